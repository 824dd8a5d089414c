"""Runs the cells of a study, each an ordinary run in a process of its own, and keeps the study's record."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import rich.box
import rich.live
import rich.table
from rich.text import Text

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.console import UserError, counted, duration, err, launch, notice, warn
from hcnet_cli.files import write_text, writing
from hcnet_cli.finished import FINISHED
from hcnet_cli.grouping import Run
from hcnet_cli.recipe import Recipe
from hcnet_cli.study.analysis import Fixed, fix
from hcnet_cli.study.design import Design, check_seeds, model_arguments
from hcnet_cli.study.known import with_known
from hcnet_cli.study.machine import environment
from hcnet_cli.study.planning import later_seeds, power_lines
from hcnet_cli.study.record import Cell, Found, RunSearch, StudyRecord, Today, exclusive, find_run, read_earlier
from hcnet_cli.study.table import runs_by_name
from hcnet_cli.table import is_number
from hcnet_cli.tasks import TASKS

PROGRAM = (sys.executable, "-m", "hcnet_cli")
POLL_EVERY = 0.1  # seconds, the processes
SHOW_EVERY = 2.0  # seconds, the progress of the runs


@dataclass(frozen=True)
class Settings:
    """Where and how to run a study; no field changes a number."""

    read_data: Callable[[Recipe], str]  # the digest of a recipe's data
    results: Path = Path("results")
    device: str = "auto"
    jobs: int = 1
    fresh: bool = False  # start over finished runs of another code version, and broken ones
    argv: Sequence[str] = ()
    detect: float | None = None  # points, the difference that matters


def run(design: Design, settings: Settings) -> tuple[StudyRecord, int]:
    """Runs the cells that are not finished. Returns the record and the exit code: 0, 1 after a failed cell, or 128 +
    the number of the signal that stopped it (the running cells have saved, and the same command continues).

    UserError if the training program refuses the baseline at once, as it would every cell.
    """
    if launch().world_size > 1:
        raise UserError("An ablation starts its own processes.", hint="Run it without torchrun; see --jobs.")
    with exclusive(settings.results / "studies" / design.name):
        record, code = StudyProcess(design, settings).run()
        later = later_seeds(record, runs_by_name(settings.results)) if code == 0 else []
        if later:
            notice(
                f"The first stage is complete; by its spread ±{record.analysis.until:g} takes {len(later)} seeds more."
            )
            record, code = StudyProcess(design, settings, later).run()
        return record, code


@dataclass
class _Job:
    cell: Cell
    process: subprocess.Popen[bytes]
    began: float
    waiting: bool = False  # for another process that trains the same run


class StudyProcess:
    """The cells of a study with their states. Only `run` writes files and starts processes."""

    def __init__(self, design: Design, settings: Settings, later: Sequence[int] = ()) -> None:
        """`later`: the seeds of the second stage of `until`."""
        self.design = design
        self.later = later
        self.settings = settings
        self.folder = settings.results / "studies" / design.name
        self.several_tasks = len(design.tasks) > 1
        before = read_earlier(self.file)
        earlier = before.seeds_beside(design.seeds) if before and not design.analysis.until else []
        seeds = [*earlier, *design.seeds, *later]
        self.record = StudyRecord(
            name=design.name,
            title=design.title,
            argv=list(settings.argv),
            arms={arm: dict(changes) for arm, changes in design.arms.items()},
            tasks=list(design.tasks),
            seeds=seeds,
            asked=seeds,
            # seed by seed, so that a study that is stopped has whole pairs
            detect=settings.detect,
            cells=[Cell(arm=a, task=t, seed=s) for s in seeds for t in design.tasks for a in design.arms],
        )
        self.places = {(cell.arm, cell.task, cell.seed): cell for cell in self.record.cells}
        self.start_over: set[str] = set()  # names of runs
        self.today = Today(settings.read_data)
        self.jobs: dict[int, _Job] = {}
        self.durations: list[float] = []  # seconds, of the cells that finished
        self.stop = 0  # the number of a signal
        self.refused: UserError | None = None
        search = RunSearch(runs.find_runs(settings.results), self.today)
        self._adopt(search, before.cells if before else ())
        self.kept = self._keep_known(earlier)  # seeds that were not asked for
        finished = any(cell.state == "finished" for cell in self.record.cells)
        asked = Fixed(analysis=design.analysis, seeds=tuple(design.seeds))
        if before is None or not finished:
            asked = with_known(asked, design, search, before)
        self.record.primary = fix(asked, before.primary if before else None, finished)

    def _keep_known(self, earlier: Sequence[int]) -> list[int]:
        """Leaves out those of the earlier seeds that nothing is known of. With a result a seed stays: a choice among
        results would make any study significant.
        """
        known = {cell.seed for cell in self.record.cells if cell.state == "finished"}
        self.record.drop(set(earlier) - known)
        check_seeds(self.design, self.record.seeds)
        return sorted(set(earlier) & known)

    def notice_kept(self) -> None:
        """Says which seeds stay in the study though they were not asked for."""
        if self.kept:
            stay = f"Seeds with results stay in the study: {', '.join(map(str, self.kept))}"
            notice(f"{stay}. Without {self.file} it begins anew, from the same runs.")

    # -- cells and their runs --

    def source(self, cell: Cell) -> Cell | None:
        """The cell whose weights this one starts from."""
        return self.places.get((cell.arm, self.design.sources.get(cell.task, ""), cell.seed))

    def recipe(self, cell: Cell) -> Recipe:
        source = self.source(cell)
        init = str(self.settings.results / "runs" / source.run) if source else ""
        return self.design.recipe(cell.arm, cell.task, cell.seed, init)

    def ready(self, cell: Cell) -> bool:
        source = self.source(cell)
        return source is None or source.state == "finished"

    def label(self, cell: Cell) -> str:
        task = f" {cell.task}," if self.several_tasks else ""
        return f"{cell.arm},{task} seed {cell.seed}"

    def _adopt(self, search: RunSearch, before: Sequence[Cell]) -> None:
        """Enters the runs that exist already. The cells of before name runs whose data has another path since."""
        earlier = {(c.arm, c.task, c.seed): c for c in before}
        code, others = runs.git_state(), 0
        for cell in self.record.cells:
            if not self.ready(cell):
                continue
            old = earlier.get((cell.arm, cell.task, cell.seed))
            folder = search.find(self.recipe(cell), old)
            if folder is None:
                continue
            cell.run = folder.name
            if old and old.run == cell.run:
                cell.jobs = old.jobs
            run = Run(*search.names[cell.run]) if cell.run in search.names else None
            cell.fingerprint = run.info.fingerprint if run else ""
            foreign = run is None or any((s.git_commit, s.git_dirty) != code for s in run.info.all_sessions())
            if self.settings.fresh and foreign:
                self.start_over.add(cell.run)
            elif run is not None and run.finished:
                cell.state = "finished"
                others += foreign
        for what, names_of_old in self.today.changed.items():
            runs_like_these = f"{counted(len(names_of_old), 'run')} of this study"
            warn(f"{what} changed since {runs_like_these} began: the old results are not taken.")
        if others and any(cell.state != "finished" for cell in self.record.cells):
            warn(
                f"{others} finished runs are of another version of the code than this one; they will not be compared "
                "with runs made now. --fresh starts them over."
            )

    @property
    def file(self) -> Path:
        return self.folder.with_name(f"{self.design.name}.json")

    def write(self) -> None:
        write_text(self.file, self.record.model_dump_json(indent=1) + "\n")

    # -- the loop --

    def write_recipes(self) -> None:
        for (arm, task), recipe in self.design.recipes.items():
            file = self.folder / f"{self.record.recipe_stem(arm, task)}.yaml"
            write_text(file, rcp.dump_yaml(recipe))

    def run(self) -> tuple[StudyRecord, int]:
        cells = self.record.cells
        self.notice_kept()
        self.write_recipes()
        self.write()
        finished = sum(cell.state == "finished" for cell in cells)
        tasks = f" x {len(self.design.tasks)} tasks" if self.several_tasks else ""
        grid = f"{len(self.design.arms)} arms{tasks} x {len(self.record.seeds)} seeds = {len(cells)} runs"
        notice(f"{grid}{f', {finished} of them finished' if finished else ''} · {self.file}")
        if finished < len(cells):
            if not self.later:
                plan = power_lines(self.design, self.record, runs_by_name(self.settings.results))
                for name, text in plan.items():
                    notice(f"{name}: {text}")
            with self._signals(), self._show() as show:
                try:
                    self._work(show)
                finally:
                    for job in self.jobs.values():  # some are left only after an exception
                        job.process.kill()
        self.write()
        if self.refused:
            if not any(cell.state == "finished" for cell in cells):
                self.file.unlink()
            raise self.refused
        if self.stop:
            notice("Stopped; the runs have saved. The same command continues from there.")
            return self.record, 128 + self.stop
        failed = [cell for cell in cells if cell.state == "failed"]
        for cell in failed:
            warn(f"{self.label(cell)} failed: {cell.error} See {self.settings.results / cell.log}")
        return self.record, 1 if failed else 0

    def _work(self, show: Callable[[], None]) -> None:
        stopping, shown = False, time.monotonic()
        while True:
            for slot, job in list(self.jobs.items()):
                if (code := job.process.poll()) is not None:
                    del self.jobs[slot]
                    self._ended(job, code)
            if (self.stop or self.refused) and not stopping:
                for job in self.jobs.values():
                    job.process.send_signal(signal.SIGINT)
                stopping = True
            while not stopping and len(self.jobs) < self.settings.jobs and (cell := self._next()):
                slot = next(n for n in range(self.settings.jobs) if n not in self.jobs)
                self.jobs[slot] = self._start(cell, slot)
            if not self.jobs:
                return
            if time.monotonic() - shown > SHOW_EVERY:
                shown = time.monotonic()
                self._name_runs()
                self._notice_waiting()
            show()
            time.sleep(POLL_EVERY)

    def _name_runs(self) -> None:
        """Records the run of each cell at work, so that a report finds it even if this process is killed."""
        unnamed = [job.cell for job in self.jobs.values() if not job.cell.run]
        found = runs.find_runs(self.settings.results) if unnamed else ((), ())
        for cell in unnamed:
            if folder := find_run(self.recipe(cell), found, self.today):
                cell.run = folder.name
                cell.fingerprint = dict(found[0])[folder].fingerprint if folder in dict(found[0]) else ""
                self.write()

    def _notice_waiting(self) -> None:
        """Says which cells wait for a run that another study trains; its result is theirs too."""
        for job in self.jobs.values():
            log = self.settings.results / job.cell.log
            if not job.waiting and runs.WAITING in log.read_text(encoding="utf-8", errors="replace"):
                job.waiting = True
                self.announce(f"{self.label(job.cell)}: another process trains this run; waiting for it")

    def _next(self) -> Cell | None:
        for cell in self.record.cells:
            if cell.state != "waiting":
                continue
            if self.ready(cell):
                return cell
            source = self.source(cell)
            if source and source.state == "failed":
                cell.state = "failed"
                cell.error = f"The {source.task} run that it starts from failed."
                cell.log = source.log
        return None

    def _start(self, cell: Cell, slot: int) -> _Job:
        recipe, results = self.recipe(cell), self.settings.results
        log = self.folder / f"{self.record.stem(cell)}.log"
        arguments = {
            "--recipe": self.folder / f"{self.record.recipe_stem(cell.arm, cell.task)}.yaml",
            "--data": recipe.data.path,
            "--seed": cell.seed,
            "--init": recipe.init,
            "--out": results,
            "--device": self.settings.device,
            **model_arguments(recipe),
        }
        line = [*PROGRAM, cell.task, *(str(x) for pair in arguments.items() for x in pair)]
        if cell.run in self.start_over:
            line.append("--fresh")
        env = environment(slot, self.settings.jobs, self.settings.device)
        env[runs.WAIT_VARIABLE] = "1"  # another study may train the same run
        with writing(log), log.open("wb") as file:
            # its own session, so that Ctrl-C reaches it through _work alone
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env,
                start_new_session=True,
            )  # fmt: skip
        cell.state = "running"
        cell.error = ""
        cell.log = str(log.relative_to(results))
        cell.jobs = self.settings.jobs
        self.write()
        self.announce(f"{self.label(cell)}: started")
        return _Job(cell, process, time.monotonic())

    def _ended(self, job: _Job, code: int) -> None:
        cell = job.cell
        log = self.settings.results / cell.log
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
        found = runs.find_runs(self.settings.results)
        folder = find_run(self.recipe(cell), found, self.today)
        if folder is None and code == 0:  # on the same data under another path the program names the finished run
            told = text.partition(FINISHED)[2].partition("\n")[0]
            folder = next((path for path, _ in found[0] if path.name in told), None)
        info = dict(found[0]).get(folder) if folder else None
        cell.run = folder.name if folder else ""
        cell.fingerprint = info.fingerprint if info else ""
        if code == 0 and folder and info and Run(folder, info).finished:
            cell.state = "finished"
            self.durations.append(time.monotonic() - job.began)
            metric = TASKS[cell.task].primary.key
            value = info.metrics.get(metric)
            score = f", {metric} {value:.2f}" if is_number(value) else ""
            self.announce(f"{self.label(cell)}: finished in {duration(self.durations[-1])}{score}{self._left()}")
        elif self.stop or self.refused:
            cell.state = "interrupted"
        else:
            cell.state = "failed"
            cell.error, hint = last_error(text) if code else ("It ended without a finished run.", "")
            first = not any(c.state == "finished" and c.task == cell.task for c in self.record.cells)
            if code == UserError.exit_code and cell.arm == self.design.baseline and first:
                self.refused = UserError(cell.error, hint)
            else:
                self.announce(f"{self.label(cell)}: failed, see {log}: {cell.error}")
        self.write()

    def _left(self) -> str:
        todo = sum(cell.state not in ("finished", "failed") for cell in self.record.cells)
        if not todo or not self.durations:
            return ""
        seconds = sum(self.durations) / len(self.durations) * todo / self.settings.jobs
        return f" · {todo} to go, about {duration(seconds)}"

    # -- signals and the screen --

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal makes the runs save and stop; the second ends them at once."""

        def receive(number: int, _: FrameType | None) -> None:
            if self.stop:
                for job in self.jobs.values():
                    job.process.kill()
            else:
                notice("Stopping: the runs finish their step and save. A second signal ends them at once.")
            self.stop = number

        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: the study goes on without its terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def announce(self, line: str) -> None:
        """One line for an event; on a terminal the live table shows it."""
        if not err.is_terminal:
            notice(line)

    @contextlib.contextmanager
    def _show(self) -> Iterator[Callable[[], None]]:
        """A live table of all cells on a terminal; nothing elsewhere."""
        if not err.is_terminal:
            yield lambda: None
            return
        shown = -SHOW_EVERY
        with rich.live.Live(console=err, auto_refresh=False) as live:

            def show() -> None:
                nonlocal shown
                if time.monotonic() - shown >= SHOW_EVERY:
                    live.update(self.grid(), refresh=True)
                    shown = time.monotonic()

            yield show
            live.update(self.grid(), refresh=True)

    def grid(self) -> rich.table.Table:
        """The state of every cell: arms down, seeds across."""
        grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, caption=self._left().removeprefix(" · "))
        for title in ("arm", *(["task"] if self.several_tasks else [])):
            grid.add_column(title)
        for seed in self.record.seeds:
            grid.add_column(f"seed {seed}", justify="right")
        found = runs.find_runs(self.settings.results)
        infos = {path.name: info for path, info in found[0]}
        for task in self.design.tasks:
            for arm in self.design.arms:
                cells = [cell for cell in self.record.cells if (cell.arm, cell.task) == (arm, task)]
                states = [self._state(cell, found, infos) for cell in cells]
                grid.add_row(arm, *([task] if self.several_tasks else []), *states)
        return grid

    def _state(self, cell: Cell, found: Found, infos: Mapping[str, runs.RunInfo]) -> Text:
        if cell.state == "finished":
            value = infos[cell.run].metrics.get(TASKS[cell.task].primary.key) if cell.run in infos else None
            return Text("finished" if value is None else f"{value:.2f}", style="green")
        if cell.state == "running":
            folder = find_run(self.recipe(cell), found, self.today)
            log = runs.read_log(folder / "metrics.jsonl") if folder else []
            if folder and folder.name in infos and log:
                return Text(f"{100 * log[-1].get('step', 0) // infos[folder.name].steps_total} %", style="cyan")
            return Text("starting", style="cyan")
        return Text(cell.state, style="red" if cell.state == "failed" else "dim")


def last_error(log: str) -> tuple[str, str]:
    """(message, hint) from the output of a command: its last error line, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith("error: "):
            return lines[number].removeprefix("error: "), " ".join(lines[number + 1 :])
    return (lines[-1] if lines else "It ended without a message."), ""
