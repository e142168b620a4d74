"""SSD, the recurrence of Mamba-2: speed and errors beside mamba_ssm's Triton kernels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from zoo.kernels import ssd, use_backend
from zoo.kernels.ssd.reference import ssd_reference
from zoo.tools.benchmarks.measure import Machine, peer
from zoo.tools.benchmarks.section import Implementation, Section

__all__ = ["SSD", "Shape"]


@dataclass(frozen=True)
class Shape:
    """One call: batch, tokens, heads, width of a head, states."""

    name: str
    batch: int
    L: int
    H: int
    P: int
    N: int


@dataclass(frozen=True)
class SSD(Section):
    """One path, one group of B and C, softplus with bias, skip."""

    name: ClassVar[str] = "ssd"
    cpu_shapes: tuple[Shape, ...] = (Shape("vision, 28 x 28 tokens", 1, 784, 12, 64, 64),)
    gpu_shapes: tuple[Shape, ...] = (
        Shape("vision, 28 x 28 tokens", 64, 784, 12, 64, 64),
        Shape("LM 2.7B", 8, 4096, 80, 64, 128),
    )

    def implementations(self, device: str) -> dict[str, Implementation]:
        """mamba_ssm with the chunks of 256 steps that its own layers use."""
        found = {"zoo": Implementation(our_ssd)}
        if device == "cpu":
            found["step recurrence"] = Implementation(step_recurrence, peer=True)
        elif combined := peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"):
            found["mamba_ssm"] = Implementation(lambda **x: combined(**x, chunk_size=256, dt_softplus=True), peer=True)
        return found

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """x (B, L, H, P), dt (B, L, H), B and C (B, L, 1, N)."""
        torch.manual_seed(0)
        activation = dict(device=device, dtype=dtype)
        tokens = (shape.batch, shape.L)
        return dict(
            x=torch.randn(*tokens, shape.H, shape.P, **activation),
            dt=torch.randn(*tokens, shape.H, **activation) * 0.5,
            A=-1 - 15 * torch.rand(shape.H, device=device),
            B=torch.randn(*tokens, 1, shape.N, **activation),
            C=torch.randn(*tokens, 1, shape.N, **activation),
            D=torch.ones(shape.H, device=device),
            dt_bias=torch.rand(shape.H, device=device) - 4.0,
        )

    def floors(self, shape: Shape, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Everything read and written once."""
        tokens = shape.batch * shape.L
        x, dt, projections = tokens * shape.H * shape.P, tokens * shape.H, 2 * tokens * shape.N
        per_ms = bandwidth * 1e-3 / machine.dtype.itemsize  # elements that can be moved in a millisecond
        return dict(
            dram_forward=(2 * x + dt + projections) / per_ms,  # and the output
            dram_backward=(3 * x + 2 * dt + 2 * projections) / per_ms,  # and all gradients
        )

    def extras(self, shape: Shape, implementations: dict, inputs: dict[str, Tensor], machine: Machine) -> dict:
        """Errors of all implementations, and ours in float32 too, which the kernels never round to TF32.

        Measured on one batch element and up to eight heads of all tokens, where a float64 reference is affordable.
        """
        small = replace(shape, batch=1, H=min(shape.H, 8))
        sample = self.inputs(small, machine.device, machine.dtype)
        numbers = errors({name: found.function for name, found in implementations.items()}, sample)
        if machine.dtype != torch.float32:
            in_float32 = errors({"zoo": our_ssd}, self.inputs(small, machine.device, torch.float32))
            numbers["zoo"] |= {f"float32_{name}": value for name, value in in_float32["zoo"].items()}
        return numbers


def our_ssd(x, dt, A, B, C, D, dt_bias) -> Tensor:
    """Ours, (B, L, H, P)."""
    return ssd(x, dt, A, B, C, D, dt_bias, dt_softplus=True)


def step_recurrence(x, dt, A, B, C, D, dt_bias) -> Tensor:
    """The definition as a loop over tokens, differentiated by autograd, (B, L, H, P)."""
    x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))  # one path
    A, D, dt_bias = (t.unsqueeze(0) for t in (A, D, dt_bias))
    return ssd_reference(x, dt, A, B, C, D, dt_bias, None, None, True, [False])[0]


def errors(functions: dict[str, Callable[..., Tensor]], inputs: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """``output_error`` and ``gradient_error`` (the largest of all inputs') against the definition in float64.

    Both are the largest difference divided by the largest expected value.
    """
    exact = {name: x.double() for name, x in inputs.items()}
    cotangent = torch.randn_like(inputs["x"])
    with use_backend("reference"):
        expected = _output_and_gradients(our_ssd, exact, cotangent)
    found = {}
    for name, function in functions.items():
        got = _output_and_gradients(function, inputs, cotangent)
        output, *gradients = (_relative_error(*pair) for pair in zip(got, expected, strict=True))
        found[name] = dict(output_error=output, gradient_error=max(gradients))
    return found


def _output_and_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], cotangent: Tensor
) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))]


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())
