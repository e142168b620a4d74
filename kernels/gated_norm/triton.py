"""Norm and gate in Triton: every row is read and written once, forward and backward.

A program has rows of one group of channels in registers, see ``triton_rows.py``. Backward programs stay: each walks
over tiles of rows, as far apart as there are programs of its group, and adds up its part of the gradients of weight and
bias in registers. They end in a buffer, which is added up afterwards: no atomics, so every call gives the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, contiguous_channels, device_guard, multiprocessors
from zoo.kernels.gated_norm.op import sum_dtype
from zoo.kernels.triton_math import activate, activation_slope
from zoo.kernels.triton_rows import centre, inverse_rms, load_channels, norm_gradient, row_options, row_tile

__all__ = ["backward", "forward"]

RESIDENT_WARPS = 12  # of backward programs on a multiprocessor
STAGES = 2  # of these: a tile is loaded into shared memory while the one before is worked on


@triton.jit
def _forward_kernel(
    x, z, weight, bias, out, rows, stride, stride_z, stride_weight, EPS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr, CENTERED: tl.constexpr, COARSE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, offset, mask = row_tile(first, rows, stride, D, ROWS, BLOCK)
    _, offset_z, _ = row_tile(first, rows, stride_z, D, ROWS, BLOCK)
    at = first * stride + group * D + offset
    v = tl.load(x + at, mask=mask, other=0.0).to(dtype)
    gate = tl.load(z + first * stride_z + group * D + offset_z, mask=mask, other=0.0).to(dtype)
    gate = activate(gate, ACTIVATION, COARSE)
    if GATE_FIRST:
        v *= gate
    if CENTERED:
        v = centre(v, mask, D)
    v *= inverse_rms(v, row, rows, D, EPS) * load_channels(weight + group * stride_weight, D, BLOCK, dtype)
    if HAS_BIAS:
        v += load_channels(bias + group * stride_weight, D, BLOCK, dtype)
    if not GATE_FIRST:
        v *= gate
    tl.store(out + at, v, mask=mask)


@triton.jit
def _backward_kernel(
    grad_out, x, z, weight, bias, d_x, d_z, sums, rows, stride, stride_z, stride_weight, EPS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr, CENTERED: tl.constexpr, STAGES: tl.constexpr, COARSE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    factors = load_channels(weight + group * stride_weight, D, BLOCK, dtype)
    d_weight = tl.zeros((ROWS, BLOCK), dtype)
    if HAS_BIAS:
        shift = load_channels(bias + group * stride_weight, D, BLOCK, dtype)
        d_bias = tl.zeros((ROWS, BLOCK), dtype)
    programs = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        first = tile * tl.full((), ROWS, tl.int64)
        row, offset, mask = row_tile(first, rows, stride, D, ROWS, BLOCK)
        _, offset_z, _ = row_tile(first, rows, stride_z, D, ROWS, BLOCK)
        at = first * stride + group * D + offset
        given = tl.load(x + at, mask=mask, other=0.0).to(dtype)
        gate = tl.load(z + first * stride_z + group * D + offset_z, mask=mask, other=0.0).to(dtype)
        g = tl.load(grad_out + at, mask=mask, other=0.0).to(dtype)
        slope = 1.0
        if ACTIVATION is not None:
            slope = activation_slope(gate, ACTIVATION, COARSE)
            gate = activate(gate, ACTIVATION, COARSE)
        v = given
        if GATE_FIRST:
            v *= gate
        if CENTERED:
            v = centre(v, mask, D)
        inverse = inverse_rms(v, row, rows, D, EPS)
        v *= inverse
        if not GATE_FIRST:
            normed = v * factors
            if HAS_BIAS:
                normed += shift
            tl.store(d_z + at, g * normed * slope, mask=mask)
            g *= gate
        d_weight += g * v
        if HAS_BIAS:
            d_bias += g
        d_v = norm_gradient(g * factors, v, inverse, D, CENTERED)
        if GATE_FIRST:
            tl.store(d_z + at, d_v * given * slope, mask=mask)
            d_v *= gate
        tl.store(d_x + at, d_v, mask=mask)
    channel = tl.arange(0, BLOCK)
    sums += tl.program_id(0) * stride + group * D
    tl.store(sums + channel, tl.sum(d_weight, axis=0), mask=channel < D)
    if HAS_BIAS:
        tl.store(sums + programs * stride + channel, tl.sum(d_bias, axis=0), mask=channel < D)


def _rows(x: Tensor) -> Tensor:
    """Rows (rows, D) with contiguous channels, a view wherever strides allow."""
    return contiguous_channels(x.reshape(-1, x.shape[-1]))


def _options(
    x: Tensor, z: Tensor, bias: Tensor | None, groups: int, eps: float, activation: str | None, gate_first: bool,
    centered: bool,
) -> dict:  # fmt: skip
    """Compile-time arguments of both kernels."""
    return dict(
        HAS_BIAS=bias is not None, ACTIVATION=activation, GATE_FIRST=gate_first, CENTERED=centered,
        COARSE=z.dtype.itemsize == 2, **row_options(sum_dtype(x, z), x.shape[-1] // groups, eps),
    )  # fmt: skip


def _stride_of_groups(weight: Tensor, D: int, groups: int) -> int:
    """Elements of the weight from one group to the next: none if it is common to all."""
    return D // groups if len(weight) == D else 0


def forward(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    gate_first: bool,
    centered: bool,
) -> Tensor:
    """Outputs (..., D) in z's dtype from the inputs of ``op.py``."""
    out, gates, D = z.new_empty(z.shape), _rows(z), z.shape[-1]
    options = _options(x, z, bias, groups, eps, activation, gate_first, centered)
    with device_guard(x.device):
        _forward_kernel[(ceil_div(len(gates), options["ROWS"]), groups)](
            x.contiguous(), gates, weight.contiguous(), None if bias is None else bias.contiguous(), out,
            len(gates), D, gates.stride(0), _stride_of_groups(weight, D, groups), **options,
        )  # fmt: skip
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    gate_first: bool,
    centered: bool,
) -> list[Tensor]:
    """Gradients of x, z, weight and, if there is one, bias."""
    gates, D = _rows(z), z.shape[-1]
    rows = len(gates)
    options = _options(x, z, bias, groups, eps, activation, gate_first, centered)
    resident = multiprocessors(x.device) * max(1, RESIDENT_WARPS // options["num_warps"])
    programs = min(ceil_div(rows, options["ROWS"]), max(1, resident // groups))
    d_x, d_z = x.new_empty(x.shape), z.new_empty(z.shape)
    sums = x.new_empty(1 if bias is None else 2, programs, D, dtype=sum_dtype(x, z))
    with device_guard(x.device):
        _backward_kernel[(programs, groups)](
            grad_out.contiguous(), x.contiguous(), gates, weight.contiguous(),
            None if bias is None else bias.contiguous(), d_x, d_z, sums, rows, D, gates.stride(0),
            _stride_of_groups(weight, D, groups), STAGES=STAGES, **options,
        )  # fmt: skip
    sums = sums.view(len(sums), -1, len(weight)).sum(1)  # over programs and, if they share the weight, groups
    return [d_x, d_z, *(total.to(t.dtype) for total, t in zip(sums, (weight, bias), strict=False))]
