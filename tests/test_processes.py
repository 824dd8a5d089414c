"""Protects the start of processes: RANK and its like are read in one place, and a contradiction is one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import fresh
import pytest
import torch
from conftest import SMALL_MODEL, Hcnet, environment

from hcnet_cli import console, dist, inputs
from hcnet_cli.console import Progress, UserError, units

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((None, None, None), (0, 1, 0)),
        (("1", None, "1"), (0, 1, 0)),  # one process is the main process
        (("3", "", ""), (0, 1, 0)),
        (("x", None, None), (0, 1, 0)),
        (("", "1", ""), (0, 1, 0)),
        (("1", "4", "0"), (1, 4, 0)),
        ((" 3 ", "4", "3"), (3, 4, 3)),
    ],
)
def test_what_the_variables_mean(
    values: tuple[str | None, ...], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(NAMES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert (dist.rank(), dist.world_size(), dist.local_rank()) == expected
    assert console.is_main_process() == dist.is_main() == (expected[0] == 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("0", "two", "0"), 'WORLD_SIZE is "two"'),
        (("0", "0", "0"), 'WORLD_SIZE is "0", not a whole number of at least 1'),
        (("0", "-1", "0"), 'WORLD_SIZE is "-1"'),
        (("0", "2.0", "0"), 'WORLD_SIZE is "2.0"'),
        (("", "2", ""), "WORLD_SIZE is 2, but RANK is not set"),
        (("2", "2", "0"), "RANK is 2, but WORLD_SIZE is 2"),
        (("1", "1", "0"), "RANK is 1, but WORLD_SIZE is 1"),
        (("0", "2", "2"), "LOCAL_RANK is 2, but WORLD_SIZE is 2"),
        (("0", "2", "a"), 'LOCAL_RANK is "a"'),
    ],
)
def test_a_contradiction_is_one_sentence_that_every_process_says(
    values: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, hcnet: Hcnet, tmp_path: Path
) -> None:
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.setenv(name, value)
    assert console.is_main_process()
    done = hcnet("pretrain", "--out", tmp_path)
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert words in done.err
    assert not list(tmp_path.iterdir())


def test_processes_that_cannot_meet_are_one_sentence(monkeypatch: pytest.MonkeyPatch, hcnet: Hcnet) -> None:
    for name, value in zip(NAMES, "020", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    done = hcnet("pretrain", "--device", "cpu")
    assert done.code == 2
    assert "The 2 processes cannot be joined" in done.err
    monkeypatch.setenv("LOCAL_RANK", "")
    with pytest.raises(UserError, match="every process would take the same GPU"):
        dist.local_rank()


def test_a_lost_terminal_saves_and_stops_and_nohup_goes_on(folder_of_images: Path, tmp_path: Path) -> None:
    """SIGHUP while nobody reads standard error any more: the run saves, exit code 129; ignored, it trains on."""
    line = [sys.executable, "-m", "hcnet_cli", "pretrain", "--recipe", "digits", *SMALL_MODEL, "--epochs", "6"]
    line += ["--set", "data.img_size=16", "--batch-size", "8", "--workers", "0", "--set", "train.log_every=1"]
    line += ["--data", str(folder_of_images), "--out", str(tmp_path)]
    for prefix, code in (([], 129), (["nohup"], 0)):
        process = subprocess.Popen([*prefix, *line], env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        before = sum(file.stat().st_size for file in tmp_path.glob("runs/*/metrics.jsonl"))
        deadline = time.monotonic() + 100
        while sum(file.stat().st_size for file in tmp_path.glob("runs/*/metrics.jsonl")) <= before:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        assert process.stderr is not None
        process.stderr.close()
        process.send_signal(1)
        assert process.wait(timeout=100) == code
    (record,) = tmp_path.glob("runs/*/run.json")
    assert '"finished"' in record.read_text()


def test_lines_come_by_time_whatever_a_step_or_an_evaluation_takes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "QUIET", 0.1)
    with Progress(10, 0, "top1") as progress:
        time.sleep(0.6)  # a long first step
        first = capfd.readouterr().err
        assert "step 1/10 · at work for" in first
        progress.begin("step 2/10")
        for batch in range(1, 8):
            time.sleep(0.05)
            progress.evaluating(batch, 7)
        assert "evaluating · batch" in capfd.readouterr().err
        progress.printed -= 1
        progress.step(2, {"loss": 1.0, "images_per_second": 3.21, "data_wait": 0.0})
        *_, row = capfd.readouterr().err.splitlines()
        assert row.split()[:4] == ["2", "1.000", "3.2", "0%"]


def progress_entry(loss: float = 1.234, **more: float) -> dict[str, float]:
    return {
        "loss": loss,
        "lr": 9.6e-4,
        "grad_norm": 1.24,
        "memory_mb": 312.0,
        "images_per_second": 181.2,
        "data_wait": 0.02,
        **more,
    }


@pytest.mark.parametrize(
    ("total", "step", "entry"),
    [
        (440, 120, progress_entry()),
        (1_501_200, 1_501_100, progress_entry(loss=12345.6, lr=1e-7, grad_norm=98765.4, images_per_second=98765.4)),
        (1_501_200, 3, progress_entry(loss=-0.00012, lr=1.25e-10, grad_norm=1e12, memory_mb=120_000, data_wait=1.0)),
        (10, 10, progress_entry(loss=float("nan"), grad_norm=float("inf"))),
    ],
)
def test_progress_has_all_values_in_80_columns(
    total: int, step: int, entry: dict[str, float], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a table of plain lines, and under the bar of a terminal."""
    progress = Progress(total, 0, "top1", steps_per_epoch=5)
    progress.began -= 3000.0
    progress.printed -= 100.0
    progress.step(step, entry)
    head, row = capfd.readouterr().err.splitlines()
    assert head.split() == list(Progress.COLUMNS)
    assert len(row.split()) >= len(Progress.COLUMNS)
    assert max(len(head), len(row)) <= 80

    said = io.StringIO()
    terminal = console.ErrorConsole(file=said, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "err", terminal)
    progress = Progress(total, 0, "top1", steps_per_epoch=5)
    progress.began -= 3000.0
    progress.step(step, entry)
    with terminal.capture() as captured:
        terminal.print(progress.bar.get_renderable())
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for word in ("epoch ", " left, ends ", "loss ", " lr ", "|grad| ", "B · ", " img/s", "wait "):
        assert word in text, text
    assert "…" not in text


