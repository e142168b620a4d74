"""Norm and gate: every backend against the definition in float64, outputs and all gradients; and layers with it."""

import importlib
import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.kernels import gated_layer_norm, gated_rms_norm, use_backend

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

checks = runpy.run_path(str(Path(__file__).with_name("op_checks.py")))
BACKENDS, assert_close = checks["BACKENDS"], checks["assert_close"]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    shape: tuple[int, ...]
    groups: int = 1
    shared: bool = False
    centered: bool = False
    bias: bool = False
    gate_first: bool = False
    activation: str | None = "silu"
    eps: float = 1e-5

    def inputs(self, dtype: torch.dtype, others: torch.dtype, device: str | torch.device) -> dict[str, Tensor]:
        """x, z (a part of wider rows, as projections make it), weight and bias."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).to(device)

        D = self.shape[-1]
        channels = D // self.groups if self.shared else D
        z = (2 * normal(*self.shape[:-1], 2 * D + 3)).to(dtype)[..., D : 2 * D]
        given = dict(x=(normal(*self.shape[:-1], 1) + normal(*self.shape)).to(dtype), z=z)
        given.update(weight=(1 + normal(channels)).to(others))
        if self.bias:
            given.update(bias=normal(channels).to(others))
        return {name: t.requires_grad_() for name, t in given.items()}

    def run(self, given: dict[str, Tensor]) -> Tensor:
        options = dict(eps=self.eps, activation=self.activation, gate_first=self.gate_first, groups=self.groups)
        return (gated_layer_norm if self.centered else gated_rms_norm)(**given, **options)

    def by_definition(self, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        gate = {"silu": F.silu, "gelu": F.gelu, None: lambda z: z}[self.activation](z)
        rows = (x * gate if self.gate_first else x).unflatten(-1, (self.groups, -1))
        if self.centered:
            rows = rows - rows.mean(-1, keepdim=True)
        normed = rows / (rows.square().mean(-1, keepdim=True) + self.eps).sqrt()
        repeats = self.groups if self.shared else 1
        out = normed.flatten(-2) * weight.repeat(repeats)
        if bias is not None:
            out = out + bias.repeat(repeats)
        return out if self.gate_first else out * gate


RMS_CASES = {
    "plain": Case((2, 9, 7)),
    "gate_first": Case((2, 9, 7), gate_first=True),
    "one_channel": Case((3, 5, 1)),
    "many_rows": Case((5, 27, 6), gate_first=True),
    "groups": Case((3, 7, 20), groups=4, gate_first=True),
    "heads": Case((2, 11, 24), groups=3, shared=True),
    "heads_gate_first": Case((2, 11, 24), groups=3, shared=True, gate_first=True),
    "gelu": Case((2, 5, 13), activation="gelu"),
    "gelu_first": Case((2, 5, 13), activation="gelu", gate_first=True),
    "plain_gate": Case((2, 5, 13), activation=None),
    "plain_gate_first": Case((2, 5, 13), activation=None, gate_first=True),
    "wide": Case((1, 5, 1000)),
    "one_row": Case((33,)),
    "grid": Case((3, 2, 5, 8)),
    "no_eps": Case((1, 5, 7), eps=0.0),
}
CASES = {
    **RMS_CASES,
    **{
        f"layer_norm_{name}": replace(case, centered=True, bias=True)
        for name, case in RMS_CASES.items()
        if case.shape[-1] > case.groups  # one channel would give zeros, which have no error
    },
    "layer_norm_no_bias": Case((5, 27, 6), centered=True),
}
GPU_CASES = {
    "efficient_vmamba_small_224": Case((8, 56, 56, 128), centered=True, bias=True),
    "mamba2": Case((4, 501, 1536), gate_first=True),
    "mamba2_groups": Case((3, 77, 2048), groups=8, gate_first=True),
    "head_first": Case((5, 197, 768), groups=12, shared=True),
    "widest": Case((2, 300, 8192), centered=True, bias=True),
    "many_narrow_rows": Case((3, 40001, 3)),
}
SUBJECTS = checks["subjects"](CASES, GPU_CASES)


def with_gradients(function: Callable[..., Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and for a fixed gradient of it those of all inputs."""
    out = function(given)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(out.device)
    gradients = torch.autograd.grad((out.double() * cotangent).sum(), list(given.values()))
    return dict(out=out, **{f"d_{name}": d for name, d in zip(given, gradients, strict=True)})


