"""The SSD op, against the authors' minimal chunked form: log decays and inputs that already hold their steps."""

from torch import Tensor

from zoo.kernels import ssd
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Output, last state, the state after half of the tokens, and gradients of the sum weighted with cotangents."""
    if case.class_name != "ssd_minimal_discrete":
        raise ValueError(f"no builder for {case.class_name!r}")
    inputs = case.inputs()
    cotangents = {name: inputs.pop(f"cotangent_{name}").detach() for name in ("Y", "state")}
    X, A, B, C = (inputs[name] for name in ("X", "A", "B", "C"))
    start = inputs.get("initial_state")
    if bool(case.kwargs["initial_states"]) != (start is not None):
        raise ValueError("the case's initial_states does not say whether it has an initial state")

    def scan(tokens: slice) -> tuple[Tensor, Tensor]:
        pieces = (x[:, tokens] for x in (X, A, B, C))
        x, log_decay, B_part, C_part = pieces
        return ssd(x, log_decay, None, B_part, C_part, initial_state=start, return_last_state=True)

    Y, state = scan(slice(None))
    _, half = scan(slice(X.shape[1] // 2))
    ((Y * cotangents["Y"]).sum() + (state * cotangents["state"]).sum()).backward()
    grads = {f"grad.{name}": tensor.grad for name, tensor in inputs.items()}
    return {"output.Y": Y, "output.final_state": state, "output.state_after_half": half, **grads}
