"""Feature pyramid from the maps of a columnar backbone, which all have one stride.

Known from BEiT's segmentation code (arXiv 2106.08254) and used by Vim: each map is brought to its own stride by
transposed convolutions or pooling, without mixing the maps. With Vim's released segmentation weights, level i holds
what the authors call ``fpn{i+1}``.

Those pyramids start from stride 16 and pool once. From stride 4 three levels of four are pooled, and pooling alone lets
no row see the next: convolutions of stride 2, as between the stages of hierarchical backbones, are the alternative.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zoo.heads.layers import Norm, make_norm

__all__ = ["Reduction", "RescalePyramid"]

Reduction = Literal["pool", "conv"]


class RescalePyramid(nn.Module):
    """Brings feature maps of one stride to strides 4, 8, 16 and 32.

    Args:
        in_channels: Channels D of every map.
        in_stride: Their stride in pixels; 4, 8, 16 or 32.
        out_strides: Strides wanted, one per level.
        norm: Norm between the two convolutions that enlarge a map four times, and after those that reduce one; see
            :func:`~zoo.heads.layers.make_norm`.
        reduction: How maps are reduced: ``"pool"``, max pooling, or ``"conv"``, a 3x3 convolution, norm and GELU for
            every factor of 2.

    Raises:
        ValueError: If a level needs a factor other than 4, 2, 1, 1/2, 1/4 or 1/8, or ``reduction`` is not known.
    """

    def __init__(
        self,
        in_channels: int,
        in_stride: int = 16,
        out_strides: Sequence[int] = (4, 8, 16, 32),
        norm: Norm = "batch",
        reduction: Reduction = "pool",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction={reduction!r} is not known; use one of {', '.join(get_args(Reduction))}")
        dd = {"device": device, "dtype": dtype}
        self.out_channels = [in_channels] * len(out_strides)
        self.in_stride, self.out_strides = in_stride, tuple(out_strides)
        self.levels = nn.ModuleList(
            [_rescale(in_channels, in_stride, stride, norm, reduction, dd) for stride in out_strides]
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, D, H, W), one per level or one for all levels, to maps (B, D, H * in/out, W * in/out).

        Raises:
            ValueError: If the number of maps is neither 1 nor the number of levels.
        """
        if len(features) == 1:
            features = list(features) * len(self.levels)
        if len(features) != len(self.levels):
            raise ValueError(f"expected 1 or {len(self.levels)} feature maps, got {len(features)}")
        return [level(feature) for level, feature in zip(self.levels, features, strict=True)]


def _rescale(channels: int, in_stride: int, out_stride: int, norm: Norm, reduction: Reduction, dd: dict) -> nn.Module:
    """Module that changes a map's stride."""

    def double() -> nn.Module:
        return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2, **dd)

    def halve() -> list[nn.Module]:
        conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        return [conv, make_norm(norm, channels, **dd), nn.GELU()]

    if in_stride == 4 * out_stride:
        return nn.Sequential(double(), make_norm(norm, channels, **dd), nn.GELU(), double())
    if in_stride == 2 * out_stride:
        return nn.Sequential(double())
    if in_stride == out_stride:
        return nn.Identity()
    if out_stride in (2 * in_stride, 4 * in_stride, 8 * in_stride):
        factor = out_stride // in_stride
        if reduction == "pool":
            return nn.MaxPool2d(factor)
        return nn.Sequential(*(layer for _ in range(factor.bit_length() - 1) for layer in halve()))
    raise ValueError(
        f"cannot bring stride {in_stride} to stride {out_stride}; maps get 2 or 4 times as fine, or 2, 4 or 8 times as "
        "coarse"
    )
