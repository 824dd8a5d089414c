"""The digits of `sklearn.datasets.load_digits` in ImageNet's layout, 32 x 32, drawn as photographs are hard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from hcnet_cli.data.embedded.drawing import TEXTURES, Floats, color, texture

SEED = 2  # of everything drawn here and in the scenes; not cache.EMBEDDED_VERSION, which changes with any of the sets
SIDE = 32  # pixels of an image
COPIES = {"train": 10, "val": 6}  # images of each digit

Digit = tuple[int, int, NDArray[np.uint8]]  # number, class, grey image [8, 8]


def load_digits() -> dict[str, list[Digit]]:
    """For `train` and `val` the digits; four in five of each class are for training."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # sixteen levels -> 0..255
    split: dict[str, list[Digit]] = {"train": [], "val": []}
    random = np.random.RandomState(0)
    for label in range(10):
        numbers = random.permutation(np.flatnonzero(bunch.target == label))
        cut = round(0.8 * len(numbers))
        split["train"] += [(int(i), label, grey[i]) for i in numbers[:cut]]
        split["val"] += [(int(i), label, grey[i]) for i in numbers[cut:]]
    return split


def make_digits(folder: Path) -> None:
    """Writes COPIES images of each digit. Training images show training digits alone, also as clutter."""
    random = np.random.RandomState()
    for split, digits in load_digits().items():
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
        for number, label, grey in digits:
            for copy in range(COPIES[split]):
                random.seed([SEED, number, copy])  # making a generator takes ten times as long
                image = draw_image(grey, digits, random)
                Image.fromarray(image).save(f"{folder}/{split}/{label}/digit_{number:04d}_{copy}.png")


def draw_image(grey: NDArray[np.uint8], others: Sequence[Digit], random: np.random.RandomState) -> NDArray[np.uint8]:
    """A digit [8, 8] as an RGB image [SIDE, SIDE, 3].

    It stands anywhere, bright on a darker texture of any hue, at 19 to 27 pixels and low to high contrast, turned and
    sheared. A stroke, or a piece of another digit, may lie behind it and a bar across it; all is blurred and noisy.
    """
    dark, spread = random.uniform(30, 120), random.uniform(3, 22)  # luma of the ground
    bright = min(dark + spread / 2 + random.uniform(70, 150), 250)

    def ground(brightness: float) -> Floats:
        return color(random.uniform(), random.uniform(0, 0.6), brightness)

    def ink() -> Floats:
        return color(random.uniform(), random.uniform(0, 0.5), bright + random.uniform(-12, 12))

    one, two = ground(dark - spread / 2), ground(dark + spread / 2)
    pattern = texture(random.randint(len(TEXTURES)), SIDE, (4, 14), random)[..., None]
    image = one + pattern * (two - one)
    if random.uniform() < 0.5:
        clutter = _arc(random) if random.uniform() < 0.5 else _piece(others[random.randint(len(others))][2], random)
        image += clutter[..., None] * (ink() - image)
    image += _turned(grey, random.uniform(19, 27), 10, random)[..., None] * (ink() - image)
    if random.uniform() < 0.15:
        image += _bar(random)[..., None] * (ground(random.uniform(40, 215)) - image)
    blur = random.uniform(0, 0.7)
    image = ndimage.gaussian_filter(image, (blur, blur, 0)) + random.normal(0, 5, image.shape)
    return np.asarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))


# --- shapes, as opacity [SIDE, SIDE] from 0 to 1 ----------------------------------------------------------------------

Y, X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)


def _turned(grey: NDArray[np.uint8], size: float, angle: float, random: np.random.RandomState) -> Floats:
    """A digit `size` pixels high, turned by up to `angle` degrees and sheared, anywhere on the image."""
    turn, shear, stretch = (
        np.deg2rad(random.uniform(-angle, angle)),
        random.uniform(-0.15, 0.15),
        random.uniform(0.85, 1.15),
    )
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    back = np.linalg.inv(rotation @ [[1, 0], [shear, 1]] @ np.diag([size / 8, size / 8 * stretch]))
    slack = (SIDE - size) / 2 + 1
    center = (SIDE - 1) / 2 + random.uniform(-slack, slack, 2)
    padded = np.zeros((12, 12))
    padded[2:-2, 2:-2] = grey / 255
    shape = ndimage.affine_transform(padded, back, 5.5 - back @ center, (SIDE, SIDE))
    return np.asarray(np.clip((shape - 0.2) / 0.4, 0, 1))


def _piece(grey: NDArray[np.uint8], random: np.random.RandomState) -> Floats:
    """A digit at any angle, of which a strip along one side of the image is seen."""
    shape = np.roll(_turned(grey, random.uniform(12, 24), 180, random), random.randint(8, 24), random.randint(2))
    shape[random.randint(8, 13) :] = 0
    return np.rot90(shape, random.randint(4))


def _arc(random: np.random.RandomState) -> Floats:
    """A piece of a circle, as a stroke."""
    (y, x), radius, width = random.uniform(-4, SIDE + 4, 2), random.uniform(4, 16), random.uniform(1, 2.2)
    angle = (np.arctan2(Y - y, X - x) - random.uniform(0, 2 * np.pi)) % (2 * np.pi)
    stroke = np.clip(width + 0.5 - np.abs(np.hypot(Y - y, X - x) - radius), 0, 1)
    return np.asarray(stroke * (angle < random.uniform(0.8, 2.5)))


def _bar(random: np.random.RandomState) -> Floats:
    """A bar across the image, 3 to 7 pixels wide."""
    angle, width = random.uniform(0, np.pi), random.uniform(1.5, 3.5)
    along = (X - SIDE / 2) * np.cos(angle) + (Y - SIDE / 2) * np.sin(angle) - random.uniform(-8, 8)
    return np.asarray(np.clip(width + 0.5 - np.abs(along), 0, 1))


def draw_digit(grey: NDArray[np.uint8], size: int, random: np.random.RandomState) -> Floats:
    """A digit for the scenes, as opacity [h, w] from 0 to 1, `size` pixels high before it is turned a little."""
    height, width = round(size * 10 / 8), round(size * 10 / 8 * random.uniform(0.85, 1.1))

    image = Image.fromarray(np.pad(grey, 1)).resize((width, height), Image.Resampling.BICUBIC)
    image = image.rotate(random.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    opacity = np.clip((np.asarray(image) / 255 - 0.2) / 0.4, 0, 1)
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
