"""Protects `--profile`: every second of a step is in one part, and the run is the one without it, bit for bit."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL_MODEL, Done, outcome
from test_engine import Points, Regression, make_job
from torch import Tensor

from hcnet_cli import engine
from hcnet_cli.data import decoding, loader
from hcnet_cli.engine import profiler
from hcnet_cli.engine.profiler import TRACED, WARM_UP, Profiler
from hcnet_cli.privacy import host_id
from hcnet_cli.runs import RunFolder

Hcnet = Callable[..., Done]
PAGE = (Path(__file__).parent.parent / "docs" / "inside-a-run.md").read_text()


class Clock:
    """A clock that only what is under test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (profiler, loader, decoding):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=made))
    return made


def cells(folder: Path) -> dict[str, list[float]]:
    """Part -> ms, per cent."""
    lines = re.findall(r"^\| ([a-z -]+) \| +([\d.,]+) \| +([\d.,]+) \|$", (folder / "profile.md").read_text(), re.M)
    return {part.strip(): [float(ms.replace(",", "")), float(share)] for part, ms, share in lines}


def test_every_second_is_in_its_part(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 s: 8 images of 0.25 s to decode and 0.5 to augment, 3 s forward, 5 back, 2 to update, 4 for the rest."""

    @decoding.timed
    def decode() -> None:
        clock.now += 0.25

    class Slow(Points):
        def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
            decode()
            clock.now += 0.5
            return super().__getitem__(request)

    def at_step(_: int) -> None:
        clock.now += 3.0

    class Task(Regression):
        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            losses = super().forward(batch)
            losses["loss_l2"].register_hook(lambda _: advance(5.0))
            return losses

    def advance(seconds: float) -> None:
        clock.now += seconds

    job = make_job(Task(at_step), total=WARM_UP + 2 + TRACED, ema=False)
    job.train = loader.TrainLoader(Slow(40), batch_size=8, accumulate=1, total_steps=9, seed=3, workers=0)
    update = job.optimizer.step
    monkeypatch.setattr(job.optimizer, "step", lambda: (advance(2.0), update()))
    derived = job.lr_at
    job.lr_at = lambda step: (advance(2.0), derived(step))[1]  # of two groups
    job.eval_every, job.log_every, job.profile = 9, 9, 2
    engine.fit(job, RunFolder(tmp_path), engine.State(), lambda _: None)
    expected = {"wait for data": 0, "decode": 2, "augment": 4, "transfer": 0, "forward": 3, "backward": 5}
    expected |= {"optimizer": 2, "other": 4, "step": 20}
    assert cells(tmp_path / "profile") == {part: [1000 * s, 5 * s] for part, s in expected.items()}
    assert "means of 2 steps" in capsys.readouterr().out


def test_what_follows_the_last_gradient_is_all_reduce(clock: Clock, tmp_path: Path) -> None:
    made = Profiler(make_job(Regression()), tmp_path, steps=1)
    made.step = WARM_UP
    with made.part("backward"):
        for _ in range(2):
            clock.now += 2.0
            made._note_gradient(torch.zeros(()))
        clock.now += 1.5
    assert made.seconds == {"backward": 4.0, "all-reduce": 1.5}


def test_a_profiled_run_is_the_run(folder_of_images: Path, hcnet: Hcnet, tmp_path: Path) -> None:
    """Data workers load; the trace names the parts; a second time the run is finished and says so."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith("hcnet pretrain --profile")]
    assert line == "hcnet pretrain --profile 20"
    run = ("pretrain", *SMALL_MODEL, "--recipe", "small", "--data", folder_of_images, "--set", "data.img_size=16")
    run += ("--batch-size", "8", "--set", "schedule.length=12", "--set", "train.eval_every=12", "--out", tmp_path)
    run += ("--device", "cpu")
    plain = hcnet(*run, "--name", "plain")
    assert plain.code == 0, plain.err
    done = hcnet(*run, "--name", "profiled", "--profile", "3")
    assert done.code == 0, done.err
    assert outcome(tmp_path / "runs" / "profiled") == outcome(tmp_path / "runs" / "plain")
    assert "Where the time of a step goes" in done.out
    folder = tmp_path / "runs" / "profiled" / "profile"
    found = cells(folder)
    assert list(found) == ["wait for data", "transfer", "forward", "backward", "optimizer", "other", "step"]
    assert sum(share for _, share in found.values()) == pytest.approx(200, abs=0.1)
    assert re.search(r"in 1 data worker, .*: decode [\d.]+ ms, augment [\d.]+ ms", (folder / "profile.md").read_text())
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert (trace["host_name"], trace["traceName"]) == (host_id(), "trace.json.gz")
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert [name for name in names if name in found] == [*list(found)[:-2], "optimizer"] * TRACED  # update, check
    again = hcnet(*run, "--name", "profiled", "--profile", "3")
    assert "Nothing was profiled" in again.err


def test_a_run_that_is_too_short_says_that_nothing_was_profiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(Regression(), total=WARM_UP, ema=False)
    job.profile = 2
    engine.fit(job, RunFolder(tmp_path), engine.State(), lambda _: None)
    assert "Nothing was profiled" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()
    job = make_job(Regression(), total=WARM_UP + 2, ema=False)
    job.profile = 999
    engine.fit(job, RunFolder(tmp_path), engine.State(), lambda _: None)
    assert "ended after 2 of the 999 steps" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"profile.md"}


@pytest.mark.parametrize("other", ["--dry-run", "--eval-only"])
def test_what_trains_nothing_is_not_profiled(other: str, hcnet: Hcnet) -> None:
    done = hcnet("pretrain", "--profile", "2", other)
    assert done.code == 2
    assert f"{other} trains nothing: it cannot be combined with --profile" in done.err
