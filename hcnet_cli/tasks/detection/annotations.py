"""A COCO instances file as flat arrays.

Boxes are x1, y1, x2, y2 in pixels. Labels are 1..C in the order of the category ids (0 is background), whatever gaps
and order the file has.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hcnet_cli.console import UserError
from hcnet_cli.data.folders import Packed
from hcnet_cli.data.images import MAX_SIDE
from hcnet_cli.data.problems import Report, refuse, reported
from hcnet_cli.files import read_bytes
from hcnet_cli.tasks.detection import masks as mask_bytes

LISTS = ("images", "annotations", "categories")
LARGEST_FILE = 4 * 2**30  # bytes; COCO's has half of one GiB
FLAG_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "": 0}
LONGEST_NAME = 1000  # characters
UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # in a path: controls, and halves of surrogate pairs
NO_MASKS_HINT = "Add --no-masks to train Faster R-CNN, without masks."


@dataclass(frozen=True)
class Truth:
    """The objects that predictions are scored against, crowds included, in the file's order and with its numbers."""

    ids: NDArray[np.int64]  # [S], of the annotations
    images: NDArray[np.int64]  # [S] image of the file
    labels: NDArray[np.int64]  # [S]
    boxes: NDArray[np.float64]  # [S, 4] x, y, width, height
    areas: NDArray[np.float64]  # [S]
    crowds: NDArray[np.bool_]  # [S]
    segments: Packed | None  # [S], b"" for an object that is scored as a box alone

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Annotations:
    """One annotation file. Images are in the file's order, objects (without crowds) are sorted by image.

    Objects of image i are rows first[i] to first[i + 1]. `dropped` and `unscored` list annotation ids, by reason.
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
    ids: NDArray[np.int64]  # [A], of the annotations
    segments: Packed | None  # [A], see masks.py
    dropped: dict[str, list[int]] = field(default_factory=dict)
    unscored: dict[str, list[int]] = field(default_factory=dict)  # what `truth` lacks, wholly or the mask of
    clipped: list[int] = field(default_factory=list)  # ids
    overhanging: list[int] = field(default_factory=list)  # ids; see `_overhangs`
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
        return mask_bytes.decode(mask_bytes.unpack(self.segments[row], height, width), height, width)

    def coco(self, image_ids: Collection[int] | None = None) -> dict[str, Any]:
        """The ground truth as COCOeval needs it, of all images or of some.

        Ids count from 1: COCOeval takes a match with id 0 as none. An object without a usable mask has no segmentation.
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
            if truth.segments is not None and truth.segments[n]:
                entry["segmentation"] = mask_bytes.unpack(truth.segments[n], *sizes[i])
            entries.append(entry)
        images = [
            {"id": number, "file_name": self.name(i), "height": sizes[i][0], "width": sizes[i][1]}
            for i, number in enumerate(self.image_ids.tolist())
            if number in wanted
        ]
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names, strict=True)]
        return {"images": images, "categories": categories, "annotations": entries}


# --- reading ----------------------------------------------------------------------------------------------------------


class _Object(NamedTuple):
    """An annotation whose values are what their types say. `reason`: why training leaves it out; "" if it does not."""

    id: int
    image: int  # its place among the images
    label: int
    bbox: list[float]  # x, y, width, height, as in the file
    inside: list[float]  # x1, y1, x2, y2, clipped to the image
    area: float
    crowd: bool
    mask: bytes
    reason: str


# reasons for which an object cannot be scored either
NOT_A_NUMBER, NEGATIVE = "box with a value that is not a number", "box of negative width or height"
NO_BOX = (NOT_A_NUMBER, NEGATIVE)
NO_MASK, NO_POLYGON = "no mask", "polygon of fewer than 3 points"
NOT_SCORED, BOX_ALONE = "not scored: {reason}", "scored as boxes alone: no usable mask"  # `Annotations.unscored`
OVERHANG = 0.1, 2.0  # of the image's side, and pixels: further beyond it reaches no box by rounding


