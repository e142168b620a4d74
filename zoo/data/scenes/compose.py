"""Fashion scenes: pictures of several items on a textured canvas, with everything that is known about them.

Composed from the photos of Fashion-MNIST (arXiv 1708.07747), so that detection, segmentation and questions about
images can be trained on real shapes without a download and with exact ground truth.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from zoo.data.fashion_mnist import load_fashion_mnist
from zoo.data.scenes.canvas import draw_canvas
from zoo.data.scenes.cutouts import Cutouts
from zoo.data.scenes.language import COLORS, Question
from zoo.data.scenes.plan import Plan, draw_plan, further_questions

__all__ = ["GENERATOR_VERSION", "MIN_SIZE", "MIN_VISIBLE", "FashionScenes", "Scene"]

GENERATOR_VERSION = 1  # to be raised whenever the same arguments give other scenes
SPLITS = {"train": 0, "val": 1, "test": 2}
MIN_SIZE = 32
MIN_VISIBLE = 0.4  # of an item's pixels
ATTEMPTS = 50
SHADOW = 0.4  # brightness of the darkest parts of an item


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; n items, listed from back to front.

    Attributes:
        image: uint8 of shape (H, W, 3).
        semantic: Class of every pixel, uint8 of shape (H, W): 0 is background, 1 to 10 are the classes plus one.
        masks: Visible pixels of every item, bool of shape (n, H, W); they do not overlap.
        boxes: Tight around the visible pixels, float32 of shape (n, 4): left, top, right, bottom in pixels, where right
            and bottom are one past the last pixel.
        labels: Classes, int64 of shape (n,), 0 to 9.
        colors: Colour names, n of them.
        visible: Visible part of every item's pixels, float32 of shape (n,), at least ``MIN_VISIBLE``.
        caption: One to three sentences.
        questions: One to five questions of different kinds.
    """

    image: np.ndarray
    semantic: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    colors: tuple[str, ...]
    visible: np.ndarray
    caption: str
    questions: tuple[Question, ...]

    @property
    def further(self) -> tuple[Question, ...]:
        """All other questions about colours, corners and relations that have a single answer."""
        known = further_questions(self.labels.tolist(), self.colors, _centers_of(self.boxes, len(self.image)))
        return tuple(question for question in known if question not in self.questions)


