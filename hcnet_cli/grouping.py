"""Which runs are one row: what may be averaged, and what is no independent sample."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.runs import RunInfo
from hcnet_cli.sizes import SIZES
from hcnet_cli.tasks import TASKS


@dataclass(frozen=True)
class Run:
    folder: Path
    info: RunInfo

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def has_weights(self) -> bool:
        return (self.folder / "best.safetensors").exists()

    @property
    def finished(self) -> bool:
        whole = self.info.stopped_early or self.info.steps_done >= self.info.steps_total
        return self.info.status == "finished" and whole

    @property
    def state(self) -> str:
        """The status, where "finished" means that every step was done, or that patience ended it."""
        return "cut short" if self.info.status == "finished" and not self.finished else self.info.status


def deduplicate(found: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """Each run once, by name and fingerprint. Of several records the finished, the furthest, the latest is kept."""
    by_key: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in found:
        by_key[run.name, run.info.fingerprint].append(run)
    kept, notes = [], []
    for same in by_key.values():
        best = max(same, key=lambda r: (r.finished, r.info.steps_done, r.info.finished, r.info.started))
        kept.append(best)
        if any(run.info != best.info for run in same):
            notes.append(f"{len(same)} different records of {best.name}; {best.folder} is the one used.")
    return sorted(kept, key=lambda run: (run.name, run.info.fingerprint)), notes


def group_by_config(kept: Iterable[Run]) -> list[list[Run]]:
    """Groups of finished runs that differ in the seed alone; then each unfinished run by itself."""
    finished: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    unfinished: list[list[Run]] = []
    for run in kept:
        if run.finished:
            finished[config_key(run.info)].append(run)
        else:
            unfinished.append([run])
    groups = [part for group in finished.values() for part in _by_start(group)]
    tasks, sizes = list(TASKS), list(SIZES)

    def order(group: list[Run]) -> tuple[Any, ...]:
        i = group[0].info
        size = sizes.index(i.size) if i.size in sizes else len(sizes)
        data = (tasks.index(i.task), i.data.name, i.data.digest)
        return (*data, i.protocol, size, i.model, i.variant, changes_text(i), group[0].name)

    return [*sorted(groups, key=order), *sorted(unfinished, key=order)]


def config_key(info: RunInfo) -> tuple[Any, ...]:
    """What two runs must share to be averaged: everything that shapes the result, except the seed.

    `config` covers the recipe, the data and the start; records from before it was kept have what the rest tells.
    """
    return (info.config, *_visible(info))


def _visible(info: RunInfo) -> tuple[Any, ...]:
    """What tables can show of it."""
    data = info.data
    by_size = info.task in TASKS and TASKS[info.task].compare_by_image_size  # elsewhere records differ in what it is
    size = info.img_size if by_size else None
    return (
        *(info.task, data.name, data.digest, data.split, info.protocol),
        *(repr(sorted(info.changes.items())), info.model, info.size, info.variant, size, init_label(info)),
        *(info.steps_total, info.batch_size, info.precision, info.evaluated_only, *score_protocols(info).items()),
    )


def score_protocols(info: RunInfo) -> dict[str, str]:
    """How the metrics of the run's task are made. Notes on further figures are left out: a run that has gained one by
    `hcnet evaluate`, or was made before it was computed, is still like its neighbours.
    """
    metrics = {metric.key for metric in TASKS[info.task].metrics} if info.task in TASKS else set()
    return {name: text for name, text in sorted(info.metric_notes.items()) if name in metrics}


def comparable_scores(info: RunInfo) -> dict[str, float]:
    """The scores that the same weights and data give again everywhere: not those that move with the rounding of a
    model's outputs, such as the calibration error.
    """
    spec = TASKS.get(info.task)
    counted = tuple(metric.key for metric in spec.metrics) if spec else ()
    rounded = tuple(figure.key for figure in spec.figures if not figure.key.startswith(counted)) if spec else ()
    return {name: value for name, value in info.metrics.items() if not name.startswith(rounded)}


def _by_start(group: Sequence[Run]) -> list[list[Run]]:
    """A group, divided where its runs started from different weights: those of equal digest together.

    Weights of one config may differ if each run took those of its own seed: then pretraining was repeated too.
    """
    by_digest: dict[str, list[Run]] = defaultdict(list)
    for run in group:
        by_digest[str(run.info.init.get("digest") or "")].append(run)
    if len(by_digest) == 1 or all(_start_seed(run.info) == run.info.seed for run in group):
        return [list(group)]
    return list(by_digest.values())


def _start_seed(info: RunInfo) -> int | None:
    """The seed of the run whose weights this one started from, where it is known."""
    if (seed := info.init.get("seed")) is not None:
        return seed
    named = re.search(r"-s(\d+)-[0-9a-f]{8}(/|$)", str(info.init.get("source") or ""))
    return int(named[1]) if named else None


def tell_apart(groups: Sequence[Sequence[Run]]) -> dict[int, str]:
    """For the finished groups that a table would show alike, by number, what is particular to each, for people."""
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        if group[0].finished:
            alike[_visible(group[0].info)].append(number)
    told: dict[int, str] = {}
    for numbers in alike.values():
        if len(numbers) > 1:
            recipes = [recipe_values(groups[number][0]) for number in numbers]
            keys = sorted({key for one in recipes for key in rcp.changed_keys(one, recipes[0])} - {"train.seed"})
            for number, recipe in zip(numbers, recipes, strict=True):
                info = groups[number][0].info
                parts = [f"{key}={plain(recipe.get(key))}" for key in keys]
                if len({groups[other][0].info.init.get("digest") for other in numbers}) > 1:
                    parts.append(f"initial weights {str(info.init.get('digest') or 'none')[:8]}")
                told[number] = ", ".join(parts) or f"configuration {info.config[:8] or 'unknown'}"
    return told


def recipe_values(run: Run) -> dict[str, Any]:
    """All of a run's recipe that can change a number, by dotted key; nothing of one that cannot be read."""
    try:
        return rcp.identity(rcp.resolve(run.folder / "recipe.yaml").recipe)
    except UserError:
        return {}


