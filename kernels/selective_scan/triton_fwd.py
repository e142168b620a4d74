"""Selective scan, forward, in Triton.

One program owns a block of channels of one batch element and walks its paths one after the other, with the (N, BLOCK_D)
states in registers. Tokens are read where they lie: the order of a path is an index, never a copy. The outputs of
several paths are added in a float32 buffer that the program alone touches, so the sum has a fixed order.

If that makes too few programs, paths are cut into regions (``triton_regions.py``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, contiguous_channels, device_guard
from zoo.kernels.registration import accumulate_dtype, path_length
from zoo.kernels.selective_scan.op import chunk_length, num_chunks
from zoo.kernels.selective_scan.triton_common import (
    PLAIN_NUMBERS,
    block_shape,
    has_holes,
    offset_type,
    pack_projections,
    path_lengths,
    readable,
    region_of,
    rows_of,
    split_projections,
    state_cells,
    states_first,
    step_size,
    tile_at,
    tile_of,
    tokens_at,
    visited,
    visits_of,
)
from zoo.kernels.selective_scan.triton_regions import carry_kernel, plan_launches, region_state_kernel, side_by_side
from zoo.kernels.selective_scan.triton_sums import add_paths
from zoo.kernels.triton_math import LOG2E, sigmoid

__all__ = ["forward"]


@triton.jit
def inputs_of_steps(
    u_at, delta_at, packed_at, table, A_k, bias_k, row, P, start, end, steps, backwards, u_l, delta_l, packed_l,
    UNROLL: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_TABLE: tl.constexpr, HOLES: tl.constexpr, COARSE: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """What the inputs of UNROLL steps are to the first of them, walked from the last: the state (N, D)."""
    tokens = tokens_at(table, row, P, start, end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
    u_t = rows_of(visited(tile_at(tokens, u_at, u_l, HOLES), tokens, HOLES))
    delta_t = rows_of(visited(tile_at(tokens, delta_at, delta_l, HOLES), tokens, HOLES))
    BC_t = rows_of(tile_at(tokens, packed_at, packed_l, HOLES))
    state = tl.zeros(A_k.shape, A_k.dtype)
    for j in tl.static_range(UNROLL - 1, -1, -1):
        _, step = step_size(delta_t[j].to(A_k.dtype), bias_k, start + j < end, SOFTPLUS, COARSE)
        B_j, _ = split_projections(BC_t[j])
        state = tl.exp2(step[None, :] * A_k) * state + (step * u_t[j].to(A_k.dtype))[None, :] * B_j[:, None]
    return state


# In all kernels `stride_N` is `channels` again, hidden from Triton's divisibility analysis: see `block_shape`.
@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def scan_kernel(
    u, delta, A, packed, D, z, bias, initial, table, lengths, out, merged, last_state, states,
    L, P, K, orders, first, stride, count, channels, stride_N, group_channels, reverse_mask, chunks, region, splits,
    u_b, u_k, u_l, delta_b, delta_k, delta_l, z_b, z_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_TABLE: tl.constexpr, HOLES: tl.constexpr, SPLIT: tl.constexpr, SIDE: tl.constexpr, MIRRORED: tl.constexpr,
    SAVE: tl.constexpr, MERGE: tl.constexpr, COMPLETE: tl.constexpr, PARTITION: tl.constexpr, COARSE: tl.constexpr,
    ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Outputs of a region of the paths first, first + stride... (count of them).

    ``initial`` holds the states before the first step, or with SPLIT those that enter every region. MERGE if outputs of
    several paths are added; COMPLETE if every path visits every token, so that the first path need not add and the last
    one can finish the output; PARTITION if every token is on a single path, which finishes it. SIDE if there is a
    program and an output (B, K, L, D) for every path.
    """
    blocks = tl.cdiv(group_channels, BLOCK_D)
    group = tl.program_id(0) // blocks
    groups = channels // group_channels
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if SIDE:
        b, first = b // K, (b % K).to(tl.int32)
    in_group = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = group * group_channels + in_group
    n = tl.arange(0, BLOCK_N)
    d_mask = in_group < group_channels
    state_mask = (n < N)[:, None] & d_mask[None, :]
    cell = state_cells(n, d, stride_N)
    d_read = readable(d, channels, 1)
    d_tile = readable(d, channels, VECTOR)
    pair = tl.arange(0, 2 * BLOCK_N)
    packed_l = groups * 2 * BLOCK_N
    out_at = out + tl.program_id(2).to(tl.int64) * L * channels + d_tile
    if HAS_Z:
        z_at = z + b * z_b + d_tile
    if MERGE:
        merged_at = merged + b * L * channels + d_tile

    for i in range(count):
        k = first + i * stride
        path = b * K + k
        row = k % orders
        backwards = (reverse_mask >> k) & 1 == 1
        steps = P
        if HOLES:
            steps = tl.load(lengths + row)
        begin, end = region_of(split, region, steps, MIRRORED & backwards)
        u_at = u + b * u_b + k * u_k + d_tile
        delta_at = delta + b * delta_b + k * delta_k + d_tile
        packed_at = packed + (path * L * groups + group) * 2 * BLOCK_N + pair
        A_k = tl.load(A + k * N * channels + cell, mask=state_mask, other=0.0).to(ACC) * LOG2E
        bias_k = tl.zeros([BLOCK_D], ACC)
        if HAS_BIAS:
            bias_k = tl.load(bias + k * channels + d_read).to(ACC)
        D_k = tl.zeros([BLOCK_D], ACC)
        if HAS_D:
            D_k = tl.load(D + k * channels + d_read).to(ACC)
        h = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        if SPLIT:
            h = tl.load(initial + (path * splits + split) * N * channels + cell, mask=state_mask, other=0.0)
        elif HAS_INITIAL:
            h = tl.load(initial + path * N * channels + cell, mask=state_mask, other=0.0).to(ACC)
        finishes = SIDE | PARTITION | (k == K - 1)
        adds = (k > 0) | (not COMPLETE)
        passes_on = (not finishes) | (not COMPLETE)

        # The rows of the next tiles come into shared memory while this one is computed.
        for start in tl.range(begin, end, UNROLL, num_stages=STAGES):
            tokens = tokens_at(table, row, P, start, end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
            u_t = rows_of(visited(tile_at(tokens, u_at, u_l, HOLES), tokens, HOLES))
            delta_t = rows_of(visited(tile_at(tokens, delta_at, delta_l, HOLES), tokens, HOLES))
            BC_t = rows_of(tile_at(tokens, packed_at, packed_l, HOLES))
            if WINDOW > 1:
                sizes_t = ()
                inputs_t = ()
                for j in tl.static_range(UNROLL):
                    _, step = step_size(delta_t[j].to(ACC), bias_k, start + j < end, SOFTPLUS, COARSE)
                    sizes_t = sizes_t + (step,)
                    inputs_t = inputs_t + (step * u_t[j].to(ACC),)
                from_later = ()  # what C reads of the later steps of a window, for every step
                later = tl.zeros([BLOCK_N, BLOCK_D], ACC)
                if WINDOW > UNROLL:
                    if (start - begin) % WINDOW == 0:
                        later = inputs_of_steps(
                            u_at, delta_at, packed_at, table, A_k, bias_k, row, P, start + UNROLL, end, steps,
                            backwards, u_l, delta_l, packed_l, UNROLL, SOFTPLUS, HAS_TABLE, HOLES, COARSE, OFFSET,
                        )  # fmt: skip
                for j in tl.static_range(UNROLL - 1, -1, -1):
                    if (j + 1) % WINDOW == 0:
                        later = tl.zeros([BLOCK_N, BLOCK_D], ACC)
                    B_j, C_j = split_projections(BC_t[j])
                    received = tl.exp2(sizes_t[j][None, :] * A_k) * later
                    from_later = (tl.sum(received * C_j[:, None], 0),) + from_later
                    later = received + inputs_t[j][None, :] * B_j[:, None]
            y_t = ()
            for j in tl.static_range(UNROLL):
                if SAVE and j % CHUNK == 0:
                    done = start + j - begin
                    if (done % CHUNK == 0) & (start + j < end):
                        saved = (path * chunks + split * (region // CHUNK) + done // CHUNK) * N
                        tl.store(states + saved * channels + cell, h, mask=state_mask)
                u_j = u_t[j].to(ACC)
                if WINDOW > 1:  # the compiler keeps the decays from above
                    step, input_j = sizes_t[j], inputs_t[j]
                else:
                    _, step = step_size(delta_t[j].to(ACC), bias_k, start + j < end, SOFTPLUS, COARSE)
                    input_j = step * u_j
                B_j, C_j = split_projections(BC_t[j])
                h = tl.exp2(step[None, :] * A_k) * h + input_j[None, :] * B_j[:, None]
                y = tl.sum(h * C_j[:, None], 0) + D_k * u_j
                if WINDOW > 1:
                    y += from_later[j]
                y_t = y_t + (y,)

            y = tile_of(y_t, UNROLL)
            visits = visits_of(tokens, start + tl.arange(0, UNROLL), end, HOLES)
            mask = d_mask[None, :] & visits[:, None]
            if MERGE:
                merged_to = merged_at[None, :] + tokens[:, None] * channels
                y += tl.where(adds, tile_at(tokens, merged_at, channels, HOLES), 0.0)
                tl.store(merged_to, y, mask=mask & passes_on)
            if COMPLETE or PARTITION:
                if HAS_Z:
                    z_t = tile_at(tokens, z_at, z_l, HOLES).to(ACC)
                    y = y * z_t * sigmoid(z_t)
                out_to = out_at[None, :] + tokens[:, None] * channels
                tl.store(out_to, y.to(out.dtype.element_ty), mask=mask & finishes)
        if not SPLIT:
            tl.store(last_state + path * N * channels + cell, h, mask=state_mask)
        tl.debug_barrier()


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    delta_softplus: bool,
    reverse: list[bool],
    window: int,
    complete: bool,
    partition: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, L, D), last state (B, K, D, N) and chunk-boundary states (B, K, chunks, N, D)."""
    batch, shared, L, channels = u.shape
    K, _, N = A.shape
    groups = B.shape[3]
    steps = path_length(u, paths)
    dtype = accumulate_dtype(u)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    chunk = chunk_length(N, window)
    chunks = num_chunks(steps, chunk) if save_states else 0
    complete = complete or paths is None
    side = side_by_side(u, A, z, complete)
    merge = (K > 1 or not complete) and not side and not partition
    block = block_shape(N, channels // groups)
    launches, splits, region = plan_launches(u, A, groups, paths, window, side)
    reverse_mask = sum(1 << k for k in range(K) if reverse[k])
    orders = 1 if paths is None else paths.shape[0]

    programs_of_batch = batch * K if side else batch
    out = u.new_empty(programs_of_batch, L, channels)
    last_state = u.new_empty(batch, K, N, channels, dtype=dtype)
    # Chunks beyond the end of a short path are never reached, but an op's output must not be left to chance.
    states = (u.new_empty if complete else u.new_zeros)(batch, K, chunks, N, channels, dtype=dtype)
    merged = None
    if merge:
        merged = (torch.empty if complete else torch.zeros)(batch, L, channels, dtype=dtype, device=u.device)

    u, delta = contiguous_channels(u), contiguous_channels(delta)
    z = None if z is None else contiguous_channels(z)
    A, entering = states_first(A), states_first(initial_state)
    D, delta_bias, paths = (None if x is None else x.contiguous() for x in (D, delta_bias, paths))
    holes = has_holes(paths, L, complete, partition)
    lengths = path_lengths(paths) if holes else None
    packed = pack_projections(B, C, dtype, block["BLOCK_N"], paths if partition and not holes else None)
    u_strides = (u.stride(0), u.stride(1) if shared > 1 else 0, u.stride(2))
    z_strides = (0, 0) if z is None else z.stride()[:2]
    block["UNROLL"] = max(block["UNROLL"], min(window, 8))  # a window, or half of it, is walked backwards in registers
    common = dict(N=N, ACC=acc, **{name: block.pop(name) for name in ("BLOCK_N", "BLOCK_D", "num_warps")})
    scan = dict(
        **block, SOFTPLUS=delta_softplus, HAS_BIAS=delta_bias is not None, HAS_TABLE=paths is not None,
        HOLES=holes, COARSE=delta.dtype.itemsize == 2,
        OFFSET=offset_type(L, u.stride(2), delta.stride(2), packed.stride(2), channels, z_strides[1]),
    )  # fmt: skip
    blocks = groups * ceil_div(channels // groups, common["BLOCK_D"])
    with device_guard(u.device):
        if splits > 1:
            initial, entering = entering, u.new_empty(batch, K, splits, N, channels, dtype=dtype)
            sums = u.new_empty(batch, K, splits, channels, dtype=dtype)
            region_state_kernel[(blocks, splits, batch * K)](
                u, delta, A, packed, delta_bias, paths, lengths, entering, sums,
                L, steps, K, orders, channels, channels, channels // groups, reverse_mask, region, splits,
                *u_strides, *delta.stride()[:3], MIRRORED=launches[0].mirrored, **common, **scan,
            )  # fmt: skip
            carry_kernel[(ceil_div(channels, common["BLOCK_D"]), batch * K)](
                A, initial, entering, sums, last_state, K, splits, channels, channels, reverse_mask,
                AHEAD=4, FROM_END=False, MIRRORED=launches[0].mirrored, HAS_INITIAL=initial is not None,
                HAS_LAST=True, **common,
            )  # fmt: skip
        for launch in launches:
            scan_kernel[(blocks, splits, programs_of_batch)](
                u, delta, A, packed, D, z, delta_bias, entering, paths, lengths, out, merged, last_state, states,
                L, steps, K, orders, launch.first, launch.stride, launch.count, channels, channels,
                channels // groups, reverse_mask, chunks, region, splits, *u_strides, *delta.stride()[:3], *z_strides,
                CHUNK=chunk, WINDOW=window, HAS_D=D is not None, HAS_Z=z is not None,
                HAS_INITIAL=entering is not None, SPLIT=splits > 1, SIDE=side, MIRRORED=launch.mirrored,
                SAVE=save_states, MERGE=merge, COMPLETE=complete, PARTITION=partition, **common, **scan,
            )  # fmt: skip
    if side:
        out = add_paths(out.view(batch, K, L, channels))
    if merge and not complete:
        out = (merged if z is None else merged * torch.nn.functional.silu(z.to(dtype))).to(u.dtype)
    return out, last_state.transpose(2, 3), states
