"""Neighbourhood attention that hands out its maps (Hassani et al., arXiv 2204.07143 and 2209.15001).

Every cell of a grid attends to the kernel_size x kernel_size cells around it. With a dilation d it sees only every d-th
row and column, that is cells of its own dilation class. Windows are shifted to stay inside the grid, never padded, so
each cell has exactly kernel_size^2 keys. Softmaxed maps are tensors of their own: they may aggregate several things.

Per axis, cell i is member p = i // d of class i % d, and its window starts at member clamp(p - K // 2, 0, members - K).

The torch implementation below cuts the grid into tiles, each a rectangle of cells of one dilation class. All cells of a
tile share one rectangle of keys, views of the activations: one product gives all pairs of the tile, from which the
pairs inside windows are picked. Tiles about as wide as a window make this one to four times the arithmetic needed, as
matrix products, and nothing larger than a tile is ever held besides the maps. A backend that fuses the steps replaces
the bodies of the four functions that are registered as operators.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import to_2tuple
from timm.models import register_notrace_function
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.backbones.scans.memory import remember_tables
from zoo.kernels import custom_op, without_autocast

__all__ = ["axis_windows", "neighborhood_aggregate", "neighborhood_maps", "neighborhood_scores"]


class AxisTile(NamedTuple):
    """A run of cells of one dilation class along an axis, in steps of the dilation.

    Attributes:
        cells: The cells.
        keys: All cells that are in one of their windows.
        starts: Where each cell's window starts among ``keys``.
        distances: Members from each cell to the start of its window, zero or negative.
    """

    cells: slice
    keys: slice
    starts: tuple[int, ...]
    distances: tuple[int, ...]


class Tile(NamedTuple):
    """A rectangle of cells; shapes: T cells, S keys, K window side.

    Attributes:
        cells: Slices of rows and of columns.
        keys: Slices of rows and of columns.
        pairs: Where a cell's K^2 keys are among all its S pairs, (T * K^2,): entries of a flattened (T, S).
        bias_rows: Row of the bias table for a cell row's K key rows, (rows of cells, K).
        bias_columns: The same for columns.
    """

    cells: tuple[slice, slice]
    keys: tuple[slice, slice]
    pairs: Tensor
    bias_rows: Tensor
    bias_columns: Tensor


def _axis_tiles(length: int, kernel_size: int, dilation: int) -> list[AxisTile]:
    tiles = []
    for first in range(dilation):
        members = math.ceil((length - first) / dilation)
        starts = [min(max(p - kernel_size // 2, 0), members - kernel_size) for p in range(members)]
        count = math.ceil(members / (kernel_size + 1))  # wider tiles waste arithmetic, narrower ones launches
        for t in range(count):
            begin, end = members * t // count, members * (t + 1) // count
            lowest, highest = starts[begin], starts[end - 1] + kernel_size - 1
            tiles.append(
                AxisTile(
                    slice(first + begin * dilation, first + (end - 1) * dilation + 1, dilation),
                    slice(first + lowest * dilation, first + highest * dilation + 1, dilation),
                    tuple(start - lowest for start in starts[begin:end]),
                    tuple(starts[p] - p for p in range(begin, end)),
                )
            )
    return tiles


def axis_windows(length: int, kernel_size: int, dilation: int = 1) -> Tensor:
    """Which cells of an axis are in the window of each cell, (length, kernel_size)."""
    windows = torch.empty(length, kernel_size, dtype=torch.long)
    for tile in _axis_tiles(length, kernel_size, dilation):
        keys = torch.arange(length)[tile.keys]
        windows[tile.cells] = keys[torch.tensor(tile.starts).unsqueeze(1) + torch.arange(kernel_size)]
    return windows


@remember_tables
def _tiles(H: int, W: int, kernel_size: int, dilation: tuple[int, int], device: torch.device) -> tuple[Tile, ...]:
    """The tiles of a grid; tiles of one pattern share their tables."""
    window = torch.arange(kernel_size)
    tables: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}

    def tables_of(row: AxisTile, column: AxisTile) -> tuple[Tensor, Tensor, Tensor]:
        pattern = (row.starts, column.starts, row.distances, column.distances)
        if pattern not in tables:
            key_rows, key_columns = (max(axis.starts) + kernel_size for axis in (row, column))
            rows = torch.tensor(row.starts).view(-1, 1, 1, 1) + window.view(-1, 1)
            columns = torch.tensor(column.starts).view(-1, 1, 1) + window
            keys = (rows * key_columns + columns).flatten(0, 1).flatten(1)  # (T, K^2)
            pairs = torch.arange(len(keys)).unsqueeze(1) * (key_rows * key_columns) + keys
            bias = [torch.tensor(a.distances).unsqueeze(1) + window + kernel_size - 1 for a in (row, column)]
            tables[pattern] = tuple(table.to(device) for table in (pairs.flatten(), *bias))
        return tables[pattern]

    rows, columns = (_axis_tiles(n, kernel_size, d) for n, d in zip((H, W), dilation, strict=True))
    return tuple(
        Tile((row.cells, column.cells), (row.keys, column.keys), *tables_of(row, column))
        for row in rows
        for column in columns
    )


def _tokens(x: Tensor, rectangle: tuple[slice, slice]) -> Tensor:
    """Cells of a rectangle of (B, H, W, n, c), heads beside the batch: (B * n, cells, c)."""
    return x[:, rectangle[0], rectangle[1]].permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _grid(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_tokens`, as a view: (B, rows, columns, n, c), as the rectangle ``like`` is shaped."""
    B, rows, columns, n, _ = like.shape
    return tokens.unflatten(0, (B, n)).unflatten(2, (rows, columns)).permute(0, 2, 3, 1, 4)


