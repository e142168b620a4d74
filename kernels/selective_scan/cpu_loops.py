"""The selective scan's loops for CPUs, compiled by numba.

A work item is one batch element and one slab of channels, which all read the same group of B and C. It walks the K
paths one after another and a path chunk by chunk, so that sums have the same order whatever the number of threads.
Of a chunk it takes tiles of ``LANES`` channels: first everything but the recurrence is computed for all steps of the
tile (softplus and so on), then state by state h stays in a register for the whole chunk.

``pad`` is the address of one thread's scratch: regions of ``CHUNK`` vectors, then four tables (N, CHUNK). It stays in
the innermost cache. Tensors are float32 and come as ``View``, whose channels are contiguous.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numba

from zoo.kernels.selective_scan import cpu_vectors
from zoo.kernels.selective_scan.cpu_vectors import (
    BYTES,
    LANES,
    exp,
    fma,
    inlined,
    load,
    load_one,
    read,
    sigmoid,
    softplus,
    splat,
    store,
    store_one,
    total,
    write,
)
from zoo.kernels.selective_scan.op import CHUNK

__all__ = [
    "BLOCK", "LANES", "Gradients", "Inputs", "Options", "Sizes", "View", "backward_items", "forward_items",
    "scratch_floats", "sum_items",
]  # fmt: skip

ROW = LANES * BYTES
REGION = CHUNK * ROW
U, STEP, INPUT, Y, SLOPE, DY, GB, DSTEP, DECAY, BEFORE, RECEIVED = (number * REGION for number in range(11))
TABLES = 11 * REGION
LINE = CHUNK * BYTES  # one state's row of a table
BLOCK = 64 * LANES  # numbers of an item of ``sum_items``
ZERO = numba.float32(0.0)


class View(NamedTuple):
    """Address and strides, in numbers, of a tensor (..., D). Address 0: not given. Stride 0: no such dimension."""

    data: int
    batch: int = 0
    path: int = 0
    token: int = 0  # of the saved states: chunk
    group: int = 0
    state: int = 0


class Inputs(NamedTuple):
    """The op's inputs, and the states that the forward saves."""

    u: View
    delta: View
    A: View  # (K, N, D)
    B: View
    C: View
    D: View
    z: View
    bias: View
    states: View  # before every chunk, (B, K, chunks, N, D)


class Gradients(NamedTuple):
    """Gradients of the inputs: dA, dD and dbias for every batch element, dB and dC for every slab of a group."""

    u: View
    delta: View
    A: View  # (B, K, N, D)
    B: View  # (slabs of a group * B, K, L, G, N)
    C: View
    D: View  # (B, K, D)
    z: View
    bias: View  # (B, K, D)
    state: View  # (B, K, N, D): of the last state, and finally of the first


class Sizes(NamedTuple):
    """How the work is cut."""

    batch: int
    tokens: int
    states: int
    group_channels: int
    slab_channels: int  # LANES times something, or less if a group is
    group_slabs: int
    slabs: int  # of all groups


class Options(NamedTuple):
    """Flags of the op and of the call."""

    softplus: bool
    window: int
    complete: bool  # every path visits every token, so that what is written needs no zeros before
    fresh: bool  # the buffer of states that a path updates holds nothing yet, so it starts from zero
    save_states: bool


class Tile(NamedTuple):
    """Where a tile is: ``width`` channels of a path, at most ``LANES``."""

    batch: int
    path: int
    channel: int
    width: int


def _compiled(function: Callable) -> Callable:
    """Compiles without the interpreter's lock, and keeps the code on disk if there is a folder numba can write to.

    numba looks at this file only to see whether the kept code is outdated; the name tells of what else it depends on.
    """
    others = zlib.crc32(Path(cpu_vectors.__file__).read_bytes())
    function.__qualname__ = f"{function.__name__}_{others:08x}_{CHUNK}"
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True, error_model="numpy")(function)


def scratch_floats(states: int) -> int:
    """Numbers in one thread's scratch."""
    return TABLES // BYTES + 4 * states * CHUNK


