"""Protects `hcnet check`: what is wrong with a data set is found, all of it, and nothing else is called wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
from conftest import Done
from PIL import Image
from pycocotools import mask as coco_mask

from hcnet_cli import check
from hcnet_cli.console import UserError
from hcnet_cli.data import embedded
from hcnet_cli.data.audit import Audit, Item
from hcnet_cli.inputs import task_of
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.detection.annotations import read_annotations
from hcnet_cli.tasks.detection.coco import CocoDataset
from hcnet_cli.tasks.detection.folder import load_split
from hcnet_cli.tasks.detection.misplaced import wrong_areas
from hcnet_cli.tasks.spec import Spec

Hcnet = Callable[..., Done]


def findings(hcnet: Hcnet, data: Path, *more: str, code: int) -> dict[str, dict[str, Any]]:
    """What is said of each thing found, by its words."""
    output = data.parent / "found.json"
    done = hcnet("check", data, "--output", output, *more)
    assert done.code == code, done.err
    assert ("Nothing is wrong." in done.out) == (code == 0)
    return {one["what"]: one for one in json.loads(output.read_text())["findings"]}


@pytest.mark.parametrize("name", ["digits", "digit-scenes", "digit-stuff"])
def test_nothing_is_wrong_with_the_embedded_sets(name: str, hcnet: Hcnet, tmp_path: Path) -> None:
    """The layout alone tells the task; a link to the folder is a folder like any other."""
    (tmp_path / "mine").symlink_to(embedded.ensure(name))
    found = findings(hcnet, tmp_path / "mine", code=0)
    assert not any(one["wrong"] for one in found.values())


def test_an_embedded_set_is_checked_by_its_name(hcnet: Hcnet) -> None:
    done = hcnet("check", "digit-stuff")
    assert done.code == 0
    assert "Nothing is wrong." in done.out


@pytest.fixture
def folder(folder_of_images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of_images, tmp_path / "colors"))


def test_an_image_folder(hcnet: Hcnet, folder: Path) -> None:
    assert findings(hcnet, folder, code=0) == {}
    (folder / "train/red/0.png").write_bytes(b"no image")
    (folder / "train/blue/2.png").write_bytes((folder / "train/blue/2.png").read_bytes()[:200])
    pixels = Image.open(folder / "train/green/1.png")
    pixels.save(folder / "val/green/again.bmp")  # other bytes, the same picture
    Image.open(folder / "train/red/3.png").save(folder / "train/green/lost.png")
    Image.open(folder / "train/red/6.png").save(folder / "train/red/twice.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(folder / "val/red/turned.png", exif=exif)
    found = findings(hcnet, folder, code=1)
    assert {what: (len(one["files"]), one["wrong"]) for what, one in found.items()} == {
        "train images that cannot be used": (2, True),
        "pictures both in training and in validation": (1, True),
        "pictures in several classes": (1, True),
        "pictures more than once in a split": (1, False),
        "images turned as their EXIF data says": (1, False),
    }
    assert found["pictures both in training and in validation"]["files"] == [
        ["train/green/1.png", "val/green/again.bmp"]
    ]
    assert list(found)[:3] == [what for what, one in found.items() if one["wrong"]], "what is wrong comes first"
    text = hcnet("check", folder).out
    assert "Correct what is WRONG before training." in text
    assert "(1): train/green/1.png = val/green/again.bmp " in " ".join(text.split())
    assert "10 – 20 – 24" not in text  # a turned image is 10 wide and 20 high
    assert "10 – 24 – 24" in text


def test_ctrl_c_ends_it_quietly(hcnet: Hcnet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "inspect_images", interrupted)
    done = hcnet("check", folder)
    assert (done.code, done.out, done.err) == (130, "", "Stopped.\n")


def test_a_class_without_validation_images_is_named(hcnet: Hcnet, folder: Path) -> None:
    shutil.rmtree(folder / "val/blue")
    assert findings(hcnet, folder, code=0)["classes without validation images"]["files"] == ["blue"]


def test_of_many_classes_the_rarest_and_the_commonest_are_shown(tmp_path: Path) -> None:
    classes = {f"class{n:02d}": {"train": float(n), "val": 1.0} for n in range(50)}
    items = [Item("a", "train"), Item("b", "val")]
    made = check.tables(Audit("many", tmp_path, "image folder", "images", items, classes))[1]
    shown = [row.values["class"] for row in made.rows]
    assert shown == [f"class{n:02d}" for n in (*range(10), *range(40, 50))]


def coco(root: Path) -> dict[str, Any]:
    """Two splits of four images, 40 x 36, each with an object."""
    random = np.random.RandomState(0)
    (root / "annotations").mkdir(parents=True)
    content: dict[str, Any] = {}
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        images, objects = [], []
        for i in range(4):
            pixels = random.randint(0, 255, (36, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017/{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 40, "height": 36})
            objects.append({"id": i, "image_id": i, "category_id": 7, "bbox": [5, 5, 10, 10], "area": 100,
                            "iscrowd": 0, "segmentation": [[5, 5, 15, 5, 15, 15]]})  # fmt: skip
        categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
        content[split] = {"images": images, "annotations": objects, "categories": categories}
    return content


def test_a_coco_folder(hcnet: Hcnet, tmp_path: Path) -> None:
    content = coco(tmp_path / "c")
    small = content["train"]["images"][3]
    small["height"] = 30
    Image.open(tmp_path / "c/train2017/3.png").crop((0, 0, 40, 30)).save(tmp_path / "c/train2017/3.png")

    def write() -> Path:
        for split, one in content.items():
            (tmp_path / f"c/annotations/instances_{split}2017.json").write_text(json.dumps(one))
        return tmp_path / "c"

    assert set(findings(hcnet, write(), code=0)) == {
        "classes without train objects",
        "classes without val objects",
        "left out: training images smaller than 32 pixels",
    }
    train, val = content["train"], content["val"]
    train["annotations"][0]["bbox"] = [5, 5, 0.5, 10]
    train["annotations"][1]["bbox"] = [35, 25, 10, 10]
    train["annotations"][2]["iscrowd"] = 1
    del train["annotations"][3]
    val["images"][0]["width"], val["images"][1]["height"] = 41, 37
    (tmp_path / "c/train2017/3.png").write_bytes(b"no image")
    shutil.copy(tmp_path / "c/train2017/0.png", tmp_path / "c/val2017/3.png")
    found = findings(hcnet, write(), code=1)
    expected = {
        "val images that cannot be used": (2, True),  # all of them, where training stops at the first
        "train images that cannot be used": (1, True),
        "pictures both in training and in validation": (1, True),
        "train annotations left out (box thinner than a pixel)": (1, False),
        "train boxes clipped to their image": (1, False),
        "train annotations not learned from (crowd)": (1, False),
        "train images without annotations": (1, False),
    }
    assert expected.items() <= {what: (len(one["files"]), one["wrong"]) for what, one in found.items()}.items()
    assert "its annotation file says 41 x 36" in found["val images that cannot be used"]["files"][0]
    val["annotations"][0]["bbox"], val["annotations"][1]["segmentation"] = [5, 5, -1, 10], [[1, 2, 3, 4]]
    found = findings(hcnet, write(), code=1)
    for what in ("not scored: box of negative width or height", "scored as boxes alone: no usable mask"):
        assert (found[f"val annotations {what}"]["wrong"], len(found[f"val annotations {what}"]["files"])) == (True, 1)
    val["annotations"][0]["bbox"] = [5, 5, 10, 10]
    for one in content.values():
        for entry in one["annotations"]:
            del entry["segmentation"]
    assert "annotation files for boxes alone (train with --no-masks)" in findings(hcnet, write(), code=1)
    val["categories"].pop()
    done = hcnet("check", write())
    assert done.code == 2  # nothing more can be said of it
    assert "different categories" in done.err


def test_boxes_that_are_corners_are_said(hcnet: Hcnet, tmp_path: Path) -> None:
    """[x1, y1, x2, y2] instead of [x, y, width, height], of polygons and of run lengths; a slip of a pixel is none."""
    content = coco(tmp_path / "c")
    objects = content["train"]["annotations"]
    objects[0]["bbox"] = [5, 6, 11, 10]
    mask = np.zeros((36, 40), dtype=np.uint8)
    mask[10:20, 2:12] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    objects[1] |= {"segmentation": {"size": [36, 40], "counts": rle["counts"].decode()}, "bbox": [2, 10, 10, 10]}

    def write() -> Path:
        for split, one in content.items():
            (tmp_path / f"c/annotations/instances_{split}2017.json").write_text(json.dumps(one))
        return tmp_path / "c"

    assert not [what for what in findings(hcnet, write(), code=0) if "not around" in what]
    objects[1]["bbox"], objects[2]["bbox"] = [2, 10, 12, 20], [20, 5, 30, 15]
    found = findings(hcnet, write(), code=1)
    (what,) = [what for what in found if "not around" in what]
    assert what.startswith("train boxes not around their masks, 2 of 4: ")
    assert found[what] == {"what": what, "files": ["annotation id 1", "annotation id 2"], "wrong": True}


def test_corners_without_masks_are_said(tmp_path: Path, hcnet: Hcnet, capfd: pytest.CaptureFixture[str]) -> None:
    """By `hcnet check` and before training; a box that overhangs by a pixel is none."""

    def change(split: str, content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["bbox"] = [20, 20, 35, 36] if split == "train" else [30, 30, 11, 11]

    root = small_data.coco(tmp_path / "c", change=change)
    found = findings(hcnet, root, "--set", "head.with_masks=false", code=1)
    assert [what for what in found if "far outside" in what] == [
        "train boxes partly far outside their image, 4 of 4: COCO's boxes are [x, y, width, height], not two corners."
    ]
    capfd.readouterr()
    small_data.opened(root)
    assert "100% of 4 boxes are partly far outside their image, the first is that of" in capfd.readouterr().err


@pytest.mark.parametrize("area", [1, 81 / 4096, 1_000_000])
def test_areas_that_cannot_be_are_said(
    area: float, tmp_path: Path, hcnet: Hcnet, capfd: pytest.CaptureFixture[str]
) -> None:
    """By `hcnet check` and before training: AP by size goes by them. Those of training decide nothing."""

    def change(split: str, content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["area"] = area

    root = small_data.coco(tmp_path / "c", change=change)
    found = findings(hcnet, root, "--set", "head.with_masks=false", code=1)
    (what,) = [what for what in found if " areas " in what]
    assert what.startswith("val areas that cannot be those of their boxes, 2 of 2: AP of small,")
    capfd.readouterr()
    small_data.opened(root)
    said = " ".join(capfd.readouterr().err.split())
    assert 'instances_val2017.json: 100% of 2 values of "area" cannot be those of their boxes, the first is' in said


@pytest.mark.parametrize(
    ("bbox", "area"),
    [
        ([4, 4, 30, 30], 30),  # a thin diagonal object
        ([4, 4, 9, 9], 100),  # pixels that the box touches
        ([4, 4, 9, 9], None),
        ([4, 4, 30, 0.5], 15),
    ],
)
def test_areas_that_can_be(bbox: list[float], area: float | None, tmp_path: Path) -> None:
    def change(split: str, content: dict[str, Any]) -> None:
        content["annotations"][0].update(bbox=bbox, area=area)
        content["annotations"][1].update(iscrowd=1, area=0.1)

    root = small_data.coco(tmp_path / "c", change=change)
    found = read_annotations(root / "annotations/instances_val2017.json", masks=False, scoring=True)
    assert wrong_areas(found).ids == []


def test_annotations_that_are_there_twice_are_said(tmp_path: Path, hcnet: Hcnet) -> None:
    """The same image, class and box under another id is a miss in validation, whatever a model predicts."""

    def change(split: str, content: dict[str, Any]) -> None:
        first = content["annotations"][0]
        content["annotations"] += [{**first, "id": 98}, {**first, "id": 99}, {**first, "id": 97, "category_id": 2}]

    root = small_data.coco(tmp_path / "c", change=change)
    found = findings(hcnet, root, "--set", "head.with_masks=false", code=1)
    for split in ("train", "val"):
        finding = found[f"{split} annotations that repeat another of the same image, class, box and mask"]
        assert finding["files"] == [["annotation id 1", "annotation id 98", "annotation id 99"]]
        assert finding["wrong"] == (split == "val")


def test_problems_of_one_cause_are_one_line() -> None:
    problems = [UserError(f"a/b.json: annotation id {i} is of image id {i + 50}, which it lacks.") for i in range(30)]
    problems += [UserError("a/b.json has no images."), UserError('a/c.json: the bbox of annotation id 7 is ["x"].')]
    shown = check.lines(Audit("x", Path("x"), "COCO", "objects", [], {}, problems=problems))
    assert len(shown) == 4
    assert shown[0].startswith("WRONG: a/b.json: annotation id 0 is of image id 50, which it lacks. And 29 more of")
    assert "Correct what is WRONG before training." in shown[-1]


def test_classes_that_only_validation_has_are_a_finding(tmp_path: Path) -> None:
    made = Audit("x", tmp_path, "ADE20K", "% of the pixels", [], {name: {} for name in ("sky", "sea", "land")})
    made.note_pixels({"training": np.array([5, 0, 0, 1]), "validation": np.array([5, 2, 0, 1])})
    assert {finding.what: finding.files for finding in made.findings} == {
        "classes in no training label": ["sea", "land"],
        "classes in no validation label": ["land"],
        "classes in validation labels that no training label has, so that they cannot be learned": ["sea"],
    }


def test_a_folder_of_scenes(hcnet: Hcnet, tmp_path: Path) -> None:
    """Shares of pixels as counted by hand; an unreadable image; what no label can be stops it with a sentence."""
    root, random = tmp_path / "s", np.random.RandomState(0)
    label = np.zeros((8, 10), dtype=np.uint8)
    label[:4], label[4:6] = 1, 2  # 40 of 80 pixels, 20 of 80, the rest ignored
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(random.randint(0, 255, (8, 10, 3)).astype(np.uint8)).save(root / f"images/{split}/{i}.png")
            Image.fromarray(label).save(root / f"annotations/{split}/{i}.png")
    (root / "classes.txt").write_text("sky\nsea\nland\n")
    done = hcnet("check", root)
    assert done.code == 0
    rows = {words[0]: words[1:] for line in done.out.splitlines() if (words := line.split())}
    assert (rows["sky"], rows["sea"], rows["land"]) == (["50.00"] * 2, ["25.00"] * 2, ["0.00"] * 2)
    assert "25.00% of the training pixels are ignored." in done.out
    assert "classes in no validation label (1): land" in done.out
    (root / "images/validation/1.png").write_bytes(b"no image")
    assert findings(hcnet, root, code=1)["validation images that cannot be used"]["wrong"]
    label[0] = 9
    Image.fromarray(label).save(root / "annotations/training/0.png")
    done = hcnet("check", root)
    assert done.code == 2
    assert "holds the label value 9" in done.err


def test_unlabelled_pixels_of_the_number_0_are_no_class(hcnet: Hcnet, tmp_path: Path) -> None:
    small_data.scenes(tmp_path / "s", labels=lambda seed: np.arange(1600).reshape(40, 40).astype(np.uint8) % 4)
    (tmp_path / "s/classes.txt").unlink()
    done = hcnet("check", tmp_path / "s", *("--set", "data.ignore_index=0"), *("--set", "data.reduce_zero_label=false"))
    assert done.code == 0, done.err
    assert "25.00% of the training pixels are ignored." in done.out
    assert "label 0" not in done.out


def test_classes_of_one_name_stay_apart(hcnet: Hcnet, tmp_path: Path) -> None:
    content = coco(tmp_path / "c")
    for split, one in content.items():
        one["categories"][1]["name"] = "cat"
        (tmp_path / f"c/annotations/instances_{split}2017.json").write_text(json.dumps(one))
    found = findings(hcnet, tmp_path / "c", code=0)
    assert found["classes without train objects"]["files"] == ["cat (0)"]  # category 3 comes before 7


@pytest.mark.parametrize(
    ("file", "task"),
    [
        ("train/cat/a.png", "pretrain"),
        ("annotations/instances_val2017.json", "finetune-det"),
        ("train/_annotations.coco.json", "finetune-det"),  # also has a folder train/
        ("images/training/a.jpg", "finetune-seg"),
        ("annotations/training/a.png", "finetune-seg"),
        ("notes.txt", "pretrain"),
    ],
)
def test_the_layout_tells_the_task(file: str, task: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("")
    assert task_of(str(tmp_path)) == task


@pytest.mark.parametrize("spec", TASKS.values(), ids=TASKS)
def test_embedded_sets_have_their_task_by_name_and_by_layout(spec: Spec) -> None:
    assert task_of(spec.embedded) == spec.name
    assert task_of(str(embedded.ensure(spec.embedded))) == spec.name


def test_check_and_training_agree_on_what_cannot_be_used(hcnet: Hcnet, tmp_path: Path) -> None:
    """A 16-bit image, a palette and damaged EXIF data are fine; a truncated file is not. Detection reads as check."""
    content = coco(tmp_path / "c")
    folder = tmp_path / "c/train2017"
    Image.fromarray(np.full((36, 40), 40_000, dtype=np.uint16)).save(folder / "0.png")
    Image.open(folder / "1.png").quantize(9).save(folder / "1.png")
    Image.open(folder / "2.png").save(folder / "2.png", exif=b"Exif\x00\x00XX\x00*garbage")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:300])
    for split, one in content.items():
        (tmp_path / f"c/annotations/instances_{split}2017.json").write_text(json.dumps(one))
    found = findings(hcnet, tmp_path / "c", code=1)
    (listed,) = found["train images that cannot be used"]["files"]
    assert listed.startswith("train2017/3.png (")
    dataset = CocoDataset(*load_split(tmp_path / "c", "train"), train=True, min_side=1)
    replaced = {index: dataset[index, 1, 0].get("unreadable", "") for index in range(4)}
    assert [index for index, words in replaced.items() if words] == [3]
    assert replaced[3] == f"{tmp_path}/c/{listed}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere does not exist"),
        (("digits", "--output", "found.csv"), "does not end in .json"),
        (("digits", "--recipe", "coco-1x"), "is for finetune-det, not for pretrain"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], words: str, hcnet: Hcnet) -> None:
    done = hcnet("check", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
