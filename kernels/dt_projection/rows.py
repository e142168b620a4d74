"""Rows (..., W) that tokens are projected to: the low rank R of their steps, B and C of N states, and zeros."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pad_projections", "project_rows", "split_rows", "stacked_weight_gradient", "steps_of_rows"]

ALIGNED = 8  # 16-bit numbers in the 16 bytes that tensor cores' kernels read at a time


def split_rows(rows: Tensor, rank: int, states: int) -> tuple[Tensor, Tensor, Tensor]:
    """The low rank (..., R), B and C (..., N) of rows, as views."""
    unused = rows.shape[-1] - rank - 2 * states
    dt, B, C, *_ = rows.split([rank, states, states, *[unused] * (unused > 0)], dim=-1)
    return dt, B, C


def project_rows(tokens: Tensor, x_weight: Tensor) -> Tensor:
    """Rows (S, B, L, W) of tokens (B, L, E) that S sets of projections (S, W, E) read: one product."""
    rows = F.linear(tokens.flatten(0, 1), x_weight.flatten(0, 1)).unflatten(1, (len(x_weight), -1))  # (B * L, S, W)
    return rows.transpose(0, 1).unflatten(1, tokens.shape[:2])


def steps_of_rows(rows: Tensor, dt_weight: Tensor, states: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps (S, B, L, E) of rows (S, B, L, W) by the weights (S, E, R) of their sets; B and C (S, B, L, N) as views."""
    dt, B, C = split_rows(rows, dt_weight.shape[2], states)
    return torch.bmm(dt.flatten(1, 2), dt_weight.transpose(1, 2)).unflatten(1, rows.shape[1:3]), B, C


def stacked_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Sums over the rows of S sets (S, M, R) and (S, M, D), (S, R, D), by one product a set.

    A batched product shares the sum over all rows among no more processors than the few outputs need.
    """
    return torch.stack([g.t() @ rows for g, rows in zip(grad, x, strict=True)])


def pad_projections(x_weight: Tensor, dt_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pads the low rank, and the rows of every set, with zeros to multiples of 8 where products want that.

    On GPUs products of 16-bit numbers otherwise fall back to kernels of old chips, which take two to four times as
    long.

    Args:
        x_weight: Projections (S, R + 2 N, E) of S sets to rows.
        dt_weight: Projections (S, E, R) of the low rank to the steps of all channels.
        dtype: In which they are multiplied.

    Returns:
        Both, padded or as they were.
    """
    if x_weight.device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return x_weight, dt_weight
    sets, rank = len(x_weight), dt_weight.shape[2]
    extra = -rank % ALIGNED
    last = -(x_weight.shape[1] + extra) % ALIGNED
    if not extra and not last:
        return x_weight, dt_weight
    of_steps, of_states = x_weight.split([rank, x_weight.shape[1] - rank], dim=1)
    zeros = x_weight.new_zeros(sets, max(extra, last), x_weight.shape[2])
    x_weight = torch.cat([of_steps, zeros[:, :extra], of_states, zeros[:, :last]], dim=1)
    return x_weight, F.pad(dt_weight, (0, extra))
