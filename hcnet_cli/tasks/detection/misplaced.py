"""Boxes that are not where their objects are: two corners, mostly, in a file that should have [x, y, width, height].

Areas that are not those of their objects, and objects that are there twice.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from hcnet_cli.tasks.detection import masks
from hcnet_cli.tasks.detection.annotations import Annotations

FEW = 0.01  # share of the boxes: fewer are slips of single annotations
AREAS = "AP of small, medium and large objects goes by them: COCO's are the masks' areas in pixels."
BOXES = "COCO's boxes are [x, y, width, height], not two corners."


class Misplaced(NamedTuple):
    """`how` the boxes are misplaced, the `ids` of their annotations, and how many boxes were looked at."""

    how: str
    ids: list[int]
    seen: int

    @property
    def many(self) -> bool:
        return len(self.ids) > FEW * self.seen


def misplaced(found: Annotations, most: int | None = None) -> Misplaced:
    """The boxes that are not around their masks, looking at all or at about `most`; without masks those that reach far
    beyond their image.
    """
    if found.segments is None:
        return Misplaced("partly far outside their image", found.overhanging, len(found.boxes))
    return Misplaced("not around their masks", *_off_mask(found, most))


def _off_mask(found: Annotations, most: int | None) -> tuple[list[int], int]:
    """The box and the mask's bounds have an IoU below 0.5, and a side is off by more than 2 pixels."""
    assert found.segments is not None
    total = len(found.segments)
    rows = np.arange(0, total, max(1, total // most) if most else 1)
    images = np.searchsorted(found.first, rows, side="right") - 1
    around = [
        masks.bounds(found.segments[row], *found.sizes[i].tolist())
        for row, i in zip(rows.tolist(), images.tolist(), strict=True)
    ]
    ours, theirs = found.boxes[rows].astype(np.float64), np.array(around, dtype=np.float64).reshape(-1, 4)
    shared = np.minimum(ours, theirs)[:, 2:] - np.maximum(ours, theirs)[:, :2]
    overlap = shared.clip(0).prod(axis=1)
    union = sum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (ours, theirs)) - overlap
    off = (overlap < 0.5 * union) & (np.abs(ours - theirs).max(axis=1, initial=0) > 2)
    return found.ids[rows[off]].tolist(), len(rows)


def wrong_areas(found: Annotations) -> Misplaced:
    """The areas by which objects are scored as small, medium or large that neither the box nor a mask in it can have.

    They are larger than the box by more than 5 % and a pixel at each side, or smaller than half of the box's longer
    side: a thin diagonal object has a pixel for each of its length. Crowds and boxes thinner than a pixel do not count.
    """
    truth = found.truth
    assert truth is not None
    sides = truth.boxes[:, 2:]
    possible = (truth.areas >= sides.max(axis=1, initial=0) / 2) & (truth.areas <= 1.05 * (sides + 2).prod(axis=1))
    counted = ~truth.crowds & (sides.min(axis=1, initial=np.inf) >= 1)
    wrong = ~possible & counted & (truth.areas > 0)  # areas of 0 are told by themselves
    return Misplaced("cannot be those of their boxes", truth.ids[wrong].tolist(), len(truth))


def repeated(found: Annotations) -> list[list[int]]:
    """The ids of annotations that are the same object: of one image, class, box and mask."""
    images = np.repeat(np.arange(len(found)), np.diff(found.first)).tolist()
    same: dict[tuple[int, int, bytes, bytes], list[int]] = defaultdict(list)
    for row, (image, label, number) in enumerate(zip(images, found.labels.tolist(), found.ids.tolist(), strict=True)):
        mask = b"" if found.segments is None else found.segments[row]
        same[image, label, found.boxes[row].tobytes(), mask].append(number)
    return [ids for ids in same.values() if len(ids) > 1]
