"""The locally bidirectional selective scan of LBMamba, as an op."""

from torch import Tensor

from zoo.parity.case import Case
from zoo.parity.families.selective_scan import run_scan

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Output, last state, and the gradients of sum(out * cotangent)."""
    if "window" not in case.kwargs:
        raise ValueError(f"no builder for {case.class_name!r}")
    return run_scan(case, "cotangent")
