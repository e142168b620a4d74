"""Norm and gate by torch's kernels: the fast path on CPUs, and correct on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.gated_norm.op import GATES, sum_dtype
from zoo.kernels.registration import without_autocast

__all__ = ["backward", "forward", "gated_norm_in_steps"]

GATE_GRADIENTS = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    None: lambda d_gate, z: d_gate,
}


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    if centered:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    return normed if bias is None else normed + bias


def gated_norm_in_steps(
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
    """Outputs (..., D) of inputs that are all of one dtype, for autograd to differentiate."""
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
    return gated_norm_in_steps(*tensors, *options).to(z.dtype).contiguous()


@without_autocast
def backward(
    grad_out: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    gate_first: bool,
    centered: bool,
) -> list[Tensor]:
    """Gradients of x, z, weight and, if there is one, bias."""
    exact, shape = sum_dtype(x, z), (-1, groups, x.shape[-1] // groups)
    g, wide_x, wide_z = (t.to(exact).reshape(shape) for t in (grad_out, x, z))  # (M, G, W)
    factors = weight.to(exact).view(-1, shape[2])  # (G or 1, W)
    gate = GATES[activation](wide_z)
    v = wide_x * gate if gate_first else wide_x
    if centered:
        v = v - v.mean(-1, keepdim=True)
    inverse = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    v = v * inverse
    d_normed = g if gate_first else g * gate
    d_v = d_normed * factors
    d_v = d_v - v * (d_v * v).mean(-1, keepdim=True)
    if centered:
        d_v = d_v - d_v.mean(-1, keepdim=True)
    d_v = d_v * inverse
    if gate_first:
        d_x, d_gate = d_v * gate, d_v * wide_x
    else:
        normed = v * factors if bias is None else v * factors + bias.to(exact).view(-1, shape[2])
        d_x, d_gate = d_v, g * normed
    gradients = [d_x, GATE_GRADIENTS[activation](d_gate, wide_z), (d_normed * v).sum(0)]
    if bias is not None:
        gradients.append(d_normed.sum(0))
    if len(factors) < groups:
        gradients[2:] = [d.sum(0) for d in gradients[2:]]
    pairs = zip(gradients, (x, z, weight, bias), strict=False)
    return [d.reshape(t.shape).to(t.dtype, copy=True) for d, t in pairs]
