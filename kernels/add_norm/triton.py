"""Residual add and norm in Triton: every row is read and written once, forward and backward.

A program holds whole rows in registers, see ``triton_rows.py``.

Backward programs stay: each walks over tiles of rows, as far apart as there are programs, and adds up its part of the
gradients of weight and bias in registers. They end in the program's own rows of a buffer, which are added up
afterwards: no atomics, so every call gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, device_guard, multiprocessors
from zoo.kernels.registration import accumulate_dtype
from zoo.kernels.triton_rows import centre, inverse_rms, load_channels, norm_gradient, row_options, row_tile

__all__ = ["backward", "forward"]

FORWARD_WARPS = 1  # at least, of a program: each has rows of its own where they are narrow
# Warps of backward programs on a multiprocessor, and stages: with three, two tiles are loaded into shared memory while
# the one before is worked on, which pays for rows that are small in memory.
RESIDENT_WARPS, STAGES = 16, 2
RESIDENT_WARPS_SMALL, STAGES_SMALL, WIDEST_SMALL = 12, 3, 1024  # of 16-bit rows with up to so many channels


@triton.jit
def _load_scale(scale, row, rows, rows_per_sample, dtype: tl.constexpr):
    """The factors of the rows' samples, (ROWS, 1)."""
    return tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0).to(dtype)[:, None]


@triton.jit
def _forward_kernel(
    stream, update, weight, bias, scale, normed, total, rows, rows_per_sample, EPS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, CENTERED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, offset, mask = row_tile(first, rows, D, D, ROWS, BLOCK)
    x = tl.load(stream + first * D + offset, mask=mask, other=0.0).to(dtype)
    factors = load_channels(weight, D, BLOCK, dtype)
    if HAS_UPDATE:
        added = tl.load(update + first * D + offset, mask=mask, other=0.0).to(dtype)
        if HAS_SCALE:
            added *= _load_scale(scale, row, rows, rows_per_sample, dtype)
        rounded = (x + added).to(total.dtype.element_ty)
        tl.store(total + first * D + offset, rounded, mask=mask)
        x = rounded.to(dtype)
    if CENTERED:
        x = centre(x, mask, D)
    y = x * inverse_rms(x, row, rows, D, EPS) * factors
    if HAS_BIAS:
        y += load_channels(bias, D, BLOCK, dtype)
    tl.store(normed + first * D + offset, y, mask=mask)


@triton.jit
def _backward_kernel(
    grad_normed, grad_stream, stream, weight, scale, d_stream, d_update, sums, rows, rows_per_sample,
    EPS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_GRAD_STREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, WRITES_UPDATE: tl.constexpr, CENTERED: tl.constexpr,
    STAGES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    factors = load_channels(weight, D, BLOCK, dtype)
    d_weight = tl.zeros((ROWS, BLOCK), dtype)
    if HAS_BIAS:
        d_bias = tl.zeros((ROWS, BLOCK), dtype)
    programs = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        first = tile * tl.full((), ROWS, tl.int64)
        row, offset, mask = row_tile(first, rows, D, D, ROWS, BLOCK)
        x = tl.load(stream + first * D + offset, mask=mask, other=0.0).to(dtype)
        g = tl.load(grad_normed + first * D + offset, mask=mask, other=0.0).to(dtype)
        if HAS_GRAD_STREAM:  # all loads before the sums, which would wait for one after the other
            passed_on = tl.load(grad_stream + first * D + offset, mask=mask, other=0.0).to(dtype)
        if HAS_SCALE:
            sample_scale = _load_scale(scale, row, rows, rows_per_sample, dtype)
        if CENTERED:
            x = centre(x, mask, D)
        inverse = inverse_rms(x, row, rows, D, EPS)
        x *= inverse
        d_weight += g * x
        if HAS_BIAS:
            d_bias += g
        d_x = norm_gradient(g * factors, x, inverse, D, CENTERED)
        if HAS_GRAD_STREAM:
            d_x += passed_on
        tl.store(d_stream + first * D + offset, d_x, mask=mask)
        if WRITES_UPDATE:
            if HAS_SCALE:
                d_x *= sample_scale
            tl.store(d_update + first * D + offset, d_x, mask=mask)
    channel = tl.arange(0, BLOCK)
    sums += tl.program_id(0) * D
    tl.store(sums + channel, tl.sum(d_weight, axis=0), mask=channel < D)
    if HAS_BIAS:
        tl.store(sums + programs * D + channel, tl.sum(d_bias, axis=0), mask=channel < D)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    centered: bool,
) -> list[Tensor]:
    """The normed rows in ``dtype`` and, if there is an update, the new stream, from the inputs of ``op.py``."""
    D = stream.shape[-1]
    rows = stream.numel() // D
    normed, total = stream.new_empty(stream.shape, dtype=dtype), None
    if update is not None:
        total = stream.new_empty(stream.shape, dtype=torch.promote_types(stream.dtype, update.dtype))
    options = row_options(accumulate_dtype(stream if total is None else total), D, eps, FORWARD_WARPS)
    with device_guard(stream.device):
        _forward_kernel[(ceil_div(rows, options["ROWS"]),)](
            stream.contiguous(), _contiguous(update), weight.contiguous(), _contiguous(bias), _contiguous(scale),
            normed, total, rows, rows // stream.shape[0], HAS_UPDATE=update is not None, HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None, CENTERED=centered, **options,
        )  # fmt: skip
    return [normed] if total is None else [normed, total]


def backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    centered: bool,
    stream_dtype: torch.dtype,
    update_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of the old stream, of weight and, with dtypes for them, of the update and of bias."""
    D = stream.shape[-1]
    rows = stream.numel() // D
    exact = accumulate_dtype(stream)
    options = row_options(exact, D, eps)
    small = stream.dtype.itemsize == 2 and options["BLOCK"] <= WIDEST_SMALL
    warps, stages = (RESIDENT_WARPS_SMALL, STAGES_SMALL) if small else (RESIDENT_WARPS, STAGES)
    resident = multiprocessors(stream.device) * max(1, warps // options["num_warps"])
    programs = min(ceil_div(rows, options["ROWS"]), resident)
    d_stream = stream.new_empty(stream.shape, dtype=stream_dtype)
    d_update = None if update_dtype is None else stream.new_empty(stream.shape, dtype=update_dtype)
    sums = stream.new_empty(1 if bias_dtype is None else 2, programs, D, dtype=exact)
    with device_guard(stream.device):
        _backward_kernel[(programs,)](
            grad_normed.contiguous(), _contiguous(grad_stream), stream.contiguous(), weight.contiguous(),
            _contiguous(scale), d_stream, d_update, sums, rows, rows // stream.shape[0],
            HAS_GRAD_STREAM=grad_stream is not None, HAS_BIAS=bias_dtype is not None, HAS_SCALE=scale is not None,
            WRITES_UPDATE=update_dtype is not None, CENTERED=centered, STAGES=stages, **options,
        )  # fmt: skip
    sums = sums.sum(1)
    gradients = [d_stream, sums[0].to(weight.dtype)]
    if d_update is not None:
        gradients.append(d_update)
    return gradients if bias_dtype is None else [*gradients, sums[1].to(bias_dtype, copy=True)]
