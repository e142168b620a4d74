"""Selective scan, backward, in Triton.

As in the forward, one program owns a block of channels of one batch element. Per path it goes through the chunks from
the last to the first. From the saved state at the beginning of a chunk it first recomputes the states every ``UNROLL``
steps and parks them in a scratch buffer of its own; then it takes these segments in reverse, recomputes the states
inside one in registers, and carries the gradient of the state backwards through it.

Sums over channels (dB, dC) and over the batch (dA, dD, ddelta_bias) leave the program as partial sums and are added by
torch afterwards: no atomics, so two runs give the same bits.
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

__all__ = ["backward"]


@triton.jit
def _step_size(delta_t, bias, token, SOFTPLUS: tl.constexpr):
    raw = delta_t + bias
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    return raw, tl.where(token >= -1, step, 0.0)


# `stride_N` is `channels` again, hidden from Triton's divisibility analysis: see `triton_common.block_shape`.
@triton.jit(do_not_specialize=["stride_N"])
def selective_scan_bwd_kernel(
    u, delta, A, B, C, D, z, bias, table, lengths, states, dout, dlast,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial, du_sum, y_sum, scratch, window_states, window_sums,
    L, P, K, channels, stride_N, group_channels, reverse_mask, chunks, batch,
    u_b, u_k, u_l, delta_b, delta_k, delta_l, B_b, B_k, B_l, B_g, C_b, C_k, C_l, C_g, z_b, z_l, dout_b, dout_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DLAST: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_TABLE: tl.constexpr,
    SUM_U: tl.constexpr, SUM_Y: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(group_channels, BLOCK_D)
    group = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b = tl.program_id(1).to(tl.int64)
    in_group = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d = group * group_channels + in_group
    n = tl.arange(0, BLOCK_N)
    d_mask = in_group < group_channels
    n_mask = n < N
    state_mask = n_mask[:, None] & d_mask[None, :]
    groups = channels // group_channels
    SEGMENTS: tl.constexpr = CHUNK // UNROLL
    dout_at = dout + b * dout_b
    if HAS_Z:
        z_at = z + b * z_b
        dz_at = dz + b * L * channels
    if SUM_Y:
        y_at = y_sum + b * L * channels
    if SUM_U:
        du_sum_at = du_sum + b * L * channels
    if WINDOW > 1:  # sums of a chunk's steps over what comes from inside their windows: y, gB and A w
        window_at = window_sums + b * 3 * CHUNK * channels + d
        GB: tl.constexpr = CHUNK
        AW: tl.constexpr = 2 * CHUNK

    for k in range(K):
        path = b * K + k
        backwards = (reverse_mask >> k) & 1 == 1
        steps = path_steps(lengths, k, P, HAS_TABLE)
        u_at = u + b * u_b + k * u_k
        delta_at = delta + b * delta_b + k * delta_k
        B_at = B + b * B_b + k * B_k + group * B_g
        C_at = C + b * C_b + k * C_k + group * C_g
        du_at = du + (b if SUM_U else path) * L * channels
        ddelta_at = ddelta + path * L * channels
        partial = (((block * batch + b) * K + k) * L * groups + group) * N
        A_k = tl.load(A + (k * N + n[:, None]) * stride_N + d[None, :], mask=state_mask, other=0.0).to(ACC) * LOG2E
        bias_k = tl.zeros([BLOCK_D], ACC)
        if HAS_BIAS:
            bias_k = tl.load(bias + k * channels + d, mask=d_mask, other=0.0).to(ACC)
        D_k = tl.zeros([BLOCK_D], ACC)
        if HAS_D:
            D_k = tl.load(D + k * channels + d, mask=d_mask, other=0.0).to(ACC)
        future = tl.zeros([BLOCK_N, BLOCK_D], ACC)  # gradient that reaches a state from later steps
        if HAS_DLAST:
            at = dlast + (path * N + n[:, None]) * stride_N + d[None, :]
            future = tl.load(at, mask=state_mask, other=0.0).to(ACC)
        dA_k = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        dD_k = tl.zeros([BLOCK_D], ACC)
        dbias_k = tl.zeros([BLOCK_D], ACC)

        for chunk_from_end in range(chunks):
            chunk = chunks - 1 - chunk_from_end
            row = (path * chunks + chunk) * N
            h = tl.load(states + (row + n[:, None]) * stride_N + d[None, :], mask=state_mask, other=0.0)
            for segment in range(SEGMENTS):
                tl.store(
                    scratch + ((b * SEGMENTS + segment) * N + n[:, None]) * stride_N + d[None, :], h, mask=state_mask
                )
                if segment < SEGMENTS - 1:
                    for j in tl.static_range(UNROLL):
                        step_number = chunk * CHUNK + segment * UNROLL + j
                        token = token_at(table, k, P, step_number, steps, backwards, HAS_TABLE, OFFSET)
                        mask = d_mask & (token >= 0)
                        u_j = tl.load(u_at + (token * u_l + d), mask=mask, other=0.0).to(ACC)
                        delta_j = tl.load(delta_at + (token * delta_l + d), mask=mask, other=0.0).to(ACC)
                        B_j = tl.load(B_at + (token * B_l + n), mask=n_mask & (token >= 0), other=0.0).to(ACC)
                        raw, step = _step_size(delta_j, bias_k, token, SOFTPLUS)
                        h = tl.exp2(step[None, :] * A_k) * h + (step * u_j)[None, :] * B_j[:, None]
            tl.debug_barrier()

            if WINDOW > 1:
                for window in range(CHUNK // WINDOW):
                    received = tl.zeros([BLOCK_N, BLOCK_D], ACC)
                    inputs = tl.zeros([BLOCK_N, BLOCK_D], ACC)
                    for i in range(WINDOW):
                        place = WINDOW - 1 - i
                        token = token_at(
                            table, k, P, chunk * CHUNK + window * WINDOW + place, steps, backwards, HAS_TABLE, OFFSET
                        )
                        mask = d_mask & (token >= 0)
                        u_j = tl.load(u_at + (token * u_l + d), mask=mask, other=0.0).to(ACC)
                        delta_j = tl.load(delta_at + (token * delta_l + d), mask=mask, other=0.0).to(ACC)
                        B_j = tl.load(B_at + (token * B_l + n), mask=n_mask & (token >= 0), other=0.0).to(ACC)
                        C_j = tl.load(C_at + (token * C_l + n), mask=n_mask & (token >= 0), other=0.0).to(ACC)
                        raw, step = _step_size(delta_j, bias_k, token, SOFTPLUS)
                        received = tl.exp2(step[None, :] * A_k) * (received + inputs)
                        inputs = (step * u_j)[None, :] * B_j[:, None]
                        tl.store(
                            window_states + ((b * WINDOW + place) * N + n[:, None]) * stride_N + d[None, :],
                            received,
                            mask=state_mask,
                        )
                        in_chunk = window * WINDOW + place
                        tl.store(window_at + in_chunk * channels, tl.sum(received * C_j[:, None], 0), mask=d_mask)
                    tl.debug_barrier()
                    handed = tl.zeros([BLOCK_N, BLOCK_D], ACC)  # gradient of a step's input from earlier outputs
                    for place in range(WINDOW):
                        in_chunk = window * WINDOW + place
                        token = token_at(table, k, P, chunk * CHUNK + in_chunk, steps, backwards, HAS_TABLE, OFFSET)
                        visited = n_mask & (token >= 0)
                        mask = d_mask & (token >= 0)
                        u_j = tl.load(u_at + (token * u_l + d), mask=mask, other=0.0).to(ACC)
                        delta_j = tl.load(delta_at + (token * delta_l + d), mask=mask, other=0.0).to(ACC)
                        B_j = tl.load(B_at + (token * B_l + n), mask=visited, other=0.0).to(ACC)
                        C_j = tl.load(C_at + (token * C_l + n), mask=visited, other=0.0).to(ACC)
                        dy = tl.load(dout_at + (token * dout_l + d), mask=mask, other=0.0).to(ACC)
                        if HAS_Z:
                            z_j = tl.load(z_at + (token * z_l + d), mask=mask, other=0.0).to(ACC)
                            dy = dy * z_j / (1.0 + tl.exp(-z_j))
                        raw, step = _step_size(delta_j, bias_k, token, SOFTPLUS)
                        at = window_states + ((b * WINDOW + place) * N + n[:, None]) * stride_N + d[None, :]
                        received = tl.load(at, mask=state_mask, other=0.0)
                        slot = partial + (token * groups * N + n)
                        tl.store(dB + slot, tl.sum(handed * (step * u_j)[None, :], 1), mask=visited)
                        tl.store(dC + slot, tl.sum(received * dy[None, :], 1), mask=visited)
                        tl.store(window_at + (GB + in_chunk) * channels, tl.sum(handed * B_j[:, None], 0), mask=d_mask)
                        handed += C_j[:, None] * dy[None, :]
                        w = handed * received
                        dA_k += w * step[None, :]
                        tl.store(window_at + (AW + in_chunk) * channels, tl.sum(w * A_k, 0), mask=d_mask)
                        handed = handed * tl.exp2(step[None, :] * A_k)
                    tl.debug_barrier()

            for segment_from_end in range(SEGMENTS):
                segment = SEGMENTS - 1 - segment_from_end
                parked = scratch + ((b * SEGMENTS + segment) * N + n[:, None]) * stride_N + d[None, :]
                h = tl.load(parked, mask=state_mask, other=0.0)
                before = ()  # the state before every step of the segment
                tokens = ()
                u_t = ()
                raw_t = ()
                step_t = ()
                B_t = ()
                for j in tl.static_range(UNROLL):
                    step_number = chunk * CHUNK + segment * UNROLL + j
                    token = token_at(table, k, P, step_number, steps, backwards, HAS_TABLE, OFFSET)
                    mask = d_mask & (token >= 0)
                    u_j = tl.load(u_at + (token * u_l + d), mask=mask, other=0.0).to(ACC)
                    delta_j = tl.load(delta_at + (token * delta_l + d), mask=mask, other=0.0).to(ACC)
                    B_j = tl.load(B_at + (token * B_l + n), mask=n_mask & (token >= 0), other=0.0).to(ACC)
                    raw, step = _step_size(delta_j, bias_k, token, SOFTPLUS)
                    before = before + (h,)
                    tokens = tokens + (token,)
                    u_t = u_t + (u_j,)
                    raw_t = raw_t + (raw,)
                    step_t = step_t + (step,)
                    B_t = B_t + (B_j,)
                    h = tl.exp2(step[None, :] * A_k) * h + (step * u_j)[None, :] * B_j[:, None]

                for j in tl.static_range(UNROLL - 1, -1, -1):
                    token = tokens[j]
                    step = step_t[j]
                    in_chunk = segment * UNROLL + j
                    mask = d_mask & (token >= 0)
                    cell = token * channels + d
                    C_j = tl.load(C_at + (token * C_l + n), mask=n_mask & (token >= 0), other=0.0).to(ACC)
                    dout_j = tl.load(dout_at + (token * dout_l + d), mask=mask, other=0.0).to(ACC)
                    dy = dout_j
                    if HAS_Z:
                        z_j = tl.load(z_at + (token * z_l + d), mask=mask, other=0.0).to(ACC)
                        gate = 1.0 / (1.0 + tl.exp(-z_j))
                        dy = dout_j * z_j * gate
                        y = tl.sum(h * C_j[:, None], 0) + D_k * u_t[j]
                        if WINDOW > 1:
                            y += tl.load(window_at + in_chunk * channels, mask=d_mask, other=0.0)
                        if SUM_Y:
                            y += tl.load(y_at + cell, mask=mask & ((k > 0) | HAS_TABLE), other=0.0)
                            tl.store(y_at + cell, y, mask=mask & ((k < K - 1) | HAS_TABLE))
                        if not HAS_TABLE:
                            dz_j = dout_j * y * gate * (1.0 + z_j * (1.0 - gate))
                            tl.store(dz_at + cell, dz_j.to(dz.dtype.element_ty), mask=mask & (k == K - 1))
                    g = future + C_j[:, None] * dy[None, :]
                    gB = tl.sum(g * B_t[j][:, None], 0)
                    dC_j = tl.sum(h * dy[None, :], 1)
                    dB_j = tl.sum(g * (step * u_t[j])[None, :], 1)
                    future = g * tl.exp2(step[None, :] * A_k)
                    w = future * before[j]
                    dA_k += w * step[None, :]
                    Aw = tl.sum(w * A_k, 0)
                    if WINDOW > 1:
                        gB += tl.load(window_at + (GB + in_chunk) * channels, mask=d_mask, other=0.0)
                        Aw += tl.load(window_at + (AW + in_chunk) * channels, mask=d_mask, other=0.0)
                        earlier = partial + (token * groups * N + n)
                        dB_j += tl.load(dB + earlier, mask=n_mask & (token >= 0), other=0.0)
                        dC_j += tl.load(dC + earlier, mask=n_mask & (token >= 0), other=0.0)
                    dstep = u_t[j] * gB + Aw / LOG2E
                    if SOFTPLUS:
                        dstep = tl.where(raw_t[j] > 20.0, dstep, dstep / (1.0 + tl.exp(-raw_t[j])))
                    dbias_k += tl.where(token >= -1, dstep, 0.0)
                    dD_k += dy * u_t[j]
                    du_j = step * gB + D_k * dy

                    tl.store(ddelta_at + cell, dstep.to(ddelta.dtype.element_ty), mask=mask)
                    if SUM_U:
                        du_j += tl.load(du_sum_at + cell, mask=mask & ((k > 0) | HAS_TABLE), other=0.0)
                        tl.store(du_sum_at + cell, du_j, mask=mask & ((k < K - 1) | HAS_TABLE))
                        if not HAS_TABLE:
                            tl.store(du_at + cell, du_j.to(du.dtype.element_ty), mask=mask & (k == K - 1))
                    else:
                        tl.store(du_at + cell, du_j.to(du.dtype.element_ty), mask=mask)
                    slot = partial + (token * groups * N + n)
                    tl.store(dB + slot, dB_j, mask=n_mask & (token >= 0))
                    tl.store(dC + slot, dC_j, mask=n_mask & (token >= 0))
                    h = before[j]
            tl.debug_barrier()

        at = (path * N + n[:, None]) * stride_N + d[None, :]
        tl.store(dA + at, dA_k, mask=state_mask)
        if HAS_DINITIAL:
            tl.store(dinitial + at, future, mask=state_mask)
        if HAS_D:
            tl.store(dD + path * channels + d, dD_k, mask=d_mask)
        if HAS_BIAS:
            tl.store(dbias + path * channels + d, dbias_k, mask=d_mask)


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    states: Tensor,
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
) -> list[Tensor]:
    """Gradients of the tensors given, in argument order."""
    dtype = accumulate_dtype(u)
    batch, shared, L, channels = u.shape
    K, _, N = A.shape
    groups = B.shape[3]
    steps = path_length(u, paths)
    block_n, block_d, warps = block_shape(N)
    blocks = triton.cdiv(channels // groups, block_d)
    sum_u = shared == 1 and (K > 1 or paths is not None)
    sum_y = z is not None and (K > 1 or paths is not None)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        """A buffer that kernels fill; a table need not visit every token, so then it starts as zeros."""
        return (torch.empty if paths is None else torch.zeros)(*shape, dtype=dtype, device=u.device)

    du = new(*u.shape, dtype=dtype if sum_u and paths is not None else u.dtype)
    du_sum = (du if paths is not None else new(batch, L, channels)) if sum_u else None
    ddelta = new(*delta.shape, dtype=delta.dtype)
    dz = None if z is None else new(batch, L, channels, dtype=z.dtype)
    y_sum = new(batch, L, channels) if sum_y else None
    dB = new(blocks, batch, K, L, groups, N)
    dC = new(blocks, batch, K, L, groups, N)
    dA = new(batch, K, N, channels)
    dD = None if D is None else new(batch, K, channels)
    dbias = None if delta_bias is None else new(batch, K, channels)
    dinitial = None if initial_state is None else new(batch, K, N, channels)
    scratch = u.new_empty(batch, CHUNK // UNROLL, N, channels, dtype=dtype)
    window_states = window_sums = None
    if window > 1:
        window_states = u.new_empty(batch, window, N, channels, dtype=dtype)
        window_sums = u.new_empty(batch, 3, CHUNK, channels, dtype=dtype)

    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    u, delta, B, C, grad_out = (
        contiguous_channels(u),
        contiguous_channels(delta),
        contiguous_channels(B),
        contiguous_channels(C),
        contiguous_channels(grad_out),
    )
    z = None if z is None else contiguous_channels(z)
    A, grad_last_state = states_first(A), states_first(grad_last_state)
    D, delta_bias, paths = (None if x is None else x.contiguous() for x in (D, delta_bias, paths))
    row_strides = [x.stride(2) for x in (u, delta, B, C)] + [x.stride(1) for x in (grad_out, z) if x is not None]
    row_strides += [channels, groups * N]
    with device_guard(u.device):
        selective_scan_bwd_kernel[(groups * blocks, batch)](
            u, delta, A, B, C, D, z, delta_bias, paths, path_lengths(paths), states, grad_out, grad_last_state,
            du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial, du_sum, y_sum, scratch, window_states, window_sums,
            L, steps, K, channels, channels, channels // groups, sum(1 << k for k in range(K) if reverse[k]),
            num_chunks(steps), batch,
            u.stride(0), u.stride(1) if shared > 1 else 0, u.stride(2), *delta.stride()[:3], *B.stride()[:4],
            *C.stride()[:4], *(z.stride()[:2] if z is not None else (0, 0)), *grad_out.stride()[:2],
            N=N, BLOCK_N=block_n, BLOCK_D=block_d, CHUNK=CHUNK, UNROLL=UNROLL, WINDOW=window,
            SOFTPLUS=delta_softplus, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            HAS_DLAST=grad_last_state is not None, HAS_DINITIAL=initial_state is not None,
            HAS_TABLE=paths is not None, SUM_U=sum_u, SUM_Y=sum_y,
            OFFSET=offset_type(L, *row_strides),
            ACC=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=warps,
        )  # fmt: skip
    if paths is not None and z is not None:
        gate = torch.sigmoid(z.to(dtype))
        dz = grad_out.to(dtype) * y_sum * gate * (1 + z.to(dtype) * (1 - gate))
    dA = dA.sum(0).transpose(1, 2).contiguous()
    dB, dC, dD, dbias = (None if x is None else x.sum(0) for x in (dB, dC, dD, dbias))
    dinitial = None if dinitial is None else dinitial.transpose(2, 3).contiguous()
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    return [grad.to(x.dtype) for grad, x in zip(grads, given, strict=True) if x is not None]
