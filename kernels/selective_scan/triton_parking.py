"""What the backward does beyond Triton on NVIDIA GPUs, in PTX: parking states in shared memory, and fetching ahead.

Triton has no shared memory of one's own. A PTX declaration inside a function reserves it, and its address is a number
like any other. Parked in a buffer in global memory instead, as elsewhere, the states of a Vim-S backward are 1.2 GB of
traffic to the second-level cache.
"""

import torch
import triton
import triton.language as tl

from zoo.kernels._triton import runs_ptx

__all__ = ["fetch_ahead", "lot_of", "park", "shared_lot", "unpark"]


def shared_lot(device: torch.device, dtype: torch.dtype, numbers: int) -> str | None:
    """PTX that reserves shared memory for that many numbers and gives its address; None where that cannot be.

    Only float32 and bfloat16 are parked there, and only what a program may reserve in this way.
    """
    size = numbers * dtype.itemsize
    if not runs_ptx(device) or dtype not in (torch.float32, torch.bfloat16) or size > 32 * 1024:
        return None
    return f"{{ .shared .align 16 .b8 parked[{size}]; mov.u32 $0, parked; }}"


@triton.jit
def fetch_ahead(pointers):
    """Asks for the lines of memory that pointers lie in, so that they are in the second-level cache when needed."""
    prefetch: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(prefetch, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def lot_of(scratch, NUMBERS: tl.constexpr, LOT: tl.constexpr):
    """Start of a program's parking lot for so many numbers: an address in shared memory, or a pointer into a buffer."""
    if LOT is not None:
        lot = tl.inline_asm_elementwise(LOT, "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    else:
        lot = scratch + tl.program_id(0).to(tl.int64) * NUMBERS
    return lot


@triton.jit
def spot_of(lot, begin, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BYTES: tl.constexpr):
    """Where the numbers of a state (BLOCK_N, BLOCK_D) are that is parked from ``begin`` on."""
    first_row = lot + begin * BYTES + tl.arange(0, BLOCK_D) * BYTES
    return first_row[None, :] + (tl.arange(0, BLOCK_N) * (BLOCK_D * BYTES))[:, None]  # in this order: constants last


@triton.jit
def pairs_of(lot, begin, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Address in shared memory, for every number of a state, of the 16-bit pair (n, n + 1) that it is in, n even."""
    first_row = lot + begin * 2 + tl.arange(0, BLOCK_D) * 4
    return first_row[None, :] + (tl.arange(0, BLOCK_N) // 2 * (BLOCK_D * 4))[:, None]


@triton.jit
def park(lot, begin, x, LOT: tl.constexpr, HALF: tl.constexpr):
    """Parks a state (BLOCK_N, BLOCK_D) from ``begin`` on, counted in numbers.

    HALF in 16 bits: then a lane must hold all states of a channel, of which it packs two at a time.
    """
    if LOT is not None and HALF:
        pack: tl.constexpr = """{ .reg .b32 pair; cvt.rn.bf16x2.f32 pair, $5, $4; st.shared.b32 [$2], pair;
            mov.b32 $0, 0; mov.b32 $1, 0; }"""
        spot = pairs_of(lot, begin, x.shape[0], x.shape[1])
        tl.inline_asm_elementwise(pack, "=r,=r,r,r,f,f", [spot, x], dtype=tl.int32, is_pure=False, pack=2)
    elif LOT is not None:
        spot = spot_of(lot, begin, x.shape[0], x.shape[1], 4)
        store: tl.constexpr = "st.shared.f32 [$1], $2; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(store, "=r,r,f", [spot, x], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(spot_of(lot, begin, x.shape[0], x.shape[1], 1), x)


@triton.jit
def unpark(lot, begin, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LOT: tl.constexpr, HALF: tl.constexpr):
    """The state (BLOCK_N, BLOCK_D) parked from ``begin`` on."""
    if LOT is not None and HALF:
        unpack: tl.constexpr = """{ .reg .b32 pair; .reg .b32 low; .reg .b32 high; ld.shared.b32 pair, [$2];
            shl.b32 low, pair, 16; and.b32 high, pair, 0xffff0000; mov.b32 $0, low; mov.b32 $1, high; }"""
        spot = pairs_of(lot, begin, BLOCK_N, BLOCK_D)
        x = tl.inline_asm_elementwise(unpack, "=f,=f,r,r", [spot], dtype=tl.float32, is_pure=False, pack=2)
    elif LOT is not None:
        spot = spot_of(lot, begin, BLOCK_N, BLOCK_D, 4)
        load: tl.constexpr = "ld.shared.f32 $0, [$1];"
        x = tl.inline_asm_elementwise(load, "=f,r", [spot], dtype=tl.float32, is_pure=False, pack=1)
    else:  # fetched as a plain row of numbers: several of them to a load
        row = tl.multiple_of(lot + begin + tl.arange(0, BLOCK_N * BLOCK_D), 16)
        x = tl.reshape(tl.load(row), (BLOCK_N, BLOCK_D))
        if HALF:
            x = x.to(tl.float32)
    return x