def _pick(pairs: Tensor, tile: Tile, kernel_size: int) -> Tensor:
    """From all pairs (B * n, T, S) those inside windows, (B * n, T, K^2)."""
    return pairs.flatten(1).index_select(1, tile.pairs).unflatten(1, (-1, kernel_size**2))


def _spread(maps: Tensor, keys: int, tile: Tile) -> Tensor:
    """Maps (B * n, T, K^2) among zeros for the pairs outside of windows, (B * n, T, S)."""
    pairs = maps.new_zeros(len(maps), maps.shape[1] * keys)
    return pairs.index_copy_(1, tile.pairs, maps.flatten(1)).unflatten(1, (-1, keys))


def _of_tile(maps: Tensor, tile: Tile) -> Tensor:
    """A tile's part of maps (B, n, H, W, K^2) as (B * n, T, K^2)."""
    return maps[:, :, tile.cells[0], tile.cells[1]].flatten(2, 3).flatten(0, 1)


def _store(maps: Tensor, tile: Tile, part: Tensor) -> None:
    """Writes a tile's part (B * n, T, K^2) into maps (B, n, H, W, K^2)."""
    place = maps[:, :, tile.cells[0], tile.cells[1]]
    place.copy_(part.view(place.shape))


def _biases(bias: Tensor, tile: Tile, kernel_size: int) -> Tensor:
    """A tile's part of the position biases (n, 2K - 1, 2K - 1) as (n, T, K^2)."""
    pairs = bias.index_select(1, tile.bias_rows.flatten()).index_select(2, tile.bias_columns.flatten())
    pairs = pairs.unflatten(2, (-1, kernel_size)).unflatten(1, (-1, kernel_size))  # (n, rows, K, columns, K)
    return pairs.transpose(2, 3).flatten(3).flatten(1, 2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and exponentials."""
    return torch.promote_types(dtype, torch.float32)


@custom_op("neighborhood_maps")
@without_autocast
def _maps(q: Tensor, k: Tensor, bias: Tensor | None, kernel_size: int, dilation: list[int], softmax: bool) -> Tensor:
    """Scores (B, n, H, W, K^2), softmaxed or not."""
    B, H, W, n, _ = q.shape
    maps = q.new_empty(B, n, H, W, kernel_size**2)
    for tile in _tiles(H, W, kernel_size, tuple(dilation), q.device):
        part = _pick(_tokens(q, tile.cells) @ _tokens(k, tile.keys).mT, tile, kernel_size)
        if bias is not None:
            part = part.unflatten(0, (B, n)) + _biases(bias, tile, kernel_size)
        if softmax:
            part = part.to(_wide(q.dtype)).softmax(-1)
        _store(maps, tile, part)
    return maps


@custom_op("neighborhood_maps_backward")
@without_autocast
def _maps_backward(
    grad: Tensor,
    maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and bias (empty without one); ``maps`` are given if they were softmaxed."""
    B, H, W, n, _ = q.shape
    wide = _wide(q.dtype)
    grad_q, grad_k = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k))
    grad_bias = q.new_zeros((0,) if bias is None else bias.shape, dtype=wide)
    table = torch.eye(2 * kernel_size - 1, dtype=wide, device=q.device)
    for tile in _tiles(H, W, kernel_size, tuple(dilation), q.device):
        part = _of_tile(grad, tile).to(wide)
        if maps is not None:
            weights = _of_tile(maps, tile).to(wide)
            part = weights * (part - (weights * part).sum(-1, keepdim=True))
        queries, keys = _tokens(q, tile.cells), _tokens(k, tile.keys)
        pairs = _spread(part.to(q.dtype), keys.shape[1], tile)
        into_q, into_k = grad_q[:, tile.cells[0], tile.cells[1]], grad_k[:, tile.keys[0], tile.keys[1]]
        into_q.copy_(_grid(pairs @ keys, into_q))
        into_k.add_(_grid(pairs.mT @ queries, into_k))
        if bias is not None:
            # Many pairs share an entry of the table. Products with one-hot rows add them in a fixed order.
            shape = (n, len(tile.bias_rows), len(tile.bias_columns), kernel_size, kernel_size)
            summed = part.unflatten(0, (B, n)).sum(0).view(shape).transpose(2, 3)  # (n, rows, K, columns, K)
            by_column = summed.flatten(3) @ table[tile.bias_columns].flatten(0, 1)  # (n, rows, K, 2K - 1)
            grad_bias += table[tile.bias_rows].flatten(0, 1).mT @ by_column.flatten(1, 2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_bias.to(q.dtype if bias is None else bias.dtype)


@_maps.register_fake
def _(q, k, bias, kernel_size, dilation, softmax):
    B, H, W, n, _ = q.shape
    return q.new_empty(B, n, H, W, kernel_size**2)


@_maps_backward.register_fake
def _(grad, maps, q, k, bias, kernel_size, dilation):
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _keep_for_maps(ctx, inputs, output):
    q, k, bias, ctx.kernel_size, ctx.dilation, softmax = inputs
    ctx.save_for_backward(q, k, bias, output if softmax else None)


def _gradients_of_maps(ctx, grad):
    q, k, bias, maps = ctx.saved_tensors
    grads = _maps_backward(grad, maps, q, k, bias, ctx.kernel_size, ctx.dilation)
    return grads[0], grads[1], None if bias is None else grads[2], None, None, None


_maps.register_autograd(_gradients_of_maps, setup_context=_keep_for_maps)


@custom_op("neighborhood_aggregate")
@without_autocast
def _aggregate(maps: Tensor, values: Tensor, kernel_size: int, dilation: list[int]) -> Tensor:
    """Weighted sums of values, (B, H, W, n, c)."""
    _, H, W, _, _ = values.shape
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    for tile in _tiles(H, W, kernel_size, tuple(dilation), values.device):
        keys = _tokens(values, tile.keys)
        pairs = _spread(_of_tile(maps, tile).to(values.dtype), keys.shape[1], tile)
        place = out[:, tile.cells[0], tile.cells[1]]
        place.copy_(_grid(pairs @ keys, place))
    return out


@custom_op("neighborhood_aggregate_backward")
@without_autocast
def _aggregate_backward(
    grad: Tensor, maps: Tensor, values: Tensor, kernel_size: int, dilation: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of maps and values."""
    _, H, W, _, _ = values.shape
    grad_maps = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    grad_values = torch.zeros(values.shape, dtype=_wide(values.dtype), device=values.device)
    for tile in _tiles(H, W, kernel_size, tuple(dilation), values.device):
        outputs, keys = _tokens(grad, tile.cells), _tokens(values, tile.keys)
        _store(grad_maps, tile, _pick(outputs @ keys.mT, tile, kernel_size))
        pairs = _spread(_of_tile(maps, tile).to(values.dtype), keys.shape[1], tile)
        place = grad_values[:, tile.keys[0], tile.keys[1]]
        place.add_(_grid(pairs.mT @ outputs, place))
    return grad_maps, grad_values.to(values.dtype)


@_aggregate.register_fake
def _(maps, values, kernel_size, dilation):
    return values.new_empty(values.shape)


@_aggregate_backward.register_fake
def _(grad, maps, values, kernel_size, dilation):
    return maps.new_empty(maps.shape), values.new_empty(values.shape)


def _keep_for_aggregate(ctx, inputs, output):
    maps, values, ctx.kernel_size, ctx.dilation = inputs
    ctx.save_for_backward(maps, values)


def _gradients_of_aggregate(ctx, grad):
    maps, values = ctx.saved_tensors
    grads = _aggregate_backward(grad, maps, values, ctx.kernel_size, ctx.dilation)
    return *grads, None, None


_aggregate.register_autograd(_gradients_of_aggregate, setup_context=_keep_for_aggregate)


@register_flop_formula(torch.ops.zoo.neighborhood_maps)
def _maps_flops(q_shape, k_shape, bias_shape, kernel_size, *args, out_shape=None, **kwargs) -> int:
    """2 operations per cell, key and channel, as if only the pairs inside windows were computed."""
    return 2 * math.prod(q_shape) * kernel_size**2


@register_flop_formula(torch.ops.zoo.neighborhood_aggregate)
def _aggregate_flops(maps_shape, values_shape, kernel_size, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(values_shape) * kernel_size**2


@register_flop_formula(torch.ops.zoo.neighborhood_maps_backward)
def _maps_backward_flops(grad_shape, maps_shape, q_shape, k_shape, bias_shape, kernel_size, *args, **kwargs) -> int:
    return 4 * math.prod(q_shape) * kernel_size**2


@register_flop_formula(torch.ops.zoo.neighborhood_aggregate_backward)
def _aggregate_backward_flops(grad_shape, maps_shape, values_shape, kernel_size, *args, **kwargs) -> int:
    return 4 * math.prod(values_shape) * kernel_size**2


def _check_window(grid: Sequence[int], kernel_size: int, dilation: Sequence[int]) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if min(dilation) < 1 or any(kernel_size * d > length for length, d in zip(grid, dilation, strict=True)):
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} is too small for windows of {kernel_size} x {kernel_size} at dilation "
            f"{tuple(dilation)}: each side needs kernel_size * dilation cells, and a dilation of at least 1"
        )


def _check_maps_inputs(q: Tensor, k: Tensor, kernel_size: int, dilation: Sequence[int], bias: Tensor | None) -> None:
    if q.dim() != 5 or q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError(
            "q and k must have one shape (B, H, W, n, c) and one dtype, "
            f"got {tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}"
        )
    _check_window(q.shape[1:3], kernel_size, dilation)
    side = 2 * kernel_size - 1
    if bias is not None and bias.shape != (q.shape[3], side, side):
        raise ValueError(f"bias must have shape (n, 2K - 1, 2K - 1) = {(q.shape[3], side, side)}, got {bias.shape}")


@torch.fx.wrap
@register_notrace_function
def neighborhood_scores(
    q: Tensor, k: Tensor, kernel_size: int, dilation: int | Sequence[int] = 1, bias: Tensor | None = None
) -> Tensor:
    """Products of every cell's query with the keys of its window.

    Args:
        q: Queries (B, H, W, n, c), already scaled; any strides.
        k: Keys (B, H, W, n, c).
        kernel_size: Side K of the window, odd.
        dilation: Cells between neighbours, one number or (rows, columns). K * dilation must not exceed the grid.
        bias: Added by distance from the cell, counted in steps of the dilation: (n, 2K - 1, 2K - 1), its middle for
            the cell itself.

    Returns:
        Scores (B, n, H, W, K^2) in the dtype of ``q``, keys row by row.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the grid is too small.
    """
    dilation = to_2tuple(dilation)
    _check_maps_inputs(q, k, kernel_size, dilation, bias)
    return _maps(q, k, bias, kernel_size, list(dilation), False)


@torch.fx.wrap
@register_notrace_function
def neighborhood_maps(
    q: Tensor, k: Tensor, kernel_size: int, dilation: int | Sequence[int] = 1, bias: Tensor | None = None
) -> Tensor:
    """Softmax of :func:`neighborhood_scores`, of which nothing but the result is kept."""
    dilation = to_2tuple(dilation)
    _check_maps_inputs(q, k, kernel_size, dilation, bias)
    return _maps(q, k, bias, kernel_size, list(dilation), True)


@torch.fx.wrap
@register_notrace_function
def neighborhood_aggregate(maps: Tensor, values: Tensor, kernel_size: int, dilation: int | Sequence[int] = 1) -> Tensor:
    """Sums of the values of every cell's window, weighted by its map.

    Args:
        maps: Weights (B, n, H, W, K^2) as of :func:`neighborhood_maps`.
        values: What is summed, (B, H, W, n, c); any strides.
        kernel_size: Side K of the window, odd.
        dilation: Cells between neighbours, one number or (rows, columns).

    Returns:
        Sums (B, H, W, n, c) in the dtype of ``values``.

    Raises:
        ValueError: If shapes do not fit, or the grid is too small.
    """
    dilation = to_2tuple(dilation)
    B, H, W, n, _ = values.shape
    if maps.shape != (B, n, H, W, kernel_size**2):
        raise ValueError(
            f"maps must have shape (B, n, H, W, K^2) = {(B, n, H, W, kernel_size**2)}, got {tuple(maps.shape)}"
        )
    _check_window((H, W), kernel_size, dilation)
    return _aggregate(maps, values, kernel_size, list(dilation))
