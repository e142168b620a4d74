"""SSD in chunked tensor form: the fast path on CPUs, and correct on every device.

A path is cut into chunks of ``CHUNK`` tokens by their places in it, whichever way it is walked, so nothing is flipped:
a reversed path takes its chunks from the last to the first and sees the other triangle of every (Q, Q) tile. All work
is batched matrix products per chunk, small enough for the cache. The backward is written out; it computes the states
between chunks again and walks the chunks in the opposite order.

Letters besides those of the op: Q tokens of a chunk, R heads of a group; t is the token that reads, s the one read.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, without_autocast
from zoo.kernels.ssd.op import CHUNK

__all__ = ["backward", "forward"]


class _Path:
    """The tokens of one path, cut into chunks."""

    def __init__(self, table: Tensor | None, length: int, reverse: bool) -> None:
        self.tokens = None if table is None else table[table >= -1].long()
        self.length = length if table is None else len(self.tokens)
        self.reverse = reverse
        self.visits = None  # 0 where a zero token is stepped, 1 elsewhere
        if table is not None and bool((self.tokens < 0).any()):
            self.visits = self.tokens >= 0
            self.tokens = self.tokens.clamp(min=0)

    def chunks(self, backwards: bool = False) -> Iterator[slice]:
        """Places of every chunk, in walking order or against it."""
        starts = range(0, self.length, CHUNK)
        for start in reversed(starts) if backwards != self.reverse else starts:
            yield slice(start, min(start + CHUNK, self.length))

    def read(self, x: Tensor, places: slice, dtype: torch.dtype) -> Tensor:
        """x (B, L, ...) at these places, (B, Q, ...); zero tokens read as zero."""
        if self.tokens is None:
            return x[:, places].to(dtype)
        rows = x.index_select(1, self.tokens[places]).to(dtype)
        return rows if self.visits is None else rows * self._visited(rows, places)

    def add(self, y: Tensor, rows: Tensor, places: slice, first: bool = False) -> None:
        """Adds rows (B, Q, ...) to y (B, L, ...) at these places; rows of zero tokens are dropped.

        The ``first`` path writes instead of adding unless it has a table, which need not visit every token.
        """
        if self.tokens is None:
            if first:
                y[:, places] = rows
            else:
                y[:, places] += rows
            return
        rows = rows if self.visits is None else rows * self._visited(rows, places)
        y.index_add_(1, self.tokens[places], rows)

    def _visited(self, rows: Tensor, places: slice) -> Tensor:
        return self.visits[places].view(1, -1, *[1] * (rows.dim() - 2))

    def cumsum(self, x: Tensor) -> Tensor:
        """Sum over this and all earlier steps, along the last dimension."""
        return x.flip(-1).cumsum(-1).flip(-1) if self.reverse else x.cumsum(-1)

    def cumsum_back(self, x: Tensor) -> Tensor:
        """Sum over this and all later steps, along the last dimension."""
        return x.cumsum(-1) if self.reverse else x.flip(-1).cumsum(-1).flip(-1)


class _Chunk:
    """Inputs of one path in one chunk, and the decays between its steps."""

    def __init__(self, path, places, x, dt, A, B, C, dt_bias, dt_softplus, dtype) -> None:
        groups = B.shape[2]
        self.x = _by_group(path.read(x, places, dtype), groups)  # (B, G, R, Q, P)
        self.B = path.read(B, places, dtype).transpose(1, 2)  # (B, G, Q, N)
        self.C = path.read(C, places, dtype).transpose(1, 2)  # (B, G, Q, N)
        raw = path.read(dt, places, dtype)
        raw = raw if dt_bias is None else raw + dt_bias  # (B, Q, H)
        self.raw = raw.transpose(1, 2).unflatten(1, (groups, -1))  # (B, G, R, Q)
        if A is None:
            self.step, log_decay = torch.ones_like(self.raw), self.raw
        else:
            self.step = F.softplus(self.raw) if dt_softplus else self.raw
            log_decay = self.step * A.view(groups, -1, 1)
        total = path.cumsum(log_decay)  # (B, G, R, Q), from the chunk's beginning
        end = total[..., :1] if path.reverse else total[..., -1:]
        self.from_start = total.exp()  # (B, G, R, Q)
        self.to_end = (end - total).exp()  # (B, G, R, Q)
        self.whole = end.exp().unsqueeze(-1)  # (B, G, R, 1, 1)
        unseen = x.new_full((total.shape[-1], total.shape[-1]), -torch.inf, dtype=dtype)
        unseen = unseen.tril_(-1) if path.reverse else unseen.triu_(1)
        self.between = (total.unsqueeze(-1) - total.unsqueeze(-2)).add_(unseen).exp_()  # (B, G, R, t, s)
        self.scores = (self.C @ self.B.transpose(2, 3)).unsqueeze(2)  # (B, G, 1, t, s)

    def output(self, h: Tensor) -> Tensor:
        """What the tokens read from each other and from the state h (B, G, R, P, N), (B, G, R, Q, P)."""
        weights = (self.between * self.scores).mul_(self.step.unsqueeze(-2))
        return (weights @ self.x).addcmul_(self.from_start.unsqueeze(-1), _read_states(self.C, h))

    def next_state(self, h: Tensor) -> Tensor:
        """State after the chunk from the state before it, (B, G, R, P, N)."""
        return (self.whole * h).add_(_outer(self.x, self.step * self.to_end, self.B))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, Q, H, P) as (B, G, R, Q, P)."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _tokens_first(x: Tensor) -> Tensor:
    """(B, G, R, Q, ...) as (B, Q, H, ...)."""
    return x.movedim(3, 1).flatten(2, 3)


def _read_states(x: Tensor, h: Tensor) -> Tensor:
    """Sum over n of x (B, G, Q, N) times h (B, G, R, P, N): (B, G, R, Q, P). One product for all heads of a group."""
    product = x @ h.flatten(2, 3).transpose(2, 3)  # (B, G, Q, R * P)
    return product.unflatten(3, h.shape[2:4]).transpose(2, 3)


def _outer(x: Tensor, weights: Tensor, B: Tensor) -> Tensor:
    """Sum over tokens of weights (B, G, R, Q) times x (B, G, R, Q, P) times B (B, G, Q, N): (B, G, R, P, N)."""
    weighted = (x * weights.unsqueeze(-1)).transpose(3, 4).flatten(2, 3)  # (B, G, R * P, Q)
    return (weighted @ B).unflatten(2, (x.shape[2], x.shape[4]))


def _project(x: Tensor, weights: Tensor, h: Tensor) -> Tensor:
    """Sum over heads and p of weights (B, G, R, Q) times x (B, G, R, Q, P) times h (B, G, R, P, N): (B, G, Q, N)."""
    weighted = (x * weights.unsqueeze(-1)).transpose(2, 3).flatten(3, 4)  # (B, G, Q, R * P)
    return weighted @ h.flatten(2, 3)


def _start(state: Tensor | None, k: int, like: Tensor, N: int, groups: int, dtype: torch.dtype) -> Tensor:
    """State of path k, (B, G, R, P, N); zeros if none was given."""
    if state is None:
        state = like.new_zeros(like.shape[0], *like.shape[3:], N, dtype=dtype)
    else:
        state = state[:, k].to(dtype)
    return state.unflatten(1, (groups, -1))


def _of_path(x: Tensor | None, k: int, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x[k].to(dtype)


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
    dtype = accumulate_dtype(x)
    batch, shared, L, heads, width = x.shape
    groups, N = B.shape[3:]
    new = torch.empty if paths is None else torch.zeros
    merged = new(batch, L, heads, width, dtype=dtype, device=x.device)
    last_states = []
    for k in range(dt.shape[1]):
        path = _Path(None if paths is None else paths[k], L, reverse[k])
        A_k, D_k, bias_k = (_of_path(t, k, dtype) for t in (A, D, dt_bias))
        h = _start(initial_state, k, x, N, groups, dtype)
        for places in path.chunks():
            chunk = _Chunk(
                path, places, x[:, min(k, shared - 1)], dt[:, k], A_k, B[:, k], C[:, k], bias_k, dt_softplus, dtype
            )
            y = chunk.output(h)
            if D_k is not None:
                y.addcmul_(chunk.x, D_k.view(groups, -1, 1, 1))
            path.add(merged, _tokens_first(y), places, k == 0)
            h = chunk.next_state(h)
        last_states.append(h.flatten(1, 2))
    return merged.to(x.dtype), torch.stack(last_states, dim=1)


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

    The log decay of step i weighs everything that an output at or after i read from before i. Within a chunk these are
    the pairs (t, s) with s < i <= t, summed as row sums minus column sums over the steps from i on: both sums are over
    the same numbers, so what cancels does so to float32 rounding.
    """
    dtype = accumulate_dtype(x)
    shared, L = x.shape[1:3]
    groups, N = B.shape[3:]
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    new = torch.empty if paths is None else torch.zeros
    dx, ddt, dB, dC = (new(t.shape, dtype=dtype, device=x.device) for t in (x, dt, B, C))
    dA, dD, dbias, dinitial = (
        None if t is None else torch.zeros_like(t, dtype=dtype) for t in (A, D, dt_bias, initial_state)
    )

    for k in range(dt.shape[1]):
        path = _Path(None if paths is None else paths[k], L, reverse[k])
        A_k, D_k, bias_k = (_of_path(t, k, dtype) for t in (A, D, dt_bias))
        args = (x[:, min(k, shared - 1)], dt[:, k], A_k, B[:, k], C[:, k], bias_k, dt_softplus, dtype)
        before = [_start(initial_state, k, x, N, groups, dtype)]  # the state before every chunk, (B, G, R, P, N)
        for places in path.chunks():
            before.append(_Chunk(path, places, *args).next_state(before[-1]))
        before.pop()
        g = _start(grad_last_state, k, x, N, groups, dtype)  # gradient of the state after the chunk
        for places in path.chunks(backwards=True):
            chunk, h = _Chunk(path, places, *args), before.pop()
            dy = _by_group(path.read(grad_out, places, dtype), groups)  # (B, G, R, Q, P)

            pairs = (dy @ chunk.x.transpose(3, 4)).mul_(chunk.between)  # (B, G, R, t, s)
            dscores = (pairs * chunk.step.unsqueeze(-2)).sum(2)  # (B, G, t, s)
            pairs.mul_(chunk.scores)
            column = pairs.sum(-2)  # (B, G, R, Q)
            straddling = pairs.mul_(chunk.step.unsqueeze(-2)).sum(-1) - column * chunk.step
            dC_k = dscores @ chunk.B + _project(dy, chunk.from_start, h)
            dB_k = dscores.transpose(2, 3) @ chunk.C + _project(chunk.x, chunk.step * chunk.to_end, g)

            from_h = (_read_states(chunk.C, h) * dy).sum(-1) * chunk.from_start  # (B, G, R, Q)
            gB = _read_states(chunk.B, g).mul(chunk.to_end.unsqueeze(-1))  # (B, G, R, Q, P)
            to_g = (gB * chunk.x).sum(-1)  # (B, G, R, Q)
            dlog = path.cumsum_back(straddling + from_h)
            dlog += path.cumsum(to_g * chunk.step) - to_g * chunk.step
            dlog += (chunk.whole * g * h).sum((3, 4)).unsqueeze(-1)

            dx_k = ((chunk.between * chunk.scores).transpose(3, 4) @ dy + gB).mul_(chunk.step.unsqueeze(-1))
            if D_k is not None:
                dx_k.addcmul_(dy, D_k.view(groups, -1, 1, 1))
                dD[k] += (dy * chunk.x).sum((0, 3, 4)).flatten()
            draw = dlog
            if A_k is not None:
                dA[k] += (dlog * chunk.step).sum((0, 3)).flatten()
                draw = dlog * A_k.view(groups, -1, 1) + column + to_g
                if dt_softplus:
                    draw = draw * torch.where(chunk.raw > 20, 1.0, torch.sigmoid(chunk.raw))
            if dbias is not None:
                dbias[k] += draw.sum((0, 3)).flatten()
            path.add(dx[:, min(k, shared - 1)], _tokens_first(dx_k), places, k == 0 or shared > 1)
            path.add(ddt[:, k], _tokens_first(draw), places, True)
            path.add(dB[:, k], dB_k.transpose(1, 2), places, True)
            path.add(dC[:, k], dC_k.transpose(1, 2), places, True)
            g = (chunk.whole * g).add_(_outer(dy, chunk.from_start, chunk.C))
        if dinitial is not None:
            dinitial[:, k] = g.flatten(1, 2)
    grads = (dx, ddt, dA, dB, dC, dD, dbias, dinitial)
    return [grad.to(t.dtype) for grad, t in zip(grads, inputs, strict=True) if t is not None]
