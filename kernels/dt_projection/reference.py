"""Backward of the steps' projection as written down, in plain torch: what every other backend is tested against."""

import torch
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, without_autocast

__all__ = ["backward"]


@without_autocast
def backward(d_delta: Tensor, d_B: Tensor, d_C: Tensor, rows: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of rows and weight, from the inputs of ``op.py``."""
    dtype = accumulate_dtype(rows)
    low_rank = rows[..., : weight.shape[2]].to(dtype)
    of_low_rank = torch.einsum("bkle,ker->bklr", d_delta.to(dtype), weight.to(dtype))
    d_weight = torch.einsum("bkle,bklr->ker", d_delta.to(dtype), low_rank)
    d_rows = torch.zeros_like(rows)
    columns = torch.cat([of_low_rank, d_B.to(dtype), d_C.to(dtype)], dim=-1)
    d_rows[..., : columns.shape[-1]] = columns.to(rows.dtype)
    return [d_rows, d_weight.to(weight.dtype)]
