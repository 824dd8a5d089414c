"""Protects `--on slurm` and `hcnet studies` with fake commands of Slurm; tests/test_real_slurm.py has the real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_slurm
import pytest
from conftest import Done
from synthetic_runs import make_run

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.study import attempt, slurm, submit
from hcnet_cli.study import runner as study

Hcnet = Callable[..., Done]
STUDY = ("ablate", "--disable", "gate", "--seeds", "0,1")
FAKE_PROGRAM = Path(__file__).parent / "fake_training.py"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fake commands of Slurm come first in PATH, and a folder of its own to work in."""
    commands = fake_slurm.install(tmp_path / "bin", max_array_size=1001)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return commands


def folder_of_study() -> Path:
    (file,) = Path("results/studies").glob("*.json")
    return file.with_suffix("")


def run_script(folder: Path, task: int, first: int = 0, script: str = "pretrain.sh", **env: str) -> int:
    """One array task, as Slurm would start it; the training program is fake_training.py."""
    text = (folder / script).read_text().replace("-m hcnet_cli ", f"{shlex.quote(str(FAKE_PROGRAM))} ")
    (folder / "fake.sh").write_text(text)
    env = {"SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": str(task), **env}
    return subprocess.run(["bash", folder / "fake.sh", str(first)], env={**os.environ, **env}).returncode


# --- submitting -------------------------------------------------------------------------------------------------------


def test_a_study_is_one_array_that_is_submitted_once(hcnet: Hcnet, fake: Path) -> None:
    flags = ("--on", "slurm", "--partition", "gpu", "--gpus", "1", "--cpus", "4", "--time", "2:00:00", "--at-once", "3")
    done = hcnet(*STUDY, *flags, "--sbatch-args", "--account='a b' --qos=long")
    assert done.code == 0, done.err
    assert "Job 100: 4 cells, at most 8.0 GPU-hours" in done.err
    folder = folder_of_study()
    (line,) = fake_slurm.submitted(fake)
    assert "--array=0-3%3" in line
    assert line[-2:] == [str(folder / "pretrain.sh"), "0"]
    directives = [text.removeprefix("#SBATCH ") for text in (folder / "pretrain.sh").read_text().splitlines()
                  if text.startswith("#SBATCH")]  # fmt: skip
    options = [word for text in directives for word in shlex.split(text)]
    for word in ("--partition=gpu", "--gpus=1", "--cpus-per-task=4", "--time=2:00:00", "--requeue", "--account=a b"):
        assert word in options, word
    (fake / "queue.txt").write_text("".join(f"100_{n}|PENDING|Priority\n" for n in range(3)))
    again = hcnet(*STUDY, *flags)
    assert "3 cells of pretrain.sh are in the queue already" in again.err
    assert "--array=3%3" in fake_slurm.submitted(fake)[1]


def test_the_dry_run_prints_the_script_and_writes_nothing(hcnet: Hcnet, fake: Path) -> None:
    done = hcnet(*STUDY, "--on", "slurm", "--dry-run")
    assert done.code == 0, done.err
    assert "#!/bin/bash" in done.out
    assert "# sbatch --parsable --array=0-3" in done.out
    assert subprocess.run(["bash", "-n"], input=done.out, text=True).returncode == 0
    assert not list(Path().iterdir())
    assert not fake_slurm.submitted(fake)


