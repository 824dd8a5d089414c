"""Predictions of a classifier for images without labels: the best classes with their probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, nn

from hcnet_cli import pictures
from hcnet_cli.engine.finite import require_finite
from hcnet_cli.files import write_text
from hcnet_cli.schema import DataPart, EvaluationPart, Part
from hcnet_cli.tasks.classification import augment
from hcnet_cli.tasks.classification.spec import ClassificationEvaluation, ImageFolder
from hcnet_cli.tasks.classification.task import ClassificationTask

BEST = 5  # classes that are kept


class Answer(NamedTuple):
    """The best classes of an image, and their probabilities."""

    classes: list[str]
    probabilities: list[float]


class Predictor:
    """See engine.Predictor. `predictions.jsonl` has a line for each image: file, picture, classes, probabilities."""

    batch_size = 64

    def __init__(self, task: ClassificationTask, prepare: Callable[[Image.Image], dict[str, Any]]) -> None:
        self.task, self.prepare = task, prepare
        self.lines: list[str] = []

    def predict(self, items: Sequence[dict[str, Any]], to_device: Callable[[Any], Any]) -> list[Answer]:
        scores: Tensor = self.task.predict(to_device(augment.collate(items)))  # [B, num_classes]
        require_finite(scores)
        ranked = scores.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        best, order = (x[:, :BEST].cpu().tolist() for x in ranked)
        names = self.task.class_names
        return [Answer([names[i] for i in row], values) for row, values in zip(order, best, strict=True)]

    def keep(
        self, folder: Path, name: str, file: str, size: tuple[int, int], answer: Answer, picture: str | None
    ) -> None:
        line: dict[str, Any] = {"file": file, **({"picture": picture} if picture else {}), "classes": answer.classes}
        line["probabilities"] = [round(value, 6) for value in answer.probabilities]
        self.lines.append(json.dumps(line))

    def finish(self, folder: Path, about: dict[str, Any]) -> Sequence[Path]:
        write_text(folder / "predictions.jsonl", "".join(f"{line}\n" for line in self.lines))
        return [folder / "predictions.jsonl"]

    def draw(self, image: Image.Image, answer: Answer, title: str) -> Image.Image:
        bars = list(zip(answer.classes, answer.probabilities, strict=True))
        return pictures.sheet([pictures.squared(image), pictures.bars(bars)], title)


def build_predictor(
    head: Part,
    config: DataPart,
    evaluation: EvaluationPart,
    class_names: Sequence[str],
    backbone: Callable[[int], nn.Module],
) -> Predictor:
    """See hcnet_cli/build.py."""
    assert isinstance(config, ImageFolder)
    assert isinstance(evaluation, ClassificationEvaluation)
    normalise = augment.Normalise(config.mean, config.std)
    task = ClassificationTask(backbone(len(class_names)), class_names, normalise, None, 0.0)
    transform = augment.eval_transform(
        img_size=evaluation.img_size or config.img_size,
        crop_pct=evaluation.crop_pct or config.crop_pct,
        interpolation=config.interpolation,
    )
    return Predictor(task, transform)
