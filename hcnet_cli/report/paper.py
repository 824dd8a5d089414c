"""`hcnet report --figures`: the page's figures for papers, as PDF and SVG, by matplotlib. Equal data give equal bytes.

The page's own SVG is coloured by its style sheet and its curves follow clicks; a paper needs fonts inside and the width
of a column. So each is drawn by what serves it, from the same data (`plots`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hcnet_cli import charts
from hcnet_cli.charts import COOL, HOT, INK, MUTED, shortened
from hcnet_cli.console import UserError, notice
from hcnet_cli.files import replacing, writing
from hcnet_cli.report import figures, final, plots
from hcnet_cli.report.escape import slug
from hcnet_cli.results import Results
from hcnet_cli.table import Table
from hcnet_cli.tasks import TASKS

COLUMN, PAGE = 3.3, 6.9  # inches: one column, both
POINTS = 72  # an inch
SIZE = 7  # points, of the letters
LINES = ("#0072b2", "#d55e00", "#cc79a7", "#000000")  # Okabe and Ito 2008, those of 3 to 1 and more on white
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1.2)))  # all colours in one, then in the next
COLUMN_NAMES = 14  # of a scatter plot that one column has room for
MOST_SETTINGS = len(LINES) * len(DASHES)
STYLE = charts.STYLE | {
    "font.size": SIZE,
    "axes.labelsize": SIZE,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "both",
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "xtick.labelsize": SIZE,
    "ytick.labelsize": SIZE,
    "xtick.color": INK,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "legend.fontsize": SIZE,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,  # TrueType, whole letters: what publishers ask for
    "svg.fonttype": "path",  # letters as outlines: no font is needed where it is shown
    "svg.hashsalt": "hcnet",
}
METADATA = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
ENDINGS = tuple(METADATA)


def write_figures(made: Sequence[Table], found: Results, folder: Path) -> list[str]:
    """NAME.pdf and NAME.svg in `folder` for every figure of the tables and runs. Returns a line for each: the name, and
    what it shows. UserError where there is nothing to draw, or the folder cannot be written.
    """
    lines: list[str] = []
    taken: set[str] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in letters that the font lacks: a box
        with matplotlib.style.context(STYLE):
            for name, what, figure in _all(made, found):
                number = 1
                own = name = slug(name)
                while own in taken:
                    number += 1
                    own = f"{name}-{number}"
                taken.add(own)
                with writing(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    for ending in ENDINGS:
                        with replacing(folder / f"{own}.{ending}") as temporary:
                            figure.savefig(temporary, format=ending, metadata=METADATA[ending])
                lines.append(f"{own}: {what}")
    if not lines:
        raise UserError("There is nothing to draw yet.", hint="Figures need a finished run, or more rows of a table.")
    return lines


def _all(made: Sequence[Table], found: Results) -> Iterator[tuple[str, str, Figure]]:
    """(name, what it shows, figure) of each."""
    for table in made:
        title = plots.short_title(table)
        for plot in plots.scatters(table):
            yield f"{title} {plot.x}", f"{title}, {plot.title}", scatter(plot)
        if arms := plots.forest_arms(table):
            x_title = plots.forest_title(table)
            yield f"{title} differences", f"{title}, {x_title} with 95 % intervals", forest(arms, x_title)
    names = {run for table in made for row in table.rows for run in row.runs}
    yield from _curves([run for run in found.runs if run.finished and run.folder in names])
    fingerprints = {run.folder: run.info.fingerprint for run in found.runs}
    for table, row, run in plots.first_runs(made):
        if row.kind == "measured":
            model = plots.short_label(table, replace(row, mark=""))  # the mark's note is under the table alone
            for what, figure in final.drawings(run / "final", COLUMN, PAGE):
                about = f"{model} on {row.values.get('data')}, {what} (run {run.name})"
                yield f"{_own_name(run.name, fingerprints.get(run, ''))} {what}", about, figure


def _own_name(name: str, fingerprint: str) -> str:
    """A run by its name and fingerprint: no other run of the folder, and no later one of that name, has it."""
    return f"{name.removesuffix(fingerprint)[:80]} {fingerprint}"


# --- tables -----------------------------------------------------------------------------------------------------------


def scatter(plot: plots.Scatter) -> Figure:
    """Published models hollow and blue, HcNet's orange, measured ones filled; the names of those with room."""
    scale = figures.FONT / SIZE  # labels are placed in pixels at the page's font size
    series: dict[figures.Series, list[figures.Point]] = {}
    for point in plot.points:
        series.setdefault((point.kind, point.series), []).append(point)
    size = (COLUMN, 0.86 * COLUMN) if len(series) <= COLUMN_NAMES else (PAGE, 0.5 * PAGE)
    figure = Figure(figsize=size, dpi=POINTS)
    wide, high = (POINTS * inches for inches in figure.get_size_inches())
    axes = figure.add_axes((27 / wide, 26 / high, 1 - 31 / wide, 1 - 40 / high))
    low_x, high_x, ticks_x = figures.log_range([p.x for p in plot.points])
    low_y, high_y, ticks_y = figures.nice_range([end for p in plot.points for end in p.ends])
    axes.set(xscale="log", xlim=(low_x, high_x), ylim=(low_y, high_y), xlabel=plot.x_title)
    axes.set_xticks(ticks_x, [f"{tick:g}" for tick in ticks_x])
    axes.set_xticks([], minor=True)
    axes.set_yticks(ticks_y, [f"{tick:g}" for tick in ticks_y])
    axes.set_title(plot.y_title, fontsize=SIZE, fontweight="normal", loc="left", pad=5, x=-25 / (wide - 31))
    spots, whiskers = {}, []

    def pixels(x: float, y: float) -> figures.Spot:
        right, up = axes.transData.transform((x, y))
        return right * scale, (high - up) * scale

    for (kind, name), members in series.items():
        members.sort(key=lambda p: (p.x, p.y))
        own = name.startswith("HcNet")
        colour, face = (HOT if own or kind == "measured" else COOL), ("white" if kind == "published" else HOT)
        xs, ys = [p.x for p in members], [p.y for p in members]
        axes.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.5, zorder=2)
        if any(p.half for p in members):
            arms = [[p.y - p.ends[0] for p in members], [p.ends[1] - p.y for p in members]]
            axes.errorbar(xs, ys, arms, fmt="none", ecolor=colour, elinewidth=1, zorder=2)
        marker = 4.5 if kind == "measured" else 3.5
        axes.plot(xs, ys, "o", markersize=marker, markeredgecolor=colour, markerfacecolor=face, zorder=3)
        spots[kind, name] = [pixels(p.x, p.y) for p in members]
        whiskers += [(pixels(p.x, p.ends[1]), pixels(p.x, p.ends[0])) for p in members if p.half]
    box = (29 * scale, 14 * scale, (wide - 4) * scale, (high - 28) * scale)
    for (kind, name), place, spot in figures.place_labels(spots, box, whiskers):
        own = kind == "measured" or name.startswith("HcNet")
        weight = "bold" if kind == "measured" else "normal"
        end = figures.nearest(place, spot)
        in_points = [(x / scale, high - y / scale) for x, y in ((place[0], place[3] - 3), spot, end)]
        text, *line = axes.transData.inverted().transform(in_points)
        axes.text(text[0], text[1], name, color=HOT if own else COOL, fontweight=weight, zorder=4)
        if math.dist(spot, end) >= figures.LEADER:
            axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=0.4, zorder=1.5)
    return figure


