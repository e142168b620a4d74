"""Scores of one model on one data set, as a row with the usual column names."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from zoo.config import DataConfig, DetectionConfig, SegmentationConfig, TrainConfig, VlmConfig
from zoo.data import Normalize, make_loader, open_split
from zoo.engine.checkpoint import ModelCard
from zoo.engine.evaluate import Evaluation, evaluate

__all__ = ["result_row", "scores_row", "validate", "write_results"]

ELSEWHERE = "; python -m zoo.tools.zero_shot evaluates towers of images and texts"
Row = dict[str, str | int | float | None]


def scores_row(model: nn.Module, card: ModelCard, config: TrainConfig) -> Row:
    """Evaluates a model of any task on the validation split of the configured data.

    Args:
        model: The model, on the device to use.
        card: Its task, classes and preprocessing.
        config: Settings of its task; what is read are the data, the precision and how images are predicted.

    Returns:
        The scores in percent and what was evaluated: timm's columns for classification, ``miou``, ``macc`` and ``aacc``
        for segmentation, COCO's ``box_ap``, ``mask_ap`` and others for detection, None where nothing was to be found,
        ``accuracy`` and others of answers for vision-language models.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If its classes are not the model's, or its task is another one.
    """
    if card.task == "segmentation":
        return _segmentation_row(model, card, config)
    if card.task == "detection":
        return _detection_row(model, card, config)
    if card.task == "vlm":
        return _vlm_row(model, card, config)
    if card.task != "classification":
        raise ValueError(f"{card.model} is trained for {card.task}, whose scores are not found here{ELSEWHERE}")
    return result_row(model, card, validate(model, card, config.data, config.precision))


def validate(model: nn.Module, card: ModelCard, data: DataConfig, precision: str = "fp32") -> Evaluation:
    """Evaluates a classifier on the validation split of the configured data.

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


def result_row(model: nn.Module, card: ModelCard, scores: Evaluation) -> Row:
    """Puts a classifier's scores under timm's column names; percentages, and parameters in millions."""
    return {
        "model": card.model,
        "img_size": card.preprocessing.size[-1],
        "top1": round(scores.top1, 4),
        "top1_err": round(100 - scores.top1, 4),
        "top5": round(scores.top5, 4),
        "top5_err": round(100 - scores.top5, 4),
        "param_count": _millions(model),
        "crop_pct": card.preprocessing.crop_pct,
        "interpolation": card.preprocessing.interpolation,
    }


def _segmentation_row(model: nn.Module, card: ModelCard, config: SegmentationConfig) -> Row:
    from zoo.engine.dense_build import mask_loader, open_masks  # heads are slow to import
    from zoo.engine.dense_evaluate import evaluate_segmentation

    dataset = open_masks(config, training=False, class_names=card.class_names)
    loader = mask_loader(dataset, card.preprocessing, config, training=False, device=next(model.parameters()).device)
    scores, _ = evaluate_segmentation(model, card, loader, config)
    return _dense_row(model, card, {"img_size": config.data.img_size, "inference": config.inference.mode, **scores})


def _detection_row(model: nn.Module, card: ModelCard, config: DetectionConfig) -> Row:
    from zoo.engine.dense_build import box_loader, open_boxes
    from zoo.engine.dense_evaluate import evaluate_detection

    dataset = open_boxes(config, training=False, class_names=card.class_names)
    loader = box_loader(dataset, card.preprocessing, config, training=False, device=next(model.parameters()).device)
    scores, _ = evaluate_detection(model, loader, config.precision)
    min_size, max_size = card.preprocessing.size
    return _dense_row(model, card, {"min_size": min_size, "max_size": max_size, **scores})


def _vlm_row(model: nn.Module, card: ModelCard, config: VlmConfig) -> Row:
    from zoo.data.conversations import open_split as open_conversations
    from zoo.engine.vlm_build import encoder_of
    from zoo.engine.vlm_evaluate import VlmValidation

    encoder = encoder_of(model, card, config.data.max_tokens)
    validation = VlmValidation(config, card, encoder, open_conversations(config.data, training=False))
    scores = validation.scores(model, device=next(model.parameters()).device)
    rounded = {name: round(value, 4) for name, value in scores.items()}
    return {"model": card.model, "img_size": card.preprocessing.size[-1], **rounded, "param_count": _millions(model)}


def _dense_row(model: nn.Module, card: ModelCard, found: Row) -> Row:
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
    rounded = {name: None if value != value else value for name, value in rounded.items()}  # NaN: nothing to score
    return {"model": card.model, "head": card.kwargs["head"], **rounded, "param_count": _millions(model)}


def _millions(model: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)


def write_results(row: Mapping[str, str | int | float | None], path: str | Path) -> None:
    """Writes a row to a ``.csv`` file, or to a ``.json`` file if it is named so.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps([dict(row)], indent=4) + "\n")
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
