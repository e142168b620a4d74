"""Hilbert curve: a path without jumps that stays in one quadrant before it enters the next.

The curve covers the smallest enclosing square whose side is a power of two; cells outside of the grid are left out, so
on other grids than such squares the path jumps over the gaps.
"""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["hilbert"]


@register_scan("hilbert")
def hilbert(H: int, W: int) -> Tensor:
    """The curve and its reverse, (2, H * W)."""
    side = 1
    curve = torch.zeros(1, 2, dtype=torch.long)  # (side^2, 2) points (row, column)
    while side < max(H, W):
        transposed = curve.flip(1)
        first, second, third = transposed, curve + torch.tensor([0, side]), curve + side
        fourth = torch.tensor([2 * side - 1, side - 1]) - transposed
        curve = torch.cat([first, second, third, fourth])
        side *= 2
    row, column = curve.unbind(1)
    inside = (row < H) & (column < W)
    forward = (row * W + column)[inside]
    return torch.stack([forward, forward.flip(0)])
