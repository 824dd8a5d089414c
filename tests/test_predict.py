"""Protects `hcnet predict`: it says of a validation image what the run's own evaluation said, whatever the file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import small_data
from conftest import SMALL_MODEL, Hcnet, only_run
from PIL import Image

TASKS = {
    "pretrain": ("classes", "val", ("data.img_size=16", "schedule.length=1"), 2),
    "finetune-det": ("coco", "val2017", ("data.img_scale=[64,64]", "schedule.length=1", "head.with_masks=false"), 2),
    "finetune-seg": ("scenes", "images/validation", ("data.img_scale=[64,64]", "schedule.length=2"), 2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


def trained(task: str, root: Path, hcnet: Hcnet) -> Path:
    """A finished run on a few pictures, made once."""
    kind, _, settings, batch = TASKS[task]
    out = root / f"{task}-out"
    if not out.exists():
        data = small_data.MAKERS[kind](root / kind)
        sets = [word for one in settings for word in ("--set", one)]
        done = hcnet(
            *(task, "--data", data, "--out", out, *SMALL_MODEL, *sets, "--batch-size", batch, "--workers", 0),
            *("--recipe", {"pretrain": "digits", "finetune-det": "digit-scenes", "finetune-seg": "digit-stuff"}[task]),
            *(() if task == "pretrain" else ("--init", "none")),
        )
        assert done.code == 0, done.err
    return only_run(out)


def test_a_classifier_answers_as_in_its_evaluation(root: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    run = trained("pretrain", root, hcnet)
    done = hcnet("predict", run, root / "classes" / "val", "--output", tmp_path / "p", "--workers", 0)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()]
    with (run / "final" / "predictions.csv").open() as file:
        rows = {row["image"].removeprefix("val/"): row for row in csv.DictReader(file)}
    assert {line["file"] for line in lines} == rows.keys()
    for line in lines:
        row = rows[line["file"]]
        assert line["classes"] == [row["class_1"], row["class_2"]]
        scores = np.array([float(row["score_1"]), float(row["score_2"])])
        assert line["probabilities"] == pytest.approx(np.exp(scores) / np.exp(scores).sum(), abs=1e-5)
    assert {path.name for path in (tmp_path / "p" / "pictures").iterdir()} == {"0.png", "1.png"}


def test_a_detector_answers_as_in_its_evaluation(root: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    run = trained("finetune-det", root, hcnet)
    done = hcnet("predict", run, root / "coco" / "val2017", "--output", tmp_path / "p", "--workers", 0)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert [one["name"] for one in found["categories"]] == ["one", "two"]
    assert [(one["id"], one["file_name"], one["height"]) for one in found["images"]] == [
        (1, "0.bmp", 40),
        (2, "1.bmp", 40),
    ]
    expected = json.loads((run / "final" / "predictions_bbox.json").read_text())
    ours = [(one["image_id"] - 1, one["category_id"], one["score"], *one["bbox"]) for one in found["annotations"]]
    theirs = [(one["image_id"], one["category_id"], one["score"], *one["bbox"]) for one in expected]
    assert len(ours) == len(theirs) > 0
    assert np.allclose(sorted(ours), sorted(theirs), atol=1e-4)
    assert len({one["id"] for one in found["annotations"]}) == len(ours)


def test_a_label_map_is_that_of_the_evaluation(root: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    run = trained("finetune-seg", root, hcnet)
    photos = root / "scenes" / "images" / "validation"
    done = hcnet("predict", run, photos, "--output", tmp_path / "p", "--workers", 0)
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "p" / "classes.json").read_text())
    assert about["values"] == {"1": "road", "2": "tree", "3": "car"}  # as in the labels, where 0 is ignored
    assert about["labels"] == {"labels/0.png": "0.bmp", "labels/1.png": "1.bmp"}
    hits = total = 0
    for name in ("0.png", "1.png"):
        with Image.open(tmp_path / "p" / "labels" / name) as label:
            predicted = np.asarray(label)
        truth = np.asarray(Image.open(root / "scenes" / "annotations" / "validation" / name))
        assert predicted.shape == truth.shape
        hits, total = hits + int((predicted == truth).sum()), total + truth.size
    record = json.loads((run / "run.json").read_text())
    assert record["metrics"]["aAcc"] == pytest.approx(100 * hits / total)


def test_photos_of_every_kind_and_one_that_is_none(root: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    run = trained("pretrain", root, hcnet)
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    noise = Image.fromarray(small_data.noise(1)).resize((400, 30))
    noise.convert("CMYK").save(photos / "cmyk.jpg")
    noise.convert("L").save(photos / "grey.png")
    noise.convert("RGBA").save(photos / "more" / "clear.png")
    Image.fromarray(np.arange(3600, dtype=np.uint16).reshape(60, 60)).save(photos / "deep.png")
    turned = Image.Exif()
    turned[274] = 6
    noise.save(photos / "turned.jpg", exif=turned)
    (photos / "text.png").write_text("not an image")
    (photos / "note.txt").write_text("hello")
    done = hcnet("predict", run, photos, photos / "grey.png", "--output", tmp_path / "p", "--workers", 0)
    assert done.code == 1
    assert f"Not read: {photos / 'text.png'} (it is not an image in one of the formats" in done.err
    assert "Left out: 1 files that are not images." in done.err
    lines = [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["cmyk.jpg", "deep.png", "grey.png", "more/clear.png", "turned.jpg"]
    page = tmp_path / "page.html"
    assert hcnet("predict", run, photos / "cmyk.jpg", "--output", page, "--workers", 0).code == 0
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 1
    assert "<script" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "photo.png", "--output", "p"), "There is no run nowhere."),
        (("RUN", "nothing.png", "--output", "p"), "There is no file or folder nothing.png."),
        (("RUN", "photo.png", "--output", "full"), "full exists already."),
        (("RUN", "photo.png", "--output", "photo.png"), "photo.png exists already."),
        (("RUN", "empty", "--output", "p"), "There is no image in empty."),
        (("RUN", "text.png", "--output", "p"), "None of the 1 images can be read, the first: text.png (it is not"),
        (("half", "photo.png", "--output", "p"), "half has no best.safetensors."),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    message: str,
    root: Path,
    tmp_path: Path,
    hcnet: Hcnet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained("pretrain", root, hcnet)
    monkeypatch.chdir(tmp_path)
    small_data.save(tmp_path / "photo.png", 1)
    small_data.save(tmp_path / "full" / "x.png", 1)
    (tmp_path / "text.png").write_text("x")
    for name in ("empty", "half"):
        (tmp_path / name).mkdir()
    for name in ("run.json", "recipe.yaml"):
        (tmp_path / "half" / name).write_bytes((run / name).read_bytes())
    done = hcnet("predict", *(str(run) if word == "RUN" else word for word in arguments))
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "p").exists() or not any((tmp_path / "p").iterdir())
