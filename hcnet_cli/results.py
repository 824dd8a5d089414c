"""Runs and published numbers as rows, and the paper's tables. Measured and published rows never merge."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hcnet_cli import privacy, runs
from hcnet_cli.grouping import (
    Run,
    changes_text,
    deduplicate,
    group_by_config,
    independent,
    init_label,
    recipe_values,
    tell_apart,
)
from hcnet_cli.last_step import last_step
from hcnet_cli.privacy import mask
from hcnet_cli.published import METRICS, read_published, shipped_published
from hcnet_cli.runs import RunInfo
from hcnet_cli.sizes import SIZES
from hcnet_cli.statistics import mean_interval
from hcnet_cli.table import MISSING, Column, Kind, Row, Table, Value, is_number, joined, mark_best
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.spec import Spec

FIGURES = tuple(figure.key for spec in TASKS.values() for figure in spec.figures)
KEYS = (  # of a row's values; each metric is followed by half of its 95 % interval
    *("kind", "table", "task", "data", "data_digest", "split", "protocol", "recipe", "changes", "init"),
    *("model", "size", "variant", "img_size", "params_m", "macs_g", "macs_input", "images_per_second"),
    *(key for metric in (*METRICS.values(), *FIGURES) for key in (metric, f"{metric}_ci")),
    *("difference", "reference", "n", "seeds", "epochs", "steps_done", "steps_total", "batch_size", "precision"),
    *("metric_notes", "status", "source", "runs", "commit", "machine", "device", "speed_notes", "command"),
    *("started", "finished", "error", "schedule", "data_notes"),
)
DIFFERENCE = Column("difference", "vs. published", "difference", measured_only=True)
RUN_COLUMNS = (  # after the task's own columns, where a run has the value
    Column("epochs", "epochs", "short", secondary=True, measured_only=True),
    Column("seeds", "seeds", secondary=True, measured_only=True),
    Column("init", "started from", secondary=True, measured_only=True),
    Column("recipe", "recipe", secondary=True, measured_only=True),
)
SOURCE = Column("source", "source", secondary=True)
MACS_NOTE = (
    "MACs: multiply-adds of convolutions, linear layers and matrix products{at}; norms, pooling and element-wise work "
    "are not counted."
)
DIFFERENCE_NOTE = (
    "vs. published: measured minus the published {model} under the same protocol. Which of the two official T "
    "configurations the published number belongs to is not known."
)


@dataclass(frozen=True)
class Results:
    """What a report is made of. The values of each row have all KEYS."""

    rows: tuple[Row, ...]
    runs: tuple[Run, ...] = ()
    broken: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()
    public: bool = False  # without what is nobody else's concern, see privacy.public


def collect(results: Iterable[Path], published: Iterable[Path] = (), public: bool = False) -> Results:
    """Reads the runs under `results`, and the published numbers: the shipped ones, `published.csv` in each results
    folder, and the files `published`.

    Runs that differ in the seed alone are one row: the mean, with half of its 95 % t-interval from two seeds on. An
    unfinished run is a row of its own. Rows that would look alike say in what they differ. UserError for a published
    file with a mistake.
    """
    folders = list(results)
    all_runs: list[Run] = []
    broken: list[tuple[Path, str]] = []
    for folder in folders:
        good, bad = runs.find_runs(folder)
        all_runs += [Run(path, public_record(info) if public else info) for path, info in good if info.task in TASKS]
        broken += [*bad, *((p, f"{p}: unknown task {i.task}.") for p, i in good if i.task not in TASKS)]
    kept, notes = deduplicate(all_runs)
    published_values = read_published([shipped_published(), *(f / "published.csv" for f in folders), *published])
    rows = [_row(values) for values in published_values]
    groups = group_by_config(kept)
    apart = tell_apart(groups)
    for number, group in enumerate(groups):
        counted, reasons = independent(group)
        notes += reasons
        values = _measured_values(counted)
        if number in apart:
            values["changes"] = ", ".join(filter(None, (str(values["changes"]), apart[number])))
        if counted[0].finished:
            values |= _difference(values, published_values)
        rows.append(_row(values, counted))
    if lost := [run.name for run in kept if run.finished and run.info.weights and not run.has_weights]:
        more = ", ..." if len(lost) > 3 else ""
        notes.append(f"Without best.safetensors, counted by their records alone: {', '.join(lost[:3])}{more}.")
    found = Results(tuple(rows), tuple(kept), tuple(broken), tuple(notes), public)
    return dataclasses.replace(found, broken=privacy.public(found.broken)) if public else found


def public_record(info: RunInfo) -> RunInfo:
    """A record without secrets, folders, and the names of computer and user."""
    content = privacy.public(info.model_dump())
    for session in (content, *content["sessions"]):
        name, system, rest = re.split(r"(\b(?:Linux|Darwin|Windows)\b|\Z)", session["machine"], maxsplit=1)
        session |= {"host": "", "machine": system + rest if system else name}  # version 0.1 put the name first
    return RunInfo.model_validate(content)


def public_table(table: Table, base: Path | None) -> Table:
    """A table without secrets, folders and names. Links to runs lead to `base`/results/runs/, if given."""
    rows = []
    for row in table.rows:
        runs = tuple(base / "results" / "runs" / run.name for run in row.runs) if base else row.runs
        values = privacy.public(dict(row.values)) if row.kind != "published" else row.values
        rows.append(dataclasses.replace(row, values=values, runs=runs))
    return dataclasses.replace(table, rows=rows, notes=privacy.public(list(table.notes)))


def _row(values: Mapping[str, Value], members: Sequence[Run] = ()) -> Row:
    kind: Kind = "published" if not members else "measured" if members[0].finished else "unfinished"
    whole = {**dict.fromkeys(KEYS), **values, "kind": kind, "schedule": _schedule(values, members)}
    return Row(kind, whole, tuple(run.folder for run in members))


def _schedule(values: Mapping[str, Value], members: Sequence[Run]) -> str:
    """The length that a published protocol names, such as 1x or 160k, where it is kept, else the number of steps."""
    info = members[0].info if members else None
    named = re.search(r"(?<= )\d+[xk]\b", published_protocol(info) if info else str(values["protocol"]))
    kept = info is None or not {"schedule.length", "schedule.unit"} & info.changes.keys()
    return named[0] if named and kept else f"{values.get('steps_total') or 0:,} steps"


# --- what a run says about itself -------------------------------------------------------------------------------------


def model_name(info: RunInfo) -> str:
    """The name in tables; a changed shape is part of it: "HcNet-T, kernel_size=3"."""
    name = info.model or (SIZES[info.size].title if info.size in SIZES else f"HcNet-{info.size}")
    return f"{name}, {info.variant}" if info.variant else name


def published_protocol(info: RunInfo) -> str:
    """The protocol of the published rows that the run is comparable with; "" if there is none."""
    spec = TASKS[info.task]
    if not info.protocol or info.data.name != spec.benchmark or not info.data.split.startswith("val"):
        return ""
    return spec.protocols.get(info.protocol, "")


def command(argv: Sequence[str]) -> str:
    """A command as a person would type it, wherever the program was installed, without secrets."""
    if not argv:
        return ""
    argv = mask(argv)  # records of version 0.1 have them
    program = Path(argv[0]).name
    return shlex.join([*(["python", "-m", "hcnet_cli"] if program == "__main__.py" else [program]), *argv[1:]])


def epochs(info: RunInfo, steps: int | None = None) -> float | None:
    """Passes over the training set in so many steps, by default those of the whole schedule."""
    per_epoch = info.steps_per_epoch or info.data.num_train // max(1, info.batch_size)
    steps = info.steps_total if steps is None else steps
    return round(steps / per_epoch, 1) if per_epoch and info.steps_total else None


def stopped_early(infos: Sequence[RunInfo]) -> str:
    """Where train.patience ended runs, for people; "" where it ended none."""
    at = joined([f"{i.steps_done:,}" for i in infos if i.stopped_early])
    return f"stopped early at step {at} of {infos[0].steps_total:,}" if at else ""


def metric_notes(notes: Mapping[str, str]) -> str:
    """Protocols by score, for people. What a further evaluation (ece_ms) shares with the first (ece) is said once."""
    own = {name: text for name, text in sorted(notes.items()) if notes.get(name.rpartition("_")[0]) != text}
    return "; ".join(f"{name}: {text}" for name, text in own.items())


def image_size(run: Run) -> int | None:
    """The side of a classifier's images; else the short side of the scale that images are rescaled to, by the recipe:
    older records have the size that MACs are counted at.
    """
    spec = TASKS[run.info.task]
    values = {} if spec.compare_by_image_size else recipe_values(run)
    sides = values.get(next(iter(spec.size_keys), ""))
    return min(sides) if isinstance(sides, list) and sides else run.info.img_size


def further_evaluations(info: RunInfo) -> list[str]:
    """Names of the evaluations beside the first, whose scores end in them: "large" of top1_large."""
    start = f"{TASKS[info.task].primary.key}_"
    return [key.removeprefix(start) for key in info.metrics if key.startswith(start) and key in info.metric_notes]


def in_units(count: int | None, unit: float) -> float | None:
    return None if count is None else count / unit


def timed_alike(infos: Iterable[RunInfo]) -> bool:
    """Whether all speeds were measured on one machine with the same settings; else their mean has no meaning."""
    return len({(i.machine, i.device, i.speed_notes) for i in infos if i.images_per_second is not None}) == 1


def _measured_values(group: Sequence[Run]) -> dict[str, Value]:
    infos = [run.info for run in group]
    info = infos[0]
    spec = TASKS[info.task]
    sessions = [session for i in infos for session in i.all_sessions()]
    speeds = [i.images_per_second for i in infos if i.images_per_second is not None]
    done = last_step(group[0].folder, info)
    values: dict[str, Value] = {
        "table": spec.table,
        "task": info.task,
        "data": info.data.name,
        "data_digest": info.data.digest,
        "split": info.data.split,
        "protocol": published_protocol(info) or f"{info.protocol} on {info.data.name}",
        "recipe": info.protocol,
        "changes": ", ".join(filter(None, [changes_text(info), stopped_early(infos)])),
        "init": init_label(info),
        "model": model_name(info),
        "size": info.size,
        "variant": info.variant,
        "img_size": image_size(group[0]),
        "params_m": in_units(info.params, 1e6),
        "macs_g": in_units(info.macs, 1e9),
        "macs_input": info.macs_input,
        "images_per_second": sum(speeds) / len(speeds) if timed_alike(infos) else None,
        "n": len(group),
        "seeds": ", ".join(str(i.seed) for i in infos),
        "epochs": epochs(info, None if group[0].finished else done),
        "steps_done": done,
        "steps_total": info.steps_total,
        "batch_size": info.batch_size,
        "precision": info.precision,
        "metric_notes": metric_notes(info.metric_notes),
        "status": group[0].state,
        "source": "measured",
        "runs": ", ".join(run.name for run in group),
        "commit": joined([s.code for s in sessions if s.git_commit]),
        "machine": joined([s.machine for s in sessions]),
        "device": joined([s.device for s in sessions]),
        "speed_notes": joined([i.speed_notes for i in infos]),
        "command": joined([command(s.argv) for s in info.all_sessions()], "; then "),
        "started": min(i.started for i in infos),
        "finished": max(i.finished for i in infos),
        "error": info.error,
        "data_notes": " ".join(dict.fromkeys(note for i in infos for note in i.data.notes)),
    }
    of_task = [metric.key for metric in (*spec.metrics, *spec.figures)]
    further = [f"{key}_{name}" for name in further_evaluations(info) for key in of_task]
    for key in of_task + [key for key in further if key in info.metrics]:
        alike = len({i.metric_notes.get(key) for i in infos}) == 1
        if alike and all(key in i.metrics for i in infos):  # what some seeds lack is not averaged over the others
            values[key], values[f"{key}_ci"] = mean_interval([i.metrics[key] for i in infos])
    return values


def _difference(values: Mapping[str, Value], published: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    """Measured minus the published row of the same model, for runs that follow the protocol."""
    size = SIZES.get(str(values["size"]))
    if not size or not size.published or values["variant"] or values["changes"]:
        return {}
    spec = TASKS[str(values["task"])]
    shared = ("table", "protocol", *(["img_size"] if spec.compare_by_image_size else []))
    for row in published:
        if row["model"] == size.published and all(row.get(key) == values[key] for key in shared):
            ours, theirs = values.get(spec.primary.key), row.get(spec.primary.key)
            if is_number(ours) and is_number(theirs):
                return {"difference": ours - theirs, "reference": size.published}
            return {}
    return {}


# --- the paper's tables -----------------------------------------------------------------------------------------------


def tables(results: Results, which: str = "all") -> list[Table]:
    """The tables of one task, by `Spec.table`, or of all tasks.

    A benchmark has a table for each published protocol, with the measured rows that follow it on that data set. Any
    other data set or recipe has a table of its own.
    """
    made = []
    infos = {run.folder: run.info for run in results.runs}
    for spec in TASKS.values():
        if which not in ("all", spec.table):
            continue
        by_protocol: dict[str, list[Row]] = {protocol: [] for protocol in spec.protocols.values()}
        by_data: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in results.rows:
            if row.values["table"] == spec.table:
                protocol = str(row.values["protocol"])
                if protocol in by_protocol:
                    by_protocol[protocol].append(row)
                else:
                    by_data[str(row.values["data"]), str(row.values["data_digest"])].append(row)
        common = os.path.commonprefix(list(by_protocol)) if len(by_protocol) > 1 else ""  # noqa: RUF071
        for protocol, rows in by_protocol.items():
            if rows:
                title = f"{spec.benchmark_title}{protocol}"
                short = f"{re.sub(' val.*', '', title)} {protocol.removeprefix(common)}" if common else ""
                made.append(_table(spec, title, rows, infos, protocol, short))
        for (name, digest), rows in sorted(by_data.items(), key=lambda item: item[0]):
            several = sum(name == other for other, _ in by_data) > 1
            place = f"{name} ({digest[:8]})" if several else name
            recipes = ", other recipes" if name == spec.benchmark else ""
            title = f"{place} {rows[0].values['split']}: {spec.subject}{recipes}"
            made.append(_table(spec, title, rows, infos))
    return made


def _table(
    spec: Spec, title: str, found: Sequence[Row], infos: Mapping[Path, RunInfo], protocol: str = "", short: str = ""
) -> Table:
    marks: dict[str, str] = {}  # note -> mark
    rows = []
    for row in sorted(found, key=lambda row: ("published", "measured", "unfinished").index(row.kind)):
        if row.values["changes"]:
            text = f"Departs from {row.values['recipe']}: {row.values['changes']}."
            row = dataclasses.replace(row, mark=marks.setdefault(text, f"[{len(marks) + 1}]"))
        rows.append(row)
    columns = [c for c in spec.columns if not c.measured_only or any(row.values[c.key] is not None for row in rows)]
    measured = {row.runs[0]: infos[row.runs[0]] for row in rows if row.runs}
    columns += _own_evaluations(spec, measured.values())
    if any(is_number(row.values["difference"]) for row in rows):
        columns.append(DIFFERENCE)
    for column in RUN_COLUMNS:
        in_schedule = column.key == "epochs" and spec.schedule_column
        if not in_schedule and any(row.values[column.key] not in (None, "") for row in rows):
            columns.append(column)
    columns.append(SOURCE)
    table = Table(spec.table, title, columns, mark_best(rows, columns), short=short)
    shown = {column.key for column in columns}
    of_columns = [{key: text for key, text in i.metric_notes.items() if key in shown} for i in measured.values()]
    evaluation = dict.fromkeys(f"Evaluation: {text}." for notes in of_columns if (text := metric_notes(notes)))
    notes = [f"{mark} {text}" for text, mark in marks.items()]
    return dataclasses.replace(table, notes=notes + _notes(spec, protocol, table, evaluation))


def _own_evaluations(spec: Spec, infos: Iterable[RunInfo]) -> list[Column]:
    """A column for the primary score of each evaluation under a user's own name: top1_large of `evaluation.large`."""
    metric, known = spec.primary, {column.key for column in spec.columns}
    names = sorted({name for info in infos for name in further_evaluations(info)})
    made = [(f"{metric.key}_{name}", f"{metric.title} {name}") for name in names]
    return [
        Column(key, title, "percent", secondary=True, measured_only=True) for key, title in made if key not in known
    ]


