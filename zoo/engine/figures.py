"""Drawings of a run: curves over its epochs, the confusion matrix, curves of several runs in one picture.

Files are written under a temporary name and then renamed, so that one that can be seen is whole.
"""

import logging
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zoo.files import replacing
from zoo.optional import require
from zoo.plots import BLUE, DPI, GREY, ORANGE, new_figure

__all__ = ["can_draw", "draw_confusion", "draw_curves", "draw_runs", "shorten", "spread"]

_logger = logging.getLogger(__name__)

SCORE_COLORS = (ORANGE, "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")
NUMBERED_CLASSES = 30  # a confusion matrix with more classes shows no numbers
NAMED_CLASSES = 120  # one with more classes shows no names either
SHOWN_CELLS = 250  # rows and columns of a confusion matrix that can be told apart
LONGEST_NAME = 24  # characters of a class
LONGEST_RUN = 40  # characters of a run
LABEL_SIZE = 9  # points

AXIS_LABELS = {
    "lr": "learning rate",
    "train_loss": "training loss",
    "train_top1": "training top-1 accuracy (%)",
    "val_loss": "validation loss",
    "top1": "validation top-1 accuracy (%)",
    "top5": "validation top-5 accuracy (%)",
    "balanced_accuracy": "balanced validation accuracy (%)",
    "macro_f1": "validation F1 over classes (%)",
    "auroc": "validation area under the ROC curve (%)",
    "miou": "validation mIoU (%)",
    "macc": "validation accuracy, mean over classes (%)",
    "aacc": "validation accuracy of pixels (%)",
    "box_ap": "validation box AP (%)",
    "mask_ap": "validation mask AP (%)",
    "recall1": "validation recall@1 (%), mean of both ways",
    "zero_shot_top1": "zero-shot top-1 accuracy (%)",
    "token_accuracy": "validation tokens that are right (%)",
    "accuracy": "validation answers that are right (%)",
    "blank_accuracy": "the same with a blank image (%)",
    "images_per_second": "training images per second",
    "data_seconds": "seconds of waiting for images",
    "seconds": "seconds per epoch",
}


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits into a picture and is not read as a formula."""
    short = name if len(name) <= longest else f"{name[: longest - 1].rstrip()}…"
    return short.replace("$", r"\$")


def can_draw(warn: bool = False) -> bool:
    """Whether there is matplotlib.

    Args:
        warn: Say so in the log if there is none, and how to get it.
    """
    try:
        require("matplotlib.figure")
    except ImportError as error:
        if warn:
            _logger.warning("No pictures will be drawn: %s", error)
        return False
    return True


def draw_curves(
    log: Sequence[Mapping[str, float]], path: Path, title: str, panels: Mapping[str, Sequence[str]], goal: str
) -> None:
    """Draws losses, scores and the learning rate over the epochs.

    Args:
        log: Rows of a run's log, see :func:`zoo.engine.read_log`.
        path: The PNG file.
        title: Line above the picture.
        panels: Columns that are drawn together, by the label of their axis.
        goal: The column whose highest value is marked.
    """
    figure = new_figure(4.8 * len(panels) + 3.4, 4)
    *score_axes, rates = figure.subplots(1, len(panels) + 1, width_ratios=(*[1] * len(panels), 0.7))
    for axes, (label, columns) in zip(score_axes, panels.items(), strict=True):
        colors = iter(SCORE_COLORS)
        for column in columns:
            training = column.startswith("train")
            shown = _curve_label(log, column, goal, alone=len(columns) == 2)
            _plot(axes, log, column, BLUE if training else next(colors), shown)
        axes.set(ylabel=label)
        if goal in columns:
            best = max(log, key=lambda row: row[goal])
            axes.plot(best["epoch"], best[goal], "o", color=ORANGE, markersize=5)

    _plot(rates, log, "lr", GREY, f"now {log[-1]['lr']:.2g}")
    rates.set(ylabel="learning rate")
    rates.yaxis.set_major_formatter("{x:g}")  # matplotlib's own would set a power of ten apart

    for axes in (*score_axes, rates):
        axes.set(xlabel="epoch")
        # Above the axes, where no curve can run through it.
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, fontsize=LABEL_SIZE)
        _tidy(axes)
    _save(figure, path, title)


def _curve_label(log: Sequence[Mapping[str, float]], column: str, goal: str, alone: bool) -> str:
    """What a curve shows and where it stands; the axis says what it measures if training and validation share it."""
    name = AXIS_LABELS.get(column, column)
    if column.startswith("train"):
        return "training (augmented images)" if alone else name
    name = "validation" if alone else name
    if column == goal:
        best = max(log, key=lambda row: row[goal])
        return f"{name}, best {best[goal]:.2f} after epoch {best['epoch']}"
    return f"{name}, now {log[-1].get(column, np.nan):.3g}"


def draw_confusion(confusion: Tensor, class_names: Sequence[str], path: Path, title: str) -> None:
    """Draws a confusion matrix whose rows add up to 100 %; classes that never occur are left out.

    Args:
        confusion: Counts (classes, classes), a row per true class.
        class_names: Names in label order.
        path: The PNG file.
        title: Line above the picture.
    """
    counts = confusion.numpy()
    seen = np.flatnonzero(counts.sum(0) + counts.sum(1))
    counts, names = counts[np.ix_(seen, seen)], [shorten(class_names[index]) for index in seen]
    percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    cells, shared = _join_classes(percent)

    numbered, named = len(names) <= NUMBERED_CLASSES, len(names) <= NAMED_CLASSES
    font = 8 if numbered else 6
    matrix = max(3, (0.42 if numbered else 0.14) * len(names)) if named else 12  # inches
    beside = 0.011 * font * max(map(len, names)) if named else 0
    figure = new_figure(matrix + beside + 1.6, matrix + beside + 0.9)
    axes = figure.subplots()
    # The root of the share as colour: a confusion of 2 % would be white on a scale up to 100 %.
    norm = require("matplotlib.colors").PowerNorm(0.5, 0, 100)
    edges = (-0.5, len(cells) * shared - 0.5)
    image = axes.imshow(cells, cmap="Blues", norm=norm, interpolation="nearest", extent=(*edges, *edges[::-1]))
    axes.set(xlabel="predicted class", ylabel="true class")
    if named:
        _name_classes(axes, names, font, upright=not numbered)
    if numbered:
        _number_cells(axes, percent, font)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, ticks=(0, 1, 5, 10, 25, 50, 75, 100))
    joined = f", highest of {shared} x {shared}" if shared > 1 else ""
    bar.set_label(f"percent of the true class{joined}")
    bar.outline.set_visible(False)
    _save(figure, path, title)


def _join_classes(percent: np.ndarray) -> tuple[np.ndarray, int]:
    """Lets neighbouring classes share a cell, with the highest of their values, until cells are large enough to see.

    Returns:
        The cells, and how many classes share a row.
    """
    shared = -(-len(percent) // SHOWN_CELLS)
    padded = np.pad(percent, (0, -len(percent) % shared))
    rows = len(padded) // shared
    return padded.reshape(rows, shared, rows, shared).max((1, 3)), shared


def _name_classes(axes: Any, names: Sequence[str], font: int, upright: bool) -> None:
    """Writes the names beside the rows and below the columns: level if they are short, else slanted or upright."""
    below: dict[str, Any] = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "top"}
    if upright:
        below |= {"rotation": 90, "va": "center"}
    elif all(len(name) <= 3 for name in names):
        below = {}
    axes.set_xticks(range(len(names)), names, fontsize=font, **below)
    axes.set_yticks(range(len(names)), names, fontsize=font)


def _number_cells(axes: Any, percent: np.ndarray, font: int) -> None:
    """Writes the percentages into the cells that are not empty."""
    for row, column in zip(*np.nonzero(percent), strict=True):
        value = percent[row, column]
        text = f"{value:.0f}" if value >= 0.5 else "<1"
        color = "white" if value > 30 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=font)


def draw_runs(logs: Mapping[str, Sequence[Mapping[str, float]]], metrics: Sequence[str], path: Path) -> None:
    """Draws the curves of several runs over each other, one picture per metric, each curve named where it ends.

    Args:
        logs: Rows of the runs' logs by the names to show; runs without a metric are left out of its picture.
        metrics: Columns of the logs.
        path: The PNG file.
    """
    height = max(3.4, 0.2 * len(logs) + 0.8)  # inches: room for all names
    figure = new_figure(10, height * len(metrics))
    grid = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    colors = require("matplotlib").colormaps["tab10"].colors
    styles = ("solid", "dashed", "dotted", "dashdot")  # once the colours are used up
    for axes, metric in zip(grid, metrics, strict=True):
        for index, (name, log) in enumerate(logs.items()):
            if _values(log, metric):
                style = styles[index // len(colors) % len(styles)]
                _plot(axes, log, metric, colors[index % len(colors)], shorten(name, LONGEST_RUN), linestyle=style)
        axes.set(xlabel="epoch", ylabel=AXIS_LABELS.get(metric, metric), ylim=_limits(logs.values(), metric))
        axes.margins(x=0)
        _tidy(axes)
    figure.draw_without_rendering()  # settles the limits and the heights, on which the places of the names depend
    for axes in grid:
        _name_ends(axes)
    _save(figure, path)


def _plot(
    axes: Any, log: Sequence[Mapping[str, float]], column: str, color: Any, label: str, linestyle: str = "solid"
) -> None:
    """Draws one column of a log; nothing if the log was written before there was such a column."""
    points = _values(log, column)
    if points:
        marker = "o" if len(points) == 1 else None  # a line through one point is invisible
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label, linestyle=linestyle)


def _values(log: Sequence[Mapping[str, float]], column: str) -> list[tuple[float, float]]:
    """Epochs and finite values of one column."""
    return [(row["epoch"], row[column]) for row in log if np.isfinite(row.get(column, np.nan))]


def _limits(logs: Iterable[Sequence[Mapping[str, float]]], column: str) -> tuple[float, float]:
    """Range of a metric over several runs; their first tenth, where all are bad, does not set the scale."""
    kept = [points[len(points) // 10 :] for log in logs if (points := _values(log, column))]
    values = [value for points in kept for _, value in points]
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1
    return min(values) - margin, max(values) + margin


def _name_ends(axes: Any) -> None:
    """Writes the name of every curve right of the axes, level with the curve's end or as near as there is room."""
    lines = axes.get_lines()
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    to_axes = axes.transData + axes.transAxes.inverted()
    levels = [to_axes.transform(end)[1] for end in ends]
    inches = axes.get_window_extent().height / axes.figure.dpi
    places = spread(levels, gap=1.25 * LABEL_SIZE / 72 / inches)
    for line, end, place in zip(lines, ends, places, strict=True):
        color = line.get_color()
        axes.annotate(
            line.get_label(),
            xy=end,
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            color=color,
            fontsize=LABEL_SIZE,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.7,
                "linestyle": "dotted",
                "relpos": (0, 0.5),  # from the middle of the name's left side
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
        axes.plot(*end, "o", color=color, markersize=3.5, clip_on=False)


def spread(levels: Sequence[float], gap: float) -> list[float]:
    """Moves heights in 0..1 apart, each as little as its neighbours allow, and keeps their order.

    Heights that are too close form a group, which lies around the mean of what its members asked for.
    """
    order = sorted(range(len(levels)), key=lambda index: levels[index])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _top(groups[-2], levels, gap) + gap > _bottom(groups[-1], levels, gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [0.0] * len(levels)
    for group in groups:
        for rank, index in enumerate(group):
            places[index] = _bottom(group, levels, gap) + rank * gap
    return places


def _bottom(group: Sequence[int], levels: Sequence[float], gap: float) -> float:
    """Height of the lowest member of a group, which stays within 0..1."""
    height = gap * (len(group) - 1)
    mean = sum(levels[index] for index in group) / len(group)
    return max(0.0, min(mean - height / 2, 1 - height))


def _top(group: Sequence[int], levels: Sequence[float], gap: float) -> float:
    """Height of the highest member of a group."""
    return _bottom(group, levels, gap) + gap * (len(group) - 1)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True, min_n_ticks=1))


def _save(figure: Any, path: Path, title: str | None = None) -> None:
    if title:
        width = int(11.5 * figure.get_figwidth())  # characters of this size
        figure.suptitle("\n".join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
