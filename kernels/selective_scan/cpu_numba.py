"""Selective scan on CPUs in loops compiled by numba (``cpu_loops``): their arguments, and the threads they run on.

numba's own threads are not used: its simplest pool aborts the process when two threads call it at a time, and none of
them survives a fork. Work items are handed out to a thread pool of this module instead; the loops release the
interpreter's lock.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from zoo.kernels.registration import path_length, without_autocast
from zoo.kernels.selective_scan import cpu_loops as loops
from zoo.kernels.selective_scan.op import new_in_order_of, num_chunks, room_for_states

__all__ = ["backward", "forward"]

ITEMS = 32  # work items to aim at; not a matter of threads, as sums depend on how channels are cut
WIDEST_SLAB = 256
SHARES = 4  # calls of a compiled loop per thread
SMALL = 1 << 18  # steps times channels times states that one thread computes before others would have woken up


def _activation(x: Tensor | None) -> Tensor | None:
    """x in float32 with contiguous channels, without a copy if it is so already."""
    if x is None:
        return None
    return (x if x.stride(-1) == 1 else x.contiguous()).float()


def _parameter(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _view(x: Tensor | None, *dims: str) -> loops.View:
    """x, whose dimensions before the last are named, as the loops take it."""
    if x is None:
        return loops.View(0)
    strides = {name: stride for name, stride, size in zip(dims, x.stride(), x.shape, strict=False) if size > 1}
    return loops.View(x.data_ptr(), **strides)


def _walks(paths: Tensor | None, K: int, L: int, reverse: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in the order in which every path reads them, (K, P), and the number of them, (K,)."""
    table = np.arange(L, dtype=np.int32)[None] if paths is None else paths.numpy().astype(np.int32)
    steps, lengths = np.empty((K, table.shape[1]), dtype=np.int32), np.empty(K, dtype=np.int64)
    for k in range(K):
        row = table[k % len(table)]
        tokens = row[row >= -1]
        lengths[k] = len(tokens)
        steps[k, : len(tokens)] = tokens[::-1] if reverse[k] else tokens
    return steps, lengths


