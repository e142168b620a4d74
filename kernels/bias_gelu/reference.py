"""Bias and GELU as written down, in plain torch: the specification every other backend is tested against."""

import math

import torch
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, without_autocast

__all__ = ["backward", "forward"]


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    v = x + bias
    return v * (1 + torch.erf(v / math.sqrt(2))) / 2


@without_autocast
def forward(x: Tensor, bias: Tensor) -> Tensor:
    """Outputs (..., D) in x's dtype."""
    exact = accumulate_dtype(x)
    return _bias_gelu(x.to(exact), bias.to(exact)).to(x.dtype).contiguous()


@without_autocast
def backward(grad_out: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
    """Gradients of x and bias, by autograd."""
    exact = accumulate_dtype(x)
    _, gradients = torch.func.vjp(_bias_gelu, x.to(exact), bias.to(exact))
    d_x, d_bias = gradients(grad_out.to(exact))
    return [d_x.to(x.dtype, memory_format=torch.contiguous_format, copy=True), d_bias.to(bias.dtype, copy=True)]
