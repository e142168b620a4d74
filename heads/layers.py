"""Layers that necks and heads share.

Parameters of a block of convolution, norm and ReLU have the names of mmsegmentation: ``conv`` and ``bn`` or ``gn``.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Norm", "channels_last", "conv_norm_act", "make_norm", "resize", "summed_cross_entropy"]

Norm = Literal["batch", "group"]


def make_norm(norm: Norm, channels: int, **factory: Any) -> nn.Module:
    """Norm of a map (B, channels, H, W).

    Args:
        norm: ``"batch"``, which ``nn.SyncBatchNorm.convert_sync_batchnorm`` turns into one over all processes, or
            ``"group"``, which works with any batch: 32 groups, or as many as leave two channels or more to each.
        channels: Channels.
        **factory: Device and dtype.

    Raises:
        ValueError: If ``norm`` is not known.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r} is not known; use one of {', '.join(get_args(Norm))}")
    if norm == "batch":
        return nn.BatchNorm2d(channels, **factory)
    return nn.GroupNorm(math.gcd(32, channels // 2), channels, **factory)


def conv_norm_act(in_channels: int, channels: int, kernel_size: int = 1, norm: Norm = "batch") -> nn.Sequential:
    """Convolution that keeps the size, norm and ReLU.

    Args:
        in_channels: Channels read.
        channels: Channels written.
        kernel_size: Side of the kernel, odd.
        norm: See :func:`make_norm`.
    """
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    name = "gn" if norm == "group" else "bn"
    layers = [("conv", conv), (name, make_norm(norm, channels)), ("act", nn.ReLU(inplace=True))]
    return nn.Sequential(OrderedDict(layers))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, D, H, W) at a size (H, W), bilinearly, by the corners of its cells; see :func:`channels_last`.

    A map that has the size is returned as it is.
    """
    size = tuple(size)
    if x.shape[-2:] == size:
        return x
    x, trained = channels_last(x), x.requires_grad and torch.is_grad_enabled()
    return channels_last(_Resize.apply(x, size) if trained and x.device.type != "cpu" else _bilinear(x, size))


def _bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class _Resize(torch.autograd.Function):
    """Bilinear resize (B, D, H, W) to (B, D, P, Q) whose gradient is two products of matrices.

    torch's own kernel for GPUs adds every gradient to four places with atomics, in the maps' dtype: slowly in bfloat16,
    rounded after each of up to hundreds of summands, and in another order every time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.size = x.shape[-2:]
        return _bilinear(x, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, columns = (_shares(n, m, grad) for n, m in zip(ctx.size, grad.shape[-2:], strict=True))
        grad = grad.movedim(1, -1)  # (B, P, Q, D), as it lies in memory
        with torch.autocast(grad.device.type, enabled=False):
            d_rows = rows @ grad.flatten(2)  # (B, H, Q D)
            d_x = columns @ d_rows.unflatten(2, grad.shape[2:])  # (B, H, W, D)
        return d_x.movedim(-1, 1), None


def _shares(size: int, resized: int, like: Tensor) -> Tensor:
    """How much each of ``size`` places gives to each of ``resized`` ones (size, resized)."""
    places = torch.eye(size, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device).unsqueeze(0)
    return F.interpolate(places, size=resized, mode="linear", align_corners=False).squeeze(0).to(like.dtype)


def channels_last(x: Tensor) -> Tensor:
    """A map (B, D, H, W) with its channels side by side in memory on GPUs; maps on CPUs as they are.

    A bilinear resize of another map gives every place of the result a thread, which goes through all images and
    channels: milliseconds for the many channels and few places of a pyramid. On CPUs convolutions of such maps are
    slower.
    """
    return x if x.device.type == "cpu" else x.contiguous(memory_format=torch.channels_last)


def summed_cross_entropy(logits: Tensor, labels: Tensor, ignored: int, weight: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropy of many rows of logits (N, K), in their dtype.

    Losses are added up afterwards: torch's own sum over rows is the work of a single block of threads on GPUs.

    Args:
        logits: Logits (N, K).
        labels: Class of every row (N,), int64.
        ignored: Label of rows that do not count.
        weight: Weight of every class (K,).
    """
    return F.cross_entropy(logits, labels, weight, ignore_index=ignored, reduction="none").sum()
