"""A linear layer with several sets of weights, one for each scan path or direction."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor

__all__ = ["stacked_linear"]


@torch.fx.wrap
@register_notrace_function
def stacked_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Tokens (S, B, L, D) of S sets through the weights (S, R, D) of theirs, (S, B, L, R).

    In training every sample is a product of its own: over all samples at once, the weights' gradient has few outputs
    and an inner dimension of B * L, which batched products do not share among processors.
    """
    if len(weight) == 1:
        return F.linear(x[0], weight[0])[None]
    if torch.is_grad_enabled() and weight.requires_grad:
        return torch.matmul(x, weight.transpose(1, 2)[:, None])
    return torch.bmm(x.flatten(1, 2), weight.transpose(1, 2)).unflatten(1, x.shape[1:3])
