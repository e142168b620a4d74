"""The selective scan step by step in plain torch: the specification every other backend is tested against.

``selective_scan_reference`` is the definition, differentiable by autograd. ``forward`` and ``backward`` make it a
backend (``ZOO_BACKEND=reference``), with the gradients written out step by step as well.

Canonical shapes (see ``op.py``): u (B, 1 or K, L, D), delta (B, K, L, D), A (K, D, N), B and C (B, K, L, G, N),
D and delta_bias (K, D), z (B, L, D), initial_state (B, K, D, N), paths (U, P).
Everything runs in any float dtype, float64 included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, path_length, without_autocast
from zoo.kernels.selective_scan.op import CHUNK, room_for_states

__all__ = ["backward", "forward", "selective_scan_reference"]


def _row(paths: Tensor, k: int) -> Tensor:
    """The row of a table that path k walks."""
    return paths[k % paths.shape[0]]


def _walk(paths: Tensor | None, k: int, length: int, reverse: bool, device: torch.device) -> Tensor:
    """Tokens that path k visits, in walking order; -1 is a zero token."""
    tokens = torch.arange(length, device=device) if paths is None else _row(paths, k)[_row(paths, k) >= -1].long()
    return tokens.flip(0) if reverse else tokens


def _read(x: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """x (B, L, ...) at the tokens, (B, P, ...); zero where the token is -1."""
    visited = (tokens >= 0).view(1, -1, *[1] * (x.dim() - 2))
    return x[:, tokens.clamp(min=0)].to(dtype) * visited


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    delta_softplus: bool,
    reverse: list[bool],
    window: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the definition.

    Returns:
        Output (B, L, D) in u's dtype, last states (B, K, D, N), and the states before every CHUNK steps
        (B, K, chunks, D, N), zero where a path has ended; these have no gradient.
    """
    dtype = accumulate_dtype(u)
    K, L, channels_per_group = A.shape[0], u.shape[2], A.shape[1] // B.shape[3]
    merged = torch.zeros(u.shape[0], L, A.shape[1], dtype=dtype, device=u.device)
    last_states = []
    room = room_for_states(path_length(u, paths), A.shape[2], window)
    states = torch.zeros(u.shape[0], K, room, *A.shape[1:], dtype=dtype, device=u.device)
    for k in range(K):
        tokens = _walk(paths, k, L, reverse[k], u.device)
        u_k = _read(u[:, min(k, u.shape[1] - 1)], tokens, dtype)  # (B, P, D)
        B_k = _read(B[:, k], tokens, dtype).repeat_interleave(channels_per_group, dim=2)  # (B, P, D, N)
        C_k = _read(C[:, k], tokens, dtype).repeat_interleave(channels_per_group, dim=2)  # (B, P, D, N)
        step = _read(delta[:, k], tokens, dtype)  # (B, P, D)
        if delta_bias is not None:
            step = step + delta_bias[k].to(dtype)
        if delta_softplus:
            step = F.softplus(step)

        A_k = A[k].to(dtype)
        h = torch.zeros_like(A_k).expand(u.shape[0], -1, -1)  # (B, D, N)
        if initial_state is not None:
            h = initial_state[:, k].to(dtype)
        outputs = []
        for t in range(len(tokens)):
            if t % CHUNK == 0:
                states[:, k, t // CHUNK] = h.detach()
            h = torch.exp(step[:, t, :, None] * A_k) * h + (step[:, t] * u_k[:, t])[..., None] * B_k[:, t]
            outputs.append((h * C_k[:, t]).sum(-1))
        future = torch.zeros_like(h)  # what later tokens of the window hand back
        for t in reversed(range(len(tokens))):
            if (t + 1) % window == 0:
                future = torch.zeros_like(h)
            received = torch.exp(step[:, t, :, None] * A_k) * future
            outputs[t] = outputs[t] + (received * C_k[:, t]).sum(-1)
            future = received + (step[:, t] * u_k[:, t])[..., None] * B_k[:, t]
        y = torch.stack(outputs, dim=1)  # (B, P, D)
        if D is not None:
            y = y + u_k * D[k].to(dtype)
        merged = merged.index_add(1, tokens.clamp(min=0), y * (tokens >= 0)[:, None])
        last_states.append(h)

    if z is not None:
        merged = merged * F.silu(z.to(dtype))
    return merged.to(u.dtype), torch.stack(last_states, dim=1), states


@without_autocast
def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    delta_softplus: bool,
    reverse: list[bool],
    window: int,
    complete: bool,
    partition: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward. The backward below recomputes from the start, but that of another backend may follow."""
    out, last_state, states = selective_scan_reference(
        u, delta, A, B, C, D, z, delta_bias, initial_state, paths, delta_softplus, reverse, window
    )
    last_state = last_state.transpose(2, 3).contiguous().transpose(2, 3)  # the op's memory layout
    return out, last_state, (states if save_states else states[:, :, :0]).transpose(3, 4).contiguous()


@without_autocast
def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    delta_softplus: bool,
    reverse: list[bool],
    window: int,
    complete: bool,
    partition: bool,
) -> list[Tensor]:
    """Gradients of the tensors given, in argument order, by the chain rule one step at a time."""
    dtype = accumulate_dtype(u)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    grads = [None if x is None else torch.zeros(x.shape, dtype=dtype, device=u.device) for x in inputs]
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = grads
    dy = grad_out.to(dtype)
    if z is not None:
        ungated, *_ = selective_scan_reference(
            *(u.to(dtype), delta, A, B, C, D, None, delta_bias, initial_state, paths, delta_softplus, reverse, window)
        )
        gate, z = torch.sigmoid(z.to(dtype)), z.to(dtype)
        dz += dy * ungated * gate * (1 + z * (1 - gate))
        dy = dy * z * gate

    L, groups = u.shape[2], B.shape[3]
    for k in range(A.shape[0]):
        tokens = _walk(paths, k, L, reverse[k], u.device)
        u_k, dy_k = _read(u[:, min(k, u.shape[1] - 1)], tokens, dtype), _read(dy, tokens, dtype)
        B_k = _read(B[:, k], tokens, dtype).repeat_interleave(A.shape[1] // groups, dim=2)
        C_k = _read(C[:, k], tokens, dtype).repeat_interleave(A.shape[1] // groups, dim=2)
        A_k = A[k].to(dtype)
        raw = _read(delta[:, k], tokens, dtype)
        raw = raw if delta_bias is None else raw + delta_bias[k].to(dtype)
        step = F.softplus(raw) if delta_softplus else raw

        h = torch.zeros(u.shape[0], *A_k.shape, dtype=dtype, device=u.device)
        before = [h if initial_state is None else initial_state[:, k].to(dtype)]  # the state before every step
        for t in range(len(tokens)):
            before.append(torch.exp(step[:, t, :, None] * A_k) * before[-1] + (step * u_k)[:, t, :, None] * B_k[:, t])

        future, received = torch.zeros_like(h), [h] * len(tokens)  # what every step gets from later ones of its window
        for t in reversed(range(len(tokens))):
            if (t + 1) % window == 0:
                future = torch.zeros_like(h)
            received[t] = torch.exp(step[:, t, :, None] * A_k) * future
            future = received[t] + (step * u_k)[:, t, :, None] * B_k[:, t]
        handed, from_window = torch.zeros_like(h), []  # gradient that a step's input gets from earlier ones
        for t in range(len(tokens)):
            if t % window == 0:
                handed = torch.zeros_like(h)
            from_window.append(handed)
            handed = torch.exp(step[:, t, :, None] * A_k) * (C_k[:, t] * dy_k[:, t, :, None] + handed)

        g = torch.zeros_like(h) if grad_last_state is None else grad_last_state[:, k].to(dtype)
        for t in reversed(range(len(tokens))):
            g = g + C_k[:, t] * dy_k[:, t, :, None]  # gradient of the state after step t, (B, D, N)
            decay = torch.exp(step[:, t, :, None] * A_k)
            dinput = g + from_window[t]
            w = g * decay * before[t] + (C_k[:, t] * dy_k[:, t, :, None] + from_window[t]) * received[t]
            dstep = u_k[:, t] * (dinput * B_k[:, t]).sum(-1) + (A_k * w).sum(-1)
            if delta_softplus:
                dstep = dstep * torch.where(raw[:, t] > 20, 1.0, torch.sigmoid(raw[:, t]))
            dA[k] += (step[:, t, :, None] * w).sum(0)
            if dbias is not None:
                dbias[k] += dstep.sum(0)
            if dD is not None:
                dD[k] += (dy_k[:, t] * u_k[:, t]).sum(0)
            token = int(tokens[t])
            if token >= 0:
                skip = 0 if D is None else D[k].to(dtype) * dy_k[:, t]
                du[:, min(k, u.shape[1] - 1), token] += step[:, t] * (dinput * B_k[:, t]).sum(-1) + skip
                ddelta[:, k, token] += dstep
                dB[:, k, token] += (dinput * (step * u_k)[:, t, :, None]).unflatten(1, (groups, -1)).sum(2)
                seen = before[t + 1] + received[t]
                dC[:, k, token] += (seen * dy_k[:, t, :, None]).unflatten(1, (groups, -1)).sum(2)
            g = g * decay
        if dinitial is not None:
            dinitial[:, k] = g
    return [grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True) if x is not None]
