"""The main kernel of the selective scan's backward.

As in the forward, one program owns a block of channels of one batch element and walks its paths, or with regions a
region of them. It goes through the chunks from the last to the first. From the saved state at the beginning of a chunk
it first recomputes the states and parks one every ``SEGMENT`` steps (``triton_parking.py``); then it takes these
segments in reverse, recomputes the states inside one in registers, and carries the gradient of the state backwards
through it. With few states a segment is a whole chunk, and nothing is parked.
"""

import triton
import triton.language as tl

from zoo.kernels.selective_scan.triton_common import (
    PLAIN_NUMBERS,
    readable,
    region_of,
    row_of,
    rows_of,
    softplus_slope,
    split_projections,
    state_cells,
    step_size,
    tile_at,
    tile_of,
    token_at,
    tokens_at,
    visited,
    visits_of,
)
from zoo.kernels.selective_scan.triton_parking import fetch_ahead, lot_of, park, unpark
from zoo.kernels.selective_scan.triton_sums import channel_sums, pair_selector, quad_sums, store_pair_sums
from zoo.kernels.triton_math import LOG2E, sigmoid

__all__ = ["scan_gradient_kernel"]


@triton.jit
def gated(dout, z, HAS_Z: tl.constexpr):
    """Gradient of a step's output before the gate."""
    if HAS_Z:
        dout = dout * z * sigmoid(z)
    return dout


