"""Continuous scan of PlainMamba (arXiv 2403.17695, figure 3): neighbours in the path are neighbours in the image."""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["snake"]


def _serpentine(lines: Tensor) -> Tensor:
    """Lines (n, length) one after the other, every second one backwards, (n * length,)."""
    lines = lines.clone()
    lines[1::2] = lines[1::2].flip(1)
    return lines.flatten()


@register_scan("snake")
def snake(H: int, W: int) -> Tensor:
    """Along the rows, its reverse, along the columns, its reverse, (4, H * W)."""
    cells = torch.arange(H * W).view(H, W)
    rows, columns = _serpentine(cells), _serpentine(cells.t())
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])
