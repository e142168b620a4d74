"""What the launches of all Triton kernels share."""

import contextlib
import functools
import os

import torch
from torch import Tensor

__all__ = ["ceil_div", "contiguous_channels", "device_guard", "multiprocessors", "next_power_of_2", "runs_ptx"]


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up; Triton's own takes 6 us a call on the host, as it can be called in kernels too."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, which is positive."""
    return 1 << (n - 1).bit_length()


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``device`` the current one: Triton launches on the current device, wherever the tensors are."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else contextlib.nullcontext()


def contiguous_channels(x: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, which is all the kernels ask for, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 for the CPU, where Triton's interpreter runs."""
    return (
        1
        if device.type == "cpu"
        else torch.get_device_module(device).get_device_properties(device).multi_processor_count
    )


def runs_ptx(device: torch.device) -> bool:
    """Whether kernels may contain NVIDIA's assembly: not on other GPUs, and not in Triton's interpreter."""
    return device.type == "cuda" and torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1"
