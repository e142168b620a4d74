"""Tables that are worked out once per grid and then reused."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["remember_tables"]

P = ParamSpec("P")
R = TypeVar("R")


class _NotKept(Exception):
    def __init__(self, tables: object) -> None:
        super().__init__()
        self.tables = tables


def remember_tables(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for functions of hashable arguments that return tensors nobody writes into.

    While a model is compiled or exported the function runs every time: sizes are symbols then, and tensors are traces.
    What is made while a CUDA graph is captured is not kept either: it has no values before the graph is replayed.
    """

    @functools.lru_cache(maxsize=256)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> R:
        tables = function(*args, **kwargs)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise _NotKept(tables)  # lru_cache keeps what is returned
        return tables

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False):  # autograd refuses to save inference tensors, which a later call may need
            try:
                return remembered(*args, **kwargs)
            except _NotKept as made:
                return made.tables

    return call
