"""Protects trackers: TensorBoard's own reader finds each logged number once, and no tracker can disturb a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_MODEL, Done, outcome

from hcnet_cli import track
from hcnet_cli.console import UserError
from hcnet_cli.runs import RunFolder, read_log
from hcnet_cli.track.sending import Tail, send

Hcnet = Callable[..., Done]
PAGE = (Path(__file__).parent.parent / "docs" / "inside-a-run.md").read_text()
Points = dict[str, list[tuple[int, float]]]  # tag -> steps and values


def shown(folder: Path) -> Points:
    """What TensorBoard shows, in float32."""
    pytest.importorskip("tensorboard", reason="pip install 'hcnet[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "track" / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def logged(entries: list[dict[str, Any]]) -> Points:
    points: Points = {}
    for entry in entries:
        for key, value in entry.items():
            if key != "step":
                points.setdefault(f"{'train' if 'lr' in entry else 'val'}/{key}", []).append((entry["step"], value))
    return points


def assert_shown(folder: Path, entries: list[dict[str, Any]]) -> None:
    found, expected = shown(folder), logged(entries)
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag


def entries(upto: int) -> list[dict[str, Any]]:
    """A line of training at each step, an evaluation at each fourth."""
    made: list[dict[str, Any]] = []
    for step in range(1, upto + 1):
        made.append({"step": step, "lr": 0.1 / step, "loss": 2.0 / step})
        if step % 4 == 0:
            made.append({"step": step, "top1": 10.0 * step})
    return made


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    pytest.importorskip("tensorboard", reason="pip install 'hcnet[tensorboard]'")
    return RunFolder(tmp_path)


def write(run: RunFolder, lines: list[dict[str, Any]]) -> None:
    run.log_file.unlink(missing_ok=True)
    for line in lines:
        run.append(**line)


def test_a_run_that_goes_on_stays_one_run(run: RunFolder) -> None:
    """Sent up to step 8 without its evaluation; killed; gone on with from step 5; sent at every stop."""
    write(run, entries(8)[:-1])
    assert send(run, "tensorboard") == 9
    assert_shown(run.path, entries(8)[:-1])
    write(run, entries(5))
    assert send(run, "tensorboard") == 0
    assert_shown(run.path, entries(7))  # step 8 comes again, and its evaluation
    write(run, entries(8))
    assert send(run, "tensorboard") == 2
    write(run, entries(13))
    send(run, "tensorboard")
    assert_shown(run.path, entries(13))


def test_what_was_sent_and_not_noted_is_not_doubled(run: RunFolder) -> None:
    """The sender is killed between the two; then its note is gone altogether."""
    write(run, entries(3))
    send(run, "tensorboard")
    kept = run.path / "track" / "tensorboard.json"
    before = kept.read_text()
    write(run, entries(9))
    send(run, "tensorboard")
    kept.write_text(before)
    send(run, "tensorboard")
    assert_shown(run.path, entries(9))
    for damage in ("", "[]", '{"step": "x"}'):
        kept.write_text(damage)
        send(run, "tensorboard")
        assert_shown(run.path, entries(9))


def test_what_was_sent_is_not_sent_again(run: RunFolder) -> None:
    """Nor after it was gone back and nothing came: step 8 is forgotten once. What was removed is sent again."""
    events = run.path / "track" / "tensorboard"
    for written, first in ((entries(8), 10), (entries(5), 0), (entries(9), 3)):
        write(run, written)
        assert send(run, "tensorboard") == first
        made = list(events.iterdir())
        assert [send(run, "tensorboard"), send(run, "tensorboard")] == [0, 0]
        assert list(events.iterdir()) == made
    assert_shown(run.path, entries(9))
    shutil.rmtree(events)
    assert send(run, "tensorboard") == 11
    assert_shown(run.path, entries(9))


def test_a_line_that_is_not_whole_is_left_for_later(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    tail = Tail(log)
    assert tail.read() == []
    log.write_text('{"step": 1}\nno entry\n{"st')
    assert tail.read() == [{"step": 1}]
    with log.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.read() == [{"step": 2}]
    assert tail.read() == []


def test_two_processes_do_not_send_at_once(run: RunFolder) -> None:
    write(run, entries(1))

    def training() -> bool:
        with pytest.raises(UserError, match="Another process sends"):
            send(run, "tensorboard")
        return False

    assert send(run, "tensorboard", training) == 1


def test_a_run_is_followed_and_sent_later(
    folder_of_images: Path, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented lines: while it trains, and afterwards, which adds nothing."""
    pytest.importorskip("tensorboard", reason="pip install 'hcnet[tensorboard]'")
    while_training, afterwards = [
        line.split("   ")[0] for line in PAGE.splitlines() if line.startswith("hcnet") and "track" in line
    ]
    monkeypatch.setattr(track, "PATIENCE", 200.0)
    assert while_training == "hcnet pretrain --track tensorboard"
    assert afterwards == "hcnet track results/runs/RUN --to tensorboard"
    done = hcnet(*arguments(folder_of_images, tmp_path), "--name", "one", *while_training.split()[2:])
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "one"
    assert_shown(run, read_log(run / "metrics.jsonl"))
    done = hcnet("track", "one", "--out", tmp_path, *afterwards.split()[3:])
    assert done.code == 0, done.err
    assert_shown(run, read_log(run / "metrics.jsonl"))
    again = hcnet(*arguments(folder_of_images, tmp_path), "--name", "one", "--track", "tensorboard")
    assert "Nothing was tracked: `hcnet track" in again.err


