"""Causal convolution in Triton: one launch for all paths and both directions, forward and backward.

A program owns BLOCK_D channels of a run of tokens and walks along it once, with the last W tokens in registers: a row
is one coalesced read, and nothing is computed twice. Rows are handled ROWS at a time, so that their reads are in flight
together. Tuples of rows (``window``) are unrolled at compile time.

Both directions share the walk. After row t a causal path has seen all that its output at row t needs, and a reversed
path all that its output at row t - (W - 1) needs: a reversed path is a causal one with its taps in the opposite order
that answers W - 1 rows later (``delay``). The same holds for the gradients: with the last W output gradients of a path,
taken before the activation, both directions know the gradient of x at row t - (W - 1).

The backward recomputes the values before the SiLU. Paths that read the same x are walked together by one program, which
adds up their gradients of x. Gradients of weight and bias are summed along the run and written to the program's own
slot of a buffer, which is added up afterwards: no atomics, so every call gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, contiguous_channels, device_guard, next_power_of_2
from zoo.kernels.registration import accumulate_dtype
from zoo.kernels.triton_math import sigmoid

__all__ = ["backward", "forward"]

BLOCK_D = 128  # channels of a program, four for each lane of a warp
ROWS = tl.constexpr(4)  # rows read at a time
FORWARD_RUN, BACKWARD_RUN = 32, 64  # tokens of a run, about


@triton.jit
def _program(L, D, run_length, PATHS: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's batch element, path, first row, number among all runs (int64) and channels (BLOCK_D,).

    Neighbours in launch order read the same rows: first all paths, then all channels, runs and batch elements.
    """
    program = tl.program_id(0).to(tl.int64)
    path, program = program % PATHS, program // PATHS
    tiles, runs = tl.cdiv(D, BLOCK_D), tl.cdiv(L, run_length)
    tile, run = program % tiles, program // tiles
    return run // runs, path, run % runs * run_length, run, tile * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def _tap_number(w: tl.constexpr, path, W: tl.constexpr, REVERSED: tl.constexpr):
    """Which tap of this path multiplies row w of the window."""
    backwards = (REVERSED >> path) & 1
    return w + backwards * (W - 1 - 2 * w)


