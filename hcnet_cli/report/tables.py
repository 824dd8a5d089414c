"""The frame as the paper's tables: which columns, which rows together, what must be said under them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from hcnet_cli.results import BENCHMARKS, METRICS, PROTOCOLS, Column, Kind, Results, Row, Table, is_number, mark_best

MISSING = "–"
TITLES = {"imagenet": "", "coco": "COCO val2017, ", "ade20k": "ADE20K val, "}
OWN_TITLES = {
    "imagenet": "image classification",
    "coco": "detection and instance segmentation, Mask R-CNN",
    "ade20k": "semantic segmentation, UperNet",
}
COMMON = (  # behind the results of every table
    Column("epochs", "epochs", "short", secondary=True),
    Column("seeds", "seeds", secondary=True),
    Column("init", "started from", secondary=True),
    Column("recipe", "recipe", secondary=True),
)
DIFFERENCE = Column("difference", "vs. published", "difference")
SOURCE = Column("source", "source", secondary=True)
SIZE_COLUMNS = (Column("params_m", "#params (M)", "number"), Column("macs_g", "MACs (G)", "number"))
COLUMNS: dict[str, tuple[Column, ...]] = {
    "imagenet": (
        Column("model", "model"),
        Column("img_size", "image", "integer"),
        *SIZE_COLUMNS,
        Column("images_per_second", "images/s", "short"),
        Column("top1", "top-1", "percent", best=True),
        Column("top5", "top-5", "percent", best=True, secondary=True),
    ),
    "coco": (
        Column("model", "backbone"),
        Column("schedule", "schedule", secondary=True),
        Column("box_AP", "box AP", "percent", best=True),
        Column("box_AP50", "box 50", "percent", best=True, secondary=True),
        Column("box_AP75", "box 75", "percent", best=True, secondary=True),
        Column("mask_AP", "mask AP", "percent", best=True),
        Column("mask_AP50", "mask 50", "percent", best=True, secondary=True),
        Column("mask_AP75", "mask 75", "percent", best=True, secondary=True),
        *SIZE_COLUMNS,
    ),
    "ade20k": (
        Column("model", "backbone"),
        *SIZE_COLUMNS,
        Column("mIoU", "mIoU SS", "percent", best=True),
        Column("mIoU_ms", "mIoU MS", "percent", best=True),
    ),
}
MACS = (
    "MACs: multiply-adds of convolutions, linear layers and matrix products{at}; norms, pooling and element-wise work "
)
MACS += "are not counted."
MACS_AT = {
    "imagenet": "",
    "coco": ", at 1280 x 800 with 1000 box and 100 mask RoIs",
    "ade20k": ", at 512 x 2048, without the auxiliary head (which counts in the parameters)",
}
PROTOCOL_NOTES = {
    "Mask R-CNN 1x": "Trained at a single scale or at several: the sources at hand do not say which.",
    "Mask R-CNN 1x (single scale)": "12 epochs, images resized to 1333 x 800 (mmdetection's 1x).",
    "Mask R-CNN 1x (multi-scale)": "12 epochs, shorter side 480 to 800 with random crops (Swin's own 1x).",
    "Mask R-CNN 1x (PVT recipe)": "12 epochs, single scale, AdamW with lr 2e-4 and weight decay 1e-4.",
    "Mask R-CNN 3x": "36 epochs, multi-scale.",
    "UperNet 160k, 512x512": "SS: single scale; MS: multi-scale with flips. vHeat: sliding window; Swin: whole image.",
}
BEST = (("Bold", "measured"), ("Underlined", "published"))
REFERENCE_NOTE = (
    "vs. published: measured minus the published {model} under the same protocol. Which of the two official T "
    "configurations the published number belongs to is not known."
)


def tables(results: Results, which: str = "all") -> list[Table]:
    """Tables of one kind ("imagenet", "coco", "ade20k": also those of other data sets for the same task) or of all.

    A benchmark's table holds the published rows of one protocol and the measured ones that follow it on that data set;
    any other data set, or recipe, has a table of its own.
    """
    made = []
    for family in METRICS:
        if which not in ("all", family):
            continue
        rows = results.rows[results.rows["table"] == family]
        protocols = list(dict.fromkeys(PROTOCOLS[family].values()))
        for protocol in protocols:
            same = rows[rows["protocol"] == protocol]
            if len(same):
                made.append(_table(results, family, f"{TITLES[family]}{protocol}", same, protocol))
        rest = rows[~rows["protocol"].isin(protocols)]
        for (data, digest), group in rest.groupby(["data", "data_digest"], sort=True):
            alone = rest[rest["data"] == data]["data_digest"].nunique() == 1
            name = str(data) if alone else f"{data} ({str(digest)[:8]})"
            own = ", other recipes" if data == BENCHMARKS[family] else ""
            title = f"{name} {group['split'].iloc[0]}: {OWN_TITLES[family]}{own}"
            made.append(_table(results, family, title, group, ""))
    return made


def _table(results: Results, family: str, title: str, group: pd.DataFrame, protocol: str) -> Table:
    order = {"published": 0, "measured": 1, "unfinished": 2}
    group = group.sort_values("kind", key=lambda kinds: kinds.map(order), kind="stable")
    departures: list[str] = []
    rows = []
    for index, values in zip(group.index, group.to_dict("records"), strict=True):
        record: dict[str, Any] = {str(k): (None if _missing(v) else v) for k, v in values.items()}
        record["schedule"] = _schedule(record)
        kind: Kind = record["kind"]
        mark = ""
        if record["changes"]:
            text = f"Departs from {record['recipe']}: {record['changes']}."
            if text not in departures:
                departures.append(text)
            mark = f"[{departures.index(text) + 1}]"
        members = tuple(run.folder for run in results.members.get(index, ()))
        rows.append(Row(kind, record, members, mark=mark))
    columns = list(COLUMNS[family])
    if any(is_number(row.values["difference"]) for row in rows):
        columns.append(DIFFERENCE)
    told = {"epochs"} if family == "coco" else set()  # by the schedule
    columns += [c for c in COMMON if c.key not in told and any(row.values[c.key] not in (None, "") for row in rows)]
    columns.append(SOURCE)
    rows = mark_best(rows, columns)
    notes = [f"[{number}] {text}" for number, text in enumerate(departures, 1)]
    return Table(family, title, columns, rows, [*notes, *_notes(family, protocol, rows)])


def _notes(family: str, protocol: str, rows: Sequence[Row]) -> list[str]:
    measured = [row.values for row in rows if row.kind != "published"]
    published = len(measured) < len(rows)
    notes = [PROTOCOL_NOTES[protocol]] if protocol in PROTOCOL_NOTES else []
    notes += [f"Evaluation: {text}." for text in _unique(measured, "metric_notes")]
    inputs = _unique(measured, "macs_input")
    at = MACS_AT[family] if protocol else f", at {', '.join(inputs)}" if inputs else ""
    notes.append(MACS.format(at=at) + (" Published values as their sources print them." if published else ""))
    if family == "imagenet" and any(is_number(v["images_per_second"]) for v in measured):
        where = _unique(measured, "speed_notes") or _unique(measured, "device")
        notes.append(f"images/s: {'; '.join(where) or 'inference'}.")
    if any(is_number(v) for values in measured for k, v in values.items() if k.endswith("_ci")):
        notes.append("±: half of the 95 % t-interval over the seeds. A single seed is shown without any claim.")
    models = _unique(measured, "reference")
    if models:
        notes.append(REFERENCE_NOTE.format(model=" and ".join(models)))
    if measured and published and any(str(v["size"]) in ("s", "b", "pico") for v in measured):
        notes.append("HcNet-S, -B and -pico are this project's sizes: the authors published no configuration for them.")
    if any(row.kind == "unfinished" for row in rows):
        notes.append("Unfinished runs show the best evaluation so far and are never averaged.")
    if any("," in str(v["commit"] or "") for v in measured):
        notes.append("Some means are over runs of different code versions (see the runs' commits).")
    kinds = {row.kind for row in rows if row.best}
    if kinds:
        notes.append(" ".join(f"{mark}: the best {kind}." for mark, kind in BEST if kind in kinds))
    if any(show(row, c) == MISSING for row in rows for c in COLUMNS[family] if c.key != "model"):
        not_stated = "; in a published row: not stated in the source at hand" if published else ""
        notes.append(f"{MISSING}: not measured{not_stated}.")
    return notes


def _unique(records: Iterable[dict[str, Any] | Any], key: str) -> list[str]:
    return list(dict.fromkeys(str(r[key]) for r in records if r[key]))


def _schedule(record: dict[str, Any]) -> str:
    protocol = record["protocol"]
    return next((s for s in ("1x", "3x", "160k") if f" {s}" in protocol), f"{record['steps_total'] or 0:,} steps")


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# --- one cell as plain text -------------------------------------------------------------------------------------------


def show(row: Row, column: Column) -> str:
    """The text of a cell; a metric measured over several seeds with its interval; "–" where there is nothing."""
    value: Any = row.values.get(column.key)
    if column.key == "model":
        return f"{value}{_state(row)}{' ' if row.mark else ''}{row.mark}"
    if value is None or value == "":
        return "" if row.kind == "published" and column in (*COMMON, DIFFERENCE) else MISSING
    if column.style == "text" or not is_number(value):
        return str(value)
    text = number(value, column.style, as_printed=row.kind == "published")
    half = row.values.get(f"{column.key}_ci")
    return text if half is None else f"{text} ± {number(half, column.style)}"


def number(value: float, style: str, as_printed: bool = False) -> str:
    """`as_printed`: with no more digits than a source gave."""
    if style == "integer":
        return f"{value:,.0f}"
    if style == "percent":
        text = f"{value:.2f}"
        return text[:-1] if as_printed and text.endswith("0") else text
    if style == "difference":
        return f"{value:+.2f}".replace("-", "−")
    if style == "p":
        return f"{value:.3f}" if value >= 0.001 else "< 0.001"
    if style == "short":
        return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.1f}"
    if as_printed:
        return f"{value:.1f}" if abs(value) < 10 and round(value, 1) == value else f"{value:,.10g}"
    if abs(value) < 1:
        return f"{value:.3g}"
    return f"{value:,.{min(2, max(0, 3 - math.floor(math.log10(abs(value)))))}f}"


def _state(row: Row) -> str:
    if row.kind != "unfinished":
        return ""
    done, total = row.values.get("steps_done"), row.values.get("steps_total")
    return (
        f" ({row.values.get('status')} at {100 * done // total} %)" if done is not None and total else " (unfinished)"
    )
