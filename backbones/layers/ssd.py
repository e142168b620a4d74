"""Mamba-2 mixer and its relatives over a token sequence (Dao & Gu, arXiv 2405.21060, section 7).

One class covers Mamba-2, its bidirectional form (ML-Mamba's connector, arXiv 2407.19832) and the mixers that attention
is distilled into: MaTVLM (arXiv 2503.13440), mmMamba (arXiv 2502.13145) and Phi-Mamba (arXiv 2408.10189):

===========  ========================================================================================================
Mamba-2      the defaults; ``norm_groups=groups`` where the authors' class is ``Mamba2`` and not ``Mamba2Simple``
ML-Mamba     ``bidirectional=True, norm_groups=groups``
MaTVLM       ``expand=1, groups=heads, kv_heads=..., norm_groups=heads``
mmMamba      ``expand=1, groups=heads, kv_heads=..., d_conv=2, skip=False, norm="head_first"``
Phi-Mamba    ``expand=1, groups=heads, conv_activation=None, decay="token", norm=None``
===========  ========================================================================================================

All of them project to the same rows here, ``z | x | B | C | dt``; loaders put other orders right. Nothing is flipped: a
direction is a flag of the kernels.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.backbones.layers.recurrence import init_steps, negative_exp
from zoo.kernels import causal_conv1d, gated_norm_in_steps, gated_rms_norm, ssd

__all__ = ["Decay", "MixerNorm", "SSDMixer", "SSDState", "stack_ssd_parameters"]

Decay = Literal["learned", "unit", "token"]
MixerNorm = Literal["gate_first", "head_first"]

# The authors' parameter names of the forward and of the backward direction, for each stacked parameter of ours.
UPSTREAM_NAMES = {
    "conv_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv_bias": ("conv1d.bias", "conv1d_b.bias"),
    "dt_bias": ("dt_bias", "dt_bias_b"),
    "A_log": ("A_log", "A_log_b"),
    "D": ("D", "D_b"),
}

# FX and timm's feature extraction see the kernel as a single node.
torch.fx.wrap("causal_conv1d")
torch.fx.wrap("ssd")
register_notrace_function(causal_conv1d)
register_notrace_function(ssd)


@torch.fx.wrap
@register_notrace_function
def _gate_and_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, gate_first: bool, groups: int) -> Tensor:
    """RMS norm of groups of channels and gate (B, L, E). A single node for FX.

    On CPUs torch keeps what the backward needs, which the op would compute again.
    """
    if y.device.type != "cpu":
        return gated_rms_norm(y, z, weight, eps, gate_first=gate_first, groups=groups)
    return gated_norm_in_steps(y, z, weight.to(y.dtype), None, groups, eps, "silu", gate_first, centered=False)


class SSDState(NamedTuple):
    """What a mixer carries from one stretch of a sequence to the next.

    Attributes:
        conv: The last inputs of the convolution, (B, W - 1, channels).
        ssm: State of the recurrence, (B, H, P, N).
    """

    conv: Tensor
    ssm: Tensor


class SSDMixer(nn.Module):
    """Project in, short causal convolution, SSD, gate and norm, project out.

    Shapes: B batch, L tokens, D = dim, H heads of width P, E = H * P = expand * dim, N states, G groups of heads that
    share B and C, W taps, K directions.

    Args:
        dim: Token width D.
        d_state: States N.
        head_dim: Width P of a head.
        expand: Inner width E as a multiple of ``dim``.
        groups: Groups G, a divisor of the heads.
        kv_heads: Heads that x and B are projected to, then repeated to all heads (grouped-query attention's keys and
            values); needs ``groups`` equal to the heads. Default: x has all heads, B has ``groups``.
        repeat_before_conv: Whether they are repeated before the convolution instead of after it.
        d_conv: Taps W of the convolution, 1 to 4.
        conv_activation: ``"silu"`` or None.
        decay: ``"learned"``: steps softplus(dt + bias), decay exp(-step * exp(A_log)); ``"unit"``: the same with
            A = -1; ``"token"``: decay exp(-softplus(dt)), and x enters without a step.
        dt_limit: Least and largest step; default unlimited.
        skip: Whether D * x is added, one D per head.
        norm: ``"gate_first"``: RMS norm of y * silu(z) in ``norm_groups``; ``"head_first"``: RMS norm of every head,
            with weights common to all, then silu(z); None: y * silu(z + bias).
        norm_groups: Groups of channels that are normed together by ``"gate_first"``.
        norm_eps: Epsilon of the norms.
        qk_norm: Whether B and C of every group go through a layer norm after the convolution.
        bidirectional: Whether the sequence is also read backwards, with convolution, steps, A and D of its own; the
            directions' normed outputs are averaged.
        reverse: Whether the sequence is read from its end to its beginning.
        learned_state: Whether the state before the first token is a parameter, common to both directions.
        bias: Whether the two projections have a bias.

    Raises:
        ValueError: If the sizes do not divide as needed or an argument is not one of its choices.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        groups: int = 1,
        kv_heads: int | None = None,
        repeat_before_conv: bool = False,
        d_conv: int = 4,
        conv_activation: Literal["silu"] | None = "silu",
        decay: Decay = "learned",
        dt_limit: tuple[float, float] | None = None,
        skip: bool = True,
        norm: MixerNorm | None = "gate_first",
        norm_groups: int = 1,
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        bidirectional: bool = False,
        reverse: bool = False,
        learned_state: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        inner = expand * dim
        heads = inner // head_dim
        if inner % head_dim or heads % groups or inner % norm_groups:
            raise ValueError(
                f"inner width {inner} must divide into heads of head_dim={head_dim} and norm_groups={norm_groups}, "
                f"and its {heads} heads into groups={groups}"
            )
        if kv_heads is not None and (groups != heads or heads % kv_heads):
            raise ValueError(f"kv_heads={kv_heads} needs groups={heads}, one per head, and must divide it")
        if decay not in get_args(Decay):
            raise ValueError(f"decay={decay!r} is not known; use one of {', '.join(get_args(Decay))}")
        if norm is not None and norm not in get_args(MixerNorm):
            raise ValueError(f"norm={norm!r} is not known; use one of {', '.join(get_args(MixerNorm))} or None")
        self.heads, self.head_dim, self.d_state, self.groups = heads, head_dim, d_state, groups
        self.repeats = heads // (kv_heads or heads)
        self.repeat_before_conv = repeat_before_conv
        self.conv_activation = conv_activation
        self.decay, self.dt_limit = decay, dt_limit
        self.norm, self.norm_groups, self.norm_eps = norm, norm_groups, norm_eps
        self.reverse = (reverse, not reverse) if bidirectional else (reverse,)
        directions = len(self.reverse)  # K

        repeated = [inner, groups * d_state, groups * d_state]  # x, B, C of all heads
        narrow = [inner // self.repeats, groups * d_state // self.repeats, groups * d_state]
        self.projected = [inner, *narrow, heads]  # z, x, B, C, dt
        self.convolved = repeated if repeat_before_conv else narrow
        channels = sum(self.convolved)
        self.in_proj = nn.Linear(dim, sum(self.projected), bias=bias, **dd)
        self.conv_weight = nn.Parameter(torch.empty(directions, channels, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(directions, channels, **dd))
        self.dt_bias = None if decay == "token" else nn.Parameter(torch.empty(directions, heads, **dd))
        self.A_log = nn.Parameter(torch.empty(directions, heads, **dd)) if decay == "learned" else None
        self.D = nn.Parameter(torch.empty(directions, heads, **dd)) if skip else None
        self.B_norm = nn.LayerNorm(d_state, norm_eps, **dd) if qk_norm else None
        self.C_norm = nn.LayerNorm(d_state, norm_eps, **dd) if qk_norm else None
        self.initial_state = nn.Parameter(torch.empty(heads, head_dim, d_state, **dd)) if learned_state else None
        self.z_bias = nn.Parameter(torch.empty(inner, **dd)) if norm is None else None
        self.norm_weight = None
        if norm is not None:
            self.norm_weight = nn.Parameter(torch.empty(inner if norm == "gate_first" else head_dim, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: steps log-uniform in [0.001, 0.1], -A uniform in [1, 16], D = 1."""
        bound = self.conv_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        with torch.no_grad():
            if self.dt_bias is not None:
                init_steps(self.dt_bias)
            if self.A_log is not None:
                self.A_log.uniform_(1, 16).log_()
        for parameter in (self.D, self.norm_weight):
            if parameter is not None:
                nn.init.ones_(parameter)
        for parameter in (self.z_bias, self.initial_state):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def _repeat(self, x: Tensor, width: int) -> Tensor:
        """Heads of ``width`` channels (..., heads * width), each repeated."""
        if self.repeats == 1:
            return x
        return x.unflatten(-1, (-1, width)).repeat_interleave(self.repeats, dim=-2).flatten(-2)

    def _convolve(self, xBC: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolves x, B and C after the inputs before them, if any: (B, K, L, channels), and all of its inputs."""
        if self.repeat_before_conv:
            x, B, C = xBC.split(self.projected[1:4], dim=-1)
            xBC = torch.cat([self._repeat(x, self.head_dim), self._repeat(B, self.d_state), C], dim=-1)
        skipped = 0 if before is None else before.shape[1]
        if before is not None:
            xBC = torch.cat([before.to(xBC.dtype), xBC], dim=1)
        convolved = causal_conv1d(
            xBC, self.conv_weight, self.conv_bias, activation=self.conv_activation, reverse=self.reverse
        )
        return convolved[:, :, skipped:], xBC

    def _scan(self, xBC: Tensor, dt: Tensor, k: int, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One direction from convolved x, B and C (B, L, channels) to its output (B, L, E) and last state."""
        x, B, C = xBC.split(self.convolved, dim=-1)
        if not self.repeat_before_conv:
            x, B = self._repeat(x, self.head_dim), self._repeat(B, self.d_state)
        x = x.unflatten(-1, (self.heads, self.head_dim))  # (B, L, H, P)
        B, C = (t.unflatten(-1, (self.groups, self.d_state)) for t in (B, C))  # (B, L, G, N)
        if self.B_norm is not None:
            B, C = self.B_norm(B), self.C_norm(C)
        A, bias, softplus = None, None, False
        if self.decay == "token":
            dt = -F.softplus(dt)
        elif self.dt_limit is not None:
            dt = F.softplus(dt + self.dt_bias[k]).clamp(*self.dt_limit)
        else:
            bias, softplus = self.dt_bias[k], True
        if self.decay == "unit":
            A = -torch.ones(self.heads, device=dt.device, dtype=torch.promote_types(dt.dtype, torch.float32))
        elif self.decay == "learned":
            A = negative_exp(self.A_log[k])
        y, last_state = ssd(
            x,
            dt,
            A,
            B.to(x.dtype),
            C.to(x.dtype),
            None if self.D is None else self.D[k],
            bias,
            dt_softplus=softplus,
            reverse=self.reverse[k],
            initial_state=initial_state,
            return_last_state=True,
        )
        return y.flatten(2), last_state

    def _gate_and_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """Output of a direction and gate, both (B, L, E), to (B, L, E)."""
        if self.norm is None:
            return y * F.silu(z + self.z_bias)
        gate_first = self.norm == "gate_first"
        groups = self.norm_groups if gate_first else self.heads
        return _gate_and_norm(y, z, self.norm_weight, self.norm_eps, gate_first, groups)

    def forward(
        self, x: Tensor, state: SSDState | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, SSDState]:
        """Tokens (B, L, D) to tokens (B, L, D).

        Args:
            x: Tokens, of any length from 1.
            state: What the tokens before these left behind; None at the beginning of the sequence.
            return_state: Whether to return what the tokens after these need, too.

        Raises:
            ValueError: If a state is given to or asked of a mixer that reads later tokens first.
        """
        if any(self.reverse) and (state is not None or return_state):
            raise ValueError("a mixer that reads the sequence from its end has no state for the tokens after it")
        initial = None if state is None else state.ssm
        if state is None and self.initial_state is not None:
            initial = self.initial_state.expand(x.shape[0], -1, -1, -1)  # (B, H, P, N)
        z, xBC, dt = self.in_proj(x).split([self.projected[0], sum(self.projected[1:4]), self.projected[4]], dim=-1)
        convolved, conv_inputs = self._convolve(xBC, None if state is None else state.conv)
        directions = convolved.unbind(1)  # whose gradients become one tensor in one pass
        outputs = []
        for k in range(len(self.reverse)):
            y, last_state = self._scan(directions[k], dt, k, initial)
            outputs.append(self._gate_and_norm(y, z))
        out = self.out_proj(outputs[0] if len(outputs) == 1 else (outputs[0] + outputs[1]) / 2)
        if not return_state:
            return out
        taps = self.conv_weight.shape[-1]
        missing = max(0, taps - 1 - conv_inputs.shape[1])  # zeros before the sequence
        conv = F.pad(conv_inputs, (0, 0, missing, 0))[:, conv_inputs.shape[1] + missing - (taps - 1) :]
        return out, SSDState(conv, last_state)


def stack_ssd_parameters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mixers of a state dict under this file's names.

    Args:
        state_dict: Weights by name. Those of mixers are ``<prefix>mixer.<name>``, as Mamba-2's authors call them, with
            ``_b`` for the backward direction; other names are kept.

    Returns:
        Weights by name, each mixer's parameters of the two directions (or the one) stacked.
    """
    place = {theirs: (ours, k) for ours, names in UPSTREAM_NAMES.items() for k, theirs in enumerate(names)}
    renamed = {"norm.weight": "norm_weight", "init_states": "initial_state"}
    converted, stacks = {}, {}
    for name, tensor in state_dict.items():
        prefix, found, leaf = name.rpartition("mixer.")
        if not found or (leaf not in place and leaf not in renamed):
            converted[name] = tensor
        elif leaf in renamed:
            converted[f"{prefix}mixer.{renamed[leaf]}"] = tensor
        else:
            ours, k = place[leaf]
            tensor = tensor.squeeze(1) if ours == "conv_weight" else tensor  # (channels, 1, W) to (channels, W)
            stacks.setdefault(f"{prefix}mixer.{ours}", {})[k] = tensor
    for name, tensors in stacks.items():
        converted[name] = torch.stack([tensors[k] for k in sorted(tensors)])
    return converted
