"""ImageNet's further test sets in their authors' layouts, counted by hand: an image's colour is what a model says."""

from __future__ import annotations

import json
import pkgutil
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import small_data
import torch
import torch.nn.functional as F
from conftest import SMALL_MODEL, Done, only_run, run_here
from PIL import Image
from timm.data import RealLabelsImagenet
from torch import Tensor, nn

from hcnet_cli import runs
from hcnet_cli.console import UserError
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.tasks.classification import shards
from hcnet_cli.tasks.classification.augment import Normalise
from hcnet_cli.tasks.classification.benchmarks import part_of, read
from hcnet_cli.tasks.classification.imagenet import synsets
from hcnet_cli.tasks.classification.spec import ClassificationEvaluation, ImageFolder
from hcnet_cli.tasks.classification.task import ClassificationTask, build_evaluation

Hcnet = Callable[..., Done]
IDS = synsets()
CONFIG = ImageFolder(format="image-folder", img_size=8, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
DOC = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
FIRST = ClassificationEvaluation()


class Colours(nn.Module):
    """Says class 32 r + g first and class b second, whatever the image shows else."""

    def forward(self, x: Tensor) -> Tensor:
        r, g, b = (255 * x.mean(dim=(2, 3))).round().long().unbind(dim=1)
        return 10.0 * F.one_hot(32 * r + g, 1000) + 5.0 * F.one_hot(b, 1000)


def put(path: Path, says: int, then: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (says // 32, says % 32, then)).save(path, format="PNG")


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, float], ClassificationTask]]:
    data = small_data.opened(small_data.classes(tmp_path_factory.mktemp("own") / "own"))

    def score(
        on: str, root: Path, classes: Sequence[str] = IDS, save: Path | None = None
    ) -> tuple[dict[str, float], ClassificationTask]:
        task = ClassificationTask(Colours(), classes, Normalise(CONFIG.mean, CONFIG.std), None, 0.0)
        entry = ClassificationEvaluation(on=on, path=str(root))  # type: ignore[arg-type]
        view, images, collate = build_evaluation(task, CONFIG, entry, FIRST, data)
        assert collate is not None
        evaluator = view.evaluator()
        for start in range(0, len(images), 2):
            samples = range(start, min(start + 2, len(images)))
            batch = collate([images[SampleRequest(i, 0, 0)] for i in samples])
            evaluator.update(view.predict(batch), batch)
        metrics = evaluator.compute()
        if save:
            evaluator.save(save)
        return metrics, view

    return score


def test_the_folders_of_v2_are_numbers(evaluate: Callable[..., object], tmp_path: Path) -> None:
    """Sorted as text, 10 and 100 would come before 2."""
    put(tmp_path / "2/a.jpeg", says=2)
    put(tmp_path / "10/a.jpeg", says=10)
    put(tmp_path / "10/b.jpeg", says=2)
    put(tmp_path / "100/a.jpeg", says=3, then=100)
    metrics, view = evaluate("imagenet-v2", tmp_path)
    assert (metrics["top1"], metrics["top5"]) == (50, 75)
    assert view.protocol.startswith("ImageNet-V2, 4 of 10,000 images (v")
    assert view.protocol.endswith("8 x 8, crop 1")


@pytest.mark.parametrize("on", ["imagenet-a", "imagenet-r"])
def test_two_hundred_classes_compete_alone(on: str, evaluate: Callable[..., object], tmp_path: Path) -> None:
    """What the model says first is a class outside of the 200: it does not count, and the second answer does."""
    text = pkgutil.get_data("timm.data", f"_info/{on.replace('-', '_')}_indices.txt") or b""
    indices = [int(line) for line in text.split()]
    assert list(part_of(on)) == sorted(indices)
    assert len(indices) == 200
    one, two = sorted(indices)[:2]
    assert 0 not in indices
    put(tmp_path / IDS[one] / "1.jpg", says=0, then=one)
    put(tmp_path / IDS[one] / "2.jpg", says=two, then=one)
    put(tmp_path / IDS[two] / "3.jpg", says=two)
    metrics, view = evaluate(on, tmp_path, save=tmp_path / "final")
    assert metrics["top1"] == pytest.approx(200 / 3)
    assert f"over its 200 classes, {CONFIG.img_size} x" in view.protocol
    assert view.class_names == [IDS[i] for i in sorted(indices)]
    confusion = json.loads((tmp_path / "final" / "confusion.json").read_text())["cells"]
    assert sorted(confusion) == sorted([[IDS[one], IDS[one], 1], [IDS[one], IDS[two], 1], [IDS[two], IDS[two], 1]])
    shutil.rmtree(tmp_path / "final")
    put(tmp_path / IDS[0] / "4.jpg", says=0)
    with pytest.raises(UserError, match=f"{IDS[0]} is no class of {on}"):
        evaluate(on, tmp_path)


