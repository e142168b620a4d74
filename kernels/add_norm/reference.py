"""Residual add and RMS norm as written down, in plain torch: the specification every other backend is tested against.

Canonical shapes (see ``op.py``): stream and update (..., D), weight (D,), scale (B,).
"""

import torch
from torch import Tensor

from zoo.kernels.add_norm.op import by_sample
from zoo.kernels.registration import accumulate_dtype, without_autocast

__all__ = ["backward", "forward"]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


@without_autocast
def forward(
    stream: Tensor, update: Tensor | None, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype
) -> list[Tensor]:
    """The normed rows in ``dtype`` and, if there is an update, the new stream."""
    total = stream
    if update is not None:
        sum_dtype = torch.promote_types(stream.dtype, update.dtype)
        exact = torch.promote_types(sum_dtype, torch.float32)
        added = update.to(exact) if scale is None else update.to(exact) * by_sample(scale, update)
        total = (stream.to(exact) + added).to(sum_dtype)
    normed = _norm(total.to(accumulate_dtype(total)), weight, eps).to(dtype).contiguous()
    return [normed] if update is None else [normed, total.contiguous()]


@without_autocast
def backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    stream_dtype: torch.dtype,
    update_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of the old stream, of weight and, with a dtype for it, of the update, by autograd through the norm."""
    exact = accumulate_dtype(stream)
    _, gradients = torch.func.vjp(lambda x, w: _norm(x, w, eps), stream.to(exact), weight.to(exact))
    d_total, d_weight = gradients(grad_normed.to(exact))
    if grad_stream is not None:
        d_total = d_total + grad_stream.to(exact)
    results = [d_total.to(stream_dtype).contiguous(), d_weight.to(weight.dtype)]
    if update_dtype is None:
        return results
    d_update = d_total if scale is None else d_total * by_sample(scale, d_total)
    return [*results, d_update.to(update_dtype, memory_format=torch.contiguous_format, copy=True)]
