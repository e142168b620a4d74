"""``torch.ops.zoo.ssd``: checks, backend dispatch, fake kernels, autograd and FLOP count.

Canonical shapes, one for every caller: x (B, 1 or K, L, H, P), dt (B, K, L, H), A, D and dt_bias (K, H), B and C
(B, K, L, G, N), initial_state (B, K, H, P, N), paths (K, S) integer, reverse K flags. Without A, dt is the log decay.
The public function in ``__init__.py`` adds and removes the K and G dimensions.

Only the inputs are kept for the backward, which computes the states between chunks again: they are larger than the
inputs and cheap.
"""

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
    show,
)

CHUNK = 64  # steps worked out together as one matrix product


def check_inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    dt_softplus: bool,
    reverse: list[bool],
) -> None:
    """Raises ValueError, naming expected and given, unless the canonical inputs fit together."""
    for name, tensor, dims in (("x", x, 5), ("dt", dt, 4), ("B", B, 5), ("C", C, 5)):
        if tensor.dim() != dims:
            raise ValueError(f"ssd: {name} has {tensor.dim()} dimensions, expected {dims}: {show(tensor.shape)}")
    batch, paths_x, L, heads, width = x.shape
    K = dt.shape[1]
    groups, N = B.shape[3:]
    if paths_x not in (1, K):
        raise ValueError(f"ssd: x has {paths_x} paths; dt has {K}, so x needs 1 or {K}")
    expect_shape("ssd", "dt", dt, "B, K, L, H", (batch, K, L, heads))
    expect_shape("ssd", "A", A, "K, H", (K, heads))
    expect_shape("ssd", "B", B, "B, K, L, G, N", (batch, K, L, groups, N))
    expect_shape("ssd", "C", C, "B, K, L, G, N", (batch, K, L, groups, N))
    expect_shape("ssd", "D", D, "K, H", (K, heads))
    expect_shape("ssd", "dt_bias", dt_bias, "K, H", (K, heads))
    expect_shape("ssd", "initial_state", initial_state, "B, K, H, P, N", (batch, K, heads, width, N))
    if 0 in x.shape or 0 in B.shape:
        raise ValueError(f"ssd: x of shape {show(x.shape)} or B of shape {show(B.shape)} is empty")
    if heads % groups:
        raise ValueError(f"ssd: {heads} heads do not divide into {groups} groups of B and C")
    if A is None and (dt_bias is not None or dt_softplus):
        raise ValueError("ssd: without A, dt is the log decay itself and takes neither dt_bias nor dt_softplus")
    if len(reverse) != K:
        raise ValueError(f"ssd: reverse has {len(reverse)} flags for {K} paths")
    if paths is not None and (paths.dim() != 2 or len(paths) != K or paths.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"ssd: paths must be an int32 or int64 table (K, S) with K={K}, got {show(paths.shape)} of {paths.dtype}"
        )
    others = dict(A=A, D=D, dt_bias=dt_bias, initial_state=initial_state)
    check_dtypes_and_devices("ssd", dict(x=x, dt=dt, B=B, C=C), others, paths)


@custom_op("ssd")
def ssd_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    dt_softplus: bool,
    reverse: list[int],
) -> tuple[Tensor, Tensor]:
    check_inputs(x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse)
    if paths is not None and not paths.is_cuda:  # reading a GPU's table would stall it
        check_tokens("ssd", paths, x.shape[2])
    return implementation("ssd", x.device).forward(
        x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, as_flags(reverse)
    )  # fmt: skip


@ssd_op.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse):
    check_inputs(x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse)
    batch, _, L, heads, width = x.shape
    state = x.new_empty(batch, dt.shape[1], heads, width, B.shape[4], dtype=accumulate_dtype(x))
    return x.new_empty(batch, L, heads, width), state


@custom_op("ssd_backward")
def ssd_backward_op(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    paths: Tensor | None,
    dt_softplus: bool,
    reverse: list[int],
) -> list[Tensor]:
    """Gradients of x, dt, B, C, and of A, D, dt_bias and initial_state if they were given, in argument order."""
    return implementation("ssd", x.device).backward(
        grad_out, grad_last_state, x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, as_flags(reverse)
    )


@ssd_backward_op.register_fake
def _(
    grad_out, grad_last_state, x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse
):  # fmt: skip
    return [t.new_empty(t.shape) for t in (x, dt, A, B, C, D, dt_bias, initial_state) if t is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out, grad_last_state):
    x, *rest = ctx.saved_tensors
    if grad_out is None:
        grad_out = x.new_zeros(x.shape[0], *x.shape[2:])
    grads = ssd_backward_op(grad_out, grad_last_state, x, *rest, ctx.dt_softplus, ctx.reverse)
    remaining = iter(grads)
    inputs = (x, *rest[:-1])  # all but paths
    return (*[None if t is None else next(remaining) for t in inputs], None, None, None)


ssd_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.ssd)
def _forward_flops(x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    """The matrix products of the chunked form: C B^T per group; that times x, C h and x B^T per head."""
    batch, K, L, heads = dt_shape
    width, groups, N = x_shape[-1], *B_shape[-2:]
    return 2 * batch * K * L * (groups * CHUNK * N + heads * (CHUNK * width + 2 * width * N))


@register_flop_formula(torch.ops.zoo.ssd_backward)
def _backward_flops(grad_shape, grad_last_shape, x_shape, dt_shape, A_shape, B_shape, *args, **kwargs) -> int:
    """Twice the forward, as for any product of matrices, plus the forward that recomputes states and C B^T."""
    return 3 * _forward_flops(x_shape, dt_shape, A_shape, B_shape)
