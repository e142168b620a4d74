"""Selective scans of tokens that their steps, B and C are projected from, as one operation for autograd.

What a mixer computes from tokens to the sum of its paths is a chain of small pieces, most of them views. Taken as one,
their gradients need no pieces of their own: products write where the next one reads, and the tokens' gradient is
added up in the product that ends it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels.autocast import autocast_dtype
from zoo.kernels.dt_projection import (
    dt_projection_backward,
    pad_projections,
    project_rows,
    split_rows,
    steps_of_rows,
)
from zoo.kernels.selective_scan.op import selective_scan_backward_op, selective_scan_op

__all__ = ["projected_scan"]


class _ProjectedScan(torch.autograd.Function):
    """See :func:`projected_scan`. Rows (K, B, L, W) hold the low rank, B and C of every token, and zeros."""

    @staticmethod
    def forward(ctx, u, x_weight, dt_weight, A, D, delta_bias, dtype, *options):
        paths, *ctx.options = options
        ctx.dtypes, ctx.rank = (x_weight.dtype, dt_weight.dtype), dt_weight.shape[2]
        x_weight, dt_weight = pad_projections(x_weight.to(dtype), dt_weight.to(dtype), dtype)
        rows = project_rows(u.to(dtype), x_weight)
        delta, B, C = steps_of_rows(rows, dt_weight, A.shape[2])
        out, _, states = selective_scan_op(*_inputs_of_scan(u, delta, A, B, C, D, delta_bias), *options, True)
        ctx.save_for_backward(u, rows, delta, states, x_weight, dt_weight, A, D, delta_bias, paths)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        u, rows, delta, states, x_weight, dt_weight, A, D, delta_bias, paths = ctx.saved_tensors
        rank, N = dt_weight.shape[2], A.shape[2]
        _, B, C = split_rows(rows, rank, N)
        inputs = _inputs_of_scan(u, delta, A, B, C, D, delta_bias)
        d_u, d_delta, d_A, d_B, d_C, d_D, d_bias = selective_scan_backward_op(
            grad, None, states, *inputs, paths, *ctx.options
        )
        d_rows, d_dt_weight = dt_projection_backward(
            d_delta, d_B.squeeze(3), d_C.squeeze(3), rows.transpose(0, 1), dt_weight
        )
        d_rows = d_rows.transpose(1, 2).flatten(2).flatten(0, 1)  # (B * L, K * W)
        d_u = _add_product(d_u.flatten(0, 2), d_rows, x_weight.flatten(0, 1)).view_as(u)
        d_x_weight = (d_rows.t() @ u.to(d_rows.dtype).flatten(0, 1)).view_as(x_weight)
        if rank != ctx.rank or x_weight.shape[1] != rank + 2 * N:  # padded
            d_x_weight = torch.cat([d_x_weight[:, : ctx.rank], d_x_weight[:, rank : rank + 2 * N]], dim=1)
            d_dt_weight = d_dt_weight[..., : ctx.rank]
        weights = (grad.to(dtype) for grad, dtype in zip((d_x_weight, d_dt_weight), ctx.dtypes, strict=True))
        return d_u, *weights, d_A, d_D, d_bias, *[None] * (2 + len(ctx.options))


def _inputs_of_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[Tensor | None, ...]:
    """The op's tensors, from tokens (B, L, E), and delta, B and C (K, B, L, E or N)."""
    delta, B, C = (x.transpose(0, 1) for x in (delta, B, C))
    return u.unsqueeze(1), delta, A, B.unsqueeze(3), C.unsqueeze(3), D, None, delta_bias, None


def _add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total (M, E) + x (M, W) @ weight (W, E), rounded once if all are of one dtype."""
    return torch.addmm(total, x, weight) if total.dtype == x.dtype else total + x @ weight


def projected_scan(
    u: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    *,
    paths: Tensor | None = None,
    reverse: Sequence[bool],
    window: int = 1,
    complete: bool = False,
) -> Tensor:
    """Projects tokens to steps, B and C of K paths, and scans them (Mamba, arXiv 2312.00752, algorithm 2).

    It is made for training steps: what the backward needs is always kept. Tokens are projected in the dtype of autocast
    where that is on, else in that of ``u``.

    Args:
        u: Tokens (B, L, E), contiguous.
        x_weight: Projections (K, R + 2 N, E) to the steps' low rank R, and to B and C of N states.
        dt_weight: Projections (K, E, R) of the low rank to the steps of all channels.
        A: State decay, (K, E, N).
        D: Skip weights, (K, E).
        delta_bias: Added to the steps before softplus, (K, E).
        paths: See :func:`~zoo.kernels.selective_scan`, as for the other arguments.
        reverse: One flag for every path.
        window: Steps of a locally bidirectional window.
        complete: Promises that every row of ``paths`` has all tokens and nothing else.

    Returns:
        The sum of what the paths put on every token, (B, L, E), in the dtype of ``u``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    options = paths, True, [int(flag) for flag in reverse], window, complete, False
    dtype = autocast_dtype(u.device.type, u.dtype) or u.dtype
    return _ProjectedScan.apply(u, x_weight, dt_weight, A, D, delta_bias, dtype, *options)
