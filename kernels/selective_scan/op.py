"""``torch.ops.zoo.selective_scan``: checks, backend dispatch, fake kernels, autograd and FLOP count.

Canonical shapes, one for every caller: u (B, 1 or K, L, D), delta (B, K, L, D), A (K, D, N), B and C (B, K, L, G, N),
D and delta_bias (K, D), z (B, L, D), initial_state (B, K, D, N), reverse K flags, paths (U, P) integer: path k walks
row k mod U.
The public function in ``__init__.py`` adds and removes the K and G dimensions.

Besides output and last state the op returns the states at chunk boundaries, (B, K, chunks, N, D): all that the
backward needs to recompute the others. They are empty unless ``save_states`` is set.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.custom_op import custom_op
from zoo.kernels.registration import (
    accumulate_dtype,
    as_flags,
    check_dtypes_and_devices,
    check_tokens,
    expect_shape,
    implementation,
    path_length,
    show,
)

CHUNK = 16  # steps that a kernel works through at a time


def paths_first(x: Tensor) -> bool:
    """Whether x (B, K, ...) lies in memory path by path, as the products of stacked weights do."""
    return x.shape[1] > 1 and x.stride(1) > x.stride(0)


def new_in_order_of(x: Tensor, new: Callable[[torch.Size], Tensor]) -> Tensor:
    """What ``new`` makes of a shape, with the shape of x (B, K, ...) and its order of batch and paths in memory."""
    return new(x.transpose(0, 1).shape).transpose(0, 1) if paths_first(x) else new(x.shape)


def in_order_of(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x (B, K, ...), contiguous but for the order of batch and paths, which is that of x."""
    return grad.transpose(0, 1).contiguous().transpose(0, 1) if paths_first(x) else grad.contiguous()


def chunk_length(N: int, window: int) -> int:
    """Steps of a chunk in Triton: half as many where a channel has a single state, which costs little to save.

    Its backward then has half as many numbers in registers, and room for more warps.
    """
    return CHUNK // 2 if N == window == 1 else CHUNK


def num_chunks(steps: int, length: int = CHUNK) -> int:
    """Chunks a path of that many steps is cut into; each starts from a saved state."""
    return (steps + length - 1) // length


def room_for_states(steps: int, N: int, window: int) -> int:
    """States to save of every path and channel. Backends whose chunks are longer fill the first of them."""
    return num_chunks(steps, chunk_length(N, window))


def check_inputs(
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
    reverse: list[bool],
    window: int,
) -> None:
    """Raises ValueError, naming expected and given, unless the canonical inputs fit together."""
    for name, x, dims in (("u", u, 4), ("delta", delta, 4), ("A", A, 3), ("B", B, 5), ("C", C, 5)):
        if x.dim() != dims:
            raise ValueError(f"selective_scan: {name} has {x.dim()} dimensions, expected {dims}: {show(x.shape)}")
    batch, paths_u, L, channels = u.shape
    K, _, N = A.shape
    groups = B.shape[3]
    if paths_u not in (1, K):
        raise ValueError(f"selective_scan: u has {paths_u} paths; A has {K}, so u needs 1 or {K}")
    expect_shape("selective_scan", "delta", delta, "B, K, L, D", (batch, K, L, channels))
    expect_shape("selective_scan", "A", A, "K, D, N", (K, channels, N))
    expect_shape("selective_scan", "B", B, "B, K, L, G, N", (batch, K, L, groups, N))
    expect_shape("selective_scan", "C", C, "B, K, L, G, N", (batch, K, L, groups, N))
    expect_shape("selective_scan", "D", D, "K, D", (K, channels))
    expect_shape("selective_scan", "z", z, "B, L, D", (batch, L, channels))
    expect_shape("selective_scan", "delta_bias", delta_bias, "K, D", (K, channels))
    expect_shape("selective_scan", "initial_state", initial_state, "B, K, D, N", (batch, K, channels, N))
    if channels % groups:
        raise ValueError(f"selective_scan: {channels} channels do not divide into {groups} groups of B and C")
    if L == 0 or batch == 0:
        raise ValueError(f"selective_scan: u of shape {show(u.shape)} is empty")
    if len(reverse) != K:
        raise ValueError(f"selective_scan: reverse has {len(reverse)} flags for {K} paths")
    if window < 1 or CHUNK % window:
        divisors = ", ".join(str(size) for size in range(1, CHUNK + 1) if CHUNK % size == 0)
        raise ValueError(f"selective_scan: window must be one of {divisors}, got {window}")
    integers = (torch.int32, torch.int64)
    if paths is not None and (paths.dim() != 2 or K % max(1, paths.shape[0]) or paths.dtype not in integers):
        raise ValueError(
            f"selective_scan: paths must be an int32 or int64 table (U, P) whose rows divide the {K} paths, "
            f"got {show(paths.shape)} of {paths.dtype}"
        )
    check_dtypes_and_devices(
        "selective_scan",
        dict(u=u, delta=delta, B=B, C=C, z=z),
        dict(A=A, D=D, delta_bias=delta_bias, initial_state=initial_state),
        paths,
    )


