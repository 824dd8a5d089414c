"""A COCO instances file as flat arrays.

Boxes are x1, y1, x2, y2 in pixels. Labels are 1..C in the order of the category ids (0 is background), whatever gaps
and order the file has.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import struct
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from hcnet_cli.console import UserError
from hcnet_cli.data.folders import Packed

FLAGS = ("iscrowd", "ignore")  # of an annotation
FLAG_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "": 0}
NO_MASKS_HINT = "Add --no-masks to train Faster R-CNN, without masks."


@dataclass(frozen=True)
class Truth:
    """The objects that predictions are scored against, crowds included, in the file's order and with its numbers."""

    images: NDArray[np.int64]  # [S] image of the file
    labels: NDArray[np.int64]  # [S]
    boxes: NDArray[np.float64]  # [S, 4] x, y, width, height
    areas: NDArray[np.float64]  # [S]
    crowds: NDArray[np.bool_]  # [S]
    segments: Packed | None  # [S]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Annotations:
    """One annotation file. Images are in the file's order, objects (without crowds) are sorted by image.

    Objects of image i are rows first[i] to first[i + 1]. `dropped` and `clipped` list annotation ids, by reason.
    """

    file: Path
    digest: str
    category_ids: list[int]  # label l is category_ids[l - 1]
    class_names: list[str]
    image_ids: NDArray[np.int64]  # [N]
    file_names: Packed  # [N]
    sizes: NDArray[np.int32]  # [N, 2] height, width according to the file
    annotated: NDArray[np.bool_]  # [N] whether any annotation names the image, crowds included
    first: NDArray[np.int64]  # [N + 1]
    boxes: NDArray[np.float32]  # [A, 4], inside the image
    labels: NDArray[np.int64]  # [A]
    segments: Packed | None  # [A], see _pack_segment
    dropped: dict[str, list[int]] = field(default_factory=dict)
    clipped: list[int] = field(default_factory=list)
    num_annotations: int = 0  # in the file, crowds and dropped ones included
    num_as_text: int = 0  # annotations whose `iscrowd` or `ignore` is written as text
    truth: Truth | None = None  # of a file that predictions are scored against

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, i: int) -> str:
        return self.file_names[i].decode()

    def mask(self, row: int, i: int) -> NDArray[np.uint8]:
        """The mask of object `row` of image `i`, [H, W] of 0 and 1."""
        assert self.segments is not None
        height, width = self.sizes[i].tolist()
        return decode_mask(_unpack_segment(self.segments[row], height, width), height, width)

    def coco(self, image_ids: Collection[int] | None = None) -> dict[str, Any]:
        """The ground truth as COCOeval needs it, of all images or of some.

        Ids count from 1: COCOeval takes a match with id 0 as none.
        """
        truth = self.truth
        assert truth is not None
        wanted = set(self.image_ids.tolist() if image_ids is None else image_ids)
        sizes = self.sizes.tolist()
        entries: list[dict[str, Any]] = []
        for n in range(len(truth)):
            i = int(truth.images[n])
            if int(self.image_ids[i]) not in wanted:
                continue
            entry: dict[str, Any] = {
                "id": len(entries) + 1,
                "image_id": int(self.image_ids[i]),
                "category_id": self.category_ids[int(truth.labels[n]) - 1],
                "bbox": truth.boxes[n].tolist(),
                "area": float(truth.areas[n]),
                "iscrowd": int(truth.crowds[n]),
            }
            if truth.segments is not None:
                entry["segmentation"] = _unpack_segment(truth.segments[n], *sizes[i])
            entries.append(entry)
        images = [
            {"id": number, "file_name": self.name(i), "height": sizes[i][0], "width": sizes[i][1]}
            for i, number in enumerate(self.image_ids.tolist())
            if number in wanted
        ]
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names, strict=True)]
        return {"images": images, "categories": categories, "annotations": entries}


