"""Mamba mixer over a token sequence, in one direction or two (Gu & Dao, arXiv 2312.00752; Zhu et al., 2401.09417).

Parameters of the K directions are stacked in the leading dimension, so one launch or one batched GEMM serves all
directions, and nothing is flipped, concatenated or transposed in memory: a direction is a flag of the kernels.
"""

import math
from typing import Literal, get_args

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.kernels import causal_conv1d, selective_scan

__all__ = ["Directions", "MambaMixer", "Merge"]

Directions = Literal["bidirectional", "shared", "forward"]
Merge = Literal["mean", "sum"]

REVERSE = {"bidirectional": (False, True), "shared": (False, True), "forward": (False,)}

# FX and timm's feature extraction see the two kernels as single nodes.
torch.fx.wrap("causal_conv1d")
torch.fx.wrap("selective_scan")
register_notrace_function(causal_conv1d)
register_notrace_function(selective_scan)


class MambaMixer(nn.Module):
    """Gated selective scan: project in, short causal convolution, scan, gate, project out.

    Shapes: B batch, L tokens, D = dim, E = expand * dim, N states, R rank of the step projection, W taps, K scanned
    directions, P parameter sets of the convolution and the projections (K, or 1 when they are shared).

    Args:
        dim: Token width D.
        d_state: States N per channel.
        d_conv: Taps W of the convolution.
        expand: Inner width E as a multiple of ``dim``.
        dt_rank: Rank R of the step projection; default ceil(dim / 16).
        directions: ``"bidirectional"`` scans forwards and backwards, each direction with its own parameters (Vim v2);
            ``"shared"`` convolves forwards once and scans the result both ways, with only A of its own (Vim v1);
            ``"forward"`` scans once.
        flipped: Whether the mixer reads the sequence from its end, as if the tokens were flipped around it.
        merge: Whether the directions' outputs are averaged or added.
        layer_scale: Initial value of a learned factor per channel on the output; default none.

    Raises:
        ValueError: If ``directions`` or ``merge`` is not one of the above.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        directions: Directions = "bidirectional",
        flipped: bool = False,
        merge: Merge = "mean",
        layer_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if directions not in REVERSE:
            raise ValueError(f"directions={directions!r} is not known; use one of {', '.join(REVERSE)}")
        if merge not in get_args(Merge):
            raise ValueError(f"merge={merge!r} is not known; use one of {', '.join(get_args(Merge))}")
        inner = expand * dim
        rank = dt_rank or math.ceil(dim / 16)
        self.reverse = tuple(backwards != flipped for backwards in REVERSE[directions])
        paths = len(self.reverse)  # K
        sets = 1 if directions == "shared" else paths  # P
        self.conv_reverse = self.reverse[:sets]
        self.splits = [rank, d_state, d_state]
        self.output_factor = 1 / paths if merge == "mean" else 1.0
        self.layer_scale_init = layer_scale

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(sets, inner, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(sets, inner, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(sets, rank + 2 * d_state, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(sets, inner, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(sets, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(paths, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(sets, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: steps log-uniform in [0.001, 0.1], A = -1..-N, D = 1."""
        taps, inner, rank = self.conv_weight.shape[-1], self.x_proj_weight.shape[-1], self.dt_proj_weight.shape[-1]
        nn.init.uniform_(self.conv_weight, -(taps**-0.5), taps**-0.5)
        nn.init.uniform_(self.conv_bias, -(taps**-0.5), taps**-0.5)
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_proj_weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
            states = torch.arange(1, self.A_log.shape[-1] + 1, device=self.A_log.device, dtype=self.A_log.dtype)
            self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) to tokens (B, L, D)."""
        batch, length, _ = x.shape
        paths = len(self.reverse)
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) views of one GEMM's output
        u = causal_conv1d(x, self.conv_weight, self.conv_bias, activation="silu", reverse=self.conv_reverse)
        tokens = u.transpose(0, 1).flatten(1, 2)  # (P, B*L, E), a view
        projected = torch.bmm(tokens, self.x_proj_weight.transpose(1, 2)).split(self.splits, dim=-1)
        delta = torch.bmm(projected[0], self.dt_proj_weight.transpose(1, 2))  # (P, B*L, E)
        delta, B, C = (
            t.unflatten(1, (batch, length)).transpose(0, 1).expand(-1, paths, -1, -1)  # (B, K, L, E or N), views
            for t in (delta, projected[1], projected[2])
        )
        A_log = self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))  # 16 bits are too coarse for exp
        y = selective_scan(
            u,
            delta,
            -torch.exp(A_log),
            B,
            C,
            self.D.expand(paths, -1),
            z,
            self.dt_bias.expand(paths, -1),
            delta_softplus=True,
            reverse=self.reverse,
        )
        out = self.out_proj(y)
        if self.gamma is not None:
            out = out * self.gamma
        # The directions are added inside the scan; the mean is taken here, where rows are narrowest.
        return out if self.output_factor == 1.0 else out * self.output_factor
