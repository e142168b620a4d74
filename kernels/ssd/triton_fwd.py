"""SSD, forward, in Triton: a program walks the chunks of one head with its (P, N) state in registers.

A chunk costs four products of tiles: C B^T, that (decayed and masked) times x, C times the state, x^T B. The (Q, Q)
tile never leaves the registers and no state goes to memory, so the inputs are read once and the output written once.
The launch for one path adds to what the launch for the path before it wrote: a fixed order, hence the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, device_guard
from zoo.kernels.ssd import cpu
from zoo.kernels.ssd.triton_common import (
    Blocks,
    Inputs,
    carry_states,
    dot,
    load_rows,
    region_states,
    tokens_at,
    walking_order,
)

__all__ = ["forward"]


@triton.jit(do_not_specialize=["k", "L", "S", "chunks", "region_chunks"])
def output_kernel(
    x, B, C, D, start, decays, steps, table, out, merged, last_state, k, K, L, S, H, T, group_heads, regions, chunks,
    region_chunks, reverse, x_b, x_k, x_l, x_h, B_b, B_k, B_l, B_g, C_b, C_k, C_l, C_g,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_START: tl.constexpr, HAS_TABLE: tl.constexpr, MERGE: tl.constexpr, ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    p_blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // p_blocks
    p = tl.program_id(0) % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    region = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    path = b * K + k
    n = tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    x_at = x + b * x_b + k * x_k + head * x_h
    B_at = B + b * B_b + k * B_k + head // group_heads * B_g
    C_at = C + b * C_b + k * C_k + head // group_heads * C_g
    if not (MERGE and HAS_TABLE):
        out_at = out + b * L * H * P + head * P
    if MERGE:
        merged_at = merged + b * L * H * P + head * P
    dtype = x.dtype.element_ty
    cell = p[:, None] * N + n[None, :]
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    row = (path * H + head) * T
    if HAS_D:
        D_h = tl.load(D + k * H + head).to(ACC)

    state = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if HAS_START:
        start_at = start + ((path * regions + region) * H + head) * P * N
        state = tl.load(start_at + cell, mask=state_mask, other=0.0).to(ACC)
    first = region * region_chunks
    for number in tl.range(first, tl.minimum(first + region_chunks, chunks), disable_licm=True):
        chunk = tl.where(reverse, chunks - 1 - number, number)
        place = chunk * Q + q
        token = tokens_at(table, k, S, place, HAS_TABLE, OFFSET)
        x_t = load_rows(x_at, token, x_l, p, P)
        B_t = load_rows(B_at, token, B_l, n, N).to(dtype)
        C_t = load_rows(C_at, token, C_l, n, N).to(dtype)
        decay = tl.load(decays + row + chunk * Q + q)
        step = tl.load(steps + row + chunk * Q + q)
        end = tl.load(decays + row + chunk * Q + tl.where(reverse, 0, Q - 1))

        y = dot(C_t, tl.trans(state.to(dtype)), ACC) * tl.exp2(decay)[:, None]
        weighted = (x_t.to(ACC) * (tl.exp2(end - decay) * step)[:, None]).to(dtype)
        state = state * tl.exp2(end) + dot(tl.trans(weighted), B_t, ACC)
        order = walking_order(place, reverse)
        seen = order[:, None] >= order[None, :]  # (t, s)
        between = tl.exp2(tl.where(seen, decay[:, None] - decay[None, :], float("-inf")))
        weights = dot(C_t, tl.trans(B_t), ACC) * between * step[None, :]
        if HAS_D:  # equal tokens are one place, or read zeros
            weights += tl.where(token[:, None] == token[None, :], D_h, 0.0)
        y += dot(weights.to(dtype), x_t, ACC)

        at = token[:, None] * H * P + p[None, :]
        mask = (token >= 0)[:, None] & (p < P)[None, :]
        if MERGE:
            y += tl.load(merged_at + at, mask=mask & ((k > 0) | HAS_TABLE), other=0.0)
            tl.store(merged_at + at, y, mask=mask & ((k < K - 1) | HAS_TABLE))
        if not (MERGE and HAS_TABLE):
            tl.store(out_at + at, y.to(dtype), mask=mask & (k == K - 1))
    if region == regions - 1:
        tl.store(last_state + (path * H + head) * P * N + cell, state, mask=state_mask)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    dt_softplus: bool,
    reverse: list[bool],
) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, P) and last states (B, K, H, P, N)."""
    if not Blocks.of(x, B).fit(x):  # the chunked tensor form takes any size
        return cpu.forward(x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse)
    with device_guard(x.device):
        given = Inputs(x, dt, A, B, C, dt_bias, paths, dt_softplus, reverse)
        start = None if initial_state is None else initial_state.contiguous()
        D = None if D is None else D.contiguous()
        block_p = min(64, given.blocks.P)
        head_blocks = given.heads * ceil_div(given.width, block_p)
        regions = given.regions(given.batch * head_blocks)
        if regions[0] > 1:
            _, ends, totals = region_states(given, regions, None, None, ends=True)
            start = carry_states(given, start, ends[0], totals)

        batch, _, L, heads, width = x.shape
        out, merged = given.merged_tensors((batch, L, heads, width), x.dtype, given.K > 1)
        last_state = given.new(batch, given.K, heads, width, given.N)
        for k in range(given.K):
            output_kernel[(head_blocks, regions[0], batch)](
                given.x, given.B, given.C, D, start, given.decays, given.steps, given.paths, out, merged, last_state,
                k, given.K, L, given.S, heads, given.T, heads // given.groups, regions[0], given.chunks, regions[1],
                reverse[k], *given.x_strides, *given.B.stride()[:4], *given.C.stride()[:4],
                P=width, N=given.N, BLOCK_P=block_p, BLOCK_N=given.blocks.N, HAS_D=D is not None,
                HAS_START=start is not None, MERGE=merged is not None, **given.options,
                num_warps=given.blocks.warps, num_stages=given.blocks.stages,
            )  # fmt: skip
    return merged.to(x.dtype) if out is None else out, last_state
