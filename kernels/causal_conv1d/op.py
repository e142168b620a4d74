"""``torch.ops.zoo.causal_conv1d``: checks, backend dispatch, fake kernels, autograd and FLOP count.

Canonical shapes, one for every caller: x (B, 1 or K, L, D), weight (K, D, W), bias (K, D), reverse K flags,
result (K, B, L, D). The public function in ``__init__.py`` adds the K dimension and moves it behind B.
Only the inputs are kept for the backward; it computes the values before the SiLU again.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.custom_op import custom_op
from zoo.kernels.registration import FLOAT_DTYPES, as_flags, implementation, show

MAX_WIDTH = 4  # the Triton kernels keep this many tokens in registers


def check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: list[bool]) -> None:
    """Raises ValueError, naming expected and given, unless the canonical inputs fit together."""
    if x.dim() != 4:
        raise ValueError(f"causal_conv1d: x must have shape (B, L, D) or (B, K, L, D), got {x.dim() - 1} dimensions")
    if weight.dim() != 3:
        raise ValueError(f"causal_conv1d: weight must have shape (D, W) or (K, D, W), got {show(weight.shape)}")
    batch, paths_x, L, D = x.shape
    K, channels, W = weight.shape
    if paths_x not in (1, K):
        raise ValueError(f"causal_conv1d: x has {paths_x} paths; weight has {K}, so x needs 1 or {K}")
    if channels != D:
        raise ValueError(f"causal_conv1d: weight has {channels} channels, x has {D}")
    if 0 in (batch, L, D, K, W):
        raise ValueError(f"causal_conv1d: x {show(x.shape)} or weight {show(weight.shape)} is empty")
    if W > MAX_WIDTH:
        raise ValueError(f"causal_conv1d: weight has {W} taps; at most {MAX_WIDTH} are supported")
    if bias is not None and tuple(bias.shape) != (K, D):
        raise ValueError(f"causal_conv1d: bias must have shape (K, D) = {show((K, D))}, got {show(bias.shape)}")
    if len(reverse) != K:
        raise ValueError(f"causal_conv1d: reverse has {len(reverse)} flags for {K} paths")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"causal_conv1d: x is {x.dtype}; use one of {', '.join(map(str, FLOAT_DTYPES))}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"causal_conv1d: {name} is {parameter.dtype}; use one of {', '.join(map(str, FLOAT_DTYPES))}"
            )
        if parameter.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {parameter.device}, x on {x.device}; move them together")


@custom_op("causal_conv1d")
def causal_conv1d_op(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[int]) -> Tensor:
    check_inputs(x, weight, bias, reverse)
    return implementation("causal_conv1d", x.device).forward(x, weight, bias, silu, as_flags(reverse))


@causal_conv1d_op.register_fake
def _(x, weight, bias, silu, reverse):
    check_inputs(x, weight, bias, reverse)
    batch, _, L, D = x.shape
    return x.new_empty(weight.shape[0], batch, L, D)


@custom_op("causal_conv1d_backward")
def causal_conv1d_backward_op(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[int]
) -> list[Tensor]:
    """Gradients of x, weight and, if it was given, bias."""
    return implementation("causal_conv1d", x.device).backward(grad_out, x, weight, bias, silu, as_flags(reverse))


@causal_conv1d_backward_op.register_fake
def _(grad_out, x, weight, bias, silu, reverse):
    return [given.new_empty(given.shape) for given in (x, weight, bias) if given is not None]


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad_out):
    x, weight, bias = ctx.saved_tensors
    gradients = causal_conv1d_backward_op(grad_out, x, weight, bias, ctx.silu, ctx.reverse)
    d_bias = None if bias is None else gradients[2]
    return gradients[0], gradients[1], d_bias, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.causal_conv1d)
def _forward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """One multiply-add (2 operations) per output element and tap, as for any convolution."""
    batch, _, L, _ = x_shape
    K, D, W = weight_shape
    return 2 * batch * K * L * D * W


@register_flop_formula(torch.ops.zoo.causal_conv1d_backward)
def _backward_flops(grad_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    """Twice the forward (gradients of x and of weight), plus the forward that is recomputed for the SiLU."""
    return 3 * _forward_flops(x_shape, weight_shape)
