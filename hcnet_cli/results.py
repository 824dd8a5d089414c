"""Runs and published numbers as one tidy frame, and the tables made of it. Measured and published rows never merge."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from hcnet_cli import runs
from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.runs import RunInfo
from hcnet_cli.sizes import SIZES

Kind = Literal["published", "measured", "unfinished"]
FAMILIES = {"pretrain": "imagenet", "finetune-det": "coco", "finetune-seg": "ade20k"}  # task -> kind of table
METRICS = {
    "imagenet": ("top1", "top5"),
    "coco": ("box_AP", "box_AP50", "box_AP75", "mask_AP", "mask_AP50", "mask_AP75"),
    "ade20k": ("mIoU", "mIoU_ms", "mAcc", "aAcc"),
}
# The data set a published table is about, and the protocols it knows: shipped recipe -> protocol of the published rows.
BENCHMARKS = {"imagenet": "imagenet-1k", "coco": "coco", "ade20k": "ade20k"}
PROTOCOLS = {
    "imagenet": {
        "pretrain/imagenet": "ImageNet-1K val, from scratch",
        "pretrain/imagenet-release": "ImageNet-1K val, from scratch",
    },
    "coco": {
        "finetune-det/coco-1x": "Mask R-CNN 1x (multi-scale)",
        "finetune-det/coco-1x-single-scale": "Mask R-CNN 1x (single scale)",
        "finetune-det/coco-3x": "Mask R-CNN 3x",
        "": "Mask R-CNN 1x",  # no recipe: the source does not say which
        "PVT": "Mask R-CNN 1x (PVT recipe)",
    },
    "ade20k": {"finetune-seg/ade20k-160k": "UperNet 160k, 512x512"},
}

PUBLISHED_TEXT = ("table", "protocol", "model", "source")
PUBLISHED_NUMBERS = {  # column of the file -> column of the frame
    "img_size": "img_size",
    "params_m": "params_m",
    "macs_g": "macs_g",
    **{name: name for name in (*METRICS["imagenet"], *METRICS["coco"])},
    "mIoU_ss": "mIoU",
    "mIoU_ms": "mIoU_ms",
}
COLUMNS = [  # of the frame; each metric is followed by half of its 95 % interval and its number of seeds
    *("kind", "table", "task", "data", "data_digest", "split", "protocol", "recipe", "changes", "init"),
    *("model", "size", "variant", "img_size", "params_m", "macs_g", "macs_input", "images_per_second"),
    *(column for names in METRICS.values() for name in names for column in (name, f"{name}_ci")),
    *("difference", "reference", "n", "seeds", "epochs", "steps_done", "steps_total", "batch_size", "precision"),
    *("metric_notes", "status", "source", "runs", "commit", "machine", "device", "speed_notes", "command"),
    *("started", "finished", "error"),
]


# --- what a table is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One column of a table. `style` says how its values are printed (report.tables.show); `best` marks the highest.

    Secondary columns are left out where there is little room.
    """

    key: str
    title: str
    style: Literal["text", "integer", "number", "short", "percent", "difference", "p"] = "text"
    best: bool = False
    secondary: bool = False


@dataclass(frozen=True)
class Row:
    """`values` by column key, with more than the table shows: CSV and JSON carry all of it. `<key>_ci` is half of the
    95 % interval of `<key>`. `best` holds the keys in which no row of the same kind is higher.
    """

    kind: Kind
    values: Mapping[str, Any]
    runs: tuple[Path, ...] = ()
    best: frozenset[str] = frozenset()
    mark: str = ""  # "[1]", pointing to a note


@dataclass(frozen=True)
class Table:
    """A table as data; report/ prints it. `forest`: (label, difference, low, high) of each arm, for a forest plot.

    `whole`: the flag that shows all columns, for where there is room for some.
    """

    name: str  # "imagenet", "coco", "ade20k", "ablation" or "bench"
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    forest: Sequence[tuple[str, float, float, float]] = ()
    whole: str = "--format markdown"

    @property
    def measured(self) -> bool:
        return any(row.kind != "published" for row in self.rows)


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    folder: Path
    info: RunInfo

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        return self.info.status == "finished" and self.info.steps_done >= self.info.steps_total


@dataclass(frozen=True)
class Results:
    """Everything a report is made of. `rows` has COLUMNS; its index is the key of `members`, the runs behind a row."""

    rows: pd.DataFrame
    members: Mapping[int, tuple[Run, ...]] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()
    broken: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()


