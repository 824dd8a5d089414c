"""Protects the first minute of a run: batches.png shows what the model gets, training does not notice, and the card of
the data is what was counted.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, Hcnet, only_run, outcome
from PIL import Image
from pydantic import ValidationError
from small_data import MAKERS, classes, coco, scenes
from torch import Tensor

from hcnet_cli import build, engine, first_batches, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.data.images import normalise, to_picture
from hcnet_cli.engine import loop
from hcnet_cli.inputs import task_of
from hcnet_cli.record import DataCard
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.classification.augment import collate, make_mixup, mix
from hcnet_cli.tasks.classification.task import ClassificationTask, mixed_classes

MIXING = {"data.mixup": 0.8, "data.cutmix": 1.0, "data.mixup_prob": 1.0, "data.smoothing": 0.1}
MODEL = {"model.depths": [1, 1, 1, 1], "model.dims": [8, 8, 16, 16], "train.workers": 0, "train.precision": "fp32"}


def job_on(root: Path, **more: Any) -> tuple[engine.Job, Any]:
    """The job of a run on a small folder, with the recipe of its task's embedded data."""
    task = task_of(str(root))
    settings = {**MODEL, "data.path": str(root), "train.batch_size": 4, **more}
    if "with_masks" in TASKS[task].heads[next(iter(TASKS[task].heads))].model_fields:
        settings["head.with_masks"] = False
    file = rcp.recipe_file(TASKS[task].embedded, task)
    recipe = rcp.resolve(file, [(key, value, "test") for key, value in settings.items()]).recipe
    data = build.open_data(recipe)
    return build.build_job(recipe, data, build.build_task(recipe, data), torch.device("cpu")), data


@pytest.mark.parametrize("maker", MAKERS)
def test_batches_are_drawn_once_and_take_no_randomness(maker: str, tmp_path: Path) -> None:
    job, _ = job_on(MAKERS[maker](tmp_path / "data"))
    folder = runs.RunFolder(tmp_path)
    states: list[Callable[[], Any]] = [
        random.getstate, lambda: np.random.get_state()[1].tolist(), lambda: torch.get_rng_state().tolist()
    ]  # type: ignore[index]  # fmt: skip
    before = [state() for state in states]
    first_batches.draw_batches(job, folder)
    assert [state() for state in states] == before
    with Image.open(folder.batches_file) as image:
        assert min(image.size) > 400
    folder.batches_file.write_bytes(b"kept")
    first_batches.draw_batches(job, folder)  # as a run that goes on does
    assert folder.batches_file.read_bytes() == b"kept"
    folder.clear()
    assert not folder.batches_file.exists()


