"""SSD in chunked tensor form: the fast path on CPUs, and correct on every device.

Paths are cut into chunks, see :mod:`zoo.kernels.ssd.cpu_paths`; a reversed path sees the other triangle of every
(Q, Q) tile. The backward is written out; it computes the states between chunks again and walks the chunks in the
opposite order.

What costs time are batched matrix products, the memory around them, and the number of calls. So as many samples and
chunks are worked on at once as leave every tensor in the cache, in memory that is allocated once.

Letters besides those of the op: M chunks worked on at once, Q tokens of a chunk, R heads of a group; t is the token
that reads, s the one read.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype, without_autocast
from zoo.kernels.ssd.cpu_paths import CHUNK, Path, Run

__all__ = ["backward", "forward"]

CACHED = 1 << 18  # elements of a tensor that should stay in the cache
CACHED_STATES = 1 << 18  # elements of the states before a chunk that should
LOG2_E = 1 / math.log(2)


class _Decays:
    """Step sizes of one path, and decays within its chunks.

    Attributes:
        steps: By place, (6, chunks, B, G, R, CHUNK): dt with its bias; the step; the sum of the log decays from the
            chunk's middle, where rounding does least, to base 2 (torch's exp, unlike its exp2, is slow where it
            underflows); the decays from the chunk's beginning and to its end; what is left of x there, which is step
            times decay.
        whole: Decays of the chunks, (chunks, B, G, R, 1, 1).
        unseen: Added to log decays from s to t, (t, s): minus infinity where t does not see s.
    """

    def __init__(self, path: Path, dt: Tensor, A: Tensor | None, bias: Tensor | None, softplus: bool) -> None:
        dt = dt if bias is None else dt + bias.squeeze(-1)  # (B, length, G, R)
        raw = self._by_chunk(dt, path)
        step = self._by_chunk(F.softplus(dt), path) if softplus else raw
        logs = raw if A is None else step * A
        step = torch.ones_like(raw) if A is None else step
        wide = torch.float32 if raw.device.type == "mps" else torch.float64  # MPS has no float64
        total = path.cumsum(logs.to(wide) * LOG2_E)
        end = total[..., :1] if path.reverse else total[..., -1:]
        sums = torch.stack([total - total[..., CHUNK // 2, None], total, end - total]).to(raw.dtype)
        decays = sums[1:].exp2_()
        self.steps = torch.stack([raw, step, *sums, step * decays[1]])
        self.whole = end.to(raw.dtype).exp2_().unsqueeze(-1)
        unseen = raw.new_full((CHUNK, CHUNK), -torch.inf)
        self.unseen = unseen.tril_(-1) if path.reverse else unseen.triu_(1)

    @staticmethod
    def _by_chunk(x: Tensor, path: Path) -> Tensor:
        """x (B, length, G, R) as (chunks, B, G, R, CHUNK); the last chunk ends in steps that change nothing."""
        x = F.pad(x, (0, 0, 0, 0, 0, path.chunks * CHUNK - path.length))
        return x.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 4, 2).contiguous()


class _Buffers:
    """Memory for the tensors of a run by name, allocated once: fresh pages would cost more than what fills them."""

    def __init__(self, x: Tensor) -> None:
        self._like, self._dtype = x, accumulate_dtype(x)
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Memory of this name, with what is in it, as a tensor of this shape."""
        size = math.prod(shape)
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = self._like.new_empty(size, dtype=self._dtype)
        return self._memory[name][:size].view(shape)


