"""COCO-format folders: annotations as flat arrays, images and targets for the detector, both resize policies.

Boxes are x1, y1, x2, y2 in pixels. Labels are 1..C in the order of the category ids (0 is background), whatever gaps
and order the file has. The recipe is that of Swin's detection code (REFERENCES in docs/detection.md).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import random
import re
import struct
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import Dataset

from hcnet_cli import rng
from hcnet_cli.console import UserError, notice
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import DataPart, Part
from hcnet_cli.tasks.detection.spec import Coco, MaskRCNN

MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1], RGB: ImageNet's, as everywhere in this project
STD = (0.229, 0.224, 0.225)
MULTISCALE = tuple(range(480, 801, 32))  # shorter sides of the DETR / Sparse R-CNN policy
NO_MASKS_HINT = "Add --no-masks to train Faster R-CNN, without masks."


# --- annotations ------------------------------------------------------------------------------------------------------


class Packed:
    """A list of byte strings as one buffer: worker processes share it, and touching an item copies no page."""

    def __init__(self, items: Sequence[bytes]) -> None:
        self.data = b"".join(items)
        self.ends = np.cumsum([len(item) for item in items], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.data[self.ends[i - 1] if i else 0 : self.ends[i]]


@dataclass(frozen=True)
class Annotations:
    """One annotation file. Images in the file's order; objects to learn from (no crowds), sorted by image.

    Objects of image i are rows first[i] to first[i + 1]. `dropped` and `clipped` list annotation ids, by reason.
    """

    file: Path
    digest: str
    category_ids: list[int]  # label l is category_ids[l - 1]
    class_names: list[str]
    image_ids: NDArray[np.int64]  # [N]
    file_names: Packed  # [N]
    sizes: NDArray[np.int32]  # [N, 2] width, height as the file says
    annotated: NDArray[np.bool_]  # [N] named by any annotation, crowds too
    first: NDArray[np.int64]  # [N + 1]
    boxes: NDArray[np.float32]  # [A, 4], inside the image
    labels: NDArray[np.int64]  # [A]
    segments: Packed | None  # [A], see _pack_segment
    dropped: dict[str, list[int]] = field(default_factory=dict)
    clipped: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, i: int) -> str:
        return self.file_names[i].decode()

    def mask(self, row: int, i: int) -> NDArray[np.uint8]:
        """The mask of object `row` of image `i`, [H, W] of 0 and 1."""
        assert self.segments is not None
        width, height = self.sizes[i].tolist()
        return _unpack_segment(self.segments[row], height, width)


def read_annotations(file: Path, *, masks: bool = True) -> Annotations:
    """The objects of a COCO instances file.

    Left out of training, as in the reference: crowds, objects flagged `ignore`, boxes thinner than a pixel or outside
    the image, areas of 0. Raises UserError for a file that is missing, broken or contradicts itself, and with `masks`
    for objects that have none.
    """
    data, digest = _parse(file)
    if not isinstance(data, dict) or not all(
        isinstance(data.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise UserError(f"{file} is not a COCO instances file: it needs the lists images, annotations, categories.")
    for kind in ("images", "annotations", "categories"):
        if not all(isinstance(entry, dict) and isinstance(entry.get("id"), int) for entry in data[kind]):
            raise UserError(f'{file}: every one of its {kind} must be an object with an integer "id".')
        twice = [i for i, n in Counter(entry["id"] for entry in data[kind]).items() if n > 1]
        if twice:
            raise UserError(f"{file}: {len(twice)} ids of {kind} are not unique, the first is {twice[0]}.")

    def of(entry: dict[str, Any], key: str, kind: str) -> Any:
        if key not in entry:
            raise UserError(f'{file}: {kind} {entry["id"]} has no "{key}".')
        return entry[key]

    categories = sorted(data["categories"], key=lambda c: c["id"])
    if not categories:
        raise UserError(f"{file} has no categories.")
    label_of = {c["id"]: label for label, c in enumerate(categories, start=1)}
    images = data["images"]
    if not images:
        raise UserError(f"{file} has no images.")
    place = {image["id"]: i for i, image in enumerate(images)}
    sizes = np.array([[of(i, "width", "image"), of(i, "height", "image")] for i in images], dtype=np.int32)
    annotated = np.zeros(len(images), dtype=bool)

    rows: list[tuple[int, list[float], int, bytes]] = []  # image, box, label, segment
    dropped: dict[str, list[int]] = {}
    clipped: list[int] = []
    maskless: list[int] = []
    for entry in data["annotations"]:
        image_id, category_id = (of(entry, key, "annotation") for key in ("image_id", "category_id"))
        if image_id not in place:
            raise UserError(f"{file}: annotation {entry['id']} is of image {image_id}, which the file does not list.")
        if category_id not in label_of:
            raise UserError(
                f"{file}: annotation {entry['id']} is of category {category_id}, which the file does not list."
            )
        i = place[image_id]
        annotated[i] = True
        box = of(entry, "bbox", "annotation")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise UserError(f"{file}: the bbox of annotation {entry['id']} is not [x, y, width, height].")
        width, height = sizes[i].tolist()
        x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
        inside = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
        segmentation = entry.get("segmentation")
        reason = ""
        if entry.get("iscrowd") or entry.get("ignore"):
            reason = "crowd"
        elif not all(map(math.isfinite, box)):
            reason = "box with a value that is no number"
        elif box[2] < 1 or box[3] < 1:
            reason = "box thinner than a pixel"
        elif inside[0] >= inside[2] or inside[1] >= inside[3]:
            reason = "box outside the image"
        elif entry.get("area", 1) <= 0:
            reason = "area of 0"
        elif masks and not segmentation:
            maskless.append(entry["id"])
            continue
        segment = b""
        if masks and not reason:
            segment = _pack_segment(segmentation, height, width, f"{file}: annotation {entry['id']}")
            reason = "" if segment else "polygon of fewer than 3 points"
        if reason:
            dropped.setdefault(reason, []).append(entry["id"])
            continue
        if inside != [x1, y1, x2, y2]:
            clipped.append(entry["id"])
        rows.append((i, inside, label_of[category_id], segment))
    if maskless:
        raise UserError(
            f"{file}: {len(maskless)} of {len(maskless) + len(rows)} objects have no mask, the first is annotation "
            f"{maskless[0]}.",
            hint=NO_MASKS_HINT,
        )

    rows.sort(key=lambda row: row[0])  # stable: an image's objects stay in the file's order
    counts = np.bincount([row[0] for row in rows], minlength=len(images)) if rows else np.zeros(len(images), int)
    return Annotations(
        file=file,
        digest=digest,
        category_ids=[c["id"] for c in categories],
        class_names=[str(c.get("name", c["id"])) for c in categories],
        image_ids=np.array([image["id"] for image in images], dtype=np.int64),
        file_names=Packed([str(of(image, "file_name", "image")).encode() for image in images]),
        sizes=sizes,
        annotated=annotated,
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([row[1] for row in rows], dtype=np.float32).reshape(-1, 4),
        labels=np.array([row[2] for row in rows], dtype=np.int64),
        segments=Packed([row[3] for row in rows]) if masks else None,
        dropped=dropped,
        clipped=clipped,
    )


def _parse(file: Path) -> tuple[Any, str]:
    """What the JSON file holds, its polygons packed, and the digest of its bytes."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"The annotation file {file} cannot be read ({error.strerror or error}).") from None
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        text = content.decode(json.detect_encoding(content))
        del content  # half a gigabyte, as is the text
        return json.loads(text, object_hook=_pack_polygons), digest
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.", hint="Was it downloaded completely?") from None


