"""Protects what comes before step 1 and after the last: late code fails early, and what nothing needs ends no run."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import small_data
import torch
from conftest import SMALL_MODEL, Hcnet, only_run
from PIL import Image

from hcnet_cli import build, engine, plan, rehearsal, runs, trial
from hcnet_cli import recipe as rcp
from hcnet_cli.console import Terminal, UserError
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.classification.metric import Accuracy
from hcnet_cli.tasks.detection.metric import CocoAP
from hcnet_cli.tasks.segmentation.metric import MeanIoU

QUICK = ("--device", "cpu", "--precision", "fp32", "--workers", "0", "--batch-size", "2")
CLASSIFY = ("pretrain", "--recipe", "digits", *SMALL_MODEL, "--epochs", "1", "--set", "data.img_size=16", *QUICK)
DETECT = (
    *("finetune-det", "--recipe", "digit-scenes", *SMALL_MODEL, "--epochs", "1", *QUICK, "--init", "none"),
    *("--set", "data.img_scale=[64,64]"),
)
SEGMENT = (
    *("finetune-seg", "--recipe", "digit-stuff", *SMALL_MODEL, "--steps", "1", *QUICK, "--init", "none"),
    *("--set", "data.img_scale=[64,64]", "--set", "data.crop_size=64"),
)
Change = Callable[[str, dict[str, Any]], None]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def noise(seed: int, size: int = 64) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 255, (size, size, 3))


def coco(root: Path, change: Change = lambda split, data: None, names: tuple[str, str] = ("one", "two")) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        images, objects = [], []
        for n in range(count):
            save(root / f"{split}2017" / f"{n}.png", noise(n))
            images.append({"id": n + 1, "file_name": f"{n}.png", "width": 64, "height": 64})
            for category in (1, 2):
                x, y, w, h = 20 * category - 15, 6, 18, 20
                ring = [x, y, x + w, y, x + w, y + h, x, y + h]
                entry = {"id": len(objects) + 1, "image_id": n + 1, "category_id": category, "bbox": [x, y, w, h]}
                objects.append({**entry, "area": w * h, "iscrowd": 0, "segmentation": [ring]})
        categories = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
        data = {"images": images, "annotations": objects, "categories": categories}
        change(split, data)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))
    return root


def scenes(root: Path, label: Callable[[str], int] = lambda split: 1) -> Path:
    for split, count in (("training", 4), ("validation", 2)):
        for n in range(count):
            save(root / "images" / split / f"{n}.png", noise(n))
            grid = np.full((64, 64), label(split))
            grid[:8] = 2 if label(split) else 0
            save(root / "annotations" / split / f"{n}.png", grid)
    return root


def refused(done: Any, words: str, results: Path) -> None:
    """Exit 2, one sentence, before anything is trained or recorded."""
    assert done.code == 2, done.err
    assert re.search(words, done.err), done.err
    assert "Traceback" not in done.err
    assert "step 1" not in done.err
    assert not list(results.glob("runs/*/run.json"))
    assert not list(results.glob("runs/*/.rehearsal"))


# --- the rehearsal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [CLASSIFY, DETECT, SEGMENT], ids=["pretrain", "finetune-det", "finetune-seg"])
def test_a_rehearsal_leaves_everything_as_it_was(command: tuple[str, ...], tmp_path: Path) -> None:
    task, _, name, *rest = command
    sets = [rest[i + 1] for i, word in enumerate(rest) if word == "--set"]
    overrides = [(*rcp.parse_override(text), text) for text in [*sets, "train.batch_size=2", "train.precision=fp32"]]
    recipe = rcp.resolve(rcp.recipe_file(f"{task}/{name}"), overrides).recipe
    data = build.open_data(recipe)
    trained = build.build_task(recipe, data)
    job = build.build_job(recipe, data, trained, torch.device("cpu"))
    before = {name: value.clone() for name, value in job.task.state_dict().items()}
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    seconds = rehearsal.rehearse(job, recipe, data, tmp_path)
    assert 0 < seconds < 100
    after = job.task.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in job.task.parameters())
    assert not job.optimizer.state
    assert random.getstate() == drawn[0]
    assert np.random.get_state()[1].tolist() == drawn[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), drawn[2])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "method"), [("val", "update"), ("val", "compute"), ("other", "compute")])
def test_what_an_evaluation_raises_is_found_before_step_1(
    name: str, method: str, hcnet: Hcnet, tmp_path: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first evaluation, and of one that takes place when training has ended."""
    real, seen = getattr(Accuracy, method), []

    def fails(self: Accuracy, *arguments: Any) -> Any:
        seen.append(self)
        if len({id(one) for one in seen}) > (name == "other"):
            raise IndexError("list index out of range")
        return real(self, *arguments)

    monkeypatch.setattr(Accuracy, method, fails)
    more = ("--set", "evaluation.other.img_size=20", "--set", "evaluation.other.when=end")
    done = hcnet(*CLASSIFY, *more, "--data", folder_of_images, "--out", tmp_path)
    refused(done, f"The evaluation {name} fails.*IndexError: list index out of range", tmp_path)


