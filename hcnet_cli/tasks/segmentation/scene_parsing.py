"""ADE20K's SceneParsing layout: where the files are, and images with labels, as in Swin's runs.

    ROOT/images/{training,validation}/**/NAME.jpg          images, .jpg or .png
    ROOT/annotations/{training,validation}/**/NAME.png     labels, see labels.py
    ROOT/objectInfo150.txt or ROOT/classes.txt             class names, optional

Dimension letters: H x W the image as stored, h x w after resizing, S the side of a training crop.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hcnet_cli import rng
from hcnet_cli.console import UserError, warn
from hcnet_cli.data.audit import Audit, Item, distinct
from hcnet_cli.data.folders import LeftOut, cache_dir, counted, dataset_name, is_image, walk
from hcnet_cli.data.identity import NAMES_NOTE, Identity, Trust, identify
from hcnet_cli.data.images import first_usable, normalise, read_image, rescale
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import IMAGENET_MEAN, IMAGENET_STD, Part
from hcnet_cli.tasks.segmentation import augment, labels, spec
from hcnet_cli.tasks.segmentation.ade20k import is_ade20k
from hcnet_cli.tasks.segmentation.augment import Pixels
from hcnet_cli.tasks.segmentation.labels import LabelScan, LabelTable, read_label

SPLITS = ("training", "validation")
BACKGROUND = frozenset({"background", "bg", "backgrounds", "unlabeled", "unlabelled", "none", "void", "ignore"})
MANY_ZEROS = 0.25  # of the pixels; 0 is less than a tenth of ADE20K
ZERO_IS_A_CLASS = "--set data.reduce_zero_label=false"


# --- the folder -------------------------------------------------------------------------------------------------------


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

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def digest(self) -> str:
        return self.identity.digest

    def read_image(self, split: str, index: int) -> Image.Image:
        """An image in RGB."""
        return read_image(str(self.images[split][index]), bits=self.identity.bits)

    def read(self, split: str, index: int) -> tuple[Pixels, Pixels]:
        """An image [H, W, 3] and its classes [H, W]; UnusableImageError if one of the two files cannot be decoded."""
        return np.array(self.read_image(split, index)), read_label(str(self.labels[split][index]), self.table)


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
    verify: bool = False,
) -> SceneFolder:
    """Pairs images with labels, reads the class names and reads every label once, before training does.

    `reduce_zero_label`: pixel value 0 is ignored and 1 .. K are classes 0 .. K - 1 (ADE20K). The number of classes is
    that of the class names if there are any, else `num_classes`, else it follows from the largest label. `scan_cache`
    is a folder that keeps the result of a scan; unchanged files are not read again.

    Raises UserError, naming a file, for an image without label and the reverse, sizes that differ, colour or 16-bit
    labels, palette and grey labels mixed, and label values out of range.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    images, label_files = {}, {}
    left_out: LeftOut = {}
    for split in SPLITS:
        images[split], label_files[split] = _pairs(root, split, left_out)
    names = _class_names(root)
    if names and num_classes and len(names) != num_classes:
        raise UserError(f"{root} names {len(names)} classes, but the recipe asks for {num_classes}.")
    scan = labels.scan(images, label_files, scan_cache) if scan_labels else LabelScan({}, {})
    count = len(names) or num_classes or _count_classes(root, scan.first, reduce_zero_label)
    table = labels.label_table(count, reduce_zero_label, ignore_index)
    for value, path in sorted(scan.first.items()):
        table.check(path, np.array([value]))
    missing = count - len({int(table.classes[value]) for value in scan.first} - {ignore_index})
    if scan_labels and missing:
        source = "" if names or num_classes else " (their number is the largest label's; a classes.txt would name them)"
        warn(f"{missing} of {count} classes occur in no label of {root}{source}.")
    class_names = names or tuple(f"label {i + reduce_zero_label}" for i in range(count))
    images_of = {os.fsencode(os.path.relpath(path, root)) for split in SPLITS for path in images[split].tolist()}
    files = [path for kind in (images, label_files) for split in SPLITS for path in kind[split].tolist()]
    identity = identify(
        root,
        [os.fsencode(os.path.relpath(path, root)) for path in files],
        {"layout": "scene-parsing", "classes": class_names, "images": [len(images[split]) for split in SPLITS]},
        images=images_of,
        trust=trust,
        bits=bits,
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
        problems=tuple(_problems(class_names, scan, table, ignore_index, reduce_zero_label)) if scan_labels else (),
        notes=(NAMES_NOTE,) if trust == "names" else (),
        images=images,
        labels=label_files,
        table=table,
    )


