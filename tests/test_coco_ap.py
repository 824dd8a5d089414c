"""COCO AP: both backends and pycocotools alone agree; any split over processes gives the same; files and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hcnet_cli import dist
from hcnet_cli.console import UserError
from hcnet_cli.tasks.detection.annotations import read_annotations
from hcnet_cli.tasks.detection.metric import NUMBERS, CocoAP

SIZE = 200
CATEGORY_IDS, NAMES = [1, 7, 90], ["ant", "bee", "cat"]


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Twelve images with all that makes scoring hard, and (prediction, target) for each.

    Crowds, images without objects and without predictions, a class without ground truth, equal scores, several
    detections of one object, sizes small to large, ids out of order.
    """
    random = np.random.RandomState(3)
    images = [{"id": 100 - 7 * n, "file_name": f"{n}.png", "width": SIZE, "height": SIZE} for n in range(12)]
    annotations: list[dict[str, Any]] = []
    pairs = []
    for n, image in enumerate(images):
        boxes = []
        for _ in range(0 if n in (2, 7) else random.randint(1, 6)):
            w, h = random.choice([9, 40, 110]) + random.randint(0, 8, 2)
            x, y = random.randint(0, SIZE - w), random.randint(0, SIZE - h)
            crowd = int(random.rand() < 0.2)
            filled = np.zeros((SIZE, SIZE), dtype=np.uint8)
            filled[y : y + h, x : x + w] = 1
            category = int(random.randint(0, 2))
            boxes.append((x, y, w, h, category + 1))
            code = rle.encode(np.asfortranarray(filled))
            annotations.append(
                {
                    "id": len(annotations),  # one has id 0
                    "image_id": image["id"],
                    "category_id": CATEGORY_IDS[category],
                    "bbox": [int(v) for v in (x, y, w, h)],
                    "area": int(w * h),
                    "iscrowd": crowd,
                    "segmentation": {"size": [SIZE, SIZE], "counts": code["counts"].decode()}
                    if crowd
                    else polygon(*map(float, (x, y, w, h))),
                }
            )
        found, scores, labels, masks = [], [], [], []
        for x, y, w, h, label in [b for b in boxes for _ in range(random.randint(0, 4))] + [(5, 5, 30, 30, 3)] * (
            n % 3
        ):
            x1, y1 = np.clip(np.array([x, y]) + random.randint(-2, 3, 2), 0, SIZE - 3)
            x2, y2 = np.clip(np.array([x + w, y + h]) + random.randint(-2, 3, 2), [x1 + 2, y1 + 2], SIZE)
            found.append([x1, y1, x2, y2])
            scores.append(random.choice([0.3, 0.5, 0.9, random.rand()]))
            labels.append(label if random.rand() < 0.85 else random.randint(1, 4))
            filled = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
            filled[y1:y2, x1:x2] = 1
            filled[y1 : y1 + 1, x1:x2] = 0
            masks.append(rle.encode(filled))
        if n == 5:
            found, scores, labels, masks = [], [], [], []
        prediction = {
            "boxes": torch.tensor(np.array(found, dtype=np.float32).reshape(-1, 4)) + 0.1,
            "scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": masks,
        }
        pairs.append((prediction, {"image_id": torch.tensor(image["id"])}))
    categories = [{"id": i, "name": n} for i, n in zip((90, 1, 7), ("cat", "ant", "bee"), strict=True)]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file, pairs


def scored(file: Path, pairs: list, **arguments: Any) -> CocoAP:
    truth = read_annotations(file, masks=arguments.get("masks", True), scoring=True)
    evaluator = CocoAP(truth, **arguments)
    for prediction, target in pairs:
        evaluator.update([prediction], {"target": [target]})
    return evaluator


def pycocotools_alone(truth: dict[str, Any], results: Any, iou_type: str) -> list[float]:
    ground_truth = COCO()
    ground_truth.dataset = truth
    ground_truth.createIndex()
    evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def test_both_backends_give_the_same_twelve_numbers(world) -> None:
    fast = scored(*world).compute()
    reference = scored(*world, backend="pycocotools").compute()
    assert set(fast) == {f"{kind}_{name}" for kind in ("box", "mask") for name in NUMBERS}
    assert fast == pytest.approx(reference, abs=1e-9)
    assert 5 < fast["mask_AP"] < 95
    assert len(set(fast.values())) > 15


@pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])
def test_ids_beyond_what_floating_point_numbers_tell_apart_change_no_number(
    world, backend: str, tmp_path: Path
) -> None:
    file, pairs = world
    truth = json.loads(file.read_text())
    for image in truth["images"]:
        image["id"] += 2**62
    for category in truth["categories"]:
        category["id"] += 2**62
    for annotation in truth["annotations"]:
        annotation["image_id"] += 2**62
        annotation["category_id"] += 2**62
    large = tmp_path / "large.json"
    large.write_text(json.dumps(truth))
    moved = [(prediction, {**target, "image_id": target["image_id"] + 2**62}) for prediction, target in pairs]
    usual, shifted = scored(file, pairs, backend=backend), scored(large, moved, backend=backend)
    assert shifted.compute() == usual.compute()
    assert shifted.per_class == usual.per_class
    assert [one["category_id"] - 2**62 for one in shifted.results_of("box")] == [
        one["category_id"] for one in usual.results_of("box")
    ]


