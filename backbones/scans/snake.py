"""Continuous scan of PlainMamba (arXiv 2403.17695, figure 3): neighbours in the path are neighbours in the image."""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["SNAKE_MOVES", "snake", "snake_moves"]

SNAKE_MOVES = ("start", "right", "left", "up", "down")


def _serpentine(lines: Tensor) -> Tensor:
    """Lines (n, length) one after the other, every second one backwards, (n * length,)."""
    lines = lines.clone()
    lines[1::2] = lines[1::2].flip(1)
    return lines.flatten()


@register_scan("snake")
def snake(H: int, W: int, device: torch.device | None = None) -> Tensor:
    """Along the rows, its reverse, along the columns, its reverse, (4, H * W)."""
    cells = torch.arange(H * W, device=device).view(H, W)
    rows, columns = _serpentine(cells), _serpentine(cells.t())
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])


def snake_moves(H: int, W: int, device: torch.device | None = None) -> Tensor:
    """The move that led to every step of :func:`snake`, an index into ``SNAKE_MOVES``, (4, H * W)."""
    paths = snake(H, W, device)
    down, right = (paths // W).diff(dim=1), (paths % W).diff(dim=1)  # (4, H * W - 1), one of them 0, the other +-1
    moves = torch.where(down == 0, torch.where(right > 0, 1, 2), torch.where(down < 0, 3, 4))
    return torch.cat([torch.zeros_like(paths[:, :1]), moves], dim=1)