def _problems(
    class_names: Sequence[str], scan: LabelScan, table: LabelTable, ignore_index: int, reduce_zero_label: bool
) -> list[str]:
    """What makes the scores meaningless or shifts the names of the classes. UserError for splits without any label."""
    found = []
    for split in SPLITS:
        present = scan.labelled(split, table, ignore_index)
        if not present:
            raise UserError(
                f"No pixel of the {split} labels has a class: all of them are ignored.",
                hint="See reduce_zero_label and ignore_index of the recipe's data section.",
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


def _count_classes(root: Path, values: Collection[int], reduce_zero_label: bool) -> int:
    """The number of classes that the largest label value implies."""
    classes = [value - reduce_zero_label for value in values if value != 255 and (value or not reduce_zero_label)]
    if not classes:
        raise UserError(
            f"The number of classes of {root} is not known.", hint="Write their names into classes.txt, one a line."
        )
    return max(classes) + 1


def _pairs(root: Path, split: str, left_out: LeftOut) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
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
                raise UserError(f"{files[stem]} and {path} have the same name: one label cannot serve both.")
            files[stem] = path
        found[kind] = files
    images, labels = found["images"], found["annotations"]
    for have, lack, what in ((images, labels, "label"), (labels, images, "image")):
        if unpaired := sorted(have.keys() - lack.keys()):
            raise UserError(
                f"{len(unpaired)} of {len(have)} files have no {what}, the first is {have[unpaired[0]]}.",
                hint=f"images/{split}/NAME.jpg and annotations/{split}/NAME.png belong together.",
            )
    if not images:
        raise UserError(f"There is no image in {root / 'images' / split}.")
    return np.array(list(images.values())), np.array([labels[stem] for stem in images])


def _is_label(name: bytes) -> bool:
    return name.lower().endswith(b".png")


def _class_names(root: Path) -> tuple[str, ...]:
    """From classes.txt, one name a line, or the last column of ADE20K's table objectInfo150.txt."""
    for file in (root / "classes.txt", root / "objectInfo150.txt"):
        if not file.is_file():
            continue
        try:
            lines = [line for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{file} is not in UTF-8.", hint="Save it again in this encoding.") from None
        if file.name == "classes.txt":
            return tuple(line.strip() for line in lines)
        return tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines[1:])
    return ()


# --- data sets --------------------------------------------------------------------------------------------------------


class TrainScenes:
    """Augmented crops, in the reference's order: resize, crop, flip, photometric distortion, normalise, pad.

    `img_scale` (long side, short side) times a ratio drawn from `ratio_range` bounds the resized image. An item has
    `image` [3, S, S] float32 and `label` [S, S] uint8; all its randomness comes from the request's key. An image or
    label that cannot be used is replaced by another, chosen by the key, and named under `unreadable`.
    """

    def __init__(
        self,
        folder: SceneFolder,
        split: str = "training",
        *,
        img_scale: tuple[int, int] = (2048, 512),
        ratio_range: tuple[float, float] = (0.5, 2.0),
        crop_size: int = 512,
        cat_max_ratio: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.folder, self.split = folder, split
        self.img_scale = img_scale
        self.ratio_range = ratio_range
        self.crop_size = crop_size
        self.cat_max_ratio = cat_max_ratio
        self.hflip = hflip
        self.photometric = photometric
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.folder.images[self.split])

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, key, _ = request
        index, (pixels, label), replaced = first_usable(self._read, index, key, range(len(self)))
        with rng.seeded(key):
            pixels, label = self._augment(pixels, label)
        image = normalise(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), self.mean, self.std)
        return {
            "sample": index,
            "key": key,
            "image": augment.pad(image, self.crop_size, 0),
            "label": augment.pad(torch.from_numpy(label), self.crop_size, self.folder.ignore_index),
            **replaced,
        }

    def sample_path(self, index: int) -> str:
        """The file of a sample."""
        return str(self.folder.images[self.split][index])

    def _read(self, index: int) -> tuple[Pixels, Pixels]:
        return self.folder.read(self.split, index)

    def _augment(self, pixels: Pixels, label: Pixels) -> tuple[Pixels, Pixels]:
        """[H, W, 3], [H, W] -> a crop of both, of at most S x S. Draws from numpy's global generator."""
        ratio = np.random.uniform(*self.ratio_range)
        long_side, short_side = (int(side * ratio) for side in self.img_scale)
        size = rescale(label.shape, (long_side, short_side))
        label = augment.resize_label(label, size)
        pixels = augment.resize_image(pixels, size)
        window = augment.random_crop(label, self.crop_size, self.cat_max_ratio, self.folder.ignore_index)
        pixels, label = pixels[window], label[window]
        if np.random.uniform() < self.hflip:
            pixels, label = pixels[:, ::-1], label[:, ::-1]
        if self.photometric:
            pixels = augment.photometric_distortion(pixels)
        return pixels, np.ascontiguousarray(label)


