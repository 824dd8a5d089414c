"""Textures and colours, on which the digits are drawn."""

from __future__ import annotations

import colorsys
import functools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TEXTURES = ("stripes", "dots", "checks", "gradient")


@functools.cache
def grid(size: int) -> Floats:
    """The rows and the columns [2, size, size] of the pixels of an image."""
    return np.mgrid[0:size, 0:size].astype(np.float64)


def texture(kind: int, size: int, periods: tuple[float, float], random: np.random.RandomState) -> Floats:
    """A pattern [size, size] of numbers from 0 to 1, turned by any angle. `periods`: in pixels, from and to."""
    y, x = grid(size)
    angle, period = random.uniform(0, np.pi), random.uniform(*periods)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period + random.uniform()
    v = (y * np.cos(angle) - x * np.sin(angle)) / period + random.uniform()
    patterns = {
        "stripes": lambda: u % 1 < 0.5,
        "dots": lambda: (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.3**2,
        "checks": lambda: (np.floor(u) + np.floor(v)) % 2,
        "gradient": lambda: (u - u.min()) / (u.max() - u.min()),
    }
    return np.asarray(patterns[TEXTURES[kind]](), dtype=np.float64)


def color(hue: float, saturation: float, brightness: float) -> Floats:
    """RGB [3], 0 to 255, of this luma as far as it can be reached."""
    rgb = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, 1.0))
    return np.minimum(255, rgb * (brightness / (rgb @ [0.299, 0.587, 0.114])))
