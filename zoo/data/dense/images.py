"""Images and masks of any common kind of file as arrays, and files checked before training.

What becomes of an image whose file does not hold 8-bit grey or RGB values:

- 16 bits per pixel are scaled to 8 (65535 becomes 255); files that use fewer of their 16 bits come out dark.
- An alpha channel is dropped, as in classification: what lies under transparent pixels is seen.
- Palettes, CMYK and YCbCr are converted to the colours that they stand for.
- Floating numbers are refused, as nobody knows what white is.

The orientation that a camera writes into EXIF is ignored, as boxes and masks belong to the pixels as they are stored;
unless the annotations have the size of the turned image, and not of the stored one.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

__all__ = ["IGNORED", "check_each", "read_image", "read_labels", "size_of_image"]

IGNORED = 255  # label of pixels that do not count

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_VALUES_SHOWN = 20

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_image(path: Path, channels: int = 3, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads an image as bytes.

    Args:
        path: The file.
        channels: 1 (grey) or 3 (RGB).
        size: Height and width of its annotations; default: those of the stored image.

    Returns:
        uint8 (H, W, channels).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, or of another size; the message names it.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(_in_bytes(_turned(image, size)).convert("L" if channels == 1 else "RGB"))
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's plugins raise many types
        raise ValueError(f"cannot read the image {path}: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def size_of_image(path: Path, expected: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width that :func:`read_image` gives for annotations of the expected size, without decoding.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, holds floating numbers, or fits annotations of the expected size neither as it
            is stored nor turned.
    """
    try:
        with Image.open(path) as image:
            _refuse_floats(image)
            stored = image.size[::-1]
            turned = stored[::-1] if image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS else stored
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if expected is not None and expected not in (stored, turned):
        raise ValueError(_wrong_size(stored, expected))
    return expected or stored


def read_labels(path: Path, table: np.ndarray) -> np.ndarray:
    """Reads the labels of an image's pixels.

    Args:
        path: A grey or palette image; of a palette the numbers count, not the colours.
        table: Label of every stored value 0 to 255, and last -1; values that stand for no class have -1 too.

    Returns:
        uint8 (H, W), 255 where pixels do not count.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such image, or holds values that the table does not know; the message names them.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"cannot read the mask {path}: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ValueError(
            f"the mask {path} is a {mode} image; masks hold one whole number per pixel: save it as grey or palette PNG"
        )
    labels = table[values.astype(np.uint8) if values.dtype == bool else values.clip(-1, 256)]
    unknown = labels < 0
    if unknown.any():
        stray, known = np.unique(values[unknown])[:_VALUES_SHOWN].tolist(), table[(table >= 0) & (table != IGNORED)]
        raise ValueError(
            f"the mask {path} has the labels {stray}, which are none of the {len(np.unique(known))} classes "
            f"({_values_of(table)}); correct it, or name more classes"
        )
    return labels.astype(np.uint8)


def check_each(check: Callable[[Item], Result], items: Sequence[Item]) -> tuple[list[Result | None], dict[int, str]]:
    """Calls a function for many items, several at a time.

    Returns:
        The results in order, None where the function raised FileNotFoundError or ValueError; and what these said, in
        one line, by the item's number.
    """

    def attempt(item: Item) -> Result | Exception:
        try:
            return check(item)
        except (FileNotFoundError, ValueError) as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(attempt, items))
    reasons = {number: _one_line(result) for number, result in enumerate(found) if isinstance(result, Exception)}
    return [None if number in reasons else result for number, result in enumerate(found)], reasons


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no file {error.filename}" if error.filename else str(error)
    return str(error).splitlines()[0]


def _turned(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    stored = image.size[::-1]
    if size in (None, stored):
        return image
    image = ImageOps.exif_transpose(image)
    if image.size[::-1] != size:
        raise ValueError(_wrong_size(stored, size))
    return image


def _wrong_size(stored: tuple[int, int], expected: tuple[int, int]) -> str:
    sizes = (f"{height} x {width}" for height, width in (stored, expected))
    return "the image has {} pixels (height x width), but its annotations {}".format(*sizes)


def _in_bytes(image: Image.Image) -> Image.Image:
    """Pillow's own conversion cuts values above 255 off."""
    _refuse_floats(image)
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"it holds values from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("it holds floating numbers; save it with 8 or 16 bits")


def _values_of(table: np.ndarray) -> str:
    """How classes are stored, for a message."""
    values = np.flatnonzero((table >= 0) & (table != IGNORED)).tolist()
    first, last = values[0], values[-1]
    return f"values {first} to {last}" if len(values) == last - first + 1 else f"values {values}"
