"""Diagonal scan: anti-diagonal after anti-diagonal, so that distance from a corner grows along the path."""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["diagonal"]


@register_scan("diagonal")
def diagonal(H: int, W: int, device: torch.device | None = None) -> Tensor:
    """From the top left, from the top right, and both reversed, (4, H * W)."""
    row, column = torch.meshgrid(*(torch.arange(n, device=device) for n in (H, W)), indexing="ij")
    falling = ((row + column) * H + row).flatten().argsort()  # by anti-diagonal, then from top to bottom
    rising = ((row + W - 1 - column) * H + row).flatten().argsort()
    return torch.stack([falling, rising, falling.flip(0), rising.flip(0)])
