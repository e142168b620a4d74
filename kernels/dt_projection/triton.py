"""Backward of the steps' projection in Triton: the steps' gradient, which is all there is to read, is read once.

Programs stay: each walks over tiles of a path's tokens, as far apart as there are programs, with all channels of a tile
in shared memory, and multiplies them with the weights and with the tokens' low rank. Its part of the weights' gradient
stays in registers and ends in a buffer, whose parts are added up afterwards in a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, contiguous_channels, device_guard, multiprocessors, next_power_of_2
from zoo.kernels.dt_projection import cpu

__all__ = ["backward"]

WIDEST, HIGHEST_RANK = 512, 64  # channels and rank of which a program's part of the weights' gradient fits in registers
SMALLEST_SIDE = 16  # of what tensor cores multiply
MOST_ROWS, LARGEST_TILE = 64, 16384  # tokens, and numbers of the steps' gradient, of a tile
STAGES = 3  # tiles that are in shared memory or on their way there
WARPS, WARPS_WIDE = 8, 4  # of a program, and of one with more than 256 channels


@triton.jit(do_not_specialize=("tokens", "L", "B_n", "C_n"))
def _backward_kernel(
    d_delta, d_B, d_C, rows, weight, d_rows, sums, tokens, L,
    g_b, g_k, g_l, B_b, B_k, B_l, B_n, C_b, C_k, C_l, C_n, r_b, r_k, r_l, o_b, o_k, o_l,
    E: tl.constexpr, R: tl.constexpr, N: tl.constexpr, W: tl.constexpr, BLOCK_E: tl.constexpr, RANK: tl.constexpr,
    REST: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(0)
    e, r, rest = tl.arange(0, BLOCK_E), tl.arange(0, RANK), tl.arange(0, REST)
    of_weight = e[:, None] * R + r[None, :]
    in_weight = (e < E)[:, None] & (r < R)[None, :]
    factors = tl.load(weight + k * E * R + of_weight, mask=in_weight, other=0.0)
    d_weight = tl.zeros((BLOCK_E, RANK), tl.float32)
    for tile in tl.range(program, tl.cdiv(tokens, ROWS), programs, num_stages=STAGES):
        token = tile * ROWS + tl.arange(0, ROWS)
        inside = token < tokens
        b, t = (token // L).to(tl.int64), token % L
        g = tl.load(
            d_delta + (b * g_b + k * g_k + t * g_l)[:, None] + e[None, :],
            mask=inside[:, None] & (e < E)[None, :],
            other=0.0,
        )
        low_rank = tl.load(
            rows + (b * r_b + k * r_k + t * r_l)[:, None] + r[None, :],
            mask=inside[:, None] & (r < R)[None, :],
            other=0.0,
        )
        from_B = d_B + (b * B_b + k * B_k + t * B_l)[:, None] + rest[None, :] * B_n
        from_C = d_C + (b * C_b + k * C_k + t * C_l)[:, None] + (rest - N)[None, :] * C_n
        others = tl.load(from_B, mask=inside[:, None] & (rest < N)[None, :], other=0.0)
        others += tl.load(from_C, mask=inside[:, None] & ((rest >= N) & (rest < 2 * N))[None, :], other=0.0)
        to = d_rows + (b * o_b + k * o_k + t * o_l)[:, None]
        d_low_rank = tl.dot(g, factors)
        d_weight = tl.dot(tl.trans(g), low_rank, d_weight)
        tl.store(to + r[None, :], d_low_rank.to(d_rows.dtype.element_ty), mask=inside[:, None] & (r < R)[None, :])
        tl.store(to + R + rest[None, :], others, mask=inside[:, None] & (rest < W - R)[None, :])
    tl.store(sums + (k * programs + program) * E * R + of_weight, d_weight, mask=in_weight)


@functools.lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; those of an H200 for the CPU, where Triton's interpreter runs."""
    if device.type == "cpu":
        return 232448
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _options(E: int, R: int, N: int, W: int, room: int) -> dict[str, int] | None:
    """Compile-time arguments, if tiles of a few tokens fit in so many bytes of shared memory."""
    block, rank = (max(SMALLEST_SIDE, next_power_of_2(size)) for size in (E, R))
    rows = min(MOST_ROWS, LARGEST_TILE // block)
    while 2 * (STAGES * rows * (block + rank) + block * rank) > room:
        rows //= 2
    if rows < SMALLEST_SIDE:
        return None
    sizes = dict(E=E, R=R, N=N, W=W, BLOCK_E=block, RANK=rank, REST=next_power_of_2(W - R), ROWS=rows)
    return dict(**sizes, STAGES=STAGES, num_warps=WARPS if block <= 256 else WARPS_WIDE)


def backward(d_delta: Tensor, d_B: Tensor, d_C: Tensor, rows: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of rows and weight, from the inputs of ``op.py``; of more than 16 bits, or too many, by torch."""
    batch, K, L, E = d_delta.shape
    R = weight.shape[2]
    narrow = all(x.dtype == rows.dtype and x.dtype.itemsize == 2 for x in (d_delta, d_B, d_C, weight))
    options = None
    if narrow and E <= WIDEST and R <= HIGHEST_RANK:
        options = _options(E, R, d_B.shape[3], rows.shape[3], _shared_memory(rows.device))
    if options is None:
        return cpu.backward(d_delta, d_B, d_C, rows, weight)
    d_delta, rows, weight = contiguous_channels(d_delta), contiguous_channels(rows), weight.contiguous()
    d_rows = torch.empty_like(rows)
    tiles = ceil_div(batch * L, options["ROWS"])
    resident = 3 if options["BLOCK_E"] <= 128 else 2  # programs that shared memory and registers leave room for
    places = max(1, multiprocessors(rows.device) * resident // K)  # of a path
    programs = ceil_div(tiles, ceil_div(tiles, places))  # all have as many tiles, but for the last one
    sums = torch.empty(K, programs, E, R, dtype=torch.float32, device=rows.device)
    with device_guard(rows.device):
        _backward_kernel[(programs, K)](
            d_delta, d_B, d_C, rows, weight, d_rows, sums, batch * L, L, *d_delta.stride()[:3],
            *d_B.stride(), *d_C.stride(), *rows.stride()[:3], *d_rows.stride()[:3], **options,
        )  # fmt: skip
    return [d_rows, sums.sum(1).to(weight.dtype)]
