"""``torch.ops.zoo.add_norm``: checks, backend dispatch, fake kernels and autograd.

Canonical shapes, one for every caller: stream and update (..., D), weight and bias (D,), scale (B,) where the stream is
(B, ..., D); the result is [normed, new stream], both (..., D) and contiguous. Without an update it is [normed] alone:
an op must not return what it was given.

The new stream and the weight are kept for the backward, but neither mean nor deviation of the rows: the backward holds
whole rows and sums over them anyway, so that further sums cost no memory traffic, while what is known of a row would be
more tensors to write, to keep and to read. FLOPs are not counted, as torch counts none for norms.
"""

import torch
from torch import Tensor

from zoo.kernels.custom_op import custom_op
from zoo.kernels.registration import FLOAT_DTYPES, check_dtypes_and_devices, expect_shape, implementation, show

OP = "add_norm"
MAX_NORM_CHANNELS = 8192  # the Triton kernels keep whole rows in registers


def check_inputs(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> None:
    """Raises ValueError, naming expected and given, unless the inputs fit together."""
    if stream.dim() == 0 or 0 in stream.shape:
        raise ValueError(f"{OP}: stream {show(stream.shape)} must have shape (..., D) and at least one element")
    D = stream.shape[-1]
    if D > MAX_NORM_CHANNELS:
        raise ValueError(f"{OP}: stream has {D} channels; at most {MAX_NORM_CHANNELS} are supported")
    expect_shape(OP, "update", update, "..., D", tuple(stream.shape))
    expect_shape(OP, "weight", weight, "D", (D,))
    expect_shape(OP, "bias", bias, "D", (D,))
    if scale is not None:
        if update is None:
            raise ValueError(f"{OP}: scale multiplies the update, but update is None; leave out scale")
        if stream.dim() == 1:
            raise ValueError(f"{OP}: scale needs samples, but stream has shape {show(stream.shape)}; use (1, D)")
        expect_shape(OP, "scale", scale, "B", (stream.shape[0],))
    if not eps >= 0:
        raise ValueError(f"{OP}: eps is {eps}; it must be 0 or more")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"{OP}: dtype is {dtype}; use one of {', '.join(map(str, FLOAT_DTYPES))}")
    check_dtypes_and_devices(OP, dict(stream=stream, update=update, weight=weight, bias=bias, scale=scale), {}, None)


def _sum_dtype(stream: Tensor, update: Tensor | None) -> torch.dtype:
    """Dtype of the new stream."""
    return stream.dtype if update is None else torch.promote_types(stream.dtype, update.dtype)


def by_sample(scale: Tensor, x: Tensor) -> Tensor:
    """The factors (B,) in the shape that multiplies x (B, ..., D)."""
    return scale.view(-1, *[1] * (x.dim() - 1))


@custom_op("add_norm")
def add_norm_op(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    centered: bool,
) -> list[Tensor]:
    """The normed rows and, if there is an update, the new stream; layer norm if ``centered``, else RMS norm."""
    check_inputs(stream, update, weight, bias, scale, eps, dtype)
    dtype = dtype or _sum_dtype(stream, update)
    return implementation(OP, stream.device).forward(stream, update, weight, bias, scale, eps, dtype, centered)


@add_norm_op.register_fake
def _(stream, update, weight, bias, scale, eps, dtype, centered):
    check_inputs(stream, update, weight, bias, scale, eps, dtype)
    normed = stream.new_empty(stream.shape, dtype=dtype or _sum_dtype(stream, update))
    return [normed] if update is None else [normed, stream.new_empty(stream.shape, dtype=_sum_dtype(stream, update))]


@custom_op("add_norm_backward")
def add_norm_backward_op(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    centered: bool,
    stream_dtype: torch.dtype,
    update_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of the old stream, of weight and, with dtypes for them, of the update and then of bias.

    ``stream`` is the new one.
    """
    return implementation(OP, stream.device).backward(
        grad_normed, grad_stream, stream, weight, scale, eps, centered, stream_dtype, update_dtype, bias_dtype
    )


@add_norm_backward_op.register_fake
def _(grad_normed, grad_stream, stream, weight, scale, eps, centered, stream_dtype, update_dtype, bias_dtype):
    gradients = [stream.new_empty(stream.shape, dtype=stream_dtype), weight.new_empty(weight.shape)]
    if update_dtype is not None:
        gradients.append(stream.new_empty(stream.shape, dtype=update_dtype))
    return gradients if bias_dtype is None else [*gradients, weight.new_empty(weight.shape, dtype=bias_dtype)]


def _setup_context(ctx, inputs, output):
    stream, update, weight, bias, scale, ctx.eps, _, ctx.centered = inputs
    ctx.set_materialize_grads(False)
    ctx.stream_dtype, ctx.update_dtype = stream.dtype, None if update is None else update.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(stream if update is None else output[1], weight, scale)


def _backward_of_sum(ctx, grad_stream: Tensor | None, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of stream and update where the normed rows were not used."""
    if grad_stream is None:
        return None, None
    d_update = grad_stream if scale is None else grad_stream * by_sample(scale, grad_stream)
    return grad_stream.to(ctx.stream_dtype), d_update.to(ctx.update_dtype)


def _backward(ctx, grads):
    stream, weight, scale = ctx.saved_tensors
    grad_normed, grad_stream = grads if len(grads) > 1 else (grads[0], None)
    if grad_normed is None:
        return *_backward_of_sum(ctx, grad_stream, scale), None, None, None, None, None, None
    # An update that was added as it is, in the stream's dtype, has the stream's gradient.
    same = scale is None and ctx.update_dtype == ctx.stream_dtype
    dtypes = ctx.stream_dtype, None if same else ctx.update_dtype, ctx.bias_dtype
    d_stream, d_weight, *rest = add_norm_backward_op(
        grad_normed, grad_stream, stream, weight, scale, ctx.eps, ctx.centered, *dtypes
    )
    d_bias = None if ctx.bias_dtype is None else rest.pop()
    d_update = d_stream if same else next(iter(rest), None)
    return d_stream, d_update, d_weight, d_bias, None, None, None, None


add_norm_op.register_autograd(_backward, setup_context=_setup_context)
