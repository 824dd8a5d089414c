"""The embedded data sets: real formats, honest splits, the same bytes every time, made safely."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from hcnet_cli import cache
from hcnet_cli.console import UserError
from hcnet_cli.data import embedded
from hcnet_cli.data.embedded import digits, scenes


@pytest.fixture(autouse=True)
def small_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scenes, "SCENES", {"train": 40, "val": 10})
    monkeypatch.setattr(digits, "COPIES", {"train": 1, "val": 1})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def grey(path: str | Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


# digits


def numbers(folder: Path) -> set[str]:
    return {path.name.split("_")[1] for path in folder.rglob("*.png")}


def test_digits_are_all_there_split_four_to_one_in_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "COPIES", {"train": 1, "val": 2})
    folder = embedded.ensure("digits")
    counts = {s: Counter(p.parent.name for p in (folder / s).rglob("*.png")) for s in ("train", "val")}
    assert sum(counts["train"].values()) + sum(counts["val"].values()) // 2 == 1797
    assert sorted(counts["train"]) == sorted(counts["val"]) == [str(d) for d in range(10)]
    for digit, n in counts["val"].items():
        assert abs(n / 2 / (n / 2 + counts["train"][digit]) - 0.2) < 0.01
    assert not numbers(folder / "train") & numbers(folder / "val")  # no digit is in both
    assert len(numbers(folder)) == 1797
    image = Image.open(next(folder.rglob("*.png")))
    assert (image.size, image.mode) == ((32, 32), "RGB")


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {split: ones[::40] for split, ones in digits.load_digits().items()}
    monkeypatch.setattr(digits, "load_digits", lambda: few)


def test_clutter_is_of_the_same_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A piece of a validation digit in a training image would be a leak."""
    shown: list[tuple[int, set[int]]] = []

    def image(grey: Any, others: list[digits.Digit], random: Any) -> Any:
        number = next(n for n, _, one in others if one is grey)
        shown.append((number, {n for n, _, _ in others}))
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr(digits, "draw_image", image)
    monkeypatch.setattr(digits, "COPIES", {"train": 1, "val": 1})
    digits.make_digits(tmp_path)
    split = {name: {n for n, _, _ in ones} for name, ones in digits.load_digits().items()}
    assert split["train"].isdisjoint(split["val"])
    for number, others in shown:
        assert others == split["train" if number in split["train"] else "val"]


def test_images_of_a_digit_differ_and_show_it() -> None:
    """Without clutter, bar, texture and noise the digit is what is bright; its images have it elsewhere each time."""
    _, _, grey = digits.load_digits()["train"][0]
    drawn = [digits._turned(grey, 24, 10, np.random.RandomState(seed)) for seed in range(20)]
    places = {tuple(int(values[0]) for values in np.nonzero(shape > 0.5)) for shape in drawn}
    assert len(places) > 10
    for shape in drawn:
        assert shape.shape == (32, 32)
        assert 60 < (shape > 0.5).sum() < 500


# scenes as COCO


def test_scenes_are_valid_coco_with_all_that_makes_coco_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "SCENES", {"train": 120, "val": 10})
    folder = embedded.ensure("digit-scenes")
    coco = COCO(folder / "annotations" / "instances_train2017.json")
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    assert len(coco.imgs) == len(list((folder / "train2017").iterdir())) == 120
    assert [c["id"] for c in content["categories"]] != sorted(coco.cats)  # order
    assert max(coco.cats) > len(coco.cats) == 10  # gaps
    assert max(coco.imgs) > len(coco.imgs)
    assert len(coco.anns) == len(content["annotations"]) < max(coco.anns)
    kinds = Counter(
        ("crowd" if a["iscrowd"] else "object", type(a["segmentation"]).__name__) for a in coco.anns.values()
    )
    assert set(kinds) == {("crowd", "dict"), ("object", "dict"), ("object", "list")}
    assert set(coco.imgs) - {a["image_id"] for a in coco.anns.values()}  # images without objects


def test_boxes_and_areas_are_those_of_the_masks_and_masks_are_disjoint() -> None:
    folder = embedded.ensure("digit-scenes")
    for split in ("train", "val"):
        coco = COCO(folder / "annotations" / f"instances_{split}2017.json")
        for image_id, image in coco.imgs.items():
            assert Image.open(folder / f"{split}2017" / image["file_name"]).size == (image["width"], image["height"])
            covered = np.zeros((image["height"], image["width"]), dtype=int)
            for annotation in coco.imgToAnns[image_id]:
                mask = coco.annToMask(annotation)
                assert mask.sum() == annotation["area"] > 0
                assert coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask))).tolist() == annotation["bbox"]
                covered += mask
            assert covered.max(initial=0) <= 1


def test_scenes_for_validation_show_no_digit_of_the_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[int]] = []
    monkeypatch.setattr(scenes, "_scene", lambda digits, random: shown.append([n for n, _, _ in digits]))
    splits = [split for split, _, _ in scenes._scenes()]
    by_split = {split: set(next(d for s, d in zip(splits, shown, strict=True) if s == split)) for split in set(splits)}
    assert by_split["train"].isdisjoint(by_split["val"])
    assert len(by_split["train"] | by_split["val"]) == 1797


