"""Depth-wise convolution in Triton: one pass over the map, forward and backward.

A program owns BLOCK channels of strips that are ROWS rows high, and walks along them from left to right: a column, with
the rows above and below that the kernel reaches, is loaded once and never again by this program. The next COLUMNS
columns are asked for before these are used, so that their reads are in flight meanwhile. Tuples are unrolled at compile
time.

Forward, a column is added to the k outputs that it is part of, whose sums are in registers; the last of them is then
complete. The gradient of x is the same with the kernel turned by half.

The backward first finds the gradient before the activation, whose values it recomputes from the last k columns, and
adds up the gradients of weight and bias. Programs stay for that: each takes every so many groups of strips and ends
with its own rows of a buffer, which are added up afterwards: no atomics, so every call gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, contiguous_channels, device_guard, multiprocessors
from zoo.kernels.registration import accumulate_dtype
from zoo.kernels.triton_math import activate, activation_slope

__all__ = ["backward", "forward"]

WARPS = 4
COLUMNS = 2  # loaded at a time
# Rows of a strip and channels of a strip in a lane, forward: more of both share what is loaded, and take registers.
ROWS, ELEMENTS = 4, 2
# The same for the gradients of the parameters, and programs on a multiprocessor that work them out; by the kernel's
# side, so that registers suffice.
GRADIENT_ROWS = 2
GRADIENT_ELEMENTS = {3: 2, 5: 1, 7: 1}
RESIDENT = {3: 3, 5: 3, 7: 2}


@triton.jit
def _load_channels(values, channel, C: tl.constexpr, dtype: tl.constexpr):
    """One value per channel, (1, BLOCK)."""
    return tl.load(values + channel, mask=channel < C, other=0.0).to(dtype)


@triton.jit
def _load_taps(weight, channel, C: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr, dtype: tl.constexpr):
    """The K * K weights of the channels, row by row, each (1, BLOCK)."""
    taps = ()
    for tap in tl.static_range(K * K):
        number = K * K - 1 - tap if TURNED else tap
        taps = taps + (tl.load(weight + channel * (K * K) + number, mask=channel < C, other=0.0).to(dtype),)
    return taps


@triton.jit
def _strips(group, H, ROWS: tl.constexpr, STRIPS: tl.constexpr):
    """Map and first row of a group's strips, both (STRIPS, 1) and int64."""
    per_map = tl.cdiv(H, ROWS)
    strip = group * STRIPS + tl.arange(0, STRIPS)[:, None].to(tl.int64)
    return strip // per_map, strip % per_map * ROWS


