"""Mamba-1 and Mamba-2 mixers of transformers' language models, and their RMS norms, on this package's kernels.

transformers works the selective scan of Mamba-1 (arXiv 2312.00752) through a Python loop over tokens unless
CUDA packages are installed. Here the ``forward`` of every mixer and norm is replaced on the instance; parameters, their
names, the initialisation and the cache classes stay transformers'. What is different in the result:

1. A cache may be continued by any number of tokens: transformers starts Mamba-1's state anew unless it is one token.
2. Padding leaves state and convolution untouched wherever it is, also after tokens that are in the cache already.
3. Steps are clamped to the model's limits in cached decoding too, as they are in training.
4. Mamba-2's gated norm works on each group of heads that share B and C, as in the authors' models; transformers' class
   norms all groups together, which differs where there are several (Codestral-Mamba).
5. RMS norms on GPUs round once, and to autocast's dtype where it is on, as linear layers would afterwards.
"""

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.layers.layer_norm import normed_dtype
from zoo.backbones.layers.recurrence import negative_exp
from zoo.heads.vlm.steps import convolution_step, selective_step, ssd_step
from zoo.kernels import MAX_NORM_CHANNELS, add_rms_norm, causal_conv1d, gated_rms_norm, selective_scan, ssd

__all__ = ["recurrent_mixers", "use_zoo_kernels"]

_logger = logging.getLogger(__name__)

LONGEST_CONVOLUTION = 4  # taps that the convolution kernel knows
NO_STEP = -1e4  # softplus of it is 0 in every dtype: the state neither decays nor takes anything in


def use_zoo_kernels(model: nn.Module) -> int:
    """Lets every Mamba-1 and Mamba-2 mixer in a model of transformers, and its norms, run on this package's kernels.

    Covers Mamba, FalconMamba, Jamba, Mamba-2, Bamba, FalconH1, GraniteMoeHybrid, NemotronH and Zamba2. Copies of the
    model keep it; a model that is pickled whole and read again has transformers' forward.

    Args:
        model: The model; it is changed in place.

    Returns:
        How many mixers run on our kernels now.
    """
    count = 0
    for module in model.modules():
        kind = type(module).__name__
        if not type(module).__module__.startswith("transformers.models."):
            continue
        if kind in NORMS:
            module.forward = MethodType(_norm_forward, module)
        forward = FORWARDS.get(kind)
        if forward is None:
            continue
        if module.conv_kernel_size > LONGEST_CONVOLUTION:
            _logger.warning(
                "%s has a convolution of %d taps and keeps transformers' forward; our kernel knows up to %d",
                *(type(module).__name__, module.conv_kernel_size, LONGEST_CONVOLUTION),
            )
            continue
        module.forward = MethodType(forward, module)
        count += 1
    return count


def recurrent_mixers(model: nn.Module) -> int:
    """How many mixers of a model run on our kernels."""
    return sum(
        getattr(module.__dict__.get("forward"), "__func__", None) in FORWARDS.values() for module in model.modules()
    )