def collect(results: Iterable[Path], published: Iterable[Path] = ()) -> Results:
    """Reads all runs under `results`, the shipped published numbers, a `published.csv` in each results folder, and
    the files `published`.

    Runs equal in everything but the seed are one row: the mean, with half of its 95 % t-interval for two seeds or
    more. An unfinished run is a row of its own, never averaged. UserError for a published file that is not in order.
    """
    folders = list(results)
    all_runs: list[Run] = []
    broken: list[tuple[Path, str]] = []
    for folder in folders:
        good, bad = runs.find_runs(folder)
        all_runs += [Run(path, info) for path, info in good if info.task in FAMILIES]
        broken += [*bad, *((p, f"{p}: unknown task {i.task}.") for p, i in good if i.task not in FAMILIES)]
    kept, notes = _once(all_runs)
    rows = read_published([shipped_published(), *(f / "published.csv" for f in folders), *published])
    members: dict[int, tuple[Run, ...]] = {}
    for group in _cells(kept):
        counted, repeated = _one_per_seed(group)
        if repeated:
            notes.append(
                f"{', '.join(run.name for run in repeated)}: the same seed as {counted[0].name}'s row has already; "
                "not counted again."
            )
        members[len(rows)] = tuple(counted)
        rows.append(_measured_row(counted))
    frame = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
    _add_differences(frame)
    return Results(frame, members, tuple(kept), tuple(broken), tuple(notes))