def _rings(segmentation: Any) -> list[list[float]]:
    """The polygons of at least 3 points."""
    found = segmentation if isinstance(segmentation, list) else []
    return [ring for ring in found if isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0]


def _pack_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """An annotation whose polygons become bytes while the file is read: as lists, those of COCO take gigabytes.

    "P", number of rings, values of each, float32 coordinates. What is no polygon stays as it is.
    """
    rings = _rings(entry.get("segmentation"))
    if rings:
        head = array("i", [len(rings), *map(len, rings)])
        with contextlib.suppress(TypeError, OverflowError):  # not numbers: `_pack_segment` says where
            entry["segmentation"] = b"".join([b"P", head.tobytes(), *(array("f", ring).tobytes() for ring in rings)])
    return entry


def _pack_segment(segmentation: Any, height: int, width: int, where: str) -> bytes:
    """Polygons as `_pack_polygons` left them or RLE ("R" and its counts); b"" if there are none."""
    if isinstance(segmentation, bytes):
        return segmentation
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if size != [height, width] or not isinstance(counts, list | str):
            raise UserError(f"{where} has a mask of size {size} in an image of height {height}, width {width}.")
        if isinstance(counts, list):
            if sum(counts) != height * width:
                raise UserError(f"{where} has a mask of {sum(counts)} pixels in an image of {height * width}.")
            return b"R" + rle.frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
        return b"R" + counts.encode()
    if _rings(segmentation):
        raise UserError(f"{where} has a polygon whose coordinates are not all numbers.")
    return b""


