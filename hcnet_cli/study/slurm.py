"""Slurm: the array script, whose tasks are one cell each, and its commands sbatch, squeue and scontrol."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcnet_cli.console import UserError
from hcnet_cli.files import read_text, write_text
from hcnet_cli.plain_json import read_json
from hcnet_cli.privacy import mask_text

SAVE_SECONDS = 180  # before the time limit the run gets SIGUSR1; Slurm sends it up to a minute early
MAX_ARRAY_SIZE = 1001  # Slurm's default
FLAGS = {
    "array": "--at-once",
    "partition": "--partition",
    "time": "--time",
    "cpus-per-task": "--cpus",
    "gpus": "--gpus",
}
OURS = (  # options of sbatch that the script and its submission set
    *("output", "error", "open-mode", "dependency", "kill-on-invalid-dep", "wrap", "parsable", "requeue", "no-requeue"),
    *("chdir", "signal", "job-name", "nodes", *FLAGS),
)
SHORT = {"a": "array", "o": "output", "e": "error", "d": "dependency", "D": "chdir", "J": "job-name", "N": "nodes",
         "p": "partition", "t": "time", "c": "cpus-per-task", "G": "gpus"}  # fmt: skip
SCRIPT = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@{save_seconds}
{directives}
# {title}
# One array task is one cell, an ordinary run. `hcnet studies` shows the states of all.
cd {here} || exit

arms=({arms})
seeds=({seeds})
cell=$((SLURM_ARRAY_TASK_ID + ${{1:-0}}))  # the argument: the first cell of this array
arm=${{arms[cell % {num_arms}]}}
seed=${{seeds[cell / {num_arms}]}}
stem={stem}
{own}
command=({command})

exec >> "$stem-s$seed.log" 2>&1
export HCNET_LINK="$stem-s$seed.run"  # becomes a link to the run's folder
export HCNET_WAIT=1                   # another job may train the same run: wait for it
{environment}
attempt() {{ {python} -m hcnet_cli.study.attempt "$stem-s$seed" "$@"; }}
attempt start {restarts} || exit  # fails after {restarts} requeues without progress

trap 'kill -USR1 "$child"' USR1  # the time limit is near
trap 'kill -TERM "$child"' TERM  # preempted, or cancelled
"${{command[@]}}" &
child=$!
while wait "$child"; code=$?; kill -0 "$child" 2> /dev/null; do :; done

job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
case $(scontrol show job "$job") in
    *JobState=RUNNING*) attempt saved "$code" && scontrol requeue "$job" ;;  # else Slurm has requeued or cancelled it
esac
exit "$code"
"""


def _ours(word: str) -> str:
    """The option of sbatch that hcnet sets itself and that a word names, also in short; "" for none."""
    if not word.startswith("--"):
        return SHORT.get(word[1:2], "") if word.startswith("-") else ""
    name = word[2:].partition("=")[0]
    return name if name in OURS else next((one for one in OURS if len(name) > 1 and one.startswith(name)), "")


