"""Shuffled scans (ShuffleMamba, arXiv 2408.17081): a random order, which breaks the habit of reading in raster order.

A table is a function of its seed; training code draws a new seed for every call.
"""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["shuffled", "shuffled_bidirectional"]


@register_scan("shuffled")
def shuffled(H: int, W: int, seed: int = 0, device: torch.device | None = None) -> Tensor:
    """One random order, (1, H * W)."""
    order = torch.randperm(H * W, generator=torch.Generator().manual_seed(seed))  # on the CPU, so the same everywhere
    return order.to(device)[None]


@register_scan("shuffled_bidirectional")
def shuffled_bidirectional(H: int, W: int, seed: int = 0, device: torch.device | None = None) -> Tensor:
    """One random order and its reverse, (2, H * W)."""
    order = shuffled(H, W, seed, device)[0]
    return torch.stack([order, order.flip(0)])
