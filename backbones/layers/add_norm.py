"""Residual add and the norm after it in one pass over the tokens."""

import torch
from timm.layers import DropPath
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.kernels import add_rms_norm

__all__ = ["add_norm"]


def add_norm(
    stream: Tensor, update: Tensor, norm: nn.RMSNorm, drop_path: nn.Module | None = None, narrow: bool = True
) -> tuple[Tensor, Tensor]:
    """Adds a block's output to the residual stream and norms the sum, see :func:`~zoo.kernels.add_rms_norm`.

    Args:
        stream: Residual stream (B, L, D).
        update: A block's output (B, L, D).
        norm: Norm that reads the stream next; made with an ``eps``.
        drop_path: The block's stochastic depth, if it has any.
        narrow: Whether the normed tokens are of autocast's dtype where it is on: right if a linear layer reads them.

    Returns:
        The new stream, and the normed tokens in the dtype of the norm's weight or of autocast.
    """
    scale = None
    if isinstance(drop_path, DropPath) and drop_path.training:
        scale = drop_path(torch.ones_like(stream[:, 0, 0]))
    normed, stream = _add_norm(update, stream, norm.weight, norm.eps, scale, narrow)
    return stream, normed


@torch.fx.wrap
@register_notrace_function
def _add_norm(
    update: Tensor, stream: Tensor, weight: Tensor, eps: float, scale: Tensor | None, narrow: bool
) -> tuple[Tensor, Tensor]:
    """A single node for FX, which chooses the dtype when it runs."""
    dtype, device = weight.dtype, stream.device.type
    if narrow and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return add_rms_norm(update, stream, weight, eps, dtype, scale=scale)
