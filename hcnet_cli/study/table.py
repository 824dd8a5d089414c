"""The table of a study: which runs count, the comparison of every arm with the baseline, and its words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from hcnet_cli import runs
from hcnet_cli.grouping import Run, score_protocols
from hcnet_cli.results import command, in_units, metric_notes, model_name, timed_alike
from hcnet_cli.runs import RunInfo
from hcnet_cli.statistics import Comparison, compare, holm, mean_interval
from hcnet_cli.study import words
from hcnet_cli.study.analysis import Analysis
from hcnet_cli.study.record import StudyRecord, read_studies
from hcnet_cli.table import Column, Row, Style, Table, Value, is_number, joined
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.spec import Metric

Counted = dict[str, dict[int, Run]]  # arm -> seed -> run
Found = Mapping[str, Run | str]  # folder name -> run, or why its record cannot be read
COST_COLUMNS = (
    Column("params_m", "#params (M)", "number", secondary=True),
    Column("macs_g", "MACs (G)", "number", secondary=True),
    Column("images_per_second", "images/s", "short", secondary=True),
    Column("memory_mb", "memory (MiB)", "integer", secondary=True),
)


NOT_RUN = "not run"  # why a cell does not count: said for all such cells at once


def tables(results: Iterable[Path]) -> tuple[list[Table], list[str]]:
    """The table of every study under the results folders, and a line for each study that cannot be read."""
    made: dict[str, Table] = {}
    broken: list[str] = []
    for folder in results:
        records, unreadable = read_studies(folder)
        broken += unreadable
        found = runs_by_name(folder) if records else {}
        for record in records:
            made.setdefault(record.name, table(record, found))
    return list(made.values()), broken


def runs_by_name(results: Path) -> Found:
    good, broken = runs.find_runs(results)
    return {**{path.name: Run(path, info) for path, info in good}, **{path.name: reason for path, reason in broken}}


# --- which runs count -------------------------------------------------------------------------------------------------


def shared_aspects(info: RunInfo) -> dict[str, str]:
    """What runs must share to be compared, by name, in words."""
    data = info.data
    return {
        "data": f"{data.name} {data.digest[:12]} {data.split}",
        "budget": f"{info.steps_total} steps of {info.batch_size}",
        "precision": info.precision,
        "evaluation": metric_notes(score_protocols(info)) or "plain",
        "code version": info.code.replace("+changes", " with changes"),
    }


def count(record: StudyRecord, task: str, found: Found) -> tuple[Counted, list[str]]:
    """The finished cells of a task that are alike, and a line with the reason for each cell that is left out.

    Where runs differ in a shared aspect, the majority counts (of two equal halves, the baseline's). A seed counts in an
    arm only if the baseline has it too.
    """
    cells = [cell for cell in record.cells if cell.task == task]
    metric = TASKS[task].primary.key
    reasons: dict[tuple[str, int], str] = {}
    finished: dict[tuple[str, int], Run] = {}
    for cell in cells:
        run, key = found.get(cell.run), (cell.arm, cell.seed)
        if isinstance(run, str):
            reasons[key] = run.rstrip(".")
        elif run is None:
            reasons[key] = "its run is gone" if cell.run else "started" if cell.state == "running" else NOT_RUN
        elif not run.finished:
            state = "running" if run.info.status == "running" else "unfinished"
            reasons[key] = f"{state} at {run.info.steps_done} of {run.info.steps_total} steps"
        elif not is_number(run.info.metrics.get(metric)):
            reasons[key] = f"its record has no {metric}"
        elif run.info.seed != cell.seed:
            reasons[key] = f"its run has seed {run.info.seed}"
        elif cell.fingerprint not in ("", run.info.fingerprint):
            reasons[key] = (
                f"its run was replaced by one of another recipe, data or start (fingerprint {run.info.fingerprint}, "
                f"{cell.fingerprint} when the study took it)"
            )
        else:
            finished[key] = run
        if key in reasons and cell.state == "failed":
            log = f" (log: {cell.log})" if cell.log else ""
            reasons[key] += f"; failed: {cell.error.rstrip('.') or 'no message'}{log}"
    reasons |= _other_config(finished)
    finished = {key: run for key, run in finished.items() if key not in reasons}
    reasons |= _unlike(record.baseline, finished)
    alike = {key: run for key, run in finished.items() if key not in reasons}
    counted: Counted = {arm: {} for arm in record.arms}
    for (arm, seed), run in sorted(alike.items(), key=lambda item: item[0][1]):
        if (record.baseline, seed) in alike:
            counted[arm][seed] = run
        else:
            reasons[arm, seed] = f"{record.baseline} has no run of this seed to compare it with"
    several = f" ({task})" if len(record.tasks) > 1 else ""
    lines = [
        f"Not counted: {cell.arm}, seed {cell.seed}{several}: {reason}{f' [{cell.run}]' if cell.run else ''}."
        for cell in cells
        if (reason := reasons.get((cell.arm, cell.seed))) and reason != NOT_RUN
    ]
    waiting = {arm: [cell.seed for cell in cells if reasons.get((arm, cell.seed)) == NOT_RUN and cell.arm == arm]
               for arm in record.arms}  # fmt: skip
    for seeds in dict.fromkeys(map(tuple, waiting.values())):
        if seeds:
            arms = [arm for arm in waiting if tuple(waiting[arm]) == seeds]
            whose = "all arms" if len(arms) == len(waiting) else ", ".join(arms)
            named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
            lines.append(f"Not run: {named} of {whose}{several}.")
    return counted, lines


def _other_config(finished: Mapping[tuple[str, int], Run]) -> dict[tuple[str, int], str]:
    """The runs that differ from the other seeds of their arm in more than the seed, or are copies of one of them."""
    reasons: dict[tuple[str, int], str] = {}
    for arm in dict.fromkeys(arm for arm, _ in finished):
        own = {key: run for key, run in finished.items() if key[0] == arm}
        votes = Counter(run.info.config for run in own.values())
        usual = max(votes, key=lambda config: (votes[config], config))
        by_weights: dict[str, Run] = {}
        for key, run in own.items():
            same = by_weights.setdefault(run.info.weights or run.name, run)
            if run.info.config != usual:
                reasons[key] = "unlike the other seeds of its arm in more than the seed (their run.json: config)"
            elif same is not run:
                reasons[key] = f"its weights are those of {same.name}, to the byte"
    return reasons


def _unlike(baseline: str, finished: Mapping[tuple[str, int], Run]) -> dict[tuple[str, int], str]:
    """The runs that differ from the majority in a shared aspect, with the first such aspect."""
    reasons: dict[tuple[str, int], str] = {}
    by_run = {key: shared_aspects(run.info) for key, run in finished.items()}
    for aspect in next(iter(by_run.values()), {}):
        values = {key: aspects[aspect] for key, aspects in by_run.items()}
        votes = Counter(values.values())
        of_baseline = Counter(value for (arm, _), value in values.items() if arm == baseline)
        usual = max(votes, key=lambda value: (votes[value], of_baseline[value], value))
        for key, value in values.items():
            if value != usual:
                reasons.setdefault(key, f"unlike the others in {aspect}: {value} instead of {usual}")
    return reasons


# --- the table --------------------------------------------------------------------------------------------------------


def table(record: StudyRecord, found: Found) -> Table:
    """Variant, cost, and for each task the metric with its interval, the paired difference and its corrected p."""
    values: dict[str, dict[str, Value]] = {arm: {"variant": arm} for arm in record.arms}
    members: dict[str, list[Run]] = {arm: [] for arm in record.arms}
    infos: list[RunInfo] = []
    forest: list[tuple[str, float, float, float]] = []
    verdicts: list[str] = []
    missing: dict[str, list[int]] = {}
    left_out: list[str] = []
    metrics: list[Metric] = []
    for task in record.tasks:
        counted, lines = count(record, task, found)
        left_out += lines
        if task == record.tasks[0]:
            _fill_costs(counted, values)
        for arm, by_seed in counted.items():
            members[arm] += by_seed.values()
            infos += [run.info for run in by_seed.values()]
        for metric in _metrics(task, counted):
            metrics.append(metric)
            comparisons = _fill_metric(metric.key, counted, values, record)
            for arm, c in comparisons.items():
                if metric == TASKS[task].primary and c.low is not None and c.high is not None:
                    label = f"{arm}, {metric.title}" if len(record.tasks) > 1 else arm
                    forest.append((label, c.difference, c.low, c.high))
            if metric.key == record.analysis.metric:
                missing = _missing_first(record, counted)
                verdicts += words.first_stage_notes(record, metric, missing)
            found_out = {arm: str(values[arm][f"{metric.key}_verdict"]) for arm in comparisons}
            verdicts += words.verdicts(record, metric, comparisons, found_out)
            if metric == TASKS[task].primary:
                verdicts += words.selection_note(record, metric, values)
                numbers = {arm: len(by_seed) for arm, by_seed in counted.items()}
                verdicts += words.unequal_seeds_note(record, metric, numbers)
    for arm, row in values.items():
        row |= _provenance(record, members[arm])
    rows = [
        Row(
            "measured" if members[arm] else "unfinished",
            values[arm] if members[arm] else {**values[arm], "state": _state_without_runs(record, arm, found)},
            tuple(run.folder for run in members[arm]),
        )
        for arm in record.arms
    ]
    rows.sort(key=lambda row: row.kind == "unfinished")
    notes = [
        *verdicts,
        *left_out,
        *words.method_notes(record, values, missing),
        *words.run_notes(record, infos, values),
    ]
    short = " on ".join(filter(None, (record.title, ", ".join(dict.fromkeys(info.data.name for info in infos)))))
    columns = _columns(record, metrics, values)
    return Table("ablation", _title(record, infos), columns, rows, notes, forest, short=short)


def _state_without_runs(record: StudyRecord, arm: str, found: Found) -> str:
    """What the label of an arm says of which no run counts."""
    own = [found.get(cell.run) for cell in record.cells if cell.arm == arm]
    there = any(isinstance(run, str) or (run is not None and run.finished) for run in own)
    return "not counted" if there else "unfinished"


def _missing_first(record: StudyRecord, counted: Counted) -> dict[str, list[int]]:
    """The seeds of the first stage of `until` that an arm with others lacks, or its baseline does."""
    first, arms = record.first_stage or (), [arm for arm in counted if arm != record.baseline and counted[arm]]
    missing = {arm: [seed for seed in first if seed not in counted[arm]] for arm in arms}
    return {arm: seeds for arm, seeds in missing.items() if seeds}


def _metrics(task: str, counted: Counted) -> list[Metric]:
    """The primary metric of a task, and those of its others that studies show and that every counted run has."""
    infos = [run.info for by_seed in counted.values() for run in by_seed.values()]
    first, *others = TASKS[task].metrics
    whole = [m for m in others if infos and all(is_number(i.metrics.get(m.key)) for i in infos)]
    return [first, *(m for m in whole if m.in_studies)]


def _columns(record: StudyRecord, metrics: Sequence[Metric], values: Mapping[str, Mapping[str, Value]]) -> list[Column]:
    """One task: cost, metric, difference. Several: the metrics side by side first, and then their details.

    At the end stand secondary figures, as far as there are any.
    """
    several, analysis = len(metrics) > 1, record.analysis

    def each(suffix: str, title: str, style: Style, secondary: bool = several) -> list[Column]:
        def heading(metric: Metric) -> str:
            return f"{title} {metric.title}" if several else title

        return [Column(f"{m.key}{suffix}", heading(m), style, secondary=secondary) for m in metrics]

    label, source = Column("variant", "variant"), Column("source", "source", secondary=True)
    scores = [Column(m.key, m.title, "percent") for m in metrics]
    number = each("_n", "n", "integer", secondary=True)
    interval = each("_interval", f"{100 * (1 - analysis.alpha):g}% interval", "text")
    difference, p = each("_difference", "diff.", "difference"), each("_p", "p (Holm)", "p")
    verdict = each("_verdict", "verdict", "text")
    other = ("_p_sign_flip", "p (sign-flip)") if analysis.test == "paired-t" else ("_p_t", "p (t)")
    further = [
        *each("_p_equivalence", "p (equivalence)", "p", secondary=True),
        *each("_effect", "effect size", "difference", secondary=True),
        *each(*other, "p", secondary=True),
        *each("_bootstrap", "BCa interval", "text", secondary=True),
        *each("_median", "median diff.", "difference", secondary=True),
        *each("_iqm", "IQM diff.", "difference", secondary=True),
    ]
    further = [column for column in further if any(row.get(column.key) not in (None, "") for row in values.values())]
    if several:
        return [label, *scores, *difference, *p, *verdict, *COST_COLUMNS, *number, *interval, *further, source]
    return [label, *number, *COST_COLUMNS, *scores, *difference, *interval, *p, *verdict, *further, source]


def _title(record: StudyRecord, infos: Sequence[RunInfo]) -> str:
    if not infos:
        return f"Ablation: {record.title}"
    data = dict.fromkeys(f"{i.data.name} {i.data.split}" for i in infos)
    models = dict.fromkeys(model_name(i.model_copy(update={"variant": ""})) for i in infos)
    return f"Ablation: {record.title}, {', '.join(models)} on {', '.join(data)}"


def _fill_costs(counted: Counted, values: Mapping[str, dict[str, Value]]) -> None:
    """Parameters, MACs, and the medians of images/s and of the peak of memory in training of each arm; these two only
    where all were measured alike.
    """
    every = [run.info for by_seed in counted.values() for run in by_seed.values()]
    alike, one_device = timed_alike(every), len({(i.machine, i.device) for i in every}) == 1
    for arm, by_seed in counted.items():
        infos = [run.info for run in by_seed.values()]
        if infos:
            memory = [i.peak_memory_mb for i in infos if i.peak_memory_mb is not None]
            speeds = [i.images_per_second for i in infos if i.images_per_second is not None]
            values[arm] |= {
                "params_m": in_units(infos[0].params, 1e6),
                "macs_g": in_units(infos[0].macs, 1e9),
                "macs_input": infos[0].macs_input,
                "images_per_second": median(speeds) if alike and speeds else None,
                "memory_mb": round(median(memory)) if one_device and memory else None,
                "speed_notes": infos[0].speed_notes if alike else "",
            }


def _fill_metric(
    metric: str, counted: Counted, values: Mapping[str, dict[str, Value]], record: StudyRecord
) -> dict[str, Comparison]:
    """Enters the figures of one metric. Returns the comparison of each arm with the baseline, where there is one."""
    analysis = record.analysis
    # the number of seeds follows from the primary metric alone: only its estimate needs the first stage
    first_stage = record.first_stage if metric == analysis.metric else None
    scores = {arm: {s: run.info.metrics[metric] for s, run in by_seed.items()} for arm, by_seed in counted.items()}
    baseline, *others = counted
    compared: dict[str, Comparison] = {}
    for arm in others:
        c = compare(
            scores[arm], scores[baseline], alpha=analysis.alpha, margin=analysis.margin, first_stage=first_stage
        )
        if c is not None:
            compared[arm] = c
    p = {arm: c.p if analysis.test == "paired-t" else c.p_sign_flip for arm, c in compared.items()}
    corrected = dict(zip(compared, holm(list(p.values()), len(others)), strict=True))
    equivalences = holm([c.p_equivalence for c in compared.values()], len(others))
    equivalent = dict(zip(compared, equivalences, strict=True))
    for arm, by_seed in scores.items():
        row = values[arm]
        if by_seed:
            row[metric], row[f"{metric}_ci"] = mean_interval(list(by_seed.values()))
        row[f"{metric}_n"] = len(by_seed)
        row[f"{metric}_by_seed"] = ", ".join(f"{seed}: {value:.4f}" for seed, value in by_seed.items())
        if c := compared.get(arm):
            bootstrap_low, bootstrap_high = c.bootstrap or (None, None)
            row |= {
                f"{metric}_difference": c.difference,
                f"{metric}_low": c.low,
                f"{metric}_high": c.high,
                f"{metric}_interval": _interval(c.low, c.high),
                f"{metric}_p": corrected[arm],
                f"{metric}_p_uncorrected": p[arm],
                f"{metric}_verdict": _verdict(c, corrected[arm], equivalent[arm], analysis),
                f"{metric}_p_equivalence": equivalent[arm],
                f"{metric}_p_t": c.p,
                f"{metric}_p_sign_flip": c.p_sign_flip,
                f"{metric}_bootstrap": _interval(bootstrap_low, bootstrap_high),
                f"{metric}_bootstrap_low": bootstrap_low,
                f"{metric}_bootstrap_high": bootstrap_high,
                f"{metric}_median": c.median,
                f"{metric}_iqm": c.iqm,
                f"{metric}_effect": c.effect,
            }
    return compared


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:+.2f}, {high:+.2f}]".replace("-", "−")


def _verdict(c: Comparison, p: float | None, p_equivalence: float | None, analysis: Analysis) -> str:
    """A word for what is shown; "" where there is no test."""
    if p is not None and p < analysis.alpha:
        return words.BETTER if c.difference > 0 else words.WORSE
    if p_equivalence is not None and p_equivalence < analysis.alpha:
        return words.EQUIVALENT
    return words.UNRESOLVED if p is not None else ""


def _provenance(record: StudyRecord, members: Sequence[Run]) -> dict[str, Value]:
    """Where the figures of an arm come from, by the keys of results.KEYS."""
    infos = [run.info for run in members]
    return {
        "seeds": joined([str(i.seed) for i in infos]),
        "study": record.name,
        "source": "measured",
        "runs": ", ".join(run.name for run in members),
        "command": command(record.argv),
        "data": joined([i.data.name for i in infos]),
        "data_digest": joined([i.data.digest for i in infos]),
        "commit": joined([shared_aspects(i)["code version"] for i in infos]),
        "machine": joined([i.machine for i in infos]),
        "device": joined([i.device for i in infos]),
        "precision": joined([i.precision for i in infos]),
        "finished": max((i.finished for i in infos), default=""),
    }
