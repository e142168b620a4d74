"""Steps of augmentation that albumentations does not have. Importing this module needs albumentations."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.data.dense.images import IGNORED
from zoo.optional import require

__all__ = ["ClassLimitedCrop", "RandomResize", "albumentations"]

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the internet for its newest version
albumentations = require("albumentations", "seg")

_TRIES = 10


class RandomResize(albumentations.SmallestMaxSize):
    """Scales an image so that its shorter side has one of several lengths, drawn at random.

    Where images shrink, each new pixel is the mean of the area that it covers.

    Args:
        bounds: Pairs of the shorter side's length and of what the longer side may not exceed, in pixels: an image that
            would be longer is scaled less.
    """

    class InitSchema(albumentations.BasicTransform.InitSchema):
        bounds: Sequence[tuple[int, int]]

    def __init__(self, bounds: Sequence[tuple[int, int]], p: float = 1.0) -> None:
        super().__init__(max_size=[shorter for shorter, _ in bounds], area_for_downscale="image", p=p)
        self.bounds = list(bounds)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        shorter, longest = self.py_random.choice(self.bounds)
        height, width = params["shape"][:2]
        return {"scale": min(shorter / min(height, width), longest / max(height, width))}


class ClassLimitedCrop(albumentations.RandomCrop):
    """Cuts a window out at a random place where no class fills too much of it, if one of ten places is such.

    An image that is smaller than the window is kept whole in that direction.

    Args:
        height: Of the window.
        width: Of the window.
        max_share: How much of the pixels that count one class may fill, 0 to 1.
    """

    class InitSchema(albumentations.BasicTransform.InitSchema):
        height: int
        width: int
        max_share: float

    def __init__(self, height: int, width: int, max_share: float, p: float = 1.0) -> None:
        super().__init__(height=height, width=width, p=p)
        self.max_share = max_share

    @property
    def targets_as_params(self) -> list[str]:
        return ["mask"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        full_height, full_width = params["shape"][:2]
        height, width = min(self.height, full_height), min(self.width, full_width)
        for _ in range(_TRIES):
            top = self.py_random.randint(0, full_height - height)
            left = self.py_random.randint(0, full_width - width)
            window = data["mask"][top : top + height, left : left + width]
            if self.max_share >= 1 or _largest_share(window) <= self.max_share:
                break
        return {"crop_coords": (left, top, left + width, top + height), "pad_params": None}


def _largest_share(mask: np.ndarray) -> float:
    """The share of the most frequent class among the pixels that count; 1 if there are none."""
    counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0
