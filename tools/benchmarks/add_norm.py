"""Residual add and norm in one call, beside torch's add, norm and cast, and the Triton kernel of mamba_ssm."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import add_layer_norm, add_rms_norm
from zoo.tools.benchmarks.cross_scan import STAGES
from zoo.tools.benchmarks.measure import Machine, peer
from zoo.tools.benchmarks.section import Implementation, Section

__all__ = ["AddNorm", "Shape"]

EPS = 1e-5
STREAM_BYTES = 4  # of an element of the residual stream, which is float32


@dataclass(frozen=True)
class Shape:
    """One call: rows of D channels; layer norm, or RMS norm if not centred."""

    name: str
    rows: int
    D: int
    centered: bool


def _shapes(batch: int) -> tuple[Shape, ...]:
    """The tokens of Vim-Ti and the four stages of VMamba-T, at 224 px."""
    return (
        Shape("Vim-Ti", batch * 197, 192, centered=False),
        *(
            Shape(f"VMamba-T stage {stage}", batch * side**2, D, centered=True)
            for stage, (D, side) in enumerate(STAGES, 1)
        ),
    )


@dataclass(frozen=True)
class AddNorm(Section):
    """An update in the machine's dtype, a stream in float32; normed rows in the machine's dtype, the sum in float32."""

    name: ClassVar[str] = "add_norm"
    cpu_shapes: tuple[Shape, ...] = _shapes(batch=2)[:1]  # layer norms of models are torch's own there
    gpu_shapes: tuple[Shape, ...] = _shapes(batch=256)

    def implementations(self, device: str) -> dict[str, Implementation]:
        """Ours, torch's three steps and, on GPUs, mamba_ssm's kernel if it is installed."""
        implementations = {"zoo": Implementation(_zoo), "torch: add, norm, cast": Implementation(_in_steps)}
        if device == "cuda" and (fused := peer("mamba_ssm.ops.triton.layer_norm", "layer_norm_fn")):
            implementations["mamba_ssm"] = Implementation(partial(_mamba_ssm, fused), peer=True)
        return implementations

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Update and stream (rows, D), weight (D,), and bias (D,) of a layer norm."""
        torch.manual_seed(0)
        inputs = dict(
            update=torch.randn(shape.rows, shape.D, device=device, dtype=dtype),
            stream=torch.randn(shape.rows, shape.D, device=device),
            weight=torch.rand(shape.D, device=device) + 0.5,
        )
        return {**inputs, "bias": torch.randn(shape.D, device=device)} if shape.centered else inputs

    def floors(self, shape: Shape, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Memory traffic: every tensor once; forward two rows in and two out, backward three in and two out."""
        elements, size = shape.rows * shape.D, machine.dtype.itemsize
        per_ms = bandwidth * 1e-3  # bytes that can be moved in a millisecond
        return dict(
            dram_forward=elements * 2 * (STREAM_BYTES + size) / per_ms,
            dram_backward=elements * (3 * STREAM_BYTES + 2 * size) / per_ms,
        )


def _zoo(update: Tensor, stream: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if bias is None:
        return add_rms_norm(update, stream, weight, EPS, update.dtype)
    return add_layer_norm(update, stream, weight, bias, EPS, update.dtype)


def _in_steps(update: Tensor, stream: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    stream = stream + update
    if bias is None:
        return F.rms_norm(stream, weight.shape, weight, EPS).to(update.dtype), stream
    return F.layer_norm(stream, weight.shape, weight, bias, EPS).to(update.dtype), stream


def _mamba_ssm(fused, update: Tensor, stream: Tensor, weight: Tensor, bias: Tensor | None = None):
    options = dict(residual=stream, eps=EPS, prenorm=True, residual_in_fp32=True)
    return fused(update, weight, bias, **options, is_rms_norm=bias is None)
