"""What runs of segmentation and detection show: sheets of predictions beside the truth, and scores of every class.

In the run's folder::

    predictions.png    some validation images with truth and prediction; of the newest weights while the run trains,
                       of the best ones when it is finished
    classes.csv        intersection over union, or average precision, of every class; of the best weights
    confusion.png      segmentation: share of every true class that was taken for every class, in pixels
"""

import csv
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zoo.data.dense import IGNORED
from zoo.data.dense.classes import ADE20K, ADE20K_COLORS, CITYSCAPES, CITYSCAPES_COLORS, Colors, distinct_colors
from zoo.data.scenes_data import PALETTE, SCENE_CLASSES
from zoo.draw import draw_detections
from zoo.engine.dense_evaluate import Gallery
from zoo.engine.dense_metrics import DetectionScores, SegmentationScores
from zoo.files import replacing

__all__ = [
    "attempt",
    "box_tile",
    "class_ap_rows",
    "class_iou_rows",
    "color_mask",
    "draw_box_sheet",
    "draw_mask_sheet",
    "draw_sheet",
    "enlarged",
    "palette_of",
    "write_rows",
]

_logger = logging.getLogger(__name__)

TILE = 288  # pixels of a picture's longer side on a sheet
GAP, LINE, FONT_SIZE = 6, 20, 14
OPACITY = 0.7  # of masks
UNLABELLED = (255, 255, 255)


def attempt(what: str, make: Callable[[], None]) -> None:
    """Makes something, or says why it could not be made: a run is worth more than its pictures."""
    try:
        make()
    except Exception as error:  # drawing and writing can fail in many ways
        _logger.warning("Not made: %s (%s); training is not affected", what, error)


def palette_of(class_names: Sequence[str]) -> Colors:
    """Colours of the classes: a data set's own, or distinct ones."""
    known = {ADE20K: ADE20K_COLORS, CITYSCAPES: CITYSCAPES_COLORS, SCENE_CLASSES: PALETTE}
    return known.get(tuple(class_names)) or distinct_colors(len(class_names))


def color_mask(image: Tensor, mask: Tensor, palette: Colors, opacity: float = OPACITY) -> Tensor:
    """Paints the classes of pixels over an image.

    Args:
        image: uint8 (1 or 3, H, W).
        mask: Labels (H, W); 255 is painted white. Black, the background of most palettes, is not painted.
        palette: Red, green and blue of every label.
        opacity: How much of the image is covered, 0 to 1.

    Returns:
        uint8 (3, H, W).
    """
    table = torch.tensor([*palette, *[UNLABELLED] * (IGNORED + 1 - len(palette))], dtype=torch.float32)
    colors = table[mask.long()].permute(2, 0, 1)  # (3, H, W)
    image = image.expand(3, -1, -1).float()
    painted = torch.lerp(image, colors, opacity)
    return torch.where(colors.sum(0) > 0, painted, image).round().to(torch.uint8)


def draw_mask_sheet(gallery: Gallery, class_names: Sequence[str], path: Path, title: str) -> None:
    """Draws images beside their true and predicted masks, with the names of the classes that are seen."""
    palette = palette_of(class_names)
    masks = [mask for _, *both in gallery.samples for mask in both]
    seen = sorted({label for mask in masks for label in mask.unique().tolist()} - {IGNORED})
    rows = []
    for image, truth, labels in gallery.samples:
        image = image if image.shape[-2:] == truth.shape else _resized(image, truth.shape, "bilinear")
        pictures = (image.expand(3, -1, -1), color_mask(image, truth, palette), color_mask(image, labels, palette))
        rows.append([enlarged(picture) for picture in pictures])
    legend = [(class_names[label], palette[label]) for label in seen]
    draw_sheet(rows, ("image", "truth", "prediction"), path, title, legend)


def draw_box_sheet(
    gallery: Gallery, class_names: Sequence[str], path: Path, title: str, threshold: float = 0.5
) -> None:
    """Draws images with true and with found objects, those whose score reaches the threshold."""
    rows = [
        [box_tile(image, objects, class_names, threshold) for objects in (truth, found)]
        for image, truth, found in gallery.samples
    ]
    draw_sheet(rows, ("truth", f"prediction (scores from {threshold})"), path, title)


