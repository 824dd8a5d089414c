"""The dry run of a study: its cells with their state, what each arm costs, and what is left to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rich.box
import rich.table
from rich.text import Text

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.console import counted, duration, out, units
from hcnet_cli.recipe import Recipe
from hcnet_cli.study.design import Design
from hcnet_cli.study.planning import detect_seeds, find_spread, power_lines
from hcnet_cli.study.runner import Settings, StudyProcess
from hcnet_cli.study.table import runs_by_name
from hcnet_cli.tasks import TASKS


@dataclass(frozen=True)
class Cost:
    """Of one run: training images, rough seconds for each, and the model's parameters and MACs."""

    images: int
    seconds: float
    params: int
    macs: int


def preview(design: Design, settings: Settings, cost: Callable[[Recipe], Cost]) -> None:
    """Prints the grid of cells with their state, the cost of each arm and the time of what is left to do."""
    process = StudyProcess(design, settings)
    process.notice_kept()
    record = process.record
    cells = record.cells
    several = len(design.tasks) > 1
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("arm", "task") if several else ("arm",):
        grid.add_column(title, no_wrap=True)
    grid.add_column("sets", overflow="fold")
    for title in ("finished", "#params\n(M)", "MACs\n(G)", "a run"):
        grid.add_column(Text(title), justify="right")
    seconds_left, seconds_per_seed, tried = 0.0, 0.0, False
    for task in design.tasks:
        for arm, changes in design.arms.items():
            recipe = design.recipes[arm, task]
            done = [cell.state == "finished" for cell in cells if (cell.arm, cell.task) == (arm, task)]
            one = cost(recipe)
            speed = _speed(recipe, settings.results)
            seconds = one.images * (1 / speed if speed else one.seconds)
            tried |= not speed
            seconds_left += seconds * done.count(False)
            seconds_per_seed += seconds
            sets = ", ".join(f"{key}={_short(value)}" for key, value in changes.items()) or "–"
            labels = (arm, task) if several else (arm,)
            size = (units(one.params, 1e6), f"{one.macs / 1e9:.3g}")
            grid.add_row(*labels, sets, f"{sum(done)} of {len(done)}", *size, duration(seconds))
    out.print(grid)
    recipe = design.recipes[design.baseline, design.tasks[0]]
    protocols = ", ".join(design.recipes[design.baseline, task].protocol for task in design.tasks)
    finished = sum(cell.state == "finished" for cell in cells)
    source = "from a short trial" if tried else "at the speed of earlier runs"
    length = counted(recipe.schedule.length, recipe.schedule.unit.removesuffix("s"))
    lines = {
        "base": f"{protocols}, size {recipe.model.label}, {length}, data {recipe.data.path}",
        "runs": f"{len(cells)}, of which {finished} are finished",
        "time": f"about {duration(seconds_left)} of training one after another, evaluation and start-up not counted "
        f"({source})",
        "study": f"{settings.results / 'studies' / design.name}.json",
    }
    if weights := _weights(design):
        lines["init"] = weights
    found = runs_by_name(settings.results)
    spread = find_spread(design, record, found)
    lines |= power_lines(design, record, found, spread)
    if detect := settings.detect:
        seeds = detect_seeds(detect, design, record, spread)
        lines["detect"] = (
            f"{detect:g} points take {seeds} seeds: {seeds * len(design.recipes)} runs, about "
            f"{duration(seeds * seconds_per_seed)} of training in all"
            if seeds
            else f"{detect:g} points take more than ten thousand seeds"
        )
    for name, text in lines.items():
        out.print(f"{name + ':':<9}{text}")


def _weights(design: Design) -> str:
    """Where fine-tuning starts from; "" in a study without any."""
    said = []
    for task in design.tasks:
        inits = {design.recipes[arm, task].init for arm in design.arms}
        if task in design.sources:
            said.append(f"{task} from the {design.sources[task]} run of the same arm and seed, trained first")
        elif (source := TASKS[task].starts_from) and inits == {"none"}:
            said.append(f"{task} from random weights (with --task {source} too: from the arm's own run)")
    return "; ".join(said)


def _speed(recipe: Recipe, results: Path) -> float | None:
    """Training images/s of the latest finished run of the same task, model and input; the same variant if possible."""
    similar = [
        (info.variant == rcp.variant(recipe), info.finished, info.train_images_per_second)
        for _, info in runs.find_runs(results)[0]
        if (info.task, info.model or info.size, info.status) == (recipe.task, recipe.model.label, "finished")
        and info.img_size == getattr(recipe.data, "img_size", info.img_size)
        and info.train_images_per_second
    ]
    return max(similar)[-1] if similar else None


def _short(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
