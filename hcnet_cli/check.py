"""`hcnet check`: every image and annotation of a data set, read as training reads them, before training does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from hcnet_cli.console import UserError, status_line
from hcnet_cli.data import embedded
from hcnet_cli.names import EMBEDDED
from hcnet_cli.recipe import Recipe
from hcnet_cli.table import Column, Row, Table
from hcnet_cli.tasks.classification import image_folder
from hcnet_cli.tasks.classification.spec import ImageFolder
from hcnet_cli.tasks.detection import coco
from hcnet_cli.tasks.detection.spec import Coco, MaskRCNN
from hcnet_cli.tasks.segmentation import scene_parsing

AT_A_TIME = 512  # images
TELL_EVERY = 2.0  # seconds
EXAMPLES = 3  # files that a line names
CLASSES = 20  # that the table of classes has at the most


@dataclass(frozen=True)
class Item:
    """An image and what its data set says of it: its class (image folders), its size as annotated, its label file."""

    path: str
    split: str
    label: str = ""
    size: tuple[int, int] | None = None  # width, height
    pixels: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of thing worth knowing. `wrong`: it spoils training or its figures, and the command exits with 1.

    `files` that show the same picture stand together in a list.
    """

    what: str
    files: Sequence[str | list[str]]
    wrong: bool = False

    def __str__(self) -> str:
        shown = "; ".join(map(_brief, self.files[:EXAMPLES]))
        more = f"; and {len(self.files) - EXAMPLES:,} more" if len(self.files) > EXAMPLES else ""
        return f"{'WRONG: ' if self.wrong else ''}{self.what} ({len(self.files):,}): {shown}{more}"


def _brief(file: str | list[str]) -> str:
    """Of equal files the first and the last, which lie in different splits if any do."""
    if isinstance(file, str):
        return file
    return f"{file[0]} = {file[-1]}" + (f" and {len(file) - 2:,} more" if len(file) > 2 else "")


@dataclass
class Report:
    """What a data set holds. `classes`: of each class how many `unit` are in each split."""

    data: str
    root: Path
    layout: str
    unit: str
    items: list[Item]
    classes: dict[str, dict[str, float]]
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # on the classes
    sizes: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def images(self) -> dict[str, int]:
        """How many each split has."""
        return dict(Counter(item.split for item in self.items))

    @property
    def wrong(self) -> bool:
        return any(finding.wrong for finding in self.findings)

    def note(self, what: str, files: Sequence[str | list[str]], wrong: bool = False) -> None:
        """A finding, if there are any."""
        if files:
            self.findings.append(Finding(what, files, wrong))

    def brief(self, file: str) -> str:
        """A file as it lies in the data folder."""
        return file.removeprefix(f"{self.root}/")


def task_of(data: str) -> str:
    """The command whose data a folder, or an embedded set, looks like."""
    for task, name in EMBEDDED.items():
        if data == name:
            return task
    root = Path(data)
    if any((root / kind / "training").is_dir() for kind in ("images", "annotations")):
        return "finetune-seg"
    if any(root.glob("annotations/*.json")) or any(root.glob("*/_annotations.coco.json")):
        return "finetune-det"
    return "pretrain"


def check(recipe: Recipe) -> Report:
    """Reads everything. UserError for what no training gets past: a layout or an annotation file that is broken."""
    path = recipe.data.path
    assert path is not None, "the command line fills in data.path"
    root = embedded.data_folder(path)
    folder = None
    if isinstance(recipe.data, ImageFolder):
        report = _image_folder(root)
    elif isinstance(recipe.data, Coco):
        assert isinstance(recipe.head, MaskRCNN)
        report = _coco(root, recipe.head.with_masks)
    else:
        config = recipe.data.model_dump(include={"num_classes", "reduce_zero_label", "ignore_index"})
        folder = scene_parsing.open_folder(root, **config, scan_cache=embedded.cache_dir() / "label-scans")
        report = _scenes(root, folder)
    _look_at_all(report, folder)
    report.findings.sort(key=lambda finding: not finding.wrong)
    return report


# --- the three layouts ------------------------------------------------------------------------------------------------


