"""Calibration against formulas by hand, scikit-learn and a bootstrap that redraws; the pictures against their axes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from hcnet_cli import charts
from hcnet_cli.calibration import Bin, calibration_error, image_scores, reliability, share_interval
from hcnet_cli.tasks.classification.metric import Accuracy


def drawn(images: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of an overconfident model, and labels."""
    random = np.random.default_rng(seed)
    logits = 3 * random.normal(size=(images, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([random.choice(classes, p=0.6 * p + 0.4 / classes) for p in probabilities])
    return probabilities, labels


def test_scores_of_two_images_by_hand() -> None:
    logs = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]))
    confidence, nll, brier = image_scores(logs, np.array([0, 2]))
    assert confidence == pytest.approx([0.7, 0.5])
    assert nll == pytest.approx([-math.log(0.7), math.log(4)])
    # 0.3² + 0.2² + 0.1²; 0.5² + 0.25² + 0.75²
    assert brier == pytest.approx([0.14, 0.875])


def test_calibration_error_of_five_images_by_hand() -> None:
    """Bins of 0.2: 0.55 and 0.60 (the edge belongs to the lower bin), 0.9 three times with two right."""
    confidence = np.array([0.55, 0.60, 0.9, 0.9, 0.9])
    found = reliability(confidence, np.array([True, False, True, True, False]), 5)
    assert [(one.images, round(one.low, 9), round(one.high, 9)) for one in found] == [(2, 0.4, 0.6), (3, 0.8, 1.0)]
    assert [one.confidence for one in found] == pytest.approx([0.575, 0.9])
    assert [one.accuracy for one in found] == pytest.approx([0.5, 2 / 3])
    assert calibration_error(found) == pytest.approx((2 * 0.075 + 3 * (0.9 - 2 / 3)) / 5)


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_those_of_scikit_learn(seed: int) -> None:
    probabilities, labels = drawn(400, 7, seed)
    confidence, nll, brier = image_scores(np.log(probabilities), labels)
    assert nll.mean() == pytest.approx(log_loss(labels, probabilities, labels=range(7)))
    one_hot = np.eye(7)[labels]
    assert brier.mean() == pytest.approx(((probabilities - one_hot) ** 2).sum(axis=1).mean())
    right = probabilities.argmax(axis=1) == labels
    found = reliability(confidence, right)
    shares, means = calibration_curve(right, confidence, n_bins=15)
    assert [one.accuracy for one in found] == pytest.approx(shares.tolist())
    assert [one.confidence for one in found] == pytest.approx(means.tolist())
    assert sum(one.images for one in found) == 400


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large_one() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.1, 1, 100_000)
    right = random.uniform(size=100_000) < confidence
    assert calibration_error(reliability(confidence, right)) < 0.01
    assert calibration_error(reliability(confidence**0.5, right)) > 0.05


@pytest.mark.parametrize(("right", "n"), [(1, 10), (7, 10), (83, 100), (350, 360), (4000, 5000)])
def test_the_interval_is_that_of_a_bootstrap_that_redraws_images(right: int, n: int) -> None:
    images = np.arange(n) < right
    random = np.random.default_rng(1)
    resampled = np.array([images[random.integers(0, n, n)].mean() for _ in range(4000)])
    low, high = share_interval(right, n) or (math.nan, math.nan)
    for end, level in ((low, 0.025), (high, 0.975)):
        below, up_to = (resampled < end - 1e-9).mean(), (resampled <= end + 1e-9).mean()
        assert below - 0.01 <= level <= up_to + 0.01  # the smallest share that so many resamples do not exceed
    assert low <= right / n <= high


def test_where_all_images_are_alike_redrawing_them_says_nothing() -> None:
    assert share_interval(0, 9) is None
    assert share_interval(9, 9) is None
    accuracy = Accuracy(3, ["a", "b", "c"])
    accuracy.update(torch.eye(3), {"target": torch.arange(3), "sample": torch.arange(3)})
    assert accuracy.compute().keys() == {"top1", "top5", "nll", "ece", "brier"}


def test_the_pictures_show_bars_and_cells() -> None:
    axes = Figure().subplots()
    charts.reliability(axes, [(0.5, 1.0, 0.25, 1234)], 0.5)
    (bar,) = axes.patches
    assert [text.get_text() for text in axes.texts] == ["1,234"]
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (50, 50, 25)
    assert axes.get_title("right") == "expected calibration error 50.00 %"
    axes = Figure().subplots()
    charts.confusion(axes, ["cat", "\u51b0"], np.array([[3, 0], [1, 3]]), 9.5)
    assert np.array_equal(axes.images[0].get_array(), [[100, 0], [25, 75]])
    assert [text.get_text() for text in axes.texts] == ["100", "25", "75"]
    # letters that the font lacks are escapes: two such names differ
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "\\u51b0"]
    axes = Figure().subplots()
    charts.confusion(axes, [f"class {i}" for i in range(1000)], np.eye(1000, dtype=np.int64), 9.5)
    assert not axes.texts


def test_bins_and_pictures_are_kept(tmp_path: Path) -> None:
    probabilities, labels = drawn(60, 4, 5)
    accuracy = Accuracy(4, list("abcd"))
    batch = {"target": torch.tensor(labels), "sample": torch.arange(60)}
    accuracy.update(torch.tensor(np.log(probabilities)), batch)
    metrics = accuracy.compute()
    accuracy.save(tmp_path)
    kept = json.loads((tmp_path / "calibration.json").read_text())
    bins = [Bin(**one) for one in kept["bins"]]
    assert 100 * calibration_error(bins) == pytest.approx(metrics["ece"], abs=1e-4)
    assert "15 bins" in kept["protocol"]
    with Image.open(tmp_path / "pictures" / "calibration.png") as picture:
        assert picture.width > picture.height
