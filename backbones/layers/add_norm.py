"""Residual add and the norm after it in one pass over the tokens."""

import torch
from timm.models import register_notrace_function
from torch import Tensor

from zoo.kernels import add_rms_norm

__all__ = ["add_norm"]


@torch.fx.wrap
@register_notrace_function
def add_norm(
    update: Tensor, stream: Tensor, weight: Tensor, eps: float | None, scale: Tensor | None, narrow: bool
) -> tuple[Tensor, Tensor]:
    """Adds a block's output to the residual stream and norms the sum, see :func:`~zoo.kernels.add_rms_norm`.

    Args:
        update: A block's output (B, L, D).
        stream: Residual stream (B, L, D).
        weight: Weight of the RMS norm, (D,).
        eps: Its epsilon; None for that of the weight's dtype, as in ``nn.RMSNorm``.
        scale: Factor of every sample's update, (B,), or None.
        narrow: Whether the normed tokens are of autocast's dtype where it is on: right if a linear layer reads them.

    Returns:
        Normed tokens, in the dtype of the weight or autocast, and the new stream.
    """
    dtype, device = weight.dtype, stream.device.type
    if narrow and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return add_rms_norm(update, stream, weight, torch.finfo(dtype).eps if eps is None else eps, dtype, scale=scale)
