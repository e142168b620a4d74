"""Local scan of LocalMamba (arXiv 2403.09338, figure 3): window after window, row by row inside each."""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["window"]


@register_scan("window")
def window(H: int, W: int, size: int = 7, device: torch.device | None = None) -> Tensor:
    """One path, (1, cells of the grid padded to whole windows).

    The grid is padded at the bottom and right; padding cells are zero tokens that are stepped, as published.

    Raises:
        ValueError: If ``size`` is less than 1.
    """
    if size < 1:
        raise ValueError(f"window scan: size must be at least 1, got {size}")
    rows, columns = -(-H // size), -(-W // size)
    row, column = (torch.arange(n * size, device=device) for n in (rows, columns))
    padded = torch.where((row.unsqueeze(1) < H) & (column < W), row.unsqueeze(1) * W + column, -1)
    windows = padded.view(rows, size, columns, size).transpose(1, 2)  # (rows, columns, size, size)
    return windows.reshape(1, -1)