@triton.jit
def _load_path(
    weight, bias, path, channel, D, W: tl.constexpr, REVERSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Path number, its delay in rows, its taps in the order of the window and its bias, all (BLOCK_D,)."""
    taps = ()
    for w in tl.static_range(W):
        offset = (path * D + channel) * W + _tap_number(w, path, W, REVERSED)
        taps = taps + (tl.load(weight + offset, mask=channel < D, other=0.0).to(dtype),)
    shift = tl.zeros(channel.shape, dtype)
    if HAS_BIAS:
        shift = tl.load(bias + path * D + channel, mask=channel < D, other=0.0).to(dtype)
    return path, ((REVERSED >> path) & 1) * (W - 1), taps, shift


@triton.jit
def _load_rows(pointer, first, stride, L, channel, D, COUNT: tl.constexpr, dtype: tl.constexpr):
    """COUNT rows from ``first`` on, a tuple of (BLOCK_D,); zero outside the sequence."""
    rows = ()
    for i in tl.static_range(COUNT):
        mask = (first + i >= 0) & (first + i < L) & (channel < D)
        rows = rows + (tl.load(pointer + (first + i) * stride + channel, mask=mask, other=0.0).to(dtype),)
    return rows


@triton.jit
def _dot(taps, window, start: tl.constexpr, W: tl.constexpr):
    """Sum of tap w times row ``start + w`` of the window."""
    total = taps[0] * window[start]
    for w in tl.static_range(1, W):
        total += taps[w] * window[start + w]
    return total


@triton.jit
def _add_gradients(d_rows, taps, d_window, W: tl.constexpr):
    """Adds what one path contributes to the gradients of ROWS rows of x: its taps in the opposite order."""
    new_rows = ()
    for i in tl.static_range(ROWS):
        total = d_rows[i]
        for w in tl.static_range(W):
            total += taps[W - 1 - w] * d_window[i + w]
        new_rows = new_rows + (total,)
    return new_rows


@triton.jit
def _add_products(sums, factor, window, start: tl.constexpr, W: tl.constexpr):
    """Adds ``factor`` times row ``start + w`` of the window to the sum of tap w."""
    new_sums = ()
    for w in tl.static_range(W):
        new_sums = new_sums + (sums[w] + factor * window[start + w],)
    return new_sums


@triton.jit
def _forward_kernel(
    x, weight, bias, out, B, L, D, stride_batch, stride_path, stride_row, run_length, K: tl.constexpr,
    W: tl.constexpr, REVERSED: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    batch, path, first, _, channel = _program(L, D, run_length, K, BLOCK_D)
    end = tl.minimum(first + run_length, L)
    path, delay, taps, shift = _load_path(weight, bias, path, channel, D, W, REVERSED, HAS_BIAS, dtype)
    x += batch * stride_batch + path * stride_path
    out += (path * B + batch) * L * D

    window = _load_rows(x, first - (W - 1), stride_row, L, channel, D, W - 1, dtype)
    for t in range(first, end + delay, ROWS):
        window = window + _load_rows(x, t, stride_row, L, channel, D, ROWS, dtype)
        for i in tl.static_range(ROWS):
            y = shift + _dot(taps, window, i, W)
            if SILU:
                y *= sigmoid(y)
            row = t + i - delay
            tl.store(out + row * D + channel, y, mask=(row >= first) & (row < end) & (channel < D))
        window = window[ROWS:]


@triton.jit
def _backward_kernel(
    grad, x, weight, bias, d_x, sums, L, D, grad_stride_path, grad_stride_batch, grad_stride_row,
    stride_batch, stride_path, stride_row, run_length, K: tl.constexpr, SHARED: tl.constexpr, W: tl.constexpr,
    REVERSED: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    PATHS_HERE: tl.constexpr = K if SHARED else 1
    batch, first_path, first, run, channel = _program(L, D, run_length, K // PATHS_HERE, BLOCK_D)
    end = tl.minimum(first + run_length, L)
    x += batch * stride_batch + first_path * stride_path
    d_x += (batch * (K // PATHS_HERE) + first_path) * L * D

    zero = tl.zeros((BLOCK_D,), dtype)
    states = ()  # of every path: gradients before the activation at the last W - 1 rows, sums of the taps and the bias
    paths = ()
    for k in tl.static_range(PATHS_HERE):
        states = states + (((zero,) * (W - 1), (zero,) * W, zero),)
        paths = paths + (_load_path(weight, bias, first_path + k, channel, D, W, REVERSED, HAS_BIAS, dtype),)

    window = _load_rows(x, first - (W - 1), stride_row, L, channel, D, W - 1, dtype)
    for t in range(first, end + W - 1, ROWS):
        window = window + _load_rows(x, t, stride_row, L, channel, D, ROWS, dtype)
        d_rows = (zero,) * ROWS
        next_states = ()
        for k in tl.static_range(PATHS_HERE):
            path, delay, taps, shift = paths[k]
            d_window, tap_sums, shift_sum = states[k]
            grad_path = grad + path * grad_stride_path + batch * grad_stride_batch
            d_outs = _load_rows(grad_path, t - delay, grad_stride_row, L, channel, D, ROWS, dtype)
            for i in tl.static_range(ROWS):
                d_y = d_outs[i]
                if SILU:
                    y = shift + _dot(taps, window, i, W)
                    gate = sigmoid(y)
                    d_y *= gate * (1 + y * (1 - gate))
                d_window = d_window + (d_y,)
                row = t + i - delay  # rows of the neighbouring runs are read here too, but count for the taps there
                own = tl.where((row >= first) & (row < end), d_y, 0.0)
                tap_sums = _add_products(tap_sums, own, window, i, W)
                shift_sum += own
            d_rows = _add_gradients(d_rows, taps, d_window, W)
            next_states = next_states + ((d_window[ROWS:], tap_sums, shift_sum),)
        for i in tl.static_range(ROWS):
            row = t + i - (W - 1)
            tl.store(d_x + row * D + channel, d_rows[i], mask=(row >= first) & (row < end) & (channel < D))
        window = window[ROWS:]
        states = next_states

    for k in tl.static_range(PATHS_HERE):
        slot = sums + (run * K + first_path + k) * (W + 1) * D + channel
        for w in tl.static_range(W):
            tap = _tap_number(w, first_path + k, W, REVERSED)
            tl.store(slot + tap * D, states[k][1][w], mask=channel < D)
        tl.store(slot + W * D, states[k][2], mask=channel < D)


def _run_length(L: int, target: int) -> int:
    """Cuts L tokens into runs of equal length, about ``target``."""
    return ceil_div(L, max(1, round(L / target)))


def _path_stride(x: Tensor) -> int:
    """Elements between the inputs of two paths, 0 where all paths read the same."""
    return x.stride(1) if x.shape[1] > 1 else 0


def _options(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[bool]) -> dict:
    """Compile-time arguments of both kernels."""
    return dict(
        K=weight.shape[0],
        W=weight.shape[2],
        REVERSED=sum(flag << k for k, flag in enumerate(reverse)),
        HAS_BIAS=bias is not None,
        SILU=silu,
        BLOCK_D=BLOCK_D,
        dtype=tl.float64 if accumulate_dtype(x) == torch.float64 else tl.float32,
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[bool]) -> Tensor:
    """Outputs (K, B, L, D) in x's dtype from canonical inputs (see ``op.py``)."""
    batch, _, L, D = x.shape
    K = weight.shape[0]
    x, taps = contiguous_channels(x), weight.contiguous()
    shifts = None if bias is None else bias.contiguous()
    out = x.new_empty(K, batch, L, D)
    run_length = _run_length(L, FORWARD_RUN)
    grid = (K * batch * ceil_div(L, run_length) * ceil_div(D, BLOCK_D),)
    with device_guard(x.device):
        _forward_kernel[grid](
            x, taps, shifts, out, batch, L, D, x.stride(0), _path_stride(x), x.stride(2), run_length,
            **_options(x, weight, bias, silu, reverse), num_warps=1,
        )  # fmt: skip
    return out


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[bool]
) -> list[Tensor]:
    """Gradients of x, weight and, if given, bias."""
    batch, paths_x, L, D = x.shape
    K, _, W = weight.shape
    x, grad_out, taps = contiguous_channels(x), contiguous_channels(grad_out), weight.contiguous()
    shifts = None if bias is None else bias.contiguous()
    run_length = _run_length(L, BACKWARD_RUN)
    runs = batch * ceil_div(L, run_length)
    d_x = x.new_empty(batch, paths_x, L, D)
    sums = x.new_empty(runs, K, W + 1, D, dtype=accumulate_dtype(x))
    # The state of every path walked together is in registers: the more paths, the fewer channels for a lane.
    num_warps = min(4, next_power_of_2(K)) if paths_x == 1 else 1
    with device_guard(x.device):
        _backward_kernel[(paths_x * runs * ceil_div(D, BLOCK_D),)](
            grad_out, x, taps, shifts, d_x, sums, L, D, grad_out.stride(0), grad_out.stride(1), grad_out.stride(2),
            x.stride(0), _path_stride(x), x.stride(2), run_length, SHARED=paths_x == 1,
            **_options(x, weight, bias, silu, reverse), num_warps=num_warps,
        )  # fmt: skip
    d_taps, d_shifts = sums.sum(0).split([W, 1], dim=1)  # (K, W, D), (K, 1, D)
    d_weight = d_taps.transpose(1, 2).to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    if bias is None:
        return [d_x, d_weight]
    return [d_x, d_weight, d_shifts.squeeze(1).to(bias.dtype, memory_format=torch.contiguous_format, copy=True)]
