"""One self-contained HTML page: tables, figures, training curves, pictures, and where every number comes from."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from hcnet_cli import runs
from hcnet_cli.report import svg
from hcnet_cli.report.tables import MISSING, number, show
from hcnet_cli.results import (
    FAMILIES,
    METRICS,
    Column,
    Results,
    Row,
    Run,
    Table,
    command,
    departures,
    is_number,
    model_name,
)

CURVE_POINTS = 120  # of each curve; more is finer than a screen shows
PICTURES_PER_ROW = 4
PICTURE_WIDTH = 900
PICTURE_BYTES = 200_000  # a file above this is made smaller
ALL_PICTURES_BYTES = 8_000_000  # of the page; what comes later is counted, not shown
PICTURE_FOLDERS = {"final/pictures": "predictions", "explain": "inside the heat layers"}
ON_PHONES_HIDDEN = ("img_size", "images_per_second", "difference")  # besides the secondary columns
TOLD_ELSEWHERE = ("seeds", "recipe")  # columns: the links to the runs are the seeds, the runs tell their recipe


def html(made: Sequence[Table], notes: Sequence[str], found: Results, refresh: float | None = None) -> str:
    """The page. Tables with measured rows come first. `refresh`: seconds after which it loads itself again."""
    anchors = {run.folder: f"run-{i}" for i, run in enumerate(found.runs)}
    ordered = sorted(made, key=lambda table: not table.measured)
    sections = [_section(table, f"table-{i}", anchors) for i, table in enumerate(ordered)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pictures, left_out = _pictures(ordered)
    finished = sum(run.finished for run in found.runs)
    return (
        environment.get_template("page.html").render(
            measured=[s for s in sections if s["measured"]],
            published=[s for s in sections if not s["measured"]],
            cards=[card for table in ordered if (card := _card(table))],
            runs=[_run(run, anchors[run.folder]) for run in found.runs],
            finished=finished,
            unfinished=len(found.runs) - finished,
            data_sets=len({run.info.data.name for run in found.runs}),
            curves=_script(_curves(found.runs, anchors)),
            pictures=pictures,
            left_out=left_out,
            notes=notes,
            refresh=refresh,
        )
        + "\n"
    )


def _script(data: Any) -> Markup:
    """JSON that may stand inside a script element, whatever the names in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


# --- tables and figures ---------------------------------------------------------------------------------------------


def _section(table: Table, anchor: str, anchors: Mapping[Path, str]) -> dict[str, Any]:
    shown = [c for c in table.columns if c.key not in TOLD_ELSEWHERE]
    columns = [
        {
            "title": c.title,
            "text": c.style == "text",
            "wide": c.secondary or c.key in ON_PHONES_HIDDEN,
            "source": c.key == "source",
        }
        for c in shown
    ]
    rows = [{"kind": row.kind, "cells": [_cell(row, column, anchors) for column in shown]} for row in table.rows]
    sources = [(show(row, shown[0]), str(row.values.get("source"))) for row in table.rows if row.kind == "published"]
    return {
        "id": anchor,
        "title": table.title,
        "short": _short(table.title),
        "sources": sources,
        "measured": table.measured,
        "columns": columns,
        "rows": rows,
        "notes": table.notes,
        "figures": _figures(table),
        "forest": _forest(table),
        "hides": any(c["wide"] for c in columns),
    }


def _cell(row: Row, column: Column, anchors: Mapping[Path, str]) -> dict[str, Any]:
    """Text, sort value, and for a source the links to its runs."""
    value = row.values.get(column.key)
    text, _, half = show(row, column).partition(" ± ") if is_number(value) else (show(row, column), "", "")
    cell: dict[str, Any] = {"text": text, "half": half, "best": row.kind if column.key in row.best else ""}
    cell["sort"] = f"{value:.10g}" if is_number(value) else "" if text == MISSING else text
    if column.key == "source" and not row.runs:
        cell["whole"] = cell["text"]
        cell["text"] = re.split(r" \(|[;.,] ", cell["text"])[0]
    elif column.key == "source":
        seeds = str(row.values.get("seeds") or "").split(", ")
        names = seeds if len(seeds) == len(row.runs) else [run.name for run in row.runs]
        cell["links"] = [{"to": anchors.get(run, ""), "text": n} for run, n in zip(row.runs, names, strict=True)]
    return cell


