"""Protects whole runs on a GPU: the three tasks, resuming, compiling, the memory of the plan."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_MODEL, Hcnet, only_run, outcome
from gpu_support import DEVICE, LENGTH, NAME, RUN, batches_of, deterministic, make_stepper, needs_cuda, needs_device
from safetensors.torch import load_file
from test_rehearsal import coco, scenes

from hcnet_cli import build, runs, trial
from hcnet_cli import recipe as rcp
from hcnet_cli.engine.step import Stepper

pytestmark = needs_device
__all__ = ["deterministic"]
PRECISIONS = ("fp32", "bf16") if NAME == "cpu" else ("fp32", "bf16", "fp16")  # fp16 is refused on a CPU


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_stopped_and_resumed_is_never_stopped(
    precision: str, folder_of_images: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch,
    deterministic: None,
) -> None:  # fmt: skip
    """Weights, metrics and log bit for bit, in fp16 with the state of the loss scale."""
    run = (*RUN, "--data", folder_of_images, "--precision", precision)
    assert hcnet(*run, "--out", tmp_path / "whole").code == 0
    real = Stepper.step

    def stopping(self: Stepper, step: int, batches: Any) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, step, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", stopping)
        done = hcnet(*run, "--out", tmp_path / "stopped")
    assert done.code == 128 + signal.SIGUSR1, done.err
    record = runs.read_record(only_run(tmp_path / "stopped") / "run.json")
    assert record.steps_done == 4
    state = json.loads((only_run(tmp_path / "stopped") / "last" / "state.json").read_text())
    assert bool(state["state"]["scaler"]) == (precision == "fp16")
    assert hcnet(*run, "--out", tmp_path / "stopped").code == 0
    assert outcome(only_run(tmp_path / "stopped")) == outcome(only_run(tmp_path / "whole"))


def test_a_compiled_run_has_the_losses_and_the_names_of_an_eager_one(
    folder_of_images: Path, tmp_path: Path, hcnet: Hcnet
) -> None:
    found = []
    for compiled in ("false", "true"):
        out = tmp_path / compiled
        run = (*RUN, "--data", folder_of_images, "--precision", "fp32", "--set", f"train.compile={compiled}")
        done = hcnet(*run, "--out", out)
        assert done.code == 0, done.err
        log = [entry["loss"] for entry in runs.read_log(only_run(out) / "metrics.jsonl") if "loss" in entry]
        found.append((log, load_file(only_run(out) / "best.safetensors").keys()))
    (eager, names), (compiled, compiled_names) = found
    assert compiled_names == names
    assert compiled == pytest.approx(eager, rel=2e-3)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_of_the_plan_is_the_peak_of_training(precision: str, folder_of_images: Path) -> None:
    """HcNet-T on 24 images of 224 x 224: planned from a trial, measured in three whole steps."""
    given = {
        "data.path": str(folder_of_images), "data.img_size": 224, "model.size": "t", "train.batch_size": 24,
        "train.workers": 0, "train.precision": precision, "schedule.length": LENGTH,
    }  # fmt: skip
    recipe = rcp.resolve(rcp.recipe_file("small", "pretrain"), [(key, given[key], "") for key in given]).recipe
    data = build.open_data(recipe)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    task = build.build_task(recipe, data)
    planned = trial.trial(recipe, data, task, DEVICE).memory
    assert planned is not None
    job = build.build_job(recipe, data, task, DEVICE)
    stepper, batches = make_stepper(job), batches_of(job, 3)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    for step, batch in enumerate(batches):
        stepper.step(step, [batch])
    peak = torch.cuda.max_memory_allocated(DEVICE)
    assert 0.9 < (planned - before) / (peak - before) < 1.2


SHRUNK = (*SMALL_MODEL, "--set", "data.img_scale=[64,64]", "--batch-size", "2", "--workers", "0", "--device", NAME)
TASKS = {
    "pretrain": RUN,
    "finetune-det": ("finetune-det", "--recipe", "digit-scenes", *SHRUNK, "--epochs", "2", "--init", "none"),
    "finetune-seg": (
        *("finetune-seg", "--recipe", "digit-stuff", *SHRUNK, "--steps", "4", "--init", "none"),
        *("--set", "data.crop_size=64"),
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_plans_trains_and_is_scored_on_the_device_and_on_a_cpu(
    task: str, folder_of_images: Path, tmp_path: Path, hcnet: Hcnet
) -> None:
    """In the precision that `auto` chooses here."""
    data = {"pretrain": lambda root: folder_of_images, "finetune-det": coco, "finetune-seg": scenes}[task](
        tmp_path / "data"
    )
    run = (*TASKS[task], "--data", data, "--out", tmp_path / "results")
    plan = hcnet(*run, "--dry-run")
    assert plan.code == 0, plan.err
    assert (NAME == "cuda") == bool(re.search(r"GiB on this cuda a process, .* measured", plan.out))
    done = hcnet(*run)
    assert done.code == 0, done.err
    folder = only_run(tmp_path / "results")
    record = runs.read_record(folder / "run.json")
    assert record.status == "finished"
    assert record.precision == ("bf16" if NAME == "cuda" and torch.cuda.is_bf16_supported(False) else record.precision)
    for device in (NAME, "cpu"):
        scored = hcnet("evaluate", folder, "--device", device, "--workers", "0")
        assert scored.code == 0, scored.err
    assert runs.read_record(folder / "run.json").metrics == record.metrics