def test_learning_rates_have_two_digits_and_speeds_no_more_than_they_mean(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1000)
    for step, (lr, rate, shown) in enumerate(
        [(9.6e-4, 5.69, "9.6e-4 5.7"), (1.3e-3, 99.97, "1.3e-3 100"), (0.0, 185.8, "0.0e0 186"), (1.0, 9, "1.0e0 9.0")]
    ):
        progress.printed -= 100
        progress.step(step + 1, {"lr": lr, "images_per_second": rate})
        assert shown in " ".join(capfd.readouterr().err.split())


def test_the_bar_of_an_evaluation_is_the_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """And training's again at the next step."""
    terminal = console.ErrorConsole(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "err", terminal)
    progress = Progress(400, 0, "mIoU")
    progress.step(200, progress_entry())
    for batch in range(1, 37):
        progress.evaluating(batch, 50)
        progress.evaluation_began -= 1.0
    with terminal.capture() as captured:
        terminal.print(progress.bar.get_renderable())
    assert "36/50 evaluating · 14 s left" in captured.get()
    assert "loss" not in captured.get()
    progress.step(201, progress_entry())
    with terminal.capture() as captured:
        terminal.print(progress.bar.get_renderable())
    assert "201/400" in captured.get()


def test_lines_have_the_main_scores_first_and_no_counts() -> None:
    boxes = [f"box_{name}" for name in ("AP", "AP50", "AP75", "AP_s")]
    both = [*boxes, *(name.replace("box", "mask") for name in boxes)]
    assert console.main_metrics(both) == ["box_AP", "mask_AP", "box_AP50", "box_AP75", "mask_AP50", "mask_AP75"]
    assert console.main_metrics(["mIoU", "mAcc", "aAcc", "num_present"]) == ["mIoU", "mAcc", "aAcc"]
    assert console.main_metrics(["top1", "top5", "nll"]) == ["top1", "top5", "nll"]


def test_each_evaluation_says_the_change_since_the_best(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress(100, 0, "box_AP")
    numbers = {f"{kind}_{name}": 12.5 for kind in ("box", "mask") for name in ("AP", "AP50", "AP75", "AP_s")}
    progress.evaluated(10, numbers, None)
    progress.evaluated(20, {"box_AP": 14.0}, 12.5)
    progress.evaluated(30, {"box_AP": 13.0}, 14.0)
    progress.evaluated(40, {"box_AP": 14.0}, 14.0)
    first, better, worse, equal = capfd.readouterr().err.splitlines()
    assert first.startswith("step 10 · evaluated: box_AP 12.50 · mask_AP 12.50")
    assert len(first) <= 80
    assert better == "step 20 · evaluated: box_AP 14.00 (+1.50, the best)"
    assert worse == "step 30 · evaluated: box_AP 13.00 (-1.00 from the best)"
    assert equal == "step 40 · evaluated: box_AP 14.00 (equal to the best, and kept in its place)"


def test_standard_error_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    said = console.ErrorConsole(file=os.fdopen(write, "w", buffering=1))
    monkeypatch.setattr(console, "err", said)
    console.notice("x")
    console.warn("y")
    assert said.quiet
    with contextlib.suppress(BrokenPipeError):
        said.file.close()


def test_durations_are_said_as_people_say_them() -> None:
    said = [console.about(seconds) for seconds in (0.2, 40, 100, 700, 9000, 60000, 2 * 86400, 13.2 * 86400)]
    assert said == ["1 s", "40 s", "1.7 min", "12 min", "2.5 h", "17 h", "2 d", "13 d"]


def test_the_others_wait_for_the_main_process_longer_than_an_exchange_may_take(tmp_path: Path) -> None:
    """It may wait for another study's run, or read a large data set."""
    fresh.run_two(Path(__file__).parent / "main_process_takes_long.py", tmp_path)
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["done", "done"]


def test_one_gpu_by_its_number_is_refused_for_several_processes(
    hcnet: Hcnet, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(inputs, "has_no_cuda", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = hcnet("pretrain", "--recipe", "small", "--data", folder_of_images, "--device", "cuda:0", "--out", tmp_path)
    assert done.code == 2, done.err
    assert "--device cuda:0 would put the 2 processes of this machine on one GPU." in done.err


@pytest.mark.parametrize(
    ("count", "shown"), [(28_620_000, "28.62"), (2_570, "0.00257"), (850_300, "0.85"), (0, "0.00")]
)
def test_small_counts_are_not_rounded_to_nothing(count: int, shown: str) -> None:
    assert units(count, 1e6) == shown
