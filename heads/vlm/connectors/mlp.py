"""Two linear layers with a GELU between them, as in LLaVA-1.5 (arXiv 2310.03744)."""

import torch
from torch import Tensor, nn

from zoo.heads.registry import register_head

__all__ = ["MLPConnector"]


@register_head("mlp_connector", task="connector")
class MLPConnector(nn.Module):
    """Linear, GELU, linear; the hidden layer is as wide as the output.

    Args:
        in_channels: Channels C of the image features.
        out_channels: Width D of the decoder's embeddings.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layers = nn.Sequential(
            nn.Linear(in_channels, out_channels, **dd), nn.GELU(), nn.Linear(out_channels, out_channels, **dd)
        )

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features (B, N, C) to tokens (B, N, D); the grid (H, W) makes no difference."""
        return self.layers(features)
