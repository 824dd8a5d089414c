"""The detection task: masks pasted as the reference does, original coordinates, learning one batch, splits of work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pycocotools import mask as rle
from torch import Tensor

import hcnet_cli.models.hcnet  # noqa: F401 (registers the sizes)
from hcnet_cli import dist, rng
from hcnet_cli.console import UserError
from hcnet_cli.data import embedded
from hcnet_cli.data.loader import EvalLoader, TrainLoader
from hcnet_cli.tasks.detection import coco
from hcnet_cli.tasks.detection.annotations import read_annotations
from hcnet_cli.tasks.detection.folder import load_split
from hcnet_cli.tasks.detection.mask_rcnn import MaskRCNN
from hcnet_cli.tasks.detection.task import DetectionTask, paste_masks

TINY = {
    "fpn_channels": 16,
    "box_head_channels": 32,
    "mask_head_channels": 16,
    "num_mask_convs": 1,
    "anchor_scale": 4.0,
    "rpn_pre_train": 60,
    "rpn_post_train": 40,
    "rpn_pre_test": 60,
    "rpn_post_test": 40,
    "rpn_batch": 32,
    "box_batch": 32,
}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("hcnet_cli.data.embedded.scenes.SCENES", {"train": 24, "val": 16})  # fewer than the real ones
        return embedded.ensure("digit-scenes")


def task_on(root: Path, drop_path_rate: float = 0.0, split: str = "val", **changes: Any) -> tuple[DetectionTask, Any]:
    annotations, images = load_split(root, split)
    torch.manual_seed(0)
    backbone = timm.create_model(
        "hcnet_pico", dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), drop_path_rate=drop_path_rate
    )
    model = MaskRCNN(backbone, num_classes=10, **{**TINY, **changes})
    dataset = coco.CocoDataset(annotations, images, train=split == "train", img_scale=(128, 128))
    task = DetectionTask(
        model,
        truth=read_annotations(annotations.file, scoring=True),
        load_image=dataset.load_image if split == "val" else None,
    )
    return task, dataset


# --- masks into images ------------------------------------------------------------------------------------------------


def paste_by_loops(mask: np.ndarray, box: list[float], height: int, width: int) -> np.ndarray:
    """For each pixel centre the bilinear value of the mask stretched over the box, 0 beyond; at least 0.5."""
    size = len(mask)
    padded = np.pad(mask, 1)
    x1, y1, x2, y2 = box
    image = np.zeros((height, width), dtype=np.uint8)
    for row in range(height):
        for column in range(width):
            u = (column + 0.5 - x1) / (x2 - x1) * size - 0.5 + 1  # in cells of the padded mask
            v = (row + 0.5 - y1) / (y2 - y1) * size - 0.5 + 1
            if not (0 <= u <= size + 1 and 0 <= v <= size + 1):
                continue
            c, r = min(int(u), size), min(int(v), size)
            du, dv = u - c, v - r
            top = padded[r, c] * (1 - du) + padded[r, c + 1] * du
            bottom = padded[r + 1, c] * (1 - du) + padded[r + 1, c + 1] * du
            image[row, column] = top * (1 - dv) + bottom * dv >= 0.5
    return image


def test_pasting_equals_the_double_loop() -> None:
    """Inside, across every border, thinner than a pixel, and outside the image."""
    random = np.random.RandomState(0)
    boxes = [
        [5.3, 6.1, 25.7, 30.2],
        [-8, -3.5, 12, 40],
        [30, 25, 60, 70],
        [10, 10, 10.4, 30],
        [3, 3, 4.2, 4.9],
        [50, 60, 70, 80],
    ]
    masks = random.rand(len(boxes), 28, 28).astype(np.float32)
    codes = paste_masks(torch.tensor(masks), torch.tensor(boxes), 37, 45)
    for mask, box, code in zip(masks, boxes, codes, strict=True):
        assert code["size"] == [37, 45]
        expected = paste_by_loops(mask.astype(np.float64), box, 37, 45)
        assert (rle.decode(code) != expected).sum() <= 1  # one pixel may sit on the threshold in float32


def test_an_empty_box_gives_an_empty_mask() -> None:
    (code,) = paste_masks(torch.ones(1, 28, 28), torch.tensor([[5.0, 5.0, 5.0, 9.0]]), 10, 10)
    assert rle.area(code) == 0


def test_predictions_are_in_the_original_image(scenes: Path) -> None:
    """The same features at another size of the original: boxes scale by its sides, masks have its shape."""
    task, _ = task_on(scenes, score_thresh=0.0)
    task.eval()
    image = torch.randn(3, 64, 96)
    results = []
    for height, width in ((64, 96), (128, 480)):
        target = {"image_id": torch.tensor(1), "orig_size": torch.tensor([height, width])}
        with torch.inference_mode():
            (found,) = task.predict({"image": [image], "target": [target]})
        results.append(found)
        assert all(code["size"] == [height, width] for code in found["masks"])
        for code, box in zip(found["masks"], found["boxes"].tolist(), strict=True):
            x, y, w, h = rle.toBbox(code)
            assert w == 0 or (x >= box[0] - 1 and y >= box[1] - 1 and x + w <= box[2] + 1 and y + h <= box[3] + 1)
    torch.testing.assert_close(results[0]["boxes"] * torch.tensor([5.0, 2.0, 5.0, 2.0]), results[1]["boxes"])


# --- splits of the work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["rpn_head.cls_logits.bias", "box_score.bias", "box_delta.bias"])
def test_outputs_that_are_not_finite_have_no_score(scenes: Path, part: str) -> None:
    """Of the proposals too: no box would be left, and the score would be 0."""
    task, dataset = task_on(scenes)
    torch.nn.init.constant_(task.model.get_parameter(part), torch.nan)
    task.eval()
    with pytest.raises(UserError, match="scores are not finite"), torch.inference_mode():
        task.predict(coco.collate([dataset[0, 0, 0]]))


def test_predictions_do_not_depend_on_the_batch(scenes: Path) -> None:
    """Bit for bit: 1 image or 3 at a time, so any number of processes predicts the same."""
    task, dataset = task_on(scenes)
    task.eval()
    items = [dataset[i, 0, 0] for i in range(3)]
    with torch.inference_mode():
        together = task.predict(coco.collate(items))
        alone = [task.predict(coco.collate([item]))[0] for item in items]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
        assert torch.equal(a["scores"], b["scores"])
        assert a["masks"] == b["masks"]


def test_two_processes_score_as_one(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader split, predictions and metric together, without duplicates, to the last digit."""
    task, dataset = task_on(scenes, score_thresh=0.12, max_detections=5)
    dataset.rows = dataset.rows[:12]
    task.eval()

    def seen_by(rank: int, world_size: int) -> Any:
        evaluator = task.evaluator()
        loader = EvalLoader(dataset, batch_size=4, workers=0, rank=rank, world_size=world_size, collate=coco.collate)
        with torch.inference_mode():
            for batch in loader:
                evaluator.update(task.predict(batch), batch)
        return evaluator

    one = seen_by(0, 1)
    numbers = one.compute()
    both = [seen_by(rank, 2) for rank in range(2)]
    assert len(both[0].found) == len(both[1].found) == 6
    monkeypatch.setattr(dist, "gather", lambda item: [e.found for e in both])
    assert both[0].compute() == numbers
    assert both[0].results_of("mask") == one.results_of("mask")


