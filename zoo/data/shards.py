"""WebDataset shards read in any order: tar files whose members ``key.jpg`` and ``key.cls`` are a sample.

Each shard is walked through once, and where its images lie is kept in the cache. So an epoch has every sample exactly
once, whatever the number of processes and workers, and a run continues in its middle. Order is shuffled by the shard
and, within a few shards at a time, by the sample: what is read in a while lies close together.

A sample's image has an ending that PIL knows; its label is a whole number in ``key.cls`` or ``key.txt``, or in
``key.json`` under ``label`` or ``cls``. Labels have no names, so ``model.num_classes`` has to be set.
"""

import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.files import UnreadableImage, report_bad_files, why_unreadable
from zoo.files import replacing
from zoo.optional import require
from zoo.weights.cache import cache_folder

__all__ = ["Shard", "ShardedImages", "find_shards", "index_shard", "open_shards"]

_logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "ppm", "webp", "bmp", "tif", "tiff", "gif")
LABELS = ("cls", "txt", "json")
TOGETHER = 8  # shards whose samples are shuffled together
OPEN_FILES = 32  # per process
VERSION = 1  # of the index


Row = tuple[int, int, int, bytes]  # first byte and size of an image, label, key


@dataclass(frozen=True)
class Shard:
    """Where the samples of a tar file lie.

    Attributes:
        path: The file.
        offsets: First byte of each image, int64 (N,).
        sizes: Bytes of each image, int64 (N,).
        labels: int64 (N,).
        keys: Names of the samples, bytes (N,).
        problems: What is wrong with others, by name; ``""`` is the shard itself.
    """

    path: Path
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    problems: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.labels)


def open_shards(root: str | None, split: str, check: bool = False, bad_files: str = "error") -> "ShardedImages":
    """Opens one split of a data set in shards.

    Args:
        root: Folder of the data.
        split: See :func:`find_shards`.
        check: Decode every image, once, and count those that cannot be as bad files. Otherwise they are noticed when
            they are read.
        bad_files: What to do with shards that are cut off and with samples without image or label: ``error``, or
            ``skip`` with a report.

    Raises:
        FileNotFoundError: If there is no such shard; the message lists what there is.
        ValueError: If there is no whole sample, or something bad under ``bad_files="error"``.
    """
    if not root:
        raise ValueError("data 'shards' needs data.root, the folder of the shards")
    paths = find_shards(root, split)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda path: index_shard(path, check), paths)
        shards = list(require("tqdm").tqdm(found, "indexing shards", len(paths), disable=None, leave=False, delay=2))
    problems = {
        f"{shard.path.name}/{name}".rstrip("/"): reason for shard in shards for name, reason in shard.problems.items()
    }
    count = sum(map(len, shards))
    report_bad_files(problems, count + len(problems), f"{root}, {split}", bad_files)
    if not count:
        raise ValueError(f"the shards {split} in {root} have no whole sample")
    return ShardedImages(shards, bad_files)


def find_shards(root: str | Path, split: str) -> list[Path]:
    """Lists shards.

    Args:
        root: Folder of the data.
        split: A folder of tar files, one tar file, a pattern as ``train-{0000..0099}.tar``, or the beginning of the
            names: ``train`` for ``train-0000.tar`` and others like it.

    Raises:
        FileNotFoundError: If there is none, or one of the pattern is missing.
    """
    folder = Path(root)
    if "{" in split:
        paths = [folder / name for name in _expand(split)]
    elif (folder / split).is_dir():
        paths = sorted((folder / split).glob("*.tar"))
    elif (folder / split).is_file():
        paths = [folder / split]
    else:
        paths = sorted(folder.glob(f"{split}-*.tar"))
    missing = [path.name for path in paths if not path.is_file()]
    if paths and not missing:
        return paths
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) if folder.is_dir() else "nothing"
    wanted = f"{len(missing)} of {len(paths)} shards, the first is {missing[0]}" if missing else f"shards {split!r}"
    raise FileNotFoundError(f"{folder} does not have {wanted}; found there: {there}")


