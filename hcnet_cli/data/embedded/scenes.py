"""Scenes of handwritten digits on textures, written as a COCO and as an ADE20K data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hcnet_cli.data.embedded import drawing
from hcnet_cli.data.embedded.digits import SEED, Digit, draw_digit, load_digits
from hcnet_cli.data.embedded.drawing import TEXTURES, Floats, color

SCENES = {"train": 800, "val": 400}
CANVAS = 128  # pixels, both sides of a scene
PERIODS = (9.0, 16.0)  # pixels, of the textures
HUES = (0.65, 0.33, 0.03, 0.83)  # blue, green, red, purple
CATEGORY_IDS = (7, 90, 1, 18, 44, 3, 62, 27, 85, 13)  # with gaps and out of order, as COCO's

Mask = NDArray[np.bool_]


@dataclass
class _Object:
    digit: int
    mask: Mask  # [CANVAS, CANVAS], the visible part
    crowd: bool = False  # many small ones of a digit, outlined together


@dataclass
class _Scene:
    image: NDArray[np.uint8]  # [CANVAS, CANVAS, 3]
    texture: NDArray[np.int64]  # [CANVAS, CANVAS], index into TEXTURES
    other: Mask  # neither digit nor texture: clutter, crowds, the soft rim of a digit
    objects: list[_Object]


Y, X = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float64)


def _texture_color(kind: int, low: float, high: float, random: np.random.RandomState) -> Floats:
    """Each texture has a typical hue, as sky and grass have."""
    hue = HUES[kind] + random.uniform(-0.06, 0.06)
    return color(hue, random.uniform(0.4, 0.8), random.uniform(low, high))


def _ink_color(random: np.random.RandomState) -> Floats:
    return color(random.uniform(), random.uniform(0, 0.4), random.uniform(185, 245))


def _place(shape: Floats, taken: list[Mask], random: np.random.RandomState) -> Floats | None:
    """The shape somewhere on an empty canvas, where it hides little of what is there; None if no place is found."""
    height, width = shape.shape
    for _ in range(20):
        top, left = random.randint(0, CANVAS - height + 1), random.randint(0, CANVAS - width + 1)
        canvas = np.zeros((CANVAS, CANVAS))
        canvas[top : top + height, left : left + width] = shape
        mask = canvas > 0.5
        if all((mask & other).sum() <= 0.06 * min(mask.sum(), other.sum()) for other in taken):
            return canvas
    return None


def _scene(digits: list[Digit], random: np.random.RandomState) -> _Scene:
    # one or two textures, separated by a wavy line
    kinds = random.permutation(len(TEXTURES))[:2]
    angle = random.uniform(0, 2 * np.pi)
    along = (X - CANVAS / 2) * np.cos(angle) + (Y - CANVAS / 2) * np.sin(angle)
    across = (Y - CANVAS / 2) * np.cos(angle) - (X - CANVAS / 2) * np.sin(angle)
    edge = random.uniform(-25, 25) + 7 * np.sin(across / random.uniform(8, 20))
    second = along > edge if random.uniform() < 0.7 else np.zeros_like(along, dtype=bool)
    texture = np.where(second, kinds[1], kinds[0])
    grounds = []
    for kind in kinds:
        one, two = _texture_color(kind, 15, 40, random), _texture_color(kind, 60, 95, random)
        pattern = drawing.texture(kind, CANVAS, PERIODS, random)[..., None]
        grounds.append(one + pattern * (two - one))
    image = np.where(second[..., None], grounds[1], grounds[0])

    other = np.zeros((CANVAS, CANVAS), dtype=bool)
    objects: list[_Object] = []

    def paint(opacity: Floats) -> Mask:
        rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
        touched = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        touched += opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None] * (_ink_color(random) - touched)
        mask = opacity > 0.5
        for thing in objects:
            thing.mask &= ~mask
        return mask

    # clutter: discs and squares
    for _ in range(random.randint(0, 3)):
        (y, x), radius = random.uniform(10, CANVAS - 10, 2), random.uniform(4, 9)
        distance = np.hypot(Y - y, X - x) if random.uniform() < 0.5 else np.maximum(abs(Y - y), abs(X - x))
        opacity = np.clip(radius - distance + 0.5, 0, 1)
        paint(opacity)
        other |= opacity > 0.1

    crowded, empty = random.uniform() < 0.08, random.uniform() < 0.04
    if crowded and not empty:
        _, label, grey = digits[random.randint(len(digits))]
        opacity = np.zeros((CANVAS, CANVAS))
        top, left = random.randint(0, CANVAS - 44, 2)
        for place in random.permutation(9)[: random.randint(5, 9)]:
            shape = draw_digit(grey, random.randint(11, 14), random)[:16, :16]
            y, x = top + place // 3 * 14, left + place % 3 * 14
            opacity[y : y + shape.shape[0], x : x + shape.shape[1]] = shape
        objects.append(_Object(label, paint(opacity), crowd=True))
        other |= opacity > 0.1

    for _ in range(0 if empty else random.randint(2, 7)):
        _, label, grey = digits[random.randint(len(digits))]
        placed = _place(draw_digit(grey, random.randint(26, 52), random), [thing.mask for thing in objects], random)
        if placed is None:
            continue
        mask = paint(placed)
        other = (other & ~mask) | ((placed > 0.05) & ~mask)
        objects.append(_Object(label, mask))

    image += random.normal(0, 4, image.shape)
    return _Scene(np.clip(np.rint(image), 0, 255).astype(np.uint8), texture, other, objects)


def _scenes() -> Iterator[tuple[str, int, _Scene]]:
    """(split, number from 1, scene). Each scene has its own generator."""
    for split, digits in load_digits().items():
        for number in range(1, SCENES[split] + 1):
            yield split, number, _scene(digits, np.random.RandomState([SEED, split == "val", number]))


def _save_jpeg(image: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(image).save(path, quality=92, subsampling=0)


# --- as COCO ----------------------------------------------------------------------------------------------------------


def _outlines(mask: Mask) -> tuple[list[list[int]], bool]:
    """The borders of a mask as polygons x0, y0, x1, y1, ... along pixel edges, and whether one of them is a hole.

    The walk along pixel edges keeps the mask on its right and turns right at corners where two pixels meet diagonally.
    So outlines are simple polygons, clockwise around the mask and anticlockwise around holes (y points down).
    """
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner (x, y) -> directions (dx, dy)
    for neighbour, start, direction in (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),  # nothing above: walk right along the top
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    ):
        for y, x in np.argwhere(inner & ~neighbour).tolist():
            leaving.setdefault((x + start[0], y + start[1]), []).append(direction)
    polygons, hole = [], False
    while leaving:
        start = here = next(iter(leaving))
        corners: list[int] = []
        twice_area = 0
        before = (0, 0)
        while here in leaving:
            choices = leaving[here]
            right = (-before[1], before[0])
            direction = right if right in choices else choices[0]
            choices.remove(direction)
            if not choices:
                del leaving[here]
            if direction != before:
                corners += here
            after = (here[0] + direction[0], here[1] + direction[1])
            twice_area += here[0] * after[1] - here[1] * after[0]
            here, before = after, direction
            if here == start:
                break
        polygons.append(corners)
        hole |= twice_area < 0
    return polygons, hole


def _run_lengths(mask: Mask) -> list[int]:
    """COCO's uncompressed RLE: lengths of alternating runs, column by column, the first of zeros."""
    flat = mask.T.ravel().astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return list(np.diff(np.concatenate([[0], changes, [flat.size]])).tolist())


