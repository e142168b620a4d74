"""SSD: every backend against the step-by-step definition, outputs and all gradients."""

import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import selective_scan, ssd, use_backend
from zoo.kernels.ssd.op import CHUNK
from zoo.kernels.ssd.reference import ssd_reference

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
ACTIVATIONS = ("x", "dt", "B", "C")  # may be 16-bit; the others stay float32
EVERYTHING = ("A", "D", "dt_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call of the op."""

    batch: int
    L: int
    H: int
    P: int
    N: int
    K: int = 1
    G: int = 1
    shared_x: bool = False
    table: bool = False
    softplus: bool = True
    first_reversed: bool = False
    optional: tuple[str, ...] = EVERYTHING

    def inputs(self, dtype: torch.dtype, device: str, scale: float = 1.0) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tensors = dict(
            x=normal(self.batch, 1 if self.shared_x else self.K, self.L, self.H, self.P) * scale,
            dt=normal(self.batch, self.K, self.L, self.H) * 0.5 - 1.0,
            A=-normal(self.K, self.H).abs() - 0.1,
            B=normal(self.batch, self.K, self.L, self.G, self.N),
            C=normal(self.batch, self.K, self.L, self.G, self.N),
            D=normal(self.K, self.H),
            dt_bias=normal(self.K, self.H) * 0.3,
            initial_state=normal(self.batch, self.K, self.H, self.P, self.N),
        )
        if "A" not in self.optional:
            tensors["dt"] = -tensors["dt"].abs()
        elif not self.softplus:
            tensors["dt"], tensors["dt_bias"] = tensors["dt"].abs() * 0.3, tensors["dt_bias"].abs()
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            name: None
            if name in EVERYTHING and name not in self.optional
            else t.to(device, dtype if name in ACTIVATIONS else exact).requires_grad_()
            for name, t in tensors.items()
        }

    def paths(self, device: str) -> Tensor | None:
        """Random partial orders with a zero token in the middle and steps past the end of the path."""
        if not self.table:
            return None
        generator = torch.Generator().manual_seed(1)
        table = torch.full((self.K, self.L), -2)
        for k in range(self.K):
            visited = self.L - self.L // 4 - k
            table[k, :visited] = torch.randperm(self.L, generator=generator)[:visited]
            table[k, self.L // 2] = -1
        return table.to(device)

    @property
    def reverse(self) -> list[bool]:
        return [k % 2 == (0 if self.first_reversed else 1) for k in range(self.K)]


CASES = {
    "plain": Case(2, 5, 3, 6, 4, optional=("A",)),
    "chunks": Case(2, 2 * CHUNK + 7, 2, 5, 3),
    "reversed": Case(1, CHUNK + 9, 2, 4, 5, first_reversed=True),
    "bidirectional": Case(1, CHUNK + 5, 4, 3, 3, K=2, G=2),
    "bidirectional_shared": Case(2, CHUNK + 5, 4, 3, 3, K=2, shared_x=True),
    "table": Case(1, CHUNK + 39, 2, 5, 4, K=2, G=2, table=True),
    "cross": Case(2, 49, 4, 2, 1, K=4, shared_x=True, table=True, optional=("A", "D", "dt_bias")),
    "one_table": Case(1, CHUNK + 40, 2, 2, 3, table=True, first_reversed=True),
    "log_decay": Case(1, CHUNK + 9, 4, 3, 2, K=3, G=2, softplus=False, optional=("D", "initial_state")),
    "log_decay_table": Case(1, 30, 4, 3, 2, K=2, table=True, softplus=False, optional=()),
    "steps_as_given": Case(1, 9, 4, 2, 2, K=3, shared_x=True, softplus=False),
    "group_per_head": Case(1, 9, 4, 3, 4, G=4, optional=("A", "D", "initial_state")),
    "exact_chunks": Case(1, 2 * CHUNK, 2, 4, 4),
    "one_token": Case(1, 1, 2, 3, 2, optional=("A", "D")),
}
# The interpreter takes seconds a case.
INTERPRETED = ("plain", "chunks", "reversed", "bidirectional_shared", "table", "cross", "one_table", "log_decay")

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]


