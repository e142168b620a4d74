"""Residual add and norm in few passes of torch code: the fast path on CPUs, and correct on every device.

``torch.nn.functional.rms_norm`` writes the squares of its input before it adds them up; a vector norm only reads the
input. In the backward the products of gradients and stream serve both the sums over channels, as a product with the
weight, and the gradient of the weight. Layer norm has kernels in torch that read rows as often as they must.
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


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    """Normed rows of x (rows, D)."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if centered:
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)[0]
    normed = (x * _inverse_rms(x, eps)).mul_(weight)
    return normed if bias is None else normed.add_(bias)


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
    total = stream if update is None else _add(stream, update, scale)
    x = total.to(accumulate_dtype(total)).reshape(-1, total.shape[-1])
    normed = _norm(x, weight, bias, eps, centered).to(dtype).contiguous().view(total.shape)
    return [normed] if update is None else [normed, total]


def _rms_norm_backward(
    g: Tensor, x: Tensor, factors: Tensor, eps: float, biased: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (rows, D), of the factors and of a bias of RMS norm."""
    inverse = _inverse_rms(x, eps)
    products = g * x
    along_x = torch.mv(products, factors).unsqueeze(1).div_(x.shape[-1]).mul_(inverse).mul_(inverse)  # (rows, 1)
    d_x = (g * factors).addcmul_(x, along_x, value=-1).mul_(inverse)
    return d_x, products.mul_(inverse).sum(0), g.sum(0) if biased else None


def _layer_norm_backward(
    g: Tensor, x: Tensor, factors: Tensor, eps: float, biased: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (rows, D), of the factors and of a bias of layer norm."""
    _, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)  # faster than torch.var_mean
    bias = torch.zeros_like(factors) if biased else None
    return torch.ops.aten.native_layer_norm_backward(
        g, x, x.shape[-1:], mean, inverse, factors, bias, [True, True, biased]
    )


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
    """Gradients of the old stream, of weight and, with dtypes for them, of the update and of bias."""
    exact, D = accumulate_dtype(stream), stream.shape[-1]
    x, g = (t.to(exact).reshape(-1, D).contiguous() for t in (stream, grad_normed))
    norm_backward = _layer_norm_backward if centered else _rms_norm_backward
    d_total, d_weight, d_bias = norm_backward(g, x, weight.to(exact), eps, bias_dtype is not None)
    if grad_stream is not None:
        d_total += grad_stream.reshape(-1, D)
    d_total = d_total.view(stream.shape)
    gradients = [d_total.to(stream_dtype), d_weight.to(weight.dtype)]
    if update_dtype is not None:
        d_update = d_total if scale is None else d_total * by_sample(scale, d_total)
        gradients.append(d_update.to(update_dtype, copy=True))
    return gradients if bias_dtype is None else [*gradients, d_bias.to(bias_dtype)]
