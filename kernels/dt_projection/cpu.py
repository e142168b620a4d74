"""Backward of the steps' projection by torch's products, which write and read the rows where they lie."""

import torch
from torch import Tensor

from zoo.kernels.dt_projection.rows import stacked_weight_gradient
from zoo.kernels.registration import without_autocast

__all__ = ["backward"]


@without_autocast
def backward(d_delta: Tensor, d_B: Tensor, d_C: Tensor, rows: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of rows and weight, from the inputs of ``op.py``."""
    rank, states = weight.shape[2], d_B.shape[3]
    d_rows, d_delta = torch.empty_like(rows), _path_by_path(d_delta)
    others, unused = [d_B, d_C], rows.shape[3] - rank - 2 * states
    if unused:
        others.append(rows.new_zeros(()).expand(*rows.shape[:3], unused))
    d_rows[..., rank:].copy_(torch.cat(others, dim=-1))
    of_low_rank = _path_by_path(d_rows[..., :rank])
    if of_low_rank.data_ptr() == d_rows.data_ptr():
        torch.bmm(d_delta, weight, out=of_low_rank)
    else:  # batch and tokens of a path do not lie as rows of one matrix
        d_rows[..., :rank] = torch.bmm(d_delta, weight).unflatten(1, (rows.shape[0], -1)).transpose(0, 1)
    return [d_rows, stacked_weight_gradient(d_delta, _path_by_path(rows[..., :rank]))]


def _path_by_path(x: Tensor) -> Tensor:
    """(B, K, L, D) as K matrices (K, B * L, D); a copy only where their rows do not lie at even distances."""
    return x.transpose(0, 1).flatten(1, 2)