def _once(found: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """Each run once, by name and fingerprint: of several records the finished one, the furthest, the latest."""
    by_key: dict[tuple[str, str], list[Run]] = {}
    for run in found:
        by_key.setdefault((run.name, run.info.fingerprint), []).append(run)
    kept, notes = [], []
    for same in by_key.values():
        best = max(same, key=lambda r: (r.finished, r.info.steps_done, r.info.finished, r.info.started))
        kept.append(best)
        if any(run.info != best.info for run in same):
            notes.append(f"{len(same)} different records of {best.name}; {best.folder} is the one used.")
    return sorted(kept, key=lambda run: (run.name, run.info.fingerprint)), notes


def _cells(kept: Iterable[Run]) -> list[list[Run]]:
    """Groups of finished runs that differ in the seed alone; each unfinished run by itself."""
    finished: dict[tuple[Any, ...], list[Run]] = {}
    alone: list[list[Run]] = []
    for run in kept:
        if run.finished:
            finished.setdefault(cell_key(run.info), []).append(run)
        else:
            alone.append([run])
    sizes = list(SIZES)

    def order(group: list[Run]) -> tuple[Any, ...]:
        i = group[0].info
        size = sizes.index(i.size) if i.size in sizes else len(sizes)
        return (
            list(FAMILIES).index(i.task),
            i.data.name,
            i.data.digest,
            i.protocol,
            size,
            i.variant,
            departures(i),
            group[0].name,
        )

    return [*sorted(finished.values(), key=order), *sorted(alone, key=order)]


def cell_key(info: RunInfo) -> tuple[Any, ...]:
    """What two runs must share to be averaged: everything that shapes the result, but the seed."""
    data = info.data
    return (
        *(
            info.task,
            data.name,
            data.digest,
            data.split,
            data.num_val,
            info.protocol,
            repr(sorted(info.changes.items())),
        ),
        *(info.size, info.variant, info.steps_total, info.batch_size, info.precision, info.img_size, init_label(info)),
        (info.evaluated_only, *sorted(info.metric_notes.items())),
    )


def _one_per_seed(group: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """A repeated seed is no new evidence: the latest run of each seed, and those left over."""
    by_seed: dict[int, Run] = {}
    for run in group:
        held = by_seed.get(run.info.seed)
        if held is None or (run.info.finished, run.name) > (held.info.finished, held.name):
            by_seed[run.info.seed] = run
    counted = [by_seed[seed] for seed in sorted(by_seed)]
    return counted, [run for run in group if run not in counted]


def model_name(info: RunInfo) -> str:
    """The name in tables; a changed shape is part of it: "HcNet-T, kernel_size=3"."""
    name = SIZES[info.size].title if info.size in SIZES else f"HcNet-{info.size}"
    return f"{name}, {info.variant}" if info.variant else name


def init_label(info: RunInfo) -> str:
    """Where the weights came from, without seed and fingerprint: "" for random, "pretrain-digits-pico" for a run."""
    source = str(info.init.get("source") or "")
    if source in ("", "none"):
        return ""
    path = Path(source)
    name = path.parent.name if path.name in ("best.safetensors", "last") else path.name
    return re.sub(r"-s\d+-[0-9a-f]{8}$", "", name)


def departures(info: RunInfo) -> str:
    """In what a run differs from the protocol it names, for people; "" when in nothing."""
    parts = [f"{key}={_plain(value)}" for key, value in info.changes.items()]
    start = init_label(info)
    if info.evaluated_only:
        parts.append(f"evaluated only, weights of {start}" if start else "evaluated only, random weights")
    elif info.task == "pretrain" and start:
        parts.append(f"started from {start}")
    elif info.task != "pretrain" and not start:
        parts.append("not pretrained")
    elif re.match("pretrain-(?!imagenet-1k-)", start) and info.data.name in BENCHMARKS.values():
        parts.append(f"started from {start}")
    return ", ".join(parts)


def published_protocol(info: RunInfo) -> str:
    """The protocol of the published rows this run may stand beside; "" when there is none."""
    table = FAMILIES[info.task]
    if info.data.name != BENCHMARKS[table] or not info.data.split.startswith("val"):
        return ""
    return PROTOCOLS[table].get(info.protocol, "") if info.protocol else ""


def command(info: RunInfo) -> str:
    """The command as a person would type it, wherever the program lay."""
    if not info.argv:
        return ""
    program = Path(info.argv[0]).name
    return shlex.join([*(["python", "-m", "hcnet_cli"] if program == "__main__.py" else [program]), *info.argv[1:]])


def epochs(info: RunInfo) -> float | None:
    """Passes over the training set in the whole schedule."""
    per_epoch = info.data.num_train // max(1, info.batch_size)
    return round(info.steps_total / per_epoch, 1) if per_epoch and info.steps_total else None


def _measured_row(group: Sequence[Run]) -> dict[str, Any]:
    infos = [run.info for run in group]
    info = infos[0]
    table = FAMILIES[info.task]
    row: dict[str, Any] = {
        "kind": "measured" if group[0].finished else "unfinished",
        "table": table,
        "task": info.task,
        "data": info.data.name,
        "data_digest": info.data.digest,
        "split": info.data.split,
        "protocol": published_protocol(info) or f"{info.protocol} on {info.data.name}",
        "recipe": info.protocol,
        "changes": departures(info),
        "init": init_label(info),
        "model": model_name(info),
        "size": info.size,
        "variant": info.variant,
        "img_size": info.img_size,
        "params_m": None if info.params is None else info.params / 1e6,
        "macs_g": None if info.macs is None else info.macs / 1e9,
        "macs_input": info.macs_input,
        "images_per_second": _speed(infos),
        "n": len(group),
        "seeds": ", ".join(str(i.seed) for i in infos),
        "epochs": epochs(info),
        "steps_done": info.steps_done,
        "steps_total": info.steps_total,
        "batch_size": info.batch_size,
        "precision": info.precision,
        "metric_notes": "; ".join(f"{name}: {text}" for name, text in sorted(info.metric_notes.items())),
        "status": info.status if group[0].finished or info.status != "finished" else "cut short",
        "source": "measured",
        "runs": ", ".join(run.name for run in group),
        "commit": _joined(i.git_commit[:12] + ("+changes" if i.git_dirty else "") for i in infos),
        "machine": _joined(i.machine for i in infos),
        "device": _joined(i.device for i in infos),
        "speed_notes": _joined(i.speed_notes for i in infos),
        "command": command(info),
        "started": min(i.started for i in infos),
        "finished": max(i.finished for i in infos),
        "error": info.error,
    }
    for name in METRICS[table]:
        values = [i.metrics[name] for i in infos if name in i.metrics]
        if len(values) == len(infos):  # a metric some seeds lack is not averaged over the rest
            row[name], row[f"{name}_ci"] = mean_interval(values)
    return row


def _speed(infos: Sequence[RunInfo]) -> float | None:
    """The mean over runs measured alike; None when machines or settings differ, as their mean would mean nothing."""
    speeds = [i.images_per_second for i in infos if i.images_per_second is not None]
    alike = len({(i.machine, i.device, i.speed_notes) for i in infos if i.images_per_second is not None}) == 1
    return sum(speeds) / len(speeds) if alike else None


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % t-interval (None for one value)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    from scipy.special import stdtrit  # a fifth of the report's start-up time

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)


def _add_differences(frame: pd.DataFrame) -> None:
    """Measured minus the published row the recipe names; only for finished runs that keep to the protocol."""
    for index, row in frame[frame["kind"] == "measured"].iterrows():
        size = SIZES.get(str(row["size"]))
        model = size.published if size else ""
        if not model or row["variant"] or row["changes"]:
            continue
        same = (frame["kind"] == "published") & (frame["table"] == row["table"])
        same &= (frame["protocol"] == row["protocol"]) & (frame["model"] == model)
        if row["table"] == "imagenet":
            same &= frame["img_size"] == row["img_size"]
        primary = METRICS[str(row["table"])][0]
        for _, published in frame[same].head(1).iterrows():
            if is_number(row[primary]) and is_number(published[primary]):
                frame.at[index, "difference"] = row[primary] - published[primary]
                frame.at[index, "reference"] = model


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _joined(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(text for text in texts if text))


def _plain(value: Any) -> str:
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list | tuple) else str(value)


# --- published numbers ------------------------------------------------------------------------------------------------


