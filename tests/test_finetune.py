"""Protects the fine-tuning commands: resume, processes, accumulation, starting weights, and what a run leaves."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import fresh
import pytest
import torch
from conftest import SMALL_MODEL, Done, only_run, outcome, run_here
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

from hcnet_cli import runs
from hcnet_cli.data import embedded
from hcnet_cli.recipe import resolve

Hcnet = Callable[..., Done]
STEPS = (
    *("--set", "schedule.unit=steps", "--set", "schedule.length=6", "--set", "train.eval_every=3"),
    *("--set", "optim.args.eps=0.01"),  # Adam at its usual eps turns the rounding of a tiny gradient into a whole step
)
SMALL = {
    "finetune-det": (
        *("--recipe", "digit-scenes", *SMALL_MODEL, *STEPS, "--set", "schedule.milestones=[5]", "--batch-size", "4"),
        *("--set", "data.img_scale=[64,64]", "--set", "train.log_every=1", "--set", "schedule.warmup=1"),
        *("--set", "head.fpn_channels=8", "--set", "head.box_head_channels=16", "--set", "head.mask_head_channels=8"),
        *("--set", "head.score_thresh=0.0"),
    ),
    "finetune-seg": (
        *("--recipe", "digit-stuff", *SMALL_MODEL, *STEPS, "--batch-size", "4", "--set", "schedule.warmup=1"),
        *("--set", "data.img_scale=[64,64]", "--set", "data.crop_size=64", "--set", "train.log_every=1"),
        *("--set", "head.channels=8", "--set", "head.aux_channels=8"),
    ),
}
TASKS = list(SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few of the embedded scenes, in the same formats: 24 for training, an odd number for validation."""
    root = tmp_path_factory.mktemp("few")
    coco, few = embedded.ensure("digit-scenes"), root / "few-scenes"
    (few / "annotations").mkdir(parents=True)
    for split, count in (("train", 24), ("val", 7)):
        content = json.loads((coco / "annotations" / f"instances_{split}2017.json").read_text())
        images = content["images"][:count]
        ids = {image["id"] for image in images}
        content |= {"images": images, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}
        (few / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (few / f"{split}2017").mkdir()
        for image in images:
            shutil.copy(coco / f"{split}2017" / image["file_name"], few / f"{split}2017")
    ade, stuff = embedded.ensure("digit-stuff"), root / "few-stuff"
    for split, count in (("training", 24), ("validation", 7)):
        for kind in ("images", "annotations"):
            (stuff / kind / split).mkdir(parents=True)
            for file in sorted((ade / kind / split).iterdir())[:count]:
                shutil.copy(file, stuff / kind / split)
    for file in ade.glob("*.txt"):
        shutil.copy(file, stuff)
    return {"finetune-det": few, "finetune-seg": stuff}


def command(task: str, data: dict[str, Path], results: Path, *more: str) -> list[str]:
    where = ("--data", str(data[task]), "--out", str(results))
    return [task, *SMALL[task], *where, "--init", "none", *more]


@pytest.fixture(scope="module")
def finished(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    results = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        run_here(*command(task, data, folder))
        results[task] = only_run(folder)
    return results


@pytest.mark.parametrize("task", TASKS)
def test_killed_and_started_again_is_never_interrupted(
    task: str, data: dict[str, Path], finished: dict[str, Path], tmp_path: Path
) -> None:
    """A process of its own is killed; this one, with a past of other runs, goes on with its run."""
    arguments = command(task, data, tmp_path, "--workers", "1")
    program = fresh.start(*arguments)
    deadline, log = time.monotonic() + 200, None
    while time.monotonic() < deadline and program.running():
        log = log or next(tmp_path.glob("runs/*/metrics.jsonl"), None)
        if log and '"step": 4' in log.read_text():
            program.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert program.done().code in (-signal.SIGKILL, 0)
    run_here(*arguments)
    assert outcome(only_run(tmp_path)) == outcome(finished[task])


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_are_one_run(task: str, data: dict[str, Path], finished: dict[str, Path], tmp_path: Path) -> None:
    """Same run name, same losses but for rounding; in segmentation (batch norm is synchronised) the same weights too.

    In detection rounding may choose another proposal after the first step; the test below is bit for bit.
    """
    fresh.run_two(*command(task, data, tmp_path))
    folder = only_run(tmp_path)
    assert folder.name == finished[task].name
    assert runs.read_record(folder / "run.json").processes == 2
    losses = [[e["loss"] for e in runs.read_log(f / "metrics.jsonl") if "loss" in e] for f in (finished[task], folder)]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    if task == "finetune-seg":
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        one, two = (load_file(f / "last" / "model.safetensors") for f in (finished[task], folder))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_detection_in_micro_batches_equals_two_processes_bit_for_bit(
    hcnet: Hcnet, data: dict[str, Path], finished: dict[str, Path], tmp_path: Path
) -> None:
    """Without batch norm a division into equal micro-batches is the same whoever computes them."""
    fresh.run_two(*command("finetune-det", data, tmp_path / "two"))
    run_here(*command("finetune-det", data, tmp_path / "one", "--accumulate", "2"))
    a, b = outcome(only_run(tmp_path / "two")), outcome(only_run(tmp_path / "one"))
    assert a["last"] == b["last"]
    assert a["metrics"] == b["metrics"]


def test_saved_predictions_scored_by_pycocotools_alone_give_the_numbers_of_the_run(
    data: dict[str, Path], finished: dict[str, Path]
) -> None:
    folder = finished["finetune-det"]
    metrics = runs.read_record(folder / "run.json").metrics
    truth = COCO(str(data["finetune-det"] / "annotations" / "instances_val2017.json"))
    scored = {}
    for kind, file in (("bbox", "predictions_bbox.json"), ("segm", "predictions_segm.json")):
        path = folder / "final" / file
        evaluation = COCOeval(
            truth, truth.loadRes(str(path if path.exists() else folder / "final/predictions_bbox.json")), kind
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scored[kind] = evaluation.stats
    for prefix, kind in (("box", "bbox"), ("mask", "segm")):
        for number, name in enumerate(("AP", "AP50", "AP75")):
            assert metrics[f"{prefix}_{name}"] == pytest.approx(100 * scored[kind][number], abs=1e-9)


def test_pictures_and_per_class_numbers_are_kept(finished: dict[str, Path]) -> None:
    for folder in finished.values():
        assert list((folder / "final" / "pictures").glob("*.png"))
        assert json.loads((folder / "final" / "per_class.json").read_text())


def test_costs_follow_the_papers_convention(finished: dict[str, Path]) -> None:
    assert runs.read_record(finished["finetune-det"] / "run.json").macs_input == "3x800x1280"
    assert runs.read_record(finished["finetune-seg"] / "run.json").macs_input == "3x512x2048"


def test_the_record_has_the_size_of_training(finished: dict[str, Path]) -> None:
    for folder in finished.values():
        scale = resolve(folder / "recipe.yaml").recipe.data.img_scale  # type: ignore[attr-defined]
        assert runs.read_record(folder / "run.json").img_size == min(scale)


@pytest.mark.parametrize("task", TASKS)
def test_init_auto_takes_the_best_pretrain_run_of_the_same_model(
    task: str, hcnet: Hcnet, data: dict[str, Path], folder_of_images: Path, tmp_path: Path
) -> None:
    pretrain = ("pretrain", "--recipe", "digits", *SMALL_MODEL, "--epochs", "1", "--batch-size", "8", "--workers", "0")
    assert hcnet(*pretrain, "--data", folder_of_images, "--out", tmp_path).code == 0
    made = only_run(tmp_path).name
    done = hcnet(task, *SMALL[task], "--data", data[task], "--out", tmp_path)
    assert done.code == 0, done.err
    assert f"{made}/best.safetensors" in done.err
    (run,) = (tmp_path / "runs").glob("finetune*")
    info = runs.read_record(run / "run.json")
    assert info.init["loaded"] == info.init["total"]
    assert "head.fc.weight" in info.init["unexpected"]
    assert "init" not in info.changes
    # the weights to evaluate are the run's, not those it started from, and without a run there are none
    evaluated = hcnet(task, *SMALL[task], "--data", data[task], "--out", tmp_path, "--eval-only")
    assert evaluated.code == 0, evaluated.err
    assert f"{run}/best.safetensors: " in evaluated.err
    name, value = next(iter(info.metrics.items()))
    assert evaluated.out.startswith(f"{name} {value:.3f}")
    # a newer pretrain run moves what `auto` means
    more = Path(shutil.copytree(folder_of_images, tmp_path / "more"))
    image = next((more / "train").rglob("*.png"))
    Image.open(image).transpose(Image.Transpose.ROTATE_90).save(image.with_name("more.png"))
    assert hcnet(*pretrain, "--data", more, "--out", tmp_path).code == 0
    planned = hcnet(task, *SMALL[task], "--data", data[task], "--out", tmp_path, "--dry-run")
    assert f"{run} is finished, from {tmp_path / 'runs' / made}. This is a new run, from " in planned.err
    assert f"--init {tmp_path / 'runs' / made} finds the old one." in planned.err
    folders = set((tmp_path / "runs").iterdir())
    evaluated = hcnet(task, *SMALL[task], "--data", data[task], "--out", tmp_path, "--eval-only", "--seed", "9")
    assert evaluated.code == 2
    assert "There are no weights to evaluate" in evaluated.err
    assert "lacks the head" in evaluated.err
    assert set((tmp_path / "runs").iterdir()) == folders


def test_init_auto_without_a_run_is_an_error_on_your_own_data_and_a_notice_on_the_embedded(
    hcnet: Hcnet, data: dict[str, Path], tmp_path: Path
) -> None:
    done = hcnet("finetune-seg", *SMALL["finetune-seg"], "--data", data["finetune-seg"], "--out", tmp_path)
    assert done.code == 2
    assert "no finished pretrain run of size pico" in done.err
    done = hcnet("finetune-seg", *SMALL["finetune-seg"], "--out", tmp_path, "--dry-run")
    assert done.code == 0
    assert "starting from scratch" in done.err
    assert "init none auto" in " ".join(done.out.split())  # the value, and that it was looked for
    assert re.search(r"[1-9] MiB activations an image", " ".join(done.out.split()))


@pytest.mark.parametrize(
    "given",
    [
        ("--size", "pico", "--set", "model.disable=[gate]", "--set", "model.dims=[8,16,24,32]"),
        (*("--model", "resnet18", "--set", "model.args.layers=[1,1,1,1]"), "--set", "model.args.act_layer=gelu"),
    ],
)
def test_the_pretraining_that_is_advised_can_be_typed(
    given: tuple[str, ...], hcnet: Hcnet, data: dict[str, Path], tmp_path: Path
) -> None:
    """It makes the model that was asked for."""
    out = tmp_path / "my results"
    common = ("--recipe", "digit-stuff", "--data", data["finetune-seg"], "--out", out)
    done = hcnet("finetune-seg", *given, *common, "--dry-run")
    assert done.code == 2
    (command,) = re.findall("Run `(.*?)` first", done.err)
    typed = shlex.split(command)
    assert typed[:2] == ["hcnet", "pretrain"]
    assert {*given, str(out)} <= set(typed)
    done = hcnet(*typed[1:], "--dry-run")
    assert done.code == 0, done.err


def test_several_scales_are_evaluated_beside_and_shown_apart(
    hcnet: Hcnet, data: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("finetune-seg", *SMALL["finetune-seg"], "--data", data["finetune-seg"], "--out", tmp_path)
    assert hcnet(*arguments, "--init", "none", "--multi-scale").code == 0
    info = runs.read_record(only_run(tmp_path) / "run.json")
    assert {"mIoU", "mIoU_ms"} <= info.metrics.keys()
    assert "ss, whole, 64x64" in info.metric_notes["mIoU"]
    assert "ms 0.5-1.75, whole, 64x64" in info.metric_notes["mIoU_ms"]  # no flip: digits are not mirrored
    assert hcnet(*arguments, "--init", "none", "--single-scale", "--fresh").code == 0
    assert set(runs.read_record(only_run(tmp_path) / "run.json").metric_notes) == {"mIoU"}
    run = only_run(tmp_path)
    done = hcnet(*arguments, "--init", "none", "--multi-scale")
    assert "This run is finished" in done.err
    assert f"ms has no score yet: `hcnet evaluate {run} --on ms` makes it." in done.err
    large = ("--set", "evaluation.large.scales=[2.0]", "--set", "evaluation.large.when=end")
    done = hcnet(*arguments, "--init", "none", *large)
    assert f"`hcnet evaluate {run} --on large` makes it, with the same --set options." in done.err
    assert hcnet("evaluate", run, "--on", "ms", "--workers", 0).code == 0
    assert "no score yet" not in hcnet(*arguments, "--init", "none", "--multi-scale").err


def test_a_detector_without_masks(hcnet: Hcnet, data: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("finetune-det", *SMALL["finetune-det"], "--data", data["finetune-det"], "--out", tmp_path)
    assert hcnet(*arguments, "--init", "none", "--no-masks").code == 0
    metrics = runs.read_record(only_run(tmp_path) / "run.json").metrics
    assert "box_AP" in metrics
    assert not any(name.startswith("mask") for name in metrics)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("finetune-det", "--data", "nowhere"), "nowhere"),
        (("finetune-seg", "--data", "nowhere"), "nowhere"),
        (("finetune-det", "--schedule", "2x"), 'There is no recipe "coco-2x"'),
        (("finetune-det", "--schedule", "1x", "--recipe", "coco-3x"), "Give one of them"),
        (("finetune-seg", "--steps", "0"), "it takes a whole number from 1 to 100,000,000."),
        (("finetune-seg", "--eval-mode", "half"), "--eval-mode"),
        (("finetune-det", "--eval-backend", "mine"), "--eval-backend"),
        (("finetune-det", "--recipe", "digits"), "The recipe digits is for pretrain, not for finetune-det."),
        (("finetune-det", "--recipe", "pretrain/digits"), "is for pretrain"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], words: str, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hcnet(*arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
