"""Figures of numbers as PNG, in one style: bars of classes, and the canvas of others."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from hcnet_cli.pictures import shortened

INK, MUTED, HOT, COOL = "#1f1b18", "#6a625a", "#c2410c", "#1d6fa5"
GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of numbers that a line may cross
MOST_CLASSES = 200  # bars of a figure: of more classes the worst
COMMON: dict[Any, Any] = {  # to all figures, those of hcnet explain too
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#b3aa9e",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "legend.frameon": False,
}
STYLE = COMMON | {
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.grid.axis": "x",
    "grid.color": "#ece7e0",
    "ytick.color": INK,
    "text.parse_math": False,  # a name is never a formula
}


def drawn(width: float, height: float, draw: Any, columns: int = 1) -> bytes:
    """A PNG of `width` x `height` inches, 100 pixels an inch; `draw` gets its axes."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        draw(*axes)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def class_bars(names: Sequence[str], values: Sequence[float], title: str, unit: str) -> bytes:
    """Values in per cent of classes, the best first, and their mean; a class without a value (NaN) is left out."""
    known = [(value, name) for name, value in zip(names, values, strict=True) if not np.isnan(value)]
    ordered = sorted(known, key=lambda pair: -pair[0])[-MOST_CLASSES:]

    def draw(axes: Any) -> None:
        places = range(len(ordered))
        numbers = [value for value, _ in ordered]
        mean = float(np.mean([value for value, _ in known])) if known else 0.0
        axes.barh(places, numbers, height=0.72, color=[HOT if v >= mean else "#e0a083" for v in numbers])
        axes.set_yticks(places, [shortened(name, 13, 180) for _, name in ordered])
        for place, value in enumerate(numbers):
            axes.text(value + 0.8, place, f"{value:.1f}", va="center", fontsize=8.5, color=MUTED, bbox=GROUND)
        axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (3, 3)), zorder=1.5)
        axes.text(mean, -0.9, f"mean {mean:.1f}", ha="center", va="bottom", fontsize=8.5)
        axes.set(xlim=(0, 108), ylim=(len(ordered) - 0.4, -1.0), xlabel=unit, title=title)
        axes.set_xticks(range(0, 101, 20))
        axes.set_axisbelow(True)
        axes.grid(visible=True, axis="x")
        axes.tick_params(length=0)

    return drawn(7.5, 1.3 + 0.26 * len(ordered), draw)