def read_annotations(file: Path, *, masks: bool = True, scoring: bool = False) -> Annotations:
    """The objects of a COCO instances file.

    Left out of training, as in the reference: crowds, objects flagged `ignore`, boxes thinner than a pixel or outside
    the image, areas of 0. Raises UserError for a file that is missing, broken or contradicts itself, and with `masks`
    for objects that have none.

    With `scoring` also the ground truth that predictions are scored against. As in pycocotools it holds every object,
    those that training leaves out included, but not what nobody can score: boxes whose numbers make no box and, with
    `masks`, objects without one.
    """
    data, digest = _parse(file, "d" if scoring else "f")
    _check_lists(data, file)
    images = data["images"]
    categories = sorted(data["categories"], key=lambda c: c["id"])
    label_of = {c["id"]: label for label, c in enumerate(categories, start=1)}
    place = {image["id"]: i for i, image in enumerate(images)}
    sizes = np.array([[_side(i, key, file) for key in ("height", "width")] for i in images], dtype=np.int32)
    annotated = np.zeros(len(images), dtype=bool)

    rows: list[tuple[int, list[float], int, bytes]] = []  # image, box, label, segment
    scored: list[tuple[int, int, list[float], float, bool, bytes]] = []  # image, label, box, area, crowd, segment
    dropped: dict[str, list[int]] = {}
    clipped: list[int] = []
    maskless: list[int] = []
    num_as_text = 0
    for entry in data["annotations"]:
        num_as_text += any(isinstance(entry.get(key), str) for key in FLAGS)
        normalise_entry(entry, file)
        i, label = (_find(entry, kind, known, file) for kind, known in (("image", place), ("category", label_of)))
        annotated[i] = True
        height, width = sizes[i].tolist()
        box, inside = _box(entry, height, width, file)
        reason = _reason_to_drop(entry, inside)
        segmentation = entry.get("segmentation")
        segment = b""
        if masks:
            if not segmentation and not reason:
                maskless.append(entry["id"])
                continue
            segment = _pack_segment(segmentation, height, width, f"{file}: annotation id {entry['id']}")
            reason = reason or ("" if segment else "polygon of fewer than 3 points")
        if scoring and reason not in NO_BOX and (segment or not masks):
            bbox = entry["bbox"]
            area = entry.get("area")
            area = bbox[2] * bbox[3] if area is None else area
            scored.append((i, label, bbox, area, bool(entry.get("iscrowd")), segment))
        if reason:
            dropped.setdefault(reason, []).append(entry["id"])
            continue
        if inside != box:
            clipped.append(entry["id"])
        rows.append((i, inside, label, segment))
    if maskless:
        raise UserError(
            f"{file}: {len(maskless)} of {len(maskless) + len(rows)} objects have no mask, the first is annotation id "
            f"{maskless[0]}.",
            hint=NO_MASKS_HINT,
        )

    rows.sort(key=lambda row: row[0])  # stable: an image's objects stay in the file's order
    counts = np.bincount(np.array([row[0] for row in rows], dtype=np.int64), minlength=len(images))
    return Annotations(
        file=file,
        digest=digest,
        category_ids=[c["id"] for c in categories],
        class_names=[str(c.get("name", c["id"])) for c in categories],
        image_ids=np.array([image["id"] for image in images], dtype=np.int64),
        file_names=Packed([str(_value(image, "file_name", file, "image")).encode() for image in images]),
        sizes=sizes,
        annotated=annotated,
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([row[1] for row in rows], dtype=np.float32).reshape(-1, 4),
        labels=np.array([row[2] for row in rows], dtype=np.int64),
        segments=Packed([row[3] for row in rows]) if masks else None,
        dropped=dropped,
        clipped=clipped,
        num_annotations=len(data["annotations"]),
        num_as_text=num_as_text,
        truth=_truth(scored, masks) if scoring else None,
    )


