"""Image classification: cross-entropy on (possibly mixed) labels, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from hcnet_cli.data.imagenet import mix
from hcnet_cli.metrics.accuracy import Accuracy
from hcnet_cli.models import HcNet
from hcnet_cli.rng import keyed_uniform


class ClassificationTask(nn.Module):
    """`model` maps images [B, 3, H, W] to logits [B, num_classes].

    With `mixup` (timm's, which also smooths) the target is soft; without it plain cross-entropy with `smoothing`.
    """

    primary = "top1"

    def __init__(self, model: HcNet, class_names: Sequence[str], mixup: Mixup | None, smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.class_names = list(class_names)
        self.mixup = mixup
        self.criterion = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image, target = mix(batch, self.mixup) if self.mixup else (batch["image"], batch["target"])
        image = image.contiguous(memory_format=torch.channels_last)
        logits = self.model(image, noise=keyed_uniform(batch["key"], self.model.num_blocks))
        return {"loss_cls": self.criterion(logits.float(), target)}

    def predict(self, batch: dict[str, Any]) -> Tensor:
        return self.model(batch["image"].contiguous(memory_format=torch.channels_last)).float()

    def evaluator(self) -> Accuracy:
        return Accuracy(len(self.class_names), self.class_names)
