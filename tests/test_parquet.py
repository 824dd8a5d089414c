"""Parquet files, as `datasets` and others write them: hcnet shards makes tars of them, or says what is wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Hcnet
from PIL import Image

from hcnet_cli.tasks.classification.image_folder import ImageFolder, scan

NAMES = ["cat", "dog"]


def encoded(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (9, 7, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def write(path: Path, rows: list[tuple[Any, Any]], names: list[str] | None = None, columns: Any = None) -> None:
    """A table of (image, label) rows, with the names of the classes in the schema as `datasets` writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns or {"image": [row[0] for row in rows], "label": [row[1] for row in rows]})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3)


def image(seed: int, path: str | None = None, kind: str = "PNG") -> dict[str, Any]:
    return {"bytes": encoded(seed, kind), "path": path}


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Seven training images in two files, two of them of one name; three validation images without names."""
    root = tmp_path / "pets"
    train = [(image(i, f"folder/{min(i, 5)}.png"), i % 2 if i < 5 else 1) for i in range(7)]
    write(root / "data" / "train-00000-of-00002.parquet", train[:4], NAMES)
    write(root / "data" / "train-00001-of-00002.parquet", train[4:], NAMES)
    write(
        root / "data" / "validation-00000-of-00001.parquet", [(image(9 + i, None, "JPEG"), 0) for i in range(3)], NAMES
    )
    return root


def contents(root: Path) -> dict[str, bytes]:
    """The bytes of every image of both splits, by its name below the data folder."""
    index = scan(root)
    found = {}
    for split in ("train", "val"):
        images = ImageFolder(index, split, lambda image: {})
        found |= {images.sample_name(i): images.sample_path(i).read() for i in range(len(images))}  # type: ignore[union-attr]
    return found


def test_the_tars_hold_every_image_under_its_class(pets: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    out = tmp_path / "tars"
    assert hcnet("shards", pets, out).code == 0
    expected = {f"train/{NAMES[i % 2 if i < 5 else 1]}/{i}.png": encoded(i) for i in range(6)}
    expected["train/dog/train-00001-of-00002-00000002.png"] = encoded(6)
    expected |= {f"val/cat/validation-00000-of-00001-{i:08d}.jpg": encoded(9 + i, "JPEG") for i in range(3)}
    assert contents(out) == expected
    assert scan(out).name == "pets"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets", "tars"]


def test_the_tars_are_those_of_the_same_images_in_folders(pets: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    assert hcnet("shards", pets, tmp_path / "tars").code == 0
    for name, content in contents(tmp_path / "tars").items():
        file = tmp_path / "folder" / "pets" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert hcnet("shards", tmp_path / "folder" / "pets", tmp_path / "again").code == 0
    for file in (tmp_path / "tars").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_plain_columns_and_folders_by_split(tmp_path: Path, hcnet: Hcnet) -> None:
    """Bytes alone, and labels that are words, or numbers that no schema names."""
    rows = {"jpeg": [encoded(0), encoded(1)], "labels": ["b", "a"], "width": [7, 7]}
    write(tmp_path / "words" / "train" / "0000.parquet", [], columns=rows)
    write(tmp_path / "words" / "validation" / "0000.parquet", [], columns=rows)
    assert hcnet("shards", tmp_path / "words", tmp_path / "a").code == 0
    assert scan(tmp_path / "a").classes == ("a", "b")
    for split in ("train", "val"):
        write(tmp_path / "numbers" / f"{split}.parquet", [(encoded(i), label) for i, label in enumerate((10, 2))])
    assert hcnet("shards", tmp_path / "numbers", tmp_path / "b").code == 0
    assert list(contents(tmp_path / "b"))[:2] == ["train/2/train-00000001.png", "train/10/train-00000000.png"]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["b", "a"], pa.large_string()),
        pa.array(["b", "a"]).dictionary_encode(),
        pa.array([1, 0], pa.int8()).dictionary_encode(),
        pa.array([1.0, 0.0]),
        pa.array([[1], [0]]),
    ],
    ids=["large_string", "names", "numbers", "float", "list"],
)
def test_a_column_called_label_is_used_or_refused(tmp_path: Path, hcnet: Hcnet, labels: pa.Array) -> None:
    """Never another column in its place. The images are large_binary, as Polars writes them."""
    images = pa.array([encoded(0), encoded(1)], pa.large_binary())
    columns = {"image": images, "label": labels, "id": [7, 8], "__index_level_0__": [3, 4]}
    write(tmp_path / "table" / "train.parquet", [], columns=columns)
    made = hcnet("shards", tmp_path / "table", tmp_path / "out")
    if pa.types.is_floating(labels.type) or pa.types.is_list(labels.type):
        assert made.code == 2
        assert ": a label is a whole number or a name." in made.err
    else:
        assert made.code == 0, made.err
        names = scan(tmp_path / "out", splits=("train",)).classes
        assert names == tuple(sorted(map(str, labels.to_pylist())))


def test_the_index_of_pandas_is_no_label(tmp_path: Path, hcnet: Hcnet) -> None:
    write(tmp_path / "t" / "train.parquet", [], columns={"image": [encoded(0)], "__index_level_0__": [3]})
    assert "has no column of labels" in hcnet("shards", tmp_path / "t", tmp_path / "out").err


def test_training_names_the_command_that_makes_tars(pets: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    (pets / "data").rename(pets / "train")  # not taken for a folder of classes
    refused = hcnet("pretrain", "--data", pets, "--out", tmp_path / "results")
    assert refused.code == 2
    assert f"hcnet shards {pets} OUT" in refused.err


@pytest.mark.parametrize("task", ["finetune-det", "finetune-seg"])
@pytest.mark.parametrize("file", ["data/train-00000-of-00001.parquet", "train2017.tar"])
def test_other_tasks_read_folders_alone(task: str, file: str, tmp_path: Path, hcnet: Hcnet) -> None:
    (tmp_path / "d" / file).parent.mkdir(parents=True)
    (tmp_path / "d" / file).write_bytes(b"")
    refused = hcnet(task, "--data", tmp_path / "d", "--out", tmp_path / "results")
    assert refused.code == 2
    assert f"and {task} reads files in folders alone." in refused.err
    assert "hcnet shards" not in refused.err


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([(None, 0)], None, "has no column of images"),
        ([({"bytes": None, "path": "a.png"}, 0), (image(1), 0)], None, "Row 0 of"),
        ([(image(1), 0), (image(1), -1)], None, "Row 1 of"),
        ([(image(1), None), (image(1), 2)], None, "names no class"),
        ([(image(1), "../up")], None, "is of the class '../up': classes become folders"),
        ([(image(1), "n/a")], None, "is of the class 'n/a': classes become folders"),
        ([], {"image": [encoded(1)]}, "has no column of labels: image"),
        ([], {"image": [encoded(1)], "x": [1], "y": [2]}, "2 columns that may be labels: x, y"),
        ([], {"image": [encoded(1)], "mask": [encoded(1)], "label": [2]}, "2 columns that may be images"),
        ([], {"image": [b"no image"], "label": [1]}, ""),
    ],
)
def test_bad_tables(tmp_path: Path, hcnet: Hcnet, rows: Any, columns: Any, message: str) -> None:
    for split in ("train", "val"):
        write(tmp_path / "bad" / f"{split}.parquet", rows, NAMES, columns)
    made = hcnet("shards", tmp_path / "bad", tmp_path / "out")
    assert made.code == (2 if message else 0)  # what an image holds is seen by hcnet check
    assert message in made.err
    assert (tmp_path / "out").exists() == (not message)
    assert not list(tmp_path.glob(".*"))


def test_two_classes_of_one_name_are_refused(tmp_path: Path, hcnet: Hcnet) -> None:
    """They would become one class in silence."""
    for split in ("train", "val"):
        write(tmp_path / "d" / f"{split}.parquet", [(image(i), i) for i in range(3)], ["cup", "dog", "cup"])
    made = hcnet("shards", tmp_path / "d", tmp_path / "out")
    assert made.code == 2
    assert 'train.parquet are both called "cup": they would become one class.' in made.err
    assert "The labels 0 and 2 of" in made.err
    assert not (tmp_path / "out").exists()


def test_refusals_name_the_folder_that_was_given(tmp_path: Path, hcnet: Hcnet) -> None:
    """Not the temporary one in which the tars are made."""
    for split, label in (("train", 0), ("val", 1)):
        write(tmp_path / "d" / f"{split}.parquet", [(image(label), label)], NAMES)
    made = hcnet("shards", tmp_path / "d", tmp_path / "out")
    assert made.code == 2
    assert f'{tmp_path}/d/val has a class ("dog") that {tmp_path}/d/train lacks' in made.err


def test_damaged_and_missing_files(pets: Path, tmp_path: Path, hcnet: Hcnet) -> None:
    second = pets / "data" / "train-00001-of-00002.parquet"
    whole = second.read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], whole[:300] + bytes(400) + whole[700:]):
        second.write_bytes(content)
        made = hcnet("shards", pets, tmp_path / "out")
        assert made.code == 2, len(content)
        assert f"{second} cannot be read as Parquet" in made.err
    second.unlink()
    made = hcnet("shards", pets, tmp_path / "out")
    assert made.code == 2
    assert "is missing" in made.err
    for part in (pets / "data").glob("train-*.parquet"):
        part.unlink()
    assert "no Parquet files of train" in hcnet("shards", pets, tmp_path / "out").err
    assert not (tmp_path / "out").exists()
