"""Data sets for semantic segmentation: an image and a mask, which holds the label of every pixel.

==============  ==================================================  ===================================================
name            images                                              masks
==============  ==================================================  ===================================================
``ade20k``      ``images/<split>/*.jpg``                            ``annotations/<split>/*.png``: 0 is not labelled,
                                                                    classes count from 1
``cityscapes``  ``leftImg8bit/<split>/<city>/*_leftImg8bit.png``    ``gtFine/<split>/<city>/*_gtFine_labelTrainIds.png``
                                                                    where there is one, else ``*_gtFine_labelIds.png``
``voc``         ``JPEGImages/*.jpg`` that                           ``SegmentationClass/*.png``
                ``ImageSets/Segmentation/<split>.txt`` names
``folder``      ``images/<split>/*``                                ``masks/<split>/*`` of the same names but for the
                                                                    ending; names of classes may be in ``classes.txt``
==============  ==================================================  ===================================================

In all of them 255 stands for pixels that do not count. Masks are grey or palette images.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from zoo.data.dense import classes
from zoo.data.dense.images import IGNORED, check_each, read_image, read_labels, size_of_image
from zoo.data.files import NAMES_SHOWN, report_bad_files, why_unreadable

__all__ = ["SegmentationData", "open_segmentation"]

_logger = logging.getLogger(__name__)

_ADE20K_SPLITS = {"train": "training", "val": "validation"}
_CITYSCAPES_IMAGE = "_leftImg8bit"
_CITYSCAPES_LABELS = "_gtFine_labelIds"
_CITYSCAPES_TRAINED = "_gtFine_labelTrainIds"

Paths = dict[str, Path]  # by what an image and its mask have in common


@dataclass(frozen=True)
class SegmentationData(Dataset):
    """Images with masks.

    Attributes:
        images: Files of the images.
        masks: Files of their masks.
        tables: How values in each mask are read, see :func:`zoo.data.dense.images.read_labels`.
        sizes: Height and width of each image.
        class_names: One name per label.
        palette: Red, green and blue of every label, 0 to 255.
        in_chans: Channels of the images: 1 or 3.
    """

    images: Sequence[Path]
    masks: Sequence[Path]
    tables: Sequence[np.ndarray]
    sizes: Sequence[tuple[int, int]]
    class_names: tuple[str, ...]
    palette: classes.Colors
    in_chans: int = 3

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads one image, uint8 (H, W, in_chans), and its mask, uint8 (H, W).

        Raises:
            ValueError: If a file has been damaged since the data set was opened; the message names it.
        """
        mask = read_labels(self.masks[index], self.tables[index])
        return read_image(self.images[index], self.in_chans, mask.shape), mask

    def first(self, count: int | None) -> "SegmentationData":
        """Returns the first ``count`` images; all of them for None."""
        lists = {name: getattr(self, name)[:count] for name in ("images", "masks", "tables", "sizes")}
        return replace(self, **lists)


def open_segmentation(
    name: str,
    root: str | Path,
    split: str,
    class_names: Sequence[str] | None = None,
    in_chans: int = 3,
    bad_files: str = "error",
) -> SegmentationData:
    """Opens one split of a data set for semantic segmentation and checks its files: each is read once.

    Args:
        name: ``ade20k``, ``cityscapes``, ``voc`` or ``folder``; the layouts are described above.
        root: Folder of the data.
        split: Which part; for ``ade20k``, ``train`` and ``val`` mean ``training`` and ``validation``.
        class_names: Names of the classes in the order of their labels, for data of one's own in one of these layouts.
            Default: those of the data set; for ``folder`` the lines of ``classes.txt``, or without it the labels in
            this split as names. Pass the training data's to the other splits.
        in_chans: 1 for grey images, 3 for RGB.
        bad_files: What becomes of images that cannot be used: ``error`` or ``skip``. These are images and masks that
            are missing, cannot be read, differ in size, or hold labels that are no classes.

    Raises:
        FileNotFoundError: If a folder or list of files is not there; the message lists what is.
        ValueError: For an unknown name, classes that do not fit, or bad files under ``bad_files="error"``.
    """
    if name not in _FIND:
        raise ValueError(f"unknown segmentation data {name!r}; use one of {', '.join(_FIND)}")
    if name == "cityscapes" and tuple(class_names or classes.CITYSCAPES) != classes.CITYSCAPES:
        raise ValueError("cityscapes has classes of its own; leave class_names out, or use data of the kind folder")
    root = Path(root)
    images, masks = _FIND[name](root, split)
    names = tuple(class_names or _names_of(name, root))
    tables = _tables_of(name, masks, len(names) or IGNORED)

    keys = [key for key in images if key in masks]
    found, reasons = check_each(lambda key: _check(images[key], masks[key], tables[key]), keys)
    problems = {images[key]: "it has no mask" for key in images if key not in masks}
    problems |= {masks[key]: "it is the mask of no image" for key in masks if key not in images}
    problems |= {images[keys[number]]: reason for number, reason in reasons.items()}
    problems = {str(path.relative_to(root)): reason for path, reason in problems.items()}
    report_bad_files(problems, len(images.keys() | masks.keys()), root, bad_files, "images", "cannot be used")
    good = [(key, *facts) for key, facts in zip(keys, found, strict=True) if facts is not None]
    if not good:
        raise ValueError(f"{root} has no image with a mask in the split {split!r}")

    largest = max(label for _, _, label in good)
    names = names or tuple(str(label) for label in range(largest + 1))
    if largest < 1:
        _report_one_label(root, names)
    return SegmentationData(
        images=[images[key] for key, *_ in good],
        masks=[masks[key] for key, *_ in good],
        tables=[tables[key] for key, *_ in good],
        sizes=[size for _, size, _ in good],
        class_names=names,
        palette=_palette_of(name, names),
        in_chans=in_chans,
    )


