"""The simple feature pyramid of ViTDet (arXiv 2203.16527): all levels from the last map of a columnar backbone.

The map is brought to each stride by itself, by transposed convolutions that halve the channels or by max pooling, then
to the common width by a 1x1 and a 3x3 convolution, each followed by a layer norm over the channels. Nothing flows from
level to level.
"""

from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from zoo.heads.feature_pyramid import ExtraLevels, extra_block, extra_strides

__all__ = ["SimplePyramid"]


class SimplePyramid(nn.Module):
    """One map to a pyramid.

    Attributes:
        out_channels: Channels of every level.
        strides: Stride of every level in pixels, with the extra ones.
        num_maps: Levels that are not extra; the first ones.

    Args:
        in_channels: Channels D of the map.
        in_stride: Its stride in pixels.
        out_channels: Channels of every level.
        out_strides: Strides of the levels but for the extra ones, rising; each is ``in_stride`` times or over a power
            of two.
        extra_levels: What follows the last of them, as of :class:`~zoo.heads.feature_pyramid.FeaturePyramid`.

    Raises:
        ValueError: If a stride cannot be reached from ``in_stride``, strides do not rise, or ``extra_levels`` is
            unknown.
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
        if not out_strides or list(out_strides) != sorted(set(out_strides)):
            raise ValueError(f"out_strides={tuple(out_strides)} do not rise; give at least one, the finest first")
        self.levels = nn.ModuleList(_level(in_channels, in_stride, out_channels, stride) for stride in out_strides)
        self.extra_blocks = extra_block(extra_levels, out_channels, out_channels)
        self.out_channels = out_channels
        self.strides = [*out_strides, *extra_strides(extra_levels, out_strides[-1])]
        self.num_maps = len(out_strides)

    def forward(self, features: Sequence[Tensor]) -> "OrderedDict[str, Tensor]":
        """Maps of which the last, (B, D, H, W), is read, to levels (B, out_channels, H * in/out, W * in/out).

        Returns:
            The levels by name: ``"0"``, ``"1"``..., then ``"pool"``, or ``"p6"`` and ``"p7"``.
        """
        levels = [level(features[-1]) for level in self.levels]
        names = [str(i) for i in range(len(levels))]
        if self.extra_blocks is not None:
            levels, names = self.extra_blocks(levels, list(features), names)
        return OrderedDict(zip(names, levels, strict=True))


def _level(in_channels: int, in_stride: int, out_channels: int, out_stride: int) -> nn.Module:
    """What makes one level of the map."""
    rescale, channels = _rescale(in_channels, in_stride, out_stride)
    return nn.Sequential(
        *rescale,
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def _rescale(channels: int, in_stride: int, out_stride: int) -> tuple[list[nn.Module], int]:
    """Layers that change the stride, and the channels behind them."""
    if out_stride % in_stride == 0 and _is_power_of_two(out_stride // in_stride):
        factor = out_stride // in_stride
        return ([nn.MaxPool2d(factor)] if factor > 1 else []), channels
    if in_stride % out_stride or not _is_power_of_two(in_stride // out_stride):
        raise ValueError(
            f"cannot bring stride {in_stride} to stride {out_stride}; give out_strides that are {in_stride} times or "
            "over a power of two"
        )
    layers: list[nn.Module] = []
    for step in range((in_stride // out_stride).bit_length() - 1):
        if step > 0:
            layers += [LayerNorm2d(channels), nn.GELU()]
        half = max(channels // 2, 1)
        layers.append(nn.ConvTranspose2d(channels, half, kernel_size=2, stride=2))
        channels = half
    return layers, channels


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
