"""Scans that project their own tokens, beside the projections and the scan one after the other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoo.backbones.layers.stacked_linear import project_steps
from zoo.backbones.scans import scan_paths
from zoo.kernels import projected_scan, selective_scan
from zoo.tools.benchmarks.cross_scan import REVERSE, Shape, vmamba_stages
from zoo.tools.benchmarks.measure import Machine
from zoo.tools.benchmarks.section import Implementation, Section

__all__ = ["ProjectedScan"]


@dataclass(frozen=True)
class ProjectedScan(Section):
    """Cross scan of tokens with everything that is projected from them; weights in the activations' dtype."""

    name: ClassVar[str] = "projected_scan"
    cpu_shapes: tuple[Shape, ...] = vmamba_stages(batch=2)
    gpu_shapes: tuple[Shape, ...] = vmamba_stages(batch=256)

    def implementations(self, device: str) -> dict[str, Implementation]:
        """Both ours: nothing differs but what autograd sees as one operation."""
        return {"zoo": Implementation(_as_one), "one after the other": Implementation(_one_after_the_other)}

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """u (B, L, E), the weights of K paths with steps of rank E / 16, and a table of two orders."""
        torch.manual_seed(0)
        K, E, N, activation = shape.K, shape.D, shape.N, dict(device=device, dtype=dtype)
        R = -(-E // 16)
        return dict(
            u=torch.randn(shape.batch, shape.L, E, **activation),
            x_weight=torch.randn(K, R + 2 * N, E, **activation) * E**-0.5,
            dt_weight=torch.randn(K, E, R, **activation) * R**-0.5,
            A=-torch.ones(K, E, N, device=device),
            D=torch.ones(K, E, device=device),
            delta_bias=torch.rand(K, E, device=device) - 4.0,
            table=scan_paths("cross", shape.H, shape.W, device)[:2],
        )

    def floors(self, shape: Shape, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Two counts of memory traffic, in elements of M = B * L tokens with E channels, of K paths:

        * ``dram``: u is read and the output is written, 2 M E; backward u and the output's gradient are read, and u's
          gradient is written, 3 M E.
        * ``dram_steps``: steps are written and read besides, 2 K M E; backward they are read, and their gradient is
          written and read, 3 K M E.
        """
        K, tokens = shape.K, shape.batch * shape.L * shape.D
        per_ms = bandwidth * 1e-3 / machine.dtype.itemsize  # elements that can be moved in a millisecond
        return dict(
            dram_forward=2 * tokens / per_ms,
            dram_backward=3 * tokens / per_ms,
            dram_steps_forward=(2 + 2 * K) * tokens / per_ms,
            dram_steps_backward=(3 + 3 * K) * tokens / per_ms,
        )


def _as_one(u, x_weight, dt_weight, A, D, delta_bias, table) -> Tensor:
    return projected_scan(u, x_weight, dt_weight, A, D, delta_bias, paths=table, reverse=REVERSE, complete=True)


def _one_after_the_other(u, x_weight, dt_weight, A, D, delta_bias, table) -> Tensor:
    delta, B, C = (x.transpose(0, 1) for x in project_steps(u[None], x_weight, dt_weight))
    return selective_scan(
        u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True, paths=table, reverse=REVERSE, complete=True
    )