def _unpack_segment(segment: bytes, height: int, width: int) -> NDArray[np.uint8]:
    if segment[:1] == b"R":
        return rle.decode({"size": [height, width], "counts": segment[1:]})
    (number,) = struct.unpack_from("i", segment, 1)
    lengths = np.frombuffer(segment, dtype=np.int32, count=number, offset=5)
    # three decimals of float32 give back the file's own numbers for any image below 8192 pixels
    points = np.frombuffer(segment, dtype=np.float32, offset=5 + 4 * number).astype(np.float64).round(3)
    rings = [ring.tolist() for ring in np.split(points, np.cumsum(lengths)[:-1])]
    return rle.decode(rle.merge(rle.frPyObjects(rings, height, width)))


# --- folders ----------------------------------------------------------------------------------------------------------


def find_split(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The annotation file of a split ("train" or "val") and the folders its images may be in, the likeliest first.

    COCO's layout (annotations/instances_train2017.json, train2017/), the same with another suffix or images/ in
    between, and exports that keep _annotations.coco.json beside the images.
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
        tries = [f"{folder}", f"images/{folder}", f"{split}", f"images/{split}", "images", ""]
        return found[0], [root / name for name in tries]
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
    annotations = read_annotations(file, masks=masks)
    return annotations, find_images(annotations, folders)


def check_same_classes(train: Annotations, val: Annotations) -> None:
    """Raises UserError unless both files have the same categories."""
    if train.category_ids != val.category_ids or train.class_names != val.class_names:
        raise UserError(
            f"{train.file.name} and {val.file.name} have different categories: {_brief(train)} and {_brief(val)}."
        )


def _brief(annotations: Annotations) -> str:
    pairs = [f"{i} {n}" for i, n in zip(annotations.category_ids, annotations.class_names, strict=True)]
    return ", ".join(pairs[:4] + ["..."] * (len(pairs) > 4))


def dataset_name(root: Path, val: Annotations) -> str:
    """How results call the data: "coco" for COCO 2017 itself (80 classes, 5000 validation images), else the folder."""
    if len(val.category_ids) == 80 and val.category_ids[-1] == 90 and len(val) == 5000:
        return "coco"
    name = re.sub(r"[^a-z0-9]+", "-", root.resolve().name.lower()).strip("-") or "data"
    return f"{name}-data" if name == "coco" else name


# --- images and their objects -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image file; ValueError, with a reason to be read after the path, for what goes wrong with it inside."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read as an image: {error}") from None


def _other_size(pixels: tuple[int, int], width: int, height: int) -> ValueError:
    return ValueError(f"is {pixels[0]} x {pixels[1]} pixels, its annotation file says {width} x {height}")


def read_image(path: Path, width: int, height: int) -> Image.Image:
    """The RGB image as its annotations see it, width x height.

    That is turned by its EXIF tag, or not if only then the size fits. Raises ValueError, with a reason to be read after
    the path, if it cannot be decoded or has another size.
    """
    with _opened(path) as image:
        image.load()
        for candidate in (ImageOps.exif_transpose(image), image):
            if candidate.size == (width, height):
                return candidate.convert("RGB")
        pixels = image.size
    raise _other_size(pixels, width, height)


def check_size(path: Path, width: int, height: int) -> None:
    """As `read_image` would judge the image's size, from its header alone."""
    with _opened(path) as image:
        pixels, turned = image.size, image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    if (width, height) != pixels and not (turned and (height, width) == pixels):
        raise _other_size(pixels, width, height)


def check_sizes(annotations: Annotations, images: Path) -> None:
    """UserError for the first image that is no image or has another size than its annotations."""
    for i, (width, height) in enumerate(annotations.sizes.tolist()):
        path = images / annotations.name(i)
        try:
            check_size(path, width, height)
        except ValueError as error:
            raise UnusableImageError(path, str(error)) from None


class Scene(NamedTuple):
    """An image and its objects."""

    image: Tensor  # [3, H, W] uint8
    boxes: Tensor  # [G, 4] float32
    labels: Tensor  # [G] int64
    masks: Tensor | None  # [G, H, W] uint8


def flip(scene: Scene) -> Scene:
    """Left and right exchanged."""
    width = scene.image.shape[2]
    x1, y1, x2, y2 = scene.boxes.unbind(1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    masks = None if scene.masks is None else scene.masks.flip(2)
    return Scene(scene.image.flip(2), boxes, scene.labels, masks)


def fit(width: int, height: int, long: int, short: int) -> tuple[int, int]:
    """The size, aspect kept, that just fits `long` x `short` (mmcv.rescale_size): (width, height)."""
    factor = min(max(long, short) / max(width, height), min(long, short) / min(width, height))
    return max(int(width * factor + 0.5), 1), max(int(height * factor + 0.5), 1)


def resize(scene: Scene, width: int, height: int) -> Scene:
    """Bilinear without antialiasing (as cv2, which the reference uses); masks nearest; boxes clipped to the image."""
    old_height, old_width = scene.image.shape[1:]
    image = F.interpolate(scene.image[None], (height, width), mode="bilinear", align_corners=False)[0]
    scale = torch.tensor([width / old_width, height / old_height] * 2, dtype=torch.float32)
    limit = torch.tensor([width, height] * 2, dtype=torch.float32)
    boxes = (scene.boxes * scale).clamp(min=0).minimum(limit)
    masks = scene.masks
    if masks is not None:
        masks = F.interpolate(masks[None], (height, width))[0] if len(masks) else masks.new_zeros(0, height, width)
    return Scene(image, boxes, scene.labels, masks)


def crop(scene: Scene, x: int, y: int, width: int, height: int) -> Scene:
    """The window at (x, y); boxes are clipped to it and those without area dropped with their labels and masks."""
    limit = torch.tensor([width, height] * 2, dtype=torch.float32)
    boxes = (scene.boxes - torch.tensor([x, y, x, y])).clamp(min=0).minimum(limit)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    masks = None if scene.masks is None else scene.masks[keep, y : y + height, x : x + width]
    return Scene(scene.image[:, y : y + height, x : x + width], boxes[keep], scene.labels[keep], masks)


class UnusableImageError(UserError):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"The image {path} {reason}.")
        self.brief = f"{path} ({reason})"

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return UserError, (str(self), self.hint)  # from a worker process it comes as what people read


class CocoDataset(Dataset[dict[str, Any]]):
    """Items of a COCO split for training or for evaluation.

    A training item: `image` [3, H, W] normalised, `target` {boxes [G, 4], labels [G], masks [G, H, W], image_id},
    `sample`, `key`. All of an item's randomness comes from the key of its request (index, key, step key). Images
    without any annotation and images smaller than `min_side` are left out, as in the reference. In place of a file
    that cannot be used comes another image of its group, and the item says so under `unreadable`.

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
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.annotations, self.images, self.train = annotations, images, train
        self.long, self.short = max(img_scale), min(img_scale)
        self.multiscale, self.crop_scales, self.crop_range = tuple(multiscale), tuple(crop_scales), crop_range
        self.hflip = hflip
        self.mean, self.std = (255 * torch.tensor(v)[:, None, None] for v in (mean, std))  # [3, 1, 1]
        rows = np.arange(len(annotations))
        if train:
            rows = rows[annotations.annotated & (annotations.sizes.min(axis=1) >= min_side)]
            if not len(rows):
                raise UserError(f"{annotations.file} has no image to train on: none has objects.")
        self.rows = rows  # dataset index -> image of the annotation file
        width, height = annotations.sizes[rows].T
        self.groups = (width >= height).astype(np.int64)  # [len], landscape or portrait

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
        """An image by its COCO id, as its annotations see it; UserError if it cannot be."""
        return self._open(int(np.flatnonzero(self.annotations.image_ids == image_id)[0]))

    def _open(self, i: int) -> Image.Image:
        path = self.images / self.annotations.name(i)
        width, height = self.annotations.sizes[i].tolist()
        try:
            return read_image(path, width, height)
        except ValueError as error:
            raise UnusableImageError(path, str(error)) from None

    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
        index, key, _ = request
        if not self.train:
            return self._evaluation_item(index, key)
        unreadable: dict[str, str] = {}
        for attempt in range(10):
            try:
                with rng.seeded(key):
                    return self._training_item(index, key) | unreadable
            except UnusableImageError as error:
                if attempt == 9:
                    raise UserError(f"Ten training images in a row cannot be used, the last: {error}") from None
                unreadable = unreadable or {"unreadable": error.brief}
                group = np.flatnonzero(self.groups == self.groups[index])
                index = int(group[rng.derive(key, "instead", attempt) % len(group)])
        raise AssertionError("unreachable")

    def _training_item(self, index: int, key: int) -> dict[str, Any]:
        i = int(self.rows[index])
        scene = self._augment(self.scene(i))
        target = {
            "boxes": scene.boxes,
            "labels": scene.labels,
            "image_id": torch.tensor(self.annotations.image_ids[i]),
        }
        if scene.masks is not None:
            target["masks"] = scene.masks.contiguous()
        return {"image": self._normalise(scene.image), "target": target, "sample": index, "key": key}

    def _evaluation_item(self, index: int, key: int) -> dict[str, Any]:
        i = int(self.rows[index])
        image = _to_tensor(self._open(i))
        height, width = image.shape[1:]
        new_width, new_height = fit(width, height, self.long, self.short)
        nothing = Scene(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None)
        target = {
            "image_id": torch.tensor(self.annotations.image_ids[i]),
            "orig_size": torch.tensor([height, width]),
        }
        image = self._normalise(resize(nothing, new_width, new_height).image)
        return {"image": image, "target": target, "sample": index, "key": key}

    def scene(self, i: int) -> Scene:
        """Image `i` of the annotation file with its objects, before any augmentation."""
        image = _to_tensor(self._open(i))
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
            return self._shrink(scene, self.short)
        if self.crop_scales and random.random() < 0.5:
            scene = self._shrink(scene, random.choice(self.crop_scales))
            height, width = scene.image.shape[1:]
            low, high = self.crop_range
            crop_height = random.randint(min(height, low), min(height, high))
            crop_width = random.randint(min(width, low), min(width, high))
            y, x = random.randint(0, height - crop_height), random.randint(0, width - crop_width)
            scene = crop(scene, x, y, crop_width, crop_height)
        return self._shrink(scene, random.choice(self.multiscale))

    def _shrink(self, scene: Scene, short: int) -> Scene:
        height, width = scene.image.shape[1:]
        return resize(scene, *fit(width, height, self.long, short))

    def _normalise(self, image: Tensor) -> Tensor:
        return (image.float() - self.mean) / self.std


def _to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


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


def open_data(config: DataPart, head: Part, root: Path) -> CocoSplits:
    """Reads both annotation files and makes the data sets; UserError for what is wrong with them."""
    assert isinstance(config, Coco)
    assert isinstance(head, MaskRCNN)
    splits = {split: load_split(root, split, masks=head.with_masks) for split in ("train", "val")}
    (train, train_images), (val, val_images) = splits["train"], splits["val"]
    check_same_classes(train, val)
    check_sizes(val, val_images)  # what evaluation cannot do without must not be found after hours of training
    if left_out := {reason: len(ids) for reason, ids in train.dropped.items() if reason != "crowd"}:
        listed = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        notice(f"Training objects left out of {train.file.name}: {listed}.")
    given = config.model_dump(exclude={"format", "path"})
    train_set = CocoDataset(train, train_images, train=True, **given)
    return CocoSplits(
        info=DataInfo(
            name=dataset_name(root, val),
            digest=hashlib.sha256(f"{train.digest} {val.digest}".encode()).hexdigest()[:16],
            path=str(root),
            num_train=len(train_set),
            num_val=len(val),
            num_classes=len(val.class_names),
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
