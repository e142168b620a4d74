"""What autocast makes of a tensor, for layers that narrow their inputs themselves."""

import torch

__all__ = ["autocast_dtype"]


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which autocast multiplies numbers of ``dtype`` on a type of device; None where it leaves them."""
    # There is no autocast for meta tensors, and autocast leaves float64 alone.
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
