"""Bias and GELU: every backend against the definition in float64, outputs and all gradients; and the MLP made of it."""

import importlib
import math
import runpy
from pathlib import Path

import pytest
import timm.layers
import torch
from torch import Tensor

from zoo.backbones.layers import mlp
from zoo.kernels import bias_gelu, use_backend

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

checks = runpy.run_path(str(Path(__file__).with_name("op_checks.py")))
BACKENDS, assert_close = checks["BACKENDS"], checks["assert_close"]
OWN = BACKENDS[1:]  # without torch's kernel for CPUs: that of 2.14 has fewer digits, and nan where x is infinite

SHAPES = {
    "one": (1,),
    "one_row": (33,),
    "one_channel": (7, 1),
    "odd": (3, 17, 13),
    "two_tiles": (2, 9, 130),
    "grid": (2, 3, 5, 8),
}
GPU_SHAPES = {"vmamba_tiny_224": (8, 56, 56, 384), "wide": (3, 501, 2500), "narrow": (3, 40001, 3)}
SUBJECTS = checks["subjects"](SHAPES, GPU_SHAPES)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, bias_dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x, from far below to far above zero, and bias."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=F64)
    bias = torch.randn(shape[-1], generator=generator, dtype=F64)
    return x.to(device, dtype).requires_grad_(), bias.to(device, bias_dtype).requires_grad_()


