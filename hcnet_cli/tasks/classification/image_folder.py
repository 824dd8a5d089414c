"""Folders of images by class, as ImageNet has them.

ROOT/train/<class>/**/*.JPEG     classes are these folders, in sorted order, and no others
ROOT/val/<class>/**/*.JPEG

A split may lie in tars instead (data/archive.py): ROOT/train-000000.tar, ...
"""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from hcnet_cli import rng
from hcnet_cli.console import UserError, did_you_mean, warn
from hcnet_cli.data import archive
from hcnet_cli.data.audit import Audit, Item
from hcnet_cli.data.folders import LeftOut, Packed, counted, own_name, reading_folder, subfolders, walk
from hcnet_cli.data.identity import NAMES_NOTE, Identity, Trust, identify
from hcnet_cli.data.images import first_usable, read_image
from hcnet_cli.data.loader import SampleRequest, Shards
from hcnet_cli.data.member import Member, Source
from hcnet_cli.data.problems import Report, refuse, reported
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.files import EXTENSIONS, is_image
from hcnet_cli.inputs import check_folder, task_of
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import MAX_PIXELS, Part
from hcnet_cli.tasks.classification import spec
from hcnet_cli.tasks.classification.folds import NOTE, deal
from hcnet_cli.tasks.classification.imagenet import is_imagenet, part_of_imagenet

SPLITS = ("train", "val")
READING = {"trust", "bits", "max_pixels"}  # fields of the recipe's section
BENCHMARK = spec.SPEC.benchmark
WITHOUT_VAL = "Without val/, cross-validate: train with --set data.folds=5."
LAYOUT = "An image folder holds train/<class>/ and val/<class>/ with the images inside."


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Files:
    """The images of a split."""

    names: Packed  # [N], each relative to its class folder
    labels: NDArray[np.int32]  # [N], index into the classes
    members: archive.Members | None = None  # [N], where they lie in tars
    split: str = ""  # whose folder they lie in, where it is another

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def take(self, rows: NDArray[np.intp], split: str) -> Files:
        """Some of them, which lie in the folder of `split`."""
        members = None if self.members is None else self.members.take(rows)
        return Files(self.names.take(rows), self.labels[rows], members, split)


NO_FILES = Files(Packed(()), np.empty(0, dtype=np.int32))


@dataclass(frozen=True, eq=False)
class Index:
    """What a folder holds. `name` is what results call the data, `notes` what they say below their tables.

    `left_out` names what is not used, by reason; `trust` says what `identity` was made of.
    """

    root: Path
    name: str
    identity: Identity
    trust: Trust
    classes: tuple[str, ...]
    train: Files
    val: Files
    left_out: LeftOut
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        return self.identity.digest

    @property
    def num_train(self) -> int:
        return len(self.train)

    @property
    def num_val(self) -> int:
        return len(self.val)


def scan(
    root: str | Path,
    *,
    trust: Trust = "content",
    bits: int | None = None,
    max_pixels: int = MAX_PIXELS,
    verify: bool = False,
    report: Report = refuse,
    splits: Sequence[str] = SPLITS,
) -> Index:
    """Lists the files and reads each once, for the digest (see data/identity.py).

    splits: The ones that are needed; the first has the classes. Another may be missing, or wrong.
    UserError for a folder that does not have this layout; classes that contradict each other are reported.
    """
    root = Path(root)
    left_out: LeftOut = {}
    with reading_folder(root):
        archives = archive.find(root) if root.is_dir() else archive.Archives(root, {})
        _check_layout(root, archives.tars, splits)
        tars = {split: archive.read(archives, split) for split in SPLITS if split in archives.tars}
        folders = [split for split in SPLITS if split not in tars and (root / split).is_dir()]
        classes = tars[splits[0]].classes if splits[0] in tars else tuple(subfolders(root / splits[0]))
        files = dict.fromkeys(SPLITS, NO_FILES)
        tell = {split: report if split in splits else lambda problem: None for split in (*tars, *folders)}
        for split in tell:
            with reported(tell[split]):
                _check_classes(root / split, classes, tars.get(split))
        for split in tell:
            if split in tars:
                files[split] = _files_in_tars(tars[split], classes)
            else:
                files[split] = _files(root / split, classes, left_out, tell[split])
        _leave_out_the_rest(root, folders, left_out)
        names = [name for split in SPLITS for name in _names(split, classes, files[split])]

    def member(number: int) -> Member | None:
        part = files["train"] if number < len(files["train"]) else files["val"]
        place = number if part is files["train"] else number - len(files["train"])
        return None if part.members is None else part.members.member(place, os.fsdecode(names[number]))

    facts = {"layout": "image-folder", "classes": classes, "images": [len(files[split]) for split in SPLITS]}
    measured: dict[str, Any] = {"trust": trust, "bits": bits, "max_pixels": max_pixels, "verify": verify}
    identity = identify(root, names, facts, member=member, **measured)
    archives.require_unchanged(identity.digest)
    train, val = files["train"], files["val"]
    whole = is_imagenet(classes, len(train), len(val), identity.num_distinct)
    name = BENCHMARK if whole else own_name(archives.name or root.resolve().name, BENCHMARK)
    notes = [] if trust == "content" else [NAMES_NOTE]
    if not whole and (part := part_of_imagenet(classes, len(train), len(val))):
        name = f"{BENCHMARK}-part-{len(classes)}c-{len(train)}"
        notes.append(part)
    if len(classes) < 6:
        notes.append(f"Top-5 of {name} chooses among {len(classes)} classes and says little.")
    return Index(root, name, identity, trust, classes, train, val, left_out, tuple(notes))


