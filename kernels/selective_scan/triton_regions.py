"""Cutting paths of the selective scan into regions, for inputs too small to fill a GPU with a program a channel block.

Regions run at once. A first pass finds what every region leaves behind on its own (``region_state_kernel``, for the
gradient of the state ``region_gradient_kernel``), ``carry_kernel`` turns that into what enters every region.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import multiprocessors
from zoo.kernels.registration import path_length
from zoo.kernels.selective_scan.op import CHUNK
from zoo.kernels.selective_scan.triton_common import (
    LOG2E,
    block_shape,
    of_token,
    packed_row,
    readable,
    region_of,
    rows_at,
    sigmoid,
    split_projections,
    state_cells,
    step_size,
    tokens_at,
)

__all__ = ["Launch", "carry_kernel", "plan_launches", "region_gradient_kernel", "region_state_kernel"]


@dataclass(frozen=True)
class Launch:
    """Which paths one launch walks: ``first``, ``first + stride``... ``count`` of them, mirrored or not."""

    first: int
    stride: int
    count: int
    mirrored: bool


def plan_launches(
    u: Tensor, A: Tensor, groups: int, paths: Tensor | None, window: int
) -> tuple[list[Launch], int, int]:
    """How paths are shared among programs: the launches, regions per path, and steps per region.

    One program walks all paths of its channels one after the other if there are programs enough to fill the device.
    Otherwise paths are cut into regions of whole chunks, and a first pass finds the state that enters each of them.

    - From 8 states on, the arithmetic is the limit, and the first pass repeats half of it: paths are cut if there are
      fewer than 8 warps for every multiprocessor, into as many regions as make 16.
    - With fewer states memory is: paths are cut into regions of 64 steps below 32 warps for every multiprocessor.

    Programs of different regions must not add to the same tokens, so with regions every order of the grid has its own
    launch. Paths that walk the same order from both ends share it, and find their sums in the cache.
    """
    batch, _, _, channels = u.shape
    K, _, N = A.shape
    steps = path_length(u, paths)
    block = block_shape(N, channels // groups)
    block_n = block["BLOCK_N"]
    programs = batch * groups * triton.cdiv(channels // groups, block["BLOCK_D"])
    per_multiprocessor = programs * block["num_warps"] / multiprocessors(u.device)
    most = max(1, steps // 64)
    splits = 1
    if block_n >= 8 and per_multiprocessor < 8:
        splits = min(most, int(16 / per_multiprocessor))
    elif block_n < 8 and per_multiprocessor < 32:
        splits = most
    region = triton.cdiv(triton.cdiv(steps, splits), CHUNK) * CHUNK
    splits = triton.cdiv(steps, region)
    if splits == 1:
        return [Launch(0, 1, K, False)], 1, region
    if window > 1:  # windows are counted from a path's first step, so regions have to be too, in either direction
        return [Launch(k, 1, 1, False) for k in range(K)], splits, region
    orders = 1 if paths is None else paths.shape[0]
    return [Launch(order, orders, K // orders, True) for order in range(orders)], splits, region


# In all kernels `stride_N` is `channels` again, hidden from Triton's divisibility analysis: see `block_shape`.
@triton.jit(do_not_specialize=["stride_N"])
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
    cell = state_cells(n, d, channels, stride_N, BLOCK_N)
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


@triton.jit(do_not_specialize=["stride_N"])
def region_state_kernel(
    u, delta, A, packed, bias, table, lengths, locals, sums,
    L, P, K, orders, channels, stride_N, group_channels, reverse_mask, region, splits,
    u_b, u_k, u_l, delta_b, delta_k, delta_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LANE: tl.constexpr, UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HOLES: tl.constexpr,
    MIRRORED: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
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
    cell = state_cells(n, d, channels, stride_N, BLOCK_N)
    row = k % orders
    steps = P
    if HOLES:
        steps = tl.load(lengths + row)
    backwards = (reverse_mask >> k) & 1 == 1
    begin, end = region_of(split, region, steps, MIRRORED & backwards)
    d_read = readable(d, channels, LANE)
    u_at = u + b * u_b + k * u_k + d_read
    delta_at = delta + b * delta_b + k * delta_k + d_read
    packed_l = groups * 2 * BLOCK_N
    rows_of_packed = packed_row(packed + (path * L * groups + group) * 2 * BLOCK_N, BLOCK_N)
    A_k = tl.load(A + k * N * channels + cell, mask=state_mask, other=0.0).to(ACC) * LOG2E
    bias_k = tl.zeros([BLOCK_D], ACC)
    if HAS_BIAS:
        bias_k = tl.load(bias + k * channels + d_read).to(ACC)
    h = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_D], ACC)

    now = tokens_at(table, row, P, begin, end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
    soon = tokens_at(table, row, P, begin + UNROLL, end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
    u_t = rows_at(now, u_at, u_l, UNROLL, HOLES)
    delta_t = rows_at(now, delta_at, delta_l, UNROLL, HOLES)
    BC_t = rows_at(now, rows_of_packed, packed_l, UNROLL, HOLES)
    for start in range(begin, end, UNROLL):
        u_next = rows_at(soon, u_at, u_l, UNROLL, HOLES)
        delta_next = rows_at(soon, delta_at, delta_l, UNROLL, HOLES)
        BC_next = rows_at(soon, rows_of_packed, packed_l, UNROLL, HOLES)
        for j in tl.static_range(UNROLL):
            u_j = of_token(u_t[j], now[j], HOLES, ACC)
            delta_j = of_token(delta_t[j], now[j], HOLES, ACC)
            _, step = step_size(delta_j, bias_k, start + j < end, SOFTPLUS, COARSE)
            total += step
            B_j, _ = split_projections(BC_t[j])
            h = tl.exp2(step[None, :] * A_k) * h + (step * u_j)[None, :] * B_j[:, None]
        now, u_t, delta_t, BC_t = soon, u_next, delta_next, BC_next
        soon = tokens_at(table, row, P, start + 2 * UNROLL, end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
    split_of_path = path * splits + split
    tl.store(locals + split_of_path * N * channels + cell, h, mask=state_mask)
    tl.store(sums + split_of_path * channels + d, total, mask=d_mask)


@triton.jit(do_not_specialize=["stride_N"])
def region_gradient_kernel(
    delta, A, packed, z, bias, table, lengths, dout, locals, sums,
    L, P, K, orders, channels, stride_N, group_channels, reverse_mask, region, splits,
    delta_b, delta_k, delta_l, z_b, z_l, dout_b, dout_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LANE: tl.constexpr, UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, HOLES: tl.constexpr,
    MIRRORED: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
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
    cell = state_cells(n, d, channels, stride_N, BLOCK_N)
    row = k % orders
    steps = P
    if HOLES:
        steps = tl.load(lengths + row)
    backwards = (reverse_mask >> k) & 1 == 1
    begin, end = region_of(split, region, steps, MIRRORED & backwards)
    d_read = readable(d, channels, LANE)
    delta_at = delta + b * delta_b + k * delta_k + d_read
    dout_at = dout + b * dout_b + d_read
    if HAS_Z:
        z_at = z + b * z_b + d_read
    rows_of_packed = packed_row(packed + (path * L * groups + group) * 2 * BLOCK_N, BLOCK_N)
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
    now = tokens_at(table, row, P, left, end, steps, turned, UNROLL, HAS_TABLE, OFFSET)
    soon = tokens_at(table, row, P, left + UNROLL, end, steps, turned, UNROLL, HAS_TABLE, OFFSET)
    delta_t = rows_at(now, delta_at, delta_l, UNROLL, HOLES)
    dout_t = rows_at(now, dout_at, dout_l, UNROLL, HOLES)
    BC_t = rows_at(now, rows_of_packed, packed_l, UNROLL, HOLES)
    if HAS_Z:
        z_t = rows_at(now, z_at, z_l, UNROLL, HOLES)
    for start in range(left, end, UNROLL):
        delta_next = rows_at(soon, delta_at, delta_l, UNROLL, HOLES)
        dout_next = rows_at(soon, dout_at, dout_l, UNROLL, HOLES)
        BC_next = rows_at(soon, rows_of_packed, packed_l, UNROLL, HOLES)
        if HAS_Z:
            z_next = rows_at(soon, z_at, z_l, UNROLL, HOLES)
        for j in tl.static_range(UNROLL):
            dy = of_token(dout_t[j], now[j], HOLES, ACC)
            if HAS_Z:
                z_j = z_t[j].to(ACC)
                dy = dy * z_j * sigmoid(z_j)
            dy = tl.where(start + j < end, dy, 0.0)
            delta_j = of_token(delta_t[j], now[j], HOLES, ACC)
            _, step = step_size(delta_j, bias_k, start + j < end, SOFTPLUS, COARSE)
            total += step
            _, C_j = split_projections(BC_t[j])
            future = (future + C_j[:, None] * dy[None, :]) * tl.exp2(step[None, :] * A_k)
        now, delta_t, dout_t, BC_t = soon, delta_next, dout_next, BC_next
        if HAS_Z:
            z_t = z_next
        soon = tokens_at(table, row, P, start + 2 * UNROLL, end, steps, turned, UNROLL, HAS_TABLE, OFFSET)
    split_of_path = path * splits + split
    tl.store(locals + split_of_path * N * channels + cell, future, mask=state_mask)
    tl.store(sums + split_of_path * channels + d, total, mask=d_mask)
