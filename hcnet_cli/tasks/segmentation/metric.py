"""mIoU from one confusion matrix over the whole validation set, at the labels' own resolution.

    IoU_c = TP_c / (TP_c + FP_c + FN_c)        mIoU  its mean over the classes that have a denominator
    Acc_c = TP_c / (TP_c + FN_c)               mAcc  its mean over the classes that are labelled
                                               aAcc  all TP / all labelled pixels

Pixels labelled `ignore_index` are not counted, and a class of that number has no IoU. Nor has a class neither labelled
nor predicted anywhere: it is left out with a notice, never counted as 0 or 1 (mmsegmentation's nanmean does the same).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hcnet_cli import charts, dist, pictures
from hcnet_cli.console import UserError, notice
from hcnet_cli.data.audit import distinct
from hcnet_cli.data.images import read_image
from hcnet_cli.engine.strip import IMAGES
from hcnet_cli.files import optional, write_text

Pixels = NDArray[np.uint8]
MAX_LEGEND = 23  # classes in the legend of a picture


def scores(confusion: NDArray[np.int64], ignore_index: int = 255) -> dict[str, Any]:
    """From a confusion matrix [K, K] (rows: label, columns: prediction), in per cent.

    mIoU, mAcc, aAcc, num_present (classes with an IoU), and arrays `iou` and `acc` [K], NaN where undefined: also for a
    class whose number is `ignore_index`, which has no pixels.
    """
    hits = np.diag(confusion).astype(np.float64)
    labelled, predicted = confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: an absent class
        iou = 100 * hits / (labelled + predicted - hits)
        acc = 100 * hits / labelled
    iou[ignore_index : ignore_index + 1] = np.nan
    if not labelled.any():
        nothing = dict.fromkeys(("mIoU", "mAcc", "aAcc"), float("nan"))
        return {**nothing, "num_present": 0, "iou": iou, "acc": acc}
    return {
        "mIoU": float(np.nanmean(iou)),
        "mAcc": float(np.nanmean(acc)),
        "aAcc": float(100 * hits.sum() / labelled.sum()),
        "num_present": int(np.count_nonzero(~np.isnan(iou))),
        "iou": iou,
        "acc": acc,
    }


class MeanIoU:
    """Evaluator of label maps. The first `num_pictures` images are drawn.

    `read` gives an image by its path, as training sees it.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        ignore_index: int = 255,
        num_pictures: int = 8,
        protocol: str = "",
        read: Callable[[str], Image.Image] = read_image,
    ) -> None:
        self.class_names = tuple(distinct(class_names))
        self.read = read
        self.ignore_index = ignore_index
        self.num_pictures = num_pictures
        self.protocol = protocol
        self.partial = False
        self._confusion: Tensor | None = None
        self._kept: dict[int, tuple[str, Pixels, Pixels]] = {}
        self._result: dict[str, Any] = {}

    def update(self, predictions: Sequence[Tensor], batch: dict[str, Any]) -> None:
        """Class indices [H, W] for each image; the batch has `label` (a list of [H, W]), `sample` [B] and `path`."""
        num_classes = len(self.class_names)
        samples = batch["sample"].tolist()
        for sample, path, label, prediction in zip(samples, batch["path"], batch["label"], predictions, strict=True):
            assert label.shape == prediction.shape
            counted = label != self.ignore_index
            pairs = label[counted].long() * num_classes + prediction[counted].long()
            counts = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
            self._confusion = counts if self._confusion is None else self._confusion + counts
            if sample < self.num_pictures:
                self._kept[sample] = (path, *(x.to(torch.uint8).cpu().numpy() for x in (label, prediction)))

    def compute(self) -> dict[str, float]:
        """mIoU, mAcc, aAcc in per cent over all processes' images, and num_present, the number of classes in mIoU."""
        num_classes = len(self.class_names)
        mine = torch.zeros(num_classes, num_classes, dtype=torch.int64) if self._confusion is None else self._confusion
        confusion = dist.all_reduce_sum(mine.cpu()).numpy()
        for kept in dist.gather(self._kept):
            self._kept |= kept
        if not confusion.any() and not self.partial:
            raise UserError("No pixel of the validation set has a label: there is no mIoU.")
        self._result = scores(confusion, self.ignore_index) | {"pixels": confusion.sum(1)}
        present = self._result["num_present"]
        undefined = set(np.flatnonzero(np.isnan(self._result["iou"])).tolist())
        if (absent := sorted(undefined - {self.ignore_index})) and not self.partial:
            some = ", ".join(self.class_names[i] for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
            notice(f"mIoU over {present} of {present + len(absent)} classes (absent: {some}).")
        return {name: float(self._result[name]) for name in ("mIoU", "mAcc", "aAcc", "num_present")}

    def save(self, folder: Path) -> None:
        """per_class.json, per_class.png and pictures/NAME.png, after `compute`. Undefined numbers are null."""
        folder.mkdir(parents=True, exist_ok=True)
        result = self._result
        rows = zip(self.class_names, result["iou"], result["acc"], result["pixels"], strict=True)
        summary = {name: _rounded(result[name]) for name in ("mIoU", "mAcc", "aAcc", "num_present")}
        content = summary | {
            "num_classes": len(self.class_names),
            "protocol": self.protocol,
            "classes": [
                {"name": name, "IoU": _rounded(iou), "acc": _rounded(acc), "pixels": int(pixels)}
                for name, iou, acc, pixels in rows
            ],
        }
        file = folder / "per_class.json"
        with optional(file):
            write_text(file, json.dumps(content, indent=1) + "\n")
        if np.isfinite(result["iou"]).any():
            with optional(folder / "per_class.png"):
                chart = charts.class_bars(self.class_names, result["iou"], "IoU of the classes", "IoU (%)")
                (folder / "per_class.png").write_bytes(chart)
        target = folder / "pictures"
        with optional(target):
            target.mkdir(parents=True, exist_ok=True)
        samples = sorted(self._kept)[: 1 if self.partial else None]
        names = pictures.file_names([self._kept[sample][0] for sample in samples])
        for sample, name in zip(samples, names, strict=True):
            path, label, prediction = self._kept[sample]
            with optional(target / name):
                picture = draw(self.read(path), label, prediction, self.class_names, self.ignore_index, Path(path).name)
                picture.save(target / name, compress_level=1)  # a third of the time, a quarter more bytes

    def strip(self) -> list[tuple[Image.Image, Image.Image]]:
        """See engine.strip: the labels, and the predictions."""
        colours = pictures.palette(len(self.class_names))
        pairs = []
        for sample in sorted(self._kept)[:IMAGES]:
            path, *maps = self._kept[sample]
            image = self.read(path)
            small = [pictures.draw_classes(image, one, colours, self.ignore_index, pictures.SMALL) for one in maps]
            true, found = (pictures.tile(one, [], pictures.SMALL) for one in small)
            pairs.append((true, found))
        return pairs

    def strip_legend(self) -> list[tuple[str, pictures.Colour]]:
        """See engine.strip: every class, or the largest in the images of the strip."""
        areas = (np.arange(256) < len(self.class_names)).astype(np.int64)
        ignored = False
        for sample in sorted(self._kept)[:IMAGES]:
            _, label, prediction = self._kept[sample]
            counts = np.bincount(np.concatenate([label.ravel(), prediction.ravel()]), minlength=256)
            areas += np.where(areas > 0, counts, 0)
            ignored |= bool((label == self.ignore_index).any())
        if self.ignore_index < len(areas):
            areas[self.ignore_index] = 0
        return legend(areas, self.class_names, ignored)


def _rounded(x: float) -> float | None:
    return None if np.isnan(x) else round(float(x), 4)


def draw(
    image: Image.Image, label: Pixels, prediction: Pixels, class_names: Sequence[str], ignore_index: int, caption: str
) -> Image.Image:
    """Image, label and prediction in a row, and a legend of the classes in them."""
    colours = pictures.palette(len(class_names))
    counted = label != ignore_index
    accuracy = f"{100 * (label == prediction)[counted].mean():.1f} % of pixels correct" if counted.any() else ""
    panels = [
        pictures.panel(pictures.enlarged(image), "image"),
        pictures.panel(pictures.draw_classes(image, label, colours, ignore_index), "label"),
        pictures.panel(pictures.draw_classes(image, prediction, colours, ignore_index), "prediction", accuracy),
    ]
    areas = np.bincount(label[counted], minlength=256) + np.bincount(prediction[counted], minlength=256)
    return pictures.sheet(panels, caption, legend(areas, class_names, not counted.all()))


def legend(
    areas: NDArray[np.int64], class_names: Sequence[str], ignored: bool = False
) -> list[tuple[str, pictures.Colour]]:
    """Names and colours of the classes that cover an area [256] of a picture, in the order of the class list.

    The MAX_LEGEND largest are named; `ignored`: pixels without a class are among them.
    """
    largest = [int(c) for c in np.argsort(-areas, kind="stable") if areas[c]]
    entries: list[tuple[str, pictures.Colour]] = []
    for c in sorted(largest[:MAX_LEGEND]):
        red, green, blue = pictures.palette(len(class_names))[c].tolist()
        entries.append((class_names[c], (red, green, blue)))
    if len(largest) > MAX_LEGEND:
        entries.append((f"and {len(largest) - MAX_LEGEND} more", pictures.PAPER))
    if ignored:
        entries.append(("ignored", pictures.IGNORED))
    return entries