@settings(deadline=None, max_examples=80)
@given(mask=arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_outlines_of_any_mask_fill_to_that_mask(mask: np.ndarray[Any, Any]) -> None:
    polygons, hole = scenes._outlines(mask)
    height, width = mask.shape
    # even-odd filling, at pixel centres: an independent way back, right with and without holes
    filled = np.zeros_like(mask)
    for corners in polygons:
        points = np.array(corners).reshape(-1, 2)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            assert (x0 == x1) != (y0 == y1)
            if x0 == x1:
                filled[min(y0, y1) : max(y0, y1), x0:] ^= True
    assert (filled == mask).all()
    # a hole is a piece of background, joined over sides and corners alike, that does not reach the frame
    outside = ~np.pad(mask, 1)
    reached = np.zeros_like(outside)
    reached[0, 0] = True
    for _ in range(outside.size):
        grown = np.pad(reached, 1)
        near = np.any([grown[i : i + height + 2, j : j + width + 2] for i in range(3) for j in range(3)], axis=0)
        reached = near & outside
    assert hole == bool((outside & ~reached).any())


@settings(deadline=None, max_examples=50)
@given(mask=arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_are_cocos(mask: np.ndarray[Any, Any]) -> None:
    rle = {"size": list(mask.shape), "counts": scenes._run_lengths(mask)}
    assert (coco_mask.decode(coco_mask.frPyObjects(rle, *mask.shape)) == mask).all()


# scenes as ADE20K


def test_stuff_has_ade20ks_layout_labels_and_class_list() -> None:
    folder = embedded.ensure("digit-stuff")
    seen: Counter[int] = Counter()
    for split, count in (("training", 40), ("validation", 10)):
        images = sorted((folder / "images" / split).iterdir())
        labels = sorted((folder / "annotations" / split).iterdir())
        assert len(images) == len(labels) == count
        assert [p.stem for p in images] == [p.stem for p in labels]
        for image, label in zip(images, labels, strict=True):
            assert Image.open(label).mode == "L"
            assert Image.open(image).size == Image.open(label).size
            seen.update(np.unique(grey(label)).tolist())
    assert set(seen) == set(range(15))
    header, *lines = (folder / "objectInfo150.txt").read_text().splitlines()
    assert header.split("\t") == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    rows = [line.split("\t") for line in lines]
    assert [row[0] for row in rows] == [str(i) for i in range(1, 15)]
    assert [row[5] for row in rows] == [*map(str, range(10)), "stripes", "dots", "checks", "gradient"]
    assert all(int(row[2]) + int(row[3]) == seen[int(row[0])] for row in rows)


def test_scenes_and_stuff_are_the_same_pictures_with_agreeing_labels() -> None:
    as_coco, as_ade = embedded.ensure("digit-scenes"), embedded.ensure("digit-stuff")
    coco = COCO(as_coco / "annotations" / "instances_val2017.json")
    for number, (image_id, image) in enumerate(coco.imgs.items(), start=1):
        name = f"ADE_val_{number:08d}"
        theirs = (as_coco / "val2017" / image["file_name"]).read_bytes()
        assert (as_ade / "images" / "validation" / f"{name}.jpg").read_bytes() == theirs
        label = grey(as_ade / "annotations" / "validation" / f"{name}.png")
        for annotation in coco.imgToAnns[image_id]:
            inside = label[coco.annToMask(annotation).astype(bool)]
            digit = 1 + int(coco.cats[annotation["category_id"]]["name"])
            # the soft rim of a digit in front of another belongs to neither
            assert set(inside.tolist()) - {0} == (set() if annotation["iscrowd"] else {digit})


# making them


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("name", list(embedded.EMBEDDED))
def test_making_a_set_twice_gives_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scenes, "SCENES", {"train": 4, "val": 2})
    first = embedded.ensure(name)
    assert f"Making the embedded data set {name}" in capsys.readouterr().err
    assert embedded.ensure(name) == first
    assert capsys.readouterr().err == ""  # found, not made again
    monkeypatch.setenv("HCNET_CACHE", str(tmp_path / "elsewhere"))
    np.random.seed(1)
    assert contents(embedded.ensure(name)) == contents(first)


@pytest.mark.usefixtures("few_digits")
def test_the_folder_is_named_by_set_and_version() -> None:
    folder = embedded.ensure("digits")
    assert folder == cache.cache_dir() / f"embedded-v{cache.EMBEDDED_VERSION}" / "digits"


def test_a_stopped_maker_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(folder: Path) -> None:
        (folder / "half").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setitem(embedded.EMBEDDED, "digits", stopped)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure("digits")
    assert list((cache.cache_dir() / f"embedded-v{cache.EMBEDDED_VERSION}").iterdir()) == []


def _make(barrier: Any) -> None:
    def slowly(folder: Path) -> None:
        (folder / "train").mkdir()
        barrier.wait(20)  # both are making it

    embedded.EMBEDDED["digits"] = slowly
    assert (embedded.ensure("digits") / "train").is_dir()


def test_two_processes_at_once_are_fine() -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_make, args=(barrier,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [p.name for p in (cache.cache_dir() / f"embedded-v{cache.EMBEDDED_VERSION}").iterdir()] == ["digits"]


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HCNET_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"digits cannot be written to .*file") as caught:
        embedded.ensure("digits")
    assert "HCNET_CACHE" in caught.value.hint


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r'no embedded data set "digit-scene"\. Did you mean "digit-scenes"'):
        embedded.ensure("digit-scene")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(os.sep, "x"))
    assert cache.cache_dir() == Path("/x/hcnet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir() == Path.home() / ".cache" / "hcnet"
