"""Selective scan, forward, in Triton.

One program owns a block of channels of one batch element and walks all its paths one after the other, with the
(N, BLOCK_D) states in registers. Tokens are read where they lie: the order of a path is an index, never a copy. The
outputs of several paths are added in a float32 buffer that the program alone touches, so the sum has a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import contiguous_channels, device_guard
from zoo.kernels.selective_scan.op import CHUNK, accumulate_dtype, num_chunks, path_length
from zoo.kernels.selective_scan.triton_common import (
    LOG2E,
    UNROLL,
    block_shape,
    offset_type,
    path_lengths,
    path_steps,
    softplus,
    states_first,
    token_at,
)

__all__ = ["forward"]


# `stride_N` is `channels` again, hidden from Triton's divisibility analysis: see `triton_common.block_shape`.
@triton.jit(do_not_specialize=["stride_N"])
def selective_scan_fwd_kernel(
    u, delta, A, B, C, D, z, bias, initial, table, lengths, out, merged, last_state, states, window_y,
    L, P, K, channels, stride_N, group_channels, reverse_mask, chunks,
    u_b, u_k, u_l, delta_b, delta_k, delta_l, B_b, B_k, B_l, B_g, C_b, C_k, C_l, C_g, z_b, z_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_TABLE: tl.constexpr, SAVE: tl.constexpr, ONE_PATH: tl.constexpr,
    ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(group_channels, BLOCK_D)
    group = tl.program_id(0) // blocks
    b = tl.program_id(1).to(tl.int64)
    in_group = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = group * group_channels + in_group
    n = tl.arange(0, BLOCK_N)
    d_mask = in_group < group_channels
    n_mask = n < N
    state_mask = n_mask[:, None] & d_mask[None, :]

    out_at = out + b * L * channels
    if HAS_Z:
        z_at = z + b * z_b
    if not ONE_PATH:
        merged_at = merged + b * L * channels
    if WINDOW > 1:
        window_at = window_y + b * WINDOW * channels + d

    for k in range(K):
        path = b * K + k
        backwards = (reverse_mask >> k) & 1 == 1
        steps = path_steps(lengths, k, P, HAS_TABLE)
        u_at = u + b * u_b + k * u_k
        delta_at = delta + b * delta_b + k * delta_k
        B_at = B + b * B_b + k * B_k + group * B_g
        C_at = C + b * C_b + k * C_k + group * C_g
        A_k = tl.load(A + (k * N + n[:, None]) * stride_N + d[None, :], mask=state_mask, other=0.0).to(ACC) * LOG2E
        bias_k = tl.zeros([BLOCK_D], ACC)
        if HAS_BIAS:
            bias_k = tl.load(bias + k * channels + d, mask=d_mask, other=0.0).to(ACC)
        D_k = tl.zeros([BLOCK_D], ACC)
        if HAS_D:
            D_k = tl.load(D + k * channels + d, mask=d_mask, other=0.0).to(ACC)
        h = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        if HAS_INITIAL:
            at = initial + (path * N + n[:, None]) * stride_N + d[None, :]
            h = tl.load(at, mask=state_mask, other=0.0).to(ACC)

        for start in range(0, P, UNROLL):
            if SAVE:
                if start % CHUNK == 0:
                    row = (path * chunks + start // CHUNK) * N
                    tl.store(states + (row + n[:, None]) * stride_N + d[None, :], h, mask=state_mask)
            if WINDOW > 1:
                if start % WINDOW == 0:
                    tl.debug_barrier()  # the sums of the window before have been read
                    future = tl.zeros([BLOCK_N, BLOCK_D], ACC)
                    for i in range(WINDOW):
                        place = WINDOW - 1 - i
                        token = token_at(table, k, P, start + place, steps, backwards, HAS_TABLE, OFFSET)
                        mask = d_mask & (token >= 0)
                        n_visited = n_mask & (token >= 0)
                        u_j = tl.load(u_at + (token * u_l + d), mask=mask, other=0.0).to(ACC)
                        step = tl.load(delta_at + (token * delta_l + d), mask=mask, other=0.0).to(ACC) + bias_k
                        B_j = tl.load(B_at + (token * B_l + n), mask=n_visited, other=0.0).to(ACC)
                        C_j = tl.load(C_at + (token * C_l + n), mask=n_visited, other=0.0).to(ACC)
                        if SOFTPLUS:
                            step = softplus(step)
                        step = tl.where(token >= -1, step, 0.0)
                        received = tl.exp2(step[None, :] * A_k) * future
                        tl.store(window_at + place * channels, tl.sum(received * C_j[:, None], 0), mask=d_mask)
                        future = received + (step * u_j)[None, :] * B_j[:, None]
                    tl.debug_barrier()
            tokens = ()
            u_t = ()
            delta_t = ()
            B_t = ()
            C_t = ()
            z_t = ()
            y_t = ()
            for j in tl.static_range(UNROLL):
                token = token_at(table, k, P, start + j, steps, backwards, HAS_TABLE, OFFSET)
                visited = token >= 0
                mask = d_mask & visited
                tokens = tokens + (token,)
                u_t = u_t + (tl.load(u_at + (token * u_l + d), mask=mask, other=0.0),)
                delta_t = delta_t + (tl.load(delta_at + (token * delta_l + d), mask=mask, other=0.0),)
                B_t = B_t + (tl.load(B_at + (token * B_l + n), mask=n_mask & visited, other=0.0),)
                C_t = C_t + (tl.load(C_at + (token * C_l + n), mask=n_mask & visited, other=0.0),)
                if HAS_Z:
                    last = mask & (k == K - 1)
                    z_t = z_t + (tl.load(z_at + (token * z_l + d), mask=last, other=0.0),)
                if not ONE_PATH:
                    started = mask & ((k > 0) | HAS_TABLE)
                    y_t = y_t + (tl.load(merged_at + (token * channels + d), mask=started, other=0.0),)
            for j in tl.static_range(UNROLL):
                token = tokens[j]
                mask = d_mask & (token >= 0)
                u_j = u_t[j].to(ACC)
                step = delta_t[j].to(ACC) + bias_k
                if SOFTPLUS:
                    step = softplus(step)
                step = tl.where(token >= -1, step, 0.0)
                h = tl.exp2(step[None, :] * A_k) * h + (step * u_j)[None, :] * B_t[j].to(ACC)[:, None]
                y = tl.sum(h * C_t[j].to(ACC)[:, None], 0) + D_k * u_j
                if WINDOW > 1:
                    y += tl.load(window_at + (start + j) % WINDOW * channels, mask=d_mask, other=0.0)
                if not ONE_PATH:
                    y += y_t[j]
                    tl.store(merged_at + (token * channels + d), y, mask=mask & ((k < K - 1) | HAS_TABLE))
                if not HAS_TABLE:
                    if HAS_Z:
                        z_j = z_t[j].to(ACC)
                        y = y * z_j / (1.0 + tl.exp(-z_j))
                    tl.store(out_at + (token * channels + d), y.to(out.dtype.element_ty), mask=mask & (k == K - 1))
        tl.store(last_state + (path * N + n[:, None]) * stride_N + d[None, :], h, mask=state_mask)
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
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, L, D), last state (B, K, D, N) and chunk-boundary states (B, K, chunks, N, D)."""
    batch, shared, L, channels = u.shape
    K, _, N = A.shape
    groups = B.shape[3]
    steps = path_length(u, paths)
    dtype = accumulate_dtype(u)
    chunks = num_chunks(steps) if save_states else 0
    one_path = K == 1 and paths is None
    out = u.new_empty(batch, L, channels)
    last_state = u.new_empty(batch, K, N, channels, dtype=dtype)
    states = u.new_empty(batch, K, chunks, N, channels, dtype=dtype)
    merged = None
    if not one_path:
        allocate = torch.empty if paths is None else torch.zeros  # a table need not visit every token
        merged = allocate(batch, L, channels, dtype=dtype, device=u.device)
    window_y = u.new_empty(batch, window, channels, dtype=dtype) if window > 1 else None

    u, delta, B, C = contiguous_channels(u), contiguous_channels(delta), contiguous_channels(B), contiguous_channels(C)
    z = None if z is None else contiguous_channels(z)
    A, initial_state = states_first(A), states_first(initial_state)
    D, delta_bias, paths = (None if x is None else x.contiguous() for x in (D, delta_bias, paths))
    z_stride = 0 if z is None else z.stride(1)
    block_n, block_d, warps = block_shape(N)
    grid = (groups * triton.cdiv(channels // groups, block_d), batch)
    with device_guard(u.device):
        selective_scan_fwd_kernel[grid](
            u, delta, A, B, C, D, z, delta_bias, initial_state, paths, path_lengths(paths),
            out, merged, last_state, states, window_y,
            L, steps, K, channels, channels, channels // groups, sum(1 << k for k in range(K) if reverse[k]), chunks,
            u.stride(0), u.stride(1) if shared > 1 else 0, u.stride(2), *delta.stride()[:3], *B.stride()[:4],
            *C.stride()[:4], *(z.stride()[:2] if z is not None else (0, 0)),
            N=N, BLOCK_N=block_n, BLOCK_D=block_d, CHUNK=CHUNK, UNROLL=UNROLL, WINDOW=window,
            SOFTPLUS=delta_softplus, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            HAS_INITIAL=initial_state is not None, HAS_TABLE=paths is not None, SAVE=save_states, ONE_PATH=one_path,
            OFFSET=offset_type(L, u.stride(2), delta.stride(2), B.stride(2), C.stride(2), channels, z_stride),
            ACC=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=warps,
        )  # fmt: skip
    if paths is not None:
        out = (merged if z is None else merged * torch.nn.functional.silu(z.to(dtype))).to(u.dtype)
    return out, last_state.transpose(2, 3), states
