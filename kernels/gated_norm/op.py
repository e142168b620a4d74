"""``torch.ops.zoo.gated_norm``: checks, backend dispatch, fake kernels and autograd.

Canonical shapes: x, z and out (..., D) in G groups of W = D / G channels, weight and bias (D,) or (W,). FLOPs are not
counted, as torch counts none for norms.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.add_norm.op import MAX_NORM_CHANNELS
from zoo.kernels.custom_op import custom_op
from zoo.kernels.registration import check_dtypes_and_devices, expect_shape, implementation, show

OP = "gated_norm"
GateActivation = Literal["silu", "gelu"]
GATES = {"silu": F.silu, "gelu": F.gelu, None: lambda z: z}


def check_inputs(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, activation: str | None
) -> None:
    """Raises ValueError, naming expected and given, unless the inputs fit together."""
    if x.dim() == 0 or 0 in x.shape:
        raise ValueError(f"{OP}: x {show(x.shape)} must have shape (..., D) and at least one element")
    D = x.shape[-1]
    if groups < 1 or D % groups:
        raise ValueError(f"{OP}: {D} channels of x do not divide into {groups} groups")
    if D // groups > MAX_NORM_CHANNELS:
        raise ValueError(f"{OP}: a group has {D // groups} channels; at most {MAX_NORM_CHANNELS} are supported")
    expect_shape(OP, "z", z, "..., D", tuple(x.shape))
    letters, channels = ("D", D) if tuple(weight.shape) != (D // groups,) else ("D / groups", D // groups)
    expect_shape(OP, "weight", weight, letters, (channels,))
    expect_shape(OP, "bias", bias, letters, (channels,))
    if not eps >= 0:
        raise ValueError(f"{OP}: eps is {eps}; it must be 0 or more")
    if activation not in GATES:
        raise ValueError(f"{OP}: activation {activation!r} is not known; use one of {', '.join(map(repr, GATES))}")
    check_dtypes_and_devices(OP, dict(x=x, z=z, weight=weight, bias=bias), {}, None)


def sum_dtype(x: Tensor, z: Tensor) -> torch.dtype:
    """Dtype of sums: float32, or float64 if x or z is."""
    return torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)


@custom_op("gated_norm")
def gated_norm_op(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    gate_first: bool,
    centered: bool,
) -> Tensor:
    """The normed and gated rows; layer norm if ``centered``, else RMS norm."""
    check_inputs(x, z, weight, bias, groups, eps, activation)
    return implementation(OP, x.device).forward(x, z, weight, bias, groups, eps, activation, gate_first, centered)


@gated_norm_op.register_fake
def _(x, z, weight, bias, groups, eps, activation, gate_first, centered):
    check_inputs(x, z, weight, bias, groups, eps, activation)
    return z.new_empty(z.shape)


@custom_op("gated_norm_backward")
def gated_norm_backward_op(
    grad_out: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    gate_first: bool,
    centered: bool,
) -> list[Tensor]:
    """Gradients of x, z, weight and, if there is one, bias."""
    backward = implementation(OP, x.device).backward
    return backward(grad_out, x, z, weight, bias, groups, eps, activation, gate_first, centered)


@gated_norm_backward_op.register_fake
def _(grad_out, x, z, weight, bias, groups, eps, activation, gate_first, centered):
    return [t.new_empty(t.shape) for t in (x, z, weight, bias) if t is not None]


def _setup_context(ctx, inputs, output):
    x, z, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight, bias)


def _backward(ctx, grad_out):
    d_x, d_z, d_weight, *d_bias = gated_norm_backward_op(grad_out, *ctx.saved_tensors, *ctx.options)
    return d_x, d_z, d_weight, next(iter(d_bias), None), None, None, None, None, None


gated_norm_op.register_autograd(_backward, setup_context=_setup_context)
