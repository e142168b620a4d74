"""Bias and GELU in one pass, beside torch's GELU of what a linear layer with a bias writes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import bias_gelu
from zoo.tools.benchmarks.cross_scan import STAGES
from zoo.tools.benchmarks.measure import Machine
from zoo.tools.benchmarks.section import Implementation, Section

__all__ = ["BiasGelu", "Shape"]

MLP_RATIO = 4


@dataclass(frozen=True)
class Shape:
    """One call: rows of D hidden channels."""

    name: str
    rows: int
    D: int


def _shapes(batch: int) -> tuple[Shape, ...]:
    """The hidden layers of VMamba-T's MLPs at 224 px."""
    return tuple(
        Shape(f"VMamba-T stage {stage}", batch * side**2, MLP_RATIO * D) for stage, (D, side) in enumerate(STAGES, 1)
    )


@dataclass(frozen=True)
class BiasGelu(Section):
    """Rows in the machine's dtype, the bias in float32."""

    name: ClassVar[str] = "bias_gelu"
    cpu_shapes: tuple[Shape, ...] = _shapes(batch=2)[:1]  # models use torch's GELU there
    gpu_shapes: tuple[Shape, ...] = _shapes(batch=256)

    def implementations(self, device: str) -> dict[str, Implementation]:
        """Ours, and torch's; its bias is added by the product before, and only its gradient takes time here."""
        return {"zoo": Implementation(bias_gelu), "torch: GELU, sum of gradients": Implementation(_in_steps)}

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Rows (rows, D) and bias (D,)."""
        torch.manual_seed(0)
        x = torch.randn(shape.rows, shape.D, device=device, dtype=dtype)
        return dict(x=x, bias=torch.randn(shape.D, device=device))

    def floors(self, shape: Shape, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Memory traffic: forward two numbers for each of the rows, backward rows and two gradients."""
        bytes_of_rows = shape.rows * shape.D * machine.dtype.itemsize
        per_ms = bandwidth * 1e-3  # bytes that can be moved in a millisecond
        return dict(dram_forward=2 * bytes_of_rows / per_ms, dram_backward=3 * bytes_of_rows / per_ms)


class _Biased(torch.autograd.Function):
    """Rows to which a product has added a bias: the sum over rows that is the bias's gradient, and nothing else."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum(0).float()


def _in_steps(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(_Biased.apply(x, bias))
