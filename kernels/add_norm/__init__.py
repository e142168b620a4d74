"""Residual add and norm in one pass: what stands between two blocks of a pre-norm network.

Mamba fuses the two (Gu & Dao, arXiv 2312.00752, ``fused_add_norm`` in their code). The norms are the RMS norm of Zhang
and Sennrich, arXiv 1910.07467, and the layer norm of Ba et al., arXiv 1607.06450. For every row of D channels::

    new_stream = stream + scale * update                                    # scale: one factor a sample, or none
    centred    = new_stream, or new_stream - mean(new_stream) in layer norm
    normed     = centred / sqrt(mean(centred ** 2) + eps) * weight          # + bias in layer norm, if there is one

With a float32 stream and bfloat16 updates this reads 6 bytes an element and writes 6. Without an update it reads 4 and
writes 2, where a float32 norm and the cast for the linear layer that follows read 8 and write 6.

The norm is that of the stream as it is returned, so that a 16-bit stream gives what two separate calls would. Sums are
float32 (float64 for float64), and the centred rows are what is squared: no digits are lost where the mean is large.
"""

import torch
from torch import Tensor

from zoo.kernels.add_norm.op import MAX_NORM_CHANNELS, add_norm_op

__all__ = ["MAX_NORM_CHANNELS", "add_layer_norm", "add_rms_norm"]


def add_rms_norm(
    update: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    *,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a block's output to the residual stream and norms the sum for the next block.

    Args:
        update: What the block before adds, (..., D) like ``stream``, or None before the first block.
        stream: Residual stream, (..., D), D up to 8192, any strides (other than contiguous ones cost a copy). This and
            ``update`` are float32, bfloat16, float16 or float64, each in its own dtype.
        weight: Factors of the normed channels, (D,), any of these dtypes.
        eps: Added to the mean square; 0 or more.
        dtype: Dtype of the normed rows; default that of the new stream. The arithmetic does not depend on it.
        scale: Factors of the update by sample, (B,) for a stream (B, ..., D), any of these dtypes: stochastic depth
            drops a sample's update with a 0. It gets no gradient. Default: the update is added as it is.

    Returns:
        The normed rows and the new stream, both (..., D) and contiguous, the stream in the dtype of
        ``stream + update``. Without an update the stream is returned as it was given.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or ``scale`` asks for a gradient; the message
            names expected and given.
    """
    return _add_norm(update, stream, weight, None, eps, dtype, scale, False)


def add_layer_norm(
    update: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    *,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a block's output to the residual stream and norms the sum around its mean.

    Args:
        update: As in :func:`add_rms_norm`, and so are ``stream``, ``weight``, ``dtype`` and ``scale``.
        bias: Added to the normed channels, (D,), any of the dtypes of ``weight``. Default: none.
        eps: Added to the variance, which is the mean of the squares of D centred channels; 0 or more.

    Returns:
        As :func:`add_rms_norm`.

    Raises:
        ValueError: As :func:`add_rms_norm`.
    """
    return _add_norm(update, stream, weight, bias, eps, dtype, scale, True)


def _add_norm(
    update: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    scale: Tensor | None,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    if scale is not None and scale.requires_grad:
        raise ValueError("add_norm: scale requires a gradient, which is not computed; pass scale.detach()")
    outputs = add_norm_op(stream, update, weight, bias, scale, eps, dtype, centered)
    return outputs[0], stream if update is None else outputs[1]