def test_a_parameter_that_no_loss_depends_on_is_found_before_step_1(
    hcnet: Hcnet, tmp_path: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build.build_task

    def with_more(*arguments: Any) -> Any:
        task = real(*arguments)
        task.model.idle = torch.nn.Linear(2, 2)
        return task

    monkeypatch.setattr(build, "build_task", with_more)
    done = hcnet(*CLASSIFY, "--data", folder_of_images, "--out", tmp_path)
    refused(done, "2 parameters would not be trained.*model.idle.weight", tmp_path)


# --- scores that may be undefined -------------------------------------------------------------------------------------


def test_validation_without_anything_to_score_is_refused(hcnet: Hcnet, tmp_path: Path) -> None:
    def empty(split: str, data: dict[str, Any]) -> None:
        if split == "val":
            data["annotations"] = []

    def crowds(split: str, data: dict[str, Any]) -> None:
        for entry in data["annotations"] if split == "val" else ():
            entry["iscrowd"] = 1

    for name, change, words in (("empty", empty, "no objects"), ("crowds", crowds, r"only crowds \(4\)")):
        root = coco(tmp_path / name, change)
        refused(hcnet(*DETECT, "--data", root, "--out", tmp_path / "out"), words, tmp_path / "out")
    root = scenes(tmp_path / "ignored", label=lambda split: int(split == "training"))
    done = hcnet(*SEGMENT, "--data", root, "--out", tmp_path / "out")
    refused(done, "No pixel of the validation labels has a class", tmp_path / "out")


def test_a_part_without_anything_to_score_is_no_mistake() -> None:
    evaluator = MeanIoU(["a", "b"])
    evaluator.partial = True
    label = torch.full((4, 4), 255)
    evaluator.update([label * 0], {"sample": torch.tensor([0]), "path": ["x"], "label": [label]})
    assert np.isnan(evaluator.compute()["mIoU"])


# --- one reader of annotations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"iscrowd": 1, "segmentation": None}, 0),
        ({"iscrowd": 1, "segmentation": {"size": [64, 64], "counts": "zzz"}}, 2),
        ({"bbox": [3, 3, 0, 0], "segmentation": []}, 0),
        ({"bbox": [23, 6, -18, 20]}, 0),
        ({"bbox": [3, 3, float("nan"), 4]}, 0),
        ({"segmentation": {"size": [64, 64], "counts": [10.0, 64 * 64 - 10.0]}}, 0),
        ({"segmentation": {"size": [64, 64], "counts": [10.5, 64 * 64 - 10.5]}}, 2),
        ({"segmentation": {"size": [64, 64], "counts": [-1, 64 * 64 + 1]}}, 2),
        ({"area": None}, 0),
        ({"area": "large"}, 2),
        ({"iscrowd": "0"}, 0),  # read as a number, in training and in scoring
        ({"iscrowd": "many"}, 2),
    ],
)
def test_training_and_scoring_have_one_verdict_on_an_annotation(
    changes: dict[str, Any], code: int, hcnet: Hcnet, tmp_path: Path
) -> None:
    def change(split: str, data: dict[str, Any]) -> None:
        data["annotations"][0] |= changes

    root = coco(tmp_path / "d", change)
    done = hcnet(*DETECT, "--data", root, "--out", tmp_path / "out")
    assert done.code == code, done.err
    if code:
        refused(done, "annotation id 1", tmp_path / "out")
    assert "Traceback" not in done.err


