"""SSD, backward, in Triton.

``states_kernel`` first walks every path both ways: along it for the states before every chunk, against it for their
gradients after every chunk, both saved in the dtype of the inputs. Then all chunks are independent. A program of
``gradients_kernel`` owns one chunk of one group and goes through the heads of the group (or a part of them), so B, C
and their product are read and made once, and the sums over heads stay in registers. It does so twice, as the sums do
not all fit there at once. Tiles are (s, t), the token read before the token that reads, which is what dx
needs as a left operand.

The log decay of step i weighs everything that outputs at or after i read from before i. Within a chunk these are
pairs (t, s) with s < i <= t, summed as row sums minus column sums over the steps from i on: both are sums of the same
numbers, so what cancels does so to float32 rounding. ``steps_grad_kernel`` takes these sums along the chunk.

Programs that share a sum write parts of it, which torch adds: no atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, contiguous_channels, device_guard
from zoo.kernels.ssd import cpu
from zoo.kernels.ssd.triton_common import (
    PROGRAMS,
    Blocks,
    Inputs,
    carry_states,
    dot,
    load_rows,
    raw_steps,
    region_states,
    tokens_at,
    walk_sums,
    walking_order,
)

__all__ = ["backward"]


@triton.jit(do_not_specialize=["k", "L", "S", "chunks"])
def gradients_kernel(
    x, B, C, D, dy, decays, steps, table, states, dx, dx_merged, dB, dC, rows, columns, entering, leaving, skip,
    k, K, L, S, H, T, groups, group_heads, splits, split_heads, chunks, batch, reverse,
    x_b, x_k, x_l, x_h, B_b, B_k, B_l, B_g, C_b, C_k, C_l, C_g, dy_b, dy_l, dy_h, dx_b, dx_k,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_TABLE: tl.constexpr, MERGE: tl.constexpr, STAGES: tl.constexpr, LAST_STAGES: tl.constexpr,
    ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    path = b * K + k
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    token = tokens_at(table, k, S, chunk * Q + q, HAS_TABLE, OFFSET)
    dtype = x.dtype.element_ty
    B_t = load_rows(B + b * B_b + k * B_k + group * B_g, token, B_l, n, N).to(dtype)
    C_t = load_rows(C + b * C_b + k * C_k + group * C_g, token, C_l, n, N).to(dtype)
    scores = dot(B_t, tl.trans(C_t), ACC).to(dtype)  # (s, t)
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    state_cell = p[:, None] * N + n[None, :]
    row_mask = (token >= 0)[:, None] & (p < P)[None, :]
    dx_cell = token[:, None] * H * P + p[None, :]
    states_at = states + (path * chunks + chunk) * H * P * N
    dstates_at = states_at + tl.cast(batch, tl.int64) * K * chunks * H * P * N
    first = group * group_heads + split * split_heads
    last = tl.minimum(first + split_heads, (group + 1) * group_heads)

    # Between tokens s and t of the chunk; dx also from the state that leaves the chunk.
    dscores = tl.zeros([Q, Q], ACC)
    for head in tl.range(first, last, num_stages=STAGES, disable_licm=True):
        x_t = load_rows(x + b * x_b + k * x_k + head * x_h, token, x_l, p, P)
        dy_t = load_rows(dy + b * dy_b + head * dy_h, token, dy_l, p, P).to(dtype)
        dstate = tl.load(dstates_at + head * P * N + state_cell, mask=state_mask, other=0.0)
        row = (path * H + head) * T + chunk * Q
        decay = tl.load(decays + row + q)
        step = tl.load(steps + row + q)
        end = tl.load(decays + row + tl.where(reverse, 0, Q - 1))

        order = walking_order(head * Q + q, reverse)
        between = tl.exp2(tl.where(order[None, :] >= order[:, None], decay[None, :] - decay[:, None], float("-inf")))
        pairs = dot(x_t, tl.trans(dy_t), ACC) * between
        dscores += pairs * step[:, None]
        weights = scores.to(ACC) * between * step[:, None]
        if HAS_D:
            same = order[:, None] == order[None, :]
            tl.store(skip + row + q, tl.sum(tl.where(same, pairs, 0.0), 1))
            weights += tl.where(same, tl.load(D + k * H + head).to(ACC), 0.0)
        pairs = pairs * scores.to(ACC)
        tl.store(columns + row + q, tl.sum(pairs, 1))
        tl.store(rows + row + q, tl.sum(pairs * step[:, None], 0))

        to_end = tl.exp2(end - decay)
        dx_t = dot(B_t, tl.trans(dstate), ACC) * to_end[:, None]
        tl.store(leaving + row + q, tl.sum(dx_t * x_t.to(ACC), 1))
        dx_t = dx_t * step[:, None] + dot(weights.to(dtype), dy_t, ACC)

        at = b * dx_b + k * dx_k + head * P
        if MERGE:
            dx_t += tl.load(dx_merged + at + dx_cell, mask=row_mask & ((k > 0) | HAS_TABLE), other=0.0)
            tl.store(dx_merged + at + dx_cell, dx_t, mask=row_mask & ((k < K - 1) | HAS_TABLE))
        if not MERGE:
            tl.store(dx + at + dx_cell, dx_t.to(dtype), mask=row_mask)
        elif not HAS_TABLE:
            tl.store(dx + at + dx_cell, dx_t.to(dtype), mask=row_mask & (k == K - 1))

    # The rest: from the state that enters the chunk to tokens t, from tokens s to the state that leaves it, and what
    # passes through from state to state.
    dB_t = dot(dscores.to(dtype), C_t, ACC)
    dC_t = dot(tl.trans(dscores.to(dtype)), B_t, ACC)
    for head in tl.range(first, last, num_stages=LAST_STAGES, disable_licm=True):
        x_t = load_rows(x + b * x_b + k * x_k + head * x_h, token, x_l, p, P)
        dy_t = load_rows(dy + b * dy_b + head * dy_h, token, dy_l, p, P).to(dtype)
        state = tl.load(states_at + head * P * N + state_cell, mask=state_mask, other=0.0)
        dstate = tl.load(dstates_at + head * P * N + state_cell, mask=state_mask, other=0.0)
        row = (path * H + head) * T + chunk * Q
        decay = tl.load(decays + row + q)
        end = tl.load(decays + row + tl.where(reverse, 0, Q - 1))
        weight = tl.exp2(end - decay) * tl.load(steps + row + q)
        dB_t += dot((x_t.to(ACC) * weight[:, None]).to(dtype), dstate, ACC)
        decayed = dy_t.to(ACC) * tl.exp2(decay)[:, None]
        dC_t += dot(decayed.to(dtype), state, ACC)
        read = tl.sum(dot(C_t, tl.trans(state), ACC) * decayed, 1)
        through = tl.exp2(end) * tl.sum(tl.sum(state.to(ACC) * dstate.to(ACC), 1), 0)
        tl.store(entering + row + q, read + tl.where(q == tl.where(reverse, 0, Q - 1), through, 0.0))

    at = ((split * batch + b) * K + k) * L * groups * N + group * N
    cell = token[:, None] * groups * N + n[None, :]
    mask = (token >= 0)[:, None] & (n < N)[None, :]
    tl.store(dB + at + cell, dB_t.to(dB.dtype.element_ty), mask=mask)
    tl.store(dC + at + cell, dC_t.to(dC.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "S"])
def steps_grad_kernel(
    dt, A, bias, table, steps, rows, columns, entering, leaving, skip, ddt, parts, K, L, S, H, T, batch, reverse_mask,
    dt_b, dt_k, dt_l, dt_h,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_TABLE: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Gradient of dt, and a chunk's parts of those of A, dt_bias and D."""
    chunk = tl.program_id(0)
    path = tl.program_id(2).to(tl.int64)
    k = tl.program_id(2) % K
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = h < H
    place = chunk * Q + tl.arange(0, Q)
    reverse = (reverse_mask >> k) & 1 == 1
    token = tokens_at(table, k, S, place, HAS_TABLE, OFFSET)
    cell = (path * H + h[None, :]) * T + place[:, None]
    mask = h_mask[None, :] & (place < T)[:, None]
    step = tl.load(steps + cell, mask=mask, other=0.0)
    column = tl.load(columns + cell, mask=mask, other=0.0)
    left = tl.load(leaving + cell, mask=mask, other=0.0)
    across = tl.load(rows + cell, mask=mask, other=0.0) + tl.load(entering + cell, mask=mask, other=0.0)
    dlog = walk_sums(across - column * step, reverse == 0)
    dlog += walk_sums(left * step, reverse) - left * step
    part = parts + ((path // K * tl.num_programs(0) + chunk) * K + k) * H + h
    part_size = tl.cast(batch, tl.int64) * tl.num_programs(0) * K * H
    draw = dlog
    if HAS_A:
        dt_at = dt + path // K * dt_b + k * dt_k
        raw, _ = raw_steps(dt_at, bias, token, k, h, H, dt_l, dt_h, SOFTPLUS, HAS_A, HAS_BIAS, ACC)
        A_h = tl.load(A + k * H + h, mask=h_mask, other=0.0).to(ACC)
        draw = dlog * A_h[None, :] + column + left
        if SOFTPLUS:
            draw = tl.where(raw > 20.0, draw, draw / (1.0 + tl.exp(-raw)))
        tl.store(part, tl.sum(dlog * step, 0), mask=h_mask)
        if HAS_BIAS:
            tl.store(part + part_size, tl.sum(tl.where((token >= -1)[:, None], draw, 0.0), 0), mask=h_mask)
    if HAS_D:
        tl.store(part + 2 * part_size, tl.sum(tl.load(skip + cell, mask=mask, other=0.0), 0), mask=h_mask)
    at = ddt + path * L * H + (token[:, None] * H + h[None, :])
    tl.store(at, draw.to(ddt.dtype.element_ty), mask=(token >= 0)[:, None] & h_mask[None, :])


def _states(
    given: Inputs, initial_state: Tensor | None, grad_last_state: Tensor | None, grad_out: Tensor, want_first: bool
) -> tuple[Tensor, Tensor | None]:
    """States before and gradients of the states after every chunk; gradient of the state before the path if wanted."""
    starts = [None if t is None else t.contiguous() for t in (initial_state, grad_last_state)]
    programs = 2 * given.batch * given.K * given.heads * ceil_div(given.width, 64)
    regions = given.regions(programs)
    if regions[0] > 1:
        _, ends, totals = region_states(given, regions, None, None, True, grad_out)
        starts = [carry_states(given, start, ends[i], totals[i]) for i, start in enumerate(starts)]
    states, ends, _ = region_states(given, regions, starts[0], given.x.dtype, want_first, grad_out, starts[1])
    return states, ends[1, :, :, -1] if want_first else None


def _head_splits(given: Inputs) -> tuple[int, int]:
    """Into how many parts the heads of a group are split to make enough programs, and the heads of a part."""
    heads = given.heads // given.groups
    split_heads = ceil_div(heads, min(heads, ceil_div(2 * PROGRAMS, given.batch * given.groups * given.chunks)))
    return ceil_div(heads, split_heads), split_heads


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
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
) -> list[Tensor]:
    """Gradients of the tensors given, in argument order."""
    if not Blocks.of(x, B).fit(x):  # the chunked tensor form takes any size
        return cpu.backward(
            grad_out, grad_last_state, x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse
        )
    grad_out = contiguous_channels(grad_out)
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    batch, shared, L, heads, width = x.shape
    with device_guard(x.device):
        given = Inputs(x, dt, A, B, C, dt_bias, paths, dt_softplus, reverse, grad_out.stride(1))
        D = None if D is None else D.contiguous()
        states, dinitial = _states(given, initial_state, grad_last_state, grad_out, initial_state is not None)
        splits, split_heads = _head_splits(given)
        new = torch.empty if paths is None else torch.zeros  # a table need not visit every token
        dx, dx_merged = given.merged_tensors(tuple(x.shape), x.dtype, shared == 1 and given.K > 1)
        dB, dC = (new(splits, *t.shape, dtype=t.dtype if splits == 1 else given.dtype, device=x.device) for t in (B, C))
        ddt = new(dt.shape, dtype=dt.dtype, device=x.device)
        of_steps = given.new(5, batch, given.K, heads, given.T)  # rows, columns, entering, leaving, skip
        parts = given.new(3, batch * given.chunks, given.K, heads)
        for k in range(given.K):
            gradients_kernel[(given.groups * splits, given.chunks, batch)](
                given.x, given.B, given.C, D, grad_out, given.decays, given.steps, given.paths, states, dx, dx_merged,
                dB, dC, *of_steps, k, given.K, L, given.S, heads, given.T, given.groups, heads // given.groups, splits,
                split_heads, given.chunks, batch, reverse[k], *given.x_strides, *given.B.stride()[:4],
                *given.C.stride()[:4], *grad_out.stride()[:3], shared * L * heads * width,
                L * heads * width if shared > 1 else 0,
                P=width, N=given.N, BLOCK_P=given.blocks.P, BLOCK_N=given.blocks.N, HAS_D=D is not None,
                MERGE=dx_merged is not None, STAGES=given.blocks.gradient_stages[0],
                LAST_STAGES=given.blocks.gradient_stages[1], **given.options, num_warps=given.blocks.gradient_warps,
            )  # fmt: skip
        steps_grad_kernel[given.grid_of_steps](
            dt, given.A, given.dt_bias, given.paths, given.steps, *of_steps, ddt, parts,
            given.K, L, given.S, heads, given.T, batch, given.reverse_mask, *dt.stride(), HAS_D=D is not None,
            **given.dt_options, **given.options, num_warps=4,
        )  # fmt: skip
    dx = dx_merged if dx is None else dx
    dB, dC = (t[0] if splits == 1 else t.sum(0) for t in (dB, dC))
    dA, dbias, dD = (None if t is None else part.sum(0) for t, part in zip((A, dt_bias, D), parts, strict=True))
    grads = (dx, ddt, dA, dB, dC, dD, dbias, dinitial)
    return [grad.to(t.dtype) for grad, t in zip(grads, inputs, strict=True) if t is not None]
