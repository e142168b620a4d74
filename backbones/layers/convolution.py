"""Convolutions of channels-last maps, as single operations for compilers.

A compiler that finds convolutions in a graph lays out its four-dimensional tensors for them (``layout_optimization`` of
inductor): maps of the form (B, H, W, C), which already lie as convolutions want them, and what a scan keeps of its
paths are copied back and forth. Convolutions that it does not know leave everything as it lies.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import autocast_dtype, custom_op, is_exporting

__all__ = ["convolve_map"]


def convolve_map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolves a map (B, H, W, C) with kernels (D, C, k, k); a map (B, H', W', D) comes out.

    The other arguments are those of :func:`torch.nn.functional.conv2d`.
    """
    if not torch.compiler.is_compiling() or is_exporting() or x.device.type == "cpu":
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, dilation).permute(0, 2, 3, 1)
    dtype = autocast_dtype(x.device.type, x.dtype) or x.dtype
    x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    return _convolve_map(x, weight, bias, list(stride), list(padding), list(dilation))


@custom_op("convolve_map")
def _convolve_map(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    y = torch.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, dilation)
    return y.permute(0, 2, 3, 1).contiguous()


@custom_op("convolve_map_backward")
def _convolve_map_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    biased: bool,
    wants_x: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[Tensor]:
    """Gradients of x, if it is wanted, of weight and, if there is one, of the bias."""
    gradients = torch.ops.aten.convolution_backward(
        *(t.permute(0, 3, 1, 2) for t in (grad, x)), weight, [len(weight)] if biased else None,
        stride, padding, dilation, False, [0, 0], 1, [wants_x, True, biased],
    )  # fmt: skip
    d_x, d_weight, d_bias = gradients
    d_x = [d_x.permute(0, 2, 3, 1).contiguous()] if wants_x else []
    return [*d_x, d_weight.contiguous(), *([d_bias] if biased else [])]


@_convolve_map.register_fake
def _(x, weight, bias, stride, padding, dilation):
    sides = zip(x.shape[1:3], weight.shape[2:], stride, padding, dilation, strict=True)
    grid = [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides]
    return x.new_empty(x.shape[0], *grid, weight.shape[0])


@_convolve_map_backward.register_fake
def _(grad, x, weight, biased, wants_x, stride, padding, dilation):
    d_x = [x.new_empty(x.shape)] if wants_x else []
    return [*d_x, weight.new_empty(weight.shape), *([weight.new_empty(weight.shape[0])] if biased else [])]


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.steps = inputs
    ctx.biased, ctx.wants_x = bias is not None, x.requires_grad
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    gradients = _convolve_map_backward(grad, *ctx.saved_tensors, ctx.biased, ctx.wants_x, *ctx.steps)
    d_x = gradients.pop(0) if ctx.wants_x else None
    return d_x, gradients[0], gradients[1] if ctx.biased else None, None, None, None


_convolve_map.register_autograd(_backward, setup_context=_setup_context)
