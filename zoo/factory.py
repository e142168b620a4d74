"""Finding and creating models; the work is timm's, with errors that help and checkpoints that are checked."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from zoo import backbones
from zoo.weights import load_checkpoint, load_into

__all__ = ["create_model", "list_models", "list_pretrained"]


def list_models(filter: str | Sequence[str] = "", *, family: str = "", pretrained: bool = False) -> list[str]:
    """Names of this zoo's models, in natural order.

    Args:
        filter: Wildcard pattern or patterns, ``"vim_*"``. Default all.
        family: Only models of this family, that is of ``zoo.backbones.<family>``. Default all.
        pretrained: Only models with weights, and with their tags.

    Raises:
        ValueError: If there is no such family.
    """
    if family and family not in backbones.FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(backbones.FAMILIES)}")
    families = [family] if family else backbones.FAMILIES
    return [name for each in families for name in timm.list_models(filter, module=each, pretrained=pretrained)]


def list_pretrained(filter: str | Sequence[str] = "") -> list[str]:
    """Names with tags, ``name.tag``, of this zoo's models with weights."""
    return list_models(filter, pretrained=True)


def create_model(
    model_name: str, pretrained: bool = False, *, checkpoint_path: str | Path | None = None, **kwargs: Any
) -> nn.Module:
    """Creates a model of this zoo, or any other model of timm.

    Args:
        model_name: ``name``, ``name.tag``, or ``hf-hub:...`` and ``local-dir:...`` as in timm.
        pretrained: Whether to load the weights of the tag (of the first tag if none is given).
        checkpoint_path: Checkpoint to load, ours or the authors'; see :func:`zoo.weights.load_checkpoint`.
        **kwargs: Arguments of the model (``num_classes``, ``img_size``, ``drop_path_rate``...) and of
            ``timm.create_model`` (``features_only``, ``out_indices``, ``pretrained_cfg_overlay``...).

    Raises:
        ValueError: If no model has this name; the message lists the nearest ones. If the checkpoint does not fit; the
            message says how, and which models it fits.
    """
    source, _, _ = model_name.rpartition(":")
    if not source and not timm.is_model(model_name):
        raise ValueError(f"there is no model {model_name!r}; did you mean {_nearest(model_name)}?")
    if checkpoint_path is None:
        return timm.create_model(model_name, pretrained, **kwargs)
    if pretrained:
        raise ValueError("pretrained=True and checkpoint_path are two sources of weights; give one")
    state_dict = load_checkpoint(checkpoint_path)
    if kwargs.get("features_only"):  # the wrapper prunes the model, so the weights have to be in before
        kwargs["pretrained_cfg_overlay"] = {**kwargs.get("pretrained_cfg_overlay", {}), "state_dict": state_dict}
        return timm.create_model(model_name, pretrained=True, **kwargs)
    model = timm.create_model(model_name, **kwargs)
    load_into(model, state_dict)
    return model


def _nearest(model_name: str) -> str:
    """The nearest known names, this zoo's first."""
    name = model_name.partition(".")[0]
    ours = difflib.get_close_matches(name, list_models(), n=5, cutoff=0.4)
    others = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.7)
    return ", ".join(dict.fromkeys([*ours, *others])) or f"one of {', '.join(list_models())}"
