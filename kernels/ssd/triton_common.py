"""What the forward and the backward of SSD in Triton share: decays, states between chunks, and block sizes.

Launches of a forward: the decays (``steps_kernel``), then one program per head and batch element that walks its chunks
with the state in registers. Where heads and batch alone do not fill a GPU, paths are cut into regions of several
chunks: ``states_kernel`` finds what every region adds to the state, ``carry_kernel`` hands the states on, and then all
regions are walked at once.

A chunk is cut by places in the path, whichever way it is walked: a reversed path goes through its chunks from the last
to the first and sees the other triangle of every tile. Tokens are read where they lie.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, contiguous_channels, next_power_of_2
from zoo.kernels.registration import accumulate_dtype, path_length
from zoo.kernels.triton_math import LOG2E

__all__ = [
    "PROGRAMS",
    "Blocks",
    "Inputs",
    "carry_states",
    "dot",
    "load_rows",
    "offset_type",
    "raw_steps",
    "region_states",
    "tokens_at",
    "walk_sums",
    "walking_order",
]

PROGRAMS = 512  # as many programs as keep a large GPU busy: about four to each multiprocessor


@triton.jit
def dot(a, b, ACC: tl.constexpr):
    """Product of two tiles; 16-bit tiles on tensor cores, float32 ones never in TF32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def tokens_at(table, k, S, place, HAS_TABLE: tl.constexpr, OFFSET: tl.constexpr):
    """Tokens at places of path k: >= 0 a token, -1 a zero token, -2 no step at all.

    Their type OFFSET is that of all offsets inside a batch element: 64 bits only where 32 do not suffice.
    """
    if HAS_TABLE:
        token = tl.load(table + k * S + place, mask=place < S, other=-2)
    else:
        token = tl.where(place < S, place, -2)
    return token.to(OFFSET)


@triton.jit
def load_rows(x, token, row, column, COLUMNS: tl.constexpr):
    """Rows of x at the tokens, (Q, columns); zero where there is none."""
    mask = (token >= 0)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(x + (token[:, None] * row + column[None, :]), mask=mask, other=0.0)


@triton.jit
def walking_order(place, backwards):
    """Numbers that grow along the walk: a token reads those whose number is not above its own.

    Compared inside the loop over chunks: a mask made before it would take a register per element all along.
    """
    return tl.where(backwards, -place, place)


@triton.jit
def walk_sums(x, backwards):
    """Sums over this and all earlier steps of a chunk; places are the first dimension."""
    if backwards:
        sums = tl.cumsum(x, 0, reverse=True)
    else:
        sums = tl.cumsum(x, 0)
    return sums


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact to rounding also where exp(x) is far below 1."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * 0.3333333333333333))
    return tl.maximum(x, 0.0) + tl.where(e < 0.01, series, tl.log(1.0 + e))


