"""Top-1 and top-5 accuracy from integer counts: the same to the last digit for any number of processes. And how well
the probabilities fit: see hcnet_cli/calibration.py.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hcnet_cli import calibration, charts, dist, pictures
from hcnet_cli.data.audit import distinct
from hcnet_cli.engine.finite import require_finite
from hcnet_cli.engine.strip import IMAGES
from hcnet_cli.files import optional, write_text
from hcnet_cli.tasks.classification.mistakes import GREEN, RED, Mistake, draw_mistakes, mistakes, worst

CALIBRATION = {  # what is computed of the probabilities, and how
    "nll": "mean negative logarithm of the label's probability",
    "ece": f"{calibration.BINS} bins of equal width over the highest probability, per cent",
    "brier": "squared distance to the label, summed over the classes",
}
INTERVAL = {"top1_95": "percentile bootstrap over the images"}  # top1_95_lower, top1_95_upper
DIGITS = 4  # of calibration figures: what lies behind is the rounding of sums


class Accuracy:
    """Counts right answers of a classifier. Of equal scores, that of the lower class number counts as higher.

    With fewer than five classes `top5` looks at all of them, and is 100. The five best classes of each image are kept
    for `save`, which names an image by `sample_name` of its number; `load_image` gives it for the picture of the worst
    mistakes. `figures`: those of CALIBRATION to compute; none for scores that are no logits.
    """

    interval = True  # of top-1: the images are drawn independently

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str],
        sample_name: Callable[[int], str] = str,
        load_image: Callable[[int], Image.Image] | None = None,
        figures: Collection[str] = tuple(CALIBRATION),
    ) -> None:
        assert num_classes == len(class_names)
        self.partial = False
        self.sample_name = sample_name
        self.load_image = load_image
        self.mistakes: list[Mistake] = []
        self.figures = figures
        self.fit: list[NDArray[np.float64]] = []  # [B, 4] confidence, NLL, Brier score, whether it is right
        self.bins: list[calibration.Bin] = []
        self.kept: list[tuple[Tensor, Tensor]] = []  # [B, 2 + 5] sample, label, best classes; [B, 5] their scores
        self.class_names = distinct(class_names)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # [truth, prediction]
        self.top5 = torch.zeros(num_classes, dtype=torch.int64)  # by truth

    def update(self, predictions: Tensor, batch: dict[str, Any]) -> None:
        """Takes scores [B, num_classes] and the batch's `target` and `sample` [B].

        UserError for a score that is not finite.
        """
        target = batch["target"]
        num_classes = len(self.class_names)
        require_finite(predictions)
        scores, order = (x[:, :5] for x in predictions.sort(dim=1, descending=True, stable=True))  # [B, 5]
        among_five = (order == target[:, None]).any(dim=1)  # [B]
        self.kept.append((torch.cat([batch["sample"][:, None], target[:, None], order], dim=1).cpu(), scores.cpu()))
        self.mistakes = worst([*self.mistakes, *mistakes(predictions, order[:, 0], target, batch["sample"])])
        if self.figures:
            logs = predictions.cpu().double().log_softmax(dim=1).numpy()
            fit = calibration.image_scores(logs, target.cpu().numpy())
            self.fit.append(np.stack([*fit, (order[:, 0] == target).cpu().numpy()], axis=1))
        cells = (target * num_classes + order[:, 0]).cpu()
        self.confusion += torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)
        self.top5 += torch.bincount(target[among_five].cpu(), minlength=num_classes)

    def compute(self) -> dict[str, float]:
        """`top1` and `top5` in per cent, the bootstrap interval of top1 over the images (`top1_95_lower`, `..._upper`;
        none where all or no images are right), and `figures`; over all processes, every one of which calls it.
        """
        self._confusion, self._top5 = dist.all_reduce_sum(self.confusion), dist.all_reduce_sum(self.top5)
        self._kept = [rows for part in dist.gather(self.kept) for rows in part]
        self._worst = worst([one for part in dist.gather(self.mistakes) for one in part])
        images = int(self._confusion.sum())
        assert images, "nothing was evaluated"
        right = int(self._confusion.trace())
        metrics = {"top1": 100 * right / images, "top5": 100 * int(self._top5.sum()) / images}
        metrics |= self._calibration()
        if self.interval and (interval := calibration.share_interval(right, images)):
            metrics |= {f"top1_95_{end}": 100 * share for end, share in zip(("lower", "upper"), interval, strict=True)}
        return metrics

    def _calibration(self) -> dict[str, float]:
        found = dist.gather(self.fit) if self.figures else []
        if not any(found):
            return {}
        fit = np.concatenate([rows for part in found for rows in part])
        self.bins = calibration.reliability(fit[:, 0], fit[:, 3] == 1)
        made = {
            "nll": math.fsum(fit[:, 1]) / len(fit),  # fsum: the same for any order of the images
            "ece": 100 * calibration.calibration_error(self.bins),
            "brier": math.fsum(fit[:, 2]) / len(fit),
        }
        return {name: round(made[name], DIGITS) for name in self.figures}

    def save(self, folder: Path) -> None:
        """After `compute`: `per_class.json`, `confusion.json` with the cells that are not zero, and `predictions.csv`
        with the best classes of each image and their scores; `mistakes.png` if there are any; `calibration.json` with
        the bins of the calibration error, and a picture of them and of the confusion.

        `top1`, `top5` of a class are its recall in per cent, null if it has no image.
        """
        images = self._confusion.sum(dim=1).tolist()
        hits = {"top1": self._confusion.diagonal().tolist(), "top5": self._top5.tolist()}
        per_class = {
            name: {"images": n} | {key: 100 * hit[i] / n if n else None for key, hit in hits.items()}
            for i, (name, n) in enumerate(zip(self.class_names, images, strict=True))
        }
        cells = self._confusion.nonzero().tolist()
        confusion = {
            "columns": ["truth", "prediction", "images"],
            "cells": [[self.class_names[i], self.class_names[j], int(self._confusion[i, j])] for i, j in cells],
        }
        folder.mkdir(parents=True, exist_ok=True)
        with optional(folder / "per_class.json"):
            write_text(folder / "per_class.json", json.dumps(per_class, indent=1, ensure_ascii=False) + "\n")
        with optional(folder / "confusion.json"):
            write_text(folder / "confusion.json", json.dumps(confusion, ensure_ascii=False) + "\n")
        if self._kept:
            with optional(folder / "predictions.csv"):
                write_text(folder / "predictions.csv", self._predictions())
        if self._worst and self.load_image is not None:
            with optional(folder / "mistakes.png"):
                draw_mistakes(self._worst, self.class_names, self.load_image, self.sample_name).save(
                    folder / "mistakes.png", compress_level=1
                )
        if self.bins:
            bins = {"protocol": CALIBRATION["ece"], "bins": [one._asdict() for one in self.bins]}
            with optional(folder / "calibration.json"):
                write_text(folder / "calibration.json", json.dumps(bins, indent=1) + "\n")
            with optional(folder / "pictures"):
                (folder / "pictures").mkdir(exist_ok=True)
                (folder / "pictures" / "calibration.png").write_bytes(self._draw())

    def strip(self) -> list[tuple[Image.Image, Image.Image]]:
        """See engine.strip: the image over its class, and the answer, green where it is right."""
        if self.load_image is None:
            return []
        ids = torch.cat([ids for ids, _ in self._kept])
        ids = ids[ids[:, 0].argsort()]
        pairs = []
        for number in range(min(IMAGES, len(ids))):
            sample, label, answer = ids[number * len(ids) // min(IMAGES, len(ids)), :3].tolist()
            name = [(self.class_names[label], pictures.INK)]
            found = [(self.class_names[answer], (255, 255, 255))]
            image = pictures.tile(self.load_image(sample), name, pictures.SMALL)
            pairs.append((image, pictures.label(found, pictures.SMALL, 24, GREEN if answer == label else RED)))
        return pairs

    def _draw(self) -> bytes:
        bars = [(one.low, one.high, one.accuracy, one.images) for one in self.bins]

        def both(left: Any, right: Any) -> None:
            charts.reliability(left, bars, calibration.calibration_error(self.bins))
            charts.confusion(right, self.class_names, self._confusion.numpy(), 9.5)
            left.set_title(f"{int(self._confusion.sum()):,} images of {len(self.class_names):,} classes")

        return charts.drawn(12, 5.4, both, columns=2)

    def _predictions(self) -> str:
        """A line for each image, in the order of the data set: name, label, best classes, their scores."""
        ids, scores = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        order = ids[:, 0].argsort()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        number = range(1, scores.shape[1] + 1)
        writer.writerow(["image", "label", *(f"class_{i}" for i in number), *(f"score_{i}" for i in number)])
        for (sample, *classes), values in zip(ids[order].tolist(), scores[order].tolist(), strict=True):
            names = [self.class_names[i] for i in classes]
            writer.writerow([self.sample_name(sample), *names, *(f"{value:.6g}" for value in values)])
        return text.getvalue()