def forest(arms: Sequence[tuple[str, float, float, float]], x_title: str) -> Figure:
    """Differences with their intervals; filled where the interval is without zero."""
    names = [shortened(name, SIZE, 110) for name, *_ in arms]
    figure = Figure(figsize=(COLUMN, 0.55 + 0.2 * len(arms)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=DASHES[1], zorder=1)
    for place, (_, difference, low, high) in enumerate(arms):
        sure = low > 0 or high < 0  # False of NaN, where there is no interval
        axes.plot([low, high], [place, place], color=HOT if sure else MUTED, linewidth=1.2, zorder=2)
        face, edge = (HOT, HOT) if sure else ("white", MUTED)
        axes.plot(difference, place, "s", markersize=4, markerfacecolor=face, markeredgecolor=edge, zorder=3)
        text = f"{difference:+.2f}".replace("-", "−")
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", color=INK)
    axes.set(ylim=(len(arms) - 0.5, -0.5), xlabel=x_title)
    axes.set_yticks(range(len(arms)), names)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    return figure


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves(finished: Sequence[Any]) -> Iterator[tuple[str, str, Figure]]:
    """Of each data set and metric: the loss, the metric, the learning rate of its finished runs."""
    groups: dict[tuple[str, str], dict[str, list[plots.Curve]]] = {}
    for curve in plots.curves(finished):
        groups.setdefault((curve.data, curve.metric), {}).setdefault(curve.setting, []).append(curve)
    titles = {"loss": "training loss", "lr": "learning rate"}
    for (data, metric), settings in groups.items():
        if len(settings) > MOST_SETTINGS:
            notice(f"Curves of {data}: the best {MOST_SETTINGS} of {len(settings)} settings.")
        for kind in plots.KINDS:
            shown = dict(list(settings.items())[:MOST_SETTINGS])
            lines = [curve for members in shown.values() for curve in members]
            title = titles.get(kind, f"validation {TASKS[lines[0].run.info.task].primary.title} (%)")
            if any(curve.points[kind] for curve in lines):
                name = f"{data} {metric if kind == 'metric' else kind} curve"
                yield name, f"{data}, {title}", curves(shown, kind, title)


def curves(settings: dict[str, list[plots.Curve]], kind: str, title: str) -> Figure:
    """A line for each run; the seeds of a setting look alike."""
    figure = Figure(figsize=(COLUMN, 1.9 + 0.145 * len(settings)), layout="constrained")
    axes = figure.subplots()
    values: list[float] = []
    for number, (name, members) in enumerate(settings.items()):
        dashes, colour = divmod(number, len(LINES))
        seeds = f" ({len(members)} seeds)" if len(members) > 1 else ""
        for curve in members:
            steps, of_step = zip(*curve.points[kind], strict=True) if curve.points[kind] else ((), ())
            values += of_step
            text = shortened(name, SIZE, 165 if seeds else 200) + seeds if curve is members[0] else None
            thin = 0.6 if seeds else 1.0
            mark = "o" if len(steps) == 1 else ""  # a line through one point is not seen
            (line,) = axes.plot(steps, of_step, color=LINES[colour], linestyle=DASHES[dashes], label=text)
            line.set(linewidth=thin, marker=mark, markersize=3)
    if kind == "metric":  # first, far values would flatten all the rest: as on the page
        low, high = sorted(values)[int(len(values) * 0.05)], max(values)
        room = (high - low or abs(high) or 1) * 0.06
        axes.set_ylim(low - room, high + room)
    axes.set(xlabel="step", ylabel=title, xlim=(0, None))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=False)
    axes.xaxis.set_major_formatter(lambda step, _: _short(step))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    for line in (legend := figure.legend(loc="outside upper left", handlelength=2.2)).get_lines():
        line.set_linewidth(1.2)
    legend.set_in_layout(True)
    return figure


def _short(step: float) -> str:
    return f"{step / 1e6:.3g}M" if step >= 1e6 else f"{step / 1e3:.3g}k" if step >= 1e4 else f"{step:g}"
