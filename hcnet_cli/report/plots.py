"""What the figures of runs and tables show, as data: drawn on the page (`page`) and for papers (`paper`)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from hcnet_cli import runs
from hcnet_cli.console import UserError, warn
from hcnet_cli.grouping import Run, changes_text
from hcnet_cli.report.figures import Point
from hcnet_cli.results import model_name
from hcnet_cli.table import Column, Row, Table, is_number
from hcnet_cli.tasks import TASKS

CURVE_POINTS = 120  # of each curve; more is finer than a screen shows
DRAWN = 1e9  # figures leave out what is larger: no model has such values, and axes need room
KINDS = ("loss", "metric", "lr")  # of curves


@dataclass(frozen=True)
class Scatter:
    """The primary metric of a table's models over their MACs or parameters."""

    x: str  # "macs" or "params"
    title: str
    x_title: str
    y_title: str
    points: list[Point]


def first_runs(tables: Sequence[Table]) -> Iterator[tuple[Table, Row, Path]]:
    """The first run of each row, whose pictures stand for all of them; once where several tables have it."""
    seen: set[Path] = set()
    for table in tables:
        for row in table.rows:
            if row.runs and row.runs[0] not in seen:
                seen.add(row.runs[0])
                yield table, row, row.runs[0]


def primary(table: Table) -> Column | None:
    """The metric that the models of a table are compared by; None for ablations."""
    return next((c for c in table.columns if c.best and not table.forest), None)


def short_title(table: Table) -> str:
    """A title for links: its own, else the part of the whole title before the split."""
    return table.short or re.sub(" val.*", "", table.title)


def scatters(table: Table) -> list[Scatter]:
    """Accuracy against MACs and against parameters, where there are enough models for a figure."""
    made: list[Scatter] = []
    metric = primary(table)
    if metric is None:
        return made
    for x, x_title in (("macs_g", "MACs (G)"), ("params_m", "#params (M)")):
        points = [point for row in table.rows if (point := _point(table, row, x, metric))]
        if len({p.x for p in points}) < 2 or (len(points) < 4 and any(p.kind == "published" for p in points)):
            continue
        y_title = f"{metric.title} (%)" if metric.style == "percent" else metric.title
        title = f"{metric.title} against {x_title}"
        made.append(Scatter(x.partition("_")[0], title, f"{x_title}, log scale", y_title, points))
    return made


def forest_title(table: Table) -> str:
    """What the arms are compared with: the baseline, whose row is the first."""
    return f"difference to {table.label(table.rows[0])}"


def forest_arms(table: Table) -> list[tuple[str, float, float, float]]:
    """(label, difference, low, high) of the arms that can be drawn."""
    return [arm for arm in table.forest if drawn(arm[1]) and all(map(drawn, filter(math.isfinite, arm[2:])))]


def _point(table: Table, row: Row, x: str, y: Column) -> Point | None:
    x_value, y_value, half = row.values.get(x), row.values.get(y.key), row.values.get(f"{y.key}_ci")
    if row.kind == "unfinished" or not drawn(x_value) or not drawn(y_value) or x_value < 1 / DRAWN:
        return None
    model = table.label(row)
    title = f"{model}: {y.title} {table.show(row, y)}, {x_value:.4g} {'G MACs' if x == 'macs_g' else 'M parameters'}"
    series = _series(table, row) if row.kind == "published" else short_label(table, row)
    return Point(x_value, y_value, row.kind, series, f"{title} ({row.kind})", half if drawn(half) else None)


def short_label(table: Table, row: Row) -> str:
    """A measured model without its changed shape, unless another row is told apart by that alone."""
    return _without_shape(table.label(row), [table.label(other) for other in table.rows])


def _without_shape(name: str, names: Iterable[str]) -> str:
    short = name.partition(", ")[0]
    return name if any(other != name and other.partition(", ")[0] == short for other in names) else short


def _series(table: Table, row: Row) -> str:
    """The line that a published model belongs to: the sizes of one family, each image size apart."""
    model = table.label(row)
    family = model.split("-")[0]
    models = [table.label(r) for r in table.rows if r.kind == "published"]
    if sum(other.startswith(f"{family}-") for other in models) == 1:
        return model
    image = row.values.get("img_size")
    usual = Counter(r.values.get("img_size") for r in table.rows).most_common(1)[0][0]
    if image == usual:
        return family
    return f"{model} at {image}" if image else model


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A run over its steps: [step, value] for each of KINDS, at most CURVE_POINTS each."""

    run: Run
    model: str  # its name, without a changed shape where no other run of the same data needs it
    metric: str
    changes: Mapping[str, Any]  # settings, without those that all runs of the same data and metric share
    points: Mapping[str, list[list[float]]]

    @property
    def label(self) -> str:
        return label(self.run, self.model, self.changes, f", seed {self.run.info.seed}")

    @property
    def setting(self) -> str:
        return label(self.run, self.model, self.changes)

    @property
    def data(self) -> str:
        return self.run.info.data.name

    @property
    def best(self) -> float:
        return self.run.info.metrics.get(self.metric) or -1


def curves(all_runs: Sequence[Run]) -> list[Curve]:
    """Of each run with a log, the running ones first, then the best."""
    found = []
    for run in all_runs:
        try:
            log = runs.read_log(run.folder / "metrics.jsonl")
        except UserError as error:
            warn(f"{error} The run has no curves.")
            continue
        metric = TASKS[run.info.task].primary.key
        points = {name: thinned(log, key) for name, key in zip(KINDS, ("loss", metric, "lr"), strict=True)}
        if any(points.values()):
            found.append((run, metric, points))
    made = []
    for run, metric, points in found:
        alike = [r for r, *_ in found if (r.info.data.name, r.info.task) == (run.info.data.name, run.info.task)]
        model = _without_shape(model_name(run.info), [model_name(r.info) for r in alike])
        made.append(Curve(run, model, metric, _own_changes(run, alike), points))
    return sorted(made, key=lambda curve: (curve.run.state != "running", -curve.best))


def _own_changes(run: Run, alike: Sequence[Run]) -> dict[str, Any]:
    shared = {k: v for k, v in run.info.changes.items() if all(r.info.changes.get(k) == v for r in alike)}
    return {k: v for k, v in run.info.changes.items() if len(alike) == 1 or k not in shared}


def label(run: Run, model: str, changes: Mapping[str, Any], seed: str = "") -> str:
    """A run by model and settings: "HcNet-pico, seed 1 (optim.lr=0.004)"."""
    text = changes_text(run.info.model_copy(update={"changes": dict(changes)}))
    return f"{model}{seed}{f' ({text})' if text else ''}"


def drawn(value: object) -> TypeGuard[float]:
    return is_number(value) and abs(value) < DRAWN


def thinned(log: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[step, value] of every entry, or of CURVE_POINTS evenly spaced ones with the last among them."""
    entries = [e for e in log if drawn(e.get("step")) and e["step"] >= 0 and drawn(e.get(key))]
    points = [[int(e["step"]), float(f"{e[key]:.5g}")] for e in entries]
    if len(points) <= CURVE_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]
