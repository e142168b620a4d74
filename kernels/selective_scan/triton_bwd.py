"""Selective scan, backward, in Triton: the launches. The main kernel is in ``triton_gradient.py``.

There are only as many programs as run at once, so that states parked in memory stay in the cache. Sums over channels
(dB, dC) and over the batch (dA, dD, ddelta_bias) leave the program as partial sums and are added afterwards: no
atomics, so two runs give the same bits.
"""

import functools

import torch
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, contiguous_channels, device_guard, multiprocessors, runs_ptx
from zoo.kernels.registration import accumulate_dtype, path_length
from zoo.kernels.selective_scan.op import chunk_length, new_in_order_of, num_chunks, paths_first
from zoo.kernels.selective_scan.triton_common import (
    block_shape,
    has_holes,
    offset_type,
    pack_projections,
    path_lengths,
    states_first,
)
from zoo.kernels.selective_scan.triton_gradient import scan_gradient_kernel
from zoo.kernels.selective_scan.triton_parking import shared_lot
from zoo.kernels.selective_scan.triton_regions import (
    carry_kernel,
    even_regions,
    plan_launches,
    region_gradient_kernel,
    side_by_side,
)
from zoo.kernels.selective_scan.triton_sums import add_partials_kernel, add_paths

__all__ = ["backward"]

