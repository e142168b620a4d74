"""Column by column from the top left."""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["columns"]


@register_scan("columns")
def columns(H: int, W: int, device: torch.device | None = None) -> Tensor:
    """One path, (1, H * W)."""
    return torch.arange(H * W, device=device).view(H, W).t().reshape(1, -1)
