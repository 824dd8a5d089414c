"""How well a classifier's probabilities fit what is true: numbers in, numbers out.

Negative log-likelihood and Brier score (1950) of each image; the expected calibration error (Guo et al. 2017) over bins
of equal width. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 15  # as in Guo et al. 2017
Floats = NDArray[np.float64]


class Bin(NamedTuple):
    """The images whose confidence lies in (low, high]: how many, their mean confidence, the share that is right."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def image_scores(log_probabilities: Floats, labels: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """(confidence, negative log-likelihood, Brier score) of each image, [N] each, from log-probabilities [N, K].

    Confidence is the highest probability. The Brier score is the squared distance of the probabilities and the one-hot
    label, summed over the classes: from 0 to 2.
    """
    probabilities = np.exp(log_probabilities)
    of_label = log_probabilities[np.arange(len(labels)), labels]
    brier = (probabilities**2).sum(axis=1) - 2 * np.exp(of_label) + 1
    return probabilities.max(axis=1), -of_label, np.maximum(brier, 0.0)


def reliability(confidence: Floats, right: NDArray[np.bool_], count: int = BINS) -> list[Bin]:
    """The bins (low, high] of equal width over 0..1 that hold an image, from confidence and correctness [N]."""
    edges = np.linspace(0.0, 1.0, count + 1)
    numbers = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, count - 1)
    found = []
    for number in range(count):
        here = numbers == number
        if n := int(here.sum()):
            mean = math.fsum(confidence[here]) / n  # fsum: the same for any order of the images
            found.append(Bin(float(edges[number]), float(edges[number + 1]), n, mean, int(right[here].sum()) / n))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error: |accuracy - confidence| of the bins, weighted by their images; from 0 to 1."""
    total = sum(one.images for one in bins)
    return math.fsum(one.images * abs(one.accuracy - one.confidence) for one in bins) / total


def share_interval(right: int, n: int, alpha: float = 0.05) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the share right / n, by redrawing the n images; None where all are equal.

    The number of right ones in a resample is binomial (n, right / n), so its quantiles are exact and nothing is drawn.
    """
    if not 0 < right < n:
        return None
    from scipy.special import bdtr, bdtrik

    def quantile(level: float) -> float:
        k = math.ceil(float(bdtrik(level, n, right / n)))
        return (k - 1 if k and float(bdtr(k - 1, n, right / n)) >= level else k) / n

    return quantile(alpha / 2), quantile(1 - alpha / 2)
