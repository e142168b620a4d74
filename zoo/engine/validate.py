"""Accuracy of one model on one data set, as a row with timm's column names."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from zoo.config import DataConfig
from zoo.data import Normalize, make_loader, open_split
from zoo.engine.checkpoint import ModelCard
from zoo.engine.evaluate import Evaluation, evaluate

__all__ = ["RESULT_COLUMNS", "result_row", "validate", "write_results"]

RESULT_COLUMNS = (
    "model",
    "img_size",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",
    "crop_pct",
    "interpolation",
)


def validate(model: nn.Module, card: ModelCard, data: DataConfig, precision: str = "fp32") -> Evaluation:
    """Evaluates a model on the validation split of the configured data.

    Args:
        model: The model, on the device to use.
        card: Its classes and preprocessing.
        data: Which images; ``val_split`` names the split.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If its classes are not the model's.
    """
    dataset, _ = open_split(data, data.val_split, class_names=card.class_names)
    device = next(model.parameters()).device
    loader = make_loader(dataset, card.preprocessing, data, device)
    normalize = Normalize(card.preprocessing.mean, card.preprocessing.std).to(device)
    return evaluate(model, loader, normalize, len(card.class_names), precision)


def result_row(model: nn.Module, card: ModelCard, scores: Evaluation) -> dict[str, str | int | float]:
    """Puts the scores under timm's column names; percentages, and parameters in millions."""
    return {
        "model": card.model,
        "img_size": card.preprocessing.size[-1],
        "top1": round(scores.top1, 4),
        "top1_err": round(100 - scores.top1, 4),
        "top5": round(scores.top5, 4),
        "top5_err": round(100 - scores.top5, 4),
        "param_count": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
        "crop_pct": card.preprocessing.crop_pct,
        "interpolation": card.preprocessing.interpolation,
    }


def write_results(row: Mapping[str, str | int | float], path: str | Path) -> None:
    """Writes a row to a ``.csv`` file, or to a ``.json`` file if it is named so.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps([dict(row)], indent=4) + "\n")
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, RESULT_COLUMNS)
        writer.writeheader()
        writer.writerow(row)
