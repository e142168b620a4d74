"""What detectors learn from: boxes, labels and masks, checked before anything is computed with them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Target", "check_targets"]

Target = Mapping[str, Tensor]

TOLERANCE = 0.01  # pixels by which a box may leave its image: boxes are resized and flipped in float32


def check_targets(
    images: Sequence[Tensor], targets: Sequence[Target] | None, num_classes: int, with_masks: bool
) -> list[dict[str, Tensor]]:
    """What a detector learns from, after a check of it.

    Args:
        images: The images (C, H, W).
        targets: One for each image, as in the detectors' ``forward``.
        num_classes: Classes without background.
        with_masks: Whether masks are needed; else they are left out.

    Returns:
        For each image its float32 boxes, int64 labels and, where needed, masks.

    Raises:
        ValueError: If something is missing, of the wrong shape, out of range or outside its image.
    """
    if targets is None or len(targets) != len(images):
        given = "no targets" if targets is None else f"{len(targets)} targets"
        raise ValueError(f"got {given} for {len(images)} images; training needs one for each")
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        _check_shapes(_place(index, target), image, target, with_masks)
    _check_values(images, targets, num_classes)
    kept = ("boxes", "labels", "masks") if with_masks else ("boxes", "labels")
    return [{key: _converted(key, target[key]) for key in kept} for target in targets]


def _check_shapes(place: str, image: Tensor, target: Target, with_masks: bool) -> None:
    missing = [key for key in ("boxes", "labels", *(["masks"] if with_masks else [])) if key not in target]
    if missing:
        raise ValueError(f"{place} has no {' and no '.join(map(repr, missing))}; its target holds {sorted(target)}")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{place} has boxes of shape {tuple(boxes.shape)}; give (N, 4): x1, y1, x2, y2 of each")
    if labels.shape != boxes.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{place} has {len(boxes)} boxes and labels of shape {tuple(labels.shape)} and {labels.dtype}; give a "
            "whole number for each box"
        )
    expected = (len(boxes), *image.shape[-2:])
    if with_masks and tuple(target["masks"].shape) != expected:
        raise ValueError(
            f"{place} has masks of shape {tuple(target['masks'].shape)}; give one of the image's size for each box: "
            f"{expected}"
        )


def _check_values(images: Sequence[Tensor], targets: Sequence[Target], num_classes: int) -> None:
    """One question to the device for the whole batch; the details are looked up only if something is wrong."""
    boxes = torch.cat([target["boxes"] for target in targets]).float()
    labels = torch.cat([target["labels"] for target in targets])
    sides = [
        (image.shape[-1], image.shape[-2])
        for image, target in zip(images, targets, strict=True)
        for _ in range(len(target["boxes"]))
    ]
    limits = torch.tensor(sides, dtype=boxes.dtype, device=boxes.device).reshape(-1, 2)
    start, end = boxes[:, :2], boxes[:, 2:]
    flat = ~(end > start).all(1)  # NaN is caught too
    outside = ((start < -TOLERANCE) | (end > limits + TOLERANCE)).any(1)
    unknown = (labels < 0) | (labels >= num_classes)
    wrong = flat | outside | unknown
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0, 0])
    owners = [(i, box) for i, target in enumerate(targets) for box in range(len(target["boxes"]))]
    image, box = owners[first]
    what = f"{_place(image, targets[image])}, box {box}: "
    if unknown[first]:
        raise ValueError(f"{what}label {int(labels[first])} is not one of the classes 0 to {num_classes - 1}")
    corners = [round(side, 3) for side in boxes[first].tolist()]
    if flat[first]:
        raise ValueError(f"{what}{corners} has no area; x2 > x1 and y2 > y1 are needed, so drop such boxes")
    width, height = sides[first]
    raise ValueError(f"{what}{corners} leaves the image of {width} x {height} pixels; clip boxes to the image")


def _place(index: int, target: Target) -> str:
    known = f" (image_id {int(target['image_id'])})" if "image_id" in target else ""
    return f"image {index} of the batch{known}"


def _converted(key: str, value: Tensor) -> Tensor:
    return value.float() if key == "boxes" else value.long() if key == "labels" else value
