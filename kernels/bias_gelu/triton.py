"""Bias and GELU in Triton: every number is read and written once, forward and backward.

Programs of the backward stay: each walks over tiles of rows, as far apart as there are programs of the same channels,
and adds up its part of the bias's gradient in registers. The parts end in a buffer and are added up afterwards: no
atomics, so every call gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, device_guard, multiprocessors
from zoo.kernels.registration import accumulate_dtype
from zoo.kernels.triton_math import normal_distribution

__all__ = ["backward", "forward"]

ROWS, BLOCK, WARPS = 16, 128, 4  # of a tile, its channels, and the warps of a program
RESIDENT = 4  # backward programs on a multiprocessor
STAGES = 3  # of these: tiles are loaded into shared memory while one is worked on


@triton.jit
def _load_channels(bias, channel, D: tl.constexpr, dtype: tl.constexpr):
    return tl.load(bias + channel, mask=channel < D, other=0.0).to(dtype)[None, :]


@triton.jit
def _forward_kernel(
    x, bias, out, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COARSE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cell = row[:, None] * D + channel[None, :]
    mask = (row < rows)[:, None] & (channel < D)[None, :]
    v = tl.load(x + cell, mask=mask, other=0.0).to(dtype) + _load_channels(bias, channel, D, dtype)
    below, _ = normal_distribution(v, COARSE)
    tl.store(out + cell, v * below, mask=mask)


@triton.jit
def _backward_kernel(
    grad_out, x, bias, d_x, sums, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, COARSE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shift = _load_channels(bias, channel, D, dtype)
    d_bias = tl.zeros((ROWS, BLOCK), dtype)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * tl.full((), ROWS, tl.int64) + tl.arange(0, ROWS)
        cell = row[:, None] * D + channel[None, :]
        mask = (row < rows)[:, None] & (channel < D)[None, :]
        v = tl.load(x + cell, mask=mask, other=0.0).to(dtype) + shift
        grad = tl.load(grad_out + cell, mask=mask, other=0.0).to(dtype)
        below, density = normal_distribution(v, COARSE)
        grad *= below + v * density
        d_bias += grad
        tl.store(d_x + cell, grad, mask=mask)
    tl.store(sums + tl.program_id(0) * D + channel, tl.sum(d_bias, axis=0), mask=channel < D)


def _options(x: Tensor) -> dict:
    """Compile-time arguments of both kernels."""
    dtype = tl.float64 if accumulate_dtype(x) == torch.float64 else tl.float32
    return dict(D=x.shape[-1], ROWS=ROWS, BLOCK=BLOCK, COARSE=x.dtype.itemsize == 2, dtype=dtype, num_warps=WARPS)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """Outputs (..., D) in x's dtype."""
    out, D = x.new_empty(x.shape), x.shape[-1]
    rows = x.numel() // D
    with device_guard(x.device):
        _forward_kernel[(ceil_div(rows, ROWS), ceil_div(D, BLOCK))](
            x.contiguous(), bias.contiguous(), out, rows, **_options(x)
        )
    return out


def backward(grad_out: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
    """Gradients of x and bias."""
    d_x, D = x.new_empty(x.shape), x.shape[-1]
    rows, tiles = x.numel() // D, ceil_div(D, BLOCK)
    programs = min(ceil_div(rows, ROWS), max(1, multiprocessors(x.device) * RESIDENT // tiles))
    sums = x.new_empty(programs, D, dtype=accumulate_dtype(x))
    with device_guard(x.device):
        _backward_kernel[(programs, tiles)](
            grad_out.contiguous(), x.contiguous(), bias.contiguous(), d_x, sums, rows, STAGES=STAGES, **_options(x)
        )
    return [d_x, sums.sum(0).to(bias.dtype)]
