"""``torch.ops.zoo.dt_projection_backward``: checks, backend dispatch, fake kernel and FLOP count.

Canonical shapes: d_delta (B, K, L, E), d_B and d_C (B, K, L, N), rows (B, K, L, W), weight (K, E, R).
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.custom_op import custom_op
from zoo.kernels.registration import check_dtypes_and_devices, expect_shape, implementation, show

OP = "dt_projection"


def check_inputs(d_delta: Tensor, d_B: Tensor, d_C: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Raises ValueError, naming expected and given, unless the canonical inputs fit together."""
    for name, x, dims in (("d_delta", d_delta, 4), ("d_B", d_B, 4), ("rows", rows, 4), ("weight", weight, 3)):
        if x.dim() != dims or 0 in x.shape:
            raise ValueError(f"{OP}: {name} {show(x.shape)} must have {dims} dimensions and at least one element")
    batch, K, L, E = d_delta.shape
    R, N = weight.shape[2], d_B.shape[3]
    expect_shape(OP, "weight", weight, "K, E, R", (K, E, R))
    expect_shape(OP, "d_B", d_B, "B, K, L, N", (batch, K, L, N))
    expect_shape(OP, "d_C", d_C, "B, K, L, N", (batch, K, L, N))
    expect_shape(OP, "rows", rows, "B, K, L, W", (batch, K, L, rows.shape[3]))
    if rows.shape[3] < R + 2 * N:
        raise ValueError(f"{OP}: rows have {rows.shape[3]} columns; {R} of the low rank and twice {N} states need more")
    check_dtypes_and_devices(OP, dict(d_delta=d_delta, d_B=d_B, d_C=d_C, rows=rows, weight=weight), {}, None)


@custom_op("dt_projection_backward")
def dt_projection_backward_op(d_delta: Tensor, d_B: Tensor, d_C: Tensor, rows: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of rows and weight."""
    check_inputs(d_delta, d_B, d_C, rows, weight)
    return implementation(OP, rows.device).backward(d_delta, d_B, d_C, rows, weight)


@dt_projection_backward_op.register_fake
def _(d_delta, d_B, d_C, rows, weight):
    check_inputs(d_delta, d_B, d_C, rows, weight)
    return [torch.empty_like(rows), weight.new_empty(weight.shape)]


@register_flop_formula(torch.ops.zoo.dt_projection_backward)
def _flops(d_delta_shape, d_B_shape, d_C_shape, rows_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products of all tokens with the weights."""
    batch, K, L, E = d_delta_shape
    return 2 * 2 * batch * K * L * E * weight_shape[2]
