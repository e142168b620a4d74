"""A model that is divided among processes: fully sharded data parallelism (FSDP, arXiv 2304.11277), torch's version 2.

Weights, gradients, the optimizer's state and the moving average are divided; a part of a block is gathered while it
computes and given up after it. Precision is that of undivided models: weights in float32, automatic mixed precision.
What is saved is whole, so a run can be continued undivided and the other way round.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from zoo.optional import require

__all__ = ["MovingAverage", "fill_whole", "find_units", "scatter", "shard", "whole"]

BLOCK_LISTS = ("blocks", "layer", "layers", "stages")


def find_units(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that are gathered one at a time: mixers, attention, MLPs, whatever has matrices in a block.

    Blocks are the items of the innermost lists called ``blocks``, ``layers`` or ``stages``. They are not taken whole:
    a model may apply the norm of a block, which is small, together with the end of the block before.

    Args:
        model: Any model; one without such lists has no units and is gathered at once.
    """
    lists = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in BLOCK_LISTS and isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    blocks = [block for blocks in lists for block in blocks if not any(part in lists for part in block.modules())]
    return [part for block in blocks for part in _parts(block) if any(weight.ndim > 1 for weight in part.parameters())]


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    for child in block.children():
        if type(child) in (nn.ModuleList, nn.ModuleDict):  # never called themselves
            yield from _parts(child)
        else:
            yield child


def shard(root: nn.Module, device: torch.device) -> None:
    """Divides a module's parameters among all processes, in place: they become ``DTensor``.

    Of the module nothing but its forward may be called from then on, by all processes alike.

    Args:
        root: On any device.
        device: Where this process computes.

    Raises:
        ValueError: If there is a parameter without dimensions, which cannot be divided.
    """
    fully_shard = require("torch.distributed.fsdp").fully_shard
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for unit in find_units(root):
        fully_shard(unit, mesh=mesh)
    fully_shard(root, mesh=mesh)


class MovingAverage(ModelEmaV3):
    """timm's moving average of weights, of divided models too: each process averages its share."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Moves floating-point values towards the model's and copies others."""
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        shares = [(_local(own), _local(other)) for own, other in pairs]
        floating = [pair for pair in shares if pair[0].is_floating_point()]
        own, others = (list(tensors) for tensors in zip(*floating, strict=True))
        torch._foreach_lerp_(own, others, weight=1 - decay)
        for own_value, other in shares:
            if not own_value.is_floating_point():
                own_value.copy_(other)


def whole(state: Any, keep: bool = True) -> Any:
    """Gathers what is divided in a nested state, one tensor at a time; every process has to call it.

    Args:
        state: Dictionaries, lists and tuples of tensors and plain values.
        keep: Whether this process wants the tensors; they become None otherwise.

    Returns:
        The same with whole tensors on the CPU.
    """
    if isinstance(state, Tensor):
        tensor = _gathered(state.detach())
        return tensor.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


@torch.no_grad()
def fill_whole(target: nn.Module, source: nn.Module) -> None:
    """Copies the weights of a divided model into an undivided copy of it; every process has to call it."""
    values = target.state_dict()
    for name, tensor in source.state_dict().items():
        values[name].copy_(_gathered(tensor))


def scatter(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Divides the whole state of an optimizer as its parameters are divided.

    Args:
        state: What its ``state_dict`` was, whole.
        optimizer: Of divided parameters; the state of others stays as it is.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    divided = {
        index: {key: _like(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": divided}


def _like(value: Any, parameter: Tensor) -> Any:
    """Of a whole value, what belongs to this process's share of the parameter."""
    if not hasattr(parameter, "device_mesh") or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    distribute = require("torch.distributed.tensor").distribute_tensor
    return distribute(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
