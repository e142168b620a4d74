"""Three linear layers with GELUs between them, the first four times as wide as its input.

From Prismatic VLMs (arXiv 2402.07865), where it joins the features of two fused vision towers; used by Cobra
(arXiv 2403.14520) and, with other weights at the start, as the last part of ML-Mamba's connector (arXiv 2407.19832).
"""

import torch
from torch import Tensor, nn

from zoo.heads.registry import register_head

__all__ = ["FusedMLPConnector"]


@register_head("fused_mlp_connector", task="connector")
class FusedMLPConnector(nn.Module):
    """Linear, GELU, linear, GELU, linear.

    Args:
        in_channels: Channels C of the image features.
        out_channels: Width D of the decoder's embeddings.
        expansion: Width of the first layer as a multiple of ``in_channels``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = expansion * in_channels
        self.layers = nn.Sequential(
            nn.Linear(in_channels, hidden, **dd),
            nn.GELU(),
            nn.Linear(hidden, out_channels, **dd),
            nn.GELU(),
            nn.Linear(out_channels, out_channels, **dd),
        )

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features (B, N, C) to tokens (B, N, D); the grid (H, W) makes no difference."""
        return self.layers(features)
