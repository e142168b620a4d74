"""Rows of D channels in Triton kernels, and their norms.

A program holds whole rows in registers, ELEMENTS numbers to a lane: several rows with one warp if D is small, one row
with up to 16 warps if it is large. D is known at compile time, so that rows are read 16 bytes at a time wherever
D is a multiple of 8.
"""

import torch
import triton
import triton.language as tl

from zoo.kernels._triton import ceil_div, next_power_of_2

__all__ = ["centre", "inverse_rms", "load_channels", "norm_gradient", "row_options", "row_tile"]

ELEMENTS = 16  # of a row, or of several, in a lane; backward kernels have five to seven such tiles in registers
MOST_ROWS = 32  # of a tile: what is known of a row takes registers too


@triton.jit
def row_tile(first, rows, stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of the rows from ``first`` on (ROWS,), offsets from the first row and mask of their elements."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    offset = row[:, None] * stride + channel[None, :]
    return first + row, offset, (first + row < rows)[:, None] & (channel < D)[None, :]


@triton.jit
def load_channels(values, D: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Weight or bias of all channels, (1, BLOCK)."""
    channel = tl.arange(0, BLOCK)
    return tl.load(values + channel, mask=channel < D, other=0.0).to(dtype)[None, :]


@triton.jit
def centre(x, mask, D: tl.constexpr):
    """Rows without their means, zero where the mask is false, as x is."""
    return tl.where(mask, x - tl.sum(x, axis=1)[:, None] / D, 0.0)


@triton.jit
def inverse_rms(x, row, rows, D: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean square + eps) of every row, (ROWS, 1); finite for rows that are not there, also if eps is 0."""
    return tl.rsqrt(tl.where(row < rows, tl.sum(x * x, axis=1) / D + EPS, 1.0))[:, None]


@triton.jit
def norm_gradient(g, normed, inverse, D: tl.constexpr, CENTERED: tl.constexpr):
    """Gradient of rows whose norm, before weight and bias, is ``normed`` and has the gradient g."""
    d_x = g - normed * (tl.sum(g * normed, axis=1)[:, None] / D)
    if CENTERED:
        d_x -= tl.sum(g, axis=1)[:, None] / D
    return d_x * inverse


def row_options(exact: torch.dtype, D: int, eps: float, least_warps: int = 1) -> dict:
    """Compile-time arguments of kernels that norm rows of D channels, with sums in a dtype."""
    block = next_power_of_2(D)
    tile = 32 * ELEMENTS  # of a warp
    warps = max(ceil_div(block, tile), least_warps)
    return dict(
        EPS=float(eps),  # at run time it would be rounded to float32
        D=D,
        ROWS=min(ceil_div(tile * warps, block), MOST_ROWS * warps),
        BLOCK=block,
        dtype=tl.float64 if exact == torch.float64 else tl.float32,
        num_warps=warps,
    )
