"""Protects `hcnet predict`: it says of a validation image what the run's own evaluation said, whatever the file."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
from conftest import SMALL_MODEL, Hcnet, only_run
from PIL import Image

from hcnet_cli import pictures
from hcnet_cli import predict as predicting
from hcnet_cli.runs import RunFolder, with_weights
from hcnet_cli.tasks.classification import predict as classification
from hcnet_cli.tasks.detection import predict as detection

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
    assert "Left out: files that are not images: 1." in done.err
    lines = [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["cmyk.jpg", "deep.png", "grey.png", "more/clear.png", "turned.jpg"]
    page = tmp_path / "page.html"
    assert hcnet("predict", run, photos / "cmyk.jpg", "--output", page, "--workers", 0).code == 0
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 1
    assert "<script" not in text


def test_a_file_is_taken_before_links_to_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small_data.save(tmp_path / "photos" / "plain.png", 1)
    small_data.save(tmp_path / "elsewhere" / "y.png", 1)
    (tmp_path / "photos" / "link.png").symlink_to("plain.png")
    (tmp_path / "photos" / "a.png").symlink_to(tmp_path / "elsewhere" / "y.png")  # the only name of its file
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root").symlink_to(tmp_path / "photos")  # a link that is named is no reason to prefer another name
    for folder in ("photos", "root"):
        found = predicting.find_photos([tmp_path / folder, tmp_path / folder / "plain.png"])
        assert [photo.name for photo in found] == ["a.png", "plain.png"]
        assert "Left out: repetitions of the same file: 3." in capfd.readouterr().err
    assert [photo.name for photo in predicting.find_photos([tmp_path / "photos", tmp_path / "elsewhere"])] == [
        "plain.png",
        "y.png",
    ]


@pytest.mark.parametrize("task", TASKS)
def test_images_of_the_same_name_are_told_apart(
    task: str, root: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(task, root, hcnet)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("s1/x.png", "s2/x.png", "s2/z.png")):
        small_data.save(tmp_path / name, number)
    monkeypatch.setattr(predicting, "MAX_PICTURES", 2)
    done = hcnet("predict", run, "s1", "s2", "--output", "p", "--workers", 0)
    assert done.code == 0, done.err
    names, drawn = ["s1/x.png", "s2/x.png", "s2/z.png"], ["pictures/s1_x.png", "pictures/s2_x.png"]
    if task == "finetune-seg":
        labels = json.loads(Path("p/classes.json").read_text())["labels"]
        assert list(labels.values()) == names
        assert [name.replace("labels", "pictures") for name in labels][:2] == drawn
    else:
        if task == "pretrain":
            lines = [json.loads(line) for line in Path("p/predictions.jsonl").read_text().splitlines()]
        else:
            lines = json.loads(Path("p/predictions.json").read_text())["images"]
        assert [line.get("file", line.get("file_name")) for line in lines] == names
        assert [line.get("picture") for line in lines] == [*drawn, None]
    assert sorted(f"pictures/{path.name}" for path in Path("p/pictures").iterdir()) == drawn


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_long_thin_photos_are_drawn(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    mask = np.ones((size[1], size[0]), dtype=np.uint8)
    found = pictures.DrawnObject("line", (9, 9, 9), (0, 0, *size), mask)
    for drawn in (
        pictures.enlarged(image),
        pictures.draw_objects(image, [found]),
        pictures.draw_classes(image, mask, pictures.palette(2), 255),
    ):
        assert sorted(drawn.size) == [1, pictures.PANEL]
    assert pictures.squared(image).size == (pictures.PANEL, pictures.PANEL)
    assert pictures.tile(image, []).size == (pictures.TILE, pictures.TILE)


def test_the_bits_of_deep_photos_are_measured(root: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    """A run of 8-bit images knows no bits: a 12-bit photo is predicted as the same photo in 8 bits, not as black."""
    run = trained("pretrain", root, hcnet)
    grey = small_data.noise(1)[..., 0]
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(grey).save(photos / "plain.png")
    Image.fromarray(grey.astype(np.uint16) << 4).save(photos / "deep.png")
    done = hcnet("predict", run, photos, "--output", tmp_path / "p", "--workers", 0)
    assert done.code == 0, done.err
    assert "Images of more than 8 bits are read as 12-bit, measured over these photos" in done.err
    deep, plain = map(json.loads, (tmp_path / "p" / "predictions.jsonl").read_text().splitlines())
    assert (deep["classes"], deep["probabilities"]) == (plain["classes"], plain["probabilities"])
    with Image.open(tmp_path / "p" / "pictures" / "deep.png") as first:
        assert np.asarray(first)[100:400, 100:400].mean() > 60
    done = hcnet("predict", run, photos / "plain.png", "--output", tmp_path / "p2", "--workers", 0)
    assert "of more than 8 bits" not in done.err


@pytest.mark.parametrize(("measured", "chosen", "expected"), [(10, None, 10), (None, 16, 16), (None, None, 12)])
def test_bits_of_the_run_come_first(
    measured: int | None,
    chosen: int | None,
    expected: int,
    root: Path,
    tmp_path: Path,
    hcnet: Hcnet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunFolder(trained("pretrain", root, hcnet))
    info, recipe = with_weights(run)
    info = info.model_copy(update={"data": info.data.model_copy(update={"bits": measured})})
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"bits": chosen}),
            "train": recipe.train.model_copy(update={"workers": 0}),
        }
    )
    used = []
    read = predicting.read_image
    monkeypatch.setattr(predicting, "read_image", lambda path, **how: used.append(how["bits"]) or read(path, **how))
    Image.fromarray(np.full((40, 40), 4000, dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "p").mkdir()
    predicting.predict(run, info, recipe, predicting.find_photos([tmp_path / "deep.png"]), tmp_path / "p", "cpu")
    assert used == [expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "photo.png", "--output", "p"), "There is no run nowhere."),
        (("RUN", "nothing.png", "--output", "p"), "There is no file or folder nothing.png."),
        (("RUN", "photo.png", "--output", "full"), "full exists already."),
        (("RUN", "photo.png", "--output", "photo.png"), "photo.png exists already."),
        (("RUN", "empty", "--output", "p"), "There is no image in empty."),
        (("RUN", "text.png", "--output", "p"), "The only image cannot be read: text.png (it is not"),
        (("half", "photo.png", "--output", "p"), "half has no best.safetensors."),
        (("half", "photo.png", "--output", "p/page.html"), "half has no best.safetensors."),
        (("RUN", "text.png", "--output", "p/page.html"), "The only image cannot be read: text.png (it is not"),
        (("RUN", "text.png", "text2.png", "--output", "p"), "None of the 2 images can be read, the first: text.png"),
        (("RUN", "photo.png", "--output", "old.html"), "old.html exists already."),
        (
            ("RUN", "photo.png", "--output", "p/x.json"),
            "p/x.json names a file: predictions are written as a folder, or",
        ),
        (("RUN", "photo.png", "--output", "p/x.pdf"), "--output p/x or --output p/x.html"),
        (("RUN", "photo.png", "--output", "p", "--workers", "-1"), '--workers: "train.workers" cannot be -1'),
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
    for name in ("text.png", "text2.png", "old.html"):
        (tmp_path / name).write_text("x")
    for name in ("empty", "half"):
        (tmp_path / name).mkdir()
    for name in ("run.json", "recipe.yaml"):
        (tmp_path / "half" / name).write_bytes((run / name).read_bytes())
    done = hcnet("predict", *(str(run) if word == "RUN" else word for word in arguments))
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "p").exists()
    assert (tmp_path / "old.html").read_text() == "x"


def test_an_error_leaves_no_empty_folder(
    root: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    run = trained("pretrain", root, hcnet)
    monkeypatch.setattr(classification.Predictor, "predict", fail)
    for output in ("above/p", "above/p.html"):
        with pytest.raises(MemoryError):
            hcnet("predict", run, root / "classes" / "val", "--output", tmp_path / output, "--workers", 0)
        assert not (tmp_path / "above").exists()


def test_a_folder_may_have_a_dot_in_its_name(root: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    run = trained("pretrain", root, hcnet)
    photo = root / "classes" / "val" / "a" / "0.bmp"
    done = hcnet("predict", run, photo, "--output", tmp_path / "run-0.1", "--workers", "auto")
    assert done.code == 0, done.err
    assert (tmp_path / "run-0.1" / "predictions.jsonl").exists()
    assert "Predicted 1 image in" in done.err


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, predictor: type, times: int, at: int = 2) -> None:
    """Sends Ctrl-C so many times while a predictor draws the second picture."""
    draw, drawn = predictor.draw, []  # type: ignore[attr-defined]

    def interrupted(*arguments: Any) -> Image.Image:
        drawn.append(1)
        for _ in range(times if len(drawn) == at else 0):
            signal.raise_signal(signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(predictor, "draw", interrupted)


@pytest.mark.parametrize(("times", "kept"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_keeps_what_is_predicted(
    times: int, kept: int, workers: int, root: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a picture is drawn. The image at hand is finished, unless Ctrl-C comes again."""
    run = trained("pretrain", root, hcnet)
    photos = root / "classes" / "train"
    handler = signal.getsignal(signal.SIGINT)
    interrupt(monkeypatch, classification.Predictor, times)
    done = hcnet("predict", run, photos, "--output", tmp_path / "p", "--workers", workers)
    assert done.code == 130
    assert f"Stopped: {4 - kept} of 4 images were not looked at." in done.err
    lines = [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["a/0.bmp", "a/2.bmp"][:kept]
    assert sorted(path.name for path in (tmp_path / "p" / "pictures").iterdir()) == ["0.png", "2.png"][:kept]
    assert signal.getsignal(signal.SIGINT) == handler


def test_what_is_predicted_before_a_data_worker_dies_is_kept(
    root: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("pretrain", root, hcnet)
    read, second = predicting.read_image, tmp_path / "p" / "pictures" / "2.png"

    def deadly(path: Path, **how: Any) -> Image.Image:
        if path.parent.name == "b":
            while not second.exists():
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, **how)

    monkeypatch.setattr(predicting, "read_image", deadly)
    monkeypatch.setattr(classification.Predictor, "batch_size", 1)
    done = hcnet("predict", run, root / "classes" / "train", "--output", tmp_path / "p", "--workers", 1)
    assert done.code == 1
    assert "A data worker process died" in done.err
    assert "Stopped: 2 of 4 images were not looked at." in done.err
    lines = (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["a/0.bmp", "a/2.bmp"]


def test_ctrl_c_keeps_the_page(root: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("pretrain", root, hcnet)
    interrupt(monkeypatch, classification.Predictor, 1)
    page = tmp_path / "new" / "page.html"
    done = hcnet("predict", run, root / "classes" / "train", "--output", page, "--workers", 0)
    assert done.code == 130
    assert "Stopped: 2 of 4 images were not looked at." in done.err
    assert page.read_text().count('<img src="data:image/jpeg;base64,') == 2
    assert list(page.parent.iterdir()) == [page]


def test_ctrl_c_before_the_first_image_writes_nothing(
    root: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("pretrain", root, hcnet)
    interrupt(monkeypatch, classification.Predictor, 2, at=1)
    for output in ("p", "p.html"):
        done = hcnet("predict", run, root / "classes" / "val", "--output", tmp_path / output, "--workers", 0)
        assert done.code == 130
        assert not list(tmp_path.iterdir())
        interrupt(monkeypatch, classification.Predictor, 2, at=1)


def test_ctrl_c_keeps_images_and_their_boxes(
    root: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("finetune-det", root, hcnet)
    interrupt(monkeypatch, detection.Predictor, 2)
    done = hcnet("predict", run, root / "coco" / "val2017", "--output", tmp_path / "p", "--workers", 0)
    assert done.code == 130
    assert "Stopped: 1 of 2 images was not looked at." in done.err
    found = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert [one["file_name"] for one in found["images"]] == ["0.bmp"]
    assert {one["image_id"] for one in found["annotations"]} == {1}