@inlined
def slab_of(item, sizes):
    """Batch element, group, slab within the group, first channel and last channel + 1 of a work item."""
    batch, slab = item // sizes.slabs, item % sizes.slabs
    group, part = slab // sizes.group_slabs, slab % sizes.group_slabs
    start = group * sizes.group_channels + part * sizes.slab_channels
    return batch, group, part, start, min(start + sizes.slab_channels, (group + 1) * sizes.group_channels)


@inlined
def at(x, tile, token, state):
    """Address of a tile's channels in a view."""
    numbers = tile.batch * x.batch + tile.path * x.path + token * x.token + state * x.state + tile.channel
    return x.data + numbers * BYTES


@inlined
def read_if_given(x, tile):
    return read(at(x, tile, 0, 0), tile.width) if x.data != 0 else splat(0.0)


@inlined
def put(address, x, width, replace):
    """Writes a row or adds it to what is there."""
    write(address, x if replace else read(address, width) + x, width)


@inlined
def clear_slab(x, batch, paths, states, start, stop):
    """Zeros on a slab of x (B, K, N, D)."""
    for path in range(paths):
        for state in range(states):
            for channel in range(start, stop, LANES):
                tile = Tile(batch, path, channel, min(LANES, stop - channel))
                write(at(x, tile, 0, state), splat(0.0), tile.width)


@inlined
def gather(x, table, batch, path, group, tokens, states):
    """Copies B or C, (..., G, N), at the steps of a chunk to a table; zeros where a step has no token."""
    for t in range(len(tokens)):
        address = x.data + (batch * x.batch + path * x.path + tokens[t] * x.token + group * x.group) * BYTES
        for n in range(states):
            number = load_one(address + n * x.state * BYTES) if tokens[t] >= 0 else ZERO
            store_one(table + n * LINE + t * BYTES, number)


@inlined
def scatter(table, y, batch, path, group, tokens, states, replace):
    """Writes a table to, or adds it to, a view (..., G, N) at the steps that have a token."""
    for t in range(len(tokens)):
        if tokens[t] >= 0:
            address = y.data + (batch * y.batch + path * y.path + tokens[t] * y.token + group * y.group) * BYTES
            for n in range(states):
                old = ZERO if replace else load_one(address + n * y.state * BYTES)
                store_one(address + n * y.state * BYTES, old + load_one(table + n * LINE + t * BYTES))


@inlined
def weighted(table, t, row, x):
    """x + table[t] * row: a number of B or C times the row of a region at step t, which is an address."""
    return fma(splat(load_one(table + t * BYTES)), load(row + t * ROW), x)


@inlined
def add_weighted(region, table, t, x):
    """region[t] += table[t] * x"""
    store(region + t * ROW, fma(splat(load_one(table + t * BYTES)), x, load(region + t * ROW)))


@inlined
def add_total(table, t, x):
    """table[t] += sum of x over its channels"""
    store_one(table + t * BYTES, load_one(table + t * BYTES) + total(x))


@inlined
def prepare(pad, x, tile, tokens, with_softplus, with_slope):
    """Fills U, STEP, INPUT (step times u), Y (the skip part of the output) and SLOPE (softplus' derivative)."""
    skip, bias = read_if_given(x.D, tile), read_if_given(x.bias, tile)
    for t in range(len(tokens)):
        u, step = splat(0.0), bias
        if tokens[t] >= 0:
            u = read(at(x.u, tile, tokens[t], 0), tile.width)
            step = step + read(at(x.delta, tile, tokens[t], 0), tile.width)
        if with_softplus:
            if with_slope:
                store(pad + SLOPE + t * ROW, sigmoid(step))
            step = softplus(step)
        store(pad + U + t * ROW, u)
        store(pad + STEP + t * ROW, step)
        store(pad + INPUT + t * ROW, step * u)
        store(pad + Y + t * ROW, skip * u)


@inlined
def run_state(pad, B, C, count, A, h):
    """Takes one state h through a chunk: adds C h to Y, leaves DECAY. Returns the last h. B and C are table rows."""
    for t in range(count):
        decay = exp(load(pad + STEP + t * ROW) * A)
        h = weighted(B, t, pad + INPUT, decay * h)
        store(pad + DECAY + t * ROW, decay)
        add_weighted(pad + Y, C, t, h)
    return h


