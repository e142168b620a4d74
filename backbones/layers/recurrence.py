"""Parameters of state-space recurrences, as the mixers of all families start, read and check them."""

import math

import torch
from torch import Tensor

from zoo.kernels import LARGEST_WINDOW

__all__ = ["check_window", "init_decays", "init_steps", "negative_exp"]


def init_steps(dt_bias: Tensor) -> None:
    """Sets biases that softplus turns into step sizes log-uniform in [0.001, 0.1] (Mamba, arXiv 2312.00752)."""
    with torch.no_grad():
        step = dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus


def init_decays(A_log: Tensor) -> None:
    """Sets the logarithms (..., N) of -A to those of 1, 2, ..., N (S4D's real initialisation, arXiv 2206.11893)."""
    with torch.no_grad():
        states = torch.arange(1, A_log.shape[-1] + 1, device=A_log.device, dtype=A_log.dtype)
        A_log.copy_(states.log().expand_as(A_log))


def negative_exp(A_log: Tensor) -> Tensor:
    """A of its logarithms, in float32 or wider: 16 bits are too coarse for exp."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def check_window(lb_window: int) -> None:
    """Raises ValueError unless ``lb_window`` is a locally bidirectional window that the scans know."""
    if lb_window < 1 or LARGEST_WINDOW % lb_window:
        raise ValueError(
            f"lb_window={lb_window} is not known; use a power of two up to {LARGEST_WINDOW}, or 1 for plain scans"
        )
