"""Mamba mixer over a token sequence, along K scan paths (Gu & Dao, arXiv 2312.00752; Zhu et al., 2401.09417).

Parameters of the K paths are stacked in the leading dimension, so one launch or one batched GEMM serves all paths, and
nothing is flipped, concatenated or transposed in memory: a direction is a flag of the kernels, another order a table.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from timm.models import checkpoint, register_notrace_function
from torch import Tensor, nn

from zoo.backbones.layers.recurrence import init_decays, init_steps, negative_exp
from zoo.backbones.layers.stacked_linear import project_steps
from zoo.kernels import LARGEST_WINDOW, causal_conv1d, selective_scan

__all__ = ["Directions", "MambaMixer", "Merge", "local_window", "stack_mixer_parameters"]

Directions = Literal["bidirectional", "shared", "forward"]
Merge = Literal["mean", "sum"]

REVERSE = {"bidirectional": (False, True), "shared": (False, True), "forward": (False,)}

# The authors' parameter names of the forward and of the backward direction, for each stacked parameter of ours.
UPSTREAM_NAMES = {
    "conv_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv_bias": ("conv1d.bias", "conv1d_b.bias"),
    "x_proj_weight": ("x_proj.weight", "x_proj_b.weight"),
    "dt_proj_weight": ("dt_proj.weight", "dt_proj_b.weight"),
    "dt_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "A_log": ("A_log", "A_b_log"),
    "D": ("D", "D_b"),
}

# FX and timm's feature extraction see the two kernels as single nodes.
torch.fx.wrap("causal_conv1d")
torch.fx.wrap("selective_scan")
torch.fx.wrap("project_steps")
register_notrace_function(causal_conv1d)
register_notrace_function(selective_scan)


@torch.fx.wrap
@register_notrace_function
def local_window(length: int) -> int:
    """Window of the locally bidirectional scan that LBMamba (arXiv 2506.15976) uses for sequences of this length.

    In the authors' kernel a window is one thread's items, so it follows from the launch: this is their NVIDIA table.
    """
    return 4 if length <= 128 else 8 if length <= 256 else 16


class MambaMixer(nn.Module):
    """Gated selective scan: project in, short causal convolution, scan, gate, project out.

    Shapes: B batch, L tokens, D = dim, E = expand * dim, N states, R rank of the step projection, W taps, K scan paths,
    S parameter sets of the convolution and the projections (K, or 1 when they are shared).

    Args:
        dim: Token width D.
        d_state: States N per channel.
        d_conv: Taps W of the convolution.
        expand: Inner width E as a multiple of ``dim``.
        dt_rank: Rank R of the step projection; default ceil(dim / 16).
        directions: ``"bidirectional"`` scans forwards and backwards, each direction with its own parameters (Vim v2);
            ``"shared"`` convolves forwards once and scans the result both ways, with only A of its own (Vim v1);
            ``"forward"`` scans once; a number K scans K paths forwards, each with its own parameters, which differ
            in the tables given to :meth:`forward`.
        flipped: Whether the mixer reads the sequence from its end, as if the tokens were flipped around it.
        merge: Whether the paths' outputs are averaged or added.
        layer_scale: Initial value of a learned factor per channel on the output; default none.
        window: Steps of a locally bidirectional window on every path (LBMamba, arXiv 2506.15976), a power of two up to
            16; 1 for a plain scan, None for :func:`local_window` of the sequence's length.

    Attributes:
        grad_checkpointing: Whether all between the two projections is computed again in the backward instead of kept.

    Raises:
        ValueError: If ``directions``, ``merge`` or ``window`` is not one of the above.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        directions: Directions | int = "bidirectional",
        flipped: bool = False,
        merge: Merge = "mean",
        layer_scale: float | None = None,
        window: int | None = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if directions not in REVERSE and not (isinstance(directions, int) and directions > 0):
            raise ValueError(f"directions={directions!r} is not known; use one of {', '.join(REVERSE)} or a number")
        if merge not in get_args(Merge):
            raise ValueError(f"merge={merge!r} is not known; use one of {', '.join(get_args(Merge))}")
        if window is not None and (window < 1 or LARGEST_WINDOW % window):
            raise ValueError(f"window={window} is not known; use a power of two up to {LARGEST_WINDOW}, or None")
        inner = expand * dim
        rank = dt_rank or math.ceil(dim / 16)
        backwards = (False,) * directions if isinstance(directions, int) else REVERSE[directions]
        self.reverse = tuple(each != flipped for each in backwards)
        paths = len(self.reverse)  # K
        sets = 1 if directions == "shared" else paths  # S
        self.window = window
        self.grad_checkpointing = False
        self.conv_reverse = self.reverse[:sets]
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
        init_steps(self.dt_bias)
        init_decays(self.A_log)
        nn.init.ones_(self.D)
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.layer_scale_init)

    def forward(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        """Mixes tokens.

        Args:
            x: Tokens (B, L, D).
            paths: Integer table (K, P) of the token that scan path k visits at step p, see
                :func:`~zoo.kernels.selective_scan`; a reversed path walks its row from the end. Default: the tokens in
                order. Only the scan follows it: the convolution always mixes neighbours of the sequence itself.

        Returns:
            Tokens (B, L, D).
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) views of one GEMM's output
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        y = checkpoint(self._scan, x, z, paths, preserve_rng_state=False) if recompute else self._scan(x, z, paths)
        out = self.out_proj(y)
        if self.gamma is not None:
            out = out * self.gamma
        # The paths are added inside the scan; the mean is taken here, where rows are narrowest.
        return out if self.output_factor == 1.0 else out * self.output_factor

    def _scan(self, x: Tensor, z: Tensor, paths: Tensor | None) -> Tensor:
        """Convolves tokens and scans them with steps, B and C made of them; x, the gate z and the result (B, L, E)."""
        K, length = len(self.reverse), x.shape[1]
        u = causal_conv1d(x, self.conv_weight, self.conv_bias, activation="silu", reverse=self.conv_reverse)
        steps = project_steps(u.transpose(0, 1), self.x_proj_weight, self.dt_proj_weight)
        # Views (B, K, L, E or N). By number, as FX cannot iterate over what a node returns.
        delta, B, C = (steps[i].transpose(0, 1).expand(-1, K, -1, -1) for i in range(3))
        return selective_scan(
            u,
            delta,
            negative_exp(self.A_log),
            B,
            C,
            self.D.expand(K, -1),
            z,
            self.dt_bias.expand(K, -1),
            delta_softplus=True,
            paths=paths,
            reverse=self.reverse,
            window=local_window(length) if self.window is None else self.window,
        )


def stack_mixer_parameters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mixers of a state dict under this file's names.

    Args:
        state_dict: Weights by name. Those of mixers are ``<prefix>mixer.<name>``, as Mamba's and Vim's authors call
            them, with ``_b`` for the backward direction; other names are kept.

    Returns:
        Weights by name, each mixer's parameters of the two directions (or the one) stacked.
    """
    place = {theirs: (ours, k) for ours, names in UPSTREAM_NAMES.items() for k, theirs in enumerate(names)}
    converted, stacks = {}, {}
    for name, tensor in state_dict.items():
        prefix, found, leaf = name.rpartition("mixer.")
        if not found or leaf not in place:
            converted[name] = tensor
            continue
        ours, k = place[leaf]
        tensor = tensor.squeeze(1) if ours == "conv_weight" else tensor  # (E, 1, W) to (E, W)
        stacks.setdefault(f"{prefix}mixer.{ours}", {})[k] = tensor
    for name, tensors in stacks.items():
        converted[name] = torch.stack([tensors[k] for k in sorted(tensors)])
    return converted
