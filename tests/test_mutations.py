"""Protects printed numbers: every change of a finished run is harmless, named or refused; none is silent.

A tiny run is made once. Each mutation changes bytes or fields of a copy: its folder, its data or its weights. After it

    report      prints the same numbers, or names the run's folder among those that are not counted, or in a note;
    train       the same command ends with 0 and the same record, or with a warning, or with exit 2 and one sentence;
    evaluate    prints the same numbers, or warns, or refuses with exit 2.

Never a traceback. Nothing but `train` and `evaluate` loads torch; both run in this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL_MODEL
from PIL import Image
from safetensors.torch import load_file, save_file

from hcnet_cli import report, runs
from hcnet_cli.header import read_metadata
from hcnet_cli.record import checksum

TINY = ("--recipe", "digits", *SMALL_MODEL, "--set", "data.img_size=16", "--batch-size", "8", "--workers", "0")
NUMBERS = ("top1", "top1_ci", "top5", "n", "seeds", "epochs", "params_m", "macs_g", "steps_total", "batch_size")
Mutation = Callable[[Path, Path], None]  # of (run folder, data folder)


def pretrain(data: Path, results: Path, seed: int = 0) -> list[str]:
    return ["pretrain", *TINY, "--data", str(data), "--out", str(results), "--epochs", "1", "--seed", str(seed)]


def program(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program in this process."""
    from hcnet_cli.cli import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["hcnet", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.argv = before
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def original(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and `results`: two seeds of one finished run. Speed is not measured, which takes seconds."""
    root = tmp_path_factory.mktemp("mutations")
    shutil.copytree(folder_of_images, root / "data" / "colors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hcnet_cli.profile.throughput", lambda *_, **__: 100.0)
        for seed in (0, 1):
            code, _, err = program(*pretrain(root / "data" / "colors", root / "results", seed))
            assert code == 0, err
    return root


def first_run(root: Path) -> Path:
    return next(path for path in sorted((root / "results" / "runs").iterdir()) if "-s0-" in path.name)


def numbers(root: Path) -> tuple[str, str]:
    """(the printed numbers of all measured rows, the notes) of `hcnet report`."""
    content = json.loads(report.report([root / "results"], fmt="json"))
    rows = [row for table in content["tables"] for row in table["rows"] if row["kind"] != "published"]
    shown = [{key: row.get(key) for key in (*NUMBERS, "changes", "model", "status")} for row in rows]
    notes = [note for table in content["tables"] for note in table["notes"]] + content["notes"]
    return json.dumps(shown, sort_keys=True), "\n".join(notes)


# --- the list of mutations --------------------------------------------------------------------------------------------


def field(key: str, value: Any, signed: bool = False) -> Mutation:
    """A field of run.json; with `signed` its checksum is made to match, as a determined editor would."""

    def mutate(run: Path, _: Path) -> None:
        content = json.loads((run / "run.json").read_text())
        inner = content
        *sections, last = key.split(".")
        for name in sections:
            inner = inner[name]
        inner[last] = value(inner.get(last)) if callable(value) else value
        if signed:
            content["checksum"] = checksum(content)
        (run / "run.json").write_text(json.dumps(content, indent=2))

    return mutate


def without(key: str) -> Mutation:
    def mutate(run: Path, _: Path) -> None:
        content = json.loads((run / "run.json").read_text())
        del content[key]
        (run / "run.json").write_text(json.dumps(content))

    return mutate


def recipe(key: str, value: Any) -> Mutation:
    def mutate(run: Path, _: Path) -> None:
        content = yaml.safe_load((run / "recipe.yaml").read_text())
        inner = content
        *sections, last = key.split(".")
        for name in sections:
            inner = inner[name]
        inner[last] = value
        (run / "recipe.yaml").write_text(yaml.dump(content))

    return mutate


def flipped(name: str, at: float) -> Mutation:
    """One bit of a file, at a part of its length."""

    def mutate(run: Path, _: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[min(len(content) - 1, int(at * len(content)))] ^= 1
        (run / name).write_bytes(content)

    return mutate


def cut(name: str, at: float) -> Mutation:
    def mutate(run: Path, _: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: int(at * len(content))])

    return mutate


def longer(name: str) -> Mutation:
    def mutate(run: Path, _: Path) -> None:
        with (run / name).open("ab") as file:
            file.write(b"\n{}\n")

    return mutate


def gone(name: str) -> Mutation:
    def mutate(run: Path, _: Path) -> None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return mutate


def copied(**fields: Any) -> Mutation:
    """The run's folder once more under another name, with fields of run.json and recipe.yaml changed."""

    def mutate(run: Path, data: Path) -> None:
        twin = run.with_name(fields.get("name", "twin"))
        shutil.copytree(run, twin)
        if "seed" in fields:
            field("seed", fields["seed"], signed=True)(twin, data)
            if fields.get("recipe"):
                recipe("train.seed", fields["seed"])(twin, data)
        if "fingerprint" in fields:
            field("fingerprint", fields["fingerprint"], signed=True)(twin, data)

    return mutate


def exchanged(name: str) -> Mutation:
    """A file or folder of the run of the other seed in its place."""

    def mutate(run: Path, data: Path) -> None:
        other = next(path for path in run.parent.iterdir() if path != run)
        gone(name)(run, data)
        (shutil.copytree if (other / name).is_dir() else shutil.copy)(other / name, run / name)

    return mutate


def weights(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Mutation:
    """The tensors or the metadata of best.safetensors, written as a valid file."""

    def mutate(run: Path, _: Path) -> None:
        file = run / "best.safetensors"
        state, about = load_file(file), read_metadata(file)
        change(state, about)
        save_file(state, file, metadata={"hcnet": json.dumps(about)} if about else None)

    return mutate


def state_json(key: str, value: Any) -> Mutation:
    def mutate(run: Path, _: Path) -> None:
        file = run / "last" / "state.json"
        content = json.loads(file.read_text())
        content["state"][key] = value
        file.write_text(json.dumps(content))

    return mutate


def images(split: str) -> Callable[[Path], list[Path]]:
    return lambda data: sorted((data / split).glob("*/*.png"))


def swapped(split: str) -> Mutation:
    """Two images of two classes in each other's place: a label error that keeps every name."""

    def mutate(_: Path, data: Path) -> None:
        a, *_rest, b = images(split)(data)
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)

    return mutate


def noise(split: str) -> Mutation:
    """An image replaced by noise in a file of the same number of bytes."""

    def mutate(_: Path, data: Path) -> None:
        file = images(split)(data)[0]
        size = file.stat().st_size
        for height in range(24, 1, -1):
            buffer = io.BytesIO()
            Image.fromarray(np.random.RandomState(0).randint(0, 255, (height, 18, 3)).astype(np.uint8)).save(
                buffer, "png"
            )
            if buffer.tell() <= size:
                file.write_bytes(buffer.getvalue() + b"\0" * (size - buffer.tell()))
                return

    return mutate


def data_file(split: str, action: str) -> Mutation:
    def mutate(_: Path, data: Path) -> None:
        file = images(split)(data)[0]
        if action == "removed":
            file.unlink()
        elif action == "renamed":
            file.rename(file.with_name("another.png"))
        elif action == "moved":
            file.rename(data / split / "red" / "moved.png")
        else:
            shutil.copy(file, file.with_name("more.png"))

    return mutate


def class_renamed(_: Path, data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "red").rename(data / split / "scarlet")


def metrics_line(text: str) -> Mutation:
    def mutate(run: Path, _: Path) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(text)

    return mutate


def raise_top1(value: float | None) -> float:
    return float(value or 0) + 5


RECORD = {
    **{f"run.json {key}={value}": field(key, value) for key, value in [
        ("metrics.top1", 150), ("metrics.top1", -3), ("metrics.top1", float("nan")), ("metrics.top1", float("inf")),
        ("metrics.top1", 12.5), ("metrics.top1", "12.5"), ("metrics.top1", None), ("metrics.top5", 1.0),
        ("metrics", {}), ("metrics.top1_more", 99.0), ("seed", 7), ("seed", -1), ("steps_done", 99), ("steps_done", 1),
        ("steps_total", 1), ("steps_total", 30), ("steps_per_epoch", 1), ("status", "running"),
        ("status", "interrupted"), ("status", "failed"), ("status", "cleared"), ("status", "odd"),
        ("fingerprint", "00000000"), ("config", "x"),
        ("config", ""), ("weights", "x"), ("weights", ""), ("best_step", 1), ("best_step", 99), ("batch_size", 16),
        ("batch_size", 0), ("params", 1), ("macs", 1), ("img_size", 224), ("precision", "bf16"),
        ("task", "finetune-seg"),
        ("task", "levitate"), ("protocol", "pretrain/imagenet"), ("changes", {}), ("size", "t"), ("variant", "no-gate"),
        ("model", "resnet18"), ("init", {"source": "x", "digest": "y"}), ("evaluated_only", True),
        ("metric_notes", {"top1": "ten crops"}), ("data.name", "imagenet-1k"), ("data.digest", "0"),
        ("data.num_train", 1281167), ("data.num_val", 50000), ("data.split", "test"), ("schema_version", 2),
        ("git_commit", "f" * 40), ("argv", ["hcnet", "pretrain", "--lr", "9"]), ("sessions", []), ("checksum", "0"),
        ("recipe_digest", "0"), ("images_per_second", 1e9), ("machine", "faster"),
    ]},
    **{f"run.json without {key}": without(key) for key in (
        "checksum", "config", "metrics", "fingerprint", "data", "seed", "weights", "steps_done", "schema_version",
    )},
    **{f"run.json signed {key}={value}": field(key, value, signed=True) for key, value in [
        ("metrics.top1", 12.5), ("metrics.top5", 12.5), ("seed", 7), ("fingerprint", "00000000"), ("weights", "x"),
        ("best_step", 1), ("steps_done", 99), ("data.digest", "0"), ("task", "finetune-seg"),
    ]},
}  # fmt: skip
FILES = {
    **{f"recipe.yaml {key}={value}": recipe(key, value) for key, value in [
        ("optim.lr", 0.5), ("optim.weight_decay", 0.0), ("train.seed", 7), ("train.batch_size", 4),
        ("schedule.length", 9),
        ("data.img_size", 32), ("data.mean", [0.0, 0.0, 0.0]), ("data.mixup", 0.3), ("model.kernel_size", 5),
        ("train.workers", 3), ("protocol", "mine"), ("task", "finetune-seg"), ("optim.lr", "fast"),
        ("init", "elsewhere"),
    ]},
    **{f"{name} flipped at {at}": flipped(name, at) for name, at in [
        ("run.json", 0.01), ("run.json", 0.5), ("recipe.yaml", 0.3), ("best.safetensors", 0.0),
        ("best.safetensors", 0.01), ("best.safetensors", 0.5), ("best.safetensors", 1.0), ("metrics.jsonl", 0.5),
        ("last/state.json", 0.5), ("last/model.safetensors", 0.9), ("last/optimizer.safetensors", 0.9),
        ("final/per_class.json", 0.5),
    ]},
    **{f"{name} cut at {at}": cut(name, at) for name, at in [
        ("run.json", 0.0), ("run.json", 0.5), ("recipe.yaml", 0.0), ("recipe.yaml", 0.5), ("best.safetensors", 0.0),
        ("best.safetensors", 0.001), ("best.safetensors", 0.9), ("metrics.jsonl", 0.5), ("last/state.json", 0.5),
    ]},
    **{f"{name} longer": longer(name) for name in ("run.json", "recipe.yaml", "best.safetensors", "metrics.jsonl")},
    **{f"{name} gone": gone(name) for name in (
        "run.json", "recipe.yaml", "best.safetensors", "metrics.jsonl", "last", "final", "last/state.json",
    )},
    **{f"{name} of another run": exchanged(name) for name in (
        "run.json", "recipe.yaml", "best.safetensors", "last", "metrics.jsonl", "final",
    )},
    "metrics.jsonl has NaN": metrics_line('{"step": 3, "top1": NaN}\n'),
    "metrics.jsonl has a higher score": metrics_line('{"step": 3, "top1": 100.0}\n'),
    "metrics.jsonl is no JSON": metrics_line("{{{\n"),
    "state.json step": state_json("step", 1),
    "state.json run": state_json("run", {}),
    "state.json best": state_json("best", 99.0),
    "copy": copied(),
    "copy with another seed": copied(seed=7),
    "copy with another seed in both files": copied(seed=7, recipe=True),
    "copy with another fingerprint": copied(fingerprint="0" * 8),
}  # fmt: skip
WEIGHTS = {
    "weights scaled": weights(lambda state, _: next(iter(state.values())).mul_(2)),
    "weights without metadata": weights(lambda _, about: about.clear()),
    "weights of another step": weights(lambda _, about: about.update(step=1)),
    "weights of another fingerprint": weights(lambda _, about: about.update(fingerprint="0" * 8)),
    "weights with other metrics": weights(lambda _, about: about["metrics"].update(top1=1.0)),
    "weights without metrics": weights(lambda _, about: about.pop("metrics")),
    "weights with another digest": weights(lambda _, about: about.update(weights="0")),
    "weights lack a tensor": weights(lambda state, _: state.pop(next(iter(state)))),
    "weights have another head": weights(lambda state, _: state.update({"head.fc.bias": torch.zeros(5)})),
}  # fmt: skip
DATA = {
    **{f"{split} file {action}": data_file(split, action) for split in ("train", "val")
       for action in ("removed", "renamed", "moved", "added")},
    "class renamed": class_renamed,
}  # fmt: skip
# Content alone: names, sizes and times of files may stay as they are.
CONTENT = {f"{what} {split}": make(split) for split in ("train", "val")
           for what, make in (("images swapped in", swapped), ("noise at equal size in", noise))}  # fmt: skip
MUTATIONS: dict[str, Mutation] = {**RECORD, **FILES, **WEIGHTS, **DATA, **CONTENT}


# --- what must hold ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before(original: Path) -> tuple[str, str, dict[str, Any]]:
    """What the untouched run gives: its row, what evaluate prints, its record."""
    shown, _ = numbers(original)
    code, out, err = program("evaluate", str(first_run(original)))
    assert code == 0, err
    assert json.loads(shown)[0]["n"] == 2
    return shown, out, runs.read_record(first_run(original) / "run.json").metrics


@contextlib.contextmanager
def mutated(original: Path, tmp_path: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """The root of a mutated copy, and the run. Its data have the path of the original."""
    run = first_run(original)
    shutil.copytree(original / "results", tmp_path / "results")
    data = original / "data" / "colors"
    kept = tmp_path / "kept"
    changes_data = name in {*DATA, *CONTENT}
    if changes_data:
        shutil.copytree(data, kept)
    try:
        MUTATIONS[name](tmp_path / "results" / "runs" / run.name, data)
        yield tmp_path, tmp_path / "results" / "runs" / run.name
    finally:
        if changes_data:
            shutil.rmtree(data)
            shutil.copytree(kept, data)


def test_there_are_a_hundred() -> None:
    assert len(MUTATIONS) >= 100


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_harmless_named_or_refused(
    name: str, original: Path, before: tuple[str, str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcnet_cli.profile.throughput", lambda *_, **__: 100.0)
    with mutated(original, tmp_path, name) as (root, run):
        shown, notes = numbers(root)
        named = re.search(rf"{re.escape(run.name)}|twin", notes)
        assert shown == before[0] or named, "report prints other numbers without a word"
        if named:
            assert len(notes.splitlines()) < 40
        code, out, err = program("evaluate", str(run))
        check(code, err)
        scores = re.findall(r"top\d [\d.]+", out)
        assert code or "warning:" in err or scores == re.findall(r"top\d [\d.]+", before[1]), err
        code, out, err = program(*pretrain(original / "data" / "colors", root / "results"))
        check(code, err)
        if code == 0 and run.exists() and "warning:" not in err and "is finished" in err:
            again, notes = numbers(root)
            assert again == before[0] or run.name in notes or "twin" in notes, err


@pytest.mark.parametrize("name", CONTENT)
def test_other_content_of_equal_size_is_other_data(
    name: str, original: Path, before: tuple[str, str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command is another run, or refused; evaluate refuses."""
    monkeypatch.setattr("hcnet_cli.profile.throughput", lambda *_, **__: 100.0)
    with mutated(original, tmp_path, name) as (root, run):
        assert program("evaluate", str(run))[0] == 2
        code, _, err = program(*pretrain(original / "data" / "colors", root / "results"))
        assert code == 2 or len(list(run.parent.iterdir())) == 3, err


def check(code: int, err: str) -> None:
    assert "Traceback" not in err
    assert code in (0, 2), err
    if code == 2:
        assert err.count("error:") == 1, err
