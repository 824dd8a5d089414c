"""Protects `--eval-only`: it needs the validation part alone, and scores the classes that the weights are of."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_MODEL, Hcnet, only_run
from small_data import MAKERS, classes

from hcnet_cli import build, plan, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.inputs import task_of

COMMON = (*SMALL_MODEL, "--batch-size", "2", "--workers", "0", "--init", "none")
LINES = {
    "classes": ("pretrain", "--recipe", "digits", *COMMON, "--epochs", "1", "--set", "head.class_weights=balanced"),
    "coco": ("finetune-det", "--recipe", "digit-scenes", *COMMON, "--epochs", "1", "--no-masks"),
    "scenes": ("finetune-seg", "--recipe", "digit-stuff", *COMMON, "--steps", "2", "--set", "data.crop_size=32"),
}
SMALL = {
    "classes": (),
    "coco": ("--set", "data.img_scale=[40,40]", "--set", "head.fpn_channels=8", "--set", "head.box_head_channels=16"),
    "scenes": ("--set", "data.img_scale=[40,40]", "--set", "head.channels=8", "--set", "head.aux_channels=8"),
}


def without_training(root: Path) -> None:
    """Removes the training images; COCO's annotation files come together, so those stay."""
    for part in ("train", "train2017", "images/training", "annotations/training"):
        shutil.rmtree(root / part, ignore_errors=True)


@pytest.mark.parametrize("layout", MAKERS)
def test_the_validation_part_alone_gives_the_same_score(layout: str, tmp_path: Path, hcnet: Hcnet) -> None:
    root = MAKERS[layout](tmp_path / "all")
    line = (*LINES[layout], *SMALL[layout])
    done = hcnet(*line, "--data", root, "--out", tmp_path / "o")
    assert done.code == 0, done.err
    trained = runs.read_record(only_run(tmp_path / "o") / "run.json")
    part = Path(shutil.copytree(root, tmp_path / "held-out"))
    without_training(part)
    again = (*line, "--data", part, "--out", tmp_path / "e")
    scored = hcnet(*again, "--eval-only", "--init", only_run(tmp_path / "o"))
    assert scored.code == 0, scored.err
    info = runs.read_record(only_run(tmp_path / "e") / "run.json")
    assert info.metrics == trained.metrics
    assert (info.data.name, info.data.num_train, info.data.num_val) == ("held-out", 0, trained.data.num_val)
    assert info.data.digest != trained.data.digest
    assert "held-out had validation images alone, no training images." in info.data.notes
    refused = hcnet(*again)  # training
    assert refused.code == 2
    assert "train" in refused.err


def test_evaluate_says_what_scores_a_held_out_folder(tmp_path: Path, hcnet: Hcnet) -> None:
    """The command of the hint does it; a folder with the validation part alone is answered too."""
    root = classes(tmp_path / "c")
    assert hcnet(*LINES["classes"], "--data", root, "--out", tmp_path / "o").code == 0
    other = classes(tmp_path / "held out", suffix="png")
    refused = hcnet("evaluate", only_run(tmp_path / "o"), "--data", other)
    assert refused.code == 2
    command = shlex.split(refused.err.partition("are scored with: ")[2])
    without_training(other)
    done = hcnet(*command[1:], "--out", tmp_path / "e")
    assert done.code == 0, done.err
    assert runs.read_record(only_run(tmp_path / "e") / "run.json").data.name == "held-out"
    refused = hcnet("evaluate", only_run(tmp_path / "o"), "--data", other)
    assert refused.code == 2
    assert "It has the validation part alone, which is enough to score weights: --eval-only --init RUN" in refused.err


def test_coco_annotations_alone_do_not_stand_for_training_images(tmp_path: Path, hcnet: Hcnet) -> None:
    root = MAKERS["coco"](tmp_path / "c")
    (root / "annotations/instances_train2017.json").unlink()
    without_training(root)
    assert task_of(str(root)) == "finetune-det"
    shutil.rmtree(root / "val2017")
    refused = hcnet(*LINES["coco"], *SMALL["coco"], "--data", root, "--out", tmp_path, "--eval-only")
    assert refused.code == 2
    assert "val2017" in refused.err


@pytest.mark.parametrize("kept", ["whole", "validation"])
def test_weights_of_more_classes_than_the_data_are_told_by_their_names(kept: str, tmp_path: Path, hcnet: Hcnet) -> None:
    def pretrain(*more: Any) -> Any:
        return hcnet(*LINES["classes"], "--data", root, *more)

    root = classes(tmp_path / "c")
    assert pretrain("--out", tmp_path / "o").code == 0
    for split in ("train", "val"):
        shutil.copytree(root / split / "b", root / split / "c")
    if kept == "validation":
        without_training(root)
    refused = pretrain("--out", tmp_path / "e", "--eval-only", "--init", only_run(tmp_path / "o"))
    assert refused.code == 2
    assert "best.safetensors is of 2 classes (a, b), the data have 3 (a, b, c)" in " ".join(refused.err.split())
    assert not (tmp_path / "e").exists()


def test_a_validation_part_of_other_classes_is_refused(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "c")
    assert hcnet(*LINES["classes"], "--data", root, "--out", tmp_path / "o").code == 0
    without_training(root)
    (root / "val/b").rename(root / "val/z")
    scored = (*LINES["classes"], "--data", root, "--out", tmp_path / "e", "--eval-only")
    refused = hcnet(*scored, "--init", only_run(tmp_path / "o"))
    assert refused.code == 2
    assert "one of them is b there and z here" in " ".join(refused.err.split())


def test_fewer_training_images_than_a_batch_do_not_keep_weights_from_being_scored(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "c")
    assert hcnet(*LINES["classes"], "--data", root, "--out", tmp_path / "o").code == 0
    scored = (*LINES["classes"], "--batch-size", "64", "--data", root, "--out", tmp_path / "e", "--eval-only")
    done = hcnet(*scored, "--init", only_run(tmp_path / "o"))
    assert done.code == 0, done.err
    assert json.loads((only_run(tmp_path / "e") / "run.json").read_text())["steps_total"] == 0


def test_nothing_is_trained_on_a_validation_part(tmp_path: Path) -> None:
    """As a format of one's own may give it; the readers of this package refuse such a folder themselves."""
    root = classes(tmp_path / "c")
    without_training(root)
    given = [("data.path", str(root), "test")]
    recipe = rcp.resolve(rcp.recipes_dir() / "pretrain/digits.yaml", given).recipe
    with pytest.raises(UserError, match="has no training images"):
        plan.check_enough_images(recipe, build.open_data(recipe, eval_only=True))
