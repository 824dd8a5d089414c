"""Protects published tables: only the benchmark itself has its name, whatever a folder is called."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_data import MAKERS, classes, opened
from timm.data import ImageNetInfo

from hcnet_cli import results
from hcnet_cli.tasks import TASKS
from hcnet_cli.tasks.classification import shards
from hcnet_cli.tasks.classification.image_folder import scan
from hcnet_cli.tasks.classification.imagenet import is_imagenet, part_of_imagenet
from hcnet_cli.tasks.detection.categories import COCO_CATEGORIES
from hcnet_cli.tasks.detection.folder import is_coco
from hcnet_cli.tasks.segmentation.ade20k import ADE20K_CLASSES, is_ade20k

SYNSETS = sorted(ImageNetInfo().label_names())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_folder_of_the_benchmarks_name_is_called_otherwise(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = {"classes": "imagenet-1k", "coco": "coco", "scenes": "ade20k"}[kind]
    root = MAKERS[kind](tmp_path / benchmark.upper())
    assert opened(root).info.name == f"{benchmark}-data"
    (tmp_path / "link").symlink_to(root)
    assert opened(tmp_path / "link").info.name == f"{benchmark}-data"
    monkeypatch.chdir(root)
    for path in (".", f"../{root.name}", "./."):
        assert opened(Path(path)).info.name == f"{benchmark}-data"


def test_imagenet_is_its_classes_and_the_numbers_of_both_splits() -> None:
    whole = 1_281_167 + 50_000
    assert is_imagenet(SYNSETS, 1_281_167, 50_000, whole - 500)
    assert not is_imagenet(SYNSETS, 1_000, 50_000, 51_000)  # a part of the training images
    assert not is_imagenet(SYNSETS, 1_281_167, 49_999, whole - 1)
    assert not is_imagenet(SYNSETS, 1_281_167, 50_000, 1)  # copies of one picture
    assert not is_imagenet(SYNSETS[:-1], 1_281_167, 50_000, whole)
    assert not is_imagenet([*SYNSETS[:-2], "n00000001", SYNSETS[-1]], 1_281_167, 50_000, whole)  # ends alone


def test_a_part_of_imagenet_says_which(tmp_path: Path) -> None:
    root = classes(tmp_path / "imagenet-1k")
    for split in ("train", "val"):
        for old, new in zip("ab", SYNSETS[10:12], strict=True):
            (root / split / old).rename(root / split / new)
    index = scan(root)
    assert index.name == "imagenet-1k-part-2c-4"
    assert "2 of 1,000 classes, 4 of 1,281,167 training and 2 of 50,000 validation images" in index.notes[0]
    assert part_of_imagenet(SYNSETS, 1000, 50_000)
    assert not part_of_imagenet(["cat", *SYNSETS[:3]], 1000, 50_000)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("imagenet-1k", "imagenet-1k-data"),
        ("ImageNet 1k", "imagenet-1k-data"),
        ("imagenet-1k-t", "imagenet-1k-data-t"),
        ("imagenet-1k-dataset", "imagenet-1k-data-dataset"),
        ("imagenet-1k-part-2c-4", "imagenet-1k-part-2c-4"),
        ("imagenet-1k-data", "imagenet-1k-data"),
        ("coco", "coco-data"),
        ("ade20k", "ade20k-data"),
        ("../flowers", "flowers"),
    ],
)
def test_a_name_that_shards_or_a_folder_have_is_no_benchmarks(written: str, name: str, tmp_path: Path) -> None:
    """Whoever writes the name by hand into _info.json has not earned it either."""
    shards.write(classes(tmp_path / "flowers"), tmp_path / "shards", 10**6)
    info = json.loads((tmp_path / "shards/_info.json").read_text())
    assert scan(tmp_path / "shards").name == info["name"] == "flowers"
    (tmp_path / "shards/_info.json").write_text(json.dumps({**info, "name": written}))
    assert scan(tmp_path / "shards").name == name
    assert scan(classes(tmp_path / "folders" / written)).name == name


@pytest.mark.parametrize("data", ["imagenet-1k-part-100c-130000", "imagenet-1k-data"])
def test_weights_of_a_part_are_not_those_of_the_benchmark(data: str) -> None:
    """A run that starts from them departs from the published protocol and says so."""

    def text(pretraining: str) -> str:
        info = SimpleNamespace(
            task="finetune-seg", changes={}, evaluated_only=False, data=SimpleNamespace(name="ade20k"),
            init={"source": f"r/pretrain-{pretraining}-t-s0-01234567/best.safetensors"},
        )  # fmt: skip
        run: Any = info
        return results.changes_text(run)

    assert text("imagenet-1k") == ""
    assert text(data) == f"started from pretrain-{data}-t"


def test_coco_is_its_categories_and_the_numbers_of_both_splits() -> None:
    def split(images: int, objects: int, categories: dict[int, str] | None = None) -> Any:
        found = categories or COCO_CATEGORIES

        class Split(SimpleNamespace):
            def __len__(self) -> int:
                return images

        return Split(num_annotations=objects, category_ids=list(found), class_names=list(found.values()))

    train, val = split(118_287, 860_001), split(5_000, 36_781)
    assert is_coco(train, val, 123_287)
    assert not is_coco(split(1_000, 7_000), val, 6_000)
    assert not is_coco(train, split(4_999, 36_781), 123_287)
    assert not is_coco(train, val, 5_000)
    assert not is_coco(split(118_287, 860_000), val, 123_287)
    renamed = COCO_CATEGORIES | {1: "human"}
    assert not is_coco(split(118_287, 860_001, renamed), split(5_000, 36_781, renamed), 123_287)


def test_the_80_categories_are_those_of_coco() -> None:
    """Against torchvision's list, which counts to 90 with "N/A" where COCO has no id."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert {i: name for i, name in enumerate(names) if name not in ("__background__", "N/A")} == COCO_CATEGORIES


def test_ade20k_is_its_names_and_the_numbers_of_both_splits() -> None:
    files = 2 * 22_210
    assert is_ade20k(ADE20K_CLASSES, 20_210, 2_000, files)
    assert not is_ade20k(ADE20K_CLASSES, 20, 2_000, files)
    assert not is_ade20k(ADE20K_CLASSES, 20_210, 2_000, 4_040)
    assert not is_ade20k(tuple(f"label {i}" for i in range(1, 151)), 20_210, 2_000, files)
    assert not is_ade20k((*ADE20K_CLASSES[1:], ADE20K_CLASSES[0]), 20_210, 2_000, files)
    assert len(set(ADE20K_CLASSES)) == 150


def test_each_benchmark_is_a_name_that_its_format_can_earn() -> None:
    assert {spec.benchmark for spec in TASKS.values()} == {"imagenet-1k", "coco", "ade20k"}
