"""The digits of `sklearn.datasets.load_digits` in ImageNet's layout, 32 x 32, with an honest split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SEED = 2  # of everything drawn here and in the scenes; not VERSION, which changes with any of the sets
NUM_COPIES = 3  # augmented images of each training digit, next to the digit itself

Floats = NDArray[np.float64]
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
    """Writes each digit filling its image, and of each training digit NUM_COPIES as they appear in scenes.

    The copies are inked, turned, small and off centre. A model that has seen only centred digits tells none apart in
    a scene, and segmentation gains nothing from its weights (docs/segmentation.md).
    """
    for split, digits in load_digits().items():
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
        for number, label, grey in digits:
            stem = folder / split / str(label) / f"digit_{number:04d}"
            Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC).save(f"{stem}.png")
            for copy in range(NUM_COPIES if split == "train" else 0):
                drawn = _copy(grey, np.random.RandomState([SEED, number, copy]))
                Image.fromarray(drawn).save(f"{stem}_{copy + 1}.png")


def _copy(grey: NDArray[np.uint8], random: np.random.RandomState) -> NDArray[np.uint8]:
    """A digit 14 to 27 pixels high before it is turned, anywhere on a black image [32, 32]."""
    shape = draw_digit(grey, random.randint(14, 28), random)[:32, :32]
    height, width = shape.shape
    top, left = random.randint(0, 33 - height), random.randint(0, 33 - width)
    image = np.zeros((32, 32), dtype=np.uint8)
    image[top : top + height, left : left + width] = np.rint(shape * 255)
    return image


def draw_digit(grey: NDArray[np.uint8], size: int, random: np.random.RandomState) -> Floats:
    """A digit as opacity [h, w] from 0 to 1, `size` pixels high before it is turned a little."""
    height, width = round(size * 10 / 8), round(size * 10 / 8 * random.uniform(0.85, 1.1))

    image = Image.fromarray(np.pad(grey, 1)).resize((width, height), Image.Resampling.BICUBIC)
    image = image.rotate(random.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    opacity = np.clip((np.asarray(image) / 255 - 0.2) / 0.4, 0, 1)
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
