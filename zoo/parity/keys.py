"""Checks that released checkpoints fit: parameter count, and a strict load of every name and shape.

``<variant>.json`` lists a checkpoint's tensors (``state_dict``: name to shape) and its parameter count (``params``).
No weights are needed: model and checkpoint are built on the meta device.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import timm
import torch

from zoo import backbones
from zoo.factory import list_models
from zoo.parity.case import Report
from zoo.vlm import create_vlm, list_vlms
from zoo.weights import load_into

__all__ = ["check_all_keys", "check_keys"]


def check_all_keys(folder: str | Path, family: str | None = None) -> Iterator[Report]:
    """Checks every list in a folder.

    Args:
        folder: Folder of ``<variant>.json`` files.
        family: Only variants of this backbone family, or whose name starts with it.

    Raises:
        FileNotFoundError: If the folder holds no such file.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if family is not None:
        ours = list_models(family=family) if family in backbones.FAMILIES else []
        paths = [path for path in paths if path.stem in ours or path.stem.startswith(family)]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no key lists" + (f" of family {family!r}" if family else ""))
    for path in paths:
        yield check_keys(path)


def check_keys(path: str | Path) -> Report:
    """Checks one list against the registered model of the same name, or a vision-language model without its towers."""
    path = Path(path)
    name = f"keys/{path.stem}"
    spec = json.loads(path.read_text())
    if path.stem in list_vlms():
        model = create_vlm(path.stem, vision=(), device="meta")
    elif path.stem in list_models():
        model = timm.create_model(path.stem, device="meta")
    else:
        return Report(name, False, None, "-", "no builder")
    count = sum(parameter.numel() for parameter in model.parameters())
    if spec["params"] not in (None, count):  # not all lists say
        return Report(name, False, None, "exact", f"{count} parameters, the released model has {spec['params']}")
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in spec["state_dict"].items()}
    try:
        load_into(model, checkpoint, assign=True)
    except ValueError as error:
        return Report(name, False, None, "exact", str(error))
    return Report(name, True, None, "exact", f"{count} parameters, {len(checkpoint)} tensors")
