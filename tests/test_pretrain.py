"""Protects `hcnet pretrain` as a person uses it: start, stop, go on, several processes, and every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import timm
import torch
from conftest import SMALL_MODEL, Done, environment, only_run, outcome, run_here
from PIL import Image
from safetensors.torch import load_file, save_file

import hcnet_cli.models  # noqa: F401  (registers the sizes with timm)
from hcnet_cli import runs, trial

Hcnet = Callable[..., Done]
SMALL = (
    *("--recipe", "digits", *SMALL_MODEL),
    *("--epochs", "3", "--batch-size", "8", "--set", "data.img_size=16", "--set", "train.log_every=2"),
)
MIXED = ("--set", "data.mixup=0.8", "--set", "data.cutmix=1.0", "--set", "model.drop_path_rate=0.3")


def command(*arguments: str | Path) -> list[str]:
    return ["pretrain", *SMALL, *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with mixing and drop path that nothing disturbed."""
    results = tmp_path_factory.mktemp("undisturbed")
    run_here(*command(*MIXED, "--data", folder_of_images, "--out", results))
    return only_run(results)


def test_a_run_leaves_all_that_a_table_needs(finished: Path) -> None:
    info = runs.read_record(finished / "run.json")
    assert (info.status, info.steps_done, info.steps_total) == ("finished", 9, 9)
    assert finished.name == f"pretrain-colors-pico-depths=1-1-1-1+dims=8-8-16-16-s0-{info.fingerprint}"
    assert (info.data.name, info.data.num_train, info.data.num_val, info.data.num_classes) == ("colors", 24, 10, 3)
    figures = {name for name in info.metrics if "_95_" not in name}
    assert figures == {"top1", "top5", "nll", "ece", "brier"}
    assert info.changes["schedule.length"] == 3
    assert info.params
    assert info.macs
    assert info.macs_input == "3x16x16"
    assert info.images_per_second
    assert info.argv[1] == "pretrain"
    assert info.versions["torch"] == torch.__version__


