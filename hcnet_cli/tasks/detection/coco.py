"""COCO-format folders: images with targets for the detector.

Both resize policies are those of Swin's detection code (docs/detection.md).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
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
from hcnet_cli.console import UserError, notice, warn
from hcnet_cli.data.audit import Audit, Item, distinct
from hcnet_cli.data.folders import counted, dataset_name
from hcnet_cli.data.images import Size, first_usable, normalise, read_image, rescale, to_tensor
from hcnet_cli.data.images import resize as resize_image
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.data.problems import reported
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import IMAGENET_MEAN, IMAGENET_STD, MAX_PIXELS
from hcnet_cli.tasks.detection import spec
from hcnet_cli.tasks.detection.annotations import NO_BOX, NO_MASKS_HINT, NO_POLYGON, Annotations
from hcnet_cli.tasks.detection.folder import check_sizes, open_folder
from hcnet_cli.tasks.detection.geometry import Scene, crop, flip, random_window, resize
from hcnet_cli.tasks.detection.misplaced import AREAS, BOXES, FEW, misplaced, repeated, wrong_areas

MOST_COMPARED = 2000  # boxes with their masks, of a split, before training; `hcnet check` compares all

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
        max_pixels: int = MAX_PIXELS,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.annotations, self.images, self.train = annotations, images, train
        self.long, self.short = max(img_scale), min(img_scale)
        self.multiscale, self.crop_scales, self.crop_range = tuple(multiscale), tuple(crop_scales), crop_range
        self.hflip = hflip
        self.bits, self.max_pixels = bits, max_pixels
        self.mean, self.std = mean, std
        rows = np.arange(len(annotations))
        if train:
            rows = rows[annotations.annotated & (annotations.sizes.min(axis=1) >= min_side)]
            if len(annotations) and not len(rows):
                raise UserError(
                    f"{annotations.file} has no image to train on: none has objects and sides of at least {min_side} "
                    "pixels.",
                    hint="data.min_side is the smallest side of a training image.",
                )
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
        return read_image(self.images / self.annotations.name(i), (height, width), self.bits, self.max_pixels)

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


def open_data(
    config: spec.Coco, head: spec.MaskRCNN, root: Path, seed: int, validation_only: bool = False
) -> CocoSplits:
    """Reads both annotation files and makes the data sets; UserError for what is wrong with them."""
    folder = open_folder(root, config, masks=head.with_masks, validation_only=validation_only)
    assert folder is not None, "problems are raised"
    train, val = folder.train, folder.val
    # what evaluation cannot do without must not be found after hours of training
    check_sizes(val, folder.val_images, config.max_pixels)
    for found in (train, val):
        if found.num_as_text:
            notice(f"{found.file}: {found.num_as_text:,} annotations have iscrowd or ignore as text; read as 0 or 1.")
        if (off := misplaced(found, MOST_COMPARED)).many:
            warn(
                f"{found.file}: {len(off.ids) / off.seen:.0%} of {off.seen:,} boxes are {off.how}, the first is that "
                f"of annotation id {off.ids[0]}. {BOXES}"
            )
    if (off := wrong_areas(val)).many:
        warn(
            f'{val.file}: {len(off.ids) / off.seen:.0%} of {off.seen:,} values of "area" {off.how}, the first is '
            f"that of annotation id {off.ids[0]}. {AREAS}"
        )
    if folder.linked:
        notice(f"{root}: {len(folder.linked):,} images are links out of the folder, the first is {folder.linked[0]}.")
    given = config.model_dump(exclude={"format", "path", "trust"}) | {"bits": folder.identity.bits}
    train_set = CocoDataset(train, folder.train_images, train=True, **given)
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
        val=CocoDataset(val, folder.val_images, train=False, **given),
        class_names=val.class_names,
        img_size=(800, 1280),
        collate=collate,
        val_collate=collate,
        groups=train_set.groups,
        class_counts=np.bincount(train.labels, minlength=len(val.class_names) + 1)[1:],
        class_unit="objects",
        annotations=val,
    )


# --- hcnet check ------------------------------------------------------------------------------------------------------


def audit(config: spec.Coco, head: spec.MaskRCNN, root: Path) -> Audit:
    """The images and objects of the folder, and what training leaves out, clips or never sees."""
    problems: list[UserError] = []
    folder = open_folder(root, config, masks=head.with_masks, report=problems.append, verify=True)
    maskless = [str(problem) for problem in problems if problem.hint == NO_MASKS_HINT]
    if maskless:
        problems.clear()
        folder = open_folder(root, config, masks=False, report=problems.append)
    if folder is None:
        return Audit(dataset_name(root, spec.SPEC.benchmark, False), root, "COCO", "objects", [], {}, problems=problems)
    with reported(problems.append):
        CocoDataset(folder.train, folder.train_images, train=True, min_side=config.min_side)
    names = distinct(folder.val.class_names)
    made = Audit(
        folder.name,
        root,
        "COCO",
        "objects",
        [],
        {name: {} for name in names},
        bits=folder.identity.bits,
        max_pixels=config.max_pixels,
        problems=problems,
    )
    reported_below = ("training objects", "validation objects", "training images without")
    unused = {reason: files for reason, files in folder.left_out.items() if not reason.startswith(reported_below)}
    made.note_identity(folder.identity, unused, folder.notes)
    made.note("images that are links out of the data folder", [made.relative(file) for file in folder.linked])
    made.note("annotation files for boxes alone (train with --no-masks)", maskless)
    for split, found, images in (("train", folder.train, folder.train_images), ("val", folder.val, folder.val_images)):
        files = [str(images / found.name(i)) for i in range(len(found))]
        sizes: list[list[int]] = found.sizes.tolist()
        made.items += [Item(file, split, size=(h, w)) for file, (h, w) in zip(files, sizes, strict=True)]
        counts = np.bincount(found.labels, minlength=len(names) + 1)[1:]
        for name, count in zip(names, counts, strict=False):  # splits with other classes are a problem
            made.classes[name][split] = int(count)
        _note_objects(made, split, found)
        bare = [made.relative(file) for file, has in zip(files, found.annotated, strict=True) if not has]
        made.note(f"{split} images without annotations", bare)
        made.note(f"classes without {split} objects", [n for n in names if not made.classes[n].get(split)])
    return made


def _note_objects(made: Audit, split: str, found: Annotations) -> None:
    """Adds the annotations of a split that are not used, or not as they are."""

    def note(what: str, ids: Sequence[int], wrong: bool = False) -> None:
        made.note(what, [f"annotation id {i}" for i in ids], wrong=wrong)

    for reason, ids in found.dropped.items():
        if reason == "crowd":
            note(f"{split} annotations not learned from (crowd)", ids)
        elif split == "train":
            note(f"train annotations left out ({reason})", ids)
        elif reason not in (*NO_BOX, NO_POLYGON):
            note(f"val annotations that are scored, though training leaves such out ({reason})", ids)
    for reason, ids in found.unscored.items():
        note(f"val annotations {reason}", ids, wrong=len(ids) > FEW * found.num_annotations)
    note(f"{split} boxes clipped to their image", found.clipped)
    off = misplaced(found)
    what = f"{split} boxes {off.how}, {len(off.ids):,} of {off.seen:,}"
    note(f"{what}: {BOXES}" if off.many else what, off.ids, wrong=off.many)
    if found.truth is not None:
        off = wrong_areas(found)
        what = f"{split} areas that {off.how}, {len(off.ids):,} of {off.seen:,}"
        note(f"{what}: {AREAS}" if off.many else what, off.ids, wrong=off.many)
    copies = repeated(found)
    extra = sum(map(len, copies)) - len(copies)
    what = f"{split} annotations that repeat another of the same image, class, box and mask"
    same = [[f"annotation id {i}" for i in ids] for ids in copies]
    made.note(what, same, wrong=split == "val" and extra > FEW * len(found.ids))
