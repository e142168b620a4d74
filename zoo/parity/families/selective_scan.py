"""The selective scan op, through the drop-in for mamba_ssm's function."""

from torch import Tensor

from zoo.kernels import selective_scan_fn
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Output, last state, and the gradients of sum(out * cotangent)."""
    if case.class_name != "selective_scan_ref":
        raise ValueError(f"no builder for {case.class_name!r}")
    inputs = case.inputs()
    cotangent = inputs.pop("cotangent").detach()
    options = {name: inputs[name] for name in ("D", "z", "delta_bias") if name in inputs}
    required = [inputs[name] for name in ("u", "delta", "A", "B", "C")]
    softplus = case.kwargs["delta_softplus"]
    out, last_state = selective_scan_fn(*required, **options, delta_softplus=softplus, return_last_state=True)
    (out * cotangent).sum().backward()
    grads = {f"grad.{name}": tensor.grad for name, tensor in inputs.items()}
    return {"output.out": out, "output.last_state": last_state, **grads}
