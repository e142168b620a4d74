"""Row by row from the top left: the order of a flattened image."""

import torch
from torch import Tensor

from zoo.backbones.scans.registry import register_scan

__all__ = ["bidirectional", "raster"]


@register_scan("raster")
def raster(H: int, W: int, device: torch.device | None = None) -> Tensor:
    """One path, (1, H * W)."""
    return torch.arange(H * W, device=device)[None]


@register_scan("bidirectional")
def bidirectional(H: int, W: int, device: torch.device | None = None) -> Tensor:
    """The raster order and its reverse, (2, H * W) (Vim, arXiv 2401.09417)."""
    forward = torch.arange(H * W, device=device)
    return torch.stack([forward, forward.flip(0)])
