"""Predictions for image files: finding the files, running a model; for classifiers, writing a table and a sheet."""

import csv
import glob
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

import zoo
from zoo.config import DataConfig, TrainConfig, load_config
from zoo.data import Normalize, image_transform, report_bad_files, resolve_preprocessing, why_unreadable
from zoo.engine.checkpoint import ModelCard, load_trained
from zoo.files import replacing
from zoo.plots import plot_images

if TYPE_CHECKING:
    from zoo.assistant import Assistant

__all__ = [
    "Prediction",
    "answer_into",
    "classify_into",
    "find_images",
    "load_any",
    "predict_files",
    "predict_into",
    "settings_beside",
    "write_predictions",
]

CAPTION_WIDTH, CAPTION_LINES = 20, 3  # characters and lines of an answer above an image
ANSWERED_COLUMNS = 6


@dataclass(frozen=True)
class Prediction:
    """The first guess for one image.

    Attributes:
        file: The image.
        label: Predicted class.
        probability: Its probability, 0 to 1.
        truth: The true class if the file's folder is named after a class, else None.
    """

    file: Path
    label: str
    probability: float
    truth: str | None

    @property
    def correct(self) -> bool | None:
        """Whether the guess is right; None if the true class is not known."""
        return None if self.truth is None else self.label == self.truth


def load_any(
    name: str, checkpoint: str | None = None, img_size: int | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, ModelCard]:
    """Loads a trained model from a run, from a weight file, or from published weights.

    Args:
        name: A run's folder, a ``.safetensors`` file of a run, or a model name.
        checkpoint: Weight file for a model name; default its published weights.
        img_size: Side of the images in pixels for a model name; default what the weights were made for.
        device: Where the model goes.

    Raises:
        FileNotFoundError: If a path leads nowhere, or a run's folder holds no weights.
        ValueError: If there is no such model, or the weights do not fit.
    """
    if Path(name).exists():
        return load_trained(name, device)
    if Path(name).suffix == ".safetensors" or ("/" in name and ":" not in name):  # names of models have no slash
        raise FileNotFoundError(f"there is no run and no weight file at {name}")
    source = {"checkpoint_path": checkpoint} if checkpoint else {"pretrained": True}
    model = zoo.create_model(name, **source).to(device).eval()
    labels = range(model.num_classes)
    names, descriptions = tuple(model.pretrained_cfg.get("label_names") or map(str, labels)), ()
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        names = tuple(info.index_to_label_name(label) for label in labels)
        descriptions = tuple(info.index_to_description(label) for label in labels)
    data = DataConfig(name="folder", img_size=img_size, in_chans=model.pretrained_cfg["input_size"][0])
    preprocessing = resolve_preprocessing(data, None, model)
    return model, ModelCard(name, {}, names, preprocessing, data="folder", descriptions=descriptions)


def settings_beside(name: str, overrides: Sequence[str] = ()) -> TrainConfig | None:
    """The settings of the run that a model is from; None if there are none beside it.

    Args:
        name: A run's folder or a file in it, or the name of a model.
        overrides: ``key=value`` settings that win.

    Raises:
        ValueError: If there are overrides, but no settings; or for a wrong override.
    """
    path = Path(name)
    saved = (path if path.is_dir() else path.parent) / "config.yaml"
    if path.exists() and saved.exists():
        return load_config(str(saved), overrides)
    if overrides:
        raise ValueError(f"there are no settings for {overrides[0]!r} to change: {saved} is not there")
    return None


def find_images(inputs: Sequence[str], bad_files: str = "skip") -> list[Path]:
    """Finds image files and checks that they can be read.

    Args:
        inputs: Files, folders (searched to the bottom) and glob patterns such as ``shop/**/*.jpg``.
        bad_files: ``skip`` reports unreadable images and leaves them out, ``error`` raises.

    Returns:
        The readable ones, sorted within each input, none twice.

    Raises:
        FileNotFoundError: If an input matches nothing.
        ValueError: If an image cannot be read under ``error``, or none can.
    """
    found: dict[Path, None] = {}  # an ordered set
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        elif path.is_file():
            files = [path]
        else:
            files = [Path(file) for file in sorted(glob.glob(text, recursive=True)) if Path(file).is_file()]
        if not files:
            raise FileNotFoundError(f"no image at {text}; give an image file, a folder of them, or a quoted pattern")
        found.update(dict.fromkeys(files))
    reasons = {str(file): reason for file in found if (reason := why_unreadable(file))}
    report_bad_files(reasons, len(found), ", ".join(inputs), bad_files)
    readable = [file for file in found if str(file) not in reasons]
    if not readable:
        raise ValueError(f"there is no readable image in {', '.join(inputs)}")
    return readable


@torch.no_grad()
def predict_files(model: nn.Module, card: ModelCard, files: Sequence[Path], batch_size: int = 64) -> list[Prediction]:
    """Classifies image files.

    Args:
        model: A model in evaluation mode.
        card: Its classes and preprocessing.
        files: Readable images, see :func:`find_images`.
        batch_size: Images at a time.

    Returns:
        One prediction per file, in their order.
    """
    device = next(model.parameters()).device
    transform = image_transform(card.preprocessing)
    normalize = Normalize(card.preprocessing.mean, card.preprocessing.std).to(device)
    predictions = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        images = torch.stack([transform(Image.open(file)) for file in batch]).to(device)  # (B, C, H, W)
        probabilities, labels = model(normalize(images)).float().softmax(-1).max(-1)  # (B,) each
        for file, probability, label in zip(batch, probabilities.tolist(), labels.tolist(), strict=True):
            folder = file.resolve().parent.name
            truth = card.shown_names[card.class_names.index(folder)] if folder in card.class_names else None
            predictions.append(Prediction(file, card.shown_names[label], probability, truth))
    return predictions