def arguments(case: Case, inputs: dict) -> tuple:
    """Arguments of the op and of the definition."""
    device = str(inputs["x"].device)
    softplus = case.softplus and inputs["A"] is not None
    return (*(inputs[name] for name in NAMES), case.paths(device), softplus, case.reverse)


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict, cotangents: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Output, last state and the gradients of both, weighted with the cotangents."""
    out, last_state = outputs
    given = {name: t for name, t in inputs.items() if t is not None}
    loss = (out.double() * cotangents[0]).sum() + (last_state.double() * cotangents[1]).sum()
    grads = torch.autograd.grad(loss, list(given.values()))
    return dict(out=out, last_state=last_state, **dict(zip(given, grads, strict=True)))


def run_op(case: Case, inputs: dict, cotangents: tuple[Tensor, Tensor], backend_name: str) -> dict[str, Tensor]:
    """Output, last state and all gradients by the op."""
    with use_backend(backend_name):
        return gradients(torch.ops.zoo.ssd(*arguments(case, inputs)), inputs, cotangents)


def in_float64(inputs: dict) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.detach().double().requires_grad_() for name, t in inputs.items()}


def run_reference(case: Case, inputs: dict, cotangents: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The same in float64 by autograd through the definition."""
    exact = in_float64(inputs)
    return gradients(ssd_reference(*arguments(case, exact)), exact, cotangents)


def cotangents_for(case: Case, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    out = torch.randn(case.batch, case.L, case.H, case.P, generator=generator, dtype=torch.float64)
    state = torch.randn(case.batch, case.K, case.H, case.P, case.N, generator=generator, dtype=torch.float64)
    return out.to(device), state.to(device)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within ``tolerance`` of the expected one, relative to its largest entry.

    Gradients of A and dt_bias are sums over the tokens and may cancel: their error is also measured by one addend.
    """
    assert got.keys() == expected.keys()
    for name in expected:
        error = (got[name].double() - expected[name]).abs().max()
        largest = expected[name].abs().max()
        if name in ("A", "dt_bias") and expected.get("dt") is not None:
            largest = torch.maximum(largest, expected["dt"].abs().max())
        assert error <= tolerance * largest + 1e-12, f"{name}: error {error:.2e}, largest entry {largest:.2e}"


def backends_and_cases() -> list:
    params = [pytest.param(name, "cpu", case) for name in ("cpu", "reference") for case in CASES]
    params += [pytest.param("triton", "cpu", case, marks=pytest.mark.interpreted) for case in INTERPRETED]
    params += [pytest.param(name, "cuda", case, marks=pytest.mark.gpu) for name in ("triton", "cpu") for case in CASES]
    return params


@pytest.mark.parametrize("backend_name, device, case_name", backends_and_cases())
def test_equals_definition_in_float64(backend_name, device, case_name):
    case = CASES[case_name]
    inputs, cotangents = case.inputs(torch.float64, device), cotangents_for(case, device)
    assert_close(run_op(case, inputs, cotangents, backend_name), run_reference(case, inputs, cotangents), 1e-9)


@pytest.mark.parametrize("case_name", ["chunks", "bidirectional_shared", "table", "log_decay"])
@pytest.mark.parametrize("cached", [1, 1 << 13])
def test_tensor_code_takes_samples_and_chunks_in_pieces(case_name, cached, monkeypatch):
    """One or few at a time; all of the other tests' inputs fit the cache at once."""
    from zoo.kernels.ssd import cpu

    monkeypatch.setattr(cpu, "CACHED", cached)
    monkeypatch.setattr(cpu, "CACHED_STATES", cached)
    case = CASES[case_name]
    inputs, cotangents = case.inputs(torch.float64, "cpu"), cotangents_for(case, "cpu")
    assert_close(run_op(case, inputs, cotangents, "cpu"), run_reference(case, inputs, cotangents), 1e-9)


def test_tensor_code_leaves_the_initial_state_alone():
    """Whatever its strides are: the walk works on a copy in place."""
    case = CASES["bidirectional"]
    inputs = {n: None if t is None else t.detach() for n, t in case.inputs(torch.float64, "cpu").items()}
    expected = ssd_reference(*arguments(case, inputs))
    kept = inputs["initial_state"].clone()
    for state in (inputs["initial_state"], kept.transpose(3, 4).contiguous().transpose(3, 4)):
        got = torch.ops.zoo.ssd(*arguments(case, {**inputs, "initial_state": state}))
        torch.testing.assert_close(got, expected)
        assert torch.equal(state, kept)


@pytest.mark.interpreted
def test_triton_walks_whole_paths_or_regions(monkeypatch):
    """Where heads and batch fill a GPU a path is one region; the other tests have so few that each chunk is one."""
    from zoo.kernels.ssd import triton_bwd, triton_common

    for programs in (1, 10):
        monkeypatch.setattr(triton_common, "PROGRAMS", programs)
        monkeypatch.setattr(triton_bwd, "PROGRAMS", programs)
        for case_name in ("chunks", "table"):
            case = CASES[case_name]
            inputs, cotangents = case.inputs(torch.float64, "cpu"), cotangents_for(case, "cpu")
            assert_close(run_op(case, inputs, cotangents, "triton"), run_reference(case, inputs, cotangents), 1e-9)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 1e-2)])
