"""What a run shows of itself while it trains and when it is finished.

A run's folder holds, besides what :mod:`zoo.engine.checkpoint` lists::

    curves.png       loss, accuracy and learning rate over the epochs, drawn while the run trains
    confusion.png    share of every true class that was taken for every class: validation images, best weights
    confusion.csv    the same as counts
    classes.csv      accuracy of every class, and what it is most often taken for
    worst.png        the validation images with the highest loss
    tensorboard/     the log as TensorBoard reads it, if asked for

All of it follows from the log, the best weights and the validation images. Nothing here draws a random number or is
needed to continue a run, and what cannot be made is reported and does not stop it.
"""

import csv
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.config import TrainConfig
from zoo.data import FileLoader, Normalize, TensorData, TensorLoader, make_loader
from zoo.engine.checkpoint import ModelCard
from zoo.engine.evaluate import autocast
from zoo.engine.figures import draw_confusion, draw_curves, shorten
from zoo.files import replacing
from zoo.optional import require
from zoo.plots import plot_images

__all__ = ["EpochMeter", "RunReport", "TensorBoardLog"]

_logger = logging.getLogger(__name__)

WORST = 40  # images on the sheet
CAPTION = 20  # characters that fit above an image of the sheet
LARGEST_CONFUSION = 2000  # classes; a matrix of more takes more memory than it is worth
WAITING_SHARE = 0.2  # of an epoch, beyond which waiting for images is reported
DRAWING_SHARE = 0.05  # of the time, at most, goes into drawing curves
PICTURES, TABLES = ("confusion.png", "worst.png"), ("confusion.csv", "classes.csv")

Log = Sequence[dict[str, float]]


class EpochMeter:
    """What one epoch of training tells of itself; no step waits for the device because of it.

    Attributes:
        data_seconds: How long the loop has waited for batches. The host's clock: where it runs ahead of the device, as
            it does not while every loss is looked at, part of that time is hidden behind the device's work.
    """

    def __init__(self) -> None:
        self.data_seconds = 0.0
        self.guesses: list[Tensor] = []
        self.labels: list[Tensor] = []

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches and measures how long each is waited for, the start of worker processes included."""
        began = time.perf_counter()
        for batch in batches:
            self.data_seconds += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Takes the answers of a step: logits (B, classes), and labels (B,) or shares of the classes (B, classes)."""
        self.guesses.append(logits.detach().argmax(-1))
        self.labels.append(targets if targets.ndim == 1 else targets.argmax(-1))

    def top1(self, num_classes: int) -> float:
        """Percentage of right answers over all processes; of mixed images, the class with the larger share is right."""
        guesses, labels = torch.cat(self.guesses), torch.cat(self.labels)
        accuracy = require("torchmetrics.classification").MulticlassAccuracy(
            num_classes, average="micro", validate_args=False
        )
        accuracy.to(guesses.device).update(guesses, labels)  # once an epoch: an update launches many kernels
        return 100 * accuracy.compute().item()


