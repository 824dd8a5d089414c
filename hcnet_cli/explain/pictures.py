"""Pictures from the numbers of `heat.measure`, on white whatever the page's colour."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from hcnet_cli.charts import COMMON, INK, MUTED
from hcnet_cli.explain.captions import ROUNDING, percent
from hcnet_cli.pictures import one_line

LINE = "#d9d2c8"
COLOURS = {
    1: "#2b1e6b",
    2: "#85216b",
    3: "#cf4446",
    4: "#dd7a12",
}  # of the stages: rising lightness, distinct in grey too
COLD, NEUTRAL, HOT = "#2f6fab", "#e9e4dc", "#c8432c"
DIVERGING, HEAT = "RdBu_r", "inferno"  # both safe for colour-blind readers
WIDTH, MARGIN = 11.0, 0.35  # inches
FLOOR = 1e-4  # the dark end of logarithmic pictures
KIND_SHADES = {"isotropic": "#3d3a4b", "directional": "#8d88a0", "transport": "#cfcbd9"}
NOTE: dict[str, Any] = {"fontsize": 8, "color": MUTED}
LABEL: dict[str, Any] = {"fontsize": 8.5, "color": MUTED}
HEAD: dict[str, Any] = {"fontsize": 9, "fontweight": "bold"}
STYLE = COMMON | {
    "axes.labelcolor": INK,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "image.interpolation": "nearest",
}
Floats = NDArray[np.float64]


def draw(found: dict[str, Any], label: str) -> dict[str, bytes]:
    """PNG files by name, each with `label` below. A model without heat steps has only the spread."""
    sheets: dict[str, Callable[[dict[str, Any]], Sheet]] = {"4-spread": _spread}
    if found["blocks"]:
        sheets = {"1-stencils": _stencils, "2-rates": _rates, "3-transfer": _transfer, **sheets}
    made = {}
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        for name, picture in sheets.items():
            sheet = picture(found)
            sheet.text(WIDTH, sheet.height + 0.05, one_line(label), ha="right", va="top", **NOTE)
            made[name] = png(sheet)
    return made


def png(sheet: Sheet) -> bytes:
    """The file of a finished sheet; equal sheets give equal bytes."""
    file = io.BytesIO()
    sheet.figure.savefig(file, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return file.getvalue()


class Sheet:
    """A figure under its title. Everything is placed in inches from the upper left corner, so that nothing overlaps."""

    def __init__(self, height: float, title: str, subtitle: str) -> None:
        self.height, self.head = height, 0.7 + 0.19 * len(subtitle.splitlines())
        self.size = (WIDTH + 2 * MARGIN, self.head + height + MARGIN)
        self.figure = Figure(figsize=self.size)
        self.text(0, -0.22 - 0.19 * len(subtitle.splitlines()), title, fontsize=15, fontweight="bold")
        self.text(0, -0.14, subtitle, va="bottom", color=MUTED, linespacing=1.35)

    def text(self, left: float, top: float, s: str, **style: Any) -> None:
        x, y = (left + MARGIN) / self.size[0], 1 - (self.head + top) / self.size[1]
        self.figure.text(x, y, s, parse_math=False, **style)

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        x, y = self.size
        return self.figure.add_axes(((left + MARGIN) / x, (y - self.head - top - height) / y, width / x, height / y))

    def field(self, left: float, top: float, side: float, values: Any, **style: Any) -> Any:
        """A framed picture of a [H, W] array in a square; its axes."""
        axes = self.axes(left, top, side, side)
        axes.imshow(values, **style)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, color=LINE)
        return axes

    def scale(self, left: float, top: float, width: float, norm: Normalize, colours: str, ticks: Sequence[str]) -> None:
        """A horizontal colour bar with ticks at equal distances."""
        axes = self.axes(left, top, width, 0.11)
        bar = self.figure.colorbar(ScalarMappable(norm, colours), cax=axes, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.set_ticks([float(norm.inverse(t)) for t in np.linspace(0, 1, len(ticks))], labels=list(ticks))
        axes.minorticks_off()
        axes.tick_params(length=2)

    def blocks(self, left: float, top: float, height: float, blocks: Sequence[dict[str, Any]]) -> Any:
        """Axes with the blocks along x in the order of depth, the stages named and separated by lines."""
        axes = self.axes(left, top, WIDTH - left, height)
        every = -(-len(blocks) // 28)
        axes.set_xlim(-0.6, len(blocks) - 0.4)
        axes.set_xticks(range(len(blocks)), [str(b["block"]) if (b["block"] - 1) % every == 0 else "" for b in blocks])
        axes.tick_params(axis="x", length=0)
        self.text(left - 0.1, top + height + 0.145, "block", ha="right", **LABEL)
        for stage in dict.fromkeys(block["stage"] for block in blocks):
            own = [i for i, block in enumerate(blocks) if block["stage"] == stage]
            middle = left + (WIDTH - left) * (np.mean(own) + 0.6) / (len(blocks) + 0.2)
            self.text(float(middle), top + height + 0.36, ha="center", **_stage(stage))
            if own[0]:
                axes.axvline(own[0] - 0.5, color=LINE, linewidth=0.8, zorder=0)
        return axes


def _stage(number: int) -> dict[str, Any]:
    return {"s": f"stage {number}", "fontsize": 11, "fontweight": "bold", "color": COLOURS[number]}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- the four pictures ------------------------------------------------------------------------------------------------


def _stencils(found: dict[str, Any]) -> Sheet:
    if "anisotropy" in found["disabled"]:
        return _laplacian()
    tile, pitch, row, top = 0.8, 0.86, 1.1, 0.5
    lefts = {"patterns": 1.15, "isotropic": 4.9, "directional": 6.72, "transport": 8.54, "energy": 10.42}
    raw = "conservation" in found["disabled"]
    sheet = Sheet(
        top + row * len(found["stages"]) + 0.4,
        "Kernels of the heat steps (conservation disabled)" if raw else "Stencils of the heat steps",
        "What a pixel takes from its neighbours: red taps add, blue taps subtract. A blue centre among red conducts, a "
        "red centre among blue sharpens.\n"
        + ("The centre is a tap of its own" if raw else "The centre balances the other taps")
        + " and often leaves the scale, which is that of the neighbours.",
    )
    heads = ("leading patterns of all channels", "most isotropic", "most directional", "most transporting", "energy")
    for left, head in zip(lefts.values(), heads, strict=True):
        sheet.text(left, 0.12, head, **HEAD)
    sheet.text(lefts["patterns"], 0.3, "singular vectors, with their share of the energy", **NOTE)
    note = "actual channels: the purest of each kind among the stronger half (block.channel · share of the kind)"
    sheet.text(lefts["isotropic"], 0.3, note, **NOTE)
    for i, stage in enumerate(found["stages"]):
        y, stencils = top + row * i, stage["stencils"]
        limit = max((_neighbours(entry["stencil"]) for entry in stencils["channels"]), default=0.0) or 1.0
        sheet.text(0, y + 0.3, **_stage(stage["stage"]))
        sheet.text(0, y + 0.48, f"{_count(stage['blocks'], 'block')} × {stage['channels']}", **LABEL)
        sheet.text(0, y + 0.65, f"scale ±{limit:.2g}", **LABEL)
        tiles = [("patterns", e["stencil"] / _neighbours(e["stencil"]), e["share"], "") for e in stencils["patterns"]]
        for entry in stencils["channels"]:
            place = f"{entry['block']}.{entry['channel']} · "
            tiles.append((entry["kind"], entry["stencil"] / limit, entry["share"], place))
        for j, (kind, values, share, place) in enumerate(tiles):
            x = lefts[kind] + pitch * sum(other[0] == kind for other in tiles[:j])
            sheet.field(x, y, tile, values, cmap=DIVERGING, vmin=-1, vmax=1)
            sheet.text(x + tile / 2, y + tile + 0.14, place + percent(share), ha="center", **LABEL)
        axes = sheet.axes(lefts["energy"], y, 0.14, tile)
        shares = stencils["energy"]
        ends = np.cumsum(list(shares.values()))
        for (kind, share), end in zip(shares.items(), ends, strict=True):
            axes.bar(0, -share, 1, bottom=1 - end + share, color=KIND_SHADES[kind], linewidth=0)
        axes.set(xlim=(-0.5, 0.5), ylim=(0, 1))
        axes.axis("off")
        for j, (kind, share) in enumerate(shares.items()):
            text = f"{kind[:3]} {percent(share)}"
            sheet.text(lefts["energy"] + 0.2, y + 0.2 + 0.24 * j, text, fontsize=7.5, color=MUTED)
    y = sheet.height - 0.24
    sheet.scale(lefts["patterns"], y, 4 * pitch - 0.06, Normalize(-1, 1), DIVERGING, ("−1", "−½", "0", "½", "1"))
    sheet.text(lefts["isotropic"], y + 0.09, "of the scale at the left; for a pattern, of its own largest tap", **LABEL)
    return sheet


def _laplacian() -> Sheet:
    sheet = Sheet(
        1.7,
        "The stencil of the heat steps (anisotropy disabled)",
        "The 5-point Laplacian / 4, for every channel of every block: nothing was learned. A pixel takes a quarter of "
        "each neighbour (red)\nand gives up its own heat (blue).",
    )
    taps = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]) / 4
    axes = sheet.field(0, 0.1, 1.5, taps, cmap=DIVERGING, vmin=-1, vmax=1)
    for (y, x), tap in np.ndenumerate(taps):
        axes.text(x, y, f"{tap:g}".replace("-", "−"), ha="center", va="center", color="white" if tap == -1 else INK)
    return sheet


def _neighbours(stencil: Floats) -> float:
    """The largest tap outside the centre."""
    taps = np.abs(stencil).ravel()
    return float(np.delete(taps, len(taps) // 2).max())


def _rates(found: dict[str, Any]) -> Sheet:
    blocks = found["blocks"]
    seen = any(block["rate"]["std_over_images"] > ROUNDING for block in blocks)
    sheet = Sheet(
        4.9 if seen else 3.5,
        "Conduction rates r (gate disabled)" if "gate" in found["disabled"] else "Conduction rates r(u)",
        f"How fast the channels of each block conduct{', over all images' if seen else ''}. At 0 the field stands "
        "still, at 1 it takes a full step of its stencil.\nShape: distribution; bars: median, middle half, 10 to 90 %; "
        "dashed: where training starts.",
    )
    left = 0.6
    axes = sheet.blocks(left, 0.05, 3.0, blocks)
    for i, block in enumerate(blocks):
        rate, colour = block["rate"], COLOURS[block["stage"]]
        width = 0.43 * rate["density"] / rate["density"].max()
        level = np.linspace(0, 1, len(width))
        axes.fill_betweenx(level, i - width, i + width, where=width > 1e-3, color=colour, alpha=0.35, linewidth=0)
        p = rate["percentiles"]
        axes.plot([i, i], [p["10"], p["90"]], color=colour, linewidth=1)
        axes.plot([i, i], [p["25"], p["75"]], color=colour, linewidth=4, solid_capstyle="butt")
        axes.plot(i, p["50"], "o", color="white", markeredgecolor=colour, markersize=4.5, zorder=3)
    axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set(ylim=(0, 1), ylabel="r", yticks=np.linspace(0, 1, 5))
    if seen:
        lower = sheet.axes(left, 3.85, WIDTH - left, 0.85)
        for key, colour, side in (("std_over_channels", "#a79e92", -0.19), ("std_over_images", HOT, 0.19)):
            lower.bar(np.arange(len(blocks)) + side, [block["rate"][key] for block in blocks], 0.36, color=colour)
        lower.set(xlim=axes.get_xlim(), xticks=[], ylabel="std of r")
        patches = [Patch(color="#a79e92", label="between channels"), Patch(color=HOT, label="between images: the gate")]
        lower.legend(handles=patches, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    return sheet


def _transfer(found: dict[str, Any]) -> Sheet:
    stages, blocks, cycles = found["stages"], found["blocks"], found["frequencies"]
    left, pitch, side = 0.6, 2.8, 2.0
    sheet = Sheet(
        7.5,
        "Transfer function |1 + r S(ω)| of the heat steps",
        "What one step multiplies a wave with: below 1 (blue) it damps, above 1 (red) it amplifies. An explicit scheme "
        "is stable where it stays within 1.\nWith the mean rate of the images.",
    )
    deviation = max(0.02, *(float(np.abs(stage["mean_gain"] - 1).max()) for stage in stages))
    norm = Normalize(1 - deviation, 1 + deviation)
    rings = np.arange(len(cycles) // 2 + 1) / len(cycles)  # 0 .. 1/2
    lowest = min(0.9, *(min(block["gain"]["radial_p10"]) for block in blocks))
    highest = max(1.1, *(max(block["gain"]["radial_p90"]) for block in blocks))
    for i, stage in enumerate(stages):
        x, colour = left + pitch * i, COLOURS[stage["stage"]]
        sheet.text(x, 0.12, **_stage(stage["stage"]))
        whole = np.pad(stage["mean_gain"], ((0, 1), (0, 1)), mode="wrap")  # frequencies 1/2 and -1/2 are the same
        at, edge = np.append(cycles, 0.5), 0.5 + 0.5 / len(cycles)
        frame = {"extent": (-edge, edge, -edge, edge), "origin": "lower"}
        axes = sheet.field(x, 0.22, side, whole, cmap=DIVERGING, norm=norm, **frame)
        if whole.min() < 1 - 1e-3 and whole.max() > 1 + 1e-3:
            axes.contour(at, at, whole, [1], colors=INK, linewidths=0.7)
        axes.set(xlim=(-0.5, 0.5), ylim=(-0.5, 0.5), xticks=(-0.5, 0, 0.5), xticklabels=("−½", "0", "½"))
        axes.tick_params(length=2)
        profile = sheet.axes(x, 3.1, side, 1.3)
        own = [block["gain"] for block in blocks if block["stage"] == stage["stage"]]
        for j, gain in enumerate(own, 1):
            band = {"color": colour, "alpha": 0.25 / len(own) ** 0.7, "linewidth": 0}
            profile.fill_between(rings, gain["radial_p10"], gain["radial_p90"], **band)
            profile.plot(rings, gain["radial_mean"], color=colour, alpha=0.3 + 0.7 * j / len(own), linewidth=1.5)
        profile.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        profile.set(xlim=(0, 0.5), ylim=(lowest, highest), xticks=(0, 0.25, 0.5), xticklabels=("0", "¼", "½"))
        if i == 0:
            axes.set(yticks=(-0.5, 0, 0.5), yticklabels=("−½", "0", "½"), ylabel="cycles a pixel")
            profile.set_ylabel("|1 + r S|")
    ticks = [f"{1 + part * deviation:.2f}" for part in (-1, 0, 1)]
    sheet.text(left, 2.62, "mean over the channels and blocks of a stage; black line: exactly 1", **NOTE)
    sheet.scale(left + 3 * pitch, 2.54, side, norm, DIVERGING, ticks)
    note = (
        "over |ω| in cycles a pixel, one line a block (the deeper the darker): mean; band: 10 to 90 % of the channels"
    )
    sheet.text(left, 3.02, note, **NOTE)
    axes = sheet.blocks(left, 5.3, 1.75, blocks)
    for i, gain in enumerate(block["gain"] for block in blocks):
        axes.bar(i, 1, 0.72, color=NEUTRAL)
        axes.bar(i, gain["damped"], 0.72, color=COLD)
        axes.bar(i, gain["amplified"], 0.72, bottom=1 - gain["amplified"], color=HOT)
        axes.plot(i, gain["stable_channels"], "D", color="white", markeredgecolor=INK, markersize=5)
    axes.set(ylim=(0, 1), yticks=(0, 0.5, 1), yticklabels=("0", "50 %", "100 %"))
    diamond: dict[str, Any] = {"color": "none", "marker": "D", "markerfacecolor": "white", "markeredgecolor": INK}
    handles = [
        Patch(color=COLD, label="damped by more than 1 %"),
        Patch(color=NEUTRAL, label="within 1 %"),
        Patch(color=HOT, label="amplified by more than 1 %"),
        Line2D([], [], label="channels within the bound at every frequency and rate", markersize=5, **diamond),
    ]
    axes.legend(handles=handles, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0)
    sheet.text(left, 4.95, "shares of all channels and frequencies of a block", **NOTE)
    return sheet


def _spread(found: dict[str, Any]) -> Sheet:
    pitch, side, conducting = 2.9, 2.3, bool(found["blocks"])
    height, width = found["stages"][0]["receptive_field"]["image"]
    low = 0.24 + side * min(1, height / width)  # where the upper pictures end
    upper = "he pixels that the centre feature (+) of each stage depends on: effective receptive field, rms gradient."
    lower = "Bottom: what the heat steps of a stage alone make of one hot pixel, on the stage's own grid."
    sheet = Sheet(
        low + (3.85 if conducting else 0.85),
        "Spread through depth",
        f"Top: t{upper}\n{lower}" if conducting else f"T{upper}",
    )
    style: dict[str, Any] = {"cmap": HEAT, "norm": LogNorm(FLOOR, 1)}
    for i, stage in enumerate(found["stages"]):
        x, seen = pitch * i, stage["receptive_field"]
        sheet.text(x, 0.12, **_stage(stage["stage"]))
        axes = sheet.field(x, 0.24, side, np.maximum(seen["field"], FLOOR), **style)
        axes.set_anchor("NW")
        for colour, thickness in (("white", 3.0), (INK, 1.2)):
            mark: dict[str, Any] = {"markersize": 10, "markeredgewidth": thickness, "clip_on": False}
            axes.plot(*seen["centre"][::-1], "+", color=colour, **mark)
        held = f"95 % of it on {percent(seen['fraction_95'])} of {width} × {height} pixels"
        sheet.text(x, low + 0.2, held, fontsize=8.5)
        if conducting:
            field, after = stage["hot_pixel"]["field"], stage["hot_pixel"]["after"]
            half = len(field) // 2
            far = max(1, np.abs(np.argwhere(field > FLOOR) - half).max())
            near = field[half - far : half + far + 1, half - far : half + far + 1]
            sheet.field(x, low + 0.5, side, np.maximum(near, FLOOR), **style)
            held = f"95 % of it on {after[-1]['area']['95']} of {len(near)} × {len(near)}"
            sheet.text(x, low + 0.7 + side, f"{_count(len(after), 'step')}: {held}", fontsize=8.5)
    ticks = [*(f"$10^{{{exponent}}}$" for exponent in range(-4, 0)), "1"]
    sheet.scale(0, sheet.height - 0.34, side, style["norm"], HEAT, ticks)
    sheet.text(pitch, sheet.height - 0.25, "of the largest value of each picture", **LABEL)
    return sheet
