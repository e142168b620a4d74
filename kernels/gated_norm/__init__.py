"""Norm and gate in one pass: what stands between a scan and the projection of its outputs.

Mamba-2 gates what it norms (Dao & Gu, arXiv 2405.21060, section 7.2), VMamba norms what it gates (Liu et al., arXiv
2401.10166). For every row, or for every one of G groups of its channels, with ``a`` the activation of the gate::

    norm(v) = centred / sqrt(mean(centred ** 2) + eps) * weight [+ bias],  centred = v, or v - mean(v) in layer norm
    out     = norm(x) * a(z), or norm(x * a(z)) with gate_first

In three steps the gate's activation and the normed rows are written and read again: 14 bytes an element in 16-bit types
instead of 6. The gate may be a part of wider rows, as projections make it together with what is scanned. Inputs alone
are kept for the backward, which reads each once.
"""

from torch import Tensor

from zoo.kernels.gated_norm.cpu import gated_norm_in_steps
from zoo.kernels.gated_norm.op import GATES, GateActivation, gated_norm_op

__all__ = ["GATES", "GateActivation", "gated_layer_norm", "gated_norm_in_steps", "gated_rms_norm"]


def gated_layer_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: GateActivation | None = "silu",
    gate_first: bool = False,
    groups: int = 1,
) -> Tensor:
    """Layer norm of x and a gate.

    Args:
        x: (..., D), any strides (other than contiguous ones cost a copy).
        z: Gate, (..., D); rows may be parts of wider rows, other strides cost a copy. Both are float32, bfloat16,
            float16 or float64, each in its own dtype.
        weight: Factors of the normed channels, (D,), or (D / groups,) for all groups; any of these dtypes.
        bias: Added to the normed channels, as ``weight``. Default: none.
        eps: Added to the variance; 0 or more.
        activation: Of the gate: ``"silu"``, ``"gelu"`` (exact) or None.
        gate_first: Whether x is gated before it is normed instead of after.
        groups: Groups of consecutive channels, each normed on its own. A group has up to 8192 channels.

    Returns:
        (..., D), contiguous, in the dtype of ``z``. Sums are float32 (float64 for float64).

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together; the message names expected and given.
    """
    return gated_norm_op(x, z, weight, bias, groups, eps, activation, gate_first, True)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    activation: GateActivation | None = "silu",
    gate_first: bool = False,
    groups: int = 1,
) -> Tensor:
    """RMS norm of x and a gate; arguments, result and errors as of :func:`gated_layer_norm`."""
    return gated_norm_op(x, z, weight, None, groups, eps, activation, gate_first, False)
