"""Protects `hcnet ablate` as a person uses it: cells are ordinary runs, none twice, and no failure is hidden."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
from conftest import SMALL_MODEL, Done

from hcnet_cli import runs
from hcnet_cli.study import machine
from hcnet_cli.study import runner as study

Hcnet = Callable[..., Done]
FAKE_PROGRAM = (sys.executable, str(Path(__file__).parent / "fake_training.py"))
SMALL = (
    *("--recipe", "digits", *SMALL_MODEL, "--epochs", "1", "--set", "train.batch_size=8"),
    *("--set", "data.img_size=16"),
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Cells are played by fake_training.py; call it to say how they behave."""
    monkeypatch.setattr(study, "PROGRAM", FAKE_PROGRAM)
    monkeypatch.setattr(study, "POLL_EVERY", 0.02)
    monkeypatch.chdir(tmp_path)

    def behave(**wanted: Any) -> None:
        monkeypatch.setenv("FAKE", json.dumps(wanted))

    behave()
    return behave


def calls(results: Path = Path("results")) -> list[list[Any]]:
    """[task, label, init, fresh, OMP_NUM_THREADS, CUDA_VISIBLE_DEVICES] of every cell that was started."""
    file = results / "calls.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def labels() -> list[str]:
    return sorted(call[1] for call in calls())


def record(results: Path = Path("results")) -> dict[str, Any]:
    (file,) = (results / "studies").glob("*.json")
    return json.loads(file.read_text())


def states(results: Path = Path("results")) -> dict[str, str]:
    return {f"{cell['arm']} s{cell['seed']}": cell["state"] for cell in record(results)["cells"]}


# --- the real program -------------------------------------------------------------------------------------------------


