"""The grid of image features that connectors with a spatial part work on."""

import math

from torch import Tensor

__all__ = ["feature_grid"]


def feature_grid(features: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns (H, W) of features (B, N, C), a square if they are not given.

    Raises:
        ValueError: If N is not H * W, or no square number where the grid is not given.
    """
    count = features.shape[1]
    side = math.isqrt(count)
    H, W = grid or (side, side)
    if count != H * W:
        given = f"a grid of {H} x {W}" if grid else "a square grid; give the grid (H, W)"
        raise ValueError(f"{count} image features do not fit {given}")
    return H, W