def test_the_script_runs_the_ordinary_command_of_each_cell(
    hcnet: Hcnet, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells in the order of the record; fine-tuning starts from its own pretraining through the link of that cell."""
    monkeypatch.setenv("FAKE", "{}")
    tasks = ("--task", "pretrain", "--task", "finetune-det")
    assert hcnet(*STUDY, *tasks, "--on", "slurm").code == 0
    folder = folder_of_study()
    _, second = fake_slurm.submitted(fake)
    assert "--dependency=aftercorr:100" in second
    assert "--kill-on-invalid-dep=yes" in second
    for task in ("pretrain", "finetune-det"):
        for number in (0, 3):
            assert run_script(folder, number, script=f"{task}.sh") == 0
            if task == "pretrain":
                cell = {0: "full-pretrain-s0", 3: "no-gate-pretrain-s1"}[number]
                newest = max(Path("results/runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
                submit.link(folder / cell, newest)
    calls = [json.loads(line) for line in Path("results/calls.txt").read_text().splitlines()]
    assert [(task, label) for task, label, *_ in calls] == [
        (task, label) for task in ("pretrain", "finetune-det") for label in ("full s0", "gate s1")
    ]
    assert [Path(init).name for *_, init, _, _, _ in calls[2:]] == ["full-pretrain-s0.run", "no-gate-pretrain-s1.run"]
    states = hcnet("studies")
    assert "8 cells, 2 finished" in states.out  # the fake program makes no links; those above are the pretrainings'


def test_arrays_stay_below_max_array_size(hcnet: Hcnet, fake: Path, tmp_path: Path) -> None:
    fake_slurm.install(fake, max_array_size=5)
    seeds = ",".join(map(str, range(6)))
    assert hcnet("ablate", "--disable", "gate", "--seeds", seeds, "--on", "slurm").code == 0
    lines = fake_slurm.submitted(fake)
    assert [(line[1], line[-1]) for line in lines] == [
        ("--array=0-4", "0"),
        ("--array=0-4", "5"),
        ("--array=0-1", "10"),
    ]
    jobs = slurm.read_jobs(folder_of_study())
    assert (jobs["full-s0"], jobs["no-gate-s2"], jobs["no-gate-s5"]) == ("100_0", "101_0", "102_1")
    assert slurm.ranges([7, 0, 1, 2, 9, 10]) == "0-2,7,9-10"


def test_one_run_is_the_command_without_the_options_of_slurm(hcnet: Hcnet, fake: Path) -> None:
    done = hcnet("pretrain", "--epochs", "1", "--on=slurm", "--gpus", "2", "--set", "model.depths=[1,1,1,1]")
    assert done.code == 0, done.err
    (script,) = Path("results/slurm").glob("*/run.sh")
    (command,) = [line for line in script.read_text().splitlines() if line.startswith("command=")]
    words = shlex.split(command.removeprefix("command=(").removesuffix(")"))
    assert words[-5:] == ["pretrain", "--epochs", "1", "--set", "model.depths=[1,1,1,1]"]
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert "SIGUSR1" in words[words.index("--signals-to-handle") + 1]
    assert "pretrain-s0" in hcnet("studies").out


def test_one_run_is_that_of_the_files_as_they_were_when_it_was_submitted(hcnet: Hcnet, fake: Path) -> None:
    recipe, model = Path("mine.yaml"), Path("net.py")
    model.write_text("def build(): ...\n")
    folders = []
    for length in (1, 2):
        recipe.write_text(hcnet("recipes", "show", "digits").out.replace("length: 6", f"length: {length}"))
        done = hcnet("pretrain", "--recipe=mine.yaml", "--model", "net.py:build", "--on", "slurm")
        assert done.code == 0, done.err
        folders += [folder for folder in Path("results/slurm").iterdir() if folder not in folders]
        (command,) = [line for line in (folders[-1] / "run.sh").read_text().splitlines() if "command=" in line]
        words = shlex.split(command.removeprefix("command=(").removesuffix(")"))[3:]
        assert words[:3] == ["pretrain", "--recipe", str(folders[-1] / "recipe.yaml")]
        assert words[-2].startswith("--set")
        assert words[-1].startswith("model.digest=")
        assert rcp.resolve(Path(words[2])).recipe.schedule.length == length
    assert len(folders) == 2
    make_run(Path("results"), name="whole")
    submit.link(folders[-1] / "pretrain-s0", Path("results/runs/whole"))
    done = hcnet("pretrain", "--recipe=mine.yaml", "--model", "net.py:build", "--on", "slurm")
    assert "This run is finished" in done.err
    assert len(fake_slurm.submitted(fake)) == 2


@pytest.mark.parametrize(
    ("gpus", "cores", "threads"),
    [(0, {}, 1), (1, {"SLURM_CPUS_ON_NODE": "6"}, 6), (8, {"SLURM_CPUS_PER_TASK": "64"}, 8), (8, {}, 1)],
)
def test_each_process_has_its_share_of_the_cores(
    gpus: int, cores: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = slurm._environment(slurm.Cluster(gpus=gpus)) + "echo $OMP_NUM_THREADS"
    assert subprocess.run(["bash", "-c", script], env=cores, capture_output=True, text=True).stdout == f"{threads}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--partition", "gpu"), "--partition is for --on slurm"),
        (("--on", "pbs"), "known is slurm"),
        (("--on", "slurm", "--time", "soon"), "--time soon is no time limit"),
        (("--on", "slurm", "--time", "0"), "--time 0 is no time limit"),
        (("--on", "slurm", "--fresh"), "--fresh cannot be combined"),
        (("--on", "slurm", "--out", "r\\j"), "Slurm takes the backslash for an escape"),
        (("--on", "slurm", "--sbatch-args", "--array=0-9"), "--sbatch-args cannot set --array"),
        (("--on", "slurm", "--sbatch-args", "--comment=token=abcdef"), "a password or a token"),
        (("--on", "slurm", "--sbatch-args", "'--qos"), "--sbatch-args cannot be read"),
        (("--on", "slurm", "--sbatch-args", "--qos=a\nrm"), "one line of plain text"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    arguments: tuple[str, ...], words: str, hcnet: Hcnet, fake: Path
) -> None:
    for command in (STUDY, ("pretrain",)):
        done = hcnet(*command, *arguments)
        assert (done.code, "Traceback" in done.err) == (2, False)
        assert words in done.err
    assert not list(Path().iterdir())


def test_a_percent_in_a_folder_is_no_pattern_of_slurm(hcnet: Hcnet, fake: Path) -> None:
    done = hcnet(*STUDY, "--on", "slurm", "--out", "r%j", "--dry-run")
    assert "--output=r%%j/studies/" in done.out


@pytest.mark.parametrize(
    ("words", "refused", "flag"),
    [
        ("--qos=long --time=1:00:00", "--time=1:00:00", "--time"),
        ("--time 60", "--time", "--time"),
        ("--tim=60", "--tim=60", "--time"),
        ("-t60", "-t60", "--time"),
        ("-J mine", "-J", ""),
        ("--job-name=mine", "--job-name=mine", ""),
        ("-p gpu", "-p", "--partition"),
        ("-c 4", "-c", "--cpus"),
        ("-G 2", "-G", "--gpus"),
        ("--gpus=a100:2", "--gpus=a100:2", "--gpus"),
        ("-N2", "-N2", ""),
        ("--signal=USR1@60", "--signal=USR1@60", ""),
    ],
)
def test_what_the_script_sets_is_no_further_option_of_sbatch(words: str, refused: str, flag: str) -> None:
    with pytest.raises(UserError, match=rf"^--sbatch-args cannot set {re.escape(refused)}: hcnet does\.$") as error:
        slurm.Cluster(args=words)
    assert error.value.hint == (f"Its flag is {flag}." if flag else "")


def test_other_options_of_sbatch_are_taken() -> None:
    words = "--gres=gpu:1 --comment time --time-min=5 --nodelist=n1 --gpus-per-node=2 --mem=4G -A lab --qos long -n 1"
    assert slurm.Cluster(args=words).words == shlex.split(words)


def test_what_sbatch_refuses_is_said(hcnet: Hcnet, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake / "refuse.txt").touch()
    done = hcnet(*STUDY, "--on", "slurm")
    assert done.code == 2
    assert "sbatch failed: sbatch: error: Batch job submission failed" in done.err
    monkeypatch.setenv("PATH", "/usr/bin-without-slurm")
    assert "There is no squeue here" in hcnet(*STUDY, "--on", "slurm").err


def test_names_with_spaces_and_quotes_stay_words(
    hcnet: Hcnet, fake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No name of a folder is ever run: the place is called $(touch hacked) and so on."""
    place = tmp_path / "a 'b' $(touch hacked) \"c\""
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("FAKE", "{}")
    assert hcnet(*STUDY, "--on", "slurm", "--out", "r $(touch hacked) 's'").code == 0
    (file,) = Path("r $(touch hacked) 's'/studies").glob("*.json")
    assert run_script(file.with_suffix(""), 0) == 0
    assert (Path("r $(touch hacked) 's'") / "calls.txt").exists()
    assert not list(tmp_path.rglob("hacked"))


def test_the_home_folder_is_not_named_in_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/some body")
    word = slurm.quote("/home/some body/my data")
    assert "body" not in word
    assert subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True).stdout == b"/home/some body/my data"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("2-1:30", 178200), ("1-00:00:01", 86401)],
)
def test_time_limits_are_those_of_sbatch(text: str, expected: int) -> None:
    assert slurm.seconds(text) == expected


