"""VMamba's cross scan in one call, beside the three steps that forks of it take: expand, scan, merge."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoo.backbones.scans import scan_paths
from zoo.kernels import selective_scan
from zoo.tools.benchmarks.measure import Machine, exponentials_ms
from zoo.tools.benchmarks.section import Implementation, Section

__all__ = ["STAGES", "CrossScan", "Shape", "vmamba_stages"]

STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))  # channels and side of the map, of VMamba-T at 224 px

REVERSE = (False, False, True, True)  # the table's last two rows are its first two from their ends


@dataclass(frozen=True)
class Shape:
    """One call: batch, paths, channels, rows and columns of the grid, states."""

    name: str
    batch: int
    K: int
    D: int
    H: int
    W: int
    N: int

    @property
    def L(self) -> int:
        return self.H * self.W


def vmamba_stages(batch: int) -> tuple[Shape, ...]:
    """The four stages of VMamba-T at 224 px."""
    return tuple(
        Shape(f"VMamba-T stage {stage}", batch, 4, D, side, side, 1) for stage, (D, side) in enumerate(STAGES, 1)
    )


@dataclass(frozen=True)
class CrossScan(Section):
    """Four paths over a grid, as in VMamba v05: one u for all of them, softplus with bias, skip, no gate."""

    name: ClassVar[str] = "cross_scan"
    cpu_shapes: tuple[Shape, ...] = vmamba_stages(batch=2)
    gpu_shapes: tuple[Shape, ...] = vmamba_stages(batch=128)

    def implementations(self, device: str) -> dict[str, Implementation]:
        """Both ours: nothing but the fusion differs."""
        return {
            "zoo fused": Implementation(fused, as_two_orders),
            "unfused: gather, zoo scan, scatter": Implementation(unfused, in_path_order),
        }

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """All in grid order: u (B, L, D), delta (B, K, L, D), B and C (B, K, L, N); table (K, L)."""
        torch.manual_seed(0)
        activation = dict(device=device, dtype=dtype)
        per_path = (shape.batch, shape.K, shape.L)
        return dict(
            u=torch.randn(shape.batch, shape.L, shape.D, **activation),
            delta=torch.randn(*per_path, shape.D, **activation) * 0.5,
            A=-torch.arange(1.0, shape.N + 1, device=device).repeat(shape.K, shape.D, 1),
            B=torch.randn(*per_path, shape.N, **activation),
            C=torch.randn(*per_path, shape.N, **activation),
            D=torch.ones(shape.K, shape.D, device=device),
            delta_bias=torch.rand(shape.K, shape.D, device=device) - 4.0,
            table=scan_paths("cross", shape.H, shape.W, device),
        )

    def floors(self, shape: Shape, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Two counts of memory traffic, and on GPUs N + 3 exponentials and logarithms per path, token and channel.

        With E = B * L * D and S = B * L * N elements of ``dtype.itemsize`` bytes (2 in bf16):

        * ``dram``: every path by itself reads u, delta, B and C once and writes its output once, K * (3 E + 2 S);
          backward it reads u, delta, B, C and the output's gradient and writes four gradients, K * (5 E + 4 S).
        * ``dram_shared``: u is read once and the output is written once for all paths, (K + 2) E + 2 K S; backward
          likewise u, its gradient and the output's, (2 K + 3) E + 4 K S. No implementation can do with less.

        Parameters and the table are not counted: they are small and stay in the cache.
        """
        K, E, S = shape.K, shape.batch * shape.L * shape.D, shape.batch * shape.L * shape.N
        per_ms = bandwidth * 1e-3 / machine.dtype.itemsize  # elements that can be moved in a millisecond
        floors = dict(
            dram_forward=K * (3 * E + 2 * S) / per_ms,
            dram_backward=K * (5 * E + 4 * S) / per_ms,
            dram_shared_forward=((K + 2) * E + 2 * K * S) / per_ms,
            dram_shared_backward=((2 * K + 3) * E + 4 * K * S) / per_ms,
        )
        if machine.device == "cuda":
            floors["exp_forward"] = exponentials_ms((shape.N + 3) * K * E)
        return floors


def as_two_orders(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keeps rows and columns of the table, each walked from both ends."""
    return {**inputs, "table": inputs["table"][:2]}


def fused(u, delta, A, B, C, D, delta_bias, table) -> Tensor:
    """One call on the grid, (B, L, D)."""
    return selective_scan(
        u, delta, A, B, C, D, None, delta_bias, delta_softplus=True, paths=table, reverse=REVERSE, complete=True
    )


def in_path_order(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """delta, B and C as forks get them, from projections of the copies of u: step by step, (B, L, K * D or K, N).

    So only u has to be copied, and only outputs have to be brought back. ``visits`` says which token is read by path k
    at step p, at p * K + k; ``returns`` says where among these path k reads token t, at t * K + k.
    """
    table = inputs["table"].long()
    K = len(table)
    path = torch.arange(K, device=table.device)
    delta, B, C = (inputs[name][:, path[:, None], table].transpose(1, 2) for name in ("delta", "B", "C"))
    return dict(
        u=inputs["u"],
        delta=delta.flatten(2).contiguous(),
        A=inputs["A"].flatten(0, 1),
        B=B.contiguous(),
        C=C.contiguous(),
        D=inputs["D"].flatten(),
        delta_bias=inputs["delta_bias"].flatten(),
        visits=table.t().flatten(),
        returns=(table.argsort(1) * K + path[:, None]).t().flatten(),
    )


def unfused(u, delta, A, B, C, D, delta_bias, visits, returns) -> Tensor:
    """u copied for every path, one scan of K * D channels in K groups, outputs gathered back and added, (B, L, D).

    The copies have the paths beside the channels instead of before the tokens: then one call scans all paths and
    returns all outputs, which is how forks call mamba_ssm's kernel.
    """
    copies = _Expand.apply(u, visits, returns)
    y = selective_scan(copies, delta, A, B, C, D, None, delta_bias, delta_softplus=True)
    return _Merge.apply(y, visits, returns)


def _expand(x: Tensor, visits: Tensor) -> Tensor:
    """Tokens (B, L, D) in the order of every path, (B, L, K * D)."""
    return x.index_select(1, visits).view(x.shape[0], x.shape[1], -1)


def _merge(y: Tensor, returns: Tensor) -> Tensor:
    """Outputs of all paths (B, L, K * D) on the grid, and there their sum (B, L, D)."""
    batch, L, _ = y.shape
    paths = len(returns) // L
    on_grid = y.reshape(batch, L * paths, -1).index_select(1, returns)
    return on_grid.view(batch, L, paths, -1).sum(2)


class _Expand(torch.autograd.Function):
    """``_expand``, whose gradient is a ``_merge``: gathers both ways, where autograd would add with atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, visits: Tensor, returns: Tensor) -> Tensor:
        ctx.save_for_backward(returns)
        return _expand(x, visits)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _merge(grad, *ctx.saved_tensors), None, None


class _Merge(torch.autograd.Function):
    """``_merge``, whose gradient is an ``_expand``."""

    @staticmethod
    def forward(ctx, y: Tensor, visits: Tensor, returns: Tensor) -> Tensor:
        ctx.save_for_backward(visits)
        return _merge(y, returns)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _expand(grad, *ctx.saved_tensors), None, None
