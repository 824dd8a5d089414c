"""Cross-validation: images are dealt into parts of equal classes, by their names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hcnet_cli import rng

NOTE = (  # below the tables of such runs
    "Cross-validation: a run of seed s is scored on fold s modulo {folds} of the training images and trained on the "
    "others; val/ is not used. Folds share training images, so intervals over them are too narrow for new data."
)
Rows = NDArray[np.intp]


def deal(names: Sequence[bytes], labels: NDArray[np.integer], number: int, folds: int) -> tuple[Rows, Rows]:
    """The rows to train on, and those of part `number`, in their order.

    The images of a class are shuffled by their names, then dealt to the parts in turn, going on where the class before
    ended: parts differ by one image at most, and by one of each class. Where parts differ, a fold with the smaller one
    leaves a training image of its largest class out: all folds train on as many. ValueError for fewer images than
    parts, and for a class of one image, which its fold could not learn.
    """
    if len(names) < folds:
        raise ValueError(f"{len(names)} training images make no {folds} folds")
    if 1 in (counts := np.bincount(labels)):
        single = names[int(np.flatnonzero(labels == np.argmax(counts == 1))[0])]
        raise ValueError(f"{single.decode(errors='backslashreplace')} is the only image of its class")
    shuffled = sorted(range(len(names)), key=lambda i: (labels[i], rng.derive("fold", names[i].hex())))
    part = np.empty(len(names), dtype=np.intp)
    part[shuffled] = np.arange(len(names)) % folds
    trained, scored = np.flatnonzero(part != number), np.flatnonzero(part == number)
    if len(scored) * folds < len(names):
        largest = np.bincount(labels[trained]).argmax()
        trained = np.delete(trained, np.flatnonzero(labels[trained] == largest)[-1])
    return trained, scored
