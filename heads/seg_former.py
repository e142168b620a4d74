"""The light head of SegFormer (arXiv 2105.15203): every map to one width, all added up at the finest stride.

Parameters have the names of mmsegmentation's ``SegformerHead``, so its weights fit. There, all maps are enlarged and
joined before one 1x1 convolution. Here, each map goes through its part of this convolution before it is enlarged: the
same numbers, for a fraction of memory and work.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.decode_head import DecodeHead
from zoo.heads.layers import Norm, conv_norm_act, resize
from zoo.heads.registry import register_head

__all__ = ["SegFormerHead"]


@register_head("seg_former", task="segmentation")
class SegFormerHead(DecodeHead):
    """1x1 convolutions on every map and on all together.

    Args:
        in_channels: Width of every map, the finest first.
        in_strides: Pixels of the image to a cell of every map.
        num_classes: Classes K.
        channels: Width D of every level.
        norm: Norm after every convolution; see :func:`~zoo.heads.layers.make_norm`.
        dropout: Probability that a channel is dropped before the classifier.

    Raises:
        ValueError: If arguments do not fit together or are not known.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        num_classes: int,
        channels: int = 256,
        norm: Norm = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_channels, in_strides, num_classes, channels, dropout)
        self.convs = nn.ModuleList(conv_norm_act(width, channels, norm=norm) for width in in_channels)
        self.fusion_conv = conv_norm_act(len(in_channels) * channels, channels, norm=norm)

    def forward_features(self, features: Sequence[Tensor]) -> Tensor:
        """Maps, the finest first, to one of the finest's size, (B, D, H, W)."""
        size = features[0].shape[-2:]
        conv, *norm_and_act = self.fusion_conv
        parts = conv.weight.split(self.channels, dim=1)
        x = sum(
            resize(F.conv2d(level(feature), part), size)
            for level, feature, part in zip(self.convs, features, parts, strict=True)
        )
        for layer in norm_and_act:
            x = layer(x)
        return x
