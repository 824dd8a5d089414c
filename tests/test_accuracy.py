"""Top-1 and top-5: equal to a count by hand, for ties, few classes, uneven batches and several processes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcnet_cli import dist
from hcnet_cli.console import UserError
from hcnet_cli.tasks.classification.metric import Accuracy


def drawn(images: int, classes: int, seed: int, levels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, and labels."""
    random = np.random.RandomState(seed)
    scores = torch.tensor(random.randint(0, levels, (images, classes)), dtype=torch.float32)
    return scores, torch.tensor(random.randint(0, classes, images))


def by_hand(scores: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Sorts each row's classes by falling score, then by class number. The rest as the formulas say, image by image."""
    rows = [sorted(range(len(row)), key=lambda c, row=row: (-row[c], c)) for row in scores.tolist()]
    labels = target.tolist()
    nll = brier = 0.0
    bins: dict[int, list[tuple[float, bool]]] = {}
    for t, row, values in zip(labels, rows, scores.tolist(), strict=True):
        total = sum(math.exp(value) for value in values)
        p = [math.exp(value) / total for value in values]
        nll -= math.log(p[t]) / len(rows)
        brier += sum((one - (k == t)) ** 2 for k, one in enumerate(p)) / len(rows)
        number = next(b for b in range(15) if b / 15 < max(p) - 1e-12 <= (b + 1) / 15 + 1e-12)
        bins.setdefault(number, []).append((max(p), t == row[0]))
    gaps = [abs(sum(right for _, right in one) - sum(p for p, _ in one)) for one in bins.values()]
    return {
        "nll": nll,
        "brier": brier,
        "ece": 100 * sum(gaps) / len(rows),
        "top1": 100 * sum(t == row[0] for t, row in zip(labels, rows, strict=True)) / len(rows),
        "top5": 100 * sum(t in row[:5] for t, row in zip(labels, rows, strict=True)) / len(rows),
    }


def batch(target: torch.Tensor, part: slice = slice(None)) -> dict[str, torch.Tensor]:
    return {"target": target[part], "sample": torch.arange(len(target))[part]}


def evaluator(classes: int) -> Accuracy:
    return Accuracy(classes, [f"class {i}" for i in range(classes)])


@settings(deadline=None, max_examples=100)
@given(images=st.integers(1, 40), classes=st.integers(1, 12), batch_size=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_accuracy_is_what_counting_by_hand_gives(images: int, classes: int, batch_size: int, seed: int) -> None:
    scores, target = drawn(images, classes, seed)
    accuracy = evaluator(classes)
    for i in range(0, images, batch_size):
        accuracy.update(scores[i : i + batch_size], batch(target, slice(i, i + batch_size)))
    made, expected = accuracy.compute(), by_hand(scores, target)
    assert {name: made[name] for name in ("top1", "top5")} == {name: expected[name] for name in ("top1", "top5")}
    assert {name: made.get(name) for name in expected} == pytest.approx(expected, abs=6e-5)
    assert made.keys() <= {*expected, "top1_95_lower", "top1_95_upper"}


def test_top5_of_fewer_than_five_classes_looks_at_all() -> None:
    scores, target = drawn(20, 3, 0)
    accuracy = evaluator(3)
    accuracy.update(scores, batch(target))
    assert accuracy.compute()["top5"] == 100


def test_equal_scores_go_to_the_lower_class_number() -> None:
    accuracy = evaluator(10)
    accuracy.update(torch.zeros(10, 10), batch(torch.arange(10)))
    made = accuracy.compute()
    assert (made["top1"], made["top5"]) == (10, 50)


def test_two_processes_give_the_numbers_of_one_to_the_last_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, target = drawn(37, 7, 1)  # does not divide by two
    whole = evaluator(7)
    whole.update(scores, batch(target))
    parts = [evaluator(7) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.update(scores[rank::2], batch(target, slice(rank, None, 2)))
    totals = {name: sum(getattr(part, name) for part in parts) for name in ("confusion", "top5")}
    expected = whole.compute()

    def summed(x: torch.Tensor) -> torch.Tensor:
        return next(totals[name] for part in parts for name in totals if getattr(part, name) is x)

    def gathered(x: object) -> list[object]:
        (name,) = {name for part in parts for name in ("kept", "fit", "mistakes") if getattr(part, name) is x}
        return [getattr(part, name) for part in parts]

    monkeypatch.setattr(dist, "all_reduce_sum", summed)
    monkeypatch.setattr(dist, "gather", gathered)
    assert [part.compute() for part in parts] == [expected] * 2


def test_computing_again_changes_nothing() -> None:
    accuracy = evaluator(4)
    scores, target = drawn(9, 4, 2)
    accuracy.update(scores, batch(target))
    assert accuracy.compute() == accuracy.compute()


def test_what_is_saved_adds_up(tmp_path: Path) -> None:
    scores, target = drawn(50, 6, 3)
    target[target == 2] = 3  # class 2 has no image
    accuracy = evaluator(6)
    accuracy.update(scores, batch(target))
    result = accuracy.compute()
    accuracy.save(tmp_path / "final")
    per_class: dict[str, Any] = json.loads((tmp_path / "final" / "per_class.json").read_text())
    assert list(per_class) == [f"class {i}" for i in range(6)]
    assert per_class["class 2"] == {"images": 0, "top1": None, "top5": None}
    seen = [c for c in per_class.values() if c["images"]]
    for name in ("top1", "top5"):
        assert sum(c["images"] * c[name] for c in seen) / 50 == pytest.approx(result[name])
    cells = json.loads((tmp_path / "final" / "confusion.json").read_text())["cells"]
    assert sum(n for _, _, n in cells) == 50
    assert 2 * sum(n for truth, prediction, n in cells if truth == prediction) == result["top1"]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_accuracy(broken: float) -> None:
    scores = torch.zeros(2, 3)
    scores[1, 2] = broken
    with pytest.raises(UserError, match="not finite"):
        evaluator(3).update(scores, batch(torch.tensor([0, 1])))


def test_the_best_classes_of_each_image_are_kept_in_the_order_of_the_data(tmp_path: Path) -> None:
    """Batches in any order, names with commas and line breaks; each line against numpy's stable sort."""
    scores, target = drawn(23, 7, 5)
    accuracy = Accuracy(7, [f"a, {i}\n" for i in range(7)], lambda sample: f"val/{sample}.png")
    for part in (slice(16, None), slice(0, 16)):
        accuracy.update(scores[part], batch(target, part))
    accuracy.compute()
    accuracy.save(tmp_path)
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        order = np.argsort(-scores[i].numpy(), kind="stable")[:5]
        assert (row["image"], row["label"]) == (f"val/{i}.png", f"a, {int(target[i])}\n")
        assert [row[f"class_{n}"] for n in range(1, 6)] == [f"a, {c}\n" for c in order]
        assert [float(row[f"score_{n}"]) for n in range(1, 6)] == scores[i].numpy()[order].tolist()
    assert len(rows) == 23