# --- going on ---------------------------------------------------------------------------------------------------------


def with_run(tmp_path: Path, **fields: Any) -> Path:
    folder = make_run(tmp_path, "digits", log=False, name="one", **fields)
    submit.link(tmp_path / "cell", folder)
    return tmp_path / "cell"


def test_the_record_decides_about_going_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert attempt.main(str(tmp_path / "cell"), "saved", "2") == 1  # no run yet: it failed before
    assert "before the run had begun" not in capfd.readouterr().err
    assert attempt.main(str(tmp_path / "cell"), "saved", "138") == 1
    assert "before the run had begun" in capfd.readouterr().err
    for status, code in (("interrupted", 0), ("running", 0), ("failed", 1), ("finished", 1)):
        stem = with_run(tmp_path / status, status=status)
        assert attempt.main(str(stem), "saved", "143") == code, status


def test_a_cell_stops_after_requeues_without_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stem = with_run(tmp_path, status="interrupted", steps_done=7)
    assert [attempt.main(str(stem), "start", "2") for _ in range(4)] == [0, 0, 0, 1]
    assert "started 3 times without getting beyond step 7" in capfd.readouterr().err
    (tmp_path / "runs" / "one" / "last").mkdir()  # a checkpoint newer than the record is progress
    (tmp_path / "runs" / "one" / "last" / "state.json").write_text('{"state": {"step": 8}}')
    assert attempt.main(str(stem), "start", "2") == 0
    slurm.forget_attempts(tmp_path, ["cell"])
    assert slurm.attempts(tmp_path, "cell") == []


