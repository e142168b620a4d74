"""Cross scan of VMamba (arXiv 2401.10166, figure 3): rows and columns, each from both ends."""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["cross"]


@register_scan("cross")
def cross(H: int, W: int, device: torch.device | None = None) -> Tensor:
    """Row-major, column-major, and both reversed, (4, H * W)."""
    cells = torch.arange(H * W, device=device).view(H, W)
    rows, columns = cells.flatten(), cells.t().flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])
