"""What heads for semantic segmentation share: the classifier of every pixel, named as in mmsegmentation."""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["DecodeHead"]


class DecodeHead(nn.Module):
    """Maps of several strides to logits at the stride of the finest.

    A head derives from it, builds its layers in the constructor, and defines ``forward_features``.

    Attributes:
        num_classes: Classes K.
        channels: Width D of the features that the classifier reads.

    Args:
        in_channels: Width of every map.
        in_strides: Pixels of the image to a cell of every map.
        num_classes: Classes K.
        channels: Width D.
        dropout: Probability that a channel is dropped before the classifier.

    Raises:
        ValueError: If there are no maps or classes, or ``in_channels`` and ``in_strides`` are not as many.
    """

    def __init__(
        self, in_channels: Sequence[int], in_strides: Sequence[int], num_classes: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        if not in_channels or len(in_channels) != len(in_strides):
            raise ValueError(
                f"in_channels={list(in_channels)} and in_strides={list(in_strides)} do not belong together; give one "
                "of each for every map"
            )
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} has to be positive")
        self.in_channels, self.in_strides = list(in_channels), list(in_strides)
        self.num_classes, self.channels = num_classes, channels
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward_features(self, features: Sequence[Tensor]) -> Tensor:
        """Maps, one per entry of ``in_channels``, to what the classifier reads, (B, D, H, W)."""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B, in_channels[i], H_i, W_i), the finest first, to logits (B, K, H, W).

        Raises:
            ValueError: If the maps are not those that the head was made for.
        """
        widths = [feature.shape[1] for feature in features]
        if widths != self.in_channels:
            raise ValueError(f"this head reads maps of {self.in_channels} channels, got {widths}")
        return self.conv_seg(self.dropout(self.forward_features(features)))
