"""The selective scan's backend for CPUs: compiled loops where they can run, vectorised torch code elsewhere."""

from types import ModuleType

import torch
from torch import Tensor

from zoo.kernels._backend import why_no_compiled_loops
from zoo.kernels.registration import accumulate_dtype
from zoo.kernels.selective_scan import cpu_torch

__all__ = ["backward", "forward"]

NARROWEST = 4  # channels of a group; with fewer, a vector of channels of one group is mostly empty


def chosen(u: Tensor, B: Tensor) -> ModuleType:
    """The code for a call with input u (B, 1 or K, L, D) and projection B (B, K, L, G, N).

    The loops work in float32, on CPUs, with vectors of channels that share a group of B and C; they need numba.
    """
    groups, wide_numbers = B.shape[3], accumulate_dtype(u) == torch.float64
    narrow_groups = groups > 1 and u.shape[3] // groups < NARROWEST
    if u.device.type != "cpu" or wide_numbers or narrow_groups or why_no_compiled_loops():
        return cpu_torch
    from zoo.kernels.selective_scan import cpu_numba

    return cpu_numba


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, L, D), last state (B, K, D, N) and chunk-boundary states (B, K, chunks, N, D)."""
    return chosen(u, B).forward(u, delta, A, B, *rest)


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    *rest,
) -> list[Tensor]:
    """Gradients of the tensors given, in argument order."""
    return chosen(u, B).backward(grad_out, grad_last_state, states, u, delta, A, B, *rest)
