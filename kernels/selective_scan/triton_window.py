"""The backward of locally bidirectional windows, one chunk at a time."""

import triton
import triton.language as tl

from zoo.kernels.selective_scan.triton_common import (
    rows_of,
    sigmoid,
    split_projections,
    step_size,
    tile_at,
    tile_of,
    token_at,
    tokens_at,
    visited,
)
from zoo.kernels.selective_scan.triton_parking import park, unpark
from zoo.kernels.selective_scan.triton_sums import channel_sums

__all__ = ["window_gradients"]


@triton.jit
def gated(dout_j, z_j, inside, HAS_Z: tl.constexpr):
    """Gradient of the output before the gate, zero past the end."""
    dy = tl.where(inside, dout_j, 0.0)
    if HAS_Z:
        dy = dy * z_j * sigmoid(z_j)
    return dy


@triton.jit
def store_sums(slot, sums, token, n_mask, inside, HOLES: tl.constexpr):
    """Stores a step's sums over channels, if it has a token."""
    mask = n_mask & inside
    if HOLES:
        mask = mask & (token >= 0)
    tl.store(slot, sums, mask=mask)


@triton.jit
def window_gradients(
    u_at, delta_at, BC_at, z_at, dout_at, table, lot, sums_at, partial_at, selector, A_k, bias_k, dA_k, d_mask, n_mask,
    row, P, begin, count, end, steps, backwards, u_l, delta_l, packed_l, z_l, dout_l, channels,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_TABLE: tl.constexpr, HOLES: tl.constexpr, MATRIX: tl.constexpr,
    COARSE: tl.constexpr, LOT: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """What the steps of the windows of a chunk owe to each other: y, gB and A w to ``sums_at``, dB and dC to partials.

    What every step receives from the later ones is found from the last to the first and parked; then the gradient that
    every step's input gets from the earlier outputs is handed on from the first to the last. Two steps at a time: a
    window begins with the first of two and ends with the second. Channels past the last one have copies of it in their
    rows, but neither decay nor gradient nor input.

    Returns:
        dA with the windows' share.
    """
    STATE: tl.constexpr = BLOCK_N * BLOCK_D
    pairs = tl.cdiv(count, 2)
    z_t = (bias_k, bias_k)  # not read without a gate
    two = tl.arange(0, 2)[:, None] * channels
    received = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    inputs = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for pair_from_end in tl.range(pairs, num_stages=STAGES):
        place = 2 * (pairs - 1 - pair_from_end)
        tokens = tokens_at(table, row, P, begin + place, end, steps, backwards, 2, HAS_TABLE, OFFSET)
        u_t = rows_of(visited(tile_at(tokens, u_at, u_l, HOLES), tokens, HOLES))
        delta_t = rows_of(visited(tile_at(tokens, delta_at, delta_l, HOLES), tokens, HOLES))
        dout_t = rows_of(visited(tile_at(tokens, dout_at, dout_l, HOLES), tokens, HOLES))
        BC_t = rows_of(tile_at(tokens, BC_at, packed_l, HOLES))
        if HAS_Z:
            z_t = rows_of(tile_at(tokens, z_at, z_l, HOLES).to(ACC))
        received = tl.where((place + 2) % WINDOW != 0, received + inputs, 0.0)
        ys = ()
        for j in tl.static_range(1, -1, -1):
            inside = begin + place + j < end
            _, step = step_size(delta_t[j].to(ACC), bias_k, inside, SOFTPLUS, COARSE)
            B_j, C_j = split_projections(BC_t[j])
            received = tl.exp2(step[None, :] * A_k) * received
            park(lot, (place + j) * STATE, received, LOT)
            ys = (tl.sum(received * C_j[:, None], 0),) + ys
            dy = gated(dout_t[j].to(ACC), z_t[j], inside, HAS_Z)
            of_C = received * tl.where(d_mask, dy, 0.0)[None, :]
            token = token_at(table, row, P, begin + place + j, end, steps, backwards, HAS_TABLE, OFFSET)
            dC_j = channel_sums(of_C, selector, MATRIX, COARSE)
            store_sums(partial_at + token * packed_l + BLOCK_N, dC_j, token, n_mask, inside, HOLES)
            inputs = (step * u_t[j].to(ACC))[None, :] * B_j[:, None]
            if j == 1:
                received += inputs
        tl.store(sums_at[None, :] + place * channels + two, tile_of(ys, 2), mask=d_mask[None, :])
    if LOT is None:
        tl.debug_barrier()

    handed = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for pair in tl.range(pairs, num_stages=STAGES):
        place = 2 * pair
        tokens = tokens_at(table, row, P, begin + place, end, steps, backwards, 2, HAS_TABLE, OFFSET)
        u_t = rows_of(visited(tile_at(tokens, u_at, u_l, HOLES), tokens, HOLES))
        delta_t = rows_of(visited(tile_at(tokens, delta_at, delta_l, HOLES), tokens, HOLES))
        dout_t = rows_of(visited(tile_at(tokens, dout_at, dout_l, HOLES), tokens, HOLES))
        BC_t = rows_of(tile_at(tokens, BC_at, packed_l, HOLES))
        if HAS_Z:
            z_t = rows_of(tile_at(tokens, z_at, z_l, HOLES).to(ACC))
        handed = tl.where(place % WINDOW != 0, handed, 0.0)
        gBs = ()
        Aws = ()
        for j in tl.static_range(2):
            inside = begin + place + j < end
            _, step = step_size(delta_t[j].to(ACC), bias_k, inside, SOFTPLUS, COARSE)
            B_j, C_j = split_projections(BC_t[j])
            of_B = handed * tl.where(d_mask, step * u_t[j].to(ACC), 0.0)[None, :]
            token = token_at(table, row, P, begin + place + j, end, steps, backwards, HAS_TABLE, OFFSET)
            dB_j = channel_sums(of_B, selector, MATRIX, COARSE)
            store_sums(partial_at + token * packed_l, dB_j, token, n_mask, inside, HOLES)
            gBs = gBs + (tl.sum(handed * B_j[:, None], 0),)
            handed += C_j[:, None] * gated(dout_t[j].to(ACC), z_t[j], inside, HAS_Z)[None, :]
            w = handed * unpark(lot, (place + j) * STATE, BLOCK_N, BLOCK_D, LOT)
            dA_k += w * step[None, :]
            Aws = Aws + (tl.sum(w * A_k, 0),)
            handed = handed * tl.exp2(step[None, :] * A_k)
        sums_to = sums_at[None, :] + (CHUNK + place) * channels + two
        tl.store(sums_to, tile_of(gBs, 2), mask=d_mask[None, :])
        tl.store(sums_to + CHUNK * channels, tile_of(Aws, 2), mask=d_mask[None, :])
    tl.debug_barrier()  # the sums have been stored, and what was parked has been read
    return dA_k
