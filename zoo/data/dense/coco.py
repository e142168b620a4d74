"""Data sets for detection and instance segmentation in the format of COCO (arXiv 1405.0312).

A JSON file lists images, categories and annotations: a box (left, top, width, height) and polygons or run-length codes
of the mask. Labels count from 0 without gaps, in the order of the categories' numbers.
"""

import json
import logging
import math
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from zoo.data.dense.images import check_each, read_image, size_of_image
from zoo.data.files import NAMES_SHOWN, report_bad_files, why_unreadable
from zoo.optional import require

__all__ = ["DetectionData", "open_detection"]

_logger = logging.getLogger(__name__)

_PARTS = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}

Record = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class DetectionData(Dataset):
    """Images with boxes and, if asked for, masks.

    Annotations are few large arrays: worker processes would copy hundreds of thousands of Python objects.

    Attributes:
        files: Files of the images.
        sizes: Height and width of each image.
        image_ids: Number of each image in the JSON file.
        starts: Where the objects of each image start in the arrays below, and at last where they end.
        boxes: float32 (objects, 4): x1, y1, x2, y2 in pixels, inside the image.
        labels: int64 (objects,).
        areas: float32 (objects,): as annotated, NaN where it is not.
        crowds: int64 (objects,): 1 for regions with many objects that are not told apart, else 0.
        outlines: Polygons or codes of the masks, pickled image by image; None without masks.
        class_names: One name per label.
        in_chans: Channels of the images: 1 or 3.
    """

    files: Sequence[Path]
    sizes: Sequence[Size]
    image_ids: Sequence[int]
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    outlines: "_Pickles | None"
    class_names: tuple[str, ...]
    in_chans: int = 3

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Reads one image, uint8 (H, W, in_chans), and what is in it.

        The dictionary has ``boxes`` (n, 4), ``labels`` (n,), ``image_id`` (), ``area`` (n,), ``iscrowd`` (n,) and, for
        data with masks, ``masks``, uint8 (n, H, W) of zeros and ones.

        Raises:
            ValueError: If the image has been damaged since the data set was opened, or the code of a mask is broken;
                the message names the image.
        """
        size = self.sizes[index]
        image = read_image(self.files[index], self.in_chans, size)
        mine = slice(self.starts[index], self.starts[index + 1])
        boxes, area = self.boxes[mine].copy(), self.areas[mine]
        target = {"boxes": boxes, "labels": self.labels[mine].copy(), "image_id": np.array(self.image_ids[index])}
        measured = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        if self.outlines is not None:
            target["masks"] = _masks_of(self.outlines[index], size, self.files[index])
            measured = target["masks"].sum((1, 2))
        target["area"] = np.where(np.isnan(area), measured, area).astype(np.float32)
        return image, target | {"iscrowd": self.crowds[mine].copy()}

    def first(self, count: int | None) -> "DetectionData":
        """Returns the first ``count`` images; all of them for None."""
        lists = {name: getattr(self, name)[:count] for name in ("files", "sizes", "image_ids")}
        return replace(self, **lists)


def open_detection(
    root: str | Path,
    split: str,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    training: bool = False,
    masks: bool = True,
    class_names: Sequence[str] | None = None,
    keep_empty: bool = False,
    in_chans: int = 3,
    bad_files: str = "error",
) -> DetectionData:
    """Opens one split of a data set in COCO's format and checks its annotations and images: each image is read once.

    Boxes are clipped to their images; those of which nothing is left are left out. For training, crowds are left out,
    and then images without objects.

    Args:
        root: Folder of the data.
        split: Which part.
        annotations: The JSON file. Default: ``annotations/instances_<split>.json`` in ``root``.
        images: Folder that names of images are relative to. Default: ``images/<split>``, or if there is none
            ``<split>``, in ``root``.
        training: Whether the data is to be trained on, not evaluated on.
        masks: Whether masks are needed; if so, each annotation has to have one.
        class_names: Names of the classes in the order of their labels, as the training data has them. Default: those of
            the file's categories in the order of their numbers.
        keep_empty: Whether images without objects are trained on too.
        in_chans: 1 for grey images, 3 for RGB.
        bad_files: What becomes of annotations and images that cannot be used: ``error`` or ``skip``. These are images
            that are missing, cannot be read or have another size than the file says, and annotations of unknown images
            or categories, without a box or a mask.

    Raises:
        FileNotFoundError: If file or folder is not there.
        ModuleNotFoundError: If masks are asked for and pycocotools is missing.
        ValueError: If the file is not of this format, its classes are not those in ``class_names``, or something is
            bad under ``bad_files="error"``.
    """
    if masks:
        require("pycocotools", "det")  # before anything is read
    root = Path(root)
    file = Path(annotations) if annotations else root / "annotations" / f"instances_{split}.json"
    folder = Path(images) if images else _folder_of(root, split)
    content = _read_json(file)
    names, label_of = _classes_of(content["categories"], class_names, file)
    records = _by_id(content["images"], file)
    sizes = _check_images(records, folder, bad_files)
    if not sizes:
        raise ValueError(f"{file} names no image that is in {folder}")
    reasons = _problems(content["annotations"], records, sizes, label_of, masks)
    _report_bad_annotations(reasons, content["annotations"], file, bad_files)

    annotated = defaultdict(list)
    for number, annotation in enumerate(content["annotations"]):
        if number not in reasons and not (training and annotation.get("iscrowd")):
            annotated[annotation["image_id"]].append(annotation)
    objects = _clipped(annotated, sizes, file)
    if training and not keep_empty:
        objects = _without_empty(objects, file)
    return _packed(objects, records, sizes, folder, names, label_of, masks, in_chans)


class _Pickles:
    """A list whose items are made anew each time, out of one array."""

    def __init__(self, items: Sequence[Any]) -> None:
        parts = [pickle.dumps(item) for item in items]
        self.ends = np.cumsum([0, *map(len, parts)])
        self.content = np.frombuffer(b"".join(parts), np.uint8)

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self.content[self.ends[index] : self.ends[index + 1]])


def _folder_of(root: Path, split: str) -> Path:
    choices = (root / "images" / split, root / split)
    for folder in choices:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"there is neither {choices[0]} nor {choices[1]}; name the folder of the images")


def _read_json(file: Path) -> dict[str, list[Record]]:
    if not file.is_file():
        there = sorted(path.name for path in file.parent.glob("*.json"))[:NAMES_SHOWN]
        raise FileNotFoundError(f"there is no file {file}; found beside it: {', '.join(there) or 'nothing'}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON, or was cut off: {error}") from error
    for part, keys in _PARTS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{file} has no list {part!r}, so it is no file of COCO's format for detection")
        for number, entry in enumerate(entries):
            missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else keys
            if missing:
                raise ValueError(f"{file}: entry {number} of {part!r} has no {' and no '.join(map(repr, missing))}")
    return content


def _classes_of(
    categories: Sequence[Record], class_names: Sequence[str] | None, file: Path
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Names of the classes, and the label of every category."""
    categories = sorted(categories, key=lambda category: category["id"])
    names = tuple(category["name"] for category in categories)
    if class_names is None or tuple(class_names) == names:
        return names, {category["id"]: label for label, category in enumerate(categories)}
    labels = {name: label for label, name in enumerate(class_names)}
    strangers = [name for name in names if name not in labels]
    if strangers:
        raise ValueError(
            f"{file} has categories that are not known: {', '.join(strangers[:NAMES_SHOWN])}; known are: "
            f"{', '.join(list(labels)[:NAMES_SHOWN])}"
        )
    return tuple(class_names), {category["id"]: labels[category["name"]] for category in categories}