def _mamba1_forward(
    self: nn.Module,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mamba-1's mixer.

    Args:
        hidden_states: Tokens (B, L, D).
        cache: transformers' cache, which is read and brought up to date; earlier releases name it ``cache_params``.
        attention_mask: (B, L), 0 at padding.

    Returns:
        Tokens (B, L, D).
    """
    _refuse_packing(kwargs)
    cache = kwargs.get("cache_params", cache)
    x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, E) each
    u = _convolve(self, x, cache, attention_mask)
    low_rank, B, C = self.x_proj(u).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    if hasattr(self, "dt_layernorm"):  # FalconMamba and Jamba
        low_rank, B, C = self.dt_layernorm(low_rank), self.b_layernorm(B), self.c_layernorm(C)
    delta = _no_step_at_padding(F.linear(low_rank, self.dt_proj.weight), attention_mask)
    state = _previous_state(self, cache)
    scan = selective_step if _is_step(u, state) else selective_scan
    y, state = scan(
        *(u, delta, negative_exp(self.A_log), B, C, self.D, z, self.dt_proj.bias),
        delta_softplus=True,
        initial_state=state,
        return_last_state=True,
    )
    if cache is not None:
        cache.update_recurrent_state(state, self.layer_idx)
    return self.out_proj(y)


def _mamba2_forward(
    self: nn.Module,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mamba-2's mixer; arguments and result as of Mamba-1's."""
    _refuse_packing(kwargs)
    cache = kwargs.get("cache_params", cache)
    projected = _project(self, hidden_states)
    z, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
    xBC = _convolve(self, xBC, cache, attention_mask)
    states = self.n_groups * self.ssm_state_size
    x, B, C = xBC.split([self.intermediate_size, states, states], dim=-1)
    x = x.unflatten(-1, (self.num_heads, self.head_dim))  # (B, L, H, P)
    B, C = (t.unflatten(-1, (self.n_groups, self.ssm_state_size)) for t in (B, C))  # (B, L, G, N)
    dt, bias = _no_step_at_padding(dt, attention_mask), self.dt_bias
    least, most = self.time_step_limit
    limited = least > 0 or most < float("inf")
    if limited:
        dt, bias = F.softplus(dt + bias).clamp(least, most), None
        dt = dt if attention_mask is None else dt * attention_mask.to(dt.dtype)[..., None]
    state = _previous_state(self, cache)
    y, state = (ssd_step if _is_step(x, state) else ssd)(
        *(x, dt, negative_exp(self.A_log), B, C, self.D, bias),
        dt_softplus=not limited,
        initial_state=state,
        return_last_state=True,
    )
    if cache is not None:
        cache.update_recurrent_state(state, self.layer_idx)
    return self.out_proj(_gate_and_norm(self, y.flatten(2), z))


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """RMS norm of tokens (..., D); on CPUs as transformers does it, which keeps what the backward needs."""
    if hidden_states.device.type == "cpu" or hidden_states.shape[-1] > MAX_NORM_CHANNELS:
        return type(self).forward(self, hidden_states)
    return _rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = normed_dtype(x.device.type, torch.promote_types(x.dtype, weight.dtype), narrow=True)
    return add_rms_norm(None, x, weight, eps, dtype)[0]


def _project(mixer: nn.Module, x: Tensor) -> Tensor:
    """Input projection of a Mamba-2 mixer, with FalconH1's multipliers where it has them."""
    if hasattr(mixer, "mup_vector"):
        return mixer.in_proj(x * mixer.ssm_in_multiplier) * mixer.mup_vector
    return mixer.in_proj(x)


def _gate_and_norm(mixer: nn.Module, y: Tensor, z: Tensor) -> Tensor:
    """Output of a Mamba-2 scan and gate, both (B, L, E), to (B, L, E) in the gate's dtype."""
    if not getattr(mixer, "mamba_rms_norm", True):  # FalconH1 may have no norm
        return y * F.silu(z)
    gate_first = not getattr(mixer.norm, "norm_before_gate", False)
    return gated_rms_norm(
        y, z, mixer.norm.weight, mixer.norm.variance_epsilon, gate_first=gate_first, groups=_norm_groups(mixer)
    )


def _norm_groups(mixer: nn.Module) -> int:
    """Groups of channels that the gated norm of a Mamba-2 mixer works on."""
    if hasattr(mixer.norm, "group_size"):
        return mixer.intermediate_size // mixer.norm.group_size
    return mixer.n_groups if type(mixer).__name__ == "Mamba2Mixer" else getattr(mixer.norm, "n_groups", 1)


def _convolve(mixer: nn.Module, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """Convolution and activation of x (B, L, E), continuing what the cache has, which is brought up to date.

    Padding counts as nothing before the first token: rows of inputs move so that what was before it adjoins.
    """
    length, layer, taps = x.shape[1], mixer.layer_idx, mixer.conv_kernel_size
    if mask is not None:
        x = x * mask.to(x.dtype)[..., None]
    if cache is not None:
        continued = cache.has_previous_state(layer)
        inputs = cache.update_conv_state(x.transpose(1, 2), layer, conv_kernel_size=taps)  # (B, E, at least W)
        if continued and length == 1:
            return mixer.act(convolution_step(inputs[..., -taps:], mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias))
        x = inputs.transpose(1, 2)
        if mask is not None and continued:
            x = _padding_first(x, mask)
            cache.layers[layer].conv_states[0].copy_(x[:, -taps:].transpose(1, 2))
    fused = mixer.activation in ("silu", "swish")
    y = causal_conv1d(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation="silu" if fused else None)
    if y.shape[1] > length:
        y = y[:, -length:]  # what the cache had before these tokens came first
    return y if fused else mixer.act(y)


def _padding_first(x: Tensor, mask: Tensor) -> Tensor:
    """Cached inputs and tokens (B, W + L, E) with the padding (B, L) of each row moved before them."""
    known = torch.ones(mask.shape[0], x.shape[1] - mask.shape[1], dtype=torch.bool, device=mask.device)
    order = torch.cat([known, mask.bool()], dim=1).to(torch.int8).argsort(dim=1, stable=True)  # (B, W + L)
    return x.gather(1, order[..., None].expand_as(x))


def _no_step_at_padding(dt: Tensor, mask: Tensor | None) -> Tensor:
    """Steps before softplus (B, L, H or E), none at padding (B, L)."""
    return dt if mask is None else dt.masked_fill(~mask.bool()[..., None], NO_STEP)


def _is_step(x: Tensor, state: Tensor | None) -> bool:
    """Whether x (B, L, ...) is a single token after others: the kernels are made for many."""
    return state is not None and x.shape[1] == 1


def _previous_state(mixer: nn.Module, cache: Any) -> Tensor | None:
    """State after the tokens that the cache has seen, None before the first."""
    if cache is None:
        return None
    layer = cache.layers[mixer.layer_idx]
    return layer.recurrent_states[0] if layer.is_recurrent_states_initialized[0] else None


def _refuse_packing(kwargs: dict[str, Any]) -> None:
    if kwargs.get("seq_idx") is not None:
        raise ValueError(
            "several sequences packed into one row (seq_idx) are not supported; give each a row of its own"
        )


NORMS = (
    *("MambaRMSNorm", "FalconMambaRMSNorm", "JambaRMSNorm", "Mamba2RMSNorm", "BambaRMSNorm", "FalconH1RMSNorm"),
    *("GraniteMoeHybridRMSNorm", "NemotronHRMSNorm", "Zamba2RMSNorm"),
)
FORWARDS: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), _mamba1_forward),
    **dict.fromkeys(("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer"), _mamba2_forward),
    **dict.fromkeys(("NemotronHMamba2Mixer", "Zamba2MambaMixer"), _mamba2_forward),
}
