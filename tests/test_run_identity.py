"""Protects whose files are whose: checkpoints, weights and records are compared, and --fresh leaves nobody's files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
from conftest import SMALL_MODEL, Hcnet, only_run, run_here
from PIL import Image
from safetensors import safe_open
from test_other_models import stopped_at_step_2

from hcnet_cli import build, plan, run, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.header import read_metadata
from hcnet_cli.results import collect

ROOT = Path(__file__).parent.parent
TINY = ("--recipe", "digits", *SMALL_MODEL, "--set", "data.img_size=16", "--batch-size", "8", "--workers", "0")


def command(data: Path, results: Path, *more: str) -> list[str]:
    return ["pretrain", *TINY, "--data", str(data), "--out", str(results), "--name", "mine", "--epochs", "2", *more]


@pytest.fixture(scope="module")
def trained(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("identity")
    run_here(*command(folder_of_images, results))
    return results


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "results"))


# --- checkpoints without a record -------------------------------------------------------------------------------------


def test_checkpoints_of_another_recipe_are_never_gone_on_with(
    results: Path, folder_of_images: Path, hcnet: Hcnet
) -> None:
    """run.json is lost, and another recipe comes under the same name."""
    (only_run(results) / "run.json").unlink()
    done = hcnet(*command(folder_of_images, results, "--lr", "0.5"))
    assert done.code == 2
    assert "has no run.json, but a checkpoint of step 6 of another run" in done.err
    assert "--fresh" in done.err
    assert not (only_run(results) / "run.json").exists()


def test_a_lost_record_of_the_same_recipe_is_said(results: Path, folder_of_images: Path, hcnet: Hcnet) -> None:
    before = runs.read_record(only_run(results) / "run.json")
    (only_run(results) / "run.json").unlink()
    done = hcnet(*command(folder_of_images, results))
    assert done.code == 0
    assert "is missing; the checkpoint of step 6 is of this very recipe" in done.err
    assert runs.read_record(only_run(results) / "run.json").metrics == before.metrics


def test_a_checkpoint_put_into_another_run_is_refused(results: Path, folder_of_images: Path, hcnet: Hcnet) -> None:
    other = ("--lr", "0.5", "--set", "train.eval_every=1")
    line = command(folder_of_images, results, *other)
    line[line.index("mine")] = "other"
    assert hcnet(*line).code == 0
    folder = results / "runs" / "other"
    info = runs.read_record(folder / "run.json")
    runs.RunFolder(folder).write(info.model_copy(update={"status": "interrupted"}))
    shutil.rmtree(folder / "last")
    shutil.copytree(results / "runs" / "mine" / "last", folder / "last")
    done = hcnet(*line)
    assert done.code == 2
    assert "are of another run, at step 6: fingerprint" in done.err


def test_lost_checkpoints_are_no_silent_restart(results: Path, folder_of_images: Path, hcnet: Hcnet) -> None:
    folder = runs.RunFolder(only_run(results))
    folder.write(runs.read_record(folder.record).model_copy(update={"status": "interrupted"}))
    for name in ("last", "previous"):
        shutil.rmtree(folder.path / name)
    done = hcnet(*command(folder_of_images, results))
    assert done.code == 0
    assert "had reached step 6, but has no checkpoint" in done.err
    assert f"The weights of the run before are kept until this run has finished: {folder.replaced}" in done.err
    assert not folder.replaced.exists()


# --- --fresh ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Every deletion and rename of a file counts; number `at` never happens, nor does anything after it."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count > at:
                raise Killed
            return real(*arguments, **more)

        return call

    for module, name in ((Path, "unlink"), (shutil, "rmtree"), (runs, "write_text")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


def test_killed_between_any_two_deletions_the_folder_is_the_old_run_or_cleared(
    trained: Path, folder_of_images: Path, hcnet: Hcnet, tmp_path: Path
) -> None:
    old = runs.read_record(only_run(trained) / "run.json")
    seen = set()
    for at in range(30):
        results = Path(shutil.copytree(trained, tmp_path / str(at)))
        folder = runs.RunFolder(only_run(results))
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, at)
            try:
                folder.clear()
                break
            except Killed:
                pass
        if folder.is_cleared():
            seen.add("cleared")
            ((path, reason),) = collect([results]).broken
            assert path == folder.path
            assert "was being cleared by --fresh" in reason
        elif folder.has_progress():
            seen.add("old")
            assert folder.read() == old
            assert not runs.contradiction(folder, old)
        if at in (1, 4):  # another recipe finds a folder that is nobody's, and says so
            done = hcnet(*command(folder_of_images, results, "--lr", "0.5", "--epochs", "1"))
            assert done.code == 0, done.err
            assert "A --fresh was stopped" in done.err
            assert "Going on" not in done.err
    assert seen == {"old", "cleared"}
    assert at < 29
    assert not folder.has_progress()


def test_what_fresh_began_goes_on_without_it_and_the_old_weights_stay_until_it_has_finished(
    results: Path, folder_of_images: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs.RunFolder(only_run(results))
    first = folder.best.read_bytes()
    line = command(folder_of_images, results)
    said = []
    stopped_at_step_2(monkeypatch, lambda: said.append(hcnet(*line, "--fresh")) or said[0])
    assert "The same command without --fresh goes on from there." in said[0].err
    assert "--fresh" not in folder.require().argv
    done = hcnet("predict", folder.path, folder_of_images / "val", "--output", results / "predicted")
    assert done.code == 2
    assert f"The weights of the run before are in {folder.replaced}." in done.err
    stopped_at_step_2(monkeypatch, lambda: hcnet(*line, "--fresh"))  # what was stopped does not take their place
    assert folder.replaced.read_bytes() == first
    done = hcnet(*line)
    assert done.code == 0
    assert "Going on from step 2" in done.err
    assert f"The weights of the run before are kept until this run has finished: {folder.replaced}" in done.err
    assert not folder.replaced.exists()


# --- sessions, metadata -----------------------------------------------------------------------------------------------


def test_every_session_of_a_run_is_listed(
    results: Path, folder_of_images: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop, change the code, commit, resume: both commits are in run.json and in the report."""
    folder = runs.RunFolder(only_run(results))
    folder.write(runs.read_record(folder.record).model_copy(update={"status": "interrupted"}))
    monkeypatch.setattr(runs, "git_state", lambda: ("c0ffee" * 6, False))
    assert hcnet(*command(folder_of_images, results)).code == 0
    info = runs.read_record(folder.record)
    assert [session.from_step for session in info.sessions] == [0, 6]
    assert info.sessions[0].argv != info.sessions[1].argv
    assert info.sessions[1].git_commit == "c0ffee" * 6
    (row,) = [row for row in collect([results]).rows if row.kind == "measured"]
    assert "c0ffeec0ffee" in str(row.values["commit"])
    assert "," in str(row.values["commit"])


