"""Folders as the Hugging Face hub holds timm's models: weights, configuration and model card."""

import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from zoo.optional import require
from zoo.tools.exporting.output import step
from zoo.tools.exporting.subject import Subject
from zoo.tools.model_card import model_card

__all__ = ["write_hub_folder"]


def write_hub_folder(subject: Subject, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes ``model.safetensors``, ``config.json`` and, for published weights, ``README.md``.

    ``timm.create_model("local-dir:<path>", pretrained=True)`` loads the folder wherever this zoo is imported, and so it
    does as ``hf-hub:`` once it is pushed.

    Args:
        subject: Model.
        path: Folder, made if need be.

    Returns:
        The model as it is loaded again.

    Raises:
        ValueError: If an argument of the model cannot be written, or the folder does not give back the same weights.
    """
    require("huggingface_hub", "export")
    model_config = {"pretrained_cfg": {"license": subject.licence}}
    if subject.class_names:
        model_config["label_names"] = list(subject.class_names)
    card = _card(subject)
    with step("writing the folder"):
        save_for_hf(
            subject.model, path, model_config, safe_serialization=True, data_config=subject.preprocessing.data_config
        )
        (path / "model.safetensors").chmod(0o644)  # written for its owner alone
        if card is not None:
            (path / "README.md").write_text(card, encoding="utf-8")
    with step("reading it again"):
        loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    expected, given = subject.model.state_dict(), loaded.state_dict()
    if expected.keys() != given.keys() or not all(torch.equal(given[name], expected[name]) for name in expected):
        raise ValueError("the folder does not give back the weights that were written")
    return loaded


def _card(subject: Subject) -> str | None:
    """The model card, if there is one that describes these weights."""
    if not subject.published:
        print("no README.md: a model card describes published weights as they are", file=sys.stderr)
        return None
    return model_card(subject.name)