def gradients_of_a_step(root: Path, accumulate: int, world_size: int) -> list[Tensor]:
    """Averaged over micro-batches and processes, as accumulation and DistributedDataParallel do."""
    task, dataset = task_on(root, drop_path_rate=0.5, split="train")
    task.train()
    for rank in range(world_size):
        loader = TrainLoader(
            dataset,
            batch_size=4,
            accumulate=accumulate,
            total_steps=1,
            seed=0,
            workers=0,
            rank=rank,
            world_size=world_size,
            collate=coco.collate,
            groups=dataset.groups,
        )
        for batch in loader.iterate(0):
            (sum(task(batch).values()) / (accumulate * world_size)).backward()
    return [p.grad for p in task.parameters()]


@pytest.mark.parametrize(("accumulate", "world_size"), [(2, 1), (1, 2), (2, 2)])
def test_micro_batches_and_processes_give_the_gradient_of_one_batch(
    scenes: Path, accumulate: int, world_size: int
) -> None:
    """With drop path, augmentation and proposal sampling on: each follows the sample's key."""
    whole = torch.cat([g.flatten() for g in gradients_of_a_step(scenes, 1, 1)])
    split = torch.cat([g.flatten() for g in gradients_of_a_step(scenes, accumulate, world_size)])
    assert (whole - split).norm() < 1e-4 * whole.norm()


def test_losses_follow_the_keys_and_torch_s_generator_is_not_touched(scenes: Path) -> None:
    task, dataset = task_on(scenes, drop_path_rate=0.5, split="train")
    batch = coco.collate([dataset[i, i, 0] for i in range(2)])
    task.train()
    before = torch.get_rng_state()
    first, again = task(batch), task(batch)
    assert torch.equal(before, torch.get_rng_state())
    assert first == again
    assert set(first) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"}
    other = task({**batch, "key": batch["key"] + 1})
    assert other["loss_cls"] != first["loss_cls"]


# --- learning ---------------------------------------------------------------------------------------------------------


def test_one_batch_is_learnt(scenes: Path, tmp_path: Path) -> None:
    """Targets, losses, decoding, pasting and scoring fit together: memorised scenes reach a high AP."""
    annotations, images = load_split(scenes, "val")
    train = coco.CocoDataset(annotations, images, train=True, img_scale=(128, 128), hflip=0)
    task, dataset = task_on(scenes, fpn_channels=32, mask_head_channels=32, box_head_channels=64)
    batch = coco.collate([train[i, 0, 0] for i in range(2)])
    chosen = train.rows[:2]
    optimizer = torch.optim.AdamW(task.parameters())
    task.train()
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 10) * (0.1 if step > 150 else 1)
        loss = sum(task({**batch, "key": torch.tensor([rng.derive(step, i) for i in range(2)])}).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.eval()
    data = json.loads(annotations.file.read_text())
    ids = {int(annotations.image_ids[i]) for i in chosen}
    data["images"] = [i for i in data["images"] if i["id"] in ids]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
    file = tmp_path / "two.json"
    file.write_text(json.dumps(data))
    task.scoring["truth"] = read_annotations(file, scoring=True)
    evaluator = task.evaluator()
    with torch.inference_mode():
        for i in chosen:
            batch = coco.collate([dataset[int(i), 0, 0]])
            evaluator.update(task.predict(batch), batch)
    numbers = evaluator.compute()
    assert numbers["box_AP"] > 90
    assert numbers["mask_AP"] > 80