def _image_folder(root: Path) -> Report:
    index = image_folder.scan(root)
    items: list[Item] = []
    classes: dict[str, dict[str, float]] = {name: {} for name in index.classes}
    for split, files in (("train", index.train), ("val", index.val)):
        images = image_folder.ImageFolder(index, split, lambda image: {})
        items += [Item(images.sample_path(i), split, index.classes[files.labels[i]]) for i in range(len(images))]
        for name, count in zip(index.classes, np.bincount(files.labels, minlength=len(classes)), strict=True):
            classes[name][split] = int(count)
    report = Report(index.name, root, "image folder", "images", items, classes)
    report.note("classes without validation images", [name for name, counts in classes.items() if not counts["val"]])
    return report


def _coco(root: Path, masks: bool) -> Report:
    splits: dict[str, tuple[coco.Annotations, Path]] = {}
    maskless = []
    for split in ("train", "val"):
        try:
            splits[split] = coco.load_split(root, split, masks=masks)
        except UserError as error:
            if error.hint != coco.NO_MASKS_HINT:
                raise
            maskless.append(str(error))
            splits[split] = coco.load_split(root, split, masks=False)
    coco.check_same_classes(*(annotations for annotations, _ in splits.values()))
    names = _distinct(splits["val"][0].class_names)
    name = coco.dataset_name(root, splits["val"][0])
    report = Report(name, root, "COCO", "objects", [], {name: {} for name in names})
    report.note("annotation files for boxes alone (train with --no-masks)", maskless)
    for split, (found, folder) in splits.items():
        files = [str(folder / found.name(i)) for i in range(len(found))]
        report.items += [Item(file, split, size=tuple(size)) for file, size in zip(files, found.sizes, strict=True)]
        for name, count in zip(names, np.bincount(found.labels, minlength=len(names) + 1)[1:], strict=True):
            report.classes[name][split] = int(count)
        for reason, ids in found.dropped.items():
            where = f"{split} annotations left out" if reason != "crowd" else f"{split} annotations not learned from"
            report.note(f"{where} ({reason})", [f"annotation {i}" for i in ids])
        report.note(f"{split} boxes clipped to their image", [f"annotation {i}" for i in found.clipped])
        bare = [report.brief(file) for file, has in zip(files, found.annotated, strict=True) if not has]
        report.note(f"{split} images without annotations", bare)
        report.note(f"classes without {split} objects", [n for n in names if not report.classes[n][split]])
    return report


def _scenes(root: Path, folder: scene_parsing.SceneFolder) -> Report:
    items = [
        Item(image, split, pixels=label)
        for split in scene_parsing.SPLITS
        for image, label in zip(folder.images[split].tolist(), folder.labels[split].tolist(), strict=True)
    ]
    classes: dict[str, dict[str, float]] = {name: {} for name in _distinct(folder.class_names)}
    return Report(folder.name, root, "ADE20K", "% of the pixels", items, classes)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names of classes; those that several classes have, with the class's number."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


# --- every image ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One image, read: width and height as a viewer shows it, a digest of its pixels, those of its label by value."""

    size: tuple[int, int] = (0, 0)
    turned: bool = False
    digest: bytes = b""
    values: NDArray[np.int64] | None = None
    error: str = ""


def look(item: Item, folder: scene_parsing.SceneFolder | None = None) -> Seen:
    """Decodes an image, and its label; what is wrong with them is said in `error`."""
    try:
        image = coco.read_image(Path(item.path), *item.size) if item.size else image_folder.read_image(item.path)
        values = None
        if folder is not None:
            values = np.bincount(scene_parsing.read_label(item.pixels, folder.lut, folder.valid).ravel(), minlength=256)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged files
        return Seen(error="is not an image PIL knows" if isinstance(error, UnidentifiedImageError) else str(error))
    digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
    return Seen(image.size, _is_turned(item.path), digest, values)


def _is_turned(path: str) -> bool:
    with contextlib.suppress(Exception), Image.open(path) as file:  # EXIF data beyond repair
        return bool(file.getexif().get(ExifTags.Base.Orientation, 1) > 1)
    return False


