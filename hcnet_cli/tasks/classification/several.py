"""Accuracy where an image has several right labels, and the mean over groups of images."""

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
from hcnet_cli.files import optional, write_text
from hcnet_cli.tasks.classification.metric import Accuracy


class AnyLabel(Accuracy):
    """Any of an image's labels is right: the one with the highest score counts as its label, in every figure.

    `labels`: by sample, at least one each. NLL and Brier score are not defined for several labels.
    """

    def __init__(self, *arguments: Any, labels: Sequence[Sequence[int]], **named: Any) -> None:
        super().__init__(*arguments, **{**named, "figures": ("ece",)})
        self.labels = labels

    def update(self, predictions: Tensor, batch: dict[str, Any]) -> None:
        right = torch.full_like(predictions, -torch.inf)
        for row, sample in enumerate(batch["sample"].tolist()):
            right[row, self.labels[sample]] = predictions[row, self.labels[sample]]
        target = right.sort(dim=1, descending=True, stable=True).indices[:, 0]
        super().update(predictions, {**batch, "target": target})


class GroupMean(Accuracy):
    """`top1` and `top5` are means over the severities of a corruption, then over corruptions; the other figures are of
    all images together. There is no interval: an image is there once for each group.

    groups: (corruption, severity) by number; group: [N], the number of each sample. Single predictions are not kept.
    """

    interval = False

    def __init__(
        self, *arguments: Any, groups: Sequence[tuple[str, str]], group: NDArray[np.int64], **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self.groups, self.group = groups, torch.from_numpy(group)
        self.counts = torch.zeros(3, len(groups), dtype=torch.int64)  # images, right, among the best five
        self.by_group: dict[str, dict[str, dict[str, float]]] = {}

    def update(self, predictions: Tensor, batch: dict[str, Any]) -> None:
        super().update(predictions, batch)
        self.kept.clear()
        ranks = predictions.sort(dim=1, descending=True, stable=True).indices == batch["target"][:, None]
        group = self.group[batch["sample"].cpu()]
        for row, hits in enumerate((ranks.any(dim=1), ranks[:, 0], ranks[:, :5].any(dim=1))):
            self.counts[row] += torch.bincount(group[hits.cpu()], minlength=len(self.groups))

    def compute(self) -> dict[str, float]:
        metrics = super().compute()
        images, *hits = dist.all_reduce_sum(self.counts).tolist()
        self.by_group = {}
        for i, (corruption, severity) in enumerate(self.groups):
            if images[i]:  # a part of the data, before a run, has few
                shares = {name: 100 * hit[i] / images[i] for name, hit in zip(("top1", "top5"), hits, strict=True)}
                self.by_group.setdefault(corruption, {})[severity] = {"images": images[i], **shares}
        for name in ("top1", "top5"):
            means = [
                sum(one[name] for one in severities.values()) / len(severities) for severities in self.by_group.values()
            ]
            metrics[name] = sum(means) / len(means)
        return metrics

    def save(self, folder: Path) -> None:
        """As Accuracy, without predictions, and `groups.json`: the scores of each corruption and severity."""
        super().save(folder)
        with optional(folder / "groups.json"):
            write_text(folder / "groups.json", json.dumps(self.by_group, indent=1) + "\n")
