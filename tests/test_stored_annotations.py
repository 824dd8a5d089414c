"""Annotation files are parsed once: what is kept is what was parsed, damage is seen, and no process parses again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcnet_cli.console import UserError
from hcnet_cli.data import embedded
from hcnet_cli.data.folders import Packed
from hcnet_cli.tasks.detection import stored
from hcnet_cli.tasks.detection.annotations import Annotations, Truth, read_annotations
from hcnet_cli.tasks.detection.folder import load_split


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The validation annotations of the embedded scenes, with an RLE crowd, and an empty cache."""
    scenes = embedded.ensure("digit-scenes")
    data = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())
    (tmp_path / "val2017").symlink_to(scenes / "val2017")
    height, width = (data["images"][0][side] for side in ("height", "width"))
    rle = {"size": [height, width], "counts": [0, 9, height * width - 9]}
    data["annotations"][0] |= {"iscrowd": 1, "segmentation": rle}
    data["annotations"][1]["bbox"][2] = 0  # left out of training, with its id
    made = tmp_path / "annotations" / "instances_val2017.json"
    made.parent.mkdir()
    made.write_text(json.dumps(data))
    monkeypatch.setenv("HCNET_CACHE", str(tmp_path / "cache"))
    return made


def plain(value: Any) -> Any:
    """Comparable with ==."""
    if isinstance(value, Packed):
        return [value[i] for i in range(len(value))]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tolist()
    if isinstance(value, Annotations | Truth):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("scoring", [True, False])
def test_what_is_kept_is_what_was_parsed(
    file: Path, monkeypatch: pytest.MonkeyPatch, masks: bool, scoring: bool
) -> None:
    expected = read_annotations(file, masks=masks, scoring=scoring)
    first = stored.shared_annotations(file, masks=masks, scoring=scoring)
    monkeypatch.setattr(stored, "read_annotations", lambda *given, **more: pytest.fail("parsed again"))
    again = stored.shared_annotations(file, masks=masks, scoring=scoring)
    assert plain(first) == plain(again) == plain(expected)
    assert expected.dropped
    assert not again.boxes.flags.owndata  # the pages of the file
    if scoring:
        assert again.coco() == expected.coco()


def test_another_content_is_parsed_and_damage_is_seen(file: Path) -> None:
    first = plain(stored.shared_annotations(file, masks=True, scoring=False))
    (kept,) = (file.parent.parent / "cache" / "annotations").glob("*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-len(content) // 3] ^= 1
    kept.write_bytes(content)
    assert plain(stored.shared_annotations(file, masks=True, scoring=False)) == first
    for cut in (0, 7, 100, len(content) - 1):
        kept.write_bytes(content[:cut])
        assert plain(stored.shared_annotations(file, masks=True, scoring=False)) == first
    data = json.loads(file.read_text())
    data["categories"][0]["name"] = "another"
    file.write_text(json.dumps(data))
    assert "another" in stored.shared_annotations(file, masks=True, scoring=False).class_names


def test_a_cache_that_cannot_be_written_costs_time_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_annotations(file)
    (file.parent.parent / "cache").write_text("a file, not a folder")
    assert plain(stored.shared_annotations(file, masks=True, scoring=False)) == plain(expected)


def test_a_file_with_a_problem_is_refused_each_time(file: Path) -> None:
    data = json.loads(file.read_text())
    data["annotations"][3]["bbox"] = "wide"
    file.write_text(json.dumps(data))
    for _ in range(2):
        with pytest.raises(UserError, match=f"id {data['annotations'][3]['id']}"):
            stored.shared_annotations(file, masks=True, scoring=False)
    problems: list[UserError] = []
    load_split(file.parent.parent, "val", report=problems.append)
    assert len(problems) == 1
