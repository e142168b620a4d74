"""Mamba-3 mixer over a token sequence: trapezoidal steps, rotated projections, and states of several inputs.

Paper: Lahoti et al., "Mamba-3: Improved Sequence Modeling using State Space Principles", arXiv 2603.15569. Origin:
https://github.com/state-spaces/mamba (class ``Mamba3``, Apache-2.0).

For every batch element and head, with a state h of (P, N), inputs x_r of (P) and projections B_r, C_r of (N) for ranks
r = 1..R (R = 1 is the paper's SISO form, more its MIMO form)::

    decay_t = exp(dt_t * A_t)
    h_t     = decay_t * h_{t-1} + (1 - trap_t) * dt_t * decay_t * sum_r x_{t-1,r} B_{t-1,r}^T
                                + trap_t * dt_t * sum_r x_{t,r} B_{t,r}^T
    y_{t,r} = h_t C_{t,r} + D * x_{t,r}

B and C are rotated by phases that are running sums of dt_t * angle_t, pair of channels by pair.

All of it is one call of :func:`zoo.kernels.ssd`. A token enters the state twice, at its own step and, with the decay of
the step after, at the next: every later output sees it with ``trap_t dt_t + (1 - trap_{t+1}) dt_{t+1}``. That is the
input of SSD, whose output then differs from y only in what a token reads from itself, R x R numbers per head. The R
inputs of a token are R steps of SSD, the first of which has the decay.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.backbones.layers.recurrence import init_steps
from zoo.kernels import ssd

__all__ = ["Mamba3Mixer", "Mamba3State", "mamba3_scan"]

A_FLOOR = 1e-4  # least -A of the authors

torch.fx.wrap("ssd")
register_notrace_function(ssd)


class Mamba3State(NamedTuple):
    """What a sequence's tokens leave for those after them.

    Attributes:
        phase: Sum of all rotations, in [0, 2 pi), (B, H, pairs).
        ssm: State of the recurrence, (B, H, P, N).
        B: The last token's rotated input projection, (B, R, H, N).
        x: The last token's input, (B, R, H, P).
    """

    phase: Tensor
    ssm: Tensor
    B: Tensor
    x: Tensor


def _rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Rotates channels (2i, 2i + 1) of x (B, L, R, H, N) by phase (B, L, H, pairs); channels beyond stay."""
    pairs = phase.shape[-1]
    cos, sin = (f(phase).unsqueeze(2) for f in (torch.cos, torch.sin))  # (B, L, 1, H, pairs)
    first, second = x[..., : 2 * pairs].to(phase.dtype).unflatten(-1, (pairs, 2)).unbind(-1)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return torch.cat([rotated.to(x.dtype), x[..., 2 * pairs :]], dim=-1)


def _read_own_token(x: Tensor, B: Tensor, C: Tensor, now: Tensor, later: Tensor) -> Tensor:
    """What SSD lacks of the outputs (B, L, R, H, P): it has each input of a token seen by those at and after it.

    Args:
        x: Inputs, (B, L, R, H, P).
        B, C: Rotated projections, (B, L, R, H, N).
        now: How much of a token's input its own outputs read, (B, L, H).
        later: How much more later outputs read, which SSD adds to that, (B, L, H).
    """
    x, B, C = (t.transpose(2, 3).to(now.dtype) for t in (x, B, C))  # (B, L, H, R, P or N)
    if x.shape[3] == 1:
        return ((C * B).sum(-1, keepdim=True) * -later[..., None, None] * x).transpose(2, 3)
    order = torch.arange(x.shape[3], device=x.device)
    seen = order[:, None] >= order  # by the output of a row, the input of a column
    lacks = torch.where(seen, -later[..., None, None], now[..., None, None])  # (B, L, H, R, R)
    return ((C @ B.transpose(3, 4) * lacks) @ x).transpose(2, 3)


