"""COCO folders: ids, masks, broken files, both resize policies, geometry under flip, resize and crop."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from hcnet_cli import rng
from hcnet_cli.console import UserError
from hcnet_cli.data.folders import dataset_name
from hcnet_cli.data.images import rescale
from hcnet_cli.tasks.detection import geometry
from hcnet_cli.tasks.detection.annotations import Annotations, read_annotations
from hcnet_cli.tasks.detection.coco import CocoDataset, collate
from hcnet_cli.tasks.detection.folder import check_same_classes, check_sizes, load_split
from hcnet_cli.tasks.detection.geometry import Scene

CATEGORIES = [{"id": 90, "name": "last"}, {"id": 1, "name": "first"}, {"id": 7, "name": "middle"}]


def square(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def an_object(number: int, image: int = 5, category: int = 7, box=(10, 20, 30, 20), **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": square(*box),
        **more,
    }


def make(root: Path, objects: list[dict[str, Any]] | None = None, *, split: str = "train", **changes: Any) -> Path:
    """A COCO folder with two images, ids 5 (100 x 80) and 2 (60 x 90); returns its root."""
    images = [
        {"id": 5, "file_name": "a.png", "width": 100, "height": 80},
        {"id": 2, "file_name": "b.png", "width": 60, "height": 90},
    ]
    data = {"images": images, "categories": CATEGORIES, "annotations": [an_object(1)] if objects is None else objects}
    data |= changes
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{split}2017").mkdir(exist_ok=True)
    for n, image in enumerate(data["images"] or images):
        pixels = np.random.RandomState(n).randint(0, 255, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{split}2017" / image["file_name"])
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))
    return root


def train_set(root: Path, **arguments: Any) -> CocoDataset:
    return CocoDataset(*load_split(root, "train"), train=True, **arguments)


# --- annotations ------------------------------------------------------------------------------------------------------


def test_category_ids_with_gaps_become_labels_and_come_back(tmp_path: Path) -> None:
    objects = [an_object(n, category=c) for n, c in enumerate([90, 1, 7], start=1)]
    annotations = read_annotations(make(tmp_path, objects) / "annotations/instances_train2017.json")
    assert annotations.category_ids == [1, 7, 90]
    assert annotations.class_names == ["first", "middle", "last"]
    assert [annotations.category_ids[label - 1] for label in annotations.labels] == [90, 1, 7]


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    """As mmdetection's CocoDataset: crowds, thin boxes, boxes outside, areas of 0; what sticks out is clipped."""
    objects = [
        an_object(1),
        an_object(2, iscrowd=1, segmentation={"size": [80, 100], "counts": [0, 50, 7950]}),
        an_object(3, box=(10, 10, 0.5, 20)),
        an_object(4, box=(200, 10, 20, 20)),
        an_object(5, area=0),
        an_object(6, segmentation=[[1, 2, 3, 4]]),
        an_object(7, box=(-5, 70, 30, 20)),
        an_object(8, box=(float("nan"), 0, 5, 5)),
        an_object(9, ignore=1),
    ]
    annotations = read_annotations(make(tmp_path, objects) / "annotations/instances_train2017.json")
    assert annotations.boxes.tolist() == [[10, 20, 40, 40], [0, 70, 25, 80]]
    assert annotations.clipped == [7]
    assert annotations.dropped == {
        "crowd": [2, 9],
        "box thinner than a pixel": [3],
        "box outside the image": [4],
        "area of 0": [5],
        "polygon of fewer than 3 points": [6],
        "box with a value that is not a number": [8],
    }


