"""Norm and gate in one pass, beside torch's norm, activation and product."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import gated_layer_norm, gated_rms_norm
from zoo.tools.benchmarks.measure import Machine
from zoo.tools.benchmarks.section import Implementation, Section

__all__ = ["GatedNorm", "Shape"]


@dataclass(frozen=True)
class Shape:
    """One call: rows of D channels, layer norm before the gate or RMS norm after it."""

    name: str
    rows: int
    D: int
    gate_first: bool


def _shapes(batch: int) -> tuple[Shape, ...]:
    """The mixers of EfficientVMamba-S at 224 px, and one of Mamba-2 130M that reads 256 tokens of every sequence."""
    return (
        Shape("EfficientVMamba-S stage 1", batch * 56**2, 128, gate_first=False),
        Shape("EfficientVMamba-S stage 2", batch * 28**2, 256, gate_first=False),
        Shape("Mamba-2 130M", batch * 256, 1536, gate_first=True),
    )


@dataclass(frozen=True)
class GatedNorm(Section):
    """Rows in the machine's dtype, of which the gate's are parts of rows three times as wide; weights in float32."""

    name: ClassVar[str] = "gated_norm"
    cpu_shapes: tuple[Shape, ...] = _shapes(batch=2)[:1]  # models call torch's functions there
    gpu_shapes: tuple[Shape, ...] = _shapes(batch=256)

    def implementations(self, device: str) -> dict[str, Implementation]:
        return {"zoo": Implementation(_fused), "torch: norm, activation, product": Implementation(_in_steps)}

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """x and z (rows, D), weight and bias (D,)."""
        torch.manual_seed(0)
        x = torch.randn(shape.rows, shape.D, device=device, dtype=dtype)
        z = torch.randn(shape.rows, 3 * shape.D, device=device, dtype=dtype)[:, -shape.D :]
        given = dict(x=x, z=z, weight=torch.randn(shape.D, device=device))
        return given if shape.gate_first else dict(given, bias=torch.randn(shape.D, device=device))

    def floors(self, shape: Shape, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Memory traffic of rows: forward two are read and one is written, backward three and two."""
        bytes_of_rows = shape.rows * shape.D * machine.dtype.itemsize
        per_ms = bandwidth * 1e-3  # bytes that can be moved in a millisecond
        return dict(dram_forward=3 * bytes_of_rows / per_ms, dram_backward=5 * bytes_of_rows / per_ms)


def _fused(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is None:
        return gated_rms_norm(x, z, weight, gate_first=True)
    return gated_layer_norm(x, z, weight, bias)


def _in_steps(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if bias is None:
        return F.rms_norm(x * F.silu(z), x.shape[-1:], weight, 1e-5)
    return F.layer_norm(x, x.shape[-1:], weight, bias) * F.silu(z)
