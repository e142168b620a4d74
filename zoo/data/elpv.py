"""elpv: 2,624 electroluminescence images of solar cells, grey, 300x300, labelled with the probability of a defect.

The cells come from 18 monocrystalline and 26 polycrystalline modules. Sources: Deitsch et al., "Automatic
classification of defective photovoltaic module cells in electroluminescence images", Solar Energy 185, 2019, arXiv
1807.02894; Buerhop-Lutz et al., EU PVSEC 2018. The images are licensed CC BY-NC-SA 4.0.

Of the authors are

* the labels: an expert called each cell functional or defective, sure of it or not. A sure verdict is the probability 0
  or 1, an unsure "functional" 1/3, an unsure "defective" 2/3;
* the protocol: a random quarter of the cells, 656, is for testing and 1,968 are for training, stratified so that both
  have the same proportions of classes;
* in their two-class experiments, the reading of every unsure cell as defective, with its probability as its weight.

Ours are

* which cells are for testing, as no list of theirs is published: grouped by probability and type of module, and within
  a group in the order of the SHA-256 digests of their file names, every fourth cell is taken, counting on from group to
  group. So each group gives a quarter of its cells, rounded up or down, and no random generator is involved. A score is
  of other cells than a published one. As it is not known either which cells share a module, those of one module are in
  both parts, as in any split of these images;
* the two classes: the expert's verdict, which is a probability of at least 1/2 for a defect, without weights.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from zoo.data.memory import TensorData
from zoo.optional import require

__all__ = ["CLASS_NAMES", "load_elpv"]

CLASS_NAMES = {
    4: ("functional", "possibly defective", "probably defective", "defective"),
    2: ("functional", "defective"),
}
MODULE_TYPES = ("mono", "poly")
TEST_STRIDE = 4  # every fourth cell is a test image


class Cell(NamedTuple):
    """A row of the labels.

    Attributes:
        file: The image.
        thirds: Probability of a defect in thirds, 0 to 3.
        module_type: ``mono`` or ``poly``.
    """

    file: Path
    thirds: int
    module_type: str


def load_elpv(split: str, classes: int = 4, img_size: int = 224, root: str | Path | None = None) -> TensorData:
    """Loads 1,968 training or 656 test images; which ones is the same on every machine.

    All images are read whichever split is asked for, as mean and standard deviation are those of the training images.

    Args:
        split: ``train``, or ``val`` or ``test`` for the test images.
        classes: 4 for the four probabilities, or 2 for functional (0, 1/3) and defective (2/3, 1).
        img_size: Side in pixels to which images are resized (bilinear, antialiased); 300 leaves them as they are.
        root: Folder laid out as the authors' repository: ``labels.csv`` and ``images/``. Default: the installed
            package ``elpv-dataset``.

    Returns:
        Grey images (n, 1, img_size, img_size) in the order of their names' digests, so that the first ones are a fair
        sample, with labels, class names, mean and standard deviation.

    Raises:
        ValueError: For another split or number of classes, a damaged image, or labels that are not of this data set.
        FileNotFoundError: If the labels or an image are not there.
        ModuleNotFoundError: If no ``root`` is given and the package is not installed.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"elpv has the splits train and test (also called val), got {split!r}")
    if classes not in CLASS_NAMES:
        raise ValueError(f"elpv has 4 or 2 classes, got classes={classes}")
    if img_size < 1:
        raise ValueError(f"img_size={img_size} must be at least 1")
    cells = sorted(_read_labels(_find_labels(root)), key=lambda cell: _digest(cell.file.name))
    with ThreadPoolExecutor() as pool:
        images = torch.stack(list(pool.map(partial(_read_image, img_size=img_size), cells)))
    thirds = torch.tensor([cell.thirds for cell in cells])
    is_test = _choose_test(cells)
    mean, std = _statistics(images[~is_test])
    chosen = ~is_test if split == "train" else is_test
    labels = thirds if classes == 4 else (thirds >= 2).long()
    return TensorData(images[chosen], labels[chosen], CLASS_NAMES[classes], mean=(mean,), std=(std,))


def _find_labels(root: str | Path | None) -> Path:
    """Returns the path of ``labels.csv``."""
    if root is None:
        root = Path(require("elpv_dataset", "data").__file__).parent / "data"
    path = Path(root) / "labels.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no labels.csv in {root}; give the folder that holds it and images/ as data.root, or leave that "
            "out and pip install elpv-dataset"
        )
    return path


def _read_labels(path: Path) -> list[Cell]:
    """Reads rows of the form ``images/cell0001.png  0.3333333333333333  mono``."""
    cells: dict[str, Cell] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, probability, module_type = line.split()
            thirds = 3 * float(probability)
            known = module_type in MODULE_TYPES and 0 <= round(thirds) <= 3 and abs(thirds - round(thirds)) < 0.01
        except (ValueError, OverflowError):
            known = False
        if not known:
            raise ValueError(
                f"{path}, line {number}: expected an image, a probability of 0, 1/3, 2/3 or 1, and mono or poly, "
                f"got {line!r}"
            )
        file = path.parent / name
        if file.name in cells:
            raise ValueError(f"{path}, line {number}: {file.name} is listed twice; remove one of its lines")
        cells[file.name] = Cell(file, round(thirds), module_type)
    if len(cells) < TEST_STRIDE:
        raise ValueError(f"{path} lists {len(cells)} images; a training and a test split need at least {TEST_STRIDE}")
    return list(cells.values())


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _choose_test(cells: Sequence[Cell]) -> Tensor:
    """Marks the test images among cells that are in the order of their digests."""
    grouped = sorted(range(len(cells)), key=lambda index: cells[index][1:])  # stable: digests order every group
    is_test = torch.zeros(len(cells), dtype=torch.bool)
    is_test[grouped[TEST_STRIDE - 1 :: TEST_STRIDE]] = True
    return is_test


def _read_image(cell: Cell, img_size: int) -> Tensor:
    """Reads one image as uint8 (1, img_size, img_size)."""
    try:
        with Image.open(cell.file) as image:
            grey = image.convert("L")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{cell.file} is in labels.csv but not on disk; fetch the data set again") from error
    except (OSError, SyntaxError) as error:  # the latter is what Pillow raises for some broken PNG files
        raise ValueError(f"{cell.file} cannot be read ({error}); fetch the data set again") from error
    return pil_to_tensor(grey.resize((img_size, img_size), Image.Resampling.BILINEAR))


def _statistics(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of uint8 images scaled to 0..1, exact, without a float copy of them all."""
    counts = sum(torch.bincount(chunk.flatten(), minlength=256) for chunk in images.split(64))
    shares = counts.double() / counts.sum()
    values = torch.linspace(0, 1, 256, dtype=torch.float64)
    mean = (shares * values).sum()
    std = (shares * (values - mean) ** 2).sum().sqrt()
    return round(mean.item(), 4), round(std.item(), 4)