def _by_id(images: Sequence[Record], file: Path) -> dict[int, Record]:
    records = {}
    for record in images:
        key = record["id"]
        if not isinstance(key, int):
            raise ValueError(f"{file}: the image id {key!r} is not a whole number")
        if key in records:
            raise ValueError(f"{file}: {records[key]['file_name']} and {record['file_name']} have the same id {key}")
        records[key] = record
    return records


def _check_images(records: Mapping[int, Record], folder: Path, bad_files: str) -> dict[int, Size]:
    """Sizes of the images that can be used."""

    def check(record: Record) -> Size:
        path, stated = folder / record["file_name"], (record.get("height"), record.get("width"))
        size = size_of_image(path, tuple(map(int, stated)) if all(stated) else None)
        reason = why_unreadable(path)
        if reason:
            raise ValueError(reason)
        return size

    found, reasons = check_each(check, list(records.values()))
    names = [record["file_name"] for record in records.values()]
    report_bad_files({names[number]: why for number, why in reasons.items()}, len(names), folder, bad_files)
    return {key: size for key, size in zip(records, found, strict=True) if size is not None}


def _problems(
    annotations: Sequence[Record],
    records: Mapping[int, Record],
    sizes: Mapping[int, Size],
    label_of: Mapping[int, int],
    masks: bool,
) -> dict[int, str]:
    """What is wrong with annotations, by their number in the file."""

    def problem(annotation: Record) -> str | None:
        image, category, box = annotation["image_id"], annotation["category_id"], annotation.get("bbox")
        if image not in records:
            return f"there is no image {image}"
        if category not in label_of:
            return f"there is no category {category}"
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
            return f"its box {box} is not four finite numbers"
        return _outline_problem(annotation.get("segmentation"), sizes[image]) if masks and image in sizes else None

    found = ((number, problem(annotation)) for number, annotation in enumerate(annotations))
    return {number: reason for number, reason in found if reason}


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)


