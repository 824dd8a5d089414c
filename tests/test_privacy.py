"""Protects people: what a run records and what a report shows names no secret, and on request no folder and no name."""

from __future__ import annotations

import getpass
import json
import platform
import shutil
import sys
from pathlib import Path

import pytest
from conftest import SMALL_MODEL, Hcnet
from synthetic_runs import make_run

from hcnet_cli import privacy, report, runs
from hcnet_cli.study.record import Cell, StudyRecord
from hcnet_cli.study.table import tables

TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--set", f"model.args.token={TOKEN}"], ["--set", "model.args.token=***"]),
        (["--token", "abc"], ["--token", "***"]),
        (["--hub-api-key", "abc"], ["--hub-api-key", "***"]),
        (["--password=abc"], ["--password=***"]),
        (["--data", "https://me:pw@host/x"], ["--data", "https://***@host/x"]),
        (["--name", TOKEN], ["--name", "***"]),
        (["--set", "a={api_key: abc, lr: 1}"], ["--set", "a={api_key: ***, lr: 1}"]),
        (["--set", "x=" + "0a" * 20], ["--set", "x=***"]),
        (["--set", "WANDB_API_KEY=abc"], ["--set", "WANDB_API_KEY=***"]),
    ],
)
def test_secrets_in_a_command_are_masked(given: list[str], kept: list[str]) -> None:
    assert privacy.mask(given) == kept


@pytest.mark.parametrize(
    "text", ["model.args.class_token=true", "optim.lr=1e-3", "--seed", "data.path=/data/x", "head.num_tokens=4",
             "--name=monkey=see", "pretrain/imagenet", "a/b.c@d"],
)  # fmt: skip
def test_other_arguments_stay(text: str) -> None:
    assert privacy.mask([text]) == [text]


def test_the_home_folder_is_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(sys, "argv", ["/home/ada/bin/hcnet", "--data=/home/ada/x", "/data/home/ada", "/home/adam"])
    assert privacy.command_line() == ["~/bin/hcnet", "--data=~/x", "/data/home/ada", "/home/adam"]


def test_paths_for_the_public_are_their_last_part() -> None:
    text = "no /home/ada/data/x.png, ../../ada/y or ~/z; 12 img/s, a/b, 3/4, https://arxiv.org/abs/1"
    assert privacy.public_text(text) == "no x.png, y or z; 12 img/s, a/b, 3/4, https://arxiv.org/abs/1"
    assert (
        privacy.public_text("hcnet pretrain --data mine/cls9 --set a=b/c") == "hcnet pretrain --data cls9 --set a=b/c"
    )
    assert privacy.public_text("data: {path: mine/cls9, img_size: 32}") == "data: {path: cls9, img_size: 32}"
    assert privacy.public(["hcnet", "check", "--data", "mine/cls9"]) == ["hcnet", "check", "--data", "cls9"]
    assert privacy.public_text("from /r/runs/pretrain-s0/best.safetensors") == "from pretrain-s0/best.safetensors"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and a study as version 0.1 recorded them: with folders, names and a secret."""
    monkeypatch.setattr(platform, "node", lambda: "lovelace-laptop")
    monkeypatch.setattr(getpass, "getuser", lambda: "lovelace")
    argv = ["/home/lovelace/.venv/bin/hcnet", "pretrain", "--data", "/home/lovelace/corpus/digits", "--set"]
    argv.append(f"x.token={TOKEN}")
    machine = "lovelace-laptop, Linux x86_64, 2 cores"
    place = tmp_path / "lovelace" / "results"
    for seed in (0, 1):
        folder = make_run(
            place, seed=seed, score=97.25, argv=argv, host="lovelace-laptop", pictures=1, machine=machine,
            error="cannot read /home/lovelace/corpus/x.png", init={"source": "/home/lovelace/w/best.safetensors"},
            name=f"r{seed}", sessions=[{"argv": argv, "host": "lovelace-laptop", "machine": machine}],
        )  # fmt: skip
        (folder / "recipe.yaml").write_text("task: pretrain\nprotocol: x\ninit: /home/lovelace/w/best.safetensors\n")
    (place / "runs" / "broken").mkdir()
    cells = [Cell(arm=arm, task="pretrain", seed=0, run="r0", state="finished") for arm in ("full", "no-gate")]
    record = StudyRecord(
        name="s", title="study", argv=argv, arms={"full": {}, "no-gate": {}}, tasks=["pretrain"], seeds=[0], cells=cells
    )
    (place / "studies").mkdir()
    (place / "studies" / "s.json").write_text(record.model_dump_json())
    return place


@pytest.mark.parametrize("fmt", report.FORMATS)
def test_a_public_report_names_nobody(fmt: str, results: Path) -> None:
    made = report.report([results], fmt=fmt, extra=tables([results])[0], output=results / "out" / "r", public=True)
    for word in ("lovelace", "/home", TOKEN):
        assert word not in made, made[max(0, made.index(word) - 200) : made.index(word) + 200]
    assert "97.25" in made


@pytest.mark.parametrize("fmt", report.FORMATS)
def test_no_report_shows_a_secret(fmt: str, results: Path) -> None:
    assert TOKEN not in report.report([results], fmt=fmt, extra=tables([results])[0])


def test_a_public_report_has_the_same_numbers(results: Path) -> None:
    def numbers(public: bool) -> list[object]:
        content = json.loads(report.report([results], fmt="json", public=public))
        rows = [row for table in content["tables"] for row in table["rows"]]
        return [value for row in rows for value in row.values() if isinstance(value, int | float)]

    assert numbers(public=True) == numbers(public=False)


def test_a_run_records_neither_secrets_nor_the_home_folder(
    hcnet: Hcnet, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it goes on, and is evaluated, with the paths that it keeps."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("hcnet_cli.profile.throughput", lambda *_, **__: 100.0)
    shutil.copytree(folder_of_images, tmp_path / "data")
    monkeypatch.setenv("HCNET_IMAGENET", "~/data")
    arguments = ["pretrain", "--recipe", "digits", *SMALL_MODEL, "--set", "data.img_size=16", "--batch-size", "8",
                 "--workers", "0", "--epochs", "1", "--out", str(tmp_path / "out")]  # fmt: skip
    done = hcnet(*arguments, "--name", "first", "--data", str(tmp_path / "data"), "--device", "cpu")
    assert done.code == 0, done.err
    kept = [file.read_text() for file in (tmp_path / "out" / "runs" / "first").glob("*.[jy]*")]
    assert len(kept) == 3
    for text in kept:
        assert str(tmp_path) not in text
        assert platform.node() not in text
    assert "This run is finished" in hcnet(*arguments, "--name", "first").err  # the same data, by $HCNET_IMAGENET
    assert "Equal to the run's record" in hcnet("evaluate", str(tmp_path / "out" / "runs" / "first")).err
    again = hcnet(*arguments, "--name", "second", "--init", "~/out/runs/first", "--seed", "1")
    assert again.code == 0, again.err
    assert runs.read_record(tmp_path / "out" / "runs" / "second" / "run.json").init["source"].startswith("~/out/")
