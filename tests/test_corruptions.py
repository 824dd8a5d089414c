"""The corruptions do what their table says, measured on pixels; what is random is the image's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_data
import torch
from PIL import Image

from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.tasks.classification.augment import eval_transform
from hcnet_cli.tasks.classification.corruptions import GROUPS, STRENGTHS, CorruptedImages, corrupt


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize("severity", [1, 2])
def test_noise_has_its_deviation(severity: int) -> None:
    grey = Image.new("RGB", (120, 100), (128, 128, 128))
    noise = (pixels(corrupt(grey, "noise", severity, 1)) - 128) / 255
    expected = STRENGTHS["noise"][severity - 1]
    assert abs(noise.mean()) < 0.005
    inside = abs(noise) < 0.49  # what is beyond black and white is cut
    assert inside.mean() > 0.99
    assert noise.std() == pytest.approx(expected, rel=0.03)


def test_blur_spreads_a_point_by_its_deviation() -> None:
    point = Image.new("RGB", (101, 101))
    for x in range(48, 53):
        for y in range(48, 53):
            point.putpixel((x, y), (255, 255, 255))
    weights = pixels(corrupt(point, "blur", 3, 0))[..., 0]
    places = np.arange(101) - 50
    variance = (weights.sum(axis=0) * places**2).sum() / weights.sum()
    before = 2.0  # of five pixels side by side: (25 - 1) / 12
    assert variance - before == pytest.approx((0.04 * 101) ** 2, rel=0.15)


def test_contrast_scales_the_differences_to_the_mean() -> None:
    ramp = Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(4, axis=0))
    for severity, factor in enumerate(STRENGTHS["contrast"], 1):
        found = pixels(corrupt(ramp, "contrast", severity, 0))[0, :, 0]
        assert found == pytest.approx(100 + factor * (np.arange(200) - 100), abs=1.5)


def test_pixels_of_pixelate_are_means() -> None:
    random = np.random.RandomState(0)
    image = Image.fromarray(random.randint(0, 255, (8, 8, 3)).astype(np.uint8))
    found = pixels(corrupt(image, "pixelate", 1, 0))
    means = pixels(image).reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert found == pytest.approx(means.repeat(2, axis=0).repeat(2, axis=1), abs=1.01)  # rounded after each direction


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_higher_severity_changes_more(name: str) -> None:
    random = np.random.RandomState(1)
    coarse = Image.fromarray(random.randint(0, 255, (8, 8, 3)).astype(np.uint8))
    image = coarse.resize((64, 48), Image.Resampling.BICUBIC)
    changes = [np.abs(pixels(corrupt(image, name, severity, 3)) - pixels(image)).mean() for severity in (1, 2, 3)]
    assert 0 < changes[0] < changes[1] < changes[2]
    assert corrupt(image, name, 1, 3).size == image.size


def test_each_image_has_its_own_noise_in_whatever_order_it_is_read(tmp_path: Path) -> None:
    same = small_data.noise(5)
    data = small_data.opened(small_data.classes(tmp_path / "two", pixels=lambda seed: same), img_size=32)
    images = CorruptedImages(data.val, eval_transform(img_size=32))  # type: ignore[arg-type]
    assert len(images) == 2 * 15
    order = [7, 0, 1, 29, 0]
    read = {i: images[SampleRequest(i, 0, 0)] for i in order}
    again = {i: images[SampleRequest(i, 0, 0)] for i in sorted(set(order))}
    for i, item in again.items():
        assert torch.equal(item["image"], read[i]["image"])
        assert (item["sample"], item["target"]) == (i, i % 2)
    assert GROUPS[0] == ("noise", "1")
    assert not torch.equal(again[0]["image"], again[1]["image"])  # the same pixels, another image
    plain = data.val.with_transform(eval_transform(img_size=32))[SampleRequest(1, 0, 0)]["image"]  # type: ignore[attr-defined]
    expected = corrupt(Image.fromarray(plain.numpy()), "jpeg", 3, 0)
    assert np.array_equal(again[29]["image"].numpy(), np.asarray(expected))
    assert images.sample_name(29) == data.val.sample_name(1)  # type: ignore[attr-defined]
