"""Efficient 2D scan of EfficientVMamba (arXiv 2403.09977): every path walks one sub-grid of skipped cells."""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["atrous"]


@register_scan("atrous")
def atrous(H: int, W: int, rate: int = 2, device: torch.device | None = None) -> Tensor:
    """One path for each of the rate^2 sub-grids, (rate^2, ceil(H / rate) * ceil(W / rate)).

    The sub-grids that start in an odd row are walked column by column, the others row by row; row offsets vary first.
    The grid is padded at the bottom and right to a multiple of ``rate``; padding cells are zero tokens that are
    stepped, as in the published models.

    Raises:
        ValueError: If ``rate`` is less than 1.
    """
    if rate < 1:
        raise ValueError(f"atrous scan: rate must be at least 1, got {rate}")
    padded = torch.full((-(-H // rate) * rate, -(-W // rate) * rate), -1, device=device)
    padded[:H, :W] = torch.arange(H * W, device=device).view(H, W)
    paths = []
    for column in range(rate):
        for row in range(rate):
            cells = padded[row::rate, column::rate]
            paths.append((cells.t() if row % 2 else cells).flatten())
    return torch.stack(paths)
