"""The selective scan's two codes for CPUs, compiled loops and torch: each against the definition, and their threads."""

import importlib
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

import zoo
from zoo.kernels import _backend, backend, selective_scan, selective_scan_fn
from zoo.kernels.selective_scan import cpu, cpu_torch, reference

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
SIXTEEN_BITS = {"u", "delta", "B", "C", "z"}  # in mixed precision; the others stay float32
WHY_NO_LOOPS = _backend.why_no_compiled_loops()
needs_loops = pytest.mark.skipif(WHY_NO_LOOPS is not None, reason=str(WHY_NO_LOOPS))
CODES = ["cpu_torch", pytest.param("cpu_numba", marks=needs_loops)]


def code(name: str) -> ModuleType:
    return importlib.import_module(f"zoo.kernels.selective_scan.{name}")


@dataclass(frozen=True)
class Case:
    """Sizes and options of a call. ``walk`` is none, complete (a permutation) or partial (with holes and an end)."""

    batch: int = 2
    L: int = 37
    D: int = 40
    N: int = 4
    K: int = 1
    G: int = 1
    walk: str = "none"
    softplus: bool = True
    window: int = 1
    shared_u: bool = False
    given: tuple[str, ...] = ("D", "z", "delta_bias", "initial_state")

    def inputs(self, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor | None]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        K, L, D, N = self.K, self.L, self.D, self.N
        tensors = dict(
            u=normal(self.batch, 1 if self.shared_u else K, L, D) * scale,
            delta=normal(self.batch, K, L, D) if self.softplus else torch.rand(self.batch, K, L, D).double() * 0.5,
            A=-normal(K, D, N).abs() - 0.1,
            B=normal(self.batch, K, L, self.G, N),
            C=normal(self.batch, K, L, self.G, N),
            D=normal(K, D),
            z=normal(self.batch, L, D),
            delta_bias=normal(K, D).abs() * 0.3,
            initial_state=normal(self.batch, K, D, N),
        )
        given = {*NAMES[:5], *self.given}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [x.to(dtype if n in SIXTEEN_BITS else wide) if n in given else None for n, x in tensors.items()]

    def options(self) -> list:
        """What follows the tensors in the arguments of a backend."""
        table = None
        if self.walk != "none":
            orders = self.K // 2 or 1  # with K paths every order is walked twice
            table = torch.stack([torch.randperm(self.L) for _ in range(orders)])
        if self.walk == "partial":
            table[:, self.L // 2] = -1
            table[0, self.L - self.L // 3 :] = -2
        return [table, self.softplus, [k % 2 == 1 for k in range(self.K)], self.window, self.walk == "complete", False]


CASES = {
    "plain": Case(),
    "bare": Case(given=(), softplus=False),
    "one_channel": Case(D=1, N=3),
    "one_token": Case(L=1, N=1),
    "tiles": Case(batch=1, D=100, N=16, K=2),
    "slabs": Case(batch=3, L=19, D=353, N=5, K=2),
    "groups": Case(D=66, G=3, N=16, K=2),
    "wide_groups": Case(batch=5, L=18, D=268, G=2, N=2),
    "narrow_groups": Case(D=12, G=6),
    "shared": Case(D=33, N=1, K=4, walk="complete", shared_u=True, given=("D", "delta_bias")),
    "complete": Case(K=4, walk="complete"),
    "partial": Case(K=2, walk="partial", given=("z", "initial_state")),
    "partial_shared": Case(L=50, K=4, walk="partial", shared_u=True),
    "window": Case(window=8, K=2, G=2),
    "partial_window": Case(window=16, K=2, walk="partial"),
}


def results(module: ModuleType, inputs: list, options: list, cotangents: list[Tensor]) -> dict[str, Tensor]:
    """Output, last state and all gradients of a module with the functions of a backend."""
    out, last_state, states = module.forward(*inputs, *options, True)
    grad_out, grad_last_state = cotangents[0].to(out.dtype), cotangents[1].to(last_state.dtype)
    grads = module.backward(grad_out, grad_last_state, states, *inputs, *options)
    names = [name for name, x in zip(NAMES, inputs, strict=True) if x is not None]
    return dict(out=out, last_state=last_state, **{f"d{name}": g for name, g in zip(names, grads, strict=True)})


def cotangents_for(case: Case) -> list[Tensor]:
    return [torch.randn(case.batch, case.L, case.D).double(), torch.randn(case.batch, case.K, case.D, case.N).double()]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within ``tolerance`` of the expected one, relative to its largest entry."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        error, largest = (got[name].double() - x).abs().max().item(), x.abs().max().item()
        assert error <= tolerance * largest + 1e-12, f"{name}: error {error:.2e}, largest entry {largest:.2e}"


def check(name: str, case: Case, dtype: torch.dtype, tolerance: float, scale: float = 1.0) -> dict[str, Tensor]:
    inputs, options, cotangents = case.inputs(dtype, scale), case.options(), cotangents_for(case)
    exact = [None if x is None else x.double() for x in inputs]
    got = results(code(name), inputs, options, cotangents)
    assert_close(got, results(reference, exact, options, cotangents), tolerance)
    return got


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("case_name", CASES)
def test_equals_definition(name, case_name):
    check(name, CASES[case_name], torch.float32, 1e-5)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("case_name", ["tiles", "groups", "partial_shared", "window"])
def test_sixteen_bits(name, dtype, tolerance, case_name):
    got = check(name, CASES[case_name], dtype, tolerance)
    assert got["out"].dtype == got["du"].dtype == dtype
    assert got["last_state"].dtype == got["dA"].dtype == torch.float32


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("N", [1, 2, 7, 17])
@pytest.mark.parametrize("D", [31, 32, 65])
@pytest.mark.parametrize("L", [15, 16, 33])
def test_sizes_around_a_vector_and_a_chunk(name, N, D, L):
    check(name, Case(batch=1, L=L, D=D, N=N), torch.float32, 1e-5)


@pytest.mark.parametrize("name", CODES)
def test_large_inputs_over_many_steps(name):
    check(name, Case(batch=1, L=2048, D=20, K=2), torch.float32, 1e-4, scale=50.0)


@pytest.mark.parametrize("name", CODES)
def test_a_table_without_steps_gives_the_skip_of_nothing(name):
    case = Case(K=1)
    inputs, cotangents = case.inputs(torch.float32), cotangents_for(case)
    options = [torch.full((1, 5), -2), True, [False], 1, False, False]
    got = results(code(name), inputs, options, cotangents)
    assert torch.equal(got["last_state"], inputs[-1]) and not got["out"].any()
    assert torch.equal(got["dinitial_state"].double(), cotangents[1].float().double())
    assert not any(got[f"d{x}"].any() for x in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))


@pytest.mark.parametrize("name", CODES)
def test_states_lie_in_memory_as_promised(name):
    case = CASES["partial"]
    inputs, options = case.inputs(torch.float32), case.options()
    got = results(code(name), inputs, options, cotangents_for(case))
    assert got["out"].is_contiguous() and got["last_state"].transpose(2, 3).is_contiguous()
    _, _, states = code(name).forward(*inputs, *options, True)
    assert states.shape == (2, 2, 3, 4, 40) and torch.isfinite(states).all()
    assert code(name).forward(*inputs, *options, False)[2].shape == (2, 2, 0, 4, 40)


def ulps(got: Tensor, exact: Tensor) -> float:
    """Largest error in units of the last place of float32 numbers."""
    return ((got.double() - exact).abs() / exact.abs()).max().item() * 2**23


def steps_of(x: Tensor) -> Tensor:
    """The compiled softplus of x: a scan with A = 0, B = C = u = 1 sums its steps."""
    ones = torch.ones(len(x), 1, 1)
    out = selective_scan(ones, x.view(-1, 1, 1), torch.zeros(1, 1), ones, ones, delta_softplus=True)
    return out.flatten()


def decays_of(x: Tensor) -> Tensor:
    """The compiled exp of x: one step of size 1, without input, from a state of 1."""
    ones, zeros = torch.ones(1, 1, len(x)), torch.zeros(1, 1, 1)
    _, last = selective_scan(
        *(ones, ones, x.view(-1, 1), zeros, zeros), initial_state=torch.ones(1, len(x), 1), return_last_state=True
    )
    return last.flatten()


@needs_loops
def test_functions_are_accurate_to_units_in_the_last_place():
    x = torch.cat([torch.linspace(-87, 88, 200_001), torch.linspace(-1e-3, 1e-3, 1001)])
    assert ulps(decays_of(x), x.double().exp()) < 2
    x = torch.linspace(-86, 100, 20_001)
    exact = torch.where(x < -30, x.double().exp(), torch.log1p(x.double().exp()))
    assert ulps(steps_of(x), exact) < 4


@needs_loops
def test_functions_at_the_end_of_the_numbers():
    x = torch.tensor([-87.5, -88.1, -104.0, -1e4, -1e30, -math.inf, 0.0, -0.0, 1e-40])
    assert decays_of(x).tolist() == [0.0] * 6 + [1.0] * 3
    assert decays_of(torch.tensor([89.0, 1e4, math.inf])).min() > 3e38
    assert decays_of(torch.tensor([math.nan])).isnan().all()
    assert steps_of(torch.tensor([-1e4, -math.inf, 1e30, math.inf])).tolist()[:2] == [0.0, 0.0]
    assert steps_of(torch.tensor([1e30, math.nan])).isnan().tolist() == [False, True]


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("delta, A", [(1e4, -1e4), (-1e4, -1.0), (50.0, -30.0), (3.0, 0.5), (88.0, -1.0)])
def test_extreme_steps_and_decays_are_finite_and_right(name, delta, A):
    case = Case(L=20, N=2, given=("D", "z"))
    inputs, options, cotangents = case.inputs(torch.float32, scale=50.0), case.options(), cotangents_for(case)
    inputs[1], inputs[2] = torch.full_like(inputs[1], delta), torch.full_like(inputs[2], A)
    got = results(code(name), inputs, options, cotangents)
    assert all(torch.isfinite(x).all() for x in got.values())
    exact = [None if x is None else x.double() for x in inputs]
    assert_close(got, results(reference, exact, options, cotangents), 1e-4)


@pytest.mark.parametrize("name", CODES)
def test_what_is_not_a_number_stays_so(name):
    for place in range(5):  # u, delta, A, B, C
        case = Case(batch=1, L=5, D=3, N=2, given=())
        inputs = case.inputs(torch.float32)
        inputs[place].view(-1)[0] = math.nan
        assert code(name).forward(*inputs, *case.options(), False)[0].isnan().any(), NAMES[place]


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "states_first"])
def test_any_strides_are_read(layout):
    """Activations in (B, D, L) memory, a step size shared by all paths, B and C in (G, N, L) memory."""
    case = CASES["groups"]
    inputs, options, cotangents = case.inputs(torch.float32), case.options(), cotangents_for(case)
    if layout == "channels_last":
        strided = [None if x is None else x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    elif layout == "expanded":
        strided = [inputs[0][:, :1].expand_as(inputs[0]), inputs[1][:, :1].expand_as(inputs[1]), *inputs[2:]]
    else:
        strided = [x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for x in inputs[3:5]]
        strided = [*inputs[:3], *strided, *inputs[5:]]
    compact = [None if x is None else x.contiguous() for x in strided]
    got, expected = (results(cpu, x, options, cotangents) for x in (strided, compact))
    assert all(torch.equal(got[key], expected[key]) for key in got)


@needs_loops
def test_which_code_runs():
    loops, u, B = code("cpu_numba"), torch.zeros(1, 1, 1, 12), torch.zeros(1, 1, 1, 1, 2)
    assert cpu.chosen(u, B) is loops and cpu.chosen(u.bfloat16(), B.bfloat16()) is loops
    assert cpu.chosen(u, B.expand(-1, -1, -1, 3, -1)) is loops
    assert cpu.chosen(u, B.expand(-1, -1, -1, 12, -1)) is cpu_torch  # every channel has its own B
    assert cpu.chosen(u.double(), B) is cpu_torch
    assert cpu.chosen(u.to("meta"), B.to("meta")) is cpu_torch
    assert "the selective scan runs in loops compiled by numba" in backend("cpu").reason


@pytest.mark.parametrize(
    "numba, reason",
    [
        (None, "faster with numba, which is not installed (pip install numba)"),
        ("raise ImportError('needs an older numpy')", "numba, which cannot be used: ImportError: needs an older numpy"),
    ],
)
def test_without_numba_torch_code_runs_and_the_reason_is_told(numba, reason, tmp_path):
    script = (
        "import importlib.util, sys, torch; from zoo.kernels import _backend, backend, selective_scan\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda *args: None if args[0] == 'numba' and {numba is None} else find(*args)\n"
        "x, b = torch.rand(1, 5, 8), torch.rand(1, 5, 2)\n"
        "print(selective_scan(x, x, -torch.rand(8, 2), b, b).shape, backend('cpu'))\n"
        "assert 'zoo.kernels.selective_scan.cpu_numba' not in sys.modules"
    )
    if numba is not None:
        (tmp_path / "numba.py").write_text(numba)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 5, 8])" in done.stdout and reason in done.stdout