# --- what nothing needs -----------------------------------------------------------------------------------------------


def test_names_that_cannot_be_drawn_or_encoded_cost_no_run(hcnet: Hcnet, tmp_path: Path) -> None:
    """Line breaks and control characters in categories; a class folder whose name is not UTF-8."""
    root = coco(tmp_path / "d", names=("cup\n", "pl\x00at\u2028e\ud800"))
    done = hcnet(*DETECT, "--data", root, "--out", tmp_path / "det")
    assert done.code == 0, done.err
    final = only_run(tmp_path / "det") / "final"
    assert "could not be written" not in done.err
    assert sorted(p.name for p in (final / "pictures").iterdir()) == ["0.png", "1.png"]
    assert "pl\x00at\u2028e\ud800" in json.loads((final / "per_class.json").read_text())
    classes = [b"caf\xe9", b"b"]
    for split in ("train", "val"):
        for name in classes:
            for n in range(2):
                folder = tmp_path / "c" / split / os.fsdecode(name)
                save(folder / f"{n}.png", noise(n, 16))
    done = hcnet(*CLASSIFY, "--data", tmp_path / "c", "--out", tmp_path / "cls")
    assert done.code == 0, done.err
    per_class = json.loads((only_run(tmp_path / "cls") / "final" / "per_class.json").read_text())
    assert set(per_class) == {"b", "caf\udce9"}


@pytest.mark.parametrize("task", ["pretrain", "finetune-seg"])
def test_a_validation_file_that_is_no_image_is_found_before_step_1(task: str, hcnet: Hcnet, tmp_path: Path) -> None:
    kind, name, command = {
        "pretrain": ("classes", "val", CLASSIFY),
        "finetune-seg": ("scenes", "images/validation", SEGMENT),
    }[task]
    root = small_data.MAKERS[kind](tmp_path / "data")
    image = next(path for path in sorted((root / name).rglob("*")) if path.is_file())
    image.write_text("<html>")
    done = hcnet(*command, "--data", root, "--out", tmp_path / "out", "--dry-run")
    assert (done.code, f"The image {image} cannot be used" in done.err) == (2, True), done.err