def test_masks_equal_pycocotools_for_every_encoding(tmp_path: Path) -> None:
    """One polygon, several, uncompressed RLE, compressed RLE; objects of two images in mixed order."""
    blob = np.zeros((80, 100), dtype=np.uint8)
    blob[20:40, 15:35] = 1
    compressed = rle.encode(np.asfortranarray(blob))
    flat = blob.flatten(order="F")
    counts = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])).tolist()
    objects = [
        an_object(11, segmentation=[[10.3, 20.7, 39.99, 22.1, 25.25, 39.5]]),
        an_object(12, image=2, segmentation=[[1.1, 2.2, 20.3, 4.4, 5.5, 30.6], [30.7, 40, 50, 40, 40, 60.07]]),
        an_object(13, segmentation={"size": [80, 100], "counts": counts}),
        an_object(14, segmentation={"size": [80, 100], "counts": compressed["counts"].decode()}),
    ]
    file = make(tmp_path, objects) / "annotations/instances_train2017.json"
    annotations, reference = read_annotations(file), COCO(str(file))
    seen = []
    for i in range(len(annotations)):
        for row in range(annotations.first[i], annotations.first[i + 1]):
            ids = [o["id"] for o in objects if o["image_id"] == annotations.image_ids[i]]
            number = ids[row - annotations.first[i]]
            np.testing.assert_array_equal(annotations.mask(row, i), reference.annToMask(reference.anns[number]))
            seen.append(number)
    assert sorted(seen) == [11, 12, 13, 14]


def test_annotations_are_a_handful_of_buffers(tmp_path: Path) -> None:
    """No Python object per annotation, so that worker processes share the memory."""
    objects = [an_object(n, image=(5, 2)[n % 2]) for n in range(1, 400)]
    annotations = read_annotations(make(tmp_path, objects) / "annotations/instances_train2017.json")
    for value in vars(annotations).values():
        if isinstance(value, list):
            assert len(value) in (0, 3)  # categories; nothing was clipped
        assert not isinstance(value, dict) or not value
    assert len(pickle.dumps(annotations)) < 110 * len(objects)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objects": [an_object(1), an_object(1)]}, "1 ids of annotations are not unique, the first is 1"),
        ({"categories": [*CATEGORIES, {"id": 7, "name": "x"}]}, "ids of categories are not unique"),
        ({"objects": [an_object(1, category=8)]}, "annotation id 1 is of category id 8, which the file does not list"),
        ({"objects": [an_object(1, image=6)]}, "annotation id 1 is of image id 6, which the file does not list"),
        ({"objects": [an_object(1, bbox=[1, 2, 3])]}, "the bbox of annotation id 1 is not"),
        ({"objects": [{"id": 3}]}, 'annotation id 3 has no "image_id"'),
        ({"images": {}}, "is not a COCO instances file"),
        ({"categories": []}, "has no categories"),
        (
            {"objects": [an_object(1, segmentation={"size": [8, 8], "counts": [64]})]},
            "has a mask of size [8, 8] in an image of height 80, width 100",
        ),
        (
            {"objects": [an_object(4, segmentation=[[1, 2, 30, 40, "5", 6]])]},
            "annotation id 4 has a polygon whose coordinates are not all numbers",
        ),
    ],
)
def test_contradictions_are_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    root = make(tmp_path, changes.pop("objects", None), **changes)
    with pytest.raises(UserError) as error:
        load_split(root, "train")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        load_split(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"no annotation file .*instances_val2017\.json"):
        load_split(make(tmp_path / "a"), "val")
    root = make(tmp_path / "b")
    (root / "annotations/instances_train2017.json").write_text('{"images": [')
    with pytest.raises(UserError, match="is not valid JSON"):
        load_split(root, "train")
    root = make(tmp_path / "c")
    (root / "train2017/b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png is missing"):
        load_split(root, "train")


def test_a_set_without_masks_asks_for_no_masks(tmp_path: Path) -> None:
    maskless = an_object(2)
    del maskless["segmentation"]
    root = make(tmp_path, [an_object(1), maskless, an_object(3, segmentation=[])])
    with pytest.raises(UserError, match="2 of 3 objects have no mask") as error:
        load_split(root, "train")
    assert "--no-masks" in error.value.hint
    annotations, images = load_split(root, "train", masks=False)
    assert len(annotations.boxes) == 3
    assert "masks" not in CocoDataset(annotations, images, train=True)[0, 1, 0]["target"]


