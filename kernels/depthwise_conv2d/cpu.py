"""Depth-wise convolution in vectorised torch code: the fast path on CPUs, and correct on every device.

Channels-last maps are images in the channels-last memory format, which torch convolves in one pass without a transpose.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, without_autocast

__all__ = ["activate", "backward", "forward"]


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images (B, C, H, W), filters (C, 1, k, k) and bias in the dtype of sums."""
    dtype = accumulate_dtype(x)
    return x.to(dtype).permute(0, 3, 1, 2), weight.to(dtype).unsqueeze(1), None if bias is None else bias.to(dtype)


def _convolve(images: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(images, filters, bias, padding=filters.shape[-1] // 2, groups=len(filters))


def activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation of what nobody else needs: in place, unless a gradient does."""
    if activation is None or activation == "gelu":
        return y if activation is None else F.gelu(y)
    return getattr(F, activation)(y, inplace=not y.requires_grad)


def _d_activation(grad: Tensor, y: Tensor, activation: str | None) -> Tensor:
    """Gradient before the activation of y."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, y)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, y)
    return torch.ops.aten.threshold_backward(grad, y, 0) if activation == "relu" else grad


@without_autocast
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Outputs (B, H, W, C) in x's dtype from canonical inputs (see ``op.py``)."""
    y = activate(_convolve(*_widened(x, weight, bias)), activation)
    return y.permute(0, 2, 3, 1).to(x.dtype).contiguous()


@without_autocast
def backward(grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> list[Tensor]:
    """Gradients of x, weight and, if given, bias; the outputs before the activation are recomputed."""
    images, filters, shift = _widened(x, weight, bias)
    d_y = grad_out.to(images.dtype).permute(0, 3, 1, 2)
    if activation is not None:
        d_y = _d_activation(d_y, _convolve(images, filters, shift), activation)
    margin = [filters.shape[-1] // 2] * 2
    d_images, d_filters, d_shift = torch.ops.aten.convolution_backward(
        d_y, images, filters, [len(filters)], [1, 1], margin, [1, 1], False, [0, 0], len(filters),
        [True, True, bias is not None],
    )  # fmt: skip
    gradients = [
        d_images.permute(0, 2, 3, 1).to(x.dtype).contiguous(),
        d_filters.squeeze(1).to(weight.dtype, memory_format=torch.contiguous_format),
    ]
    return gradients if bias is None else [*gradients, d_shift.to(bias.dtype)]
