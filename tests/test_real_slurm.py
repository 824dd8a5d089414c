"""Protects studies on a real Slurm (tests/real_slurm.py): whatever it does to the cells, the table is that of --jobs.

One quick test is in the suite. `make slurm` (HCNET_SLURM=1) runs all: a requeued job waits for two minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL_MODEL, environment, outcome
from real_slurm import Slurm, cluster, wait_for

from hcnet_cli import runs

slow = pytest.mark.skipif("HCNET_SLURM" not in os.environ, reason="takes minutes: make slurm")
SMALL = ("--recipe", "digits", *SMALL_MODEL, "--set", "data.img_size=16", "--set", "train.log_every=5")
SMALL += ("--device", "cpu", "--set", "train.workers=0")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def hcnet(slurm: Slurm, *arguments: str | Path) -> str:
    env = {**environment(), **slurm.environment, "GIT_DIR": str(slurm.root)}  # somebody may commit meanwhile
    line = [sys.executable, "-m", "hcnet_cli", *map(str, arguments)]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def states(slurm: Slurm, results: Path, name: str) -> dict[str, str]:
    lines = hcnet(slurm, "studies", name, "--results", results).splitlines()
    return {line.split()[0]: line.split()[1] for line in lines[4:] if len(line.split()) > 1}


def step_of(results: Path, name: str, cell: str) -> int:
    log = results / "studies" / name / f"{cell}.run" / "metrics.jsonl"
    return max((entry.get("step", 0) for entry in runs.read_log(log)), default=0) if log.exists() else 0


def assert_same_table(slurm: Slurm, ours: Path, theirs: Path) -> None:
    """Equal weights and scores, and equal tables to the byte."""
    folders = {path.name: path for path in (theirs / "runs").iterdir()}
    assert sorted(folders) == sorted(path.name for path in (ours / "runs").iterdir())
    for name, folder in folders.items():
        assert outcome(ours / "runs" / name) == outcome(folder), name
    tables = [table(slurm, results) for results in (ours, theirs)]
    assert tables[0] == tables[1]
    assert "no-gate" in tables[0]


MEASURED = (
    "images_per_second",
    "memory_mb",
    "speed_notes",
    "command",
    "finished",
)  # differs between two runs of one study


def table(slurm: Slurm, results: Path) -> str:
    """The table of the study without times, speeds and the command."""
    shown = json.loads(hcnet(slurm, "report", "--results", results, "--table", "ablation", "--format", "json"))

    def kept(value: object) -> object:
        if isinstance(value, dict):
            return {key: kept(one) for key, one in value.items() if key not in MEASURED}
        if isinstance(value, list):
            notes = [one for one in value if isinstance(one, str) and ("images/s" in one or "in all on" in one)]
            return [kept(one) for one in value if one not in notes]
        return value

    return json.dumps(kept(shown), indent=1)


def test_an_array_with_a_throttle_is_the_study_of_one_machine(
    slurm: Slurm, folder_of_images: Path, tmp_path: Path
) -> None:
    study = ("ablate", "--disable", "gate", *SMALL, "--epochs", "1", "--set", "train.batch_size=8")
    study += ("--data", str(folder_of_images), "--seeds", "0", "--out")
    hcnet(slurm, *study, tmp_path / "slurm", "--on", "slurm", "--at-once", "1", "--cpus", "1")
    at_once = []

    def over() -> bool:
        at_once.append(list(slurm.jobs().values()).count("RUNNING"))
        return not slurm.jobs()

    wait_for(over, 200, "the study")
    assert max(at_once) == 1
    hcnet(slurm, *study, tmp_path / "here")
    assert_same_table(slurm, tmp_path / "slurm", tmp_path / "here")
    (file,) = (tmp_path / "slurm" / "studies").glob("*.json")
    assert states(slurm, tmp_path / "slurm", file.stem) == {"full-s0": "finished", "no-gate-s0": "finished"}
    info = runs.read_record(file.with_suffix("") / "full-s0.run" / "run.json")
    assert (info.node, info.restarts) == (slurm.host, 0)
    assert info.job.endswith("_0")
    assert info.sessions[0].job == info.job


@slow
@pytest.mark.timeout(3000)
def test_whatever_slurm_does_to_the_cells(slurm: Slurm, folder_of_images: Path, tmp_path: Path) -> None:
    """Preempted by a higher partition, requeued by hand, cancelled and submitted again, a node that fails."""
    ours = tmp_path / "slurm"
    study = ("ablate", "--disable", "gate", *SMALL, "--epochs", "480", "--set", "train.batch_size=8")
    study += ("--set", "train.eval_every=160", "--data", str(folder_of_images), "--seeds", "0,1", "--out")
    submit = (*study, ours, "--on", "slurm", "--at-once", "2", "--cpus", "1", "--partition", "main")
    hcnet(slurm, *submit)
    (file,) = (ours / "studies").glob("*.json")
    name = file.stem
    jobs = json.loads((file.with_suffix("") / "slurm.json").read_text())

    def wait_for_step(least: int, *cells: str) -> None:
        wait_for(lambda: all(step_of(ours, name, cell) >= least for cell in cells), 600, f"step {least} of {cells}")

    def wait_for_state(state: str, *cells: str) -> None:
        wait_for(lambda: all(states(slurm, ours, name)[cell] == state for cell in cells), 600, f"{cells} {state}")

    wait_for_step(10, "full-s0", "no-gate-s0")
    slurm.command("sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 2")
    wait_for_state("requeued", "full-s0", "no-gate-s0")
    wait_for_step(10, "full-s1", "no-gate-s1")
    slurm.command("scontrol", "requeue", jobs["full-s1"])
    slurm.command("scancel", jobs["no-gate-s1"])
    wait_for_state("requeued", "full-s1")
    wait_for_state("interrupted", "no-gate-s1")
    reached = step_of(ours, name, "full-s0")
    wait_for_step(reached + 10, "full-s0")
    slurm.kill_node()
    wait_for_state("requeued", "full-s0")
    slurm.start_node()
    hcnet(slurm, *submit)  # the cancelled cell alone
    again = json.loads((file.with_suffix("") / "slurm.json").read_text())
    assert {cell for cell in jobs if jobs[cell] != again[cell]} == {"no-gate-s1"}
    wait_for(lambda: not slurm.jobs(), 1200, "the study")
    hcnet(slurm, *study, tmp_path / "here", "--jobs", "2")
    assert_same_table(slurm, ours, tmp_path / "here")
    infos = {cell: runs.read_record(file.with_suffix("") / f"{cell}.run" / "run.json") for cell in jobs}
    for cell, info in infos.items():
        print(cell, [(one.job, one.restarts, one.from_step) for one in info.sessions])
        assert len(info.sessions) >= 2, cell
    assert infos["full-s0"].restarts >= 2


@slow
@pytest.mark.timeout(1500)
def test_a_time_limit_is_a_pause(slurm: Slurm, folder_of_images: Path, tmp_path: Path) -> None:
    run = ("pretrain", *SMALL, "--epochs", "800", "--batch-size", "8", "--set", "train.eval_every=200")
    run += ("--data", str(folder_of_images), "--name", "mine", "--out")
    hcnet(slurm, *run, tmp_path / "slurm", "--on", "slurm", "--time", "60", "--cpus", "1")
    ours = tmp_path / "slurm" / "runs" / "mine"
    log, (job,) = ours / "metrics.jsonl", slurm.jobs()
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3, 300, "the first steps")
    began = time.monotonic()
    minutes = int(slurm.command("squeue", "--noheader", f"--jobs={job}", "--format=%M").split(":")[0])
    slurm.command("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")  # within the warning of 180 s
    wait_for(lambda: slurm.jobs().get(job) == "PENDING", 180, "the requeue")
    print(f"requeued after {time.monotonic() - began:.0f} s")
    slurm.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for(lambda: not slurm.jobs(), 1200, "the run")
    hcnet(slurm, *run, tmp_path / "here")
    assert outcome(ours) == outcome(tmp_path / "here" / "runs" / "mine")
    sessions = runs.read_record(ours / "run.json").sessions
    print([(one.job, one.restarts, one.from_step) for one in sessions])
    assert [one.restarts for one in sessions] == [0, 1]
    assert sessions[1].from_step > 0
