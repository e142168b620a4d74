"""2D selective scan of VMamba (Liu et al., arXiv 2401.10166, section 4.2): a map mixed along paths through its grid.

Maps are channels-last, (B, H, W, C). Parameters of the K paths are stacked in the leading dimension, and the scan is
one launch that reads the map and adds into the result through index tables: neither cross-scan nor cross-merge ever
exists in memory. An order walked from both ends is one row of a table, and the order of the map itself needs none.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones.layers.depthwise_conv import DepthwiseConv
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.recurrence import check_window, init_decays, init_steps, negative_exp
from zoo.backbones.layers.stacked_linear import project_steps
from zoo.backbones.scans import scan_paths
from zoo.kernels import GATES, is_exporting, projected_scan, selective_scan, ssd

__all__ = [
    "SS2D",
    "Gate",
    "OutputNorm",
    "Paths",
    "Recurrence",
    "SSDPaths",
    "SelectivePaths",
    "from_authors_name",
]

Activation = Literal["silu", "gelu"]
Gate = Literal["activated", "plain"]
OutputNorm = Literal["layernorm", "dwconv", "layernorm_dwconv", "softmax", "sigmoid"]
Recurrence = Literal["selective_scan", "ssd"]

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU}

# Scans whose K = 4 paths go through all cells, and which of the paths start from the end.
FULL_SCANS = {
    "cross": (False, False, True, True),  # rows, columns
    "bidi": (False, False, True, True),  # rows, rows
    "unidi": (False, False, False, False),
}
CASCADE = "cascade"


class Paths(NamedTuple):
    """What a scan along K paths steps its states with.

    Attributes:
        delta: Steps of every token, (B, K, L, E).
        B: What a token puts in, (B, K, L, N).
        C: What it takes out, (B, K, L, N).
        A: Decays, (K, E, N).
        D: Skip, (K, E).
        delta_bias: Added to the steps, (K, E).
    """

    delta: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor
    delta_bias: Tensor

    def split(self) -> list["Paths"]:
        """Every path on its own. Gradients are put together once; those of slices would be copied into zeros."""
        # Paths come first in the memory of what projections make, and so they do in its gradient.
        of_tokens = [[path.transpose(0, 1) for path in x.transpose(0, 1).split(1)] for x in self[:3]]
        return [Paths(*path) for path in zip(*of_tokens, *(x.split(1) for x in self[3:]), strict=True)]


def _check(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, choices))}")


def _of(parameters: Tensor, only: slice | None) -> Tensor:
    """Those of some paths. A slice of all is not free: its gradient is copied into zeros."""
    return parameters if only is None else parameters[only]


class SelectivePaths(nn.Module):
    """Selective scans along K paths, each with its own parameters, that all read the same tokens.

    Shapes: B batch, L tokens, E = dim, K paths, N states, R rank of the step projection.

    Args:
        dim: Token width E.
        paths: Paths K.
        d_state: States N per channel.
        dt_rank: Rank R.
        lb_window: Steps of a locally bidirectional window (LBMamba, arXiv 2506.15976): 1 for plain scans, 2, 4, 8, 16.

    Raises:
        ValueError: If ``lb_window`` is not one of the above.
    """

    def __init__(
        self,
        dim: int,
        paths: int,
        d_state: int,
        dt_rank: int,
        lb_window: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_window(lb_window)
        self.splits = [dt_rank, d_state, d_state]  # of the rows that x_proj makes of a token
        self.lb_window = lb_window
        self.x_proj_weight = nn.Parameter(torch.empty(paths, sum(self.splits), dim, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(paths, dim, dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(paths, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(paths, dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(paths, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: steps log-uniform in [0.001, 0.1], A = -1..-N, D = 1."""
        dim, rank = self.dt_proj_weight.shape[1:]
        nn.init.uniform_(self.x_proj_weight, -(dim**-0.5), dim**-0.5)
        nn.init.uniform_(self.dt_proj_weight, -(rank**-0.5), rank**-0.5)
        init_steps(self.dt_bias)
        init_decays(self.A_log)
        nn.init.ones_(self.D)

    def paths(self, delta: Tensor, B: Tensor, C: Tensor, only: slice | None = None) -> Paths:
        """All paths, or those of ``only``, whose delta (B, K, L, E), B and C (B, K, L, N) are these."""
        return Paths(delta, B, C, negative_exp(_of(self.A_log, only)), _of(self.D, only), _of(self.dt_bias, only))

    def project(self, u: Tensor, only: slice | None = None) -> Paths:
        """What all paths, or those of ``only``, make of tokens (B, L, E)."""
        steps = project_steps(u[None], _of(self.x_proj_weight, only), _of(self.dt_proj_weight, only))
        return self.paths(*(t.transpose(0, 1) for t in steps), only)

    def walk(
        self,
        u: Tensor,
        paths: Paths,
        table: Tensor | None = None,
        reverse: tuple[bool, ...] = (False,),
        complete: bool = False,
        partition: bool = False,
    ) -> Tensor:
        """Scans tokens (B, L, E) along paths; returns the sum of what they put on every token (B, L, E).

        ``table``, ``reverse``, ``complete`` and ``partition`` are those of :func:`~zoo.kernels.selective_scan`.
        """
        if u.dtype == torch.float16:  # the sum over paths overflows it in training
            u, paths = u.float(), Paths(*(x.float() for x in paths))
        return selective_scan(
            u, **paths._asdict(), delta_softplus=True, paths=table, reverse=reverse, window=self.lb_window,
            complete=complete, partition=partition,
        )  # fmt: skip

    def forward(
        self, u: Tensor, table: Tensor | None = None, reverse: tuple[bool, ...] = (False,), complete: bool = False
    ) -> Tensor:
        """Tokens (B, L, E) to the sum of all paths (B, L, E)."""
        if not self._learns_in_one(u):
            return self.walk(u, self.project(u), table, reverse, complete)
        return projected_scan(
            u, self.x_proj_weight, self.dt_proj_weight, negative_exp(self.A_log), self.D, self.dt_bias, paths=table,
            reverse=reverse, window=self.lb_window, complete=complete,
        )  # fmt: skip

    def _learns_in_one(self, u: Tensor) -> bool:
        """Whether gradients are needed, of numbers that need no widening, and of a call that is not taken apart."""
        learns = torch.is_grad_enabled() and (u.requires_grad or self.x_proj_weight.requires_grad)
        taken_apart = torch.jit.is_tracing() or is_exporting()
        return learns and u.dtype != torch.float16 and not taken_apart