LARGE = Case(batch=2, L=197, D=160, N=16, K=2, given=("D", "z", "delta_bias"))  # enough work for several threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_loops
@pytest.mark.parametrize("G", [1, 2])
def test_results_do_not_depend_on_the_number_of_threads(two_threads, G):
    case = Case(**{**LARGE.__dict__, "G": G})
    inputs, options, cotangents = case.inputs(torch.float32), case.options(), cotangents_for(case)
    several = [results(code("cpu_numba"), inputs, options, cotangents) for _ in range(3)]
    torch.set_num_threads(1)
    one = results(code("cpu_numba"), inputs, options, cotangents)
    for other in several:
        for key in one:
            assert torch.equal(one[key], other[key]), key


@needs_loops
def test_two_python_threads_may_call_at_once(two_threads):
    inputs, options, cotangents = LARGE.inputs(torch.float32), LARGE.options(), cotangents_for(LARGE)
    expected, wrong = results(cpu, inputs, options, cotangents), []

    def call() -> None:
        for _ in range(5):
            got = results(cpu, inputs, options, cotangents)
            wrong.extend(key for key in expected if not torch.equal(got[key], expected[key]))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORK = """
import multiprocessing, torch
from zoo.kernels import selective_scan
torch.set_num_threads(2)
u, delta, B = torch.randn(4, 197, 160), torch.randn(4, 197, 160), torch.randn(4, 197, 16)
A, results = -torch.rand(160, 16), multiprocessing.get_context("fork").Queue()

def scan():
    results.put(selective_scan(u, delta, A, B, B, delta_softplus=True).numpy().tobytes())

scan()  # starts the threads
child = multiprocessing.get_context("fork").Process(target=scan)
child.start()
assert results.get(timeout=60) == results.get(timeout=60)
child.join(timeout=60)
assert child.exitcode == 0
"""


