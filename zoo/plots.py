"""Sheets of labelled images, and what all pictures share. PNG files, no display needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.optional import require

__all__ = ["new_figure", "plot_images"]

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9822b", "#2e8b57", "#c0392b", "#888888"
DPI = 130


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
    figure = new_figure(max(1.45 * columns, 5), (1.3 + 0.17 * lines) * rows + 0.5)
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


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches that lays itself out; made without pyplot, so no window and no global state."""
    return require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
