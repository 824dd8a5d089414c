"""Two classifiers on the same images, image by image: `hcnet report --compare RUN RUN`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hcnet_cli import pictures
from hcnet_cli.console import UserError
from hcnet_cli.files import read_text
from hcnet_cli.runs import RunFolder, RunInfo, contradiction
from hcnet_cli.statistics import SIGNIFICANT, compare_images

FILE = Path("final") / "predictions.csv"
LIMIT = 1 << 30  # bytes of a file of predictions
SHOWN = 24  # images in the picture
COLUMNS = 6
RIGHT, WRONG = (0, 110, 50), (176, 32, 32)


class Prediction(NamedTuple):
    """What a classifier says of an image: its label, and its best classes with their scores, the best first."""

    label: str
    scores: Mapping[str, float]

    @property
    def answer(self) -> str:
        return next(iter(self.scores))

    @property
    def right(self) -> bool:
        return self.answer == self.label


Predictions = Mapping[str, Prediction]  # by the image's name
Read = Callable[[Path, int | None], Image.Image]  # file, bits of values of more than 8 -> image


def compare_runs(first: Path, second: Path, read: Read | None = None) -> tuple[list[str], Image.Image | None]:
    """Lines of text, and a picture of the images on which the two differ most; None where they give the same answers.

    `read(file, bits)` gives an image, its values of more than 8 bits reduced as in the run; without it none is shown.
    UserError for a run and itself, and for runs that have other validation images or no predictions.
    """
    if first.resolve() == second.resolve():
        raise UserError(f"{first} and {second} are one run.", hint="Compare two: hcnet report --compare RUN OTHER")
    infos = [_read_info(folder) for folder in (first, second)]
    data = [(info.data.digest, info.data.split) for info in infos]
    if data[0] != data[1]:
        raise UserError(
            f"{first} and {second} were validated on other data ({infos[0].data.name} {data[0][0][:12]}, "
            f"{infos[1].data.name} {data[1][0][:12]}), so their images cannot be compared."
        )
    ours, theirs = (_read_own(folder, info) for folder, info in zip((first, second), infos, strict=True))
    if {name: one.label for name, one in ours.items()} != {name: one.label for name, one in theirs.items()}:
        raise UserError(f"{first / FILE} and {second / FILE} are not of the same images and labels.")
    lines = describe((first.name, second.name), ours, theirs)
    names = most_different(ours, theirs)
    if not names:
        return lines, None
    where = infos[0].data
    images = {name: _open(Path(where.path) / name, where.bits, read) for name in names[:SHOWN]}
    return lines, draw([(name, ours[name], theirs[name]) for name in names[:SHOWN]], images, len(names))


def _read_info(folder: Path) -> RunInfo:
    info = RunFolder(folder).read() if folder.is_dir() else None
    if info is None:
        raise UserError(f"{folder} is not a run: it has no run.json.", hint="Runs lie in results/runs/.")
    if not (folder / FILE).is_file():
        raise UserError(
            f"{folder} has no {FILE}: it is no classifier, is not evaluated yet, or was trained before predictions "
            "were kept.",
            hint="Train it again with --fresh to have them.",
        )
    return info


def _read_own(folder: Path, info: RunInfo) -> dict[str, Prediction]:
    """The predictions of a run. UserError where they, or the weights, are not those of its record."""
    found = read_predictions(folder / FILE)
    top1 = 100 * sum(one.right for one in found.values()) / len(found)
    reason = contradiction(RunFolder(folder), info)
    if not reason and abs(top1 - info.metrics.get("top1", top1)) > 1e-6:
        reason = f"{folder / FILE} has top-1 {top1:.2f}, the run's record {info.metrics['top1']:.2f}."
    if reason:
        raise UserError(reason, hint="Restore the run, or train it again with --fresh.")
    return found


def read_predictions(file: Path) -> dict[str, Prediction]:
    """The lines of a predictions.csv. UserError for what is not such a file."""
    try:
        rows = csv.reader(io.StringIO(read_text(file, LIMIT), newline=""), strict=True)
        header = next(rows, [])
        k = (len(header) - 2) // 2
        expected = ["image", "label", *(f"{what}_{i + 1}" for what in ("class", "score") for i in range(k))]
        if k < 1 or header != expected:
            raise ValueError("its first line is another")
        made: dict[str, Prediction] = {}
        for row in rows:
            if len(row) != len(header) or row[0] in made:
                raise ValueError(f"line {rows.line_num}")
            scores = dict(zip(row[2 : 2 + k], map(float, row[2 + k :]), strict=True))
            made[row[0]] = Prediction(row[1], scores)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} is not a file of predictions ({error}).") from None
    if not made:
        raise UserError(f"{file} has no images.")
    return made


def describe(names: tuple[str, str], ours: Predictions, theirs: Predictions) -> list[str]:
    """Counts, difference and test, a line each."""
    right = [[by_image[name].right for name in ours] for by_image in (ours, theirs)]
    found = compare_images(*right)
    assert found is not None
    both = sum(a and b for a, b in zip(*right, strict=True))
    lines = [
        *(
            f"{letter}: top-1 {100 * sum(one) / found.n:.2f}  {name}"
            for letter, name, one in zip("AB", names, right, strict=True)
        ),
        f"{found.n:,} images: {both:,} both right, {found.only_first:,} only A, {found.only_second:,} only B, "
        f"{found.n - both - found.only_first - found.only_second:,} neither",
    ]
    if found.low is None or found.high is None:
        return [*lines, "Both have the same images right: there is nothing to test."]
    verdict = "" if found.p < SIGNIFICANT else "; not resolved"
    return [
        *lines,
        f"B minus A: {found.difference:+.2f} points, 95 % [{found.low:+.2f}, {found.high:+.2f}] (paired bootstrap over "
        "images)",
        f"McNemar, exact: p {'< 0.001' if found.p < 0.001 else f'= {found.p:.3f}'}{verdict}",
        "This compares two trained networks on other images of the kind; what another seed gives, hcnet ablate shows.",
    ]


def most_different(ours: Predictions, theirs: Predictions) -> list[str]:
    """The images with different answers: first where each scores its own answer highest above the other's.

    A class outside of the best five has at most the score of the fifth, which stands for it.
    """
    distance = {}
    for name, a in ours.items():
        b = theirs[name]
        if a.answer != b.answer:
            distance[name] = _lead(a, b.answer) + _lead(b, a.answer)
    return sorted(distance, key=lambda name: (-distance[name], name))


def _lead(one: Prediction, other: str) -> float:
    return one.scores[one.answer] - one.scores.get(other, min(one.scores.values()))


def draw(
    answers: Sequence[tuple[str, Prediction, Prediction]], images: Mapping[str, Image.Image | None], differing: int
) -> Image.Image:
    """The images with their labels and both answers; `differing`: how many there are in all."""
    tiles = []
    for name, a, b in answers:
        lines = [(f"{Path(name).name}: {a.label}", pictures.INK)]
        lines += [(f"{letter}: {one.answer}", RIGHT if one.right else WRONG) for letter, one in (("A", a), ("B", b))]
        tiles.append(pictures.tile(images[name], lines))
    return pictures.grid(
        tiles, COLUMNS, f"{len(answers)} of {differing} images with different answers; labels in black"
    )


def _open(path: Path, bits: int | None, read: Read | None) -> Image.Image | None:
    """The image, or None where it is gone: the data may lie elsewhere by now."""
    if read is None:
        return None
    try:
        return read(path, bits)
    except UserError:
        return None
