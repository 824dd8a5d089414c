"""progress.png: predictions on the same few images, a row for each evaluation, so that learning can be watched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from hcnet_cli import pictures
from hcnet_cli.files import replacing

IMAGES = 8  # in a row
ROWS = 12  # of the picture; of more evaluations every second, fourth, eighth ... and the last
LABEL = 120  # pixels, the width of what stands before a row


@runtime_checkable
class DrawsStrip(Protocol):
    """An evaluator that draws a row. The same images at every evaluation, small, the pictures of a row of one size."""

    def strip(self) -> list[tuple[Image.Image, Image.Image]]:
        """(what is true, what was predicted) of at most IMAGES images; called after `compute`, by the main process."""
        ...


@runtime_checkable
class NamesColours(Protocol):
    """An evaluator whose row has colours that stand for classes."""

    def strip_legend(self) -> list[tuple[str, pictures.Colour]]:
        """The names with their colours."""
        ...


def add_row(run: Path, evaluator: object, step: int, evaluation: int, score: str) -> None:
    """Adds the row of the `evaluation`-th evaluation of a run; rows of later ones are of a run that went back."""
    if not isinstance(evaluator, DrawsStrip):
        return
    pairs = evaluator.strip()
    if not pairs:
        return
    folder = run / "progress"
    folder.mkdir(exist_ok=True)
    _save(folder / "truth.jpg", _row("truth", "", [true for true, _ in pairs]))
    _save(folder / f"{evaluation:06d}-{step}.jpg", _row(f"step {step}", score, [found for _, found in pairs]))
    every = 1
    while evaluation // every > ROWS - 1:
        every *= 2
    rows = []
    for file in sorted(folder.glob("[0-9]*-*.jpg")):
        number = int(file.name.partition("-")[0])
        if number > evaluation or (number % every and number < evaluation):
            file.unlink()
        else:
            rows.append(file)
    images = []
    for file in (folder / "truth.jpg", *rows):
        with Image.open(file, formats=["JPEG"]) as image:
            images.append(image.convert("RGB"))
    if isinstance(evaluator, NamesColours):
        names = pictures.legend_image(evaluator.strip_legend(), images[0].width - LABEL)
        images.append(pictures.beside([pictures.label([], LABEL, names.height), names], gap=6, margin=4))
    with replacing(run / "progress.png") as temporary:
        pictures.stacked(images).save(temporary, "PNG", compress_level=1)


def _row(first: str, second: str, tiles: Sequence[Image.Image]) -> Image.Image:
    height = max(tiles[0].height, 30)
    lines = [(first, pictures.INK), (second, pictures.GREY)]
    return pictures.beside([pictures.label(lines, LABEL, height), *tiles], gap=6, margin=4)


def _save(file: Path, row: Image.Image) -> None:
    with replacing(file) as temporary:
        row.save(temporary, "JPEG", quality=90)
