"""UPerNet (arXiv 1807.10221): a feature pyramid network whose coarsest level pools the whole image at several scales.

Parameters have the names of mmsegmentation's ``UPerHead``, so its weights fit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.heads.decode_head import DecodeHead
from zoo.heads.layers import Norm, conv_norm_act, resize
from zoo.heads.registry import register_head

__all__ = ["UPerNet"]


@register_head("uper_net", task="segmentation")
class UPerNet(DecodeHead):
    """Pooling pyramid on the coarsest map, top-down path, all levels fused at the finest.

    Args:
        in_channels: Width of every map, the finest first.
        in_strides: Pixels of the image to a cell of every map.
        num_classes: Classes K.
        channels: Width D of every level.
        pool_scales: Sides of the grids to which the coarsest map is pooled.
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
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        norm: Norm = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_channels, in_strides, num_classes, channels, dropout)
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_norm_act(coarsest, channels, norm=norm))
            for scale in pool_scales
        )
        self.bottleneck = conv_norm_act(coarsest + len(pool_scales) * channels, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(conv_norm_act(width, channels, norm=norm) for width in finer)
        self.fpn_convs = nn.ModuleList(conv_norm_act(channels, channels, 3, norm) for _ in finer)
        self.fpn_bottleneck = conv_norm_act(len(in_channels) * channels, channels, 3, norm)

    def forward_features(self, features: Sequence[Tensor]) -> Tensor:
        """Maps, the finest first, to one of the finest's size, (B, D, H, W)."""
        *finer, coarsest = features
        level = self._pool(coarsest)
        levels = [level]
        for feature, lateral, conv in reversed(list(zip(finer, self.lateral_convs, self.fpn_convs, strict=True))):
            level = lateral(feature) + resize(level, feature.shape[-2:])
            levels.insert(0, conv(level))
        size = levels[0].shape[-2:]
        return self.fpn_bottleneck(torch.cat([levels[0], *(resize(level, size) for level in levels[1:])], dim=1))

    def _pool(self, x: Tensor) -> Tensor:
        """The coarsest map (B, in_channels[-1], H, W) with its surroundings at every scale, (B, D, H, W)."""
        if self.training and x.shape[0] == 1 and any(isinstance(m, nn.BatchNorm2d) for m in self.psp_modules.modules()):
            raise ValueError(
                "a batch of one image has no batch statistics of what is pooled to one cell; train with at least two "
                "images, with norm='group', or with nn.SyncBatchNorm over several processes"
            )
        pooled = [resize(pool(x), x.shape[-2:]) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))