class EvalScenes:
    """Whole images, one resized copy for each ratio, and the label at its original size.

    An item has `images`, a list of [3, h, w] float32 (one per ratio, each resized from the original within
    `img_scale` times the ratio), `label` [H, W] uint8 and `path`. Sizes differ, so it needs `collate_scenes`.
    """

    def __init__(
        self,
        folder: SceneFolder,
        split: str = "validation",
        *,
        img_scale: tuple[int, int] = (2048, 512),
        ratios: Sequence[float] = (1.0,),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.folder, self.split = folder, split
        self.scales = [(int(img_scale[0] * ratio), int(img_scale[1] * ratio)) for ratio in ratios]
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.folder.images[self.split])

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, key, _ = request
        pixels, label = self.folder.read(self.split, index)
        resized = [augment.resize_image(pixels, rescale(label.shape, scale)) for scale in self.scales]
        return {
            "sample": index,
            "key": key,
            "images": [normalise(torch.from_numpy(x).permute(2, 0, 1), self.mean, self.std) for x in resized],
            "label": torch.from_numpy(label),
            "path": str(self.folder.images[self.split][index]),
        }


def collate_scenes(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists over the samples, since their sizes may differ; `sample` and `key` as int64 tensors [B]."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    return batch | {name: torch.tensor(batch[name], dtype=torch.int64) for name in ("sample", "key")}


# --- from a recipe's section ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SceneSplits(DataSplits):
    """With the folder, for evaluations at other scales."""

    folder: SceneFolder


def _open(config: spec.SceneParsing, root: Path, verify: bool = False) -> SceneFolder:
    return open_folder(
        root,
        num_classes=config.num_classes,
        reduce_zero_label=config.reduce_zero_label,
        ignore_index=config.ignore_index,
        scan_cache=cache_dir() / "label-scans",
        trust=config.trust,
        bits=config.bits,
        verify=verify,
    )


def open_data(config: spec.SceneParsing, head: Part, root: Path) -> SceneSplits:
    """Pairs images with labels, reads every label once, and makes both data sets; UserError for what is wrong."""
    folder = _open(config, root)
    for problem in folder.problems:
        warn(f"{root}: {problem}")
    shared: dict[str, Any] = {"img_scale": config.img_scale, "mean": config.mean, "std": config.std}
    names = {"ratio_range", "crop_size", "cat_max_ratio", "hflip", "photometric"}
    train = TrainScenes(folder, **shared, **config.model_dump(include=names))
    return SceneSplits(
        info=DataInfo(
            name=folder.name,
            digest=folder.digest,
            path=str(root),
            num_train=len(train),
            num_val=len(folder.images["validation"]),
            num_classes=folder.num_classes,
            trust=folder.trust,
            bits=folder.identity.bits,
            left_out=counted(folder.left_out),
            notes=list(folder.notes),
        ),
        train=train,
        val=EvalScenes(folder, **shared),
        class_names=list(folder.class_names),
        img_size=(512, 2048),
        val_collate=collate_scenes,
        folder=folder,
    )


# --- hcnet check ------------------------------------------------------------------------------------------------------


def audit(config: spec.SceneParsing, head: Part, root: Path) -> Audit:
    """The images and labels of the folder; UserError for labels that cannot be used."""
    folder = _open(config, root, verify=True)
    items = [
        Item(image, split, annotation=label)
        for split in SPLITS
        for image, label in zip(folder.images[split].tolist(), folder.labels[split].tolist(), strict=True)
    ]

    def count_pixels(item: Item) -> NDArray[np.int64]:
        counts = np.bincount(read_label(item.annotation, folder.table).ravel(), minlength=256)
        return np.append(counts[: folder.num_classes], counts[folder.num_classes :].sum())

    classes: dict[str, dict[str, float]] = {name: {} for name in distinct(folder.class_names)}
    made = Audit(
        folder.name, root, "ADE20K", "% of the pixels", items, classes, count_pixels, bits=folder.identity.bits
    )
    made.note_identity(folder.identity, folder.left_out, folder.notes)
    made.note("scores that mean nothing, or names that are shifted", list(folder.problems), wrong=True)
    return made
