"""Two processes under torchrun, a signal at a random moment: all is saved, nobody is left, the run goes on bit for bit.

`make signals` runs ten moments of each signal. A moment lies anywhere between the first step and the end, evaluations
and checkpoints included. The run goes on with 2 processes, or with 1 after 2 and 2 after 1.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment
from test_torchrun import RUN, assert_same, documented

from hcnet_cli import runs

MOMENTS = int(os.environ.get("HCNET_SIGNALS", "0"))
pytestmark = pytest.mark.skipif(not MOMENTS, reason="minutes of training: make signals")
STEPS = 120  # of the run
LIMIT = 15.0  # seconds until everything is saved
ORDERS = ((2, 2), (1, 2), (2, 1))  # processes before the signal, and after it


def line(processes: int, data: Path, out: Path) -> list[str]:
    run = [*RUN, "--data", str(data), "--out", str(out), "--set", "train.eval_every=4", "--set", "train.log_every=2"]
    if processes == 2:
        return [*documented("torchrun --signals-to-handle"), *run]
    return [sys.executable, "-m", "hcnet_cli", *run, "--accumulate", "2"]


def left_of(out: Path) -> list[str]:
    """The command lines of processes that are still there and were given this folder; torchrun's have own sessions."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if str(out) in line]


@pytest.fixture(scope="module")
def expected(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process in two parts."""
    out = tmp_path_factory.mktemp("expected")
    subprocess.run(line(1, folder_of_images, out / "one"), env=environment(), check=True, capture_output=True)
    return out / "one" / "runs" / "mine"


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_at_a_random_moment(
    name: str, moment: int, folder_of_images: Path, tmp_path: Path, expected: Path
) -> None:
    draw = random.Random(f"{name} {moment}")
    before, after = ORDERS[moment % len(ORDERS)]
    record, log = (tmp_path / "runs" / "mine" / file for file in ("run.json", "metrics.jsonl"))
    process = subprocess.Popen(line(before, folder_of_images, tmp_path), env=environment(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    deadline, step = time.monotonic() + 600, draw.randrange(STEPS - 10)
    while max((entry["step"] for entry in runs.read_log(log)), default=-1) < step:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.2))
    process.send_signal(getattr(signal, name))
    sent = time.monotonic()
    status = ""
    while status not in ("interrupted", "finished") and time.monotonic() < sent + 4 * LIMIT:
        status = runs.read_record(record).status
        time.sleep(0.02)
    saved = time.monotonic() - sent
    _, err = process.communicate(timeout=300)
    ended = time.monotonic() - sent
    info = runs.read_record(record)
    print(
        f"{name}: {before} -> {after} processes, step {info.steps_done}: saved in {saved:.1f} s, ended in {ended:.1f} s"
    )
    assert status in ("interrupted", "finished"), err
    assert saved < LIMIT
    assert left_of(tmp_path) == []
    done = subprocess.run(line(after, folder_of_images, tmp_path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "runs" / "mine", expected)
