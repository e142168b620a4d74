"""Pictures of a run: learning curves, a confusion matrix, a sheet of labelled images. PNG files, no display needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zoo.optional import require

__all__ = ["plot_confusion", "plot_curves", "plot_images"]

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9822b", "#2e8b57", "#c0392b", "#888888"
DPI = 130
NAMED_CLASSES = 30  # a confusion matrix with more classes shows no names and no counts


def plot_curves(log: Sequence[dict[str, float]], path: str | Path, title: str) -> None:
    """Draws loss and validation accuracy over the epochs.

    Args:
        log: Rows of a run's log, see :func:`zoo.engine.read_log`.
        path: The PNG file.
        title: Line above the picture.
    """
    figure = _figure(10, 4)
    losses, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in log]
    marker = "o" if len(epochs) == 1 else None  # a line through one point is invisible

    losses.plot(epochs, [row["train_loss"] for row in log], color=BLUE, marker=marker, label="training (augmented)")
    losses.plot(epochs, [row["val_loss"] for row in log], color=ORANGE, marker=marker, label="validation")
    losses.set(xlabel="epoch", ylabel="cross-entropy loss")
    losses.set_ylim(bottom=0)

    top1 = [row["top1"] for row in log]
    accuracy.plot(epochs, top1, color=ORANGE, marker=marker, label=f"validation, at the end {top1[-1]:.2f} %")
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy (%)", ylim=(0, 101))
    for axes in (losses, accuracy):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True))
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def plot_confusion(confusion: Tensor, class_names: Sequence[str], path: str | Path, title: str) -> None:
    """Draws a confusion matrix: the colour is the share of the true class, the number the count of images.

    Args:
        confusion: Counts (classes, classes), a row per true class.
        class_names: Names in label order.
        path: The PNG file.
        title: Line above the picture.
    """
    counts = confusion.numpy()
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    named = len(counts) <= NAMED_CLASSES
    side = 3 + 0.5 * min(len(counts), NAMED_CLASSES)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if named:
        short = all(len(name) <= 3 for name in class_names)
        slant = {} if short else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(counts)), class_names, **slant)
        axes.set_yticks(range(len(counts)), class_names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=DPI)


def plot_images(
    images: Sequence[np.ndarray | Any],
    captions: Sequence[str],
    correct: Sequence[bool | None],
    path: str | Path,
    title: str,
    columns: int = 8,
) -> None:
    """Draws a sheet of images with a caption above each.

    Args:
        images: Arrays (H, W) or (H, W, 3) of bytes, or PIL images.
        captions: One per image.
        correct: Frame and caption are green for True, red for False, grey for None (not known).
        path: The PNG file.
        title: Line above the sheet.
        columns: Images per row.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    figure = _figure(max(1.45 * columns, 5), (1.3 + 0.17 * lines) * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, caption, right in zip(grid.flat, images, captions, correct, strict=False):
        color = {True: GREEN, False: RED, None: GREY}[right]
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(edgecolor=color, linewidth=2.5)
        axes.set_title(caption, fontsize=8, color="black" if right is None else color, pad=4)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=DPI)


def _figure(width: float, height: float) -> Any:
    """A figure of this size in inches that lays itself out; made without pyplot, so no window and no global state."""
    return require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