def _truth(rows: list[tuple[int, int, list[float], float, bool, bytes]], masks: bool) -> Truth:
    return Truth(
        images=np.array([row[0] for row in rows], dtype=np.int64),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        boxes=np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4),
        areas=np.array([row[3] for row in rows], dtype=np.float64),
        crowds=np.array([row[4] for row in rows], dtype=bool),
        segments=Packed([row[5] for row in rows]) if masks else None,
    )


def _parse(file: Path, number: str) -> tuple[Any, str]:
    """The content of the JSON file, with polygons packed as `number` ("f" or "d"), and the digest of its bytes."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"The annotation file {file} cannot be read ({error.strerror or error}).") from None
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        text = content.decode(json.detect_encoding(content))
        del content  # half a gigabyte for COCO, as is the text
        return json.loads(text, object_hook=functools.partial(_pack_polygons, number=number)), digest
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.", hint="Was it downloaded completely?") from None


def _check_lists(data: Any, file: Path) -> None:
    """Raises UserError unless the three lists are there, have ids, and name images and categories."""
    kinds = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(kind), list) for kind in kinds):
        raise UserError(f"{file} is not a COCO instances file: it needs the lists images, annotations, categories.")
    for kind in kinds:
        if not all(isinstance(entry, dict) and type(entry.get("id")) is int for entry in data[kind]):
            raise UserError(f'{file}: every one of its {kind} must be an object with an integer "id".')
        repeated = [i for i, n in Counter(entry["id"] for entry in data[kind]).items() if n > 1]
        if repeated:
            raise UserError(f"{file}: {len(repeated)} ids of {kind} are not unique, the first is {repeated[0]}.")
    for kind in ("categories", "images"):
        if not data[kind]:
            raise UserError(f"{file} has no {kind}.")


def _value(entry: dict[str, Any], key: str, file: Path, kind: str) -> Any:
    if key not in entry:
        raise UserError(f'{file}: {kind} id {entry["id"]} has no "{key}".')
    return entry[key]


def _side(image: dict[str, Any], key: str, file: Path) -> int:
    value = _value(image, key, file, "image")
    if not _is_number(value) or not 1 <= value < 2**31 or value != int(value):
        raise UserError(f"{file}: the {key} of image id {image['id']} is {value!r}, not a number of pixels.")
    return int(value)


def normalise_entry(annotation: dict[str, Any], file: Path) -> None:
    """Makes the flags of an annotation 0 or 1 and its area a number; UserError for values that mean neither.

    COCO has 0 and 1. Text is true in Python whatever it says, so "0" would make every object a crowd.
    """
    for key in FLAGS:
        value = annotation.get(key)
        if value is None:
            annotation.pop(key, None)
            continue
        known = FLAG_VALUES.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(known, bool | int | float) or known not in (0, 1):
            raise UserError(f'{file}: "{key}" of annotation id {annotation["id"]} is {value!r}, neither 0 nor 1.')
        annotation[key] = int(known)
    area = annotation.get("area")
    if area is None:
        annotation.pop("area", None)
    elif not _is_number(area) or not math.isfinite(area):
        raise UserError(f'{file}: "area" of annotation id {annotation["id"]} is {area!r}, not a number.')


def _find(annotation: dict[str, Any], kind: str, known: dict[int, int], file: Path) -> int:
    """The place of an annotation's image or category among those of the file."""
    number = _value(annotation, f"{kind}_id", file, "annotation")
    if number not in known:
        raise UserError(
            f"{file}: annotation id {annotation['id']} is of {kind} id {number}, which the file does not list."
        )
    return known[number]