def test_the_real_program_trains_both_arms_and_shares_its_runs(
    hcnet: Hcnet, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows; a run made by hand before is taken as it is; again, everything is there; the report has the table."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # somebody may commit meanwhile
    out = ("--out", tmp_path)
    assert hcnet("pretrain", *SMALL, "--data", folder_of_images, *out).code == 0
    (mine,) = (tmp_path / "runs").iterdir()
    before = (mine / "run.json").read_bytes()
    arguments = ("ablate", "--disable", "refinement", *SMALL, "--data", folder_of_images, "--seeds", "0", *out)
    done = hcnet(*arguments)
    assert done.code == 0, done.err
    assert "2 runs, 1 of them finished" in done.err
    assert (mine / "run.json").read_bytes() == before
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert "no-refinement" in done.out
    assert "numbers, not findings" in " ".join(done.out.split())
    again = hcnet(*arguments)
    assert (again.code, again.out) == (0, done.out)
    assert "2 runs, 2 of them finished" in again.err
    assert "no-refinement" in hcnet("report", "--results", tmp_path, "--table", "ablation").out
    ours, other = (
        json.loads((tmp_path / "runs" / c["run"] / "run.json").read_text()) for c in record(tmp_path)["cells"]
    )
    assert ours["params"] > other["params"]
    assert ours["macs"] > other["macs"]
    assert other["variant"].startswith("no-refinement")


def test_the_plan_is_printed_and_nothing_is_started(hcnet: Hcnet, folder_of_images: Path, tmp_path: Path) -> None:
    arguments = ("ablate", "--disable", "all", *SMALL, "--data", folder_of_images, "--out", tmp_path / "new")
    done = hcnet(*arguments, "--dry-run", "--seeds", "0,1")
    assert done.code == 0, done.err
    plan = " ".join(done.out.split())
    for words in ("no-conservation", "12, of which 0 are finished", "about 0:0", "pretrain/digits", "1 epoch,"):
        assert words in plan
    assert not (tmp_path / "new").exists()


# --- cells ------------------------------------------------------------------------------------------------------------


def test_as_typed_it_is_two_arms_and_three_seeds_of_three_epochs_on_the_embedded_digits(
    hcnet: Hcnet, fake: Callable[..., None]
) -> None:
    done = hcnet("ablate", "--disable", "refinement")
    assert done.code == 0
    assert "using the embedded digits" in done.err
    assert labels() == [f"{arm} s{seed}" for arm in ("full", "refinement") for seed in range(3)]
    recipes = {path.name: path.read_text() for path in Path("results/studies").glob("*/*.yaml")}
    assert recipes.keys() == {"full.yaml", "no-refinement.yaml"}
    assert all("length: 3" in text and "disable: [" in text for text in recipes.values())
    assert all(text in done.out for text in ("full", "no-refinement", "91.00"))


def test_finished_cells_are_never_run_twice_whatever_study_asks(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    assert hcnet("ablate", "--disable", "refinement", "--seeds", "0").code == 0
    assert hcnet("ablate", "--disable", "refinement", "--seeds", "0").code == 0
    assert labels() == ["full s0", "refinement s0"]
    assert hcnet("ablate", "--study", "components", "--seeds", "0").code == 0
    assert len(labels()) == len(set(labels())) == 6  # full and no-refinement were there
    assert hcnet("ablate", "--disable", "refinement", "--seeds", "0,1").code == 0  # one more seed
    assert [label for label in labels() if label.endswith("1")] == ["full s1", "refinement s1"]
    assert len(labels()) == len(set(labels())) == 8


def test_a_failed_cell_is_recorded_and_the_others_go_on(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    fake(fail=["refinement s1"])
    done = hcnet("ablate", "--disable", "refinement")
    assert done.code == 1
    assert states()["no-refinement s1"] == "failed"
    assert set(states().values()) == {"failed", "finished"}
    cell = next(cell for cell in record()["cells"] if cell["state"] == "failed")
    assert cell["error"] == "It broke."
    assert "some words" in (Path("results") / cell["log"]).read_text()
    assert cell["log"] in done.err
    told = " ".join(done.out.split())
    assert "Not counted: no-refinement, seed 1: unfinished at 4 of 10 steps; failed: It broke" in told
    fake()
    assert hcnet("ablate", "--disable", "refinement").code == 0  # the same command tries it again, and only it
    assert labels().count("refinement s1") == 2
    assert len(labels()) == 7


def test_a_refusal_of_the_first_arm_is_the_users_mistake(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    """What the program refuses for the full model it would refuse for every cell: one sentence, exit code 2."""
    fake(refuse=["full s0"], seconds=5)
    done = hcnet("ablate", "--disable", "refinement", "--jobs", "2")
    assert done.code == 2
    assert done.err.endswith("error: The data are not in order.\nMend them.\n")
    assert len(calls()) <= 2
    assert not list(Path("results/studies").glob("*.json"))


def test_a_refusal_of_another_arm_is_that_arms_failure(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    fake(refuse=["refinement s0"])
    done = hcnet("ablate", "--disable", "refinement", "--seeds", "0,1")
    assert done.code == 1
    assert list(states().values()).count("finished") == 3


def test_jobs_divide_cores_and_gpus(hcnet: Hcnet, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    fake(seconds=0.5)
    assert hcnet("ablate", "--disable", "gate", "--jobs", "2", "--seeds", "0,1").code == 0
    assert {(call[4], call[5]) for call in calls()} == {("4", "3"), ("4", "5")}
    assert hcnet("ablate", "--disable", "gate", "--jobs", "4", "--seeds", "2,3", "--device", "cpu").code == 0
    assert {(call[4], call[5]) for call in calls()[4:]} == {("2", "3,5")}


def test_torchrun_is_refused(hcnet: Hcnet, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = hcnet("ablate", "--disable", "gate")
    assert done.code == 2
    assert "without torchrun" in done.err


def test_fine_tuning_waits_for_its_own_pretraining_and_starts_from_it(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    fake(fail=["gate s1"])
    tasks = ("--task", "finetune-det", "--task", "pretrain", "--task", "finetune-seg")
    done = hcnet("ablate", "--disable", "gate", *tasks, "--seeds", "0,1", "--jobs", "3")
    assert done.code == 1
    started = {(task, label): init for task, label, init, *_ in calls()}
    assert ("finetune-det", "gate s1") not in started  # its pretraining failed
    for label in ("full s0", "full s1", "gate s0"):
        assert started["pretrain", label] == "none"
        for task in ("finetune-det", "finetune-seg"):
            name = Path(started[task, label]).name
            info = runs.read_record(Path(started[task, label]) / "run.json")
            arm, seed = label.split()
            assert (info.variant, info.seed) == ("no-gate" if arm == "gate" else "", int(seed[1:])), name
    text = hcnet("report", "--format", "markdown", "--table", "ablation").out
    for column in ("top-1", "box AP", "mIoU"):
        assert column in text
    assert "The pretrain run that it starts from failed" in text


def test_runs_of_another_code_version_are_told_and_fresh_makes_them_anew(
    hcnet: Hcnet, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "git_state", lambda: ("new", False))
    fake(commit="old")
    assert hcnet("ablate", "--disable", "gate", "--seeds", "0").code == 0
    fake(commit="new")
    done = hcnet("ablate", "--disable", "gate", "--seeds", "0,1,2")
    assert "2 finished runs are of another version of the code" in done.err
    told = " ".join(done.out.split())
    assert "Not counted: full, seed 0: unlike the others in code version: old instead of new" in told
    assert "Not counted: no-gate, seed 0" in told
    before = len(calls())
    done = hcnet("ablate", "--disable", "gate", "--seeds", "0,1,2", "--fresh")
    assert sorted(call[1] for call in calls()[before:]) == ["full s0", "gate s0"]
    assert all(call[3] for call in calls()[before:])
    assert "Not counted" not in done.out


def test_a_broken_record_is_a_failed_cell_until_fresh(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    assert hcnet("ablate", "--disable", "gate", "--seeds", "0").code == 0
    (victim,) = Path("results/runs").glob("*no-gate-s0*")
    (victim / "run.json").write_text("{")
    done = hcnet("ablate", "--disable", "gate", "--seeds", "0")
    assert done.code == 1
    assert "Not counted: no-gate, seed 0: results/runs/" in " ".join(done.out.split())
    assert hcnet("ablate", "--disable", "gate", "--seeds", "0", "--fresh").code == 0
    assert set(states().values()) == {"finished"}


def test_a_run_on_moved_data_is_recognised_by_the_program_itself(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    """The data's path is not their identity: the cell starts, finds itself finished, and is not trained again."""
    Path("a/train").mkdir(parents=True)
    Path("b/train").mkdir(parents=True)
    arguments = ("ablate", "--disable", "gate", "--recipe", "digits", "--seeds", "0")
    assert hcnet(*arguments, "--data", "a").code == 0
    made = {path: (path / "run.json").read_bytes() for path in Path("results/runs").iterdir()}
    assert hcnet(*arguments, "--data", "b").code == 0
    assert {path: (path / "run.json").read_bytes() for path in Path("results/runs").iterdir()} == made
    count = len(calls())
    assert hcnet(*arguments, "--data", "b").code == 0
    assert len(calls()) == count  # the study remembers which runs they are


def cells_of(folder: Path) -> list[dict[str, Any]]:
    return record(folder / "results")["cells"] if list(folder.glob("results/studies/*.json")) else []


def interrupted(tmp_path: Path, *numbers: signal.Signals) -> tuple[int, str]:
    """The program at a long study, in a process of its own, sent signals while two cells are at work."""
    code = (
        "import sys; from hcnet_cli.study import runner as study; from hcnet_cli import cli\n"
        f"study.PROGRAM, study.SHOW_EVERY = {FAKE_PROGRAM!r}, 0.1\n"
        "sys.argv = ['hcnet', 'ablate', '--disable', 'gate', '--jobs', '2']\n"
        "cli.main()"
    )
    env = {**os.environ, "FAKE": json.dumps({"seconds": 60})}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while sum(bool(cell["run"]) for cell in cells_of(tmp_path)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_and_the_same_command_goes_on(
    number: signal.Signals, tmp_path: Path, hcnet: Hcnet, fake: Callable[..., None]
) -> None:
    code, err = interrupted(tmp_path, number)
    assert code == 128 + number, err
    assert "Traceback" not in err
    assert "The same command continues from there" in err
    assert sorted(states(tmp_path / "results").values()) == ["interrupted"] * 2 + ["waiting"] * 4
    for folder in (tmp_path / "results" / "runs").iterdir():
        assert runs.read_record(folder / "run.json").status == "interrupted"
    assert hcnet("ablate", "--disable", "gate").code == 0
    assert set(states().values()) == {"finished"}
    assert len(list(Path("results/runs").iterdir())) == 6


def test_studies_at_once_that_share_an_arm_train_it_once(folder_of_images: Path, tmp_path: Path) -> None:
    """Two real commands; the one that comes second to the shared baseline waits for it, and both end well."""
    line = ("ablate", *SMALL, "--data", folder_of_images, "--seeds", "0", "--out", tmp_path, "--disable")
    ended = [program.done() for program in [fresh.start(*line, name) for name in ("refinement", "gate")]]
    assert [done.code for done in ended] == [0, 0], ended
    records = [json.loads(file.read_text()) for file in (tmp_path / "studies").glob("*.json")]
    assert [[cell["state"] for cell in one["cells"]] for one in records] == [["finished"] * 2] * 2
    shared = {cell["run"] for one in records for cell in one["cells"] if cell["arm"] == "full"}
    assert len(shared) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_a_run_in_use_is_waited_for_where_the_environment_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, second = runs.RunFolder(tmp_path), runs.RunFolder(tmp_path)
    monkeypatch.setenv(runs.WAIT_VARIABLE, "1")
    with folder.lock():
        waiting = threading.Thread(target=lambda: second.lock().__enter__())
        waiting.start()
        while runs.WAITING not in capfd.readouterr().err:
            time.sleep(0.05)
        assert waiting.is_alive()
    waiting.join(timeout=20)
    assert second.waited
    assert not folder.waited


def test_a_second_command_at_the_same_study_is_refused(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    assert hcnet("ablate", "--disable", "gate", "--seeds", "0").code == 0
    (folder,) = (path for path in Path("results/studies").iterdir() if path.is_dir())
    with study.exclusive(folder):
        done = hcnet("ablate", "--disable", "gate", "--seeds", "0")
    assert done.code == 2
    assert "Another process is working at this study" in done.err


def test_a_study_file_names_recipes_budget_and_seeds(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    Path("mine.yaml").write_text(
        "title: rates\n"
        "arms: {usual: {}, high: {optim.lr: 0.01}}\n"
        "runs:\n"
        "  - {recipe: pretrain/digits, changes: {schedule.length: 2}}\n"
        "  - {recipe: finetune-seg/digit-stuff, init: pretrain}\n"
        "seeds: [5, 6]\n"
    )
    assert hcnet("ablate", "--study", "mine.yaml").code == 0
    assert record()["seeds"] == [5, 6]
    assert len(calls()) == 8
    assert "length: 2" in next(Path("results/studies").glob("*/usual-pretrain.yaml")).read_text()
    assert hcnet("ablate", "--study", "mine.yaml", "--data", "x").code == 2


def test_a_cell_that_fails_has_no_score_though_its_output_names_a_run(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    """Such as the run whose weights it started from."""
    assert hcnet("ablate", "--disable", "gate", "--seeds", "0").code == 0
    named = record()["cells"][0]["run"]
    fake(killed={"gate s1": f"Weights from results/runs/{named}/best.safetensors: 60 of 60 tensors loaded."})
    done = hcnet("ablate", "--disable", "gate", "--seeds", "0,1")
    assert done.code == 1
    (cell,) = (cell for cell in record()["cells"] if (cell["arm"], cell["seed"]) == ("no-gate", 1))
    assert (cell["state"], cell["run"]) == ("failed", "")


def test_the_live_table_shows_every_cell(fake: Callable[..., None]) -> None:
    from hcnet_cli import recipe as rcp
    from hcnet_cli.study import design

    short, asked = design.disable_study(["gate"])
    plan = design.expand(short, asked, [design.Base(rcp.recipe_file("pretrain/digits"), ())])
    at_work = study.StudyProcess(plan, study.Settings(lambda _: ""))
    for cell, state in zip(at_work.record.cells, ("finished", "failed", "running", "waiting"), strict=False):
        cell.state = state  # type: ignore[assignment]
    grid = at_work.grid()
    shown = [str(text) for column in grid.columns for text in column.cells]
    assert shown == ["full", "no-gate", "finished", "failed", "starting", "waiting", "waiting", "waiting"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Name components to --disable, a --study, or a field to --sweep"),
        (
            ("--disable", "gate", "--study", "stencil"),
            "--disable and --study each make a study of their own: leave one out",
        ),
        (("--disable", "all+gate"), 'unknown component "all"'),
        (("--disable", "gate", "--seeds", ""), "not a list of whole numbers"),
        (("--disable", "gat"), 'unknown component "gat". Did you mean "gate"?'),
        (("--disable", "conduction+gate"), "without conduction there is no gate to disable"),
        (("--disable", ""), "unknown component"),
        (("--study", "component"), 'no study "component". Did you mean "components"?'),
        (("--study", "mine.yaml"), "no study file mine.yaml"),
        (("--arms", "t,pico"), "--arms names models for --study backbones"),
        (("--study", "backbones", "--arms", "t,t"), "t is there twice"),
        (("--study", "backbones", "--arms", "t"), "at least two arms"),
        (("--study", "backbones", "--arms", "t,a b"), "cannot be the name of an arm"),
        (("--study", "backbones", "--arms", "t,none.py:f"), "There is no file none.py"),
        (("--study", "backbones", "--arms", "t,pico", "--size", "s"), "the arm t sets model.size too"),
        (("--disable", "gate", "--task", "finetune"), "Did you mean"),
        (("--disable", "gate", "--seeds", "0;1"), "is not a list of whole numbers"),
        (("--disable", "gate", "--seeds", "1,1"), "names a seed twice"),
        (("--disable", "gate", "--jobs", "0"), "Invalid value"),
        (("--disable", "gate", "--size", "xl"), "unknown size"),
        (("--disable", "gate", "--set", "optim.lrr=1"), 'Did you mean "optim.lr"?'),
        (("--disable", "gate", "--set", "train.seed=1"), "--set train.seed cannot be set in an ablation"),
        (("--disable", "gate", "--set", "model.disable=[refinement]"), "the arm no-gate sets model.disable too"),
        (("--disable", "gate", "--recipe", "coco-1x"), "in an ablation, --task finetune-det"),
        (("--disable", "gate", "--task", "pretrain", "--task", "finetune-det", "--epochs", "2"), "study of one task"),
        (("--disable", "gate", "--task", "finetune-seg", "--epochs", "2"), "This recipe counts steps"),
        (("--disable", "gate", "--task", "pretrain", "--task", "pretrain"), "the same recipe"),
        (("--disabel", "gate"), "No such option"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], words: str, hcnet: Hcnet, fake: Callable[..., None], tmp_path: Path
) -> None:
    done = hcnet("ablate", *arguments)
    assert done.code == 2
    assert words in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


# --- the primary analysis and the number of seeds ---------------------------------------------------------------------


def test_until_adds_the_seeds_that_the_first_stage_asks_for(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    """Differences 1, 2: s² = 1/2 and t(0.975, 1) = 12.706, so that ±5 takes ceil(t² / 2 / 25) = 4 seeds."""
    fake(top1={"gate s0": 91.0, "gate s1": 93.0})
    arguments = ("ablate", "--disable", "gate", "--seeds", "0,1", "--until", "5", "--max-seeds", "8")
    done = hcnet(*arguments)
    assert done.code == 0, done.err
    assert "takes 2 seeds more" in done.err
    assert record()["seeds"] == [0, 1, 2, 3]
    assert record()["primary"]["seeds"] == [0, 1]
    assert len(labels()) == 8
    assert "those of the two stages" in " ".join(done.out.split())
    again = hcnet(*arguments)
    assert (again.code, again.out, len(labels())) == (0, done.out, 8)
    changed = hcnet("ablate", "--disable", "gate", "--seeds", "0,1", "--until", "0.5", "--max-seeds", "8")
    assert (changed.code, len(labels())) == (2, 8)
    assert "until is 5.0 and cannot become 0.5" in changed.err


def test_until_ends_at_max_seeds_and_after_a_failure_of_the_first_stage(
    hcnet: Hcnet, fake: Callable[..., None]
) -> None:
    scores = {"gate s0": 91.0, "gate s1": 93.0}
    fake(top1=scores, fail=["gate s1"])
    arguments = ("ablate", "--disable", "gate", "--seeds", "0,1", "--until", "0.1", "--max-seeds", "3")
    assert (hcnet(*arguments).code, record()["seeds"]) == (1, [0, 1])
    fake(top1=scores)
    done = hcnet(*arguments)
    assert (done.code, record()["seeds"]) == (0, [0, 1, 2])
    assert "--max-seeds" in done.out


def test_what_is_primary_is_said_before_and_fixed(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    first = ("ablate", "--disable", "gate", "--seeds", "0,1")
    done = hcnet(*first, "--test", "sign-flip", "--margin", "0.2")
    assert "primary: top-1, exact sign-flip test, two-sided, p < 0.05; equivalence within ±0.2" in done.err
    assert "power: none: 2 seeds cannot have p < 0.05 whatever they show; 6 can" in done.err
    assert done.err.index("power: none") < done.err.index("full, seed 0: started")
    assert "Fixed before training." in " ".join(done.out.split())
    refused = hcnet(*first, "--margin", "0.5")
    assert (refused.code, "margin is 0.2 and cannot become 0.5" in refused.err) == (2, True)
    assert hcnet(*first).code == 0  # flags left out: as it was
    assert record()["primary"]["analysis"]["test"] == "sign-flip"
    more = hcnet("ablate", "--disable", "gate", "--seeds", "0,1,2")
    assert "Seeds added when results of the first 2 were known: 2." in " ".join(more.out.split())


def test_no_seed_with_a_result_leaves_its_study(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    """A choice among results would make any study significant."""
    first = ("ablate", "--disable", "gate", "--seeds")
    assert hcnet(*first, "0,1,2").code == 0
    for fewer, dry in (("1", True), ("1", False), ("2,0", False)):
        done = hcnet(*first, fewer, *(["--dry-run"] if dry else []))
        assert done.code == 0, done.err
        stay = [seed for seed in "012" if seed not in fewer]
        assert f"Seeds with results stay in the study: {', '.join(stay)}. Without results/studies/" in done.err
        assert ("6, of which 6 are finished" in done.out) is dry
    assert sorted(record()["seeds"]) == [0, 1, 2]
    done = hcnet(*first, "3")
    assert sorted(record()["seeds"]) == [0, 1, 2, 3]
    assert "Seeds added when results of the first 3 were known: 3." in " ".join(done.out.split())
    assert len(labels()) == len(set(labels())) == 8
    (file,) = Path("results/studies").glob("*.json")
    file.unlink()
    done = hcnet(*first, "1,2")
    assert record()["seeds"] == [1, 2]
    known = "Fixed when 8 runs of the study's arms were finished already, 4 of them with other seeds than those planned"
    assert known in " ".join(done.out.split())


def test_results_of_runs_that_are_gone_stay_known(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    first = ("ablate", "--disable", "gate", "--seeds")
    assert hcnet(*first, "0,1").code == 0
    shutil.rmtree("results/runs")
    assert "Fixed before training." in " ".join(hcnet(*first, "0,1").out.split())  # as it was
    shutil.rmtree("results/runs")
    for flags in (("--test", "sign-flip"), ()):
        done = hcnet(*first, "2,3", *flags)
        assert done.code == 0, done.err
        assert "Fixed when 4 runs of the study's arms were finished already: p is" in " ".join(done.out.split())


def test_until_that_begins_again_says_what_was_known(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    fake(top1={"gate s0": 91.0, "gate s1": 93.0})
    arguments = ("ablate", "--disable", "gate", "--seeds", "0,1", "--until", "5", "--max-seeds", "8")
    assert hcnet(*arguments).code == 0
    (file,) = Path("results/studies").glob("*.json")
    file.unlink()
    known = "Fixed when 8 runs of the study's arms were finished already, 4 of them with other seeds than those planned"
    assert known in " ".join(hcnet(*arguments).out.split())


def test_seeds_that_follow_a_single_one_are_named(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    for seeds in ("0", "0,1", "0,1,2,3"):
        done = hcnet("ablate", "--disable", "gate", "--seeds", seeds)
        assert done.code == 0, done.err
    assert "Seeds added when results of seed 0 were known: 1, 2, 3." in " ".join(done.out.split())


def test_planned_seeds_without_a_result_may_go_and_are_named(hcnet: Hcnet, fake: Callable[..., None]) -> None:
    fake(fail=["gate s1", "full s1", "full s2", "gate s2"])
    assert hcnet("ablate", "--disable", "gate", "--seeds", "0,1,2").code == 1
    fake()
    assert hcnet("ablate", "--disable", "gate", "--seeds", "0,3").code == 0
    assert record()["seeds"] == [0, 3]
    assert "Seeds that were asked for and have no result: 1, 2." in " ".join(hcnet("report").out.split())
    assert hcnet("ablate", "--disable", "gate", "--seeds", "3").code == 0
    assert "Seeds that were asked for and have no result: 1, 2." in " ".join(hcnet("report").out.split())
    assert hcnet("ablate", "--disable", "gate", "--seeds", "1").code == 0
    assert sorted(record()["seeds"]) == [0, 1, 3]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--detect", "-1"), "--detect -1 is no difference"),
        (("--detect", "nan"), "--detect nan is no difference"),
        (("--margin", "0"), "--margin"),
        (("--until", "0.5", "--seeds", "0"), "at least two seeds"),
        (("--until", "0.5", "--test", "sign-flip"), "must be paired-t"),
        (("--max-seeds", "5"), "is for a study with"),
        (("--test", "wilcoxon"), "--test"),
    ],
)
def test_a_mistake_in_the_analysis_is_one_sentence(
    flags: tuple[str, ...], words: str, hcnet: Hcnet, fake: Callable[..., None]
) -> None:
    done = hcnet("ablate", "--disable", "gate", *flags)
    assert (done.code, calls()) == (2, [])
    assert words in done.err
    assert "Traceback" not in done.err


def test_the_plan_says_what_the_seeds_can_show_and_how_many_it_takes(
    hcnet: Hcnet, folder_of_images: Path, tmp_path: Path
) -> None:
    given = ("--data", folder_of_images, "--out", tmp_path / "new")
    done = hcnet("ablate", "--disable", "gate", *SMALL, *given, "--dry-run", "--seeds", "0,1", "--detect", "0.3")
    plan = " ".join(done.out.split())
    assert "spread: 0.50 points, a guess" in plan
    assert "2 seeds show a difference of 5.77 with 80 % power" in plan
    assert "0.3 points take 24 seeds: 48 runs" in plan
