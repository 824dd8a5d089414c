"""kNN and linear probe against scikit-learn and a minimum by scipy; the features against what the head takes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import hcnet_cli.models  # noqa: F401  # registers HcNet
from hcnet_cli import dist
from hcnet_cli.console import UserError
from hcnet_cli.tasks.classification.augment import Normalise
from hcnet_cli.tasks.classification.features import STRENGTHS, OnFeatures, linear_probe, nearest_neighbours
from hcnet_cli.tasks.classification.task import FeatureTask


def drawn(images: int, seed: int, classes: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    """Features that overlap, around a centre for each class."""
    random = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    found = centres[labels] + random.normal(size=(images, width))
    return torch.tensor(found, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("images", [60, 7])
def test_neighbours_vote_as_in_scikit_learn(images: int) -> None:
    bank, labels = drawn(images, 0)
    queries, _ = drawn(25, 1)
    votes, _ = nearest_neighbours(bank, labels, queries, 4)
    theirs = KNeighborsClassifier(
        min(20, images), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.double().numpy(), labels.numpy())
    expected = theirs.predict_proba(queries.double().numpy())
    assert votes.numpy() == pytest.approx(expected, abs=1e-4)
    assert votes.argmax(dim=1).tolist() == theirs.predict(queries.double().numpy()).tolist()


def chosen(x: np.ndarray, y: np.ndarray) -> float:
    """The C with the most right among samples 4, 9, 14, ... by scikit-learn, one after the other."""
    held_out = np.arange(len(y)) % 5 == 4
    best, most = 0.0, -1
    for c in STRENGTHS:
        mean, deviation = x[~held_out].mean(axis=0), x[~held_out].std(axis=0)
        fitted = LogisticRegression(C=c, max_iter=1000).fit((x[~held_out] - mean) / deviation, y[~held_out])
        right = int((fitted.predict((x[held_out] - mean) / deviation) == y[held_out]).sum())
        best, most = (c, right) if right > most else (best, most)
    return best


def test_the_probe_is_the_minimum_of_its_loss_with_the_c_that_was_held_out_for() -> None:
    """The loss written out: sum of cross-entropies + |W|^2 / 2C over standardised features, minimised by scipy."""
    bank, labels = drawn(90, 2)
    queries, _ = drawn(30, 3)
    scores, lines = linear_probe(bank, labels, queries, 5)  # the fifth class has no image
    x, y = bank.double().numpy(), labels.numpy()
    c = chosen(x, y)
    assert lines[-1] == f"The probe has C = {c:g}."
    assert [line.split(":")[0] for line in lines[:-1]] == [f"C = {one:g}" for one in STRENGTHS]
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    z, one_hot = (x - mean) / deviation, np.eye(4)[y]

    def logs(w: np.ndarray, features: np.ndarray) -> np.ndarray:
        logits = features @ w[:24].reshape(6, 4) + w[24:]
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        found = logs(w, z)
        residual = np.exp(found) - one_hot
        gradient = np.concatenate([(z.T @ residual).ravel() + w[:24] / c, residual.sum(axis=0)])
        return float(-(one_hot * found).sum() + (w[:24] ** 2).sum() / (2 * c)), gradient

    w = minimize(loss, np.zeros(28), jac=True, method="BFGS", options={"gtol": 1e-6}).x
    expected = logs(w, (queries.double().numpy() - mean) / deviation)
    assert np.exp(scores[:, :4].numpy()) == pytest.approx(np.exp(expected), abs=2e-3)
    assert scores[:, :4].argmax(dim=1).tolist() == expected.argmax(axis=1).tolist()
    assert scores[:, 4].exp().max() < 1e-9


def test_too_few_images_for_a_probe() -> None:
    bank, _ = drawn(10, 0)
    for images, labels in ((4, [0, 1, 2, 3]), (10, [0] * 10)):
        with pytest.raises(UserError, match="too few for a probe"):
            linear_probe(bank[:images], torch.tensor(labels), bank, 4)


def test_each_process_scores_its_share_by_the_whole_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples in any order, every second one with the other process: the counts of both are those of one process."""
    features, labels = drawn(50, 4)
    facts = {"sample": torch.arange(50), "target": labels}

    def evaluator(samples: Tensor) -> OnFeatures:
        made = OnFeatures(4, list("abcd"), figures=(), bank=30, classify=nearest_neighbours)
        made.update(features[samples], {name: values[samples] for name, values in facts.items()})
        return made

    whole = evaluator(torch.arange(50).flip(0))
    votes, _ = nearest_neighbours(features[:30], labels[:30], features[30:], 4)
    assert whole.compute()["top1"] == 100 * (votes.argmax(dim=1) == labels[30:]).sum().item() / 20
    parts = [evaluator(torch.arange(start, 50, 2)) for start in (0, 1)]
    found = [part.found for part in parts]
    monkeypatch.setattr(dist, "gather", lambda mine: found if any(mine is one for one in found) else [mine])
    for part in parts:
        part.compute()
    assert torch.equal(sum(part.confusion for part in parts), whole.confusion)


def test_a_rehearsal_without_validation_images_scores_nothing(tmp_path: Path) -> None:
    features, labels = drawn(3, 4)
    made = OnFeatures(4, list("abcd"), bank=30, classify=linear_probe)
    made.partial = True
    made.update(features, {"sample": torch.arange(3), "target": labels})
    assert math.isnan(made.compute()["top1"])
    made.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hcnet_pico", "test_vit", "test_convnext"])
def test_features_are_what_the_last_layer_takes(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    taken: list[Tensor] = []
    model.get_classifier().register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    task = FeatureTask(model, ["a", "b", "c"], Normalise((0.5,) * 3, (0.5,) * 3), None, 0.0)
    side = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 64, 64))[1] if name != "hcnet_pico" else 64
    batch = {"image": torch.randint(0, 255, (2, side, side, 3), dtype=torch.uint8), "holes": [], "fill": torch.empty(0)}
    with torch.no_grad():
        model(task.normalise(batch))
        found = task.predict(batch)
    assert found.ndim == 2
    assert torch.equal(found, taken[0])
