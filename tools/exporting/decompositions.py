"""The zoo's operators as plain torch operators around a few loops, for graphs that leave torch.

:data:`DECOMPOSITIONS` is a table for ``ExportedProgram.run_decompositions``. What remains of the zoo's operators is a
loop over steps that has no counterpart among torch's operators; each is a small operator of its own here (namespace
``zoo_export``), with an implementation in plain torch, so that a decomposed graph still runs and can be tested, and one
in ONNX in :mod:`zoo.tools.exporting.onnx_loops`.

The order in which a path visits tokens becomes a gather before the loop and, as a path visits a token at most once, a
gather after it. The loops themselves always run over all paths at once and in one direction.

Shapes: B batch, K paths, S steps of a path, L tokens, D channels in G groups of E = D / G, N states, n heads of c
channels, T cells of a window. States are (N, E) tiles, so that vector units run along channels. float32 only.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo.backbones  # noqa: F401  (registers the operators)

__all__ = ["DECOMPOSITIONS", "LOOKAHEAD", "RECURRENCE", "WINDOW_SCORES", "WINDOW_SUMS"]


@torch.library.custom_op("zoo_export::recurrence", mutates_args=())
def recurrence(
    steps: Tensor, received: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The states' walk from the first step to the last.

    Args:
        steps: Step sizes (S, K, B, G, 1, E).
        received: What enters the states, (S, K, B, G, 1, E).
        B: How it is spread over the states, (S, K, B, G, N, 1).
        C: How the states are read, (S, K, B, G, 1, N).
        A: Decay (K, 1, G, N or 1, E).
        state: States before the first step, (K, B, G, N, E).

    Returns:
        What was read (S, K, B, G, 1, E), and the last states.
    """
    outputs = []
    for step, value, spread, read in zip(steps, received, B, C, strict=True):
        state = torch.exp(step * A) * state + value * spread
        outputs.append(read @ state)
    return torch.stack(outputs), state.clone()


@recurrence.register_fake
def _(steps, received, B, C, A, state):
    return torch.empty_like(steps), torch.empty_like(state)


@torch.library.custom_op("zoo_export::lookahead", mutates_args=())
def lookahead(steps: Tensor, received: Tensor, B: Tensor, C: Tensor, keep: Tensor, A: Tensor, state: Tensor) -> Tensor:
    """What every step of a locally bidirectional scan gets from the later steps of its window, from the last backwards.

    Args:
        keep: 0 at the last step of a window and 1 elsewhere, (S, 1).
        state: Zeros, (K, B, G, N, E).

    The other arguments and the result are as in :func:`recurrence`.
    """
    outputs = []
    for t in reversed(range(len(steps))):
        state = torch.exp(steps[t] * A) * (state * keep[t])
        outputs.append(C[t] @ state)
        state = state + received[t] * B[t]
    return torch.stack(outputs[::-1])


@lookahead.register_fake
def _(steps, received, B, C, keep, A, state):
    return torch.empty_like(steps)


@torch.library.custom_op("zoo_export::window_scores", mutates_args=())
def window_scores(q: Tensor, k: Tensor, cells: Tensor) -> Tensor:
    """Products of every cell's query (B, L, n, c) with the keys (B, L, n, c) of its window ``cells`` (T, L).

    Returns:
        (T, B, L, n).
    """
    return torch.stack([(q * k[:, each]).sum(-1) for each in cells])


@window_scores.register_fake
def _(q, k, cells):
    return q.new_empty(cells.shape[0], *q.shape[:3])


@torch.library.custom_op("zoo_export::window_sums", mutates_args=())
def window_sums(maps: Tensor, values: Tensor, cells: Tensor) -> Tensor:
    """Sums of the values (B, L, n, c) of every cell's window ``cells`` (T, L), weighted by maps (T, B, L, n, 1)."""
    total = torch.zeros_like(values)
    for weight, each in zip(maps, cells, strict=True):
        total = total + weight * values[:, each]
    return total


@window_sums.register_fake
def _(maps, values, cells):
    return torch.empty_like(values)


