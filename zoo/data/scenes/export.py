"""Fashion scenes as folders in the formats that detection, segmentation and multimodal training read.

======  ===========================================  ======================================================
format  pictures                                     ground truth
======  ===========================================  ======================================================
COCO    ``images/{train,val}/000001.png``            ``annotations/instances_{train,val}.json``
ADE     ``images/{training,validation}/000001.png``  ``annotations/{training,validation}/000001.png``
LLaVA   ``images/{train,val}/000001.png``            ``{train,val}.json``
======  ===========================================  ======================================================

A folder appears under its name once it is whole. It then holds ``scenes.json``, which says what was asked for: asked
again, the folder is used as it is. An interrupted export continues where it stopped: until then its pictures are in a
hidden folder beside the wanted one.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from zoo.data.scenes.compose import GENERATOR_VERSION, FashionScenes, Scene
from zoo.data.scenes.language import DESCRIBE, ITEM_NAMES
from zoo.files import replacing
from zoo.optional import require

__all__ = ["write_ade", "write_coco", "write_llava"]

_logger = logging.getLogger(__name__)

EXPORT_VERSION = 1  # to be raised whenever the same scenes are written differently
CARD = "scenes.json"


def write_coco(output: str | Path, train: FashionScenes, val: FashionScenes, workers: int = 0) -> Path:
    """Writes a folder in the format of COCO's instance annotations; needs pycocotools.

    Categories are numbered 1 to 10, images and annotations from 1. Masks are compressed run-length codes, as polygons
    could not hold what is left of an occluded item exactly.

    Args:
        output: The folder. Written by one process at a time.
        train: Training scenes.
        val: Validation scenes.
        workers: Processes that draw and write; 0 does it in this one.

    Returns:
        The folder.

    Raises:
        FileExistsError: If there is something else at ``output``.
        ModuleNotFoundError: If pycocotools or tqdm is missing.
    """
    require("pycocotools", "det")  # before anything is written
    return _write_once("coco", output, {"train": train, "val": val}, _write_coco_split, workers)


def write_ade(output: str | Path, train: FashionScenes, val: FashionScenes, workers: int = 0) -> Path:
    """Writes a folder for semantic segmentation in the layout of ADE20K.

    Like there, 0 in an annotation means not labelled, which no pixel of a scene is, and classes start from 1:
    background is 1, the ten kinds of items are 2 to 11. Readers that subtract one (``reduce_zero_label``) get the 11
    numbers of :attr:`Scene.semantic`.

    Arguments, result and errors are those of :func:`write_coco`.
    """
    return _write_once("ade", output, {"training": train, "validation": val}, _write_ade_split, workers)


def write_llava(output: str | Path, train: FashionScenes, val: FashionScenes, workers: int = 0) -> Path:
    """Writes conversations in the format of LLaVA's instruction data.

    Every caption and every question is a conversation of its own, with an id such as ``train-000001-count``: in one
    long conversation earlier answers would give later ones away. Names of images are relative to ``images``.

    Arguments, result and errors are those of :func:`write_coco`.
    """
    return _write_once("llava", output, {"train": train, "val": val}, _write_llava_split, workers)


def _write_once(
    kind: str,
    output: str | Path,
    splits: dict[str, FashionScenes],
    write_split: Callable[[Path, str, FashionScenes, int], None],
    workers: int,
) -> Path:
    """Writes the folder under a temporary name and renames it, unless it is there already."""
    output = Path(output)
    card = _card_of(kind, splits)
    if _is_there(output, card):
        _logger.info("%s holds these scenes already", output)
        return output
    partial = output.with_name(f".writing.{output.name}.{card['hash'][:12]}")
    partial.mkdir(parents=True, exist_ok=True)
    for split, scenes in splits.items():
        write_split(partial, split, scenes, workers)
    _write_json(card, partial / CARD, indent=2)
    if output.is_dir():
        output.rmdir()  # an empty one
    return partial.rename(output)


def _card_of(kind: str, splits: dict[str, FashionScenes]) -> dict[str, Any]:
    """What is in a folder; its hash covers everything that the files depend on."""
    facts = [EXPORT_VERSION, kind, {split: scenes.fingerprint for split, scenes in splits.items()}]
    return {
        "format": kind,
        "generator": GENERATOR_VERSION,
        "splits": {name: {"scenes": len(s), "size": s.size, "seed": s.seed} for name, s in splits.items()},
        "classes": list(ITEM_NAMES),
        "hash": hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    }


def _is_there(output: Path, card: dict[str, Any]) -> bool:
    """Whether the folder holds exactly these scenes; raises FileExistsError if it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / CARD).read_text())
        known = {key: found[key] for key in ("format", "generator", "splits")}
        same = found["hash"] == card["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{output} is not a folder of fashion scenes; choose another one") from None
    if not same:
        wanted = {key: card[key] for key in known}
        raise FileExistsError(
            f"{output} holds other scenes, {json.dumps(known)}, than those wanted, {json.dumps(wanted)}; "
            "remove it or choose another folder"
        )
    return True


