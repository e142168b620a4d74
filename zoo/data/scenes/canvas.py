"""Textured canvases: what lies behind the items of a scene."""

import numpy as np

from zoo.data.scenes.cutouts import resample

__all__ = ["draw_canvas"]


def draw_canvas(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws a canvas of a random kind in two random, not too different colours; uint8 of shape (size, size, 3)."""
    kinds = (_gradient, _noise, _cloth, _stripes, _checks)
    pattern = kinds[rng.integers(len(kinds))](rng, size)
    grain = rng.integers(0, 7, size=(size, size), dtype=np.uint8)
    levels = (pattern * 249).astype(np.uint8) + grain
    return _ramp(rng).take(levels, axis=0)


def _ramp(rng: np.random.Generator) -> np.ndarray:
    """Colours of the 256 levels of a pattern, uint8 (256, 3): greyish, with a difference of 30 to 90 per channel."""
    grey = rng.integers(40, 216)
    first = grey + rng.integers(-40, 41, size=3)
    step = rng.integers(30, 91, size=3) * (1 if grey < 128 else -1)
    levels = np.arange(256)[:, None]
    return np.clip(first + step * levels // 255, 0, 255).astype(np.uint8)


def _plane(rng: np.random.Generator, size: int, slope: float) -> np.ndarray:
    """Coordinate along a random direction: ``slope`` times the position in the image, of shape (size, size)."""
    dx, dy = rng.random(2) * 2 - 1
    length = np.sqrt(dx * dx + dy * dy) + 1e-9
    position = np.arange(size) * (slope / size)
    return position * (dx / length) + (position * (dy / length))[:, None]


def _triangle(x: np.ndarray) -> np.ndarray:
    """A wave of period 1 between 0 and 1."""
    return np.abs(2 * (x - np.floor(x)) - 1)


def _edges(wave: np.ndarray, steepness: float) -> np.ndarray:
    """Makes a wave between 0 and 1 steeper at one half: soft stripes become hard ones."""
    return np.clip((wave - 0.5) * steepness + 0.5, 0, 1)


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    return _triangle(_plane(rng, size, rng.random() * 0.8 + 0.2) + rng.random())


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise of four frequencies, the lowest of which is random."""
    cells = rng.integers(2, 9)
    total, weight = np.zeros((size, size)), 1.0
    for _ in range(4):
        total += weight * (resample(rng.random((cells, cells)), size, size) - 0.5)
        cells, weight = 2 * cells, 0.6 * weight
    return np.clip(0.5 + total, 0, 1)


def _cloth(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise with a direction, like woven threads or wood."""
    across, along = rng.integers(24, 97), rng.integers(2, 9)
    pattern = resample(rng.random((across, along)), size, size)
    return pattern if rng.integers(2) else pattern.T


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    wave = _triangle(_plane(rng, size, rng.integers(3, 17)) + rng.random())
    return _edges(wave, 1.0 + 7 * rng.random())


def _checks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Squares in two colours, turned by a random angle."""
    plane = _plane(rng, size, rng.integers(2, 9))
    waves = (_edges(_triangle(x + rng.random()), 12.0) for x in (plane, plane.T[:, ::-1]))
    first, second = waves
    return first + second - 2 * first * second
