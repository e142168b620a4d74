"""Mamba's operations for a single token after others, in a few torch operations: kernels are made for many tokens.

They take and return what :func:`zoo.kernels.selective_scan`, :func:`zoo.kernels.ssd` and a causal convolution do for
one path of one token with a state before it; states are float32 as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["convolution_step", "selective_step", "ssd_step"]


def convolution_step(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The last W inputs (B, E, W), taps (E, W) and bias (E,) to the convolution at the last one, (B, 1, E)."""
    y = (inputs * weight).sum(dim=-1)
    return (y if bias is None else y + bias).to(inputs.dtype).unsqueeze(1)


def selective_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
    initial_state: Tensor,
    return_last_state: bool,
) -> tuple[Tensor, Tensor]:
    """One token of the selective scan.

    Shapes: u, delta and z (B, 1, E), A (E, N), B and C (B, 1, N), D and delta_bias (E,), states (B, E, N).

    Returns:
        Output (B, 1, E) in the dtype of u, and the state after the token.
    """
    step = _step_size(delta, delta_bias, delta_softplus).transpose(1, 2)  # (B, E, 1)
    x = u.to(step.dtype).transpose(1, 2)
    state = initial_state * torch.exp(step * A) + step * x * B
    y = (state * C).sum(dim=-1) + D * x.squeeze(-1)  # (B, E)
    return (y.unsqueeze(1) * F.silu(z)).to(u.dtype), state


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    *,
    dt_softplus: bool,
    initial_state: Tensor,
    return_last_state: bool,
) -> tuple[Tensor, Tensor]:
    """One token of SSD.

    Shapes: x (B, 1, H, P), dt (B, 1, H), A, D and dt_bias (H,), B and C (B, 1, G, N), states (B, H, P, N).

    Returns:
        Output (B, 1, H, P) in the dtype of x, and the state after the token.
    """
    step = _step_size(dt, dt_bias, dt_softplus).squeeze(1)  # (B, H)
    heads = x.shape[2] // B.shape[2]
    B, C = (t.squeeze(1).to(step.dtype).repeat_interleave(heads, dim=1).unsqueeze(-2) for t in (B, C))  # (B, H, 1, N)
    tokens = x.squeeze(1).to(step.dtype).unsqueeze(-1)  # (B, H, P, 1)
    step = step[..., None, None]
    state = initial_state * torch.exp(step * A[:, None, None]) + step * tokens * B
    y = (state * C).sum(dim=-1) + D[:, None] * tokens.squeeze(-1)  # (B, H, P)
    return y.unsqueeze(1).to(x.dtype), state


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Step sizes in float32, or float64 if they are."""
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    delta = delta if bias is None else delta + bias
    return F.softplus(delta) if softplus else delta
