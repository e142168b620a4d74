"""Cutting paths of the selective scan into regions, for inputs too small to fill a GPU with a program a channel block.

Regions run at once. A first pass finds what every region leaves behind on its own (``region_state_kernel``, for the
gradient of the state ``region_gradient_kernel``), ``carry_kernel`` turns that into what enters every region.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, multiprocessors
from zoo.kernels.registration import path_length
from zoo.kernels.selective_scan.op import CHUNK
from zoo.kernels.selective_scan.triton_common import (
    PLAIN_NUMBERS,
    block_shape,
    readable,
    region_of,
    rows_of,
    state_cells,
    step_size,
    tile_at,
    tokens_at,
    visited,
)
from zoo.kernels.triton_math import LOG2E, sigmoid

__all__ = [
    "Launch",
    "carry_kernel",
    "even_regions",
    "plan_launches",
    "region_gradient_kernel",
    "region_state_kernel",
    "side_by_side",
]


@dataclass(frozen=True)
class Launch:
    """Which paths one launch walks: ``first``, ``first + stride``... ``count`` of them, mirrored or not."""

    first: int
    stride: int
    count: int
    mirrored: bool


def side_by_side(u: Tensor, A: Tensor, z: Tensor | None, complete: bool) -> bool:
    """Whether every path has programs and an output of its own, and the outputs are added afterwards.

    With few states memory is the limit. Adding to a wide sum path by path moves more of it than 16-bit outputs of all
    paths do, and needs regions, and with them a first pass, to have programs enough.
    """
    K, _, N = A.shape
    return K > 1 and N < 8 and complete and z is None and u.dtype != torch.float64


def plan_launches(
    u: Tensor, A: Tensor, groups: int, paths: Tensor | None, window: int, side: bool
) -> tuple[list[Launch], int, int]:
    """How paths are shared among programs: the launches, regions per path, and steps per region.

    One program walks all paths of its channels one after the other if there are programs enough to fill the device, or
    one of them if they are side by side. Otherwise paths are cut into regions of whole chunks, and a first pass finds
    the state that enters each of them.

    - From 8 states on, the arithmetic is the limit, and the first pass repeats half of it: paths are cut if there are
      fewer than 8 warps for every multiprocessor, into as many regions as make 16.
    - With fewer states memory is, and more has to be on its way: paths are cut below 10 warps, to make 24.

    Programs of different regions must not add to the same tokens, so with regions every order of the grid has its own
    launch, unless paths are side by side. Paths that walk the same order from both ends share it, and find their sums
    in the cache.
    """
    batch, _, _, channels = u.shape
    K, _, N = A.shape
    steps = path_length(u, paths)
    block = block_shape(N, channels // groups)
    programs = batch * groups * ceil_div(channels // groups, block["BLOCK_D"]) * (K if side else 1)
    warps = programs * block["num_warps"] / multiprocessors(u.device)
    fewest, wanted = (8, 16) if block["BLOCK_N"] >= 8 else (10, 24)
    splits = max(1, min(steps // 64, int(wanted / warps))) if warps < fewest else 1
    region = ceil_div(ceil_div(steps, splits), CHUNK) * CHUNK
    splits = ceil_div(steps, region)
    if side:
        return [Launch(0, 1, 1, False)], splits, region
    if splits == 1:
        return [Launch(0, 1, K, False)], 1, region
    if window > 1:  # windows are counted from a path's first step, so regions have to be too, in either direction
        return [Launch(k, 1, 1, False) for k in range(K)], splits, region
    orders = 1 if paths is None else paths.shape[0]
    return [Launch(order, orders, K // orders, True) for order in range(orders)], splits, region


def even_regions(items: int, places: int, steps: int) -> tuple[int, int]:
    """Regions per path, and steps per region, that leave few places empty in the last round of a single path's items.

    Only rounds filled to less than 70 % are worth the first pass over the regions.
    """

    def filled(splits: int) -> float:
        return items * splits / (ceil_div(items * splits, places) * places)

    splits = 1
    if filled(1) < 0.7 and items > places:
        splits = max(range(1, min(4, steps // 64) + 1), key=filled, default=1)
    region = ceil_div(ceil_div(steps, splits), CHUNK) * CHUNK
    return ceil_div(steps, region), region


# In all kernels `stride_N` is `channels` again, hidden from Triton's divisibility analysis: see `block_shape`.
@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def carry_kernel(
    A, initial, locals, sums, last, K, splits, channels, stride_N, reverse_mask,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, FROM_END: tl.constexpr,
    MIRRORED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Turns the state that every region leaves behind on its own into the state that enters it.

    A region hands on exp(A * sum of its steps) times what enters it plus its own. FROM_END for the gradient of the
    state, which enters the last region of a path first.
    """
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    path = tl.program_id(1).to(tl.int64)
    k = (path % K).to(tl.int32)
    n = tl.arange(0, BLOCK_N)
    d_mask = d < channels
    mask = (n < N)[:, None] & d_mask[None, :]
    cell = state_cells(n, d, stride_N)
    A_k = tl.load(A + k * N * channels + cell, mask=mask, other=0.0).to(ACC) * LOG2E
    h = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    if HAS_INITIAL:
        h = tl.load(initial + path * N * channels + cell, mask=mask, other=0.0).to(ACC)
    downwards = (MIRRORED & ((reverse_mask >> k) & 1 == 1)) != FROM_END
    for start in range(0, splits, AHEAD):
        own = ()
        total = ()
        for j in tl.static_range(AHEAD):
            split = path * splits + tl.where(downwards, splits - 1 - start - j, start + j)
            inside = start + j < splits
            own = own + (tl.load(locals + split * N * channels + cell, mask=mask & inside, other=0.0),)
            total = total + (tl.load(sums + split * channels + d, mask=d_mask & inside, other=0.0),)
        for j in tl.static_range(AHEAD):
            split = path * splits + tl.where(downwards, splits - 1 - start - j, start + j)
            tl.store(locals + split * N * channels + cell, h, mask=mask & (start + j < splits))
            h = tl.exp2(total[j][None, :] * A_k) * h + own[j]
    if HAS_LAST:
        tl.store(last + path * N * channels + cell, h, mask=mask)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def region_state_kernel(
    u, delta, A, packed, bias, table, lengths, locals, sums,
    L, P, K, orders, channels, stride_N, group_channels, reverse_mask, region, splits,
    u_b, u_k, u_l, delta_b, delta_k, delta_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr, HOLES: tl.constexpr, MIRRORED: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """State after a region that starts from zero, and the sum of its step sizes."""
    blocks = tl.cdiv(group_channels, BLOCK_D)
    group = tl.program_id(0) // blocks
    groups = channels // group_channels
    split = tl.program_id(1)
    path = tl.program_id(2).to(tl.int64)
    b, k = path // K, (path % K).to(tl.int32)
    in_group = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = group * group_channels + in_group
    n = tl.arange(0, BLOCK_N)
    d_mask = in_group < group_channels
    state_mask = (n < N)[:, None] & d_mask[None, :]
    cell = state_cells(n, d, stride_N)
    row = k % orders
    steps = P
    if HOLES:
        steps = tl.load(lengths + row)
    backwards = (reverse_mask >> k) & 1 == 1
    begin, end = region_of(split, region, steps, MIRRORED & backwards)
    d_read, d_tile = readable(d, channels, 1), readable(d, channels, VECTOR)
    u_at = u + b * u_b + k * u_k + d_tile
    delta_at = delta + b * delta_b + k * delta_k + d_tile
    packed_l = groups * 2 * BLOCK_N
    B_at = packed + (path * L * groups + group) * 2 * BLOCK_N + n
    A_k = tl.load(A + k * N * channels + cell, mask=state_mask, other=0.0).to(ACC) * LOG2E
    bias_k = tl.zeros([BLOCK_D], ACC)
    if HAS_BIAS:
        bias_k = tl.load(bias + k * channels + d_read).to(ACC)
    h = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_D], ACC)

    for start in tl.range(begin, end, UNROLL, num_stages=STAGES):
        tokens = tokens_at(table, row, P, start, end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
        u_t = rows_of(visited(tile_at(tokens, u_at, u_l, HOLES), tokens, HOLES))
        delta_t = rows_of(visited(tile_at(tokens, delta_at, delta_l, HOLES), tokens, HOLES))
        B_t = rows_of(tile_at(tokens, B_at, packed_l, HOLES))
        for j in tl.static_range(UNROLL):
            _, step = step_size(delta_t[j].to(ACC), bias_k, start + j < end, SOFTPLUS, COARSE)
            total += step
            h = tl.exp2(step[None, :] * A_k) * h + (step * u_t[j].to(ACC))[None, :] * B_t[j][:, None]
    split_of_path = path * splits + split
    tl.store(locals + split_of_path * N * channels + cell, h, mask=state_mask)
    tl.store(sums + split_of_path * channels + d, total, mask=d_mask)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def region_gradient_kernel(
    delta, A, packed, z, bias, table, lengths, dout, locals, sums,
    L, P, K, orders, channels, stride_N, group_channels, reverse_mask, region, splits,
    delta_b, delta_k, delta_l, z_b, z_l, dout_b, dout_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr, HOLES: tl.constexpr, MIRRORED: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before a region, from the region's own outputs, and the sum of its step sizes."""
    blocks = tl.cdiv(group_channels, BLOCK_D)
    group = tl.program_id(0) // blocks
    groups = channels // group_channels
    split = tl.program_id(1)
    path = tl.program_id(2).to(tl.int64)
    b, k = path // K, (path % K).to(tl.int32)
    in_group = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = group * group_channels + in_group
    n = tl.arange(0, BLOCK_N)
    d_mask = in_group < group_channels
    state_mask = (n < N)[:, None] & d_mask[None, :]
    cell = state_cells(n, d, stride_N)
    row = k % orders
    steps = P
    if HOLES:
        steps = tl.load(lengths + row)
    backwards = (reverse_mask >> k) & 1 == 1
    begin, end = region_of(split, region, steps, MIRRORED & backwards)
    d_read, d_tile = readable(d, channels, 1), readable(d, channels, VECTOR)
    delta_at = delta + b * delta_b + k * delta_k + d_tile
    dout_at = dout + b * dout_b + d_tile
    if HAS_Z:
        z_at = z + b * z_b + d_tile
    C_at = packed + ((path * L * groups + group) * 2 + 1) * BLOCK_N + n
    packed_l = groups * 2 * BLOCK_N
    A_k = tl.load(A + k * N * channels + cell, mask=state_mask, other=0.0).to(ACC) * LOG2E
    bias_k = tl.zeros([BLOCK_D], ACC)
    if HAS_BIAS:
        bias_k = tl.load(bias + k * channels + d_read).to(ACC)
    future = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_D], ACC)

    # The same walk as in `region_state_kernel`, the other way round: step i from the end is end - 1 - i.
    turned = backwards == 0
    left = steps - end
    end = steps - begin
    for start in tl.range(left, end, UNROLL, num_stages=STAGES):
        tokens = tokens_at(table, row, P, start, end, steps, turned, UNROLL, HAS_TABLE, OFFSET)
        dout_t = rows_of(visited(tile_at(tokens, dout_at, dout_l, HOLES), tokens, HOLES))
        delta_t = rows_of(visited(tile_at(tokens, delta_at, delta_l, HOLES), tokens, HOLES))
        C_t = rows_of(tile_at(tokens, C_at, packed_l, HOLES))
        if HAS_Z:
            z_t = rows_of(tile_at(tokens, z_at, z_l, HOLES))
        for j in tl.static_range(UNROLL):
            dy = tl.where(start + j < end, dout_t[j].to(ACC), 0.0)
            if HAS_Z:
                z_j = z_t[j].to(ACC)
                dy = dy * z_j * sigmoid(z_j)
            _, step = step_size(delta_t[j].to(ACC), bias_k, start + j < end, SOFTPLUS, COARSE)
            total += step
            future = (future + C_t[j][:, None] * dy[None, :]) * tl.exp2(step[None, :] * A_k)
    split_of_path = path * splits + split
    tl.store(locals + split_of_path * N * channels + cell, future, mask=state_mask)
    tl.store(sums + split_of_path * channels + d, total, mask=d_mask)
