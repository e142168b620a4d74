"""Selective scan in vectorised torch code, correct on every device; the fast path where no compiled loops run.

A path is cut into chunks of ``CHUNK`` steps whose (step, B, N, D) buffers stay in the cache. Inside a chunk everything
but the recurrence itself is one torch call for all steps; the recurrence is one fused multiply-add per step on a
(B, N, D) slice. N comes before D so that the vector units always run along contiguous channels. The backward walks
the chunks from the last to the first, recomputes their states from the saved boundary state and never holds more
than one chunk of them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, path_length, without_autocast
from zoo.kernels.selective_scan.op import CHUNK, num_chunks, room_for_states

__all__ = ["backward", "forward"]


class _Walk:
    """The tokens one path visits, in walking order, cut into chunks."""

    def __init__(self, tokens: Tensor | None, length: int, reverse: bool, device: torch.device) -> None:
        if tokens is not None:
            tokens = tokens[tokens >= -1].long()
            tokens = tokens[torch.arange(len(tokens) - 1, -1, -1, device=device)] if reverse else tokens
        elif reverse:
            tokens = torch.arange(length - 1, -1, -1, device=device)
        self.tokens = tokens
        self.length = length if tokens is None else len(tokens)
        self.visits = None  # 0 where a zero token is stepped, 1 elsewhere
        if tokens is not None and bool((tokens < 0).any()):
            self.visits = tokens >= 0
            self.tokens = tokens.clamp(min=0)

    def chunks(self, backwards: bool = False) -> Iterator[tuple[int, slice]]:
        """Yields (chunk number, steps of the chunk)."""
        numbers = range(num_chunks(self.length))
        for number in reversed(numbers) if backwards else numbers:
            yield number, slice(number * CHUNK, min((number + 1) * CHUNK, self.length))

    def read(self, x: Tensor, steps: slice, dtype: torch.dtype) -> Tensor:
        """x (B, L, ...) at these steps, (steps, B, ...); zero tokens read as zero."""
        if self.tokens is None:
            return x[:, steps].transpose(0, 1).to(dtype)
        rows = x.index_select(1, self.tokens[steps]).transpose(0, 1).to(dtype)
        if self.visits is None:
            return rows
        return rows * self.visits[steps].view(-1, *[1] * (rows.dim() - 1))

    def add(self, y: Tensor, rows: Tensor, steps: slice) -> None:
        """Adds rows (steps, B, ...) to y (B, L, ...) at these steps; rows of zero tokens are dropped."""
        if self.tokens is None:
            y[:, steps] += rows.transpose(0, 1)
            return
        if self.visits is not None:
            rows = rows * self.visits[steps].view(-1, *[1] * (rows.dim() - 1))
        y.index_add_(1, self.tokens[steps], rows.transpose(0, 1))


class _Chunk:
    """Inputs of one path at the steps of one chunk and its states h_0 .. h_c, all (c, B, ...)."""

    def __init__(self, walk, steps, u, delta, A, B, C, delta_bias, delta_softplus, h, window, buffers, decays) -> None:
        dtype = h.dtype
        self.u = walk.read(u, steps, dtype)  # (c, B, D)
        self.B = walk.read(B, steps, dtype)  # (c, B, G, N)
        self.C = walk.read(C, steps, dtype)  # (c, B, G, N)
        raw = walk.read(delta, steps, dtype)
        self.raw = raw if delta_bias is None else raw + delta_bias  # (c, B, D)
        self.step = _softplus(self.raw) if delta_softplus else self.raw
        self.input = self.step * self.u  # (c, B, D)

        count, groups = self.u.shape[0], self.B.shape[2]
        self.decay = torch.mul(self.step.unsqueeze(2), A, out=decays[:count]).exp_()  # (c, B, N, D)
        self.states = buffers[: count + 1]  # (c + 1, B, N, D), the state before every step and after the last
        self.states[0] = h
        torch.mul(
            _by_group(self.input.unsqueeze(2), groups),
            _as_states(self.B),
            out=_by_group(self.states[1:], groups),
        )
        self.received = self._from_later_steps(window) if window > 1 else None  # (c, B, N, D)
        for t in range(count):
            self.states[t + 1].addcmul_(self.decay[t], self.states[t])

    def _from_later_steps(self, window: int) -> Tensor:
        """What every step receives from the later ones of its window; the states still hold the steps' inputs."""
        inputs = self.states[1:]
        received = torch.zeros_like(inputs)
        for t in range(len(inputs) - 2, -1, -1):
            if (t + 1) % window:
                torch.add(inputs[t + 1], received[t + 1], out=received[t]).mul_(self.decay[t])
        return received

    @property
    def seen(self) -> Tensor:
        """What C reads, (c, B, N, D)."""
        return self.states[1:] if self.received is None else self.states[1:] + self.received

    def output(self, D: Tensor | None) -> Tensor:
        """C h + D u, (c, B, D)."""
        y = _contract_states(self.C, self.seen)
        return y if D is None else y.addcmul_(self.u, D)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to rounding, three times as fast as torch's, whose log1p is not vectorised.

    log(1 + e) is log(w) e / (w - 1) with w = 1 + e rounded: the error of w cancels (Higham, Accuracy and Stability of
    Numerical Algorithms, section 1.14.1).
    """
    e = x.abs().neg_().exp_()
    w = e + 1
    rounded = w - 1
    tail = torch.where(rounded > 0, w.log_().mul_(e).div_(rounded), e)
    return tail.add_(x.clamp(min=0))


def _to_later_steps(g: Tensor, decay: Tensor, window: int) -> Tensor:
    """Gradient that every step's input gets from the earlier outputs of its window, (c, B, N, D).

    Args:
        g: C dy of every step, (c, B, N, D).
        decay: Decay of every step, (c, B, N, D).
        window: Steps of a window.
    """
    handed = torch.zeros_like(g)
    for t in range(1, len(g)):
        if t % window:
            torch.add(g[t - 1], handed[t - 1], out=handed[t]).mul_(decay[t - 1])
    return handed


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(..., D) viewed as (..., G, D / G)."""
    return x.unflatten(-1, (groups, -1))


