"""What the launches of all Triton kernels share."""

import contextlib

import torch
from torch import Tensor

__all__ = ["contiguous_channels", "device_guard"]


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``device`` the current one: Triton launches on the current device, wherever the tensors are."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else contextlib.nullcontext()


def contiguous_channels(x: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, which is all the kernels ask for, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
