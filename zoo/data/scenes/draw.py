"""Drawing many scenes, in processes of their own if wanted."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.scenes.compose import FashionScenes, Scene
from zoo.optional import require

__all__ = ["drawn"]

TOGETHER = 50  # scenes that a process draws before it sends them: each parcel costs about as much as a scene

Told = TypeVar("Told")


def drawn(scenes: FashionScenes, tell: Callable[[Scene], Told], workers: int = 0) -> Iterator[tuple[Tensor, Told]]:
    """Yields all scenes in order, with a progress bar on a terminal.

    Args:
        scenes: What is to be drawn.
        tell: What is kept of a scene beside its image; it runs where the scene is drawn.
        workers: Processes that draw; 0 draws in this one.

    Yields:
        The image, uint8 (H, W, 3), and what is told of it.
    """
    generator = torch.Generator()  # of its own, so that the caller's random numbers stay what they were
    parcels = DataLoader(
        _Parcels(scenes, tell), batch_size=None, num_workers=workers, collate_fn=_unchanged, generator=generator
    )
    bar = require("tqdm").tqdm(
        None, f"drawing {scenes.split} scenes", len(scenes), unit="scene", disable=None, dynamic_ncols=True, leave=False
    )
    with bar:
        for images, told in parcels:
            yield from zip(images, told, strict=True)
            bar.update(len(told))


class _Parcels(Dataset):
    """Scenes are drawn when they are asked for, some at a time."""

    def __init__(self, scenes: FashionScenes, tell: Callable[[Scene], Told]) -> None:
        self.scenes, self.tell = scenes, tell

    def __len__(self) -> int:
        return -(-len(self.scenes) // TOGETHER)

    def __getitem__(self, index: int) -> tuple[Tensor, list[Told]]:
        """Images (n, H, W, 3), and what is told of each."""
        numbers = range(len(self.scenes))[index * TOGETHER : (index + 1) * TOGETHER]
        scenes = [self.scenes[number] for number in numbers]
        return torch.from_numpy(np.stack([scene.image for scene in scenes])), [self.tell(scene) for scene in scenes]


def _unchanged(parcel: Any) -> Any:
    return parcel
