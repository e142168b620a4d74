"""Predictions and scores of segmentors and detectors over a whole data set."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import SegmentationConfig, SegmentationInferenceConfig
from zoo.data import Normalize
from zoo.data.dense import IGNORED, DenseLoader
from zoo.engine.checkpoint import ModelCard
from zoo.engine.dense_metrics import DetectionScores, SegmentationScores
from zoo.engine.evaluate import autocast
from zoo.heads.layers import resize
from zoo.heads.segmentor import predict_segmentation
from zoo.optional import require

__all__ = ["Gallery", "SegmentationPredictor", "evaluate_detection", "evaluate_segmentation", "predict_boxes"]

Boxes = dict[str, Tensor]


@dataclass
class Gallery:
    """Some images of a data set, evenly spaced, with truth and prediction, kept on the CPU to be drawn.

    Attributes:
        total: Images that will be shown to it.
        wanted: How many of them are kept.
        samples: Image, uint8 (C, H, W), truth and prediction: masks (H, W) or dictionaries of boxes.
    """

    total: int
    wanted: int = 8
    samples: list[tuple[Tensor, Any, Any]] = field(default_factory=list)
    seen: int = 0

    def add(self, image: Tensor, truth: Any, prediction: Any) -> None:
        """Keeps or passes over an image."""
        kept = min(self.wanted, self.total)
        if len(self.samples) < kept and self.seen >= len(self.samples) * self.total // kept:
            self.samples.append((image.cpu(), _on_cpu(truth), _on_cpu(prediction)))
        self.seen += 1


class SegmentationPredictor:
    """Probabilities of every pixel's classes, as the settings say.

    Args:
        model: A segmentor.
        card: Its preprocessing.
        inference: Whole images or windows, scales and mirroring.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(
        self, model: nn.Module, card: ModelCard, inference: SegmentationInferenceConfig, precision: str = "fp32"
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.normalize = Normalize(card.preprocessing.mean, card.preprocessing.std).to(self.device)
        self.precision = precision
        sliding = inference.mode == "slide"
        self.options = dict(
            crop_size=tuple(inference.crop_size or card.preprocessing.size) if sliding else None,
            stride=tuple(inference.stride) if sliding and inference.stride else None,
            scales=inference.scales,
            flip=inference.flip,
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Maps uint8 images (B, C, H, W) to probabilities (B, K, H, W), float32."""
        with autocast(self.device, self.precision):
            return predict_segmentation(self.model, self.normalize(images.to(self.device)), **self.options)


@torch.no_grad()
def evaluate_segmentation(
    model: nn.Module, card: ModelCard, loader: DenseLoader, config: SegmentationConfig, gallery: Gallery | None = None
) -> tuple[dict[str, float], SegmentationScores]:
    """Runs a segmentor over a data set; under several processes each runs its share and all get the total.

    Args:
        model: The segmentor, on the loader's device.
        card: Its classes and preprocessing.
        loader: Images and masks. Masks may have another size than images; then their size counts.
        config: How images are predicted, and the precision.
        gallery: Keeps some images.

    Returns:
        ``val_loss``, the mean cross-entropy of the pixels that count; ``miou``, ``macc`` and ``aacc`` in percent; and
        what they were computed from.
    """
    model.eval()
    predict = SegmentationPredictor(model, card, config.inference, config.precision)
    scores = SegmentationScores(len(card.class_names), IGNORED, predict.device)
    loss = require("torchmetrics").MeanMetric().to(predict.device)
    for images, masks in _progress(loader):
        probabilities = predict(images)
        # At another size one by one: large images with many classes fill memory.
        step = len(images) if probabilities.shape[-2:] == masks.shape[-2:] else 1
        for part in zip(images.split(step), masks.split(step), probabilities.split(step), strict=True):
            labels = _score(*part[1:], scores, loss)
            for sample in zip(part[0], part[1], labels, strict=True):
                if gallery is not None:
                    gallery.add(*sample)
    found = scores.compute()
    return {"val_loss": loss.compute().item(), **{name: 100 * value for name, value in found.items()}}, scores


def _score(masks: Tensor, probabilities: Tensor, scores: SegmentationScores, loss: Any) -> Tensor:
    """Adds images to the scores, at the size of their masks (B, H, W), and returns the predicted labels."""
    probabilities = resize(probabilities, masks.shape[-2:])
    labels = probabilities.argmax(1)
    scores.update(labels, masks)
    loss.update(*_cross_entropy(probabilities, masks))
    return labels


def _cross_entropy(probabilities: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the pixels that count, and how many these are."""
    counted = masks != IGNORED
    count = counted.sum()
    chosen = probabilities.gather(1, masks.where(counted, 0).unsqueeze(1)).squeeze(1)
    losses = -chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log()
    return (losses * counted).sum() / count.clamp(min=1), count


@torch.no_grad()
def predict_boxes(model: nn.Module, images: Sequence[Tensor], precision: str = "fp32") -> list[Boxes]:
    """Finds objects in uint8 images (C, H, W), on the model's device; see :class:`zoo.heads.detector.FasterRCNN`."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        return model([image.to(device).float() / 255 for image in images])


@torch.no_grad()
def evaluate_detection(
    model: nn.Module, loader: DenseLoader, precision: str = "fp32", gallery: Gallery | None = None
) -> tuple[dict[str, float], DetectionScores]:
    """Runs a detector over a data set, likewise.

    Args:
        model: The detector, on the loader's device.
        loader: Lists of images and of targets.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        gallery: Keeps some images.

    Returns:
        COCO's average precision in percent, ``box_ap``, ``box_ap50``, ... and for heads with masks ``mask_ap``, ...;
        and what they were computed from.
    """
    model.eval()
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it logs all scores at every evaluation
    scores = DetectionScores(masks=model.predicts_masks)
    for images, targets in _progress(loader):
        predictions = predict_boxes(model, images, precision)
        scores.update(predictions, targets)
        for sample in zip(images, targets, predictions, strict=True):
            if gallery is not None:
                gallery.add(*sample)
    return {name: 100 * value for name, value in scores.compute().items()}, scores


def _progress(loader: DenseLoader) -> Any:
    return require("tqdm").tqdm(loader, "evaluation", unit="batch", leave=False, disable=None, dynamic_ncols=True)


def _on_cpu(value: Any) -> Any:
    return {key: tensor.cpu() for key, tensor in value.items()} if isinstance(value, dict) else value.cpu()