def _notes(spec: Spec, protocol: str, table: Table, evaluation: Iterable[str]) -> list[str]:
    measured = [row.values for row in table.rows if row.kind != "published"]
    published = len(measured) < len(table.rows)

    def each(key: str) -> list[str]:
        return list(dict.fromkeys(str(values[key]) for values in measured if values[key]))

    notes = [spec.protocol_notes[protocol]] if protocol in spec.protocol_notes else []
    notes += evaluation
    notes += each("data_notes")
    inputs = ", ".join(each("macs_input"))
    at = spec.macs_note if protocol else f", at {inputs}" if inputs else ""
    notes.append(MACS_NOTE.format(at=at) + (" Published values as their sources print them." if published else ""))
    if spec.times_inference and any(is_number(values["images_per_second"]) for values in measured):
        where = each("speed_notes") or each("device")
        notes.append(f"images/s: {'; '.join(where) or 'inference'}.")
    if any(is_number(value) for values in measured for key, value in values.items() if key.endswith("_ci")):
        notes.append("±: half of the 95 % t-interval over the seeds. A single seed is shown without any claim.")
    if models := each("reference"):
        notes.append(DIFFERENCE_NOTE.format(model=" and ".join(models)))
    own_sizes = [name for name, size in SIZES.items() if not size.published]
    if measured and published and any(values["size"] in own_sizes for values in measured):
        notes.append("HcNet-S, -B and -pico are this project's sizes: the authors published no configuration for them.")
    if any(row.kind == "unfinished" for row in table.rows):
        notes.append("Unfinished runs show the best evaluation so far and are never averaged.")
    if any("," in str(values["commit"] or "") for values in measured):
        notes.append("Some rows are of several code versions (see the runs' commits).")
    best = [
        f"{style}: the best {kind}."
        for style, kind in (("Bold", "measured"), ("Underlined", "published"))
        if any(row.best and row.kind == kind for row in table.rows)
    ]
    notes += [" ".join(best)] if best else []
    if any(table.show(row, column) == MISSING for row in table.rows for column in spec.columns):
        not_stated = "; in a published row: not stated in the source at hand" if published else ""
        notes.append(f"{MISSING}: not measured{not_stated}.")
    return notes