def draw_sheet(
    rows: Sequence[Sequence[Tensor]],
    headings: Sequence[str],
    path: Path,
    title: str,
    legend: Iterable[tuple[str, tuple[int, int, int]]] = (),
    blocks: int = 2,
) -> None:
    """Draws rows of pictures.

    Args:
        rows: Pictures, uint8 (3, H, W) of at most ``TILE`` pixels.
        headings: What the pictures of a row are.
        path: The PNG file, which appears once it is whole.
        title: Line above.
        legend: Names and their colours, below the title.
        blocks: Rows side by side.
    """
    blocks = min(blocks, len(rows))
    heights = [max(p.shape[1] for r in rows[i : i + blocks] for p in r) for i in range(0, len(rows), blocks)]
    width = blocks * (len(headings) * (TILE + GAP) + GAP) + GAP
    entries, legend_lines = _place_legend(list(legend), width)
    top = GAP + LINE * (1 + legend_lines + any(headings))
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP * len(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    draw.text((GAP, GAP), title, "black", font)
    for x, line, name, color in entries:
        y = GAP + LINE * (1 + line)
        draw.rectangle((x, y + 3, x + FONT_SIZE, y + 3 + FONT_SIZE), color, "black")
        draw.text((x + FONT_SIZE + 4, y + 2), name, "black", font)
    for block in range(blocks):
        for column, heading in enumerate(headings):
            draw.text((_left(block, column, headings), top - LINE), heading, "black", font)
    for index, row in enumerate(rows):
        y = top + sum(heights[: index // blocks]) + GAP * (index // blocks)
        for column, picture in enumerate(row):
            sheet.paste(_to_image(picture), (_left(index % blocks, column, headings), y))
    with replacing(path) as temporary:
        sheet.save(temporary)


def _left(block: int, column: int, headings: Sequence[str]) -> int:
    return GAP + block * (len(headings) * (TILE + GAP) + GAP) + column * (TILE + GAP)


def _place_legend(
    legend: Sequence[tuple[str, tuple[int, int, int]]], width: int
) -> tuple[list[tuple[int, int, str, tuple[int, int, int]]], int]:
    """Left edge, line, name and colour of every entry, and the number of lines."""
    font, entries, x, line = ImageFont.load_default(FONT_SIZE), [], GAP, 0
    for name, color in legend:
        needed = FONT_SIZE + 4 + int(font.getlength(name)) + 2 * GAP
        if x > GAP and x + needed > width:
            x, line = GAP, line + 1
        entries.append((x, line, name, color))
        x += needed
    return entries, line + 1 if entries else 0


def enlarged(picture: Tensor, longest: int = TILE) -> Tensor:
    """A picture, uint8 (C, H, W), whose longer side has so many pixels."""
    scale = longest / max(picture.shape[-2:])
    size = [max(round(side * scale), 1) for side in picture.shape[-2:]]
    return _resized(picture, size, "bilinear" if scale < 1 else "nearest")


def box_tile(image: Tensor, objects: Mapping[str, Tensor], class_names: Sequence[str], threshold: float) -> Tensor:
    """An image with objects, uint8 (3, H, W), of the size of a tile: so names are as large on all of them."""
    return draw_detections(*_enlarged_boxes(image.cpu(), objects), class_names, threshold)


def _enlarged_boxes(image: Tensor, objects: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    picture = enlarged(image)
    height, width = picture.shape[-2:]
    factors = torch.tensor([width / image.shape[-1], height / image.shape[-2]] * 2)
    drawn = {key: objects[key] for key in ("labels", "scores") if key in objects}
    drawn["boxes"] = objects["boxes"].float().cpu() * factors
    if "masks" in objects:
        masks = objects["masks"].float().reshape(-1, 1, *image.shape[-2:])
        drawn["masks"] = F.interpolate(masks, (height, width), mode="nearest").squeeze(1)
    return picture, drawn


def _resized(picture: Tensor, size: Sequence[int], mode: str) -> Tensor:
    options = {"antialias": True} if mode == "bilinear" else {}
    resized = F.interpolate(picture.float().unsqueeze(0), tuple(size), mode=mode, **options)
    return resized.squeeze(0).round().clamp(0, 255).to(torch.uint8)


def _to_image(picture: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))


def class_iou_rows(scores: SegmentationScores, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Share of pixels, intersection over union and accuracy of every class in percent; empty where it has no pixel."""
    confusion = scores.confusion.compute().cpu().double()
    found = confusion.sum(1)
    shares, accuracies = found / found.sum(), confusion.diagonal() / found
    columns = zip(class_names, shares.tolist(), scores.class_iou(), accuracies.tolist(), strict=True)
    return [
        {"class": name, "pixels": _percent(share), "iou": _percent(iou), "accuracy": _percent(accuracy)}
        for name, share, iou, accuracy in columns
    ]


def class_ap_rows(scores: DetectionScores, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Number of objects and average precision of every class in percent; empty where there are none."""
    found = scores.class_scores()
    rows = []
    for label, name in enumerate(class_names):
        own = found.get(label, {})
        precisions = {f"{kind}_ap": _percent(own.get(f"{kind}_ap", math.nan)) for kind in scores.kinds.values()}
        rows.append({"class": name, "objects": own.get("objects", 0), **precisions})
    return rows


def _percent(share: float) -> str:
    return "" if share != share else f"{100 * share:.2f}"


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a CSV file, a line for each row, which appears once it is whole."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
