"""COCO-format folders: where the files are, and images with targets for the detector.

Both resize policies are those of Swin's detection code (docs/detection.md).
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hcnet_cli import rng
from hcnet_cli.console import UserError, notice
from hcnet_cli.data.audit import Audit, Item, distinct
from hcnet_cli.data.folders import LeftOut, counted, dataset_name, is_image
from hcnet_cli.data.identity import NAMES_NOTE, Identity, Trust, identify
from hcnet_cli.data.images import Size, check_size, first_usable, normalise, read_image, rescale, to_tensor
from hcnet_cli.data.images import resize as resize_image
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import IMAGENET_MEAN, IMAGENET_STD
from hcnet_cli.tasks.detection import spec
from hcnet_cli.tasks.detection.annotations import NO_MASKS_HINT, Annotations, read_annotations
from hcnet_cli.tasks.detection.categories import COCO_CATEGORIES
from hcnet_cli.tasks.detection.geometry import Scene, crop, flip, random_window, resize

NUM_IMAGES = (118_287, 5_000)  # of COCO 2017, for training and for validation
NUM_OBJECTS = (860_001, 36_781)  # annotations of COCO 2017, crowds included
MIN_DISTINCT = 0.99  # of its images have different contents

# --- the folder -------------------------------------------------------------------------------------------------------


def find_split(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The annotation file of a split ("train" or "val") and the folders its images may be in, most likely first.

    Known layouts: COCO's (annotations/instances_train2017.json, train2017/), the same with another suffix or images/
    in between, and exports with _annotations.coco.json next to the images.
    """
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    found = sorted(root.glob(f"annotations/instances_{split}*.json")) or sorted(root.glob(f"annotations/{split}*.json"))
    if len(found) > 1:
        found = [f for f in found if f.stem == f"instances_{split}2017"] or found
    if len(found) > 1:
        raise UserError(f"{root}/annotations has several files for {split}: {', '.join(f.name for f in found)}.")
    if found:
        folder = found[0].stem.removeprefix("instances_")
        return found[0], [root / name for name in (folder, f"images/{folder}", split, f"images/{split}", "images", "")]
    for name in (split, "valid" if split == "val" else split):
        if (root / name / "_annotations.coco.json").is_file():
            return root / name / "_annotations.coco.json", [root / name]
    raise UserError(
        f"There is no annotation file {root / 'annotations' / f'instances_{split}2017.json'}.",
        hint="A COCO folder has train2017/, val2017/ and annotations/instances_{train,val}2017.json.",
    )


def find_images(annotations: Annotations, folders: Sequence[Path]) -> Path:
    """The first of the folders that holds the first image; UserError naming an image if any listed one is missing."""
    names = [annotations.name(i) for i in range(len(annotations))]
    folder = next((f for f in folders if (f / names[0]).is_file()), None)
    if folder is None:
        raise UserError(
            f"{folders[0] / names[0]} is missing: no folder holds the images that {annotations.file} lists."
        )
    parents = {Path(name).parent for name in names}
    present = {str(p / f.name) for p in parents if (folder / p).is_dir() for f in (folder / p).iterdir()}
    missing = [name for name in names if str(Path(name)) not in present]
    if missing:
        count = f"{len(missing)} of {len(names)} images" if len(missing) > 1 else "an image"
        raise UserError(f"{folder / missing[0]} is missing: {annotations.file} lists {count} that {folder} lacks.")
    return folder


def load_split(root: Path, split: str, *, masks: bool = True) -> tuple[Annotations, Path]:
    """(annotations, image folder) of "train" or "val" in a COCO folder; UserError for what is missing or broken."""
    file, folders = find_split(root, split)
    annotations = read_annotations(file, masks=masks, scoring=split == "val")
    return annotations, find_images(annotations, folders)


def check_same_classes(train: Annotations, val: Annotations) -> None:
    """Raises UserError unless both files have the same categories."""
    if train.category_ids != val.category_ids or train.class_names != val.class_names:
        raise UserError(
            f"{train.file.name} and {val.file.name} have different categories: {_brief(train)} and {_brief(val)}."
        )


def check_objects(train: Annotations, val: Annotations) -> None:
    """Raises UserError where there is nothing to train on, or nothing to score."""
    for found, purpose in ((train, "to train on"), (val, "to score")):
        if not len(found.boxes):
            reasons = ", ".join(f"{reason}: {len(ids)}" for reason, ids in found.dropped.items())
            raise UserError(
                f"{found.file} has no object {purpose}: of its {found.num_annotations} annotations "
                f"{'none is left' if found.num_annotations else 'there is none'}{f' ({reasons})' if reasons else ''}."
            )


