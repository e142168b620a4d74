"""Stochastic layer-wise shuffle, a regulariser for columns of blocks that read their tokens in order.

Source: ShuffleMamba, arXiv 2408.17081. In training, block i of n reads the tokens, class tokens included, in a random
order with probability ``rate * i / (n - 1)``, and its output is put back in place. A column takes part so::

    orders = self.layer_shuffle(x)  # one per block; None where nothing is shuffled, so always in evaluation
    for block, order in zip(self.blocks, orders):
        x = restore_tokens(block(shuffle_tokens(x, order)), order)

What works on one token at a time (norm, projections, gate) commutes with a shuffle; a scan can follow an index table
instead (:func:`shuffle_paths`). A convolution over the sequence can do neither, as its neighbours are the shuffled
ones: blocks that have one need one gather in and one out, at their narrowest places.
"""

from typing import NamedTuple

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

__all__ = ["LayerShuffle", "TokenOrder", "restore_tokens", "shuffle_paths", "shuffle_tokens"]


class TokenOrder(NamedTuple):
    """A permutation of L tokens, one for the batch (L,) or one per sample (B, L), int64.

    Attributes:
        order: The token that the block reads at each place.
        inverse: The place at which the block reads each token.
    """

    order: Tensor
    inverse: Tensor


class _Reorder(torch.autograd.Function):
    """Tokens in another order. The gradient is the inverse gather: no scatter, hence no atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return _gather(x, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, order), None, None


def _gather(x: Tensor, order: Tensor) -> Tensor:
    if order.dim() == 1:
        return x.index_select(1, order)
    batch, length = order.shape
    firsts = torch.arange(0, batch * length, length, device=order.device)
    rows = (order + firsts.unsqueeze(1)).flatten()  # of all B * L tokens
    return x.reshape(batch * length, *x.shape[2:]).index_select(0, rows).view(x.shape)


def _reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    if torch.jit.is_tracing():  # TorchScript has no autograd functions
        return _gather(x, order)
    return _Reorder.apply(x, order, inverse)


@torch.fx.wrap
@register_notrace_function
def shuffle_tokens(x: Tensor, order: TokenOrder | None) -> Tensor:
    """Tokens (B, L, ...) in the order of a block; a gathered copy, or ``x`` itself if ``order`` is None."""
    return x if order is None else _reorder(x, order.order, order.inverse)


@torch.fx.wrap
@register_notrace_function
def restore_tokens(x: Tensor, order: TokenOrder | None) -> Tensor:
    """Undoes :func:`shuffle_tokens`."""
    return x if order is None else _reorder(x, order.inverse, order.order)


def shuffle_paths(paths: Tensor, order: TokenOrder | None) -> Tensor:
    """The table that makes a scan walk over shuffled tokens in place.

    Args:
        paths: Scan paths (K, P) over the shuffled tokens, as for :func:`zoo.kernels.selective_scan`.
        order: One order for the batch; None leaves the table as it is.

    Returns:
        Table (K, P) of ``paths``' dtype: scanning with it equals shuffling, scanning with ``paths`` and restoring.

    Raises:
        ValueError: If the order differs between samples; a scan has one table for all.
    """
    if order is None:
        return paths
    if order.order.dim() != 1:
        raise ValueError("a scan follows one table for the whole batch; use an order per batch, not per sample")
    tokens = order.order[paths.clamp(min=0)].to(paths.dtype)
    return torch.where(paths < 0, paths, tokens)  # negative entries are zero tokens and fillers


class LayerShuffle(nn.Module):
    """Draws the orders in which the blocks of a column read their tokens.

    Everything is drawn on the tokens' device, by one sort for all blocks and without the host waiting for it. A block
    that is not shuffled in a step gets the identity, so that every step does the same work.

    Args:
        rate: Probability that the last block is shuffled; it grows linearly from 0 at the first.
        depth: Blocks n.
        per_sample: Whether every sample draws for itself, instead of one draw for the whole batch as published.
        generator: Random generator on the tokens' device; default the device's own, which ``torch.manual_seed`` seeds.
            Set the attribute of that name to change it.

    Raises:
        ValueError: If ``rate`` is not a probability.
    """

    def __init__(
        self, rate: float, depth: int, per_sample: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise ValueError(f"the rate of a layer shuffle is a probability, got {rate}")
        self.rate = rate
        self.depth = depth
        self.per_sample = per_sample
        self.generator = generator

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rate={self.rate}, depth={self.depth}, per_sample={self.per_sample}"

    def forward(self, x: Tensor) -> list[TokenOrder | None]:
        """Orders of the n blocks for tokens (B, L, ...); None for blocks that are never shuffled."""
        if not self.training or not self.rate or self.depth < 2:
            return [None] * self.depth
        batch = x.shape[0] if self.per_sample else None
        orders, inverses = _draw_orders(self.rate, self.depth, batch, x.shape[1], x.device, self.generator)
        return [None, *(TokenOrder(orders[i], inverses[i]) for i in range(self.depth - 1))]


@torch.fx.wrap
@register_notrace_function
def _draw_orders(
    rate: float, depth: int, batch: int | None, length: int, device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Orders of all blocks but the first and their inverses, each (n - 1, L), or (n - 1, B, L) given a batch size."""
    shape = (depth - 1, length) if batch is None else (depth - 1, batch, length)
    rates = torch.linspace(0, rate, depth, device=device)[1:].view(-1, *[1] * (len(shape) - 1))
    chance = torch.rand(*shape[:-1], 1, generator=generator, device=device, dtype=torch.float32)
    keys = torch.rand(*shape, generator=generator, device=device, dtype=torch.float32)
    in_place = torch.arange(length, device=device, dtype=torch.float32)
    orders = torch.where(chance < rates, keys, in_place).argsort(dim=-1)
    return orders, orders.argsort(dim=-1)
