"""The selective scan along one path, beside the step-by-step recurrence, mambapy and mamba_ssm's CUDA kernel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import selective_scan, selective_scan_fn
from zoo.tools.benchmarks.measure import Machine, exponentials_ms, host_milliseconds, peer
from zoo.tools.benchmarks.section import Implementation, Section

__all__ = ["SelectiveScan", "Shape"]


@dataclass(frozen=True)
class Shape:
    """One call: batch, channels, tokens, states."""

    name: str
    batch: int
    D: int
    L: int
    N: int


@dataclass(frozen=True)
class SelectiveScan(Section):
    """One path in bf16 on GPUs, float32 on CPUs, with gate, skip, bias and softplus, as in a Mamba block."""

    name: ClassVar[str] = "selective_scan"
    cpu_shapes: tuple[Shape, ...] = (
        Shape("Vim-Ti 224", 8, 384, 197, 16),
        Shape("VMamba-T stage 1", 2, 192, 3136, 1),
    )
    gpu_shapes: tuple[Shape, ...] = (
        Shape("Vim-Ti 224", 128, 384, 197, 16),
        Shape("Vim-S 224", 128, 768, 197, 16),
        Shape("Vim-B 224", 128, 1536, 197, 16),
        Shape("Vim-Ti 1248", 4, 384, 6085, 16),
        Shape("LM 2.8B", 8, 5120, 2048, 16),
    )

    def implementations(self, device: str) -> dict[str, Implementation]:
        """Ours on channels-last memory, the others on channel-major memory."""
        found = {"zoo": Implementation(channels_last_scan, in_channels_last_memory)}
        if device == "cpu":
            found["step recurrence"] = Implementation(step_recurrence, peer=True)
            if peer("mambapy.pscan", "pscan"):
                found["mambapy"] = Implementation(mambapy_scan, peer=True)
            return found
        if mamba_ssm_scan := peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"):
            found["mamba_ssm"] = Implementation(lambda **x: mamba_ssm_scan(**x, delta_softplus=True), peer=True)
        found["zoo, (B, D, L) drop-in"] = Implementation(lambda **x: selective_scan_fn(**x, delta_softplus=True))
        return found

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """In mamba_ssm's layout: u, delta and z (B, D, L), B and C (B, N, L)."""
        torch.manual_seed(0)
        activation = dict(device=device, dtype=dtype)
        return dict(
            u=torch.randn(shape.batch, shape.D, shape.L, **activation),
            delta=torch.randn(shape.batch, shape.D, shape.L, **activation) * 0.5,
            A=-torch.arange(1.0, shape.N + 1, device=device).repeat(shape.D, 1),
            B=torch.randn(shape.batch, shape.N, shape.L, **activation),
            C=torch.randn(shape.batch, shape.N, shape.L, **activation),
            D=torch.ones(shape.D, device=device),
            z=torch.randn(shape.batch, shape.D, shape.L, **activation),
            delta_bias=torch.rand(shape.D, device=device) - 4.0,
        )

    def floors(self, shape: Shape, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Everything read and written once; on GPUs also N + 3 exponentials and logarithms per token and channel."""
        elements, states = shape.batch * shape.D * shape.L, shape.batch * shape.L * shape.N
        per_ms = bandwidth * 1e-3 / machine.dtype.itemsize  # activations that can be moved in a millisecond
        floors = dict(
            dram_forward=(4 * elements + 2 * states) / per_ms,  # u, delta, z and the output; B and C
            dram_backward=(7 * elements + 4 * states) / per_ms,  # u, delta, z, four gradients; B, C and theirs
        )
        if machine.device == "cuda":
            floors["exp_forward"] = exponentials_ms((shape.N + 3) * elements)
        return floors

    def extras(self, shape: Shape, implementations: dict, inputs: dict[str, Tensor], machine: Machine) -> dict:
        """``host_ms`` of our forward on a GPU: what the host needs to issue it."""
        if machine.device == "cpu":
            return {}
        prepared = in_channels_last_memory(inputs)
        with torch.no_grad():
            return {"zoo": dict(host_ms=host_milliseconds(lambda: channels_last_scan(**prepared), machine))}


def in_channels_last_memory(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes with contiguous channels, as in our models."""
    return {name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 3 else x for name, x in inputs.items()}


def channels_last_scan(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """Ours, (B, L, D)."""
    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)


def step_recurrence(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """The scan as a loop over tokens with exponentials computed beforehand, (B, D, L): what everybody writes first."""
    step = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(step[..., None] * A[:, None])  # (B, D, L, N)
    inputs = (step * u)[..., None] * B.transpose(1, 2)[:, None]  # (B, D, L, N)
    h, outputs = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[-1]):
        h = decay[:, :, t] * h + inputs[:, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(outputs, -1) + D[:, None] * u) * F.silu(z)


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """The same through mambapy's parallel scan in plain torch."""
    from mambapy.pscan import pscan

    step = F.softplus(delta + delta_bias[:, None]).transpose(1, 2)  # (B, L, D)
    decay = torch.exp(step[..., None] * A)  # (B, L, D, N)
    h = pscan(decay, (step * u.transpose(1, 2))[..., None] * B.transpose(1, 2)[:, :, None])
    y = (h @ C.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
    return (y + D[:, None] * u) * F.silu(z)