@triton.jit
def _load_columns(
    pointer, number, first, column, channel, B, H, W, stride_row, stride_column, C: tl.constexpr,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COUNT rows from ``first`` on of COLUMNS columns, a tuple of (STRIPS, BLOCK); zero outside of the maps."""
    values = ()
    for i in tl.static_range(COLUMNS):
        inside = (column + i >= 0) & (column + i < W) & (number < B) & (channel < C)
        for r in tl.static_range(COUNT):
            row = first + r
            at = pointer + row * stride_row + (column + i) * stride_column + channel
            values = values + (tl.load(at, mask=inside & (row >= 0) & (row < H), other=0.0),)
    return values


@triton.jit
def _exact(values, COUNT: tl.constexpr, dtype: tl.constexpr):
    """COUNT loaded values in the type of the sums."""
    exact = ()
    for i in tl.static_range(COUNT):
        exact = exact + (values[i].to(dtype),)
    return exact


@triton.jit
def _store_column(
    pointer, values, number, first, column, channel, B, H, W, C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Writes the rows of one column of contiguous maps."""
    for r in tl.static_range(ROWS):
        row = first + r
        mask = (number < B) & (row < H) & (column >= 0) & (column < W) & (channel < C)
        tl.store(pointer + (row * W + column) * C + channel, values[r], mask=mask)


@triton.jit
def _add_column(partial, column, taps, shift, K: tl.constexpr, ROWS: tl.constexpr):
    """Adds a column to the outputs it is part of: K columns of ROWS sums, of which the last is complete.

    ``partial`` has the sums of K - 1 columns, after the column before.
    """
    sums = ()
    for j in tl.static_range(K):
        for r in tl.static_range(ROWS):
            total = shift if j == 0 else partial[(j - 1) * ROWS + r]
            for i in tl.static_range(K):
                total += taps[i * K + j] * column[r + i]
            sums = sums + (total,)
    return sums


@triton.jit
def _convolve(window, taps, shift, r: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr):
    """Output of row r from the last K columns of COUNT rows."""
    total = shift
    for j in tl.static_range(K):
        for i in tl.static_range(K):
            total += taps[i * K + j] * window[j * COUNT + r + i]
    return total


@triton.jit
def _add_products(sums, factor, window, r: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr):
    """Adds to the sum of every tap ``factor`` times what the tap multiplies in row r."""
    new_sums = ()
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            new_sums = new_sums + (sums[i * K + j] + factor * window[j * COUNT + r + i],)
    return new_sums


@triton.jit
def _forward_kernel(
    x, weight, bias, out, B, H, W, stride_map, stride_row, stride_column, C: tl.constexpr, K: tl.constexpr,
    TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (C + BLOCK - 1) // BLOCK
    MARGIN: tl.constexpr = K // 2
    COARSE: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    program = tl.program_id(0)
    channel = program % TILES * BLOCK + tl.arange(0, BLOCK)[None, :]
    number, top = _strips(program // TILES, H, ROWS, STRIPS)
    x += number * stride_map
    out += number * H * W * C
    taps = _load_taps(weight, channel, C, K, TURNED, dtype)
    shift = tl.zeros((STRIPS, BLOCK), dtype)
    if HAS_BIAS:
        shift += _load_channels(bias, channel, C, dtype)

    REACH: tl.constexpr = ROWS + K - 1  # rows that the outputs of a strip are made of
    partial = (shift,) * ((K - 1) * ROWS)
    coming = _load_columns(
        x, number, top - MARGIN, 0, channel, B, H, W, stride_row, stride_column, C, REACH, COLUMNS
    )  # fmt: skip
    for t in range(0, W + MARGIN, COLUMNS):
        columns = _exact(coming, COLUMNS * REACH, dtype)
        coming = _load_columns(
            x, number, top - MARGIN, t + COLUMNS, channel, B, H, W, stride_row, stride_column, C, REACH, COLUMNS
        )  # fmt: skip
        for i in tl.static_range(COLUMNS):
            sums = _add_column(partial, columns[i * REACH :], taps, shift, K, ROWS)
            partial = sums[: (K - 1) * ROWS]
            done = ()
            for r in tl.static_range(ROWS):
                done = done + (activate(sums[(K - 1) * ROWS + r], ACTIVATION, COARSE),)
            _store_column(out, done, number, top, t + i - MARGIN, channel, B, H, W, C, ROWS)


@triton.jit
def _gradient_kernel(
    grad, x, weight, bias, d_y, sums, B, H, W, groups, grad_stride_map, grad_stride_row, grad_stride_column,
    stride_map, stride_row, stride_column, C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (C + BLOCK - 1) // BLOCK
    MARGIN: tl.constexpr = K // 2
    COARSE: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    REACH: tl.constexpr = ROWS + K - 1  # rows that the outputs of a strip are made of
    program = tl.program_id(0) // TILES
    channel = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)[None, :]
    taps = _load_taps(weight, channel, C, K, False, dtype)
    zero = tl.zeros((STRIPS, BLOCK), dtype)
    shift = zero
    if HAS_BIAS:
        shift += _load_channels(bias, channel, C, dtype)

    tap_sums = (zero,) * (K * K)
    shift_sum = zero
    for group in range(program, groups, tl.num_programs(0) // TILES):
        number, top = _strips(group, H, ROWS, STRIPS)
        own_x, own_grad = x + number * stride_map, grad + number * grad_stride_map
        window = (zero,) * ((K - 1) * REACH)
        coming = _load_columns(
            own_x, number, top - MARGIN, 0, channel, B, H, W, stride_row, stride_column, C, REACH, COLUMNS
        )  # fmt: skip
        grads_coming = _load_columns(
            own_grad, number, top, -MARGIN, channel, B, H, W, grad_stride_row, grad_stride_column, C, ROWS, COLUMNS
        )  # fmt: skip
        for t in range(0, W + MARGIN, COLUMNS):
            columns = _exact(coming, COLUMNS * REACH, dtype)
            grads = _exact(grads_coming, COLUMNS * ROWS, dtype)
            coming = _load_columns(
                own_x, number, top - MARGIN, t + COLUMNS, channel, B, H, W, stride_row, stride_column, C, REACH,
                COLUMNS,
            )  # fmt: skip
            grads_coming = _load_columns(
                own_grad, number, top, t + COLUMNS - MARGIN, channel, B, H, W, grad_stride_row, grad_stride_column, C,
                ROWS, COLUMNS,
            )  # fmt: skip
            for i in tl.static_range(COLUMNS):
                window = window + columns[i * REACH : (i + 1) * REACH]
                done = ()
                for r in tl.static_range(ROWS):
                    factor = grads[i * ROWS + r]
                    if ACTIVATION is not None:
                        slope = activation_slope(_convolve(window, taps, shift, r, K, REACH), ACTIVATION, COARSE)
                        factor = tl.where(factor == 0, factor, factor * slope)  # outside of the maps they may be inf
                    tap_sums = _add_products(tap_sums, factor, window, r, K, REACH)
                    shift_sum += factor
                    done = done + (factor,)
                if ACTIVATION is not None:
                    _store_column(
                        d_y + number * H * W * C, done, number, top, t + i - MARGIN, channel, B, H, W, C, ROWS
                    )
                window = window[REACH:]

    sums += program.to(tl.int64) * (K * K + 1) * C + channel
    for tap in tl.static_range(K * K):
        tl.store(sums + tap * C, tl.sum(tap_sums[tap], axis=0)[None, :], mask=channel < C)
    tl.store(sums + K * K * C, tl.sum(shift_sum, axis=0)[None, :], mask=channel < C)


def _block(C: int) -> int:
    """Channels of a program: those of 128, 64 and 32 that leave the fewest lanes idle."""
    return min((128, 64, 32), key=lambda block: ceil_div(C, block) * block)


def _options(x: Tensor, side: int, activation: str | None, has_bias: bool, rows: int, elements: int) -> dict:
    """Compile-time arguments of both kernels: strips of so many rows, of which a lane has so many channels."""
    block = _block(x.shape[-1])
    return dict(
        C=x.shape[-1],
        K=side,
        HAS_BIAS=has_bias,
        ACTIVATION=activation,
        ROWS=rows,
        COLUMNS=COLUMNS,
        STRIPS=32 * WARPS * elements // block,
        BLOCK=block,
        dtype=tl.float64 if accumulate_dtype(x) == torch.float64 else tl.float32,
        num_warps=WARPS,
    )


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, turned: bool = False
) -> Tensor:
    B, H, W, C = x.shape
    out = x.new_empty(x.shape)
    side = weight.shape[-1]
    options = _options(x, side, activation, bias is not None, ROWS, ELEMENTS)
    groups = ceil_div(B * ceil_div(H, ROWS), options["STRIPS"])
    with device_guard(x.device):
        _forward_kernel[(groups * ceil_div(C, options["BLOCK"]),)](
            x, weight, bias, out, B, H, W, *x.stride()[:3], TURNED=turned, **options
        )
    return out


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Outputs (B, H, W, C) in x's dtype from canonical inputs (see ``op.py``)."""
    bias = None if bias is None else bias.contiguous()
    return _launch_forward(contiguous_channels(x), weight.contiguous(), bias, activation)


def backward(grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> list[Tensor]:
    """Gradients of x, weight and, if given, bias; the outputs before the activation are recomputed."""
    x, grad, kernel = contiguous_channels(x), contiguous_channels(grad_out), weight.contiguous()
    B, H, W, C = x.shape
    side = kernel.shape[-1]
    options = _options(x, side, activation, bias is not None, GRADIENT_ROWS, GRADIENT_ELEMENTS[side])
    groups = ceil_div(B * ceil_div(H, GRADIENT_ROWS), options["STRIPS"])
    tiles = ceil_div(C, options["BLOCK"])
    programs = min(groups, max(1, multiprocessors(x.device) * RESIDENT[side] // tiles))
    d_y = grad if activation is None else x.new_empty(x.shape)
    sums = x.new_empty(programs, side * side + 1, C, dtype=accumulate_dtype(x))
    with device_guard(x.device):
        _gradient_kernel[(programs * tiles,)](
            grad, x, kernel, None if bias is None else bias.contiguous(), d_y, sums, B, H, W, groups,
            *grad.stride()[:3], *x.stride()[:3], **options,
        )  # fmt: skip
    d_x = _launch_forward(d_y, kernel, None, None, turned=True)
    d_taps, d_shift = sums.sum(0).split([side * side, 1])  # (k * k, C), (1, C)
    d_weight = d_taps.t().unflatten(1, (side, side)).to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    return [d_x, d_weight] if bias is None else [d_x, d_weight, d_shift.squeeze(0).to(bias.dtype)]
