"""What a number of seeds can show, said before hours are spent: power, from the spread of earlier runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.grouping import Run
from hcnet_cli.recipe import Recipe
from hcnet_cli.statistics import (
    POWER,
    fewest_seeds,
    paired_differences,
    pooled_deviation,
    seeds_for,
    seeds_until,
    smallest_difference,
    t_interval,
    two_stage,
)
from hcnet_cli.study.design import SHARED, Design
from hcnet_cli.study.record import StudyRecord
from hcnet_cli.study.table import Found, count
from hcnet_cli.table import is_number
from hcnet_cli.tasks import TASKS

GUESS = 0.5  # points, the spread that is taken where nothing has been measured
FREEDOM = 2  # degrees of freedom below which a measured spread is worth no more than the guess


class Spread(NamedTuple):
    """Standard deviation in points of the paired differences between seeds, and where it comes from."""

    sd: float
    source: str


def scores(record: StudyRecord, found: Found) -> dict[str, dict[int, float]]:
    """The counted scores of the primary metric, by arm and seed."""
    task = _primary_task(record.tasks, record.analysis.metric)
    counted, _ = count(record, task, found)
    return {
        arm: {s: run.info.metrics[record.analysis.metric] for s, run in runs.items()} for arm, runs in counted.items()
    }


def _primary_task(tasks: Sequence[str], metric: str) -> str:
    return next(task for task in tasks if TASKS[task].primary.key == metric)


# --- the spread -------------------------------------------------------------------------------------------------------


def find_spread(design: Design, record: StudyRecord, found: Found) -> Spread:
    """From this study's finished pairs, else from the seeds of other runs of like recipe, else a guess."""
    by_arm = scores(record, found)
    baseline = by_arm.pop(record.baseline)
    pairs = {arm: list(paired_differences(values, baseline).values()) for arm, values in by_arm.items()}
    pairs = {arm: differences for arm, differences in pairs.items() if len(differences) > 1}
    pooled = pooled_deviation(list(pairs.values()))
    if pooled and pooled[1] >= FREEDOM:
        number = sum(map(len, pairs.values()))
        return Spread(pooled[0], f"between {number} finished pairs of this study ({', '.join(pairs)})")
    task = _primary_task(record.tasks, record.analysis.metric)
    groups = _like_runs(design.recipes[design.baseline, task], record.analysis.metric, found)
    pooled = pooled_deviation([list(group.values()) for group in groups])
    if pooled and pooled[1] >= FREEDOM:
        number = sum(map(len, groups))
        return Spread(
            math.sqrt(2) * pooled[0],
            f"√2 times that between the seeds of {number} earlier runs of like recipe in {len(groups)} variants",
        )
    return Spread(GUESS, "a guess: there are too few earlier runs of like recipe")


def _like_runs(recipe: Recipe, metric: str, found: Found) -> list[dict[int, float]]:
    """Scores by seed of each configuration with the same task, size, data, budget and batch."""
    wanted = _likeness(recipe)
    groups: dict[str, dict[int, float]] = defaultdict(dict)
    for run in found.values():
        if not isinstance(run, Run) or not run.finished or run.info.task != recipe.task or not run.info.config:
            continue
        try:
            other = rcp.resolve(run.folder / "recipe.yaml").recipe
        except UserError:
            continue
        if _likeness(other) == wanted and is_number(value := run.info.metrics.get(metric)):
            groups[run.info.config][run.info.seed] = value
    return [group for group in groups.values() if len(group) > 1]


def _likeness(recipe: Recipe) -> dict[str, object]:
    fields = rcp.flatten(recipe.model_dump())
    kept = {key: fields.get(key) for key in SHARED - {"train.seed"}}
    return {**kept, "data.path": str(Path(recipe.data.path or "").resolve()), "model": recipe.model.label}


# --- the number of seeds ----------------------------------------------------------------------------------------------


