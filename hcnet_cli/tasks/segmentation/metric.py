"""mIoU from one confusion matrix over the whole validation set, at the labels' own resolution; and pictures.

    IoU_c = TP_c / (TP_c + FP_c + FN_c)        mIoU  its mean over the classes that have a denominator
    Acc_c = TP_c / (TP_c + FN_c)               mAcc  its mean over the classes that are labelled
                                               aAcc  all TP / all labelled pixels

Pixels labelled `ignore_index` count nowhere. A class neither labelled nor predicted anywhere has no IoU: it
is left out and said so, never counted as 0 or 1 (mmsegmentation's nanmean does the same).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcnet_cli import dist
from hcnet_cli.console import UserError, notice

Pixels = NDArray[np.uint8]


def scores(confusion: NDArray[np.int64]) -> dict[str, Any]:
    """From a confusion matrix [K, K] (rows: label, columns: prediction), in per cent.

    mIoU, mAcc, aAcc, num_present (classes with an IoU), and arrays `iou` and `acc` [K], NaN where undefined.
    """
    hits = np.diag(confusion).astype(np.float64)
    labelled, predicted = confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: an absent class
        iou = 100 * hits / (labelled + predicted - hits)
        acc = 100 * hits / labelled
    return {
        "mIoU": float(np.nanmean(iou)),
        "mAcc": float(np.nanmean(acc)),
        "aAcc": float(100 * hits.sum() / labelled.sum()),
        "num_present": int(np.count_nonzero(~np.isnan(iou))),
        "iou": iou,
        "acc": acc,
    }


class MeanIoU:
    """Evaluator of label maps; names of metrics end in `suffix`. Keeps the first `num_pictures` images for
    pictures.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        ignore_index: int = 255,
        num_pictures: int = 8,
        suffix: str = "",
        protocol: str = "",
    ) -> None:
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index
        self.num_pictures = num_pictures
        self.suffix = suffix
        self.protocol = protocol
        self._confusion: Tensor | None = None
        self._kept: dict[int, tuple[str, Pixels, Pixels]] = {}
        self._result: dict[str, Any] = {}

    def update(self, predictions: Sequence[Tensor], batch: dict[str, Any]) -> None:
        """Class indices [H, W] for each image; the batch has `label` (as many [H, W]), `sample` [B] and
        `path`.
        """
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
        """mIoU, mAcc, aAcc in per cent over all processes' images, and num_present, the classes behind
        mIoU.
        """
        num_classes = len(self.class_names)
        mine = torch.zeros(num_classes, num_classes, dtype=torch.int64) if self._confusion is None else self._confusion
        confusion = dist.all_reduce_sum(mine.cpu()).numpy()
        for kept in dist.gather(self._kept):
            self._kept |= kept
        if not confusion.any():
            raise UserError("No pixel of the validation set has a label: there is no mIoU.")
        self._result = scores(confusion) | {"pixels": confusion.sum(1)}
        present = self._result["num_present"]
        if present < num_classes:
            absent = [name for name, iou in zip(self.class_names, self._result["iou"], strict=True) if np.isnan(iou)]
            some = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            notice(f"mIoU over {present} of {num_classes} classes (absent: {some}).")
        return {name + self.suffix: float(self._result[name]) for name in ("mIoU", "mAcc", "aAcc", "num_present")}

    def save(self, folder: Path) -> None:
        """per_class.json and pictures/NAME.png, after `compute`. Undefined numbers are null."""
        folder.mkdir(parents=True, exist_ok=True)
        result = self._result
        rows = zip(self.class_names, result["iou"], result["acc"], result["pixels"], strict=True)
        summary = {name: round(result[name], 4) for name in ("mIoU", "mAcc", "aAcc", "num_present")}
        content = summary | {
            "num_classes": len(self.class_names),
            "protocol": self.protocol,
            "classes": [
                {"name": name, "IoU": _rounded(iou), "acc": _rounded(acc), "pixels": int(pixels)}
                for name, iou, acc, pixels in rows
            ],
        }
        (folder / f"per_class{self.suffix}.json").write_text(json.dumps(content, indent=1) + "\n")
        pictures = folder / f"pictures{self.suffix}"
        pictures.mkdir(exist_ok=True)
        for sample in sorted(self._kept):
            path, label, prediction = self._kept[sample]
            draw(path, label, prediction, self.class_names, self.ignore_index, pictures / f"{Path(path).stem}.png")


