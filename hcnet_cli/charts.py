"""Figures of numbers as PNG, in one style: bars of classes, and the canvas of others."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from hcnet_cli.pictures import cut

INK, MUTED, HOT, COOL = "#1f1b18", "#6a625a", "#c2410c", "#1d6fa5"
GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of numbers that a line may cross
MOST_NAMES = 40  # classes whose names have room in a confusion matrix
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


def shortened(text: str, size: float, width: float) -> str:
    """The text as one line, cut so that it is at most `width` points wide in letters of `size` points."""
    font = FontProperties(family=COMMON["font.family"], size=size)

    def fits(part: str) -> bool:
        return float(text_to_path.get_text_width_height_descent(part, font, ismath=False)[0]) <= width

    return cut(text, fits)


def class_bars(names: Sequence[str], values: Sequence[float], title: str, unit: str) -> bytes:
    """Values in per cent of classes, the best first, and their mean; a class without a value (NaN) is left out."""
    known = [(value, name) for name, value in zip(names, values, strict=True) if not np.isnan(value)]
    ordered = sorted(known, key=lambda pair: -pair[0])[-MOST_CLASSES:]

    def draw(axes: Any) -> None:
        places = range(len(ordered))
        numbers = [value for value, _ in ordered]
        mean = float(np.mean([value for value, _ in known])) if known else 0.0
        axes.barh(places, numbers, height=0.72, color=[HOT if v >= mean else "#e0a083" for v in numbers])
        axes.set_yticks(places, [shortened(name, 9.5, 130) for _, name in ordered])
        numbers_beside(axes, [f"{value:.1f}" for value in numbers], 8.5)
        axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (3, 3)), zorder=1.5)
        title_line = f"{title}; dashed: the mean, {mean:.1f}; light: below it"
        axes.set(xlim=(0, 100), ylim=(len(ordered) - 0.4, -0.6), xlabel=unit, title=title_line)
        axes.set_axisbelow(True)
        axes.grid(visible=True, axis="x")
        axes.tick_params(length=0)

    return drawn(7.5, 1.2 + 0.26 * len(ordered), draw)


def numbers_beside(axes: Any, texts: Sequence[str], size: float) -> None:
    """A text for each bar at the right of the axes, where no bar or line reaches. size: of the letters, in points."""
    for place, text in enumerate(texts):
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=size, color=MUTED)


def reliability(axes: Any, bins: Sequence[tuple[float, float, float, int]], error: float) -> None:
    """The share of right answers in bins of confidence: (low, high, share, images) each, with the number of images in
    its bar or above it; shares and `error` between 0 and 1.

    A calibrated model's bars end on the diagonal.
    """
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (4, 1.5)), zorder=1.5)
    for low, high, share, images in bins:
        axes.bar(100 * low, 100 * share, 100 * (high - low), align="edge", color=COOL, edgecolor="white", linewidth=0.6)
        text = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": "x-small"}
        if share > 0.25:
            axes.text(50 * (low + high), 2, f"{images:,}", color="white", **text)
        else:
            axes.text(50 * (low + high), 100 * share + 2, f"{images:,}", color=INK, bbox=GROUND, **text)
    title = f"expected calibration error {100 * error:.2f} %"
    axes.set_title(title, loc="right", fontsize="medium", fontweight="normal", color=INK)
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence (%); numbers: images", ylabel="accuracy (%)")


def confusion(axes: Any, names: Sequence[str], counts: NDArray[Any], size: float) -> None:
    """The share of each class's images by what they were taken for, from images by label and prediction [K, K].

    Names and numbers stand in it where there are few classes. size: of the names, in points.
    """
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    drawn_as = "none" if len(names) <= MOST_CLASSES else "antialiased"  # whole cells, in a PDF too; of many their mean
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation=drawn_as)
    if len(names) <= MOST_NAMES:
        labels = [shortened(name, size, 8 * size) for name in names]
        upright = max(map(len, labels)) <= 2
        axes.set_xticks(range(len(names)), labels, rotation=0 if upright else 90)
        axes.set_yticks(range(len(names)), labels)
    if len(names) <= 12:
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[i, j] > 50 else INK
            text = f"{shares[i, j]:.0f}" if shares[i, j] >= 1 else "<1"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=0.8 * size)
    axes.set(xlabel="prediction", ylabel="truth")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("share of the class (%)")
