"""A sheet of fashion scenes with all that is known about them."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.data.scenes.compose import Scene
from zoo.data.scenes.language import ITEM_NAMES
from zoo.plots import new_figure

__all__ = ["plot_scenes"]

OUTLINES = ("#00e5ff", "#ff2fd0", "#b4ff00", "#ffffff", "#ff8a00", "#ffe600")  # one per item of a scene
WIDTH = 50  # characters per line


def plot_scenes(scenes: Sequence[Scene], path: str | Path, columns: int = 4) -> None:
    """Draws boxes (dashed), outlines of masks, and class names over the images; caption and a question stand below.

    Args:
        scenes: At least one.
        path: The PNG file.
        columns: Scenes per row.
    """
    columns = min(columns, len(scenes))
    rows = -(-len(scenes) // columns)
    figure = new_figure(2.4 * columns, 3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (number, scene) in zip(grid.flat, enumerate(scenes), strict=False):
        height, width = scene.semantic.shape
        axes.imshow(scene.image, extent=(0, width, height, 0))
        for box, label, mask, color in zip(scene.boxes, scene.labels, scene.masks, OUTLINES, strict=False):
            _draw_item(axes, box, int(label), mask, color)
        question = scene.questions[number % len(scene.questions)]
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        text = f"{textwrap.fill(scene.caption, WIDTH)}\n{question.text} {question.answer}"
        axes.set_xlabel(text, loc="left", multialignment="left", fontsize=6.5)
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    """Saves with 256 colours, dithered: a third of the size, and enough for a look."""
    sheet = io.BytesIO()
    figure.savefig(sheet, dpi=110)
    with Image.open(sheet) as image:
        pixels = image.convert("RGB")
    pixels.quantize(palette=pixels.quantize(256)).save(path, optimize=True)


def _draw_item(axes: Any, box: np.ndarray, label: int, mask: np.ndarray, color: str) -> None:
    left, top, right, bottom = box.tolist()
    height, width = mask.shape
    axes.contour(np.arange(width) + 0.5, np.arange(height) + 0.5, mask, levels=[0.5], colors=[color], linewidths=1.1)
    frame = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axes.plot(*frame, color=color, linewidth=0.8, linestyle=(0, (3, 2)))
    tag = dict(facecolor="black", edgecolor="none", alpha=0.65, pad=0.8)
    axes.text(left, top, ITEM_NAMES[label], color=color, fontsize=6, verticalalignment="bottom", bbox=tag)
