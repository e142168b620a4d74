"""The causal convolution tap by tap in plain torch: the specification every other backend is tested against.

Canonical shapes (see ``op.py``): x (B, 1 or K, L, D), weight (K, D, W), bias (K, D), result (K, B, L, D).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backward", "forward"]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[bool]) -> Tensor:
    """Returns the outputs (K, B, L, D) in x's dtype; differentiable by autograd, any float dtype."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    K, _, W = weight.shape
    L = x.shape[2]
    outputs = []
    for k in range(K):
        tokens = x[:, k if x.shape[1] > 1 else 0].to(accumulate)  # (B, L, D)
        tokens = tokens.flip(1) if reverse[k] else tokens
        padded = F.pad(tokens, (0, 0, W - 1, 0))  # (B, W - 1 + L, D)
        y = torch.zeros_like(tokens)
        for w in range(W):
            y = y + padded[:, w : w + L] * weight[k, :, w].to(accumulate)
        if bias is not None:
            y = y + bias[k].to(accumulate)
        if silu:
            y = F.silu(y)
        outputs.append(y.flip(1) if reverse[k] else y)
    return torch.stack(outputs).to(x.dtype)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[bool]
) -> list[Tensor]:
    """Gradients of x, weight and, if given, bias, by autograd through :func:`forward`."""
    inputs = (x, weight) if bias is None else (x, weight, bias)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return forward(x, weight, bias, silu, reverse)

    _, gradients = torch.func.vjp(run, *inputs)
    return [gradient.contiguous() for gradient in gradients(grad_out)]
