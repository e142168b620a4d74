"""The subject ``loader``: how fast images are read from files, decoded and augmented, in each format.

The same JPEG images lie in class folders, in one tar file and in shards. A format is opened, which for folders and tar
files decodes every image once to find damaged ones, and read as training and as evaluation do. Workers are counted as
processes, none as one; the first batch, for which processes are started, is not timed.

* ``open_seconds``: opening the split; shards are opened a second time, when their index is in the cache.
* ``images_per_second``, ``per_process``: decoded, augmented and collated.
* ``megabytes_per_second``: of JPEG files.
"""

import argparse
import contextlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from zoo.config import AugmentConfig, DataConfig
from zoo.data import FileLoader, Preprocessing, make_loader, open_split
from zoo.optional import require
from zoo.tools.arguments import positive
from zoo.tools.benchmarks.measure import Machine
from zoo.tools.tables import aligned

__all__ = ["HELP", "add_arguments", "run", "write_images"]

HELP = "reading, decoding and augmenting image files: folders, tar files, shards"
FORMATS = ("folder", "tar", "shards")
CLASSES, SHARDS = 4, 8
PHOTO = (375, 500)  # pixels of the images, as many of ImageNet's have
QUALITY = 90  # of the JPEG files, which makes them about as large as ImageNet's
COLUMNS = ("images_per_second", "per_process", "megabytes_per_second", "open_seconds")

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="default all")
    parser.add_argument("--images", type=positive, default=512, help="how many are written; default 512")
    parser.add_argument("--img-size", type=positive, default=224, help="side of what the model sees; default 224")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument(
        "--workers", nargs="+", type=int, default=[0, os.cpu_count() or 1], help="processes; default 0 and all cores"
    )
    parser.add_argument("--auto-augment", help="timm's policy for training images, as rand-m9-mstd0.5-inc1")


def run(machine: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """Writes images into a temporary folder, measures the chosen formats, prints a table and returns its records."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_images(root, options.images)
        passes = len(options.formats) * 2 * len(options.workers)
        with require("tqdm").tqdm(total=passes, unit="row", disable=None) as bar:
            for name in options.formats:
                for row in _measure_format(name, root, machine, options):
                    row["megabytes_per_second"] = row["images_per_second"] * size / options.images / 1e6
                    records.append(row)
                    bar.update()
    lines = [["", *(column.replace("_", " ") for column in COLUMNS)]]
    for row in records:
        about = f"{row['format']}, {row['mode']}, {row['workers']} workers"
        lines.append([about, *(f"{row[column]:.2f}" for column in COLUMNS)])
    kilobytes = size / options.images / 1e3
    print(f"\n{options.images} JPEG images of {PHOTO[1]} x {PHOTO[0]} pixels, {kilobytes:.0f} kB each")
    print("\n".join(aligned(lines)))
    return {"records": records}


def write_images(root: Path, count: int) -> int:
    """Writes smooth random pictures with some noise: ``root/folder/<class>/<n>.jpg``, ``root/tar.tar``, shards.

    Returns:
        The size of all JPEG files in bytes.
    """
    generator = torch.Generator().manual_seed(0)
    written = 0
    with contextlib.ExitStack() as open_archives:
        tar, *shards = (
            open_archives.enter_context(tarfile.open(root / f"{name}.tar", "w"))
            for name in ("tar", *(f"shards-{shard:04d}" for shard in range(SHARDS)))
        )
        for number in range(count):
            label = number % CLASSES
            content = _picture(generator)
            written += len(content)
            file = root / "folder" / str(label) / f"{number:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            _add(tar, f"{label}/{number:05d}.jpg", content)
            shard = shards[number * SHARDS // count]
            _add(shard, f"{number:05d}.jpg", content)
            _add(shard, f"{number:05d}.cls", str(label).encode())
    return written


def _picture(generator: torch.Generator) -> bytes:
    coarse = torch.rand((1, 3, 12, 16), generator=generator)
    smooth = F.interpolate(coarse, PHOTO, mode="bicubic", align_corners=False)[0]
    noisy = smooth + 0.04 * torch.randn((3, *PHOTO), generator=generator)
    pixels = (noisy.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)  # (H, W, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _measure_format(name: str, root: Path, machine: Machine, options: argparse.Namespace) -> Iterator[Row]:
    side = options.img_size
    preprocessing = Preprocessing((side, side), 3, (0.5,) * 3, (0.5,) * 3, "bicubic", crop_pct=0.875)
    for mode in ("train", "eval"):
        training = mode == "train"
        augment = AugmentConfig(auto_augment=options.auto_augment) if training else None
        for workers in options.workers:
            config = DataConfig(name=name, root=str(root), batch_size=options.batch_size, workers=workers)
            if name == "shards":
                open_split(config, name, training=training)
            began = time.perf_counter()
            dataset, _ = open_split(config, name, training=training)
            opened = time.perf_counter() - began
            speed = _images_per_second(make_loader(dataset, preprocessing, config, "cpu", augment), machine.seconds)
            about = {"format": name, "mode": mode, "workers": workers, "open_seconds": opened}
            yield {**about, "images_per_second": speed, "per_process": speed / max(workers, 1)}


def _images_per_second(loader: FileLoader, seconds: float) -> float:
    """Speed of whole passes after their first batches, over at least so many seconds."""
    images, spent, epoch = 0, 0.0, 0
    while spent < seconds:
        loader.set_epoch(epoch)
        batches = iter(loader)
        next(batches)
        began = time.perf_counter()
        images += sum(len(batch) for batch, _ in batches)
        spent += time.perf_counter() - began
        epoch += 1
    return images / spent
