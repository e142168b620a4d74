"""The selective scan op, through the drop-in for mamba_ssm's function."""

from torch import Tensor

from zoo.kernels import selective_scan_fn
from zoo.parity.case import Case

__all__ = ["run", "run_scan"]


def run(case: Case) -> dict[str, Tensor]:
    """Output, last state, and the gradients of sum(out * cotangent)."""
    if case.class_name != "selective_scan_ref":
        raise ValueError(f"no builder for {case.class_name!r}")
    return run_scan(case, "cotangent")


def run_scan(case: Case, cotangent_name: str) -> dict[str, Tensor]:
    """Runs the op on a case's inputs, with its window if it has one."""
    inputs = case.inputs()
    cotangent = inputs.pop(cotangent_name).detach()
    softplus, window = case.kwargs["delta_softplus"], case.kwargs.get("window", 1)
    out, last_state = selective_scan_fn(**inputs, delta_softplus=softplus, return_last_state=True, window=window)
    (out * cotangent).sum().backward()
    grads = {f"grad.{name}": tensor.grad for name, tensor in inputs.items()}
    return {"output.out": out, "output.last_state": last_state, **grads}