def test_triton_precision(dtype, tolerance):
    """Not in bfloat16, whose products Triton 3.8's interpreter gets wrong."""
    case = CASES["bidirectional_shared"]
    inputs, cotangents = case.inputs(dtype, "cpu"), cotangents_for(case, "cpu")
    assert_close(run_op(case, inputs, cotangents, "triton"), run_reference(case, inputs, cotangents), tolerance)


@pytest.mark.interpreted
def test_wide_offsets(monkeypatch):
    """Tensors whose rows do not fit 32-bit offsets take 64-bit ones; forced here, as such tensors have gigabytes."""
    tl = pytest.importorskip("triton.language")
    from zoo.kernels.ssd import triton_common

    assert triton_common.offset_type(16384, 10240, 32) == tl.int32
    assert triton_common.offset_type(1 << 20, 4096, 32) == tl.int64
    monkeypatch.setattr(triton_common, "offset_type", lambda *_: tl.int64)
    case = CASES["one_table"]
    inputs, cotangents = case.inputs(torch.float64, "cpu"), cotangents_for(case, "cpu")
    assert_close(run_op(case, inputs, cotangents, "triton"), run_reference(case, inputs, cotangents), 1e-9)


@pytest.mark.parametrize(
    "device, backend_name", [("cpu", "cpu"), pytest.param("cpu", "triton", marks=pytest.mark.interpreted)]
)
def test_heads_too_wide_for_the_kernels(device, backend_name):
    case = Case(1, 5, 1, 300, 4)
    inputs, cotangents = case.inputs(torch.float32, device), cotangents_for(case, device)
    assert_close(run_op(case, inputs, cotangents, backend_name), run_reference(case, inputs, cotangents), 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("case_name", ["chunks", "bidirectional_shared", "cross", "log_decay", "one_token"])
def test_precision(device, dtype, tolerance, case_name):
    case = CASES[case_name]
    inputs, cotangents = case.inputs(dtype, device), cotangents_for(case, device)
    got = run_op(case, inputs, cotangents, "auto")
    assert got["out"].dtype == dtype and got["x"].dtype == dtype and got["last_state"].dtype == torch.float32
    assert_close(got, run_reference(case, inputs, cotangents), tolerance)


def run_tensor_code(case: Case, inputs: dict, cotangents: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The tensor code in float64, itself tested above: for sizes that the definition is too slow for."""
    return run_op(case, in_float64(inputs), cotangents, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("P, N", [(16, 16), (64, 64), (64, 128), (48, 24), (80, 80), (128, 128), (64, 256), (5, 3)])
@pytest.mark.parametrize("L, H, G", [(7, 1, 1), (197, 24, 1), (1030, 6, 2)])
def test_sizes_on_gpu(L, P, N, H, G, dtype, tolerance):
    case = Case(2, L, H, P, N, G=G)
    inputs, cotangents = case.inputs(dtype, "cuda"), cotangents_for(case, "cuda")
    assert_close(run_op(case, inputs, cotangents, "triton"), run_tensor_code(case, inputs, cotangents), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("options", [dict(K=2, shared_x=True), dict(K=2), dict(K=4, shared_x=True, table=True)])
def test_paths_on_gpu(options, dtype, tolerance):
    case = Case(3, 785, 6, 64, 64, **options)
    inputs, cotangents = case.inputs(dtype, "cuda"), cotangents_for(case, "cuda")
    assert_close(run_op(case, inputs, cotangents, "triton"), run_tensor_code(case, inputs, cotangents), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("batch, L, H, N", [(64, 784, 12, 64), (8, 4096, 80, 128)])
def test_benchmarked_shapes_on_gpu(batch, L, H, N):
    """The shapes of the benchmark: whole paths as one region, heads in several parts."""
    case = Case(batch, L, H, 64, N, optional=("A", "D", "dt_bias"))
    inputs, cotangents = case.inputs(torch.bfloat16, "cuda"), cotangents_for(case, "cuda")
    got = run_op(case, inputs, cotangents, "triton")
    exact = {name: None if t is None else t.detach().float().requires_grad_() for name, t in inputs.items()}
    assert_close(got, run_op(case, exact, cotangents, "cpu"), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("L", [1, 16384])
def test_long_and_large_inputs_stay_finite_and_right(L):
    case = Case(1, L, 2, 32, 16)
    inputs, cotangents = case.inputs(torch.bfloat16, "cuda", scale=50.0), cotangents_for(case, "cuda")
    got = run_op(case, inputs, cotangents, "auto")
    assert all(torch.isfinite(t).all() for t in got.values())
    assert_close(got, run_tensor_code(case, inputs, cotangents), 2e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case", [Case(2, 197, 24, 16, 16, K=2), Case(1, 100, 4, 32, 16, K=2, shared_x=True, table=True)]
)
def test_gradients_are_bit_equal_in_two_runs(device, case):
    inputs, cotangents = case.inputs(torch.bfloat16, device), cotangents_for(case, device)
    first, second = (run_op(case, inputs, cotangents, "auto") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "backend_name, device",
    [("cpu", "cpu"), ("reference", "cpu"), pytest.param("auto", *GPU.values, marks=pytest.mark.gpu)],
)
def test_autocast_does_not_narrow_the_sums(backend_name, device):
    case = CASES["bidirectional"]
    inputs, cotangents = case.inputs(torch.float32, device), cotangents_for(case, device)
    with torch.autocast(device, torch.bfloat16):
        got = run_op(case, inputs, cotangents, backend_name)
    assert_close(got, run_reference(case, inputs, cotangents), 1e-4)


def test_tensor_code_trains_ten_times_as_fast_as_the_steps():
    """Against a loop over tokens that autograd differentiates, which is what the definition is."""
    case = Case(1, 784, 6, 32, 32, optional=("A", "D", "dt_bias"))
    inputs, cotangents = case.inputs(torch.float32, "cpu"), cotangents_for(case, "cpu")

    def seconds(run, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            gradients(run(*arguments(case, inputs)), inputs, cotangents)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(ssd_reference, 1) > 10 * seconds(torch.ops.zoo.ssd, 3)


def test_a_decay_of_one_state_is_the_selective_scan():
    """With one number of decay per head, the selective scan and SSD are the same function."""
    B_, L, H, P, N = 2, 70, 3, 4, 5
    x, dt, A = torch.randn(B_, L, H, P), torch.rand(B_, L, H), -torch.rand(H)
    B, C = torch.randn(2, B_, L, N)
    expected = selective_scan(
        x.flatten(2), dt.repeat_interleave(P, 2), A.repeat_interleave(P)[:, None].expand(-1, N), B, C
    )
    torch.testing.assert_close(ssd(x, dt, A, B, C).flatten(2), expected, rtol=1e-4, atol=1e-5)


def test_steps_inside_or_outside():
    """exp(dt A) with dt on the input is the form without A on inputs that hold their steps."""
    x, dt, A = torch.randn(2, 70, 3, 4), torch.rand(2, 70, 3), -torch.rand(3)
    B, C = torch.randn(2, 2, 70, 5)
    inside = ssd(x, dt, A, B, C)
    torch.testing.assert_close(ssd(x * dt.unsqueeze(-1), dt * A, None, B, C), inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_reverse_is_flipping_around_the_op(device):
    case = Case(2, 90, 3, 4, 5)
    x = {n: None if t is None else t.detach() for n, t in case.inputs(torch.float32, device).items()}
    args = [x[n].squeeze(1) for n in ("x", "dt", "B", "C")]
    A, D, bias = (x[n][0] for n in ("A", "D", "dt_bias"))
    backwards = ssd(*args[:2], A, *args[2:], D, bias, dt_softplus=True, reverse=True)
    flipped = [t.flip(1) for t in args]
    expected = ssd(*flipped[:2], A, *flipped[2:], D, bias, dt_softplus=True).flip(1)
    torch.testing.assert_close(backwards, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_table_is_gathering_around_the_op(device):
    x = Case(2, 90, 3, 4, 5).inputs(torch.float32, device)
    args = [x[n].squeeze(1).detach() for n in ("x", "dt", "B", "C")]
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3)).to(device)
    by_table = ssd(*args[:2], x["A"][0], *args[2:], paths=order, dt_softplus=True)
    gathered = [t[:, order] for t in args]
    by_copy = ssd(*gathered[:2], x["A"][0], *gathered[2:], dt_softplus=True)
    torch.testing.assert_close(by_table[:, order], by_copy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_two_halves_chained_by_the_state_equal_the_whole(device):
    x = Case(2, 190, 3, 4, 5).inputs(torch.float32, device)
    args = [x[n].squeeze(1) for n in ("x", "dt", "B", "C")]
    A = x["A"][0]
    whole, last = ssd(*args[:2], A, *args[2:], dt_softplus=True, return_last_state=True)
    state, parts = None, []
    for half in (slice(0, 77), slice(77, 190)):
        piece = [t[:, half] for t in args]
        out, state = ssd(*piece[:2], A, *piece[2:], dt_softplus=True, initial_state=state, return_last_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(whole.square().sum(), (x["x"], x["A"]), retain_graph=True)
    got = torch.autograd.grad(torch.cat(parts, 1).square().sum(), (x["x"], x["A"]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "device, backend_name",
    [
        ("cpu", "cpu"),
        pytest.param("cpu", "triton", marks=pytest.mark.interpreted),
        pytest.param("cuda", "triton", marks=pytest.mark.gpu),
    ],
)
def test_views_are_read_in_place(device, backend_name):
    """Parts of one projection, tokens of a transposed layout, and inputs expanded over paths."""
    B_, L, H, P, N = 2, 21, 4, 8, 4
    projection = torch.randn(B_, L, H * P + 2 * N + H, device=device)
    x, B, C, dt = projection.split([H * P, N, N, H], dim=-1)
    A = -torch.rand(2, H, device=device)
    views = [x.unflatten(-1, (H, P)), dt.unsqueeze(1).expand(-1, 2, -1, -1)]
    views += [t.unsqueeze(1).expand(-1, 2, -1, -1) for t in (B, C)]
    turned = views[0].transpose(0, 1).contiguous().transpose(0, 1)
    with use_backend(backend_name):
        got = ssd(turned, views[1], A, *views[2:], reverse=[False, True], dt_softplus=True)
        compact = [t.contiguous() for t in views]
        expected = ssd(*compact[:2], A, *compact[2:], reverse=[False, True], dt_softplus=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case_name", ["plain", "cross", "log_decay"])
def test_torch_accepts_the_op(device, case_name):
    case = CASES[case_name]
    torch.library.opcheck(torch.ops.zoo.ssd.default, arguments(case, case.inputs(torch.float32, device)))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_and_exports(device):
    x = CASES["bidirectional"].inputs(torch.float32, device)

    class Scan(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            return ssd(x, dt, A, B, C, reverse=[False, True], dt_softplus=True) * 2

    args = tuple(x[name] for name in ("x", "dt", "A", "B", "C"))
    eager = Scan()(*args)
    compiled = torch.compile(Scan(), fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")(*args)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), args), torch.autograd.grad(eager.sum(), args), rtol=1e-5, atol=1e-5
    )
    exported = torch.export.export(Scan(), tuple(t.detach() for t in args))
    torch.testing.assert_close(exported.module()(*(t.detach() for t in args)), eager.detach())


def test_meta_device_gives_shapes():
    x, dt, A = (torch.empty(*shape, device="meta") for shape in ((2, 7, 4, 6), (2, 7, 4), (4,)))
    B = torch.empty(2, 7, 3, device="meta")
    out, last = ssd(x, dt, A, B, B, return_last_state=True)
    assert out.shape == (2, 7, 4, 6) and last.shape == (2, 4, 6, 3)


def test_flops_are_counted():
    x, dt, A = torch.randn(2, 7, 4, 6, requires_grad=True), torch.rand(2, 7, 4), -torch.rand(4)
    B = torch.randn(2, 7, 2, 3)
    with FlopCounterMode(display=False) as counter:
        ssd(x, dt, A, B, B).sum().backward()
    forward = 2 * 2 * 7 * (2 * CHUNK * 3 + 4 * (CHUNK * 6 + 2 * 6 * 3))
    assert counter.get_total_flops() == 4 * forward  # the forward, and three times that backward


def good_inputs() -> dict:
    return dict(
        x=torch.randn(2, 7, 4, 6), dt=torch.rand(2, 7, 4), A=-torch.rand(4), B=torch.randn(2, 7, 3),
        C=torch.randn(2, 7, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dt=torch.randn(2, 6, 4)), r"dt must have shape .* = \(2, 1, 7, 4\), got \(2, 1, 6, 4\)"),
        (dict(A=torch.randn(5)), r"A must have shape \(K, H\) = \(1, 4\), got \(1, 5\)"),
        (dict(C=torch.randn(2, 7, 2)), r"C must have shape"),
        (dict(D=torch.ones(3)), r"D must have shape"),
        (dict(initial_state=torch.ones(2, 4, 6, 2)), r"initial_state must have shape"),
        (dict(x=torch.randn(2, 7, 24)), r"x has 3 dimensions, expected 4"),
        (dict(B=torch.randn(7, 3)), r"B has 2 dimensions, expected 3 or 4"),
        (dict(x=torch.zeros(2, 7, 4, 6, dtype=torch.int64)), r"x is torch.int64"),
        (dict(A=torch.zeros(4, dtype=torch.complex64)), r"A is torch.complex64"),
        (dict(B=torch.randn(2, 7, 3, 3), C=torch.randn(2, 7, 3, 3)), r"4 heads do not divide into 3 groups"),
        (dict(A=None, dt_softplus=True), r"without A, dt is the log decay itself"),
        (dict(paths=torch.zeros(7)), r"int32 or int64 table"),
        (dict(paths=torch.full((7,), 7)), r"paths names token 7"),
        (dict(reverse=[True, False]), r"reverse has 2 flags for 1 path"),
        (dict(D=torch.empty(4, device="meta")), r"D is on meta but x is on cpu"),
        (
            dict(x=torch.randn(2, 0, 4, 6), dt=torch.randn(2, 0, 4), B=torch.randn(2, 0, 3), C=torch.randn(2, 0, 3)),
            "empty",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ssd(**{**good_inputs(), **change})
