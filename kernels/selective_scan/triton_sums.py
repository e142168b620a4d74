"""Sums over channels and over programs in the backward of the selective scan."""

import triton
import triton.language as tl

__all__ = ["add_partials_kernel", "channel_sums"]


@triton.jit
def lane_rows(x):
    """x (16, D), a channel to a lane, as (D / 2, 32): the left operand of a matrix product, as the lanes hold it.

    Nothing moves. Of a product of 16 rows, lane l holds rows l / 4 and l / 4 + 8 in columns l % 4 + 4 i. State n goes
    to half n % 2 of the rows and to columns 4 (n / 2) to 4 (n / 2) + 3.
    """
    x = tl.reshape(x, (8, 2, x.shape[1] // 4, 4))  # (n / 2, n % 2, quad, lane of the quad)
    return tl.reshape(tl.permute(x, (1, 2, 0, 3)), (x.shape[2] * 2, 32))


@triton.jit
def channel_sums(x, selector, EXACT: tl.constexpr):
    """Sums over the channels of x (16, D), (16,), a quarter of the way on the matrix unit.

    Exchanging values between lanes is the slowest way to add them: all of a multiprocessor's warps share one unit for
    it, and this takes 12 exchanges instead of 80. The matrix unit reads float32 as tf32, with 11 bits; EXACT splits
    what it reads into two such parts.
    """
    rows = lane_rows(x)
    if EXACT:
        high = (rows.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        sums = tl.dot(rows - high, selector, input_precision="tf32")
        sums = tl.dot(high, selector, sums, input_precision="tf32")
    else:
        sums = tl.dot(rows, selector, input_precision="tf32")
    sums = tl.sum(tl.reshape(sums, (2, sums.shape[0] // 2, 8)), 1)
    return tl.reshape(tl.permute(sums, (1, 0)), (16,))


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
