"""Depth-wise convolution of channels-last maps, by the zoo's kernel on GPUs."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.kernels import DEPTHWISE_KERNELS, Activation, activate, autocast_dtype, depthwise_conv2d

__all__ = ["DepthwiseConv", "depthwise_conv"]


class DepthwiseConv(nn.Conv2d):
    """Depth-wise convolution of maps (B, H, W, C) that keeps their size, and an activation.

    Args:
        dim: Channels C.
        size: Side of the kernel, odd.
        bias: Whether a bias is added.
        activation: ``"silu"``, ``"gelu"``, ``"relu"`` or None.
    """

    def __init__(
        self,
        dim: int,
        size: int = 3,
        bias: bool = True,
        activation: Activation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, dim, size, padding=size // 2, groups=dim, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to map (B, H, W, C)."""
        return depthwise_conv(x, self.weight, self.bias, self.activation)


@torch.fx.wrap
@register_notrace_function
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """What :class:`DepthwiseConv` does, with any weight (C, 1, k, k) and bias (C,). A single node for FX.

    On CPUs, and for other sizes than 3, 5 and 7, it is torch's convolution, which keeps what its activation needs for
    the backward instead of computing it again.
    """
    side = weight.shape[-1]
    if x.device.type == "cpu" or side not in DEPTHWISE_KERNELS:
        images = x.permute(0, 3, 1, 2)  # channels-last views
        y = F.conv2d(images, weight, bias, padding=side // 2, groups=len(weight)).permute(0, 2, 3, 1)
        return activate(y, activation)
    dtype = autocast_dtype(x.device.type, x.dtype)
    return depthwise_conv2d(x if dtype is None else x.to(dtype), weight, bias, activation=activation)
