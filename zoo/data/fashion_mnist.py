"""Fashion-MNIST: 70,000 grey 28x28 photographs of ten kinds of clothing (Xiao et al., arXiv 1708.07747, MIT licence).

The four idx files are looked for in a given folder, where Debian's package ``dataset-fashion-mnist`` puts them, and in
the cache; otherwise torchvision downloads them into the cache. Whatever the source, their contents are checked.
"""

import gzip
import hashlib
import logging
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.data.memory import TensorData

__all__ = ["CLASS_NAMES", "load_fashion_mnist"]

_logger = logging.getLogger(__name__)

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

# Of the uncompressed files, so that it does not matter how they were packed: SHA-256, bytes before the data.
CONTENTS = {
    "train-images-idx3-ubyte": ("c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", 16),
    "train-labels-idx1-ubyte": ("bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", 8),
    "t10k-images-idx3-ubyte": ("5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", 16),
    "t10k-labels-idx1-ubyte": ("0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", 8),
}


def load_fashion_mnist(split: str, root: str | Path | None = None, download: bool = True) -> TensorData:
    """Loads the 60,000 training or the 10,000 test images.

    Args:
        split: ``train``, or ``val`` or ``test`` for the test images.
        root: Folder of the four idx files, compressed (``.gz``) or not. Default: the folder of Debian's package, else
            the cache (``ZOO_CACHE``, by default ``~/.cache/vision-ssm-zoo``).
        download: If no ``root`` is given and nothing was found, let torchvision download 30 MB into the cache.

    Raises:
        ValueError: For another split, or if a file's contents are not the published ones.
        FileNotFoundError: If the files are nowhere and must not, or cannot, be downloaded.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"fashion_mnist has the splits train and test (also called val), got {split!r}")
    folder = _find_folder(root, download)
    prefix = "train" if split == "train" else "t10k"
    images = _read_checked(folder, f"{prefix}-images-idx3-ubyte").view(-1, 1, 28, 28)
    labels = _read_checked(folder, f"{prefix}-labels-idx1-ubyte").long()
    return TensorData(images, labels, CLASS_NAMES, mean=(0.2860,), std=(0.3530,))


def _find_folder(root: str | Path | None, download: bool) -> Path:
    """Returns the first folder that holds all four files, after a download if need be."""
    cache = Path(os.environ.get("ZOO_CACHE", "~/.cache/vision-ssm-zoo")).expanduser()
    places = [Path(root)] if root else [DEBIAN_FOLDER, cache]
    for place in places:
        for folder in (place, place / "FashionMNIST" / "raw"):  # the latter is where torchvision puts them
            if all(_path_of(folder, name) for name in CONTENTS):
                return folder
    options = "install Debian's package dataset-fashion-mnist, or give their folder as data.root"
    searched = ", ".join(map(str, places))
    if root or not download:
        raise FileNotFoundError(f"the four Fashion-MNIST files are not in {searched}; {options}, or allow the download")
    _logger.info("Downloading Fashion-MNIST (30 MB) into %s", cache)
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(cache, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"could not download Fashion-MNIST ({error}); {options}") from error
    return cache / "FashionMNIST" / "raw"


def _path_of(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read_checked(folder: Path, name: str) -> Tensor:
    """Returns the data of one idx file as a flat uint8 tensor, or raises ValueError if it is not the published file."""
    path = _path_of(folder, name)
    digest, header = CONTENTS[name]
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and fetch it again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(
            f"{path} is not the published Fashion-MNIST file: {len(content)} bytes with SHA-256 {found}, "
            f"expected {digest}; delete it and fetch it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())
