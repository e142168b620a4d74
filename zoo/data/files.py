"""Images from files: class folders, tar archives, WebDataset shards and hub data sets, through timm's readers.

Folders and tar archives are checked before training: a file that is not an image, or a truncated one, is reported by
name and counted, and is then an error or left out as the caller chose. In shards (:mod:`zoo.data.shards`), which may be
too large for that, an image that cannot be read is noticed in training and replaced by the next one.
"""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from zoo.data.memory import epoch_order

__all__ = ["FileLoader", "UnreadableImage", "class_names_of", "open_files", "report_bad_files", "why_unreadable"]

_logger = logging.getLogger(__name__)

NAMES_SHOWN = 20
REPLACED_IN_A_ROW = 100  # beyond which it is the disk that cannot be read


class UnreadableImage(ValueError):
    """A data set's image that turned out to be damaged. Such a data set has ``name(index)`` and ``bad_files``."""


def open_files(
    name: str,
    root: str | None,
    split: str,
    class_to_idx: Mapping[str, int] | None = None,
    bad_files: str = "error",
    **options: Any,
) -> Dataset:
    """Opens one split of a data set of image files.

    Args:
        name: ``folder`` (``root/<split>/<class>/<image>``), ``tar`` (``root/<split>.tar`` or ``root/<split>/*.tar``
            with class folders inside), or a name with a prefix that timm reads (``wds/``, ``hfds/``, ``hfids/``,
            ``tfds/``, ``torch/``).
        root: Folder of the data.
        split: Which part. For ``folder`` and ``tar`` an empty string means ``root`` itself.
        class_to_idx: Labels of the class names, as found in another split; default numbers the sorted names.
        bad_files: ``error`` or ``skip``, for ``folder`` and ``tar``; the other readers have rules of their own.
        options: Passed to timm's ``create_dataset`` for names with a prefix.

    Returns:
        A data set of ``(PIL image, label)``; assign its transform with :class:`FileLoader`.

    Raises:
        FileNotFoundError: If the split is not there; the message lists what is.
        ValueError: For an unknown name, classes that ``class_to_idx`` lacks, or bad files under ``bad_files="error"``.
    """
    if name not in ("folder", "tar"):
        if "/" not in name:
            raise ValueError(
                f"unknown data set {name!r}; use digits, fashion_mnist, folder, tar, shards, "
                "or timm's prefixes wds/, hfds/, hfids/, tfds/, torch/"
            )
        return create_dataset(name, root=root, split=split, **options)

    place = _find_split(name, root, split)
    reader_type = ReaderImageFolder if name == "folder" else ReaderImageInTar
    reader = reader_type(str(place))
    class_to_idx = class_to_idx or _class_to_idx(reader)
    strangers = sorted(set(_class_to_idx(reader)) - set(class_to_idx))
    if strangers:
        raise ValueError(
            f"{place} has classes that are not known: {', '.join(strangers[:NAMES_SHOWN])}; "
            f"known are: {', '.join(list(class_to_idx)[:NAMES_SHOWN])}"
        )
    readable = _check(reader, place, bad_files)
    reader = reader_type(str(place), class_map=dict(class_to_idx))  # a new one: workers must not share open tar files
    dataset = ImageDataset(str(place), reader=reader, input_img_mode="")
    return dataset if len(readable) == len(reader) else Subset(dataset, readable)


def class_names_of(dataset: Dataset) -> tuple[str, ...] | None:
    """Returns the class names in the order of their labels, or None if the data set does not tell."""
    dataset = getattr(dataset, "dataset", dataset)  # a Subset without its bad files
    reader = getattr(dataset, "reader", None)
    labels = _class_to_idx(reader) or getattr(dataset, "class_to_idx", None)
    if labels:
        return tuple(sorted(labels, key=labels.get))
    features = getattr(getattr(reader, "dataset", None), "features", None)  # Hugging Face data sets
    names = getattr((features or {}).get(getattr(reader, "label_key", "label")), "names", None)
    return tuple(names) if names else None


