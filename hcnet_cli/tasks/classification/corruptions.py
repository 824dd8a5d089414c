"""Corruptions that are computed here, by Pillow and numpy, on the image that the model sees. They are not ImageNet-C.

Lengths are shares of the image's side, so that small and large images suffer alike. What is random is drawn for each
corruption, severity and image, the same in every run.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.data import Dataset

from hcnet_cli import rng
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.tasks.classification.augment import Transform
from hcnet_cli.tasks.classification.image_folder import ImageFolder

STRENGTHS = {  # at severity 1, 2 and 3
    "noise": (0.08, 0.16, 0.32),  # standard deviation of Gaussian noise, of values in 0..1
    "blur": (0.01, 0.02, 0.04),  # standard deviation of a Gaussian blur over the side
    "contrast": (0.5, 0.3, 0.15),  # factor on the differences to the mean grey
    "pixelate": (0.5, 0.35, 0.2),  # side in pixels over the image's own
    "jpeg": (30, 15, 7),  # quality
}
GROUPS = tuple((name, str(severity)) for name in STRENGTHS for severity in (1, 2, 3))


def corrupt(image: Image.Image, name: str, severity: int, key: int) -> Image.Image:
    """An RGB image after a corruption of STRENGTHS at severity 1 to 3, of the same size."""
    strength = STRENGTHS[name][severity - 1]
    if name == "noise":
        # numpy guarantees that the stream of RandomState never changes
        random = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
        noisy = np.asarray(image, dtype=np.float64) + 255 * strength * random.normal(size=(*image.size[::-1], 3))
        return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    if name == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength * min(image.size)))
    if name == "contrast":
        return ImageEnhance.Contrast(image).enhance(strength)
    if name == "pixelate":
        width, height = (max(1, round(strength * side)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(strength))
    with Image.open(file, formats=["JPEG"]) as made:
        return made.convert("RGB")


class CorruptedImages(Dataset[dict[str, Any]]):
    """The images of a split once for each of GROUPS; sample g N + i is image i of N under corruption g."""

    def __init__(self, images: ImageFolder, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(GROUPS) * len(self.images)

    def sample_name(self, sample: int) -> str:
        return self.images.sample_name(sample % len(self.images))

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        group, index = divmod(request.index, len(self.images))
        name, severity = GROUPS[group]
        key = rng.derive("corruptions", name, severity, index)
        last = functools.partial(corrupt, name=name, severity=int(severity), key=key)
        images = self.images.with_transform(Transform([*self.transform.parts, last]))
        return {**images[SampleRequest(index, request.key, request.step_key)], "sample": request.index}