def _short(title: str) -> str:
    """Such as "COCO val2017, Mask R-CNN 1x (multi-scale)" -> "COCO 1x (multi-scale)", and for most the data set."""
    return re.sub(" val.*", "", title.replace(" val2017, Mask R-CNN", ""))


def _card(table: Table) -> dict[str, str] | None:
    """The best finished result of a table, in one line."""
    primary = next((c for c in table.columns if c.best), None)
    rows = [row for row in table.rows if row.kind == "measured" and primary and is_number(row.values.get(primary.key))]
    if primary is None or not rows or table.forest:
        return None
    best = max(rows, key=lambda row: float(row.values[primary.key]))
    text, _, half = show(best, primary).partition(" ± ")
    seeds = int(best.values.get("n") or 1)
    return {
        "title": _short(table.title),
        "value": text,
        "half": half,
        "metric": primary.title,
        "model": show(best, table.columns[0]),
        "seeds": f"{seeds} seeds" if seeds > 1 else "one seed",
    }


def _figures(table: Table) -> list[dict[str, Any]]:
    """Accuracy against MACs and against parameters, each drawn for wide and for narrow screens."""
    primary = next((c for c in table.columns if c.best), None)
    if primary is None or table.forest:
        return []
    figures = []
    for x_key, x_title in (("macs_g", "MACs (G)"), ("params_m", "#params (M)")):
        points = [
            point for row in table.rows if row.kind != "unfinished" and (point := _point(row, x_key, primary, table))
        ]
        if len({p.x for p in points}) < 2 or (len(points) < 4 and any(p.kind == "published" for p in points)):
            continue
        y_title = f"{primary.title} (%)" if primary.style == "percent" else primary.title
        draw = [svg.scatter(points, f"{x_title}, log scale", y_title, *size) for size in ((580, 400), (350, 330))]
        figures.append({"title": f"{primary.title} against {x_title}", "svgs": [Markup(d) for d in draw]})
    return figures


def _point(row: Row, x_key: str, y: Column, table: Table) -> svg.Point | None:
    x_value, y_value = row.values.get(x_key), row.values.get(y.key)
    if x_value is None or y_value is None or not (is_number(x_value) and is_number(y_value) and x_value > 0):
        return None
    model = show(row, table.columns[0])
    series = model
    if row.kind == "published":  # sizes of one family are one line, each input size its own
        images = Counter(r.values.get("img_size") for r in table.rows)
        usual = images.most_common(1)[0][0]
        image = row.values.get("img_size")
        family = str(row.values["model"]).split("-")[0]
        alone = sum(str(r.values["model"]).startswith(f"{family}-") and r.kind == "published" for r in table.rows) == 1
        series = model if alone else family
        if image != usual and not alone:
            series = f"{model} at {image}"
    half = row.values.get(f"{y.key}_ci")
    title = f"{model}: {y.title} {show(row, y)}, {x_value:.4g} {'G MACs' if x_key == 'macs_g' else 'M parameters'}"
    return svg.Point(float(x_value), float(y_value), row.kind, series, f"{title} ({row.kind})", half)


def _forest(table: Table) -> list[Markup]:
    if not table.forest:
        return []
    title = "difference to the full model"
    return [Markup(svg.forest(table.forest, title, width)) for width in (760, 350)]


# --- runs -----------------------------------------------------------------------------------------------------------


def _label(run: Run) -> str:
    departs = departures(run.info)
    return f"{model_name(run.info)}, seed {run.info.seed}{f' ({departs})' if departs else ''}"


def _curves(all_runs: Sequence[Run], anchors: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Loss, primary metric and learning rate of each run over its steps, thinned."""
    curves = []
    for run in all_runs:
        log = runs.read_log(run.folder / "metrics.jsonl")
        metric = METRICS[FAMILIES[run.info.task]][0]
        series = {name: _thin(log, key) for name, key in (("loss", "loss"), ("metric", metric), ("lr", "lr"))}
        if any(series.values()):
            group = f"{run.info.data.name}: {metric}"
            curves.append(
                {"id": anchors[run.folder], "label": _label(run), "group": group, "primary": metric, **series}
            )
    return curves


def _thin(log: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[step, value] of every entry, or of CURVE_POINTS evenly spread ones with the last among them."""
    points = [
        [int(e["step"]), float(f"{e[key]:.5g}")] for e in log if is_number(e.get("step")) and is_number(e.get(key))
    ]
    if len(points) <= CURVE_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]