def read_annotations(file: Path, *, masks: bool = True, scoring: bool = False, report: Report = refuse) -> Annotations:
    """The objects of a COCO instances file.

    Left out of training, as in the reference: crowds, objects flagged `ignore`, boxes thinner than a pixel or outside
    the image, areas of 0. Problems go to `report`: values of a wrong type or without meaning, contradictions, masks
    that do not fit their image and, with `masks`, objects that have none. UserError for a file that cannot be read or
    has no COCO lists.

    With `scoring` also the ground truth that predictions are scored against. As in pycocotools it holds every object,
    those that training leaves out included, but not boxes whose numbers make no box. An object without a usable mask is
    scored as a box, so that box AP has one truth with and without `masks`.
    """
    data, digest = _parse(file, "d" if scoring else "f")
    images, entries, categories = (_listed(data, kind, file, report) for kind in LISTS)
    categories.sort(key=lambda category: int(category["id"]))
    names = ["" for _ in categories]
    for n, category in enumerate(categories):
        with reported(report):
            names[n] = _class_name(category, file)
    read: list[tuple[int, str, list[int]]] = []
    known: dict[str, dict[int, int | None]] = {"image": {image["id"]: None for image in images}}  # None: has a problem
    for image in images:
        with reported(report):
            name, size = _file_name(image, file), [_side(image, key, file) for key in ("height", "width")]
            known["image"][image["id"]] = len(read)
            read.append((image["id"], name, size))
    known["category"] = {category["id"]: label for label, category in enumerate(categories, start=1)}
    sizes = np.array([size for _, _, size in read], dtype=np.int32).reshape(-1, 2)
    annotated = np.zeros(len(read), dtype=bool)

    kept: list[_Object] = []
    scored: list[_Object] = []
    dropped: dict[str, list[int]] = {}
    unscored: dict[str, list[int]] = {}
    clipped: list[int] = []
    overhanging: list[int] = []
    for entry in entries:
        found = None
        with reported(report):
            found = _read_object(entry, known, sizes, masks, file)
        if found is None:
            continue
        annotated[found.image] = True
        if scoring and found.reason in NO_BOX:
            unscored.setdefault(NOT_SCORED.format(reason=found.reason), []).append(found.id)
        elif scoring:
            scored.append(found)
            if masks and not found.mask:
                unscored.setdefault(BOX_ALONE, []).append(found.id)
        if found.reason:
            dropped.setdefault(found.reason, []).append(found.id)
            continue
        x, y, width, height = found.bbox
        if found.inside != [x, y, x + width, y + height]:
            clipped.append(found.id)
        if _overhangs(found.bbox, *sizes[found.image].tolist()):
            overhanging.append(found.id)
        kept.append(found)
    if maskless := dropped.pop(NO_MASK, []):
        report(
            UserError(
                f"{file}: {len(maskless)} of {len(maskless) + len(kept)} objects have no mask, the first is annotation "
                f"id {maskless[0]}.",
                hint=NO_MASKS_HINT,
            )
        )
    kept.sort(key=lambda one: one.image)  # stable: an image's objects stay in the file's order
    counts = np.bincount(np.array([one.image for one in kept], dtype=np.int64), minlength=len(read))
    return Annotations(
        file=file,
        digest=digest,
        category_ids=[category["id"] for category in categories],
        class_names=names,
        image_ids=np.array([number for number, _, _ in read], dtype=np.int64),
        file_names=Packed([name.encode() for _, name, _ in read]),
        sizes=sizes,
        annotated=annotated,
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([one.inside for one in kept], dtype=np.float32).reshape(-1, 4),
        labels=np.array([one.label for one in kept], dtype=np.int64),
        ids=np.array([one.id for one in kept], dtype=np.int64),
        segments=Packed([one.mask for one in kept]) if masks else None,
        dropped=dropped,
        unscored=unscored,
        clipped=clipped,
        overhanging=overhanging,
        num_annotations=len(data["annotations"]),
        num_as_text=sum(any(isinstance(entry.get(key), str) for key in ("iscrowd", "ignore")) for entry in entries),
        truth=_truth(scored, masks) if scoring else None,
    )