def _expand(pattern: str) -> list[str]:
    """The names that a pattern with ``{000..123}`` and ``{a,b}`` stands for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)  # what is in braces has an odd number
    choices = []
    for number, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if number % 2 else None
        if span:
            first, last = span.groups()
            choices.append([str(value).zfill(len(first)) for value in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if number % 2 else [part])
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def index_shard(path: Path, check: bool = False) -> Shard:
    """Walks through a tar file, or reads from the cache what an earlier walk has found.

    Args:
        path: The file. If its size or time has changed since, the cache does not count.
        check: Decode every image.
    """
    state = path.stat()
    stamp = [VERSION, state.st_size, state.st_mtime_ns]
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    cached = cache_folder() / "shards" / f"{name}{'.checked' if check else ''}.npz"
    try:
        with np.load(cached) as found:
            if found["stamp"].tolist() == stamp:
                arrays = (found[name] for name in ("offsets", "sizes", "labels", "keys"))
                return Shard(path, *arrays, json.loads(str(found["problems"])))
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged archive can raise nearly anything
        _logger.warning("The index %s cannot be read (%s) and is made anew", cached, error)
    shard = _walk(path, check)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as temporary:
            arrays = {name: getattr(shard, name) for name in ("offsets", "sizes", "labels", "keys")}
            np.savez(temporary, stamp=stamp, problems=json.dumps(shard.problems), **arrays)
    except OSError as error:
        _logger.warning("The index of %s cannot be kept in %s (%s)", path, cached.parent, error.strerror)
    return shard


def _walk(path: Path, check: bool) -> Shard:
    problems: dict[str, str] = {}
    rows: list[Row] = []
    with path.open("rb") as file:
        for key, members in itertools.groupby(_members(file, problems), lambda member: _split_name(member.name)[0]):
            try:
                rows.append(_sample(file, key, {_split_name(member.name)[1]: member for member in members}, check))
            except ValueError as error:
                problems[key] = str(error)
    if "" in problems:
        problems[""] += f"; {len(rows)} whole samples before"
    columns = zip(*rows, strict=True) if rows else ((),) * 4
    offsets, sizes, labels, keys = columns
    integers = (np.array(column, dtype=np.int64) for column in (offsets, sizes, labels))
    return Shard(path, *integers, np.array(keys, dtype=np.bytes_), problems)


def _members(file: BinaryIO, problems: dict[str, str]) -> Iterator[tarfile.TarInfo]:
    """Yields the files that are whole; if the archive is not, this is put down as a problem."""
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while member := archive.next():
                hidden = member.name.rpartition("/")[2].startswith(".")  # some systems add what they know of a file
                if member.isfile() and not hidden and member.offset_data + member.size <= size:
                    yield member
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # which ends every archive
                problems[""] = "the tar file is cut off or damaged"
    except tarfile.TarError as error:
        problems[""] = f"not a whole tar file without compression ({error})"


def _split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: a dot in a folder's name belongs to the key."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _sample(file: BinaryIO, key: str, members: Mapping[str, tarfile.TarInfo], check: bool) -> Row:
    """What is kept of a sample.

    Raises:
        ValueError: If it has no image or no label, or with ``check`` the image cannot be decoded.
    """
    image = next((members[ending] for ending in IMAGES if ending in members), None)
    label = next(((ending, members[ending]) for ending in LABELS if ending in members), None)
    if image is None or label is None:
        lacking = "image" if image is None else "label"
        raise ValueError(f"has no {lacking} among {', '.join(members) or 'nothing'}")
    ending, member = label
    number = _read_label(ending, os.pread(file.fileno(), member.size, member.offset_data))
    if check:
        reason = why_unreadable(io.BytesIO(os.pread(file.fileno(), image.size, image.offset_data)))
        if reason:
            raise ValueError(reason)
    return image.offset_data, image.size, number, key.encode()


def _read_label(ending: str, content: bytes) -> int:
    try:
        if ending != "json":
            return int(content)
        values = json.loads(content)
        return int(values["label"] if "label" in values else values["cls"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the label in .{ending} is not a whole number: {content[:40]!r}") from error


class ShardedImages(Dataset):
    """Samples of shards by number.

    Args:
        shards: Their indices.
        bad_files: What a loader does with an image that cannot be decoded: ``error``, or ``skip`` to take another.

    Attributes:
        transform: Applied to the PIL image.
    """

    def __init__(self, shards: list[Shard], bad_files: str = "error") -> None:
        self.shards = shards
        self.bad_files = bad_files
        self.starts = np.cumsum([0, *map(len, shards)])
        self.transform: Callable[[Image.Image], Any] | None = None
        self.files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Image and label.

        Raises:
            UnreadableImage: If the image cannot be decoded.
        """
        shard, place = self._locate(index)
        try:
            image = Image.open(io.BytesIO(self._read(shard, place)))
            image.load()
        except Exception as error:  # PIL's plugins raise many types
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        label = int(self.shards[shard].labels[place])
        return (self.transform(image) if self.transform else image), label

    def name(self, index: int) -> str:
        """The shard of a sample and its key."""
        shard, place = self._locate(index)
        return f"{self.shards[shard].path.name}/{self.shards[shard].keys[place].decode()}"

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """All numbers (N,) in an order that is shuffled by the shard, and by the sample within a few shards."""
        parts = []
        for together in torch.randperm(len(self.shards), generator=generator).split(TOGETHER):
            spans = [torch.arange(self.starts[shard], self.starts[shard + 1]) for shard in together.tolist()]
            numbers = torch.cat(spans)
            parts.append(numbers[torch.randperm(len(numbers), generator=generator)])
        return torch.cat(parts)

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, int(index - self.starts[shard])

    def _read(self, shard: int, place: int) -> bytes:
        found = self.shards[shard]
        return os.pread(self._descriptor(shard), int(found.sizes[place]), int(found.offsets[place]))

    def _descriptor(self, shard: int) -> int:
        """An open file; the one that was not used for the longest time is closed for it."""
        if shard not in self.files:
            if len(self.files) >= OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
            self.files[shard] = os.open(self.shards[shard].path, os.O_RDONLY)
        self.files.move_to_end(shard)
        return self.files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": OrderedDict()}  # descriptors mean nothing in another process
