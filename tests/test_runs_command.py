"""Protects `hcnet runs`: what is shown is what is there, and nothing else is removed or renamed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Hcnet, environment
from synthetic_runs import make_run
from synthetic_studies import study_of

from hcnet_cli.cli import complete
from hcnet_cli.runs import RunFolder, own_folder, read_record


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_run(Path("results"), name="whole", score=91.5)
    make_run(Path("results"), seed=1, done=0.5, status="interrupted", name="half")
    return Path("results")


def test_ls_has_every_run_with_its_score_size_and_state(results: Path, hcnet: Hcnet) -> None:
    (results / "runs" / "whole" / "best.safetensors").write_bytes(bytes(3_456_789))
    (results / "runs" / "broken").mkdir()
    make_run(results, name="elsewhere", seed=2)  # of a task that this installation does not know
    record = results / "runs" / "elsewhere" / "run.json"
    record.write_text(record.read_text().replace('"task": "pretrain"', '"task": "turned"'))
    done = hcnet("runs", "ls")
    assert done.code == 0
    assert "elsewhere" in done.out
    assert hcnet("runs", "show", "elsewhere").code == 0
    assert re.search(r"half +50 %(.|\n)+whole +finished", done.out)
    assert "top-1 91.50" in done.out
    assert "3.5 MB" in done.out
    assert "3 runs, 1 unfinished" in done.out
    assert "broken has no run.json." in done.err


def test_a_running_run_is_as_far_as_its_log_says(results: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is written at checkpoints alone. Long names fit into 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "finetune-det-digit-scenes-pico-s0-1a2b3c4d"
    make_run(results, seed=3, done=0.0, status="running", name=name)
    folder = RunFolder(results / "runs" / name)
    info = read_record(folder.record)
    folder.log_file.write_text(f'{{"step": 100}}\n{{"step": {info.steps_total * 3 // 4}}}\n{{"ste')
    with folder.lock():
        assert re.search(rf"{name} +running 7[45] %", hcnet("runs", "ls").out)
        assert f"step {info.steps_total * 3 // 4:,} of" in hcnet("runs", "show", name).out
        assert re.search(r"\(running at 7[45] %\)", hcnet("report", "--results", "results").out.replace("\n", " "))
    assert read_record(folder.record).steps_done == 0


def test_show_names_the_command_that_goes_on(results: Path, hcnet: Hcnet) -> None:
    done = hcnet("runs", "show", "half")
    assert done.code == 0
    lines = {line[:13].strip(): line[13:] for line in done.out.splitlines() if line[:13].strip()}
    assert lines["status"] == "interrupted, step 220 of 440"
    assert lines["command"] == "hcnet pretrain --size pico --seed 1"
    assert lines["data"] == "digits: 1,438 training and 359 validation images"


def test_a_name_that_is_nearly_a_run_is_answered_with_it(results: Path, hcnet: Hcnet) -> None:
    assert 'There is no run whle. Did you mean "whole"?' in hcnet("runs", "show", "whle").err


def test_a_run_is_called_by_the_fingerprint_that_its_name_ends_in(results: Path, hcnet: Hcnet) -> None:
    (results / "runs" / "half").rename(results / "runs" / "pretrain-digits-pico-s1-0a1b2c3d")
    assert "pretrain-digits-pico-s1-0a1b2c3d" in hcnet("runs", "show", "0a1b2c3d").out
    assert "are enough" in hcnet("runs", "ls").out
    (results / "runs" / "whole").rename(results / "runs" / "other-0a1b2c3d")
    two = hcnet("runs", "rm", "0a1b2c3d", "--yes")
    assert two.code == 2
    assert "2 runs end in 0a1b2c3d: other-0a1b2c3d, pretrain-digits-pico-s1-0a1b2c3d." in two.err


def test_the_tab_key_offers_the_recipes_of_the_task() -> None:
    of_seg = complete.recipes(SimpleNamespace(info_name="finetune-seg"), "")  # type: ignore[arg-type]
    assert {"digit-stuff", "finetune-seg/digit-stuff"} <= set(of_seg)
    assert not [name for name in of_seg if name.startswith(("pretrain", "finetune-det"))]
    assert complete.recipes(SimpleNamespace(info_name="ablate"), "pretrain/d") == ["pretrain/digits"]  # type: ignore[arg-type]


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from hcnet_cli.cli import main; main()"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("recipes show pretrain/d", ["pretrain/digits"]),
        ("recipes explain optim.no", ["optim.no_decay"]),
        ("pretrain --model swinv2_t", ["swinv2_tiny_window16_256", "swinv2_tiny_window8_256"]),
        ("pretrain --track tensorboard,w", ["tensorboard,wandb"]),
        ("pretrain --init results/runs/h", ["results/runs/half"]),
        ("evaluate w", ["whole"]),
        ("explain results/runs/w", ["results/runs/whole"]),
        ("export whole --format on", ["onnx"]),
        ("report --table a", ["ade20k", "ablation", "all"]),
        ("report --format m", ["markdown"]),
        ("report --compare results/runs/half results/runs/w", ["results/runs/whole"]),
        ("track whole --to m", ["mlflow"]),
    ],
)
def test_the_tab_key_offers_what_a_list_holds(words: str, offered: list[str], results: Path) -> None:
    line = f"hcnet {words}"
    asked = {"_HCNET_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, cwd=results.parent, env=environment() | asked, capture_output=True, text=True)
    assert done.stdout.split() == offered, done.stderr


def test_rm_removes_what_runs_write_and_nothing_else(results: Path, hcnet: Hcnet) -> None:
    whole, half = (results / "runs" / name for name in ("whole", "half"))
    (half / "notes.txt").write_text("mine")
    for name in ("best.safetensors", "replaced.safetensors"):  # the second: of a run that --fresh replaced
        (whole / name).write_bytes(b"weights")
        (half / name).write_bytes(b"weights")
    refused = hcnet("runs", "rm", "whole", "half")
    assert refused.code == 2
    assert "Give --yes" in refused.err
    assert (whole / "run.json").exists()
    done = hcnet("runs", "rm", "whole", str(half), "--yes")
    assert done.code == 0
    assert not whole.exists()
    assert [path.name for path in half.iterdir() if path.name != ".lock"] == ["notes.txt"]
    assert f"Removed {whole}.\nRemoved the run; {half} holds other files too, and was left." in done.err


def test_what_is_needed_elsewhere_is_said(results: Path, hcnet: Hcnet) -> None:
    source = {"source": "results/runs/whole/best.safetensors"}
    make_run(results, "digit-scenes", status="interrupted", done=0.5, name="det", init=source)
    done = hcnet("runs", "rm", "whole")
    assert "The unfinished run det starts from its weights." in done.err


def test_mv_keeps_the_run_and_refuses_what_would_lose_it(results: Path, hcnet: Hcnet) -> None:
    record = (results / "runs" / "whole" / "run.json").read_bytes()
    assert hcnet("runs", "mv", "whole", "best-so-far").code == 0
    assert (results / "runs" / "best-so-far" / "run.json").read_bytes() == record
    for name, reason in (("half", "exists already"), ("../up", "cannot be the name"), ("a b", "cannot be the name")):
        done = hcnet("runs", "mv", "best-so-far", name)
        assert done.code == 2
        assert reason in done.err
    with RunFolder(results / "runs" / "half").lock():
        assert "Another process is working" in hcnet("runs", "mv", "half", "other").err
        assert "Another process is working" in hcnet("runs", "rm", "half", "--yes").err
    assert (results / "runs" / "half" / "run.json").exists()


def test_a_copy_does_not_hide_the_finished_run(results: Path) -> None:
    """Of unfinished ones nobody knows which is meant."""
    runs = results / "runs"
    whole, half = (RunFolder(runs / name).require().fingerprint for name in ("whole", "half"))
    for name in ("whole", "half"):
        shutil.copytree(runs / name, runs / f"{name}2")
    assert own_folder(results, "", "usual", whole).path == runs / "whole"
    assert own_folder(results, "", "usual", half).path == runs / "usual"
    shutil.rmtree(runs / "half2")
    assert own_folder(results, "", "usual", half).path == runs / "half"


def test_a_run_of_a_study_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hcnet: Hcnet) -> None:
    monkeypatch.chdir(tmp_path)
    study = study_of(Path("results"))
    Path("results/studies").mkdir()
    Path("results/studies/mine.json").write_text(study.model_dump_json())
    name = sorted(path.name for path in Path("results/runs").iterdir())[0]
    done = hcnet("runs", "mv", name, "other")
    assert done.code == 2
    assert "counts" in done.err
    assert "counts it." in hcnet("runs", "rm", name).err
