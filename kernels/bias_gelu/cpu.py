"""Bias and GELU by torch's kernels: the fast path on CPUs, and correct on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, without_autocast

__all__ = ["backward", "forward"]


@without_autocast
def forward(x: Tensor, bias: Tensor) -> Tensor:
    """Outputs (..., D) in x's dtype."""
    return F.gelu(_shifted(x, bias)).to(x.dtype)


@without_autocast
def backward(grad_out: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
    """Gradients of x and bias."""
    v = _shifted(x, bias)
    d_v = torch.ops.aten.gelu_backward(grad_out.to(v.dtype).contiguous(), v)
    d_bias = d_v.flatten(0, -2).sum(0) if d_v.dim() > 1 else d_v
    return [d_v.to(x.dtype), d_bias.to(bias.dtype, copy=True)]


def _shifted(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, contiguous, in the dtype of sums."""
    exact = accumulate_dtype(x)
    return x.to(exact).contiguous() + bias.to(exact)
