"""Blocks of the Mamba authors: Mamba-2."""

from torch import Tensor

from zoo.backbones.layers.ssd import SSDMixer, stack_ssd_parameters
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Output, and the input's gradient of its squared sum."""
    if case.class_name != "Mamba2Simple":
        raise ValueError(f"no builder for {case.class_name!r}")
    mixer = case.load(_from_upstream(case.kwargs), _mixer_state(case.group("state")))
    u = case.inputs()["u"]
    y = mixer(u)
    y.square().sum().backward()
    return {"output.y": y, "grad.input": u.grad}


def _from_upstream(kwargs: dict) -> SSDMixer:
    """The mixer that ``Mamba2Simple`` builds from the same arguments; those about fused kernels change nothing."""
    args = {name: value for name, value in kwargs.items() if name not in ("use_mem_eff_path", "chunk_size")}
    names = dict(d_model="dim", headdim="head_dim", ngroups="groups", learnable_init_states="learned_state")
    return SSDMixer(**{names.get(name, name): value for name, value in args.items()})


def _mixer_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of one mixer to ours."""
    converted = stack_ssd_parameters({f"mixer.{name}": tensor for name, tensor in state.items()})
    return {name.removeprefix("mixer."): tensor for name, tensor in converted.items()}
