"""Figures as SVG. The page's style sheet colours them; equal data gives equal bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hcnet_cli.report.escape import in_html

FONT = 12
LETTER = 0.64 * FONT  # mean width of a letter, rounded up: no browser measures the labels
LEADER = 14  # pixels between a point and its label from which on a line joins them
Box = tuple[float, float, float, float]  # left, top, right, bottom
Spot = tuple[float, float]
Series = tuple[str, str]  # kind, name


@dataclass(frozen=True)
class Point:
    """One model in a scatter plot. Points of one `series` are joined by a line and share one label."""

    x: float
    y: float
    kind: str  # "published" or "measured"
    series: str
    title: str  # shown under the pointer
    half: float | None = None  # half of the interval of y

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval of y, which is in per cent, as far as scores go."""
        half = self.half or 0.0
        return max(min(0.0, self.y), self.y - half), min(max(100.0, self.y), self.y + half)


def scatter(points: Sequence[Point], x_title: str, y_title: str, width: int, height: int) -> str:
    """Points over a logarithmic x axis, with labels that do not overlap; a label without room is left out."""
    left, top, right, bottom = 44.0, 26.0, width - 14.0, height - 40.0
    low_x, high_x, ticks_x = log_range([p.x for p in points])
    low_y, high_y, ticks_y = nice_range([end for p in points for end in p.ends])

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - math.log(low_x)) / (math.log(high_x) - math.log(low_x))
        return left + share * (right - left), bottom - (y - low_y) / (high_y - low_y) * (bottom - top)

    parts = []
    for tick in ticks_x:
        x, _ = at(tick, low_y)
        parts += [_path("grid", (x, top), "V", bottom), _text(x, bottom + 16, f"{tick:g}", "tick", "middle")]
    for tick in ticks_y:
        _, y = at(low_x, tick)
        parts += [_path("grid", (left, y), "H", right), _text(left - 7, y + 4, f"{tick:g}", "tick", "end")]
    parts.append(_text(right, height - 6, x_title, "title", "end"))
    parts.append(_text(4, 13, y_title, "title", "start"))

    series: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        series.setdefault((point.kind, point.series), []).append(point)
    marks, spots_of, whiskers = [], {}, []
    for (kind, name), members in series.items():
        members.sort(key=lambda p: (p.x, p.y))
        spots_of[kind, name] = spots = [at(p.x, p.y) for p in members]
        if len(spots) > 1:
            line = "L".join(f"{_n(x)} {_n(y)}" for x, y in spots)
            parts.append(f'<path class="line {kind}" d="M{line}"/>')
        style, radius = _style(kind, name), 5 if kind == "measured" else 3.5
        for point, (x, y) in zip(members, spots, strict=True):
            if point.half:
                (_, low), (_, high) = (at(point.x, end) for end in point.ends)
                whiskers.append(((x, high), (x, low)))
                parts.append(_path(f"whisker {kind}", (x, high), "V", low))
            circle = f'<circle class="dot {style}" cx="{_n(x)}" cy="{_n(y)}" r="{radius}">'
            marks.append(f"{circle}<title>{in_html(point.title)}</title></circle>")
    for (kind, name), box, anchor in place_labels(spots_of, (left + 2, top, float(width), bottom - 2), whiskers):
        marks += [_leader(box, anchor, kind), _text(box[0], box[3] - 3, name, f"label {_style(kind, name)}", "start")]
    what = in_html(f"{y_title} against {x_title}: {len(points)} models")
    return _svg(width, height, what, [*parts, *marks])


def place_labels(
    spots_of: Mapping[Series, Sequence[Spot]], frame: Box, whiskers: Sequence[tuple[Spot, Spot]] = ()
) -> list[tuple[Series, Box, Spot]]:
    """Where the name of each (kind, name) stands, and beside which of its points, in pixels at a font of FONT. A name
    without room in the frame is left out; measured ones are placed first. Names keep clear of lines between points
    and of `whiskers`, the intervals' lines, where they can.
    """
    dots = [spot for spots in spots_of.values() for spot in spots]
    segments = [*whiskers, *(pair for spots in spots_of.values() for pair in pairwise(spots))]
    order = sorted(spots_of, key=lambda key: (key[0] != "measured", key[1] != "HcNet-T", len(spots_of[key])))
    found: list[tuple[Series, Box, Spot]] = []
    for key in order:
        placed = _place(key[1], spots_of[key], dots, segments, [box for _, box, _ in found], frame)
        if placed is not None:
            found.append((key, *placed))
    return found


def _place(
    name: str,
    spots: Sequence[Spot],
    dots: Sequence[Spot],
    segments: Sequence[tuple[Spot, Spot]],
    labels: Sequence[Box],
    frame: Box,
) -> tuple[Box, Spot] | None:
    """The cheapest free box for a label near one of its points, and that point; None where no box is free."""
    wide, high = len(name) * LETTER, FONT + 3
    best: tuple[float, Box, Spot] | None = None
    for rank, (x, y) in enumerate(reversed(spots)):  # the largest model comes first
        for gap in (7, 13, 22, 34):
            for dx, dy in ((1, 0), (0, -1), (1, -1), (1, 1), (0, 1), (-1, 0), (-1, -1), (-1, 1)):
                centre_x = x + dx * (gap + wide / 2)
                centre_y = y + dy * (gap + high / 2 - (4 if dx else 0))
                box = (centre_x - wide / 2, centre_y - high / 2, centre_x + wide / 2, centre_y + high / 2)
                inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
                if not inside or any(_overlap(box, other) for other in labels):
                    continue
                if any(box[0] - 5 < u < box[2] + 5 and box[1] - 4 < v < box[3] + 4 for u, v in dots):
                    continue
                cost = gap + rank * 3.0 + (dx < 0) * 2
                if best is None or cost < best[0]:
                    cost += 12 * sum(_crosses(box, a, b) for a, b in segments)
                if best is None or cost < best[0]:
                    best = cost, box, (x, y)
    return None if best is None else best[1:]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] + 8 and b[0] < a[2] + 8 and a[1] < b[3] and b[1] < a[3]