def _segmentation(thing: _Object) -> Any:
    """Polygons, or RLE where the mask has a hole (as in 0 and 8) and for crowds."""
    from pycocotools import mask as coco_mask

    if thing.crowd:
        return {"size": list(thing.mask.shape), "counts": _run_lengths(thing.mask)}
    polygons, hole = _outlines(thing.mask)
    if not hole:
        return polygons
    encoded = coco_mask.encode(np.asfortranarray(thing.mask, dtype=np.uint8))
    return {"size": list(thing.mask.shape), "counts": encoded["counts"].decode("ascii")}


def make_digit_scenes(folder: Path) -> None:
    files = {
        split: {
            "info": {"description": "digit-scenes: handwritten digits on textures", "version": str(SEED)},
            "categories": [
                {"id": id_, "name": str(digit), "supercategory": "digit"} for digit, id_ in enumerate(CATEGORY_IDS)
            ],
            "images": [],
            "annotations": [],
        }
        for split in SCENES
    }
    random = np.random.RandomState(SEED)
    image_id = annotation_id = 0
    for split in SCENES:
        (folder / f"{split}2017").mkdir()
    for split, _, scene in _scenes():
        image_id += int(random.randint(1, 60))  # gaps, as in COCO
        file_name = f"{image_id:012d}.jpg"
        _save_jpeg(scene.image, folder / f"{split}2017" / file_name)
        content: dict[str, Any] = files[split]
        content["images"].append({"id": image_id, "file_name": file_name, "width": CANVAS, "height": CANVAS})
        for thing in scene.objects:
            annotation_id += int(random.randint(1, 9))
            rows, columns = np.flatnonzero(thing.mask.any(1)), np.flatnonzero(thing.mask.any(0))
            left, top = int(columns[0]), int(rows[0])
            content["annotations"].append(
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[thing.digit],
                    "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                    "area": int(thing.mask.sum()),
                    "iscrowd": int(thing.crowd),
                    "segmentation": _segmentation(thing),
                }
            )
    (folder / "annotations").mkdir()
    for split, content in files.items():
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


# --- as ADE20K --------------------------------------------------------------------------------------------------------


def make_digit_stuff(folder: Path) -> None:
    """Labels: 0 other, 1..10 the digits 0..9, 11..14 the textures.

    Names and statistics are in `objectInfo150.txt`, the name and columns of ADE20K's own list.
    """
    names = [str(digit) for digit in range(10)] + list(TEXTURES)
    pixels = np.zeros(len(names) + 1, dtype=np.int64)
    images = {split: np.zeros(len(names) + 1, dtype=np.int64) for split in SCENES}
    folders = {"train": "training", "val": "validation"}
    for kind in ("images", "annotations"):
        for split in folders.values():
            (folder / kind / split).mkdir(parents=True)
    for split, number, scene in _scenes():
        label = (scene.texture + 11).astype(np.uint8)
        for thing in scene.objects:
            label[thing.mask] = 1 + thing.digit
        label[scene.other] = 0
        stem = f"ADE_{split}_{number:08d}"
        _save_jpeg(scene.image, folder / "images" / folders[split] / f"{stem}.jpg")
        Image.fromarray(label).save(folder / "annotations" / folders[split] / f"{stem}.png")
        counts = np.bincount(label.ravel(), minlength=len(names) + 1)
        pixels += counts
        images[split] += counts > 0
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for index, name in enumerate(names, start=1):
        ratio = f"{pixels[index] / pixels.sum():.4f}"
        stuff = int(name in TEXTURES)
        lines.append(f"{index}\t{ratio}\t{images['train'][index]}\t{images['val'][index]}\t{stuff}\t{name}")
    (folder / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
