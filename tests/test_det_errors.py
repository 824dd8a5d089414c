"""Protects the errors of a detector by kind: AP50 is COCO's, each kind is what its definition says, and what it costs
is what mending it would gain.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from test_coco_ap import scored, world

from hcnet_cli.tasks.detection import errors
from hcnet_cli.tasks.detection.metric import worth_drawing

__all__ = ["world"]  # a fixture
Box = tuple[float, float, float, float]


def scene(objects: list[tuple[int, Box]], found: list[tuple[int, Box, float]]) -> tuple[dict[str, Any], list[Any]]:
    """One image with objects (class, box) and detections (class, box, score)."""
    annotations = [{"id": n, "image_id": 1, "category_id": c, "bbox": b} for n, (c, b) in enumerate(objects, 1)]
    results = [{"image_id": 1, "category_id": c, "bbox": b, "score": s} for c, b, s in found]
    return {"images": [{"id": 1}], "annotations": annotations}, results


def test_overlaps_are_those_of_pycocotools() -> None:
    random = np.random.RandomState(0)
    a, b = (random.randint(1, 60, (9, 4)).astype(float) for _ in range(2))
    assert np.allclose(errors.overlaps(a, b), rle.iou(a, b, [0] * 9))
    assert np.allclose(errors.overlaps(a, b, crowd=True), rle.iou(a, b, [1] * 9))


def test_ap50_and_curves_are_those_of_coco(world: Any, tmp_path: Path) -> None:
    """On a set with crowds, ties, images without objects and a class without any."""
    evaluator = scored(*world)
    numbers = evaluator.compute()
    plain, kinds = errors.by_kind(evaluator.truth.coco(None), evaluator.results_of("box"))
    assert plain == pytest.approx(numbers["box_AP50"], abs=1e-9)
    assert sum(kind.number for kind in kinds.values()) > 5
    assert all(kind.lost >= -1e-9 for kind in kinds.values())
    for name, key in (("0.5", "box_AP50"), ("0.75", "box_AP75"), ("0.5:0.95", "box_AP")):
        assert 100 * np.mean(evaluator.curves[name]) == pytest.approx(numbers[key], abs=1e-9)
    evaluator.num_pictures = 0
    evaluator.save(tmp_path)
    assert json.loads((tmp_path / "errors.json").read_text())["box_AP50"] == plain
    with Image.open(tmp_path / "errors.png") as image:
        assert image.size == (1100, 400)


SQUARE: Box = (0, 0, 10, 10)
FAR: Box = (50, 50, 10, 10)
KINDS: dict[str, tuple[int, Box]] = {  # the one detection beside a right one of SQUARE, class 1; FAR is class 1 too
    "localisation": (1, (53, 53, 10, 10)),  # IoU 49 / 151 with FAR
    "class": (2, (51, 50, 10, 10)),  # 90 / 110
    "duplicate": (1, (1, 0, 10, 10)),  # of SQUARE
    "background": (1, (100, 100, 10, 10)),
    "both": (2, (53, 53, 10, 10)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_its_definition_says(kind: str) -> None:
    label, box = KINDS[kind]
    truth, results = scene([(1, SQUARE), (1, FAR)], [(1, SQUARE, 0.9), (label, box, 0.8)])
    _, kinds = errors.by_kind(truth, results)
    about_far = kind in ("localisation", "class")
    expected = dict.fromkeys(errors.KINDS, 0) | {kind: 1, "missed": 0 if about_far else 1}
    assert {name: found.number for name, found in kinds.items()} == expected


def test_a_kind_costs_what_mending_it_gains() -> None:
    """By hand: of two objects one is found, so the precision is 1 up to a recall of 0.5: 51 of 101 recalls."""
    half, whole = 100 * 51 / 101, 100.0
    truth, results = scene([(1, SQUARE), (1, FAR)], [(1, SQUARE, 0.9), (1, (53, 53, 10, 10), 0.8)])
    plain, kinds = errors.by_kind(truth, results)
    assert plain == pytest.approx(half)
    assert kinds["localisation"].lost == pytest.approx(whole - half)
    assert kinds["missed"] == (0, 0.0)
    truth, results = scene([(1, SQUARE), (1, FAR)], [(1, (200, 0, 5, 5), 0.95), (1, SQUARE, 0.9)])
    plain, kinds = errors.by_kind(truth, results)  # a false one first: precision 1 / 2 up to recall 0.5
    assert plain == pytest.approx(half / 2)
    assert kinds["background"].lost == pytest.approx(half / 2)
    assert kinds["missed"].lost == pytest.approx(50 - half / 2)  # one object of one, at precision 1 / 2
    # two classes, of which the second's object is called the first: mended, both are found
    truth, results = scene([(1, SQUARE), (2, FAR)], [(1, SQUARE, 0.9), (1, FAR, 0.8), (1, (51, 50, 10, 10), 0.7)])
    plain, kinds = errors.by_kind(truth, results)
    assert (plain, kinds["class"]) == (50.0, (2, 50.0))  # the better scored becomes right, the other goes


def test_without_objects_or_detections_there_is_a_picture(recwarn: pytest.WarningsRecorder) -> None:
    for truth, results in (scene([], []), scene([], [(1, SQUARE, 0.5)]), scene([(1, SQUARE)], [])):
        plain, kinds = errors.by_kind(truth, results)
        assert plain == 0
        with Image.open(io.BytesIO(errors.draw({}, plain, kinds))) as image:
            image.load()
    assert not [str(w.message) for w in recwarn]


def test_a_picture_has_the_best_few_where_none_is_confident() -> None:
    found = [{"score": score} for score in (0.1, 0.4, 0.2, 0.3)]
    shown, note = worth_drawing(found)
    assert [one["score"] for one in shown] == [0.4, 0.3, 0.2]
    assert note == "0 of score 0.5 and up, and the best 3 below"
    shown, note = worth_drawing([{"score": 0.5 + n / 10} for n in range(4)])
    assert (len(shown), note) == (4, "4 of score 0.5 and up")