@dataclass(frozen=True)
class _Writing(Dataset):
    """Writes scene ``index`` when it is asked for, and gives what the split's annotation file says about it."""

    scenes: FashionScenes
    write: Callable[[Path, str, int, Scene], Any]
    folder: Path
    split: str

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Any:
        return self.write(self.folder, self.split, index + 1, self.scenes[index])


def _write_all(writing: _Writing, workers: int) -> list[Any]:
    """Writes all scenes of a split; returns their records in order."""
    (writing.folder / "images" / writing.split).mkdir(parents=True, exist_ok=True)
    generator = torch.Generator()  # of its own, so that the caller's random numbers stay what they were
    loader = DataLoader(writing, batch_size=None, num_workers=workers, collate_fn=_unchanged, generator=generator)
    return list(require("tqdm").tqdm(loader, writing.split, unit="scene", disable=None, dynamic_ncols=True))


def _unchanged(record: Any) -> Any:
    return record


def _write_coco_split(folder: Path, split: str, scenes: FashionScenes, workers: int) -> None:
    per_image = _write_all(_Writing(scenes, _write_coco_scene, folder, split), workers)
    annotations = [annotation for annotations in per_image for annotation in annotations]
    for number, annotation in enumerate(annotations, 1):  # evaluation code takes 0 for no annotation
        annotation["id"] = number
    content = {
        "info": {"description": "Fashion scenes composed from Fashion-MNIST", "version": str(GENERATOR_VERSION)},
        "licenses": [{"id": 1, "name": "MIT", "url": "https://github.com/zalandoresearch/fashion-mnist"}],
        "images": [
            {"id": number, "file_name": _name(number), "width": scenes.size, "height": scenes.size, "license": 1}
            for number in range(1, len(scenes) + 1)
        ],
        "annotations": annotations,
        "categories": [
            {"id": label + 1, "name": name, "supercategory": "fashion"} for label, name in enumerate(ITEM_NAMES)
        ],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    _write_json(content, folder / "annotations" / f"instances_{split}.json")


def _write_coco_scene(folder: Path, split: str, number: int, scene: Scene) -> list[dict[str, Any]]:
    _write_png(scene.image, folder / "images" / split / _name(number))
    codes = require("pycocotools.mask", "det").encode(np.asfortranarray(scene.masks.transpose(1, 2, 0), np.uint8))
    return [
        {
            "image_id": number,
            "category_id": int(label) + 1,
            "bbox": [left, top, right - left, bottom - top],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
        }
        for label, (left, top, right, bottom), mask, code in zip(
            scene.labels, scene.boxes.tolist(), scene.masks, codes, strict=True
        )
    ]


def _write_ade_split(folder: Path, split: str, scenes: FashionScenes, workers: int) -> None:
    (folder / "annotations" / split).mkdir(parents=True, exist_ok=True)
    _write_all(_Writing(scenes, _write_ade_scene, folder, split), workers)


def _write_ade_scene(folder: Path, split: str, number: int, scene: Scene) -> None:
    _write_png(scene.image, folder / "images" / split / _name(number))
    _write_png(scene.semantic + 1, folder / "annotations" / split / _name(number))


def _write_llava_split(folder: Path, split: str, scenes: FashionScenes, workers: int) -> None:
    per_image = _write_all(_Writing(scenes, _write_llava_scene, folder, split), workers)
    _write_json([record for records in per_image for record in records], folder / f"{split}.json")


def _write_llava_scene(folder: Path, split: str, number: int, scene: Scene) -> list[dict[str, Any]]:
    _write_png(scene.image, folder / "images" / split / _name(number))
    turns = [("caption", DESCRIBE, scene.caption), *((q.kind, q.text, q.answer) for q in scene.questions)]
    return [
        {
            "id": f"{split}-{number:06d}-{kind}",
            "image": f"{split}/{_name(number)}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{text}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for kind, text, answer in turns
    ]


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _write_png(pixels: np.ndarray, path: Path) -> None:
    """Writes a picture unless it is there: it was whole, and of these very scenes, when it got its name."""
    if not path.exists():
        with replacing(path) as temporary:
            Image.fromarray(pixels).save(temporary, compress_level=1)  # a third of the time, a fifth larger


def _write_json(content: Any, path: Path, indent: int | None = None) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent))
