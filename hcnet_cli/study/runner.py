"""Runs the cells of an ablation, each an ordinary run in a process of its own, and keeps the study's record."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import rich.box
import rich.live
import rich.table
from filelock import FileLock, Timeout
from rich.text import Text

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.console import UserError, duration, err, notice, out, warn
from hcnet_cli.files import write_text, writing
from hcnet_cli.recipe import Recipe
from hcnet_cli.results import FAMILIES, METRICS, Run, is_number
from hcnet_cli.study import design
from hcnet_cli.study.design import Cell, Plan, StudyRecord

PROGRAM = (sys.executable, "-m", "hcnet_cli")
LOOK_EVERY = 0.1  # seconds between looks at the processes
SHOW_EVERY = 2.0  # seconds between looks at how far the runs are
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Settings:
    """Where and how to run a study; nothing here can change a number."""

    results: Path = Path("results")
    device: str = "auto"
    jobs: int = 1
    fresh: bool = False  # finished runs of another code version, and broken ones, are started over
    argv: Sequence[str] = ()


@dataclass(frozen=True)
class Cost:
    """Of one run: training images, rough seconds for each, and the model's size."""

    images: int
    seconds: float
    params: int
    macs: int


def run(plan: Plan, settings: Settings) -> tuple[StudyRecord, int]:
    """Runs what is not finished yet. Returns the record and the exit code: 0, 1 after a failed cell, or 128 + the
    number of the signal that stopped it (the running cells have saved, and the same command goes on).

    UserError if the first arm is refused at once: a mistake that is every cell's.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("An ablation starts its own processes.", hint="Run it without torchrun; see --jobs.")
    with _alone(settings.results / "studies" / plan.name):
        return _Study(plan, settings).run()


def preview(plan: Plan, settings: Settings, cost: Callable[[Recipe], Cost]) -> None:
    """Prints the grid of cells with their state, the cost of each arm and of all that is left to do."""
    study = _Study(plan, settings)
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    several = len(plan.tasks) > 1
    for title in ("arm", *(["task"] if several else [])):
        grid.add_column(title, no_wrap=True)
    grid.add_column("sets", overflow="fold")
    for title in ("finished", "#params\n(M)", "MACs\n(G)", "a run"):
        grid.add_column(title, justify="right")
    left, tried = 0.0, False
    for task in plan.tasks:
        for arm, changes in plan.arms.items():
            cells = [cell for cell in study.record.cells if (cell.arm, cell.task) == (arm, task)]
            one = cost(plan.recipes[arm, task])
            speed = _speed(plan.recipes[arm, task], settings.results)
            seconds = one.images * (1 / speed if speed else one.seconds)
            tried |= not speed
            left += seconds * sum(cell.state != "finished" for cell in cells)
            grid.add_row(
                *(arm, *([task] if several else []), ", ".join(f"{k}={_short(v)}" for k, v in changes.items()) or "–"),
                f"{sum(cell.state == 'finished' for cell in cells)} of {len(cells)}",
                *(f"{one.params / 1e6:.2f}", f"{one.macs / 1e9:.3g}", duration(seconds)),
            )
    out.print(grid)
    recipe = plan.recipes[next(iter(plan.arms)), plan.tasks[0]]
    todo = sum(cell.state != "finished" for cell in study.record.cells)
    lines = {
        "base": f"{', '.join(plan.recipes[next(iter(plan.arms)), task].protocol for task in plan.tasks)}, "
        f"size {recipe.model.size}, {recipe.schedule.length} {recipe.schedule.unit}, data {recipe.data.path}",
        "runs": f"{len(study.record.cells)}, of which {len(study.record.cells) - todo} are finished",
        "time": f"about {duration(left)} of training one after another, evaluation and start-up not counted ("
        + ("from a short trial)" if tried else "at the speed of earlier runs)"),
        "study": f"{settings.results / 'studies' / plan.name}.json",
    }
    for name, text in lines.items():
        out.print(f"{name + ':':<8}{text}", markup=False)


def _speed(recipe: Recipe, results: Path) -> float | None:
    """Training images/s of the latest finished run of the same task, size and input, best of the same variant."""
    runs_like_it = [
        (info.variant == rcp.variant(recipe), info.finished, info.train_images_per_second)
        for _, info in runs.find_runs(results)[0]
        if (info.task, info.size, info.status) == (recipe.task, recipe.model.size, "finished")
        and info.img_size == getattr(recipe.data, "img_size", info.img_size)
        and info.train_images_per_second
    ]
    return max(runs_like_it)[-1] if runs_like_it else None


# --- one study at work ------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    cell: Cell
    process: subprocess.Popen[bytes]
    began: float


class _Study:
    """The cells of a plan with their states. Only `run` writes or starts anything."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.plan, self.settings = plan, settings
        self.folder = settings.results / "studies" / plan.name
        self.record = StudyRecord(
            name=plan.name,
            title=plan.title,
            argv=list(settings.argv),
            arms={arm: dict(changes) for arm, changes in plan.arms.items()},
            tasks=list(plan.tasks),
            seeds=list(plan.seeds),
            # seed by seed, so that a study that is stopped has whole pairs
            cells=[Cell(arm=a, task=t, seed=s) for s in plan.seeds for t in plan.tasks for a in plan.arms],
        )
        self.again: set[str] = set()  # runs to start over
        self.jobs: dict[int, _Job] = {}
        self.took: list[float] = []
        self.stop = 0
        self.refused: UserError | None = None
        self._adopt()

    # -- cells and their runs --

    def init(self, cell: Cell) -> str:
        """The run of the cell's own pretraining, where its task starts from that."""
        if cell.task not in self.plan.from_pretrain:
            return ""
        return str(self.settings.results / "runs" / self.pretraining(cell).run)

    def pretraining(self, cell: Cell) -> Cell:
        wanted = (cell.arm, "pretrain", cell.seed)
        return next(c for c in self.record.cells if (c.arm, c.task, c.seed) == wanted)

    def recipe(self, cell: Cell) -> Recipe:
        return self.plan.recipe(cell.arm, cell.task, cell.seed, self.init(cell))

    def ready(self, cell: Cell) -> bool:
        return cell.task not in self.plan.from_pretrain or self.pretraining(cell).state == "finished"

    def label(self, cell: Cell) -> str:
        task = f" {cell.task}," if len(self.plan.tasks) > 1 else ""
        return f"{cell.arm},{task} seed {cell.seed}"

    def stem(self, cell: Cell) -> str:
        return cell.arm if len(self.plan.tasks) == 1 else f"{cell.arm}-{cell.task}"

    def _adopt(self) -> None:
        """Finds the runs that are there already, whatever asked for them; the earlier record knows of moved data."""
        earlier = {}
        with contextlib.suppress(OSError, ValueError):
            old = StudyRecord.model_validate_json(self.file.read_text(encoding="utf-8"))
            earlier = {(c.arm, c.task, c.seed): c for c in old.cells}
        found = runs.find_runs(self.settings.results)
        names = {path.name: Run(path, info) for path, info in found[0]}
        code, others = runs.git_state(), 0
        for cell in self.record.cells:
            if not self.ready(cell):
                continue
            folder = design.find(self.recipe(cell), found)
            before = earlier.get((cell.arm, cell.task, cell.seed))
            cell.run = folder.name if folder else before.run if before and before.run in names else ""
            if not cell.run:
                continue
            if before and before.run == cell.run:
                cell.jobs = before.jobs
            run = names.get(cell.run)
            foreign = run is None or (run.info.git_commit, run.info.git_dirty) != code
            if self.settings.fresh and foreign:
                self.again.add(cell.run)
            elif run is not None and run.finished:
                cell.state = "finished"
                others += foreign
        if others and any(cell.state != "finished" for cell in self.record.cells):
            warn(
                f"{others} finished runs are of another version of the code than this one; they will not be compared "
                "with runs made now. --fresh starts them over."
            )

    @property
    def file(self) -> Path:
        return self.folder.with_name(f"{self.plan.name}.json")

    def write(self) -> None:
        write_text(self.file, self.record.model_dump_json(indent=1) + "\n")

    # -- the loop --

    def run(self) -> tuple[StudyRecord, int]:
        cells, arms = self.record.cells, len(self.plan.arms)
        for (arm, task), recipe in self.plan.recipes.items():
            file = self.folder / f"{self.stem(Cell(arm=arm, task=task, seed=0))}.yaml"
            write_text(file, rcp.dump_yaml(recipe))
        self.write()
        there = sum(cell.state == "finished" for cell in cells)
        tasks = f" x {len(self.plan.tasks)} tasks" if len(self.plan.tasks) > 1 else ""
        notice(
            f"{arms} arms{tasks} x {len(self.plan.seeds)} seeds = {len(cells)} runs"
            + (f", {there} of them finished" if there else "")
            + f" · {self.file}"
        )
        if there < len(cells):
            with self._signals(), self._show() as show:
                try:
                    self._work(show)
                finally:
                    for job in self.jobs.values():  # only after an error of our own
                        job.process.kill()
        self.write()
        if self.refused:
            if not any(cell.state == "finished" for cell in cells):  # a mistake leaves no study behind
                self.file.unlink()
            raise self.refused
        if self.stop:
            notice("Stopped; the runs have saved. The same command goes on from there.")
            return self.record, 128 + self.stop
        failed = [cell for cell in cells if cell.state == "failed"]
        for cell in failed:
            warn(f"{self.label(cell)} failed: {cell.error} See {self.settings.results / cell.log}")
        return self.record, 1 if failed else 0

    def _work(self, show: Callable[[], None]) -> None:
        asked, looked = False, time.monotonic()
        while True:
            for slot, job in list(self.jobs.items()):
                if (code := job.process.poll()) is not None:
                    del self.jobs[slot]
                    self._ended(job, code)
            if (self.stop or self.refused) and not asked:
                for job in self.jobs.values():
                    job.process.send_signal(signal.SIGINT)
                asked = True
            while not asked and len(self.jobs) < self.settings.jobs and (cell := self._next()):
                slot = next(n for n in range(self.settings.jobs) if n not in self.jobs)
                self.jobs[slot] = self._start(cell, slot)
            if not self.jobs:
                return
            if time.monotonic() - looked > SHOW_EVERY:
                looked = time.monotonic()
                self._name_runs()
            show()
            time.sleep(LOOK_EVERY)

    def _name_runs(self) -> None:
        """Writes down which run a cell has become, so that a report knows it even if this process is killed."""
        unnamed = [job.cell for job in self.jobs.values() if not job.cell.run]
        found = runs.find_runs(self.settings.results) if unnamed else ((), ())
        for cell in unnamed:
            if folder := design.find(self.recipe(cell), found):
                cell.run = folder.name
                self.write()

    def _next(self) -> Cell | None:
        for cell in self.record.cells:
            if cell.state != "waiting":
                continue
            if self.ready(cell):
                return cell
            if self.pretraining(cell).state == "failed":
                cell.state, cell.error = "failed", "Its pretraining failed."
                cell.log = self.pretraining(cell).log
        return None

    def _start(self, cell: Cell, slot: int) -> _Job:
        recipe, results = self.recipe(cell), self.settings.results
        log = self.folder / f"{self.stem(cell)}-s{cell.seed}.log"
        arguments = {
            "--recipe": self.folder / f"{self.stem(cell)}.yaml",
            "--data": recipe.data.path,
            "--seed": cell.seed,
            "--init": recipe.init,
            "--out": results,
            "--device": self.settings.device,
        }
        line = [*PROGRAM, cell.task, *(str(x) for pair in arguments.items() for x in pair)]
        if cell.run in self.again:
            line.append("--fresh")
        with writing(log), log.open("wb") as file:
            # a session of its own: Ctrl-C is passed on by us, once
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._environment(slot),
                start_new_session=True,
            )  # fmt: skip
        cell.state, cell.error, cell.log = "running", "", str(log.relative_to(results))
        cell.jobs = self.settings.jobs
        self.write()
        self.tell(f"{self.label(cell)}: started")
        return _Job(cell, process, time.monotonic())

    def _environment(self, slot: int) -> dict[str, str]:
        """The cores, or the GPUs, divided between the jobs."""
        env = {name: value for name, value in os.environ.items() if name not in (*OF_TORCHRUN, "FORCE_COLOR")}
        if self.settings.jobs > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self.settings.jobs)))
            cards = gpus(self.settings.device)
            if cards:
                env["CUDA_VISIBLE_DEVICES"] = cards[slot % len(cards)]
        return env

    def _ended(self, job: _Job, code: int) -> None:
        cell = job.cell
        log = self.settings.results / cell.log
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
        found = runs.find_runs(self.settings.results)
        folder = design.find(self.recipe(cell), found)
        if folder is None:  # a finished run on the same data under another path: the program named it
            folder = next((path for path, _ in found[0] if path.name in text), None)
        info = dict(found[0]).get(folder) if folder else None
        cell.run = folder.name if folder else ""
        if code == 0 and folder and info and Run(folder, info).finished:
            cell.state = "finished"
            self.took.append(time.monotonic() - job.began)
            metric = METRICS[FAMILIES[cell.task]][0]
            value = info.metrics.get(metric)
            self.tell(
                f"{self.label(cell)}: finished in {duration(self.took[-1])}"
                + (f", {metric} {value:.2f}" if is_number(value) and value is not None else "")
                + self._left()
            )
        elif self.stop or self.refused:
            cell.state = "interrupted"
        else:
            cell.state = "failed"
            cell.error, hint = complaint(text) if code else ("It ended without a finished run.", "")
            alone = not any(c.state == "finished" and c.task == cell.task for c in self.record.cells)
            if code == UserError.exit_code and cell.arm == next(iter(self.plan.arms)) and alone:
                self.refused = UserError(cell.error, hint)
            else:
                self.tell(f"{self.label(cell)}: failed, see {log}: {cell.error}")
        self.write()

    def _left(self) -> str:
        todo = sum(cell.state not in ("finished", "failed") for cell in self.record.cells)
        if not todo or not self.took:
            return ""
        seconds = sum(self.took) / len(self.took) * todo / self.settings.jobs
        return f" · {todo} to go, about {duration(seconds)}"

    # -- signals and the screen --

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal asks the runs to save and stop; a second one ends them at once."""

        def receive(number: int, _: FrameType | None) -> None:
            if self.stop:
                for job in self.jobs.values():
                    job.process.kill()
            else:
                notice("Stopping: the runs finish their step and save. Once more to end them at once.")
            self.stop = number

        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        before = {number: signal.signal(number, receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def tell(self, line: str) -> None:
        """One event; on a terminal the live table shows it."""
        if not err.is_terminal:
            notice(line)

    @contextlib.contextmanager
    def _show(self) -> Iterator[Callable[[], None]]:
        """A table of all cells that stays in place on a terminal; nothing elsewhere."""
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
        for title in ("arm", *(["task"] if len(self.plan.tasks) > 1 else [])):
            grid.add_column(title)
        for seed in self.plan.seeds:
            grid.add_column(f"seed {seed}", justify="right")
        found = runs.find_runs(self.settings.results)
        infos = {path.name: info for path, info in found[0]}
        for task in self.plan.tasks:
            for arm in self.plan.arms:
                cells = [cell for cell in self.record.cells if (cell.arm, cell.task) == (arm, task)]
                states = [self._state(cell, found, infos) for cell in cells]
                grid.add_row(arm, *([task] if len(self.plan.tasks) > 1 else []), *states)
        return grid

    def _state(self, cell: Cell, found: design.Found, infos: Mapping[str, runs.RunInfo]) -> Text:
        if cell.state == "finished":
            value = infos[cell.run].metrics.get(METRICS[FAMILIES[cell.task]][0]) if cell.run in infos else None
            return Text("finished" if value is None else f"{value:.2f}", style="green")
        if cell.state == "running":
            folder = design.find(self.recipe(cell), found)
            log = runs.read_log(folder / "metrics.jsonl") if folder else []
            if folder and folder.name in infos and log:
                return Text(f"{100 * log[-1].get('step', 0) // infos[folder.name].steps_total} %", style="cyan")
            return Text("starting", style="cyan")
        return Text(cell.state, style="red" if cell.state == "failed" else "dim")


# --- small things -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands at the same study would start the same runs."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"Another process is working at this study ({folder}).", hint="Wait for it, or stop it."
            ) from None
    try:
        yield
    finally:
        lock.release()


def complaint(log: str) -> tuple[str, str]:
    """(what went wrong, hint) from the output of a command: its error line, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith("error: "):
            return lines[number].removeprefix("error: "), " ".join(lines[number + 1 :])
    return (lines[-1] if lines else "It ended without a word."), ""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(device: str) -> list[str]:
    """The GPUs to divide between jobs, as CUDA_VISIBLE_DEVICES names them; none where `device` is a certain one."""
    if device not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
