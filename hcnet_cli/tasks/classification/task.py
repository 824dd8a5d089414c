"""Image classification: cross-entropy on (possibly mixed) labels, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from hcnet_cli.models import HcNet
from hcnet_cli.rng import keyed_uniform
from hcnet_cli.tasks.classification.augment import Normalise, mix
from hcnet_cli.tasks.classification.metric import Accuracy


class ClassificationTask(nn.Module):
    """`model` maps images [B, 3, H, W], which `normalise` makes of a batch, to logits [B, num_classes].

    With `mixup` (timm's, which also smooths) the target is soft; without it plain cross-entropy with `smoothing`.
    """

    primary = "top1"

    def __init__(
        self, model: HcNet, class_names: Sequence[str], normalise: Normalise, mixup: Mixup | None, smoothing: float
    ) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise
        self.class_names = list(class_names)
        self.mixup = mixup
        self.criterion = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, target = self.normalise(batch), batch["target"]
        if self.mixup:
            images, target = mix(images, target, batch["step_key"], self.mixup)
        logits = self.model(images, noise=keyed_uniform(batch["key"], self.model.num_blocks))
        return {"loss_cls": self.criterion(logits.float(), target)}

    def predict(self, batch: dict[str, Any]) -> Tensor:
        return self.model(self.normalise(batch)).float()

    def evaluator(self) -> Accuracy:
        return Accuracy(len(self.class_names), self.class_names)