def _check(image: Path, mask: Path, table: np.ndarray) -> tuple[tuple[int, int], int]:
    """Size of an image and the largest label in its mask, -1 if no pixel counts; ValueError if they cannot be used."""
    labels = read_labels(mask, table)
    size = size_of_image(image, labels.shape)
    reason = why_unreadable(image)
    if reason:
        raise ValueError(reason)
    counted = labels[labels != IGNORED]
    return size, int(counted.max()) if counted.size else -1


def _report_one_label(root: Path, names: Sequence[str]) -> None:
    text = f"no mask in {root} has a label above 0, and {IGNORED} stands for pixels that do not count"
    if len(names) < 2:
        raise ValueError(f"{text}; if {IGNORED} is meant to be a class, write it as 1")
    _logger.warning("%s; if it is meant to be a class, write it as 1", text)


def _find_in_folders(images: str, masks: str, splits: Mapping[str, str], root: Path, split: str) -> tuple[Paths, Paths]:
    split = splits.get(split, split)
    return _files(root / images / split), _files(root / masks / split)


def _find_cityscapes(root: Path, split: str) -> tuple[Paths, Paths]:
    annotations = root / "gtFine" / split
    masks = {**_files(annotations, _CITYSCAPES_LABELS), **_files(annotations, _CITYSCAPES_TRAINED)}
    return _files(root / "leftImg8bit" / split, _CITYSCAPES_IMAGE), masks


def _find_voc(root: Path, split: str) -> tuple[Paths, Paths]:
    lists = root / "ImageSets" / "Segmentation"
    listed = lists / f"{split}.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"there is no list of images {listed}; {_contents(lists)}")
    names = listed.read_text().split()
    images = {name: root / "JPEGImages" / f"{name}.jpg" for name in names}
    return images, {name: root / "SegmentationClass" / f"{name}.png" for name in names}


_FIND: dict[str, Callable[[Path, str], tuple[Paths, Paths]]] = {
    "ade20k": partial(_find_in_folders, "images", "annotations", _ADE20K_SPLITS),
    "cityscapes": _find_cityscapes,
    "voc": _find_voc,
    "folder": partial(_find_in_folders, "images", "masks", {}),
}


def _files(folder: Path, ending: str = "") -> Paths:
    """The files below a folder whose names end so before the dot, by the part of their paths before that."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; {_contents(folder.parent)}")
    found: Paths = {}
    for path in sorted(folder.rglob(f"*{ending}.*")):
        key = str(path.relative_to(folder).with_suffix("")).removesuffix(ending)
        if not path.is_file() or path.name.startswith("."):
            continue
        if key in found:
            raise ValueError(f"{found[key]} and {path.name} have the same name but for the ending; remove one")
        found[key] = path
    return found


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor is there {folder}"
    names = sorted(child.name for child in folder.iterdir())[:NAMES_SHOWN]
    return f"found in {folder}: {', '.join(names) or 'nothing'}"


def _names_of(name: str, root: Path) -> tuple[str, ...]:
    """The classes of a data set; none if only its masks can tell."""
    if name != "folder":
        return {"ade20k": classes.ADE20K, "cityscapes": classes.CITYSCAPES, "voc": classes.VOC}[name]
    listed = root / "classes.txt"
    return tuple(filter(None, map(str.strip, listed.read_text().splitlines()))) if listed.is_file() else ()


def _palette_of(name: str, names: Sequence[str]) -> classes.Colors:
    own = {"ade20k": classes.ADE20K_COLORS, "cityscapes": classes.CITYSCAPES_COLORS}.get(name, ())
    return own if len(own) == len(names) else classes.distinct_colors(len(names))


def _tables_of(name: str, masks: Paths, num_classes: int) -> dict[str, np.ndarray]:
    """How values in every mask are read, see :func:`zoo.data.dense.images.read_labels`."""
    if name == "ade20k":
        table = _table_of({0: IGNORED, **{label + 1: label for label in range(num_classes)}})
    else:
        table = _table_of({label: label for label in range(num_classes)})
    if name != "cityscapes":
        return dict.fromkeys(masks, table)
    of_ids = _table_of(classes.CITYSCAPES_LABELS)
    return {key: of_ids if path.stem.endswith(_CITYSCAPES_LABELS) else table for key, path in masks.items()}


def _table_of(labels: Mapping[int, int]) -> np.ndarray:
    if max(labels) >= IGNORED:
        raise ValueError(f"there are too many classes: masks hold bytes, of which {IGNORED} stands for no class")
    table = np.full(257, -1, np.int16)
    table[list(labels)] = list(labels.values())
    table[IGNORED] = IGNORED
    return table
