"""COCO-format folders: where the files are, and what training and evaluation need of them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hcnet_cli.console import UserError
from hcnet_cli.data.folders import LeftOut, Packed, dataset_name, reading_folder
from hcnet_cli.data.identity import NAMES_NOTE, Identity, Trust, identify
from hcnet_cli.data.images import check_size
from hcnet_cli.data.problems import Report, refuse, reported
from hcnet_cli.files import is_image
from hcnet_cli.schema import MAX_PIXELS
from hcnet_cli.tasks.detection import spec
from hcnet_cli.tasks.detection.annotations import Annotations, read_annotations
from hcnet_cli.tasks.detection.categories import COCO_CATEGORIES
from hcnet_cli.tasks.detection.stored import shared_annotations

NUM_IMAGES = (118_287, 5_000)  # of COCO 2017, for training and for validation
NUM_OBJECTS = (860_001, 36_781)  # annotations of COCO 2017, crowds included
MIN_DISTINCT = 0.99  # of its images have different contents


def find_images(annotations: Annotations, folders: Sequence[Path], report: Report = refuse) -> Path:
    """The first of the folders that holds the first image. UserError if there is none; missing images are reported."""
    names = [annotations.name(i) for i in range(len(annotations))]
    folder = next((f for f in folders if os.path.isfile(f / names[0])), None)
    if folder is None:
        raise UserError(
            f"{folders[0] / names[0]} is missing: no folder holds the images that {annotations.file} lists."
        )
    parents = {Path(name).parent for name in names}
    present = {str(p / f.name) for p in parents if os.path.isdir(folder / p) for f in (folder / p).iterdir()}
    missing = [name for name in names if str(Path(name)) not in present]
    if missing:
        count = f"{len(missing)} of {len(names)} images" if len(missing) > 1 else "an image"
        report(UserError(f"{folder / missing[0]} is missing: {annotations.file} lists {count} that {folder} lacks."))
    return folder


def load_split(root: Path, split: str, *, masks: bool = True, report: Report = refuse) -> tuple[Annotations, Path]:
    """(annotations, image folder) of "train" or "val" in a COCO folder; problems with single entries are reported, and
    what leaves nothing to go on with is a UserError.
    """
    with reading_folder(root):
        file, folders = spec.find_split(root, split)
        scoring = split == "val"
        if report is refuse:
            annotations = shared_annotations(file, masks=masks, scoring=scoring)
        else:  # every problem is wanted
            annotations = read_annotations(file, masks=masks, scoring=scoring, report=report)
        if not len(annotations):
            raise UserError(f"{file} has no image that can be used.")
        return annotations, find_images(annotations, folders, report)


def check_same_classes(train: Annotations, val: Annotations) -> None:
    """Raises UserError unless both files have the same categories."""
    if train.category_ids != val.category_ids or train.class_names != val.class_names:
        raise UserError(
            f"{train.file.name} and {val.file.name} have different categories: {_brief(train)} and {_brief(val)}."
        )


def check_objects(train: Annotations, val: Annotations) -> None:
    """Raises UserError where there is nothing to train on, or nothing to score."""
    for found, purpose in ((train, "to train on"), (val, "to score")):
        if len(found) and not len(found.boxes):
            reasons = ", ".join(f"{reason}: {len(ids)}" for reason, ids in found.dropped.items())
            raise UserError(
                f"{found.file} has no object {purpose}: of its {found.num_annotations} annotations "
                f"{'none is left' if found.num_annotations else 'there is none'}{f' ({reasons})' if reasons else ''}."
            )


def _brief(annotations: Annotations) -> str:
    pairs = [
        f"{i} {textwrap.shorten(n, 40, placeholder='...')}"
        for i, n in zip(annotations.category_ids, annotations.class_names, strict=True)
    ]
    return ", ".join(pairs[:4] + ["..."] * (len(pairs) > 4))


def check_sizes(annotations: Annotations, images: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Raises UnusableImageError for the first image that is not one or has another size than its annotations.

    Reads headers alone. Evaluation needs every image, so this runs before training rather than hours into it.
    """
    for i, (height, width) in enumerate(annotations.sizes.tolist()):
        check_size(images / annotations.name(i), (height, width), max_pixels)


def is_coco(train: Annotations, val: Annotations, num_distinct: int) -> bool:
    """Whether this is COCO 2017: its 80 categories, and its images and objects, hardly an image twice."""
    return (
        (len(train), len(val)) == NUM_IMAGES
        and (train.num_annotations, val.num_annotations) == NUM_OBJECTS
        and num_distinct >= MIN_DISTINCT * sum(NUM_IMAGES)
        and dict(zip(val.category_ids, val.class_names, strict=True)) == COCO_CATEGORIES
    )


@dataclass(frozen=True)
class CocoFolder:
    """A checked data folder.

    `left_out`: files and objects that training or scoring does not use, by reason. `linked`: images that lie outside of
    the data folder and are only linked from it.
    """

    root: Path
    name: str
    identity: Identity
    trust: Trust
    left_out: LeftOut
    linked: list[str]
    train: Annotations
    train_images: Path
    val: Annotations
    val_images: Path

    @property
    def notes(self) -> list[str]:
        return [NAMES_NOTE] if self.trust == "names" else []


