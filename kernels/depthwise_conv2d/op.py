"""``torch.ops.zoo.depthwise_conv2d``: checks, backend dispatch, fake kernels, autograd and FLOP count.

Canonical shapes: x (B, H, W, C), weight (C, k, k), bias (C,), result (B, H, W, C). Only the inputs are kept for the
backward; it computes the values before the activation again.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.custom_op import custom_op
from zoo.kernels.registration import check_dtypes_and_devices, expect_shape, implementation, show

OP = "depthwise_conv2d"
Activation = Literal["silu", "gelu", "relu"]
KERNELS = (3, 5, 7)  # sides; the Triton kernels keep the weights in registers


def check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Raises ValueError, naming expected and given, unless the canonical inputs fit together."""
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must have shape (B, H, W, C), got {show(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{OP}: x {show(x.shape)} is empty")
    C = x.shape[-1]
    if weight.dim() != 3 or weight.shape[0] != C or weight.shape[1] != weight.shape[2]:
        raise ValueError(f"{OP}: weight must have shape (C, k, k) with C = {C}, got {show(weight.shape)}")
    side = weight.shape[1]
    if side not in KERNELS:
        raise ValueError(f"{OP}: the kernel's side is {side}; use one of {', '.join(map(str, KERNELS))}")
    expect_shape(OP, "bias", bias, "C", (C,))
    if activation not in (None, *get_args(Activation)):
        known = ", ".join(map(repr, get_args(Activation)))
        raise ValueError(f"{OP}: activation {activation!r} is not known; use {known} or None")
    check_dtypes_and_devices(OP, dict(x=x, weight=weight, bias=bias), {}, None)


@custom_op(OP)
def depthwise_conv2d_op(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    check_inputs(x, weight, bias, activation)
    return implementation(OP, x.device).forward(x, weight, bias, activation)


@depthwise_conv2d_op.register_fake
def _(x, weight, bias, activation):
    check_inputs(x, weight, bias, activation)
    return x.new_empty(x.shape)


@custom_op("depthwise_conv2d_backward")
def depthwise_conv2d_backward_op(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> list[Tensor]:
    """Gradients of x, weight and, if it was given, bias."""
    return implementation(OP, x.device).backward(grad_out, x, weight, bias, activation)


@depthwise_conv2d_backward_op.register_fake
def _(grad_out, x, weight, bias, activation):
    return [given.new_empty(given.shape) for given in (x, weight, bias) if given is not None]


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad_out):
    x, weight, bias = ctx.saved_tensors
    gradients = depthwise_conv2d_backward_op(grad_out, x, weight, bias, ctx.activation)
    return *gradients, *[None] * (4 - len(gradients))


depthwise_conv2d_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.depthwise_conv2d)
def _forward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """One multiply-add (2 operations) per output element and weight of its kernel, as for any convolution."""
    B, H, W, _ = x_shape
    C, rows, columns = weight_shape
    return 2 * B * H * W * C * rows * columns


@register_flop_formula(torch.ops.zoo.depthwise_conv2d_backward)
def _backward_flops(grad_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    """Twice the forward (gradients of x and of weight), plus the forward that is recomputed for the activation."""
    return 3 * _forward_flops(x_shape, weight_shape)
