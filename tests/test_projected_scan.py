"""Scans that project their own tokens: the same as the projections and the scan one after the other."""

import importlib
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from zoo.backbones.layers.ss2d import SelectivePaths
from zoo.backbones.scans import scan_paths
from zoo.kernels import dt_projection_backward, projected_scan, selective_scan, use_backend
from zoo.kernels.selective_scan import projected

checks = runpy.run_path(str(Path(__file__).with_name("op_checks.py")))
assert_close = checks["assert_close"]


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``width`` of the rows, and ``shared`` if a token's rows of all paths lie side by side."""

    batch: int
    K: int
    L: int
    E: int
    R: int
    N: int
    width: int | None = None
    shared: bool = True

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Gradients of steps (path by path in memory), B and C; rows and weights."""
        generator = torch.Generator().manual_seed(0)
        width = self.width or self.R + 2 * self.N

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        rows = normal(self.K, self.batch, self.L, width).transpose(0, 1)
        if self.shared:
            rows = normal(self.batch, self.L, self.K, width).transpose(1, 2)
        return dict(
            d_delta=normal(self.K, self.batch, self.L, self.E).transpose(0, 1),
            d_B=normal(self.batch, self.K, self.L, self.N),
            d_C=normal(self.batch, self.K, self.L, self.N),
            rows=rows,
            weight=normal(self.K, self.E, self.R),
        )


CASES = {
    "vmamba": Case(2, 4, 9, 24, 6, 1),
    "padded": Case(3, 4, 7, 16, 8, 1, width=16),
    "states": Case(2, 2, 35, 20, 3, 16, width=40, shared=False),
    "one_path": Case(1, 1, 70, 33, 17, 4),
    "one_token": Case(1, 3, 1, 1, 1, 1),
    "wide": Case(1, 1, 6, 520, 2, 1),
    "high_rank": Case(1, 2, 6, 16, 65, 2),
}
GPU_CASES = {f"stage_{i}": Case(8, 4, (112 // 2**i) ** 2, 48 * 2**i, 3 * 2**i, 1, width=16 * i) for i in (1, 2, 3, 4)}
SUBJECTS = [
    *[(backend, "cpu", name) for backend in ("cpu", "reference") for name in CASES],
    *[pytest.param("triton", "cpu", name, marks=pytest.mark.interpreted) for name in CASES],
    *[pytest.param("triton", "cuda", name, marks=pytest.mark.gpu) for name in (*CASES, *GPU_CASES)],
]


def written_down(d_delta: Tensor, d_B: Tensor, d_C: Tensor, rows: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Both gradients by autograd in float64."""
    rows, weight = (x.double().detach().requires_grad_() for x in (rows, weight))
    R, N = weight.shape[2], d_B.shape[3]
    dt, B, C, _ = rows.split([R, N, N, rows.shape[3] - R - 2 * N], dim=-1)
    delta = torch.einsum("bklr,ker->bkle", dt, weight)
    outputs, grads = (delta, B, C), [x.double() for x in (d_delta, d_B, d_C)]
    return dict(zip(("rows", "weight"), torch.autograd.grad(outputs, (rows, weight), grads), strict=True))


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("backend, device, name", SUBJECTS)
def test_backward_of_the_projection(backend, device, name, bits):
    dtype = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}[bits]
    if (backend, device, bits) == ("triton", "cpu", 16):
        dtype = torch.float16  # products of bfloat16 are what Triton 3.8's interpreter gets wrong
    inputs = {**CASES, **GPU_CASES}[name].inputs(dtype, device)
    with use_backend(backend):
        d_rows, d_weight = dt_projection_backward(**inputs)
    assert d_rows.stride() == inputs["rows"].stride() and d_weight.is_contiguous()
    expected = written_down(**inputs)
    assert_close(dict(rows=d_rows, weight=d_weight), expected, {16: 1e-2, 32: 1e-5, 64: 1e-12}[bits])


@pytest.mark.interpreted
@pytest.mark.parametrize("room", [232448, 101376, 65536, 20000])
def test_tiles_fit_in_shared_memory(room):
    """Of an H200, an RTX 4090, an MI300X, and one where torch's products have to do."""
    options = importlib.import_module("zoo.kernels.dt_projection.triton")._options
    found = {E: options(E, 16, 1, 24, room) for E in (96, 192, 384, 512)}
    assert {E: each and each["ROWS"] for E, each in found.items()} == {
        232448: {96: 64, 192: 64, 384: 32, 512: 32},
        101376: {96: 64, 192: 32, 384: 16, 512: 16},
        65536: {96: 64, 192: 32, 384: None, 512: None},
        20000: {96: 16, 192: None, 384: None, 512: None},
    }[room]