@inlined
def receive(pad, B, C, count, window):
    """What every step receives from the later ones of its window: left in RECEIVED and, times C, added to Y."""
    received = splat(0.0)
    for t in range(count - 1, -1, -1):
        if t == count - 1 or (t + 1) % window == 0:
            received = splat(0.0)
        else:
            received = load(pad + DECAY + t * ROW) * weighted(B, t + 1, pad + INPUT, received)
        store(pad + RECEIVED + t * ROW, received)
        add_weighted(pad + Y, C, t, received)


@inlined
def forward_tile(pad, x, last, tile, chunk, tokens, sizes, options):
    """Leaves a tile's output at the steps of a chunk in Y, without gate, and takes ``last`` to the chunk's end."""
    prepare(pad, x, tile, tokens, options.softplus, False)
    for n in range(sizes.states):
        B, C = pad + TABLES + n * LINE, pad + TABLES + (sizes.states + n) * LINE
        h = read(at(last, tile, 0, n), tile.width)
        if options.save_states:
            write(at(x.states, tile, chunk, n), h, tile.width)
        h = run_state(pad, B, C, len(tokens), read(at(x.A, tile, 0, n), tile.width), h)
        write(at(last, tile, 0, n), h, tile.width)
        if options.window > 1:
            receive(pad, B, C, len(tokens), options.window)


@inlined
def gate_slab(out, z, batch, tokens, start, stop):
    """out *= silu(z) on a slab; both (B, L, D)."""
    for token in range(tokens):
        for channel in range(start, stop, LANES):
            tile = Tile(batch, 0, channel, min(LANES, stop - channel))
            gate, address = read(at(z, tile, token, 0), tile.width), at(out, tile, token, 0)
            write(address, read(address, tile.width) * gate * sigmoid(gate), tile.width)


