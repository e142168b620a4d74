"""Functions of numbers that several Triton kernels compute."""

import triton
import triton.language as tl

__all__ = ["LOG2E", "activate", "activation_slope", "normal_distribution", "sigmoid"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); the reciprocal is a square of rsqrt, since Triton's division guards against ranges."""
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-x))
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def normal_distribution(x, COARSE: tl.constexpr):
    """Part of the normal distribution below x, and its density there.

    If COARSE, errors are 1e-7 and, far below zero, a hundredth of what is left: the rounding of 16-bit types hides
    them, and erf takes three times the instructions. The approximation is 7.1.26 of Abramowitz and Stegun's handbook.
    """
    if COARSE:
        bell = tl.exp2(x * x * (-0.5 * LOG2E))
        root = tl.rsqrt(1.0 + tl.abs(x) * 0.23164188826636045)
        t = root * root
        p = t * 1.061405429 - 1.453152027
        p = p * t + 1.421413741
        p = p * t - 0.284496736
        p = p * t + 0.254829592
        tail = 0.5 * p * t * bell
        below = tl.where(x >= 0, 1.0 - tail, tail)
    else:
        bell = tl.exp(-0.5 * x * x)
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return below, 0.3989422804014327 * bell


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, COARSE: tl.constexpr):
    """``"silu"``, ``"gelu"``, ``"relu"`` or None of x; COARSE as above."""
    if ACTIVATION == "silu":
        x *= sigmoid(x)
    if ACTIVATION == "gelu":
        below, _ = normal_distribution(x, COARSE)
        x *= below
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # leaves NaN
    return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr, COARSE: tl.constexpr):
    """Derivative of the activation, which is not None, at x."""
    if ACTIVATION == "silu":
        gate = sigmoid(x)
        slope = gate * (1 + x * (1 - gate))
    if ACTIVATION == "gelu":
        below, density = normal_distribution(x, COARSE)
        slope = below + x * density
    if ACTIVATION == "relu":
        slope = tl.where(x > 0, 1.0, 0.0).to(x.dtype)
    return slope
