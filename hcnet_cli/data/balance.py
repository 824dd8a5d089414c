"""Class weights against skewed classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hcnet_cli.console import UserError
from hcnet_cli.data.splits import DataSplits


def class_weights(wanted: str | Sequence[float], data: DataSplits) -> tuple[float, ...]:
    """The weight of each class in the loss; () for "none".

    "balanced": N / (K n_c) for n_c of N training samples (images, or labelled pixels) of K classes, as
    `class_weight="balanced"` of scikit-learn: the mean over the samples is 1. A class without any has no weight and is
    not among the K. UserError for a list of another length than the classes', or all of zeros.
    """
    if wanted == "none" or not len(data.train):  # an evaluation alone
        return ()
    if wanted == "balanced":
        counts = class_counts(data)
        present = counts > 0
        weights = np.divide(counts.sum() / present.sum(), counts, out=np.zeros(len(counts)), where=present)
        return tuple(weights.tolist())
    assert not isinstance(wanted, str)
    if len(wanted) != data.info.num_classes:
        raise UserError(
            f"The data have {data.info.num_classes} classes, and head.class_weights has {len(wanted)} numbers.",
            hint=f"Their order: {', '.join(data.class_names[:10])}{', ...' if len(data.class_names) > 10 else ''}.",
        )
    return tuple(wanted)


def class_counts(data: DataSplits) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Training samples of each class [K]. UserError for a data format that does not count them."""
    if data.class_counts is None:
        raise UserError("This data format does not count the samples of its classes (DataSplits.class_counts).")
    return np.asarray(data.class_counts, dtype=np.float64)
