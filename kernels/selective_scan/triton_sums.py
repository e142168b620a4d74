"""Sums over channels and over programs in the backward of the selective scan."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, device_guard

__all__ = ["add_partials_kernel", "add_paths", "channel_sums", "pair_selector", "quad_sums", "store_pair_sums"]


@triton.jit
def lane_rows(x, COARSE: tl.constexpr):
    """x (16, D), a channel to a lane, as (D / 2, 32): the left operand of a matrix product, as the lanes hold it.

    Nothing moves. Of a product of 16 rows, lane l holds rows l / 4 and l / 4 + 8, and of every 8 columns l % 4 and
    l % 4 + 4; or 2 (l % 4) and 2 (l % 4) + 1, which Triton chooses if 16-bit numbers went into x. State n goes to half
    n % 2 of the rows.
    """
    QUADS: tl.constexpr = x.shape[1] // 4
    if COARSE:
        x = tl.reshape(x, (4, 2, 2, QUADS, 4))  # (n / 4, n / 2 % 2, n % 2, quad, lane of the quad)
        x = tl.permute(x, (2, 3, 0, 4, 1))
    else:
        x = tl.reshape(x, (8, 2, QUADS, 4))  # (n / 2, n % 2, quad, lane of the quad)
        x = tl.permute(x, (1, 2, 0, 3))
    return tl.reshape(x, (QUADS * 2, 32))


@triton.jit
def pair_selector(COARSE: tl.constexpr):
    """Right operand (32, 8) that adds the lanes of a quad: column n / 2 takes what is of states n and n + 1."""
    k = tl.arange(0, 32)
    pair = k // 4
    if COARSE:
        pair = k // 8 * 2 + k % 2
    return (pair[:, None] == tl.arange(0, 8)[None, :]).to(tl.float32)


@triton.jit
def channel_sums(x, selector, MATRIX: tl.constexpr, COARSE: tl.constexpr):
    """Sums over the channels of x (R, D), (R,); if MATRIX, with R = 16, a quarter of the way on the matrix unit.

    Exchanging values between lanes is the slowest way to add them: all of a multiprocessor's warps share one unit for
    it, and this takes 12 exchanges instead of 80. The matrix unit reads float32 as tf32, with 11 bits; unless COARSE,
    what it reads is split into two such parts.
    """
    if not MATRIX:
        sums = tl.sum(x, 1)
    else:
        rows = lane_rows(x, COARSE)
        if COARSE:
            sums = tl.dot(rows, selector, input_precision="tf32")
        else:
            high = (rows.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            sums = tl.dot(rows - high, selector, input_precision="tf32")
            sums = tl.dot(high, selector, sums, input_precision="tf32")
        sums = tl.sum(tl.reshape(sums, (2, sums.shape[0] // 2, 8)), 1)
        sums = tl.reshape(tl.permute(sums, (1, 0)), (16,))
    return sums


@triton.jit
def quad_sums(x, selector, PTX: tl.constexpr):
    """Sums of x (16, D) over the four channels of a quad: (half of the states and quad, pair of states).

    In bfloat16, which halves what is exchanged later, but for Triton's interpreter, which cannot multiply it.
    """
    sums = tl.dot(lane_rows(x, True), selector, input_precision="tf32")
    if PTX:
        sums = sums.to(tl.bfloat16)
    return sums


@triton.jit
def store_pair_sums(to, sums, tokens, visited, row_stride, N: tl.constexpr):
    """Stores the sums over channels for two tokens, of dB and of dC each, once the quads' are known.

    They are added on the matrix unit, which gives every lane the sums of both halves of the states. Lanes pick one of
    the four tensors, so that a single store takes them all.

    Args:
        to: Where the sums of token 0 are stored, N of dB and, 16 further on, N of dC.
        sums: ``quad_sums`` of dB and dC of the first token, then of the second.
        tokens: The two tokens.
        visited: Whether they are to be stored.
        row_stride: Distance between tokens.
    """
    ROWS: tl.constexpr = sums[0].shape[0]
    row = tl.arange(0, 16)
    half = (tl.arange(0, ROWS) // (ROWS // 2))[None, :] == (row % 2)[:, None]
    which = (row // 2)[:, None]
    total = tl.dot(half.to(sums[0].dtype), sums[0])
    for i in tl.static_range(1, 4):
        total = tl.where(which == i, tl.dot(half.to(sums[0].dtype), sums[i]), total)
    n = 2 * tl.arange(0, 8)[None, :] + (row % 2)[:, None]
    token = tl.where(which < 2, tokens[0], tokens[1])
    mask = (which < 4) & (n < N) & tl.where(which < 2, visited[0], visited[1])
    tl.store(to + (token * row_stride + which % 2 * 16 + n), total, mask=mask)


@triton.jit
def add_partials_kernel(
    partial, dB, dC, parts, rows, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Adds the partial sums (parts, rows, 2, BLOCK_N) in a fixed order and narrows them: dB and dC (rows, N)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (n < N)[None, :]
    at = partial + row[:, None] * 2 * BLOCK_N + n[None, :]
    sum_B = tl.zeros([ROWS, BLOCK_N], partial.dtype.element_ty)
    sum_C = tl.zeros([ROWS, BLOCK_N], partial.dtype.element_ty)
    for _ in range(parts):
        sum_B += tl.load(at, mask=mask, other=0.0)
        sum_C += tl.load(at + BLOCK_N, mask=mask, other=0.0)
        at += rows * 2 * BLOCK_N
    to = row[:, None] * N + n[None, :]
    tl.store(dB + to, sum_B.to(dB.dtype.element_ty), mask=mask)
    tl.store(dC + to, sum_C.to(dC.dtype.element_ty), mask=mask)


@triton.jit
def add_paths_kernel(x, y, numbers, K: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over K of x (B, K, numbers), to y (B, numbers)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    mask = at < numbers
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(x + (b * K + k) * numbers + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + b * numbers + at, total.to(y.dtype.element_ty), mask=mask)


def add_paths(x: Tensor) -> Tensor:
    """Sum over the paths of x (B, K, L, D), contiguous and not float64: (B, L, D)."""
    batch, K, L, channels = x.shape
    y = torch.empty(batch, L, channels, dtype=x.dtype, device=x.device)
    block = 1024
    with device_guard(x.device):
        add_paths_kernel[(ceil_div(L * channels, block), batch)](x, y, L * channels, K=K, BLOCK=block, num_warps=4)
    return y
