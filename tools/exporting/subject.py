"""The model that is exported, and what its file says about it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import nn

import zoo
from zoo.config import DataConfig
from zoo.data import Preprocessing, resolve_preprocessing
from zoo.engine import load_trained

__all__ = ["Subject", "load_subject"]

PUBLISHED = "published"


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode on the CPU, in float32.

    Attributes:
        name: Name of the model, with the tag of its weights if they are published ones.
        model: The model.
        preprocessing: How images become its input.
        weights: Where its weights come from.
        licence: That of the weights.
        class_names: Names in label order, where the weights know them.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    weights: str
    licence: str
    class_names: tuple[str, ...] = ()

    @property
    def published(self) -> bool:
        """Whether this is a published model of this zoo as it is, so that its model card describes it."""
        if self.weights != PUBLISHED or self.model.num_classes != self.model.pretrained_cfg["num_classes"]:
            return False
        return zoo.list_pretrained(self.name) == [self.name]

    def metadata(self) -> dict[str, str]:
        """What files can say beside the graph, as strings; lists are JSON."""
        entries = dict(
            model=self.name,
            **self.preprocessing.data_config,
            num_classes=self.model.num_classes,
            class_names=self.class_names or None,
            weights=self.weights,
            license=self.licence,
            made_by=f"vision-ssm-zoo {zoo.__version__}",
        )
        written = {name: value for name, value in entries.items() if value is not None}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in written.items()}


def load_subject(
    name: str,
    checkpoint: str | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    size: tuple[int, int] | None = None,
) -> Subject:
    """Creates the model.

    Args:
        name: A model's name, or a run's folder or its ``.safetensors`` file.
        checkpoint: Weight file for a model's name, ours or the authors'.
        pretrained: Whether a model's name gets its published weights. Without either, weights are random.
        num_classes: Classes; default those of the model.
        size: Height and width of the images; default what the weights were made for.

    Raises:
        OSError: If a file is not there, or weights cannot be downloaded.
        ValueError: If there is no such model, the weights do not fit, or arguments contradict each other.
    """
    path = Path(name)
    if not timm.is_model(name) and (path.exists() or path.suffix == ".safetensors"):
        if checkpoint or pretrained or num_classes is not None:
            raise ValueError(f"{name} is a run, which has weights and classes of its own; give a model's name instead")
        subject = _run(path)
    else:
        subject = _named(name, checkpoint, pretrained, num_classes)
    if size is None:
        return subject
    return replace(subject, preprocessing=replace(subject.preprocessing, size=size))


def _run(path: Path) -> Subject:
    """A model that this package trained."""
    model, card = load_trained(path)
    return Subject(card.model, model.float(), card.preprocessing, f"run {path.name}", "unknown", card.class_names)


def _named(name: str, checkpoint: str | None, pretrained: bool, num_classes: int | None) -> Subject:
    torch.manual_seed(0)  # random weights, or those of a new classifier, are the same at every call
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = zoo.create_model(name, pretrained, checkpoint_path=checkpoint, **options).float().eval()
    cfg = model.pretrained_cfg
    data = DataConfig(name="folder", in_chans=cfg["input_size"][0])
    preprocessing = resolve_preprocessing(data, None, model)
    # A checkpoint may well be the authors' or be trained from theirs, so their terms are not dropped.
    licence = cfg.get("license") or "unknown"
    if checkpoint:
        return Subject(name, model, preprocessing, f"checkpoint {Path(checkpoint).name}", licence)
    if pretrained:
        tagged = f"{name}.{cfg.get('tag')}"
        name = tagged if timm.is_model_pretrained(tagged) else name
        return Subject(name, model, preprocessing, PUBLISHED, licence)
    return Subject(name, model, preprocessing, "random", "none, as the weights are random")