def _truth(scored: list[_Object], masks: bool) -> Truth:
    return Truth(
        ids=np.array([one.id for one in scored], dtype=np.int64),
        images=np.array([one.image for one in scored], dtype=np.int64),
        labels=np.array([one.label for one in scored], dtype=np.int64),
        boxes=np.array([one.bbox for one in scored], dtype=np.float64).reshape(-1, 4),
        areas=np.array([one.area for one in scored], dtype=np.float64),
        crowds=np.array([one.crowd for one in scored], dtype=bool),
        segments=Packed([one.mask for one in scored]) if masks else None,
    )


def _parse(file: Path, number: str) -> tuple[dict[str, list[Any]], str]:
    """The content of the JSON file, with polygons packed as `number` ("f" or "d"), and the digest of its bytes."""
    content = read_bytes(file, LARGEST_FILE)
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        text = content.decode(json.detect_encoding(content))
        del content  # half a gigabyte for COCO, as is the text
        data = json.loads(text, object_hook=functools.partial(mask_bytes.pack_polygons, number=number))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}.", hint="Was it downloaded completely?") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(kind), list) for kind in LISTS):
        raise UserError(f"{file} is not a COCO instances file: it needs the lists images, annotations, categories.")
    for kind in ("categories", "images"):
        if not data[kind]:
            raise UserError(f"{file} has no {kind}.")
    return data, digest


def _listed(data: dict[str, list[Any]], kind: str, file: Path, report: Report) -> list[dict[str, Any]]:
    """The entries of a list that are objects with an id of their own."""
    good = [entry for entry in data[kind] if isinstance(entry, dict) and _is_id(entry.get("id"))]
    if len(good) < len(data[kind]):
        lost = len(data[kind]) - len(good)
        report(UserError(f'{file}: {lost} of its {kind} are not objects with an "id", an integer of at most 64 bits.'))
    repeated = [i for i, n in Counter(entry["id"] for entry in good).items() if n > 1]
    if repeated:
        report(UserError(f"{file}: {len(repeated)} ids of {kind} are not unique, the first is {repeated[0]}."))
        good = list({entry["id"]: entry for entry in good}.values())
    return good