def _brief(annotations: Annotations) -> str:
    pairs = [f"{i} {n}" for i, n in zip(annotations.category_ids, annotations.class_names, strict=True)]
    return ", ".join(pairs[:4] + ["..."] * (len(pairs) > 4))


def check_sizes(annotations: Annotations, images: Path) -> None:
    """Raises UnusableImageError for the first image that is not one or has another size than its annotations.

    Reads headers alone. Evaluation needs every image, so this runs before training rather than hours into it.
    """
    for i, (height, width) in enumerate(annotations.sizes.tolist()):
        check_size(images / annotations.name(i), (height, width))


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
    """A checked data folder. `left_out`: files and objects that training does not use, by reason."""

    root: Path
    name: str
    identity: Identity
    trust: Trust
    left_out: LeftOut
    train: Annotations
    train_images: Path
    val: Annotations
    val_images: Path

    @property
    def notes(self) -> list[str]:
        return [NAMES_NOTE] if self.trust == "names" else []


def identify_folder(
    root: Path,
    train: tuple[Annotations, Path],
    val: tuple[Annotations, Path],
    config: spec.Coco,
    verify: bool = False,
) -> CocoFolder:
    """Reads the images once, for the digest, and lists what is left out."""
    places: dict[bytes, None] = {}  # in the order of the files, each once
    for found, folder in (train, val):
        for i in range(len(found)):
            places[os.fsencode(os.path.relpath(folder / found.name(i), root))] = None
    identity = identify(
        root,
        list(places),
        {
            "layout": "coco",
            "classes": list(zip(val[0].category_ids, val[0].class_names, strict=True)),
            "annotations": [train[0].digest, val[0].digest],
        },
        trust=config.trust,
        bits=config.bits,
        verify=verify,
    )
    left_out = _left_out(root, [train, val], config.min_side, places)
    name = dataset_name(root, spec.SPEC.benchmark, is_coco(train[0], val[0], identity.num_distinct))
    return CocoFolder(root, name, identity, config.trust, left_out, *train, *val)


def _left_out(
    root: Path, splits: Sequence[tuple[Annotations, Path]], min_side: int, used: Mapping[bytes, None]
) -> LeftOut:
    """Training objects and images that training does not use, and image files that no annotation file names."""
    train = splits[0][0]
    left_out: LeftOut = {
        f"training objects ({reason})": [f"annotation id {i}" for i in ids] for reason, ids in train.dropped.items()
    }
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


def check_scorable(val: Annotations) -> None:
    """UserError unless there is an object to measure AP on."""
    assert val.truth is not None
    if not (~val.truth.crowds).any():
        objects = f"only crowds ({len(val.truth)})" if len(val.truth) else "no objects"
        raise UserError(
            f"{val.file} has {objects}: there is nothing to measure AP on.",
            hint="The validation images need annotated objects, as those for training do.",
        )


# --- images and their objects -----------------------------------------------------------------------------------------