def test_a_run_of_names_that_cannot_be_encoded_is_as_good_as_any(hcnet: Hcnet, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, count in ((b"caf\xe9", 3), (b"b", 2), (b"c", 2)):
            for n in range(count):
                save(tmp_path / "c" / split / os.fsdecode(name) / f"{n}.png", noise(n + len(split), 16))
    out = tmp_path / "out"
    training = (*CLASSIFY, "--data", tmp_path / "c", "--out", out)
    assert hcnet(*training).code == 0
    run = only_run(out)
    for command in (
        ("report", "--results", out),
        ("evaluate", run),
        ("predict", run, tmp_path / "c" / "val", "--output", tmp_path / "p"),
        ("card", run),
        ("export", run, "--format", "timm", "--output", tmp_path / "timm"),
        (*training, "--seed", "1", "--init", run),
        (*training, "--eval-only"),
    ):
        done = hcnet(*command)
        assert (done.code, "not Unicode" in done.out + done.err, "other classes" in done.err) == (0, False, False), done
    lines = [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()[1:]]
    assert "caf\\udce9" in {name for line in lines for name in line.get("classes", [])}


@pytest.mark.parametrize("broken", ["_draw", "save"])
def test_a_picture_that_fails_is_a_warning_and_the_checkpoint_is_there(
    broken: str, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(CocoAP, broken)

    def fails(self: CocoAP, *arguments: Any) -> Any:
        if self.partial:
            return real(self, *arguments)
        raise ValueError("can't measure length of multiline text")

    monkeypatch.setattr(CocoAP, broken, fails)
    done = hcnet(*DETECT, "--data", coco(tmp_path / "d"), "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "can't measure length of multiline text. No score depends on it." in done.err
    folder = only_run(tmp_path / "out")
    assert runs.read_record(folder / "run.json").status == "finished"
    assert (folder / "last" / "model.safetensors").is_file()


def test_predictions_lost_between_checkpoint_and_saving_are_made_again(
    hcnet: Hcnet, tmp_path: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill at that moment leaves it: the checkpoint is whole, final/ is not."""
    arguments = (*CLASSIFY, "--data", folder_of_images, "--out", tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "save_final", killed)
        assert hcnet(*arguments).code == 130
    folder = only_run(tmp_path)
    assert [p.name for p in (folder / "final").iterdir()] == [engine.loop.MISSING]
    done = hcnet(*arguments)
    assert done.code == 0, done.err
    assert sorted(p.name for p in (folder / "final").iterdir()) == [
        "calibration.json",
        "confusion.json",
        "mistakes.png",
        "per_class.json",
        "pictures",
        "predictions.csv",
    ]


# --- what fits the data -----------------------------------------------------------------------------------------------


def test_the_time_is_said_at_every_start_and_a_fitting_recipe_is_proposed(
    hcnet: Hcnet, tmp_path: Path, folder_of_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = hcnet(*CLASSIFY, "--data", folder_of_images, "--out", tmp_path)
    assert re.search(r"About \d+ (s|min) on this cpu( while the machine is busy .*)?, evaluation not counted", done.err)
    assert "Fits better" not in done.err
    plain = ("pretrain", "--recipe", "imagenet", "--size", "pico", "--data", folder_of_images, "--batch-size", "8")
    done = hcnet(*plain, "--dry-run", "--out", tmp_path)
    assert done.code == 0, done.err
    assert "the images have about 20 pixels a side and would be enlarged to 224" in done.err.replace("The i", "the i")
    assert "24 training images are few for 300 passes over them" in done.err
    assert re.search(
        r"MiB are saved: about \d+ \w+, and seconds more until the process ends", " ".join(done.out.split())
    )
    assert f"hcnet pretrain --recipe pretrain/small --data {folder_of_images}" in done.err


@pytest.mark.parametrize(
    ("task", "shape", "flags"),
    [
        ("finetune-det", (90, 130), "--set 'data.img_scale=[128,128]' --set head.with_masks=false --batch-size 2"),
        ("finetune-det", (480, 640), "--set head.with_masks=false --batch-size 2"),
        ("finetune-seg", (60, 64), "--set 'data.img_scale=[64,64]' --set data.crop_size=64 --batch-size 2"),
        ("finetune-seg", (300, 400), "--batch-size 2"),
    ],
)
def test_few_images_of_ones_own_are_answered_with_the_small_recipe(
    task: str, shape: tuple[int, int], flags: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def resized(split: str, content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["height"], image["width"] = shape

    def black(seed: int) -> np.ndarray:
        return np.zeros((*shape, 3), np.uint8)

    root = tmp_path / "my data"
    if task == "finetune-det":
        small_data.coco(root, black, change=resized)
    else:
        small_data.scenes(root, black, labels=lambda seed: np.ones(shape, np.uint8))
    own = [("data.path", str(root), "--data"), ("train.batch_size", 4, "--batch-size")]
    if task == "finetune-det":
        own.append(("head.with_masks", False, "--no-masks"))
    recipe = rcp.resolve(rcp.recipe_file(f"{task}/{TASKS[task].default_recipe}"), own).recipe
    data = build.open_data(recipe)
    plan.notice_what_fits(recipe, data, 60.0)
    proposed = capfd.readouterr().err.strip().splitlines()[-1]
    assert proposed == f"Fits better: hcnet {task} --recipe {task}/small --data '{root}' {flags}"
    given = [rcp.parse_override(word) for word in shlex.split(proposed) if "=" in word]
    small = rcp.resolve(rcp.recipe_file(f"{task}/small"), [*own, *((key, value, "--set") for key, value in given)])
    plan.notice_what_fits(small.recipe, data, 60.0)
    assert capfd.readouterr().err == ""
    plan.notice_what_fits(rcp.resolve(rcp.recipe_file(f"{task}/small"), own).recipe, data, 60.0)
    assert ("fits them better" in capfd.readouterr().err) is ("img_scale" in flags)


def few_classes(root: Path, sides: Sequence[int]) -> Path:
    """Two classes, an image of 20 x side for each number; and as many validation images."""
    for split in ("train", "val"):
        for number, side in enumerate(sides):
            save(root / split / "ab"[number % 2] / f"{number:03d}.png", np.zeros((side, side + 20, 3)))
    return root


def test_fewer_images_than_a_batch_are_answered_with_the_whole_command(hcnet: Hcnet, tmp_path: Path) -> None:
    root = few_classes(tmp_path / "my data", [80] * 30)
    plain = ("pretrain", "--size", "pico", "--data", root, "--out", tmp_path)
    for more in (("--dry-run",), ()):
        refused = hcnet(*plain, *more)
        assert refused.code == 2
        assert refused.out == ""  # before the plan
        said = " ".join(refused.err.split())
        assert "The training set has 30 images, fewer than one batch of 256. Choose --batch-size 30 or smaller." in said
        assert (
            f"Fits better: hcnet pretrain --recipe pretrain/small --data '{root}' --set data.img_size=96 --batch-size 6"
            in said
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("side", "size"), [(33, 32), (70, 64), (79.5, 96), (80, 96), (81, 96), (500, 96)])
def test_the_proposed_size_is_the_nearest_one_in_proportion(side: float, size: int) -> None:
    small = rcp.resolve(rcp.recipe_file("pretrain/small")).recipe
    flags = "" if size == 32 else f" --set data.img_size={size}"
    assert plan.size_flags(small, (side, side + 20)) == flags


def test_the_typical_side_is_the_median_of_all_images_where_they_are_few(tmp_path: Path) -> None:
    sides = [40] * 12 + [*range(60, 100, 2)] + [130] * 13
    data = small_data.opened(few_classes(tmp_path / "c", sides))
    assert plan.typical_sides(data) == (float(np.median(sides)), float(np.median(sides)) + 20)


@pytest.mark.parametrize(
    ("unit", "epoch", "said"), [("steps", 1, "length=500 makes 500"), ("steps", 4, "length=1200 makes 300")]
)
def test_many_passes_are_answered_with_a_length(
    unit: str, epoch: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = rcp.resolve(rcp.recipe_file("pretrain/small"), [("schedule.length", 20_000, "--set")]).recipe
    assert recipe.schedule.unit == unit
    plan.notice_many_passes(recipe, build.steps_of_schedule(recipe, epoch))
    assert capfd.readouterr().err.strip().endswith(said + ".")
    plan.notice_many_passes(recipe, build.steps_of_schedule(recipe, 20))
    assert capfd.readouterr().err == ""


def test_a_slow_machine_has_a_rate_and_days(
    hcnet: Hcnet, tmp_path: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "trial", lambda *_: trial.Trial(45_000.0, per_image=1.0))
    done = hcnet(*CLASSIFY, "--data", folder_of_images, "--out", tmp_path, "--dry-run")
    assert done.code == 0, done.err
    assert re.search(r"time: +about 12 d on this cpu by one process \(2\.22e-05 images/s", done.out)


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"init": "none"}, "--init none"),
        ({"init": "my runs/t", "model.kernel_size": 3}, "--size t --init 'my runs/t' --set model.kernel_size=3"),
        (
            {"model.name": "resnet18", "model.args.layers": [1, 1, 1, 1], "init": "none"},
            "--model resnet18 --init none --set 'model.args.layers=[1,1,1,1]'",
        ),
    ],
)
def test_the_small_recipe_is_proposed_with_the_model_and_its_weights(given: dict[str, Any], flags: str) -> None:
    file = rcp.recipe_file("finetune-seg/ade20k-160k")
    recipe = rcp.resolve(file, [(key, value, "--set") for key, value in given.items()]).recipe
    assert plan.flags_of_small(recipe, 100, None) == f" {flags}"


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (small_data.coco, ("finetune-det", "--no-masks", "--set", "data.img_scale=[64,64]")),
        (small_data.scenes, ("finetune-seg", "--set", "data.img_scale=[64,64]", "--set", "data.crop_size=64")),
    ],
)
def test_the_small_recipes_of_fine_tuning_train(
    make: Callable[[Path], Path], command: tuple[str, ...], hcnet: Hcnet, tmp_path: Path
) -> None:
    settings = (*QUICK, *SMALL_MODEL, "--set", "schedule.length=2", "--init", "none", "--out", tmp_path)
    done = hcnet(*command, "--recipe", "small", "--data", make(tmp_path / "mine"), *settings)
    assert done.code == 0, done.err
    assert "Fits better" not in done.err


def test_days_are_answered_with_a_shorter_schedule(capfd: pytest.CaptureFixture[str]) -> None:
    recipe = rcp.resolve(rcp.recipe_file("finetune-seg/digit-stuff")).recipe
    data = build.open_data(recipe)
    plan.notice_what_fits(recipe, data, 10 * 86400)
    err = capfd.readouterr().err
    assert "Training would take about 10 d here" in err
    assert f"{recipe.schedule.unit} {int(recipe.schedule.length / 10)}" in err


@pytest.mark.parametrize("side", [28, 64, 96])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_small_recipe_trains_on_small_images(side: int, mode: str, hcnet: Hcnet, tmp_path: Path) -> None:
    for split, count in (("train", 40), ("val", 4)):
        for label in range(2):
            for n in range(count):
                pixels = noise(n, side) // 2 + 100 * label
                save(tmp_path / "d" / split / f"c{label}" / f"{n}.png", pixels if mode == "RGB" else pixels[..., 0])
    size = ("--set", f"data.img_size={max(32, side)}", *SMALL_MODEL, "--set", "schedule.length=2")
    done = hcnet("pretrain", "--recipe", "small", "--data", tmp_path / "d", *size, "--workers", "0", "--out", tmp_path)
    assert done.code == 0, done.err
    assert "Fits better" not in done.err


def test_an_undefined_score_is_one_sentence() -> None:
    """The engine takes no score for granted, whatever a task's evaluator returns."""

    class Nothing:
        def compute(self) -> dict[str, float]:
            return {}

    class Odd(torch.nn.Module):
        primary = "score"
        model = torch.nn.Linear(1, 1)

        def evaluator(self) -> Nothing:
            return Nothing()

    task: Any = Odd()
    job: Any = type("Job", (), {"weights": task.model})
    with pytest.raises(UserError, match="score is not defined on the validation data"):
        engine.evaluate(job, engine.Evaluation("val", task, []))  # type: ignore[arg-type]


def test_what_fails_on_one_of_two_processes_ends_both_with_the_same_sentence(tmp_path: Path) -> None:
    """The other process must not wait for ever in the next exchange."""
    script = Path(__file__).parent / "rehearsal_on_one_process.py"
    fresh.run_two(script, tmp_path)
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert "A training step fails" in first
    assert "ZeroDivisionError: of process 1" in first


def test_processes_may_differ_in_the_steps_they_try(tmp_path: Path) -> None:
    """Each has its own clock and memory. The batch norm of UPerNet must not wait for steps that another leaves out."""
    script = Path(__file__).parent / "trial_of_two_processes.py"
    command = SEGMENT[: SEGMENT.index("--batch-size")] + SEGMENT[SEGMENT.index("--batch-size") + 2 :]
    data = scenes(tmp_path / "data")
    fresh.run_two(script, *command, "--batch-size", "4", "--data", data, "--out", tmp_path / "out")
    record = runs.read_record(only_run(tmp_path / "out") / "run.json")
    assert (record.status, record.processes) == ("finished", 2)


def test_one_of_two_processes_plans_alone(tmp_path: Path) -> None:
    """With one image each: only together they have statistics of the pooled 1 x 1 maps."""
    fresh.run_two(*SEGMENT, "--data", scenes(tmp_path / "data"), "--out", tmp_path / "out", "--dry-run")


def test_a_trial_on_a_gpu_leaves_out_what_sync_batch_norm_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanging(*_: object) -> torch.Tensor:
        raise AssertionError("it waits for other processes")

    model = torch.nn.Sequential(torch.nn.SyncBatchNorm(3))
    x = torch.randn(4, 3, 2, 2)
    expected = torch.nn.BatchNorm2d(3)(x)
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", exchanging)
    with trial.alone(model, torch.device("cuda")):
        assert torch.equal(model(x), expected)
    with pytest.raises(AssertionError, match="waits"):
        model(x)


@pytest.mark.parametrize(
    ("terminal", "expected"),
    [
        (True, "stop:          after a signal a step\n               ends\n"),
        (False, "stop:          after a signal a step ends\n"),
    ],
)
def test_a_long_line_of_the_plan_goes_on_below_its_text_on_a_terminal(
    terminal: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(plan, "out", Terminal(file=said, width=36, force_terminal=terminal, soft_wrap=True))
    plan._print_fact("stop:", "after a signal a step ends")
    assert said.getvalue() == expected