def _outline_problem(outline: Any, size: Size) -> str | None:
    if isinstance(outline, list):
        return None if _polygons(outline) else "its mask has no polygon of three corners or more"
    if not isinstance(outline, dict) or not {"size", "counts"} <= outline.keys():
        return "it has no mask"
    if tuple(outline["size"]) != size:
        return f"its mask is of the size {outline['size']}, its image of {list(size)} (height, width)"
    if isinstance(outline["counts"], list) and sum(outline["counts"]) != size[0] * size[1]:
        return f"its mask has {sum(outline['counts'])} pixels, its image {size[0] * size[1]}"
    return None


def _polygons(outline: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Those with three corners or more: pycocotools would take two corners for a box."""
    return [corners for corners in outline if len(corners) >= 6 and len(corners) % 2 == 0]


def _report_bad_annotations(
    reasons: Mapping[int, str], annotations: Sequence[Record], file: Path, bad_files: str
) -> None:
    if not reasons:
        return
    shown = list(reasons.items())[:NAMES_SHOWN]
    lines = [f"  annotation {annotations[number].get('id', number)}: {reason}" for number, reason in shown]
    if len(reasons) > NAMES_SHOWN:
        lines.append(f"  ... and {len(reasons) - NAMES_SHOWN} more")
    summary = f"{len(reasons)} of {len(annotations)} annotations in {file} cannot be used"
    if bad_files == "error":
        lines.append("correct them, or leave them out with data.bad_files=skip (--bad-files skip)")
        raise ValueError("\n".join([f"{summary}:", *lines]))
    _logger.warning("%s", "\n".join([f"{summary} and are left out:", *lines]))


Objects = dict[int, tuple[list[Record], np.ndarray]]  # annotations and boxes of every image


def _clipped(annotated: Mapping[int, list[Record]], sizes: Mapping[int, Size], file: Path) -> Objects:
    """Objects with boxes inside their images; those of which nothing is left are counted and left out."""
    objects, total, left = {}, 0, 0
    for key, (height, width) in sizes.items():
        annotations = annotated.get(key, [])
        boxes = np.array([annotation["bbox"] for annotation in annotations], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
        whole = (boxes[:, 2:] > boxes[:, :2]).all(1)
        objects[key] = [annotations[number] for number in np.flatnonzero(whole)], boxes[whole]
        total, left = total + len(whole), left + int(whole.sum())
    if left < total:
        _logger.warning("%d of %d boxes in %s have no area inside their images", total - left, total, file)
    return objects


def _without_empty(objects: Objects, file: Path) -> Objects:
    full = {key: found for key, found in objects.items() if found[0]}
    if not full:
        raise ValueError(f"no image in {file} has an object to train on")
    if len(full) < len(objects):
        _logger.warning("%d of %d images in %s have no objects", len(objects) - len(full), len(objects), file)
    return full


def _packed(
    objects: Objects,
    records: Mapping[int, Record],
    sizes: Mapping[int, Size],
    folder: Path,
    names: tuple[str, ...],
    label_of: Mapping[int, int],
    masks: bool,
    in_chans: int,
) -> DetectionData:
    annotations = [annotation for found, _ in objects.values() for annotation in found]
    outlines = [[annotation.get("segmentation") for annotation in found] for found, _ in objects.values()]
    return DetectionData(
        files=[folder / records[key]["file_name"] for key in objects],
        sizes=[sizes[key] for key in objects],
        image_ids=list(objects),
        starts=np.cumsum([0, *(len(found) for found, _ in objects.values())]),
        boxes=np.concatenate([boxes for _, boxes in objects.values()]),
        labels=np.array([label_of[annotation["category_id"]] for annotation in annotations], np.int64),
        areas=np.array([annotation.get("area", np.nan) for annotation in annotations], np.float32),
        crowds=np.array([annotation.get("iscrowd", 0) for annotation in annotations], np.int64),
        outlines=_Pickles(outlines) if masks else None,
        class_names=names,
        in_chans=in_chans,
    )


def _masks_of(outlines: Sequence[Any], size: Size, file: Path) -> np.ndarray:
    """Masks, uint8 (n, H, W); ValueError if a code is broken."""
    if not outlines:
        return np.zeros((0, *size), np.uint8)
    coder = require("pycocotools.mask", "det")
    try:
        codes = [_code_of(coder, outline, size) for outline in outlines]
        masks = np.ascontiguousarray(coder.decode(codes).transpose(2, 0, 1))
    except ValueError as error:
        raise ValueError(f"a mask in the annotations of {file} is broken: {error}") from error
    if masks.max() > 1:  # where a code ends too early, what was in memory before
        raise ValueError(f"a mask in the annotations of {file} is broken: its code is too short")
    return masks


def _code_of(coder: ModuleType, outline: Any, size: Size) -> Record:
    """The compressed run-length code of polygons, of a list of runs, or as it is."""
    if isinstance(outline, list):
        return coder.merge(coder.frPyObjects(_polygons(outline), *size))
    return coder.frPyObjects(outline, *size) if isinstance(outline["counts"], list) else outline