def test_sketch_has_all_classes(evaluate: Callable[..., object], tmp_path: Path) -> None:
    put(tmp_path / IDS[0] / "sketch_1.JPEG", says=0)
    put(tmp_path / IDS[999] / "sketch_2.JPEG", says=999)
    put(tmp_path / IDS[999] / "sketch_3.JPEG", says=998)
    assert evaluate("imagenet-sketch", tmp_path)[0]["top1"] == pytest.approx(200 / 3)


def test_any_real_label_is_right_and_images_without_one_are_left_out(
    evaluate: Callable[..., object], tmp_path: Path
) -> None:
    """Against timm's own counting, on images with no, one, two and more labels."""
    labels = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") or b"")
    number = {n: next(i for i, one in enumerate(labels) if len(one) == n) for n in (0, 1, 2, 3)}
    wrong = next(i for i in range(255) if i not in labels[number[1]])
    answers = {0: 5, 1: wrong, 2: labels[number[2]][1], 3: labels[number[3]][2]}
    names = {n: f"ILSVRC2012_val_{i + 1:08d}.JPEG" for n, i in number.items()}
    for n, says in answers.items():
        put(tmp_path / ("flat" if n else IDS[3]) / names[n], says=says)
    metrics, view = evaluate("imagenet-real", tmp_path)
    counted = RealLabelsImagenet([*names.values(), *("",) * 49_996])
    counted.add_result(torch.stack([10.0 * F.one_hot(torch.tensor(says), 1000) for says in answers.values()]))
    assert metrics["top1"] == pytest.approx(counted.get_accuracy(1)) == pytest.approx(200 / 3)
    assert {"ece"} == {"nll", "ece", "brier"} & metrics.keys()
    assert "any label of an image is right, 1 without one left out" in view.protocol


def test_c_is_a_mean_over_severities_then_corruptions(evaluate: Callable[..., object], tmp_path: Path) -> None:
    root = tmp_path / "c"
    put(root / "gaussian_noise/1" / IDS[7] / "a.JPEG", says=7)
    put(root / "gaussian_noise/1" / IDS[8] / "b.JPEG", says=7)
    put(root / "gaussian_noise/5" / IDS[7] / "a.JPEG", says=8)
    put(root / "fog/1" / IDS[7] / "a.JPEG", says=7)
    with pytest.raises(UserError, match="c lacks fog/5: a mean over"):
        evaluate("imagenet-c", root)
    put(root / "fog/5" / IDS[7] / "a.JPEG", says=7)
    put(root / "speckle_noise/1" / IDS[7] / "a.JPEG", says=1)  # one of the four that do not count
    metrics, view = evaluate("imagenet-c", root, save=tmp_path / "final")
    assert metrics["top1"] == ((50 + 0) / 2 + (100 + 100) / 2) / 2
    assert (
        "mean over 2 corruptions and severities 1, 5, not normalised, 1 to 2 images of each severity" in view.protocol
    )
    assert not [name for name in metrics if "_95_" in name]
    groups = json.loads((tmp_path / "final" / "groups.json").read_text())
    assert groups["gaussian_noise"]["1"] == {"images": 2, "top1": 50, "top5": 50}
    assert groups["fog"]["1"]["top1"] == 100
    assert not (tmp_path / "final" / "predictions.csv").exists()