def _leave_out_the_rest(root: Path, splits: Sequence[str], left_out: LeftOut) -> None:
    """Counts what lies in the folder beside the splits, and in a split beside the class folders."""
    for folder in (root, *(root / split for split in splits)):
        with os.scandir(folder) as entries:
            for entry in entries:
                if folder == root and entry.name not in SPLITS and entry.is_dir():
                    left_out.setdefault("folders that are no split", []).append(entry.path)
                elif folder != root and entry.name.startswith("."):
                    left_out.setdefault("hidden files and folders", []).append(entry.path)
                elif folder != root and not entry.is_dir():
                    left_out.setdefault("files outside the class folders", []).append(entry.path)


def _names(split: str, classes: Sequence[str], files: Files) -> list[bytes]:
    """The files of a split relative to the data folder."""
    folders = [os.fsencode(f"{split}/{name}/") for name in classes]
    return [folders[label] + files.names[i] for i, label in enumerate(files.labels.tolist())]


def _check_layout(root: Path, tars: Mapping[str, Sequence[Path]], splits: Sequence[str]) -> None:
    check_folder(str(root), hint=LAYOUT)
    missing = [split for split in splits if split not in tars and not (root / split).is_dir()]
    if not missing:
        return
    hint = LAYOUT
    if (task := task_of(str(root))) != spec.SPEC.name:
        hint = f"It looks like data for another command: hcnet {task} --data {shlex.quote(str(root))}"
    elif missing == ["val"]:
        hint += f" {WITHOUT_VAL}"
    elif found := subfolders(root):
        hint += f" It has: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}."
    folders = " and no ".join(f"{split}/" for split in missing)
    raise UserError(f"The data folder {root} has no {folders} folder.", hint=hint)


def _check_classes(folder: Path, classes: tuple[str, ...], tars: archive.Contents | None) -> None:
    """Raises UserError unless a split has class folders, all of them among the training classes."""
    found = subfolders(folder) if tars is None else list(tars.classes)
    if not found and tars is not None:
        raise UserError(f"The tars of {folder} hold no images.")
    if not found:
        with os.scandir(folder) as entries:
            loose = any(is_image(os.fsencode(entry.name)) for entry in entries)
        hint = LAYOUT
        if loose and folder.name == "val":
            hint += " ImageNet's validation images come in one folder; sort them by class first (valprep.sh)."
        raise UserError(f"{folder} holds {'images but ' if loose else ''}no class folders.", hint=hint)
    if unknown := sorted(set(found) - set(classes)):
        suggestion = did_you_mean(unknown[0], classes)
        raise UserError(
            f"{folder} has {_count_and_names(unknown)} that {folder.parent / 'train'} lacks.{suggestion}",
            hint="Classes come from the training folder alone.",
        )


def _count_and_names(names: list[str]) -> str:
    quoted = ", ".join(f'"{name}"' for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'a class' if len(names) == 1 else f'{len(names)} classes'} ({quoted}{more})"


