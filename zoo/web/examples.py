"""Pieces of clothing drawn as shapes: images to try the packaged classifier of Fashion-MNIST with at once."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["draw_clothes"]

SIDE = 224
CELLS = 28  # what the shapes are drawn in; fashion_mnist's pixels
GRAIN = 14  # standard deviation of the fabric's brightness

Polygon = tuple[tuple[float, float], ...]

# Outlines as (x, y), each filled with the brightness before it.
CLOTHES: dict[str, tuple[tuple[int, Polygon], ...]] = {
    "t-shirt": (
        (
            190,
            (
                *((10, 2), (12, 4), (16, 4), (18, 2), (22, 4), (27, 10), (23, 13)),
                *((20, 10), (20, 26), (8, 26), (8, 10), (5, 13), (1, 10), (6, 4)),
            ),
        ),
    ),
    "trousers": (
        (170, ((9, 1), (19, 1), (21, 27), (16, 27), (14, 9), (12, 27), (7, 27))),
        (120, ((9, 1), (19, 1), (19.2, 3), (8.8, 3))),
    ),
    "dress": (
        (180, ((11, 1), (12, 4), (16, 4), (17, 1), (18, 2), (17, 11), (21, 27), (7, 27), (11, 11), (10, 2))),
        (110, ((11, 10.5), (17, 10.5), (17.2, 12), (10.8, 12))),
    ),
    "bag": (
        (150, ((9, 12), (9, 6), (11, 4), (17, 4), (19, 6), (19, 12), (17, 12), (17, 6), (11, 6), (11, 12))),
        (200, ((3, 11), (25, 11), (27, 25), (1, 25))),
        (130, ((3, 11), (25, 11), (25.4, 14), (2.6, 14))),
    ),
    "sneaker": (
        (190, ((1, 15), (6, 14), (12, 10), (15, 9), (19, 11), (24, 9), (27, 10), (27, 17), (1, 17))),
        (235, ((1, 17), (27, 17), (27, 19.5), (2, 19.5))),
    ),
    "boot": (
        (180, ((23, 3), (13, 3), (12, 13), (3, 17), (2, 22), (24, 22))),
        (90, ((24, 22), (2, 22), (2, 24), (18, 24), (18, 25), (24, 25))),
    ),
}


def draw_clothes(folder: Path) -> list[Path]:
    """Draws pieces of clothing, light on black as in Fashion-MNIST, as PNG files in a folder and returns these."""
    files = []
    scale = SIDE / CELLS
    for name, shapes in CLOTHES.items():
        image = Image.new("L", (SIDE, SIDE))
        draw = ImageDraw.Draw(image)
        for brightness, outline in shapes:
            draw.polygon([(x * scale, y * scale) for x, y in outline], fill=brightness)
        files.append(folder / f"{name}.png")
        _with_grain(image).save(files[-1])
    return files


def _with_grain(image: Image.Image) -> Image.Image:
    """Fabric instead of even grey, and soft edges."""
    pixels = np.asarray(image, np.float32)
    grain = np.random.default_rng(0).normal(0, GRAIN, (CELLS, CELLS)).astype(np.float32)
    coarse = np.asarray(Image.fromarray(grain).resize(image.size, Image.Resampling.BICUBIC))
    fabric = np.where(pixels > 0, pixels + coarse, 0).clip(0, 255).astype(np.uint8)
    return Image.fromarray(fabric).filter(ImageFilter.GaussianBlur(SIDE / CELLS / 4))