def code_of_the_page() -> dict[str, Any]:
    """The functions of docs/weights.md."""
    scope: dict[str, Any] = {}
    exec("".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "weights.md").read_text(), re.DOTALL)), scope)
    return scope


def test_the_weights_say_what_they_must_be_given(trained: Path, folder_of_images: Path) -> None:
    """The snippet of docs/weights.md, with timm alone, gives the accuracy of the record."""
    scope = code_of_the_page()
    info = runs.read_record(only_run(trained) / "run.json")
    best = only_run(trained) / "best.safetensors"
    model, transform, classes = scope["load_classifier"](str(best))
    files = sorted((folder_of_images / "val").glob("*/*.png"))
    with torch.inference_mode():
        hits = [
            classes[int(model(transform(Image.open(file).convert("RGB"))[None]).argmax())] == file.parent.name
            for file in files
        ]
    assert 100 * sum(hits) / len(hits) == pytest.approx(info.metrics["top1"])
    with safe_open(best, "pt") as file:
        about = json.loads(file.metadata()["hcnet"])
    assert about == read_metadata(best)
    assert (about["fingerprint"], about["step"], about["metrics"]) == (info.fingerprint, info.best_step, info.metrics)
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "weights.md").read_text()))
    assert about.keys() <= documented


SHORT = ("--batch-size", "2", "--workers", "0")
IMAGES = (*SHORT, "--recipe", "digits", "--set", "data.img_size=32", "--epochs", "1")
SCENES = (*SHORT, "--recipe", "digit-scenes", "--init", "none", "--set", "data.img_scale=[64,64]")


