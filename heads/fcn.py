"""The head of fully convolutional networks (arXiv 1411.4038): a few convolutions on one map, and a classifier.

On a middle stage it is the usual auxiliary head, which gives the backbone a second loss. Parameters have the names of
mmsegmentation's ``FCNHead``, so its weights fit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.heads.decode_head import DecodeHead
from zoo.heads.layers import Norm, conv_norm_act
from zoo.heads.registry import register_head

__all__ = ["FCN"]


@register_head("fcn", task="segmentation")
class FCN(DecodeHead):
    """Convolutions on one of the maps.

    Args:
        in_channels: Width of every map.
        in_strides: Pixels of the image to a cell of every map.
        num_classes: Classes K.
        channels: Width D of the convolutions.
        index: Map that is read; negative counts from the last.
        num_convs: Convolutions before the classifier, at least one.
        kernel_size: Side of their kernels.
        concat_input: Whether another convolution joins the map itself with what they make of it.
        norm: Norm after every convolution; see :func:`~zoo.heads.layers.make_norm`.
        dropout: Probability that a channel is dropped before the classifier.

    Raises:
        ValueError: If there is no such map, or arguments do not fit together or are not known.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        num_classes: int,
        channels: int = 256,
        index: int = -1,
        num_convs: int = 1,
        kernel_size: int = 3,
        concat_input: bool = False,
        norm: Norm = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_channels, in_strides, num_classes, channels, dropout)
        if not -len(in_channels) <= index < len(in_channels):
            raise ValueError(f"index={index} is not among the {len(in_channels)} maps; use 0 to {len(in_channels) - 1}")
        if num_convs < 1:
            raise ValueError(f"num_convs={num_convs} has to be at least 1")
        self.index = index
        widths = [in_channels[index]] + [channels] * (num_convs - 1)
        self.convs = nn.Sequential(*(conv_norm_act(width, channels, kernel_size, norm) for width in widths))
        joined = in_channels[index] + channels
        self.conv_cat = conv_norm_act(joined, channels, kernel_size, norm) if concat_input else None

    def forward_features(self, features: Sequence[Tensor]) -> Tensor:
        """Maps to one of the size of the map that is read, (B, D, H, W)."""
        x = features[self.index]
        out = self.convs(x)
        return out if self.conv_cat is None else self.conv_cat(torch.cat([x, out], dim=1))
