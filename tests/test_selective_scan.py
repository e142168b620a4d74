"""The selective scan: every backend against the step-by-step definition, outputs and all gradients."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import selective_scan, selective_scan_fn, use_backend
from zoo.kernels.selective_scan.op import CHUNK
from zoo.kernels.selective_scan.reference import selective_scan_reference

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
ACTIVATIONS = ("u", "delta", "B", "C", "z")  # may be 16-bit; the others stay float32


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call of the op."""

    batch: int
    L: int
    D: int
    N: int
    K: int = 1
    G: int = 1
    shared_u: bool = False
    table: bool = False
    complete: bool = False
    partition: bool = False
    softplus: bool = True
    window: int = 1
    optional: tuple[str, ...] = ("D", "z", "delta_bias")

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tensors = dict(
            u=normal(self.batch, 1 if self.shared_u else self.K, self.L, self.D) * scale,
            delta=normal(self.batch, self.K, self.L, self.D) * 0.5,
            A=-normal(self.K, self.D, self.N).abs() - 0.1,
            B=normal(self.batch, self.K, self.L, self.G, self.N),
            C=normal(self.batch, self.K, self.L, self.G, self.N),
            D=normal(self.K, self.D),
            z=normal(self.batch, self.L, self.D),
            delta_bias=normal(self.K, self.D) * 0.3,
            initial_state=normal(self.batch, self.K, self.D, self.N),
        )
        if not self.softplus:
            tensors["delta"] = tensors["delta"].abs() * 0.3
            tensors["delta_bias"] = tensors["delta_bias"].abs()
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            name: None
            if name in ("D", "z", "delta_bias", "initial_state") and name not in self.optional
            else x.to(device, dtype if name in ACTIVATIONS else exact).requires_grad_()
            for name, x in tensors.items()
        }

    def paths(self, device: str) -> Tensor | None:
        """Random orders: partial ones with a zero token in the middle and steps past the end, or complete ones.

        Those of a partition have a zero token, and steps past the end, unless they are equally long.
        """
        if not self.table:
            return None
        generator = torch.Generator().manual_seed(1)
        if self.complete:  # every order is walked by K / U paths
            orders = max(1, self.K // 2)
            return torch.stack([torch.randperm(self.L, generator=generator) for _ in range(orders)]).to(device)
        if self.partition:
            parts = torch.randperm(self.L, generator=generator).tensor_split(self.K)
            if self.L % self.K == 0:
                return torch.stack(parts).to(device)
            table = torch.full((self.K, len(parts[0]) + 2), -2)
            for row, part in zip(table, parts, strict=True):
                row[: len(part) + 1] = torch.cat([part[:1], torch.tensor([-1]), part[1:]])
            return table.to(device)
        table = torch.full((self.K, self.L), -2)
        for k in range(self.K):
            visited = self.L - self.L // 4
            table[k, :visited] = torch.randperm(self.L, generator=generator)[:visited]
            table[k, self.L // 2] = -1
        return table.to(device)

    @property
    def reverse(self) -> list[bool]:
        if self.complete:
            return [k >= self.K // 2 for k in range(self.K)]
        return [k % 2 == 1 for k in range(self.K)]


CASES = {
    "plain": Case(2, 5, 6, 4),
    "chunks": Case(2, 2 * CHUNK + 7, 5, 3, optional=("D", "z", "delta_bias", "initial_state")),
    "bidirectional": Case(1, CHUNK + 5, 12, 3, K=2, G=2, optional=("D", "z", "delta_bias", "initial_state")),
    "table": Case(1, 39, 10, 4, K=2, table=True, optional=("D", "z", "delta_bias", "initial_state")),
    "cross": Case(2, 49, 8, 1, K=4, shared_u=True, table=True, optional=("D", "delta_bias")),
    "one_table": Case(1, 20, 4, 2, table=True, optional=("z",)),
    "bare": Case(1, 9, 4, 1, K=3, G=2, shared_u=True, softplus=False, optional=()),
    "group_per_channel": Case(1, 9, 8, 4, G=8, optional=("D", "initial_state")),
    "window": Case(1, CHUNK + 13, 6, 3, K=2, window=8, optional=("D", "z", "delta_bias", "initial_state")),
    "window_table": Case(2, 21, 5, 4, K=2, G=5, table=True, window=4, optional=("D", "z", "delta_bias")),
    "one_token": Case(1, 1, 3, 2, optional=("D",)),
    "matrix": Case(1, CHUNK + 3, 37, 16, optional=("D", "z", "delta_bias")),
    "regions": Case(1, 4 * CHUNK + 9, 5, 3, K=2, optional=("D", "z", "delta_bias", "initial_state")),
    "regions_orders": Case(1, 4 * CHUNK + 9, 6, 1, K=4, shared_u=True, table=True, complete=True),
    "regions_window": Case(1, 4 * CHUNK + 9, 3, 12, K=2, window=8, optional=("D", "z", "initial_state")),
    "regions_table": Case(1, 4 * CHUNK + 9, 3, 2, K=2, table=True, optional=("z", "initial_state")),
    "orders": Case(2, 15, 5, 9, K=4, table=True, complete=True),
    "partition": Case(2, 40, 6, 3, K=4, shared_u=True, table=True, partition=True),
    "partition_uneven": Case(1, 39, 5, 4, K=2, table=True, partition=True, optional=("D", "z", "initial_state")),
    "partition_single": Case(1, 11, 5, 1, table=True, partition=True),
    "partition_window": Case(1, 38, 5, 16, K=4, shared_u=True, table=True, partition=True, window=4, optional=("D",)),
    "regions_partition": Case(1, 8 * CHUNK + 19, 3, 2, K=2, shared_u=True, table=True, partition=True),
}
INTERPRETED = (
    "window_table",
    "plain",
    "bidirectional",
    "table",
    "one_table",
    "bare",
    "matrix",
    "regions",
    "regions_orders",
    "regions_window",
    "regions_table",
    "orders",
    "partition",
    "partition_uneven",
    "regions_partition",
)  # the interpreter takes seconds a case

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]


def run_op(case: Case, inputs: dict, cotangents: tuple, backend_name: str, for_backward: str = "") -> dict[str, Tensor]:
    """Output, last state and all gradients by the op."""
    given = {name: x for name, x in inputs.items() if x is not None}
    with use_backend(backend_name):
        table, inputs_in_order = case.paths(str(inputs["u"].device)), [inputs[name] for name in NAMES]
        out, last_state, _ = torch.ops.zoo.selective_scan(
            *inputs_in_order, table, case.softplus, case.reverse, case.window, case.complete,
            case.partition, True,
        )  # fmt: skip
    loss = (out.double() * cotangents[0]).sum() + (last_state.double() * cotangents[1]).sum()
    with use_backend(for_backward or backend_name):
        grads = torch.autograd.grad(loss, list(given.values()))
    return dict(out=out, last_state=last_state, **dict(zip(given, grads, strict=True)))


def run_reference(case: Case, inputs: dict, cotangents: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The same in float64 by autograd through the definition."""
    exact = {n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
    given = {name: x for name, x in exact.items() if x is not None}
    out, last_state, _ = selective_scan_reference(
        *(exact[name] for name in NAMES), case.paths(str(inputs["u"].device)), case.softplus, case.reverse, case.window
    )
    loss = (out * cotangents[0]).sum() + (last_state * cotangents[1]).sum()
    grads = torch.autograd.grad(loss, list(given.values()))
    return dict(out=out, last_state=last_state, **dict(zip(given, grads, strict=True)))


def cotangents_for(case: Case, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    out = torch.randn(case.batch, case.L, case.D, generator=generator, dtype=torch.float64)
    state = torch.randn(case.batch, case.K, case.D, case.N, generator=generator, dtype=torch.float64)
    return out.to(device), state.to(device)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within ``tolerance`` of the expected one, relative to its largest entry."""
    assert got.keys() == expected.keys()
    for name in expected:
        error = (got[name].double() - expected[name]).abs().max()
        largest = expected[name].abs().max()
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


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("case_name", ["matrix", "regions"])
def test_precision_interpreted(dtype, tolerance, case_name):
    """float64 takes other ways than the narrower types: exact logarithms, sums without the matrix unit."""
    case = CASES[case_name]
    inputs, cotangents = case.inputs(dtype, "cpu"), cotangents_for(case, "cpu")
    assert_close(run_op(case, inputs, cotangents, "triton"), run_reference(case, inputs, cotangents), tolerance)


@pytest.mark.parametrize("forward, backward", [("reference", "cpu"), ("cpu", "reference")])
def test_backend_may_change_before_the_backward(forward, backward):
    """As it does when only the forward runs inside ``use_backend``: what one saves, another must understand."""
    case = CASES["window_table"]
    inputs, cotangents = case.inputs(torch.float64, "cpu"), cotangents_for(case, "cpu")
    assert_close(run_op(case, inputs, cotangents, forward, backward), run_reference(case, inputs, cotangents), 1e-9)


@pytest.mark.interpreted
def test_wide_offsets(monkeypatch):
    """Tensors whose rows do not fit 32-bit offsets take 64-bit ones; forced here, as such tensors have gigabytes."""
    tl = pytest.importorskip("triton.language")
    from zoo.kernels.selective_scan import triton_bwd, triton_common, triton_fwd

    assert triton_common.offset_type(16384, 10240, 32) == tl.int32
    assert triton_common.offset_type(1 << 20, 4096, 32) == tl.int64
    for module in (triton_fwd, triton_bwd):
        monkeypatch.setattr(module, "offset_type", lambda *_: tl.int64)
    case = CASES["window_table"]
    inputs, cotangents = case.inputs(torch.float64, "cpu"), cotangents_for(case, "cpu")
    assert_close(run_op(case, inputs, cotangents, "triton"), run_reference(case, inputs, cotangents), 1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize(
    "case_name", ["chunks", "bidirectional", "cross", "one_token", "matrix", "regions", "regions_orders", "orders"]
)
def test_precision(device, dtype, tolerance, case_name):
    case = CASES[case_name]
    inputs, cotangents = case.inputs(dtype, device), cotangents_for(case, device)
    got = run_op(case, inputs, cotangents, "auto")
    assert got["out"].dtype == dtype and got["u"].dtype == dtype and got["A"].dtype == torch.float32
    assert_close(got, run_reference(case, inputs, cotangents), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1, 2, 3, 4, 8, 16, 24, 32, 64])
@pytest.mark.parametrize("D, L", [(8, 7), (96, 49), (384, 197), (100, 1030)])
def test_sizes_on_gpu(N, D, L):
    case = Case(2, L, D, N)
    inputs, cotangents = case.inputs(torch.float32, "cuda"), cotangents_for(case, "cuda")
    with use_backend("cpu"):  # the tensor code in float64, itself tested against the definition above
        exact = {n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
        expected = run_op(case, exact, cotangents, "cpu")
    assert_close(run_op(case, inputs, cotangents, "triton"), expected, 1e-4)


@pytest.mark.parametrize(
    "device, L", [("cpu", 2048), *[pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (1, 16384)]]
)
def test_long_and_large_inputs_stay_finite_and_right(device, L):
    case = Case(1, L, 16, 4)
    inputs, cotangents = case.inputs(torch.bfloat16, device, scale=50.0), cotangents_for(case, device)
    got = run_op(case, inputs, cotangents, "auto")
    assert all(torch.isfinite(x).all() for x in got.values())
    exact = {n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
    assert_close(got, run_op(case, exact, cotangents, "cpu"), 3e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_bit_equal_in_two_runs(device):
    case = Case(4, 197, 96, 16, K=2)
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
    assert_close(got, run_reference(case, inputs, cotangents), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_reverse_is_a_flipped_sequence(device):
    x = CASES["chunks"].inputs(torch.float32, device)
    u, delta, B, C, z = (x[n].squeeze(1) if n != "z" else x[n] for n in ACTIVATIONS)
    rest = dict(D=x["D"][0], delta_bias=x["delta_bias"][0], delta_softplus=True)
    backwards = selective_scan(u, delta, x["A"][0], B, C, z=z, reverse=True, **rest)
    flipped = selective_scan(u.flip(1), delta.flip(1), x["A"][0], B.flip(1), C.flip(1), z=z.flip(1), **rest)
    torch.testing.assert_close(backwards, flipped.flip(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_table_reads_and_writes_where_it_points(device):
    x = CASES["chunks"].inputs(torch.float32, device)
    u, delta, B, C, z = (x[n].squeeze(1) if n != "z" else x[n] for n in ACTIVATIONS)
    order = torch.randperm(u.shape[1], generator=torch.Generator().manual_seed(3)).to(device)
    by_table = selective_scan(u, delta, x["A"][0], B, C, z=z, paths=order, delta_softplus=True)
    gathered = [t[:, order] for t in (u, delta, B, C, z)]
    by_copy = selective_scan(*gathered[:2], x["A"][0], *gathered[2:4], z=gathered[4], delta_softplus=True)
    torch.testing.assert_close(by_table[:, order], by_copy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_two_halves_chained_by_the_state_equal_the_whole(device):
    x = Case(2, 90, 8, 4).inputs(torch.float32, device)
    u, delta, B, C, z = (x[n].squeeze(1) if n != "z" else x[n] for n in ACTIVATIONS)
    A = x["A"][0]
    whole, last = selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, return_last_state=True)
    state, parts = None, []
    for half in (slice(0, 37), slice(37, 90)):
        out, state = selective_scan(
            *(t[:, half] for t in (u, delta)), A, *(t[:, half] for t in (B, C)), z=z[:, half],
            delta_softplus=True, initial_state=state, return_last_state=True,
        )  # fmt: skip
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(whole.square().sum(), (x["u"], x["A"]), retain_graph=True)
    got = torch.autograd.grad(torch.cat(parts, 1).square().sum(), (x["u"], x["A"]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_read_in_place(device):
    """Halves of one projection, tokens of a transposed layout, and inputs expanded over paths."""
    case = Case(2, 21, 8, 4, K=2, optional=("z",))
    x = case.inputs(torch.float32, device)
    projection = torch.cat([x["z"], x["z"] * 2], dim=-1).detach()
    z = projection[..., case.D :]
    u = x["u"].detach().transpose(0, 1).contiguous().transpose(0, 1)
    delta = x["delta"][:, :1].detach().expand(-1, 2, -1, -1)
    B = x["B"].detach().permute(0, 1, 2, 4, 3).contiguous().permute(0, 1, 2, 4, 3)
    args = (x["A"], B, x["C"])
    got = selective_scan(u, delta, *args, z=z, reverse=[False, True], delta_softplus=True)
    compact = selective_scan(
        u.contiguous(), delta.contiguous(), x["A"], B.contiguous(), x["C"], z=z.contiguous(),
        reverse=[False, True], delta_softplus=True,
    )  # fmt: skip
    torch.testing.assert_close(got, compact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("B_rank, C_rank", [(4, 4), (3, 3), (2, 2), (2, 4)])
def test_drop_in_accepts_every_rank_of_B_and_C(B_rank, C_rank):
    torch.manual_seed(0)
    batch, D, N, L = 2, 6, 4, 19
    shapes = {4: (batch, 1, N, L), 3: (batch, N, L), 2: (D, N)}
    B, C = (torch.randn(shapes[rank], requires_grad=True) for rank in (B_rank, C_rank))
    u, delta, z = (torch.randn(batch, D, L, requires_grad=True) for _ in range(3))
    A = -torch.rand(D, N)
    out, last = selective_scan_fn(u, delta, A, B, C, torch.ones(D), z, torch.zeros(D), True, return_last_state=True)
    full_B, full_C = (
        x[None, :, :, None].expand(batch, -1, -1, L)
        if x.dim() == 2
        else x.reshape(batch, 1, N, L).expand(-1, D, -1, -1)
        for x in (B, C)
    )  # (B, D, N, L)
    step, h, ys = torch.nn.functional.softplus(delta), torch.zeros(batch, D, N), []
    for t in range(L):
        h = torch.exp(step[:, :, t, None] * A) * h + (step * u)[:, :, t, None] * full_B[..., t]
        ys.append((h * full_C[..., t]).sum(-1))
    expected = (torch.stack(ys, -1) + u) * torch.nn.functional.silu(z)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, h, rtol=1e-4, atol=1e-5)
    inputs = (u, delta, B, C, z)
    got = torch.autograd.grad(out.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "backend_name, device",
    [
        ("cpu", "cpu"),
        pytest.param("triton", "cpu", marks=pytest.mark.interpreted),
        pytest.param("triton", *GPU.values, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("case_name", ["bidirectional", "regions_table"])
def test_gradients_lie_in_memory_as_the_compiler_was_told(backend_name, device, case_name):
    case = CASES[case_name]
    inputs, cotangents = case.inputs(torch.float32, device), cotangents_for(case, device)
    results = run_op(case, inputs, cotangents, backend_name)
    assert all(grad.is_contiguous() for name, grad in results.items() if name not in ("out", "last_state"))
    # Paths before the batch, as the products of stacked weights lie, is how the gradients of those are read too.
    for name in ("u", "delta"):
        inputs[name] = inputs[name].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    moved = run_op(case, inputs, cotangents, backend_name)
    assert all(moved[name].transpose(0, 1).is_contiguous() for name in ("u", "delta") if inputs[name].shape[1] > 1)
    torch.testing.assert_close(moved, results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case_name", ["bidirectional", "table", "bare", "partition_uneven"])
def test_opcheck(device, case_name):
    case = CASES[case_name]
    inputs = case.inputs(torch.float32, device)
    args = (
        *(inputs[name] for name in NAMES),
        case.paths(device),
        case.softplus,
        case.reverse,
        case.window,
        case.complete,
        case.partition,
        True,
    )
    torch.library.opcheck(torch.ops.zoo.selective_scan.default, args)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_and_exports(device):
    case = CASES["bidirectional"]
    x = case.inputs(torch.float32, device)

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C, z):
            return selective_scan(u, delta, A, B, C, z=z, reverse=[False, True], delta_softplus=True) * 2

    args = tuple(x[name] for name in ("u", "delta", "A", "B", "C", "z"))
    eager = Scan()(*args)
    compiled = torch.compile(Scan(), fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")(*args)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), args), torch.autograd.grad(eager.sum(), args), rtol=1e-5, atol=1e-5
    )
    exported = torch.export.export(Scan(), tuple(t.detach() for t in args))
    torch.testing.assert_close(exported.module()(*(t.detach() for t in args)), eager.detach())


def test_meta_device_gives_shapes():
    u = torch.empty(2, 7, 4, device="meta")
    B = torch.empty(2, 7, 3, device="meta")
    out, last = selective_scan(u, u, torch.empty(4, 3, device="meta"), B, B, return_last_state=True)
    assert out.shape == (2, 7, 4) and last.shape == (2, 4, 3)


def test_flops_are_counted():
    u, B, A = torch.randn(2, 7, 4, requires_grad=True), torch.randn(2, 7, 3), -torch.rand(4, 3)
    with FlopCounterMode(display=False) as counter:
        selective_scan(u, u, A, B, B).sum().backward()
    assert counter.get_total_flops() == 4 * 9 * 2 * 7 * 4 * 3  # the forward, and three times that backward


def good_inputs() -> dict:
    return dict(
        u=torch.randn(2, 7, 4), delta=torch.randn(2, 7, 4), A=-torch.rand(4, 3), B=torch.randn(2, 7, 3),
        C=torch.randn(2, 7, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(delta=torch.randn(2, 6, 4)), r"delta must have shape .* = \(2, 1, 7, 4\), got \(2, 1, 6, 4\)"),
        (dict(A=torch.randn(5, 3)), r"A must have shape .* = \(1, 4, 3\), got \(1, 5, 3\)"),
        (dict(C=torch.randn(2, 7, 2)), r"C must have shape"),
        (dict(z=torch.randn(2, 7, 5)), r"z must have shape \(B, L, D\) = \(2, 7, 4\), got \(2, 7, 5\)"),
        (dict(D=torch.ones(3)), r"D must have shape"),
        (dict(initial_state=torch.ones(2, 4, 2)), r"initial_state must have shape"),
        (dict(u=torch.randn(7, 4)), r"u has 2 dimensions"),
        (dict(A=torch.randn(3)), r"A has 1 dimension"),
        (dict(u=torch.zeros(2, 7, 4, dtype=torch.int64)), r"u is torch.int64"),
        (dict(A=torch.zeros(4, 3, dtype=torch.complex64)), r"A is torch.complex64"),
        (dict(B=torch.randn(2, 7, 3, 3), C=torch.randn(2, 7, 3, 3)), r"4 channels do not divide into 3 groups"),
        (dict(paths=torch.zeros(7)), r"int32 or int64 table"),
        (dict(paths=torch.full((7,), 7)), r"paths names token 7"),
        (dict(paths=torch.arange(6), complete=True), r"complete=True promises .* 6 entries, the lowest 0"),
        (dict(paths=torch.arange(6), partition=True), r"each of 7 tokens is on exactly one path; .* have 6"),
        (dict(partition=True), r"partition=True needs a row of paths for each of 1, got 0"),
        (dict(window=5), r"window must be one of 1, 2, 4, 8, 16, got 5"),
        (dict(reverse=[True, False]), r"reverse has 2 flags for 1 path"),
        (dict(z=torch.empty(2, 7, 4, device="meta")), r"z is on meta but u is on cpu"),
        (
            dict(u=torch.randn(2, 0, 4), delta=torch.randn(2, 0, 4), B=torch.randn(2, 0, 3), C=torch.randn(2, 0, 3)),
            "empty",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**good_inputs(), **change})
