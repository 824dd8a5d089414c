"""ADE20K's SceneParsing layout: where the files are, and what they are called.

ROOT/images/{training,validation}/**/NAME.jpg          images, .jpg or .png
ROOT/annotations/{training,validation}/**/NAME.png     labels, see labels.py
ROOT/objectInfo150.txt or ROOT/classes.txt             class names, optional
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hcnet_cli.console import UserError, warn
from hcnet_cli.data.folders import LeftOut, dataset_name, reading_folder, walk
from hcnet_cli.data.identity import NAMES_NOTE, Identity, Trust, identify
from hcnet_cli.data.images import read_image
from hcnet_cli.data.problems import Report, refuse, reported
from hcnet_cli.files import is_image, read_text
from hcnet_cli.schema import MAX_PIXELS
from hcnet_cli.tasks.segmentation import labels, spec
from hcnet_cli.tasks.segmentation.ade20k import is_ade20k
from hcnet_cli.tasks.segmentation.augment import Pixels
from hcnet_cli.tasks.segmentation.labels import LabelScan, LabelTable, read_label

SPLITS = ("training", "validation")
BACKGROUND = frozenset({"background", "bg", "backgrounds", "unlabeled", "unlabelled", "none", "void", "ignore"})
MANY_ZEROS = 0.25  # of the pixels; 0 is less than a tenth of ADE20K
ZERO_IS_A_CLASS = "--set data.reduce_zero_label=false"


@dataclass(frozen=True)
class SceneFolder:
    """A checked data folder. `images[split]` and `labels[split]` are arrays of paths, paired by position."""

    root: Path
    name: str
    class_names: tuple[str, ...]
    ignore_index: int
    identity: Identity
    trust: Trust
    left_out: LeftOut
    problems: tuple[str, ...]  # that spoil the scores
    notes: tuple[str, ...]
    images: dict[str, NDArray[np.str_]]
    labels: dict[str, NDArray[np.str_]]
    table: LabelTable
    max_pixels: int
    class_counts: NDArray[np.int64]  # [num_classes], labelled pixels of the training split

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def digest(self) -> str:
        return self.identity.digest

    def read_image(self, split: str, index: int) -> Image.Image:
        """An image in RGB."""
        return read_image(str(self.images[split][index]), bits=self.identity.bits, max_pixels=self.max_pixels)

    def read(self, split: str, index: int) -> tuple[Pixels, Pixels]:
        """An image [H, W, 3] and its classes [H, W]; UnusableImageError if one of the two files cannot be decoded."""
        label = str(self.labels[split][index])
        return np.array(self.read_image(split, index)), read_label(label, self.table, self.max_pixels)


def open_folder(
    root: str | Path,
    *,
    num_classes: int | None = None,
    reduce_zero_label: bool = True,
    ignore_index: int = 255,
    scan_labels: bool = True,
    scan_cache: Path | None = None,
    trust: Trust = "content",
    bits: int | None = None,
    max_pixels: int = MAX_PIXELS,
    verify: bool = False,
    report: Report = refuse,
    validation_only: bool = False,
) -> SceneFolder:
    """Pairs images with labels, reads the class names and reads every label once, before training does.

    `reduce_zero_label`: pixel value 0 is ignored and 1 .. K are classes 0 .. K - 1 (ADE20K). The number of classes is
    that of the class names if there are any, else `num_classes`, else it follows from the largest label. `scan_cache`
    is a folder that keeps the result of a scan; unchanged files are not read again. `validation_only`: there is no
    training part.

    Reported, each with a file's name: images without label and the reverse, sizes that differ, colour or 16-bit labels,
    palette and grey labels mixed, and label values out of range. UserError for what leaves nothing to go on with.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    images, label_files = {}, {}
    left_out: LeftOut = {}
    for split in SPLITS[1:] if validation_only else SPLITS:
        with reading_folder(root):
            images[split], label_files[split] = _pairs(root, split, left_out, report)
    names: tuple[str, ...] = ()
    with reported(report):
        names = _class_names(root)
    if names and num_classes and len(names) != num_classes:
        report(UserError(f"{root} names {len(names)} classes, but the recipe asks for {num_classes}."))
    scan = LabelScan({}, {})
    if scan_labels:
        scan = labels.scan(images, label_files, None if verify else scan_cache, max_pixels, report)
    for paths in (images, label_files):
        paths.setdefault("training", np.array([], dtype=np.str_))
    count = len(names) or num_classes or _count_classes(root, scan.first, reduce_zero_label, ignore_index)
    class_names = names or tuple(f"label {i + reduce_zero_label}" for i in range(count))
    _check_numbers(root, class_names, reduce_zero_label, ignore_index)
    table = labels.label_table(count, reduce_zero_label, ignore_index)
    for value, path in sorted(scan.first.items()):
        with reported(report):
            table.check(path, np.array([value]))
    occurring = {int(table.classes[value]) for value in scan.first} - {ignore_index}
    missing = len(set(range(count)) - {ignore_index}) - len(occurring)
    if scan_labels and missing:
        source = "" if names or num_classes else " (their number is the largest label's; a classes.txt would name them)"
        warn(f"{missing} of {count} classes occur in no label of {root}{source}.")
    problems: list[str] = []
    if scan_labels:
        problems = _problems(class_names, scan, table, ignore_index, reduce_zero_label, report)
    images_of = {os.fsencode(os.path.relpath(path, root)) for split in SPLITS for path in images[split].tolist()}
    files = [path for kind in (images, label_files) for split in SPLITS for path in kind[split].tolist()]
    identity = identify(
        root,
        [os.fsencode(os.path.relpath(path, root)) for path in files],
        {"layout": "scene-parsing", "classes": class_names, "images": [len(images[split]) for split in SPLITS]},
        images=images_of,
        trust=trust,
        bits=bits,
        max_pixels=max_pixels,
        verify=verify,
    )
    whole = is_ade20k(names, len(images["training"]), len(images["validation"]), identity.num_distinct)
    return SceneFolder(
        root=root,
        name=dataset_name(root, spec.SPEC.benchmark, whole),
        class_names=class_names,
        ignore_index=ignore_index,
        identity=identity,
        trust=trust,
        left_out=left_out,
        problems=tuple(problems),
        notes=(NAMES_NOTE,) if trust == "names" else (),
        images=images,
        labels=label_files,
        table=table,
        max_pixels=max_pixels,
        class_counts=scan.class_counts("training", table, count, ignore_index),
    )


