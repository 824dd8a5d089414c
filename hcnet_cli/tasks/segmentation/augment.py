"""Augmentation for segmentation: image and label move together, and colours change as OpenCV would change them.

Random numbers come from numpy's global generator. Dimension letters: H x W before, h x w after a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hcnet_cli.data import images
from hcnet_cli.data.images import Size

Pixels = NDArray[np.uint8]


# --- geometry ---------------------------------------------------------------------------------------------------------


def resize_image(pixels: Pixels, size: Size) -> Pixels:
    """[H, W, 3] -> [h, w, 3], see `images.resize`."""
    resized = images.resize(torch.from_numpy(pixels).permute(2, 0, 1), size)  # channels last, which is faster
    return np.asarray(resized.permute(1, 2, 0))


def resize_label(label: Pixels, size: Size) -> Pixels:
    """[H, W] -> [h, w], nearest as OpenCV's resizeNN: floor(i * scale) in float64.

    torch computes it in float32, where some exact multiples fall short.
    """
    rows, columns = (
        np.minimum(np.floor(np.arange(after) * (1 / (after / before))).astype(int), before - 1)
        for before, after in zip(label.shape, size, strict=True)
    )
    return np.asarray(label.take(rows, axis=0).take(columns, axis=1))


def random_crop(label: Pixels, crop_size: int, cat_max_ratio: float, ignore_index: int) -> tuple[slice, slice]:
    """A window of at most `crop_size` a side, drawn again, up to ten times, while one class covers `cat_max_ratio`."""

    def draw() -> tuple[slice, slice]:
        top, left = (np.random.randint(max(side - crop_size, 0) + 1) for side in label.shape)
        return slice(top, top + crop_size), slice(left, left + crop_size)

    window = draw()
    if cat_max_ratio < 1:
        for _ in range(10):
            counts = np.bincount(label[window].ravel(), minlength=256)
            counts[ignore_index] = 0
            if np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum():
                break
            window = draw()
    return window


def pad(image: Tensor, size: int, value: float) -> Tensor:
    """[..., H, W] -> [..., size, size], with `value` at the bottom and at the right."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, size - width, 0, size - height), value=value)


# --- colour -----------------------------------------------------------------------------------------------------------


def photometric_distortion(pixels: Pixels) -> Pixels:
    """Brightness +-32, contrast and saturation x 0.5-1.5, hue +-18 of 180, each with probability 1/2.

    Contrast comes second or last, with equal probability. Every step ends in 8 bits, as in the reference. [H, W, 3].
    """

    def coin() -> bool:
        return bool(np.random.randint(2))

    def scaled(values: NDArray[Any], factor: float = 1.0, offset: float = 0.0) -> Pixels:
        return np.asarray(np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8))

    if coin():
        pixels = scaled(pixels, offset=np.random.uniform(-32, 32))
    contrast_first = coin()
    if contrast_first and coin():
        pixels = scaled(pixels, np.random.uniform(0.5, 1.5))
    if coin():
        hue, saturation, value = rgb_to_hsv(pixels)
        pixels = hsv_to_rgb(hue, scaled(saturation, np.random.uniform(0.5, 1.5)), value)
    if coin():
        hue, saturation, value = rgb_to_hsv(pixels)
        shifted = (hue.astype(np.int16) + np.random.randint(-18, 18)) % 180
        pixels = hsv_to_rgb(shifted.astype(np.uint8), saturation, value)
    if not contrast_first and coin():
        pixels = scaled(pixels, np.random.uniform(0.5, 1.5))
    return pixels


def rgb_to_hsv(pixels: Pixels) -> tuple[Pixels, Pixels, Pixels]:
    """[H, W, 3] -> hue in 0..179 (2 degrees each), saturation, value: OpenCV's 8-bit definition, bit for bit."""
    red, green, blue = (pixels[..., i].astype(np.int32) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    saturation = (spread * _PER_VALUE[value] + 2048) >> 12
    sector = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sector * _PER_SPREAD[spread] + 2048) >> 12
    hue += (hue < 0) * 180
    return hue.astype(np.uint8), saturation.astype(np.uint8), value.astype(np.uint8)


# 12-bit fixed point: 255 / value and 30 / spread (180 half degrees over six sectors)
_PER_VALUE = np.array([0, *(round(255 * 4096 / i) for i in range(1, 256))], dtype=np.int32)
_PER_SPREAD = np.array([0, *(round(30 * 4096 / i) for i in range(1, 256))], dtype=np.int32)


def hsv_to_rgb(hue: Pixels, saturation: Pixels, value: Pixels) -> Pixels:
    """The inverse, [H, W] each -> [H, W, 3]; at most one grey level from OpenCV's, by float rounding."""
    position = hue.astype(np.float32) * np.float32(1 / 30)  # 0 .. 6 around the circle
    v = value.astype(np.float32)
    chroma = v * saturation.astype(np.float32) * np.float32(1 / 255)
    channels = []
    for start in (5, 3, 1):  # red, green, blue: a trapezoid each, shifted by a third of the circle
        k = (position + start) % 6
        channels.append(v - chroma * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(channels, axis=-1).astype(np.uint8)  # truncated, not rounded, as in OpenCV
