"""Items cut out of product photos: which pixels of a small grey photo on a black ground belong to the product."""

import functools

import numpy as np

from zoo.data.scenes.language import ITEM_NAMES

__all__ = ["Cutouts", "resample"]

GROUND = 20  # grey values below it are the photo's ground; shadows and compression noise stay below
CHUNK = 2000  # photos at a time, which fit into a processor's cache
SMOOTHNESS = 0.9  # photos whose mask changes more than this (intersection over union) when smoothed are left out


class Cutouts:
    """The usable photos of every class, with the ground removed.

    A mask is what is brighter than the ground, plus the thin holes in it, which are white prints, stripes and soles.
    A hole as large as 3x3 pixels stays open: the handle of a bag, the straps of a sandal. The mask is then smoothed.
    Photos are left out that have no clear outline, as those of white garments, or a grey ground: a dark rectangle.

    Args:
        images: uint8 of shape (N, H, W), bright products on black ground.
        labels: Integers of shape (N,), 0 to 9.

    Raises:
        ValueError: For other shapes, types or labels, or if a class has no usable photo.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                "items must be uint8 images (N, H, W) and labels (N,), "
                f"got {images.dtype} {images.shape} and {labels.shape}"
            )
        if not np.isin(labels, range(len(ITEM_NAMES))).all():
            raise ValueError(f"labels of items must be 0 to 9, got {labels.min()} to {labels.max()}")
        chunks = [find_masks(images[start : start + CHUNK]) for start in range(0, max(1, len(images)), CHUNK)]
        masks, clear = map(np.concatenate, zip(*chunks, strict=True))
        self.pixels = np.maximum(images, 1) * masks  # 0 outside of the product, 1 to 255 inside
        self.of_class = [np.flatnonzero(clear & (labels == label)) for label in range(len(ITEM_NAMES))]
        for name, found in zip(ITEM_NAMES, self.of_class, strict=True):
            if not len(found):
                raise ValueError(f"no item of the class {name!r} has a clear outline; give bright ones on black ground")

    def draw(self, rng: np.random.Generator, label: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws a photo of a class, perhaps mirrored, with its longer side enlarged to ``side`` pixels.

        Returns:
            Shade and opacity, float64 (h, w) in 0..1. The product is where the opacity is at least one half; it fades
            out within about one pixel.
        """
        photos = self.of_class[label]
        pixels = self.pixels[photos[rng.integers(len(photos))]]
        rows, columns = (np.flatnonzero((pixels > 0).any(axis)) for axis in (1, 0))
        pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        scale = side / max(pixels.shape)
        if rng.integers(2):
            pixels = pixels[:, ::-1]
        pixels = np.pad(pixels, 1)  # room to fade out
        height, width = (max(1, int(length * scale)) for length in pixels.shape)
        coverage = resample((pixels > 0).astype(np.float64), height, width)
        shade = resample(pixels / pixels.max(), height, width) / np.maximum(coverage, 0.05)  # without the black ground
        opacity = np.clip((coverage - 0.5) * max(scale, 1.0) + 0.5, 0, 1)
        return np.clip(shade, 0, 1), opacity


def find_masks(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the product in every photo.

    Args:
        images: uint8 of shape (N, H, W).

    Returns:
        Masks, bool (N, H, W), and which of them are clear, bool (N,).
    """
    images = np.ascontiguousarray(images.transpose(1, 2, 0))  # photos last: every step is over all of them
    product = images >= GROUND
    holes = ~(product | _outside(product))
    solid = product | (holes & ~_dilate(_erode(holes)))
    smooth = _binomial(solid) >= 8  # of 16
    area = smooth.sum((0, 1))
    outlined = (smooth & solid).sum((0, 1)) >= SMOOTHNESS * (smooth | solid).sum((0, 1))
    rectangular = area >= 0.94 * _extent(smooth.any(0)) * _extent(smooth.any(1))
    dark = (smooth & (images < 80)).sum((0, 1)) >= 0.5 * area
    return smooth.transpose(2, 0, 1), (area > 0) & outlined & ~(rectangular & dark)


def resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resamples a float64 image (h, w) to (height, width) with the cubic B-spline, which also smooths it.

    Sums run in a fixed order, not through a matrix product, so that every machine gets the same bits.
    """
    for axis, length in enumerate((height, width)):
        neighbours, weights = _spline(image.shape[axis], length)
        weights = weights[:, :, None] if axis == 0 else weights[:, None, :]
        taps = [image.take(neighbours[k], axis) * weights[k] for k in range(4)]
        image = taps[0] + taps[1] + taps[2] + taps[3]
    return image


@functools.lru_cache(maxsize=4096)
def _spline(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of four neighbours (4, target), the border being repeated, and their weights (4, target)."""
    position = (np.arange(target) + 0.5) * (source / target) - 0.5
    before = np.floor(position)
    t = position - before
    u = 1 - t
    weights = np.stack([u * u * u, 4 - 6 * t * t + 3 * t * t * t, 4 - 6 * u * u + 3 * u * u * u, t * t * t]) / 6
    neighbours = before.astype(np.int64) + np.arange(-1, 3)[:, None]
    return neighbours.clip(0, source - 1), weights


def _outside(product: np.ndarray) -> np.ndarray:
    """The ground that is connected (4 neighbours) with the border, for masks (H, W, N)."""
    free = ~product
    reached = np.zeros_like(free)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        reached[edge] = free[edge]
    found = -1
    while found != (found := np.count_nonzero(reached)):
        for part, allowed in ((reached, free), (reached.swapaxes(0, 1), free.swapaxes(0, 1))):
            for line in range(1, len(part)):
                part[line] |= part[line - 1] & allowed[line]
            for line in range(len(part) - 2, -1, -1):
                part[line] |= part[line + 1] & allowed[line]
    return reached


def _extent(line: np.ndarray) -> np.ndarray:
    """From the first to the last true pixel of lines (L, N)."""
    return len(line) - line.argmax(0) - line[::-1].argmax(0)


def _neighbours(x: np.ndarray) -> list[np.ndarray]:
    """The nine 3x3 neighbours of every pixel of (H, W, N), row by row, with zeros outside."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    height, width = x.shape[:2]
    return [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]


def _erode(mask: np.ndarray) -> np.ndarray:
    return functools.reduce(np.logical_and, _neighbours(mask))


def _dilate(mask: np.ndarray) -> np.ndarray:
    return functools.reduce(np.logical_or, _neighbours(mask))


def _binomial(mask: np.ndarray) -> np.ndarray:
    """3x3 smoothing with weights 1 2 1 by 1 2 1, not divided by their sum of 16."""
    weights = (1, 2, 1, 2, 4, 2, 1, 2, 1)
    return sum(weight * x for weight, x in zip(weights, _neighbours(mask.view(np.uint8)), strict=True))
