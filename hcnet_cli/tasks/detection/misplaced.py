"""Boxes that are not where their objects are: two corners, mostly, in a file that should have [x, y, width, height]."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hcnet_cli.tasks.detection import masks
from hcnet_cli.tasks.detection.annotations import Annotations

FEW = 0.01  # share of the boxes: fewer are slips of single annotations
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
