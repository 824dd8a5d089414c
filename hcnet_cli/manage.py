"""The runs of a results folder: listed, shown, removed and renamed. Torch-free."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hcnet_cli import grouping, runs
from hcnet_cli.console import UserError, counted, duration, notice
from hcnet_cli.files import writing
from hcnet_cli.last_step import last_step
from hcnet_cli.results import command
from hcnet_cli.runs import RunFolder, RunInfo
from hcnet_cli.study.record import read_studies
from hcnet_cli.table import Column, Row, Table, Value, number
from hcnet_cli.tasks import TASKS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}")
COLUMNS = (Column("run", "run"), Column("state", "state"), Column("score", "score"), Column("size", "size"))


def size_of(folder: Path) -> int:
    """Bytes of a file, or of all files in a folder and below; links are not followed."""
    total = 0 if folder.is_dir() else folder.lstat().st_size
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return total


def in_units(num_bytes: int) -> str:
    """12 kB, 3.4 MB or 5.6 GB."""
    for unit, step in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= step:
            return f"{num_bytes / step:.1f} {unit}"
    return f"{-(-num_bytes // 1000)} kB"


def listed(results: Path) -> tuple[Table, list[str]]:
    """The runs of a folder, unfinished ones first, then the latest first; and a line for each folder that is none."""
    good, broken = runs.find_runs(results)
    rows, total = [], 0
    latest = sorted(good, key=lambda one: one[1].finished or one[1].started, reverse=True)
    for folder, info in sorted(latest, key=lambda one: one[1].status == "finished"):
        size = size_of(folder)
        total += size
        values: dict[str, Value] = {
            "run": folder.name,
            "score": _score(info),
            "size": in_units(size),
            "state": _state(folder, info),
        }
        rows.append(Row("measured", values))
    unfinished = sum(info.status != "finished" for _, info in good)
    notes = [f"{counted(len(good), 'run')}, {unfinished} unfinished, {in_units(total)} in all."]
    if any(runs.FINGERPRINT.fullmatch(folder.name[-8:]) for folder, _ in good):
        notes.append("The last eight characters of a long name are enough: hcnet runs show 1a2b3c4d.")
    if unfinished:
        notes.append("The command that started a run goes on with it: hcnet runs show RUN prints it.")
    lines = [f"Not counted: {reason}" for _, reason in broken]
    return Table("runs", f"Runs in {results / 'runs'}", COLUMNS, rows, notes), lines


def _state(folder: Path, info: RunInfo) -> str:
    """finished; 50 % where interrupted; running 50 % or failed 50 %: a row fits into 80 columns."""
    if info.status == "finished":
        return info.status
    share = f"{100 * last_step(folder, info) // max(1, info.steps_total)} %"
    return share if info.status == "interrupted" else f"{info.status} {share}"


def _score(info: RunInfo) -> str:
    spec = TASKS.get(info.task)  # None: of a task of another installation
    value = info.metrics.get(spec.primary.key) if spec else None
    return f"{spec.primary.title} {number(value, 'percent')}" if spec and value is not None else ""


def shown(folder: RunFolder) -> list[tuple[str, list[str]]]:
    """What is known of a run: names, each with its lines."""
    info = folder.require()
    data = info.data
    scores = [
        f"{name} {value:.3f}{f' ({info.metric_notes[name]})' if name in info.metric_notes else ''}"
        for name, value in info.metrics.items()
    ]
    sessions = [
        f"{one.started[:16].replace('T', ' ')}, from step {one.from_step:,}: {one.device}, code {one.code}"
        for one in info.all_sessions()
    ]
    early = ", stopped early" if info.stopped_early else ""
    entries = [entry for entry in sorted(folder.path.iterdir()) if not entry.name.startswith(".")]
    files = [f"{entry.name:<18} {in_units(size_of(entry))}" for entry in entries]
    made = [
        ("run", [str(folder.path)]),
        (
            "status",
            [f"{info.status}, step {last_step(folder.path, info):,} of {info.steps_total:,}{early}", info.error],
        ),
        ("not believed", [runs.contradiction(folder, info)]),
        ("model", [f"{info.model or info.size} {info.variant}".strip()]),
        (
            "data",
            [
                f"{data.name}: {data.num_train:,} training and {data.num_val:,} validation images",
                f"{data.path} ({data.digest})",
                *data.remarks(),
            ],
        ),
        ("recipe", [f"{info.protocol or 'own'}, seed {info.seed}, {counted(info.batch_size, 'image')} a step"]),
        ("changes", [grouping.changes_text(info)]),
        ("starts from", [str(info.init.get("source", ""))]),
        ("scores", scores),
        ("training", [duration(info.train_seconds) if info.train_seconds else ""]),
        ("sessions", sessions),
        ("command", [command(info.argv)]),
        ("files", files),
    ]
    kept = [(name, [line for line in lines if line]) for name, lines in made]
    return [(name, lines) for name, lines in kept if lines]


def remove(folder: RunFolder) -> None:
    """Removes the files that a run writes, and the folder if nothing else is in it. UserError while it is at work."""
    folder.require()
    with folder.lock():
        folder.remove()
    lock = folder.path / ".lock"
    with writing(folder.path):
        if [entry.name for entry in folder.path.iterdir()] == [lock.name]:
            lock.unlink()
        if any(folder.path.iterdir()):
            notice(f"Removed the run; {folder.path} holds other files too, and was left.")
        else:
            folder.path.rmdir()
            notice(f"Removed {folder.path}.")


def rename(folder: RunFolder, name: str, results: Path) -> Path:
    """Gives a run's folder another name beside it. UserError for a name that is taken or no name, and while it is at
    work or a study counts on its name.
    """
    folder.require()
    if not NAME.fullmatch(name):
        raise UserError(f'"{name}" cannot be the name of a run.', hint="Letters, digits and . _ = + - make a name.")
    target = folder.path.parent / name
    if os.path.lexists(target):
        raise UserError(f"{target} exists already.")
    if studies := counted_by(folder, results):
        raise UserError(f"The study {studies[0]} counts {folder.path.name} by its name, so it stays.")
    with folder.lock(), writing(target):
        os.rename(folder.path, target)
        (target / ".lock.json").unlink(missing_ok=True)  # which names this process
    return target


def counted_by(folder: RunFolder, results: Path) -> list[str]:
    """The studies of a results folder that have a run among their cells."""
    name = folder.path.resolve().name
    return [study.name for study in read_studies(results)[0] if any(cell.run == name for cell in study.cells)]


def started_from(folder: RunFolder, results: Path) -> list[str]:
    """The unfinished runs that start from the weights of this one, and need them to go on."""
    ours = {os.path.realpath(folder.path), os.path.realpath(folder.best)}
    return [
        path.name
        for path, info in runs.find_runs(results)[0]
        if info.status != "finished" and os.path.realpath(str(info.init.get("source") or os.devnull)) in ours
    ]
