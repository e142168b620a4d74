"""Augmentation for dense tasks: what changes an image changes its mask, or its boxes and instance masks, too.

Each function builds a transform from albumentations' steps: a callable of an image, its target and a random generator,
which returns image and target. All randomness comes from that generator.

Images that shrink are averaged over areas, masks are sampled at the nearest pixel.
"""

import random
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from zoo.data.dense.images import IGNORED

__all__ = [
    "DenseTransform",
    "box_flip",
    "large_scale_jitter",
    "multi_scale_resize",
    "segmentation_augment",
    "segmentation_resize",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
LONGEST_ASPECT = 4  # longer side over shorter one: published recipes bound images of ADE20K by 2048 x 512 times a scale
SMALLEST_BOX = 1.0  # pixels; what is left of smaller boxes is not learnt

Target = dict[str, np.ndarray]


class DenseTransform(Protocol):
    """Changes an image, uint8 (H, W, C), and its target: a mask, uint8 (H, W), or a dictionary of boxes and more."""

    def __call__(self, image: np.ndarray, target: Any, generator: np.random.Generator) -> tuple[np.ndarray, Any]:
        """Returns the changed image and target; all random numbers come from the generator."""


def segmentation_augment(
    img_size: int | Sequence[int],
    base_size: int | None = None,
    scale: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    flip: float = 0.5,
    distort: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
) -> DenseTransform:
    """Training images of one size: scaled, cropped, mirrored, with other colours, padded below and to the right.

    Args:
        img_size: Height and width in pixels, or side.
        base_size: Length of the shorter side at scale 1. Default: the shorter one of ``img_size``.
        scale: Least and largest scale. The longer side never exceeds four times what the shorter one is scaled to.
        cat_max_ratio: How much of a crop one class may fill, 0 to 1; ten places are tried.
        flip: Probability of mirroring, left to right.
        distort: Whether brightness, contrast, saturation and hue change, each with probability one half.
        mean: Colour of the padding, for each channel, 0 to 1; of grey images the first. Masks are padded with 255.

    Raises:
        ModuleNotFoundError: If albumentations is missing.
        ValueError: If an argument is out of range.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not 0 < cat_max_ratio <= 1:
        raise ValueError(f"cat_max_ratio={cat_max_ratio} has to be above 0 and at most 1")
    sides = _lengths(base_size or min(height, width), scale)
    steps = _steps()
    library = steps.albumentations
    return _MaskTransform(
        library.Compose(
            [
                steps.RandomResize([(side, LONGEST_ASPECT * side) for side in sides]),
                steps.ClassLimitedCrop(height, width, cat_max_ratio),
                library.HorizontalFlip(p=flip),
                *(_distortion(library) if distort else ()),
                library.PadIfNeeded(height, width, position="top_left", fill=_bytes(mean), fill_mask=IGNORED),
            ]
        )
    )


def segmentation_resize(shorter_side: int, longest_side: int | None = None) -> DenseTransform:
    """Images to evaluate on, scaled to a length of the shorter side. Masks keep their size, in which scores count.

    Args:
        shorter_side: In pixels.
        longest_side: What the longer side may not exceed. Default: four times ``shorter_side``.

    Raises:
        ModuleNotFoundError: If albumentations is missing.
    """
    steps = _steps()
    resize = steps.RandomResize([(shorter_side, longest_side or LONGEST_ASPECT * shorter_side)])
    return _ImageTransform(steps.albumentations.Compose([resize]))


def box_flip(flip: float = 0.5) -> DenseTransform:
    """Training images for detectors, mirrored with a probability. Detectors resize their images themselves."""
    return _BoxTransform([_steps().albumentations.HorizontalFlip(p=flip)], crops=False)


def multi_scale_resize(
    shorter_sides: Sequence[int] = tuple(range(480, 801, 32)), longest_side: int = 1333, flip: float = 0.5
) -> DenseTransform:
    """Training images for detectors, mirrored and scaled to one of several lengths of the shorter side.

    A detector whose ``min_size`` is a list does the same on its device. This is for one whose image size is fixed.

    Args:
        shorter_sides: Lengths in pixels.
        longest_side: What the longer side may not exceed.
        flip: Probability of mirroring.

    Raises:
        ModuleNotFoundError: If albumentations is missing.
    """
    steps = _steps()
    resize = steps.RandomResize([(side, longest_side) for side in shorter_sides])
    return _BoxTransform([steps.albumentations.HorizontalFlip(p=flip), resize], crops=False)


def large_scale_jitter(
    img_size: int = 1024,
    scale: tuple[float, float] = (0.1, 2.0),
    flip: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
) -> DenseTransform:
    """Square training images for detectors: mirrored, scaled a lot, cropped and padded (arXiv 2012.07177).

    What a crop leaves of an object gets a new box where there are masks; objects of which it leaves nothing go.

    Args:
        img_size: Side of the square in pixels. Give the detector the same as ``min_size`` and ``max_size``.
        scale: Least and largest length of the image's longer side, relative to the square's.
        flip: Probability of mirroring.
        mean: Colour of the padding, for each channel, 0 to 1; of grey images the first. It is below and to the right.

    Raises:
        ModuleNotFoundError: If albumentations is missing.
        ValueError: If ``scale`` is out of range.
    """
    library = _steps().albumentations
    resize = library.LongestMaxSize(_lengths(img_size, scale), area_for_downscale="image")
    crop = library.RandomCrop(img_size, img_size, pad_if_needed=True, pad_position="top_left", fill=_bytes(mean))
    return _BoxTransform([library.HorizontalFlip(p=flip), resize, crop], crops=True)


class _ImageTransform:
    """Steps for images alone."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def __call__(self, image: np.ndarray, target: Any, generator: np.random.Generator) -> tuple[np.ndarray, Any]:
        _seed(self.steps, generator)
        return self.steps(image=image)["image"], target


class _MaskTransform:
    """Steps for images with masks."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def __call__(
        self, image: np.ndarray, target: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        _seed(self.steps, generator)
        changed = self.steps(image=image, mask=target)
        return changed["image"], changed["mask"]


class _BoxTransform:
    """Steps for images with boxes and, where there are, instance masks.

    Args:
        steps: What is done.
        crops: Whether it can cut parts of objects off, so that boxes are to be taken from masks.
    """

    def __init__(self, steps: Sequence[Any], crops: bool) -> None:
        library = _steps().albumentations
        boxes = library.BboxParams(
            "pascal_voc",
            label_fields=["numbers"],
            min_width=SMALLEST_BOX,
            min_height=SMALLEST_BOX,
            clip=True,
            filter_invalid_bboxes=True,
        )
        self.steps = library.Compose(steps, bbox_params=boxes)
        self.crops = crops

    def __call__(self, image: np.ndarray, target: Target, generator: np.random.Generator) -> tuple[np.ndarray, Target]:
        _seed(self.steps, generator)
        masks = target.get("masks")
        with_masks = masks is not None and len(masks) > 0
        given = {"image": image, "bboxes": target["boxes"], "numbers": np.arange(len(target["boxes"]))}
        changed = self.steps(**given, **({"masks": masks} if with_masks else {}))

        kept, boxes = np.array(changed["numbers"], int), np.array(changed["bboxes"], np.float32).reshape(-1, 4)
        target = {"image_id": target["image_id"], "labels": target["labels"][kept], "iscrowd": target["iscrowd"][kept]}
        if masks is None:
            return changed["image"], target | {"boxes": boxes, "area": (boxes[:, 2:] - boxes[:, :2]).prod(1)}
        masks = changed["masks"][kept] if with_masks else np.zeros((0, *changed["image"].shape[:2]), np.uint8)
        areas = np.count_nonzero(masks.view(bool), axis=(1, 2))
        if self.crops:
            boxes = _boxes_around(masks)
        target |= {"boxes": boxes, "masks": masks, "area": areas.astype(np.float32)}
        gone = areas == 0
        return changed["image"], _without(target, gone) if gone.any() else target


def _without(target: Target, gone: np.ndarray) -> Target:
    return {key: value if key == "image_id" else value[~gone] for key, value in target.items()}


def _boxes_around(masks: np.ndarray) -> np.ndarray:
    """Boxes, float32 (N, 4), from the first to past the last row and column of masks (N, H, W).

    torchvision's ``masks_to_boxes`` ends one pixel earlier, and takes longer than all else that is done to a sample.
    """
    ends = []
    for lines in (masks.view(bool).any(1), masks.view(bool).any(2)):  # columns, then rows
        ends.append((lines.argmax(1), lines.shape[1] - lines[:, ::-1].argmax(1)))
    (left, right), (top, bottom) = ends
    return np.stack([left, top, right, bottom], 1).astype(np.float32)


def _seed(steps: Any, generator: np.random.Generator) -> None:
    """One generator for all steps: ``set_random_seed`` would have each draw the same numbers as the others."""
    steps.set_random_state(generator, random.Random(int(generator.integers(2**63))))


def _steps() -> ModuleType:
    """The module that needs albumentations."""
    from zoo.data.dense import steps

    return steps


def _lengths(base: int, scale: tuple[float, float]) -> list[int]:
    """All whole numbers of pixels between the least and the largest scale."""
    least, largest = round(base * scale[0]), round(base * scale[1])
    if not 1 <= least <= largest:
        raise ValueError(f"scale={scale} makes {least} to {largest} of {base} pixels; give positive numbers in order")
    return list(range(least, largest + 1))


def _bytes(color: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(255 * value) for value in color)


def _distortion(library: ModuleType) -> list[Any]:
    """Changes of colour as large as SSD's (arXiv 1512.02325)."""
    unchanged = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    return [
        library.RandomBrightnessContrast(brightness_limit=32 / 255, contrast_limit=0, p=0.5),
        library.RandomBrightnessContrast(brightness_limit=0, contrast_limit=0.5, p=0.5),
        library.ColorJitter(**unchanged | {"saturation": (0.5, 1.5)}, p=0.5),
        library.ColorJitter(**unchanged | {"hue": (-0.1, 0.1)}, p=0.5),
    ]
