"""Protects `hcnet evaluate`: a finished run gains scores by other protocols, and loses none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
from conftest import SMALL_MODEL, Done, only_run, run_here
from safetensors.torch import load_file

from hcnet_cli import checkpoint, engine, runs
from hcnet_cli.console import UserError
from hcnet_cli.header import read_metadata
from hcnet_cli.recipe import parse_override, recipe_file, resolve

DOC = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
Hcnet = Callable[..., Done]


@pytest.fixture(scope="module")
def classifier(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("evaluate")
    line = ["pretrain", "--recipe", "digits", *SMALL_MODEL, "--batch-size", "8", "--epochs", "1"]
    line += ["--set", "data.img_size=16", "--workers", "0"]
    run_here(*line, "--data", folder_of_images, "--out", results)
    return only_run(results)


@pytest.fixture
def run(classifier: Path, tmp_path: Path) -> Path:
    """A copy of the run, so that a test may change it."""
    return Path(shutil.copytree(classifier, tmp_path / "run"))


def test_a_new_protocol_is_added_to_the_record(run: Path, hcnet: Hcnet) -> None:
    before = runs.read_record(run / "run.json")
    done = hcnet("evaluate", run, "--set", "evaluation.large.img_size=24", "--set", "evaluation.large.crop_pct=1.0")
    assert done.code == 0, done.err
    after = runs.read_record(run / "run.json")
    figures = {"top1", "top5", "nll", "ece", "brier"}
    named = {name for name in after.metrics if "_95_" not in name}  # an interval is there unless all are right
    assert named == figures | {f"{name}_large" for name in figures}
    assert {name: after.metrics[name] for name in before.metrics} == before.metrics
    assert after.metric_notes["top1_large"] == "24 x 24, crop 1"
    assert after.metric_notes["ece"] == after.metric_notes["ece_large"]
    assert after.metric_notes["ece"].startswith("15 bins of equal width")
    assert after.evaluations[0]["name"] == "large"
    assert after.evaluations[0]["settings"]["img_size"] == 24
    assert after.fingerprint == before.fingerprint
    assert (run / "final" / "large" / "confusion.json").is_file()
    # the recipe holds the new entry, so it can be made again, and is as it was
    again = hcnet("evaluate", run, "--on", "large")
    assert again.code == 0
    assert again.out == done.out


def test_an_interrupted_evaluation_keeps_the_scores_before_it(
    run: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"--set=evaluation.{name}.img_size={size}" for name, size in (("one", 16), ("two", 24))]
    whole = engine.evaluate

    def interrupted(job: Any, evaluation: Any) -> Any:
        if evaluation.name == "two":
            raise KeyboardInterrupt
        return whole(job, evaluation)

    monkeypatch.setattr(engine, "evaluate", interrupted)
    done = hcnet("evaluate", run, *settings)
    assert (done.code, done.err.splitlines()[-1]) == (130, "Stopped.")
    kept = runs.read_record(run / "run.json")
    assert [one["name"] for one in kept.evaluations] == ["one"]
    assert "top1_one" in kept.metrics
    monkeypatch.undo()
    done = hcnet("evaluate", run)  # what has no score yet
    assert done.code == 0, done.err
    assert [one["name"] for one in runs.read_record(run / "run.json").evaluations] == ["one", "two"]


def test_without_further_evaluations_the_record_is_checked(run: Path, hcnet: Hcnet) -> None:
    done = hcnet("evaluate", run)
    assert done.code == 0
    assert "Equal to the run's record." in done.err
    record = json.loads((run / "run.json").read_text())
    record["metrics"]["top1"] += 10
    (run / "run.json").write_text(json.dumps(record))
    done = hcnet("evaluate", run)
    assert done.code == 2
    assert "score otherwise than the run's record says" in done.err


def test_a_run_of_an_older_version_gains_the_figures_that_it_lacks(run: Path, hcnet: Hcnet) -> None:
    folder = runs.RunFolder(run)
    info = folder.require()
    whole = dict(info.metrics)
    info.metrics = {name: whole[name] for name in ("top1", "top5")}
    info.metric_notes = {}
    about = {**read_metadata(folder.best), "metrics": info.metrics}
    checkpoint.save_tensors(folder.best, load_file(folder.best), about)
    folder.write(info)
    done = hcnet("evaluate", run)
    assert done.code == 0, done.err
    after = runs.read_record(folder.record)
    assert after.metrics == pytest.approx(whole, abs=2e-4)
    assert after.metric_notes["nll"] == "mean negative logarithm of the label's probability"
    assert not runs.contradiction(folder, after)


def test_an_evaluation_that_sees_the_same_pixels_gives_the_same_score(run: Path, hcnet: Hcnet) -> None:
    """img_size and crop_pct of the data, given explicitly, are another entry with equal scores."""
    done = hcnet("evaluate", run, "--set", "evaluation.same.img_size=16", "--set", "evaluation.same.crop_pct=1.0")
    assert done.code == 0, done.err
    metrics = runs.read_record(run / "run.json").metrics
    assert metrics["top1_same"] == metrics["top1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "evaluation.val.crop_pct=0.5"), "stays as it is"),
        (("--set", "optim.lr=0.1"), "changes nothing but its own section"),
        (("--on", "nothing"), 'no evaluation "nothing"'),
        (("--on", "imagenet-v3"), 'Did you mean "imagenet-v2"?'),
        (("--on", "imagenet-a", "--data", "."), "needs a model of the 1,000 classes of ImageNet-1K; this one has 3"),
        (("--set", "evaluation.val.on=imagenet-a"), "stays as it is"),
        (("--set", "evaluation.x.mode=slide"), "unknown key"),
        (("--data", "digits"), "holds other data"),
        (
            ("--data", "digits"),
            "--data is for the run's own data. Other data of the same classes are scored with: hcnet",
        ),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: str, run: Path, hcnet: Hcnet) -> None:
    record = (run / "run.json").read_bytes()
    done = hcnet("evaluate", run, *arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert (run / "run.json").read_bytes() == record


def test_another_protocol_under_the_same_name_is_refused(run: Path, hcnet: Hcnet) -> None:
    assert hcnet("evaluate", run, "--set", "evaluation.large.img_size=24").code == 0
    record = (run / "run.json").read_bytes()
    for named in (("--on", "large"), ()):
        done = hcnet("evaluate", run, *named, "--set", "evaluation.large.img_size=20")
        assert done.code == 2
        assert "was made with img_size=24, not 20" in done.err
    again = hcnet("evaluate", run, "--set", "evaluation.large.img_size=24")
    assert (again.code, "Evaluating large" in again.err, "Equal to the run's record." in again.err) == (0, True, True)
    assert (run / "run.json").read_bytes() == record


def test_features_and_corruptions_of_the_run(run: Path, hcnet: Hcnet) -> None:
    """As the docs type it; in the record with its protocol, and the same again with other batches."""
    (line,) = re.findall(r"^hcnet evaluate results/runs/RUN (.*knn.*)$", DOC, flags=re.MULTILINE)
    done = hcnet("evaluate", run, *line.split())
    assert done.code == 0, done.err
    assert "C = 0.001: " in done.err
    info = runs.read_record(run / "run.json")
    assert {"top1_knn", "top1_probe", "ece_probe", "top1_corruptions"} <= info.metrics.keys()
    assert "nll_knn" not in info.metrics
    assert info.metric_notes["top1_knn"].startswith("20 nearest neighbours by cosine, votes exp(s / 0.07)")
    assert "C of 0.001, 0.01, 0.1, 1, 10 by a held-out fifth" in info.metric_notes["top1_probe"]
    assert info.metric_notes["top1_corruptions"].startswith("computed by hcnet, not ImageNet-C")
    groups = json.loads((run / "final" / "corruptions" / "groups.json").read_text())
    assert {name: list(severities) for name, severities in groups.items()} == {
        name: ["1", "2", "3"] for name in ("noise", "blur", "contrast", "pixelate", "jpeg")
    }
    scores = [one["top1"] for severities in groups.values() for one in severities.values()]
    assert info.metrics["top1_corruptions"] == pytest.approx(sum(scores) / 15)
    again = hcnet("evaluate", run, "--on", "corruptions,probe,knn", "--set", "train.eval_batch_size=3")
    assert again.code == 0, again.err
    assert again.err.count("Equal to the run's record.") == 3


def test_half_a_run_and_no_run(run: Path, hcnet: Hcnet, tmp_path: Path) -> None:
    assert "There is no run" in hcnet("evaluate", "nowhere").err
    (tmp_path / "empty").mkdir()
    assert "no run.json" in hcnet("evaluate", tmp_path / "empty").err
    record = json.loads((run / "run.json").read_text()) | {"status": "interrupted"}
    (run / "run.json").write_text(json.dumps(record))
    done = hcnet("evaluate", run)
    assert done.code == 2
    assert "is not finished" in done.err


def test_the_first_evaluation_is_the_one_of_training() -> None:
    for text in ("evaluation.ss.when=end", "evaluation.ms.when=training", "evaluation.a-b.mode=slide"):
        key, value = parse_override(text)
        with pytest.raises(UserError, match="evaluation"):
            resolve(recipe_file("digit-stuff", "finetune-seg"), [(key, value, "--set")])


def test_any_number_of_processes_evaluates_a_run_of_micro_batches(small_classifier: Path, tmp_path: Path) -> None:
    """Two micro-batches of one image, which two processes could not train."""
    data, out = small_classifier / "data", tmp_path / "results"
    line = ["pretrain", "--recipe", "digits", *SMALL_MODEL, "--batch-size", "2", "--accumulate", "2", "--epochs", "1"]
    run_here(*line, "--workers", "0", "--set", "data.mixup=0", "--set", "data.cutmix=0", "--data", data, "--out", out)
    folder = only_run(out)
    scores = runs.read_record(folder / "run.json").metrics
    fresh.run_two("evaluate", folder)
    assert runs.read_record(folder / "run.json").metrics == scores