def _run(run: Run, anchor: str) -> dict[str, Any]:
    """Everything run.json knows, for people."""
    i = run.info
    steps = f"{i.steps_done:,} of {i.steps_total:,}"
    speed = f"{number(i.images_per_second, 'short')} images/s ({i.speed_notes})" if i.images_per_second else ""
    size = f"{i.params / 1e6:.2f} M parameters" if i.params else ""
    if i.macs:
        size += f", {number(i.macs / 1e9, 'number')} G MACs at {i.macs_input}"
    training = f"{i.train_seconds:,.0f} s" if i.train_seconds else ""
    if i.train_images_per_second:
        training += f", {number(i.train_images_per_second, 'short')} images/s"
    if i.data_wait_share is not None:
        training += f", {i.data_wait_share:.0%} waiting for data"
    several = f"{i.processes} processes" if i.processes > 1 else ""
    facts = {
        "results": ", ".join(f"{name} {value:.2f}" for name, value in i.metrics.items()),
        "evaluation": "; ".join(f"{name}: {text}" for name, text in i.metric_notes.items()),
        "best at step": f"{i.best_step:,}" if i.best_step else "",
        "command": command(i),
        "recipe": i.protocol,
        "departs in": departures(i),
        "started from": str(i.init.get("source") or "random weights"),
        "steps": f"{steps}, {i.batch_size} images each",
        "data": f"{i.data.name}: {i.data.num_train:,} to train, {i.data.num_val:,} {i.data.split}, {i.data.digest}",
        "size": size,
        "training": training,
        "inference": speed,
        "memory": f"{i.peak_memory_mb:,.0f} MiB at the peak" if i.peak_memory_mb else "",
        "unreadable images": str(i.unreadable_images) if i.unreadable_images else "",
        "machine": ", ".join(filter(None, [i.machine, i.device, i.precision, several])),
        "code": i.git_commit + (" with uncommitted changes" if i.git_dirty else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in i.versions.items()),
        "time": f"{i.started} to {i.finished or 'now'}" if i.started else "",
        "fingerprint": i.fingerprint,
        "error": i.error,
    }
    recipe = run.folder / "recipe.yaml"
    return {
        "id": anchor,
        "name": run.name,
        "label": _label(run),
        "data": i.data.name,
        "status": "finished" if run.finished else i.status if i.status != "finished" else "cut short",
        "share": math.floor(100 * i.steps_done / max(1, i.steps_total)),
        "facts": {what: text for what, text in facts.items() if text},
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
    }


def _pictures(made: Sequence[Table]) -> tuple[list[dict[str, Any]], int]:
    """Pictures of the first run of each measured row, as data URIs, until the page holds enough; and how many not."""
    groups: list[dict[str, Any]] = []
    room, left_out = ALL_PICTURES_BYTES, 0
    for table in made:
        for row in table.rows:
            for place, what in PICTURE_FOLDERS.items() if row.runs else ():
                files = sorted(f for f in (row.runs[0] / place).glob("*") if f.suffix in (".png", ".svg"))
                images = []
                for file in files[:PICTURES_PER_ROW] if room > 0 else ():
                    uri, size = _data_uri(file)
                    if uri:
                        images.append({"uri": uri, "size": size, "name": file.stem})
                        room -= len(uri)
                left_out += len(files) - len(images)
                if images:
                    title = f"{show(row, table.columns[0])} on {row.values.get('data')}: {what}"
                    groups.append({"title": title, "images": images, "run": row.runs[0].name})
    return groups, left_out


def _data_uri(file: Path) -> tuple[str, tuple[int, int] | None]:
    """The picture inside a URI, made smaller if it is large; "" for a file that is no picture."""
    if file.suffix == ".svg":
        return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}", None
    content, kind = file.read_bytes(), "png"
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            if len(content) > PICTURE_BYTES:
                image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
                size, kind = image.size, "jpeg"
                small = io.BytesIO()
                image.convert("RGB").save(small, "JPEG", quality=85)
                content = small.getvalue()
            else:
                image.verify()
    except (OSError, SyntaxError, ValueError):
        return "", None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", size
