"""Protects answers that need no PyTorch: they are given before it is loaded, and they are the ones it would give."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import SMALL_MODEL, Hcnet, environment, only_run
from safetensors.torch import save_file
from timm.models import _registry
from torch import Tensor

from hcnet_cli import cache, console, finished, header, model_names, weights
from hcnet_cli.console import UserError
from hcnet_cli.recipe import recipe_file, resolve

WITHOUT_TORCH = """
import json, sys
from hcnet_cli import cache
from hcnet_cli.cli import main
cache.UNSETTLED_SECONDS = -60.0
for words in json.loads(sys.argv[1]):
    sys.argv = ["hcnet", *words]
    try:
        main()
    except SystemExit as stop:
        print("ANSWER", stop.code or 0, {"torch", "timm"} & set(sys.modules), file=sys.stderr)
"""


def answers(commands: list[list[str]], folder: Path) -> list[tuple[str, str]]:
    """(exit code and what was loaded, standard error) of commands run one after the other in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    said, *parts = done.stderr.split("ANSWER ")
    found = []
    for part in parts:
        end, _, rest = part.partition("\n")
        found.append((end, said))
        said = rest
    assert len(found) == len(commands), done.stderr
    return found


@pytest.fixture(scope="module")
def trained(folder_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which a command was run to its end, and its words."""
    root = tmp_path_factory.mktemp("trained")
    words = ["pretrain", "--recipe", "pretrain/digits", "--data", str(folder_of_images), *SMALL_MODEL, "--epochs", "1"]
    return root, [*words, "--batch-size", "8", "--set", "data.img_size=32", "--workers", "0", "--device", "cpu"]


def test_mistakes_are_said_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("flat/cat/1.jpg", "flat/dog/1.jpg", "labelme/1.jpg", "labelme/1.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("cvat/annotations/instances_default.json", "cvat/images/default/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "w.pth").write_text("these are my weights\n")
    expected = {
        "pretrain --init w.pth": 'w.pth holds no weights: it is text ("these are my weights")',
        "evaluate nowhere": "There is no run nowhere",
        "explain nowhere": "not a run",
        "pretrain --device gpu": 'no device "gpu"',
        "ablate --disable gate --device gpu": 'no device "gpu"',
        "pretrain --model resnet5o": 'Did you mean "resnet50"?',
        "ablate --disable gate --model resnet5o": "resnet5o",
        "bench --models nosuch": 'Unknown model "nosuch"',
        "bench --mode training": 'Did you mean "train"?',
        "bench --precision fp8": "fp32, bf16, fp16",
        "bench --output here.txt": "neither .md nor .json",
        "check empty": "It is empty.",
        "pretrain --data flat": "for each of 2 classes. Move the folders into flat/train",
        "finetune-det --data labelme": "It has a JSON file for each image, as LabelMe writes them",
        "finetune-det --data cvat": "annotations/instances_val2017.json.",
        "check cvat": "There is instances_default.json.",
    }
    found = answers([command.split() for command in expected], tmp_path)
    for (command, words), (end, said) in zip(expected.items(), found, strict=True):
        assert end == "2 set()", command
        assert words in " ".join(said.split()), command


def test_check_waits_for_torch_alone(folder_of_images: Path) -> None:
    """Not for timm and torchvision, which take longer."""
    program = (
        f"import sys\nsys.argv = ['hcnet', 'check', {str(folder_of_images)!r}]\nfrom hcnet_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print({'timm', 'torchvision'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stderr.endswith("set()\n"), done.stderr


def test_a_terminal_is_told_that_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is not."""
    for terminal, words in ((True, "Loading PyTorch ..."), (False, "")):
        file = io.StringIO()
        monkeypatch.setattr(console, "err", console.Terminal(file=file, force_terminal=terminal))
        monkeypatch.delitem(sys.modules, "torch")
        with console.loading():
            pass
        monkeypatch.undo()
        assert words in file.getvalue()
        assert bool(words) == bool(file.getvalue())


def test_of_a_finished_run(trained: tuple[Path, list[str]], hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a finished run answers, and what it refuses; after a change the answer is left to PyTorch."""
    root, words = trained
    monkeypatch.chdir(root)
    monkeypatch.setattr(cache, "UNSETTLED_SECONDS", -60.0)
    assert hcnet(*words).code == 0
    run = str(only_run(root / "results").relative_to(root))
    commands = [
        words,
        ["explain", run, "--image", "nope.png"],
        ["evaluate", run, "--set", "optim.lr=1"],
        ["evaluate", run, "--on", "nope"],
        ["evaluate", run, "--device", "gpu"],
        ["predict", run, run, "--output", "new", "--workers", "-1"],
        ["predict", run, run, "--output", "new.json"],
    ]
    again, *mistakes = answers(commands, root)
    assert again[0] == "0 set()"
    assert "This run is finished" in again[1]
    expected_words = ("nope.png", "optim.lr", "nope", "gpu", "--workers", "names a file")
    for (end, said), expected in zip(mistakes, expected_words, strict=True):
        assert (end, expected in said) == ("2 set()", True)

    recipe = resolve(recipe_file("pretrain/digits"), [("data.path", words[4], "")]).recipe
    folder = finished.data_root(recipe)
    results = root / "results"
    parts = json.loads((root / run / "run.json").read_text())
    own = resolve(root / run / "recipe.yaml").recipe
    here = finished.finished_run(own, results, Path(run).name, "cpu")
    assert here is not None
    assert parts["data"]["digest"] == cache.known_data(folder, finished.data_section(own)).digest  # type: ignore[union-attr]
    best = here.best.read_bytes()
    here.best.write_bytes(best[:-1] + bytes([best[-1] ^ 1]))  # a bit of a weight
    assert finished.finished_run(own, results, Path(run).name, "cpu") is None
    assert "weights are lost" in hcnet(*words).err
    here.best.write_bytes(best)
    other = resolve(root / run / "recipe.yaml", [("train.seed", 1, "")]).recipe
    assert finished.finished_run(other, results, Path(run).name, "cpu") is None
    assert finished.finished_run(own, results, Path(run).name, "cuda") is not None  # its number format is in the recipe
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert finished.finished_run(own, results, Path(run).name, "cpu") is None


def test_the_state_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes with any file, keeps nothing that may still change, and follows links without going in circles."""
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    (root / "a/1").write_text("one")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/2").write_text("two")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "a/up").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nothing")
    assert cache.folder_state(root) == "", "written just now"
    monkeypatch.setattr(cache, "UNSETTLED_SECONDS", -60.0)
    states = {cache.folder_state(root)}
    assert states == {cache.folder_state(root)} != {""}
    changes = [
        lambda: (tmp_path / "elsewhere/2").write_text("owt"),
        lambda: (root / "a/1").rename(root / "a/0"),
        lambda: (root / "a/0").write_text("1"),
        lambda: os.utime(root / "a/0", (0, 0)),
        lambda: (root / "gone").unlink(),
        lambda: (root / "new").touch(),
    ]
    for number, change in enumerate(changes):
        change()
        states.add(cache.folder_state(root))
        assert len(states) == number + 2
    monkeypatch.setattr(cache, "MOST_FILES", 2)
    assert cache.folder_state(root) == ""
    assert cache.folder_state(tmp_path / "nothing") == ""


def test_known_data_are_those_of_an_equal_folder_and_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "UNSETTLED_SECONDS", -60.0)
    root = tmp_path / "data"
    root.mkdir()
    (root / "x").write_text("x")
    known = cache.KnownData("name", "v2-0")
    cache.keep_data(root, {"a": 1}, known, time.time())
    assert cache.known_data(root, {"a": 1}) == known
    assert cache.known_data(root, {"a": 2}) is None
    (tmp_path / "link").symlink_to(root)
    assert cache.known_data(tmp_path / "link", {"a": 1}) == known
    (file,) = (tmp_path / "cache/known").iterdir()
    for damaged in ("", "[]", "{}", '{"state": ""}', "null", '{"state": 1, "name": 2}'):
        file.write_text(damaged)
        assert cache.known_data(root, {"a": 1}) is None
    (root / "x").write_text("y")
    assert cache.known_data(root, {"a": 1}) is None
    cache.keep_data(root, {"a": 1}, known, time.time() - 3600)  # changed after it was read
    assert cache.known_data(root, {"a": 1}) is None


TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor(3.5, dtype=torch.float64),
    "é": torch.zeros(0, 4),
    "c": torch.tensor([True, False]),
    **{str(kind): torch.ones(3, dtype=kind) for kind in (torch.bfloat16, torch.float16, torch.int8, torch.uint8)},
    **{str(kind): torch.ones(2, 2, dtype=kind) for kind in (torch.int16, torch.int32, torch.int64)},
}


@pytest.mark.parametrize("state", [TENSORS, {}, {"x": torch.randn(1000)}], ids=["kinds", "none", "one"])
def test_the_digest_of_a_file_is_that_of_its_tensors(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    assert header.tensors_digest(tmp_path / "w.safetensors") == weights.digest(state)


@pytest.mark.parametrize(("content", "words"), [(b"", "not a safetensors file"), (b"\x40\0\0\0\0\0\0\0{", "cut short")])
def test_a_damaged_file_has_no_digest(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        header.tensors_digest(tmp_path / "w")
    with pytest.raises(UserError):
        header.tensors_digest(tmp_path)


@pytest.mark.parametrize(
    "one",
    [
        {},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
    ],
)
def test_a_header_that_makes_no_tensors_has_no_digest(one: dict[str, object], tmp_path: Path) -> None:
    whole = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header_of in ({"a": one, "b": whole}, {str(n): whole for n in range(40)}):
        text = json.dumps(header_of).encode()
        (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        if header_of.keys() == {"a", "b"}:
            with pytest.raises(ValueError, match=r"damaged|longer|cut short"):
                header.tensors_digest(tmp_path / "w")
    with pytest.raises(ValueError, match="damaged"):
        header.tensors_digest(tmp_path / "w")  # 40 tensors that are all of the file


def test_no_model_of_timm_is_called_unknown() -> None:
    import hcnet_cli.models  # noqa: F401  registers ours

    known = [*_registry._model_entrypoints, *timm.list_pretrained(), "resnet50.a1_in1k", "file.py:Model"]
    assert [name for name in known if model_names.is_unknown(name)] == []
    assert set(timm.list_models()) <= set(model_names.registered())
    for name in ("resnet5o", "nosuch", "", "hf_hub:timm/x", "a b", "(", "resnet50/.."):
        assert model_names.is_unknown(name)
        assert not timm.is_model(name)