def test_with_and_without_the_pictures_the_weights_have_the_same_bytes(
    hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = classes(tmp_path / "data")
    sets = [word for key, value in MIXING.items() for word in ("--set", f"{key}={value}")]
    command = ("pretrain", "--recipe", "digits", *SMALL_MODEL, "--epochs", "2", "--set", "data.img_size=16", *sets)
    command = (*command, "--device", "cpu", "--precision", "fp32", "--workers", "0", "--batch-size", "2")
    done = hcnet(*command, "--data", root, "--out", tmp_path / "with")
    assert done.code == 0, done.err
    drawn = only_run(tmp_path / "with")
    assert "The first batches, as the model gets them" in done.err
    assert "Training data: 2 classes of 2 images each; 40 x 40 pixels, of 4 images." in done.err
    assert (drawn / "batches.png").exists()
    assert (drawn / "progress.png").exists()
    assert [file.name for file in sorted((drawn / "progress").iterdir())] == [
        "000001-2.jpg",
        "000002-4.jpg",
        "truth.jpg",
    ]
    monkeypatch.setattr(first_batches, "draw_batches", lambda job, folder: None)
    monkeypatch.setattr(loop, "add_row", lambda *_: None)
    assert hcnet(*command, "--data", root, "--out", tmp_path / "without").code == 0
    plain = only_run(tmp_path / "without")
    assert not [*plain.glob("*.png"), *plain.glob("progress")]
    assert outcome(drawn) == outcome(plain)


def test_a_picture_that_fails_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job, _ = job_on(classes(tmp_path / "data"))

    def broken(batch: Any, caption: str) -> Image.Image:
        raise IndexError("no such class")

    job.task.draw_batch = broken  # type: ignore[method-assign]
    first_batches.draw_batches(job, runs.RunFolder(tmp_path))
    assert "warning: " in (said := capfd.readouterr().err)
    assert "no such class. No score depends on it." in said
    assert not (tmp_path / "batches.png").exists()


# --- what they show ---------------------------------------------------------------------------------------------------


def test_part_of_a_mixed_batch_is_mixed_as_the_whole(tmp_path: Path) -> None:
    """The ends of a batch, read and mixed alone, are the images that the model gets in the first steps."""
    job, _ = job_on(classes(tmp_path / "data"), **MIXING)
    assert isinstance(job.task, ClassificationTask)
    assert job.task.mixup is not None
    for whole, (part, size) in zip(job.train.iterate(0), job.train.first(3, 2), strict=False):
        assert (size, len(part["sample"])) == (4, 2)
        images, target = mix(job.task.normalise(whole), whole["target"], whole["step_key"], job.task.mixup)
        shown, labels = mix(job.task.normalise(part), part["target"], part["step_key"], job.task.mixup)
        assert torch.equal(shown, images[[0, 3]])
        assert torch.equal(labels, target[[0, 3]])


def test_shares_in_a_label_are_those_of_the_pixels() -> None:
    """Images of one value each, mixed by timm: the share of the first is read off the pixels."""
    mixup = make_mixup(5, smoothing=0.1)
    assert mixup is not None
    target = torch.tensor([3, 1, 4, 0])
    for key in range(20):
        images = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(3, 32, 32, 1).permute(3, 0, 1, 2).contiguous()
        mixed, soft = mix(images, target, key, mixup)
        for i, (first, second, share) in enumerate(mixed_classes(target, soft, mixup)[:2]):
            assert (first, second) == (target[i], target[3 - i])
            assert share == pytest.approx(mixed[i].mean().item(), abs=1e-5)


def test_a_picture_undoes_the_normalisation() -> None:
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    shown = to_picture(normalise(pixels, mean, std), mean, std)
    assert np.array_equal(np.asarray(shown), pixels.permute(1, 2, 0).numpy())


def test_labels_of_a_mixed_batch_name_both_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = first_batches.pictures.tile

    def tile(image: Image.Image, lines: list[tuple[str, Any]], *rest: Any) -> Image.Image:
        seen.append(" ".join(text for text, _ in lines))
        return real(image, lines, *rest)

    monkeypatch.setattr(first_batches.pictures, "tile", tile)
    normalise_ = build_normalise()
    task = ClassificationTask(
        torch.nn.Identity(), ["cat", "dog"], normalise_, make_mixup(2, cutmix=0.0, smoothing=0.0), 0.0
    )
    items = [
        {"image": torch.zeros(8, 8, 3, dtype=torch.uint8), "target": i, "sample": i, "key": i, "erased": []}
        for i in range(2)
    ]
    batch: dict[str, Any] = {**collate(items), "step_key": 5}
    task.draw_batch(batch, "Step 1")
    shares: list[Tensor] = list(mix(torch.zeros(2, 3, 8, 8), batch["target"], 5, task.mixup)[1])
    assert seen == [
        f"{shares[0][0]:.2f} cat + {shares[0][1]:.2f} dog",
        f"{shares[1][1]:.2f} dog + {shares[1][0]:.2f} cat",
    ]


def build_normalise() -> Any:
    from hcnet_cli.tasks.classification.augment import Normalise

    return Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --- the card ---------------------------------------------------------------------------------------------------------


def test_cards_are_what_is_in_the_data(tmp_path: Path) -> None:
    """Counts by hand of images, objects and pixels."""
    root = classes(tmp_path / "classes")
    Image.new("RGB", (30, 50)).save(root / "train/a/wide.png")
    card = first_batches.describe_data(job_on(root)[1])
    assert (card.classes, card.unit, card.imbalance) == ({"a": 3, "b": 2}, "images", 1.5)
    assert (card.width, card.height, card.sized) == ((30, 40, 40), (40, 40, 50), 5)
    assert card.size_text() == "30 to 40 (median 40) x 40 to 50 (median 40) pixels, of 5 images"
    change = lambda split, content: content["annotations"][0].update(category_id=2)  # noqa: E731
    card = first_batches.describe_data(job_on(coco(tmp_path / "coco", change=change))[1])
    assert (card.classes, card.unit) == ({"two": 3, "one": 1}, "objects")
    assert card.balance_text() == "2 classes of 1 to 3 objects, 3.0 to 1"
    root = scenes(tmp_path / "scenes", labels=lambda seed: np.repeat([[1, 1, 1, 2]], 40, 0).repeat(10, 1).astype("u1"))
    card = first_batches.describe_data(job_on(root)[1])
    assert (card.classes, card.empty) == ({"road": 4 * 1200, "tree": 4 * 400, "car": 0}, 1)
    assert card.balance_text() == "3 classes of 1,600 to 4,800 pixels, 3.0 to 1, 1 without any"


@pytest.mark.parametrize("maker", MAKERS)
def test_check_has_the_card_of_training(maker: str, hcnet: Hcnet, tmp_path: Path) -> None:
    root = MAKERS[maker](tmp_path / "data")
    card = first_batches.describe_data(job_on(root)[1])
    done = hcnet("check", root, "--output", tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["card"] == card.model_dump(mode="json")
    assert f"Training: {card.balance_text()}." in re.sub(r"\s+", " ", done.out)


@pytest.mark.parametrize(
    "content",
    [
        {"width": [1, 2]},
        {"largest": 10**400, "smallest": 1},
        {"smallest": -1},
        {"classes": {"a": "many"}},
        {"sized": 3},
    ],
)
def test_a_card_of_others_is_refused_or_said(content: dict[str, Any]) -> None:
    try:
        text = str(DataCard.model_validate_json(json.dumps(content)))
    except ValidationError:
        return
    assert text == ""
