"""Batches of images with masks or boxes, the same whatever the number of worker processes.

The order depends only on seed and epoch, and the processes of a distributed run take interleaved shares of it. The
random numbers of an image depend on these and on its index, not on who reads it.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.dense.transforms import DenseTransform
from zoo.data.memory import epoch_order

__all__ = ["AugmentedData", "DenseLoader", "make_dense_loader"]

BoxTarget = dict[str, Tensor]


def make_dense_loader(
    dataset: Dataset,
    batch_size: int,
    training: bool = False,
    transform: DenseTransform | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> "DenseLoader":
    """Builds the loader of a data set for segmentation or detection.

    In training, images come in a new order every epoch, in full batches. In evaluation each comes exactly once over
    all processes: for detection in order, for segmentation with images of one size together, as only they can share a
    batch.

    Args:
        dataset: What :func:`zoo.data.dense.open_segmentation` or :func:`zoo.data.dense.open_detection` returned, or
            another data set of arrays like theirs with ``sizes``.
        batch_size: Images per batch and process; in evaluation, at most.
        training: Shuffle, and leave out the incomplete last batch.
        transform: One of :mod:`zoo.data.dense.transforms`. For batches of segmentation in training it has to bring all
            images to one size.
        seed: Seed of order and augmentation.
        rank: Number of this process.
        world_size: Number of processes.
        workers: Worker processes; 0 reads in this one.
        device: Where batches go.

    Raises:
        ValueError: If training and there are fewer images than one batch per process needs.
    """
    samples = AugmentedData(dataset, transform, seed)
    of_boxes = isinstance(dataset[0][1], dict)
    if training:
        batches = _TrainingBatches(len(samples), batch_size, seed, rank, world_size)
    else:
        sizes = [(0, 0)] * len(samples) if of_boxes else dataset.sizes
        batches = _EvaluationBatches(sizes, batch_size, rank, world_size)
    return DenseLoader(samples, batches, of_boxes, workers, device)


class AugmentedData(Dataset):
    """A data set whose samples are changed at random and become tensors.

    Args:
        dataset: Pairs of an image, uint8 (H, W, C), and a mask, uint8 (H, W), or a dictionary of arrays.
        transform: What changes them; default: nothing.
        seed: With the epoch and the sample's index, seed of the transform's random numbers.
    """

    def __init__(self, dataset: Dataset, transform: DenseTransform | None = None, seed: int = 0) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the random numbers of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | BoxTarget]:
        """Returns an image, uint8 (C, H, W), and its mask, uint8 (H, W), or its dictionary as tensors."""
        image, target = self.dataset[index]
        if self.transform is not None:
            image, target = self.transform(image, target, np.random.default_rng((self.seed, self.epoch, index)))
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if isinstance(target, dict):
            return pixels, {key: torch.from_numpy(np.asarray(value)) for key, value in target.items()}
        return pixels, torch.from_numpy(target)


class DenseLoader:
    """Iterates over batches on one device; made by :func:`make_dense_loader`.

    Args:
        samples: The images.
        batches: The indices of every batch of an epoch.
        of_boxes: Whether targets are dictionaries, not masks.
        workers: Worker processes.
        device: Where batches go.
    """

    def __init__(
        self,
        samples: AugmentedData,
        batches: "_Batches",
        of_boxes: bool,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.samples = samples
        self.batches = batches
        self.device = torch.device(device)
        self.loader = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_listed if of_boxes else _stacked,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_use_one_thread,
            generator=torch.Generator(),  # else every pass draws a number from the global one
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the order and the augmentation of the next pass, and the batch that it starts with."""
        self.samples.set_epoch(epoch)
        self.batches.epoch, self.batches.first = epoch, first_batch

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return self.batches.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | tuple[list[Tensor], list[BoxTarget]]]:
        """Yields uint8 images (B, C, H, W) and int64 masks (B, H, W), or lists of images (C, H, W) and of targets."""
        for images, targets in self.loader:
            if isinstance(images, Tensor):
                yield self._moved(images), self._moved(targets).long()
            else:
                moved = [{key: self._moved(value) for key, value in target.items()} for target in targets]
                yield [self._moved(image) for image in images], moved

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class _Batches(Sampler[list[int]]):
    """The batches of one process, from a certain one on.

    Attributes:
        count: How many a whole pass has.
        epoch: Number of the pass.
        first: The batch that it starts with.
    """

    count: int
    epoch = 0
    first = 0

    def __len__(self) -> int:
        return self.count - self.first

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.whole_pass()[self.first :])

    def whole_pass(self) -> list[list[int]]:
        """Indices of the images of every batch."""
        raise NotImplementedError


class _TrainingBatches(_Batches):
    """Full batches, shuffled."""

    def __init__(self, images: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.count = images // (batch_size * world_size)
        if not self.count:
            raise ValueError(
                f"{images} training images do not fill one batch of {batch_size} on each of {world_size} processes; "
                "lower data.batch_size"
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def whole_pass(self) -> list[list[int]]:
        order = epoch_order(self.images, True, self.seed, self.epoch, self.rank, self.world_size)
        return order[: self.count * self.batch_size].view(self.count, -1).tolist()


class _EvaluationBatches(_Batches):
    """All images once, those of one size together."""

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, rank: int, world_size: int) -> None:
        share = sorted(range(len(sizes)), key=lambda index: sizes[index])[rank::world_size]
        groups = [list(group) for _, group in groupby(share, key=lambda index: sizes[index])]
        self.batches = [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]
        self.count = len(self.batches)

    def whole_pass(self) -> list[list[int]]:
        return self.batches


def _stacked(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*samples, strict=True)
    sizes = sorted({tuple(tensor.shape[-2:]) for tensor in (*images, *masks)})
    if len({image.shape for image in images}) > 1 or len({mask.shape for mask in masks}) > 1:
        raise ValueError(f"images or masks of one batch differ in size: {sizes}; crop and pad them, or batch_size=1")
    return torch.stack(images), torch.stack(masks)


def _listed(samples: Sequence[tuple[Tensor, BoxTarget]]) -> tuple[list[Tensor], list[BoxTarget]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _use_one_thread(worker: int) -> None:
    """OpenCV, which albumentations computes with, would use all processors in every worker."""
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