RESIDENT_WARPS = 8  # of a multiprocessor: what the main kernel's registers leave room for
RESIDENT_WARPS_SIDE_BY_SIDE = 12  # the same with one state and a program for every path: nothing is added up there


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
    partition: bool,
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
    single = N == window == 1
    block["STAGES"] = 5 if single else 3
    side = side_by_side(u, A, z, complete)
    launches, splits, region = plan_launches(u, A, groups, paths, window, side)
    blocks = ceil_div(channels // groups, block_d)
    resident = RESIDENT_WARPS_SIDE_BY_SIDE if single and side else RESIDENT_WARPS
    places = multiprocessors(u.device) * max(1, resident // block["num_warps"])
    if splits == 1 and K == 1:
        splits, region = even_regions(batch * groups * blocks, places, steps)
    items = batch * splits * groups * blocks * (K if side else 1)
    programs = ceil_div(items, ceil_div(items, places))  # all have as many items, but for the last one
    reverse_mask = sum(1 << k for k in range(K) if reverse[k])
    orders = 1 if paths is None else paths.shape[0]
    several = (K > 1 or not complete) and not partition  # paths may be on a token, or none
    sum_u = shared == 1 and several and not side
    sum_y = z is not None and several

    def new(*shape: int | torch.Size, dtype: torch.dtype = dtype) -> Tensor:
        """A buffer that kernels fill; if a table does not visit every token, it starts as zeros."""
        return (torch.empty if complete else torch.zeros)(*shape, dtype=dtype, device=u.device)

    # Where paths have programs of their own that read one u, their gradients of it are added up afterwards.
    split_u = side and shared == 1
    new_u = functools.partial(new, dtype=u.dtype if complete or not sum_u else dtype)
    du = new_u(batch, K, L, channels) if split_u else new_in_order_of(u, new_u)
    du_sum = (new(batch, L, channels) if complete else du) if sum_u else None
    ddelta = new_in_order_of(delta, functools.partial(new, dtype=delta.dtype))
    dz = None if z is None else new(batch, L, channels, dtype=z.dtype)
    y_sum = new(batch, L, channels) if sum_y else None
    partial = new(blocks, batch, K, L, groups, 2, block_n)
    dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
    rows_of_totals = [N] + [1 for x in (D, delta_bias) if x is not None]  # dA, dD, dbias: added up in one go
    totals = u.new_empty(batch, K, splits, sum(rows_of_totals), channels, dtype=dtype)
    dinitial = None if initial_state is None else u.new_empty(batch, K, N, channels, dtype=dtype)
    chunk = chunk_length(N, window)
    segment = min(8 if window > 1 else chunk, max(2, 32 // block_n))  # steps whose states are in registers together
    # With windows two of every state are parked: in half as many bits, or of half as many steps at a time.
    half = window > 1 and u.dtype == delta.dtype == torch.bfloat16 and block_n > 1 and block["num_warps"] == 1
    span = 8 if window > 1 and not half else chunk
    parked = 0 if segment == chunk else (2 if window > 1 else 1) * span // segment * block_n * block_d
    parked_dtype = torch.bfloat16 if half else dtype
    lot = shared_lot(u.device, parked_dtype, parked)
    matrix = dtype == torch.float32 and (2 * segment if block_n == 1 else block_n) == 16  # see channel_sums
    scratch = None if lot or not parked else u.new_empty(programs, parked, dtype=parked_dtype)

    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    u, delta, grad_out = contiguous_channels(u), contiguous_channels(delta), contiguous_channels(grad_out)
    z = None if z is None else contiguous_channels(z)
    A, entering = states_first(A), states_first(grad_last_state)
    D, delta_bias, paths = (None if x is None else x.contiguous() for x in (D, delta_bias, paths))
    holes = has_holes(paths, L, complete, partition)
    lengths = path_lengths(paths) if holes else None
    packed = pack_projections(B, C, dtype, block_n, paths if partition and not holes else None)
    u_strides = (u.stride(0), u.stride(1) if shared > 1 else 0, u.stride(2))
    z_strides = (0, 0) if z is None else z.stride()[:2]
    strides = (*delta.stride()[:3], *z_strides, *grad_out.stride()[:2])
    row_strides = (u.stride(2), delta.stride(2), packed.stride(2), grad_out.stride(1), z_strides[1], channels)
    options = dict(
        N=N, SOFTPLUS=delta_softplus, HAS_Z=z is not None, **block,
        HAS_BIAS=delta_bias is not None, HAS_TABLE=paths is not None, HOLES=holes, MIRRORED=launches[0].mirrored,
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
            carry_kernel[(ceil_div(channels, block_d), batch * K)](
                A, from_outside, entering, sums, dinitial, K, splits, channels, channels, reverse_mask,
                N=N, BLOCK_N=block_n, BLOCK_D=block_d, AHEAD=4, FROM_END=True, MIRRORED=launches[0].mirrored,
                HAS_INITIAL=from_outside is not None, HAS_LAST=dinitial is not None, ACC=acc,
                num_warps=block["num_warps"],
            )  # fmt: skip
        for launch in launches:
            scan_gradient_kernel[(programs,)](
                u, delta, A, packed, D, z, delta_bias, paths, lengths, states, grad_out, entering,
                du, ddelta, partial, totals, dz, dinitial, du_sum, y_sum, scratch,
                L, steps, K, orders, launch.first, launch.stride, launch.count, channels, channels, channels // groups,
                reverse_mask, num_chunks(steps, chunk), region, splits, batch, items, *u_strides, *strides,
                CHUNK=chunk, SPAN=span, SEGMENT=segment, WINDOW=window, HAS_D=D is not None,
                HAS_ENTERING=entering is not None,
                HAS_DINITIAL=dinitial is not None, SPLIT=splits > 1, SIDE=side, SUM_U=sum_u, SUM_Y=sum_y,
                COMPLETE=complete, PARTITION=partition, ONE_U=du.shape[1] == 1, LOT=lot, HALF=half,
                PTX=runs_ptx(u.device), MATRIX=matrix,
                U_PATHS_FIRST=paths_first(du), PATHS_FIRST=paths_first(ddelta), TAIL=channels // groups % block_d > 0,
                **options,
            )  # fmt: skip
        rows, block_rows = batch * K * L * groups, 256 // block_n
        add_partials_kernel[(ceil_div(rows, block_rows),)](
            partial, dB, dC, blocks, rows, N=N, BLOCK_N=block_n, ROWS=block_rows, num_warps=2
        )
    if sum_y and not complete:
        gate = torch.sigmoid(z.to(dtype))
        dz = grad_out.to(dtype) * y_sum * gate * (1 + z.to(dtype) * (1 - gate))
    if split_u:
        du = add_paths(du).unsqueeze(1)
    dA, *others = totals.sum((0, 2)).split(rows_of_totals, dim=1)  # (K, rows, D)
    dA = dA.transpose(1, 2)
    others = [x.squeeze(1).clone() for x in others]  # outputs of an op must not share memory
    dbias = None if delta_bias is None else others.pop()
    dD = None if D is None else others.pop()
    dinitial = None if dinitial is None else dinitial.transpose(2, 3)
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    pairs = [(grad, x) for grad, x in zip(grads, given, strict=True) if x is not None]
    return [grad.to(x.dtype) for grad, x in pairs]