def test_best_weights_load_into_timm(finished: Path) -> None:
    model = timm.create_model(
        "hcnet_pico",
        num_classes=3,
        depths=(1, 1, 1, 1),
        dims=(8, 8, 16, 16),
        checkpoint_path=str(finished / "best.safetensors"),
    )
    saved = load_file(finished / "best.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_a_run_can_be_repeated_from_its_recipe(finished: Path, tmp_path: Path) -> None:
    """recipe.yaml alone gives the same run: same name, same weights."""
    arguments = [sys.executable, "-m", "hcnet_cli", "pretrain", "--recipe", str(finished / "recipe.yaml")]
    subprocess.run([*arguments, "--out", str(tmp_path)], env=environment(), check=True, capture_output=True)
    assert only_run(tmp_path).name == finished.name
    assert outcome(only_run(tmp_path)) == outcome(finished)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_is_never_interrupted(
    number: signal.Signals, finished: Path, folder_of_images: Path, tmp_path: Path
) -> None:
    """The real program, killed while it trains with two workers; the same command goes on to the same bytes."""
    arguments = command(*MIXED, "--data", folder_of_images, "--out", tmp_path, "--workers", "2")
    program = fresh.start(*arguments)
    deadline = time.monotonic() + 200
    log = None
    while time.monotonic() < deadline and program.running():
        log = log or next(tmp_path.glob("runs/*/metrics.jsonl"), None)
        if log and '"step": 3' in log.read_text():
            program.send_signal(number)
            break
        time.sleep(0.002)
    done = program.done()
    if done.code == 0:
        pytest.skip("it finished before it could be killed")
    assert done.code == (-number if number == signal.SIGKILL else 128 + number), done.err
    if number == signal.SIGTERM:
        assert "everything is saved" in done.err
        assert runs.read_record(only_run(tmp_path) / "run.json").status == "interrupted"
    run_here(*arguments)
    assert outcome(only_run(tmp_path)) == outcome(finished)


def test_two_processes_are_one_run_and_one_result(
    hcnet: Hcnet, finished: Path, folder_of_images: Path, tmp_path: Path
) -> None:
    """Two processes = one process with two micro-batches, bit for bit; and = one batch but for rounding."""
    arguments = command(*MIXED, "--data", folder_of_images, "--out")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [*torchrun, "-m", "hcnet_cli", *arguments, str(tmp_path / "two")]
    done = subprocess.run(two, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run_here(*arguments, tmp_path / "one", "--accumulate", "2")
    a, b = only_run(tmp_path / "two"), only_run(tmp_path / "one")
    assert a.name == b.name == finished.name
    assert runs.read_record(a / "run.json").processes == 2
    left, right = outcome(a), outcome(b)
    assert left.pop("log")[-1] == right.pop("log")[-1]  # the last evaluation
    assert left == right
    whole = load_file(finished / "last" / "model.safetensors")
    for name, value in load_file(a / "last" / "model.safetensors").items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=2e-5)
    # and the finished run of one process is the finished run of two
    assert "This run is finished" in hcnet(*arguments, tmp_path / "two").err


def test_same_command_again_says_finished_and_fresh_starts_over(
    hcnet: Hcnet, folder_of_images: Path, tmp_path: Path
) -> None:
    arguments = ("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path)
    assert hcnet(*arguments).code == 0
    first = outcome(only_run(tmp_path))
    again = hcnet(*arguments)
    assert again.code == 0
    assert "This run is finished" in again.err
    assert "step" not in again.err
    over = hcnet(*arguments, "--fresh")
    assert over.code == 0
    assert "The weights of the run before are kept until this run has finished" in over.err
    assert outcome(only_run(tmp_path)) == first
    assert not (only_run(tmp_path) / "replaced.safetensors").exists()
    evaluated = hcnet(*arguments, "--eval-only")
    assert evaluated.code == 0
    assert f"top1 {first['metrics']['top1']:.3f}" in evaluated.out
    assert hcnet("runs", "mv", only_run(tmp_path).name, "mine", "--out", tmp_path).code == 0
    assert f"This run is finished: {tmp_path / 'runs' / 'mine'}" in hcnet(*arguments).err
    assert only_run(tmp_path).name == "mine"


def test_fresh_loses_no_weights_before_there_are_new_ones(tmp_path: Path) -> None:
    folder = runs.RunFolder(tmp_path)
    folder.best.write_bytes(b"old")
    for _ in range(2):  # the second --fresh finds no weights of the first
        folder.clear()
        (tmp_path / "recipe.yaml").touch()
        assert folder.replaced.read_bytes() == b"old"
        assert not folder.best.exists()


def test_weights_of_other_classes_are_never_taken_in_silence(
    hcnet: Hcnet, finished: Path, folder_of_images: Path, tmp_path: Path
) -> None:
    """As many classes, one of them renamed so that their order is another one."""
    other = shutil.copytree(folder_of_images, tmp_path / "colors")
    for split in ("train", "val"):
        (other / split / "blue").rename(other / split / "sky")
    arguments = ("pretrain", *SMALL, "--data", other, "--out", tmp_path, "--init", finished / "best.safetensors")
    scored = hcnet(*arguments, "--eval-only")
    assert scored.code == 2
    assert "is of other classes than the data: one of them is blue there and green here" in scored.err
    assert not (tmp_path / "runs").exists()
    trained = hcnet(*arguments, "--epochs", "1", "--set", "schedule.length=2")
    assert trained.code == 0
    assert "warning: " in trained.err
    assert "Training starts from what was learned there." in trained.err
    assert "--set schedule.length=2 counts, and --epochs 1 does not" in " ".join(trained.err.split())
    assert hcnet(*arguments[:-1], finished, "--data", folder_of_images, "--eval-only").code == 0


def test_a_name_that_holds_another_recipe_is_refused_with_the_keys(
    hcnet: Hcnet, folder_of_images: Path, tmp_path: Path
) -> None:
    arguments = ("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path, "--name", "mine")
    assert hcnet(*arguments).code == 0
    before = (tmp_path / "runs" / "mine" / "run.json").read_bytes()
    other = hcnet(*arguments, "--lr", "0.5")
    assert other.code == 2
    assert "optim.lr (0.003 there, 0.5 here)" in other.err
    assert (tmp_path / "runs" / "mine" / "run.json").read_bytes() == before


def test_a_second_command_in_the_same_folder_is_refused(hcnet: Hcnet, folder_of_images: Path, tmp_path: Path) -> None:
    with runs.RunFolder(tmp_path / "runs" / "mine").lock():
        done = hcnet("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path, "--name", "mine")
    assert done.code == 2
    assert "Another process is working" in done.err


def test_init_gives_an_account_and_enters_the_fingerprint(
    hcnet: Hcnet, finished: Path, folder_of_images: Path, tmp_path: Path
) -> None:
    """From a run folder; from a file with another head, which is re-initialised and named; from too little, refused."""
    arguments = ("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path, "--epochs", "1")
    done = hcnet(*arguments, "--init", finished)
    assert done.code == 0
    assert "tensors loaded" in done.err
    info = runs.read_record(only_run(tmp_path) / "run.json")
    assert info.init["loaded"] == info.init["total"]
    evaluated = hcnet(*arguments, "--init", finished, "--eval-only")
    assert f"top1 {info.metrics['top1']:.3f}" in evaluated.out  # of what was trained, not of what it started from
    state = load_file(finished / "best.safetensors")
    state["head.fc.weight"], state["head.fc.bias"] = torch.zeros(7, 16), torch.zeros(7)
    save_file(state, tmp_path / "other.safetensors")
    done = hcnet(*arguments, "--init", tmp_path / "other.safetensors")
    assert done.code == 0
    assert "re-initialised (shape differs): head.fc.bias, head.fc.weight" in done.err
    assert len(list((tmp_path / "runs").iterdir())) == 2
    save_file({"head.fc.bias": torch.zeros(3)}, tmp_path / "little.safetensors")
    done = hcnet(*arguments, "--init", tmp_path / "little.safetensors")
    assert done.code == 2
    assert "does not fit this model" in done.err


def test_eval_only_of_foreign_weights_becomes_a_row_of_its_own(
    hcnet: Hcnet, finished: Path, folder_of_images: Path, tmp_path: Path
) -> None:
    arguments = ("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path, "--eval-only")
    done = hcnet(*arguments, "--init", finished / "best.safetensors")
    assert done.code == 0
    info = runs.read_record(only_run(tmp_path) / "run.json")
    assert info.evaluated_only
    assert info.metrics == runs.read_record(finished / "run.json").metrics
    assert hcnet(*arguments).code == 2  # nothing trained here
    assert hcnet(*arguments, "--init", finished / "best.safetensors").code == 0  # the same score again
    scored = only_run(tmp_path)
    trained = hcnet(*arguments[:-1], "--init", finished / "best.safetensors")
    assert trained.code == 0, trained.err
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert runs.read_record(scored / "run.json").metrics == info.metrics
    shutil.rmtree(next(one for one in (tmp_path / "runs").iterdir() if one != scored))
    scored.rename(scored.with_name(scored.name.removesuffix("-evaluated")))  # as earlier versions called it
    refused = hcnet(*arguments[:-1], "--init", finished / "best.safetensors")
    assert refused.code == 2
    assert "holds a score of weights that were not trained here" in refused.err


def test_the_plan_says_where_values_come_from_and_what_linear_scaling_would_give(
    hcnet: Hcnet, folder_of_images: Path, tmp_path: Path
) -> None:
    done = hcnet("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path, "--lr", "0.01", "--dry-run")
    assert done.code == 0
    assert not (tmp_path / "runs").exists()
    plan = " ".join(done.out.split())
    for words in ("optim.lr 0.01 --lr", "data.img_size 16 --set data.img_size", "9 (3 an epoch)", "8 = 8 x 1"):
        assert words in plan
    for words in ("schedule.kind cosine recipe", "schedule.power 1.0 default", "model.depths [1, 1, 1, 1] --set"):
        assert words in plan
    assert "linear scaling would give --lr 0.000375" in plan  # 3e-3 x 8 / 64


def test_the_plan_counts_what_the_backward_pass_needs(hcnet: Hcnet, folder_of_images: Path, tmp_path: Path) -> None:
    """The same count on the meta device, where only shapes are computed."""
    line = ("pretrain", "--recipe", "digits", "--data", folder_of_images, "--out", tmp_path, "--batch-size", "8")
    done = hcnet(*line, "--set", "data.img_size=64", "--set", "train.workers=0", "--dry-run")
    assert done.code == 0, done.err
    (said,) = re.findall(r"([\d.]+) MiB activations an image", " ".join(done.out.split()))
    model = timm.create_model("hcnet_pico", num_classes=3).to("meta")
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.empty(2, 3, 64, 64, device="meta"))
    own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    storages = {id(x.untyped_storage()): x.untyped_storage() for x in kept}
    per_image = sum(one.nbytes() for number, one in storages.items() if number not in own) / 2
    assert float(said) == pytest.approx(per_image / 2**20, rel=0.05)


@pytest.mark.parametrize(("seconds", "sizes"), [(1e-9, [2]), (1e9, [2, 8])])
def test_time_is_estimated_with_whole_batches_where_two_images_are_quick(
    seconds: float, sizes: list[int], hcnet: Hcnet, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images at a time take a small model's GPU or CPU several times as long an image as its batch does."""
    seen: list[int] = []
    real = trial.loader.sample_batch

    def noting(images: Any, indices: Any, *more: Any) -> Any:
        seen.append(len(indices))
        return real(images, indices, *more)

    monkeypatch.setattr(trial, "TRIAL_SECONDS", seconds)
    monkeypatch.setattr(trial, "QUICK_SECONDS", 0)
    monkeypatch.setattr(trial.loader, "sample_batch", noting)
    assert hcnet("pretrain", *SMALL, "--data", folder_of_images, "--dry-run").code == 0
    assert seen == sizes


def test_as_typed_it_starts_on_the_embedded_data_with_a_notice(tmp_path: Path) -> None:
    """`hcnet pretrain --size s --epochs 300` from any folder, interrupted by Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hcnet_cli", "pretrain", "--size", "s", "--epochs", "300"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 250
    while time.monotonic() < deadline and not list(tmp_path.glob("results/runs/*/run.json")):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert "using the embedded digits" in err
    assert "Traceback" not in err
    assert process.returncode == 130
    info = runs.read_record(next(tmp_path.glob("results/runs/*/run.json")))
    assert (info.status, info.steps_total, info.size) == ("interrupted", 300 * 224, "s")


def test_another_optimizer_is_a_value_of_the_recipe(hcnet: Hcnet, folder_of_images: Path, tmp_path: Path) -> None:
    chosen = ("--set", "optim.name=lamb", "--set", "optim.args.betas=[0.9,0.95]")
    done = hcnet("pretrain", *SMALL, *chosen, "--data", folder_of_images, "--out", tmp_path)
    assert done.code == 0, done.err
    info = runs.read_record(only_run(tmp_path) / "run.json")
    assert (info.changes["optim.name"], info.changes["optim.args.betas"]) == ("lamb", [0.9, 0.95])
    again = hcnet("pretrain", "--recipe", only_run(tmp_path) / "recipe.yaml", "--out", tmp_path)
    assert "This run is finished" in again.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "xl"), "unknown size"),
        (("--epoch", "3"), "No such option"),
        (("--epochs", "many"), "Invalid value"),
        (("--set", "optim.learning_rate=1"), "Did you mean"),
        (("--set", "optim.name=lamp"), 'optim.name: unknown optimizer "lamp". Did you mean "lamb"?'),
        (("--set", "optim.args.beta=1"), 'optim.args.beta: adamw has no such argument. Did you mean "betas"?'),
        (("--set", "lr"), "KEY=VALUE"),
        (("--recipe", "imagent"), 'Did you mean "imagenet"'),
        (("--recipe", "mine.yaml"), "no recipe file mine.yaml"),
        (("--data", "nowhere"), "nowhere does not exist"),
        (("--init", "nowhere"), "no weights file nowhere"),
        (("--device", "gpu"), "no device"),
        (("--device", "cuda:9"), "device"),
        (("--name", "a/b"), "not the name of a folder"),
        (("--name", ""), "not the name of a folder"),
        (("--init", ""), '"init" cannot be ""'),
        (("--eval-only", "--fresh"), "cannot be combined with --fresh"),
        (("--eval-only", "--dry-run"), "cannot be combined with --dry-run"),
        (("--eval-only",), "There are no weights to evaluate"),
        (("--batch-size", "7", "--accumulate", "2"), "does not divide"),
        (("--batch-size", "15000"), "fewer than one batch"),
        (("--precision", "fp8"), "fp8"),
        (("--set", "model.disable=[conduction,gate]"), "gate"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], words: str, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hcnet("pretrain", "--size", "pico", *arguments)
    assert done.code == 2
    assert words in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir()) or list(tmp_path.iterdir()) == [tmp_path / "results"]


def test_an_output_folder_that_cannot_be_written(hcnet: Hcnet, tmp_path: Path, folder_of_images: Path) -> None:
    (tmp_path / "file").write_text("")
    done = hcnet("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path / "file")
    assert done.code == 2
    assert "cannot be written" in done.err
    assert "Traceback" not in done.err


def test_a_disk_that_fills_up_ends_in_one_sentence_and_loses_nothing(
    hcnet: Hcnet, tmp_path: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the second checkpoint; with space again the same command ends as if nothing had happened."""
    arguments = ("pretrain", *SMALL, "--data", folder_of_images, "--out")
    assert hcnet(*arguments, tmp_path / "whole").code == 0
    real, calls = shutil.disk_usage, 0

    def filling(path: Path) -> Any:
        nonlocal calls
        calls += 1
        return real(path) if calls < 6 else shutil._ntuple_diskusage(100, 100, 0)  # type: ignore[attr-defined]

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", filling)
        done = hcnet(*arguments, tmp_path / "full")
    assert done.code == 2
    assert "The disk is full" in done.err
    assert "Traceback" not in done.err
    assert runs.read_record(only_run(tmp_path / "full") / "run.json").status == "failed"
    assert hcnet(*arguments, tmp_path / "full").code == 0
    assert outcome(only_run(tmp_path / "full")) == outcome(only_run(tmp_path / "whole"))


def test_a_disk_too_small_for_the_checkpoints_is_told_before_training(
    hcnet: Hcnet, tmp_path: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 2**14))
    done = hcnet("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path)
    assert done.code == 2
    assert "too little space" in done.err
    assert not (only_run(tmp_path) / "metrics.jsonl").exists()


def test_a_finished_run_without_its_weights_says_so(hcnet: Hcnet, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs" / finished.name)
    again = ("pretrain", "--recipe", finished / "recipe.yaml", "--out", tmp_path)
    assert hcnet(*again).code == 0
    best = only_run(tmp_path) / "best.safetensors"
    for spoil in (lambda: best.write_bytes(best.read_bytes()[:1000]), best.unlink):
        spoil()
        done = hcnet(*again)
        assert done.code == 2
        assert "its weights are lost" in done.err
        assert "--fresh" in done.err


def test_eval_only_needs_no_writable_folder(hcnet: Hcnet, tmp_path: Path, finished: Path) -> None:
    """A run on a read-only disk, or one that another command works on, can be evaluated."""
    shutil.copytree(finished, tmp_path / "runs" / finished.name)
    with runs.RunFolder(only_run(tmp_path)).lock():
        done = hcnet("pretrain", "--recipe", finished / "recipe.yaml", "--out", tmp_path, "--eval-only")
    assert done.code == 0, done.err
    assert f"top1 {runs.read_record(finished / 'run.json').metrics['top1']:.3f}" in done.out


def test_a_folder_of_results_as_init_names_the_runs_in_it(hcnet: Hcnet, tmp_path: Path, finished: Path) -> None:
    done = hcnet("pretrain", *SMALL, "--out", tmp_path, "--init", finished.parent.parent)
    assert done.code == 2
    assert str(finished) in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_standard_output_on_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hcnet_cli", "report"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "error: The disk is full: what is printed here could not be written.\n"


def test_a_pth_that_would_run_code_is_refused(hcnet: Hcnet, tmp_path: Path, folder_of_images: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": Bomb()}, tmp_path / "w.pth")
    done = hcnet("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path, "--init", tmp_path / "w.pth")
    assert done.code == 2
    assert "refused" in done.err
    assert not (tmp_path / "ran").exists()


def test_corrupt_images_are_skipped_and_counted_in_training_and_an_error_in_evaluation(
    hcnet: Hcnet, tmp_path: Path, folder_of_images: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder_of_images, data)
    next((data / "train" / "red").iterdir()).write_bytes(b"not an image")
    done = hcnet("pretrain", *SMALL, "--data", data, "--out", tmp_path)
    assert done.code == 0
    assert runs.read_record(only_run(tmp_path) / "run.json").unreadable_images == 1
    assert "could not be read" in done.err
    victim = next((data / "val" / "red").iterdir())
    victim.write_bytes(b"not an image")
    done = hcnet("pretrain", *SMALL, "--data", data, "--out", tmp_path, "--fresh")
    assert done.code == 2
    assert victim.name in done.err
    assert "Traceback" not in done.err
    Image.new("RGB", (4, 4)).save(victim)
    assert hcnet("pretrain", *SMALL, "--data", data, "--out", tmp_path).code == 0  # mended: it goes on


def test_a_corrupt_checkpoint_is_passed_over(hcnet: Hcnet, tmp_path: Path, folder_of_images: Path) -> None:
    arguments = ("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path)
    assert hcnet(*arguments).code == 0
    folder = only_run(tmp_path)
    before = outcome(folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    (folder / "last" / "optimizer.safetensors").write_bytes(b"cut")
    done = hcnet(*arguments)
    assert done.code == 0
    assert "damaged" in done.err
    assert outcome(folder) == before
    (folder / "run.json").write_text("{")
    done = hcnet(*arguments)
    assert done.code == 2
    assert "run.json" in done.err


def test_bf16_and_ema(hcnet: Hcnet, tmp_path: Path, folder_of_images: Path) -> None:
    """At 32 x 32: PyTorch's CPU gradient of a 3x3 stride-2 bf16 convolution on a 1 x 1 map is not a number."""
    precision = ("--precision", "bf16", "--set", "train.ema_decay=0.9", "--set", "data.img_size=32")
    done = hcnet("pretrain", *SMALL, "--data", folder_of_images, "--out", tmp_path, *precision)
    assert done.code == 0
    info = runs.read_record(only_run(tmp_path) / "run.json")
    assert info.precision == "bf16"
    assert (only_run(tmp_path) / "last" / "ema.safetensors").exists()


def test_recipes_ls_show_cp(hcnet: Hcnet, tmp_path: Path) -> None:
    listed = hcnet("recipes", "ls").out
    assert "pretrain/imagenet-release" in listed
    shown = hcnet("recipes", "show", "digits").out
    mine = tmp_path / "mine.yaml"
    assert hcnet("recipes", "cp", "pretrain/digits", mine).code == 0
    assert mine.read_text() == shown
    assert hcnet("recipes", "cp", "digits", mine).code == 2
    assert "Did you mean" in hcnet("recipes", "show", "pretrain/digit").err
