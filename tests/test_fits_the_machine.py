"""Workers from the cores there are, and memory that does not suffice: found before step 1, answered with what fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_MODEL, Hcnet, only_run, outcome

from hcnet_cli import build, cores, device, runs, trial
from hcnet_cli import recipe as rcp
from hcnet_cli.tasks.classification.task import ClassificationTask


@pytest.mark.parametrize(
    ("affinity", "environment", "usable", "workers"),
    [
        (8, {}, 8, 7),
        (64, {}, 64, 16),
        (1, {}, 1, 1),
        (64, {"SLURM_CPUS_PER_TASK": "4"}, 4, 3),
        (4, {"SLURM_CPUS_PER_TASK": "12"}, 4, 3),
        (64, {"SLURM_CPUS_PER_TASK": "32", "LOCAL_WORLD_SIZE": "8"}, 4, 3),
        (4, {"LOCAL_WORLD_SIZE": "8"}, 1, 1),
        (8, {"SLURM_CPUS_PER_TASK": "", "LOCAL_WORLD_SIZE": ""}, 8, 7),
    ],
)
def test_workers_follow_the_cores(
    monkeypatch: pytest.MonkeyPatch, affinity: int, environment: dict[str, str], usable: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    monkeypatch.setattr(cores, "container_cores", lambda: None)
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores.cores() == usable
    for asked, expected in (("auto", workers), (5, 5), (0, 0)):
        recipe = rcp.resolve(rcp.recipe_file("imagenet", "pretrain"), [("train.workers", asked, "--workers")]).recipe
        assert build.workers(recipe) == expected


@pytest.mark.parametrize(("load", "words"), [(1.5, ""), (12.2, " while the machine is busy (load 12, 2 cores)")])
def test_a_time_says_that_the_machine_was_busy(monkeypatch: pytest.MonkeyPatch, load: float, words: str) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert cores.busy() == words


@pytest.mark.parametrize(("usable", "asked", "threads"), [(1, None, 1), (8, None, 2), (1, "2", 2)])
def test_threads_follow_the_cores(
    monkeypatch: pytest.MonkeyPatch, usable: int, asked: str | None, threads: int
) -> None:
    """PyTorch has 2 threads here; a container's limit is not among what it looks at."""
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "cores", lambda: usable)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    try:
        torch.set_num_threads(2)
        device.use_cores(torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch", "accumulate", "fitting", "advice"),
    [
        (256, 1, 100, "--accumulate 4 computes the same steps in micro-batches of 64 images"),
        (256, 1, 128, "--accumulate 2 "),
        (96, 2, 20, "--accumulate 6 computes the same steps in micro-batches of 16 images"),
        (64, 1, 0, "--accumulate 32 computes the same steps in micro-batches of 2 images"),
        (2, 1, 0, "grad_checkpointing"),
    ],
)
def test_the_advice_is_the_fewest_parts_that_fit(batch: int, accumulate: int, fitting: int, advice: str) -> None:
    changes = [("train.batch_size", batch, ""), ("train.accumulate", accumulate, "")]
    recipe = rcp.resolve(rcp.recipe_file("imagenet", "pretrain"), changes).recipe
    assert advice in trial.memory_advice(recipe, fitting)


def test_the_images_that_fit_lie_on_the_line_through_two_peaks() -> None:
    """100 bytes and 10 for an image: 190 images fit into 2,000 bytes."""
    peaks = {2: 120, 8: 180, 32: 420}
    assert trial.images_that_fit(peaks, 2000) == 190
    assert trial.images_that_fit(peaks, 425) == 32
    assert trial.images_that_fit({2: 100, 8: 100}, 2000) == 8


COMMAND = (
    *("pretrain", "--recipe", "small", "--set", "data.img_size=16", "--batch-size", "8", "--workers", "0"),
    *("--set", "schedule.length=6", "--set", "schedule.warmup=0", "--set", "train.eval_every=3", *SMALL_MODEL),
    *("--device", "cpu"),
)


def test_memory_that_does_not_suffice(
    folder_of_images: Path, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with room for 4 images: the first command is refused before anything is written, its advice trains.

    Later, in the fourth step, there is room for 2 only: the run fails with the same advice, and goes on with it.
    """
    real, room = ClassificationTask.forward, [4]

    def limited(self: Any, batch: dict[str, Any]) -> Any:
        if len(batch["target"]) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, batch)

    for limit in ("QUICK_SECONDS", "TRIAL_SECONDS"):  # the trial goes through all its sizes, however slow the machine
        monkeypatch.setattr(trial, limit, 1e6)
    command = (*COMMAND, "--data", folder_of_images)
    assert hcnet(*command, "--out", tmp_path / "expected").code == 0
    monkeypatch.setattr(ClassificationTask, "forward", limited)
    results = ("--out", tmp_path / "results")
    for more in ((), ("--dry-run",)):
        done = hcnet(*command, *results, *more)
        assert done.code == 2
        assert "A micro-batch of 8 images does not fit into the memory of this cpu." in done.err
        assert "--accumulate 4 computes the same steps in micro-batches of 2 images" in done.err
        assert not list(tmp_path.glob("results/runs/*/run.json"))

    class Shrinking(list[int]):
        """Room for 4 images in the 3 steps of the trial and in 7 micro-batches, for 2 in the others."""

        def __getitem__(self, index: Any) -> int:
            self.append(0)
            return 4 if len(self) < 12 else 2

    room = Shrinking([4])
    failed = hcnet(*command, *results, "--accumulate", "2")
    assert failed.code == 1
    assert "did not suffice for a micro-batch of 4 images; the last checkpoint is whole" in failed.err
    assert "--accumulate 4 computes" in failed.err
    assert runs.read_record(only_run(tmp_path / "results") / "run.json").status == "failed"
    assert hcnet(*command, *results, "--accumulate", "4").code == 0
    assert outcome(only_run(tmp_path / "results"))["metrics"] == outcome(only_run(tmp_path / "expected"))["metrics"]