@pytest.mark.parametrize(
    ("task", "options", "make"),
    [
        ("pretrain", (*IMAGES, *SMALL_MODEL), small_data.classes),
        ("pretrain", (*IMAGES, "--model", "test_convnext"), small_data.classes),
        ("finetune-det", (*SCENES, *SMALL_MODEL, "--epochs", "1", "--no-masks"), small_data.coco),
        ("finetune-det", (*SCENES, "--model", "resnet10t", "--epochs", "1", "--no-masks"), small_data.coco),
        (
            "finetune-seg",
            (*SCENES[:4], "--recipe", "digit-stuff", *SCENES[6:], "--steps", "2", "--model", "test_convnext"),
            small_data.scenes,
        ),
    ],
)
def test_the_backbone_of_any_run_is_loaded_as_the_page_says(
    task: str, options: tuple[str, ...], make: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Each way of docs/weights.md gives the maps that the run's model computes."""
    run_here(task, *options, "--data", make(tmp_path / "data"), "--out", tmp_path)
    folder = runs.RunFolder(only_run(tmp_path))
    best = str(folder.best)
    about, page = read_metadata(folder.best), code_of_the_page()
    predictor = build.build_predictor(rcp.resolve(folder.recipe_file).recipe, about["classes"])
    build.load_own(predictor.task, folder.path)
    trained: Any = predictor.task.model.eval()
    backbone = getattr(trained, "backbone", trained)
    loaded = [page["load_backbone"](best)]
    if task == "pretrain":
        loaded += [page["load_features"](best, about["model"], len(about["classes"]), **about["model_args"]).eval()]
        run_here("export", folder.path, "--format", "timm", "--output", tmp_path / "folder")
        loaded += [page["load_exported_features"](tmp_path / "folder").eval()]
    image = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = backbone.forward_intermediates(image, intermediates_only=True)[-4:]
        assert [64 // one.shape[-1] for one in expected] == [4, 8, 16, 32]
        for maps in loaded:
            assert all(map(torch.equal, maps(image)[-4:], expected))


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("finetune-det/coco-1x", {"schedule.length": 6}, "milestones 8, 11: the learning rate does not fall there. In "
         "proportion: --set 'schedule.milestones=[4,6]'"),
        ("finetune-det/coco-1x", {"schedule.length": 11}, "milestones 11"),
        ("pretrain/digits", {"schedule.gamma": 0.1}, "schedule.gamma has no effect"),
        ("pretrain/digits", {"optim.no_decay": "norm", "optim.weight_decay": 0.0}, "optim.no_decay has no effect"),
        ("pretrain/digits", {"schedule.warmup": 0.0}, "schedule.warmup_ratio has no effect"),
        ("finetune-det/coco-1x", {"schedule.milestones": []}, "never falls"),
        ("finetune-det/coco-1x", {"schedule.kind": "cosine"}, "schedule.milestones has no effect"),
        ("pretrain/digits", {"schedule.power": 2.0}, "schedule.power has no effect"),
        ("pretrain/digits", {"schedule.kind": "multistep", "schedule.milestones": [2]}, "schedule.min_lr has"),
        ("pretrain/digits", {"schedule.warmup": 20}, "shortened to half of the run"),
        ("pretrain/digits", {"train.eval_every": 20}, "evaluated once, at the end"),
        ("pretrain/digits", {"optim.lr": 1.0e-6}, "the learning rate rises"),
    ],
)  # fmt: skip
def test_what_a_schedule_says_and_does_not_do(recipe: str, changes: dict[str, Any], words: str) -> None:
    file = rcp.recipes_dir() / f"{recipe}.yaml"
    made, sources = vars(rcp.resolve(file, [(key, value, "--set") for key, value in changes.items()])).values()
    remarks = plan.schedule_remarks(made, build.steps_of_schedule(made, 100), sources)
    assert words.split(". In")[0] in " ".join(remarks)


@pytest.mark.parametrize("name", rcp.shipped())
def test_a_shipped_schedule_needs_no_remark(name: str) -> None:
    recipe = rcp.resolve(rcp.recipes_dir() / f"{name}.yaml").recipe
    assert plan.schedule_remarks(recipe, build.steps_of_schedule(recipe, 1000)) == []


def test_a_metric_that_cannot_be_is_not_read(results: Path) -> None:
    folder = runs.RunFolder(only_run(results))
    info = runs.read_record(folder.record)
    for update in (
        {"metrics": {"top1": 150.0}},
        {"metrics": {"top1": -1.0}},
        {"metrics": {"top1": float("inf")}},
        {"metrics": {"top1": float("nan")}},
        {"metrics": {"top1_large": 100.5}},
        {"steps_done": info.steps_total + 1},
    ):
        folder.write(info.model_copy(update=update))
        with pytest.raises(UserError):
            runs.read_record(folder.record)


def test_data_that_change_while_a_run_trains_are_named_in_its_record(
    folder_of_images: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two classes of the validation images are exchanged after the start: the scores are of neither state."""
    data = Path(shutil.copytree(folder_of_images, tmp_path / "data"))
    first, second = sorted((data / "val").iterdir())[:2]
    score = run._score_best_weights

    def exchange(*given: Any) -> Any:
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
        return score(*given)

    monkeypatch.setattr(run, "_score_best_weights", exchange)
    done = hcnet(*command(data, tmp_path / "results"))
    assert done.code == 0, done.err
    assert "changed while the run mine trained" in done.err
    note = runs.read_record(only_run(tmp_path / "results") / "run.json").data.notes[-1]
    assert "changed while the run mine trained" in note
    assert note in hcnet("report", "--results", tmp_path / "results", "--format", "markdown").out


def test_only_a_change_of_the_code_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    for name in ("hcnet_cli/runs.py", "recipes/a.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "hcnet_cli" / "runs.py"))
    for name, changed in (("README.md", False), ("recipes/a.yaml", True)):
        (tmp_path / name).write_text("2")
        assert runs.git_state()[1] == changed
