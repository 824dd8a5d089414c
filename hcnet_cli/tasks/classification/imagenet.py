"""What ImageNet-1K is: its classes and its numbers of images."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUM_TRAIN, NUM_VAL = 1_281_167, 50_000  # images of ImageNet-1K
MIN_DISTINCT = 0.99  # of its files have different contents; some hundred pictures are there twice
SYNSET = re.compile(r"n\d{8}")


def is_imagenet(classes: Sequence[str], num_train: int, num_val: int, num_distinct: int) -> bool:
    """Whether these are the classes and the images of ILSVRC2012: as many of them, and hardly one twice."""
    return (
        (num_train, num_val) == (NUM_TRAIN, NUM_VAL)
        and num_distinct >= MIN_DISTINCT * (NUM_TRAIN + NUM_VAL)
        and len(classes) == 1000
        and list(classes) == synsets()
    )


def part_of_imagenet(classes: Sequence[str], num_train: int, num_val: int) -> str:
    """Which part of ImageNet-1K this is, for the tables; "" for data with other classes."""
    if not all(SYNSET.fullmatch(name) for name in classes) or not set(classes) <= set(synsets()):
        return ""
    return (
        f"Part of ImageNet-1K: {len(classes):,} of 1,000 classes, {num_train:,} of {NUM_TRAIN:,} training and "
        f"{num_val:,} of {NUM_VAL:,} validation images."
    )


def synsets() -> list[str]:
    """The class ids of ImageNet-1K, sorted, as timm lists them."""
    from timm.data import ImageNetInfo  # seconds, which other data need not wait

    return list(ImageNetInfo().label_names())
