"""Selective scan, backward, in Triton.

As in the forward, one program owns a block of channels of one batch element and walks its paths, or with regions a
region of them. It goes through the chunks from the last to the first. From the saved state at the beginning of a chunk
it first recomputes the states and parks one every ``SEGMENT`` steps in a scratch buffer of its own; then it takes these
segments in reverse, recomputes the states inside one in registers, and carries the gradient of the state backwards
through it. There are only as many programs as run at once, so the parked states stay in the cache.

Sums over channels (dB, dC) and over the batch (dA, dD, ddelta_bias) leave the program as partial sums and are added
afterwards: no atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import contiguous_channels, device_guard, multiprocessors
from zoo.kernels.registration import accumulate_dtype, path_length
from zoo.kernels.selective_scan.op import CHUNK, num_chunks
from zoo.kernels.selective_scan.triton_common import (
    LOG2E,
    block_shape,
    of_token,
    offset_type,
    pack_projections,
    packed_row,
    path_lengths,
    readable,
    region_of,
    rows_at,
    sigmoid,
    split_projections,
    state_cells,
    states_first,
    step_size,
    tokens_at,
)
from zoo.kernels.selective_scan.triton_regions import carry_kernel, plan_launches, region_gradient_kernel
from zoo.kernels.selective_scan.triton_sums import add_partials_kernel, channel_sums
from zoo.kernels.selective_scan.triton_window import window_gradients

__all__ = ["backward"]

SEGMENT = 2  # steps whose states are in registers together
RESIDENT_WARPS = 8  # of a multiprocessor: what the main kernel's registers leave room for


# Hiding the alignment of `scratch` keeps one channel to a lane, like `stride_N` does, with offsets known beforehand.
@triton.jit(do_not_specialize=["stride_N"], do_not_specialize_on_alignment=["scratch"])
def scan_gradient_kernel(
    u, delta, A, packed, D, z, bias, table, lengths, states, dout, entering,
    du, ddelta, partial, dA, dD, dz, dbias, dinitial, du_sum, y_sum, scratch, window_states, window_sums,
    L, P, K, orders, first, stride, count, channels, stride_N, group_channels, reverse_mask, chunks, region, splits,
    batch, items, u_b, u_k, u_l, delta_b, delta_k, delta_l, z_b, z_l, dout_b, dout_l,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LANE: tl.constexpr, CHUNK: tl.constexpr,
    UNROLL: tl.constexpr, SEGMENT: tl.constexpr, WINDOW: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTERING: tl.constexpr, HAS_DINITIAL: tl.constexpr,
    HAS_TABLE: tl.constexpr, HOLES: tl.constexpr, SPLIT: tl.constexpr, MIRRORED: tl.constexpr, SUM_U: tl.constexpr,
    SUM_Y: tl.constexpr, COMPLETE: tl.constexpr, MATRIX: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """All gradients of a region of the paths first, first + stride... (count of them).

    ``entering`` is the gradient that reaches the last state from outside, or with SPLIT the one that reaches the last
    state of every region. Each program takes every ``programs``-th of the (batch, region, block of channels) items.
    """
    blocks = tl.cdiv(group_channels, BLOCK_D)
    groups = channels // group_channels
    n = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_D)
    n_mask = n < N
    packed_l = groups * 2 * BLOCK_N
    PARKED: tl.constexpr = CHUNK // SEGMENT + 1
    scratch_at = scratch + tl.program_id(0).to(tl.int64) * PARKED * BLOCK_N * BLOCK_D
    parked_cell = n[:, None] * BLOCK_D + lane[None, :]
    if MATRIX:
        quad = tl.arange(0, 32) // 4
        selector = (quad[:, None] == tl.arange(0, 8)[None, :]).to(tl.float32)  # adds the lanes of a quad

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = item % blocks
        group = item // blocks % groups
        split = item // (blocks * groups) % splits
        b = (item // (blocks * groups * splits)).to(tl.int64)
        in_group = block * BLOCK_D + lane
        d = group * group_channels + in_group
        d_mask = in_group < group_channels
        d_read = readable(d, channels, LANE)
        state_mask = n_mask[:, None] & d_mask[None, :]
        cell = state_cells(n, d, channels, stride_N, BLOCK_N)
        dout_at = dout + b * dout_b + d_read
        z_at = dout_at
        if HAS_Z:
            z_at = z + b * z_b + d_read
            dz_at = dz + b * L * channels + d
        if SUM_Y:
            y_at = y_sum + b * L * channels + d_read
        if SUM_U:
            du_sum_at = du_sum + b * L * channels + d_read
        if WINDOW > 1:  # sums of a chunk's steps over what comes from inside their windows: y, gB and A w
            window_at = window_sums + (b * splits + split) * 3 * CHUNK * channels + d
            received_at = window_states + (b * splits + split) * WINDOW * N * channels

        for i in range(count):
            k = first + i * stride
            path = b * K + k
            row = k % orders
            backwards = (reverse_mask >> k) & 1 == 1
            steps = P
            if HOLES:
                steps = tl.load(lengths + row)
            begin, end = region_of(split, region, steps, MIRRORED & backwards)
            u_at = u + b * u_b + k * u_k + d_read
            delta_at = delta + b * delta_b + k * delta_k + d_read
            packed_at = packed + (path * L * groups + group) * 2 * BLOCK_N + n
            rows_of_packed = packed_row(packed + (path * L * groups + group) * 2 * BLOCK_N, BLOCK_N)
            du_at = du + (b if SUM_U else path) * L * channels + d
            ddelta_at = ddelta + path * L * channels + d
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
            dA_k = tl.zeros([BLOCK_N, BLOCK_D], ACC)
            dD_k = tl.zeros([BLOCK_D], ACC)
            dbias_k = tl.zeros([BLOCK_D], ACC)
            adds = (k > 0) | (not COMPLETE)
            finishes = k == K - 1
            passes_on = (k < K - 1) | (not COMPLETE)

            chunks_here = tl.cdiv(end - begin, CHUNK)
            for chunk_from_end in range(chunks_here):
                chunk = chunks_here - 1 - chunk_from_end
                chunk_begin = begin + chunk * CHUNK
                segments = tl.cdiv(tl.minimum(end - chunk_begin, CHUNK), SEGMENT)
                saved = (path * chunks + split * (region // CHUNK) + chunk) * N
                h = tl.load(states + saved * channels + cell, mask=state_mask, other=0.0)
                chunk_end = tl.minimum(chunk_begin + CHUNK, end)
                now = tokens_at(table, row, P, chunk_begin, chunk_end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
                u_t = rows_at(now, u_at, u_l, UNROLL, HOLES)
                delta_t = rows_at(now, delta_at, delta_l, UNROLL, HOLES)
                BC_t = rows_at(now, rows_of_packed, packed_l, UNROLL, HOLES)
                tl.debug_barrier()  # the parked states of the chunk before have been read
                tl.store(scratch_at + parked_cell, h)
                for start in range(chunk_begin, chunk_begin + (segments - 1) * SEGMENT, UNROLL):
                    next_begin = start + UNROLL
                    soon = tokens_at(table, row, P, next_begin, chunk_end, steps, backwards, UNROLL, HAS_TABLE, OFFSET)
                    u_next = rows_at(soon, u_at, u_l, UNROLL, HOLES)
                    delta_next = rows_at(soon, delta_at, delta_l, UNROLL, HOLES)
                    BC_next = rows_at(soon, rows_of_packed, packed_l, UNROLL, HOLES)
                    for j in tl.static_range(UNROLL):
                        u_j = of_token(u_t[j], now[j], HOLES, ACC)
                        delta_j = of_token(delta_t[j], now[j], HOLES, ACC)
                        _, step = step_size(delta_j, bias_k, start + j < end, SOFTPLUS, COARSE)
                        B_j, _ = split_projections(BC_t[j])
                        h = tl.exp2(step[None, :] * A_k) * h + (step * u_j)[None, :] * B_j[:, None]
                        if j % SEGMENT == SEGMENT - 1:
                            parked_segment = (start - chunk_begin + j + 1) // SEGMENT
                            tl.store(scratch_at + parked_segment * BLOCK_N * BLOCK_D + parked_cell, h)
                    now, u_t, delta_t, BC_t = soon, u_next, delta_next, BC_next
                tl.debug_barrier()

                if WINDOW > 1:
                    for window in range(tl.cdiv(tl.minimum(end - chunk_begin, CHUNK), WINDOW)):
                        dA_k = window_gradients(
                            u_at, delta_at, packed_at, z_at, dout_at, table, received_at, window_at, partial_at + n,
                            A_k, bias_k, dA_k, d_mask, n_mask, row, P, chunk_begin + window * WINDOW, end, steps,
                            backwards, u_l, delta_l, packed_l, z_l, dout_l, channels, cell, window * WINDOW,
                            N, BLOCK_N, CHUNK, WINDOW, SOFTPLUS, HAS_Z, HAS_TABLE, HOLES, COARSE, ACC, OFFSET,
                        )  # fmt: skip

                parked = tl.load(scratch_at + (segments - 1) * BLOCK_N * BLOCK_D + parked_cell)
                last_begin = chunk_begin + (segments - 1) * SEGMENT
                now = tokens_at(table, row, P, last_begin, end, steps, backwards, SEGMENT, HAS_TABLE, OFFSET)
                u_t = rows_at(now, u_at, u_l, SEGMENT, HOLES)
                delta_t = rows_at(now, delta_at, delta_l, SEGMENT, HOLES)
                dout_t = rows_at(now, dout_at, dout_l, SEGMENT, HOLES)
                BC_t = rows_at(now, rows_of_packed, packed_l, SEGMENT, HOLES)
                if HAS_Z:
                    z_t = rows_at(now, z_at, z_l, SEGMENT, HOLES)
                if SUM_Y:
                    y_t = rows_at(now, y_at, channels, SEGMENT, HOLES)
                if SUM_U:
                    du_t = rows_at(now, du_sum_at, channels, SEGMENT, HOLES)
                for segment_from_end in range(segments):
                    segment = segments - 1 - segment_from_end
                    h = parked
                    # The segment before is on its way while this one is computed; ahead of the first, nobody uses it.
                    start = chunk_begin + segment * SEGMENT
                    next_begin = tl.maximum(start - SEGMENT, chunk_begin)
                    soon = tokens_at(table, row, P, next_begin, end, steps, backwards, SEGMENT, HAS_TABLE, OFFSET)
                    u_next = rows_at(soon, u_at, u_l, SEGMENT, HOLES)
                    delta_next = rows_at(soon, delta_at, delta_l, SEGMENT, HOLES)
                    dout_next = rows_at(soon, dout_at, dout_l, SEGMENT, HOLES)
                    BC_next = rows_at(soon, rows_of_packed, packed_l, SEGMENT, HOLES)
                    if HAS_Z:
                        z_next = rows_at(soon, z_at, z_l, SEGMENT, HOLES)
                    if SUM_Y:
                        y_next = rows_at(soon, y_at, channels, SEGMENT, HOLES)
                    if SUM_U:
                        du_next = rows_at(soon, du_sum_at, channels, SEGMENT, HOLES)

                    before = ()  # the state before every step of the segment
                    decays = ()
                    raws = ()
                    sizes = ()
                    inputs = ()
                    for j in tl.static_range(SEGMENT):
                        u_j = of_token(u_t[j], now[j], HOLES, ACC)
                        delta_j = of_token(delta_t[j], now[j], HOLES, ACC)
                        raw, step = step_size(delta_j, bias_k, start + j < end, SOFTPLUS, COARSE)
                        decay = tl.exp2(step[None, :] * A_k)
                        before = before + (h,)
                        decays = decays + (decay,)
                        raws = raws + (raw,)
                        sizes = sizes + (step,)
                        inputs = inputs + (u_j,)
                        B_j, _ = split_projections(BC_t[j])
                        h = decay * h + (step * u_j)[None, :] * B_j[:, None]

                    for j in tl.static_range(SEGMENT - 1, -1, -1):
                        token = now[j]
                        step, u_j = sizes[j], inputs[j]
                        B_j, C_j = split_projections(BC_t[j])
                        in_chunk = segment * SEGMENT + j
                        inside = start + j < end
                        visited = inside
                        if HOLES:
                            visited = visited & (token >= 0)
                        mask = d_mask & visited
                        dout_j = tl.where(visited, dout_t[j].to(ACC), 0.0)
                        dy = dout_j
                        if HAS_Z:
                            z_j = z_t[j].to(ACC)
                            gate = sigmoid(z_j)
                            dy = dout_j * z_j * gate
                            y = tl.sum(h * C_j[:, None], 0) + D_k * u_j
                            if WINDOW > 1:
                                y += tl.load(window_at + in_chunk * channels, mask=d_mask, other=0.0)
                            if SUM_Y:
                                y += tl.where(adds, y_t[j], 0.0)
                                tl.store(y_at + token * channels, y, mask=mask & passes_on)
                            if COMPLETE:
                                dz_j = dout_j * y * gate * (1.0 + z_j * (1.0 - gate))
                                tl.store(dz_at + token * channels, dz_j.to(dz.dtype.element_ty), mask=mask & finishes)
                        g = future + C_j[:, None] * dy[None, :]
                        gB = tl.sum(g * B_j[:, None], 0)
                        of_C = h * tl.where(d_mask, dy, 0.0)[None, :]
                        of_B = g * tl.where(d_mask, step * u_j, 0.0)[None, :]
                        future = g * decays[j]
                        w = future * before[j]
                        dA_k += w * step[None, :]
                        Aw = tl.sum(w * A_k, 0)
                        if WINDOW > 1:
                            gB += tl.load(window_at + (CHUNK + in_chunk) * channels, mask=d_mask, other=0.0)
                            Aw += tl.load(window_at + (2 * CHUNK + in_chunk) * channels, mask=d_mask, other=0.0)
                        dstep = u_j * gB + Aw / LOG2E
                        if SOFTPLUS:
                            dstep *= sigmoid(raws[j])
                        dbias_k += tl.where(inside, dstep, 0.0)
                        dD_k += dy * u_j
                        du_j = step * gB + D_k * dy
                        tl.store(ddelta_at + token * channels, dstep.to(ddelta.dtype.element_ty), mask=mask)
                        if SUM_U:
                            du_j += tl.where(adds, du_t[j], 0.0)
                            tl.store(du_sum_at + token * channels, du_j, mask=mask & passes_on)
                            if COMPLETE:
                                tl.store(du_at + token * channels, du_j.to(du.dtype.element_ty), mask=mask & finishes)
                        else:
                            tl.store(du_at + token * channels, du_j.to(du.dtype.element_ty), mask=mask)
                        if MATRIX:
                            dB_j = channel_sums(of_B, selector, COARSE == 0)
                            dC_j = channel_sums(of_C, selector, COARSE == 0)
                        else:
                            dB_j = tl.sum(of_B, 1)
                            dC_j = tl.sum(of_C, 1)
                        slot = partial_at + token * packed_l + n
                        if WINDOW > 1:
                            dB_j += tl.load(slot, mask=n_mask & visited, other=0.0)
                            dC_j += tl.load(slot + BLOCK_N, mask=n_mask & visited, other=0.0)
                        tl.store(slot, dB_j, mask=n_mask & visited)
                        tl.store(slot + BLOCK_N, dC_j, mask=n_mask & visited)
                        if (
                            j == SEGMENT - 1
                        ):  # the state at the beginning of the segment before, now that registers are free
                            parked = tl.load(scratch_at + tl.maximum(segment - 1, 0) * BLOCK_N * BLOCK_D + parked_cell)
                        h = before[j]
                    now, u_t, delta_t, dout_t, BC_t = soon, u_next, delta_next, dout_next, BC_next
                    if HAS_Z:
                        z_t = z_next
                    if SUM_Y:
                        y_t = y_next
                    if SUM_U:
                        du_t = du_next

            part = path * splits + split
            tl.store(dA + part * N * channels + cell, dA_k, mask=state_mask)
            if HAS_DINITIAL and not SPLIT:
                tl.store(dinitial + path * N * channels + cell, future, mask=state_mask)
            if HAS_D:
                tl.store(dD + part * channels + d, dD_k, mask=d_mask)
            if HAS_BIAS:
                tl.store(dbias + part * channels + d, dbias_k, mask=d_mask)


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
    complete: bool,
) -> list[Tensor]:
    """Gradients of the tensors given, in argument order."""
    dtype = accumulate_dtype(u)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    batch, shared, L, channels = u.shape
    K, _, N = A.shape
    groups = B.shape[3]
    steps = path_length(u, paths)
    complete = complete or paths is None
    block = block_shape(N, channels // groups)
    block_n, block_d = block["BLOCK_N"], block["BLOCK_D"]
    if block_n >= 8:  # few programs run at once, so each fetches more
        block["UNROLL"] = 8
    launches, splits, region = plan_launches(u, A, groups, paths, window)
    blocks = triton.cdiv(channels // groups, block_d)
    items = batch * splits * groups * blocks
    programs = min(items, multiprocessors(u.device) * max(1, RESIDENT_WARPS // block["num_warps"]))
    reverse_mask = sum(1 << k for k in range(K) if reverse[k])
    orders = 1 if paths is None else paths.shape[0]
    sum_u = shared == 1 and (K > 1 or not complete)
    sum_y = z is not None and (K > 1 or not complete)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        """A buffer that kernels fill; if a table does not visit every token, it starts as zeros."""
        return (torch.empty if complete else torch.zeros)(*shape, dtype=dtype, device=u.device)

    du = new(*u.shape, dtype=u.dtype if complete or not sum_u else dtype)
    du_sum = (new(batch, L, channels) if complete else du) if sum_u else None
    ddelta = new(*delta.shape, dtype=delta.dtype)
    dz = None if z is None else new(batch, L, channels, dtype=z.dtype)
    y_sum = new(batch, L, channels) if sum_y else None
    partial = new(blocks, batch, K, L, groups, 2, block_n)
    dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
    dA = u.new_empty(batch, K, splits, N, channels, dtype=dtype)
    dD = None if D is None else u.new_empty(batch, K, splits, channels, dtype=dtype)
    dbias = None if delta_bias is None else u.new_empty(batch, K, splits, channels, dtype=dtype)
    dinitial = None if initial_state is None else u.new_empty(batch, K, N, channels, dtype=dtype)
    scratch = u.new_empty(programs, CHUNK // SEGMENT + 1, block_n, block_d, dtype=dtype)
    window_states = window_sums = None
    if window > 1:
        window_states = u.new_empty(batch * splits, window, N, channels, dtype=dtype)
        window_sums = u.new_empty(batch * splits, 3, CHUNK, channels, dtype=dtype)

    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    packed = pack_projections(B, C, dtype, block_n)
    u, delta, grad_out = contiguous_channels(u), contiguous_channels(delta), contiguous_channels(grad_out)
    z = None if z is None else contiguous_channels(z)
    A, entering = states_first(A), states_first(grad_last_state)
    D, delta_bias, paths = (None if x is None else x.contiguous() for x in (D, delta_bias, paths))
    lengths = None if complete else path_lengths(paths)
    u_strides = (u.stride(0), u.stride(1) if shared > 1 else 0, u.stride(2))
    z_strides = (0, 0) if z is None else z.stride()[:2]
    strides = (*delta.stride()[:3], *z_strides, *grad_out.stride()[:2])
    row_strides = (u.stride(2), delta.stride(2), packed.stride(2), grad_out.stride(1), z_strides[1], channels)
    options = dict(
        N=N, SOFTPLUS=delta_softplus, HAS_Z=z is not None, **block,
        HAS_BIAS=delta_bias is not None, HAS_TABLE=paths is not None, HOLES=not complete, MIRRORED=launches[0].mirrored,
        COARSE=delta.dtype.itemsize == 2, ACC=acc, OFFSET=offset_type(L, *row_strides),
        num_stages=1,  # the kernel fetches ahead by itself
    )  # fmt: skip
    with device_guard(u.device):
        if splits > 1:
            from_outside, entering = entering, u.new_empty(batch, K, splits, N, channels, dtype=dtype)
            sums = u.new_empty(batch, K, splits, channels, dtype=dtype)
            region_gradient_kernel[(groups * blocks, splits, batch * K)](
                delta, A, packed, z, delta_bias, paths, lengths, grad_out, entering, sums,
                L, steps, K, orders, channels, channels, channels // groups, reverse_mask, region, splits, *strides,
                **options,
            )  # fmt: skip
            carry_kernel[(triton.cdiv(channels, block_d), batch * K)](
                A, from_outside, entering, sums, dinitial, K, splits, channels, channels, reverse_mask,
                N=N, BLOCK_N=block_n, BLOCK_D=block_d, AHEAD=4, FROM_END=True, MIRRORED=launches[0].mirrored,
                HAS_INITIAL=from_outside is not None, HAS_LAST=dinitial is not None, ACC=acc,
                num_warps=block["num_warps"],
            )  # fmt: skip
        for launch in launches:
            scan_gradient_kernel[(programs,)](
                u, delta, A, packed, D, z, delta_bias, paths, lengths, states, grad_out, entering,
                du, ddelta, partial, dA, dD, dz, dbias, dinitial, du_sum, y_sum, scratch, window_states, window_sums,
                L, steps, K, orders, launch.first, launch.stride, launch.count, channels, channels, channels // groups,
                reverse_mask, num_chunks(steps), region, splits, batch, items, *u_strides, *strides,
                CHUNK=CHUNK, SEGMENT=SEGMENT, WINDOW=window, HAS_D=D is not None, HAS_ENTERING=entering is not None,
                HAS_DINITIAL=dinitial is not None, SPLIT=splits > 1, SUM_U=sum_u, SUM_Y=sum_y, COMPLETE=complete,
                MATRIX=block_n == 16 and dtype == torch.float32, **options,
            )  # fmt: skip
        rows, block_rows = batch * K * L * groups, 256 // block_n
        add_partials_kernel[(triton.cdiv(rows, block_rows),)](
            partial, dB, dC, blocks, rows, N=N, BLOCK_N=block_n, ROWS=block_rows, num_warps=2
        )
    if not complete and z is not None:
        gate = torch.sigmoid(z.to(dtype))
        dz = grad_out.to(dtype) * y_sum * gate * (1 + z.to(dtype) * (1 - gate))
    dA = dA.sum((0, 2)).transpose(1, 2)
    dD, dbias = (None if x is None else x.sum((0, 2)) for x in (dD, dbias))
    dinitial = None if dinitial is None else dinitial.transpose(2, 3)
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    pairs = [(grad, x) for grad, x in zip(grads, given, strict=True) if x is not None]
    return [grad.to(x.dtype).contiguous() for grad, x in pairs]