def _is_id(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _value(entry: dict[str, Any], key: str, file: Path, kind: str) -> Any:
    if key not in entry:
        raise UserError(f'{file}: {kind} id {entry["id"]} has no "{key}".')
    return entry[key]


def _number(value: Any) -> float | None:
    """A number of JSON; None for anything else, and for integers beyond all floating-point numbers."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


# --- images and categories --------------------------------------------------------------------------------------------


def _class_name(category: dict[str, Any], file: Path) -> str:
    name = category.get("name")
    if name is None or type(name) is int:
        return str(category["id"] if name is None else name)
    if not isinstance(name, str) or len(name) > LONGEST_NAME:
        raise UserError(
            f"{file}: the name of category id {category['id']} is {reprlib.repr(name)}, not a text of up to "
            f"{LONGEST_NAME:,} characters."
        )
    return str(name)


def _file_name(image: dict[str, Any], file: Path) -> str:
    """A path below the folder of the images, in text that can be encoded and shown."""
    name = _value(image, "file_name", file, "image")
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or UNUSABLE.search(name):
        raise UserError(f"{file}: the file_name of image id {image['id']} is {reprlib.repr(name)}, not a file's name.")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(
            f"{file}: the file_name of image id {image['id']} leads out of the images' folder: {reprlib.repr(name)}.",
            hint="Names are relative to the folder of the split, without `..`.",
        )
    return str(name)


def _side(image: dict[str, Any], key: str, file: Path) -> int:
    value = _number(_value(image, key, file, "image"))
    if value is None or not 1 <= value <= MAX_SIDE or value != int(value):
        raise UserError(
            f"{file}: the {key} of image id {image['id']} is {reprlib.repr(image[key])}, not a number of pixels from 1 "
            f"to {MAX_SIDE:,}."
        )
    return int(value)


# --- objects ----------------------------------------------------------------------------------------------------------


def _read_object(
    entry: dict[str, Any],
    known: dict[str, dict[int, int | None]],
    sizes: NDArray[np.int32],
    masks: bool,
    file: Path,
) -> _Object | None:
    """An annotation, checked; None for an object of an image that has a problem of its own."""
    crowd, ignore = _flag(entry, "iscrowd", file), _flag(entry, "ignore", file)
    image, label = _find(entry, "image", known, file), _find(entry, "category", known, file)
    if image is None or label is None:
        return None
    height, width = sizes[image].tolist()
    bbox = _bbox(entry, height, width, file)
    inside = [max(bbox[0], 0), max(bbox[1], 0), min(bbox[0] + bbox[2], width), min(bbox[1] + bbox[3], height)]
    area = _area(entry, bbox, file)
    reason = _reason_to_drop(bbox, inside, area, crowd or ignore)
    mask = b""
    if masks and reason not in NO_BOX:
        if segmentation := entry.get("segmentation"):
            try:
                mask = mask_bytes.pack(segmentation, height, width)
            except ValueError as error:
                raise UserError(f"{file}: annotation id {entry['id']} has {error}.") from None
            reason = reason or ("" if mask else NO_POLYGON)
        reason = reason or ("" if mask else NO_MASK)
    return _Object(entry["id"], image, label, bbox, inside, area, crowd, mask, reason)


def _flag(entry: dict[str, Any], key: str, file: Path) -> bool:
    """COCO has 0 and 1. Text is true in Python whatever it says, so "0" would make every object a crowd."""
    value = entry.get(key)
    known = FLAG_VALUES.get(value.strip().lower()) if isinstance(value, str) else value
    if known is None and value is None:
        return False
    if not isinstance(known, bool | int | float) or known not in (0, 1):
        raise UserError(f'{file}: "{key}" of annotation id {entry["id"]} is {reprlib.repr(value)}, neither 0 nor 1.')
    return bool(known)


def _find(entry: dict[str, Any], kind: str, known: dict[str, dict[int, int | None]], file: Path) -> int | None:
    """The place of an annotation's image or the label of its category."""
    number = _value(entry, f"{kind}_id", file, "annotation")
    if type(number) not in (int, float) or number not in known[kind]:
        raise UserError(
            f"{file}: annotation id {entry['id']} is of {kind} id {reprlib.repr(number)}, which the file does not list."
        )
    return known[kind][number]


def _bbox(entry: dict[str, Any], height: int, width: int, file: Path) -> list[float]:
    value = _value(entry, "bbox", file, "annotation")
    numbers = [_number(v) for v in value] if isinstance(value, list) else []
    bbox = [number for number in numbers if number is not None]
    if len(numbers) != 4 or len(bbox) != 4:
        raise UserError(f"{file}: the bbox of annotation id {entry['id']} is not [x, y, width, height].")
    far = mask_bytes.FAR * max(height, width)
    if any(math.isfinite(number) and abs(number) > far for number in bbox):
        raise UserError(
            f"{file}: the bbox of annotation id {entry['id']} lies far outside its image of height {height}, width "
            f"{width}."
        )
    return bbox


def _overhangs(bbox: list[float], height: int, width: int) -> bool:
    """Whether a box reaches far beyond the right or the lower border, as boxes do that are two corners."""
    share, pixels = OVERHANG
    ends = bbox[0] + bbox[2] - width, bbox[1] + bbox[3] - height
    return any(end > max(share * side, pixels) for end, side in zip(ends, (width, height), strict=True))


def _area(entry: dict[str, Any], bbox: list[float], file: Path) -> float:
    """The area that the file gives, else the box's."""
    if entry.get("area") is None:
        return bbox[2] * bbox[3]
    area = _number(entry["area"])
    if area is None or not 0 <= area < math.inf:
        raise UserError(
            f'{file}: "area" of annotation id {entry["id"]} is {reprlib.repr(entry["area"])}, not a number from 0 up.'
        )
    return area


def _reason_to_drop(bbox: list[float], inside: list[float], area: float, crowd: bool) -> str:
    """Why training leaves an object out; "" if it does not."""
    if not all(map(math.isfinite, bbox)):
        return NOT_A_NUMBER
    if bbox[2] < 0 or bbox[3] < 0:
        return NEGATIVE
    if crowd:
        return "crowd"
    if bbox[2] < 1 or bbox[3] < 1:
        return "box thinner than a pixel"
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        return "box outside the image"
    return "" if area > 0 else "area of 0"
