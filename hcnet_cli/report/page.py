"""One self-contained HTML page: tables, figures, training curves, pictures, and where every number comes from."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from hcnet_cli import files
from hcnet_cli.console import UserError, units, visible
from hcnet_cli.grouping import Run, changes_text
from hcnet_cli.last_step import last_step
from hcnet_cli.privacy import public_text
from hcnet_cli.report import figures, plots
from hcnet_cli.report.escape import to_json
from hcnet_cli.results import Results, command, model_name
from hcnet_cli.study.status import StudyStatus
from hcnet_cli.table import MISSING, Column, Row, Table, is_number, number

FOLDER = Path(__file__).parent
PICTURES_PER_ROW = 4
PICTURE_WIDTH = 900
PICTURE_BYTES = 200_000  # a larger file is shrunk
LARGEST_PICTURE = 64 * 2**20, 50_000_000  # bytes of a file, pixels; a larger one is left out
ALL_PICTURES_BYTES = 8_000_000  # of the page; further pictures are counted, not shown
RECIPE_BYTES = 2**20
OVERVIEW = "how it learns, and what is wrong"
PICTURES = {  # of a run: what they show -> the files
    OVERVIEW: ("progress.png", "final/*.png", "batches.png"),
    "predictions": ("final/pictures/*.png",),
    "inside the heat layers": ("explain/*.png",),
}
CAPTIONS = {  # files whose names do not say what they show
    "progress": "the same images at each evaluation",
    "batches": "the first training batches",
    "errors": "precision and recall, kinds of errors",
    "per_class": "each class",
    "mistakes": "the worst mistakes",
}
HIDDEN_ON_PHONES = ("img_size", "images_per_second", "difference")  # columns, with the secondary ones
COLUMNS_LEFT_OUT = ("seeds", "recipe")  # links to the runs show the seeds, and each run's section its recipe


def html(
    made: Sequence[Table],
    notes: Sequence[str],
    found: Results,
    refresh: float | None = None,
    version: str = "",
    studies: Sequence[StudyStatus] = (),
) -> str:
    """The page, with the tables in their order. `refresh`: seconds after which it loads itself again.

    `version`: of a page that `serve` hands out, which loads itself again when there is another one.
    """
    anchors = {run.folder: f"run-{i}" for i, run in enumerate(found.runs)}
    sections = [_section(table, f"table-{i}", anchors) for i, table in enumerate(made)]
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    pictures, left_out = _pictures(made)
    curves = to_json(_curves(found.runs, anchors), indent=None, separators=(",", ":"))
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    if version:
        script += (FOLDER / "live.js").read_text(encoding="utf-8")
    if refresh:
        script = f"setTimeout(() => location.reload(), {int(refresh * 1000)});\n{script}"
    text = environment.get_template("page.html").render(
        measured=[s for s in sections if s["table"].measured],
        published=[s for s in sections if not s["table"].measured],
        cards=[card for table in made if (card := _card(table))],
        runs=[_run(run, anchors[run.folder], found.public) for run in found.runs],
        finished=sum(run.finished for run in found.runs),
        data_sets=len({run.info.data.name for run in found.runs}),
        curves=Markup(curves.replace("<", "\\u003c")),  # no name in it can end the script element
        pictures=pictures,
        left_out=left_out,
        notes=notes,
        version=version,
        studies=studies,
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # no other script runs
    )
    return f"{text}\n"


def _shown(value: Any) -> Any:
    """What a template prints; line breaks stay."""
    return visible(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value


# --- tables and figures ---------------------------------------------------------------------------------------------


def _section(table: Table, anchor: str, anchors: Mapping[Path, str]) -> dict[str, Any]:
    columns = [c for c in table.columns if c.key not in COLUMNS_LEFT_OUT]
    arms = plots.forest_arms(table)
    forest = [figures.forest(arms, plots.forest_title(table), width) for width in (760, 350)] if arms else []
    return {
        "id": anchor,
        "table": table,
        "short": plots.short_title(table),
        "columns": columns,
        "wide": [c for c in columns if c.secondary or c.key in HIDDEN_ON_PHONES],
        "rows": [(row.kind, [_cell(table, row, column, anchors) for column in columns]) for row in table.rows],
        "published": [row for row in table.rows if row.kind == "published"],
        "figures": _scatter_plots(table),
        "forest": [Markup(svg) for svg in forest],
    }


def _cell(table: Table, row: Row, column: Column, anchors: Mapping[Path, str]) -> dict[str, Any]:
    """Text, sort value, and for a source the links to its runs."""
    value, text, half = row.values.get(column.key), table.show(row, column), ""
    if is_number(value):
        text, _, half = text.partition(" ± ")
    cell: dict[str, Any] = {"text": text, "half": half, "best": column.key in row.best}
    if table.is_label(column):
        cell["name"], _, cell["variant"] = text.partition(", ")
    cell["sort"] = f"{value:.10g}" if is_number(value) else "" if text == MISSING else text
    if column.key == "source" and not row.runs:
        cell |= {"whole": text, "text": re.split(r" \(|[;.,] ", text)[0]}
    elif column.key == "source":
        seeds = str(row.values.get("seeds") or "").split(", ")
        by_seed = len(seeds) == len(row.runs)
        texts = seeds if by_seed else [str(i) for i in range(1, len(row.runs) + 1)]
        cell["what"] = "seed" if by_seed else "run"
        cell["links"] = [
            {"to": anchors.get(run, ""), "run": run.name, "text": text}
            for run, text in zip(row.runs, texts, strict=True)
        ]
    return cell


def _card(table: Table) -> dict[str, str] | None:
    """The best finished result of a table, in one line."""
    primary = plots.primary(table)
    if primary is None:
        return None
    measured = [(row.values.get(primary.key), row) for row in table.rows if row.kind == "measured"]
    scores = [(value, row) for value, row in measured if is_number(value)]
    if not scores:
        return None
    _, best = max(scores, key=lambda pair: pair[0])
    text, _, half = table.show(best, primary).partition(" ± ")
    seeds = best.values.get("n") or 1
    model, how_many = plots.short_label(table, best), "one seed" if seeds == 1 else f"{seeds} seeds"
    return {
        "title": plots.short_title(table),
        "value": text,
        "half": half,
        "how": f"{primary.title}, {model}, {how_many}",
    }


def _scatter_plots(table: Table) -> list[dict[str, Any]]:
    """Each drawn for wide and for narrow screens."""
    made = []
    for plot in plots.scatters(table):
        svgs = [figures.scatter(plot.points, plot.x_title, plot.y_title, *size) for size in ((580, 400), (350, 330))]
        made.append({"title": plot.title, "svgs": [Markup(svg) for svg in svgs]})
    return made


# --- runs -----------------------------------------------------------------------------------------------------------


def _curves(all_runs: Sequence[Run], anchors: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Loss, primary metric and learning rate of each run, for the script."""
    return [
        {
            "id": anchors[curve.run.folder],
            "label": curve.label,
            "group": f"{curve.data}: {curve.metric}",
            "primary": curve.metric,
            "running": curve.run.state == "running",
            "best": curve.run.info.metrics.get(curve.metric),
            "images": curve.run.info.steps_done * curve.run.info.batch_size,
            **curve.points,
        }
        for curve in plots.curves(all_runs)
    ]


