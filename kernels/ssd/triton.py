"""SSD in Triton: the backend's two entry points."""

from zoo.kernels.ssd.triton_bwd import backward
from zoo.kernels.ssd.triton_fwd import forward

__all__ = ["backward", "forward"]
