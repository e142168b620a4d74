"""Low-rank adapters (LoRA, arXiv 2106.09685) of peft in the parts of a vision-language model."""

import logging

from torch import nn

from zoo.config import LoraConfig
from zoo.heads.vlm import VisionLanguageModel
from zoo.optional import require

__all__ = ["add_adapters", "merge_adapters"]

_logger = logging.getLogger(__name__)

READ = ("dt_proj",)  # of Mamba-1: its weight is read without the layer being called, so an adapter would do nothing


def add_adapters(model: VisionLanguageModel, config: LoraConfig) -> None:
    """Puts adapters beside linear layers, in place; of the parts that get some, nothing else is trained from then on.

    Args:
        model: The model; what is frozen of its other parts stays so.
        config: Where, and of what rank.

    Raises:
        ModuleNotFoundError: If peft is not installed.
        ValueError: If a part has none of the layers that are named.
    """
    peft = require("peft", "vlm")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = [name for part in config.parts for name in _layers(model, part, config.layers)]
    # The whole model is given: of a Mamba model by itself peft refuses layers that our kernels do call.
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
        ),
        model,
    )
    for name, parameter in model.named_parameters():  # peft has frozen all but the adapters
        parameter.requires_grad |= name in trained and name.split(".")[0] not in config.parts
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    _logger.info("%d linear layers have adapters of rank %d: %d parameters", len(targets), config.rank, adapters)


def _layers(model: VisionLanguageModel, part: str, wanted: list[str]) -> list[str]:
    """Names of the linear layers of a part that get adapters."""
    module = getattr(model, part)
    output = model.language_model.get_output_embeddings()
    linear = {
        f"{part}.{name}": name.rpartition(".")[2]
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not output
    }
    useless = [name for name in wanted if name in READ]
    if useless:
        raise ValueError(f"model.lora.layers names {', '.join(useless)}, where an adapter has no effect; leave it out")
    chosen = [name for name, last in linear.items() if (last in wanted if wanted else last not in READ)]
    missing = set(wanted) - {linear[name] for name in chosen}
    if missing or not chosen:
        there = ", ".join(sorted(set(linear.values()) - set(READ))) or "none"
        lacking = ", ".join(sorted(missing)) or "linear layer"
        raise ValueError(f"model.lora.layers: the {part} has no {lacking}; it has {there}")
    return chosen


def merge_adapters(model: nn.Module) -> nn.Module:
    """Adds what adapters have learned to the weights of their layers, in place, and removes them.

    Args:
        model: A model with adapters, or without.

    Returns:
        The model.
    """
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for name in layers:
        layer = model.get_submodule(name)
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model