@_compiled
def forward_items(first, stop_item, sizes, options, steps, lengths, x, out, last, pad):
    """Forward of work items ``first`` to ``stop_item`` - 1.

    Args:
        steps: Token read at every step of every path, -1 for none, (K, P) int32.
        lengths: Number of steps of every path, (K,).
        x: Inputs; the states before every chunk are written to ``x.states``.
        out: Output, (B, L, D).
        last: Initial states, turned into the last states, (B, K, N, D).
        pad: Address of ``scratch_floats`` numbers.
    """
    C_table = pad + TABLES + sizes.states * LINE
    for item in range(first, stop_item):
        batch, group, _, start, stop = slab_of(item, sizes)
        if options.fresh:
            clear_slab(last, batch, len(lengths), sizes.states, start, stop)
        for path in range(len(lengths)):
            replace = options.complete and path == 0
            for step in range(0, lengths[path], CHUNK):
                tokens = steps[path, step : min(step + CHUNK, lengths[path])]
                gather(x.B, pad + TABLES, batch, path, group, tokens, sizes.states)
                gather(x.C, C_table, batch, path, group, tokens, sizes.states)
                for channel in range(start, stop, LANES):
                    tile = Tile(batch, path, channel, min(LANES, stop - channel))
                    forward_tile(pad, x, last, tile, step // CHUNK, tokens, sizes, options)
                    for t in range(len(tokens)):
                        if tokens[t] >= 0:
                            put(at(out, tile, tokens[t], 0), load(pad + Y + t * ROW), tile.width, replace)
        if x.z.data != 0:
            gate_slab(out, x.z, batch, sizes.tokens, start, stop)


@inlined
def prepare_gradients(pad, grad_out, z, tile, tokens):
    """Fills DY, the gradient of the output before the gate, and clears GB and DSTEP."""
    for t in range(len(tokens)):
        dy = splat(0.0)
        if tokens[t] >= 0:
            dy = read(at(grad_out, tile, tokens[t], 0), tile.width)
            if z.data != 0:
                gate = read(at(z, tile, tokens[t], 0), tile.width)
                dy = dy * gate * sigmoid(gate)
        store(pad + DY + t * ROW, dy)
        store(pad + GB + t * ROW, splat(0.0))
        store(pad + DSTEP + t * ROW, splat(0.0))


@inlined
def run_state_again(pad, B, C, dC, count, A, h, with_output):
    """``run_state`` for the backward: leaves BEFORE too, the h before every step, and adds h dy to dC."""
    for t in range(count):
        decay = exp(load(pad + STEP + t * ROW) * A)
        store(pad + DECAY + t * ROW, decay)
        store(pad + BEFORE + t * ROW, h)
        h = weighted(B, t, pad + INPUT, decay * h)
        add_total(dC, t, h * load(pad + DY + t * ROW))
        if with_output:
            add_weighted(pad + Y, C, t, h)


@inlined
def add_decay_gradient(pad, t, w, A, dA):
    """Adds w A to DSTEP and returns dA + w step, where w is a gradient of step A."""
    store(pad + DSTEP + t * ROW, fma(w, A, load(pad + DSTEP + t * ROW)))
    return fma(w, load(pad + STEP + t * ROW), dA)


@inlined
def run_state_back(pad, B, C, dB, count, A, g):
    """Takes the gradient g of one state from the end of a chunk to its beginning; adds to GB, DSTEP and dB.

    Returns:
        The gradient of the state before the chunk, and that of A.
    """
    dA = splat(0.0)
    for t in range(count - 1, -1, -1):
        g = weighted(C, t, pad + DY, g)
        add_weighted(pad + GB, B, t, g)
        add_total(dB, t, g * load(pad + INPUT + t * ROW))
        g = g * load(pad + DECAY + t * ROW)
        dA = add_decay_gradient(pad, t, g * load(pad + BEFORE + t * ROW), A, dA)
    return g, dA


@inlined
def receive_back(pad, B, C, dB, dC, count, window, A):
    """What windows add to the gradients of one state; returns that of A.

    ``handed`` is the gradient that a step's input gets from the earlier outputs of its window.
    """
    dA, handed, arrived = splat(0.0), splat(0.0), splat(0.0)
    for t in range(count):
        handed = splat(0.0) if t % window == 0 else load(pad + DECAY + (t - 1) * ROW) * arrived
        received = load(pad + RECEIVED + t * ROW)
        arrived = weighted(C, t, pad + DY, handed)
        add_weighted(pad + GB, B, t, handed)
        add_total(dB, t, handed * load(pad + INPUT + t * ROW))
        add_total(dC, t, received * load(pad + DY + t * ROW))
        dA = add_decay_gradient(pad, t, arrived * received, A, dA)
    return dA


@inlined
def backward_tile(pad, x, grads, tile, chunk, tokens, sizes, options):
    """All gradients of a tile at the steps of a chunk but those ``finish_tile`` writes."""
    count, states = len(tokens), sizes.states
    for n in range(states):
        B = pad + TABLES + n * LINE
        C, dB, dC = B + states * LINE, B + 2 * states * LINE, B + 3 * states * LINE
        A, h = read(at(x.A, tile, 0, n), tile.width), read(at(x.states, tile, chunk, n), tile.width)
        run_state_again(pad, B, C, dC, count, A, h, x.z.data != 0)
        g, dA = run_state_back(pad, B, C, dB, count, A, read(at(grads.state, tile, 0, n), tile.width))
        write(at(grads.state, tile, 0, n), g, tile.width)
        if options.window > 1:
            receive(pad, B, C, count, options.window)
            dA = dA + receive_back(pad, B, C, dB, dC, count, options.window, A)
        put(at(grads.A, tile, 0, n), dA, tile.width, False)


@inlined
def finish_tile(pad, x, grads, tile, tokens, options):
    """Gradients of u, delta, D and bias from GB (sum over n of B g) and DSTEP; the ungated output goes to z's."""
    skip, dD, dbias = read_if_given(x.D, tile), splat(0.0), splat(0.0)
    first = options.complete and tile.path == 0
    first_of_u = first or (options.complete and grads.u.path != 0)
    for t in range(len(tokens)):
        u, dy, GB_t = load(pad + U + t * ROW), load(pad + DY + t * ROW), load(pad + GB + t * ROW)
        dstep = fma(GB_t, u, load(pad + DSTEP + t * ROW))
        if options.softplus:
            dstep = dstep * load(pad + SLOPE + t * ROW)
        dD, dbias = fma(dy, u, dD), dbias + dstep
        if tokens[t] >= 0:
            du = fma(GB_t, load(pad + STEP + t * ROW), dy * skip)
            put(at(grads.u, tile, tokens[t], 0), du, tile.width, first_of_u)
            put(at(grads.delta, tile, tokens[t], 0), dstep, tile.width, options.complete)
            if x.z.data != 0:
                put(at(grads.z, tile, tokens[t], 0), load(pad + Y + t * ROW), tile.width, first)
    if x.D.data != 0:
        put(at(grads.D, tile, 0, 0), dD, tile.width, False)
    if x.bias.data != 0:
        put(at(grads.bias, tile, 0, 0), dbias, tile.width, False)


@inlined
def gate_slab_back(grad_out, z, dz, batch, tokens, start, stop):
    """Turns the output before the gate, in dz, into the gradient of z on a slab; all (B, L, D)."""
    for token in range(tokens):
        for channel in range(start, stop, LANES):
            tile = Tile(batch, 0, channel, min(LANES, stop - channel))
            gate, address = read(at(z, tile, token, 0), tile.width), at(dz, tile, token, 0)
            opened = sigmoid(gate)
            slope = opened * fma(gate, splat(1.0) - opened, splat(1.0))
            grad = read(at(grad_out, tile, token, 0), tile.width)
            write(address, read(address, tile.width) * grad * slope, tile.width)


@_compiled
def backward_items(first, stop_item, sizes, options, steps, lengths, x, grad_out, grads, pad):
    """Backward of the work items; arguments as in ``forward_items``, grad_out (B, L, D), and where gradients go.

    With g_t the gradient of h_t: g_t = C_t dy_t + exp(step_{t+1} A) g_{t+1}; everything else follows from g, from the
    recomputed states and from w_t = g_t exp(step_t A) h_{t-1}.
    """
    C_table, dB_table = pad + TABLES + sizes.states * LINE, pad + TABLES + 2 * sizes.states * LINE
    dC_table = dB_table + sizes.states * LINE
    for item in range(first, stop_item):
        batch, group, part, start, stop = slab_of(item, sizes)
        clear_slab(grads.A, batch, len(lengths), sizes.states, start, stop)
        if x.D.data != 0:
            clear_slab(grads.D, batch, len(lengths), 1, start, stop)
        if x.bias.data != 0:
            clear_slab(grads.bias, batch, len(lengths), 1, start, stop)
        if options.fresh:
            clear_slab(grads.state, batch, len(lengths), sizes.states, start, stop)
        for path in range(len(lengths)):
            for step in range((lengths[path] - 1) // CHUNK * CHUNK, -1, -CHUNK):
                tokens = steps[path, step : min(step + CHUNK, lengths[path])]
                gather(x.B, pad + TABLES, batch, path, group, tokens, sizes.states)
                gather(x.C, C_table, batch, path, group, tokens, sizes.states)
                for i in range(2 * sizes.states * CHUNK):
                    store_one(dB_table + i * BYTES, ZERO)
                for channel in range(start, stop, LANES):
                    tile = Tile(batch, path, channel, min(LANES, stop - channel))
                    prepare(pad, x, tile, tokens, options.softplus, True)
                    prepare_gradients(pad, grad_out, x.z, tile, tokens)
                    backward_tile(pad, x, grads, tile, step // CHUNK, tokens, sizes, options)
                    finish_tile(pad, x, grads, tile, tokens, options)
                replace, row = options.complete, part * sizes.batch + batch
                scatter(dB_table, grads.B, row, path, group, tokens, sizes.states, replace)
                scatter(dC_table, grads.C, row, path, group, tokens, sizes.states, replace)
        if x.z.data != 0:
            gate_slab_back(grad_out, x.z, grads.z, batch, sizes.tokens, start, stop)


@_compiled
def sum_items(first, stop_item, rows, numbers, x, y):
    """Sums x (rows, numbers) over the rows to y (numbers,), for blocks of ``BLOCK`` numbers; x and y are addresses."""
    for i in range(first * BLOCK, min(stop_item * BLOCK, numbers), LANES):
        width = min(LANES, numbers - i)
        row_sum = read(x + i * BYTES, width)
        for row in range(1, rows):
            row_sum = row_sum + read(x + (row * numbers + i) * BYTES, width)
        write(y + i * BYTES, row_sum, width)