class CocoDataset(Dataset[dict[str, Any]]):
    """Items of a COCO split for training or for evaluation.

    A training item: `image` [3, H, W] normalised, `target` {boxes [G, 4], labels [G], masks [G, H, W], image_id},
    `sample`, `key`. All of an item's randomness comes from the key of its request (index, key, step key). Images
    without any annotation and images smaller than `min_side` are left out, as in the reference. An image that cannot
    be used is replaced by another of its group, and the item then names the file under `unreadable`.

    An evaluation item: the image at `img_scale`, `target` {image_id, orig_size [2] = height, width}; every image of the
    file, in its order.

    Args:
        img_scale: (long, short) sides to fit the image into; the only policy if `multiscale` is empty.
        multiscale: shorter sides to draw from, the long side staying below img_scale's. Half of the images are first
            resized to a side of `crop_scales` and cropped to a window with sides from `crop_range` (unless empty).
        hflip: probability of a horizontal flip, before everything else.
    """

    def __init__(
        self,
        annotations: Annotations,
        images: Path,
        *,
        train: bool,
        img_scale: tuple[int, int] = (1333, 800),
        multiscale: Sequence[int] = (),
        crop_scales: Sequence[int] = (400, 500, 600),
        crop_range: tuple[int, int] = (384, 600),
        hflip: float = 0.5,
        min_side: int = 32,
        bits: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.annotations, self.images, self.train = annotations, images, train
        self.long, self.short = max(img_scale), min(img_scale)
        self.multiscale, self.crop_scales, self.crop_range = tuple(multiscale), tuple(crop_scales), crop_range
        self.hflip = hflip
        self.bits = bits
        self.mean, self.std = mean, std
        rows = np.arange(len(annotations))
        if train:
            rows = rows[annotations.annotated & (annotations.sizes.min(axis=1) >= min_side)]
            if not len(rows):
                raise UserError(f"{annotations.file} has no image to train on: none has objects.")
        self.rows = rows  # dataset index -> image of the annotation file
        height, width = annotations.sizes[rows].T
        self.groups = (width >= height).astype(np.int64)  # [len], 1 landscape, 0 portrait
        self._members: list[NDArray[np.int64]] = [np.flatnonzero(self.groups == group) for group in (0, 1)]

    def __len__(self) -> int:
        return len(self.rows)

    def sample_path(self, index: int) -> str:
        """The file of an item."""
        return str(self.images / self.annotations.name(int(self.rows[index])))

    def at_scale(self, img_scale: tuple[int, int]) -> CocoDataset:
        """The same images, rescaled to fit other (long, short) sides."""
        other = copy.copy(self)
        other.long, other.short = max(img_scale), min(img_scale)
        return other

    def load_image(self, image_id: int) -> Image.Image:
        """An image by its COCO id, as its annotations see it; UserError if it cannot be used."""
        return self._read(int(np.flatnonzero(self.annotations.image_ids == image_id)[0]))

    def _read(self, i: int) -> Image.Image:
        height, width = self.annotations.sizes[i].tolist()
        return read_image(self.images / self.annotations.name(i), (height, width), self.bits)

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, key, _ = request
        return self._training_item(index, key) if self.train else self._evaluation_item(index, key)

    def _training_item(self, index: int, key: int) -> dict[str, Any]:
        others = self._members[self.groups[index]]
        index, scene, replaced = first_usable(lambda index: self.scene(int(self.rows[index])), index, key, others)
        with rng.seeded(key):
            scene = self._augment(scene)
        target = {
            "boxes": scene.boxes,
            "labels": scene.labels,
            "image_id": torch.tensor(self.annotations.image_ids[self.rows[index]]),
        }
        if scene.masks is not None:
            target["masks"] = scene.masks.contiguous()
        image = normalise(scene.image, self.mean, self.std)
        return {"image": image, "target": target, "sample": index, "key": key, **replaced}

    def _evaluation_item(self, index: int, key: int) -> dict[str, Any]:
        i = int(self.rows[index])
        image = to_tensor(self._read(i))
        target = {
            "image_id": torch.tensor(self.annotations.image_ids[i]),
            "orig_size": torch.tensor(image.shape[1:]),
        }
        image = normalise(resize_image(image, self._fit(image, self.short)), self.mean, self.std)
        return {"image": image, "target": target, "sample": index, "key": key}

    def scene(self, i: int) -> Scene:
        """Image `i` of the annotation file with its objects, before any augmentation."""
        image = to_tensor(self._read(i))
        rows = range(int(self.annotations.first[i]), int(self.annotations.first[i + 1]))
        masks = None
        if self.annotations.segments is not None:
            masks = torch.zeros(len(rows), *image.shape[1:], dtype=torch.uint8)
            for g, row in enumerate(rows):
                masks[g] = torch.from_numpy(self.annotations.mask(row, i))
        boxes, labels = self.annotations.boxes[rows.start : rows.stop], self.annotations.labels[rows.start : rows.stop]
        return Scene(image, torch.from_numpy(boxes.copy()), torch.from_numpy(labels.copy()), masks)

    def _augment(self, scene: Scene) -> Scene:
        if random.random() < self.hflip:
            scene = flip(scene)
        if not self.multiscale:
            return resize(scene, self._fit(scene.image, self.short))
        if self.crop_scales and random.random() < 0.5:
            scene = resize(scene, self._fit(scene.image, random.choice(self.crop_scales)))
            height, width = scene.image.shape[1:]
            scene = crop(scene, *random_window((height, width), self.crop_range))
        return resize(scene, self._fit(scene.image, random.choice(self.multiscale)))

    def _fit(self, image: Tensor, short: int) -> Size:
        return rescale(image.shape[1:], (self.long, short))


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Images and targets stay lists (their sizes differ); sample and key become int64 [B]."""
    return {
        "image": [item["image"] for item in items],
        "target": [item["target"] for item in items],
        "sample": torch.tensor([item["sample"] for item in items], dtype=torch.int64),
        "key": torch.tensor([item["key"] for item in items], dtype=torch.int64),
    }


# --- from a recipe's section ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CocoSplits(DataSplits):
    """With the annotations of the validation images, which scores are made against."""

    val: CocoDataset
    annotations: Annotations


def open_data(config: spec.Coco, head: spec.MaskRCNN, root: Path) -> CocoSplits:
    """Reads both annotation files and makes the data sets; UserError for what is wrong with them."""
    splits = {split: load_split(root, split, masks=head.with_masks) for split in ("train", "val")}
    (train, train_images), (val, val_images) = splits["train"], splits["val"]
    check_same_classes(train, val)
    check_scorable(val)
    check_sizes(val, val_images)  # what evaluation cannot do without must not be found after hours of training
    check_objects(train, val)
    folder = identify_folder(root, splits["train"], splits["val"], config)
    for found in (train, val):
        if found.num_as_text:
            notice(f"{found.file}: {found.num_as_text:,} annotations have iscrowd or ignore as text; read as 0 or 1.")
    given = config.model_dump(exclude={"format", "path", "trust"}) | {"bits": folder.identity.bits}
    train_set = CocoDataset(train, train_images, train=True, **given)
    return CocoSplits(
        info=DataInfo(
            name=folder.name,
            digest=folder.identity.digest,
            path=str(root),
            num_train=len(train_set),
            num_val=len(val),
            num_classes=len(val.class_names),
            trust=folder.trust,
            bits=folder.identity.bits,
            left_out=counted(folder.left_out),
            notes=folder.notes,
        ),
        train=train_set,
        val=CocoDataset(val, val_images, train=False, **given),
        class_names=val.class_names,
        img_size=(800, 1280),
        collate=collate,
        val_collate=collate,
        groups=train_set.groups,
        annotations=val,
    )


# --- hcnet check ------------------------------------------------------------------------------------------------------


def audit(config: spec.Coco, head: spec.MaskRCNN, root: Path) -> Audit:
    """The images and objects of the folder, and what training leaves out, clips or never sees."""
    splits: dict[str, tuple[Annotations, Path]] = {}
    maskless = []
    for split in ("train", "val"):
        try:
            splits[split] = load_split(root, split, masks=head.with_masks)
        except UserError as error:
            if error.hint != NO_MASKS_HINT:
                raise
            maskless.append(str(error))
            splits[split] = load_split(root, split, masks=False)
    train, val = splits["train"][0], splits["val"][0]
    check_same_classes(train, val)
    names = distinct(val.class_names)
    folder = identify_folder(root, splits["train"], splits["val"], config, verify=True)
    made = Audit(folder.name, root, "COCO", "objects", [], {name: {} for name in names}, bits=folder.identity.bits)
    reported = ("training objects", "training images without")  # below, for both splits
    unused = {reason: files for reason, files in folder.left_out.items() if not reason.startswith(reported)}
    made.note_identity(folder.identity, unused, folder.notes)
    try:
        check_objects(train, val)
    except UserError as error:
        made.note("scores that mean nothing", [str(error)], wrong=True)
    made.note("annotation files for boxes alone (train with --no-masks)", maskless)
    for split, (found, images) in splits.items():
        files = [str(images / found.name(i)) for i in range(len(found))]
        sizes: list[list[int]] = found.sizes.tolist()
        made.items += [Item(file, split, size=(h, w)) for file, (h, w) in zip(files, sizes, strict=True)]
        for name, count in zip(names, np.bincount(found.labels, minlength=len(names) + 1)[1:], strict=True):
            made.classes[name][split] = int(count)
        for reason, ids in found.dropped.items():
            what = f"{split} annotations left out" if reason != "crowd" else f"{split} annotations not learned from"
            made.note(f"{what} ({reason})", [f"annotation id {i}" for i in ids])
        made.note(f"{split} boxes clipped to their image", [f"annotation id {i}" for i in found.clipped])
        bare = [made.relative(file) for file, has in zip(files, found.annotated, strict=True) if not has]
        made.note(f"{split} images without annotations", bare)
        made.note(f"classes without {split} objects", [n for n in names if not made.classes[n][split]])
    return made
