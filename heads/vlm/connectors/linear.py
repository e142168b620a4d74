"""One linear layer from image features to token embeddings, as in LLaVA (arXiv 2304.08485)."""

import torch
from torch import Tensor, nn

from zoo.heads.registry import register_head

__all__ = ["LinearConnector"]


@register_head("linear_connector", task="connector")
class LinearConnector(nn.Module):
    """Linear layer.

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
        self.proj = nn.Linear(in_channels, out_channels, device=device, dtype=dtype)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features (B, N, C) to tokens (B, N, D); the grid (H, W) makes no difference."""
        return self.proj(features)