def _check_table(paths: Tensor, L: int, complete: bool, partition: bool) -> None:
    check_tokens("selective_scan", paths, L)
    lowest = int(paths.min())
    if partition:
        visited = paths[paths >= 0]
        if len(visited) != L or len(visited.unique()) != L:
            raise ValueError(
                f"selective_scan: partition=True promises that each of {L} tokens is on exactly one path; paths have "
                f"{len(visited)} entries, of which {len(visited.unique())} are different"
            )
    if complete and (paths.shape[1] != L or lowest < 0):
        raise ValueError(
            f"selective_scan: complete=True promises rows of paths with all {L} tokens and nothing else; "
            f"they have {paths.shape[1]} entries, the lowest {lowest}"
        )


@custom_op("selective_scan")
def selective_scan_op(
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
    reverse: list[int],
    window: int,
    complete: bool,
    partition: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, paths, reverse, window)
    rows = 0 if paths is None else len(paths)
    if partition and rows != len(A):
        raise ValueError(f"selective_scan: partition=True needs a row of paths for each of {len(A)}, got {rows}")
    if paths is not None and not paths.is_cuda:  # reading a GPU's table would stall it
        _check_table(paths, u.shape[2], complete, partition)
    return implementation("selective_scan", u.device).forward(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        paths,
        delta_softplus,
        as_flags(reverse),
        window,
        complete,
        partition,
        save_states,
    )


@selective_scan_op.register_fake
def _(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    paths,
    delta_softplus,
    reverse,
    window,
    complete,
    partition,
    save_states,
):
    check_inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, paths, reverse, window)
    batch, _, L, channels = u.shape
    K, _, N = A.shape
    dtype = accumulate_dtype(u)
    chunks = room_for_states(path_length(u, paths), N, window) if save_states else 0
    return (
        u.new_empty(batch, L, channels),
        u.new_empty(batch, K, N, channels, dtype=dtype).transpose(2, 3),
        u.new_empty(batch, K, chunks, N, channels, dtype=dtype),
    )


@custom_op("selective_scan_backward")
def selective_scan_backward_op(
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
    reverse: list[int],
    window: int,
    complete: bool,
    partition: bool,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, then of D, z, delta_bias and initial_state as far as they were given.

    Those of u and delta have their order of batch and paths in memory: both are added to, or multiplied with, tensors
    of that order, which would otherwise be read against the grain or copied.
    """
    grads = implementation("selective_scan", u.device).backward(
        grad_out, grad_last_state, states,
        u, delta, A, B, C, D, z, delta_bias, initial_state, paths, delta_softplus, as_flags(reverse), window, complete,
        partition,
    )  # fmt: skip
    d_u, d_delta, *others = grads
    return [in_order_of(u, d_u), in_order_of(delta, d_delta), *(grad.contiguous() for grad in others)]


@selective_scan_backward_op.register_fake
def _(
    grad_out,
    grad_last_state,
    states,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    paths,
    delta_softplus,
    reverse,
    window,
    complete,
    partition,
):
    others = [x.new_empty(x.shape) for x in (A, B, C, D, z, delta_bias, initial_state) if x is not None]
    return [*(new_in_order_of(x, x.new_empty) for x in (u, delta)), *others]


def _setup_context(ctx, inputs, output):
    *tensors, delta_softplus, reverse, window, complete, partition, save_states = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors)
    ctx.options, ctx.save_states = (delta_softplus, reverse, window, complete, partition), save_states
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, grad_out, grad_last_state, _):
    if not ctx.save_states:
        raise RuntimeError("zoo::selective_scan ran with save_states=False, so it has no gradient")
    states, u, *rest = ctx.saved_tensors
    if grad_out is None:
        grad_out = u.new_zeros(u.shape[0], u.shape[2], u.shape[3])
    grads = selective_scan_backward_op(grad_out, grad_last_state, states, u, *rest, *ctx.options)
    remaining = iter(grads)
    inputs = (u, *rest[:-1])  # all but paths
    return (*[None if x is None else next(remaining) for x in inputs], *[None] * 7)


selective_scan_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.selective_scan)
def _forward_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    """9 operations per step, channel and state: the field's usual count (2 for each multiply-add, 1 for exp...)."""
    batch, K, L, channels = delta_shape
    return 9 * batch * K * L * channels * A_shape[-1]


@register_flop_formula(torch.ops.zoo.selective_scan_backward)
def _backward_flops(grad_shape, grad_last_shape, states_shape, u_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    """Twice the forward, as for any linear layer, plus the forward that recomputes the states."""
    return 3 * _forward_flops(u_shape, delta_shape, A_shape)
