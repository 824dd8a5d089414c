"""`hcnet check`: reads every image and annotation of a data set as training reads them, before training does."""

from __future__ import annotations

import hashlib
import importlib
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from hcnet_cli.console import UserError, status_line
from hcnet_cli.data import embedded
from hcnet_cli.data.audit import Audit, Item
from hcnet_cli.data.images import Size, UnusableImageError, is_turned, read_image
from hcnet_cli.inputs import check_folder, layouts
from hcnet_cli.recipe import Recipe
from hcnet_cli.record import DataCard, data_card
from hcnet_cli.report.escape import to_json
from hcnet_cli.table import Column, Row, Style, Table, Value
from hcnet_cli.tasks import TASKS

CHUNK = 512  # images read between two status lines
STATUS_SECONDS = 2.0  # at least, between two status lines
CLASSES_SHOWN = 20  # at most, in the table of classes
PROBLEMS_SHOWN = 20  # causes at most, a line each
OTHERS_SHOWN = 3  # at most, of the problems of one cause after the first


def check(recipe: Recipe) -> Audit:
    """Reads the whole data set of a recipe, as training would. What training would refuse is in `problems`, all of it.

    UserError for a path that is no folder.
    """
    path = recipe.data.path
    assert path is not None, "the command line fills in data.path"
    root = embedded.data_folder(path)
    check_folder(str(root), layouts())
    form = TASKS[recipe.task].formats[recipe.data.format]
    audit: Audit
    try:
        audit = importlib.import_module(form.module).audit(recipe.data, recipe.head, root)
    except UserError as problem:  # after which a format cannot go on
        audit = Audit(root.name, root, recipe.data.format, "images", [], {}, problems=[problem])
    if audit.problems and not form.recognise(root):
        audit.problems[0].hint = layouts()
    inspect_images(audit)
    audit.findings.sort(key=lambda finding: not finding.wrong)
    return audit


# --- every image ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """One image, decoded: its size as shown, a digest of its pixels, and its label's pixels by class."""

    size: Size = (0, 0)
    turned: bool = False
    digest: bytes = b""
    pixels: NDArray[np.int64] | None = None
    error: str = ""


def inspect(item: Item, audit: Audit) -> Inspection:
    """Decodes an image, and its label file if it has one. `error` says why training cannot use them."""
    try:
        image = read_image(item.path, item.size, audit.bits, audit.max_pixels)
        pixels = audit.count_pixels(item) if audit.count_pixels else None
        turned = is_turned(item.path, audit.max_pixels)
    except UserError as error:
        if isinstance(error, UnusableImageError) and error.path == str(item.path):
            return Inspection(error=error.reason)
        return Inspection(error=str(error))  # of its label
    size = image.height, image.width
    digest = hashlib.blake2b(repr(size).encode() + image.tobytes(), digest_size=16).digest()
    return Inspection(size, turned, digest, pixels)


def inspect_images(audit: Audit) -> None:
    """Inspects every image and adds what was found to the audit."""
    same: dict[bytes, list[Item]] = defaultdict(list)
    unusable: dict[str, list[str]] = defaultdict(list)
    turned: list[str] = []
    pixels: dict[str, NDArray[np.int64]] = {}
    for item, seen in _inspections(audit):
        if seen.error:
            unusable[item.split].append(f"{audit.relative(item.path)} ({seen.error})")
            continue
        same[seen.digest].append(item)
        audit.sizes[item.split].append(seen.size)
        if seen.turned:
            turned.append(audit.relative(item.path))
        if seen.pixels is not None:
            pixels[item.split] = pixels.get(item.split, 0) + seen.pixels
    for split, files in unusable.items():
        audit.note(f"{split} images that cannot be used", files, wrong=True)
    _note_repeated(audit, [items for items in same.values() if len(items) > 1])
    audit.note("images turned as their EXIF data says", turned)
    audit.note_pixels(pixels)


def _inspections(audit: Audit) -> Iterator[tuple[Item, Inspection]]:
    """Every image with its inspection, in order. Decoding releases the interpreter, so threads are enough."""
    last_status = time.monotonic()
    with ThreadPoolExecutor() as pool, status_line() as tell:
        for start in range(0, len(audit.items), CHUNK):
            chunk = audit.items[start : start + CHUNK]
            yield from zip(chunk, pool.map(lambda item: inspect(item, audit), chunk), strict=True)
            if time.monotonic() - last_status > STATUS_SECONDS:
                last_status = time.monotonic()
                tell(f"{start + len(chunk):,} of {len(audit.items):,} images")