def write_predictions(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Writes a CSV file with the columns file, predicted, probability, true (empty where it is not known)."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "predicted", "probability", "true"])
        for prediction in predictions:
            writer.writerow(
                [prediction.file, prediction.label, f"{prediction.probability:.4f}", prediction.truth or ""]
            )


def classify_into(
    output: Path, model: nn.Module, card: ModelCard, files: Sequence[Path], batch_size: int = 64, shown: int = 64
) -> str:
    """Classifies image files, writes ``predictions.csv`` and a labelled contact sheet, ``predictions.png``.

    Args:
        output: Folder for them.
        model: A classifier in evaluation mode.
        card: Its classes and preprocessing.
        files: Readable images, see :func:`find_images`.
        batch_size: Images at a time.
        shown: Largest number of images on the sheet.

    Returns:
        A line that sums it up.
    """
    predictions = predict_files(model, card, files, batch_size)
    write_predictions(predictions, output / "predictions.csv")
    known = [prediction for prediction in predictions if prediction.truth is not None]
    summary = f"{card.model}: {len(predictions)} images"
    if known:
        right = sum(prediction.correct for prediction in known)
        summary += f", {right} of the {len(known)} with a known class are right"
    drawn = predictions[:shown]
    mode = "L" if card.preprocessing.in_chans == 1 else "RGB"
    plot_images(
        [Image.open(prediction.file).convert(mode) for prediction in drawn],
        [f"{prediction.label}\n({prediction.probability:.0%})" for prediction in drawn],
        [prediction.correct for prediction in drawn],
        output / "predictions.png",
        summary if len(drawn) == len(predictions) else f"{summary} (the first {len(drawn)} are shown)",
    )
    return summary


def answer_into(
    output: Path,
    assistant: "Assistant",
    files: Sequence[Path],
    questions: Sequence[str],
    batch_size: int = 8,
    max_new_tokens: int = 256,
    shown: int = 64,
) -> str:
    """Asks questions about every image file, writes the answers and a sheet of images with those to the first question.

    Args:
        output: Folder for ``predictions.csv``, with the columns file, question, answer, and ``predictions.png``.
        assistant: A vision-language model.
        files: Readable images, see :func:`find_images`.
        questions: The questions, each of which is asked on its own.
        batch_size: Questions at a time.
        max_new_tokens: Longest answer.
        shown: Largest number of images on the sheet.

    Returns:
        A line that sums it up.

    Raises:
        ValueError: If a question does not fit the model, see :meth:`zoo.assistant.Assistant.ask`.
    """
    rows = [(file, question) for file in files for question in questions]
    answers = assistant.answer(*zip(*rows, strict=True), batch_size=batch_size, max_new_tokens=max_new_tokens)
    path = output / "predictions.csv"
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "question", "answer"])
        writer.writerows([*row, answer] for row, answer in zip(rows, answers, strict=True))
    drawn = files[:shown]
    first = answers[:: len(questions)]
    plot_images(
        [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in drawn],
        [_caption(answer) for answer in first[: len(drawn)]],
        [None] * len(drawn),
        output / "predictions.png",
        _plain(textwrap.shorten(questions[0], 80)) + (f" (the first {len(drawn)})" if len(drawn) < len(files) else ""),
        ANSWERED_COLUMNS,
    )
    return f"{len(answers)} answers about {len(files)} images"


def _caption(answer: str) -> str:
    return _plain("\n".join(textwrap.wrap(answer, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder="...")))


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def predict_into(
    output: Path,
    model: nn.Module,
    card: ModelCard,
    files: Sequence[Path],
    settings: TrainConfig | None = None,
    batch_size: int | None = None,
    shown: int = 64,
    threshold: float = 0.5,
) -> str:
    """Predicts image files with a model of any task and writes what the task has to show.

    Args:
        output: Folder for the results.
        model: A model in evaluation mode.
        card: Its task, classes and preprocessing.
        files: Readable images, see :func:`find_images`.
        settings: Those of its run, for how a segmentor predicts images.
        batch_size: Images at a time; segmentation takes them one by one. Default 64, 8 for detection.
        shown: Largest number of images on the sheet.
        threshold: Lowest score of an object that is drawn.

    Returns:
        A line that sums it up.

    Raises:
        ValueError: If the task is another one.
    """
    from zoo.engine.dense_predict import detect_into, segment_into  # heads are slow to import

    if card.task == "segmentation":
        return segment_into(output, model, card, files, settings.inference if settings else None, shown)
    if card.task == "detection":
        return detect_into(output, model, card, files, batch_size or 8, threshold, shown)
    if card.task != "classification":
        raise ValueError(f"{card.model} is trained for {card.task}, which has nothing to predict for images alone")
    return classify_into(output, model, card, files, batch_size or 64, shown)
