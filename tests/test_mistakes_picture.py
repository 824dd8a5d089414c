"""Protects the picture of a classifier's worst mistakes: which they are, by a sum over all images, for any batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hcnet_cli import pictures
from hcnet_cli.tasks.classification.metric import Accuracy
from hcnet_cli.tasks.classification.mistakes import MOST, Mistake, draw_mistakes


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_the_worst_mistakes_of_all_images_are_drawn(batch_size: int, tmp_path: Path) -> None:
    scores = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 4
    read: list[int] = []

    def load(sample: int) -> Image.Image:
        read.append(sample)
        return Image.new("RGB", (20, 30), (sample, 0, 0))

    evaluator = Accuracy(4, list("abcd"), str, load)
    for start in range(0, 200, batch_size):
        part = slice(start, start + batch_size)
        evaluator.update(scores[part], {"target": labels[part], "sample": torch.arange(200)[part]})
    evaluator.compute()
    evaluator.save(tmp_path)
    shares = np.exp(scores.numpy().astype(np.float64))
    shares /= shares.sum(1, keepdims=True)
    wrong = [i for i in range(200) if shares[i].argmax() != labels[i]]
    assert read == sorted(wrong, key=lambda i: -shares[i].max())[:MOST]
    for one in evaluator.mistakes:
        assert (one.of_answer, one.of_label) == pytest.approx((shares[one.sample].max(), shares[one.sample, one.label]))
    with Image.open(tmp_path / "mistakes.png") as image:
        assert image.width > image.height > 500


def test_captions_name_the_folder_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    tile = pictures.tile
    monkeypatch.setattr(pictures, "tile", lambda image, lines: [captions.append(lines[-1][0]), tile(image, lines)][1])
    found = [Mistake(0, 0, 1, 0.9, 0.1), Mistake(1, 1, 0, 0.8, 0.2)]
    names = ["val/apple/img_001.jpg", "val/brick/img_001.jpg"]
    draw_mistakes(found, ["apple", "brick"], lambda sample: Image.new("RGB", (8, 8)), names.__getitem__)
    assert captions == ["apple/img_001.jpg", "brick/img_001.jpg"]


def test_without_a_mistake_there_is_no_picture(tmp_path: Path) -> None:
    evaluator = Accuracy(2, ["a", "b"], str, lambda sample: Image.new("RGB", (8, 8)))
    evaluator.update(torch.eye(2), {"target": torch.arange(2), "sample": torch.arange(2)})
    evaluator.compute()
    evaluator.save(tmp_path)
    assert not (tmp_path / "mistakes.png").exists()