def expected(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    return with_gradients(lambda tensors: case.by_definition(**tensors), exact)


@pytest.mark.parametrize("backend, device, name", SUBJECTS)
def test_equals_the_definition(backend, device, name):
    case = {**CASES, **GPU_CASES}[name]
    given = case.inputs(F64, F64, device)
    with use_backend(backend):
        got = with_gradients(case.run, given)
    assert_close(got, expected(case, given), 1e-11)


@pytest.mark.parametrize("dtype, others, tolerance", [(F32, F32, 1e-5), (BF16, F32, 8e-3), (F16, F16, 1e-3)])
@pytest.mark.parametrize("name", ["groups", "layer_norm_grid", "layer_norm_gelu", "heads"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_dtypes(backend, device, name, dtype, others, tolerance):
    case = CASES[name]
    given = case.inputs(dtype, others, device)
    with use_backend(backend):
        got = with_gradients(case.run, given)
    assert all(got[f"d_{name}"].dtype == t.dtype for name, t in given.items())
    assert got["out"].dtype == dtype
    assert_close(got, expected(case, given), tolerance)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_the_result_has_the_gates_dtype(backend, device):
    given = Case((2, 5, 8)).inputs(F32, F32, device)
    narrow = dict(given, z=given["z"].detach().to(BF16).requires_grad_())
    with use_backend(backend):
        got = with_gradients(Case((2, 5, 8)).run, narrow)
    assert (got["out"].dtype, got["d_x"].dtype, got["d_z"].dtype) == (BF16, F32, BF16)
    assert_close(got, expected(Case((2, 5, 8)), narrow), 8e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_numbers_that_are_not_finite(backend, device, dtype):
    x = torch.randn(5, 4, device=device, dtype=dtype)
    x[1, 2], x[2, 0] = math.inf, math.nan
    z = torch.full_like(x, 1e4)
    z[3] = -1e4
    with use_backend(backend):
        out = gated_rms_norm(x, z, torch.ones(4, device=device))
    assert out[1:3].isfinite().sum() == 3  # of the row with an infinity, what is not it is nothing beside it
    assert out[0].isfinite().all() and (out[3] == 0).all()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_any_strides_are_read_and_results_are_contiguous(backend, device):
    wide, weight = torch.randn(3, 10, 14, device=device), torch.randn(14, device=device)[::2]
    strided = (wide[..., 7:], wide[:, ::2, :7], wide[..., :7].transpose(0, 1), wide[:1, :, :7].expand(2, -1, -1))
    for t in (*strided, wide[..., ::2]):
        outputs = []
        for x in (t.detach(), t.detach().contiguous()):
            x.requires_grad_()
            with use_backend(backend):
                out = gated_layer_norm(x, x, weight, gate_first=True)
            assert out.is_contiguous()
            outputs.append((out, *torch.autograd.grad(out, x, x.detach())))
        torch.testing.assert_close(*outputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("elements, most_rows, resident", [(1, 1, 1), (2, 4, 7), (16, 2, 3)])
@pytest.mark.parametrize("name", ["layer_norm_groups", "layer_norm_heads", "layer_norm_grid"])
def test_triton_tiles_and_programs_meet_without_a_seam(monkeypatch, name, elements, most_rows, resident):
    rows = importlib.import_module("zoo.kernels.triton_rows")
    monkeypatch.setattr(rows, "ELEMENTS", elements)
    monkeypatch.setattr(rows, "MOST_ROWS", most_rows)
    monkeypatch.setattr(importlib.import_module("zoo.kernels.gated_norm.triton"), "RESIDENT_WARPS", resident)
    given = CASES[name].inputs(F64, F64, "cpu")
    with use_backend("triton"):
        got = with_gradients(CASES[name].run, given)
    assert_close(got, expected(CASES[name], given), 1e-11)


@pytest.mark.parametrize("name", ["plain", "groups", "heads", "layer_norm_gelu_first"])
def test_gradients_are_those_of_finite_differences(name, device):
    given = replace(CASES[name], shape=(3, CASES[name].shape[-1])).inputs(F64, F64, device)
    names = list(given)
    assert torch.autograd.gradcheck(
        lambda *tensors: CASES[name].run(dict(zip(names, tensors, strict=True))), list(given.values())
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["plain", "groups", "layer_norm_heads", "layer_norm_grid"])
def test_opcheck(name, dtype, device):
    case = CASES[name]
    given = case.inputs(dtype, F32, device)
    options = case.groups, case.eps, case.activation, case.gate_first, case.centered
    inputs = given["x"], given["z"], given["weight"], given.get("bias"), *options
    torch.library.opcheck(torch.ops.zoo.gated_norm.default, inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(())), r"x \(\) must have shape \(..., D\)"),
        (dict(z=torch.ones(2, 5)), r"z must have shape \(..., D\) = \(2, 6\), got \(2, 5\)"),
        (dict(weight=torch.ones(3)), r"weight must have shape \(D\) = \(6\), got \(3\)"),
        (dict(groups=4), "6 channels of x do not divide into 4 groups"),
        (dict(groups=3, weight=torch.ones(2), bias=torch.ones(6)), r"bias must have shape \(D / groups\) = \(2\)"),
        (dict(eps=-1.0), "eps is -1.0; it must be 0 or more"),
        (dict(activation="tanh"), "activation 'tanh' is not known; use one of 'silu', 'gelu', None"),
        (dict(x=torch.ones(2, 6, dtype=torch.int64)), "x is torch.int64; use one of"),
        (dict(weight=torch.ones(6, device="meta")), "weight is on meta but x is on cpu; move them together"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    given = dict(x=torch.ones(2, 6), z=torch.ones(2, 6), weight=torch.ones(6))
    with pytest.raises(ValueError, match=message):
        gated_layer_norm(**{**given, **change})


def test_too_many_channels_are_refused():
    x = torch.ones(1, 2 * 8193, device="meta")
    with pytest.raises(ValueError, match="a group has 8193 channels; at most 8192 are supported"):
        gated_rms_norm(x, x, torch.ones(8193, device="meta"), groups=2)


@pytest.mark.parametrize("activation", ["silu", "gelu", None])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gated_layer_is_a_layer_and_a_gate(device, autocast, activation):
    norm = LayerNorm(12, device=device)
    torch.nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 3, 5, 12, device=device), torch.randn(2, 3, 5, 12, device=device)
    with torch.autocast(device.type, BF16, enabled=autocast):
        z = z.to(BF16) if autocast else z
        got = norm.gated(x, z, activation)
        expected = norm(x) * {"silu": F.silu, "gelu": F.gelu, None: lambda z: z}[activation](z)
    assert got.dtype == z.dtype
    assert_close(dict(out=got), dict(out=expected.double()), 2e-2 if autocast else 1e-5)


def test_hooks_of_the_norm_see_normed_rows(device):
    norm, seen = LayerNorm(12, device=device), []
    x, z = torch.randn(2, 5, 12, device=device), torch.randn(2, 5, 12, device=device)
    expected = norm.gated(x, z, "silu")
    norm.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    torch.testing.assert_close(norm.gated(x, z, "silu"), expected)
    ((given, normed),) = seen
    assert given is x
    torch.testing.assert_close(normed * F.silu(z), expected)
