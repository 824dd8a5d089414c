"""Predictions of a detector for images without labels: one COCO file of boxes, scores and masks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools import mask as rle
from torch import nn

from hcnet_cli import pictures
from hcnet_cli.data.images import normalise, rescale, resize, to_tensor
from hcnet_cli.files import write_text
from hcnet_cli.schema import DataPart, EvaluationPart, Part
from hcnet_cli.tasks.detection.mask_rcnn import MaskRCNN
from hcnet_cli.tasks.detection.metric import worth_drawing
from hcnet_cli.tasks.detection.spec import Coco, DetectionEvaluation
from hcnet_cli.tasks.detection.spec import MaskRCNN as Head
from hcnet_cli.tasks.detection.task import DetectionTask


class Predictor:
    """See engine.Predictor. `predictions.json` has COCO's `images`, `categories` (numbered from 1, in the order of the
    model's classes) and `annotations`, with a `score` each and the mask as RLE.
    """

    batch_size = 1

    def __init__(
        self, task: DetectionTask, class_names: Sequence[str], prepare: Callable[[Image.Image], dict[str, Any]]
    ) -> None:
        self.task, self.class_names, self.prepare = task, class_names, prepare
        self.kept: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []  # images, each with its objects

    def predict(self, items: Sequence[dict[str, Any]], to_device: Callable[[Any], Any]) -> list[list[dict[str, Any]]]:
        """For each image its objects as COCO has them, best first."""
        batch = {key: [item[key] for item in items] for key in items[0]}
        return [_objects(found) for found in self.task.predict(to_device(batch))]

    def keep(
        self,
        folder: Path,
        name: str,
        file: str,
        size: tuple[int, int],
        objects: list[dict[str, Any]],
        picture: str | None,
    ) -> None:
        number = len(self.kept) + 1
        image = {"id": number, "file_name": file, "height": size[0], "width": size[1]}
        if picture:
            image["picture"] = picture
        self.kept.append((image, [{"image_id": number, **one} for one in objects]))  # Ctrl-C: both, or neither

    def finish(self, folder: Path, about: dict[str, Any]) -> Sequence[Path]:
        categories = [{"id": i, "name": name} for i, name in enumerate(self.class_names, 1)]
        images = [image for image, _ in self.kept]
        objects = [one for _, found in self.kept for one in found]
        annotations = [{"id": i, **one} for i, one in enumerate(objects, 1)]
        content = {"info": about, "images": images, "categories": categories, "annotations": annotations}
        write_text(folder / "predictions.json", json.dumps(content) + "\n")
        return [folder / "predictions.json"]

    def draw(self, image: Image.Image, objects: list[dict[str, Any]], title: str) -> Image.Image:
        shown, note = worth_drawing(objects)
        canvas = pictures.draw_objects(image, [self._drawn(one) for one in shown])
        return pictures.sheet([pictures.panel(canvas, "prediction", note)], title)

    def _drawn(self, one: dict[str, Any]) -> pictures.DrawnObject:
        label = one["category_id"] - 1
        red, green, blue = pictures.palette(len(self.class_names))[label].tolist()
        text = f"{self.class_names[label]}  {100 * one['score']:.0f}%"
        mask = rle.decode(one["segmentation"]) if "segmentation" in one else None
        return pictures.DrawnObject(text, (red, green, blue), one["bbox"], mask)


def _objects(found: dict[str, Any]) -> list[dict[str, Any]]:
    boxes, scores, labels = (found[key].float().cpu().tolist() for key in ("boxes", "scores", "labels"))
    objects = []
    for i, ((x1, y1, x2, y2), score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        one: dict[str, Any] = {"category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        if "masks" in found:
            code = found["masks"][i]
            one["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
            one["area"] = float(rle.area(code))
        else:
            one["area"] = (x2 - x1) * (y2 - y1)
        objects.append({**one, "iscrowd": 0})
    return sorted(objects, key=lambda one: -one["score"])


def _prepare(image: Image.Image, frame: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """What `coco.CocoDataset` makes of an image for evaluation."""
    pixels = to_tensor(image)
    size = rescale(pixels.shape[1:], frame)
    return {
        "image": normalise(resize(pixels, size), mean, std),
        "target": {"orig_size": torch.tensor(pixels.shape[1:])},
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
    assert isinstance(config, Coco)
    assert isinstance(evaluation, DetectionEvaluation)
    task = DetectionTask(MaskRCNN(backbone(0), len(class_names), **head.model_dump()))
    frame = evaluation.img_scale or config.img_scale
    return Predictor(task, class_names, functools.partial(_prepare, frame=frame, mean=config.mean, std=config.std))