def _crosses(box: Box, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether the segment a-b passes through the box: the part between left and right, cut by top and bottom."""
    enter, leave = 0.0, 1.0
    for axis in (0, 1):
        low, high, start, way = box[axis], box[axis + 2], a[axis], b[axis] - a[axis]
        if way == 0:
            if not low < start < high:
                return False
        else:
            one, other = (low - start) / way, (high - start) / way
            enter, leave = max(enter, min(one, other)), min(leave, max(one, other))
    return enter < leave


def nearest(box: Box, anchor: Spot) -> Spot:
    """The end of the line from a point to its label."""
    return min(max(anchor[0], box[0]), box[2]), min(max(anchor[1], box[1] + 2), box[3] - 2)


def _leader(box: Box, anchor: tuple[float, float], kind: str) -> str:
    x, y = nearest(box, anchor)
    if math.dist((x, y), anchor) < LEADER:
        return ""
    return f'<path class="leader {kind}" d="M{_n(anchor[0])} {_n(anchor[1])}L{_n(x)} {_n(y)}"/>'


def forest(arms: Sequence[tuple[str, float, float, float]], x_title: str, width: int) -> str:
    """Differences with their intervals, a line for each (label, difference, low, high). An interval without zero in it
    is drawn in full colour; without finite low and high only the difference is drawn.
    """
    row, top = 30, 14
    name_width = min(0.4 * width, max(len(arm[0]) for arm in arms) * LETTER + 14)
    number_width = 21 * LETTER if width > 500 else 6.5 * LETTER
    left, right, bottom = name_width, width - number_width - 10, top + row * len(arms)
    low, high, ticks = nice_range([0.0, *(v for arm in arms for v in arm[1:] if math.isfinite(v))])

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = []
    for tick in ticks:
        parts.append(_path("grid" if tick else "zero", (at(tick), top), "V", bottom))
        parts.append(_text(at(tick), bottom + 16, f"{tick:g}".replace("-", "−"), "tick", "middle"))
    parts.append(_text((left + right) / 2, bottom + 34, x_title, "title", "middle"))
    for number, (label, difference, arm_low, arm_high) in enumerate(arms):
        y = top + row * (number + 0.5)
        sure = math.isfinite(arm_low) and math.isfinite(arm_high)
        kind = "measured" if sure and (arm_low > 0 or arm_high < 0) else "unsure"
        parts.append(_text(0, y + 4, label, "name", "start"))
        shown = f"{difference:+.2f}"
        if sure:
            parts.append(_path(f"whisker {kind}", (at(arm_low), y), "H", at(arm_high)))
            shown += f" [{arm_low:+.2f}, {arm_high:+.2f}]" if width > 500 else ""
        x = at(difference) - 4.5
        parts.append(f'<rect class="dot {kind}" x="{_n(x)}" y="{_n(y - 4.5)}" width="9" height="9"/>')
        parts.append(_text(width, y + 4, shown.replace("-", "−"), "number", "end"))
    return _svg(width, bottom + 40, in_html(f"{x_title} of {len(arms)} arms with 95 % intervals"), parts)


# --- axes -----------------------------------------------------------------------------------------------------------


def nice_range(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Lowest and highest value with a margin, and ticks between them (1, 2 or 5 times a power of ten apart)."""
    low, high = min(values), max(values)
    span = (high - low) or max(abs(high) * 0.02, 0.1)
    low, high = low - 0.06 * span, high + 0.06 * span
    return low, high, _ticks(low, high, 7)


def _ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_range(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """The same for a logarithmic axis: ticks at 1, 2, 5 times powers of ten; evenly spaced over a short range."""
    low, high = min(values), max(values)
    room = max((math.log(high) - math.log(low)) * 0.07, 0.1)
    low, high = low * math.exp(-room), high * math.exp(room)
    if high / low < 4:
        return low, high, _ticks(low, high, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return low, high, [t for p in powers for m in (1, 2, 5) if low <= (t := round(m * 10.0**p, 12)) <= high]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _style(kind: str, name: str) -> str:
    return f"{kind} own" if name.startswith("HcNet") else kind


def _path(style: str, start: tuple[float, float], way: str, end: float) -> str:
    """A line that runs from `start` horizontally ("H") or vertically ("V") to a coordinate."""
    return f'<path class="{style}" d="M{_n(start[0])} {_n(start[1])}{way}{_n(end)}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{style}" x="{_n(x)}" y="{_n(y)}"{place}>{in_html(text)}</text>'


def _svg(width: int, height: float, what: str, parts: Sequence[str]) -> str:
    head = f'<svg class="figure" viewBox="0 0 {width} {_n(height)}" width="{width}" role="img" aria-label="{what}">'
    return head + "".join(parts) + "</svg>"
