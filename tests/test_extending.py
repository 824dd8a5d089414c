"""Protects docs/extending.md: each example is applied to a copy of the package, its files counted, its commands run."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import fresh
import pytest
from small_data import coco

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()
SECTION = re.compile(r"^## (A.*?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
EXAMPLES: dict[str, str] = dict(SECTION.findall(TEXT))
TOUCHED = {"A component": 2, "A backbone": 0, "An optimizer": 0, "A data format": 2}
SHORT = ["--set", "schedule.unit=steps", "--set", "schedule.length=2", "--set", "train.eval_every=2"]
ADDED = {  # to the commands of the docs, so that the test takes seconds
    "pretrain": [*SHORT, "--workers", "0", "--batch-size", "8"],
    "rotate": [*SHORT, "--workers", "0"],
    "finetune-det": [*SHORT, "--workers", "0", "--set", "train.eval_every=2"],
    "ablate": [*SHORT, "--seeds", "0", "--set", "train.workers=0", "--set", "train.batch_size=8"],
}


def blocks(body: str) -> list[tuple[str, str, str]]:
    """(language, file, content) of each block."""
    return re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)


def apply(body: str, source: Path, folder: Path) -> set[str]:
    """Makes the edits in the copy `source`, the user's own files in `folder`; returns the package's files touched."""
    touched = set()
    for language, name, content in blocks(body):
        if not name:
            continue
        place = source if name.startswith("hcnet_cli/") else folder
        if language == "diff":
            lines = content.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            text = (place / name).read_text()
            assert text.count(before) == 1, f"{name} has {text.count(before)} times:\n{before}"
            (place / name).write_text(text.replace(before, after))
        else:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(content)
        if place == source:
            touched.add(name)
    return touched


def with_polygons(split: str, content: dict[str, Any]) -> None:
    for one in content["annotations"]:
        one["segmentation"] = [[4, 4, 13, 4, 13, 13, 4, 13]]


def run_commands(body: str, source: Path, folder: Path, images: Path) -> str:
    """The output of the example's commands, those on embedded data on a few images instead."""
    scenes = coco(folder / "scenes", change=with_polygons)
    few = {
        "pretrain": ["--data", str(images), "--recipe", "digits"],
        "ablate": ["--data", str(images), "--recipe", "digits"],
        "finetune-det": ["--data", str(scenes), "--recipe", "digit-scenes", "--batch-size", "2"],
    }
    said = ""
    for language, _, content in blocks(body):
        for line in content.splitlines() if language == "bash" else ():
            words = shlex.split(line)
            assert words[0] == "hcnet"
            command = [*words[1:], *ADDED.get(words[1], [])]
            command += few.get(words[1], []) if "--data" not in words else []
            done = fresh.run(*command, folder=folder, PYTHONPATH=str(source))
            assert done.code == 0, f"{line}\n{done.out}{done.err}"
            said += done.out + done.err
    return said


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, folder_of_images: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "work"
    folder.mkdir()
    for part in ("hcnet_cli", "recipes", "results/published.csv"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (source / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, source / part)
    touched = apply(EXAMPLES[name], source, folder)
    if name == "A task":
        assert {file for file in touched if "/rotation/" not in file} == {"hcnet_cli/tasks/__init__.py"}
    else:
        assert len(touched) == TOUCHED[name], touched
    if name == "A data format":
        listed = shutil.copytree(folder_of_images, folder / "listed")
        for split in ("train", "val"):
            with (listed / f"{split}.csv").open("w", newline="") as file:
                images = sorted((listed / split).rglob("*.png"))
                csv.writer(file).writerows((image.relative_to(listed), image.parent.name) for image in images)
    said = run_commands(EXAMPLES[name], source, folder, folder_of_images)
    expected = {
        "A component": "no-source",
        "A backbone": "MyNet",
        "An optimizer": "Finished",
        "A data format": "Nothing is wrong.",
        "A task": "accuracy",
    }
    assert expected[name] in said


def test_the_table_counts_every_example() -> None:
    assert set(EXAMPLES) == {*TOUCHED, "A task"}
