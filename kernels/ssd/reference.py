"""SSD step by step in plain torch: the specification every other backend is tested against.

``ssd_reference`` is the definition, differentiable by autograd. ``forward`` and ``backward`` make it a backend
(``ZOO_BACKEND=reference``), with the gradients written out step by step as well.

Canonical shapes (see ``op.py``): x (B, 1 or K, L, H, P), dt (B, K, L, H), A, D and dt_bias (K, H), B and C
(B, K, L, G, N), initial_state (B, K, H, P, N), paths (K, S). Everything runs in any float dtype, float64 included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, without_autocast

__all__ = ["backward", "forward", "ssd_reference"]


def _walk(paths: Tensor | None, k: int, length: int, reverse: bool, device: torch.device) -> Tensor:
    """Tokens that path k visits, in walking order; -1 is a zero token."""
    tokens = torch.arange(length, device=device) if paths is None else paths[k][paths[k] >= -1].long()
    return tokens.flip(0) if reverse else tokens


def _read(x: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """x (B, L, ...) at the tokens, (B, S, ...); zero where the token is -1."""
    visited = (tokens >= 0).view(1, -1, *[1] * (x.dim() - 2))
    return x[:, tokens.clamp(min=0)].to(dtype) * visited


def _steps(raw: Tensor, A: Tensor | None, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """Factor of the input and decay of the state at every step, each (B, S, H), from dt with its bias."""
    if A is None:
        return torch.ones_like(raw), torch.exp(raw)
    step = F.softplus(raw) if dt_softplus else raw
    return step, torch.exp(step * A)


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    dt_softplus: bool,
    reverse: list[bool],
) -> tuple[Tensor, Tensor]:
    """Returns the output (B, L, H, P) in x's dtype and the last states (B, K, H, P, N)."""
    dtype = accumulate_dtype(x)
    batch, shared, L, heads, width = x.shape
    merged = x.new_zeros(batch, L, heads, width, dtype=dtype)
    last_states = []
    for k in range(dt.shape[1]):
        tokens = _walk(paths, k, L, reverse[k], x.device)
        x_k = _read(x[:, min(k, shared - 1)], tokens, dtype)  # (B, S, H, P)
        B_k, C_k = (  # (B, S, H, N)
            _read(t[:, k], tokens, dtype).repeat_interleave(heads // t.shape[3], dim=2) for t in (B, C)
        )
        raw = _read(dt[:, k], tokens, dtype)  # (B, S, H)
        raw = raw if dt_bias is None else raw + dt_bias[k].to(dtype)
        step, decay = _steps(raw, None if A is None else A[k].to(dtype), dt_softplus)
        h = x.new_zeros(batch, heads, width, B.shape[4], dtype=dtype)
        if initial_state is not None:
            h = initial_state[:, k].to(dtype)
        outputs = []
        for t in range(len(tokens)):
            received = (step[:, t, :, None] * x_k[:, t]).unsqueeze(3) * B_k[:, t].unsqueeze(2)  # (B, H, P, N)
            h = decay[:, t, :, None, None] * h + received
            outputs.append((h * C_k[:, t].unsqueeze(2)).sum(-1))
        y = torch.stack(outputs, dim=1)  # (B, S, H, P)
        if D is not None:
            y = y + D[k].to(dtype)[:, None] * x_k
        merged = merged.index_add(1, tokens.clamp(min=0), y * (tokens >= 0).view(-1, 1, 1))
        last_states.append(h)
    return merged.to(x.dtype), torch.stack(last_states, dim=1)


@without_autocast
def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    dt_softplus: bool,
    reverse: list[bool],
) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, P) and last states (B, K, H, P, N)."""
    return ssd_reference(x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse)


@without_autocast
def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    dt_softplus: bool,
    reverse: list[bool],
) -> list[Tensor]:
    """Gradients of the tensors given, in argument order.

    With g_t the gradient of state h_t: g_t = dy_t C_t^T + decay_{t+1} g_{t+1}; everything else follows from g and h.
    """
    dtype = accumulate_dtype(x)
    shared, L, heads = x.shape[1:4]
    groups = B.shape[3]
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    grads = [None if t is None else torch.zeros_like(t, dtype=dtype) for t in inputs]
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = grads

    for k in range(dt.shape[1]):
        tokens = _walk(paths, k, L, reverse[k], x.device)
        x_k = _read(x[:, min(k, shared - 1)], tokens, dtype)  # (B, S, H, P)
        dy = _read(grad_out, tokens, dtype)  # (B, S, H, P)
        B_k, C_k = (_read(t[:, k], tokens, dtype).repeat_interleave(heads // groups, dim=2) for t in (B, C))
        raw = _read(dt[:, k], tokens, dtype)  # (B, S, H)
        raw = raw if dt_bias is None else raw + dt_bias[k].to(dtype)
        A_k = None if A is None else A[k].to(dtype)
        step, decay = _steps(raw, A_k, dt_softplus)
        before = [torch.zeros_like(x_k[:, 0]).unsqueeze(-1).expand(-1, -1, -1, B.shape[4])]  # states, (B, H, P, N)
        if initial_state is not None:
            before[0] = initial_state[:, k].to(dtype)
        for t in range(len(tokens)):
            received = (step[:, t, :, None] * x_k[:, t]).unsqueeze(3) * B_k[:, t].unsqueeze(2)
            before.append(decay[:, t, :, None, None] * before[t] + received)

        g = torch.zeros_like(before[0]) if grad_last_state is None else grad_last_state[:, k].to(dtype)
        for t in reversed(range(len(tokens))):
            g = g + dy[:, t].unsqueeze(3) * C_k[:, t].unsqueeze(2)  # gradient of the state after step t, (B, H, P, N)
            gB = (g * B_k[:, t].unsqueeze(2)).sum(-1)  # (B, H, P)
            dlog = decay[:, t] * (g * before[t]).sum((2, 3))  # gradient of the log decay, (B, H)
            if A is None:
                draw = dlog
            else:
                dA[k] += (step[:, t] * dlog).sum(0)
                draw = A_k * dlog + (x_k[:, t] * gB).sum(-1)
                if dt_softplus:
                    draw = draw * torch.where(raw[:, t] > 20, 1.0, torch.sigmoid(raw[:, t]))
            if dbias is not None:
                dbias[k] += draw.sum(0)
            if dD is not None:
                dD[k] += (dy[:, t] * x_k[:, t]).sum((0, 2))
            token = int(tokens[t])
            if token >= 0:
                skip = 0 if D is None else D[k].to(dtype)[:, None] * dy[:, t]
                dx[:, min(k, shared - 1), token] += step[:, t, :, None] * gB + skip
                ddt[:, k, token] += draw
                dB_t = step[:, t, :, None] * (g * x_k[:, t].unsqueeze(3)).sum(2)  # (B, H, N)
                dC_t = (before[t + 1] * dy[:, t].unsqueeze(3)).sum(2)
                dB[:, k, token] += dB_t.unflatten(1, (groups, -1)).sum(2)
                dC[:, k, token] += dC_t.unflatten(1, (groups, -1)).sum(2)
            g = g * decay[:, t, :, None, None]
        if dinitial is not None:
            dinitial[:, k] = g
    return [grad.to(t.dtype) for grad, t in zip(grads, inputs, strict=True) if t is not None]
