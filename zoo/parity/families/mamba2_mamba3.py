"""Blocks of the Mamba authors: Mamba-2 and Mamba-3."""

from torch import Tensor, nn

from zoo.backbones.layers.mamba3 import Mamba3Mixer
from zoo.backbones.layers.ssd import SSDMixer, stack_ssd_parameters
from zoo.parity.case import Case

__all__ = ["run"]

NAMES = dict(d_model="dim", headdim="head_dim", ngroups="groups")


def run(case: Case) -> dict[str, Tensor]:
    """Output, and the input's gradient of its squared sum."""
    builders = dict(Mamba2Simple=_mamba2, Mamba3=_mamba3)
    if case.class_name not in builders:
        raise ValueError(f"no builder for {case.class_name!r}")
    mixer = case.load(*builders[case.class_name](case.kwargs, case.group("state")))
    u = case.inputs()["u"]
    y = mixer(u)
    y.square().sum().backward()
    return {"output.y": y, "grad.input": u.grad}


def _mamba2(kwargs: dict, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The mixer that ``Mamba2Simple`` builds from the same arguments, and its weights in our names.

    Arguments about fused kernels change nothing.
    """
    args = {name: value for name, value in kwargs.items() if name not in ("use_mem_eff_path", "chunk_size")}
    names = dict(NAMES, learnable_init_states="learned_state")
    converted = stack_ssd_parameters({f"mixer.{name}": tensor for name, tensor in state.items()})
    weights = {name.removeprefix("mixer."): tensor for name, tensor in converted.items()}
    return SSDMixer(**{names.get(name, name): value for name, value in args.items()}), weights


def _mamba3(kwargs: dict, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The mixer that ``Mamba3`` builds from the same arguments, and its weights in our names."""
    args = {name: value for name, value in kwargs.items() if name != "chunk_size"}
    rank = args.pop("mimo_rank", 4)
    args["mimo_rank"] = rank if args.pop("is_mimo", False) else None
    names = dict(NAMES, is_outproj_norm="out_norm")
    weights = {("norm_weight" if name == "norm.weight" else name): tensor for name, tensor in state.items()}
    return Mamba3Mixer(**{names.get(name, name): value for name, value in args.items()}), weights
