"""Depth-wise convolution with bias and SiLU, beside torch's convolution and activation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import depthwise_conv2d
from zoo.tools.benchmarks.cross_scan import STAGES
from zoo.tools.benchmarks.measure import Machine
from zoo.tools.benchmarks.section import Implementation, Section

__all__ = ["DepthwiseConv2d", "Shape"]


@dataclass(frozen=True)
class Shape:
    """One call: batch, side of the maps, channels, side of the kernels."""

    name: str
    batch: int
    side: int
    C: int
    k: int


def _shapes(batch: int) -> tuple[Shape, ...]:
    """The stages of VMamba-T, the inverted residuals of EfficientVMamba-S and PlainMamba-L1, at 224 px."""
    return (
        *(Shape(f"VMamba-T stage {stage}", batch, side, C, 3) for stage, (C, side) in enumerate(STAGES, 1)),
        Shape("EfficientVMamba-S stage 3", batch, 14, 1024, 3),
        Shape("EfficientVMamba-S stage 4", batch, 7, 2048, 3),
        Shape("PlainMamba-L1", batch, 14, 384, 7),
    )


@dataclass(frozen=True)
class DepthwiseConv2d(Section):
    """Maps in the machine's dtype, parameters in float32."""

    name: ClassVar[str] = "depthwise_conv2d"
    cpu_shapes: tuple[Shape, ...] = _shapes(batch=2)[:1]  # models use torch's convolution there
    gpu_shapes: tuple[Shape, ...] = _shapes(batch=128)

    def implementations(self, device: str) -> dict[str, Implementation]:
        """Ours, and torch's convolution followed by its activation."""
        return {"zoo": Implementation(_zoo), "torch: convolve, activate": Implementation(_in_steps)}

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Maps (B, side, side, C), weight (C, 1, k, k) and bias (C,)."""
        torch.manual_seed(0)
        return dict(
            x=torch.randn(shape.batch, shape.side, shape.side, shape.C, device=device, dtype=dtype),
            weight=torch.randn(shape.C, 1, shape.k, shape.k, device=device) / shape.k,
            bias=torch.randn(shape.C, device=device),
        )

    def floors(self, shape: Shape, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Memory traffic: every map once; forward one in and one out, backward two in and one out."""
        bytes_of_map = shape.batch * shape.side**2 * shape.C * machine.dtype.itemsize
        per_ms = bandwidth * 1e-3  # bytes that can be moved in a millisecond
        return dict(dram_forward=2 * bytes_of_map / per_ms, dram_backward=3 * bytes_of_map / per_ms)


def _zoo(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return depthwise_conv2d(x, weight, bias, activation="silu")


def _in_steps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As autocast has it: parameters are made as narrow as the maps."""
    images, weight, bias = x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype)
    return F.silu(F.conv2d(images, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)))
