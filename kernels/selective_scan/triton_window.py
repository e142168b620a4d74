"""The backward of locally bidirectional windows, one window at a time."""

import triton
import triton.language as tl

from zoo.kernels.selective_scan.triton_common import (
    of_token,
    row_of,
    sigmoid,
    step_size,
    token_at,
)

__all__ = ["window_gradients"]


@triton.jit
def window_gradients(
    u_at, delta_at, packed_at, z_at, dout_at, table, states_at, sums_at, partial_at, A_k, bias_k, dA_k, d_mask, n_mask,
    row, P, begin, end, steps, backwards, u_l, delta_l, packed_l, z_l, dout_l, channels, cell, in_chunk,
    N: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_TABLE: tl.constexpr, HOLES: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """What the steps of one window owe to each other: leaves y, gB and A w at ``sums_at``, dB and dC at ``partial_at``.

    Returns dA with the window's share.
    """
    state_mask = n_mask[:, None] & d_mask[None, :]
    received = tl.zeros_like(A_k)
    inputs = tl.zeros_like(A_k)
    for i in range(WINDOW):
        place = WINDOW - 1 - i
        token = token_at(table, row, P, begin + place, end, steps, backwards, HAS_TABLE, OFFSET)
        at = row_of(token, HOLES)
        u_j = of_token(tl.load(u_at + at * u_l), token, HOLES, ACC)
        B_j = tl.load(packed_at + at * packed_l)
        C_j = tl.load(packed_at + at * packed_l + BLOCK_N)
        delta_j = of_token(tl.load(delta_at + at * delta_l), token, HOLES, ACC)
        _, step = step_size(delta_j, bias_k, begin + place < end, SOFTPLUS, COARSE)
        received = tl.exp2(step[None, :] * A_k) * (received + inputs)
        inputs = (step * u_j)[None, :] * B_j[:, None]
        tl.store(states_at + place * N * channels + cell, received, mask=state_mask)
        tl.store(sums_at + (in_chunk + place) * channels, tl.sum(received * C_j[:, None], 0), mask=d_mask)
    tl.debug_barrier()
    handed = tl.zeros_like(A_k)  # gradient of a step's input from earlier outputs
    for place in range(WINDOW):
        token = token_at(table, row, P, begin + place, end, steps, backwards, HAS_TABLE, OFFSET)
        at = row_of(token, HOLES)
        visited = begin + place < end
        if HOLES:
            visited = visited & (token >= 0)
        u_j = tl.where(visited, tl.load(u_at + at * u_l).to(ACC), 0.0)
        B_j = tl.load(packed_at + at * packed_l)
        C_j = tl.load(packed_at + at * packed_l + BLOCK_N)
        dy = tl.where(visited, tl.load(dout_at + at * dout_l).to(ACC), 0.0)
        if HAS_Z:
            z_j = tl.load(z_at + at * z_l).to(ACC)
            dy = dy * z_j * sigmoid(z_j)
        delta_j = of_token(tl.load(delta_at + at * delta_l), token, HOLES, ACC)
        _, step = step_size(delta_j, bias_k, begin + place < end, SOFTPLUS, COARSE)
        received = tl.load(states_at + place * N * channels + cell, mask=state_mask, other=0.0)
        slot = partial_at + at * packed_l
        # Channels past the last one have copies of it in these rows, but neither decay nor gradient nor input.
        tl.store(slot, tl.sum(handed * tl.where(d_mask, step * u_j, 0.0)[None, :], 1), mask=n_mask & visited)
        tl.store(slot + BLOCK_N, tl.sum(received * tl.where(d_mask, dy, 0.0)[None, :], 1), mask=n_mask & visited)
        tl.store(sums_at + (CHUNK + in_chunk + place) * channels, tl.sum(handed * B_j[:, None], 0), mask=d_mask)
        handed += C_j[:, None] * dy[None, :]
        w = handed * received
        dA_k += w * step[None, :]
        tl.store(sums_at + (2 * CHUNK + in_chunk + place) * channels, tl.sum(w * A_k, 0), mask=d_mask)
        handed = handed * tl.exp2(step[None, :] * A_k)
    tl.debug_barrier()
    return dA_k
