"""ADE20K's SceneParsing layout: where the files are, and images with labels, as in Swin's runs.

    ROOT/images/{training,validation}/**/NAME.jpg          images, .jpg or .png
    ROOT/annotations/{training,validation}/**/NAME.png     labels, see labels.py
    ROOT/objectInfo150.txt or ROOT/classes.txt             class names, optional

Dimension letters: H x W the image as stored, h x w after resizing, S the side of a training crop.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcnet_cli import rng
from hcnet_cli.console import UserError, warn
from hcnet_cli.data import embedded
from hcnet_cli.data.audit import Audit, Item, distinct
from hcnet_cli.data.folders import dataset_name
from hcnet_cli.data.images import first_usable, normalise, read_image, rescale
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import IMAGENET_MEAN, IMAGENET_STD, Part
from hcnet_cli.tasks.segmentation import augment, labels, spec
from hcnet_cli.tasks.segmentation.augment import Pixels
from hcnet_cli.tasks.segmentation.labels import LabelTable, read_label

SPLITS = ("training", "validation")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


# --- the folder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneFolder:
    """A checked data folder. `images[split]` and `labels[split]` are arrays of paths, paired by position."""

    root: Path
    name: str
    class_names: tuple[str, ...]
    ignore_index: int
    digest: str
    images: dict[str, NDArray[np.str_]]
    labels: dict[str, NDArray[np.str_]]
    table: LabelTable

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, split: str, index: int) -> tuple[Pixels, Pixels]:
        """An image [H, W, 3] and its classes [H, W]; UnusableImageError if one of the two files cannot be decoded."""
        pixels = np.array(read_image(str(self.images[split][index])))
        return pixels, read_label(str(self.labels[split][index]), self.table)


def open_folder(
    root: str | Path,
    *,
    num_classes: int | None = None,
    reduce_zero_label: bool = True,
    ignore_index: int = 255,
    scan_labels: bool = True,
    scan_cache: Path | None = None,
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
    for split in SPLITS:
        images[split], label_files[split] = _pairs(root, split)
    names = _class_names(root)
    if names and num_classes and len(names) != num_classes:
        raise UserError(f"{root} names {len(names)} classes, but the recipe asks for {num_classes}.")
    first_file: dict[int, str] = {}  # of each label value
    if scan_labels:
        both = [np.concatenate([files[split] for split in SPLITS]) for files in (images, label_files)]
        first_file = labels.scan(both[0], both[1], scan_cache)
    count = len(names) or num_classes or _count_classes(root, first_file, reduce_zero_label)
    table = labels.label_table(count, reduce_zero_label, ignore_index)
    for value, path in sorted(first_file.items()):
        table.check(path, np.array([value]))
    missing = count - len({int(table.classes[value]) for value in first_file} - {ignore_index})
    if scan_labels and missing:
        source = "" if names or num_classes else " (their number is the largest label's; a classes.txt would name them)"
        warn(f"{missing} of {count} classes occur in no label of {root}{source}.")
    return SceneFolder(
        root=root,
        name=dataset_name(root, "ade20k", count == 150 and len(images["validation"]) == 2000),
        class_names=names or tuple(f"label {i + reduce_zero_label}" for i in range(count)),
        ignore_index=ignore_index,
        digest=_digest(root, [*images.values(), *label_files.values()]),
        images=images,
        labels=label_files,
        table=table,
    )


def _count_classes(root: Path, values: Collection[int], reduce_zero_label: bool) -> int:
    """The number of classes that the largest label value implies."""
    classes = [value - reduce_zero_label for value in values if value != 255 and (value or not reduce_zero_label)]
    if not classes:
        raise UserError(
            f"The number of classes of {root} is not known.", hint="Write their names into classes.txt, one a line."
        )
    return max(classes) + 1


def _pairs(root: Path, split: str) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Sorted paths of a split's images and, at the same positions, of their labels."""
    found: dict[str, dict[str, str]] = {}
    for kind in ("images", "annotations"):
        folder = root / kind / split
        if not folder.is_dir():
            raise UserError(
                f"{root} has no folder {kind}/{split}.",
                hint="Expected: images/training, images/validation, annotations/training, annotations/validation.",
            )
        suffixes = IMAGE_SUFFIXES if kind == "images" else {".png"}
        files: dict[str, str] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                stem = path.relative_to(folder).with_suffix("").as_posix()
                if stem in files:
                    raise UserError(f"{files[stem]} and {path} have the same name: one label cannot serve both.")
                files[stem] = str(path)
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


def _class_names(root: Path) -> tuple[str, ...]:
    """From classes.txt, one name a line, or the last column of ADE20K's table objectInfo150.txt."""
    if (path := root / "classes.txt").is_file():
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    if (path := root / "objectInfo150.txt").is_file():
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:] if line.strip()]
        return tuple(row[-1].split(",")[0].strip() for row in rows)
    return ()


def _digest(root: Path, files: Sequence[NDArray[np.str_]]) -> str:
    """Covers relative names and sizes, so a folder that was moved or unpacked again has the same digest."""
    digest = hashlib.blake2b(digest_size=8)
    for path in np.concatenate(list(files)).tolist():
        digest.update(f"{Path(path).relative_to(root).as_posix()} {os.stat(path).st_size}\n".encode())
    return digest.hexdigest()


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


def check_scorable(folder: SceneFolder) -> None:
    """UserError unless a validation label has a pixel to measure mIoU on. Reads labels up to the first that has."""
    for path in folder.labels["validation"].tolist():
        if (read_label(path, folder.table) != folder.ignore_index).any():
            return
    raise UserError(
        f"No pixel of the validation labels in {folder.root} has a class: there is nothing to measure mIoU on.",
        hint="Ignored are the label 255 and, with data.reduce_zero_label, the label 0.",
    )


def _open(config: spec.SceneParsing, root: Path) -> SceneFolder:
    return open_folder(
        root,
        num_classes=config.num_classes,
        reduce_zero_label=config.reduce_zero_label,
        ignore_index=config.ignore_index,
        scan_cache=embedded.cache_dir() / "label-scans",
    )


def open_data(config: spec.SceneParsing, head: Part, root: Path) -> SceneSplits:
    """Pairs images with labels, reads every label once, and makes both data sets; UserError for what is wrong."""
    folder = _open(config, root)
    check_scorable(folder)
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
    folder = _open(config, root)
    items = [
        Item(image, split, annotation=label)
        for split in SPLITS
        for image, label in zip(folder.images[split].tolist(), folder.labels[split].tolist(), strict=True)
    ]

    def count_pixels(item: Item) -> NDArray[np.int64]:
        counts = np.bincount(read_label(item.annotation, folder.table).ravel(), minlength=256)
        return np.append(counts[: folder.num_classes], counts[folder.num_classes :].sum())

    classes: dict[str, dict[str, float]] = {name: {} for name in distinct(folder.class_names)}
    return Audit(folder.name, root, "ADE20K", "% of the pixels", items, classes, count_pixels)