def test_layouts_that_are_found(tmp_path: Path) -> None:
    root = make(tmp_path / "export")
    (root / "valid").mkdir()
    (root / "annotations/instances_train2017.json").rename(root / "valid/_annotations.coco.json")
    for file in (root / "train2017").iterdir():
        file.rename(root / "valid" / file.name)
    assert load_split(root, "val")[1] == root / "valid"
    root = make(tmp_path / "nested")
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images/train2017")
    assert load_split(root, "train")[1] == root / "images/train2017"


def test_splits_must_agree_on_classes(tmp_path: Path) -> None:
    train, _ = load_split(make(tmp_path), "train")
    val, _ = load_split(make(tmp_path, split="val", categories=[*CATEGORIES, {"id": 8, "name": "x"}]), "val")
    with pytest.raises(UserError, match="different categories"):
        check_same_classes(train, val)
    check_same_classes(train, train)
    assert dataset_name(tmp_path / "My Scenes", "coco", False) == "my-scenes"
    assert dataset_name(tmp_path / "coco", "coco", False) == "coco-data"


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_replaced_in_training_and_an_error_in_evaluation(tmp_path: Path) -> None:
    objects = [an_object(n, image=i) for n, i in enumerate((5, 2, 9, 10), start=1)]
    images = [
        {"id": i, "file_name": f"{name}.png", "width": w, "height": h}
        for i, name, w, h in ((5, "a", 100, 80), (2, "b", 60, 90), (9, "c", 100, 80), (10, "d", 100, 80))
    ]
    root = make(tmp_path, objects, images=images)
    for name in "cd":
        (root / f"train2017/{name}.png").write_bytes((root / "train2017/a.png").read_bytes())
    (root / "train2017/a.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    dataset = train_set(root)
    items = [dataset[0, key, 0] for key in range(20)]
    assert all("a.png" in item["unreadable"] for item in items)
    assert {item["sample"] for item in items} == {2, 3}  # its own aspect-ratio group
    assert dataset[0, 3, 0]["sample"] == dataset[0, 3, 0]["sample"]
    assert "unreadable" not in dataset[1, 0, 0]
    annotations, folder = load_split(root, "train")
    with pytest.raises(UserError, match=r"a\.png cannot be used: it is not an image"):
        CocoDataset(annotations, folder, train=False)[0, 0, 0]
    assert CocoDataset(annotations, folder, train=False)[1, 0, 0]["target"]["orig_size"].tolist() == [90, 60]


def test_which_images_are_trained_on(tmp_path: Path) -> None:
    """Images without annotations stay out of training, crowds alone keep one in; evaluation has every image."""
    root = make(tmp_path, [an_object(1, image=2, iscrowd=1, box=(1, 1, 20, 20))])
    annotations, folder = load_split(root, "train")
    dataset = CocoDataset(annotations, folder, train=True)
    assert len(dataset) == 1
    assert dataset[0, 0, 0]["target"]["image_id"] == 2
    assert dataset[0, 0, 0]["target"]["boxes"].shape == (0, 4)
    assert dataset[0, 0, 0]["target"]["masks"].shape[0] == 0
    assert len(CocoDataset(annotations, folder, train=False)) == 2
    with pytest.raises(UserError, match="no image to train on"):
        CocoDataset(annotations, folder, train=True, min_side=70)


def test_items_depend_on_the_key_alone(tmp_path: Path) -> None:
    dataset = train_set(make(tmp_path, [an_object(1), an_object(2, image=2)]), multiscale=(64, 80), img_scale=(120, 80))
    first = dataset[0, 123, 0]
    random.seed(9)
    torch.manual_seed(9)
    dataset[1, 5, 0]
    again = dataset[0, 123, 7]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["target"]["boxes"], again["target"]["boxes"])
    assert len({dataset[0, key, 0]["image"].shape for key in range(20)}) > 1


