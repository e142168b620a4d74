"""Functions of numbers that several Triton kernels compute."""

import triton
import triton.language as tl

__all__ = ["LOG2E", "sigmoid"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); the reciprocal is a square of rsqrt, since Triton's division guards against ranges."""
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-x))
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root
