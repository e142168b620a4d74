"""Selective scan in Triton: the backend's two entry points."""

from zoo.kernels.selective_scan.triton_bwd import backward
from zoo.kernels.selective_scan.triton_fwd import forward

__all__ = ["backward", "forward"]