class FashionScenes(Dataset):
    """A data set of composed scenes; a scene is drawn when it is asked for.

    Scene i depends on ``seed``, ``split``, i, ``size`` and the photos alone, and is the same on every machine.

    Args:
        split: ``train``, made of the 60,000 training photos, or ``val`` or ``test``, made of the 10,000 test photos;
            the scenes of ``val`` and ``test`` differ.
        count: Number of scenes.
        size: Side of the images in pixels, at least 32.
        seed: Another seed gives other scenes.
        root: Folder of the Fashion-MNIST files; see :func:`zoo.data.load_fashion_mnist`.
        download: Whether Fashion-MNIST may be downloaded if it is not found.
        items: Other photos to compose of: uint8 images (N, H, W), bright on black ground, and labels (N,) from 0 to 9.

    Raises:
        ValueError: For an unknown split, a size below 32, negative numbers, or items that cannot be used.
        FileNotFoundError: If Fashion-MNIST is nowhere.
    """

    def __init__(
        self,
        split: str,
        count: int,
        size: int = 256,
        seed: int = 0,
        root: str | Path | None = None,
        download: bool = True,
        items: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"fashion scenes have the splits {', '.join(SPLITS)}, got {split!r}")
        if size < MIN_SIZE:
            raise ValueError(f"size must be at least {MIN_SIZE} pixels, got {size}")
        if count < 0 or seed < 0:
            raise ValueError(f"count and seed must not be negative, got count {count} and seed {seed}")
        if items is None:
            photos = load_fashion_mnist(split, root, download)
            items = photos.images[:, 0].numpy(), photos.labels.numpy()
        self.split, self.count, self.size, self.seed = split, count, size, seed
        self.cutouts = Cutouts(*items)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        """Draws scene ``index``."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        seed = np.random.SeedSequence((self.seed, SPLITS[self.split], index))
        rng = np.random.Generator(np.random.PCG64(seed))
        plan = draw_plan(rng)
        while (placed := _place_items(rng, plan, self.size, self.cutouts)) is None:
            plan = draw_plan(rng)
        return _paint_scene(plan, *placed, draw_canvas(rng, self.size))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that the scenes depend on."""
        photos = hashlib.sha256(self.cutouts.pixels.tobytes())
        for numbers in self.cutouts.of_class:
            photos.update(numbers.astype("<i8").tobytes() + b"/")
        facts = [GENERATOR_VERSION, self.split, self.count, self.size, self.seed, photos.hexdigest()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class _Sprite:
    """An item at its place: ``window`` are its rows and columns in the image."""

    window: tuple[slice, slice]
    shade: np.ndarray
    opacity: np.ndarray


def _place_items(
    rng: np.random.Generator, plan: Plan, size: int, cutouts: Cutouts
) -> tuple[list[_Sprite], np.ndarray] | None:
    """Chooses photos until the visible pixels agree with the plan, smaller ones each time.

    Returns:
        The items and their masks (n, H, W). None if even small items do not fit, which happens in tiny images, where
        places are rounded coarsely.
    """
    shrink, indices = 1.0, range(len(plan.labels))
    for _ in range(ATTEMPTS):
        sprites = [_draw_sprite(rng, plan, item, shrink, size, cutouts) for item in indices]
        owner = np.full((size, size), -1, np.int8)  # the front item of every pixel
        for item, sprite in enumerate(sprites):
            owner[sprite.window][sprite.opacity >= 0.5] = item
        masks = owner == np.array(indices, np.int8)[:, None, None]
        visible = (_visible_parts(sprites, masks) >= MIN_VISIBLE).all()
        if visible and plan.holds_at(_centers_of(_boxes_of(masks), size)):
            return sprites, masks
        shrink *= 0.95
    return None


def _paint_scene(plan: Plan, sprites: list[_Sprite], masks: np.ndarray, canvas: np.ndarray) -> Scene:
    """Paints the items on the canvas, from back to front, and writes down what is where."""
    for sprite, color in zip(sprites, plan.colors, strict=True):
        _paint(canvas[sprite.window], sprite, COLORS[color])
    labels = np.array(plan.labels, np.int64)
    semantic = np.zeros(canvas.shape[:2], np.uint8)
    for mask, label in zip(masks, plan.labels, strict=True):
        semantic[mask] = label + 1
    return Scene(
        image=canvas,
        semantic=semantic,
        masks=masks,
        boxes=_boxes_of(masks).astype(np.float32),
        labels=labels,
        colors=plan.colors,
        visible=_visible_parts(sprites, masks).astype(np.float32),
        caption=plan.caption,
        questions=plan.questions,
    )


def _visible_parts(sprites: list[_Sprite], masks: np.ndarray) -> np.ndarray:
    """The part of every item's pixels that no other item covers, float64 (n,)."""
    totals = np.array([np.count_nonzero(sprite.opacity >= 0.5) for sprite in sprites])
    return masks.sum((1, 2)) / np.maximum(totals, 1)


def _draw_sprite(
    rng: np.random.Generator, plan: Plan, item: int, shrink: float, size: int, cutouts: Cutouts
) -> _Sprite:
    side = max(4, int(plan.sides[item] * shrink * size))
    shade, opacity = cutouts.draw(rng, plan.labels[item], side)
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    inner = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    shade, opacity = shade[inner], opacity[inner]
    window = []
    for length, center in zip(shade.shape, plan.centers[item, ::-1], strict=True):
        start = int(np.clip(np.floor(center * size - length / 2 + 0.5), 0, size - length))
        window.append(slice(start, start + length))
    return _Sprite(tuple(window), shade, opacity)


def _boxes_of(masks: np.ndarray) -> np.ndarray:
    """Tight boxes, int64 (n, 4), of masks (n, H, W) that are not empty."""
    size = np.array(masks.shape[1:])
    rows, columns = masks.any(2), masks.any(1)
    left, top = columns.argmax(1), rows.argmax(1)
    right, bottom = size[1] - columns[:, ::-1].argmax(1), size[0] - rows[:, ::-1].argmax(1)
    return np.stack([left, top, right, bottom], 1)


def _centers_of(boxes: np.ndarray, size: int) -> np.ndarray:
    """Middles of boxes in an image, as fractions of its side, (n, 2)."""
    return (boxes[:, :2] + boxes[:, 2:]) / (2 * size)


def _paint(ground: np.ndarray, sprite: _Sprite, color: tuple[int, int, int]) -> None:
    """Blends a tinted item into a window (h, w, 3) of the image, in place."""
    tinted = np.array(color) * (SHADOW + (1 - SHADOW) * sprite.shade[..., None])
    blended = ground + sprite.opacity[..., None] * (tinted - ground)
    ground[:] = np.floor(blended + 0.5).astype(np.uint8)
