"""Local scans of LocalMamba (arXiv 2403.09338): rows, columns or windows, from either end, around a class token."""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.backbones.scans.columns import columns
from zoo.backbones.scans.memory import remember_tables
from zoo.backbones.scans.raster import raster
from zoo.backbones.scans.window import window
from zoo.kernels import is_exporting

__all__ = ["Route", "check_direction", "local_order", "local_routes"]


class Route(NamedTuple):
    """One order of the tokens of an image.

    Attributes:
        steps: Tokens on the route, L and those that pad the grid to whole windows.
        order: Token of every step, (steps,); padding tokens are numbered from L on. None for the tokens' own order.
        places: Step of every token, (steps,); None for their own order.
        reverse: Whether the tokens' own order is walked from its end.
    """

    steps: int
    order: Tensor | None = None
    places: Tensor | None = None
    reverse: bool = False


def check_direction(direction: str) -> None:
    """Raises ValueError unless a direction is ``h``, ``v`` or ``w<size>``, with or without ``_flip``."""
    if not re.fullmatch(r"(h|v|w[1-9]\d*)(_flip)?", direction):
        raise ValueError(f"direction {direction!r} is not known; use h, v or w with a window size, e.g. w2 or w7_flip")


def local_order(
    direction: str, H: int, W: int, class_token: bool = False, device: torch.device | None = None
) -> Tensor:
    """The order in which a direction visits tokens.

    Args:
        direction: ``h`` by rows, ``v`` by columns, ``w7`` by windows of 7 x 7; with ``_flip`` from the end.
        H: Rows of the grid.
        W: Columns of the grid.
        class_token: Whether a class token stands in the middle of the tokens, at index H * W // 2. Every direction
            meets it at that same step.
        device: Where the order is made; default the CPU.

    Returns:
        (steps,), a permutation: the tokens, and after them as many zero tokens as pad the grid to whole windows.
    """
    base = direction.removesuffix("_flip")
    if base.startswith("w"):
        order = window(H, W, int(base[1:]), device)[0]
    else:
        order = (columns if base == "v" else raster)(H, W, device)[0]
    if direction.endswith("_flip"):
        order = order.flip(0)
    middle, tokens = H * W // 2, H * W + int(class_token)
    padding = tokens + (order < 0).cumsum(0) - 1
    if not class_token:
        return torch.where(order < 0, padding, order)
    order = torch.where(order < 0, padding, order + (order >= middle))
    return torch.cat([order[:middle], order.new_full((1,), middle), order[middle:]])


@remember_tables
def local_routes(
    directions: tuple[str, ...], H: int, W: int, class_token: bool, device: torch.device
) -> tuple[Route, ...]:
    """The routes of several directions over a grid, with their tables (int32) on a device; see :func:`local_order`."""
    tokens = H * W + int(class_token)
    # Between two halves of unequal length the class token is met at another step when the tokens are read backwards.
    mirrored = not class_token or (not is_exporting() and H * W % 2 == 0)
    routes = []
    for direction in directions:
        if direction == "h" or (direction == "h_flip" and mirrored):
            routes.append(Route(tokens, reverse=direction == "h_flip"))
            continue
        order = local_order(direction, H, W, class_token, device)
        order, places = (table.to(torch.int32) for table in (order, order.argsort()))
        routes.append(Route(order.shape[0], order, places))
    return tuple(routes)
