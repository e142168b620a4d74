"""Backward of the projection that makes the steps of a selective scan of their low rank (Mamba, arXiv 2312.00752,
section 3.6, where it is the linear layer of ``dt_proj``).

A product makes rows of every token: the low rank R of its steps, B and C, and zeros that bring them to a width W. The
forward is a product of the first R columns, and the others are views. Backwards the gradient of the steps, R times as
wide as what it comes from, is wanted twice, by the rows and by the weights; here it is read once::

    d_rows   = [d_delta @ weight | d_B | d_C | 0]
    d_weight = d_delta^T @ low rank
"""

from torch import Tensor

from zoo.kernels.dt_projection.op import dt_projection_backward_op
from zoo.kernels.dt_projection.rows import (
    pad_projections,
    project_rows,
    split_rows,
    stacked_weight_gradient,
    steps_of_rows,
)

__all__ = [
    "dt_projection_backward",
    "pad_projections",
    "project_rows",
    "split_rows",
    "stacked_weight_gradient",
    "steps_of_rows",
]


def dt_projection_backward(
    d_delta: Tensor, d_B: Tensor, d_C: Tensor, rows: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights.

    Args:
        d_delta: Gradient of the steps, (B, K, L, E), any strides with contiguous channels; float32, bfloat16, float16
            or float64, as all others.
        d_B: Gradient of B, (B, K, L, N).
        d_C: Gradient of C, (B, K, L, N).
        rows: What tokens were projected to, (B, K, L, W), W >= R + 2 N, any strides with contiguous columns.
        weight: Weights of the K paths, (K, E, R).

    Returns:
        Gradients of ``rows``, in their order in memory, and of ``weight``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together; the message names expected and given.
    """
    d_rows, d_weight = dt_projection_backward_op(d_delta, d_B, d_C, rows, weight)
    return d_rows, d_weight
