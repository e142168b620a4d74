"""Fashion scenes for segmentation and detection: drawn once, kept in memory, seen with masks or with boxes.

A scene of 256 pixels takes 4 ms to draw, longer than a small model on a GPU takes to learn from it; it is 0.26 MB then.
Items do not overlap, so one byte a pixel says which of them is seen there, and the masks of both tasks follow from it.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL.ImageColor import getrgb
from torch.utils.data import Dataset

from zoo.data.dense.classes import Colors
from zoo.data.scenes import ITEM_NAMES, FashionScenes, Scene, drawn
from zoo.draw import COLORS

__all__ = ["PALETTE", "SCENE_CLASSES", "DrawnScenes", "ScenesWithBoxes", "ScenesWithMasks", "draw_scenes"]

SCENE_CLASSES = ("background", *ITEM_NAMES)
PALETTE = ((0, 0, 0), *map(getrgb, COLORS))  # as detections are drawn
NOBODY = 255  # number of the item in a pixel of the background

Owned = tuple[np.ndarray, np.ndarray, np.ndarray]  # owners, boxes and labels of a scene


@dataclass(frozen=True, eq=False)
class DrawnScenes:
    """N scenes in memory.

    Attributes:
        images: uint8 (N, H, W, 3).
        owners: Number of the item that every pixel shows, 255 for none, uint8 (N, H, W).
        boxes: float32 (n, 4) of each scene.
        labels: int64 (n,) of each scene, 0 to 9.
    """

    images: np.ndarray
    owners: np.ndarray
    boxes: list[np.ndarray]
    labels: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image."""
        return [self.images.shape[1:3]] * len(self)

    def first(self, count: int | None) -> "DrawnScenes":
        """Returns the first ``count`` scenes; all of them for None."""
        return DrawnScenes(self.images[:count], self.owners[:count], self.boxes[:count], self.labels[:count])


@dataclass(frozen=True, eq=False)
class ScenesWithMasks(Dataset):
    """Scenes with the class of every pixel, as :class:`zoo.data.dense.SegmentationData` has them.

    Attributes:
        scenes: The scenes.
        class_names: Eleven: the background, then the items.
        palette: Red, green and blue of every label.
        in_chans: Channels of the images.
    """

    scenes: DrawnScenes
    class_names: tuple[str, ...] = SCENE_CLASSES
    palette: Colors = PALETTE
    in_chans: int = 3

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an image, uint8 (H, W, 3), and its mask, uint8 (H, W)."""
        label_of = np.zeros(256, np.uint8)
        labels = self.scenes.labels[index]
        label_of[: len(labels)] = labels + 1
        return self.scenes.images[index], label_of[self.scenes.owners[index]]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image."""
        return self.scenes.sizes

    def first(self, count: int | None) -> "ScenesWithMasks":
        """Returns the first ``count`` scenes; all of them for None."""
        return replace(self, scenes=self.scenes.first(count))


@dataclass(frozen=True, eq=False)
class ScenesWithBoxes(Dataset):
    """Scenes with boxes and masks of the items, as :class:`zoo.data.dense.DetectionData` has them.

    Attributes:
        scenes: The scenes.
        class_names: The ten items.
        in_chans: Channels of the images.
    """

    scenes: DrawnScenes
    class_names: tuple[str, ...] = ITEM_NAMES
    in_chans: int = 3

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns an image, uint8 (H, W, 3), and what is in it: boxes, labels, masks, areas, no crowds."""
        labels = self.scenes.labels[index]
        numbers = np.arange(len(labels), dtype=np.uint8)
        masks = (self.scenes.owners[index] == numbers[:, None, None]).view(np.uint8)
        return self.scenes.images[index], {
            "boxes": self.scenes.boxes[index].copy(),
            "labels": labels.copy(),
            "masks": masks,
            "image_id": np.array(index),
            "area": masks.sum((1, 2), dtype=np.float32),
            "iscrowd": np.zeros(len(labels), np.int64),
        }

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image."""
        return self.scenes.sizes

    def first(self, count: int | None) -> "ScenesWithBoxes":
        """Returns the first ``count`` scenes; all of them for None."""
        return replace(self, scenes=self.scenes.first(count))


def draw_scenes(scenes: FashionScenes, workers: int = 0) -> DrawnScenes:
    """Draws scenes into memory, with a progress bar on a terminal.

    Args:
        scenes: What is to be drawn.
        workers: Processes that draw; 0 draws in this one.

    Raises:
        ValueError: If there are no scenes.
    """
    count, side = len(scenes), scenes.size
    if not count:
        raise ValueError("there are no scenes to draw; give a count of at least 1")
    images = np.empty((count, side, side, 3), np.uint8)
    owners = np.empty((count, side, side), np.uint8)
    boxes, labels = [], []
    for index, (image, (owner, own_boxes, own_labels)) in enumerate(drawn(scenes, _owned, workers)):
        images[index], owners[index] = image.numpy(), owner
        boxes.append(own_boxes)
        labels.append(own_labels)
    images.setflags(write=False)  # a step of augmentation that worked in place would change later epochs
    owners.setflags(write=False)
    return DrawnScenes(images, owners, boxes, labels)


def _owned(scene: Scene) -> Owned:
    owners = np.full(scene.semantic.shape, NOBODY, np.uint8)
    for number, mask in enumerate(scene.masks):
        owners[mask] = number
    return owners, scene.boxes, scene.labels