def test_operands_that_do_not_fit():
    inputs = CASES["vmamba"].inputs(torch.float32, "cpu")
    for name, wrong, problem in (
        ("weight", torch.ones(4, 23, 6), r"weight must have shape \(K, E, R\) = \(4, 24, 6\), got \(4, 23, 6\)"),
        ("d_C", torch.ones(2, 4, 9, 2), "d_C must have shape"),
        ("rows", torch.ones(2, 4, 9, 7), "rows have 7 columns; 6 of the low rank and twice 1 states need more"),
        ("rows", torch.ones(2, 4, 9, 8, dtype=torch.int64), "rows is torch.int64"),
    ):
        with pytest.raises(ValueError, match=problem):
            dt_projection_backward(**{**inputs, name: wrong})


def parameters(K: int, E: int, R: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (K, R + 2 * N, E), (K, E, R), (K, E, N), (K, E), (K, E)
    values = [torch.randn(shape, generator=generator, dtype=dtype) * 0.3 for shape in shapes]
    values[2] = -values[2].exp()
    return [x.requires_grad_() for x in values]


def one_after_the_other(u, x_weight, dt_weight, A, D, delta_bias, **options):
    R, N = dt_weight.shape[2], A.shape[2]
    dt, B, C = torch.einsum("ble,kwe->bklw", u, x_weight).split([R, N, N], dim=-1)
    delta = torch.einsum("bklr,ker->bkle", dt, dt_weight)
    return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True, **options)


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize(
    "K, R, N, options",
    [
        (4, 6, 1, dict(paths="cross", reverse=(False, False, True, True), complete=True)),
        (2, 3, 4, dict(reverse=(False, True), window=4)),
        (1, 12, 16, dict(reverse=(True,))),
        (2, 5, 3, dict(paths="holes", reverse=(False, True))),
    ],
    ids=["cross", "windows", "one_path", "holes"],
)
def test_it_is_the_projections_and_the_scan(monkeypatch, K, R, N, options, padding):
    def pad(x_weight, dt_weight, dtype):
        of_steps, of_states = x_weight.split([R, 2 * N], dim=1)
        extra = F.pad(of_steps, (0, 0, 0, padding)), F.pad(of_states, (0, 0, 0, padding // 2))
        return torch.cat(extra, dim=1), F.pad(dt_weight, (0, padding))

    monkeypatch.setattr(projected, "pad_projections", pad)
    tables = {
        "cross": scan_paths("cross", 5, 7, torch.device("cpu"))[:2],
        "holes": torch.tensor([[4, 0, -1, 9, 30, -2]]),
    }
    options = {**options, "paths": tables.get(options.get("paths"))}
    u = torch.randn(2, 35, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    inputs = u, *parameters(K, 10, R, N, torch.float64)
    got, expected = projected_scan(*inputs, **options), one_after_the_other(*inputs, **options)
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(u)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, cotangent) for out in (got, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_precision(device, dtype):
    """Tokens of either width under autocast: near the same in float64, with gradients in their own dtypes."""
    u = torch.randn(2, 35, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    inputs = u, *(x.detach().to(device).requires_grad_() for x in parameters(4, 24, 6, 1, torch.float32))
    options = dict(paths=scan_paths("cross", 5, 7, u.device)[:2], reverse=(False, False, True, True), complete=True)
    with torch.autocast(device, torch.bfloat16):
        out = projected_scan(*inputs, **options)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    expected = one_after_the_other(*exact, **{**options, "paths": options["paths"].cpu()})
    cotangent = torch.randn(u.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, cotangent.to(out))
    assert [x.dtype for x in (out, *grads)] == [x.dtype for x in (u, *inputs)]
    got = dict(zip("yuxtADb", (x.cpu() for x in (out, *grads)), strict=True))
    assert_close(
        got, dict(zip("yuxtADb", (expected, *torch.autograd.grad(expected, exact, cotangent)), strict=True)), 2e-2
    )


def test_compiled():
    inputs = torch.randn(2, 12, 8).requires_grad_(), *parameters(4, 8, 3, 1, torch.float32)

    def step(*inputs):
        return projected_scan(*inputs, reverse=(False, False, True, True))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), step(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)))


def test_layers_take_it_where_gradients_are_needed(monkeypatch):
    layer, u = SelectivePaths(8, paths=2, d_state=2, dt_rank=3), torch.randn(2, 11, 8)
    calls = []
    whole = projected_scan
    monkeypatch.setitem(
        SelectivePaths.forward.__globals__, "projected_scan", lambda *a, **k: calls.append(1) or whole(*a, **k)
    )
    learning = layer(u, reverse=(False, True))
    with torch.no_grad():
        torch.testing.assert_close(layer(u, reverse=(False, True)), learning)
    exported = torch.export.export(layer, (u,), {"reverse": (False, True)}).module()
    torch.testing.assert_close(exported(u, reverse=(False, True)), learning)
    torch.testing.assert_close(layer.requires_grad_(False)(u, reverse=(False, True)), learning)
    assert len(calls) == 1


def test_compiled_models_are_not_taken_for_exported_ones():
    """torch 2.11 says of compiled models that they are being exported, which they must not pay for."""
    layer, u, targets = SelectivePaths(8, paths=2, d_state=2, dt_rank=3), torch.randn(2, 11, 8), []

    def note(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=note))
    compiled(u, reverse=(False, True)).sum().backward()
    assert "zoo.dt_projection_backward.default" in targets