def _run(run: Run, anchor: str, public: bool) -> dict[str, Any]:
    """What run.json records, for people."""
    i = run.info
    steps = f"{i.steps_done:,} of {i.steps_total:,}{', stopped early' * i.stopped_early}"
    speed = f"{number(i.images_per_second, 'short')} images/s ({i.speed_notes})" if i.images_per_second else ""
    size = f"{units(i.params, 1e6)} M parameters" if i.params else ""
    if i.params_trained is not None and i.params_trained != i.params:
        size += f", {units(i.params_trained, 1e6)} M trained"
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
        "command": command(i.argv),
        "recipe": i.protocol,
        "departs in": changes_text(i),
        "started from": str(i.init.get("source") or "random weights"),
        "steps": f"{steps}, {i.batch_size} images each",
        "data": f"{i.data.name}: {i.data.num_train:,} to train, {i.data.num_val:,} {i.data.split}, {i.data.digest}",
        "training data": str(i.data.card or ""),
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
    text = _recipe_text(run.folder / "recipe.yaml")
    return {
        "id": anchor,
        "run": run,
        "label": plots.label(run, model_name(i), i.changes, f", seed {run.info.seed}"),
        "share": math.floor(100 * last_step(run.folder, i) / max(1, i.steps_total)),
        "facts": {what: text for what, text in facts.items() if text},
        "recipe": public_text(text) if public else text,
    }


def _recipe_text(file: Path) -> str:
    try:
        return files.read_text(file, RECIPE_BYTES) if file.exists() else ""
    except UserError as error:
        return str(error)


def _pictures(made: Sequence[Table]) -> tuple[list[dict[str, Any]], int]:
    """Pictures of the first run of each measured row, up to ALL_PICTURES_BYTES; and how many were left out."""
    groups: list[dict[str, Any]] = []
    room, left_out = ALL_PICTURES_BYTES, 0
    for table, row, run in plots.first_runs(made):
        for what, patterns in PICTURES.items():
            files = [file for pattern in patterns for file in sorted(run.glob(pattern))]
            most = PICTURES_PER_ROW * (2 if what == OVERVIEW else 1)
            images = [image for file in files[:most] if room > 0 and (image := _image(file))]
            room -= sum(len(image["uri"]) for image in images)
            left_out += len(files) - len(images)
            if images:
                title = f"{plots.short_label(table, row)} on {row.values.get('data')}: {what}"
                captions = [CAPTIONS.get(image["name"], image["name"].replace("_", " ")) for image in images]
                shown = list(zip(images, captions if what == OVERVIEW else [""] * len(images), strict=True))
                groups.append({"title": title, "images": shown, "run": run.name})
    return groups, left_out


def _image(file: Path) -> dict[str, Any] | None:
    """A picture as data URI, shrunk if it is large, and its size; None for a file that is no PNG, or far too large."""
    max_bytes, max_pixels = LARGEST_PICTURE
    kind = "png"
    try:
        content = files.read_bytes(file, max_bytes)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            size = image.size
            if math.prod(size) > max_pixels:
                return None
            if len(content) > PICTURE_BYTES:
                image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
                size, kind = image.size, "jpeg"
                small = io.BytesIO()
                image.convert("RGB").save(small, "JPEG", quality=85)
                content = small.getvalue()
            else:
                image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # UserError is a ValueError
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"uri": uri, "size": size, "name": file.stem}
