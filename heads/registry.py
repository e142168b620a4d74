"""Heads by name.

A head is one file. Its constructor takes what the features are like, ``in_channels`` and ``in_strides`` first or a
module that knows them, and never the name of a backbone.
"""

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["create_head", "list_heads", "register_head"]

Head = TypeVar("Head", bound=type[nn.Module])

_HEADS: dict[str, tuple[str | None, type[nn.Module]]] = {}


def register_head(name: str, *, task: str | None = None) -> Callable[[Head], Head]:
    """Class decorator that makes a head available by name.

    Args:
        name: The head's name, ``"uper_net"`` for example.
        task: What it predicts, ``"segmentation"`` or ``"detection"`` for example; a filter of :func:`list_heads`.

    Raises:
        ValueError: If another class has the name.
    """

    def register(head: Head) -> Head:
        known = _HEADS.get(name)
        if known is not None and (known[1].__module__, known[1].__qualname__) != (head.__module__, head.__qualname__):
            raise ValueError(
                f"the name {name!r} belongs to {known[1].__module__}.{known[1].__qualname__}; take another"
            )
        _HEADS[name] = (task, head)
        return head

    return register


def list_heads(task: str | None = None) -> list[str]:
    """Names of all heads, or of those for one task, in alphabetical order.

    Raises:
        ValueError: If no head has this task.
    """
    tasks = sorted({known for known, _ in _HEADS.values() if known})
    if task is not None and task not in tasks:
        raise ValueError(f"no head is for task={task!r}; there are {', '.join(tasks)}")
    return sorted(name for name, (known, _) in _HEADS.items() if task in (None, known))


def create_head(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Creates the head of this name with the arguments of its class.

    Raises:
        ValueError: If there is no such head; the message names the nearest.
    """
    if name not in _HEADS:
        nearest = difflib.get_close_matches(name, _HEADS, n=3, cutoff=0.4) or list_heads()
        raise ValueError(f"there is no head {name!r}; did you mean {', '.join(nearest)}?")
    return _HEADS[name][1](*args, **kwargs)


def _dotted(head: type[nn.Module]) -> str:
    return f"{head.__module__}.{head.__qualname__}"