def arguments(data: Path, results: Path) -> tuple[str | Path, ...]:
    small = ("--set", "data.img_size=16", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--recipe", "small")
    length = ("--set", "schedule.length=6", "--set", "train.eval_every=3", "--set", "train.log_every=1")
    return ("pretrain", *SMALL_MODEL, *small, *length, "--data", data, "--out", results)


FAULTS = {
    "hangs": "import time\nwhile True: time.sleep(1)\n",
    "raises": "raise RuntimeError('no tracker today')\n",
    "is killed": "import os\nos.kill(os.getpid(), 9)\n",
}


def test_a_tracker_cannot_touch_training(
    folder_of_images: Path, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as without, and the command says what is left to send."""
    pytest.importorskip("tensorboard", reason="pip install 'hcnet[tensorboard]'")
    done = hcnet(*arguments(folder_of_images, tmp_path), "--name", "without")
    assert done.code == 0, done.err
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def noting(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(track.subprocess, "Popen", noting)
    for fault, code in FAULTS.items():
        package = tmp_path / fault / "tensorboard"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        with monkeypatch.context() as patch:
            patch.setattr(track, "PATIENCE", 1.0 if fault == "hangs" else 200.0)
            patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / fault), *filter(None, sys.path)]))
            done = hcnet(*arguments(folder_of_images, tmp_path), "--name", fault, "--track", "tensorboard")
        assert done.code == 0, done.err
        assert outcome(tmp_path / "runs" / fault) == outcome(tmp_path / "runs" / "without")
        assert f"tensorboard {'did not finish' if fault == 'hangs' else 'failed'}" in done.err
        assert started[-1].poll() is not None
    assert "no tracker today" in (tmp_path / "runs" / "raises" / "track" / "tensorboard.log").read_text()
    done = hcnet("track", "is killed", "--out", tmp_path, "--to", "tensorboard")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "is killed"
    assert_shown(run, read_log(run / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--track", "tensorbord"), 'There is no tracker "tensorbord". Did you mean "tensorboard"?'),
        (("--track", "tensorboard", "--dry-run"), "--dry-run trains nothing: it cannot be combined with --track"),
    ],
)
def test_a_mistake_is_a_sentence(given: tuple[str, ...], sentence: str, hcnet: Hcnet) -> None:
    done = hcnet("pretrain", *given)
    assert done.code == 2
    assert sentence in done.err


def test_a_tracker_that_is_not_installed_is_a_sentence(hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    done = hcnet("pretrain", "--track", "tensorboard")
    assert done.code == 2
    assert "pip install 'hcnet[tensorboard]'" in done.err


def test_a_folder_of_that_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases itself makes a folder `wandb` where a script runs."""
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(track, "TRACKERS", ("a_tracker",))
    with pytest.raises(UserError, match="a_tracker is not installed"):
        track.check_trackers("a_tracker")
