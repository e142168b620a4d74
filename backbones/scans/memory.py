"""Tables that are worked out once per grid and then reused."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["remember_tables"]

P = ParamSpec("P")
R = TypeVar("R")


def remember_tables(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for functions of hashable arguments that return tensors nobody writes into.

    While a model is compiled or exported the function runs every time: sizes are symbols then, and tensors are traces.
    """
    remembered = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False):  # autograd refuses to save inference tensors, which a later call may need
            return remembered(*args, **kwargs)

    return call