def why_unreadable(file: Path | BinaryIO) -> str | None:
    """Decodes an image file to the end; returns None, or one line that says what is wrong with it."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (64, 64))  # JPEG reads everything but computes only small blocks: several times faster
            image.load()
    except Exception as error:  # PIL's plugins raise many types: OSError, SyntaxError, ValueError, struct.error, ...
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def report_bad_files(
    reasons: Mapping[str, str],
    total: int,
    place: object,
    bad_files: str,
    kind: str = "files",
    fault: str = "are not readable images",
) -> None:
    """Logs (``skip``) or raises as ValueError (``error``) the names and the number of files that cannot be used.

    Args:
        reasons: What is wrong, by file name; nothing happens if it is empty.
        total: Number of files looked at.
        place: Where they are, for the message.
        bad_files: ``error`` or ``skip``.
        kind: What they are, for the message.
        fault: What is wrong with all of them, for the message.
    """
    if not reasons:
        return
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:NAMES_SHOWN]]
    if len(reasons) > NAMES_SHOWN:
        lines.append(f"  ... and {len(reasons) - NAMES_SHOWN} more")
    summary = f"{len(reasons)} of {total} {kind} in {place} {fault}"
    if bad_files == "error":
        lines.append("remove them, or leave them out with data.bad_files=skip (--bad-files skip)")
        raise ValueError("\n".join([f"{summary}:", *lines]))
    _logger.warning("%s", "\n".join([f"{summary} and are left out:", *lines]))


class FileLoader:
    """Loads batches of image files with worker processes and puts them on one device.

    Like :class:`zoo.data.memory.TensorLoader`, the order depends only on ``seed`` and the epoch number, and several
    processes take interleaved shares of it. The random numbers of an image depend only on these and its index, not on
    the worker or the process that reads it.

    Args:
        dataset: What :func:`open_files` returned.
        transform: Maps a PIL image to a uint8 tensor (C, H, W).
        batch_size: Images per batch and process.
        workers: Worker processes; 0 decodes in this one.
        device: Where batches go.
        training: Shuffle, and leave out the incomplete last batch.
        seed: Seed of order and augmentation.
        rank: Number of this process.
        world_size: Number of processes.
        repeats: How often an epoch has each image that it draws, augmented anew; it is no longer for it.

    Raises:
        ValueError: If training and there are fewer images than one batch per process needs, or if a stream shall repeat
            its images.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
        training: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
    ) -> None:
        self.device = torch.device(device)
        self.dataset = dataset
        self.is_stream = isinstance(dataset, IterableDataset)
        self.batch_size = batch_size
        self.first_batch = 0
        self.seed = seed * 1_000_003 + rank
        self.generator = torch.Generator()
        getattr(dataset, "dataset", dataset).transform = transform
        if self.is_stream and repeats > 1:
            raise ValueError(f"a stream cannot repeat its images: set augment.repeats to 1, not {repeats}")
        if self.is_stream:
            dataset.set_loader_cfg(num_workers=workers)  # streams divide themselves among the processes
        elif training and len(dataset) < batch_size * world_size:
            raise ValueError(
                f"{len(dataset)} training images do not fill one batch of {batch_size} on each of {world_size} "
                "processes; lower data.batch_size"
            )
        self.order = None if self.is_stream else _Order(dataset, training, seed, rank, world_size, repeats)
        self.loader = DataLoader(
            dataset if self.is_stream else _SeededImages(dataset, self.order),
            batch_size,
            sampler=self.order,
            num_workers=workers,
            drop_last=training,
            pin_memory=self.device.type == "cuda",
            generator=self.generator,
        )
        self.batches = len(self.loader)
        self.replaced: list[str] = []
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the order and the augmentation of the next pass, and the batch that it starts with."""
        self.generator.manual_seed(self.seed + 7919 * epoch)
        self.first_batch = first_batch
        if self.order:
            self.order.epoch, self.order.first = epoch, first_batch * self.batch_size
        elif hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields uint8 images of shape (B, C, H, W) and int64 labels of shape (B,)."""
        batches = islice(self.loader, self.first_batch, None) if self.is_stream else self.loader
        for images, labels, *replaced in batches:
            for numbers in replaced:
                self._note(numbers[numbers >= 0].tolist())
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def unreadable(self) -> list[str]:
        """Names of the images that were replaced since the last call, because they could not be read."""
        names, self.replaced = self.replaced, []
        return names

    def _note(self, numbers: Sequence[int]) -> None:
        names = [self.dataset.name(number) for number in numbers]
        if names and self.dataset.bad_files == "error":
            raise ValueError(
                f"these images cannot be read: {', '.join(names)}; remove them, or replace each by the next one with "
                "data.bad_files=skip"
            )
        self.replaced += names


