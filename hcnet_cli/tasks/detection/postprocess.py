"""Photos to boxes and masks with the graphs of a Mask R-CNN that `hcnet export` wrote: all that is not in them.

numpy alone: this file lies beside the graphs and needs neither hcnet nor PyTorch. `about` is the JSON of the graphs'
metadata, key "hcnet". Boxes are x1, y1, x2, y2 in pixels, floating point; arrays are float32 unless said otherwise.

    image = prepare(pixels, about)
    boxes, scores, labels, masks = detect(image, pixels.shape[:2], about, maps, boxes, masks)
    whole = paste(masks[0], boxes[0], pixels.shape[:2])

`maps`, `boxes` and `masks` are the graphs as functions of arrays that return a sequence of arrays. K is the number of
anchors, N of boxes, C of classes, c of channels.

    maps: image [B, 3, H, W], H and W multiples of 32 -> p2, p3, p4, p5 [B, c, H / stride, W / stride] at strides 4, 8,
        16 and 32, objectness [B, K] (logits), deltas [B, K, 4]
    boxes: p2, p3, p4, p5 of one image, boxes [N, 4] -> scores [N, 1 + C], background first, deltas [N, C, 4]
    masks: p2, p3, p4, p5 of one image, boxes [N, 4], labels [N] int64 from 0 -> masks [N, 28, 28], probabilities
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Graph = Callable[..., Sequence[Array]]

STRIDES = (4, 8, 16, 32, 64)  # of the levels that have anchors; the last is every second place of the one before
RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
MULTIPLE = 32  # of the sides of what `maps` takes
RPN_NMS = 0.7  # overlap (IoU) above which the weaker of two proposals is dropped
BOX_STDS = (0.1, 0.1, 0.2, 0.2)  # what the deltas of `boxes` are multiplied by; those of `maps` are taken as they are
MAX_LOG_RATIO = float(np.log(1000 / 16))


# --- before the graphs ------------------------------------------------------------------------------------------------


def prepare(pixels: Array, about: Mapping[str, Any]) -> Array:
    """RGB uint8 [H, W, 3] -> [3, h, w]: rescaled to fit `img_size` (long side, short side), normalised."""
    frame, (height, width) = about["img_size"], pixels.shape[:2]
    factor = min(max(frame) / max(height, width), min(frame) / min(height, width))
    size = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    resized = resize(resize(pixels, 1, size[1]), 0, size[0]).astype(np.float32)
    mean, std = (255 * np.array(about[key], np.float32) for key in ("mean", "std"))
    return ((resized - mean) / std).transpose(2, 0, 1)


def resize(pixels: Array, axis: int, length: int) -> Array:
    """Uint8 pixels with another length of an axis: bilinear, two taps, no antialiasing, as PyTorch on x86 CPUs.

    PyTorch computes with weights of 16 bits and rounds after each axis, width first.
    """
    old = pixels.shape[axis]
    if length == old:
        return pixels
    place = np.maximum((np.arange(length) + 0.5) * (old / length) - 0.5, 0)
    left = place.astype(np.int64)
    weights = np.stack([1 - (place - left), place - left])
    bits = int(np.log2((2**15 - 0.5) / weights.max()))
    shape = [length if one == axis else 1 for one in range(pixels.ndim)]
    first, second = np.floor(weights * 2**bits + 0.5).astype(np.int64).reshape(2, *shape)
    mixed = pixels.take(left, axis) * first + pixels.take(np.minimum(left + 1, old - 1), axis) * second
    return ((mixed + 2 ** (bits - 1)) >> bits).clip(0, 255).astype(np.uint8)


# --- between and after them -------------------------------------------------------------------------------------------


def detect(
    image: Array, size: tuple[int, int], about: Mapping[str, Any], maps: Graph, boxes: Graph, masks: Graph | None = None
) -> tuple[Array, Array, Array, Array | None]:
    """What is in an image, the best first.

    Args:
        image: [3, h, w], of `prepare`.
        size: Height and width of the photo, which the boxes are returned for.
        about: The metadata.
        maps: See above.
        boxes: See above.
        masks: None for a Faster R-CNN, which has none.

    Returns:
        Boxes [N, 4], scores [N], labels [N] int64 (places in the metadata's `classes`), and the probabilities of the
        masks [N, 28, 28], each inside its box (see `paste`), or None.
    """
    height, width = image.shape[1:]
    padded = np.zeros((1, 3, *(-(-side // MULTIPLE) * MULTIPLE for side in (height, width))), np.float32)
    padded[0, :, :height, :width] = image
    *pyramid, objectness, deltas = maps(padded)
    settings = about["mask_rcnn"]
    sizes = padded.shape[2], padded.shape[3]
    proposals = propose(objectness[0], deltas[0], anchors(sizes, settings["anchor_scale"]), (height, width), settings)
    probabilities, deltas = boxes(*pyramid, proposals)
    found, scores, labels = choose(probabilities, deltas, proposals, (height, width), settings)
    inside = masks(*pyramid, found, labels)[0] if masks is not None else None
    return found * np.array([size[1] / width, size[0] / height] * 2, np.float32), scores, labels, inside


def anchors(size: tuple[int, int], scale: float) -> list[Array]:
    """Anchors of each level [h * w * 3, 4] of a padded image: rows first, then columns, then RATIOS.

    Their centres are the corners of the level's cells, their area is (scale * stride)^2.
    """
    root = np.sqrt(np.array(RATIOS, np.float32))
    levels = []
    for stride in STRIDES:
        half_w, half_h = scale * stride / root / 2, scale * stride * root / 2
        cell = np.stack([-half_w, -half_h, half_w, half_h], axis=1)
        y, x = np.mgrid[0 : size[0] : stride, 0 : size[1] : stride].astype(np.float32)
        levels.append((np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4) + cell).reshape(-1, 4))
    return levels


def decode(deltas: Array, boxes: Array) -> Array:
    """Boxes moved by (dx, dy) in their own widths and heights, and grown by exp(dw, dh), at most 62.5 times."""
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * np.exp(deltas[..., 2:].clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)) / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def clip(boxes: Array, size: tuple[int, int]) -> Array:
    """Boxes [N, 4] cut at the edge of an image of (height, width)."""
    return boxes.clip(0, np.array([size[1], size[0]] * 2, np.float32))


def propose(
    objectness: Array, deltas: Array, levels: Sequence[Array], size: tuple[int, int], settings: Mapping[str, Any]
) -> Array:
    """Proposals [N, 4] in an image of (height, width): of each level the best, then NMS within levels, then the best.

    objectness [K] and deltas [K, 4] are those of the anchors of all `levels`, one after the other.
    """
    boxes, scores, groups, start = [], [], [], 0
    for level, anchor in enumerate(levels):
        own = objectness[start : start + len(anchor)]
        best = np.argsort(-own, kind="stable")[: settings["rpn_pre_test"]]
        boxes.append(clip(decode(deltas[start + best], anchor[best]), size))
        scores.append(own[best])
        groups.append(np.full(len(best), level))
        start += len(anchor)
    box, group = np.concatenate(boxes), np.concatenate(groups)
    with np.errstate(over="ignore"):
        score = 1 / (1 + np.exp(-np.concatenate(scores)))
    solid = (box[:, 2:] > box[:, :2]).all(axis=1)
    box, score, group = box[solid], score[solid], group[solid]
    return box[nms(box, score, group, RPN_NMS)[: settings["rpn_post_test"]]]


def choose(
    scores: Array, deltas: Array, proposals: Array, size: tuple[int, int], settings: Mapping[str, Any]
) -> tuple[Array, Array, Array]:
    """Boxes [N, 4], scores [N] and labels [N] from 0 of the objects, the best first, from what `boxes` returned."""
    every = decode(deltas * np.array(BOX_STDS, np.float32), proposals[:, None])  # [proposals, C, 4]
    which, labels = np.nonzero(scores[:, 1:] > settings["score_thresh"])
    boxes, kept = clip(every[which, labels], size), scores[which, labels + 1]
    best = nms(boxes, kept, labels, settings["nms_thresh"])[: settings["max_detections"]]
    return boxes[best], kept[best], labels[best].astype(np.int64)


def nms(boxes: Array, scores: Array, groups: Array, threshold: float) -> Array:
    """Indices of the boxes that no better box of their group overlaps with an IoU above `threshold`, the best first.

    boxes [N, 4], scores [N], groups [N] integers. Up to 1000 boxes are moved apart by group and taken together, as
    torchvision does on a CPU, whose rounding is part of a run's numbers.
    """
    if boxes.size == 0:
        return np.zeros(0, np.int64)
    if boxes.size <= 4000:
        return _nms(boxes + (groups.astype(np.float32) * (boxes.max() + 1))[:, None], scores, threshold)
    parts = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    kept = np.sort(np.concatenate([part[_nms(boxes[part], scores[part], threshold)] for part in parts]))
    return kept[np.argsort(-scores[kept], kind="stable")]


def _nms(boxes: Array, scores: Array, threshold: float) -> Array:
    order = np.argsort(-scores, kind="stable")
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        low, high = np.maximum(boxes[first, :2], boxes[order, :2]), np.minimum(boxes[first, 2:], boxes[order, 2:])
        side = (high - low).clip(0)
        shared = side[:, 0] * side[:, 1]
        with np.errstate(invalid="ignore"):  # of two boxes without area
            order = order[~(shared / (area[first] + area[order] - shared) > np.float64(threshold))]
    return np.array(kept, np.int64)


def paste(mask: Array, box: Array, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels [height, width] of a photo that belong to an object, from its mask [28, 28] and its box [4].

    The mask is enlarged to the box (bilinear, pixel centres at .5, 0 beyond its edge); probability 0.5 and above.
    """
    whole = np.zeros(size, np.bool_)
    x1, y1, x2, y2 = box.tolist()
    left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
    right, bottom = min(int(x2) + 2, size[1]), min(int(y2) + 2, size[0])
    if x2 > x1 and y2 > y1 and right > left and bottom > top:
        x = (np.arange(left, right) + 0.5 - x1) / (x2 - x1)
        y = (np.arange(top, bottom) + 0.5 - y1) / (y2 - y1)
        values = _sample(_sample(np.pad(mask, 1), y).T, x).T
        whole[top:bottom, left:right] = values >= 0.5
    return whole


def _sample(framed: Array, place: Array) -> Array:
    """Rows of an array with one row of zeros on each side, at places of which 0 to 1 is what lies between."""
    rows = len(framed) - 2
    row = (place * rows + 0.5).clip(0, rows + 1)
    first = np.minimum(row.astype(np.int64), rows)
    share = (row - first)[:, None]
    return framed[first] * (1 - share) + framed[first + 1] * share
