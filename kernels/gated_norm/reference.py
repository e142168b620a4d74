"""Norm and gate as written down, in plain torch: the specification every other backend is tested against.

Canonical shapes (see ``op.py``): x and z (..., D), weight and bias (D,) or (D / groups,).
"""

import math

import torch
from torch import Tensor

from zoo.kernels.gated_norm.op import sum_dtype
from zoo.kernels.registration import without_autocast

__all__ = ["backward", "forward"]


def _activation(z: Tensor, kind: str | None) -> Tensor:
    if kind is None:
        return z
    return z * (torch.sigmoid(z) if kind == "silu" else (1 + torch.erf(z / math.sqrt(2))) / 2)


def _gated_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    activation: str | None,
    gate_first: bool,
    centered: bool,
) -> Tensor:
    gate = _activation(z, activation)
    rows = (x * gate if gate_first else x).unflatten(-1, (groups, -1))  # (..., G, W)
    if centered:
        rows = rows - rows.mean(-1, keepdim=True)
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    repeats = x.shape[-1] // len(weight)  # of weight and bias: 1, or one for every group
    out = normed.flatten(-2) * weight.repeat(repeats) + bias.repeat(repeats)
    return out if gate_first else out * gate


def _widened(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    exact = sum_dtype(x, z)
    return [t.to(exact) for t in (x, z, weight, torch.zeros_like(weight) if bias is None else bias)]


@without_autocast
def forward(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, *options: int | float | str | None) -> Tensor:
    """Outputs (..., D) in z's dtype."""
    return _gated_norm(*_widened(x, z, weight, bias), *options).to(z.dtype).contiguous()


@without_autocast
def backward(
    grad_out: Tensor, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, *options: int | float | str | None
) -> list[Tensor]:
    """Gradients of x, z, weight and, if there is one, bias, by autograd."""
    tensors = _widened(x, z, weight, bias)
    _, gradients = torch.func.vjp(lambda *t: _gated_norm(*t, *options), *tensors)
    results = zip(gradients(grad_out.to(tensors[0].dtype)), (x, z, weight, bias), strict=True)
    return [d.to(t.dtype, memory_format=torch.contiguous_format, copy=True) for d, t in results if t is not None]
