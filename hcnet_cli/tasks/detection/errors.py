"""What a detector gets wrong, by kind, after TIDE (Bolya et al., A General Toolbox for Identifying Object Detection
Errors, ECCV 2020), and how precision falls with recall.

A detection is right if it is matched, best scores first, to an object of its class that overlaps it most, with an IoU
of at least FOREGROUND. Every other one has one kind, the first of these that holds:

    localisation  an object of its class overlaps it with an IoU from BACKGROUND to FOREGROUND
    class         an object of another class overlaps it with at least FOREGROUND
    duplicate     an object of its class does so, and is matched already
    background    no object overlaps it with more than BACKGROUND
    both          place and class are wrong
    missed        an object that no detection is matched to, and that no localisation or class error is about

Each kind's `lost` is the AP50 that would be gained if it were mended alone: a localisation or class error becomes right
(the best scored one of an unmatched object; others go), a duplicate, background or both goes, a missed object is no
longer asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hcnet_cli import charts

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU
KINDS = ("localisation", "class", "duplicate", "background", "both", "missed")
Floats = NDArray[np.float64]


class Kind(NamedTuple):
    number: int
    lost: float  # AP50, in per cent


class Judged(NamedTuple):
    """A detection. `kind`: "" if it is right; `truth`: the number of the object that it is, or is about, or -1."""

    score: float
    label: int
    kind: str
    truth: int


def overlaps(boxes: Floats, others: Floats, crowd: bool = False) -> Floats:
    """IoU [N, M] of boxes [N, 4] and [M, 4], x, y, width, height; with `crowd` the share of a box that is inside."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (others[:, :2] + others[:, 2:])[None])
    shared = (high - low).clip(0).prod(axis=2)
    own = boxes[:, 2:].prod(axis=1)[:, None]
    union = own if crowd else own + others[:, 2:].prod(axis=1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def judge(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> tuple[list[Judged], list[int], set[int]]:
    """Every detection (COCO results) against the ground truth (a COCO dataset), those in crowds left out; the classes
    of the objects, by number; and the numbers of those that are matched.
    """
    found: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    objects: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    for result in results:
        found[result["image_id"]].append(result)
    judged: list[Judged] = []
    classes: list[int] = []
    matched: set[int] = set()
    for image in sorted(found):
        own = [one for one in objects[image] if not one.get("iscrowd")]
        crowds = [one for one in objects[image] if one.get("iscrowd")]
        first = len(classes)
        classes += [one["category_id"] for one in own]
        detections = sorted(found[image], key=lambda one: -one["score"])
        judged += _judge_image(detections, own, crowds, first, matched)
    return judged, classes, matched


def _judge_image(
    detections: Sequence[Mapping[str, Any]],
    objects: Sequence[Mapping[str, Any]],
    crowds: Sequence[Mapping[str, Any]],
    first: int,
    matched: set[int],
) -> list[Judged]:
    boxes = np.array([one["bbox"] for one in detections], dtype=np.float64).reshape(-1, 4)
    iou = overlaps(boxes, np.array([one["bbox"] for one in objects], dtype=np.float64).reshape(-1, 4))
    inside = overlaps(boxes, np.array([one["bbox"] for one in crowds], dtype=np.float64).reshape(-1, 4), crowd=True)
    labels = np.array([one["category_id"] for one in objects], dtype=np.int64)
    crowd_labels = np.array([one["category_id"] for one in crowds], dtype=np.int64)
    taken = np.zeros(len(objects), dtype=bool)
    right: dict[int, int] = {}  # detection -> object
    left: set[int] = set()  # neither right nor in a crowd
    for n, one in enumerate(detections):
        free = np.where((labels == one["category_id"]) & ~taken, iou[n], -1.0)
        if free.max(initial=-1.0) >= FOREGROUND:
            right[n] = int(np.flatnonzero(free == free.max())[-1])  # of equal ones the last, as COCOeval
            taken[right[n]] = True
            matched.add(first + right[n])
        elif np.where(crowd_labels == one["category_id"], inside[n], 0.0).max(initial=0.0) < FOREGROUND:
            left.add(n)
    judged: list[Judged] = []
    for n, one in enumerate(detections):
        if n in right:
            judged.append(Judged(one["score"], one["category_id"], "", first + right[n]))
        if n not in left:
            continue
        same, other = (np.where(chosen, iou[n], 0.0) for chosen in (labels == one["category_id"],
                                                                     labels != one["category_id"]))  # fmt: skip
        kind, about = "both", -1
        if BACKGROUND <= same.max(initial=0.0) < FOREGROUND:
            kind, about = "localisation", first + int(same.argmax())
        elif other.max(initial=0.0) >= FOREGROUND:
            kind, about = "class", first + int(other.argmax())
        elif same.max(initial=0.0) >= FOREGROUND:
            kind = "duplicate"
        elif iou[n].max(initial=0.0) <= BACKGROUND:
            kind = "background"
        judged.append(Judged(one["score"], one["category_id"], kind, about))
    return judged


def average_precision(right: Sequence[tuple[float, int, bool]], counts: Mapping[int, int]) -> float:
    """COCO's AP at one IoU, in per cent: the mean over classes of the precision at 101 recalls.

    right: (score, class, whether it is right) of each detection; counts: objects of each class.
    """
    scores, labels, good = np.array(right, dtype=np.float64).reshape(-1, 3).T
    order = np.argsort(-scores, kind="stable")
    labels, good = labels[order], good[order]
    values = []
    for label, count in counts.items():
        if count > 0:
            own = good[labels == label]
            hits = own.cumsum()
            precision = np.maximum.accumulate((hits / np.arange(1, len(own) + 1))[::-1])[::-1]
            places = np.searchsorted(hits / count, np.linspace(0, 1, 101), side="left")
            values.append(np.append(precision, 0.0)[places].mean())
    return 100 * float(np.mean(values)) if values else 0.0


def by_kind(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> tuple[float, dict[str, Kind]]:
    """AP50 of the boxes, and every kind of error: how many, and the AP50 that is lost to it."""
    judged, classes, matched = judge(truth, results)
    counts = {label: classes.count(label) for label in sorted(set(classes))}
    plain = average_precision([(one.score, one.label, not one.kind) for one in judged], counts)
    about = {one.truth for one in judged if one.kind in ("localisation", "class")}
    missed = [n for n in range(len(classes)) if n not in matched and n not in about]
    found: dict[str, Kind] = {}
    for kind in KINDS[:-1]:
        mended = average_precision(_mended(judged, kind, classes, matched), counts)
        found[kind] = Kind(sum(one.kind == kind for one in judged), mended - plain)
    fewer = dict(counts)
    for n in missed:
        fewer[classes[n]] -= 1
    mended = average_precision([(one.score, one.label, not one.kind) for one in judged], fewer)
    return plain, {**found, "missed": Kind(len(missed), mended - plain)}


def _mended(
    judged: Sequence[Judged], kind: str, classes: Sequence[int], matched: set[int]
) -> list[tuple[float, int, bool]]:
    """The detections after every error of a kind is mended."""
    best: dict[int, int] = {}  # object -> detection that becomes right
    for n, one in enumerate(judged):
        free = one.kind == kind and one.truth >= 0 and one.truth not in matched
        if free and (one.truth not in best or one.score > judged[best[one.truth]].score):
            best[one.truth] = n
    chosen = set(best.values())
    return [
        (one.score, classes[one.truth] if n in chosen else one.label, n in chosen or not one.kind)
        for n, one in enumerate(judged)
        if one.kind != kind or n in chosen
    ]


def draw(curves: Mapping[str, Sequence[float]], ap50: float, kinds: Mapping[str, Kind]) -> bytes:
    """PNG: precision over recall, the mean of the classes, at several IoUs; and what each kind of error costs.

    curves: 101 precisions in 0..1 by the IoU they are at.
    """

    def both(left: Any, right: Any) -> None:
        recall = np.linspace(0, 100, 101)
        for (name, values), colour in zip(curves.items(), (charts.HOT, charts.COOL, charts.INK), strict=False):
            label = f"IoU {name}: AP {100 * float(np.mean(values)):.1f}"
            left.plot(recall, 100 * np.asarray(values), color=colour, linewidth=1.8, label=label)
        left.set(xlim=(0, 100), ylim=(0, 103), xlabel="recall (%)", ylabel="precision (%)")
        left.set_title("Precision and recall of the boxes")
        left.grid(visible=True, axis="both")
        if curves:
            left.legend(loc="upper right")
        names = list(kinds)
        lost = [max(0.0, kinds[name].lost) for name in names]
        right.barh(range(len(names)), lost, height=0.62, color=charts.HOT)
        right.set_yticks(range(len(names)), names)
        texts = [f"{value:.1f}  ({kinds[name].number:,})" for name, value in zip(names, lost, strict=True)]
        charts.numbers_beside(right, texts, 8.5)
        right.set(xlim=(0, max(5.0, *lost)), ylim=(len(names) - 0.5, -0.6))
        note = "Each kind is mended alone, so the losses do not add up."
        right.set_xlabel(f"AP50 lost (number of errors; low scores count too).\n{note}")
        right.set_title(f"What the errors cost, of AP50 {ap50:.1f}")
        right.grid(visible=True, axis="x")
        right.tick_params(length=0)
        for axes in (left, right):
            axes.set_axisbelow(True)

    return charts.drawn(11, 4, both, columns=2)