class _Order(Sampler[int]):
    """The share of one process of an epoch's order, from a certain place on."""

    def __init__(self, images: Dataset, training: bool, seed: int, rank: int, world_size: int, repeats: int) -> None:
        self.count, self.training, self.seed, self.repeats = len(images), training, seed, repeats
        self.shuffled = getattr(images, "shuffled", None)  # a data set may know a better order than any
        self.rank, self.world_size = rank, world_size
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        share = self.count // self.world_size if self.training else len(range(self.rank, self.count, self.world_size))
        return share - self.first

    def __iter__(self) -> Iterator[int]:
        shares = {"rank": self.rank, "world_size": self.world_size, "repeats": self.repeats}
        order = epoch_order(self.count, self.training, self.seed, self.epoch, **shares, shuffled=self.shuffled)
        return iter(order[self.first : self.first + len(self)].tolist())


class _SeededImages(Dataset):
    """Images whose random numbers follow from seed, epoch and index; an epoch may have several copies of an image."""

    def __init__(self, images: Dataset, order: _Order) -> None:
        self.images = images
        self.order = order

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        """Image, label, and the number of the image that this one replaces, or -1."""
        if not self.order.training:
            return *self.images[index], -1
        _seed(hash((self.order.seed, self.order.epoch, index)) % 2**32)
        number, count = index % len(self.images), len(self.images)
        for step in range(REPLACED_IN_A_ROW):
            try:
                return *self.images[(number + step) % count], number if step else -1
            except UnreadableImage as error:
                reason = str(error)
        raise ValueError(f"{REPLACED_IN_A_ROW} images in a row cannot be read; the last is {reason}")


def _seed(seed: int) -> None:
    """Seeds all that draws on the CPU.

    ``torch.manual_seed`` would seed GPUs too. A main process that uses none only notes that, with a stack trace for
    every kind of device: a sixth of the time of an image.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def _find_split(name: str, root: str | None, split: str) -> Path:
    if not root:
        raise ValueError(f"data {name!r} needs data.root, the folder of the images")
    folder = Path(root)
    choices = [folder / split, folder / f"{split}.tar"] if split and folder.suffix != ".tar" else [folder]
    for place in choices:
        if place.is_dir() or (name == "tar" and place.is_file()):
            return place
    there = ", ".join(sorted(child.name for child in folder.iterdir())[:NAMES_SHOWN]) if folder.is_dir() else "nothing"
    raise FileNotFoundError(f"{folder} has no split {split!r}; found there: {there}")


def _class_to_idx(reader: Reader | None) -> dict[str, int] | None:
    return getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)


def _check(reader: Reader, place: Path, bad_files: str) -> Sequence[int]:
    """Reports the bad files of a folder or tar archive and returns the numbers of the good ones."""

    def check(index: int) -> str | None:
        file = reader[index][0]
        with file:
            return why_unreadable(file)

    names = [str(name) for name in reader.filenames()]
    reasons: Iterable[str | None]
    if isinstance(reader, ReaderImageFolder):
        with ThreadPoolExecutor() as pool:
            reasons = list(pool.map(check, range(len(reader))))
    else:
        reasons = [check(index) for index in range(len(reader))]  # an open tar file cannot be shared by threads
    bad = {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
    good = [index for index, reason in enumerate(reasons) if not reason]

    others = {}
    if isinstance(reader, ReaderImageFolder):
        known = set(names)
        files = (path for path in sorted(place.rglob("*")) if path.is_file())
        others = {name: "not an image file" for path in files if (name := str(path.relative_to(place))) not in known}
    report_bad_files({**bad, **others}, len(names) + len(others), place, bad_files)
    if not good:
        raise ValueError(f"{place} has no readable image")
    return good
