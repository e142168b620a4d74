"""Convolution, batch norm and activation of channels-last maps: one step where the norm is fixed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from zoo.backbones.layers.convolution import convolve_map
from zoo.backbones.layers.depthwise_conv import depthwise_conv
from zoo.kernels import Activation, activate, autocast_dtype

__all__ = ["conv_norm", "convolve", "map_of", "on_images"]

# In this file, too, FX sees them as single nodes.
torch.fx.wrap("activate")
torch.fx.wrap("depthwise_conv")


def on_images(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a layer of images (B, C, H, W) to a map (B, H, W, C), through channels-last views."""
    if torch.compiler.is_compiling() and _is_whole(layer):
        return convolve_map(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def map_of(images: Tensor, conv: Callable[[Tensor], Tensor]) -> Tensor:
    """Convolves images (B, C, H, W), by one layer or several; returns a map (B, H', W', D).

    The images become channels-last before: of others a convolution makes a channels-first map, many times as large,
    which what follows would have to copy, and its gradient too.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if _is_whole(conv):
        return _convolve_images(images, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)
    return conv(images).permute(0, 2, 3, 1)


@torch.fx.wrap
def _convolve_images(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """The same for channels-last images. GPUs have fast convolutions of 16-bit numbers for 8 channels, not for 3."""
    missing, device = -images.shape[1] % 8, images.device.type
    narrow = autocast_dtype(device, images.dtype) or images.dtype
    if missing and device == "cuda" and narrow.itemsize == 2:
        images, weight = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (images, weight))
    return convolve_map(images.permute(0, 2, 3, 1), weight, bias, stride, padding, dilation)


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolves a map (B, H, W, C) with a 1 x 1 convolution, or a depth-wise one of an odd size that keeps its size."""
    return _convolve(x, conv, conv.weight, conv.bias) if _is_plain(conv) else on_images(conv, x)


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: Activation | None = None) -> Tensor:
    """Convolves a map, norms and activates it.

    A norm that is evaluated is folded into the convolution's weights, and neither of the two modules is called.

    Args:
        x: Map (B, H, W, C).
        conv: Convolution as of :func:`convolve`.
        norm: Batch norm of its output.
        activation: ``"silu"``, ``"gelu"``, ``"relu"`` or None; the one that ``norm`` has if it is a ``BatchNormAct2d``.

    Returns:
        Map (B, H, W, C').
    """
    if _is_plain(conv) and _is_fixed(norm):
        return _convolve(x, conv, *_folded(conv, norm), activation)
    y = on_images(norm, convolve(x, conv))
    return y if isinstance(norm, BatchNormAct2d) else activate(y, activation)


def _is_plain(conv: Callable[[Tensor], Tensor]) -> bool:
    """Whether weights say all there is: adapters that stand for a convolution have to be called."""
    return type(conv) is nn.Conv2d


def _is_whole(conv: Callable[[Tensor], Tensor]) -> bool:
    """Whether a convolution is plain and of all channels, padded with zeros by some number of them."""
    return _is_plain(conv) and conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _is_fixed(norm: nn.Module) -> bool:
    """Whether a norm is the same linear function of every image."""
    return isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.track_running_stats and norm.affine


def _convolve(
    x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
) -> Tensor:
    """The convolution with other weights."""
    if conv.groups > 1:
        return depthwise_conv(x, weight, bias, activation)
    return activate(_pointwise(x, weight, bias), activation)


@torch.fx.wrap
def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map (B, H, W, C) convolved with 1 x 1 kernels (C', C, 1, 1).

    On GPUs it is a linear layer, whose bias costs nothing. On CPUs torch's convolutions are oneDNN's, which on those of
    AMD are twice as fast as MKL's products.
    """
    if x.device.type == "cpu":
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)  # channels-last views
    return F.linear(x, weight.flatten(1), bias)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (C', C / groups, k, k) and bias (C',) of the convolution followed by the norm."""
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = norm.weight.to(wide) * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    shift = norm.running_mean.to(wide) if conv.bias is None else norm.running_mean.to(wide) - conv.bias
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), (norm.bias - shift * scale).to(conv.weight.dtype)
