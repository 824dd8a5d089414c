"""`hcnet report --compare`: equal to a count by hand, refused for other data, and a picture of what differs most."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Done
from PIL import Image
from scipy import stats
from synthetic_runs import make_run

from hcnet_cli import runs
from hcnet_cli.console import UserError
from hcnet_cli.report import compare
from hcnet_cli.report.compare import compare_runs, most_different, read_predictions

LABELS = ["cat", "dog", "cat", "dog", "cat", "cat"]


def write(file: Path, answers: Sequence[Sequence[tuple[str, float]]], labels: Sequence[str] = LABELS) -> None:
    """A predictions.csv of images val/<label>/<number>.png."""
    file.parent.mkdir(parents=True, exist_ok=True)
    k = len(answers[0])
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        numbers = range(1, k + 1)
        writer.writerow(["image", "label", *(f"class_{i}" for i in numbers), *(f"score_{i}" for i in numbers)])
        for i, (label, scores) in enumerate(zip(labels, answers, strict=True)):
            writer.writerow([f"val/{label}/{i}.png", label, *(name for name, _ in scores), *(x for _, x in scores)])


def cat(score: float = 2.0) -> list[tuple[str, float]]:
    return [("cat", score), ("dog", 0.0)]


def dog(score: float = 2.0) -> list[tuple[str, float]]:
    return [("dog", score), ("cat", 0.0)]


def two_runs(results: Path) -> tuple[Path, Path]:
    """A has images 0 to 3 right; B has 0, 1, 4 and 5; on image 5 they differ most."""
    top1 = 100 * 4 / 6  # as it is counted below
    folders = tuple(make_run(results, seed=seed, score=top1, log=False) for seed in (0, 1))
    write(folders[0] / compare.FILE, [cat(), dog(), cat(1), dog(1), dog(1), dog(9)])
    write(folders[1] / compare.FILE, [cat(), dog(), dog(1), cat(1), cat(1), cat(9)])
    return folders


def test_predictions_that_are_not_those_of_the_run_are_refused(tmp_path: Path) -> None:
    """All answers right, where the record says 66.67: edited, or another run's."""
    first, second = two_runs(tmp_path)
    write(first / compare.FILE, [cat(), dog(), cat(), dog(), cat(), cat()])
    with pytest.raises(UserError, match=r"has top-1 100\.00, the run's record 66\.67"):
        compare_runs(first, second)
    first, second = two_runs(tmp_path / "again")
    record = second / "run.json"
    runs.RunFolder(second).write(runs.read_record(record).model_copy(update={"config": "0" * 16}))  # has a checksum
    record.write_text(record.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(UserError, match=r"run\.json was changed after it was written"):
        compare_runs(first, second)


def test_counts_difference_and_test_are_those_of_a_count_by_hand(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    lines, picture = compare_runs(first, second)
    text = "\n".join(lines)
    assert f"A: top-1 66.67  {first.name}" in text
    assert f"B: top-1 66.67  {second.name}" in text
    assert "6 images: 2 both right, 2 only A, 2 only B, 0 neither" in text
    assert "B minus A: +0.00 points" in text
    assert f"p = {stats.binomtest(2, 4).pvalue:.3f}; not resolved" in text
    assert picture is not None  # the data are gone, and still there is a picture of the answers


def test_the_images_that_differ_most_come_first() -> None:
    made = [
        {
            str(i): compare.Prediction(label, dict(scores))
            for i, (label, scores) in enumerate(zip(LABELS, answers, strict=True))
        }
        for answers in (
            [cat(), dog(), cat(1), dog(1), dog(1), dog(9)],
            [cat(), dog(), dog(1), cat(1), cat(3), cat(9)],
        )
    ]
    assert most_different(*made) == ["5", "4", "2", "3"]


def test_a_class_outside_of_the_best_counts_as_the_last_of_them() -> None:
    a = compare.Prediction("x", {"x": 5.0, "y": 3.0})
    b = compare.Prediction("x", {"z": 4.0, "y": 1.0})
    assert compare._lead(a, "z") + compare._lead(b, "x") == (5 - 3) + (4 - 1)


def test_the_picture_shows_the_images_as_they_were_evaluated(hcnet: Callable[..., Done], tmp_path: Path) -> None:
    """Turned as EXIF data say, and with the bits of the run; one that is gone is blank."""
    (tmp_path / "data/val/cat").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    halves = np.zeros((30, 30, 3), dtype=np.uint8)
    halves[:15] = 250, 10, 10
    halves[15:] = 10, 10, 250
    Image.fromarray(halves).save(tmp_path / "data/val/cat/5.png", exif=exif)
    Image.fromarray(np.full((30, 30), 3200, dtype=np.uint16)).save(tmp_path / "data/val/cat/4.png")
    first, second = two_runs(tmp_path)
    record = runs.read_record(first / "run.json")
    data = record.data.model_copy(update={"path": str(tmp_path / "data"), "bits": 12})
    runs.RunFolder(first).write(record.model_copy(update={"data": data}))
    assert hcnet("report", "--compare", first, second, "--output", tmp_path / "a.png").code == 0
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == 200).all(axis=2).sum() > 400
    red, blue = (
        np.flatnonzero((pixels == colour).all(axis=(2)).any(axis=1)) for colour in ([250, 10, 10], [10, 10, 250])
    )
    assert blue.max() < red.min()


def test_two_networks_with_the_same_answers(tmp_path: Path) -> None:
    first, _ = two_runs(tmp_path)
    same = shutil.copytree(first, tmp_path / "same")
    lines, picture = compare_runs(first, same)
    assert "there is nothing to test" in lines[-1]
    assert picture is None


def test_other_data_are_refused(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    file = second / "run.json"
    file.write_text(file.read_text().replace('"digits-digest"', '"another-digest"'))
    with pytest.raises(UserError, match="validated on other data"):
        compare_runs(first, second)


def test_other_images_and_runs_without_predictions_are_refused(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    write(second / compare.FILE, [cat()] * 6, LABELS[::-1])
    with pytest.raises(UserError, match="not of the same images and labels"):
        compare_runs(first, second)
    (second / compare.FILE).unlink()
    with pytest.raises(UserError, match=r"has no final/predictions\.csv"):
        compare_runs(first, second)
    with pytest.raises(UserError, match="is not a run"):
        compare_runs(first, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\xfe",
        b"image,label\na,b\n",
        b"image,label,class_1,score_1\n",
        b"image,label,class_1,score_1\na,b,c\n",
        b"image,label,class_1,score_1\na,b,c,high\n",
        b"image,label,class_1,score_1\na,b,c,1\na,b,c,1\n",
        b'image,label,class_1,score_1\n"a,b,c,1\n',
        b"image,label,class_1,score_1\n" + b"a" * 200_000 + b",b,c,1\n",
    ],
)
def test_a_file_that_holds_no_predictions_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"predictions\.csv"):
        read_predictions(tmp_path / "predictions.csv")


def test_the_command(hcnet: Callable[..., Done], tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    picture = tmp_path / "new" / "which.png"
    before = sorted(tmp_path.rglob("*"))
    done = hcnet("report", "--compare", first, second)
    assert "--output FILE.png draws" in done.err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written that was not asked for"
    done = hcnet("report", "--compare", first, second, "--output", picture)
    assert done.code == 0, done.err
    assert [line.split(":")[0] for line in done.out.splitlines()][:5] == [
        "A",
        "B",
        "6 images",
        "B minus A",
        "McNemar, exact",
    ]
    with Image.open(picture) as image:
        assert image.width > 400
    done = hcnet("report", "--compare", first, second, "--output", tmp_path / "which.html")
    assert (done.code, "must end in .png" in done.err) == (2, True)
