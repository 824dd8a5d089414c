"""An image with its objects, and how flip, resize and crop move them together."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hcnet_cli.data import images
from hcnet_cli.data.images import Size


class Scene(NamedTuple):
    """An image and its objects."""

    image: Tensor  # [3, H, W] uint8
    boxes: Tensor  # [G, 4] float32
    labels: Tensor  # [G] int64
    masks: Tensor | None  # [G, H, W] uint8


def flip(scene: Scene) -> Scene:
    """Left and right exchanged."""
    width = scene.image.shape[2]
    x1, y1, x2, y2 = scene.boxes.unbind(1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    masks = None if scene.masks is None else scene.masks.flip(2)
    return Scene(scene.image.flip(2), boxes, scene.labels, masks)


def resize(scene: Scene, size: Size) -> Scene:
    """The image bilinear without antialiasing, masks nearest, boxes clipped to the image."""
    (height, width), (old_height, old_width) = size, scene.image.shape[1:]
    scale = torch.tensor([width / old_width, height / old_height] * 2, dtype=torch.float32)
    limit = torch.tensor([width, height] * 2, dtype=torch.float32)
    boxes = (scene.boxes * scale).clamp(min=0).minimum(limit)
    masks = scene.masks
    if masks is not None:
        masks = F.interpolate(masks[None], size)[0] if len(masks) else masks.new_zeros(0, height, width)
    return Scene(images.resize(scene.image, size), boxes, scene.labels, masks)


def crop(scene: Scene, y: int, x: int, height: int, width: int) -> Scene:
    """The window at (y, x). Boxes are clipped to it; those left without area go, with their labels and masks."""
    limit = torch.tensor([width, height] * 2, dtype=torch.float32)
    boxes = (scene.boxes - torch.tensor([x, y, x, y])).clamp(min=0).minimum(limit)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    masks = None if scene.masks is None else scene.masks[keep, y : y + height, x : x + width]
    return Scene(scene.image[:, y : y + height, x : x + width], boxes[keep], scene.labels[keep], masks)


def random_window(size: Size, sides: tuple[int, int]) -> tuple[int, int, int, int]:
    """A window (y, x, height, width) of an image: each side uniform in `sides` where the image allows, anywhere in it.

    Draws from Python's global generator.
    """
    low, high = sides
    height, width = (random.randint(min(side, low), min(side, high)) for side in size)
    y, x = random.randint(0, size[0] - height), random.randint(0, size[1] - width)
    return y, x, height, width