def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor,
    D: Tensor | None = None,
    state: Mamba3State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Mamba3State]:
    """The recurrence at the top of this file, with its rotations.

    Args:
        x: Inputs, (B, L, R, H, P), any float dtype; sums and states are float32, or float64 for float64.
        dt: Step sizes, positive, (B, L, H).
        log_decay: dt * A, at most 0, (B, L, H).
        trap: Share of a step's input that is taken at its end, in [0, 1], (B, L, H).
        B: Input projection before the rotation, (B, L, R, H, N).
        C: Output projection before the rotation, same shape.
        angles: Rotation per unit of time in radians, (B, L, H, pairs) or (B, L, 1, pairs), pairs at most N / 2.
        D: Skip weights, (H,); default none.
        state: What the tokens before these left behind; None at the beginning of the sequence.
        return_state: Whether to return what the tokens after these need, too.

    Returns:
        Output (B, L, R, H, P) in the dtype of ``x``; with ``return_state`` also the state after the last token.

    Raises:
        ValueError: If more channels are to be rotated than B has.
    """
    if 2 * angles.shape[-1] > B.shape[-1]:
        raise ValueError(f"mamba3_scan: {angles.shape[-1]} pairs of channels to rotate, but B has {B.shape[-1]}")
    exact = torch.promote_types(x.dtype, torch.float32)
    dt, log_decay, trap, angles = (t.to(exact) for t in (dt, log_decay, trap, angles))
    phase = (angles * dt.unsqueeze(-1)).cumsum(1)  # (B, L, H, pairs)
    if state is not None:
        phase = phase + state.phase.to(exact).unsqueeze(1)
    B, C = _rotate(B, phase).to(x.dtype), _rotate(C, phase).to(x.dtype)

    now = trap * dt  # (B, L, H)
    carried = dt - now  # what a step takes of the token before it
    later = F.pad(carried[:, 1:], (0, 0, 0, 1))  # what the step after takes of its token
    inputs = (x * (now + later)[:, :, None, :, None]).to(x.dtype)
    ranks = x.shape[2]
    decays = log_decay if ranks == 1 else F.pad(log_decay.unsqueeze(2), (0, 0, 0, ranks - 1)).flatten(1, 2)
    initial = None
    if state is not None:
        received = state.x.to(exact).permute(0, 2, 3, 1) @ state.B.to(exact).transpose(1, 2)  # (B, H, P, N)
        initial = state.ssm.to(exact) + carried[:, 0, :, None, None] * received
    y, ssm = ssd(
        inputs.flatten(1, 2),
        decays,
        None,
        B.flatten(1, 2),
        C.flatten(1, 2),
        initial_state=initial,
        return_last_state=True,
    )
    y = y.unflatten(1, (-1, ranks)) + _read_own_token(x, B, C, now, later)
    y = (y if D is None else y + D.to(exact).unsqueeze(-1) * x).to(x.dtype)
    if not return_state:
        return y
    return y, Mamba3State(phase[:, -1].remainder(2 * math.pi), ssm, B[:, -1], x[:, -1])


