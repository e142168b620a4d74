"""Residual add and the norm after it in one pass over the tokens."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.backbones.layers.layer_norm import normed_dtype, plain_on_cpu
from zoo.kernels import add_layer_norm, add_rms_norm

__all__ = ["add_norm"]


def add_norm(
    stream: Tensor,
    update: Tensor | None,
    norm: nn.RMSNorm | nn.LayerNorm,
    drop_path: nn.Module | None = None,
    narrow: bool = True,
) -> tuple[Tensor, Tensor]:
    """Adds a block's output to the residual stream and norms the sum, see :func:`~zoo.kernels.add_layer_norm`.

    Args:
        stream: Residual stream (B, ..., D), D up to 8192.
        update: A block's output (B, ..., D), or None before the first block: the stream is returned as it is.
        norm: Norm over the last dimension that reads the stream next; made with an ``eps`` and with parameters.
        drop_path: The block's stochastic depth, if it has any.
        narrow: Whether the normed tokens are of autocast's dtype where it is on: right if a linear layer reads them.

    Returns:
        The new stream, and the normed tokens in the dtype of the norm's weight or of autocast.

    Raises:
        ValueError: If the norm has no parameters.
    """
    if norm.weight is None:
        raise ValueError("add_norm: the norm has no weight; make it with elementwise_affine=True")
    scale = None
    if update is not None and isinstance(drop_path, DropPath) and drop_path.training:
        scale = drop_path(stream.new_ones(stream.shape[0]))
    centered = isinstance(norm, nn.LayerNorm)
    bias = norm.bias if centered else None
    normed, stream = _add_norm(update, stream, norm.weight, bias, norm.eps, scale, narrow, centered)
    return stream, normed


@torch.fx.wrap
@register_notrace_function
def _add_norm(
    update: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    narrow: bool,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """A single node for FX, which chooses the dtype when it runs."""
    dtype = normed_dtype(stream.device.type, weight.dtype, narrow)
    given = [x for x in (stream, update, weight) if x is not None]
    if centered and scale is None and plain_on_cpu(dtype, *given):
        stream = stream if update is None else stream + update
        return F.layer_norm(stream, stream.shape[-1:], weight, bias, eps), stream
    if centered:
        return add_layer_norm(update, stream, weight, bias, eps, dtype, scale=scale)
    return add_rms_norm(update, stream, weight, eps, dtype, scale=scale)