def later_seeds(record: StudyRecord, found: Found) -> list[int]:
    """The seeds of the second stage of `until`: as many as the arm with the widest interval needs.

    UserError if the first stage is not complete: its spread alone decides.
    """
    analysis, first = record.analysis, record.first_stage
    if not analysis.until or first is None:
        return []
    needed = [len(first)]
    by_arm = scores(record, found)
    baseline = by_arm.pop(record.baseline)
    for arm, values in by_arm.items():
        differences = [d for seed, d in paired_differences(values, baseline).items() if seed in first]
        if len(differences) < len(first):
            raise UserError(
                f"--until has no second stage: {arm} has {len(differences)} of {len(first)} pairs of the first stage "
                "that count.",
                hint="The table says why; the same command tries failed runs again, --fresh those of other code.",
            )
        needed.append(seeds_until(differences, analysis.until, analysis.alpha) or len(first))
    return new_seeds(first, min(analysis.most_seeds, max(needed)) - len(first))


def new_seeds(first: Sequence[int], number: int) -> list[int]:
    return [max(first) + 1 + i for i in range(number)]


def power_lines(design: Design, record: StudyRecord, found: Found, spread: Spread | None = None) -> dict[str, str]:
    """What the seeds of a study can show, by a short name, as sentences."""
    analysis, arms = record.analysis, len(record.arms) - 1
    n = len(design.seeds if analysis.until else record.seeds)
    level = analysis.alpha / arms
    sd, source = spread or find_spread(design, record, found)
    lines = {"primary": analysis.describe(arms), "spread": f"{sd:.2f} points, {source}"}
    least = fewest_seeds(level)
    if analysis.until:
        lines["seeds"] = f"{n} at first, then as many as ±{analysis.until:g} takes: {_expected(sd, n, record)}"
    elif analysis.test == "sign-flip" and n < least:
        lines["power"] = (
            f"none: {n} seeds cannot have p < {analysis.alpha:g} whatever they show; {least} can{_per_arm(arms)}"
        )
    elif difference := smallest_difference(sd, n, level):
        lines["power"] = (
            f"{n} seeds show a difference of {difference:.2f} with {100 * POWER:.0f} % power{_per_arm(arms)}"
        )
        if analysis.test == "sign-flip":
            lines["power"] += ", as computed for the t-test; the sign-flip test needs somewhat more"
        elif n < least:
            lines["power"] += f"; the sign-flip test, which is secondary, needs {least} seeds to show anything"
    else:
        lines["power"] = "none: one seed shows no difference, whatever its size (--seeds 0,1,2,3,4)"
    return lines


def detect_seeds(detect: float, design: Design, record: StudyRecord, spread: Spread) -> int | None:
    """The seeds that show a difference of `detect` points in the primary analysis; None: more than ten thousand."""
    level = record.analysis.alpha / (len(record.arms) - 1)
    needed = seeds_for(detect, spread.sd, level)
    return max(needed, fewest_seeds(level)) if needed and record.analysis.test == "sign-flip" else needed


def _per_arm(arms: int) -> str:
    return f" (the first of {arms} arms in Holm's order)" if arms > 1 else ""


def _expected(sd: float, n: int, record: StudyRecord) -> str:
    """The seeds that `until` takes if the first stage has this spread."""
    analysis = record.analysis
    assert analysis.until
    first = [sd * math.sqrt((n - 1) / 2), -sd * math.sqrt((n - 1) / 2), *[0.0] * (n - 2)]  # of deviation sd
    needed = seeds_until(first, analysis.until, analysis.alpha) or n
    most = analysis.most_seeds
    if needed <= most:
        return f"with this spread {needed} in all, at most {most}"
    e = two_stage(first, [0.0] * (most - n))
    half = t_interval(e, analysis.alpha)[1] - e.mean if e else math.nan
    return f"with this spread {needed} in all; the {most} of --max-seeds give ±{half:.2f}"