class RunReport:
    """The pictures and tables of a run, for its main process. A context: leaving it closes what is open.

    Args:
        config: The complete configuration.
        card: What is trained: names, classes, preprocessing.
    """

    def __init__(self, config: TrainConfig, card: ModelCard) -> None:
        self.config = config
        self.card = card
        self.output = Path(config.output)
        self.can_draw = _can_draw()
        self.tensorboard = _open_tensorboard(self.output) if config.tensorboard else None
        self.next_drawing = 0.0
        self.said: set[str] = set()

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tensorboard:
            self.tensorboard.close()

    def after_epoch(self, log: Log) -> None:
        """Reports a finished epoch: a warning if it was spent waiting, the curves, TensorBoard.

        Args:
            log: All rows up to this epoch.
        """
        self._warn_of_waiting(log[-1])
        if self.tensorboard:
            self._attempt("the log for TensorBoard", lambda: self.tensorboard.add(log))
        began = time.monotonic()
        if began >= self.next_drawing or log[-1]["epoch"] >= self.config.optim.epochs:
            self._draw_curves(log)
            now = time.monotonic()
            self.next_drawing = now + (now - began) / DRAWING_SHARE

    def finish(self, model: nn.Module, data: TensorData | Dataset, log: Log, trained: int) -> None:
        """Makes what a finished run leaves, of its best weights; what is there and up to date stays.

        Args:
            model: On its device, without a wrapper; the best weights are loaded into it.
            data: The validation images.
            log: All rows.
            trained: How many epochs this call of the training loop has trained.
        """
        if log and _is_older(self.output / "curves.png", self.output / "log.csv"):
            self._draw_curves(log)
        weights = self.output / "best.safetensors"
        if not weights.exists():  # continued from another run's checkpoint and never better than it
            weights = self.output / "last.safetensors"
        if trained > 0 or any(_is_older(self.output / name, weights) for name in self._files()):
            self._attempt("the report of the best weights", lambda: self._report_weights(weights, model, data))

    def _report_weights(self, weights: Path, model: nn.Module, data: TensorData | Dataset) -> None:
        with safe_open(weights, framework="pt") as opened:
            card = ModelCard.from_header(opened.metadata())
        model.load_state_dict(load_file(weights))
        device = next(model.parameters()).device
        preprocessing = card.preprocessing
        normalize = Normalize(preprocessing.mean, preprocessing.std).to(device)
        loader = make_loader(data, preprocessing, self.config.data, device)
        answers = find_answers(model, loader, normalize, self.config.precision)

        which = f"{card.model} on {card.data}, {weights.stem} weights (epoch {card.epoch})"
        self._report_classes(answers, f"{which}\n{answers.top1:.2f} % of {len(answers.labels)} validation images")
        if self.can_draw:
            title = f"{which}\nthe {len(answers.worst_labels)} validation images with the highest loss"
            self._attempt("worst.png", lambda: draw_worst(answers, self._names, self.output / "worst.png", title))
        made = [name for name in self._files() if not _is_older(self.output / name, weights)]
        _logger.info("Report of the %s weights in %s: %s", weights.stem, self.output, ", ".join(made))

    def _files(self) -> list[str]:
        """What is to be made of the weights here, with these classes and packages."""
        files = [*(PICTURES if self.can_draw else ()), *TABLES]
        return files if len(self._names) <= LARGEST_CONFUSION else [name for name in files if name == "worst.png"]

    def _report_classes(self, answers: "Answers", title: str) -> None:
        names, output = self._names, self.output
        if len(names) > LARGEST_CONFUSION:
            _logger.warning("No confusion matrix and no classes.csv for %d classes: it would be too large", len(names))
            return
        confusion = answers.confusion(len(names))
        self._attempt("confusion.csv", lambda: write_confusion(confusion, names, output / "confusion.csv"))
        self._attempt("classes.csv", lambda: write_classes(confusion, names, output / "classes.csv"))
        if self.can_draw:
            self._attempt("confusion.png", lambda: draw_confusion(confusion, names, output / "confusion.png", title))

    @property
    def _names(self) -> tuple[str, ...]:
        return self.card.shown_names

    def _draw_curves(self, log: Log) -> None:
        epochs = f"{log[-1]['epoch']} of {self.config.optim.epochs} epochs"
        title = f"{self.card.model} on {self.card.data}, {epochs}"
        if self.can_draw:
            self._attempt("curves.png", lambda: draw_curves(log, self.output / "curves.png", title))

    def _warn_of_waiting(self, row: dict[str, float]) -> None:
        if row["data_seconds"] <= WAITING_SHARE * row["seconds"] or "waiting" in self.said:
            return
        self.said.add("waiting")
        workers = f"data.workers (now {self.config.data.workers}; this machine has {os.cpu_count()} cores)"
        advice = f"raise {workers}, or store smaller images"
        if self.config.data.name in ("digits", "fashion_mnist"):
            advice = f"these images are in memory, where {workers} has no effect; raise data.batch_size"
        waited = f"waited for images for {row['data_seconds']:.1f} of its {row['seconds']:.1f} s"
        _say(f"Epoch {row['epoch']} {waited}; {advice}")

    def _attempt(self, what: str, make: Callable[[], None]) -> None:
        """Makes something, or says once why it could not be made: a run is worth more than its pictures."""
        try:
            make()
        except Exception as error:  # drawing and writing can fail in many ways: a full disk, a strange class name
            if what not in self.said:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                _say(f"Not made: {what} ({reason}); training is not affected")
            self.said.add(what)


class TensorBoardLog:
    """Writes a run's log for TensorBoard, into the folder ``tensorboard`` of the run.

    A run that is continued writes its whole log again and takes the earlier records back, so that no epoch is missing
    and none is shown twice.

    Args:
        output: The run's folder.

    Raises:
        ModuleNotFoundError: If the package ``tensorboard`` is not installed.
    """

    TAGS = (
        ("train_loss", "loss/training"),
        ("val_loss", "loss/validation"),
        ("train_top1", "accuracy/training_top1"),
        ("top1", "accuracy/validation_top1"),
        ("top5", "accuracy/validation_top5"),
        ("lr", "training/lr"),
        ("images_per_second", "training/images_per_second"),
        ("data_seconds", "training/data_seconds"),
        ("seconds", "training/seconds"),
    )

    def __init__(self, output: Path) -> None:
        require("tensorboard")  # torch's error would not say how to install it
        self.writer_type = require("torch.utils.tensorboard").SummaryWriter
        self.folder = output / "tensorboard"
        self.writer: Any = None

    def add(self, log: Log) -> None:
        """Writes the newest row; the first call writes all of them."""
        rows = log[-1:]
        if self.writer is None:
            rows = log
            self.writer = self.writer_type(self.folder, purge_step=int(log[0]["epoch"]))
        now = time.time() - sum(row["seconds"] for row in rows)
        for row in rows:
            now += row["seconds"]
            for column, tag in self.TAGS:
                if column in row:  # an epoch trained before there was such a column lacks it
                    self.writer.add_scalar(tag, row[column], row["epoch"], walltime=now)
        self.writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self.writer is not None:
            self.writer.close()


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


def _can_draw() -> bool:
    """Whether there is matplotlib; says what will be missing if not."""
    try:
        require("matplotlib.figure")
    except ImportError as error:
        _logger.warning("%s will not be drawn: %s", ", ".join(("curves.png", *PICTURES)), error)
        return False
    return True


def _open_tensorboard(output: Path) -> TensorBoardLog | None:
    try:
        return TensorBoardLog(output)
    except ImportError as error:
        _logger.warning("tensorboard=true has no effect: %s", error)
        return None


def _is_older(path: Path, source: Path) -> bool:
    """Whether a file was made before what it is made from, or never."""
    return not path.exists() or (source.exists() and path.stat().st_mtime < source.stat().st_mtime)


def _say(line: str) -> None:
    """Logs a warning without breaking the progress bar."""
    with require("tqdm.contrib.logging").logging_redirect_tqdm([logging.getLogger()]):
        _logger.warning(line)
