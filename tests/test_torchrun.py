"""Protects what torchrun does to a run: signals, mistakes, several nodes. The lines are those of docs/slurm.md."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh
import pytest
from conftest import SMALL_MODEL, environment, outcome
from real_slurm import free_port

from hcnet_cli import runs

PAGE = (Path(__file__).parent.parent / "docs" / "slurm.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
RUN = ("pretrain", "--recipe", "digits", *SMALL_MODEL, "--set", "data.img_size=16", "--device", "cpu", "--workers", "0")
RUN += ("--epochs", "40", "--batch-size", "8", "--set", "train.eval_every=20", "--name", "mine")
RUN += ("--set", "train.log_every=20")


def documented(beginning: str, **changes: str) -> list[str]:
    """The launcher of a line of the page, on this machine, with the values of some of its options changed."""
    (line,) = [line for line in LINES if line.startswith(beginning)]
    words = shlex.split(line)
    for option, value in {"nproc_per_node": "2", **changes}.items():
        words[words.index("--" + option.replace("_", "-")) + 1] = value
    start = words.index("torchrun")
    return [sys.executable, "-m", "torch.distributed.run", *words[start + 1 : words.index("-m")], "-m", "hcnet_cli"]


@pytest.fixture(scope="module")
def whole(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that computes each step in two parts: the numbers of two processes."""
    out = tmp_path_factory.mktemp("whole")
    done = fresh.run(*RUN, "--data", folder_of_images, "--out", out, "--accumulate", "2")
    assert done.code == 0, done.err
    return out / "runs" / "mine"


def assert_same(ours: Path, theirs: Path) -> None:
    left, right = outcome(ours), outcome(theirs)
    assert left.pop("log")[-1] == right.pop("log")[-1]  # the gradient's norm is that of one process, losses are means
    assert left == right


def test_sigusr1_saves_and_the_run_goes_on_by_one_process(whole: Path, folder_of_images: Path, tmp_path: Path) -> None:
    """Without orphans; the record, not the exit code, says that everything is saved."""
    run = (*RUN, "--data", str(folder_of_images), "--out", str(tmp_path))
    line = [*documented("torchrun --signals-to-handle"), *run]
    process = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, start_new_session=True, text=True)
    record, log = (tmp_path / "runs" / "mine" / name for name in ("run.json", "metrics.jsonl"))
    deadline = time.monotonic() + 200
    while not log.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    info = runs.read_record(record)
    assert info.status == "interrupted"
    assert "everything is saved" in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    done = fresh.run(*run, "--accumulate", "2")
    assert done.code == 0, done.err
    assert_same(tmp_path / "runs" / "mine", whole)


def test_two_nodes_give_the_numbers_of_one(whole: Path, folder_of_images: Path, tmp_path: Path) -> None:
    """While the time that they wait for each other is measured."""
    launcher = documented("torchrun --nnodes", nproc_per_node="1", rdzv_endpoint=f"127.0.0.1:{free_port()}")
    line = [*launcher, *RUN, "--data", str(folder_of_images), "--out", str(tmp_path), "--profile", "2"]
    nodes = [subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for node in nodes:
        _, err = node.communicate(timeout=250)
        assert node.returncode == 0, err
    assert runs.read_record(tmp_path / "runs" / "mine" / "run.json").processes == 2
    assert "| all-reduce " in (tmp_path / "runs" / "mine" / "profile" / "profile.md").read_text()
    assert_same(tmp_path / "runs" / "mine", whole)


def test_a_mistake_is_the_last_thing_that_torchrun_says(tmp_path: Path) -> None:
    line = [
        *documented("torchrun --signals-to-handle"),
        *RUN,
        "--data",
        str(tmp_path / "nothing"),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("Root Cause") :]
    sentence = re.search(r"traceback : error: (.*)", last)
    assert sentence is not None, last
    assert "nothing" in sentence[1]
    assert "rank      : 0" in last
    assert done.stderr.count(f"error: {sentence[1]}") == 2  # when it happened, and there


def test_the_line_for_srun_is_that_of_one_node(tmp_path: Path) -> None:
    """It starts the documented torchrun."""
    (line,) = [line for line in LINES if line.startswith("srun")]
    (one,) = [line for line in LINES if line.startswith("torchrun --nnodes")]
    assert line.endswith(one)