def _box(annotation: dict[str, Any], height: int, width: int, file: Path) -> tuple[list[float], list[float]]:
    """The box (x1, y1, x2, y2) as the file has it, and clipped to the image."""
    bbox = _value(annotation, "bbox", file, "annotation")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        raise UserError(f"{file}: the bbox of annotation id {annotation['id']} is not [x, y, width, height].")
    box = [bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]]
    return box, [max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# boxes that cannot be scored either
NOT_A_NUMBER, NEGATIVE = "box with a value that is not a number", "box of negative width or height"
NO_BOX = (NOT_A_NUMBER, NEGATIVE)


def _reason_to_drop(annotation: dict[str, Any], inside: list[float]) -> str:
    """Why training leaves an object out; "" if it does not. `inside` is the clipped box."""
    bbox = annotation["bbox"]
    if not all(map(math.isfinite, bbox)):
        return NOT_A_NUMBER
    if bbox[2] < 0 or bbox[3] < 0:
        return NEGATIVE
    if annotation.get("iscrowd") or annotation.get("ignore"):
        return "crowd"
    if bbox[2] < 1 or bbox[3] < 1:
        return "box thinner than a pixel"
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        return "box outside the image"
    area = annotation.get("area")
    return "area of 0" if area is not None and area <= 0 else ""


def _rings(segmentation: Any) -> list[list[float]]:
    """The polygons of at least 3 points."""
    found = segmentation if isinstance(segmentation, list) else []
    return [ring for ring in found if isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0]


def _pack_polygons(entry: dict[str, Any], number: str) -> dict[str, Any]:
    """Turns the polygons of an annotation into bytes while the file is read: as lists, COCO's take gigabytes.

    "f" or "d", number of rings, values of each, coordinates as float32 or float64. Anything else stays as it is.
    """
    rings = _rings(entry.get("segmentation"))
    if rings:
        head = array("i", [len(rings), *map(len, rings)])
        with contextlib.suppress(TypeError, OverflowError):  # not numbers: `_pack_segment` says where
            entry["segmentation"] = b"".join(
                [number.encode(), head.tobytes(), *(array(number, ring).tobytes() for ring in rings)]
            )
    return entry


def _pack_segment(segmentation: Any, height: int, width: int, where: str) -> bytes:
    """Polygons as packed by `_pack_polygons`, or RLE as "R" and its counts; b"" if there are none."""
    if isinstance(segmentation, bytes):
        return segmentation
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if size != [height, width] or not isinstance(counts, list | str):
            raise UserError(f"{where} has a mask of size {size} in an image of height {height}, width {width}.")
        runs = counts if isinstance(counts, list) else _runs(counts)
        if not all(isinstance(run, int | float) and run >= 0 and float(run).is_integer() for run in runs):
            raise UserError(f'{where} has a mask whose "counts" are not all whole numbers from 0.')
        if sum(runs) != height * width:
            raise UserError(f"{where} has a mask of {sum(runs)} pixels in an image of {height * width}.")
        if isinstance(counts, list):
            plain = {"size": size, "counts": [int(run) for run in runs]}
            counts = rle.frPyObjects(plain, height, width)["counts"].decode()
        return b"R" + counts.encode()
    if _rings(segmentation):
        raise UserError(f"{where} has a polygon whose coordinates are not all numbers.")
    return b""


def _runs(counts: str) -> list[int]:
    """The run lengths of a compressed RLE (COCO's rleFrString); [-1] for a text that is none."""
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode("utf-8", "replace"):
        code -= 48
        if not 0 <= code < 64:
            return [-1]
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else [-1]


def _unpack_segment(segment: bytes, height: int, width: int) -> Any:
    """COCO's polygons, or its compressed RLE."""
    if segment[:1] == b"R":
        return {"size": [height, width], "counts": segment[1:].decode()}
    (number,) = struct.unpack_from("i", segment, 1)
    lengths = np.frombuffer(segment, dtype=np.int32, count=number, offset=5)
    if segment[:1] == b"f":
        # rounding float32 to three decimals restores the file's own numbers for any image below 8192 pixels
        points = np.frombuffer(segment, dtype=np.float32, offset=5 + 4 * number).astype(np.float64).round(3)
    else:
        points = np.frombuffer(segment, dtype=np.float64, offset=5 + 4 * number)
    return [ring.tolist() for ring in np.split(points, np.cumsum(lengths)[:-1])]


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """COCO's polygons, or its RLE of either kind -> [height, width] of 0 and 1."""
    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return np.asarray(rle.decode(segmentation))