def with_gradients(out: Tensor, x: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The output, and for a fixed gradient of it those of x and bias."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(out.device)
    d_x, d_bias = torch.autograd.grad((out.double() * cotangent).sum(), (x, bias))
    return dict(out=out, d_x=d_x, d_bias=d_bias)


def by_definition(x: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The same by autograd in float64."""
    x, bias = (t.detach().double().requires_grad_() for t in (x, bias))
    v = x + bias
    return with_gradients(v * (1 + torch.erf(v / math.sqrt(2))) / 2, x, bias)


@pytest.mark.parametrize("backend, device, name", SUBJECTS)
def test_equals_the_definition(backend, device, name):
    given = inputs({**SHAPES, **GPU_SHAPES}[name], F64, F64, device)
    with use_backend(backend):
        got = with_gradients(bias_gelu(*given), *given)
    assert_close(got, by_definition(*given), 1e-12)


@pytest.mark.parametrize("dtype, bias_dtype, tolerance", [(F32, F32, 1e-6), (BF16, F32, 8e-3), (F16, F16, 1e-3)])
@pytest.mark.parametrize("name", ["odd", "two_tiles"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_dtypes(backend, device, name, dtype, bias_dtype, tolerance):
    given = inputs(SHAPES[name], dtype, bias_dtype, device)
    with use_backend(backend):
        got = with_gradients(bias_gelu(*given), *given)
    assert got["out"].dtype == got["d_x"].dtype == dtype and got["d_bias"].dtype == bias_dtype
    assert_close(got, by_definition(*given), tolerance)


@pytest.mark.parametrize("backend, device", OWN)
def test_every_16_bit_number_is_rounded_once(backend, device):
    """What P is approximated by is off by less than the rounding of its product, wherever that has all its digits."""
    x = torch.linspace(-4, 4, 4001, device=device).to(F16)[:, None]
    with use_backend(backend):
        out = bias_gelu(x, torch.zeros(1, device=device)).double()
    exact = torch.nn.functional.gelu(x.double())
    assert ((out - exact).abs() <= 2**-10 * exact.abs() + 2**-24).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("backend, device", OWN)
def test_numbers_that_are_not_finite(backend, device, dtype):
    x = torch.tensor([[math.inf, math.nan, 1e4, -1e4]], device=device, dtype=dtype)
    with use_backend(backend):
        out = bias_gelu(x, torch.zeros(4, device=device))[0]
    assert out[0] == math.inf and out[1].isnan() and out[2] == x[0, 2] and out[3] == 0


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_any_strides_are_read_and_results_are_contiguous(backend, device):
    wide, bias = torch.randn(3, 10, 14, device=device), torch.randn(14, device=device)[::2]
    for x in (wide[..., 7:], wide[:, ::2, :7], wide[..., :7].transpose(0, 1), wide[:1, :, :7].expand(2, -1, -1)):
        outputs = {}
        for name, t in (("strided", x.detach()), ("copied", x.detach().contiguous())):
            t.requires_grad_()
            with use_backend(backend):
                out = bias_gelu(t, bias)
                outputs[name] = (out, *torch.autograd.grad(out, t, t.detach()))
            assert out.is_contiguous()
        torch.testing.assert_close(outputs["strided"], outputs["copied"])


@pytest.mark.interpreted
@pytest.mark.parametrize("rows, block, resident", [(1, 16, 1), (4, 32, 7), (32, 8, 2)])
def test_triton_tiles_and_programs_meet_without_a_seam(monkeypatch, rows, block, resident):
    implementation = importlib.import_module("zoo.kernels.bias_gelu.triton")
    for name, value in (("ROWS", rows), ("BLOCK", block), ("RESIDENT", resident)):
        monkeypatch.setattr(implementation, name, value)
    given = inputs((5, 7, 45), F64, F64, "cpu")
    with use_backend("triton"):
        got = with_gradients(bias_gelu(*given), *given)
    assert_close(got, by_definition(*given), 1e-12)


def test_gradients_are_those_of_finite_differences(device):
    assert torch.autograd.gradcheck(bias_gelu, inputs((2, 3, 5), F64, F64, device))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(name, dtype, device):
    torch.library.opcheck(torch.ops.zoo.bias_gelu.default, inputs(SHAPES[name], dtype, F32, device))


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.zeros(()), torch.zeros(1), r"x \(\) must have shape \(..., D\)"),
        (torch.zeros(2, 0), torch.zeros(0), r"x \(2, 0\) must have .* at least one element"),
        (torch.zeros(2, 6), torch.zeros(5), r"bias must have shape \(D\) = \(6\), got \(5\)"),
        (torch.zeros(2, 6, dtype=torch.int64), torch.zeros(6), "x is torch.int64; use one of torch.float32"),
        (torch.zeros(2, 6), torch.zeros(6, device="meta"), "bias is on meta but x is on cpu; move them together"),
    ],
)
def test_bad_inputs(x, bias, message):
    with pytest.raises(ValueError, match=f"bias_gelu: {message}"):
        bias_gelu(x, bias)


def same_mlps(device: str, dtype: torch.dtype = F32, drop: float = 0.0) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and timm's, with the same weights."""
    ours, timms = (kind(12, 40, drop=drop).to(device, dtype) for kind in (mlp.Mlp, timm.layers.Mlp))
    ours.load_state_dict(timms.state_dict())
    return ours, timms


def outputs_of(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    out = layer(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_the_mlp_is_that_of_timm(monkeypatch, device, fused, drop):
    monkeypatch.setattr(mlp, "FUSED_ON", (device.type,) if fused else ())
    ours, timms = same_mlps(device, drop=drop)
    x = torch.randn(2, 3, 5, 12, device=device)
    torch.testing.assert_close(outputs_of(ours, x), outputs_of(timms, x), rtol=1e-4, atol=1e-5)


def test_the_mlp_in_autocast(monkeypatch, device):
    monkeypatch.setattr(mlp, "FUSED_ON", (device.type,))
    ours, timms = same_mlps(device)
    x = torch.randn(2, 30, 12, device=device)
    with torch.autocast(device.type, BF16):
        got, expected = outputs_of(ours, x), outputs_of(timms, x)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b.float()).abs().max() <= 0.03 * b.float().abs().max()


def test_the_mlp_compiles_into_one_graph_and_exports_as_timms(monkeypatch, device):
    monkeypatch.setattr(mlp, "FUSED_ON", (device.type,))
    ours, _ = same_mlps(device)
    x = torch.randn(4, 12, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs_of(compiled, x), outputs_of(ours, x), rtol=1e-4, atol=1e-5)
    graph = torch.export.export(ours.eval(), (x,)).graph
    assert not any("zoo" in str(node.target) for node in graph.nodes)