def _note_repeated(audit: Audit, groups: Sequence[Sequence[Item]]) -> None:
    """Adds findings for groups of items with equal pixels."""
    leaks: list[list[str]] = []
    contradictions: list[list[str]] = []
    repeats: list[list[str]] = []
    for items in groups:
        files = [audit.relative(item.path) for item in items]
        if len({item.split for item in items}) > 1:
            leaks.append(files)
        elif len({item.label for item in items}) > 1:
            contradictions.append(files)
        else:
            repeats.append(files)
    audit.note("pictures both in training and in validation", leaks, wrong=True)
    audit.note("pictures in several classes", contradictions, wrong=True)
    scored = ", and folds part them" if audit.folds else ""
    audit.note(f"pictures more than once in a split{scored}", repeats, wrong=audit.folds)


# --- results ----------------------------------------------------------------------------------------------------------


def tables(audit: Audit) -> list[Table]:
    """The images and the classes; none of data that could not be read."""
    if not audit.items:
        return []
    rows = []
    for split, count in audit.images.items():
        values: dict[str, Value] = {"split": split, "images": count}
        if sizes := audit.sizes[split]:
            for name, side in zip(("height", "width"), np.array(sizes).T, strict=True):
                values[name] = f"{side.min()} – {int(np.median(side))} – {side.max()}"
        rows.append(Row("measured", values))
    columns = (Column("split", "split"), Column("images", "images", "integer"),
               Column("width", "width"), Column("height", "height"))  # fmt: skip
    notes = ["Width and height: smallest, median, largest."]
    return [Table("check", f"{audit.data} ({audit.layout})", columns, rows, notes), _class_table(audit)]


def _class_table(audit: Audit) -> Table:
    """All classes, or the rarest and the commonest of many."""
    splits = list(audit.images)
    names = list(audit.classes)
    title = f"{len(names)} classes, {audit.unit}"
    if len(names) > CLASSES_SHOWN:
        names.sort(key=lambda name: audit.classes[name].get(splits[0], 0))
        names = names[: CLASSES_SHOWN // 2] + names[-CLASSES_SHOWN // 2 :]
        title += f": the {CLASSES_SHOWN // 2} rarest and the {CLASSES_SHOWN // 2} commonest"
    card = audit_card(audit)
    remarks = [f"Training: {card.balance_text()}.", *audit.remarks] if card.imbalance else audit.remarks
    style: Style = "percent" if audit.unit.startswith("%") else "integer"
    columns = [Column("class", "class"), *(Column(split, split, style) for split in splits)]
    rows = [Row("measured", {"class": name, **audit.classes[name]}) for name in names]
    return Table("check", title, columns, rows, remarks)


def audit_card(audit: Audit) -> DataCard:
    """What training puts into its record: classes, sizes and imbalance of the training images, all of them here."""
    split = next(iter(audit.images), "")
    counts = {name: audit.counts.get(split, {}).get(name, of.get(split, 0)) for name, of in audit.classes.items()}
    return data_card(audit.unit.removeprefix("% of the "), counts, audit.sizes[split])


def lines(audit: Audit) -> list[str]:
    """The problems and findings, a line each, and the verdict."""
    causes = list(by_cause(audit.problems).values())
    shown = [f"WRONG: {_with_others(found)}" for found in causes[:PROBLEMS_SHOWN]]
    if left := sum(map(len, causes[PROBLEMS_SHOWN:])):
        shown.append(f"WRONG: and {left:,} more problems; --output FILE.json has all.")
    wrong = audit.problems or any(finding.wrong for finding in audit.findings)
    verdict = "Correct what is WRONG before training." if wrong else "Nothing is wrong."
    return [*shown, *map(str, audit.findings), verdict]


def by_cause(problems: Sequence[UserError]) -> dict[str, list[str]]:
    """The sentences of problems, those that differ in numbers, names and quoted values alone together."""
    causes: dict[str, list[str]] = defaultdict(list)
    for problem in map(str, problems):
        causes[re.sub(r"'[^']*'|\S*/\S*|[-+\w.]*\d[\w.]*", "#", problem)].append(problem)
    return causes


def _with_others(found: Sequence[str]) -> str:
    """The first sentence of a cause, and of the next ones what is other in them."""
    first, *others = found
    if not others:
        return first
    words = first.split()
    named = [" ".join(w for w in other.split() if w not in words).strip(".,:") for other in others[:OTHERS_SHOWN]]
    more = ", ..." if len(others) > OTHERS_SHOWN else ""
    return f"{first} And {len(others):,} more of the kind: {', '.join(named)}{more}."


def json_text(audit: Audit) -> str:
    """The audit with every file of every finding."""
    content = {
        "data": audit.data,
        "root": str(audit.root),
        "layout": audit.layout,
        "images": audit.images,
        "unit": audit.unit,
        "classes": audit.classes,
        "card": audit_card(audit).model_dump(),
        "problems": list(map(str, audit.problems)),
        "findings": [asdict(finding) for finding in audit.findings],
    }
    return to_json(content) + "\n"
