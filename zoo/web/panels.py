"""What the page works out: from an uploaded image to pictures and numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.assistant import open_image
from zoo.config import SegmentationInferenceConfig
from zoo.data import Normalize, image_transform, why_unreadable
from zoo.data.dense import segmentation_resize
from zoo.draw import draw_detections
from zoo.engine import ModelCard, load_any, settings_beside
from zoo.engine.attribution import attribute, overlay
from zoo.engine.dense_evaluate import SegmentationPredictor, predict_boxes
from zoo.engine.dense_report import enlarged, palette_of
from zoo.heads.layers import resize

__all__ = ["Classified", "Trained", "classify", "find_objects", "load_for", "open_upload", "segment"]

MOST_PIXELS = 50_000_000
SHOWN_SIDE = 448  # pixels of the longer side of a classifier's input when it is shown
SMALLEST_SIDE, LARGEST_SIDE = 512, 1024  # of the longer side of what is segmented and searched for objects
SHOWN_CLASSES = 5
OPTIONS = {"classification": "classifier", "segmentation": "segmenter", "detection": "detector", "vlm": "vlm"}


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode.

    Attributes:
        model: The model.
        card: Its task, classes and preprocessing.
        inference: For a segmentor, how its run predicts images.
    """

    model: nn.Module
    card: ModelCard
    inference: SegmentationInferenceConfig | None = None


@dataclass(frozen=True)
class Classified:
    """What a classifier says of an image.

    Attributes:
        probabilities: Of the most probable classes, by name, the highest first.
        seen: The image as the model gets it, enlarged, (H, W, 3) bytes.
        evidence: The same with the map over it.
    """

    probabilities: dict[str, float]
    seen: np.ndarray
    evidence: np.ndarray


def load_for(task: str, name: str, device: torch.device | str) -> Trained:
    """Loads a model for a task.

    Args:
        task: ``classification``, ``segmentation`` or ``detection``.
        name: A run's folder, a ``.safetensors`` file of a run, or, for classification, the name of a model.
        device: Where it goes.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If there is no such model, or it is for another task.
    """
    model, card = load_any(name, device=device)
    if card.task != task:
        own = OPTIONS.get(card.task)
        hint = f"; give it as --{own}" if own else ""
        raise ValueError(f"{name} is trained for {card.task}, not for {task}{hint}")
    settings = settings_beside(name) if task == "segmentation" else None
    return Trained(model, card, settings.inference if settings else None)


def open_upload(file: Path) -> Image.Image:
    """Opens an image that somebody sent.

    Raises:
        ValueError: If it is no image, or larger than the page takes.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
    except Exception as error:  # PIL's plugins raise many types
        raise ValueError(f"{file.name} is not a readable image; send a PNG, JPEG or WebP file") from error
    if width * height > MOST_PIXELS:
        raise ValueError(f"{file.name} has {width} x {height} pixels; send at most {MOST_PIXELS // 10**6} million")
    reason = why_unreadable(file)
    if reason:
        raise ValueError(f"{file.name} is damaged ({reason}); send it again")
    return open_image(file)


def classify(trained: Trained, image: Image.Image, target: str | None, method: str) -> Classified:
    """Classifies an image and shows where the evidence for a class lies.

    Args:
        trained: A classifier.
        image: The image.
        target: Name of the class whose evidence is shown; None for the most probable one.
        method: One of ``zoo.engine.attribution.METHODS``.

    Raises:
        ValueError: If the method does not work for the model.
    """
    model, card = trained.model, trained.card
    pixels = image_transform(card.preprocessing)(image)  # uint8 (C, H, W)
    device = next(model.parameters()).device
    inputs = Normalize(card.preprocessing.mean, card.preprocessing.std).to(device)(pixels.unsqueeze(0).to(device))
    with torch.no_grad():
        probabilities = model(inputs).float().softmax(-1)[0].cpu()
    label = int(probabilities.argmax()) if target is None else card.shown_names.index(target)
    heat = attribute(model, inputs, label, method)[0]  # (H, W)
    best = probabilities.topk(min(SHOWN_CLASSES, len(probabilities)))
    named = {}
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        name = card.shown_names[index]
        named[f"{name} ({index})" if name in named else name] = probability  # ImageNet has two cranes
    return Classified(named, _shown(pixels.expand(3, -1, -1)), _shown(_channels_first(overlay(pixels, heat))))


def segment(trained: Trained, image: Image.Image) -> tuple[np.ndarray, list[tuple[np.ndarray, str]]]:
    """Divides an image into classes.

    Args:
        trained: A segmentor.
        image: The image.

    Returns:
        The image, (H, W, 3) bytes, and for each class that was found where it is, (H, W) booleans, and its name. Left
        out is what is black in the classes' palette: the background.
    """
    card = trained.card
    pixels = _fitting(image, card.preprocessing.in_chans)  # (H, W, C)
    predict = SegmentationPredictor(trained.model, card, trained.inference or SegmentationInferenceConfig())
    side = round(min(card.preprocessing.size) / card.preprocessing.crop_pct)
    shrunk, _ = segmentation_resize(side)(pixels, None, np.random.default_rng(0))
    labels = resize(predict(_channels_first(shrunk).unsqueeze(0)), pixels.shape[:2]).argmax(1)[0].cpu()
    palette = palette_of(card.class_names)
    found = [label for label in labels.unique().tolist() if any(palette[label])]
    return _in_colour(pixels), [((labels == label).numpy(), card.shown_names[label]) for label in found]


def find_objects(trained: Trained, image: Image.Image, threshold: float) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """Finds objects in an image.

    Args:
        trained: A detector.
        image: The image.
        threshold: Lowest score of an object that counts.

    Returns:
        The image with boxes, and masks if the model has them, drawn on it, (H, W, 3) bytes; and name and score of every
        object, the surest first.
    """
    card = trained.card
    pixels = _channels_first(_fitting(image, card.preprocessing.in_chans))
    objects = predict_boxes(trained.model, [pixels])[0]
    drawn = draw_detections(pixels, objects, card.shown_names, threshold)
    named = [
        (card.shown_names[label], score)
        for label, score in zip(objects["labels"].tolist(), objects["scores"].tolist(), strict=True)
        if score >= threshold
    ]
    return _channels_last(drawn), sorted(named, key=lambda entry: -entry[1])


def _fitting(image: Image.Image, channels: int) -> np.ndarray:
    """Bytes (H, W, C) of an image of a size at which names on it can be read and pictures do not fill memory."""
    longest = max(image.size)
    scale = min(max(longest, SMALLEST_SIDE), LARGEST_SIDE) / longest
    size = [max(round(side * scale), 1) for side in image.size]
    pixels = np.array(image.convert("L" if channels == 1 else "RGB").resize(size, Image.Resampling.BICUBIC))
    return pixels.reshape(*pixels.shape[:2], channels)


def _shown(picture: Tensor) -> np.ndarray:
    return _channels_last(enlarged(picture, SHOWN_SIDE))


def _in_colour(pixels: np.ndarray) -> np.ndarray:
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _channels_last(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).contiguous().numpy()
