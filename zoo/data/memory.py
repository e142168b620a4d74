"""Small data sets held in memory as tensors, and a loader that cuts batches out of them on the training device.

Sixty thousand 28x28 images are 47 MB: kept on the device as bytes, a batch is one gather and no worker process is
needed. Augmentation of whole batches is in :mod:`zoo.data.augment`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.optional import require

__all__ = ["TensorData", "TensorLoader", "epoch_order", "load_digits"]


@dataclass(frozen=True)
class TensorData:
    """Labelled images in memory.

    Attributes:
        images: uint8 of shape (N, C, H, W).
        labels: int64 of shape (N,).
        class_names: One name per label.
        mean: Per-channel mean of the training images in 0..1.
        std: Per-channel standard deviation likewise.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> "TensorData":
        """Returns the first ``count`` images; all of them for None."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def resized(self, size: int) -> "TensorData":
        """Returns the same images resampled (bilinear) to ``size`` x ``size`` pixels."""
        if self.images.shape[-2:] == (size, size):
            return self
        images = F.interpolate(self.images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
        return replace(self, images=images.round().to(torch.uint8))


def load_digits(split: str) -> TensorData:
    """Loads scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels, 10 classes; nothing is downloaded.

    Every fifth scan of each class is a test image: 355 test and 1,442 training images, always the same.

    Args:
        split: ``train``, or ``val`` or ``test`` for the test images.

    Raises:
        ValueError: For another split.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"digits has the splits train and test (also called val), got {split!r}")
    bunch = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images).unsqueeze(1).mul(255 / 16).round().to(torch.uint8)  # (N, 1, 8, 8)
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        is_test[(labels == label).nonzero().flatten()[4::5]] = True
    chosen = ~is_test if split == "train" else is_test
    names = tuple(str(digit) for digit in range(10))
    return TensorData(images[chosen], labels[chosen], names, mean=(0.305,), std=(0.376,))


def epoch_order(
    count: int,
    training: bool,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    repeats: int = 1,
    shuffled: Callable[[torch.Generator], Tensor] | None = None,
) -> Tensor:
    """Indices (N,) that a process visits in an epoch: shuffled for training, else in order.

    Processes take interleaved shares of one order, so that what they see at a time together does not depend on their
    number. With repetitions the order has every image that it draws so many times in succession, as the indices
    ``image + count * copy``, and is no longer for it. ``shuffled`` draws an order of its own instead of any.
    """
    if training:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = shuffled(generator) if shuffled else torch.randperm(count, generator=generator)
    else:
        order = torch.arange(count)
    if repeats > 1:
        order = (order.unsqueeze(1) + count * torch.arange(repeats)).flatten()[:count]
    return order[rank::world_size]


class TensorLoader:
    """Iterates over batches of a :class:`TensorData` that lies on one device.

    The order of an epoch depends only on ``seed`` and the epoch number, so a resumed run sees the same batches. Several
    processes take interleaved shares of one order.

    Args:
        data: The images.
        batch_size: Images per batch and process.
        device: Where images and labels are kept.
        training: Shuffle, and leave out the incomplete last batch.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.
        repeats: How often an epoch has each image that it draws; it is no longer for it.

    Raises:
        ValueError: If training and there are fewer images than one batch per process needs.
    """

    def __init__(
        self,
        data: TensorData,
        batch_size: int,
        device: torch.device | str = "cpu",
        training: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
    ) -> None:
        if training and len(data) < batch_size * world_size:
            raise ValueError(
                f"{len(data)} training images do not fill one batch of {batch_size} on each of {world_size} processes; "
                "lower data.batch_size"
            )
        self.images = data.images.to(device)
        self.labels = data.labels.to(device)
        self.batch_size = batch_size
        self.training = training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.epoch, self.first_batch = 0, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the order of the next pass, and the batch that it starts with."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        if self.training:
            return len(self.labels) // (self.batch_size * self.world_size)
        share = len(range(self.rank, len(self.labels), self.world_size))
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields uint8 images of shape (B, C, H, W) and int64 labels of shape (B,)."""
        count = len(self.labels)
        order = epoch_order(count, self.training, self.seed, self.epoch, self.rank, self.world_size, self.repeats)
        share = (order % count).to(self.labels.device)
        for batch in share.split(self.batch_size)[self.first_batch : len(self)]:
            yield self.images[batch], self.labels[batch]