def test_saved_predictions_scored_by_pycocotools_alone_give_the_run_s_numbers(world, tmp_path: Path) -> None:
    evaluator = scored(*world)
    numbers = evaluator.compute()
    evaluator.save(tmp_path / "out")
    for kind, name, iou_type in (("box", "predictions_bbox", "bbox"), ("mask", "predictions_segm", "segm")):
        # pycocotools takes a match with the ground truth of id 0 for a miss: count ids from 1, nothing else
        truth = json.loads(world[0].read_text())
        for annotation in truth["annotations"]:
            annotation["id"] += 1
        stats = pycocotools_alone(truth, str(tmp_path / "out" / f"{name}.json"), iou_type)
        ours = [numbers[f"{kind}_{n}"] / 100 for n in NUMBERS]
        assert ours == pytest.approx(stats, abs=1e-12)


def test_categories_come_back_and_files_are_plain_coco(world, tmp_path: Path) -> None:
    evaluator = scored(*world)
    evaluator.compute()
    evaluator.save(tmp_path / "out")
    boxes = json.loads((tmp_path / "out/predictions_bbox.json").read_text())
    masks = json.loads((tmp_path / "out/predictions_segm.json").read_text())
    assert {r["category_id"] for r in boxes} == {1, 7, 90}
    assert set(boxes[0]) == {"image_id", "category_id", "bbox", "score"}
    assert set(masks[0]) == {"image_id", "category_id", "segmentation", "score"}
    per_class = json.loads((tmp_path / "out/per_class.json").read_text())
    assert set(per_class) == set(NAMES)
    assert per_class["cat"] == {}  # no ground truth, hence no figure
    numbers = evaluator.compute()
    mean = np.mean([per_class[name]["box_AP"] for name in ("ant", "bee")])
    assert numbers["box_AP"] == pytest.approx(mean)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_split_over_processes_gives_the_same_to_the_last_digit(world, processes: int, monkeypatch) -> None:
    file, pairs = world
    alone = scored(file, pairs)
    whole = alone.compute()
    parts = [scored(file, pairs[rank::processes]) for rank in range(processes)]
    monkeypatch.setattr(dist, "gather", lambda item, parts=[p.found for p in parts]: parts[::-1])
    assert parts[0].compute() == whole
    assert parts[0].results_of("mask") == alone.results_of("mask")


def test_an_image_counted_twice_is_caught(world, monkeypatch) -> None:
    file, pairs = world
    evaluator = scored(file, pairs)
    with pytest.raises(AssertionError, match="predicted twice"):
        evaluator.update([pairs[0][0]], {"target": [pairs[0][1]]})
    monkeypatch.setattr(dist, "gather", lambda item: [item, {100: None}])
    with pytest.raises(AssertionError, match="two processes"):
        evaluator.compute()


@pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])
def test_finding_nothing_is_zero_and_undefined_figures_are_left_out(world, backend: str, tmp_path: Path) -> None:
    file, pairs = world
    nothing = {key: value[:0] for key, value in pairs[0][0].items()}
    numbers = scored(file, [(nothing, target) for _, target in pairs], backend=backend).compute()
    assert set(numbers.values()) == {0.0}
    data = json.loads(file.read_text())
    data["annotations"] = [a for a in data["annotations"] if a["area"] < 32**2 and not a["iscrowd"]]
    small = tmp_path / "small.json"
    small.write_text(json.dumps(data))
    numbers = scored(small, pairs, backend=backend).compute()
    assert "box_AP_s" in numbers
    assert "box_AP_l" not in numbers


def test_boxes_alone(world) -> None:
    """Faster R-CNN: the same box numbers, no mask numbers, no masks needed anywhere."""
    file, pairs = world
    both = scored(file, pairs).compute()
    data = json.loads(file.read_text())
    for annotation in data["annotations"]:
        del annotation["segmentation"]
    file.write_text(json.dumps(data))
    boxes = scored(file, [({k: v for k, v in p.items() if k != "masks"}, t) for p, t in pairs], masks=False).compute()
    assert boxes == {name: value for name, value in both.items() if name.startswith("box_")}


def test_an_object_of_a_broken_polygon_counts_for_boxes_alone(world, tmp_path: Path) -> None:
    """Box AP is that without masks, mask AP that without the object."""
    file, pairs = tmp_path / "broken.json", world[1]
    data = json.loads(world[0].read_text())
    broken = next(one for one in data["annotations"] if not one["iscrowd"])
    file.write_text(json.dumps(data | {"annotations": [one for one in data["annotations"] if one is not broken]}))
    without = scored(file, pairs).compute()
    broken["segmentation"] = [[1, 2, 3, 4]]
    file.write_text(json.dumps(data))
    boxes = scored(file, [({k: v for k, v in p.items() if k != "masks"}, t) for p, t in pairs], masks=False).compute()
    masks = {name: value for name, value in without.items() if name.startswith("mask_")}
    assert scored(file, pairs).compute() == boxes | masks
    assert boxes != {name: value for name, value in without.items() if name.startswith("box_")}


def test_ground_truth_is_completed(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    annotation = {"id": 0, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 5], "segmentation": [[1, 2], [0] * 6]}
    images = [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}]
    file.write_text(json.dumps({"images": images, "categories": [{"id": 1}], "annotations": [annotation]}))
    (entry,) = read_annotations(file, scoring=True).coco()["annotations"]
    assert (entry["id"], entry["iscrowd"], entry["area"]) == (1, 0, 20)
    assert entry["segmentation"] == [[0] * 6]


def test_an_unknown_backend_is_named(world) -> None:
    with pytest.raises(UserError, match='Unknown evaluation backend "coco"'):
        scored(*world, backend="coco").compute()


def test_pictures_show_ground_truth_and_prediction(world, tmp_path: Path) -> None:
    """The first images of the file, two panels each; the colors of drawn objects are on them."""
    evaluator = scored(*world, load_image=lambda image_id: Image.new("RGB", (SIZE, SIZE), "white"), num_pictures=3)
    evaluator.compute()
    evaluator.save(tmp_path)
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [p.name for p in pictures] == ["0.png", "1.png", "2.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.width > 2 * 640
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
