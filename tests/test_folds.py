"""Cross-validation: seeds are folds of the training images, which part them, and tables average them."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_MODEL, Hcnet, only_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_runs import make_run
from synthetic_studies import study_of

from hcnet_cli.console import UserError
from hcnet_cli.data.folders import Packed
from hcnet_cli.grouping import group_by_config
from hcnet_cli.results import collect
from hcnet_cli.study.words import run_notes
from hcnet_cli.tasks.classification.image_folder import Files, Index, fold, scan

QUICK = ("--device", "cpu", "--precision", "fp32", "--workers", "0", "--set", "data.img_size=16", "--init", "none")


def folder(root: Path, splits: dict[str, int], classes: int = 3) -> Path:
    for split, count in splits.items():
        for label in range(classes):
            for n in range(count + label):
                path = root / split / f"c{label}" / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.RandomState(100 * label + n).randint(0, 100, (16, 16, 3)) + 70 * label
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def index_of(counts: list[int], order: list[int]) -> Index:
    """An index of files in some order."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    names = [b"\xff%d.png" % i for i in range(len(labels))]
    files = Files(Packed([names[i] for i in order]), labels[order])
    classes = tuple(f"c{i}" for i in range(len(counts)))
    return Index(Path("d"), "d", None, "content", classes, files, files, {}, ())  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_folds_part_the_images_evenly_and_by_their_names_alone(data: st.DataObject) -> None:
    some = st.lists(st.integers(0, 9).filter(lambda count: count != 1), min_size=1, max_size=5)
    counts = data.draw(some.filter(lambda found: sum(found) > 1))
    folds = data.draw(st.integers(2, min(7, sum(counts))))
    plain = index_of(counts, list(range(sum(counts))))
    other = index_of(counts, data.draw(st.permutations(range(sum(counts)))))
    seen: Counter[str] = Counter()
    per_class = []
    for number in range(folds):
        made, again = fold(plain, number, folds), fold(other, number, folds)
        scored, trained = ([files.name(i) for i in range(len(files))] for files in (made.val, made.train))
        assert sorted(scored) == sorted(again.val.name(i) for i in range(len(again.val)))
        assert len(trained) == len(plain.train) - -(-len(plain.train) // folds)  # all folds train on as many
        assert set(trained).isdisjoint(scored)
        assert set(made.train.labels) == set(plain.train.labels)
        seen += Counter(scored)
        per_class.append(np.bincount(made.val.labels, minlength=len(counts)))
    assert seen == Counter(plain.train.name(i) for i in range(len(plain.train)))  # each image is scored once
    assert np.ptp(np.array(per_class), axis=0).max() <= 1
    assert np.ptp(np.array(per_class).sum(axis=1)) <= 1


def test_images_that_make_no_folds_are_refused(tmp_path: Path, hcnet: Hcnet) -> None:
    with pytest.raises(UserError, match="3 training images make no 5 folds"):
        fold(index_of([3], [0, 1, 2]), 0, 5)
    with pytest.raises(UserError, match=r"ff7.png is the only image of its class"):
        fold(index_of([7, 1], list(range(8))), 0, 5)
    done = hcnet("check", folder(tmp_path / "few", {"train": 1}, classes=1), "--set", "data.folds=5")
    assert done.code == 2
    assert "1 training images make no 5 folds" in done.err


@pytest.mark.parametrize("more", [("--seeds", "0,1,5"), ("--seeds", "0,1", "--until", "1")])
def test_a_study_takes_each_fold_once(more: tuple[str, ...], tmp_path: Path, hcnet: Hcnet) -> None:
    typed = ("ablate", "--disable", "refinement", "--set", "data.folds=5", *more, "--dry-run", "--out", tmp_path)
    done = hcnet(*typed)
    assert done.code == 2
    assert "a study has 5 seeds at most" in done.err


def test_a_folder_without_validation_images_names_the_way_out(tmp_path: Path, hcnet: Hcnet) -> None:
    root = folder(tmp_path / "mine", {"train": 4})
    done = hcnet("pretrain", "--recipe", "digits", "--data", root, "--out", tmp_path)
    assert done.code == 2
    assert "has no val/ folder" in done.err
    assert "--set data.folds=5" in done.err
    assert len(scan(root, splits=("train",)).val) == 0
    assert hcnet("check", root).code == 2
    done = hcnet("check", root, "--set", "data.folds=5")
    assert done.code == 0, done.out
    assert "3 classes, images\n" in done.out
    assert "Nothing is wrong." in done.out
    shutil.copy(root / "train/c0/0.png", root / "train/c0/again.png")  # a fold may train on one and score the other
    done = hcnet("check", root, "--set", "data.folds=5")
    assert done.code == 1
    assert "WRONG: pictures more than once in a split, and folds part them (1)" in done.out


@pytest.mark.parametrize("splits", [{"train": 8}, {"train": 8, "val": 0}])  # one class of val/ is empty
def test_a_seed_is_a_fold(splits: dict[str, int], tmp_path: Path, hcnet: Hcnet) -> None:
    root = folder(tmp_path / "mine", splits)
    typed = ("pretrain", "--recipe", "digits", "--data", root, *SMALL_MODEL, *QUICK, "--batch-size", "4")
    done = hcnet(*typed, "--epochs", "1", "--set", "data.folds=3", "--seed", "4", "--out", tmp_path)
    assert done.code == 0, done.err
    run = only_run(tmp_path)
    info = json.loads((run / "run.json").read_text())
    assert info["data"]["name"] == "mine-3-folds"
    assert info["data"]["digest"].endswith("-3-folds")  # scores on folds are not compared with those on val/
    assert (info["data"]["num_train"], info["data"]["num_val"]) == (18, 9)  # 8 + 9 + 10 images
    with open(run / "final" / "predictions.csv") as file:
        scored = {row["image"] for row in csv.DictReader(file)}
    expected = fold(scan(root, splits=("train",)), 1, 3).val
    assert scored == {f"train/c{label}/{expected.name(i)}" for i, label in enumerate(expected.labels)}
    done = hcnet("evaluate", run, "--workers", "0")
    assert "Equal to the run's record." in done.err, done.err
    for seed, seen in (("7", False), ("5", True)):  # of the same fold, and of another
        goes_on = (*typed, "--init", run, "--epochs", "1", "--set", "data.folds=3", "--seed", seed)
        done = hcnet(*goes_on, "--out", tmp_path / seed, "--dry-run")
        assert ("was trained on mine-3-folds, with images that this fold is scored on" in done.err) is seen, done.err


def test_shards_give_the_folds_of_their_folder(tmp_path: Path, hcnet: Hcnet) -> None:
    root = folder(tmp_path / "mine", {"train": 8, "val": 2})
    assert hcnet("shards", root, tmp_path / "tars").code == 0
    digests = set()
    for data in (root, tmp_path / "tars"):
        typed = ("pretrain", "--recipe", "digits", "--data", data, *SMALL_MODEL, *QUICK, "--batch-size", "4")
        done = hcnet(*typed, "--epochs", "1", "--set", "data.folds=3", "--out", tmp_path / data.name / "out")
        assert done.code == 0, done.err
        digests.add((only_run(tmp_path / data.name / "out") / "best.safetensors").read_bytes())
    assert len(digests) == 1


def test_a_row_is_the_mean_over_folds_of_unlike_size(tmp_path: Path) -> None:
    index = fold(index_of([9, 9], list(range(18))), 0, 5)
    for seed, images in enumerate((4, 4, 4, 3, 3)):
        file = make_run(tmp_path, seed=seed, score=90.0 + seed) / "run.json"
        content = json.loads(file.read_text())
        content["data"] |= {"name": index.name, "num_val": images, "num_train": 18 - images, "notes": index.notes}
        file.write_text(json.dumps(content))
    groups = group_by_config(collect([tmp_path]).runs)
    assert [len(group) for group in groups] == [5]
    notes = run_notes(study_of(tmp_path / "study"), [run.info for run in groups[0]], {})
    assert sum("Folds share training images" in note for note in notes) == 1
