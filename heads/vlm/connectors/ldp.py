"""Lightweight downsample projector, version 2, of MobileVLM V2 (arXiv 2402.03766).

Two linear layers, pooling to a grid of fixed size, and a depthwise convolution with identity as position encoding (PEG,
arXiv 2102.10882). Cobra's form (arXiv 2403.14520) has a first layer of four times the input's width and 14 x 14 tokens;
MobileVLM V2's has ``hidden_channels=out_channels`` and 12 x 12 tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.registry import register_head
from zoo.heads.vlm.connectors.grid import feature_grid

__all__ = ["LDPConnector"]


@register_head("ldp_connector", task="connector")
class LDPConnector(nn.Module):
    """Linear, GELU, linear, average pooling, depthwise 3 x 3 convolution plus identity.

    Args:
        in_channels: Channels C of the image features.
        out_channels: Width D of the decoder's embeddings.
        hidden_channels: Width of the first linear layer; default four times ``in_channels``.
        out_grid: Side of the grid of tokens that is left, whatever the image's size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int | None = None,
        out_grid: int = 14,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = hidden_channels or 4 * in_channels
        self.out_grid = out_grid
        self.layers = nn.Sequential(
            nn.Linear(in_channels, hidden, **dd), nn.GELU(), nn.Linear(hidden, out_channels, **dd)
        )
        self.position = nn.Conv2d(out_channels, out_channels, 3, padding=1, groups=out_channels, **dd)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features (B, H * W, C) to tokens (B, out_grid * out_grid, D).

        Args:
            features: Image features, row by row.
            grid: Their rows and columns (H, W); default a square.

        Raises:
            ValueError: If the features do not fit the grid.
        """
        H, W = feature_grid(features, grid)
        x = self.layers(features).unflatten(1, (H, W)).permute(0, 3, 1, 2)  # (B, D, H, W), a view
        x = F.adaptive_avg_pool2d(x, self.out_grid)
        return (self.position(x) + x).flatten(2).transpose(1, 2)
