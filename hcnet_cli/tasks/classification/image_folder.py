"""Folders of images by class, as ImageNet has them.

ROOT/train/<class>/**/*.JPEG     classes are these folders, in sorted order, and no others
ROOT/val/<class>/**/*.JPEG
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from hcnet_cli import rng
from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.data.audit import Audit, Item
from hcnet_cli.data.folders import Packed, dataset_name
from hcnet_cli.data.images import first_usable, read_image
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import Part
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.classification import spec
from hcnet_cli.tasks.classification.augment import collate, eval_transform, train_transform

SIZES_HASHED_PER_CLASS = 100  # about; in a class of fewer files, all
EXTENSIONS = frozenset(b".jpg .jpeg .png .webp .bmp .tif .tiff .gif .ppm .pgm .jp2".split())
LAYOUT = "An image folder holds train/<class>/ and val/<class>/ with the images inside."


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Files:
    """The images of a split."""

    names: Packed  # [N], each relative to its class folder
    labels: NDArray[np.int32]  # [N], index into the classes

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])


@dataclass(frozen=True, eq=False)
class Index:
    """What a folder holds. `digest` is a hash of class and file names, `name` is what results call the data."""

    root: Path
    name: str
    digest: str
    classes: tuple[str, ...]
    train: Files
    val: Files

    @property
    def num_train(self) -> int:
        return len(self.train)

    @property
    def num_val(self) -> int:
        return len(self.val)


def scan(root: str | Path) -> Index:
    """Reads the folders and opens no file. The digest covers all names and the sizes of some files of each class.

    Raises UserError for a folder that does not have this layout.
    """
    root = Path(root)
    _check_layout(root)
    try:
        classes = tuple(_subfolders(root / "train"))
        for split in ("train", "val"):
            _check_classes(root / split, classes)
        digest = hashlib.blake2b(digest_size=8)
        files = {split: _files(root / split, classes, digest) for split in ("train", "val")}
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read: {error.strerror}.") from None
    name = dataset_name(root, "imagenet-1k", is_imagenet(classes, len(files["val"])))
    return Index(root, name, digest.hexdigest(), classes, files["train"], files["val"])


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}.", hint=LAYOUT)
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if not missing:
        return
    others = [
        task.name
        for task in TASKS.values()
        if task is not spec.SPEC and any(form.recognise(root) for form in task.formats.values())
    ]
    hint = LAYOUT
    if others:
        hint = f"It looks like data for another command: hcnet {others[0]} --data {root}"
    elif found := _subfolders(root):
        hint += f" It has: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}."
    folders = " and no ".join(f"{split}/" for split in missing)
    raise UserError(f"The data folder {root} has no {folders} folder.", hint=hint)


def _check_classes(folder: Path, classes: tuple[str, ...]) -> None:
    """Raises UserError unless a split has class folders, all of them among the training classes."""
    found = _subfolders(folder)
    if not found:
        with os.scandir(folder) as entries:
            loose = any(_is_image(os.fsencode(entry.name)) for entry in entries)
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


def _is_image(name: bytes) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _image_names(folder: bytes) -> list[bytes]:
    """Images in a folder and below, relative to it, sorted; what starts with a dot is left out."""
    names: list[bytes] = []
    pending = [b""]
    while pending:
        below = pending.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if _is_image(entry.name):
                    names.append(below + entry.name)
                elif entry.is_dir():
                    pending.append(below + entry.name + b"/")
    return sorted(names)


def _files(folder: Path, classes: tuple[str, ...], digest: hashlib.blake2b) -> Files:
    present = set(_subfolders(folder))
    names: list[bytes] = []
    counts, empty = [], []
    digest.update(b"\0split " + os.fsencode(folder.name))
    for name in classes:
        images = _image_names(os.fsencode(folder / name)) if name in present else []
        if name in present and not images:
            empty.append(name)
        digest.update(b"\0class " + os.fsencode(name))
        step = max(1, len(images) // SIZES_HASHED_PER_CLASS)
        for number, image in enumerate(images):
            digest.update(b"\0" + image)
            if number % step == 0:  # a file replaced under its old name has another size
                digest.update(b"%d" % os.stat(os.path.join(os.fsencode(folder / name), image)).st_size)
        names += images
        counts.append(len(images))
    if empty:
        raise UserError(
            f"{folder} has {_count_and_names(empty)} without images.",
            hint=f"Image files end in {' '.join(sorted(e.decode() for e in EXTENSIONS))}.",
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return Files(Packed(names), labels)


def is_imagenet(classes: tuple[str, ...], num_val: int) -> bool:
    """Whether these are the classes and the number of validation images of ILSVRC2012."""
    return len(classes) == 1000 and (classes[0], classes[-1]) == ("n01440764", "n15075141") and num_val == 50_000


# --- images -----------------------------------------------------------------------------------------------------------


class ImageFolder(Dataset[dict[str, Any]]):
    """Items of a split: what the transform makes of an image (see `augment.Transform`), `target`, `sample` and `key`.

    In training the transform draws from the request's key alone, and an image that cannot be used is replaced by one
    that the key chooses; the item then names the file under `unreadable`. In evaluation that is a UserError.
    """

    def __init__(self, index: Index, split: str, transform: Callable[[Image.Image], dict[str, Any]]) -> None:
        self.files: Files = {"train": index.train, "val": index.val}[split]
        self.train = split == "train"
        self.folder = str(index.root / split)
        self.classes = index.classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def with_transform(self, transform: Callable[[Image.Image], dict[str, Any]]) -> ImageFolder:
        """The same images behind another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def sample_path(self, index: int) -> str:
        """The file of a sample."""
        return os.path.join(self.folder, self.classes[self.files.labels[index]], self.files.name(index))

    def _read(self, index: int) -> Image.Image:
        return read_image(self.sample_path(index))

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, key, _ = request
        replaced: dict[str, str] = {}
        if self.train:
            index, image, replaced = first_usable(self._read, index, key, range(len(self)))
        else:
            image = self._read(index)
        with rng.seeded(key):
            made = self.transform(image)
        return {**made, "sample": index, "key": key, "target": int(self.files.labels[index]), **replaced}