class SSDPaths(nn.Module):
    """Mamba-2's recurrence (SSD, arXiv 2405.21060) along K paths: R heads on each, one decay per head, steps projected
    straight from the tokens. Every path has to go through all tokens.

    Args:
        dim: Token width E, a multiple of ``heads``.
        paths: Paths K.
        d_state: States N.
        heads: Heads R of a path.

    Raises:
        ValueError: If ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        paths: int,
        d_state: int,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % heads:
            raise ValueError(f"inner width {dim} does not divide into dt_rank={heads} heads")
        self.splits = [heads, d_state, d_state]
        self.x_proj_weight = nn.Parameter(torch.empty(paths, sum(self.splits), dim, **dd))
        self.dt_bias = nn.Parameter(torch.empty(paths, heads, **dd))
        self.A_log = nn.Parameter(torch.empty(paths, heads, **dd))
        self.D = nn.Parameter(torch.empty(paths, heads, dim // heads, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of Mamba-2: steps log-uniform in [0.001, 0.1], -A uniform in [1, 16], D = 1."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_steps(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)

    def forward(
        self, u: Tensor, table: Tensor | None = None, reverse: tuple[bool, ...] = (False,), complete: bool = True
    ) -> Tensor:
        """Tokens (B, L, E) to the sum of all paths (B, L, E); arguments as in :class:`SelectivePaths`."""
        K, heads, width = self.D.shape
        if table is not None:  # this kernel wants a row for every path
            table = table.repeat(K // len(table), 1)
        projected = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(2, (K, -1)).transpose(1, 2)
        dt, B, C = projected.split(self.splits, dim=-1)  # (B, K, L, R or N)
        y = ssd(
            u.unflatten(2, (heads, width)),
            dt,
            negative_exp(self.A_log),
            B,
            C,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            paths=table,
            reverse=reverse,
        )
        # D differs between the channels of a head, so it is added here, once for all paths.
        return torch.addcmul(y.flatten(2), u, self.D.sum(0).flatten().to(u.dtype))


class SpatialSoftmax(nn.Module):
    """Softmax over the cells of a map (B, H, W, C), channel by channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to map (B, H, W, C)."""
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


def _output_norm(
    kind: OutputNorm | None, dim: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    dd = {"device": device, "dtype": dtype}
    if kind is None:
        return nn.Identity()
    if kind == "dwconv":
        return DepthwiseConv(dim, 3, bias=False, **dd)
    if kind == "layernorm_dwconv":
        return nn.Sequential(LayerNorm(dim, **dd), DepthwiseConv(dim, 3, bias=False, **dd))
    if kind == "layernorm":
        return LayerNorm(dim, **dd)
    return SpatialSoftmax() if kind == "softmax" else nn.Sigmoid()


@register_notrace_module
class SS2D(nn.Module):
    """Project in, depth-wise convolution, scan along K paths, norm, gate, project out.

    Shapes: B batch, D = dim, E = int(ssm_ratio * dim), N states, R rank of the step projection, K paths.

    Args:
        dim: Width D of the map.
        d_state: States N per channel.
        dt_rank: Rank R of the step projection (the heads of a path with ``recurrence="ssd"``); default ceil(dim / 16).
        ssm_ratio: Inner width E as a multiple of ``dim``.
        d_conv: Side of the depth-wise convolution, odd; 1 for none (its activation stays).
        conv_bias: Whether the convolution has a bias.
        scan: The paths. ``"cross"``: rows and columns, each from both ends; ``"bidi"``: rows, twice from either end;
            ``"unidi"``: rows, four times; ``"cascade"``: every row on its own from both ends and then every column;
            or any strategy of :func:`~zoo.backbones.scans.list_scans`, whose paths are walked forwards.
        scan_options: Options of that strategy, such as the ``rate`` of ``"atrous"``.
        recurrence: ``"selective_scan"`` (Mamba) or ``"ssd"`` (Mamba-2).
        gate: Whether the output is multiplied by a second projection of the input, ``"activated"`` or ``"plain"``.
        activation: After the convolution and of the gate.
        output_norm: Of the scans' sum: layer norm, depth-wise 3x3 convolution, both one after the other, softmax over
            the cells, sigmoid, or None.
        output_activation: Whether GELU follows the norm.
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.
        drop_rate: Dropout of the output.

    ``"cascade"`` does as published: what a row or column scanned from its end gives is added in the order of its steps,
    not at the cells that were read. No released model uses it.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        d_conv: int = 3,
        conv_bias: bool = True,
        scan: str = "cross",
        scan_options: dict[str, int] | None = None,
        recurrence: Recurrence = "selective_scan",
        gate: Gate | None = "activated",
        activation: Activation = "silu",
        output_norm: OutputNorm | None = "layernorm",
        output_activation: bool = False,
        lb_window: int = 1,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        _check("recurrence", recurrence, get_args(Recurrence))
        _check("activation", activation, get_args(Activation))
        _check("gate", gate, (None, *get_args(Gate)))
        _check("output_norm", output_norm, (None, *get_args(OutputNorm)))
        if recurrence == "ssd" and (scan not in FULL_SCANS or lb_window != 1):
            raise ValueError(
                f"recurrence='ssd' needs lb_window=1 and scan one of {', '.join(FULL_SCANS)}, got {scan!r}"
            )
        if d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, or 1 for no convolution, got {d_conv}")
        inner, rank = int(ssm_ratio * dim), dt_rank or math.ceil(dim / 16)
        self.scan, self.scan_options = scan, dict(scan_options or {})
        if scan in FULL_SCANS or scan == CASCADE:
            self.reverse = FULL_SCANS.get(scan, (False, True, False, True))
        else:  # a strategy's number of paths is known once it is asked; a small grid will do
            self.reverse = (False,) * len(scan_paths(scan, 2, 2, **self.scan_options))
        self.gate, self.output_activation = gate, output_activation
        self.gate_activation = activation if gate == "activated" else None
        self.in_proj = nn.Linear(dim, inner if gate is None else 2 * inner, bias=False, **dd)
        if d_conv > 1:
            self.conv = DepthwiseConv(inner, d_conv, conv_bias, activation, **dd)
        else:
            self.conv = ACTIVATIONS[activation]()
        if recurrence == "ssd":
            self.ssm = SSDPaths(inner, len(self.reverse), d_state, rank, **dd)
        else:
            self.ssm = SelectivePaths(inner, len(self.reverse), d_state, rank, lb_window, **dd)
        self.out_norm = _output_norm(output_norm, inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to map (B, H, W, D)."""
        x = self.in_proj(x)  # (B, H, W, E or 2 E)
        x, z = (x, None) if self.gate is None else x.chunk(2, dim=-1)
        u = self.conv(x)
        y = self._cascade(u) if self.scan == CASCADE else self._scan(u)
        return self.drop(self.out_proj(self._norm_and_gate(y, z, u.dtype)))

    def _norm_and_gate(self, y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Sum of the paths and gate, if there is one, both (B, H, W, E), to (B, H, W, E) in ``dtype``."""
        if z is not None and isinstance(self.out_norm, LayerNorm) and not self.output_activation:
            return self.out_norm.gated(y, z, self.gate_activation)
        y = self.out_norm(y.to(self.out_proj.weight.dtype) if dtype == torch.float16 else y).to(dtype)
        if self.output_activation:
            y = F.gelu(y)
        return y if z is None else y * GATES[self.gate_activation](z)

    def _scan(self, u: Tensor) -> Tensor:
        """Map (B, H, W, E) to the sum of all paths on it (B, H, W, E)."""
        H, W = u.shape[1:3]
        table = None
        if self.scan == "cross":
            table = scan_paths("cross", H, W, u.device)[:2]  # the other two rows are these, reversed
        elif self.scan not in FULL_SCANS:
            table = scan_paths(self.scan, H, W, u.device, **self.scan_options)
        y = self.ssm(u.flatten(1, 2), table, self.reverse, complete=self.scan in FULL_SCANS)
        return y.unflatten(1, (H, W))

    def _cascade(self, u: Tensor) -> Tensor:
        """Map (B, H, W, E) with its rows and then its columns scanned, each from both ends."""
        rows = self._scan_lines(F.layer_norm(u, u.shape[-1:]), slice(0, 2))
        columns = F.layer_norm(rows, u.shape[-1:]).transpose(1, 2)  # (B, W, H, E)
        return self._scan_lines(columns, slice(2, 4)).transpose(1, 2)

    def _scan_lines(self, lines: Tensor, paths: slice) -> Tensor:
        """Lines (B, M, T, E), each a sequence of its own, scanned along two paths."""
        u = lines.flatten(0, 1)  # (B*M, T, E)
        forwards, backwards = (
            self.ssm.walk(u, self.ssm.project(u, only), reverse=self.reverse[only])
            for only in (slice(paths.start, paths.start + 1), slice(paths.start + 1, paths.stop))
        )
        return (forwards + backwards.flip(1)).unflatten(0, lines.shape[:2])


# The names of VMamba's authors, and of their single-file version, for the parameters of an SS2D.
UPSTREAM_NAMES = {
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "conv2d.1.weight": "conv.weight",  # Mamba-2 form
    "conv2d.1.bias": "conv.bias",
    "x_proj_weight": "ssm.x_proj_weight",
    "x_proj.weight": "ssm.x_proj_weight",
    "dt_projs_weight": "ssm.dt_proj_weight",
    "dt_projs.weight": "ssm.dt_proj_weight",
    "dt_projs_bias": "ssm.dt_bias",
    "dt_projs.bias": "ssm.dt_bias",
    "A_logs": "ssm.A_log",
    "Ds": "ssm.D",
    "out_norm.1.weight": "out_norm.weight",  # convolution as norm
    "out_norm.2.weight": "out_norm.1.weight",  # convolution after layer norm
}


def from_authors_name(leaf: str) -> str:
    """Name of a parameter inside an SS2D: the authors' to ours."""
    return UPSTREAM_NAMES.get(leaf, leaf)
