"""Residual add and norm as written down, in plain torch: the specification every other backend is tested against.

Canonical shapes (see ``op.py``): stream and update (..., D), weight and bias (D,), scale (B,).
"""

import torch
from torch import Tensor

from zoo.kernels.add_norm.op import by_sample
from zoo.kernels.registration import accumulate_dtype, without_autocast

__all__ = ["backward", "forward"]


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    if centered:
        x = x - x.mean(-1, keepdim=True)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return normed if bias is None else normed + bias.to(x.dtype)


@without_autocast
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
    """The normed rows in ``dtype`` and, if there is an update, the new stream."""
    total = stream
    if update is not None:
        sum_dtype = torch.promote_types(stream.dtype, update.dtype)
        exact = torch.promote_types(sum_dtype, torch.float32)
        added = update.to(exact) if scale is None else update.to(exact) * by_sample(scale, update)
        total = (stream.to(exact) + added).to(sum_dtype)
    normed = _norm(total.to(accumulate_dtype(total)), weight, bias, eps, centered).to(dtype).contiguous()
    return [normed] if update is None else [normed, total.contiguous()]


@without_autocast
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
    """Gradients of the old stream, of weight and, with dtypes for them, of the update and of bias, by autograd."""
    exact = accumulate_dtype(stream)
    x, factors = stream.to(exact), weight.to(exact)
    _, gradients = torch.func.vjp(lambda x, w, b: _norm(x, w, b, eps, centered), x, factors, torch.zeros_like(factors))
    d_total, d_weight, d_bias = gradients(grad_normed.to(exact))
    if grad_stream is not None:
        d_total = d_total + grad_stream.to(exact)
    results = [d_total.to(stream_dtype).contiguous(), d_weight.to(weight.dtype)]
    if update_dtype is not None:
        d_update = d_total if scale is None else d_total * by_sample(scale, d_total)
        results.append(d_update.to(update_dtype, memory_format=torch.contiguous_format, copy=True))
    if bias_dtype is not None:
        results.append(d_bias.to(bias_dtype, copy=True))  # of a single row it is the gradient that was given
    return results