# Hiding the alignment of `scratch` keeps one channel to a lane, like `stride_N` does, with offsets known beforehand.
@triton.jit(do_not_specialize=PLAIN_NUMBERS, do_not_specialize_on_alignment=["scratch"])
def scan_gradient_kernel(
    u, delta, A, packed, D, z, bias, table, lengths, states, dout, entering,
    du, ddelta, partial, totals, dz, dinitial, du_sum, y_sum, scratch,
    L, P, K, orders, first, stride, count, channels, stride_N, group_channels, reverse_mask, chunks, region, splits,
    batch, items, u_b, u_k, u_l, delta_b, delta_k, delta_l, z_b, z_l, dout_b, dout_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr, SPAN: tl.constexpr, SEGMENT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ENTERING: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_TABLE: tl.constexpr, HOLES: tl.constexpr,
    SPLIT: tl.constexpr, SIDE: tl.constexpr, MIRRORED: tl.constexpr, SUM_U: tl.constexpr, SUM_Y: tl.constexpr,
    COMPLETE: tl.constexpr, PARTITION: tl.constexpr, ONE_U: tl.constexpr, MATRIX: tl.constexpr, COARSE: tl.constexpr,
    LOT: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr, U_PATHS_FIRST: tl.constexpr, PATHS_FIRST: tl.constexpr,
    TAIL: tl.constexpr, ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """All gradients of a region of the paths first, first + stride... (count of them).

    ``entering`` is the gradient that reaches the last state from outside, or with SPLIT the one that reaches the last
    state of every region. Each program takes every ``programs``-th of the (batch, region, block of channels) items;
    SIDE if there is an item for every path too.
    """
    blocks = tl.cdiv(group_channels, BLOCK_D)
    groups = channels // group_channels
    n = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_D)
    n_mask = n < N
    packed_l = groups * 2 * BLOCK_N
    STATE: tl.constexpr = BLOCK_N * BLOCK_D
    PARKS: tl.constexpr = SEGMENT < CHUNK  # else segments start from saved states
    SLOTS: tl.constexpr = SPAN // SEGMENT
    PAIRS: tl.constexpr = MATRIX and COARSE and BLOCK_N == 16 and SEGMENT == 2 and WINDOW == 1
    WINDOW_OR_SEGMENT: tl.constexpr = min(WINDOW, SEGMENT)
    if PARKS:
        lot = lot_of(scratch, (2 if WINDOW > 1 else 1) * SLOTS * STATE, LOT)
    selector = pair_selector(COARSE)

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = item % blocks
        group = item // blocks % groups
        split = item // (blocks * groups) % splits
        b = (item // (blocks * groups * splits)).to(tl.int64)
        if SIDE:
            b, first = b // K, (b % K).to(tl.int32)
        first_channel = group * group_channels + block * BLOCK_D
        in_group = block * BLOCK_D + lane
        d = group * group_channels + in_group
        d_mask = in_group < group_channels
        d_read = readable(d, channels, 1)
        state_mask = n_mask[:, None] & d_mask[None, :]
        cell = state_cells(n, d, stride_N)
        d_tile = readable(d, channels, VECTOR)
        dout_at = dout + b * dout_b + d_tile
        z_at = dout_at
        if HAS_Z:
            z_at = z + b * z_b + d_tile
            dz_at = dz + b * L * channels + d_tile
        if SUM_Y:
            y_at = y_sum + b * L * channels + d_tile
        if SUM_U:
            du_sum_at = du_sum + b * L * channels + d_tile

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
            packed_at = packed + (path * L * groups + group) * 2 * BLOCK_N
            B_at, BC_at = packed_at + n, packed_at + tl.arange(0, 2 * BLOCK_N)
            du_at = du + (b if ONE_U else k * batch + b if U_PATHS_FIRST else path) * L * channels + d_tile
            ddelta_at = ddelta + (k * batch + b if PATHS_FIRST else path) * L * channels + d_tile
            partial_at = partial + (((block * batch + path // K) * K + k) * L * groups + group) * 2 * BLOCK_N
            A_k = tl.load(A + k * N * channels + cell, mask=state_mask, other=0.0).to(ACC) * LOG2E
            bias_k = tl.zeros([BLOCK_D], ACC)
            if HAS_BIAS:
                bias_k = tl.load(bias + k * channels + d_read).to(ACC)
            D_k = tl.zeros([BLOCK_D], ACC)
            if HAS_D:
                D_k = tl.load(D + k * channels + d_read).to(ACC)
            future = tl.zeros([BLOCK_N, BLOCK_D], ACC)  # gradient that reaches a state from later steps
            if SPLIT:
                entering_at = entering + (path * splits + split) * N * channels + cell
                future = tl.load(entering_at, mask=state_mask, other=0.0)
            elif HAS_ENTERING:
                future = tl.load(entering + path * N * channels + cell, mask=state_mask, other=0.0).to(ACC)
            later = tl.zeros([BLOCK_N, BLOCK_D], ACC)  # what the steps of a window after this one have put in
            dA_k = tl.zeros([BLOCK_N, BLOCK_D], ACC)
            dD_k = tl.zeros([BLOCK_D], ACC)
            dbias_k = tl.zeros([BLOCK_D], ACC)
            adds = (k > 0) | (not COMPLETE)
            finishes = PARTITION | (k == K - 1)
            passes_on = (k < K - 1) | (not COMPLETE)

            span = region  # what one round goes through: all chunks, or as much as can be parked
            if PARKS:
                span = SPAN
            spans = tl.cdiv(end - begin, span)
            for span_from_end in range(spans):
                span_begin = begin + (spans - 1 - span_from_end) * span
                chunk = (span_begin - begin) // CHUNK
                chunk_begin = begin + chunk * CHUNK
                segments = tl.cdiv(tl.minimum(end - span_begin, span), SEGMENT)
                saved_at = states + (path * chunks + split * (region // CHUNK) + chunk) * N * channels + cell

                if PARKS:
                    if PTX:  # the steps before, which come next
                        first_coming = span_begin - CHUNK
                        coming = tokens_at(table, row, P, first_coming, end, steps, backwards, CHUNK, HAS_TABLE, OFFSET)
                        rows = row_of(coming, HOLES)
                        fetch_ahead(u + b * u_b + k * u_k + first_channel + rows * u_l)
                        fetch_ahead(delta + b * delta_b + k * delta_k + first_channel + rows * delta_l)
                        fetch_ahead(dout + b * dout_b + first_channel + rows * dout_l)
                        if HAS_Z:
                            fetch_ahead(z + b * z_b + first_channel + rows * z_l)
                        earlier = (path * chunks + split * (region // CHUNK) + tl.maximum(chunk - 1, 0)) * N
                        fetch_ahead(states + (earlier + n) * channels + first_channel)
                    tl.debug_barrier()  # what was parked before has been read
                    h = tl.load(saved_at, mask=state_mask, other=0.0)
                    first_state = h
                    handed = tl.zeros([BLOCK_N, BLOCK_D], ACC)  # gradient that a window's outputs so far hand on
                    recompute_end = span_begin + (segments - 1) * SEGMENT
                    for start in tl.range(chunk_begin, recompute_end, UNROLL, num_stages=STAGES):
                        tokens = tokens_at(table, row, P, start, end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
                        u_t = rows_of(visited(tile_at(tokens, u_at, u_l, HOLES), tokens, HOLES))
                        delta_t = rows_of(visited(tile_at(tokens, delta_at, delta_l, HOLES), tokens, HOLES))
                        if WINDOW > 1:
                            BC_t = rows_of(tile_at(tokens, BC_at, packed_l, HOLES))
                            visits = visits_of(tokens, start + tl.arange(0, UNROLL), end, HOLES)
                            dout_t = rows_of(tile_at(tokens, dout_at, dout_l, HOLES, visits[:, None]))
                            z_t = dout_t
                            if HAS_Z:
                                z_t = rows_of(tile_at(tokens, z_at, z_l, HOLES))
                        else:
                            B_t = rows_of(tile_at(tokens, B_at, packed_l, HOLES))
                        steps_t = ()
                        inputs_t = ()
                        dys_t = ()
                        for j in tl.static_range(UNROLL):
                            _, step = step_size(delta_t[j].to(ACC), bias_k, start + j < end, SOFTPLUS, COARSE)
                            steps_t = steps_t + (step,)
                            inputs_t = inputs_t + (step * u_t[j].to(ACC),)
                            if WINDOW > 1:
                                dys_t = dys_t + (gated(dout_t[j].to(ACC), z_t[j].to(ACC), HAS_Z),)
                        for piece in tl.static_range(UNROLL // SEGMENT):
                            if start + piece * SEGMENT < recompute_end:
                                for j in tl.static_range(piece * SEGMENT, (piece + 1) * SEGMENT):
                                    decay = tl.exp2(steps_t[j][None, :] * A_k)
                                    if WINDOW > 1:
                                        B_j, C_j = split_projections(BC_t[j])
                                        if j % SEGMENT != 0 and j % WINDOW == 0:
                                            handed = tl.zeros([BLOCK_N, BLOCK_D], ACC)
                                        handed = decay * (handed + C_j[:, None] * dys_t[j][None, :])
                                    else:
                                        B_j = B_t[j]
                                    h = decay * h + inputs_t[j][None, :] * B_j[:, None]
                                after = start + (piece + 1) * SEGMENT - span_begin
                                if WINDOW > 1:  # at the start of a window nothing has been handed on
                                    in_window = (start + (piece + 1) * SEGMENT - chunk_begin) % WINDOW
                                    handed = tl.where((in_window == 0) | (WINDOW <= SEGMENT), 0.0, handed)
                                if (WINDOW == 1) | (after >= 0):
                                    park(lot, after // SEGMENT * STATE, h, LOT, HALF)
                                    if WINDOW > 1:
                                        park(lot, (SLOTS + after // SEGMENT) * STATE, handed, LOT, HALF)
                    if (WINDOW == 1) | (span_begin == chunk_begin):
                        park(lot, 0, first_state, LOT, HALF)  # here, so that nothing above waits for it
                        if WINDOW > 1:
                            park(lot, SLOTS * STATE, tl.zeros([BLOCK_N, BLOCK_D], ACC), LOT, HALF)
                    tl.debug_barrier()

                for segment_from_end in tl.range(segments, num_stages=STAGES):
                    segment = segments - 1 - segment_from_end
                    start = span_begin + segment * SEGMENT
                    tokens = tokens_at(table, row, P, start, end, steps, backwards, SEGMENT, HAS_TABLE, OFFSET)
                    if PARKS:
                        h = unpark(lot, segment * STATE, BLOCK_N, BLOCK_D, LOT, HALF)
                    else:
                        h = tl.load(saved_at + segment * N * channels, mask=state_mask, other=0.0)
                    u_t = rows_of(visited(tile_at(tokens, u_at, u_l, HOLES), tokens, HOLES))
                    delta_t = rows_of(visited(tile_at(tokens, delta_at, delta_l, HOLES), tokens, HOLES))
                    visits = visits_of(tokens, start + tl.arange(0, SEGMENT), end, HOLES)
                    dout_t = rows_of(tile_at(tokens, dout_at, dout_l, HOLES, visits[:, None]))
                    if BLOCK_N == 1:  # every token twice, for a number to every lane
                        twice = start + tl.arange(0, 2 * SEGMENT) % SEGMENT
                        pairs = token_at(table, row, P, twice, end, steps, backwards, HAS_TABLE, OFFSET)
                        BC_t = rows_of(tile_at(pairs, BC_at, packed_l, HOLES))
                    else:
                        BC_t = rows_of(tile_at(tokens, BC_at, packed_l, HOLES))
                    z_t = dout_t
                    if HAS_Z:
                        z_t = rows_of(tile_at(tokens, z_at, z_l, HOLES))
                    if SUM_Y:
                        y_t = rows_of(tile_at(tokens, y_at, channels, HOLES))
                    before = ()  # the state before every step of the segment
                    decays = ()
                    raws = ()
                    sizes = ()
                    for j in tl.static_range(SEGMENT):
                        raw, step = step_size(delta_t[j].to(ACC), bias_k, start + j < end, SOFTPLUS, COARSE)
                        decay = tl.exp2(step[None, :] * A_k)
                        before = before + (h,)
                        decays = decays + (decay,)
                        raws = raws + (raw,)
                        sizes = sizes + (step,)
                        B_j, _ = split_projections(BC_t[j])
                        h = decay * h + (step * u_t[j].to(ACC))[None, :] * B_j[:, None]

                    if WINDOW > 1:  # what the input of every step is handed by the outputs of its window before it
                        handed = unpark(lot, (SLOTS + segment) * STATE, BLOCK_N, BLOCK_D, LOT, HALF)
                        handed_t = ()
                        for j in tl.static_range(SEGMENT):
                            if j % WINDOW_OR_SEGMENT == 0 and j > 0:
                                handed = tl.zeros([BLOCK_N, BLOCK_D], ACC)
                            handed_t = handed_t + (handed,)
                            if j < SEGMENT - 1:
                                dy = gated(dout_t[j].to(ACC), z_t[j].to(ACC), HAS_Z)
                                _, C_j = split_projections(BC_t[j])
                                handed = decays[j] * (handed + C_j[:, None] * dy[None, :])

                    du_t = ()
                    ddelta_t = ()
                    dz_t = ()
                    ys = ()
                    of_Bs = ()
                    of_Cs = ()
                    tokens_t = ()
                    visits_t = ()
                    sums_t = ()
                    for j in tl.static_range(SEGMENT - 1, -1, -1):
                        step, u_j = sizes[j], u_t[j].to(ACC)
                        B_j, C_j = split_projections(BC_t[j])
                        inside = start + j < end
                        dout_j = dout_t[j].to(ACC)
                        dy = dout_j
                        seen = h  # what C reads
                        if WINDOW > 1:
                            if (j + 1) % WINDOW_OR_SEGMENT == 0:
                                later = tl.where((start - chunk_begin + j + 1) % WINDOW == 0, 0.0, later)
                            received = decays[j] * later
                            seen = h + received
                        if HAS_Z:
                            z_j = z_t[j].to(ACC)
                            gate = sigmoid(z_j)
                            dy = dout_j * z_j * gate
                            y = tl.sum(seen * C_j[:, None], 0) + D_k * u_j
                            if SUM_Y:
                                y += tl.where(adds, y_t[j], 0.0)
                                ys = (y,) + ys
                            dz_t = (dout_j * y * gate * (1.0 + z_j * (1.0 - gate)),) + dz_t
                        g = future + C_j[:, None] * dy[None, :]
                        of_input = g
                        before_j = before[j]
                        if WINDOW > 1:
                            handed_j = handed_t[j]
                            if j == 0:  # fetched again: there are no registers to keep it in
                                before_j = unpark(lot, segment * STATE, BLOCK_N, BLOCK_D, LOT, HALF)
                                handed_j = unpark(lot, (SLOTS + segment) * STATE, BLOCK_N, BLOCK_D, LOT, HALF)
                            of_input = g + handed_j
                        gB = tl.sum(of_input * B_j[:, None], 0)
                        factor_C, factor_B = dy, step * u_j
                        if TAIL:
                            factor_C, factor_B = tl.where(d_mask, factor_C, 0.0), tl.where(d_mask, factor_B, 0.0)
                        of_C = seen * factor_C[None, :]
                        of_B = of_input * factor_B[None, :]
                        future = g * decays[j]
                        w = future * before_j
                        if WINDOW > 1:
                            w += (handed_j + C_j[:, None] * dy[None, :]) * received
                            later = received + (step * u_j)[None, :] * B_j[:, None]
                        dA_k += w * step[None, :]
                        Aw = tl.sum(w * A_k, 0)
                        dstep = u_j * gB + Aw / LOG2E
                        if SOFTPLUS:
                            dstep *= softplus_slope(raws[j], step, COARSE)
                        else:
                            dstep = tl.where(inside, dstep, 0.0)
                        dbias_k += dstep
                        dD_k += dy * u_j
                        ddelta_t = (dstep,) + ddelta_t
                        du_t = (step * gB + D_k * dy,) + du_t
                        if BLOCK_N == 1:
                            of_Bs = (tl.reshape(of_B, (BLOCK_D,)),) + of_Bs
                            of_Cs = (tl.reshape(of_C, (BLOCK_D,)),) + of_Cs
                        else:
                            token = token_at(table, row, P, start + j, end, steps, backwards, HAS_TABLE, OFFSET)
                            visits_j = visits_of(token, start + j, end, HOLES)
                            if PAIRS:
                                tokens_t = (token,) + tokens_t
                                visits_t = (visits_j,) + visits_t
                                sums_t = (quad_sums(of_B, selector, PTX), quad_sums(of_C, selector, PTX)) + sums_t
                            else:
                                dB_j = channel_sums(of_B, selector, MATRIX, COARSE)
                                dC_j = channel_sums(of_C, selector, MATRIX, COARSE)
                                slot = partial_at + token * packed_l + n
                                tl.store(slot, dB_j, mask=n_mask & visits_j)
                                tl.store(slot + BLOCK_N, dC_j, mask=n_mask & visits_j)
                        h = before_j

                    if PAIRS:
                        store_pair_sums(partial_at, sums_t, tokens_t, visits_t, packed_l, N)
                    mask = d_mask[None, :] & visits[:, None]
                    if BLOCK_N == 1:  # dB and dC of all steps of a segment at once
                        both = channel_sums(tile_of(of_Bs + of_Cs, 2 * SEGMENT), selector, MATRIX, COARSE)
                        which = tl.arange(0, 2 * SEGMENT) // SEGMENT
                        slots = partial_at + pairs * packed_l + which
                        tl.store(slots, both, mask=visits_of(pairs, twice, end, HOLES))
                    row_cells = tokens[:, None] * channels
                    ddelta_s = tile_of(ddelta_t, SEGMENT)
                    tl.store(ddelta_at[None, :] + row_cells, ddelta_s.to(ddelta.dtype.element_ty), mask=mask)
                    du_s = tile_of(du_t, SEGMENT)
                    if SUM_U:
                        du_s += tl.where(adds, tile_at(tokens, du_sum_at, channels, HOLES), 0.0)
                        tl.store(du_sum_at[None, :] + row_cells, du_s, mask=mask & passes_on)
                    if COMPLETE or not SUM_U:
                        du_mask = mask
                        if SUM_U:
                            du_mask = mask & finishes
                        tl.store(du_at[None, :] + row_cells, du_s.to(du.dtype.element_ty), mask=du_mask)
                    if SUM_Y:
                        tl.store(y_at[None, :] + row_cells, tile_of(ys, SEGMENT), mask=mask & passes_on)
                    if HAS_Z and (COMPLETE or PARTITION):
                        dz_s = tile_of(dz_t, SEGMENT)
                        tl.store(dz_at[None, :] + row_cells, dz_s.to(dz.dtype.element_ty), mask=mask & finishes)

            totals_at = totals + (path * splits + split) * (N + HAS_D + HAS_BIAS) * channels
            tl.store(totals_at + cell, dA_k, mask=state_mask)
            if HAS_DINITIAL and not SPLIT:
                tl.store(dinitial + path * N * channels + cell, future, mask=state_mask)
            if HAS_D:
                tl.store(totals_at + N * channels + d, dD_k, mask=d_mask)
            if HAS_BIAS:
                tl.store(totals_at + (N + HAS_D) * channels + d, dbias_k, mask=d_mask)
            tl.debug_barrier()  # the next path adds to what this one has stored
