"""Linear layers with several sets of weights, one for each scan path or direction."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels import (
    autocast_dtype,
    dt_projection_backward,
    pad_projections,
    project_rows,
    split_rows,
    stacked_weight_gradient,
    steps_of_rows,
)

__all__ = ["project_steps", "stacked_linear"]


class _Products(torch.autograd.Function):
    """Rows (S, M, D) of S sets times the weights (S, R, D) of theirs, (S, M, R)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # with a setup_context, torch binds arguments in every call
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        d_x = torch.bmm(grad, weight) if of_x else None
        d_weight = stacked_weight_gradient(grad, x) if of_weight else None
        return d_x, d_weight


class _Steps(torch.autograd.Function):
    """Steps (S, B, L, E), B and C (S, B, L, N) of rows (S, B, L, >= R + 2 N) of S sets, by their weights (S, E, R).

    B and C are views. The rows' gradient is written in the order in memory of the rows themselves, so that it need not
    be turned around.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, states: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, weight)
        return steps_of_rows(rows, weight, states)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_steps: Tensor, of_B: Tensor, of_C: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        d_rows, d_weight = dt_projection_backward(*(x.transpose(0, 1) for x in (of_steps, of_B, of_C, rows)), weight)
        return d_rows.transpose(0, 1), d_weight, None


@torch.fx.wrap
@register_notrace_function
def stacked_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Tokens (S, B, L, D) of S sets through the weights (S, R, D) of theirs, (S, B, L, R)."""
    if len(weight) == 1:
        return F.linear(x.squeeze(0), weight.squeeze(0)).unsqueeze(0)  # x[0] would fill zeros in the backward
    rows, dtype = x.flatten(1, 2), autocast_dtype(x.device.type, x.dtype)
    if dtype is not None:  # here, as nothing is narrowed in a backward
        rows, weight = rows.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        return _Products.apply(rows, weight).unflatten(1, x.shape[1:3])
    return torch.bmm(rows, weight.transpose(1, 2)).unflatten(1, x.shape[1:3])


@torch.fx.wrap
@register_notrace_function
def project_steps(u: Tensor, x_weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Makes of tokens what a selective scan steps its states with (Mamba, arXiv 2312.00752, algorithm 2).

    Args:
        u: Tokens (S, B, L, E) of S paths, or (1, B, L, E) that all paths read.
        x_weight: Projections (S, R + 2 N, E) to the steps' low rank R, and to B and C of N states.
        dt_weight: Projections (S, E, R) of the low rank to the steps of all channels.

    Returns:
        delta (S, B, L, E), B and C (S, B, L, N), the latter two as views.
    """
    states = (x_weight.shape[1] - dt_weight.shape[2]) // 2
    x_weight, dt_weight = pad_projections(x_weight, dt_weight, u.dtype)
    rank, sets = dt_weight.shape[2], len(x_weight)
    if len(u) < sets:
        projected = project_rows(u.flatten(0, 1), x_weight)
    else:
        projected = stacked_linear(u, x_weight)
    if not torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        dt, B, C = split_rows(projected, rank, states)
        return stacked_linear(dt, dt_weight), B, C
    dtype = autocast_dtype(projected.device.type, projected.dtype) or projected.dtype
    return _Steps.apply(projected.to(dtype), dt_weight.to(dtype), states)
