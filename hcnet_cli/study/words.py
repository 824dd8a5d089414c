"""The sentences under the table of a study: what is shown, by what method, and from which runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hcnet_cli import recipe as rcp
from hcnet_cli.console import duration
from hcnet_cli.grouping import plain
from hcnet_cli.results import command, epochs
from hcnet_cli.runs import RunInfo
from hcnet_cli.statistics import (
    MOST_SEEDS,
    POWER,
    Comparison,
    fewest_seeds,
    seeds_for,
    smallest_difference,
)
from hcnet_cli.study.record import StudyRecord
from hcnet_cli.table import Value, is_number, joined
from hcnet_cli.tasks.spec import Metric

LIKE_SIZES = 1.1  # times the parameters, up to which arms are of one size
WHOLE = 100.0  # points: no two scores in per cent differ by more
BETTER, WORSE, EQUIVALENT, UNRESOLVED = "better", "worse", "equivalent", "unresolved"


def verdicts(
    record: StudyRecord, metric: Metric, comparisons: Mapping[str, Comparison], found_out: Mapping[str, str]
) -> list[str]:
    """What the numbers of a metric show and what they do not. `found_out`: the verdict of each arm."""
    analysis, title, baseline = record.analysis, metric.title, record.baseline
    if metric.key != analysis.metric:
        title += " (secondary)"
    by_verdict = {
        word: [arm for arm, one in found_out.items() if one == word] for word in dict.fromkeys(found_out.values())
    }
    lines = [
        f"{title}: {word} than {baseline} (corrected p < {analysis.alpha:g}): {', '.join(by_verdict[word])}."
        for word in (BETTER, WORSE)
        if word in by_verdict
    ]
    if arms := by_verdict.get(EQUIVALENT):
        lines.append(f"{title}: equivalent to {baseline} within ±{analysis.margin:g}: {', '.join(arms)}.")
    if arms := by_verdict.get(UNRESOLVED):
        lines.append(f"{title}: not resolved for {', '.join(arms)}: differences inside the intervals remain possible.")
        if not analysis.until:
            lines += [f"{title}: {sentence}" for sentence in _more_seeds(record, [comparisons[arm] for arm in arms])]
    if analysis.until and metric.key == analysis.metric:
        lines += [f"{title}: {sentence}" for sentence in _still_wide(analysis.until, comparisons)]
    without_interval = [arm for arm, c in comparisons.items() if c.n > 1 and c.low is None]
    later = [arm for arm in without_interval if analysis.until and comparisons[arm].spread is not None]
    if later:
        lines.append(f"{title}: the first seeds of {', '.join(later)} show no spread: no interval and no t-test.")
    if arms := [arm for arm in without_interval if arm not in later]:
        lines.append(
            f"{title}: every seed gives the same difference for {', '.join(arms)}: there is no spread, and so no "
            "interval and no t-test."
        )
    if arms := [arm for arm, c in comparisons.items() if c.n == 1]:
        lines.append(
            f"{title}: one seed for {', '.join(arms)}: these are numbers, not findings. Nothing can be said about a "
            "difference without repeated runs (--seeds 0,1,2)."
        )
    return lines


def first_stage_notes(record: StudyRecord, metric: Metric, missing: Mapping[str, Sequence[int]]) -> list[str]:
    """What the seeds of the first stage that do not count (by arm) mean for the figures beside them."""
    planned = len(record.first_stage or ())
    return [
        f"{metric.title}: of the first {planned} seeds, whose spread decided the number of the others, {arm} has "
        f"{planned - len(seeds)} (missing: {_listed(seeds)}): its interval, p and verdict are not exact."
        for arm, seeds in missing.items()
    ]


def unequal_seeds_note(record: StudyRecord, metric: Metric, numbers: Mapping[str, int]) -> list[str]:
    """That means over unequal numbers of seeds (by arm) do not subtract to the difference over the common ones."""
    baseline = record.baseline
    fewer = [f"{arm} over {n}" for arm, n in numbers.items() if 0 < n < numbers[baseline]]
    if not fewer:
        return []
    return [
        f"{metric.title}: the mean of {baseline} is over {numbers[baseline]} seeds, {', '.join(fewer)}: a difference "
        "is over the common seeds, and is not that of these means."
    ]


def selection_note(record: StudyRecord, metric: Metric, values: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """The best arm of a sweep, a study whose arms all set the same fields, and what choosing it does to its score."""
    keys = set(record.arms[record.baseline])
    scores = {arm: score for arm, row in values.items() if is_number(score := row.get(metric.key))}
    if not keys or len(scores) < 2 or any(set(changed) != keys for changed in record.arms.values()):
        return []
    best = max(scores, key=lambda arm: scores[arm])
    return [
        f"{metric.title}: the highest of {len(scores)} is {best} ({scores[best]:.2f}). Choosing it on the validation "
        "data is a selection: its score there is too high on average. Report it on data that had no part in the choice."
    ]


def _more_seeds(record: StudyRecord, unresolved: Sequence[Comparison]) -> list[str]:
    """How many seeds it would take, from the spread of the arm with the largest: at most one sentence."""
    analysis = record.analysis
    n, spread = min(c.n for c in unresolved), max(c.spread or 0.0 for c in unresolved)
    level = analysis.alpha / (len(record.arms) - 1)
    if analysis.test == "sign-flip" and n < fewest_seeds(level):
        return [f"{n} seeds cannot have p < {analysis.alpha:g} in the sign-flip test; {fewest_seeds(level)} can."]
    shown, power = smallest_difference(spread, n, level), f"{100 * POWER:.0f} % power"
    if analysis.test == "sign-flip":
        power += " of the t-test (sign-flip needs somewhat more)"
    if shown is None:
        return []
    if shown > WHOLE:
        return [f"{n} seeds show no difference, whatever its size, with {power}: they spread too far."]
    wanted = record.detect or analysis.margin or shown / 2
    needed = seeds_for(wanted, spread, level) or MOST_SEEDS
    if needed <= n:
        return [f"{n} seeds show a difference of {shown:.2f} with {power}."]
    return [
        f"{n} seeds show a difference of {shown:.2f} with {power}; seeds still needed for {wanted:.2f}: "
        f"{'more than ' if needed == MOST_SEEDS else ''}{needed - n}."
    ]


def _still_wide(until: float, comparisons: Mapping[str, Comparison]) -> list[str]:
    """The arms whose interval is wider than was asked, with the seeds that it takes by Stein's rule."""
    halves = {arm: (c.high - c.low) / 2 for arm, c in comparisons.items() if c.low is not None and c.high is not None}
    return [
        f"the interval of {arm} is ±{half:.2f} with {comparisons[arm].n} seeds; ±{until:g} takes "
        f"{math.ceil(comparisons[arm].n * (half / until) ** 2 - 1e-9)} (--max-seeds)."
        for arm, half in halves.items()
        if half > until * (1 + 1e-9)
    ]