def _check_numbers(root: Path, class_names: Sequence[str], reduce_zero_label: bool, ignore_index: int) -> None:
    """UserError for more classes than labels have values, and for a class that would be ignored by its number."""
    most = 254 if reduce_zero_label else 256
    if len(class_names) > most:
        where = "; 0 and 255 are ignored (data.reduce_zero_label)" if reduce_zero_label else ""
        raise UserError(
            f"{root} has {len(class_names)} classes, and labels of 8 bits have room for {most}{where}.",
            hint="classes.txt has the name of one class on each line.",
        )
    if reduce_zero_label and ignore_index < len(class_names):
        raise UserError(
            f'The class "{class_names[ignore_index]}" would be neither trained nor scored: data.ignore_index is its '
            f"number, {ignore_index}, since with data.reduce_zero_label label 1 is class 0.",
            hint="Leave data.ignore_index out: the labels 0 and 255 are ignored.",
        )


def _problems(
    class_names: Sequence[str],
    scan: LabelScan,
    table: LabelTable,
    ignore_index: int,
    reduce_zero_label: bool,
    report: Report,
) -> list[str]:
    """What makes the scores meaningless or shifts the names of the classes. Splits without any label are reported."""
    found = []
    for split in scan.pixels:
        present = scan.labelled(split, table, ignore_index)
        if not present:
            report(
                UserError(
                    f"No pixel of the {split} labels has a class: all of them are ignored.",
                    hint="See reduce_zero_label and ignore_index of the recipe's data section.",
                )
            )
        if len(class_names) > 1 and len(present) == 1:
            found.append(f'the {split} labels hold one class alone ("{class_names[present[0]]}").')
    if len(class_names) == 1:
        found.append(f'there is one class alone ("{class_names[0]}"): every answer is right and nothing is learned.')
    if not reduce_zero_label:
        return found
    zeros = scan.share_of_zeros()
    if re.sub(r"[^a-z]", "", class_names[0].lower()) in BACKGROUND:
        found.append(
            f'the first class is called "{class_names[0]}", but label 0 is ignored and label 1 gets that name. If 0 is '
            f"{class_names[0]}, give {ZERO_IS_A_CLASS}."
        )
    elif zeros > MANY_ZEROS:
        found.append(f"{zeros:.0%} of the pixels are 0 and ignored. If 0 is a class, give {ZERO_IS_A_CLASS}.")
    return found


def _count_classes(root: Path, values: Collection[int], reduce_zero_label: bool, ignore_index: int) -> int:
    """The number of classes that the largest label value implies that is not ignored."""
    classes = {value - reduce_zero_label for value in values if value != 255} - {-1, ignore_index}
    if not classes:
        raise UserError(
            f"The number of classes of {root} is not known.", hint="Write their names into classes.txt, one a line."
        )
    return max(classes) + 1


def _pairs(root: Path, split: str, left_out: LeftOut, report: Report) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Sorted paths of a split's images and, at the same positions, of their labels."""
    found: dict[str, dict[str, str]] = {}
    for kind in ("images", "annotations"):
        folder = root / kind / split
        if not folder.is_dir():
            raise UserError(
                f"{root} has no folder {kind}/{split}.",
                hint="Expected: images/training, images/validation, annotations/training, annotations/validation.",
            )
        wanted, other = (is_image, "images") if kind == "images" else (_is_label, "labels (.png)")
        files: dict[str, str] = {}
        for name in walk(os.fsencode(folder), wanted, f"{split} files that are not {other}", left_out):
            path = os.path.join(folder, os.fsdecode(name))
            stem = os.path.splitext(os.fsdecode(name))[0]
            if stem in files:
                report(UserError(f"{files[stem]} and {path} have the same name: one label cannot serve both."))
            files[stem] = path
        found[kind] = files
    images, labels = found["images"], found["annotations"]
    for have, lack, what in ((images, labels, "label"), (labels, images, "image")):
        if unpaired := sorted(have.keys() - lack.keys()):
            problem = UserError(
                f"{len(unpaired)} of {len(have)} files have no {what}, the first is {have[unpaired[0]]}.",
                hint=f"images/{split}/NAME.jpg and annotations/{split}/NAME.png belong together.",
            )
            report(problem)
    paired = [stem for stem in images if stem in labels]
    if not paired:
        raise UserError(f"There is no image in {root / 'images' / split}.")
    return np.array([images[stem] for stem in paired]), np.array([labels[stem] for stem in paired])


def _is_label(name: bytes) -> bool:
    return name.lower().endswith(b".png")


def _class_names(root: Path) -> tuple[str, ...]:
    """From classes.txt, one name a line, or the last column of ADE20K's table objectInfo150.txt."""
    for file in (root / "classes.txt", root / "objectInfo150.txt"):
        if not file.is_file():
            continue
        lines = [line for line in read_text(file).splitlines() if line.strip()]
        if file.name == "classes.txt":
            return tuple(line.strip() for line in lines)
        return tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines[1:])
    return ()
