"""What the registrations of all ops share: dtypes, the choice of a backend, and messages about wrong inputs."""

import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor

from zoo.kernels._backend import backend

__all__ = [
    "FLOAT_DTYPES",
    "accumulate_dtype",
    "as_flags",
    "check_dtypes_and_devices",
    "check_tokens",
    "expect_shape",
    "implementation",
    "path_length",
    "show",
    "without_autocast",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states, exponentials and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_flags(values: list[int]) -> list[bool]:
    """What an op takes as integers, because torch.jit.trace knows no list of bools, as backends take it."""
    return [bool(value) for value in values]


def path_length(x: Tensor, paths: Tensor | None) -> int:
    """Steps per path over tokens x (B, K, L, ...)."""
    return x.shape[2] if paths is None else paths.shape[1]


def without_autocast(function: Callable) -> Callable:
    """Decorates what computes an op in torch code: inside ``torch.autocast`` its sums would run in 16 bits."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return guarded


def implementation(op: str, device: torch.device) -> ModuleType:
    """The backend's module of an op, which offers ``forward`` and ``backward`` on canonical shapes."""
    return _module_of(op, backend(device).name)


@functools.cache  # of every call on a GPU, finding a module that is loaded already would take 3 us
def _module_of(op: str, backend_name: str) -> ModuleType:
    return importlib.import_module(f"zoo.kernels.{op}.{backend_name}")


def show(shape: tuple) -> str:
    """A shape as users write it."""
    return "(" + ", ".join(str(size) for size in shape) + ")"


def expect_shape(op: str, name: str, x: Tensor | None, letters: str, shape: tuple) -> None:
    """Raises ValueError unless x, if given, has a shape."""
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape ({letters}) = {show(shape)}, got {show(tuple(x.shape))}")


def check_dtypes_and_devices(
    op: str, activations: Mapping[str, Tensor | None], others: Mapping[str, Tensor | None], paths: Tensor | None
) -> None:
    """Raises ValueError unless activations are of a known float type, others real, and all with the first of them."""
    for name, x in activations.items():
        if x is not None and x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{op}: {name} is {x.dtype}; use one of {', '.join(map(str, FLOAT_DTYPES))}")
    for name, x in others.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op}: {name} is {x.dtype}; it must be a real floating-point tensor")
    first, leader = next(iter(activations.items()))
    for name, x in {**activations, **others, "paths": paths}.items():
        if x is not None and x.device != leader.device:
            raise ValueError(f"{op}: {name} is on {x.device} but {first} is on {leader.device}; move them together")


def check_tokens(op: str, paths: Tensor, L: int) -> None:
    """Raises ValueError if a table names a token that is not among L."""
    lowest, highest = int(paths.min()), int(paths.max())
    if highest >= L or lowest < -2:
        token = highest if highest >= L else lowest
        raise ValueError(f"{op}: paths names token {token}; tokens are 0 to {L - 1}, -1 for zero, -2 for none")
