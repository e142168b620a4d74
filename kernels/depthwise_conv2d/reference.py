"""The depth-wise convolution tap by tap in plain torch: the specification every other backend is tested against.

Canonical shapes (see ``op.py``): x (B, H, W, C), weight (C, k, k), bias (C,), result (B, H, W, C).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backward", "forward"]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Returns the outputs (B, H, W, C) in x's dtype; differentiable by autograd, any float dtype."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    H, W = x.shape[1:3]
    side = weight.shape[1]
    margin = side // 2
    padded = F.pad(x.to(accumulate), (0, 0, margin, margin, margin, margin))
    y = torch.zeros_like(x, dtype=accumulate)
    for i in range(side):
        for j in range(side):
            y = y + padded[:, i : i + H, j : j + W] * weight[:, i, j].to(accumulate)
    if bias is not None:
        y = y + bias.to(accumulate)
    if activation is not None:
        y = getattr(F, activation)(y)
    return y.to(x.dtype)


def backward(grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> list[Tensor]:
    """Gradients of x, weight and, if given, bias, by autograd through :func:`forward`."""
    inputs = (x, weight) if bias is None else (x, weight, bias)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return forward(x, weight, bias, activation)

    _, gradients = torch.func.vjp(run, *inputs)
    return [gradient.contiguous() for gradient in gradients(grad_out)]