class Walk:
    """The tokens that K paths visit, in walking order.

    Args:
        paths: Table (U, S), see :func:`~zoo.kernels.selective_scan`, or None for the tokens in order.
        reverse: A flag for every path.
        tokens: Number of tokens L.
        complete: Whether every row has all tokens and nothing else.
        packed: Whether entries that are no step are moved behind the others, where they do not count as steps.
        device: Device of the table.
    """

    def __init__(
        self, paths: Tensor | None, reverse: list[bool], tokens: int, complete: bool, packed: bool, device: torch.device
    ) -> None:
        self.K, self.L = len(reverse), tokens
        self.complete = complete or paths is None
        self.table = None  # (K, S)
        if paths is None and not any(reverse):
            return
        rows = torch.arange(tokens, device=device).unsqueeze(0) if paths is None else paths.long()
        rows = [rows[k % len(rows)] for k in range(self.K)]
        self.table = torch.stack([row.flip(0) if flag else row for row, flag in zip(rows, reverse, strict=True)])
        if packed and not self.complete:
            order = (self.table < -1).long().sort(dim=1, stable=True).indices
            self.table = self.table.gather(1, order)

    def read(self, x: Tensor) -> Tensor:
        """x (B, 1 or K, L, ...) at the steps, (S, 1 or K, B, ...); what lies at negative entries is not defined."""
        if self.table is None:
            return x.transpose(0, 2)
        rows = self.table.clamp(min=0) if not self.complete else self.table
        if x.shape[1] > 1:
            rows = rows + self.L * self._path_numbers()
        x = x.movedim(0, 2).flatten(0, 1)  # (K * L, B, ...)
        return x.index_select(0, rows.t().flatten()).unflatten(0, (-1, self.K))

    def mask(self, x: Tensor, lowest: int) -> Tensor:
        """Steps (S, K, B, ...), zero where the entry of the table is below ``lowest``."""
        if self.complete:
            return x
        kept = (self.table >= lowest).t().to(x.dtype)
        return x * kept.reshape(*kept.shape, *[1] * (x.dim() - 2))

    def merge(self, y: Tensor) -> Tensor:
        """Sums over the paths of what the steps (S, K, B, ...) put on every token, (B, L, ...)."""
        if self.table is None:
            return y.sum(1).transpose(0, 1)
        S = self.table.shape[1]
        numbers = torch.arange(S, device=y.device).expand(self.K, -1)
        y = y.flatten(0, 1)  # (S * K, B, ...)
        if self.complete:
            places = torch.zeros_like(self.table).scatter(1, self.table, numbers)
            rows = places * self.K + self._path_numbers()  # (K, L)
        else:
            nowhere = torch.where(self.table < 0, self.L, self.table)
            places = torch.full((self.K, self.L + 1), S, device=y.device).scatter(1, nowhere, numbers)[:, : self.L]
            rows = torch.where(places == S, S * self.K, places * self.K + self._path_numbers())
            y = torch.cat([y, torch.zeros_like(y[:1])])  # what a path puts on tokens that it does not visit
        return y.index_select(0, rows.t().flatten()).unflatten(0, (-1, self.K)).sum(1).transpose(0, 1)

    def _path_numbers(self) -> Tensor:
        return torch.arange(self.K, device=self.table.device).unsqueeze(1)


