"""Protects against silence: a file or object of a data folder is used, or counted with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL_MODEL, Hcnet, only_run
from PIL import Image
from small_data import MAKERS, classes, coco, noise, opened, save, scenes

from hcnet_cli import pictures, runs
from hcnet_cli.data.audit import distinct


def count(root: Path) -> int:
    return len([path for path in root.rglob("*") if path.is_file()])


@pytest.mark.parametrize("kind", ["classes", "scenes"])
def test_every_file_of_a_split_is_used_or_counted(kind: str, tmp_path: Path) -> None:
    root = MAKERS[kind](tmp_path / kind)
    folders = {"classes": ["train/a", "val/b"], "scenes": ["images/training", "annotations/validation"]}[kind]
    for folder in folders:
        for name in ("photo", "note.txt", "x.heic", ".hidden.png", "~x.png.part"):
            (root / folder / name).write_bytes(b"?")
    info = opened(root).info
    splits = ("train", "val") if kind == "classes" else ("images", "annotations")
    files = sum(count(root / split) for split in splits)
    used = info.num_train + info.num_val
    assert files == used * (1 if kind == "classes" else 2) + sum(info.left_out.values())
    assert info.left_out["hidden files and folders"] == 2


def test_what_pillow_reads_is_used_and_the_rest_is_named(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "c")
    for ending in ("jfif", "avif", "jpe", "webp"):
        file = root / f"train/a/more.{ending}"
        Image.fromarray(noise(len(ending))).save(file, format={"jfif": "JPEG", "jpe": "JPEG"}.get(ending))
    shutil.copy(root / "train/b/1.bmp", root / "train/b/photo")
    (root / "train/loose.bmp").write_bytes(b"")
    (root / "test").mkdir()
    left_out = {
        "train files that are not images": 1,
        "files outside the class folders": 1,
        "folders that are no split": 1,
    }
    assert opened(root).info.num_train == 8
    assert opened(root).info.left_out == left_out
    checked = hcnet("check", root)
    assert "left out: train files that are not images (1): train/b/photo" in checked.out
    done = hcnet(
        *("pretrain", "--recipe", "pretrain/digits", "--data", root, "--out", tmp_path / "o", *SMALL_MODEL),
        *("--epochs", 1, "--batch-size", 2, "--workers", 0),
    )
    assert done.code == 0, done.err
    assert "Left out of the data: train files that are not images: 1" in done.err
    assert runs.read_record(only_run(tmp_path / "o") / "run.json").data.left_out == left_out


def test_validation_objects_that_cannot_be_scored_are_counted(tmp_path: Path) -> None:
    def change(split: str, content: dict[str, Any]) -> None:
        content["annotations"].append({**content["annotations"][0], "id": 99, "bbox": [9, 9, -5, 5]})

    assert opened(coco(tmp_path / "c", change=change)).info.left_out == {
        "training objects (box of negative width or height)": 1,
        "validation objects (not scored: box of negative width or height)": 1,
    }


def test_links_to_folders_above_the_class_are_not_followed(tmp_path: Path) -> None:
    """Not once either: the class would get the images of all others. Nor above a folder that a link leads to."""
    root = classes(tmp_path / "d")
    before = opened(root).info
    away = tmp_path / "away/inner"
    away.mkdir(parents=True)
    shutil.copy(min((root / "train/a").iterdir()), away)
    (root / "train/a/more").symlink_to(away)
    (away / "up").symlink_to("..")
    for number, target in enumerate(("..", "../..", root / "train")):
        (root / f"train/a/up{number}").symlink_to(target)
    found = opened(root).info
    assert found.num_train == before.num_train + 1
    assert found.left_out == {"links to a folder above": 4}


@pytest.mark.parametrize("kind", ["classes", "scenes"])
def test_linked_folders_are_followed_and_circles_are_not(kind: str, tmp_path: Path) -> None:
    root = MAKERS[kind](tmp_path / kind)
    before = opened(root).info
    places = {"classes": ["train/a"], "scenes": ["images/training", "annotations/training"]}[kind]
    for place in places:
        away = tmp_path / "elsewhere" / place
        away.mkdir(parents=True)
        shutil.copy(min((root / place).iterdir()), away)
        (root / place / "more").symlink_to(away)
        (root / place / "circle").symlink_to(root / place)
    found = opened(root).info
    assert found.num_train == before.num_train + 1
    assert found.left_out == {"links to a folder above": len(places)}


def test_all_endings_of_images_have_labels_too(tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    for number, ending in enumerate(("tif", "webp", "JPG", "jpeg")):
        save(root / f"images/training/new{number}.{ending}", number)
        save(root / f"annotations/training/new{number}.png", number, lambda seed: np.full((40, 40), 1, np.uint8))
    assert opened(root).info.num_train == 8


def test_objects_and_images_of_coco_are_counted(tmp_path: Path) -> None:
    def change(split: str, content: dict[str, Any]) -> None:
        if split == "train":
            content["annotations"][0]["iscrowd"] = 1
            content["annotations"][1]["bbox"][2] = 0.5
            content["annotations"] = content["annotations"][:3]

    root = coco(tmp_path / "coco", change=change)
    save(root / "train2017/more.png", 1)
    assert opened(root).info.left_out == {
        "training objects (crowd)": 1,
        "training objects (box thinner than a pixel)": 1,
        "training images without annotations": 1,
        "images that no annotation file names": 1,
    }


def test_pictures_of_equal_names_do_not_overwrite_each_other() -> None:
    assert pictures.file_names(["d/a.jpg", "d/b.jpg"]) == ["a.png", "b.png"]
    for images in (
        ["x/a.jpg", "y/a.jpg", "y/b.jpg"],
        ["a.jpg", "a.png"],
        ["a/b_c.jpg", "a_b/c.jpg", "x/c.jpg"],
        ["A.jpg", "a.jpg"],
        ["/r/1/x.png", "/r/2/x.png", "x.png"],
    ):
        names = pictures.file_names(images)
        assert len({name.lower() for name in names}) == len(images), names
        assert not any("/" in name or name.startswith(".") for name in names)


def test_equal_class_names_are_told_apart() -> None:
    for names in (["a", "b"], ["cup", "cup"], ["cup", "cup", "cup (1)"], ["cup (0)", "cup", "cup"], ["x"] * 4):
        made = distinct(names)
        assert len(set(made)) == len(names)
        assert all(new.startswith(old) for new, old in zip(made, names, strict=True))
    assert distinct(["a", "b"]) == ["a", "b"]
    assert distinct(["cup", "cup"]) == ["cup (0)", "cup (1)"]


def test_per_class_tables_have_a_row_for_each_class(tmp_path: Path, hcnet: Hcnet) -> None:
    root = coco(tmp_path / "coco", change=lambda split, content: content["categories"][1].update(name="one"))
    done = hcnet(
        *("finetune-det", "--recipe", "finetune-det/digit-scenes", "--data", root, "--out", tmp_path / "o"),
        *("--epochs", 1, "--batch-size", 2, "--workers", 0, "--init", "none", "--no-masks", *SMALL_MODEL),
        *("--set", "data.img_scale=[64,64]"),
    )
    assert done.code == 0, done.err
    per_class = json.loads((only_run(tmp_path / "o") / "final/per_class.json").read_text())
    assert list(per_class) == ["one (0)", "one (1)"]