@needs_loops
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_process_has_its_own_threads():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@needs_loops
def test_loops_are_compiled_where_no_cache_can_be_written():
    script = (
        "import numba.core.caching as caching\n"
        "def nowhere(self, *args): raise RuntimeError('cannot cache function: no locator available')\n"
        "caching.FunctionCache.__init__ = nowhere\n"
        "from zoo.kernels.selective_scan.cpu_loops import sum_items\n"
        "import torch; x, y = torch.ones(3, 5), torch.empty(5)\n"
        "sum_items(0, 1, 3, 5, x.data_ptr(), y.data_ptr()); print(y.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([3.0] * 5), done.stderr


@needs_loops
def test_loops_are_vector_instructions_without_calls_to_the_math_library():
    numba, loops = importlib.import_module("numba"), code("cpu_loops")
    results(code("cpu_numba"), LARGE.inputs(torch.float32), LARGE.options(), cotangents_for(LARGE))
    (signature,) = loops.backward_items.signatures  # one for all cases, so compiled once
    again = numba.njit(nogil=True, error_model="numpy")(loops.backward_items.py_func)  # kept code has no assembly
    again.compile(signature)
    (assembly,) = again.inspect_asm().values()
    assert not re.search(r"\b(expf?|logf?|fmaf?|exp2f?)\b", assembly)
    if "AVX2" in torch.backends.cpu.get_cpu_capability() or "AVX512" in torch.backends.cpu.get_cpu_capability():
        assert len(re.findall(r"vfmadd\w+ps\s.*%[yz]mm", assembly)) > 50
        assert not re.search(r"vfmadd\w+ss\s", assembly)


@pytest.mark.parametrize("name", CODES)
def test_a_model_gives_the_same_with_either_code(name, monkeypatch):
    model, images = zoo.create_model("vim_micro").eval(), torch.randn(2, 3, 32, 32)
    with zoo.use_backend("reference"):
        expected = model(images)
        gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    monkeypatch.setattr(cpu, "chosen", lambda u, B: code(name))
    got = model(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), list(model.parameters())), gradients, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", CODES)
def test_the_drop_in_gives_the_same_with_either_code(name, monkeypatch):
    u, delta, z = torch.randn(3, 2, 24, 35).unbind(0)  # (B, D, L)
    B, C = torch.randn(2, 2, 2, 8, 35).unbind(0)  # (B, G, N, L)
    inputs = [x.requires_grad_() for x in (u, delta, -torch.rand(24, 8), B, C, torch.rand(24), z)]
    with zoo.use_backend("reference"):
        expected = selective_scan_fn(*inputs, delta_softplus=True)
        gradients = torch.autograd.grad(expected.square().sum(), inputs)
    monkeypatch.setattr(cpu, "chosen", lambda u, B: code(name))
    got = selective_scan_fn(*inputs, delta_softplus=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), inputs), gradients, rtol=1e-3, atol=1e-3)
