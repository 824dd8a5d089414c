"""Protects the README: every command in it runs, on small data where it names data that nobody here has."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, Done, environment, only_run
from PIL import Image

from hcnet_cli.data import embedded

Hcnet = Callable[..., Done]
README = (Path(__file__).parent.parent / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split(" # ")[0].split("    #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


TRAINING = ("pretrain", "finetune-det", "finetune-seg")
TWO_STEPS = ("--set", "schedule.unit=steps", "--set", "schedule.length=2", "--set", "train.eval_every=2")
DATA = {
    "/data/imagenet": "digits",
    "/data/coco": "digit-scenes",
    "/data/ADEChallengeData2016": "digit-stuff",
}
# The plan goes through everything but the training itself: data, model, loaders, one forward and backward pass.
SHRUNK = ("--dry-run", *SMALL_MODEL)
SMALLER = {
    "pretrain": ("--set", "data.img_size=32", "--batch-size", "8"),
    "finetune-det": ("--set", "data.img_scale=[64,64]", "--set", "data.multiscale=[]", "--batch-size", "8"),
    "finetune-seg": ("--set", "data.img_scale=[64,64]", "--set", "data.crop_size=64", "--batch-size", "8"),
}


def test_the_readme_names_the_two_commands_and_the_five() -> None:
    found = commands()
    assert {"make demo", "make test"} <= set(found)
    words = {shlex.split(line)[1] for line in found if line.startswith("hcnet")}
    assert {"pretrain", "finetune-det", "finetune-seg", "ablate", "report", "bench"} <= words


def test_make_knows_its_targets() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for line in commands():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the embedded digits, for the commands that need one."""
    results = tmp_path_factory.mktemp("readme")
    line = [sys.executable, "-m", "hcnet_cli", "pretrain", *SMALL_MODEL, *TWO_STEPS, "--out", str(results)]
    subprocess.run(line, check=True, capture_output=True, env=environment())
    return only_run(results)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("line", [line for line in commands() if not line.startswith("make ")])
def test_every_command_runs(
    line: str, small_run: Path, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    if words[0] == "torchrun":
        assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "hcnet_cli"]
        words = ["hcnet", *words[5:]]
    assert words[0] == "hcnet"
    words = [str(embedded.ensure(DATA[word])) if word in DATA else word for word in words]
    arguments = words[1:]
    if "mine.yaml" in arguments and "cp" not in arguments:
        assert hcnet("recipes", "cp", "pretrain/digits", "mine.yaml").code == 0
    if arguments[0] in TRAINING:
        if any(word.endswith(".pth") for word in arguments):  # official weights: their reading has tests of its own
            torch.save({"model": {"head.bias": torch.zeros(2)}}, tmp_path / "hcnet_release.pth")
            arguments = [str(tmp_path / Path(word).name) if word.endswith(".pth") else word for word in arguments]
            done = hcnet(*arguments, *SMALL_MODEL)
            assert "does not fit this model" in done.err
            return
        size = SMALLER[arguments[0]] if set(words) & {str(embedded.ensure(name)) for name in DATA.values()} else ()
        init = ("--init", "none") if arguments[0] != "pretrain" else ()
        shrunk = SHRUNK[:1] if "--model " in line else SHRUNK  # another model has no HcNet to shrink
        arguments = [*(word for word in arguments if word != "--dry-run"), *shrunk, *size, *init]
    if arguments[0] in ("explain", "evaluate", "predict", "runs") or "--compare" in arguments:
        shutil.copytree(small_run, "results/runs/RUN")
        for photo in ("photo.jpg", "more/photo.png"):
            Path(photo).parent.mkdir(exist_ok=True)
            Image.new("RGB", (40, 30), "orange").save(photo)
    if "OTHER" in line:
        shutil.copytree("results/runs/RUN", "results/runs/OTHER")
    if "--watch" in arguments:  # until Ctrl-C
        arguments += ["--port", "0"]
        monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    if arguments[0] == "ablate":
        arguments = [*arguments, "--dry-run"]
    if arguments[:2] == ["bench", "data"]:
        arguments += ["--img-size", "32", "--batch-size", "8", "--rounds", "1", "--workers", "0"]
    elif arguments[0] == "bench":  # compiling takes minutes
        arguments = [word for word in arguments if word != "--compile"]
        arguments += ["--models", "pico,reference", "--img-size", "32", "--batch-size", "1", "--rounds", "1"]
    done = hcnet(*arguments)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err


def test_the_python_in_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(1, 64, 56, 80), (1, 128, 28, 40), (1, 320, 14, 20), (1, 512, 7, 10)]"


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (root / target).exists(), target


def test_the_wheel_works_from_any_folder(tmp_path: Path) -> None:
    """What `pip install .` puts into an environment holds the recipes and the published numbers."""
    root = Path(__file__).parent.parent
    copy = tmp_path / "source"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache"))
    target = tmp_path / "site"
    build = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        str(copy),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); import hcnet_cli; "
           "assert hcnet_cli.__file__.startswith(sys.path[0]), hcnet_cli.__file__; from hcnet_cli.cli import main; "
           "sys.argv = ['hcnet', *sys.argv[1:]]; main()"]  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for arguments in (
        ["recipes", "show", "pretrain/imagenet"],
        ["report", "--format", "markdown"],
        ["pretrain", *SMALL_MODEL, *TWO_STEPS],
    ):
        done = subprocess.run([*run, *arguments], cwd=elsewhere, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert next((elsewhere / "results" / "runs").iterdir()).name.startswith("pretrain-digits-pico")