# --- from a recipe's section ------------------------------------------------------------------------------------------


def open_data(config: spec.ImageFolder, head: Part, root: Path) -> DataSplits:
    """Scans the folder and makes both data sets; UserError for what is wrong with it."""
    return splits(config, scan(root))


def splits(config: spec.ImageFolder, index: Index, images: type[ImageFolder] | None = None) -> DataSplits:
    """Both data sets of an index, with the augmentation of the recipe. `images`: the class that finds the files."""
    images = images or ImageFolder
    shared: dict[str, Any] = {"img_size": config.img_size, "interpolation": config.interpolation}
    names = {
        *("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment"),
        *("re_prob", "re_mode", "re_count", "mean"),
    }
    train = train_transform(**shared, **config.model_dump(include=names))
    return DataSplits(
        info=DataInfo(
            name=index.name,
            digest=index.digest,
            path=str(index.root),
            num_train=index.num_train,
            num_val=index.num_val,
            num_classes=len(index.classes),
        ),
        train=images(index, "train", train),
        val=images(index, "val", eval_transform(**shared, crop_pct=config.crop_pct)),
        class_names=list(index.classes),
        img_size=(config.img_size, config.img_size),
        collate=collate,
        val_collate=collate,
    )


# --- hcnet check ------------------------------------------------------------------------------------------------------


def audit(config: spec.ImageFolder, head: Part, root: Path) -> Audit:
    """The images of the folder, and classes that validation lacks."""
    index = scan(root)
    items: list[Item] = []
    classes: dict[str, dict[str, float]] = {name: {} for name in index.classes}
    for split, files in (("train", index.train), ("val", index.val)):
        images = ImageFolder(index, split, lambda image: {})
        items += [Item(images.sample_path(i), split, index.classes[files.labels[i]]) for i in range(len(images))]
        for name, count in zip(index.classes, np.bincount(files.labels, minlength=len(classes)), strict=True):
            classes[name][split] = int(count)
    made = Audit(index.name, root, "image folder", "images", items, classes)
    made.note("classes without validation images", [name for name, counts in classes.items() if not counts["val"]])
    return made
