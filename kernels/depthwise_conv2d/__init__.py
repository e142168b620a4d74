"""Depth-wise convolution of channels-last maps: every channel on its own, with bias and activation in the same pass.

It precedes the scan in VMamba's blocks (Liu et al., arXiv 2401.10166, section 4.2) and stands in inverted residuals
(Sandler et al., arXiv 1801.04381). With a k x k kernel, p = (k - 1) / 2, for every channel::

    y[h, w]   = bias + sum_{i, j < k} weight[i, j] * x[h + i - p, w + j - p]      # zero outside of the map
    out[h, w] = activation(y[h, w])

Sums and activations are float32 (float64 for float64 inputs).
"""

from torch import Tensor

from zoo.kernels.depthwise_conv2d.cpu import activate
from zoo.kernels.depthwise_conv2d.op import KERNELS as DEPTHWISE_KERNELS
from zoo.kernels.depthwise_conv2d.op import Activation, depthwise_conv2d_op

__all__ = ["DEPTHWISE_KERNELS", "Activation", "activate", "depthwise_conv2d"]


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation | None = None
) -> Tensor:
    """Convolves every channel of a map with a kernel of its own; the map keeps its size.

    Args:
        x: Maps, (B, H, W, C), any strides with contiguous channels (other strides cost a copy); float32, bfloat16,
            float16 or float64.
        weight: Kernels, (C, k, k) or, as ``nn.Conv2d`` has them, (C, 1, k, k); k is 3, 5 or 7; any float dtype.
        bias: Added before the activation, (C,). Default none.
        activation: ``"silu"``, ``"gelu"`` (exact), ``"relu"`` or None.

    Returns:
        (B, H, W, C), contiguous, in the dtype of ``x``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together or the activation is not known; the message names
            expected and given.
    """
    if weight.dim() == 4 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    return depthwise_conv2d_op(x, weight, bias, activation)
