"""Reading checkpoints safely, and loading them with errors that say what is wrong and what would fit."""

import argparse
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo import backbones

__all__ = ["checkpoint_filter", "fitting_variants", "load_checkpoint", "load_into"]

# Keys under which training scripts keep the weights, best first: published accuracies are of `model`, not of its EMA.
ENVELOPES = ("model", "state_dict", "model_state_dict", "module", "model_ema", "state_dict_ema", "net", "weights")
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint file without running code from it.

    Reads ``.safetensors`` and anything ``torch.save`` wrote; of a training checkpoint, the model's weights. Prefixes
    of wrappers are removed from the names.

    Args:
        path: File.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no checkpoint, or holds objects other than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is no checkpoint of tensors and plain values, or is damaged: {error}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read; it is damaged, incomplete or no checkpoint: {error}") from error
    return _unwrap(content, path)


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in ENVELOPES if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no weights; its entries are {', '.join(map(str, content)) or 'none'}")
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def checkpoint_filter(model: nn.Module) -> Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]:
    """The ``checkpoint_filter_fn`` of the file that defines the model; does nothing if the file has none."""
    module = sys.modules[type(model).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state_dict, model: dict(state_dict))


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Converts a state dict to the model's names and loads it; every name and shape has to fit.

    Args:
        model: Model of this zoo or of timm.
        state_dict: Weights by name, ours or the authors'.
        assign: Whether the model takes over the tensors themselves instead of copying their values.

    Raises:
        ValueError: If names or shapes differ; the message lists them, and the models that the weights fit.
    """
    converted = checkpoint_filter(model)(state_dict, model)
    problems = _differences(converted, model.state_dict())
    if problems:
        fits = fitting_variants(state_dict)
        advice = f"These weights fit {', '.join(fits)}." if fits else "These weights fit no model of this zoo."
        raise ValueError(f"the weights do not fit this {type(model).__name__}: {'; '.join(problems)}. {advice}")
    model.load_state_dict(converted, assign=assign)


def _differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], shown: int = 4) -> list[str]:
    """What is missing, unexpected or of another shape, each in a phrase."""

    def phrase(what: str, items: list[str]) -> list[str]:
        rest = [f"and {len(items) - shown} more"] if len(items) > shown else []
        return [f"{what} {', '.join(items[:shown] + rest)}"] if items else []

    reshaped = [
        f"{name} {tuple(given[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    return [
        *phrase("missing", [name for name in expected if name not in given]),
        *phrase("unexpected", [name for name in given if name not in expected]),
        *phrase("wrong shape", reshaped),
    ]


def fitting_variants(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of this zoo's models that a state dict fits, with the number of classes where it is not the default."""
    shapes = {name: tensor.to("meta") for name, tensor in state_dict.items()}
    fits = []
    for family in backbones.FAMILIES:
        for name in timm.list_models(module=family):
            model = timm.create_model(name, device="meta")
            try:
                converted = checkpoint_filter(model)(shapes, model)
            except (KeyError, ValueError, RuntimeError, AttributeError):  # the filter met another family's weights
                continue
            classes = _num_classes(converted, model)
            if classes not in (None, model.num_classes):
                model.reset_classifier(classes)
            if not _differences(converted, model.state_dict()):
                default = classes == timm.get_pretrained_cfg_value(name, "num_classes")
                fits.append(name if default else f"{name} (num_classes={classes})")
    return fits


def _num_classes(state_dict: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """Rows of the classifier in a state dict."""
    classifier = model.pretrained_cfg["classifier"]
    weight = state_dict.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    return None if weight is None else weight.shape[0]