def _look_at_all(report: Report, folder: scene_parsing.SceneFolder | None) -> None:
    same: dict[bytes, list[Item]] = defaultdict(list)
    unusable: dict[str, list[str]] = defaultdict(list)
    turned: list[str] = []
    values: dict[str, NDArray[np.int64]] = {}
    for item, seen in _seen(report.items, folder):
        if seen.error:
            unusable[item.split].append(f"{report.brief(item.path)} ({seen.error})")
            continue
        same[seen.digest].append(item)
        report.sizes[item.split].append(seen.size)
        if seen.turned:
            turned.append(report.brief(item.path))
        if seen.values is not None:
            values[item.split] = values.get(item.split, 0) + seen.values
    for split, files in unusable.items():
        report.note(f"{split} images that cannot be used", files, wrong=True)
    _note_repeated(report, [items for items in same.values() if len(items) > 1])
    report.note("images turned as their EXIF data says", turned)
    if folder is not None:
        for split, counts in values.items():
            for label, name in enumerate(report.classes):
                report.classes[name][split] = 100 * float(counts[label] / counts.sum())
            absent = [name for name, shares in report.classes.items() if not shares[split]]
            report.note(f"classes in no {split} label", absent)
            ignored = 1 - counts[: folder.num_classes].sum() / counts.sum()
            report.remarks.append(f"Of the {split} pixels {ignored:.2%} are ignored.")


def _seen(items: Sequence[Item], folder: scene_parsing.SceneFolder | None) -> Iterator[tuple[Item, Seen]]:
    """Every image with what was seen, in order; decoding runs beside the interpreter, so threads are enough."""
    told = time.monotonic()
    with ThreadPoolExecutor() as pool, status_line() as tell:
        for start in range(0, len(items), AT_A_TIME):
            some = items[start : start + AT_A_TIME]
            yield from zip(some, pool.map(lambda item: look(item, folder), some), strict=True)
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                tell(f"{start + len(some):,} of {len(items):,} images")


def _note_repeated(report: Report, groups: Sequence[Sequence[Item]]) -> None:
    leaks: list[list[str]] = []
    classes: list[list[str]] = []
    within: list[list[str]] = []
    for items in groups:
        files = [report.brief(item.path) for item in items]
        if len({item.split for item in items}) > 1:
            leaks.append(files)
        elif len({item.label for item in items}) > 1:
            classes.append(files)
        else:
            within.append(files)
    report.note("pictures both in training and in validation", leaks, wrong=True)
    report.note("pictures in several classes", classes, wrong=True)
    report.note("pictures more than once in a split", within)


# --- results ----------------------------------------------------------------------------------------------------------


def tables(report: Report) -> list[Table]:
    rows = []
    for split, count in report.images.items():
        values: dict[str, Any] = {"split": split, "images": count}
        if sizes := report.sizes[split]:
            for name, side in zip(("width", "height"), np.array(sizes).T, strict=True):
                values[name] = f"{side.min()} – {int(np.median(side))} – {side.max()}"
        rows.append(Row("measured", values))
    columns = (Column("split", "split"), Column("images", "images", "integer"),
               Column("width", "width"), Column("height", "height"))  # fmt: skip
    notes = ["Width and height: smallest, median, largest."]
    return [Table("check", f"{report.data} ({report.layout})", columns, rows, notes), _classes(report)]


def _classes(report: Report) -> Table:
    """Of many classes those with the least and the most to learn from."""
    splits = list(report.images)
    names = list(report.classes)
    title = f"{len(names)} classes, {report.unit}"
    if len(names) > CLASSES:
        names.sort(key=lambda name: report.classes[name].get(splits[0], 0))
        names = names[: CLASSES // 2] + names[-CLASSES // 2 :]
        title += f": the {CLASSES // 2} rarest and the {CLASSES // 2} commonest"
    style = "percent" if report.unit.startswith("%") else "integer"
    columns = [Column("class", "class"), *(Column(split, split, style) for split in splits)]  # type: ignore[arg-type]
    rows = [Row("measured", {"class": name, **report.classes[name]}) for name in names]
    return Table("check", title, columns, rows, report.remarks)


def lines(report: Report) -> list[str]:
    """What was found, for people."""
    wrong = sum(finding.wrong for finding in report.findings)
    end = f"What is WRONG ({wrong}) should be mended before training." if wrong else "Nothing is wrong."
    return [*map(str, report.findings), end]


def json_text(report: Report) -> str:
    """Everything, with every file of every finding."""
    whole = {
        "data": report.data,
        "root": str(report.root),
        "layout": report.layout,
        "images": report.images,
        "unit": report.unit,
        "classes": report.classes,
        "findings": [asdict(finding) for finding in report.findings],
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
