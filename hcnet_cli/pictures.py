"""Pictures of predictions: the ground truth next to what a model says, as PIL images."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

INK, PAPER, GREY = (32, 33, 36), (250, 250, 248), (110, 112, 116)
PANEL = 640  # pixels, the longer side of a panel
LONGEST = 200  # letters of a name or a title
TILE = 180  # pixels, the side of an image in a grid
SMALL = 128  # pixels, the side of an image in a strip over time
GAP = 24  # pixels between panels
IGNORED = (60, 60, 60)  # colour of pixels without a class
Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]


FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # comes with matplotlib: everywhere the same


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size)


@functools.cache
def _letters() -> frozenset[int]:
    """The code points that the font has: many alphabets, but no Chinese, Japanese or Korean."""
    return frozenset(FT2Font(FONT).get_charmap())


def palette(num_classes: int) -> Pixels:
    """[K, 3] RGB: hues a golden angle apart, lightness in three steps, so that neighbours in the list differ most."""
    i = np.arange(num_classes)
    lightness, chroma = np.array([0.70, 0.55, 0.84])[i % 3], np.array([0.17, 0.18, 0.15])[i % 3]
    hue = np.deg2rad(25 + 137.508 * i)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    # OKLab (Ottosson 2020) -> linear sRGB -> sRGB
    to_lms = np.array([[1, 0.3963378, 0.2158038], [1, -0.1055613, -0.0638542], [1, -0.0894842, -1.2914855]])
    to_rgb = np.array(
        [
            [4.0767417, -3.3077116, 0.2309699],
            [-1.2684380, 2.6097574, -0.3413194],
            [-0.0041961, -0.7034186, 1.7076147],
        ]
    )
    rgb = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
    srgb = np.where(rgb > 0.0031308, 1.055 * rgb ** (1 / 2.4) - 0.055, 12.92 * rgb)
    return np.asarray(np.rint(255 * srgb), dtype=np.uint8)


# --- names ------------------------------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    r"""The text as it can be drawn: no line break, nothing that is obeyed or hidden (`console.visible`), not endless.

    Letters that the font lacks are escapes, such as \u51b0, so that two names of them differ.
    """
    plain = _printable(text)
    plain = "".join(c if ord(c) in _letters() else c.encode("unicode_escape").decode() for c in plain)
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 1]}…"


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * LONGEST]).split())


def _plain(part: str) -> str:
    """A part of a path that can stand in a file name everywhere. Bytes that are no UTF-8 are escapes in it."""
    text = part.encode(errors="backslashreplace").decode()
    return re.sub(r'[\\/:*?"<>|]', "_", _printable(text)).encode()[:80].decode(errors="ignore") or "image"


def file_names(images: Sequence[str]) -> list[str]:
    """A file name for the picture of each image, no two alike: NAME.png, with its folders where names repeat."""
    places = [[_plain(part) for part in Path(image).with_suffix("").parts] for image in images]
    depth = 1
    names = [place[-1] for place in places]
    while len({name.lower() for name in names}) < len(names) and depth < max(map(len, places)):
        depth += 1
        names = ["_".join(part for part in place[-depth:]).lstrip("_") for place in places]
    made: list[str] = []
    taken: set[str] = set()
    for name in names:  # a.jpg and a.png, and a/b_c and a_b/c, are still alike
        own, number = name, 1
        while own.lower() in taken:
            number += 1
            own = f"{name} ({number})"
        taken.add(own.lower())
        made.append(f"{own}.png")
    return made


# --- panels and sheets ------------------------------------------------------------------------------------------------


def enlarged(image: Image.Image, longest: int = PANEL) -> Image.Image:
    """The image with a longer side of `longest` pixels, and a shorter one of at least one."""
    factor = longest / max(image.size)
    width, height = (max(1, round(factor * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def squared(image: Image.Image) -> Image.Image:
    """The image in the middle of PANEL x PANEL pixels."""
    return ImageOps.pad(enlarged(image), (PANEL, PANEL), Image.Resampling.BICUBIC, PAPER)


def panel(image: Image.Image, title: str, note: str = "") -> Image.Image:
    """The image under a title at the left and a note at the right."""
    framed = Image.new("RGB", (image.width, image.height + 44), PAPER)
    framed.paste(image, (0, 44))
    draw = ImageDraw.Draw(framed)
    draw.text((0, 22), one_line(title), fill=INK, font=_font(20), anchor="lm")
    draw.text((image.width, 22), one_line(note), fill=GREY, font=_font(16), anchor="rm")
    return framed


def shortened(text: str, size: int, width: float) -> str:
    """The text as one line (`one_line`), cut so that it is at most `width` pixels wide."""
    return cut(text, lambda part: _font(size).getlength(part) <= width)


def cut(text: str, fits: Callable[[str], bool]) -> str:
    """The text as one line (`one_line`), cut with an ellipsis until it fits."""
    text = one_line(text)
    if fits(text):
        return text
    while text and not fits(f"{text}…"):
        text = text[:-1]
    return f"{text}…"


def sheet(panels: Sequence[Image.Image], caption: str, legend: Sequence[tuple[str, Colour]] = ()) -> Image.Image:
    """Panels of one size in a row; below them a legend of names with their colours, and a caption."""
    width, height = panels[0].size
    total = len(panels) * (width + GAP) + GAP
    names = legend_image(legend, total - 2 * GAP)
    top = height + GAP  # of the legend
    image = Image.new("RGB", (total, top + names.height + 44), PAPER)
    for n, one in enumerate(panels):
        image.paste(one, (GAP + n * (width + GAP), GAP // 2))
    image.paste(names, (GAP, top))
    draw = ImageDraw.Draw(image)
    draw.text((GAP, top + names.height + 20), one_line(caption), fill=GREY, font=_font(15), anchor="lm")
    return image


def tile(image: Image.Image | None, lines: Sequence[tuple[str, Colour]], side: int = TILE) -> Image.Image:
    """An image in a square of `side` pixels (None: an empty one) above lines of text in their colours."""
    made = Image.new("RGB", (side, side + 22 * len(lines)), PAPER)
    if image is not None:
        shown = enlarged(image, side)
        made.paste(shown, ((side - shown.width) // 2, (side - shown.height) // 2))
    draw = ImageDraw.Draw(made)
    for n, (text, colour) in enumerate(lines):
        draw.text((0, side + 22 * n + 12), shortened(text, 15, side), fill=colour, font=_font(15), anchor="lm")
    return made


def beside(images: Sequence[Image.Image], gap: int = 4, margin: int = 0) -> Image.Image:
    """Images in a row, in the middle of its height."""
    width, height = sum(one.width + gap for one in images) - gap, max(one.height for one in images)
    row = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PAPER)
    left = margin
    for one in images:
        row.paste(one, (left, margin + (height - one.height) // 2))
        left += one.width + gap
    return row


def label(lines: Sequence[tuple[str, Colour]], width: int, height: int, ground: Colour = PAPER) -> Image.Image:
    """Lines of text in their colours, in the middle of a height."""
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    lines = [line for line in lines if line[0]]
    for n, (text, colour) in enumerate(lines):
        y = height / 2 + 16 * (n - (len(lines) - 1) / 2)
        draw.text((6, y), shortened(text, 12, width - 12), fill=colour, font=_font(12), anchor="lm")
    return image


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Images one below the other, at the left."""
    column = Image.new("RGB", (max(one.width for one in images), sum(one.height for one in images)), PAPER)
    top = 0
    for one in images:
        column.paste(one, (0, top))
        top += one.height
    return column


