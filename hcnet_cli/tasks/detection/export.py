"""A Mask R-CNN as graphs for other programs, and its detections by them and postprocess.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torch import Tensor, nn
from torch.export import Dim
from torchvision.ops import roi_align

from hcnet_cli.console import UserError
from hcnet_cli.data.images import Size
from hcnet_cli.engine import Graph
from hcnet_cli.tasks.detection import postprocess
from hcnet_cli.tasks.detection.mask_rcnn import STRIDES, MaskRCNN, roi_levels
from hcnet_cli.tasks.detection.task import DetectionTask

PROGRAM = postprocess  # the module that is written beside the graphs
DECIMALS = 1  # of AP, which must be the run's
COMPARED = 8  # images whose detections are compared with the model's
SCORE_TOLERANCE, BOX_TOLERANCE, MASK_OVERLAP = 1e-3, 0.1, 0.99  # BOX_TOLERANCE in pixels of the photo
TIES = 0.02  # of detections may differ: NMS and top-k decide between neighbours whose scores are equal but for rounding
PYRAMID = ("p2", "p3", "p4", "p5")
SETTINGS = ("anchor_scale", "rpn_pre_test", "rpn_post_test", "score_thresh", "nms_thresh", "max_detections")


# --- graphs -----------------------------------------------------------------------------------------------------------


class _Maps(nn.Module):
    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.model.features(image)
        scores, deltas = self.model.rpn_head(features)
        flat = torch.cat([one.permute(0, 2, 3, 1).flatten(1) for one in scores], dim=1)  # [B, K]
        moves = torch.cat([one.permute(0, 2, 3, 1).reshape(one.shape[0], -1, 4) for one in deltas], dim=1)
        return *features[:4], flat.float(), moves.float()


class _Boxes(nn.Module):
    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        scores, deltas = self.model._box_outputs(_pool((p2, p3, p4, p5), boxes, 7))
        return scores.softmax(dim=1), deltas.reshape(-1, self.model.num_classes, 4)


class _Masks(nn.Module):
    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.mask_score(self.model.mask_head(_pool((p2, p3, p4, p5), boxes, 14))).float()
        chosen = labels[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        return logits.gather(1, chosen)[:, 0].sigmoid()


def _pool(features: tuple[Tensor, ...], boxes: Tensor, size: int) -> Tensor:
    """`mask_rcnn.pool` of one image without choosing rows, which a graph for any number of boxes cannot do.

    On a level that is not a box's own the box is shrunk to a point. RoIAlign takes no samples there and gives 0.
    """
    levels = roi_levels(boxes)
    rois = F.pad(boxes, (1, 0))  # [N, 5]: image 0, box
    parts = [
        roi_align(feature, rois * (levels == level)[:, None], size, 1 / STRIDES[level], sampling_ratio=0, aligned=True)
        for level, feature in enumerate(features)
    ]
    return parts[0] + parts[1] + parts[2] + parts[3]


def graphs(task: DetectionTask) -> dict[str, Graph]:
    """The parts of the model, by the names of their files; see postprocess.py."""
    model = task.model

    def image(count: int, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(count, 3, *size, generator=generator),)

    @torch.no_grad()
    def rois(count: int, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Maps of noise, and boxes of all sizes in it, among them one of the whole image and one that is a point."""
        pyramid = [one.contiguous() for one in model.features(*image(1, size, generator))[:4]]
        corners = torch.rand(5 + 4 * count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
        corners[0], corners[1, 2:] = torch.tensor([0, 0, 1, 1]), corners[1, :2]
        return *pyramid, corners * torch.tensor([size[1], size[0]] * 2)

    def rois_and_labels(count: int, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
        given = rois(count, size, generator)
        return *given, torch.arange(len(given[-1])) % model.num_classes

    free = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    number = {0: Dim.DYNAMIC}
    made = {
        "maps": Graph(_Maps(model), ["image"], [*PYRAMID, "objectness", "deltas"], image, [number | free], True),
        "boxes": Graph(_Boxes(model), [*PYRAMID, "boxes"], ["scores", "deltas"], rois, [free] * 4 + [number], True),
    }
    if model.with_masks:
        inputs, dynamic = [*PYRAMID, "boxes", "labels"], [free] * 4 + [number] * 2
        made["masks"] = Graph(_Masks(model), inputs, ["masks"], rois_and_labels, dynamic, True)
    return made


def settings(task: DetectionTask) -> dict[str, Any]:
    """What postprocess.py needs beside what the metadata of weights have."""
    return {"mask_rcnn": task.model.settings.model_dump(include=set(SETTINGS)), "pad_to_multiple": postprocess.MULTIPLE}


# --- detections by them -----------------------------------------------------------------------------------------------


class ExportedTask(DetectionTask):
    """A task that predicts with the exported graphs and postprocess.py.

    For the first images it predicts with the model, too. UserError where those detections are not the same.
    """

    def __init__(self, task: DetectionTask, files: Mapping[str, Callable[..., Any]], about: Mapping[str, Any]) -> None:
        super().__init__(task.model)
        self.about = about
        self.files = {name: _of_arrays(file) for name, file in files.items()}
        self.compared = self.found = self.other = 0

    def in_place_of(self, task: DetectionTask) -> DetectionTask:
        """Returns this task, which from here on is compared with another one, and scored as it is."""
        self.model, self.scoring = task.model, task.scoring
        return self

    def predict(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        predictions = []
        for image, target in zip(batch["image"], batch["target"], strict=True):
            height, width = target["orig_size"].tolist()
            size = height, width
            boxes, scores, labels, masks = postprocess.detect(image.numpy(), size, self.about, **self.files)
            found: dict[str, Any] = {"boxes": boxes, "scores": scores, "labels": labels + 1}
            prediction: dict[str, Any] = {key: torch.from_numpy(value) for key, value in found.items()}
            if masks is not None:
                pasted = (postprocess.paste(mask, box, size) for mask, box in zip(masks, boxes, strict=True))
                prediction["masks"] = [rle.encode(np.asfortranarray(mask, np.uint8)) for mask in pasted]
            predictions.append(prediction)
            if self.compared < COMPARED:
                self.compared += 1
                self._count(prediction, super().predict({"image": [image], "target": [target]})[0])
        return predictions

    def _count(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        same = pairs(found, expected)
        self.found += sum(same.shape)
        self.other += int((~same.any(axis=0)).sum() + (~same.any(axis=1)).sum())

    def compare(self) -> str:
        """A sentence: how many detections are the model's. UserError where more differ than ties explain."""
        if not self.compared:
            return ""
        text = f"{self.found - self.other} of {self.found} detections in {self.compared} images"
        if self.other > TIES * self.found:
            raise UserError(f"The files detect otherwise than the model: {text} are the same. They were not kept.")
        return f"{text} are the model's. "


def pairs(found: dict[str, Any], expected: dict[str, Any]) -> Any:
    """Which detections are the same within the tolerances, [found, expected] of bool."""
    box, score, label = (
        [torch.as_tensor(one[key]).numpy() for one in (found, expected)] for key in ("boxes", "scores", "labels")
    )
    same = (np.abs(box[0][:, None] - box[1][None]) <= BOX_TOLERANCE).all(axis=2)
    same &= np.abs(score[0][:, None] - score[1][None]) <= SCORE_TOLERANCE
    same &= label[0][:, None] == label[1][None]
    if "masks" in expected and same.any():
        overlaps = np.asarray(rle.iou(found["masks"], expected["masks"], [0] * len(expected["masks"])))
        empty = [[int(rle.area(code)) == 0 for code in one["masks"]] for one in (found, expected)]
        same &= (overlaps >= MASK_OVERLAP) | np.logical_and.outer(*empty)
    return same


def _of_arrays(file: Callable[..., Any]) -> postprocess.Graph:
    """A function of tensors as one of arrays."""

    def call(*arrays: postprocess.Array) -> list[postprocess.Array]:
        made = file(*(torch.from_numpy(np.ascontiguousarray(one)) for one in arrays))
        return [one.numpy() for one in (made if isinstance(made, tuple | list) else (made,))]

    return call