def _as_states(x: Tensor) -> Tensor:
    """B or C (c, B, G, N) shaped to broadcast over states (c, B, N, G, D / G)."""
    return x.transpose(2, 3).unsqueeze(-1)


def _contract_states(x: Tensor, states: Tensor) -> Tensor:
    """Sum over n of x (c, B, G, N) times states (c, B, N, D): (c, B, D)."""
    by_group = _by_group(states, x.shape[2]).transpose(2, 3)  # (c, B, G, N, D / G)
    return (x.unsqueeze(3) @ by_group).flatten(2)


def _contract_channels(states: Tensor, x: Tensor, groups: int) -> Tensor:
    """Sum over the channels of a group of states (c, B, N, D) times x (c, B, D): (c, B, G, N)."""
    by_group = _by_group(states, groups).transpose(2, 3)  # (c, B, G, N, D / G)
    return (by_group @ _by_group(x, groups).unsqueeze(-1)).squeeze(-1)


def _of_path(x: Tensor | None, k: int, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x[k].to(dtype)


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
    """Output (B, L, D), last state (B, K, D, N) and chunk-boundary states (B, K, chunks, N, D)."""
    dtype = accumulate_dtype(u)
    batch, shared, L, channels = u.shape
    K, _, N = A.shape
    chunks = room_for_states(path_length(u, paths), N, window) if save_states else 0
    merged = u.new_zeros(batch, L, channels, dtype=dtype)
    last_state = u.new_empty(batch, K, N, channels, dtype=dtype)
    states = u.new_zeros(batch, K, chunks, N, channels, dtype=dtype)
    buffers = u.new_empty(CHUNK + 1, batch, N, channels, dtype=dtype)
    decays = u.new_empty(CHUNK, batch, N, channels, dtype=dtype)

    for k in range(K):
        walk = _Walk(None if paths is None else paths[k % len(paths)], L, reverse[k], u.device)
        A_k = A[k].to(dtype).t().contiguous()  # (N, D)
        D_k, bias_k = _of_path(D, k, dtype), _of_path(delta_bias, k, dtype)
        h = u.new_zeros(batch, N, channels, dtype=dtype)
        if initial_state is not None:
            h.copy_(initial_state[:, k].transpose(1, 2))
        for number, steps in walk.chunks():
            if save_states:
                states[:, k, number] = h
            chunk = _Chunk(
                walk, steps, u[:, min(k, shared - 1)], delta[:, k], A_k, B[:, k], C[:, k],
                bias_k, delta_softplus, h, window, buffers, decays,
            )  # fmt: skip
            walk.add(merged, chunk.output(D_k), steps)
            h.copy_(chunk.states[-1])
        last_state[:, k] = h

    if z is not None:
        merged *= F.silu(z.to(dtype))
    return merged.to(u.dtype), last_state.transpose(2, 3), states


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
    """Gradients of the tensors given, in argument order.

    With g_t the gradient of state h_t: g_t = C_t dy_t + exp(step_{t+1} A) g_{t+1}; everything else follows from g, from
    the recomputed states and from w_t = g_t exp(step_t A) h_{t-1}.
    """
    dtype = accumulate_dtype(u)
    batch, shared, L, channels = u.shape
    K, _, N = A.shape
    groups = B.shape[3]
    gate = None if z is None else torch.sigmoid(z.to(dtype))
    dy = grad_out.to(dtype) if z is None else grad_out.to(dtype) * z.to(dtype) * gate
    merged = None if z is None else u.new_zeros(batch, L, channels, dtype=dtype)

    du, ddelta, dA, dB, dC = (torch.zeros(x.shape, dtype=dtype, device=u.device) for x in (u, delta, A, B, C))
    dD = None if D is None else torch.zeros_like(D, dtype=dtype)
    dbias = None if delta_bias is None else torch.zeros_like(delta_bias, dtype=dtype)
    dinitial = None if initial_state is None else torch.zeros_like(initial_state, dtype=dtype)
    buffers = u.new_empty(CHUNK + 1, batch, N, channels, dtype=dtype)
    decays = u.new_empty(CHUNK, batch, N, channels, dtype=dtype)
    grads = u.new_empty(CHUNK, batch, N, channels, dtype=dtype)

    for k in range(K):
        walk = _Walk(None if paths is None else paths[k % len(paths)], L, reverse[k], u.device)
        A_k = A[k].to(dtype).t().contiguous()  # (N, D)
        D_k, bias_k = _of_path(D, k, dtype), _of_path(delta_bias, k, dtype)
        from_future = u.new_zeros(batch, N, channels, dtype=dtype)  # gradient that reaches a chunk's last state
        if grad_last_state is not None:
            from_future.copy_(grad_last_state[:, k].transpose(1, 2))
        for number, steps in walk.chunks(backwards=True):
            chunk = _Chunk(
                walk, steps, u[:, min(k, shared - 1)], delta[:, k], A_k, B[:, k], C[:, k],
                bias_k, delta_softplus, states[:, k, number], window, buffers, decays,
            )  # fmt: skip
            count = chunk.u.shape[0]
            dy_k = walk.read(dy, steps, dtype)  # (c, B, D)
            if merged is not None:
                walk.add(merged, chunk.output(D_k), steps)

            g = grads[:count]  # (c, B, N, D)
            torch.mul(_by_group(dy_k.unsqueeze(2), groups), _as_states(chunk.C), out=_by_group(g, groups))
            handed = None if window == 1 else _to_later_steps(g, chunk.decay, window)  # (c, B, N, D)
            w_window = None if window == 1 else (g + handed).mul_(chunk.received)
            g[-1] += from_future
            for t in range(count - 2, -1, -1):
                g[t].addcmul_(chunk.decay[t + 1], g[t + 1])
            torch.mul(chunk.decay[0], g[0], out=from_future)

            dinput = g if window == 1 else g + handed  # (c, B, N, D)
            gB = _contract_states(chunk.B, dinput)  # (c, B, D)
            walk.add(dC[:, k], _contract_channels(chunk.seen, dy_k, groups), steps)
            walk.add(dB[:, k], _contract_channels(dinput, chunk.input, groups), steps)
            du_k = gB * chunk.step
            if D_k is not None:
                du_k.addcmul_(dy_k, D_k)
                dD[k] += (dy_k * chunk.u).sum((0, 1))
            walk.add(du[:, min(k, shared - 1)], du_k, steps)

            w = g.mul_(chunk.decay).mul_(chunk.states[:count])  # (c, B, N, D)
            if w_window is not None:
                w += w_window
            dA[k] += torch.einsum("cbnd,cbd->dn", w, chunk.step)
            dstep = (w * A_k).sum(2).addcmul_(gB, chunk.u)
            if delta_softplus:
                dstep *= torch.where(chunk.raw > 20, 1.0, torch.sigmoid(chunk.raw))
            if dbias is not None:
                dbias[k] += dstep.sum((0, 1))
            walk.add(ddelta[:, k], dstep, steps)
        if dinitial is not None:
            dinitial[:, k] = from_future.transpose(1, 2)

    dz = None
    if merged is not None:
        dz = grad_out.to(dtype) * merged * gate * (1 + z.to(dtype) * (1 - gate))
    given = zip(
        (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial),
        (u, delta, A, B, C, D, z, delta_bias, initial_state),
        strict=True,
    )
    return [grad.to(x.dtype) for grad, x in given if x is not None]