class Mamba3Mixer(nn.Module):
    """Project in, norm and rotate B and C, scan, gate, project out; no convolution.

    Shapes: B batch, L tokens, D = dim, H heads of width P, E = H * P = expand * dim, N states, G groups of heads that
    share B and C before their biases, R ranks.

    Args:
        dim: Token width D.
        d_state: States N.
        head_dim: Width P of a head.
        expand: Inner width E as a multiple of ``dim``.
        groups: Groups G, a divisor of the heads.
        rope_fraction: Share of the states that is rotated, in [0, 1], down to whole pairs; the authors use 0.5 or 1.
        mimo_rank: Rank R of the MIMO form; None for SISO.
        out_norm: Whether the output of every head is RMS-normed before the gate, with weights per channel.
        norm_eps: Epsilon of the norms.
        bias: Whether the two projections have a bias.

    Raises:
        ValueError: If the sizes do not divide as needed or an argument is out of its range.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        groups: int = 1,
        rope_fraction: float = 0.5,
        mimo_rank: int | None = None,
        out_norm: bool = False,
        norm_eps: float = 1e-5,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        inner = expand * dim
        heads = inner // head_dim
        if inner % head_dim or heads % groups:
            raise ValueError(
                f"inner width {inner} must divide into heads of head_dim={head_dim}, and its {heads} heads into "
                f"groups={groups}"
            )
        if not 0 <= rope_fraction <= 1:
            raise ValueError(f"rope_fraction={rope_fraction} is not in [0, 1]")
        if mimo_rank is not None and mimo_rank < 1:
            raise ValueError(f"mimo_rank={mimo_rank} must be at least 1, or None for SISO")
        ranks = mimo_rank or 1
        self.heads, self.head_dim, self.d_state, self.groups = heads, head_dim, d_state, groups
        self.ranks, self.norm_eps = ranks, norm_eps
        pairs = int(d_state * rope_fraction) // 2
        projections = ranks * groups * d_state
        self.projected = [inner, inner, projections, projections, heads, heads, heads, pairs]
        self.in_proj = nn.Linear(dim, sum(self.projected), bias=bias, **dd)  # z, x, B, C, dt, A, trap, angles
        self.dt_bias = nn.Parameter(torch.empty(heads, **dd))
        self.B_norm = nn.RMSNorm(d_state, norm_eps, **dd)
        self.C_norm = nn.RMSNorm(d_state, norm_eps, **dd)
        self.B_bias = nn.Parameter(torch.empty(heads, ranks, d_state, **dd))
        self.C_bias = nn.Parameter(torch.empty(heads, ranks, d_state, **dd))
        self.D = nn.Parameter(torch.empty(heads, **dd))
        self.mimo_x = self.mimo_z = self.mimo_o = None
        if mimo_rank is not None:
            self.mimo_x, self.mimo_z, self.mimo_o = (
                nn.Parameter(torch.empty(heads, ranks, head_dim, **dd)) for _ in range(3)
            )
        self.norm_weight = nn.Parameter(torch.empty(inner, **dd)) if out_norm else None
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: steps log-uniform in [0.001, 0.1]; D, biases and norms 1; ranks share x."""
        init_steps(self.dt_bias)
        for parameter in (self.B_bias, self.C_bias, self.D, self.mimo_z, self.norm_weight):
            if parameter is not None:
                nn.init.ones_(parameter)
        for parameter in (self.mimo_x, self.mimo_o):
            if parameter is not None:
                nn.init.constant_(parameter, 1 / self.ranks)

    def _by_rank(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Channels (B, L, E), weighted for every rank: (B, L, R, H, P)."""
        x = x.unflatten(-1, (self.heads, self.head_dim)).unsqueeze(2)
        return x if weight is None else x * weight.transpose(0, 1).to(x.dtype)

    def _projection(self, x: Tensor, norm: nn.RMSNorm, bias: Tensor) -> Tensor:
        """B or C as projected (B, L, R * G * N) to every head's (B, L, R, H, N)."""
        x = x.unflatten(-1, (self.ranks, self.groups, self.d_state))
        x = F.rms_norm(x, (self.d_state,), norm.weight.to(x.dtype), norm.eps)  # one dtype, also inside autocast
        x = x.repeat_interleave(self.heads // self.groups, dim=3)
        return x + bias.transpose(0, 1).to(x.dtype)

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """Output of the scan (B, L, R, H, P), normed if so asked, and gate (B, L, E) to (B, L, E)."""
        if self.norm_weight is not None:
            weight = self.norm_weight.view(self.heads, self.head_dim).to(y.dtype)
            y = F.rms_norm(y, (self.head_dim,), eps=self.norm_eps) * weight
        y = y * F.silu(self._by_rank(z, self.mimo_z))
        if self.mimo_o is None:
            return y.squeeze(2).flatten(2)
        return (y * self.mimo_o.transpose(0, 1).to(y.dtype)).sum(2).flatten(2)

    def forward(
        self, x: Tensor, state: Mamba3State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Mamba3State]:
        """Tokens (B, L, D) to tokens (B, L, D).

        Args:
            x: Tokens, of any length from 1.
            state: What the tokens before these left behind; None at the beginning of the sequence.
            return_state: Whether to return what the tokens after these need, too.
        """
        z, inputs, B, C, dt, A, trap, angles = self.in_proj(x).split(self.projected, dim=-1)
        exact = torch.promote_types(x.dtype, torch.float32)  # 16 bits are too coarse for exp and for sums of angles
        dt, A, trap, angles = (t.to(exact) for t in (dt, A, trap, angles))
        dt = F.softplus(dt + self.dt_bias.to(exact))
        A = torch.where(A >= 0, 1 + A, 1 / (1 - A.clamp(max=0))).clamp(min=A_FLOOR)
        y, last = mamba3_scan(
            self._by_rank(inputs, self.mimo_x),
            dt,
            -dt * A,
            torch.sigmoid(trap),
            self._projection(B, self.B_norm, self.B_bias),
            self._projection(C, self.C_norm, self.C_bias),
            math.pi * torch.tanh(angles).unsqueeze(2),
            self.D,
            state,
            return_state=True,
        )
        out = self.out_proj(self._gate(y, z))
        return (out, last) if return_state else out