def _files(folder: Path, classes: tuple[str, ...], left_out: LeftOut, report: Report) -> Files:
    present = set(subfolders(folder))
    names: list[bytes] = []
    counts, empty = [], []
    for name in classes:
        place = os.fsencode(folder / name)
        images = walk(place, is_image, f"{folder.name} files that are not images", left_out) if name in present else []
        if name in present and not images:
            empty.append(name)
        names += images
        counts.append(len(images))
    if empty:
        report(
            UserError(
                f"{folder} has {_count_and_names(empty)} without images.",
                hint=f"Image files end in {' '.join(sorted(EXTENSIONS))}.",
            )
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return Files(Packed(names), labels)


def _files_in_tars(contents: archive.Contents, classes: tuple[str, ...]) -> Files:
    """The images of a split in tars, class by class; classes that training lacks are reported already."""
    contents = contents.only(classes)
    numbers = np.array([classes.index(name) for name in contents.classes], dtype=np.int32)
    labels = np.repeat(numbers, contents.counts)
    return Files(contents.names, labels, contents.members)


# --- images -----------------------------------------------------------------------------------------------------------


class ImageFolder(Dataset[dict[str, Any]]):
    """Items of a split: what the transform makes of an image (see `augment.Transform`), `target`, `sample` and `key`.

    In training the transform draws from the request's key alone, and an image that cannot be used is replaced by one
    that the key chooses; the item then names the file under `unreadable`. In evaluation that is a UserError.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        transform: Callable[[Image.Image], dict[str, Any]],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.files: Files = {"train": index.train, "val": index.val}[split]
        self.train = split == "train"
        self.split = self.files.split or split
        self.folder = str(index.root / self.split)
        self.classes = index.classes
        self.bits, self.max_pixels = index.identity.bits, max_pixels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def with_transform(self, transform: Callable[[Image.Image], dict[str, Any]]) -> ImageFolder:
        """The same images behind another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def sample_path(self, index: int) -> Source:
        """The file of a sample, or its place in a tar."""
        if self.files.members is not None:
            return self.files.members.member(index, self.sample_name(index))
        return os.path.join(self.folder, self.classes[self.files.labels[index]], self.files.name(index))

    def sample_name(self, index: int) -> str:
        """The file of a sample relative to the data folder, wherever it lies: val/cat/1.jpg."""
        return f"{self.split}/{self.classes[self.files.labels[index]]}/{self.files.name(index)}"

    def load_image(self, index: int) -> Image.Image:
        """The image of a sample, before any transform."""
        return read_image(self.sample_path(index), bits=self.bits, max_pixels=self.max_pixels)

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, key, _ = request
        replaced: dict[str, str] = {}
        if self.train:
            index, image, replaced = first_usable(self.load_image, index, key, range(len(self)))
        else:
            image = self.load_image(index)
        with rng.seeded(key):
            made = self.transform(image)
        return {**made, "sample": index, "key": key, "target": int(self.files.labels[index]), **replaced}


# --- from a recipe's section ------------------------------------------------------------------------------------------


def open_data(config: spec.ImageFolder, head: Part, root: Path, seed: int, validation_only: bool = False) -> DataSplits:
    """Scans the folder and makes both data sets; UserError for what is wrong with it."""
    index = scan(root, **config.model_dump(include=READING), splits=needed(config, validation_only))
    return splits(config, index, seed)


def needed(config: spec.ImageFolder, validation_only: bool = False) -> Sequence[str]:
    """The splits without which a run has no images to train on or to score."""
    return SPLITS[:1] if config.folds is not None else SPLITS[1:] if validation_only else SPLITS


def degenerate(index: Index) -> str:
    """Why any score on these data is meaningless; "" where it is not."""
    if len(index.classes) == 1:
        return f'there is one class alone ("{index.classes[0]}"): every answer is right and nothing is learned.'
    if len(np.unique(index.val.labels)) == 1:
        name = index.classes[int(index.val.labels[0])]
        return f'validation has images of one class alone ("{name}"): a model that always says so scores 100.'
    return ""


def fold(index: Index, number: int, folds: int) -> Index:
    """Part `number` of the training images as the validation images, the other parts as the training images.

    UserError for images that make no such parts; see folds.deal.
    """
    files = index.train
    try:
        trained, scored = deal([files.names[i] for i in range(len(files))], files.labels, number, folds)
    except ValueError as error:
        raise UserError(f"{index.root} cannot be cross-validated: {error}.") from None
    return replace(
        index,
        name=f"{index.name}-{folds}-folds",
        train=files.take(trained, "train"),
        val=files.take(scored, "train"),
        notes=(*index.notes, NOTE.format(folds=folds)),
    )


def splits(config: spec.ImageFolder, index: Index, seed: int, images: type[ImageFolder] = ImageFolder) -> DataSplits:
    """Both data sets of an index, with the augmentation of the recipe; under `data.folds` those of the seed's fold.

    `images`: the class that finds the files. UserError for images that make no folds.
    """
    from hcnet_cli.tasks.classification import augment  # timm, torchvision: seconds that hcnet check need not wait

    shards, digest = None, index.digest
    if config.folds is not None:
        index, digest = fold(index, seed % config.folds, config.folds), f"{digest}-{config.folds}-folds"
    if problem := degenerate(index):
        warn(f"{index.root}: {problem}")
    shared: dict[str, Any] = {"img_size": config.img_size, "interpolation": config.interpolation}
    names = {
        *("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment"),
        *("re_prob", "re_mode", "re_count", "mean"),
    }
    train = augment.train_transform(**shared, **config.model_dump(include=names))
    if config.order == "shards":
        if config.folds is not None:
            raise UserError("The order of shards does not go with data.folds: each fold would be another order.")
        if index.train.members is None:
            raise UserError(
                f"--data-order shards is for images in tars; those of {index.root} are files of their own.",
                hint="Write tars with: hcnet shards FOLDER OUT",
            )
        shards = Shards(index.train.members.by_tar(), config.window)
        digest = f"{index.digest}-{shards.digest}"
    return DataSplits(
        info=DataInfo(
            name=index.name,
            digest=digest,
            path=str(index.root),
            num_train=index.num_train,
            num_val=index.num_val,
            num_classes=len(index.classes),
            trust=index.trust,
            bits=index.identity.bits,
            left_out=counted(index.left_out),
            notes=list(index.notes),
        ),
        train=images(index, "train", train, config.max_pixels),
        val=images(index, "val", augment.eval_transform(**shared, crop_pct=config.crop_pct), config.max_pixels),
        class_names=list(index.classes),
        img_size=(config.img_size, config.img_size),
        collate=augment.collate,
        val_collate=augment.collate,
        class_counts=np.bincount(index.train.labels, minlength=len(index.classes)),
        shards=shards,
    )


# --- hcnet check ------------------------------------------------------------------------------------------------------


def audit(config: spec.ImageFolder, head: Part, root: Path) -> Audit:
    """The images of the folder, and classes that validation lacks."""
    problems: list[UserError] = []
    index = None
    with reported(problems.append):
        reading = config.model_dump(include=READING)
        index = scan(root, **reading, verify=True, report=problems.append, splits=needed(config))
    if index is None:
        name = own_name(root.resolve().name, BENCHMARK)
        return Audit(name, root, "image folder", "images", [], {}, problems=problems)
    if config.folds is not None:
        with reported(problems.append):
            fold(index, 0, config.folds)
        index = replace(index, val=NO_FILES)
    items: list[Item] = []
    classes: dict[str, dict[str, float]] = {name: {} for name in index.classes}
    for split, files in (("train", index.train), ("val", index.val)):
        images = ImageFolder(index, split, lambda image: {})
        items += [Item(images.sample_path(i), split, index.classes[files.labels[i]]) for i in range(len(images))]
        for name, count in zip(index.classes, np.bincount(files.labels, minlength=len(classes)), strict=True):
            classes[name][split] = int(count)
    made = Audit(
        *(index.name, root, "image folder", "images", items, classes),
        bits=index.identity.bits,
        max_pixels=config.max_pixels,
        folds=config.folds is not None,
        problems=problems,
    )
    made.note_identity(index.identity, index.left_out, index.notes)
    made.note("scores that mean nothing", [problem] if (problem := degenerate(index)) else [], wrong=True)
    if config.folds is None:
        made.note("classes without validation images", [name for name, counts in classes.items() if not counts["val"]])
    return made