class _Chunks:
    """Inputs of one path in one run of chunks."""

    def __init__(self, path: Path, run: Run, decays: _Decays, x: Tensor, B: Tensor, C: Tensor, buffers: _Buffers):
        self.path, self.buffers = path, buffers
        dtype = decays.steps.dtype
        self.x = _heads_first(path.read(x, run, dtype))  # (M, B, G, R, Q, P)
        self.B, self.C = (path.read(t, run, dtype).transpose(2, 3).contiguous() for t in (B, C))  # (M, B, G, Q, N)
        steps = decays.steps[1:, run.numbers, ..., : run.size]
        self.step, self.total, self.from_start, self.to_end, self.left = steps.unbind()  # (M, B, G, R, Q)
        self.whole = decays.whole[run.numbers]  # (M, B, G, R, 1, 1)
        self.unseen = decays.unseen[: run.size, : run.size]

    def tiles(self) -> tuple[Tensor, Tensor]:
        """Decays (M, B, G, R, t, s) from s to t, 0 unless t sees s, and C B^T (M, B, G, 1, t, s)."""
        between = self.buffers("between", *self.total.shape, len(self.unseen))
        torch.sub(self.total.unsqueeze(-1), self.total.unsqueeze(-2), out=between).add_(self.unseen).exp2_()
        scores = self.buffers("scores", *self.C.shape[:-1], len(self.unseen))
        return between, _product(self.C, self.B.transpose(3, 4), scores).unsqueeze(3)

    def scaled(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (M, B, G, R, Q, P) times weights (M, B, G, R, Q) as (M, B, G, Q, R * P), for products over heads."""
        M, B, G, R, Q, P = x.shape
        scaled = self.buffers("rows", M, B, G, Q, R, P)
        return torch.mul(x.transpose(3, 4), weights.transpose(3, 4).unsqueeze(-1), out=scaled).flatten(4)

    def read_states(self, x: Tensor, h: Tensor) -> Tensor:
        """Sum over n of x (M, B, G, Q, N) times h (M, B, G, R, P, N): (M, B, G, R, Q, P)."""
        columns = h.flatten(3, 4).transpose(3, 4)  # (M, B, G, N, R * P): one product for all heads
        rows = _product(x, columns, self.buffers("rows", *x.shape[:4], columns.shape[4]))
        return rows.unflatten(4, h.shape[3:5]).transpose(3, 4)

    def walk(self, states: Tensor) -> None:
        """Fills in the states between chunks (M + 1, B, G, R, P, N) from the one before the first that is walked."""
        self._walk(states, self.x, self.left, self.B, backwards=False)

    def walk_back(self, g: Tensor, dy: Tensor) -> None:
        """Fills in the gradients of these states from that after the last, and of the output (M, B, G, R, Q, P)."""
        self._walk(g, dy, self.from_start, self.C, backwards=True)

    def _walk(self, states: Tensor, x: Tensor, weights: Tensor, y: Tensor, backwards: bool) -> None:
        """Every chunk decays the state and adds the sum over its tokens of x, weighted, times y (M, B, G, Q, N)."""
        M, B, G, R, Q, P = x.shape
        columns = states.flatten(1, 2).flatten(2, 3).unbind()  # (B * G, R * P, N)
        rows = self.buffers("rows", B, G, Q, R, P)  # of one chunk after another
        flat, by_head = rows.flatten(0, 1).flatten(2).transpose(1, 2), rows.transpose(2, 3)
        x, weights, y = x.unbind(), weights.unsqueeze(-1).unbind(), y.flatten(1, 2).unbind()
        states, whole = states.unbind(), self.whole.unbind()
        for m in self.path.order(M, backwards):
            before, after = (m, m + 1) if backwards == self.path.reverse else (m + 1, m)
            torch.mul(x[m], weights[m], out=by_head)
            torch.mul(states[before], whole[m], out=states[after])
            columns[after].baddbmm_(flat, y[m])

    def output(self, h: Tensor, D: Tensor | None, out: Tensor) -> None:
        """Walks the chunks with the state h (B, G, R, P, N), in place, and writes their output (M, B, G, R, Q, P)."""
        between, scores = self.tiles()
        weights = between.mul_(scores).mul_(self.step.unsqueeze(-2))
        if D is not None:
            weights.diagonal(dim1=-2, dim2=-1).add_(D)
        x = self.buffers("x", *self.x.shape).copy_(self.x)
        inside = _product(weights, x, self.buffers("inside", *x.shape)).unbind()

        M, B, G, R, Q, P = x.shape
        columns = h.flatten(0, 1).flatten(1, 2)  # (B * G, R * P, N), one product for all heads
        rows = self.buffers("rows", B, G, Q, R, P)  # of one chunk after another
        flat, by_head = rows.flatten(0, 1).flatten(2), rows.transpose(2, 3)
        flat_T, columns_T = flat.transpose(1, 2), columns.transpose(1, 2)
        x, B_, C_ = self.x.unbind(), self.B.flatten(1, 2).unbind(), self.C.flatten(1, 2).unbind()
        from_start, left = (t.unsqueeze(-1).unbind() for t in (self.from_start, self.left))
        out, whole = out.unbind(), self.whole.unbind()
        for m in self.path.order(M):
            torch.bmm(C_[m], columns_T, out=flat)
            torch.addcmul(inside[m], from_start[m], by_head, out=out[m])
            torch.mul(x[m], left[m], out=by_head)
            h.mul_(whole[m])
            columns.baddbmm_(flat_T, B_[m])

    def gradients(self, dy: Tensor, before: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Gradients of the chunks' inputs.

        The log decay of step i weighs everything that an output at or after i read from before i. Within a chunk these
        are the pairs (t, s) with s < i <= t, summed as row sums minus column sums over the steps from i on: both sums
        are over the same numbers, so what cancels does so to float32 rounding.

        Args:
            dy: Gradient of the output, (M, B, G, R, Q, P).
            before: States before every chunk, (M, B, G, R, P, N).
            g: Gradient of the states after every chunk, of the same shape.

        Returns:
            Gradients of ``B`` and ``C`` (M, B, G, Q, N); of the steps' ``factor`` of x, and of their ``log`` decays,
            (M, B, G, R, Q); of the ``input`` that is x times step, (M, B, G, R, Q, P); of ``D``, (G, R).
        """
        x, dy = (self.buffers(name, *t.shape).copy_(t) for name, t in (("x", self.x), ("dy", dy)))
        steps = self.step.unsqueeze(-2)  # (M, B, G, R, 1, s)
        between, scores = self.tiles()
        tile = between.shape
        pairs = _product(dy, x.transpose(4, 5), self.buffers("pairs", *tile))  # (M, B, G, R, t, s)
        dD = pairs.diagonal(dim1=-2, dim2=-1).sum((0, 1, 4))
        dscores = torch.mul(pairs.mul_(between), steps, out=self.buffers("rows", *tile)).sum(3)  # (M, B, G, t, s)
        column = pairs.mul_(scores).sum(-2)  # (M, B, G, R, Q)
        straddling = pairs.mul_(steps).sum(-1).addcmul_(column, self.step, value=-1)

        by_state = *x.shape[:5], before.shape[5]
        from_states = _product(dy, before, self.buffers("by_state", *by_state)).mul_(self.from_start.unsqueeze(-1))
        dC = (dscores @ self.B).add_(from_states.sum(3))
        straddling += torch.mul(from_states, self.C.unsqueeze(3), out=self.buffers("rows", *by_state)).sum(-1)
        dB = dscores.transpose(3, 4) @ self.C
        dB += self.scaled(x, self.left) @ g.flatten(3, 4)

        dinput = self.read_states(self.B, g).mul_(self.to_end.unsqueeze(-1))  # so far what later chunks give
        given = torch.mul(dinput, x, out=self.buffers("inside", *x.shape)).sum(-1)
        inside = _product(between.mul_(scores).transpose(4, 5), dy, self.buffers("inside", *x.shape))
        entering = given * self.step
        dlog = self.path.cumsum_back(straddling).add_(self.path.cumsum(entering)).sub_(entering)
        in_states = torch.mul(g, before, out=self.buffers("states", *g.shape)).sum((4, 5)).unsqueeze(-1)
        dlog.addcmul_(in_states, self.whole.squeeze(-1))
        return dict(B=dB, C=dC, factor=given.add_(column), log=dlog, input=inside.add_(dinput), D=dD)


def _heads_first(x: Tensor) -> Tensor:
    """(M, B, Q, G, R, ...) as (M, B, G, R, Q, ...)."""
    return x.movedim(2, 4)


def _tokens_first(x: Tensor) -> Tensor:
    """(M, B, G, R, Q, ...) as (M, B, Q, G, R, ...)."""
    return x.movedim(4, 2)


def _product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x @ y where all dimensions but the last two are equal, written into out."""
    torch.bmm(x.flatten(0, -3), y.flatten(0, -3), out=out.flatten(0, -3))
    return out


class _Slice:
    """The op's arguments for some samples, heads by group, and how many chunks to work on at once."""

    def __init__(
        self, rows: slice, buffers: _Buffers, x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse
    ) -> None:
        self.buffers = buffers
        self.dtype = accumulate_dtype(x)
        self.groups = B.shape[3]
        self.x = x[rows].unflatten(3, (self.groups, -1))  # (B, 1 or K, L, G, R, P)
        self.dt = dt[rows].unflatten(3, (self.groups, -1))  # (B, K, L, G, R)
        self.B, self.C = B[rows], C[rows]
        self.A, self.D, self.dt_bias = A, D, dt_bias
        self.initial_state = None if initial_state is None else initial_state[rows]
        self.paths, self.dt_softplus, self.reverse = paths, dt_softplus, reverse
        batch, _, _, groups, heads, width = self.x.shape
        self.state_shape = batch, groups, heads, width, B.shape[4]
        self.at_once = max(1, CACHED // (batch * groups * heads * CHUNK * max(width, CHUNK)))

    def path(self, k: int) -> tuple[Path, _Decays]:
        """Path k and its decays."""
        path = Path(None if self.paths is None else self.paths[k], self.x.shape[2], self.reverse[k])
        A, bias = self.of_path(self.A, k), self.of_path(self.dt_bias, k)
        return path, _Decays(path, path.all_steps(self.dt[:, k].to(self.dtype)), A, bias, self.dt_softplus)

    def of_path(self, x: Tensor | None, k: int) -> Tensor | None:
        """A parameter (K, H) of path k, (G, R, 1)."""
        return None if x is None else x[k].to(self.dtype).view(self.groups, -1, 1)

    def chunks(self, k: int, path: Path, run: Run, decays: _Decays) -> _Chunks:
        """Inputs of path k in a run."""
        x = self.x[:, min(k, self.x.shape[1] - 1)]
        return _Chunks(path, run, decays, x, self.B[:, k], self.C[:, k], self.buffers)

    def start(self, state: Tensor | None, k: int) -> Tensor:
        """State (B, K, H, P, N) of path k, (B, G, R, P, N); zeros if none was given."""
        h = self.x.new_zeros(self.state_shape, dtype=self.dtype)
        return h if state is None else h.copy_(state[:, k].unflatten(1, self.state_shape[1:3]))

    def all_states(self, k: int, path: Path, decays: _Decays) -> Tensor:
        """States between all chunks of path k by place, (chunks + 1, B, G, R, P, N)."""
        states = self.buffers("all_states", path.chunks + 1, *self.state_shape)
        states[path.first_and_last()[0]] = self.start(self.initial_state, k)
        for run in path.runs(self.at_once):
            self.chunks(k, path, run, decays).walk(states[run.states])
        return states


def _slices(x: Tensor, N: int) -> Iterator[slice]:
    """Samples worked on at once: as many as leave their states, and all else of one chunk, in the cache."""
    batch, _, _, heads, width = x.shape
    at_once = max(1, CACHED_STATES // (heads * max(width, CHUNK) * max(N, CHUNK)))
    for first in range(0, batch, at_once):
        yield slice(first, first + at_once)


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
    args = (x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse)
    dtype = accumulate_dtype(x)
    batch, _, L, heads, width = x.shape
    new = torch.empty if paths is None else torch.zeros
    merged = new(batch, L, heads, width, dtype=dtype, device=x.device)
    last_states = x.new_empty(batch, dt.shape[1], heads, width, B.shape[4], dtype=dtype)
    buffers = _Buffers(x)
    for rows in _slices(x, B.shape[4]):
        _forward(_Slice(rows, buffers, *args), merged[rows], last_states[rows])
    return merged.to(x.dtype), last_states


def _forward(given: _Slice, merged: Tensor, last_states: Tensor) -> None:
    """Fills in the outputs (B, L, H, P) and last states (B, K, H, P, N) of some samples."""
    merged = merged.unflatten(2, given.state_shape[1:3])
    for k in range(given.dt.shape[1]):
        path, decays = given.path(k)
        D = given.of_path(given.D, k)
        h = given.start(given.initial_state, k)
        written = k == 0 and given.paths is None
        for run in path.runs(given.at_once):
            chunks = given.chunks(k, path, run, decays)
            y = _heads_first(path.view(merged, run)) if written else given.buffers("y", *chunks.x.shape)
            chunks.output(h, D, y)
            if not written:
                path.add(merged, _tokens_first(y), run)
        last_states[:, k] = h.flatten(1, 2)


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
    """Gradients of the tensors given, in argument order."""
    args = (x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse)
    dtype = accumulate_dtype(x)
    new = torch.empty if paths is None else torch.zeros
    by_sample = [new(t.shape, dtype=dtype, device=x.device) for t in (x, dt, B, C)]
    dx, ddt, dB, dC = by_sample
    dA, dD, dbias, dinitial = (
        None if t is None else torch.zeros_like(t, dtype=dtype) for t in (A, D, dt_bias, initial_state)
    )
    buffers = _Buffers(x)
    for rows in _slices(x, B.shape[4]):
        last = None if grad_last_state is None else grad_last_state[rows]
        grads = [t[rows] for t in by_sample] + [dA, dD, dbias, None if dinitial is None else dinitial[rows]]
        _backward(_Slice(rows, buffers, *args), grad_out[rows], last, *grads)
    grads = (dx, ddt, dA, dB, dC, dD, dbias, dinitial)
    return [grad.to(t.dtype) for grad, t in zip(grads, args[:8], strict=True) if t is not None]


def _backward(
    given: _Slice,
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    dx: Tensor,
    ddt: Tensor,
    dB: Tensor,
    dC: Tensor,
    dA: Tensor | None,
    dD: Tensor | None,
    dbias: Tensor | None,
    dinitial: Tensor | None,
) -> None:
    """Fills in the gradients of some samples, and adds to those of the parameters."""
    by_group = given.state_shape[1:3]
    grad_out, dx, ddt = grad_out.unflatten(2, by_group), dx.unflatten(3, by_group), ddt.unflatten(3, by_group)
    for k in range(ddt.shape[1]):
        path, decays = given.path(k)
        A, D = given.of_path(given.A, k), given.of_path(given.D, k)
        states = given.all_states(k, path, decays)
        dsteps = torch.zeros_like(decays.steps[:2])  # gradients of the log decays and of the steps as factors of x
        shared = min(k, dx.shape[1] - 1)
        written = k == shared and given.paths is None
        g = given.start(grad_last_state, k)
        for run in path.runs(given.at_once, backwards=True):
            chunks = given.chunks(k, path, run, decays)
            dy = _heads_first(path.read(grad_out, run, given.dtype))  # (M, B, G, R, Q, P)
            gs = given.buffers("gs", run.chunks + 1, *g.shape)
            first, last = path.first_and_last(backwards=True)
            gs[first] = g
            chunks.walk_back(gs, dy)
            g = gs[last]
            grads = chunks.gradients(dy, path.ends(states[run.states])[0], path.ends(gs)[1])
            dsteps[:, run.numbers, ..., : run.size] = torch.stack([grads["log"], grads["factor"]])
            dx_k = _heads_first(path.view(dx[:, shared], run)) if written else grads["input"]
            torch.mul(grads["input"], chunks.step.unsqueeze(-1), out=dx_k)
            if D is not None:
                dx_k.addcmul_(dy, D.unsqueeze(-1))
                dD[k] += grads["D"].flatten()
            if not written:
                path.add(dx[:, shared], _tokens_first(dx_k), run)
            path.add(dB[:, k], grads["B"].transpose(2, 3), run, True)
            path.add(dC[:, k], grads["C"].transpose(2, 3), run, True)

        draw, dfactor = dsteps
        if A is not None:
            dA[k] += (draw * decays.steps[1]).sum((0, 1, 4)).flatten()
            draw = dfactor.addcmul_(draw, A)
            if given.dt_softplus:
                draw *= torch.where(decays.steps[0] > 20, 1.0, torch.sigmoid(decays.steps[0]))
        if dbias is not None:
            dbias[k] += draw.sum((0, 1, 4)).flatten()
        path.add_all(ddt[:, k], draw.permute(1, 0, 4, 2, 3).flatten(1, 2)[:, : path.length])
        if dinitial is not None:
            dinitial[:, k] = g.flatten(1, 2)