def shipped_published() -> Path:
    """The published numbers this project ships: inside the wheel, or in a source checkout."""
    here = Path(__file__).parent
    return next(p for p in (here / "published.csv", here.parent / "results" / "published.csv") if p.is_file())


def read_published(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of the frame from published.csv files; files after the first that do not exist are the caller's to check.

    The same row in two files counts once; rows of one model and protocol with unlike numbers are a UserError.
    """
    rows: dict[tuple[str, ...], tuple[dict[str, Any], str]] = {}
    seen: set[Path] = set()
    for file in files:
        if not file.is_file() or file.resolve() in seen:
            continue
        seen.add(file.resolve())
        here: set[tuple[str, ...]] = set()
        for line, row in _read_csv(file):
            key = (row["table"], row["protocol"], row["model"], str(row.get("img_size", "")))
            place = f"{file} line {line}"
            if key in here:
                raise UserError(f'{place}: "{row["model"]}" stands twice for {row["protocol"]} ({rows[key][1]}).')
            here.add(key)
            if key in rows and _numbers(rows[key][0]) != _numbers(row):
                raise UserError(
                    f'{place}: "{row["model"]}" ({row["protocol"]}) has other numbers than {rows[key][1]}.',
                    hint='Remove one, or give a row from another source a name of its own, such as "Swin-T (re-run)".',
                )
            rows.setdefault(key, (row, place))
    return [row for row, _ in rows.values()]


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in PUBLISHED_NUMBERS.values()}


def _read_csv(file: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle)
            header = next(reader, [])
            lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as CSV: {error}.") from None
    known = [*PUBLISHED_TEXT, *PUBLISHED_NUMBERS]
    for name in header:
        if name not in known:
            raise UserError(
                f'{file}: unknown column "{name}".{did_you_mean(name, known)}', hint=f"Columns: {', '.join(known)}."
            )
    missing = [name for name in PUBLISHED_TEXT if name not in header]
    if missing or len(set(header)) < len(header):
        what = f"the column {missing[0]} is missing" if missing else "a column stands twice"
        raise UserError(f"{file}: {what}.", hint=f"Columns: {', '.join(known)}.")
    rows = []
    for line, cells in lines:
        if len(cells) != len(header):
            raise UserError(f"{file} line {line} has {len(cells)} cells, the header {len(header)}.")
        rows.append((line, _published_row(dict(zip(header, cells, strict=True)), f"{file} line {line}")))
    return rows


def _published_row(cells: Mapping[str, str], place: str) -> dict[str, Any]:
    row: dict[str, Any] = {name: cells[name].strip() for name in PUBLISHED_TEXT}
    for name in PUBLISHED_TEXT:
        if not row[name]:
            raise UserError(f'{place}: "{name}" is empty.')
    known = PROTOCOLS.get(row["table"])
    if known is None:
        raise UserError(f'{place}: unknown table "{row["table"]}" (known: {", ".join(PROTOCOLS)}).')
    if row["protocol"] not in known.values():
        raise UserError(
            f'{place}: unknown protocol "{row["protocol"]}".{did_you_mean(row["protocol"], known.values())}',
            hint=f"Known for {row['table']}: {'; '.join(dict.fromkeys(known.values()))}.",
        )
    for name, column in PUBLISHED_NUMBERS.items():
        text = cells.get(name, "").strip()
        if text:
            row[column] = _number(text, column, name, place)
    metrics = [name for name in METRICS[row["table"]] if name in row]
    if not metrics:
        raise UserError(f"{place}: no result in it ({', '.join(METRICS[row['table']])} are all empty).")
    return {"kind": "published", "data": BENCHMARKS[row["table"]], **row, "status": "published"}


def _number(text: str, column: str, name: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f'{place}: "{name}" is "{text}", not a number.') from None
    highest = math.inf if column in ("img_size", "params_m", "macs_g") else 100.0
    if not 0 <= value <= highest or math.isinf(value):
        limit = "between 0 and 100 (per cent)" if highest == 100 else "a positive number"
        raise UserError(f'{place}: "{name}" is {text}, not {limit}.')
    return int(value) if value.is_integer() and column == "img_size" else value


# --- marks -----------------------------------------------------------------------------------------------------------


def mark_best(rows: Sequence[Row], columns: Sequence[Column]) -> list[Row]:
    """The rows with `best` filled in: measured and published each by themselves, where there are two to choose from."""
    marks: list[set[str]] = [set() for _ in rows]
    for column in (c for c in columns if c.best):
        for kind in ("measured", "published"):
            values = {
                i: row.values[column.key]
                for i, row in enumerate(rows)
                if row.kind == kind and is_number(row.values.get(column.key))
            }
            if len(values) > 1:
                for i, value in values.items():
                    if value == max(values.values()):
                        marks[i].add(column.key)
    return [dataclasses.replace(row, best=frozenset(m)) for row, m in zip(rows, marks, strict=True)]
