"""What the forward and the backward Triton kernels of the selective scan share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._triton import ceil_div, device_guard, next_power_of_2
from zoo.kernels.triton_math import LOG2E, sigmoid

__all__ = [
    "PLAIN_NUMBERS",
    "block_shape",
    "exp_of_minus_abs",
    "has_holes",
    "log1p_of_unit",
    "offset_type",
    "pack_projections",
    "path_lengths",
    "readable",
    "region_of",
    "row_of",
    "rows_of",
    "softplus",
    "softplus_slope",
    "split_projections",
    "state_cells",
    "states_first",
    "step_size",
    "tile_at",
    "tile_of",
    "token_at",
    "tokens_at",
    "visited",
    "visits_of",
]

# Arguments whose value shall not make Triton compile a kernel anew, as it does for 1 and for multiples of 16: lengths,
# for example. Among them ``stride_N``, which is the number of channels: see ``block_shape``. Numbers of paths are not
# among them: a loop over one path known as such takes 128 registers in the forward, not 168.
PLAIN_NUMBERS = (
    "L",
    "P",
    "orders",
    "first",
    "stride",
    "stride_N",
    "reverse_mask",
    "chunks",
    "region",
    "splits",
    "batch",
    "items",
)


@triton.jit
def exp_of_minus_abs(x):
    """exp(-|x|), in (0, 1]."""
    if x.dtype == tl.float64:
        return tl.exp(-tl.abs(x))
    return tl.exp2(-tl.abs(x) * LOG2E)


@triton.jit
def log1p_of_unit(e, COARSE: tl.constexpr):
    """log(1 + e) for e in [0, 1], by a polynomial: Triton's logarithm takes three times the instructions.

    The coefficients minimise the largest relative error on [0, 1], which is 2e-7, or 6e-5 if COARSE.
    """
    if e.dtype == tl.float64:
        series = e * (1.0 - e * (0.5 - e * (0.3333333333333333 - e * 0.25)))
        return tl.where(e < 1e-4, series, tl.log(1.0 + e))
    if COARSE:
        p = e * 0.041347257792949677 - 0.157427117228508
        p = p * e + 0.3063008785247803
        p = p * e - 0.4969778060913086
        p = p * e + 0.9999432563781738
    else:
        p = e * -0.008539198897778988 + 0.04408959671854973
        p = p * e - 0.10768166184425354
        p = p * e + 0.17745238542556763
        p = p * e - 0.24495461583137512
        p = p * e + 0.33275479078292847
        p = p * e - 0.4999740421772003
        p = p * e + 0.9999998211860657
    return p * e


@triton.jit
def softplus(x, COARSE: tl.constexpr):
    """log(1 + exp(x)), to rounding also where exp(x) is far below 1; if COARSE, to the rounding of 16-bit types."""
    return tl.maximum(x, 0.0) + log1p_of_unit(exp_of_minus_abs(x), COARSE)


@triton.jit
def readable(d, channels, VECTOR: tl.constexpr):
    """Channels d, wrapped around to where every pointer can be read; VECTOR neighbours stay together."""
    return tl.max_contiguous(tl.multiple_of(d % channels, VECTOR), VECTOR)


@triton.jit
def token_at(table, row, columns, step, end, steps, backwards, HAS_TABLE: tl.constexpr, OFFSET: tl.constexpr):
    """Token that a path reads at a step, or -1 for a zero token; from ``end`` on, the last one again.

    Its type OFFSET is that of all offsets inside a batch element: 64 bits only where 32 do not suffice, since they cost
    twice the instructions.
    """
    step = tl.maximum(tl.minimum(step, end - 1), 0)
    position = tl.where(backwards, steps - 1 - step, step)
    if HAS_TABLE:
        position = tl.load(table + row * columns + position)
    return position.to(OFFSET)


@triton.jit
def tokens_at(
    table, row, columns, step, end, steps, backwards, STEPS: tl.constexpr, HAS_TABLE: tl.constexpr, OFFSET: tl.constexpr
):
    """Tokens of several steps from ``step`` on, (STEPS,), as ``token_at`` gives them."""
    return token_at(table, row, columns, step + tl.arange(0, STEPS), end, steps, backwards, HAS_TABLE, OFFSET)


@triton.jit
def row_of(token, HOLES: tl.constexpr):
    """Row to read for a token; a zero token reads the first row, and what is read there is not used."""
    if HOLES:
        token = tl.maximum(token, 0)
    return token


@triton.jit
def tile_at(tokens, pointers, row_stride, HOLES: tl.constexpr, mask=None):
    """The rows (D,) of several tokens, (STEPS, D). Every pointer can be read; where mask is false, zeros come."""
    at = pointers[None, :] + row_of(tokens, HOLES)[:, None] * row_stride
    return tl.load(at, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def visited(tile, tokens, HOLES: tl.constexpr):
    """A tile with zeros in the rows of zero tokens."""
    if HOLES:
        tile = tl.where((tokens >= 0)[:, None], tile, 0.0)
    return tile


@triton.jit
def visits_of(tokens, steps, end, HOLES: tl.constexpr):
    """Which of some steps visit a token, given what ``token_at`` says of them."""
    visits = steps < end
    if HOLES:
        visits = visits & (tokens >= 0)
    return visits


@triton.jit
def rows_of(tile):
    """The rows of a tile (STEPS, D), a tuple: halved until every part is a row, which moves no value between lanes."""
    STEPS: tl.constexpr = tile.shape[0]
    D: tl.constexpr = tile.shape[1]
    HALVINGS: tl.constexpr = (STEPS > 1) + (STEPS > 2) + (STEPS > 4) + (STEPS > 8)
    parts = (tl.permute(tile, (1, 0)),)
    for level in tl.static_range(HALVINGS):
        halves = ()
        for i in tl.static_range(1 << level):
            part = tl.reshape(parts[i], (D, 2, (STEPS >> level) // 2))
            low, high = tl.split(tl.permute(part, (0, 2, 1)))
            halves = halves + (low, high)
        parts = halves
    rows = ()
    for i in tl.static_range(STEPS):
        rows = rows + (tl.reshape(parts[i], (D,)),)
    return rows


@triton.jit
def tile_of(rows, STEPS: tl.constexpr):
    """The tile (STEPS, D) of a tuple of rows (D,)."""
    D: tl.constexpr = rows[0].shape[0]
    HALVINGS: tl.constexpr = (STEPS > 1) + (STEPS > 2) + (STEPS > 4) + (STEPS > 8)
    parts = ()
    for i in tl.static_range(STEPS):
        parts = parts + (tl.reshape(rows[i], (D, 1)),)
    for level in tl.static_range(HALVINGS):
        joined = ()
        for i in tl.static_range(STEPS >> (level + 1)):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
            joined = joined + (tl.reshape(pair, (D, 2 << level)),)
        parts = joined
    return tl.permute(parts[0], (1, 0))


@triton.jit
def split_projections(row):
    """B and C (BLOCK_N,) of a row (2 * BLOCK_N,) of ``pack_projections``."""
    return tl.split(tl.permute(tl.reshape(row, (2, row.shape[0] // 2)), (1, 0)))


@triton.jit
def step_size(delta_j, bias, inside, SOFTPLUS: tl.constexpr, COARSE: tl.constexpr):
    """delta + bias and the step size made of it, which is zero where there is no step, as is its slope."""
    raw = tl.where(inside, delta_j + bias, -float("inf") if SOFTPLUS else 0.0)
    step = raw
    if SOFTPLUS:
        step = softplus(raw, COARSE)
    return raw, step


@triton.jit
def softplus_slope(x, y, COARSE: tl.constexpr):
    """Derivative of y = softplus(x), sigmoid(x) = 1 - exp(-y).

    The latter takes fewer instructions and lets go of x, but is off by 6e-8, which only 16-bit types do not show where
    y is small.
    """
    if COARSE:
        return 1.0 - tl.exp2(y * -LOG2E)
    return sigmoid(x)


@triton.jit
def state_cells(n, d, stride_N):
    """Offsets of the states n of channels d in a tensor (..., N, D); ``stride_N`` is D, see ``block_shape``."""
    return n[:, None] * stride_N + d[None, :]


@triton.jit
def region_of(split, region, steps, mirrored):
    """Steps [begin, end) of a region of a path.

    Regions are counted along the path; mirrored ones from its end, so that a path and its reverse share their tokens.
    """
    begin = tl.minimum(split * region, steps)
    end = tl.minimum(begin + region, steps)
    return tl.where(mirrored, steps - end, begin), tl.where(mirrored, steps - begin, end)


@triton.jit
def pack_kernel(
    B, C, packed, table, paths, L, P, groups, B_b, B_k, B_l, B_g, B_n, C_b, C_k, C_l, C_g, C_n,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    path = tl.program_id(1).to(tl.int64)
    b, k = path // paths, path % paths
    n = tl.arange(0, BLOCK_N)
    inside = row < P * groups
    token, group = row // groups, row % groups
    if HAS_TABLE:
        token = tl.load(table + k * P + token, mask=inside, other=0)
    token = token.to(tl.int64)
    mask = inside[:, None] & (n < N)[None, :]
    from_B = B + b * B_b + k * B_k + (token * B_l + group * B_g)[:, None] + n[None, :] * B_n
    from_C = C + b * C_b + k * C_k + (token * C_l + group * C_g)[:, None] + n[None, :] * C_n
    to = packed + (((path * L + token) * groups + group) * 2 * BLOCK_N)[:, None] + n[None, :]
    into = packed.dtype.element_ty
    tl.store(to, tl.load(from_B, mask=mask, other=0.0).to(into), mask=inside[:, None])
    tl.store(to + BLOCK_N, tl.load(from_C, mask=mask, other=0.0).to(into), mask=inside[:, None])


def pack_projections(B: Tensor, C: Tensor, dtype: torch.dtype, block_n: int, visited: Tensor | None = None) -> Tensor:
    """B and C (B, K, L, G, N) side by side, widened and padded with zeros: (B, K, L, G, 2, block_n).

    Every lane of every warp reads these rows; converting them there takes a fifth of the forward's instructions.

    Args:
        B: See above.
        C: See above.
        dtype: What they are widened to.
        block_n: What N is padded to.
        visited: Table (K, P) of the tokens whose rows will be read, all of them tokens; the other rows are left to
            chance. Default: all rows are made.
    """
    batch, K, L, groups, N = B.shape
    steps = L if visited is None else visited.shape[1]
    packed = torch.empty(batch, K, L, groups, 2, block_n, dtype=dtype, device=B.device)
    rows = 64
    with device_guard(B.device):
        pack_kernel[(ceil_div(steps * groups, rows), batch * K)](
            B, C, packed, visited, K, L, steps, groups, *B.stride(), *C.stride(), N=N, BLOCK_N=block_n, ROWS=rows,
            HAS_TABLE=visited is not None, num_warps=4,
        )  # fmt: skip
    return packed


def block_shape(N: int, channels: int) -> dict[str, int]:
    """Sizes of a program: BLOCK_N states and BLOCK_D channels, all states of a channel in one lane.

    With the states of a channel in one thread, the sum over states needs no exchange between threads, and values that
    belong to a channel (u, delta, z, y) are in the lane that uses them. For that, Triton must not prove that several
    neighbouring channels may be loaded at once: hence ``stride_N``, whose divisibility the kernels hide. More than 16
    states are shared among several warps.

    A loop body has UNROLL steps. Their rows are fetched together, VECTOR neighbouring channels at once, STAGES - 1
    bodies ahead and into shared memory: a warp can tell only six groups of loads into registers apart, and at the next
    use of any other would wait for rows that nobody needs yet.

    Args:
        N: States.
        channels: Channels that share their B and C.
    """
    block_n = next_power_of_2(N)
    unroll = max(4, min(16, 64 // block_n))
    vector = next(size for size in (8, 4, 2, 1) if channels % size == 0)
    warps = max(1, block_n // 16)
    return dict(
        BLOCK_N=block_n, BLOCK_D=32, VECTOR=vector, UNROLL=unroll, STAGES=4 if unroll == 4 else 3, num_warps=warps
    )


def states_first(x: Tensor | None) -> Tensor | None:
    """(..., D, N) with the states before the channels in memory: (..., N, D)."""
    return None if x is None else x.transpose(-2, -1).contiguous()


def path_lengths(paths: Tensor) -> Tensor:
    """Steps of every row of a table (U, P), (U,): its columns before the first -2."""
    return (paths >= -1).sum(1, dtype=torch.int32)


def has_holes(paths: Tensor | None, L: int, complete: bool, partition: bool) -> bool:
    """Whether a table may have entries that are no tokens. If it has as many as a partition's tokens, all are."""
    return not (complete or paths is None or (partition and paths.numel() == L))


def offset_type(L: int, *row_strides: int) -> tl.dtype:
    """Integer type that holds the offset of every token's row in tensors with these strides between rows."""
    return tl.int32 if L * max(row_strides) < 2**31 else tl.int64