# --- the states -------------------------------------------------------------------------------------------------------


def test_every_state_of_a_cell(hcnet: Hcnet, fake: Path) -> None:
    arguments = ("ablate", "--disable", "gate", "--seeds", "0,1,2", "--on", "slurm")
    assert hcnet(*arguments).code == 0
    folder = folder_of_study()
    made = {
        "full-s0": {"status": "finished"},
        "no-gate-s0": {
            "status": "running",
            "steps_done": 3,
            "steps_total": 10,
            "best_step": 2,
            "node": "n7",
            "host": "another",
        },
        "full-s1": {"status": "interrupted", "steps_done": 4, "best_step": 2},
        "no-gate-s1": {"status": "failed", "error": "It broke."},
    }
    for cell, fields in made.items():
        submit.link(folder / cell, make_run(Path("results"), "digits", log=False, name=cell, **fields))
    for cell in ("full-s1", "no-gate-s1", "full-s2"):
        (folder / f"{cell}.attempts").write_text("0\n")
    (folder / "full-s2.log").write_text("error: The data are not in order.\nMend them.\n")
    (fake / "queue.txt").write_text("100_1|RUNNING|None\n100_2|PENDING|BeginTime\n100_5|PENDING|Priority\n")
    shown = hcnet("studies", folder.name)
    rows = {line.split()[0]: line for line in shown.out.splitlines() if line.startswith((" full", " no-gate"))}
    for cell, words in {
        "full-s0": ("finished", "top1"),
        "no-gate-s0": ("running", "step 3 of 10", "on n7", "job 100_1"),
        "full-s1": ("requeued", "step 4", "start 2", "BeginTime"),
        "no-gate-s1": ("failed", "It broke."),
        "full-s2": ("failed", "The data are not in order."),
        "no-gate-s2": ("waiting", "Priority"),
    }.items():
        assert all(word in rows[cell] for word in words), rows[cell]
    (fake / "queue.txt").unlink()
    blind = hcnet("studies")
    assert "What waits in the queue is not known" in blind.err
    assert blind.code == 0
    assert hcnet("studies", "nothing").code == 2


def test_a_study_on_this_machine_has_states_too(hcnet: Hcnet, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "PROGRAM", (sys.executable, str(FAKE_PROGRAM)))
    monkeypatch.setattr(study, "POLL_EVERY", 0.02)
    monkeypatch.setenv("FAKE", json.dumps({"fail": ["gate s0"]}))
    assert hcnet("ablate", "--disable", "gate", "--seeds", "0").code == 1
    assert "2 cells, 1 finished, 1 failed" in hcnet("studies").out


def test_a_file_of_jobs_that_hcnet_did_not_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slurm.json").write_text("[1]")
    with pytest.raises(UserError, match="is not what hcnet wrote"):
        slurm.read_jobs(tmp_path)


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "slurm.md").read_text()


def test_every_command_of_the_page_runs(hcnet: Hcnet, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded digits for ImageNet. tests/test_torchrun.py has the lines of torchrun."""

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hcnet_cli.cli.studies.time", SimpleNamespace(sleep=stop))  # its own alone: locks sleep too
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    hcnet ")]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line.replace("/data/imagenet", "digits"))[1:]
        words = [folder_of_study().name if word == "STUDY" else word for word in words]
        done = hcnet(*words)
        assert done.code == (130 if "--watch" in words else 0), done.err
    assert len(fake_slurm.submitted(fake)) == 2
