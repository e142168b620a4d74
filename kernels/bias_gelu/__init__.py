"""Bias and GELU in one pass: what stands between the two linear layers of an MLP.

GELU is that of Hendrycks and Gimpel, arXiv 1606.08415, with the normal distribution itself, not an approximation by
tanh. For every row of D channels::

    out = v * P(v),  v = x + bias,  P(v) = (1 + erf(v / sqrt(2))) / 2

A linear layer without its bias goes before. What it writes is kept for the backward, which reads it once, together with
the gradient, and adds up the gradient of the bias on the way.
"""

from torch import Tensor

from zoo.kernels.bias_gelu.op import bias_gelu_op

__all__ = ["bias_gelu"]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Adds a bias to every row and applies GELU.

    Args:
        x: (..., D), any strides (other than contiguous ones cost a copy); float32, bfloat16, float16 or float64.
        bias: (D,), any of these dtypes.

    Returns:
        (..., D), contiguous, in the dtype of ``x``. Sums are float32 (float64 for float64); in 16-bit types P is
        approximated to their rounding on GPUs.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together; the message names expected and given.
    """
    return bias_gelu_op(x, bias)