@triton.jit
def raw_steps(
    dt, bias, token, k, h, H, dt_l, dt_h,
    SOFTPLUS: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dt with its bias and the factor of the input, both (Q, heads); the factor is 0 where there is no step."""
    h_mask = h < H
    mask = (token >= 0)[:, None] & h_mask[None, :]
    raw = tl.load(dt + (token[:, None] * dt_l + h[None, :] * dt_h), mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        raw += tl.load(bias + k * H + h, mask=h_mask, other=0.0).to(ACC)[None, :]
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    if not HAS_A:
        step = tl.full(raw.shape, 1.0, ACC)
    return raw, tl.where((token >= -1)[:, None], step, 0.0)


@triton.jit(do_not_specialize=["S"])
def steps_kernel(
    dt, A, bias, table, decays, steps, K, S, H, T, reverse_mask, dt_b, dt_k, dt_l, dt_h,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Of every step: its factor of the input, and the binary logarithm of the decay since its chunk began."""
    path = tl.program_id(2).to(tl.int64)
    k = tl.program_id(2) % K
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    place = tl.program_id(0) * Q + tl.arange(0, Q)
    token = tokens_at(table, k, S, place, HAS_TABLE, OFFSET)
    dt_at = dt + path // K * dt_b + k * dt_k
    raw, step = raw_steps(dt_at, bias, token, k, h, H, dt_l, dt_h, SOFTPLUS, HAS_A, HAS_BIAS, ACC)
    if HAS_A:
        log_decay = step * tl.load(A + k * H + h, mask=h < H, other=0.0).to(ACC)[None, :]
    else:
        log_decay = raw * step
    decay = walk_sums(log_decay * LOG2E, (reverse_mask >> k) & 1 == 1)
    cell = (path * H + h[None, :]) * T + place[:, None]
    mask = (h < H)[None, :] & (place < T)[:, None]
    tl.store(decays + cell, decay, mask=mask)
    tl.store(steps + cell, step, mask=mask)


@triton.jit
def _walk_region(
    x, B, start, decays, steps, table, states, ends, totals, k, head, path, region, S, H, T, regions, chunks,
    region_chunks, reverse, p_block, x_l, B_l,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    AGAINST: tl.constexpr, HAS_START: tl.constexpr, HAS_TABLE: tl.constexpr, SAVE: tl.constexpr, ENDS: tl.constexpr,
    ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Walks a region and stores the state before every chunk (SAVE) and after the last (ENDS).

    AGAINST the path's order, x is the gradient of the output, B is C, and the states are their gradients.
    """
    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    cell = p[:, None] * N + n[None, :]
    mask = (p < P)[:, None] & (n < N)[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if HAS_START:
        state = tl.load(start + ((path * regions + region) * H + head) * P * N + cell, mask=mask, other=0.0).to(ACC)
    row = (path * H + head) * T
    total = tl.zeros([1], ACC)
    backwards = reverse
    if AGAINST:
        backwards = reverse == 0
    first = region * region_chunks
    for number in tl.range(first, tl.minimum(first + region_chunks, chunks), disable_licm=True):
        chunk = tl.where(backwards, chunks - 1 - number, number)
        if SAVE:
            at = states + ((path * chunks + chunk) * H + head) * P * N
            tl.store(at + cell, state.to(states.dtype.element_ty), mask=mask)
        token = tokens_at(table, k, S, chunk * Q + q, HAS_TABLE, OFFSET)
        x_t = load_rows(x, token, x_l, p, P)
        B_t = load_rows(B, token, B_l, n, N).to(x.dtype.element_ty)
        decay = tl.load(decays + row + chunk * Q + q)
        end = tl.load(decays + row + chunk * Q + tl.where(reverse, 0, Q - 1))
        if AGAINST:
            weight = tl.exp2(decay)
        else:
            weight = tl.exp2(end - decay) * tl.load(steps + row + chunk * Q + q)
        weighted = (x_t.to(ACC) * weight[:, None]).to(x.dtype.element_ty)
        state = state * tl.exp2(end) + dot(tl.trans(weighted), B_t, ACC)
        total += end
    if ENDS:
        tl.store(ends + ((path * regions + region) * H + head) * P * N + cell, state, mask=mask)
        tl.store(totals + (path * regions + region) * H + head + tl.arange(0, 1), total)


@triton.jit(do_not_specialize=["S", "chunks", "region_chunks"])
def states_kernel(
    x, B, dy, C, start, start_grad, decays, steps, table, states, ends, totals, K, S, H, T, group_heads, regions,
    chunks, region_chunks, reverse_mask, paths,
    x_b, x_k, x_l, x_h, B_b, B_k, B_l, B_g, dy_b, dy_l, dy_h, C_b, C_k, C_l, C_g,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr, HAS_START_GRAD: tl.constexpr, HAS_TABLE: tl.constexpr, SAVE: tl.constexpr,
    ENDS: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """States along the paths, and in the second half of the grid their gradients against the paths."""
    p_blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // p_blocks
    p_block = tl.program_id(0) % p_blocks
    region = tl.program_id(1) % regions
    path = tl.program_id(2).to(tl.int64)
    b = path // K
    k = tl.program_id(2) % K
    reverse = (reverse_mask >> k) & 1 == 1
    group = head // group_heads
    if tl.program_id(1) < regions:
        _walk_region(
            x + b * x_b + k * x_k + head * x_h, B + b * B_b + k * B_k + group * B_g, start, decays, steps, table,
            states, ends, totals, k, head, path, region, S, H, T, regions, chunks, region_chunks, reverse, p_block,
            x_l, B_l, P, N, Q, BLOCK_P, BLOCK_N, False, HAS_START, HAS_TABLE, SAVE, ENDS, ACC, OFFSET,
        )  # fmt: skip
    else:
        _walk_region(
            dy + b * dy_b + head * dy_h, C + b * C_b + k * C_k + group * C_g, start_grad, decays, steps, table,
            states + tl.cast(paths, tl.int64) * chunks * H * P * N,
            ends + tl.cast(paths, tl.int64) * regions * H * P * N,
            totals + paths * regions * H, k, head, path, region, S, H, T, regions, chunks, region_chunks, reverse,
            p_block, dy_l, C_l, P, N, Q, BLOCK_P, BLOCK_N, True, HAS_START_GRAD, HAS_TABLE, SAVE, ENDS, ACC, OFFSET,
        )  # fmt: skip


@triton.jit
def carry_kernel(
    start, ends, totals, H, regions, SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_START: tl.constexpr, ACC: tl.constexpr
):
    """Turns what every region adds to the state into the state before every region, in place."""
    path = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cell < SIZE
    state = tl.zeros([BLOCK], ACC)
    if HAS_START:
        state = tl.load(start + (path * H + head) * SIZE + cell, mask=mask, other=0.0).to(ACC)
    for region in range(regions):
        row = (path * regions + region) * H + head
        added = tl.load(ends + row * SIZE + cell, mask=mask, other=0.0)
        tl.store(ends + row * SIZE + cell, state, mask=mask)
        state = state * tl.exp2(tl.load(totals + row)) + added


def offset_type(L: int, *row_strides: int) -> tl.dtype:
    """Integer type that holds the offset of every token's row in tensors with these strides between rows."""
    return tl.int32 if L * max(row_strides) < 2**31 else tl.int64


@dataclass(frozen=True)
class Blocks:
    """Sizes of the tiles, by the sizes of the call alone: one configuration for each, nothing is tuned at run time."""

    Q: int  # steps of a chunk
    P: int  # padded width of a head
    N: int  # padded states
    warps: int  # of a program that walks a path
    stages: int  # chunks whose tiles are being loaded or worked on at a time
    gradient_warps: int  # of a program of gradients_kernel
    gradient_stages: tuple[int, int]  # heads whose tiles are in flight in either of its loops

    @classmethod
    def of(cls, x: Tensor, B: Tensor) -> "Blocks":
        """64 steps to a chunk: fewer spend more on states, more spend more on the inside, in time and in registers.

        64 rows are what four warps multiply at once on Hopper's tensor cores; more warps would repeat each other's
        work. Where tiles take more registers than four warps have, by dtype or width, there are eight; and where they
        would still spill, chunks are shorter and loads are not begun ahead of time.
        """
        width, N = (max(16, next_power_of_2(size)) for size in (x.shape[-1], B.shape[-1]))
        largest = max(width, N)
        if x.element_size() > 2:
            return cls(64 if largest <= 32 else 32 if largest <= 64 else 16, width, N, 8, 1, 8, (1, 1))
        wide = width > 64 or N > 128
        return cls(64 if largest <= 128 else 32, width, N, 4, 2, 8 if wide else 4, (1 if wide else 2, 1))

    def fit(self, x: Tensor) -> bool:
        """Whether a state of x's dtype leaves room in shared memory for all that is worked on with it."""
        return max(self.P, self.N) <= 256 and self.P * self.N * x.element_size() <= 64 * 1024


class Inputs:
    """Arguments of the op as the kernels take them, with the decays that all kernels read.

    Args:
        x, dt, A, B, C, dt_bias, paths, dt_softplus, reverse: As in the op.
        row_strides: Distances between tokens in other tensors that kernels address.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor | None,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        paths: Tensor | None,
        dt_softplus: bool,
        reverse: list[bool],
        *row_strides: int,
    ) -> None:
        self.dtype = accumulate_dtype(x)
        self.batch, self.shared, self.L, self.heads, self.width = x.shape
        self.K, self.groups, self.N = dt.shape[1], *B.shape[3:]
        self.blocks = Blocks.of(x, B)
        self.S = path_length(x, paths)
        self.chunks = ceil_div(self.S, self.blocks.Q)
        self.T = self.chunks * self.blocks.Q
        self.x, self.dt, self.B, self.C = contiguous_channels(x), dt, contiguous_channels(B), contiguous_channels(C)
        self.A, self.dt_bias, self.paths = (None if t is None else t.contiguous() for t in (A, dt_bias, paths))
        self.reverse_mask = sum(1 << k for k in range(self.K) if reverse[k])
        self.x_strides = (self.x.stride(0), self.x.stride(1) if self.shared > 1 else 0, *self.x.stride()[2:4])
        self.dt_options = dict(SOFTPLUS=dt_softplus, HAS_A=A is not None, HAS_BIAS=dt_bias is not None, BLOCK_H=16)
        rows = [t.stride(2) for t in (self.x, dt, self.B, self.C)]
        rows += [self.heads * self.width, self.groups * self.N, *row_strides]
        self.options = dict(
            Q=self.blocks.Q,
            HAS_TABLE=paths is not None,
            ACC=tl.float64 if self.dtype == torch.float64 else tl.float32,
            OFFSET=offset_type(self.L, *rows),
        )
        self.decays = self.new(self.batch, self.K, self.heads, self.T)
        self.steps = self.new(self.batch, self.K, self.heads, self.T)
        steps_kernel[self.grid_of_steps](
            dt, self.A, self.dt_bias, self.paths, self.decays, self.steps, self.K, self.S, self.heads, self.T,
            self.reverse_mask, *dt.stride(), **self.dt_options, **self.options, num_warps=4,
        )  # fmt: skip

    @property
    def grid_of_steps(self) -> tuple[int, int, int]:
        """One program per chunk, sixteen heads, and path of a batch element."""
        return self.chunks, ceil_div(self.heads, 16), self.batch * self.K

    def new(self, *shape: int) -> Tensor:
        """A buffer in the dtype of sums, filled by a kernel."""
        return torch.empty(shape, dtype=self.dtype, device=self.x.device)

    def merged_tensors(
        self, shape: tuple[int, ...], dtype: torch.dtype, merges: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """A tensor that paths write, and the sum over the paths so far if there are several.

        A table need not visit every token, so with one the sum starts from zeros and is the result itself.
        """
        new = torch.empty if self.paths is None else torch.zeros
        merged = new(shape, dtype=self.dtype, device=self.x.device) if merges else None
        if merges and self.paths is not None:
            return None, merged
        return new(shape, dtype=dtype, device=self.x.device), merged

    def regions(self, programs: int) -> tuple[int, int]:
        """Into how many regions a path is cut, and their chunks, where one region makes that many programs."""
        region_chunks = ceil_div(self.chunks, min(self.chunks, ceil_div(PROGRAMS, programs)))
        return ceil_div(self.chunks, region_chunks), region_chunks


def region_states(
    given: Inputs,
    regions: tuple[int, int],
    start: Tensor | None,
    save_as: torch.dtype | None,
    ends: bool,
    grad_out: Tensor | None = None,
    start_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Walks all regions of all paths, and with ``grad_out`` also against the paths.

    Args:
        given: The op's arguments.
        regions: Number of regions and chunks of each.
        start: State before every region in walking order, (B, K, regions, H, P, N); None for zeros.
        save_as: Dtype of the states before every chunk; None to save none.
        ends: Whether to return the states after every region.
        grad_out: Gradient of the output (B, L, H, P).
        start_grad: Gradient of the state after every region, in the order of the walk against the path.

    Returns:
        States before every chunk (1 or 2, B, K, chunks, H, P, N), with ``grad_out`` also the gradients of the states
        after every chunk; states after every region (1 or 2, B, K, regions, H, P, N); log decays of the regions.
    """
    directions = 1 if grad_out is None else 2
    count, region_chunks = regions
    block_p = min(64, given.blocks.P)
    state = (given.heads, given.width, given.N)
    states = all_ends = totals = None
    if save_as is not None:
        states = given.x.new_empty(directions, given.batch, given.K, given.chunks, *state, dtype=save_as)
    if ends:
        all_ends = given.new(directions, given.batch, given.K, count, *state)
        totals = given.new(directions, given.batch, given.K, count, given.heads)
    placeholder = given.decays  # what is not used must still be a pointer
    grid = (given.heads * ceil_div(given.width, block_p), count * directions, given.batch * given.K)
    grad_strides = (0, 0, 0) if grad_out is None else grad_out.stride()[:3]
    states_kernel[grid](
        given.x, given.B, given.x if grad_out is None else grad_out, given.C, start, start_grad,
        given.decays, given.steps, given.paths, placeholder if states is None else states,
        placeholder if all_ends is None else all_ends, placeholder if totals is None else totals,
        given.K, given.S, given.heads, given.T, given.heads // given.groups, count, given.chunks, region_chunks,
        given.reverse_mask, given.batch * given.K, *given.x_strides, *given.B.stride()[:4], *grad_strides,
        *given.C.stride()[:4], P=given.width, N=given.N, BLOCK_P=block_p, BLOCK_N=given.blocks.N,
        HAS_START=start is not None, HAS_START_GRAD=start_grad is not None, SAVE=save_as is not None, ENDS=ends,
        **given.options, num_warps=given.blocks.warps,
        num_stages=given.blocks.stages,
    )  # fmt: skip
    return states, all_ends, totals


def carry_states(given: Inputs, start: Tensor | None, ends: Tensor, totals: Tensor) -> Tensor:
    """States before every region (B, K, regions, H, P, N) from those before the path (B, K, H, P, N), in place of ends.

    ``ends`` and ``totals`` are what :func:`region_states` found for one direction when all regions started from zeros.
    """
    size = given.width * given.N
    block = min(1024, next_power_of_2(size))
    carry_kernel[(ceil_div(size, block), given.heads, given.batch * given.K)](
        start, ends, totals, given.heads, ends.shape[2], SIZE=size, BLOCK=block, HAS_START=start is not None,
        ACC=given.options["ACC"], num_warps=4,
    )  # fmt: skip
    return ends
