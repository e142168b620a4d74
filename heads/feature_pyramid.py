"""Feature pyramid network (arXiv 1612.03144): maps of falling resolution to one width, coarse ones added to fine ones.

The network is torchvision's. This module gives it a list of maps, as heads get them, and the levels beyond the last
map: one by subsampling for R-CNNs, P6 and P7 by strided convolutions for RetinaNet (arXiv 1708.02002) and FCOS
(arXiv 1904.01355). For maps of one stride, as columnar backbones give, it comes behind a
:class:`~zoo.heads.rescale_pyramid.RescalePyramid`.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from zoo.heads.rescale_pyramid import RescalePyramid

__all__ = ["ExtraLevels", "FeaturePyramid", "RescaledFeaturePyramid", "extra_block", "extra_strides"]

ExtraLevels = Literal["none", "pool", "p6p7"]


class FeaturePyramid(FeaturePyramidNetwork):
    """torchvision's network on a list of maps, finest first; parameters have torchvision's names.

    Attributes:
        out_channels: Channels of every level.
        strides: Stride of every level in pixels, with the extra ones.
        num_maps: Levels that are not extra; the first ones.

    Args:
        in_channels: Channels of every map.
        in_strides: Their strides in pixels, rising.
        out_channels: Channels of every level.
        extra_levels: What follows the last map: ``"pool"`` for one level that is every second cell of the last,
            ``"p6p7"`` for two levels by convolutions of stride 2, ``"none"``.
        p6_from_map: Whether P6 reads the last map as the backbone gave it instead of the last level.
        norm_layer: Makes the norm of each convolution from its channels; default none, with biases instead.

    Raises:
        ValueError: If channels and strides do not belong together, strides do not rise, or ``extra_levels`` is unknown.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        out_channels: int = 256,
        extra_levels: ExtraLevels = "pool",
        p6_from_map: bool = False,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        _check_maps(in_channels, in_strides)
        p6_channels = in_channels[-1] if p6_from_map else out_channels
        extra = extra_block(extra_levels, p6_channels, out_channels, p6_from_map)
        super().__init__(list(in_channels), out_channels, extra, norm_layer)
        self.out_channels = out_channels
        self.strides = [*in_strides, *extra_strides(extra_levels, in_strides[-1])]
        self.num_maps = len(in_strides)

    def forward(self, features: Sequence[Tensor]) -> "OrderedDict[str, Tensor]":
        """Maps (B, D_i, H_i, W_i), finest first, to levels (B, out_channels, H_i, W_i).

        Returns:
            The levels by name: ``"0"``, ``"1"``... for the maps, then ``"pool"``, or ``"p6"`` and ``"p7"``.

        Raises:
            ValueError: If the number of maps is not the one that the network was built for.
        """
        if len(features) != len(self.inner_blocks):
            raise ValueError(f"expected {len(self.inner_blocks)} feature maps, got {len(features)}")
        return super().forward(OrderedDict((str(i), feature) for i, feature in enumerate(features)))


class RescaledFeaturePyramid(nn.Module):
    """Maps of one stride, brought to several by transposed convolutions and pooling, through a feature pyramid network.

    Attributes as :class:`FeaturePyramid`.

    Args:
        in_channels: Channels of every map.
        in_stride: Their stride in pixels.
        out_channels: Channels of every level.
        out_strides: Strides of the levels but for the extra ones.
        extra_levels: As of :class:`FeaturePyramid`.

    Raises:
        ValueError: If a stride cannot be reached from ``in_stride``, or ``extra_levels`` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        in_stride: int = 16,
        out_channels: int = 256,
        out_strides: Sequence[int] = (4, 8, 16, 32),
        extra_levels: ExtraLevels = "pool",
    ) -> None:
        super().__init__()
        self.rescale = RescalePyramid(in_channels, in_stride, out_strides)
        self.fpn = FeaturePyramid(self.rescale.out_channels, out_strides, out_channels, extra_levels)
        self.out_channels, self.strides, self.num_maps = out_channels, self.fpn.strides, self.fpn.num_maps

    def forward(self, features: Sequence[Tensor]) -> "OrderedDict[str, Tensor]":
        """Maps (B, D, H, W), one per level or one for all, to levels by name as :class:`FeaturePyramid` gives them."""
        return self.fpn(self.rescale(features))


def extra_block(
    extra_levels: ExtraLevels, in_channels: int, out_channels: int, from_map: bool = False
) -> ExtraFPNBlock | None:
    """torchvision's module that adds levels behind the last one.

    Args:
        extra_levels: As of :class:`FeaturePyramid`.
        in_channels: Channels of what P6 reads.
        out_channels: Channels of every level.
        from_map: Whether P6 reads the backbone's last map; else the pyramid's last level.

    Raises:
        ValueError: If ``extra_levels`` is unknown.
    """
    if extra_levels not in get_args(ExtraLevels):
        raise ValueError(f"extra_levels={extra_levels!r} is not known; use one of {', '.join(get_args(ExtraLevels))}")
    if extra_levels == "none":
        return None
    if extra_levels == "pool":
        return LastLevelMaxPool()
    block = LastLevelP6P7(in_channels, out_channels)
    block.use_P5 = not from_map  # torchvision guesses it from the channels, which can be equal by chance
    return block


def extra_strides(extra_levels: ExtraLevels, last_stride: int) -> list[int]:
    """Strides of the levels that :func:`extra_block` adds."""
    count = {"none": 0, "pool": 1, "p6p7": 2}[extra_levels]
    return [last_stride * 2 ** (i + 1) for i in range(count)]


def _check_maps(channels: Sequence[int], strides: Sequence[int]) -> None:
    if not channels or len(channels) != len(strides):
        raise ValueError(f"channels {list(channels)} and strides {list(strides)} do not belong together")
    if any(coarse <= fine for fine, coarse in pairwise(strides)):
        raise ValueError(
            f"a feature pyramid network needs maps of rising strides, got {list(strides)}; for maps of one stride use "
            "SimplePyramid or RescaledFeaturePyramid"
        )