def method_notes(
    record: StudyRecord, values: Mapping[str, Mapping[str, Value]], missing: Mapping[str, Sequence[int]]
) -> list[str]:
    """The statistics, where there is more than one seed. `missing`: the seeds of the first stage that do not count."""

    def numbers(ending: str) -> list[float]:
        return [v for row in values.values() for key, v in row.items() if key.endswith(ending) and is_number(v)]

    if not numbers("_ci"):
        return []
    analysis, others = record.analysis, len(record.arms) - 1
    notes = [f"Primary analysis: {analysis.describe(others)}. {_when_fixed(record)} Other figures are secondary."]
    if analysis.until:
        counted = "those that count of " if missing else ""
        notes.append(
            f"Interval and p of the primary analysis are those of the two stages: the spread is that of {counted}the "
            f"first {len(record.first_stage or ())} seeds, which decided the number of the others."
        )
    elif record.primary and (planned := record.primary.seeds):
        if added := set(record.seeds) - set(planned):
            first = f"the first {len(planned)}" if len(planned) > 1 else f"seed {planned[0]}"
            notes.append(
                f"Seeds added when results of {first} were known: {_listed(added)}. p is too small if "
                "they were added because of these results (--until adds seeds and keeps the error rate)."
            )
        if dropped := set(record.ever_asked) - set(record.seeds):
            notes.append(
                f"Seeds that were asked for and have no result: {_listed(dropped)}. p is too small if the study was "
                "ended because of its results."
            )
    further = [
        "±: half of the 95 % t-interval over n seeds.",
        "Effect size: Hedges' g_z (mean difference over the standard deviation of the differences, corrected for "
        "small n).",
        "p of the secondary test: without correction.",
    ]
    if numbers("_p_equivalence"):
        further.append("p (equivalence): two one-sided t-tests, Holm-corrected.")
    if numbers("_iqm"):
        further.append("IQM: mean of the middle half of the differences.")
    if numbers("_bootstrap_low"):
        further.append("BCa interval: bootstrap over seeds, too narrow for few seeds (docs/statistics.md).")
    notes.append(f"Differences are arm minus {record.baseline}, paired by seed. {' '.join(further)}")
    return notes


