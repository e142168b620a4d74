"""Hilbert curve: a path without jumps that stays in one quadrant before it enters the next.

The curve covers the smallest enclosing square whose side is a power of two; cells outside of the grid are left out, so
on other grids than such squares the path jumps over the gaps.
"""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["hilbert"]


@register_scan("hilbert")
def hilbert(H: int, W: int, device: torch.device | None = None) -> Tensor:
    """The curve and its reverse, (2, H * W)."""
    side = 1
    row = column = torch.zeros(1, dtype=torch.long, device=device)  # (side^2,)
    while side < max(H, W):
        row, column = (
            torch.cat([column, row, row + side, 2 * side - 1 - column]),
            torch.cat([row, column + side, column + side, side - 1 - row]),
        )
        side *= 2
    inside = (row < H) & (column < W)
    forward = (row * W + column)[inside]
    return torch.stack([forward, forward.flip(0)])
