"""Registry of scan strategies: named functions that say in which order paths visit the cells of a grid."""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.backbones.scans.memory import remember_tables

__all__ = ["list_scans", "register_scan", "scan_paths"]

_SCANS: dict[str, Callable[..., Tensor]] = {}


def register_scan(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that registers a function ``paths(H, W, **options, device=None) -> table`` under a name.

    The table is an int64 tensor (K, P) on that device: the cell, counted row by row, that path k reads and writes at
    step p; -1 is a zero token that is stepped all the same; -2 ends a path that is shorter than the others.

    Raises:
        ValueError: If the name is taken.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in _SCANS:
            raise ValueError(f"scan {name!r} is registered already, by {_SCANS[name].__module__}")
        _SCANS[name] = function
        return function

    return register


def list_scans() -> list[str]:
    """Names of all scan strategies."""
    return sorted(_SCANS)


def scan_paths(name: str, H: int, W: int, device: torch.device | str | None = None, **options: int) -> Tensor:
    """The table of a scan strategy for a grid, ready for ``selective_scan(paths=...)``.

    Args:
        name: One of :func:`list_scans`.
        H: Rows of the grid.
        W: Columns of the grid.
        device: Where the table goes; default the CPU.
        **options: The strategy's own options (window ``size``, atrous ``rate``, ``seed``...).

    Returns:
        int32 table (K, P); the same tensor for the same arguments, so do not write into it.

    Raises:
        ValueError: If there is no such strategy, the grid is empty, or an option is out of range.
    """
    if name not in _SCANS:
        raise ValueError(f"no scan {name!r}; there are {', '.join(list_scans())}")
    if H < 1 or W < 1:
        raise ValueError(f"scan {name!r}: a grid of {H} rows and {W} columns has no cells")
    return _table(name, H, W, str(device or "cpu"), tuple(sorted(options.items())))


@remember_tables
def _table(name: str, H: int, W: int, device: str, options: tuple[tuple[str, int], ...]) -> Tensor:
    # Made on the device: a compiled model makes it in every call, and a CUDA graph cannot copy it from the CPU.
    return _SCANS[name](H, W, **dict(options), device=torch.device(device)).to(torch.int32)
