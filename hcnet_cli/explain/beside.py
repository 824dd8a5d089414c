"""The receptive fields of several trained backbones, side by side: `hcnet explain RUN RUN`. HcNet is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.colors import LogNorm
from torch import Tensor, nn

from hcnet_cli.charts import INK
from hcnet_cli.explain.captions import percent
from hcnet_cli.explain.heat import Floats, area, receptive_field, windows
from hcnet_cli.explain.pictures import FLOOR, HEAD, HEAT, LABEL, NOTE, STYLE, WIDTH, Sheet, png
from hcnet_cli.pictures import one_line

PITCH, SIDE = 2.7, 2.1  # inches


def measured(backbone: Any, images: Sequence[Tensor]) -> list[Floats]:
    """The receptive field of the centre of each of the backbone's maps, [H, W] each (see heat.receptive_field)."""
    assert isinstance(backbone, nn.Module)
    return receptive_field(lambda x: backbone.forward_intermediates(x, intermediates_only=True), windows(images))  # type: ignore[operator]


def draw(rows: Sequence[tuple[str, Sequence[Floats]]], source: str) -> bytes:
    """A PNG: a row for each model (name, fields), a column for each map."""
    height, width = rows[0][1][0].shape
    high = SIDE * min(1, height / width)
    pitch = high + 0.75
    with matplotlib.style.context(["default", STYLE]):
        sheet = Sheet(
            pitch * len(rows) + 0.5,
            "Receptive fields",
            "The pixels that the centre feature (+) of each map depends on: effective receptive field, rms gradient.\n"
            "Below each: the share of its pixels that holds 95 % of it.",
        )
        style: dict[str, Any] = {"cmap": HEAT, "norm": LogNorm(FLOOR, 1)}
        for i, (name, fields) in enumerate(rows):
            top = pitch * i
            sheet.text(0, top + 0.12, one_line(name), **HEAD)
            for j, energy in enumerate(fields):
                field = np.sqrt(energy / max(float(energy.max()), 1e-300))
                axes = sheet.field(PITCH * j, top + 0.2, SIDE, np.maximum(field, FLOOR), **style)
                axes.set_anchor("NW")
                for colour, thickness in (("white", 3.0), (INK, 1.2)):
                    axes.plot(width // 2, height // 2, "+", color=colour, markersize=10, markeredgewidth=thickness)
                held = f"map {j + 1}: 95 % on {percent(area(energy, 0.95) / energy.size)} of {width} × {height} pixels"
                sheet.text(PITCH * j, top + 0.2 + high + 0.16, held, fontsize=8)
        ticks = [*(f"$10^{{{exponent}}}$" for exponent in range(-4, 0)), "1"]
        sheet.scale(0, sheet.height - 0.3, SIDE, style["norm"], HEAT, ticks)
        sheet.text(PITCH, sheet.height - 0.21, "of the largest value of each picture", **LABEL)
        sheet.text(WIDTH, sheet.height + 0.05, one_line(source), ha="right", va="top", **NOTE)
        return png(sheet)
