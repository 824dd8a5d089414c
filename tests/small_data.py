"""Tiny data sets in the three layouts, and how training opens them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hcnet_cli import build
from hcnet_cli import recipe as rcp
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.inputs import task_of
from hcnet_cli.tasks import TASKS

CATEGORIES = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
Pixels = Callable[[int], NDArray[Any]]


def noise(seed: int) -> NDArray[Any]:
    return np.random.RandomState(seed).randint(0, 255, (40, 40, 3)).astype(np.uint8)


def save(path: Path, seed: int, pixels: Pixels = noise) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)


def classes(root: Path, pixels: Pixels = noise, suffix: str = "bmp") -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            save(root / split / "ab"[number % 2] / f"{number}.{suffix}", number + 10 * count, pixels)
    return root


def coco(
    root: Path,
    pixels: Pixels = noise,
    suffix: str = "bmp",
    change: Callable[[str, dict[str, Any]], object] = lambda split, content: None,
) -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 4), ("val", 2)):
        images, objects = [], []
        for i in range(count):
            save(root / f"{split}2017/{i}.{suffix}", i + 10 * count, pixels)
            images.append({"id": i, "file_name": f"{i}.{suffix}", "width": 40, "height": 40})
            objects.append(
                {"id": i + 1, "image_id": i, "category_id": 1 + i % 2, "bbox": [4, 4, 9, 9], "area": 81, "iscrowd": 0}
            )
        content = {"images": images, "annotations": objects, "categories": copy.deepcopy(CATEGORIES)}
        change(split, content)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


def some_labels(seed: int) -> NDArray[Any]:
    return np.random.RandomState(seed).randint(1, 4, (40, 40)).astype(np.uint8)


def scenes(root: Path, pixels: Pixels = noise, suffix: str = "bmp", labels: Pixels = some_labels) -> Path:
    for split, count in (("training", 4), ("validation", 2)):
        for i in range(count):
            save(root / f"images/{split}/{i}.{suffix}", i + 10 * count, pixels)
            save(root / f"annotations/{split}/{i}.png", i, labels)
    (root / "classes.txt").write_text("road\ntree\ncar\n")
    return root


MAKERS: dict[str, Callable[..., Path]] = {"classes": classes, "coco": coco, "scenes": scenes}


def opened(root: Path, **data: object) -> DataSplits:
    """The data sets of a folder, with the recipe of the task's embedded data and values for its data section."""
    task = task_of(str(root))
    file = rcp.recipe_file(TASKS[task].embedded, task)
    settings = {"data.path": str(root), **{f"data.{key}": value for key, value in data.items()}}
    if "with_masks" in TASKS[task].heads[next(iter(TASKS[task].heads))].model_fields:
        settings["head.with_masks"] = False
    given = [(key, value, "test") for key, value in settings.items()]
    return build.open_data(rcp.resolve(file, given).recipe)


def evaluate_and_predict(hcnet: Callable[..., Any], run: Path, on: str, folder: Path) -> None:
    """What follows on training, as typed: the score is the record's, and photos have predictions."""
    done = hcnet("evaluate", run, "--on", on, "--workers", 0)
    assert done.code == 0, done.err
    assert "Equal to the run's record." in done.err
    for number, size in enumerate(((90, 50), (64, 64))):
        path = folder / "photos" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(number)).resize(size).save(path)
    done = hcnet("predict", run, folder / "photos", "--output", folder / "predictions", "--workers", 0)
    assert done.code == 0, done.err
    kept = {path.name for path in (folder / "predictions").iterdir()} - {"pictures"}
    said = next(line for line in done.err.splitlines() if line.startswith("Wrote "))
    assert all(str(folder / "predictions" / name) in said for name in kept), (kept, said)
    assert {path.name for path in (folder / "predictions" / "pictures").iterdir()} == {"0.png", "1.png"}
