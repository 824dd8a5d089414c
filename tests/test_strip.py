"""Protects progress.png: a row for each evaluation, thinned evenly, always of the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_coco_ap import scored, world

from hcnet_cli import pictures
from hcnet_cli.engine.strip import IMAGES, ROWS, DrawsStrip, add_row
from hcnet_cli.tasks.classification.metric import Accuracy
from hcnet_cli.tasks.segmentation.metric import MeanIoU

__all__ = ["world"]  # a fixture


class Grey:
    """Draws a row of one grey."""

    def __init__(self, grey: int) -> None:
        self.grey = grey

    def strip(self) -> list[tuple[Image.Image, Image.Image]]:
        return [tuple(Image.new("RGB", (40, 40), (value,) * 3) for value in (255, self.grey))] * 2  # type: ignore[list-item]


def rows(run: Path) -> list[int]:
    return [int(file.name[:6]) for file in sorted((run / "progress").glob("0*.jpg"))]


def test_rows_are_thinned_evenly_and_the_last_is_there(tmp_path: Path) -> None:
    expected = {
        1: [1],
        11: list(range(1, 12)),
        12: [*range(2, 13, 2)],
        13: [*range(2, 13, 2), 13],
        48: [*range(8, 49, 8)],
    }
    for number in range(1, 49):
        add_row(tmp_path, Grey(number), 10 * number, number, "top1 1.0")
        if number in expected:
            assert rows(tmp_path) == expected[number]
        assert len(rows(tmp_path)) <= ROWS
    with Image.open(tmp_path / "progress.png") as image:
        assert image.height == (len(rows(tmp_path)) + 1) * 48
        column = np.asarray(image.convert("L"))[24::48, 150]
        assert np.abs(column.astype(int) - [255, *rows(tmp_path)]).max() <= 2  # in order, below the truth


def test_a_run_that_went_back_draws_later_rows_again(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        add_row(tmp_path, Grey(50), 10 * number, number, "")
    add_row(tmp_path, Grey(200), 20, 2, "")
    assert rows(tmp_path) == [1, 2]
    with Image.open(tmp_path / "progress.png") as image:
        assert np.asarray(image.convert("L"))[24 + 2 * 48, 150] == pytest.approx(200, abs=2)


def test_every_task_draws_the_same_images_each_time(world: Any, tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    noise = Image.fromarray(random.randint(0, 255, (60, 80, 3)).astype(np.uint8))
    read: list[int] = []

    def load(number: int) -> Image.Image:
        read.append(number)
        return noise

    detection = scored(*world, load_image=load)
    detection.compute()
    classifier = Accuracy(3, list("abc"), str, load)
    order = torch.from_numpy(random.permutation(20))  # as several processes hand them in
    classifier.update(torch.eye(3)[order % 3], {"target": order % 2, "sample": order})
    classifier.compute()
    scenes = MeanIoU(["a", "b"], read=lambda path: noise)
    maps = [torch.zeros(60, 80, dtype=torch.uint8)] * 9
    batch = {"label": maps, "sample": torch.arange(9), "path": [f"{n}.png" for n in range(9)]}
    scenes.update(maps, batch)
    scenes.compute()
    for evaluator in (detection, classifier, scenes):
        assert isinstance(evaluator, DrawsStrip)
        read.clear()
        pairs = evaluator.strip()
        assert len(pairs) == IMAGES
        assert len({true.size for true, _ in pairs}) == len({found.size for _, found in pairs}) == 1
        assert all(true.width == found.width == pictures.SMALL for true, found in pairs)
        if evaluator is detection:
            assert read == detection.truth.image_ids[:IMAGES].tolist()
        elif evaluator is classifier:
            assert read == [0, 2, 5, 7, 10, 12, 15, 17]
            answers = [found.getpixel((1, 1)) for _, found in pairs]
            right = [n % 3 == n % 2 for n in read]
            assert [one[1] > one[0] for one in answers] == right  # type: ignore[index]  # green, not red


def test_segmentation_names_its_colours_below_the_rows(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 80, 3)).astype(np.uint8))
    scenes = MeanIoU(["sky", "tree", "road"], read=lambda path: noise)
    labels = [torch.full((60, 80), n % 2, dtype=torch.uint8) for n in range(3)]
    labels[0][:5] = scenes.ignore_index
    predictions = [label.clamp(max=1) for label in labels]
    scenes.update(predictions, {"label": labels, "sample": torch.arange(3), "path": [f"{n}.png" for n in range(3)]})
    scenes.compute()
    names = scenes.strip_legend()
    assert [name for name, _ in names] == ["sky", "tree", "road", "ignored"]
    assert names[1][1] == tuple(pictures.palette(3)[1].tolist())
    add_row(tmp_path, scenes, 10, 1, "mIoU 1.0")
    with Image.open(tmp_path / "progress.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[2 * (pictures.SMALL + 8) :] == names[2][1]).all(-1).any()  # a class that is in no image too
