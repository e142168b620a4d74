"""LBVim: the cases of its scan."""

import torch
from torch import Tensor

from zoo.kernels import selective_scan_fn
from zoo.parity.case import Case
from zoo.parity.families.selective_scan import run_scan

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Output with and without gate, last state, the plain scan's output, and gradients of sum(out * dout)."""
    if case.mode != "op":
        raise ValueError(f"no builder for {case.class_name!r}")
    results = run_scan(case, "dout")
    inputs = case.inputs()
    inputs.pop("dout")
    softplus, window = case.kwargs["delta_softplus"], case.kwargs["window"]
    with torch.no_grad():
        plain = selective_scan_fn(**inputs, delta_softplus=softplus)
        inputs.pop("z", None)
        ungated = selective_scan_fn(**inputs, delta_softplus=softplus, window=window)
    return {**results, "output.plain_scan_out": plain, "output.y_pregate": ungated}
