"""The SISO scan of Mamba-3, with the activations that the authors' kernel applies itself."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.backbones.layers.mamba3 import Mamba3State, mamba3_scan
from zoo.parity.case import Case

__all__ = ["run"]

STATES = dict(angle="phase", ssm="ssm", k="B", v="x")


def run(case: Case) -> dict[str, Tensor]:
    """Output, states after half and after all of the tokens, and gradients of the sum weighted with the cotangent."""
    if case.class_name != "mamba3_siso_step_ref":
        raise ValueError(f"no builder for {case.class_name!r}")
    inputs = case.inputs()
    cotangent = inputs.pop("cotangent").detach()
    length = inputs["V"].shape[1]
    if case.kwargs["L"] != length:
        raise ValueError(f"the case says L={case.kwargs['L']}, its inputs have {length} tokens")
    out, last = _scan(inputs, slice(None))
    _, half = _scan(inputs, slice(length // 2))
    (out * cotangent).sum().backward()
    results = {"output.out": out, **{f"grad.{name}": tensor.grad for name, tensor in inputs.items()}}
    for when, state in (("final", last), ("half", half)):
        for theirs, ours in STATES.items():
            tensor = getattr(state, ours)
            results[f"output.{when}_{theirs}_state"] = tensor.squeeze(1) if theirs in "kv" else tensor
    return results


def _scan(inputs: dict[str, Tensor], tokens: slice) -> tuple[Tensor, Mamba3State]:
    """Gated output (B, L, H, P) and state of some tokens from the beginning."""
    V, Z, Angles = (inputs[name][:, tokens] for name in ("V", "Z", "Angles"))
    ADT, DT, Trap = (inputs[name].transpose(1, 2)[:, tokens] for name in ("ADT", "DT", "Trap"))  # (B, L, H)
    repeats = V.shape[2] // inputs["Q"].shape[2]
    C, B = (
        inputs[name][:, tokens].repeat_interleave(repeats, dim=2) + inputs[f"{name}_bias"] for name in ("Q", "K")
    )  # (B, L, H, N)
    x, B, C = (t.unsqueeze(2) for t in (V, B, C))
    angles = math.pi * torch.tanh(Angles)
    y, state = mamba3_scan(x, DT, ADT, torch.sigmoid(Trap), B, C, angles, inputs["D"], return_state=True)
    return y.squeeze(2) * F.silu(Z), state
