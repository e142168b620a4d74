"""Norm and gate by torch's kernels: the fast path on CPUs, and correct on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.gated_norm.op import GATES, sum_dtype
from zoo.kernels.registration import without_autocast

__all__ = ["backward", "forward"]


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    if centered:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    return normed if bias is None else normed + bias


def _gated_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    gate_first: bool,
    centered: bool,
) -> Tensor:
    """Outputs (..., D) of inputs that are all of the dtype of sums."""
    gate = GATES[activation](z)
    rows = (x * gate if gate_first else x).unflatten(-1, (groups, -1))  # (..., G, W)
    if weight.shape == rows.shape[-1:]:
        normed = _norm(rows, weight, bias, eps, centered).flatten(-2)
    else:
        normed = _norm(rows, None, None, eps, centered).flatten(-2) * weight
        normed = normed if bias is None else normed + bias
    return normed if gate_first else normed * gate


@without_autocast
def forward(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, *options: int | float | str | None) -> Tensor:
    """Outputs (..., D) in z's dtype from the inputs of ``op.py``, the last of which are ``options``."""
    exact = sum_dtype(x, z)
    tensors = (None if t is None else t.to(exact) for t in (x, z, weight, bias))
    return _gated_norm(*tensors, *options).to(z.dtype).contiguous()


@without_autocast
def backward(
    grad_out: Tensor, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, *options: int | float | str | None
) -> list[Tensor]:
    """Gradients of x, z, weight and, if there is one, bias."""
    exact = sum_dtype(x, z)
    tensors = [t for t in (x, z, weight, bias) if t is not None]

    def out(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _gated_norm(x, z, weight, bias, *options)

    _, gradients = torch.func.vjp(out, *(t.to(exact) for t in tensors))
    results = zip(gradients(grad_out.to(exact)), tensors, strict=True)
    return [d.to(t.dtype, memory_format=torch.contiguous_format, copy=True) for d, t in results]