def independent(group: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The latest run of each seed, by seed, and a line for each run that is no independent sample: a repeated seed, or
    the very weights of another run.
    """
    by_seed: dict[int, Run] = {}
    for run in sorted(group, key=lambda run: (run.info.finished, run.name)):
        by_seed[run.info.seed] = run
    counted: list[Run] = []
    lines = []
    by_weights: dict[str, Run] = {}
    for run in (by_seed[seed] for seed in sorted(by_seed)):
        same = by_weights.setdefault(run.info.weights or run.name, run)
        if same is run:
            counted.append(run)
        else:
            lines.append(f"{run.name}: its weights are those of {same.name}, to the byte; not counted again.")
    repeated = [run.name for run in group if run is not by_seed[run.info.seed]]
    if repeated:
        lines.append(f"{', '.join(repeated)}: the same seed as {counted[0].name}'s row has already; not counted again.")
    return counted, lines


# --- how a run differs from others, in words --------------------------------------------------------------------------


def init_label(info: RunInfo) -> str:
    """Where the weights came from, without seed and fingerprint: "" for random, "pretrain-digits-pico" for a run."""
    source = str(info.init.get("source") or "")
    if source in ("", "none"):
        return ""
    path = Path(source)
    name = path.parent.name if path.name in ("best.safetensors", "last") else path.name
    return re.sub(r"-s\d+-[0-9a-f]{8}$", "", name)


def changes_text(info: RunInfo) -> str:
    """How a run differs from the protocol that it names, for people; "" where it follows the protocol."""
    parts = [f"{key}={plain(value)}" for key, value in info.changes.items()]
    start = init_label(info)
    spec = TASKS.get(info.task)  # None: of a task of another installation
    source = TASKS.get(spec.starts_from) if spec else None  # the task whose weights the protocol starts from
    if info.evaluated_only:
        parts.append(f"evaluated only, weights of {start}" if start else "evaluated only, random weights")
    elif source is None:
        parts += [f"started from {start}"] if start else []
    elif not start:
        parts.append("not pretrained")
    elif info.data.name in {spec.benchmark for spec in TASKS.values()}:
        whole = rf"{source.name}-{source.benchmark}-(?!data-|part-)"  # a part of the benchmark is other data
        other_data = start.startswith(f"{source.name}-") and not re.match(whole, start)
        parts += [f"started from {start}"] if other_data else []
    return ", ".join(parts)


def plain(value: object) -> str:
    """A value as --set takes it (null, true), where text stays without quotes."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