def _listed(seeds: Collection[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _when_fixed(record: StudyRecord) -> str:
    if record.primary is None:
        return "It is the default: none was fixed before training."
    finished, others = record.primary.finished, record.primary.other_seeds
    if not finished:
        return "Fixed before training."
    with_others = f", {others} of them with other seeds than those planned" if others else ""
    return (
        f"Fixed when {finished} runs of the study's arms were finished already{with_others}: p is too small if the "
        "analysis or the seeds were chosen because of their results."
    )


def run_notes(record: StudyRecord, infos: Sequence[RunInfo], values: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """Data, budget, arms, conventions, machine and command."""
    if not infos:
        return []
    budgets = dict.fromkeys(
        f"{i.task} {i.steps_total} steps of {i.batch_size} images"
        + (f" ({passes:g} epochs)" if (passes := epochs(i)) else "")
        for i in infos
    )
    notes = list(dict.fromkeys(note for i in infos for note in i.data.notes))
    notes.append(f"Every run: {'; '.join(budgets)}; the best of its evaluations on the validation data.")
    if early := [i.steps_done for i in infos if i.stopped_early]:
        notes.append(
            f"Budgets differ: {len(early)} of {len(infos)} runs were stopped early (train.patience), after "
            f"{min(early)} to {max(early)} steps."
        )
    notes.append(f"{'; '.join(f'{arm}: {_changes(changed)}' for arm, changed in record.arms.items() if changed)}.")
    notes += unlike_sizes(values)
    inputs = joined([i.macs_input for i in infos if i.task == record.tasks[0]])
    notes.append(
        "MACs: multiply-adds of convolutions, linear layers and matrix products"
        f"{f', at {inputs}' if inputs else ''}; norms, pooling and element-wise work are not counted."
    )
    if speeds := joined([str(row.get("speed_notes") or "") for row in values.values()], "; "):
        jobs = max(cell.jobs for cell in record.cells)
        shared = f", while up to {jobs} runs shared the machine" if jobs > 1 else ""
        notes.append(f"images/s: median of the runs; {speeds}{shared}.")
    if any(is_number(row.get("memory_mb")) for row in values.values()):
        processors = {"cpu", "mps"}  # a GPU is called by its own name
        where = "the whole process" if processors & {i.device for i in infos} else "allocated on the GPU"
        notes.append(f"memory: peak while training, {where}, median of the runs.")
    if any(session.git_dirty for i in infos for session in i.all_sessions()):
        notes.append("The code had uncommitted changes; it is taken to have been the same for runs of one commit.")
    machines = joined([i.machine for i in infos])
    notes.append(
        f"{len(infos)} runs, {duration(sum(i.train_seconds for i in infos))} of training in all"
        f"{f' on {machines}' if machines else ''}: {command(record.argv) or record.name}"
    )
    return notes


def unlike_sizes(values: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """The arms' parameters, where one has more than LIKE_SIZES times those of another."""
    sizes = {arm: size for arm, row in values.items() if is_number(size := row.get("params_m"))}
    if not sizes or max(sizes.values()) <= LIKE_SIZES * min(sizes.values()):
        return []
    return [f"The arms differ in size: {', '.join(f'{arm} {size:.3g} M' for arm, size in sizes.items())} parameters."]


def _changes(changed: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={plain(value)}" for key, value in rcp.flatten(changed).items())