def _sizes(u: Tensor, B: Tensor) -> loops.Sizes:
    """Cuts the channels of every group into slabs: wide ones, as rows are then read in long pieces, but ``ITEMS``."""
    batch, _, L, channels = u.shape
    groups, states = B.shape[3:]
    width = -(-batch * channels // (ITEMS * loops.LANES)) * loops.LANES
    width = min(width, WIDEST_SLAB, channels // groups)
    slabs = -(-channels // (groups * width))
    return loops.Sizes(batch, L, states, channels // groups, width, slabs, slabs * groups)


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of a process; a forked one has none of its parent's, so it gets its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="zoo-scan")


def _run(loop: Callable, items: int, work: int, states: int, *arguments: object) -> None:
    """Calls a compiled loop for all items, on as many threads as torch uses, this one among them.

    Args:
        loop: Takes first item, last item + 1, the arguments and, unless ``states`` is 0, a thread's scratch.
        items: Number of work items.
        work: Steps times channels times states.
        states: States of the scratch.
        arguments: What all calls get.
    """
    threads = 1 if work < SMALL else min(torch.get_num_threads(), items)
    share = -(-items // (SHARES * threads)) if threads > 1 else items
    firsts = iter(range(0, items, share))

    def work_through() -> None:
        scratch = torch.empty(loops.scratch_floats(states))
        pad = (scratch.data_ptr(),) if states else ()
        for first in firsts:
            loop(first, min(first + share, items), *arguments, *pad)

    if threads == 1:
        return work_through()
    pool = _pool(os.getpid(), torch.get_num_threads() - 1)
    others = [pool.submit(work_through) for _ in range(threads - 1)]
    work_through()
    for other in others:
        if not other.cancel():  # one that has not begun yet would find nothing left to do
            other.result()


def _sum_first(x: Tensor) -> Tensor:
    """Sum over the first dimension of a contiguous tensor, in one order whatever the number of threads."""
    if len(x) == 1:
        return x[0]
    y = torch.empty(x.shape[1:])
    items = -(-y.numel() // loops.BLOCK)
    _run(loops.sum_items, items, x.numel(), 0, len(x), y.numel(), x.data_ptr(), y.data_ptr())
    return y


class _Call:
    """What forward and backward share: the inputs as the loops take them, and how the work is cut.

    The tensors are attributes, as the loops get addresses only.
    """

    def __init__(self, u, delta, A, B, C, D, z, bias, states, paths, reverse) -> None:
        self.batch, _, self.L, self.channels = u.shape
        self.K, _, self.N = A.shape
        self.u, self.delta, self.z = _activation(u), _activation(delta), _activation(z)
        self.A, self.B, self.C = _parameter(A.transpose(1, 2)), B.float(), C.float()
        self.D, self.bias, self.states = _parameter(D), _parameter(bias), states
        self.sizes = _sizes(u, B)
        self.steps, self.lengths = _walks(paths, self.K, self.L, reverse)
        self.items = self.batch * self.sizes.slabs
        self.work = self.batch * int(self.lengths.sum()) * self.channels * self.N

    def inputs(self) -> loops.Inputs:
        return loops.Inputs(
            u=_view(self.u, "batch", "path", "token"),
            delta=_view(self.delta, "batch", "path", "token"),
            A=_view(self.A, "path", "state"),
            B=_view(self.B, "batch", "path", "token", "group", "state"),
            C=_view(self.C, "batch", "path", "token", "group", "state"),
            D=_view(self.D, "path"),
            z=_view(self.z, "batch", "token"),
            bias=_view(self.bias, "path"),
            states=_view(self.states, "batch", "path", "token", "state"),
        )

    def states_of(self, x: Tensor | None) -> Tensor:
        """A copy of x (B, K, D, N), if given, as (B, K, N, D)."""
        copy = torch.empty(self.batch, self.K, self.N, self.channels)
        return copy if x is None else copy.copy_(x.transpose(2, 3))

    def run(self, loop: Callable, options: loops.Options, *arguments: object) -> None:
        _run(loop, self.items, self.work, self.N, self.sizes, options, self.steps, self.lengths, *arguments)


@without_autocast
def forward(
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
    """Output (B, L, D), last state (B, K, D, N) and chunk-boundary states (B, K, chunks, N, D)."""
    complete = complete or paths is None
    new = torch.empty if complete else torch.zeros
    steps, (K, _, N) = path_length(u, paths), A.shape
    room = room_for_states(steps, N, window) if save_states else 0
    filled = room <= num_chunks(steps)  # else what is left over stays zero
    states = (new if filled else torch.zeros)(u.shape[0], K, room, N, u.shape[3])
    call = _Call(u, delta, A, B, C, D, z, delta_bias, states, paths, reverse)
    out, last = new(call.batch, call.L, call.channels), call.states_of(initial_state)
    options = loops.Options(delta_softplus, window, complete, initial_state is None, save_states)
    out_view, last_view = _view(out, "batch", "token"), _view(last, "batch", "path", "state")
    call.run(loops.forward_items, options, call.inputs(), out_view, last_view)
    return out.to(u.dtype), last.transpose(2, 3), states


@without_autocast
def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    states: Tensor,
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
) -> list[Tensor]:
    """Gradients of the tensors given, in argument order."""
    complete = complete or paths is None
    new = torch.empty if complete else torch.zeros
    call = _Call(u, delta, A, B, C, D, z, delta_bias, states, paths, reverse)
    grad_out = _activation(grad_out)
    batch, K, N, channels = call.batch, call.K, call.N, call.channels
    parts = call.sizes.group_slabs  # every slab of a group has its own sums over channels

    du, ddelta = (new_in_order_of(x, new) for x in (u, delta))
    dz = None if z is None else new(z.shape)
    dB, dC = (new(parts * batch, *x.shape[1:]) for x in (B, C))
    dA, dstate = torch.empty(batch, K, N, channels), call.states_of(grad_last_state)
    dD, dbias = (None if x is None else torch.empty(batch, K, channels) for x in (D, delta_bias))
    gradients = loops.Gradients(
        u=_view(du, "batch", "path", "token"),
        delta=_view(ddelta, "batch", "path", "token"),
        A=_view(dA, "batch", "path", "state"),
        B=_view(dB, "batch", "path", "token", "group", "state"),
        C=_view(dC, "batch", "path", "token", "group", "state"),
        D=_view(dD, "batch", "path"),
        z=_view(dz, "batch", "token"),
        bias=_view(dbias, "batch", "path"),
        state=_view(dstate, "batch", "path", "state"),
    )
    options = loops.Options(delta_softplus, window, complete, grad_last_state is None, False)
    call.run(loops.backward_items, options, call.inputs(), _view(grad_out, "batch", "token"), gradients)

    dA = _sum_first(dA).transpose(1, 2)
    dB, dC = (_sum_first(x.unflatten(0, (parts, batch))) for x in (dB, dC))
    dD, dbias = (None if x is None else _sum_first(x) for x in (dD, dbias))
    given = zip(
        (du, ddelta, dA, dB, dC, dD, dz, dbias, dstate.transpose(2, 3)),
        (u, delta, A, B, C, D, z, delta_bias, initial_state),
        strict=True,
    )
    return [grad.to(x.dtype) for grad, x in given if x is not None]
