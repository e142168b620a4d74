"""Residual add and RMS norm in few passes of torch code: the fast path on CPUs, and correct on every device.

``torch.nn.functional.rms_norm`` writes the squares of its input before it adds them up; a vector norm only reads the
input. In the backward the products of gradients and stream serve both the sums over channels, as a product with the
weight, and the gradient of the weight.
"""

import torch
from torch import Tensor

from zoo.kernels.add_norm.op import by_sample
from zoo.kernels.registration import accumulate_dtype, without_autocast

__all__ = ["backward", "forward"]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean square + eps) of every row of x (rows, D), (rows, 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _add(stream: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    """The new stream, contiguous; torch adds 16-bit numbers in float32."""
    total = stream.new_empty(stream.shape, dtype=torch.promote_types(stream.dtype, update.dtype))
    if scale is None:
        return torch.add(stream, update, out=total)
    exact = accumulate_dtype(total)
    return total.copy_(torch.addcmul(stream.to(exact), update.to(exact), by_sample(scale, update)))


@without_autocast
def forward(
    stream: Tensor, update: Tensor | None, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype
) -> list[Tensor]:
    """The normed rows in ``dtype`` and, if there is an update, the new stream."""
    total = stream if update is None else _add(stream, update, scale)
    x = total.to(accumulate_dtype(total)).reshape(-1, total.shape[-1])
    normed = (x * _inverse_rms(x, eps)).mul_(weight.to(x.dtype)).to(dtype).contiguous().view(total.shape)
    return [normed] if update is None else [normed, total]


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
    """Gradients of the old stream, of weight and, with a dtype for it, of the update."""
    exact, D = accumulate_dtype(stream), stream.shape[-1]
    x, g = (t.to(exact).reshape(-1, D).contiguous() for t in (stream, grad_normed))
    factors = weight.to(exact)
    inverse = _inverse_rms(x, eps)
    products = g * x
    along_x = torch.mv(products, factors).unsqueeze(1).div_(D).mul_(inverse).mul_(inverse)  # (rows, 1)
    d_total = (g * factors).addcmul_(x, along_x, value=-1).mul_(inverse)
    d_weight = products.mul_(inverse).sum(0).to(weight.dtype)
    if grad_stream is not None:
        d_total += grad_stream.reshape(-1, D)
    d_total = d_total.view(stream.shape)
    if update_dtype is None:
        return [d_total.to(stream_dtype), d_weight]
    d_update = d_total if scale is None else d_total * by_sample(scale, d_total)
    return [d_total.to(stream_dtype), d_weight, d_update.to(update_dtype, copy=True)]