def test_normalisation_and_groups(tmp_path: Path) -> None:
    dataset = train_set(make(tmp_path, [an_object(1), an_object(2, image=2)]), img_scale=(100, 80), hflip=0)
    assert dataset.groups.tolist() == [1, 0]  # 100 x 80 is landscape, 60 x 90 is not
    pixels = np.array(Image.open(dataset.sample_path(0)), dtype=np.float32)
    expected = (pixels - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(dataset[0, 0, 0]["image"].permute(1, 2, 0).numpy(), expected, atol=1e-4)


# --- resizing policies ------------------------------------------------------------------------------------------------


def test_multi_scale_policy(tmp_path: Path) -> None:
    """Half of the items are only resized to a drawn side; the other half are cropped and then resized."""
    images = [{"id": 5, "file_name": "a.png", "width": 640, "height": 480}]
    root = make(tmp_path, [an_object(1, box=(100, 100, 400, 300))], images=images)
    sides = tuple(range(480, 801, 32))
    dataset = train_set(root, multiscale=sides)
    plain = {rescale((480, 640), (1333, side)) for side in sides}
    sizes = [tuple(dataset[0, key, 0]["image"].shape[1:]) for key in range(60)]
    assert all(min(size) in sides or max(size) == 1333 for size in sizes)
    assert len({min(size) for size in sizes}) > 8
    whole = sum(size in plain for size in sizes)
    assert 18 < whole < 42
    assert any(height > width for height, width in sizes)  # cropped to portrait


@pytest.mark.parametrize("scale", [400, 600])
def test_a_crop_follows_a_resize_to_one_of_its_own_scales(tmp_path: Path, scale: int) -> None:
    """A window of 200 pixels enlarged to 480 shows objects of 60 pixels at 60 * scale / 480 * 480 / 200."""
    images = [{"id": 5, "file_name": "a.png", "width": 640, "height": 480}]
    grid = [(x, y, 60, 60) for x in range(0, 640, 80) for y in range(0, 480, 80)]
    root = make(tmp_path, [an_object(n, box=box) for n, box in enumerate(grid)], images=images)
    dataset = train_set(root, multiscale=(480,), crop_scales=(scale,), crop_range=(200, 200))
    sides = set()
    for key in range(12):
        boxes = dataset[0, key, 0]["target"]["boxes"]
        sides.add(round((boxes[:, 2] - boxes[:, 0]).max().item()))
    assert sides == {60, 60 * scale // 200}


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_crop_window_sides_are_from_the_range(height: int, width: int, seed: int) -> None:
    """U{min(side, 384)..min(side, 600)} for each side, anywhere inside the image."""
    with rng.seeded(seed):
        y, x, h, w = geometry.random_window((height, width), (384, 600))
    assert min(height, 384) <= h <= min(height, 600)
    assert min(width, 384) <= w <= min(width, 600)
    assert 0 <= y <= height - h
    assert 0 <= x <= width - w


def test_crop_windows_are_drawn_from_the_whole_range() -> None:
    with rng.seeded(0):
        windows = [geometry.random_window((610, 610), (384, 600)) for _ in range(2000)]
    for position in (2, 3):
        sides = [window[position] for window in windows]
        assert (min(sides), max(sides)) == (384, 600)
        assert abs(np.mean(sides) - 492) < 5
    assert max(y + h for y, _, h, _ in windows) == 610
    assert min(y for y, *_ in windows) == 0


# --- geometry ---------------------------------------------------------------------------------------------------------


def scene_with(boxes: list[tuple[int, int, int, int]], width: int, height: int) -> Scene:
    """Objects that fill their boxes exactly."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    image = torch.arange(height * width).remainder(251).reshape(1, height, width).expand(3, -1, -1).to(torch.uint8)
    return Scene(image, torch.tensor(boxes).float().reshape(-1, 4), torch.arange(1, len(boxes) + 1), masks)


def box_of(mask: torch.Tensor) -> list[int]:
    y, x = torch.nonzero(mask, as_tuple=True)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    width, height = draw(st.integers(8, 60)), draw(st.integers(8, 60))
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x1, y1 = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
        boxes.append((x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))))
    return scene_with(boxes, width, height)


@given(scenes())
@settings(max_examples=40, deadline=None)
def test_flip_moves_boxes_with_masks_and_is_its_own_inverse(scene: Scene) -> None:
    flipped = geometry.flip(scene)
    assert [box_of(m) for m in flipped.masks] == flipped.boxes.int().tolist()
    back = geometry.flip(flipped)
    assert all(torch.equal(a, b) for a, b in zip(back, scene, strict=True))


@given(scenes(), st.integers(5, 90), st.integers(5, 90))
@settings(max_examples=40, deadline=None)
def test_resize_keeps_boxes_around_masks(scene: Scene, width: int, height: int) -> None:
    """Nearest resampling places an edge within a pixel of the exact one; shapes and order stay."""
    resized = geometry.resize(scene, (height, width))
    assert resized.image.shape == (3, height, width)
    assert resized.masks.shape == (len(scene.boxes), height, width)
    old_height, old_width = scene.image.shape[1:]
    scale = torch.tensor([width / old_width, height / old_height] * 2)
    torch.testing.assert_close(resized.boxes, scene.boxes * scale)
    for mask, box in zip(resized.masks, resized.boxes, strict=True):
        if mask.any():
            assert max(abs(a - b) for a, b in zip(box_of(mask), box.tolist(), strict=True)) <= 1


@given(scenes(), st.data())
@settings(max_examples=60, deadline=None)
def test_crop_clips_boxes_as_it_cuts_masks(scene: Scene, data: st.DataObject) -> None:
    """What is left of a filled box is exactly the cropped box; what is gone is dropped with its label and mask."""
    height, width = scene.image.shape[1:]
    w, h = data.draw(st.integers(1, width)), data.draw(st.integers(1, height))
    x, y = data.draw(st.integers(0, width - w)), data.draw(st.integers(0, height - h))
    cut = geometry.crop(scene, y, x, h, w)
    assert torch.equal(cut.image, scene.image[:, y : y + h, x : x + w])
    assert [box_of(m) for m in cut.masks] == cut.boxes.int().tolist()
    visible = [n for n, m in enumerate(scene.masks) if m[y : y + h, x : x + w].any()]
    assert cut.labels.tolist() == [n + 1 for n in visible]


def test_collate_keeps_lists(tmp_path: Path) -> None:
    dataset = train_set(make(tmp_path, [an_object(1), an_object(2, image=2)]))
    batch = collate([dataset[0, 4, 0], dataset[1, 5, 0]])
    assert [image.ndim for image in batch["image"]] == [3, 3]
    assert batch["sample"].tolist() == [0, 1]
    assert batch["key"].tolist() == [4, 5]


def test_sizes_of_validation_images_are_checked_from_their_headers(tmp_path: Path) -> None:
    """An image that EXIF turns may have either size; another size, or no image, is named before any training."""
    Image.new("RGB", (60, 40)).save(tmp_path / "plain.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "text.jpg").write_text("no image")

    def annotations(name: str, width: int, height: int) -> Annotations:
        images = [{"id": 1, "file_name": name, "width": width, "height": height}]
        content = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": []}
        (tmp_path / "a.json").write_text(json.dumps(content))
        return read_annotations(tmp_path / "a.json", masks=False)

    for name, size in (("plain.jpg", (60, 40)), ("turned.jpg", (60, 40)), ("turned.jpg", (40, 60))):
        check_sizes(annotations(name, *size), tmp_path)
    for name, size, message in (
        ("plain.jpg", (40, 60), "plain.jpg cannot be used: it is 60 x 40 pixels, its annotation file says 40 x 60."),
        ("turned.jpg", (61, 40), "turned.jpg cannot be used: it is 60 x 40 pixels, its annotation file says 61 x 40."),
        ("text.jpg", (60, 40), "text.jpg cannot be used: it is not an image"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            check_sizes(annotations(name, *size), tmp_path)
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # as from a worker process
