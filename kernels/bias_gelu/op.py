"""``torch.ops.zoo.bias_gelu``: checks, backend dispatch, fake kernels and autograd.

Canonical shapes: x and out (..., D), bias (D,). FLOPs are not counted, as torch counts none for activations.
"""

from torch import Tensor

from zoo.kernels.custom_op import custom_op
from zoo.kernels.registration import check_dtypes_and_devices, expect_shape, implementation, show

OP = "bias_gelu"


def check_inputs(x: Tensor, bias: Tensor) -> None:
    """Raises ValueError, naming expected and given, unless the inputs fit together."""
    if x.dim() == 0 or 0 in x.shape:
        raise ValueError(f"{OP}: x {show(x.shape)} must have shape (..., D) and at least one element")
    expect_shape(OP, "bias", bias, "D", (x.shape[-1],))
    check_dtypes_and_devices(OP, dict(x=x, bias=bias), {}, None)


@custom_op("bias_gelu")
def bias_gelu_op(x: Tensor, bias: Tensor) -> Tensor:
    """The rows with bias and GELU."""
    check_inputs(x, bias)
    return implementation(OP, x.device).forward(x, bias)


@bias_gelu_op.register_fake
def _(x, bias):
    check_inputs(x, bias)
    return x.new_empty(x.shape)


@custom_op("bias_gelu_backward")
def bias_gelu_backward_op(grad_out: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
    """Gradients of x and bias."""
    return implementation(OP, x.device).backward(grad_out, x, bias)


@bias_gelu_backward_op.register_fake
def _(grad_out, x, bias):
    return [x.new_empty(x.shape), bias.new_empty(bias.shape)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out):
    d_x, d_bias = bias_gelu_backward_op(grad_out, *ctx.saved_tensors)
    return d_x, d_bias


bias_gelu_op.register_autograd(_backward, setup_context=_setup_context)
