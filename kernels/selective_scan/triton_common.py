"""What the forward and the backward Triton kernel of the selective scan share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "LOG2E",
    "UNROLL",
    "block_shape",
    "offset_type",
    "path_lengths",
    "path_steps",
    "softplus",
    "states_first",
    "token_at",
]

LOG2E = tl.constexpr(1.4426950408889634)
UNROLL = 2  # steps whose loads are in flight together; the backward keeps that many states in registers


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact to rounding also where exp(x) is far below 1."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * 0.3333333333333333))
    return tl.maximum(x, 0.0) + tl.where(e < 0.01, series, tl.log(1.0 + e))


@triton.jit
def path_steps(lengths, path, columns, HAS_TABLE: tl.constexpr):
    """Steps of a path: all columns of the table, or fewer if it ends in -2."""
    if HAS_TABLE:
        steps = tl.load(lengths + path)
    else:
        steps = columns
    return steps


@triton.jit
def token_at(table, path, columns, step, steps, backwards, HAS_TABLE: tl.constexpr, OFFSET: tl.constexpr):
    """Token that a path reads at a step: >= 0 a token, -1 a zero token, -2 past the end, no step at all.

    Its type OFFSET is that of all offsets inside a batch element: 64 bits only where 32 do not suffice, since they cost
    twice the instructions.
    """
    inside = step < steps
    position = tl.where(backwards, steps - 1 - step, step)
    if HAS_TABLE:
        token = tl.load(table + path * columns + position, mask=inside, other=-2)
    else:
        token = tl.where(inside, position, -2)
    return token.to(OFFSET)


def block_shape(N: int) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_D, warps) of a program: one channel to a lane, at most 16 of its states in a thread's registers.

    With the states of a channel in one thread, the sum over states needs no exchange between threads, and values that
    belong to a channel (u, delta, z, y) are loaded by the very lane that uses them. Triton picks that layout by itself
    as long as it cannot prove that several neighbouring channels may be loaded at once; hence ``stride_N``, whose
    divisibility the kernels hide.
    """
    block_n = triton.next_power_of_2(N)
    return block_n, 32, max(1, block_n // 16)


def states_first(x: Tensor | None) -> Tensor | None:
    """(..., D, N) with the states before the channels in memory: (..., N, D)."""
    return None if x is None else x.transpose(-2, -1).contiguous()


def path_lengths(paths: Tensor | None) -> Tensor | None:
    """Steps of every path of a table (K, P), (K,): its columns before the first -2."""
    return None if paths is None else (paths >= -1).sum(1, dtype=torch.int32)


def offset_type(L: int, *row_strides: int) -> tl.dtype:
    """Integer type that holds the offset of every token's row in tensors with these strides between rows."""
    return tl.int32 if L * max(row_strides) < 2**31 else tl.int64
