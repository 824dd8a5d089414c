"""Object detection and instance segmentation: Mask R-CNN's losses, detections in the original image, COCO AP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor, nn

from hcnet_cli import pictures
from hcnet_cli.data.images import to_picture
from hcnet_cli.data.loader import Collate, RequestDataset
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.engine import Task
from hcnet_cli.profile import count_macs as macs_of
from hcnet_cli.rng import keyed_uniform
from hcnet_cli.schema import NORMALISATION, DataPart, EvaluationPart, Part
from hcnet_cli.tasks.detection.annotations import Annotations
from hcnet_cli.tasks.detection.coco import CocoSplits
from hcnet_cli.tasks.detection.mask_rcnn import MaskRCNN
from hcnet_cli.tasks.detection.metric import Backend, CocoAP
from hcnet_cli.tasks.detection.spec import Coco, DetectionEvaluation
from hcnet_cli.tasks.detection.spec import MaskRCNN as Head

BATCH_TILE = 320  # pixels, the side of an image in the picture of a batch


class DetectionTask(Task):
    """Mask R-CNN (or Faster R-CNN, if the model has no masks) on COCO-format data.

    A batch: `image`, a list of [3, H, W], normalised; `target`, a list of dicts (training: boxes, labels, masks;
    evaluation: image_id, orig_size); `key` [B]. The other arguments go to the evaluator, metric.CocoAP; without `truth`
    the task predicts, and has none. `drawing`: class names, mean and std of the pixels, for pictures of batches.
    """

    model: MaskRCNN
    primary = "box_AP"
    protocol = ""

    def __init__(
        self,
        model: MaskRCNN,
        *,
        truth: Annotations | None = None,
        backend: Backend = "faster-coco-eval",
        load_image: Callable[[int], Image.Image] | None = None,
        num_pictures: int = 8,
        drawing: tuple[Sequence[str], Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.drawing = drawing
        self.scoring: dict[str, Any] = {
            "truth": truth,
            "masks": model.with_masks,
            "backend": backend,
            "load_image": load_image,
            "num_pictures": num_pictures,
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """loss_rpn_cls, loss_rpn_box, loss_cls, loss_box and (with masks) loss_mask; all weights are 1."""
        keys = batch["key"]
        noise = keyed_uniform(keys, self.model.backbone.num_blocks) if self.model.pyramid.takes_noise else None

        def uniform(image: int, number: int, stream: int) -> Tensor:
            return keyed_uniform(keys[image : image + 1], number, stream)[:, 0]

        return self.model(batch["image"], batch["target"], noise=noise, uniform=uniform)

    def predict(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """For each image boxes, scores, labels and masks (COCO RLE) in the coordinates of the original image.

        One image at a time, as the reference tests: in a batch an image is padded to its neighbours' size, which
        changes its features, and the numbers would depend on how the data was split over batches and processes.
        """
        predictions = []
        for image, target in zip(batch["image"], batch["target"], strict=True):
            (found,) = self.model([image])
            height, width = target["orig_size"].tolist()
            scale = found["boxes"].new_tensor([width / image.shape[2], height / image.shape[1]] * 2)
            prediction: dict[str, Any] = {**found, "boxes": found["boxes"] * scale}
            if "masks" in found:
                prediction["masks"] = paste_masks(found["masks"], prediction["boxes"], height, width)
            predictions.append(prediction)
        return predictions

    def draw_batch(self, batch: dict[str, Any], caption: str) -> Image.Image | None:
        """See engine.Task: the images with their boxes, masks and names."""
        if self.drawing is None:
            return None
        class_names, mean, std = self.drawing
        colours = pictures.palette(len(class_names)).tolist()
        tiles = []
        for image, target in zip(batch["image"], batch["target"], strict=True):
            boxes, labels = target["boxes"].cpu(), (target["labels"] - 1).tolist()
            corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
            masks = target["masks"].cpu().numpy().astype(np.uint8) if "masks" in target else [None] * len(labels)
            objects = [
                pictures.DrawnObject(class_names[label], tuple(colours[label]), tuple(box), mask)
                for label, box, mask in zip(labels, corners, masks, strict=True)
            ]
            canvas = pictures.draw_objects(to_picture(image, mean, std), objects, BATCH_TILE)
            count = f"{len(objects)} object{'' if len(objects) == 1 else 's'}, {image.shape[2]} x {image.shape[1]}"
            tiles.append(pictures.tile(canvas, [(count, pictures.GREY)], BATCH_TILE))
        return pictures.grid(tiles, 4, caption)

    def evaluator(self) -> CocoAP:
        return CocoAP(**self.scoring)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """Masks [N, 28, 28] of boxes [N, 4] -> N compressed RLEs of an image, probability 0.5 and above.

    Bilinear, pixel centres at .5 and 0 beyond the mask's edge, as the reference. Only the box's surroundings are
    interpolated, one object at a time, so memory is that of one mask.
    """
    masks, boxes = masks.float().cpu(), boxes.float().cpu()
    pasted = []
    for mask, box in zip(masks, boxes, strict=True):
        x1, y1, x2, y2 = box.tolist()
        left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
        right, bottom = min(int(x2) + 2, width), min(int(y2) + 2, height)
        full = np.zeros((height, width), dtype=np.uint8, order="F")  # column by column, as RLE runs
        if x2 > x1 and y2 > y1 and right > left and bottom > top:
            x = (torch.arange(left, right) + 0.5 - x1) / (x2 - x1) * 2 - 1
            y = (torch.arange(top, bottom) + 0.5 - y1) / (y2 - y1) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [h, w, 2]
            values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
            full[top:bottom, left:right] = (values >= 0.5).numpy()
        pasted.append(rle.encode(full))
    return pasted


class _Cost(nn.Module):
    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> None:
        self.model.forward_dummy(image)


def count_macs(task: DetectionTask, size: tuple[int, int] = (800, 1280)) -> int:
    """Multiply-accumulates by the convention of the papers' COCO tables, for one image of `size` (height, width).

    Backbone, FPN, RPN, box head on 1000 RoIs and mask head on 100; convolutions, linear layers and matrix products.
    """
    return macs_of(_Cost(task.model), torch.empty(1, 3, *size, device="meta"))


def build_task(
    head: Part,
    config: DataPart,
    evaluation: EvaluationPart,
    data: DataSplits,
    backbone: Callable[[int], nn.Module],
    micro_batch: int,
) -> DetectionTask:
    """See hcnet_cli/build.py."""
    assert isinstance(head, Head)
    assert isinstance(data, CocoSplits)
    model = MaskRCNN(backbone(0), data.info.num_classes, **head.model_dump())
    return _task(model, evaluation, data)


def _task(model: MaskRCNN, evaluation: EvaluationPart, data: CocoSplits) -> DetectionTask:
    assert isinstance(evaluation, DetectionEvaluation)
    return DetectionTask(
        model,
        truth=data.annotations,
        backend=evaluation.backend,
        load_image=data.val.load_image,
        drawing=(data.class_names, data.val.mean, data.val.std),
    )


def build_evaluation(
    task: DetectionTask, config: DataPart, entry: EvaluationPart, first: EvaluationPart, data: DataSplits
) -> tuple[DetectionTask, RequestDataset, Collate | None]:
    """See hcnet_cli/build.py."""
    assert isinstance(entry, DetectionEvaluation)
    assert isinstance(data, CocoSplits)
    view = task if entry is first else _task(task.model, entry, data)
    if entry.img_scale is None:
        return view, data.val, data.val_collate
    view.protocol = f"{entry.img_scale[0]}x{entry.img_scale[1]}"
    return view, data.val.at_scale(entry.img_scale), data.val_collate


def describe_input(config: DataPart, evaluation: EvaluationPart) -> dict[str, Any]:
    """How an image is rescaled and normalised for evaluation."""
    assert isinstance(config, Coco)
    assert isinstance(evaluation, DetectionEvaluation)
    return {
        "img_size": list(evaluation.img_scale or config.img_scale),  # long and short side of the frame it is to fit
        "interpolation": "bilinear, no antialiasing",
        "mean": list(config.mean),
        "std": list(config.std),
        "normalisation": NORMALISATION,
        "crop_pct": 1.0,
    }