def selective_scan(
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
    """``zoo::selective_scan`` around :func:`recurrence`; the states for a backward are left out."""
    K, _, N = A.shape
    batch, L, G = u.shape[0], u.shape[2], B.shape[3]
    walk = Walk(paths, reverse, L, complete, window > 1, u.device)
    steps = walk.mask(walk.read(delta), 0)  # (S, K, B, D)
    if delta_bias is not None:
        steps = steps + delta_bias.unsqueeze(1)
    steps = walk.mask(F.softplus(steps) if delta_softplus else steps, -1)
    values = walk.mask(walk.read(u), 0)  # (S, K or 1, B, D)

    A = A.unflatten(1, (G, -1)).transpose(2, 3).unsqueeze(1)  # (K, 1, G, N, E)
    state = u.new_zeros(K, batch, G, N, A.shape[-1])
    first = state if initial_state is None else initial_state.transpose(0, 1).unflatten(2, (G, -1)).mT
    inputs = (
        steps.unflatten(3, (G, 1, -1)),
        (steps * values).unflatten(3, (G, 1, -1)),
        walk.read(B).unsqueeze(-1),
        walk.read(C).unsqueeze(-2),
    )
    y, last = torch.ops.zoo_export.recurrence(*inputs, A, first)
    if window > 1:
        numbers = torch.arange(1, inputs[0].shape[0] + 1, device=u.device)
        keep = (numbers % window != 0).to(u.dtype).unsqueeze(1)
        y = y + torch.ops.zoo_export.lookahead(*inputs, keep, A, state)
    y = y.flatten(3)  # (S, K, B, D)
    if D is not None:
        y = y + values * D.unsqueeze(1)
    out = walk.merge(y)
    if z is not None:
        out = out * F.silu(z)
    last = last.mT.flatten(2, 3).transpose(0, 1)  # (B, K, D, N)
    return out.contiguous(), last, u.new_zeros(batch, K, 0, N, u.shape[-1])


def ssd(
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
    """``zoo::ssd`` around :func:`recurrence`; H heads of width P are laid out as G groups of E = H * P / G channels."""
    batch, _, L, H, P = x.shape
    K, G, N = dt.shape[1], *B.shape[3:]
    walk = Walk(paths, reverse, L, False, False, x.device)
    steps = walk.mask(walk.read(dt), 0)  # (S, K, B, H)
    if dt_bias is not None:
        steps = steps + dt_bias.unsqueeze(1)
    steps = walk.mask(F.softplus(steps) if dt_softplus else steps, -1).unsqueeze(-1)
    values = walk.mask(walk.read(x), 0)  # (S, K or 1, B, H, P)
    received = values.expand(-1, K, -1, -1, -1) if A is None else steps * values

    decay = dt.new_ones(K, H) if A is None else A
    decay = decay.unsqueeze(-1).expand(-1, -1, P).flatten(1).unflatten(1, (G, 1, -1)).unsqueeze(1)  # (K, 1, G, 1, E)
    state = x.new_zeros(K, batch, G, N, decay.shape[-1])
    if initial_state is not None:
        state = initial_state.transpose(0, 1).flatten(2, 3).unflatten(2, (G, -1)).mT
    y, last = torch.ops.zoo_export.recurrence(
        steps.expand(-1, -1, -1, -1, P).flatten(3).unflatten(3, (G, 1, -1)),
        received.flatten(3).unflatten(3, (G, 1, -1)),
        walk.read(B).unsqueeze(-1),
        walk.read(C).unsqueeze(-2),
        decay,
        state,
    )
    y = y.flatten(3).unflatten(3, (H, P))  # (S, K, B, H, P)
    if D is not None:
        y = y + values * D[:, None, :, None]
    last = last.mT.flatten(2, 3).transpose(0, 1).unflatten(2, (H, P))  # (B, K, H, P, N)
    return walk.merge(y).contiguous(), last.contiguous()


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[bool]) -> Tensor:
    """``zoo::causal_conv1d`` as ordinary convolutions, one for every path."""
    K, D, W = weight.shape
    L = x.shape[2]
    outputs = []
    for k in range(K):
        tokens = x[:, k if x.shape[1] > 1 else 0].transpose(1, 2)  # (B, D, L)
        taps = weight[k].flip(1) if reverse[k] else weight[k]
        y = F.conv1d(tokens, taps.unsqueeze(1), None if bias is None else bias[k], padding=W - 1, groups=D)
        y = y.narrow(2, W - 1 if reverse[k] else 0, L).transpose(1, 2)
        outputs.append(F.silu(y) if silu else y)
    return torch.stack(outputs)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """``zoo::depthwise_conv2d`` as an ordinary convolution."""
    images, side = x.permute(0, 3, 1, 2), weight.shape[-1]
    y = F.conv2d(images, weight.unsqueeze(1), bias, padding=side // 2, groups=len(weight)).permute(0, 2, 3, 1)
    return y if activation is None else getattr(F, activation)(y)


def add_norm(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    centered: bool,
) -> list[Tensor]:
    """``zoo::add_norm`` as it is written down, around the layer norm that ONNX has."""
    total = stream
    if update is not None:
        total = stream + (update if scale is None else update * scale.view(-1, *[1] * (update.dim() - 1)))
    if centered:
        bias = None if bias is None else bias.to(total.dtype)
        normed = F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias, eps)
    else:
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight
        normed = normed if bias is None else normed + bias
    normed = normed.to(dtype or total.dtype).contiguous()
    return [normed] if update is None else [normed, total.contiguous()]


def window_axis(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The windows of neighbourhood attention along one axis.

    Returns:
        The cells in the window of every cell, and for each the row of the position biases, both (length, kernel_size).
    """
    cells = torch.arange(length)
    members = (length - cells % dilation + dilation - 1) // dilation  # of the cell's dilation class
    numbers = cells // dilation
    starts = torch.minimum((numbers - kernel_size // 2).clamp(min=0), members - kernel_size)
    window = starts.unsqueeze(1) + torch.arange(kernel_size)
    return (cells % dilation).unsqueeze(1) + window * dilation, window - numbers.unsqueeze(1) + kernel_size - 1


def window_cells(rows: Tensor, columns: Tensor) -> Tensor:
    """Cells in the window of every cell of a grid, (T, L), from those along its axes."""
    cells = rows.t()[:, None, :, None] * columns.shape[0] + columns.t()[None, :, None, :]  # (K, K, H, W)
    return cells.flatten(2).flatten(0, 1)


def neighborhood_maps(
    q: Tensor, k: Tensor, bias: Tensor | None, kernel_size: int, dilation: list[int], softmax: bool
) -> Tensor:
    """``zoo::neighborhood_maps`` around :func:`window_scores`."""
    H, W = q.shape[1:3]
    (rows, bias_rows), (columns, bias_columns) = (
        window_axis(length, kernel_size, d) for length, d in zip((H, W), dilation, strict=True)
    )
    scores = torch.ops.zoo_export.window_scores(q.flatten(1, 2), k.flatten(1, 2), window_cells(rows, columns))
    maps = scores.permute(1, 3, 2, 0).unflatten(2, (H, W))  # (B, n, H, W, T)
    if bias is not None:
        picked = bias.index_select(1, bias_rows.flatten()).index_select(2, bias_columns.flatten())
        picked = picked.unflatten(2, (W, kernel_size)).unflatten(1, (H, kernel_size))
        maps = maps + picked.transpose(2, 3).flatten(3)
    return (maps.softmax(-1) if softmax else maps).contiguous()


def neighborhood_aggregate(maps: Tensor, values: Tensor, kernel_size: int, dilation: list[int]) -> Tensor:
    """``zoo::neighborhood_aggregate`` around :func:`window_sums`."""
    H, W = values.shape[1:3]
    rows, columns = (window_axis(length, kernel_size, d)[0] for length, d in zip((H, W), dilation, strict=True))
    weights = maps.flatten(2, 3).permute(3, 0, 2, 1).unsqueeze(-1)  # (T, B, L, n, 1)
    sums = torch.ops.zoo_export.window_sums(weights, values.flatten(1, 2), window_cells(rows, columns))
    return sums.unflatten(1, (H, W))


RECURRENCE = torch.ops.zoo_export.recurrence.default
LOOKAHEAD = torch.ops.zoo_export.lookahead.default
WINDOW_SCORES = torch.ops.zoo_export.window_scores.default
WINDOW_SUMS = torch.ops.zoo_export.window_sums.default

DECOMPOSITIONS: dict[Any, Callable] = {
    torch.ops.zoo.selective_scan.default: selective_scan,
    torch.ops.zoo.ssd.default: ssd,
    torch.ops.zoo.causal_conv1d.default: causal_conv1d,
    torch.ops.zoo.depthwise_conv2d.default: depthwise_conv2d,
    torch.ops.zoo.add_norm.default: add_norm,
    torch.ops.zoo.neighborhood_maps.default: neighborhood_maps,
    torch.ops.zoo.neighborhood_aggregate.default: neighborhood_aggregate,
}
