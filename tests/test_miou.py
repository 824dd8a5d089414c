"""mIoU: equal to a brute-force count, with ignored pixels, absent classes and any split over processes;
pictures.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hcnet_cli import dist
from hcnet_cli.console import UserError
from hcnet_cli.pictures import overlay, palette
from hcnet_cli.tasks.segmentation.metric import MeanIoU, scores


def brute_force(labels, predictions, num_classes, ignore_index=255):
    """Pixel by pixel, sets of positions per class: no confusion matrix, no numpy."""
    truth, guess = {c: set() for c in range(num_classes)}, {c: set() for c in range(num_classes)}
    for image, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
        for y, row in enumerate(label.tolist()):
            for x, c in enumerate(row):
                if c != ignore_index:
                    truth[c].add((image, y, x))
                    guess[int(prediction[y][x])].add((image, y, x))
    ious, accs = [], []
    for c in range(num_classes):
        if truth[c] | guess[c]:
            ious.append(len(truth[c] & guess[c]) / len(truth[c] | guess[c]))
        if truth[c]:
            accs.append(len(truth[c] & guess[c]) / len(truth[c]))
    right = sum(len(truth[c] & guess[c]) for c in truth)
    return {
        "mIoU": 100 * sum(ious) / len(ious),
        "mAcc": 100 * sum(accs) / len(accs),
        "aAcc": 100 * right / sum(map(len, truth.values())),
        "num_present": len(ious),
    }


def random_maps(seed, count=5, num_classes=6, absent=()):
    """Labels with ignored pixels and predictions that are often right, of different sizes; `absent` occur
    nowhere.
    """
    random = np.random.RandomState(seed)
    present = [c for c in range(num_classes) if c not in absent]
    labels, predictions = [], []
    for _ in range(count):
        size = random.randint(3, 12, 2)
        label = random.choice(present, size).astype(np.uint8)
        prediction = np.where(random.uniform(size=size) < 0.6, label, random.choice(present, size)).astype(np.uint8)
        label[random.uniform(size=size) < 0.2] = 255
        labels.append(label)
        predictions.append(prediction)
    return labels, predictions


def batches(labels, predictions, indices, batch_size=2, folder="."):
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        batch = {
            "sample": torch.tensor(chosen),
            "path": [f"{folder}/{i}.jpg" for i in chosen],
            "label": [torch.from_numpy(labels[i]) for i in chosen],
        }
        yield [torch.from_numpy(predictions[i]) for i in chosen], batch


def evaluate(labels, predictions, num_classes, indices=None):
    evaluator = MeanIoU([str(c) for c in range(num_classes)])
    for maps, batch in batches(labels, predictions, list(range(len(labels))) if indices is None else indices):
        evaluator.update(maps, batch)
    return evaluator


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), absent=st.sets(st.integers(0, 5), max_size=3))
def test_equals_a_brute_force_count(seed, absent):
    """With ignored pixels, absent classes and images of different sizes."""
    labels, predictions = random_maps(seed, absent=tuple(absent))
    got = evaluate(labels, predictions, 6).compute()
    expected = brute_force(labels, predictions, 6)
    assert got == pytest.approx(expected, abs=1e-9)


def test_absent_classes_are_left_out_and_named(capsys):
    """Neither 0 nor 1 stands in for a class that does not occur; "mIoU over k of C classes" says so."""
    label = np.array([[0, 0, 1, 255]], np.uint8)
    got = evaluate([label], [np.array([[0, 0, 1, 3]], np.uint8)], 5).compute()
    assert got == {"mIoU": 100, "mAcc": 100, "aAcc": 100, "num_present": 2}
    assert "mIoU over 2 of 5 classes (absent: 2, 3, 4)." in capsys.readouterr().err
    evaluator = MeanIoU([str(c) for c in range(5)], ignore_index=2)  # class 2 is ignored, not absent
    evaluator.update([torch.tensor([[0, 1, 1]])], next(batches([label[:, :3]], [label[:, :3]], [0]))[1])
    evaluator.compute()
    assert "classes (absent: 3, 4)." in capsys.readouterr().err


def test_a_class_predicted_but_not_labelled_has_iou_zero():
    """It has a union, so it counts (as in mmsegmentation), but it has no accuracy."""
    result = scores(np.array([[3, 1], [0, 0]]))
    assert result["iou"].tolist() == [75, 0]
    assert result["mIoU"] == 37.5
    assert result["mAcc"] == 75


def test_a_class_of_the_ignored_number_has_no_iou_though_it_is_predicted():
    result = scores(np.array([[0, 0], [1, 3]]), ignore_index=0)
    assert np.isnan(result["iou"][0])
    assert (result["mIoU"], result["num_present"]) == (75, 1)


def test_split_over_two_processes_with_an_odd_number_of_images(monkeypatch):
    """Each image once, integers summed: the same to the last digit."""
    labels, predictions = random_maps(3, count=7)
    whole = evaluate(labels, predictions, 6).compute()
    parts = [evaluate(labels, predictions, 6, list(range(rank, 7, 2))) for rank in range(2)]
    total = parts[0]._confusion + parts[1]._confusion
    monkeypatch.setattr(dist, "all_reduce_sum", lambda _: total)
    monkeypatch.setattr(dist, "gather", lambda _: [part._kept for part in parts])
    assert [part.compute() for part in parts] == [whole, whole]
    assert sorted(parts[0]._kept) == list(range(7))


def test_a_process_without_images_still_takes_part(monkeypatch):
    labels, predictions = random_maps(4, count=1)
    busy, idle = evaluate(labels, predictions, 6), evaluate(labels, predictions, 6, [])
    monkeypatch.setattr(dist, "all_reduce_sum", lambda x: x + busy._confusion if not x.any() else x)
    assert idle.compute() == busy.compute()


def test_no_labelled_pixel_is_an_error_not_nan():
    with pytest.raises(UserError, match="No pixel of the validation set has a label"):
        evaluate([np.full((2, 2), 255, np.uint8)], [np.zeros((2, 2), np.uint8)], 3).compute()


def test_saved_results_and_pictures(tmp_path):
    """per_class.json has null for undefined numbers; a picture shows image, label and prediction side by
    side.
    """
    labels, predictions = random_maps(5, count=3, absent=(4,))
    for i, label in enumerate(labels):
        Image.fromarray(np.full((*label.shape, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.jpg")
    evaluator = MeanIoU([f"class {c}" for c in range(6)], num_pictures=2, protocol="ms")
    for maps, batch in batches(labels, predictions, [0, 1, 2], folder=tmp_path):
        evaluator.update(maps, batch)
    metrics = evaluator.compute()
    assert set(metrics) == {"mIoU", "mAcc", "aAcc", "num_present"}
    evaluator.save(tmp_path / "final")
    saved = json.loads((tmp_path / "final" / "per_class.json").read_text())
    assert saved["mIoU"] == pytest.approx(metrics["mIoU"], abs=1e-4)
    assert saved["protocol"] == "ms"
    assert [row["name"] for row in saved["classes"] if row["IoU"] is None] == ["class 4"]
    counted = [row["IoU"] for row in saved["classes"] if row["IoU"] is not None]
    assert sum(counted) / saved["num_present"] == pytest.approx(saved["mIoU"], abs=1e-3)
    pictures = sorted(path.name for path in (tmp_path / "final" / "pictures").iterdir())
    assert pictures == ["0.png", "1.png"]
    with Image.open(tmp_path / "final" / "pictures" / "0.png") as picture:
        assert picture.width > 1200


@pytest.mark.parametrize("num_classes", [2, 14, 150])
def test_colours_are_distinct(num_classes):
    """Every class has its own colour, and the first twenty are far apart."""
    colours = palette(num_classes).astype(int)
    assert len({tuple(c) for c in colours.tolist()}) == num_classes
    first = colours[:20]
    distance = np.abs(first[:, None] - first[None]).sum(-1) + 1000 * np.eye(len(first), dtype=int)
    assert distance.min() >= 30


def test_overlay_keeps_ignored_pixels_dark_and_grey():
    image = np.full((4, 6, 3), 200, np.uint8)
    classes = np.zeros((4, 6), np.uint8)
    classes[:, 3:] = 255
    mixed = overlay(image, classes, palette(2), ignore_index=255)
    assert np.ptp(mixed[0, 5]) == 0
    assert np.ptp(mixed[0, 0].astype(int)) > 30
    assert not math.isclose(mixed[0, 3].mean(), mixed[0, 5].mean(), abs_tol=20)  # a line lies between them
