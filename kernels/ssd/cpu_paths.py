"""The tokens of SSD's paths in chunks, for the tensor code: where chunks lie, reading and adding their tokens.

A path is cut into chunks by its tokens' places in it, whichever way it is walked, so nothing is flipped: a reversed
path takes its chunks from the last to the first.

Letters besides those of the op: M chunks of a run, Q tokens of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["CHUNK", "Path", "Run"]

CHUNK = 32  # steps: products with the state cost the same per step for any, those inside a chunk grow with it


class Run:
    """Chunks of a path that are worked on at once: all of ``size`` tokens."""

    def __init__(self, first: int, chunks: int, size: int) -> None:
        self.chunks, self.size = chunks, size
        self.numbers = slice(first, first + chunks)
        self.states = slice(first, first + chunks + 1)
        self.places = slice(first * CHUNK, first * CHUNK + chunks * size)


class Path:
    """The tokens of one path, cut into chunks."""

    def __init__(self, table: Tensor | None, length: int, reverse: bool) -> None:
        self.tokens = None if table is None else table[table >= -1].long()
        self.length = length if table is None else len(self.tokens)
        self.chunks = -(-self.length // CHUNK)
        self.reverse = reverse
        self.visits = None  # 0 where a zero token is stepped, 1 elsewhere
        if table is not None and bool((self.tokens < 0).any()):
            self.visits = self.tokens >= 0
            self.tokens = self.tokens.clamp(min=0)

    def runs(self, at_once: int, backwards: bool = False) -> Iterator[Run]:
        """Runs of up to so many chunks in walking order or against it; a chunk that is not full is one by itself."""
        full, rest = divmod(self.length, CHUNK)
        runs = [Run(first, min(at_once, full - first), CHUNK) for first in range(0, full, at_once)]
        runs += [Run(full, 1, rest)] if rest else []
        yield from reversed(runs) if backwards != self.reverse else runs

    def read(self, x: Tensor, run: Run, dtype: torch.dtype) -> Tensor:
        """x (B, L, ...) at the places of a run, (M, B, Q, ...); zero tokens read as zero."""
        if self.tokens is None:
            return self.view(x, run).to(dtype)
        rows = x.index_select(1, self.tokens[run.places]).to(dtype)
        rows = rows if self.visits is None else rows * self._visited(rows, run.places)
        return _by_chunk(rows, run)

    def view(self, x: Tensor, run: Run) -> Tensor:
        """x (B, L, ...) at the places of a run as (M, B, Q, ...), for a path without a table."""
        return _by_chunk(x[:, run.places], run)

    def add(self, y: Tensor, rows: Tensor, run: Run, first: bool = False) -> None:
        """Adds rows (M, B, Q, ...) to y (B, L, ...) at the places of a run; rows of zero tokens are dropped.

        The ``first`` path writes instead of adding unless it has a table, which need not visit every token.
        """
        if self.tokens is not None:
            rows = rows.transpose(0, 1).flatten(1, 2)
            rows = rows if self.visits is None else rows * self._visited(rows, run.places)
            y.index_add_(1, self.tokens[run.places], rows)
        elif first:
            self.view(y, run).copy_(rows)
        else:
            self.view(y, run).add_(rows)

    def add_all(self, y: Tensor, rows: Tensor) -> None:
        """Adds rows (B, length, ...) of all steps to y (B, L, ...), zeros with a table, else written."""
        if self.tokens is None:
            y.copy_(rows)
        else:
            y.index_add_(1, self.tokens, rows if self.visits is None else rows * self._visited(rows, slice(None)))

    def _visited(self, rows: Tensor, places: slice) -> Tensor:
        return self.visits[places].view(1, -1, *[1] * (rows.dim() - 2))

    def all_steps(self, x: Tensor) -> Tensor:
        """x (B, L, ...) at all steps, (B, length, ...); zero tokens read as zero."""
        if self.tokens is None:
            return x
        rows = x.index_select(1, self.tokens)
        return rows if self.visits is None else rows * self._visited(rows, slice(None))

    def cumsum(self, x: Tensor) -> Tensor:
        """Sum over this and all earlier steps, along the last dimension."""
        return x.flip(-1).cumsum(-1).flip(-1) if self.reverse else x.cumsum(-1)

    def cumsum_back(self, x: Tensor) -> Tensor:
        """Sum over this and all later steps, along the last dimension."""
        return x.cumsum(-1) if self.reverse else x.flip(-1).cumsum(-1).flip(-1)

    def order(self, count: int, backwards: bool = False) -> range:
        """Numbers of the chunks of a run in the order of a walk along the path or against it."""
        return range(count) if backwards == self.reverse else range(count - 1, -1, -1)

    def first_and_last(self, backwards: bool = False) -> tuple[int, int]:
        """Places of the first and of the last state of a walk along the path or against it."""
        return (0, -1) if backwards == self.reverse else (-1, 0)

    def ends(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of the states between chunks (M + 1, ...) those before and those after every chunk, each (M, ...)."""
        return (states[1:], states[:-1]) if self.reverse else (states[:-1], states[1:])


def _by_chunk(rows: Tensor, run: Run) -> Tensor:
    """(B, M * Q, ...) as (M, B, Q, ...)."""
    return rows.unflatten(1, (run.chunks, run.size)).transpose(0, 1)
