"""Predictions of a segmentation model for images without labels: a label map for each image."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from hcnet_cli import pictures
from hcnet_cli.data.images import normalise, rescale
from hcnet_cli.files import replacing, write_text, writing
from hcnet_cli.schema import DataPart, EvaluationPart, Part
from hcnet_cli.tasks.segmentation import augment
from hcnet_cli.tasks.segmentation.metric import legend
from hcnet_cli.tasks.segmentation.spec import SceneEvaluation, SceneParsing
from hcnet_cli.tasks.segmentation.spec import UPerNet as Head
from hcnet_cli.tasks.segmentation.task import SegmentationTask, scoring_task
from hcnet_cli.tasks.segmentation.upernet import UPerNet

Pixels = NDArray[np.uint8]


class Predictor:
    """See engine.Predictor. `labels/NAME.png` holds a value for each pixel, as the labels of the training data;
    `classes.json` names the values, and the image of each label. The picture has the name of the label.
    """

    batch_size = 1

    def __init__(self, task: SegmentationTask, prepare: Callable[[Image.Image], dict[str, Any]], first: int) -> None:
        self.task, self.prepare, self.first = task, prepare, first
        self.colours = pictures.palette(len(task.class_names))
        self.labels: dict[str, str] = {}

    def predict(self, items: Sequence[dict[str, Any]], to_device: Callable[[Any], Any]) -> list[Pixels]:
        """Class indices [H, W] of each image."""
        batch = {key: [item[key] for item in items] for key in items[0]}
        return [found.cpu().numpy() for found in self.task.predict(to_device(batch))]

    def keep(
        self, folder: Path, name: str, file: str, size: tuple[int, int], classes: Pixels, picture: str | None
    ) -> None:
        path = folder / "labels" / name
        label = Image.fromarray(classes + np.uint8(self.first), mode="P")
        label.putpalette([0] * 3 * self.first + self.colours.flatten().tolist())
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                label.save(temporary, "PNG")
        self.labels[f"labels/{name}"] = file

    def finish(self, folder: Path, about: dict[str, Any]) -> Sequence[Path]:
        values = {str(i): name for i, name in enumerate(self.task.class_names, self.first)}
        content = {"info": about, "values": values, "labels": self.labels}
        write_text(folder / "classes.json", json.dumps(content, indent=1) + "\n")
        return [folder / "labels", folder / "classes.json"]

    def draw(self, image: Image.Image, classes: Pixels, title: str) -> Image.Image:
        panels = [
            pictures.panel(pictures.enlarged(image), "image"),
            pictures.panel(pictures.draw_classes(image, classes, self.colours, 255), "prediction"),
        ]
        return pictures.sheet(panels, title, legend(np.bincount(classes.ravel(), minlength=256), self.task.class_names))


def _prepare(
    image: Image.Image, scales: Sequence[tuple[int, int]], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """What `scene_parsing.EvalScenes` makes of an image; `label` has its size alone."""
    pixels = np.array(image)
    resized = [augment.resize_image(pixels, rescale(pixels.shape[:2], scale)) for scale in scales]
    return {
        "images": [normalise(torch.from_numpy(one).permute(2, 0, 1), mean, std) for one in resized],
        "label": torch.empty(pixels.shape[:2], dtype=torch.uint8),
    }


def build_predictor(
    head: Part,
    config: DataPart,
    evaluation: EvaluationPart,
    class_names: Sequence[str],
    backbone: Callable[[int], nn.Module],
) -> Predictor:
    """See hcnet_cli/build.py."""
    assert isinstance(head, Head)
    assert isinstance(config, SceneParsing)
    assert isinstance(evaluation, SceneEvaluation)
    model = UPerNet(backbone(0), len(class_names), **head.model_dump())
    task = scoring_task(model, head.aux_weight, config, evaluation, evaluation, class_names)
    long, short = config.img_scale
    scales = [(int(long * ratio), int(short * ratio)) for ratio in evaluation.scales]
    prepare = functools.partial(_prepare, scales=scales, mean=config.mean, std=config.std)
    return Predictor(task, prepare, first=int(config.reduce_zero_label))
