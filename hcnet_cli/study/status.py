"""Where every cell of a study, or a single run on Slurm, is: from the records of runs, and squeue for what waits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import rich.box
import rich.table
from rich.text import Text

from hcnet_cli.console import UserError, counted, duration
from hcnet_cli.grouping import Run
from hcnet_cli.last_step import last_entries, logged_step, tail
from hcnet_cli.runs import RunFolder, RunInfo
from hcnet_cli.study import slurm
from hcnet_cli.study.record import linked_run, read_study
from hcnet_cli.study.runner import last_error
from hcnet_cli.table import is_number
from hcnet_cli.tasks import TASKS

STATES = ("finished", "running", "requeued", "waiting", "interrupted", "failed")
STYLES = {"finished": "green", "running": "cyan", "failed": "red"}
Queue = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class CellStatus:
    cell: str
    state: str  # one of STATES
    detail: str


@dataclass(frozen=True)
class StudyStatus:
    name: str
    cells: list[CellStatus]

    def __str__(self) -> str:
        counts = Counter(cell.state for cell in self.cells)
        known = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
        return f"{self.name}: {counted(len(self.cells), 'cell')}, {known}"

    @property
    def is_over(self) -> bool:
        return all(cell.state in ("finished", "failed", "interrupted") for cell in self.cells)

    def grid(self) -> rich.table.Table:
        grid = rich.table.Table("cell", "state", "", box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for cell in self.cells:
            grid.add_row(cell.cell, Text(cell.state, style=STYLES.get(cell.state, "")), cell.detail)
        return grid


def statuses(results: Path, name: str = "") -> tuple[list[StudyStatus], list[str]]:
    """Of the studies and single runs of a results folder, or of the one of this name, and what could not be known."""
    folders = [file.with_suffix("") for file in sorted((results / "studies").glob("*.json"))]
    folders += sorted(file.parent for file in (results / "slurm").glob("*/slurm.json"))
    if name:
        folders = [folder for folder in folders if folder.name == name]
        if not folders:
            raise UserError(f"There is no study {name} in {results}.", hint="`hcnet studies` lists them.")
    notes: list[str] = []
    queue: Queue | None = {}
    if any((folder / "slurm.json").exists() for folder in folders):
        try:
            queue = slurm.queue()
        except UserError as error:
            queue = None
            notes.append(f"{error} What waits in the queue is not known.")
    found = []
    for folder in folders:
        try:
            found.append(_study(folder, results, queue))
        except UserError as error:
            notes.append(str(error))
    return found, notes


def _study(folder: Path, results: Path, queue: Queue | None) -> StudyStatus:
    jobs = slurm.read_jobs(folder)
    file = folder.with_name(f"{folder.name}.json")
    if file.exists():
        record = read_study(file)
        cells = [(record.stem(cell), cell.run, cell.state, cell.error) for cell in record.cells]
    else:
        cells = [(stem, linked_run(folder / stem), "waiting", "") for stem in jobs]
    return StudyStatus(
        folder.name,
        [
            _cell(folder, results, stem, run, jobs.get(stem, ""), queue, state, error)
            for stem, run, state, error in cells
        ],
    )


def _cell(
    folder: Path, results: Path, stem: str, run: str, job: str, queue: Queue | None, state: str, error: str
) -> CellStatus:
    """`state`, `error`: as the record of a study without Slurm has them."""
    info, place = None, RunFolder(results / "runs" / run)
    if run:
        try:
            info = place.read()
        except UserError as unreadable:
            return CellStatus(stem, "failed", str(unreadable))
    if info and Run(place.path, info).finished:
        value = info.metrics.get(TASKS[info.task].primary.key) if info.task in TASKS else None
        metric = f"{TASKS[info.task].primary.key} {value:.2f}" if is_number(value) else ""
        return CellStatus(stem, "finished", metric)
    at = f"step {info.steps_done} of {info.steps_total}" if info else ""
    starts = len(slurm.attempts(folder, stem))
    slurm_state, reason = (queue or {}).get(job, ("", ""))
    if slurm_state == "PENDING":
        words = [at, f"start {starts + 1}" if starts else "", reason, f"job {job}"]
        return CellStatus(stem, "requeued" if starts else "waiting", ", ".join(filter(None, words)))
    if slurm_state or (info and info.status == "running"):
        return CellStatus(
            stem, "running", ", ".join(filter(None, [*_progress(place, info), f"job {job}" if job else ""]))
        )
    if info and info.status == "failed":
        return CellStatus(stem, "failed", info.error or at)
    message = _last_error(folder / f"{stem}.log") if starts or state == "failed" else ""
    if message or state == "failed":
        return CellStatus(stem, "failed", message or error)
    if info:
        return CellStatus(stem, "interrupted", f"saved at {at}; the same command goes on")
    if job:
        return CellStatus(stem, "waiting", "not known" if queue is None else "no longer in the queue: submit it again")
    return CellStatus(stem, "waiting", "")


def _progress(place: RunFolder, info: RunInfo | None) -> list[str]:
    """How far, how long still, and where."""
    if info is None:
        return ["starting"]
    step, rate = logged_step(place.path, info), info.train_images_per_second
    for entry in last_entries(place.log_file):
        rate = entry.get("images_per_second", rate)
    share = f" ({100 * step // info.steps_total} %)" if info.steps_total else ""
    left = f"{duration((info.steps_total - step) * info.batch_size / rate)} left" if rate else ""
    return [f"step {step} of {info.steps_total}{share}", left, f"on {info.node}" if info.node else ""]


def _last_error(log: Path) -> str:
    """The last line that a cell's log calls an error; "" if there is none."""
    found = last_error(tail(log))[0]
    return found if f"error: {found}" in tail(log) else ""
