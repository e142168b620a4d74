"""Predictions of segmentors and detectors for image files: drawn on the images, and in files that others read.

In the output folder::

    drawn/<name>.png     the image with masks, or with boxes, names and scores
    labels/<name>.png    segmentation: class of every pixel, as a palette image of the file's own size
    predictions.json     segmentation: classes, and what share of each image they fill; detection: a list in the format
                         of COCO's results, with the image's name and the class's name besides
    predictions.png      a sheet of the first images

Where images have the same name in several folders, a number is added.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.config import SegmentationInferenceConfig
from zoo.data.dense import read_image, segmentation_resize
from zoo.draw import draw_detections
from zoo.engine.checkpoint import ModelCard
from zoo.engine.dense_evaluate import SegmentationPredictor, predict_boxes
from zoo.engine.dense_report import box_tile, color_mask, draw_sheet, enlarged, palette_of
from zoo.files import replacing
from zoo.heads.layers import resize
from zoo.optional import require

__all__ = ["detect_into", "segment_into"]

SHEET_COLUMNS = 4


def segment_into(
    output: Path,
    model: nn.Module,
    card: ModelCard,
    files: Sequence[Path],
    inference: SegmentationInferenceConfig | None = None,
    shown: int = 16,
) -> str:
    """Segments image files and writes what is listed above.

    Args:
        output: Folder for the results.
        model: A segmentor in evaluation mode.
        card: Its classes and preprocessing.
        files: Readable images, see :func:`zoo.engine.find_images`.
        inference: How images are predicted; default whole, at the size that the model was trained for.
        shown: Largest number of images on the sheet.

    Returns:
        A line that sums it up.
    """
    predict = SegmentationPredictor(model, card, inference or SegmentationInferenceConfig())
    side = round(min(card.preprocessing.size) / card.preprocessing.crop_pct)
    shrink, generator = segmentation_resize(side), np.random.default_rng(0)
    palette, names = palette_of(card.class_names), card.shown_names
    records, sheet = [], []
    for name, file in _named(files):
        image = read_image(file, card.preprocessing.in_chans)
        probabilities = predict(_tensor(shrink(image, None, generator)[0]).unsqueeze(0))
        labels = resize(probabilities, image.shape[:2]).argmax(1)[0].to(torch.uint8).cpu()
        _write_labels(labels, palette, _folder(output, "labels") / f"{name}.png")
        drawn = color_mask(_tensor(image), labels, palette)
        _write_picture(drawn, _folder(output, "drawn") / f"{name}.png")
        records.append({"file": str(file), "labels": f"labels/{name}.png", "shares": _shares(labels, names)})
        if len(sheet) < shown:
            sheet.append((drawn, labels))
    _write_json({"classes": list(names), "images": records}, output / "predictions.json")
    seen = sorted({int(label) for _, labels in sheet for label in labels.unique()})
    legend = [(names[label], palette[label]) for label in seen]
    rows = [[enlarged(drawn)] for drawn, _ in sheet]
    draw_sheet(rows, ("",), output / "predictions.png", _title(card, files, sheet), legend, SHEET_COLUMNS)
    return f"{card.model}: {len(files)} images segmented into {len(names)} classes"


def detect_into(
    output: Path,
    model: nn.Module,
    card: ModelCard,
    files: Sequence[Path],
    batch_size: int = 8,
    threshold: float = 0.5,
    shown: int = 16,
) -> str:
    """Finds objects in image files and writes what is listed above.

    Args:
        output: Folder for the results.
        model: A detector in evaluation mode.
        card: Its classes and preprocessing.
        files: Readable images, see :func:`zoo.engine.find_images`.
        batch_size: Images at a time.
        threshold: Objects of a lower score are not drawn; the list has them too.
        shown: Largest number of images on the sheet.

    Returns:
        A line that sums it up.
    """
    records, sheet, named, found = [], [], list(_named(files)), 0
    for start in range(0, len(named), batch_size):
        batch = named[start : start + batch_size]
        images = [_tensor(read_image(file, card.preprocessing.in_chans)) for _, file in batch]
        for offset, objects in enumerate(predict_boxes(model, images)):
            image, (name, file) = images[offset], batch[offset]
            drawn = draw_detections(image, objects, card.shown_names, threshold)
            _write_picture(drawn, _folder(output, "drawn") / f"{name}.png")
            records += _results(objects, start + offset + 1, file, card)
            found += int((objects["scores"] >= threshold).sum())
            if len(sheet) < shown:
                sheet.append([box_tile(image, objects, card.shown_names, threshold)])
    _write_json(records, output / "predictions.json")
    title = _title(card, files, sheet)
    draw_sheet(sheet, ("",), output / "predictions.png", title, blocks=SHEET_COLUMNS)
    return f"{card.model}: {found} objects with scores from {threshold} in {len(files)} images"


def _results(objects: dict[str, Tensor], image_id: int, file: Path, card: ModelCard) -> list[dict[str, Any]]:
    """Entries of COCO's results: categories count from 1, boxes are left, top, width, height."""
    records = []
    codes = _codes(objects["masks"]) if "masks" in objects else [None] * len(objects["boxes"])
    for box, label, score, code in zip(
        objects["boxes"].tolist(), objects["labels"].tolist(), objects["scores"].tolist(), codes, strict=True
    ):
        left, top, right, bottom = (round(side, 2) for side in box)
        records.append(
            {
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                "score": round(score, 5),
                **({"segmentation": code} if code else {}),
                "file_name": str(file),
                "category_name": card.shown_names[label],
            }
        )
    return records


def _codes(masks: Tensor) -> list[dict[str, Any]]:
    """Run-length codes of masks (N, 1, H, W)."""
    pixels = (masks.flatten(0, 1) > 0.5).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
    codes = require("pycocotools.mask", "det").encode(np.asfortranarray(pixels))
    return [{"size": code["size"], "counts": code["counts"].decode("ascii")} for code in codes]


def _named(files: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yields a name for the results of each file, and the file."""
    uses: Counter[str] = Counter()
    for file in files:
        uses[file.stem] += 1
        yield (file.stem if uses[file.stem] == 1 else f"{file.stem}-{uses[file.stem]}"), file


def _title(card: ModelCard, files: Sequence[Path], sheet: Sequence[Any]) -> str:
    first = "" if len(sheet) == len(files) else f" (the first {len(sheet)} are shown)"
    return f"{card.model}: {len(files)} images{first}"


def _shares(labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    counts = labels.flatten().bincount(minlength=len(names)) / labels.numel()
    return {names[label]: round(float(counts[label]), 4) for label in counts.argsort(descending=True) if counts[label]}


def _tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, C) to (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _folder(output: Path, name: str) -> Path:
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_labels(labels: Tensor, palette: Sequence[tuple[int, int, int]], path: Path) -> None:
    image = Image.fromarray(labels.numpy())
    image.putpalette([channel for color in palette for channel in color])
    with replacing(path) as temporary:
        image.save(temporary)


def _write_picture(picture: Tensor, path: Path) -> None:
    with replacing(path) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(temporary)


def _write_json(content: Any, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
