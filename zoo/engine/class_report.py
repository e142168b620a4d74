"""What a classifier's run shows when it is finished: its confusions, its classes, its worst mistakes.

In the run's folder, of the best weights and the validation images::

    confusion.png    share of every true class that was taken for every class
    confusion.csv    the same as counts
    classes.csv      accuracy of every class, and what it is most often taken for
    worst.png        the images with the highest loss
"""

import csv
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import TrainConfig
from zoo.data import FileLoader, Normalize, TensorLoader
from zoo.engine.checkpoint import ModelCard, read_card
from zoo.engine.evaluate import autocast
from zoo.engine.figures import can_draw, draw_confusion, shorten
from zoo.files import replacing
from zoo.optional import require
from zoo.plots import plot_images

__all__ = ["ClassReport", "find_answers"]

_logger = logging.getLogger(__name__)

WORST = 40  # images on the sheet
CAPTION = 20  # characters that fit above an image of the sheet
LARGEST_CONFUSION = 2000  # classes; a matrix of more takes more memory than it is worth
PICTURES, TABLES = ("confusion.png", "worst.png"), ("confusion.csv", "classes.csv")


class ClassReport:
    """The pictures and tables of a classifier's run.

    Args:
        config: The complete configuration.
        card: What was trained: names, classes, preprocessing.
    """

    def __init__(self, config: TrainConfig, card: ModelCard) -> None:
        self.precision = config.precision
        self.output = Path(config.output)
        self.names = card.shown_names

    def files(self) -> list[str]:
        """What is made here, with these classes and packages."""
        files = [*(PICTURES if can_draw() else ()), *TABLES]
        return files if len(self.names) <= LARGEST_CONFUSION else [name for name in files if name == "worst.png"]

    def make(
        self,
        model: nn.Module,
        loader: TensorLoader | FileLoader,
        weights: Path,
        attempt: Callable[[str, Callable[[], None]], None],
    ) -> None:
        """Makes all of it.

        Args:
            model: The model with these weights, on the loader's device.
            loader: All validation images.
            weights: The file that the weights are from.
            attempt: Calls a function that makes the named thing, and reports it if that fails.
        """
        card = read_card(weights)
        normalize = Normalize(card.preprocessing.mean, card.preprocessing.std).to(next(model.parameters()).device)
        answers = find_answers(model, loader, normalize, self.precision)
        which = f"{card.model} on {card.data}, {weights.stem} weights (epoch {card.epoch})"
        self._report_classes(
            answers, f"{which}\n{answers.top1:.2f} % of {len(answers.labels)} validation images", attempt
        )
        if can_draw():
            title = f"{which}\nthe {len(answers.worst_labels)} validation images with the highest loss"
            attempt("worst.png", lambda: draw_worst(answers, self.names, self.output / "worst.png", title))

    def _report_classes(
        self, answers: "Answers", title: str, attempt: Callable[[str, Callable[[], None]], None]
    ) -> None:
        names, output = self.names, self.output
        if len(names) > LARGEST_CONFUSION:
            _logger.warning("No confusion matrix and no classes.csv for %d classes: it would be too large", len(names))
            return
        confusion = answers.confusion(len(names))
        attempt("confusion.csv", lambda: write_confusion(confusion, names, output / "confusion.csv"))
        attempt("classes.csv", lambda: write_classes(confusion, names, output / "classes.csv"))
        if can_draw():
            attempt("confusion.png", lambda: draw_confusion(confusion, names, output / "confusion.png", title))


@dataclass(frozen=True)
class Answers:
    """What a model answered to a data set, on the CPU.

    Attributes:
        labels: True classes (N,).
        guesses: Most probable classes (N,).
        worst_labels: True classes of the images with the highest loss, highest first (W,).
        worst_guesses: Most probable classes of these images (W,).
        worst_probabilities: Probabilities of these classes, 0 to 1 (W,).
        worst_images: The images as bytes (W, C, H, W).
    """

    labels: Tensor
    guesses: Tensor
    worst_labels: Tensor
    worst_guesses: Tensor
    worst_probabilities: Tensor
    worst_images: Tensor

    @property
    def top1(self) -> float:
        """Percentage of right answers."""
        return 100 * (self.labels == self.guesses).double().mean().item()

    def confusion(self, num_classes: int) -> Tensor:
        """Counts (classes, classes), a row per true class."""
        count = require("torchmetrics.functional.classification").multiclass_confusion_matrix
        return count(self.guesses, self.labels, num_classes=num_classes)


@torch.no_grad()
def find_answers(
    model: nn.Module, loader: TensorLoader | FileLoader, normalize: Callable[[Tensor], Tensor], precision: str
) -> Answers:
    """Runs a model over a data set and keeps its answers, and the images that it does worst on.

    Args:
        model: Maps (B, C, H, W) to logits (B, classes).
        loader: Yields uint8 images and labels on the model's device.
        normalize: Maps uint8 images to the model's input.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    model.eval()
    device = next(model.parameters()).device
    labels, guesses, worst = [], [], None
    for images, truth in require("tqdm").tqdm(loader, "report", unit="batch", leave=False, disable=None):
        with autocast(device, precision):
            logits = model(normalize(images))
        logits = logits.float()
        probability, guess = logits.softmax(-1).max(-1)  # (B,) each
        batch = (F.cross_entropy(logits, truth, reduction="none"), truth, guess, probability, images)
        worst = _highest(batch if worst is None else tuple(map(torch.cat, zip(worst, batch, strict=True))))
        labels.append(truth)
        guesses.append(guess)
    return Answers(torch.cat(labels).cpu(), torch.cat(guesses).cpu(), *(part.cpu() for part in worst[1:]))


def _highest(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Keeps the rows of all tensors where the first one is highest."""
    chosen = parts[0].topk(min(WORST, len(parts[0]))).indices
    return tuple(part[chosen] for part in parts)


def draw_worst(answers: Answers, class_names: Sequence[str], path: Path, title: str) -> None:
    """Draws the images with the highest loss, each with its true class and the guess with its probability."""
    captions = []
    for label, guess, probability in zip(
        answers.worst_labels.tolist(), answers.worst_guesses.tolist(), answers.worst_probabilities.tolist(), strict=True
    ):
        guessed = shorten(class_names[guess], CAPTION - len(" (100%)"))
        captions.append(f"{guessed} ({probability:.0%})\ntrue: {shorten(class_names[label], CAPTION - len('true: '))}")
    images = list(answers.worst_images.permute(0, 2, 3, 1).squeeze(-1).numpy())  # (H, W) if grey, else (H, W, 3)
    right = (answers.worst_labels == answers.worst_guesses).tolist()
    with replacing(path) as temporary:
        plot_images(images, captions, right, temporary, title)


def write_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Writes the counts, a row per true class and a column per predicted one."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *class_names])
        writer.writerows([name, *row] for name, row in zip(class_names, confusion.tolist(), strict=True))


def write_classes(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Writes images, right answers, accuracy in percent and the most frequent mistake of every class."""
    mistakes = confusion.clone().fill_diagonal_(0)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "right", "accuracy", "most_often_taken_for", "times"])
        for label, name in enumerate(class_names):
            images, right = int(confusion[label].sum()), int(confusion[label, label])
            times, other = (value.item() for value in mistakes[label].max(0))
            accuracy = f"{100 * right / images:.2f}" if images else ""
            writer.writerow([name, images, right, accuracy, class_names[other] if times else "", times])