def test_mistakes_in_the_folders(evaluate: Callable[..., object], tmp_path: Path) -> None:
    put(tmp_path / "v2/1000/a.png", says=1)
    with pytest.raises(UserError, match="1000 is no class of imagenet-v2"):
        read("imagenet-v2", tmp_path / "v2")
    (tmp_path / "empty/3").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images of imagenet-v2"):
        read("imagenet-v2", tmp_path / "empty")
    put(tmp_path / "c/fog/6" / IDS[0] / "a.png", says=1)
    with pytest.raises(UserError, match="6 is no severity"):
        read("imagenet-c", tmp_path / "c")
    put(tmp_path / "real/ILSVRC2012_val_00050001.JPEG", says=1)
    with pytest.raises(UserError, match="no validation image of ImageNet"):
        read("imagenet-real", tmp_path / "real")
    with pytest.raises(UserError, match=r"needs a model of the 1,000 classes of ImageNet-1K; this one has 1,000"):
        evaluate("imagenet-a", tmp_path, classes=IDS[::-1])


# --- as typed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model of ImageNet's classes, trained for a step on an image of each."""
    root = tmp_path_factory.mktemp("classes") / "tiny"
    for number, name in enumerate(IDS):
        put(root / "train" / name / "a.png", says=number)
    for number in (0, 1, 6):
        put(root / "val" / IDS[number] / f"ILSVRC2012_val_{number + 1:08d}.png", says=number)
    results = tmp_path_factory.mktemp("benchmarks")
    line = ["pretrain", "--recipe", "digits", *SMALL_MODEL, "--batch-size", "8", "--workers", "0", "--data", str(root)]
    line += ["--set", "data.img_size=16", "--set", "schedule.unit=steps", "--set", "schedule.length=1"]
    run_here(*line, "--out", results)
    return only_run(results)


def test_real_labels_of_images_in_tars_need_a_folder(tmp_path: Path) -> None:
    small_data.classes(tmp_path / "own")
    shards.write(tmp_path / "own", tmp_path / "tars", 10**9)
    task = ClassificationTask(Colours(), IDS, Normalise(CONFIG.mean, CONFIG.std), None, 0.0)
    entry = ClassificationEvaluation(on="imagenet-real")
    with pytest.raises(UserError, match="the images of this run are in tars") as refused:
        build_evaluation(task, CONFIG, entry, FIRST, small_data.opened(tmp_path / "tars"))
    assert "--data FOLDER" in refused.value.hint


def test_scores_go_to_the_record_and_into_the_table(run: Path, hcnet: Hcnet, tmp_path: Path) -> None:
    put(tmp_path / "imagenet-a" / IDS[6] / "a.jpg", says=6)
    put(tmp_path / "imagenet-v2/10/a.jpg", says=10)
    done = hcnet("evaluate", run, "--on", "imagenet-v2,imagenet-a,imagenet-real", "--data", tmp_path / "imagenet-a")
    assert done.code == 2
    assert "imagenet-a is not laid out as imagenet-v2 is" in done.err
    before = (run / "run.json").read_bytes()
    commands = re.findall(r"^hcnet evaluate results/runs/RUN (.*imagenet.*)$", DOC, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        done = hcnet("evaluate", run, *command.replace("/data", str(tmp_path)).split())
        assert done.code == 0, done.err
    info = runs.read_record(run / "run.json")
    for name in ("imagenetv2", "imageneta", "imagenetreal"):
        assert {f"top1_{name}", f"ece_{name}"} <= info.metrics.keys()
        assert [one["settings"]["on"].replace("-", "") for one in info.evaluations if one["name"] == name] == [name]
    assert "1 of 7,500 images" in info.metric_notes["top1_imageneta"]
    earlier = json.loads(before)["metrics"]
    assert {name: info.metrics[name] for name in earlier} == earlier
    table = hcnet("report", "--results", run.parents[1], "--format", "csv")
    assert "top1_imagenetv2" in table.out
    assert re.search(r"\| +V2 \|", hcnet("report", "--results", run.parents[1], "--format", "markdown").out)
    # again: equal; on other images: refused
    assert "Equal to the run's record." in hcnet("evaluate", run, "--on", "imagenet-a").err
    put(tmp_path / "imagenet-a" / IDS[11] / "b.jpg", says=6)
    done = hcnet("evaluate", run, "--on", "imagenet-a")
    assert done.code == 2
    assert "would now be made as ImageNet-A, 2 of 7,500" in done.err
    # what is not asked for is not read
    shutil.rmtree(tmp_path / "imagenet-a")
    assert "Equal to the run's record." in hcnet("evaluate", run, "--on", "imagenet-v2").err
    assert "does not exist" in hcnet("evaluate", run, "--on", "imagenet-a").err
