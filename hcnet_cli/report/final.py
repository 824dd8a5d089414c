"""Figures of what a run left in `final/`, drawn again from its numbers. A file that is none of these is passed over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hcnet_cli import calibration, charts
from hcnet_cli.charts import COOL, HOT, INK, shortened
from hcnet_cli.console import UserError, warn
from hcnet_cli.plain_json import read_json

SIZE = 7  # points, of the names
MOST_BARS = 60  # classes in a figure of bars: of more the worst


def drawings(folder: Path, column: float, page: float) -> Iterator[tuple[str, Figure]]:
    """(what, figure) of each file of numbers in the folder; `column` and `page` are widths in inches."""
    for name, draw in FILES.items():
        if (folder / name).is_file():
            try:
                yield from draw(read_json(folder / name), column, page)
            except UserError as error:
                warn(str(error))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
                warn(f"{folder / name} does not hold what its name says: it is not drawn.")


def _reliability(content: Any, column: float, _: float) -> Iterator[tuple[str, Figure]]:
    """How often answers are right, over their confidence."""
    bins = [calibration.Bin(**one) for one in content["bins"]]
    figure = Figure(figsize=(column, 0.8 * column), layout="constrained")
    bars = [(one.low, one.high, one.accuracy, int(one.images)) for one in bins]
    charts.reliability(figure.subplots(), bars, calibration.calibration_error(bins))
    yield "reliability", figure


def _confusion(content: Any, column: float, page: float) -> Iterator[tuple[str, Figure]]:
    """The share of each class's images by what they were taken for."""
    cells = [(str(truth), str(answer), int(images)) for truth, answer, images in content["cells"]]
    names = sorted({name for truth, answer, _ in cells for name in (truth, answer)})
    number = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    for truth, answer, images in cells:
        counts[number[truth], number[answer]] += images
    width = column if len(names) <= 20 else page
    figure = Figure(figsize=(width, 0.92 * width), layout="constrained")
    charts.confusion(figure.subplots(), names, counts, SIZE)
    yield "confusion", figure


def _errors(content: Any, column: float, _: float) -> Iterator[tuple[str, Figure]]:
    """Precision over recall, and the AP50 that each kind of error costs."""
    figure = Figure(figsize=(column, 0.7 * column), layout="constrained")
    axes = figure.subplots()
    recall = np.linspace(0, 100, 101)
    styles = zip((HOT, COOL, INK), ("solid", (0, (4, 1.5)), (0, (1, 1.2))), strict=True)
    for (name, values), (colour, dashes) in zip(content["precision"].items(), styles, strict=False):
        text = f"IoU {name}: AP {100 * float(np.mean(values)):.1f}"
        axes.plot(recall, 100 * np.asarray(values, float), color=colour, linestyle=dashes, label=text)
    axes.set(xlim=(0, 100), ylim=(0, 103), xlabel="recall (%)", ylabel="precision (%)")
    axes.legend(loc="best", handlelength=2.2)
    yield "precision over recall", figure
    lost = {str(name): max(0.0, float(one["AP50_lost"])) for name, one in content["errors"].items()}
    numbers = [int(one["count"]) for one in content["errors"].values()]
    texts = [f"{value:.1f} ({number:,})" for value, number in zip(lost.values(), numbers, strict=True)]
    yield "errors by kind", _bars(list(lost), list(lost.values()), texts, "AP50 lost (number of errors)", column)


def _per_class(content: Any, column: float, page: float) -> Iterator[tuple[str, Figure]]:
    """IoU of the classes, the best first."""
    if "mIoU" not in content:  # of another task: the page has no figure of it either
        return
    known = [(float(one["IoU"]), str(one["name"])) for one in content["classes"] if one["IoU"] is not None]
    known = sorted(known, key=lambda pair: -pair[0])[-MOST_BARS:]
    names, values = [name for _, name in known], [value for value, _ in known]
    if known:
        figure = _bars(names, values, [f"{value:.1f}" for value in values], "IoU (%)", column)
        mean = float(content["mIoU"])
        figure.axes[0].axvline(mean, color=INK, linewidth=0.8, linestyle=(0, (4, 1.5)), zorder=1.5)
        figure.axes[0].set_title(f"mean {mean:.1f}", fontsize=7, fontweight="normal", loc="left")
        yield "IoU of the classes", figure


def _bars(names: list[str], values: list[float], texts: list[str], title: str, width: float) -> Figure:
    figure = Figure(figsize=(width, 0.5 + 0.15 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), values, height=0.7, color=COOL)
    axes.set_yticks(range(len(names)), [shortened(name, 7, 90) for name in names])
    charts.numbers_beside(axes, texts, SIZE)
    axes.set(xlim=(0, max(*values, 1.0)), ylim=(len(names) - 0.4, -0.6), xlabel=title)
    axes.grid(visible=False, axis="y")
    return figure


FILES = {
    "calibration.json": _reliability,
    "confusion.json": _confusion,
    "errors.json": _errors,
    "per_class.json": _per_class,
}