@dataclass(frozen=True)
class Cluster:
    """What a cell gets, in Slurm's words. `time`: as sbatch takes it; "" is the partition's own limit."""

    partition: str = ""
    gpus: int = 0
    cpus: int = 0  # 0: as many as Slurm gives
    time: str = ""
    at_once: int = 0  # cells of one array; 0: no limit
    args: str = ""  # further options of sbatch
    restarts: int = 3  # requeues without progress, after which a cell has failed

    def __post_init__(self) -> None:
        seconds(self.time)
        for word in (self.partition, self.args):
            if not word.isprintable():
                raise UserError("What sbatch is given must be one line of plain text.")
        if mask_text(self.args) != self.args:
            raise UserError(
                "--sbatch-args holds what looks like a password or a token, and the script is kept.",
                hint="sbatch also takes options from the environment (SBATCH_ACCOUNT and others).",
            )
        for word in self.words:
            if option := _ours(word):
                flag = f"Its flag is {FLAGS[option]}." if option in FLAGS else ""
                raise UserError(f"--sbatch-args cannot set {word}: hcnet does.", hint=flag)

    @property
    def words(self) -> list[str]:
        try:
            return shlex.split(self.args)
        except ValueError as error:
            raise UserError(f"--sbatch-args cannot be read: {error}.") from None

    @property
    def save_seconds(self) -> int:
        limit = seconds(self.time)
        return min(SAVE_SECONDS, limit // 3) if limit else SAVE_SECONDS

    def directives(self, name: str) -> str:
        wanted = {"job-name": name, "partition": self.partition, "time": self.time, "nodes": 1}
        wanted |= {"cpus-per-task": self.cpus, "gpus": self.gpus}
        lines = [f"--{key}={shlex.quote(str(value))}" for key, value in wanted.items() if value]
        return (
            "\n".join(f"#SBATCH {line}" for line in [*lines, *([shlex.join(self.words)] if self.args else [])]) + "\n"
        )

    def program(self, python: str) -> str:
        """What starts the training program: torchrun where a cell has several GPUs."""
        if self.gpus <= 1:
            return f"{python} -m hcnet_cli"
        signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun passes on those that it is told to
        return (
            f"{python} -m torch.distributed.run --standalone --nproc-per-node {self.gpus} "
            f"--signals-to-handle {signals} -m hcnet_cli"
        )

    def cost(self, cells: int) -> str:
        """What the cells use at most, in words."""
        unit, each = ("GPU", self.gpus) if self.gpus else ("core", self.cpus or 1)
        limit = seconds(self.time)
        if not limit:
            return f"{cells * each} {unit}s' time up to the partition's limit"
        return f"at most {cells * each * limit / 3600:,.1f} {unit}-hours before a requeue"


@dataclass(frozen=True)
class Array:
    """The cells of one task of a study, or a single run. Cell i has seed i // len(arms) and arm i % len(arms).

    Args:
        arguments: Of the training command, words of bash already quoted; `$stem`, `$arm`, `$seed`, "${own[@]}" are set.
        own: By arm, further arguments, quoted too.
        stem: Beginning of a cell's files, a word of bash with `$arm`.
    """

    name: str
    title: str
    arms: Sequence[str]
    seeds: Sequence[str]
    stem: str
    arguments: str
    own: Mapping[str, str] = field(default_factory=dict)
    file: str = "run.sh"

    def script(self, cluster: Cluster) -> str:
        cases = "".join(f"\n    {shlex.quote(arm)}) own=({words}) ;;" for arm, words in self.own.items())
        different = set(self.own.values()) or {""}
        own = f"own=({different.pop()})" if len(different) == 1 else f"case $arm in{cases}\nesac"
        python = quote(sys.executable)
        return SCRIPT.format(
            save_seconds=cluster.save_seconds,
            directives=cluster.directives(self.name),
            title=self.title,
            here=quote(os.getcwd()),
            arms=" ".join(map(shlex.quote, self.arms)),
            seeds=" ".join(map(shlex.quote, self.seeds)),
            num_arms=len(self.arms),
            stem=self.stem,
            own=own,
            command=f"{cluster.program(python)} {self.arguments}",
            environment=_environment(cluster),
            python=python,
            restarts=cluster.restarts,
        )


def _environment(cluster: Cluster) -> str:
    """Threads of a process: with task/none the affinity mask names all cores of a node, so Slurm's number is used."""
    if "OMP_NUM_THREADS" in os.environ:
        return f"export OMP_NUM_THREADS={shlex.quote(os.environ['OMP_NUM_THREADS'])}\n"
    cores, processes = "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}", max(1, cluster.gpus)
    share = cores if processes == 1 else f"$(({cores} > {processes} ? {cores} / {processes} : 1))"
    return f"export OMP_NUM_THREADS={share}\n"


def quote(text: str | Path) -> str:
    """One word of bash; the home folder as "$HOME", so that the script does not name its user."""
    text, home = str(text), os.path.expanduser("~")
    if len(home) > 1 and text.startswith(f"{home}/"):
        return f'"$HOME"{shlex.quote(text[len(home) :])}'
    return shlex.quote(text)


def seconds(time: str) -> int:
    """Of a time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; 0 for "". UserError for others."""
    if not time:
        return 0
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?", time)
    if not found or not any(map(int, filter(None, found.groups()))):
        raise UserError(f"--time {time} is no time limit.", hint="For example 90 (minutes), 12:00:00 or 2-00:00:00.")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None or len(parts) == 3:
        hours, minutes, second = (*parts, 0, 0)[:3]
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + second
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


# --- Slurm's commands -------------------------------------------------------------------------------------------------


def call(*line: str) -> str:
    """What a command of Slurm prints. UserError where it fails or is not there."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(
            f"There is no {line[0]} here.", hint="--on slurm is for a machine that submits to Slurm."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{line[0]} gave no answer in 2 minutes.") from None
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["it gave no reason"]
        raise UserError(f"{line[0]} failed: {reason[-1].rstrip('.')}.")
    return done.stdout


def queue() -> dict[str, tuple[str, str]]:
    """The user's jobs that wait or run: id (JOB_TASK for a task of an array) -> state, reason."""
    jobs = {}
    for line in call("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r").splitlines():
        name, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        jobs[name] = (state, reason)
    return jobs


def max_array_size() -> int:
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"))
    return max(1, int(found[1])) if found else MAX_ARRAY_SIZE


def ranges(numbers: Sequence[int]) -> str:
    """0-3,7 for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


@dataclass(frozen=True)
class Submission:
    """One call of sbatch: the array tasks of the cells `first`, `first` + 1 ... that are in `cells`."""

    script: Path
    first: int
    cells: Mapping[int, str]  # number of the array task -> stem of the cell's files, without the folder
    after: str = ""  # what they wait for, as sbatch takes it

    def line(self, cluster: Cluster) -> list[str]:
        limit = f"%{cluster.at_once}" if cluster.at_once else ""
        line = [
            "sbatch",
            "--parsable",
            f"--array={ranges(list(self.cells))}{limit}",
            f"--output={str(self.script.parent / 'slurm.log').replace('%', '%%')}",  # %j is a pattern, %% a percent
        ]
        if self.after:
            line += [f"--dependency={self.after}", "--kill-on-invalid-dep=yes"]
        return [*line, str(self.script), str(self.first)]


def split(script: Path, cells: Mapping[int, str], after: Mapping[int, str], size: int) -> list[Submission]:
    """Arrays of numbers below `size`. `after`: what a cell waits for, as sbatch takes it."""
    groups: dict[tuple[int, str], dict[int, str]] = {}
    for cell, stem in sorted(cells.items()):
        first = cell - cell % size
        groups.setdefault((first, after.get(cell, "")), {})[cell - first] = stem
    return [Submission(script, first, group, job) for (first, job), group in groups.items()]


def submit(one: Submission, cluster: Cluster) -> str:
    """The id of the job."""
    answer = call(*one.line(cluster)).strip().partition(";")[0]  # ID, or ID;CLUSTER
    if not answer.isdigit():
        raise UserError(f"The answer of sbatch, {answer!r:.80}, is not the number of a job.")
    return answer


# --- what was submitted -----------------------------------------------------------------------------------------------


def read_jobs(folder: Path) -> dict[str, str]:
    """Of a study's folder: stem of a cell -> the array task, JOB_TASK, that it was last submitted as."""
    file = folder / "slurm.json"
    if not file.exists():
        return {}
    content: Any = read_json(file)
    if not (isinstance(content, dict) and all(isinstance(one, str) for one in content.values())):
        raise UserError(f"{file} is not what hcnet wrote.", hint="Remove it; queued cells would be submitted again.")
    return content


def write_jobs(folder: Path, jobs: Mapping[str, str]) -> None:
    write_text(folder / "slurm.json", json.dumps(dict(jobs), indent=0) + "\n")


def forget_attempts(folder: Path, stems: Sequence[str]) -> None:
    """A new submission counts its requeues from the beginning."""
    for stem in stems:
        (folder / f"{stem}.attempts").unlink(missing_ok=True)


def attempts(folder: Path, stem: str) -> list[int]:
    """The step at which each attempt at a cell began."""
    file = folder / f"{stem}.attempts"
    return [int(line) for line in read_text(file).split() if line.isdigit()] if file.exists() else []