def grid(
    tiles: Sequence[Image.Image], columns: int, caption: str, legend: Sequence[tuple[str, Colour]] = ()
) -> Image.Image:
    """Tiles of one size in rows, below them a legend of names with their colours, and a caption."""
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    total = columns * (width + GAP) + GAP
    names = legend_image(legend, total - 2 * GAP)
    image = Image.new("RGB", (total, rows * (height + GAP) + GAP + names.height + 40), PAPER)
    for n, one in enumerate(tiles):
        image.paste(one, (GAP + n % columns * (width + GAP), GAP + n // columns * (height + GAP)))
    image.paste(names, (GAP, image.height - 44 - names.height))
    draw = ImageDraw.Draw(image)
    draw.text((GAP, image.height - 30), one_line(caption), fill=GREY, font=_font(15), anchor="lm")
    return image


def legend_image(entries: Sequence[tuple[str, Colour]], width: int) -> Image.Image:
    """Names behind their colours, in rows of `width` pixels."""
    entries = [(one_line(name), colour) for name, colour in entries]
    places, rows = _flow([name for name, _ in entries], width)
    image = Image.new("RGB", (width, 28 * rows), PAPER)
    draw = ImageDraw.Draw(image)
    for (name, colour), (x, row) in zip(entries, places, strict=True):
        y = 28 * row
        draw.rounded_rectangle((x, y + 5, x + 24, y + 21), radius=3, fill=colour)
        draw.text((x + 32, y + 13), name, fill=INK, font=_font(15), anchor="lm")
    return image


def bars(values: Sequence[tuple[str, float]]) -> Image.Image:
    """Names with their shares of 1 as bars, one below the other, in a panel of PANEL x PANEL pixels."""
    image = Image.new("RGB", (PANEL, PANEL), PAPER)
    draw = ImageDraw.Draw(image)
    for n, (name, share) in enumerate(values):
        y = 24 + 84 * n
        draw.text((0, y), one_line(name), fill=INK, font=_font(20), anchor="lm")
        draw.text((PANEL, y), f"{100 * share:.1f}%", fill=GREY, font=_font(20), anchor="rm")
        draw.rounded_rectangle((0, y + 20, PANEL - 1, y + 34), radius=4, fill=(232, 228, 222))
        if share * PANEL >= 8:
            draw.rounded_rectangle((0, y + 20, round(share * PANEL), y + 34), radius=4, fill=(194, 65, 12))
    return image


def _flow(names: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """(x, row) of each entry of a legend, in rows of at most `width` pixels, and the number of rows."""
    places, x, row = [], 0, 0
    for name in names:
        needed = 32 + round(_font(15).getlength(name)) + 24
        if x and x + needed > width:
            x, row = 0, row + 1
        places.append((x, row))
        x += needed
    return places, row + bool(names)


# --- objects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnObject:
    """An object in the pixels of its image. Box: x, y, width, height; mask: [H, W] of 0 and 1."""

    text: str
    colour: Colour
    box: tuple[float, float, float, float]
    mask: Pixels | None = None


def draw_objects(
    image: Image.Image, objects: Sequence[DrawnObject], longest: int = PANEL, size: int = 15
) -> Image.Image:
    """The enlarged image under the objects' masks, boxes and names of `size` pixels, large objects first."""
    canvas = enlarged(image, longest)
    scale = max(canvas.size) / max(image.size)
    objects = sorted(objects, key=lambda one: -one.box[2] * one.box[3])
    for one in objects:
        if one.mask is not None:
            mask = Image.fromarray(one.mask * 255).resize(canvas.size, Image.Resampling.BICUBIC)
            mask = mask.point(lambda v: 255 * (v >= 128))
            inner = mask.filter(ImageFilter.MinFilter(5))
            canvas.paste(Image.blend(canvas, Image.new("RGB", canvas.size, one.colour), 0.45), mask=inner)
            canvas.paste(one.colour, mask=ImageChops.subtract(mask, inner))
    draw = ImageDraw.Draw(canvas)
    for one in objects:
        x, y, width, height = (scale * v for v in one.box)
        width, height = max(0.0, width), max(0.0, height)
        draw.rectangle((x, y, x + width, y + height), outline=one.colour, width=max(1, size // 5))
        text, tall, pad = one_line(one.text), size * 8 // 5, size * 2 // 5
        text_width = draw.textlength(text, font=_font(size)) + 2 * pad
        left = min(max(x, 0), max(canvas.width - text_width, 0))
        top = y - tall if y >= tall else min(y + height, canvas.height - tall)
        draw.rounded_rectangle((left, top, left + text_width, top + tall), radius=4, fill=one.colour)
        dark = np.dot(one.colour, (0.299, 0.587, 0.114)) < 150
        draw.text((left + pad, top + tall / 2), text, fill="white" if dark else INK, font=_font(size), anchor="lm")
    return canvas


# --- class maps -------------------------------------------------------------------------------------------------------


def draw_classes(
    image: Image.Image, classes: Pixels, colours: Pixels, ignore_index: int, longest: int = PANEL
) -> Image.Image:
    """The enlarged image under a map of classes [H, W]."""
    canvas = enlarged(image, longest)
    large = Image.fromarray(classes).resize(canvas.size, Image.Resampling.NEAREST)
    return Image.fromarray(overlay(np.asarray(canvas), np.asarray(large), colours, ignore_index))


def overlay(image: Pixels, classes: Pixels, colours: Pixels, ignore_index: int) -> Pixels:
    """The image [H, W, 3] in grey under its classes' colours, with white lines between them; ignored: dark grey."""
    table = np.full((256, 3), IGNORED, dtype=np.float64)
    table[: len(colours)] = colours
    table[ignore_index] = IGNORED
    mixed = 0.28 * image.mean(-1, keepdims=True) + 0.72 * table[classes]
    border = np.zeros(classes.shape, dtype=bool)
    border[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    border[1:] |= classes[1:] != classes[:-1]
    mixed[border] = 0.35 * mixed[border] + 0.65 * 255
    return np.asarray(np.rint(mixed), dtype=np.uint8)