def _no_training(val: Annotations) -> Annotations:
    """The training part of a folder that has none: the categories of the other part, and no image."""
    return Annotations(
        file=val.file,
        digest="",
        category_ids=val.category_ids,
        class_names=val.class_names,
        image_ids=val.image_ids[:0],
        file_names=Packed(()),
        sizes=val.sizes[:0],
        annotated=val.annotated[:0],
        first=val.first[:1],
        boxes=val.boxes[:0],
        labels=val.labels[:0],
        ids=val.ids[:0],
        segments=None if val.segments is None else Packed(()),
    )


def open_folder(
    root: Path,
    config: spec.Coco,
    *,
    masks: bool,
    report: Report = refuse,
    verify: bool = False,
    validation_only: bool = False,
) -> CocoFolder | None:
    """Reads both annotation files, reports what is wrong with them and reads the images once, for the digest.

    None if a split cannot be read at all, which is reported too. validation_only: the training part is empty.
    """
    splits: dict[str, tuple[Annotations, Path]] = {}
    for split in ("val",) if validation_only else ("train", "val"):
        with reported(report):
            splits[split] = load_split(root, split, masks=masks, report=report)
    if validation_only and "val" in splits:
        val, val_images = splits["val"]
        splits = {"train": (_no_training(val), val_images), "val": (val, val_images)}
    if len(splits) < 2:
        return None
    (train, train_images), (val, val_images) = splits["train"], splits["val"]
    for check in (check_same_classes, check_scorable, check_objects):
        with reported(report):
            check(train, val)
    places: dict[bytes, None] = {}  # in the order of the files, each once
    for found, folder in splits.values():
        for i in range(len(found)):
            places[os.fsencode(os.path.relpath(folder / found.name(i), root))] = None
    identity = identify(
        root,
        list(places),
        {
            "layout": "coco",
            "classes": list(zip(val.category_ids, val.class_names, strict=True)),
            "annotations": [train.digest, val.digest],
        },
        trust=config.trust,
        bits=config.bits,
        max_pixels=config.max_pixels,
        verify=verify,
    )
    name = dataset_name(root, spec.SPEC.benchmark, is_coco(train, val, identity.num_distinct))
    with reading_folder(root):
        left_out = _left_out(root, list(splits.values()), config.min_side, places)
        linked = [name for found, folder in splits.values() for name in _linked(root, found, folder)]
    return CocoFolder(root, name, identity, config.trust, left_out, linked, train, train_images, val, val_images)


def _linked(root: Path, found: Annotations, folder: Path) -> list[str]:
    """The images that lie outside of the data folder, by links within it. The split's own folder may be a link."""
    inside = tuple(os.path.join(os.path.realpath(place), "") for place in (root, folder))
    names = [str(Path(found.name(i))) for i in range(len(found))]
    outside: set[str] = set()  # folders and files
    for parent in {os.path.dirname(name) for name in names}:
        if not os.path.isdir(folder / parent):
            continue
        if not os.path.join(os.path.realpath(folder / parent), "").startswith(inside):
            outside.add(parent)
            continue
        with os.scandir(folder / parent) as entries:
            links = [entry for entry in entries if entry.is_symlink()]
        outside.update(
            os.path.join(parent, link.name) for link in links if not os.path.realpath(link.path).startswith(inside)
        )
    return [str(folder / name) for name in names if name in outside or (os.path.dirname(name) in outside)]


def _left_out(
    root: Path, splits: Sequence[tuple[Annotations, Path]], min_side: int, used: Mapping[bytes, None]
) -> LeftOut:
    """Training objects and images that training does not use, validation objects that are not or not wholly scored, and
    image files that no annotation file names.
    """
    train, val = splits[0][0], splits[1][0]
    objects = {f"training objects ({reason})": ids for reason, ids in train.dropped.items()}
    objects |= {f"validation objects ({reason})": ids for reason, ids in val.unscored.items()}
    left_out: LeftOut = {reason: [f"annotation id {i}" for i in ids] for reason, ids in objects.items()}
    bare, small = ~train.annotated, train.annotated & (train.sizes.min(axis=1) < min_side)
    for reason, rows in (("without annotations", bare), (f"smaller than {min_side} pixels", small)):
        if rows.any():
            left_out[f"training images {reason}"] = [train.name(int(i)) for i in np.flatnonzero(rows)]
    parents = {folder / Path(found.name(i)).parent for found, folder in splits for i in range(len(found))}
    for parent in sorted(parents):
        files = [path for path in parent.iterdir() if is_image(os.fsencode(path.name))]
        unnamed = [str(path) for path in files if os.fsencode(os.path.relpath(path, root)) not in used]
        if unnamed:
            left_out.setdefault("images that no annotation file names", []).extend(sorted(unnamed))
    return left_out


def check_scorable(train: Annotations, val: Annotations) -> None:
    """UserError unless there is an object to measure AP on."""
    assert val.truth is not None
    if not (~val.truth.crowds).any():
        objects = f"only crowds ({len(val.truth)})" if len(val.truth) else "no objects"
        raise UserError(
            f"{val.file} has {objects}: there is nothing to measure AP on.",
            hint="The validation images need annotated objects, as those for training do.",
        )