def _rounded(x: float) -> float | None:
    return None if np.isnan(x) else round(float(x), 4)


# --- pictures -------------------------------------------------------------------------------------------------


def palette(num_classes: int) -> Pixels:
    """[K, 3] RGB: hues a golden angle apart, lightness in three steps, so that neighbours in the list
    differ most.
    """
    i = np.arange(num_classes)
    lightness, chroma = np.array([0.70, 0.55, 0.84])[i % 3], np.array([0.17, 0.18, 0.15])[i % 3]
    hue = np.deg2rad(25 + 137.508 * i)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    # OKLab (Ottosson 2020) -> linear sRGB -> sRGB
    lms = (lab @ np.array([[1, 0.3963378, 0.2158038], [1, -0.1055613, -0.0638542], [1, -0.0894842, -1.2914855]]).T) ** 3
    rgb = (
        lms
        @ np.array(
            [
                [4.0767417, -3.3077116, 0.2309699],
                [-1.2684380, 2.6097574, -0.3413194],
                [-0.0041961, -0.7034186, 1.7076147],
            ]
        ).T
    )
    rgb = np.clip(rgb, 0, 1)
    return np.rint(255 * np.where(rgb > 0.0031308, 1.055 * rgb ** (1 / 2.4) - 0.055, 12.92 * rgb)).astype(np.uint8)


def overlay(image: Pixels, classes: Pixels, colours: Pixels, ignore_index: int) -> Pixels:
    """The image [H, W, 3] in grey under its classes' colours, white lines between them; ignored pixels stay
    dark grey.
    """
    grey = image.mean(-1, keepdims=True)
    table = np.full((256, 3), 60, dtype=np.float64)
    table[: len(colours)] = colours
    table[ignore_index] = 60
    mixed = 0.28 * grey + 0.72 * table[classes]
    border = np.zeros(classes.shape, dtype=bool)
    border[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    border[1:] |= classes[1:] != classes[:-1]
    mixed[border] = 0.35 * mixed[border] + 0.65 * 255
    return np.rint(mixed).astype(np.uint8)


def draw(
    image_path: str,
    label: Pixels,
    prediction: Pixels,
    class_names: Sequence[str],
    ignore_index: int,
    target: Path,
) -> None:
    """Writes a PNG: image, label and prediction side by side, and a legend of the classes in it, largest
    first.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from PIL import Image, ImageOps

    height, width = label.shape
    with Image.open(image_path) as file:
        image = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    zoom = max(1, round(512 / max(height, width)))  # lines between classes stay thin on small images
    image = np.asarray(Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC))
    colours = palette(len(class_names))
    counted = label != ignore_index
    accuracy = 100 * (label == prediction)[counted].mean() if counted.any() else float("nan")
    large = [np.kron(x, np.ones((zoom, zoom), np.uint8)) for x in (label, prediction)]
    panels = [
        ("image", image),
        ("label", overlay(image, large[0], colours, ignore_index)),
        (f"prediction ({accuracy:.1f} % of pixels)", overlay(image, large[1], colours, ignore_index)),
    ]
    areas = np.bincount(label[counted], minlength=256) + np.bincount(prediction[counted], minlength=256)
    shown = [int(c) for c in np.argsort(-areas, kind="stable") if areas[c]]
    entries = [Patch(color=colours[c] / 255, label=class_names[c]) for c in shown[:23]]
    if len(shown) > 23:
        entries.append(Patch(color="none", label=f"and {len(shown) - 23} more"))
    if not counted.all():
        entries.append(Patch(color="#3c3c3c", label="ignored"))
    columns = 8
    legend_height = 0.24 * -(-len(entries) // columns) + 0.12
    panel_width = 3.4
    panel_height = panel_width * height / width
    figure = Figure(figsize=(3 * panel_width + 0.2, panel_height + legend_height + 0.3), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (title, panel) in zip(axes, panels, strict=True):
        axis.imshow(panel, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.legend(
        handles=entries, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handlelength=1.2
    )
    figure.savefig(target, dpi=160, facecolor="white")
