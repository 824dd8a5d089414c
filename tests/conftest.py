"""Shared by all tests: the program run in this process, tiny data in real formats, an offline machine."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hcnet_cli import runs

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; set before torch is loaded


@dataclass
class Done:
    code: int
    out: str
    err: str


Hcnet = Callable[..., Done]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data are made once for a test session, never in the home folder of whoever runs the tests."""
    if "HCNET_CACHE" not in os.environ:
        os.environ["HCNET_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "hcnet-cache")
    for name in ("HCNET_IMAGENET", "HCNET_COCO", "HCNET_ADE20K"):
        os.environ.pop(name, None)
    return Path(os.environ["HCNET_CACHE"])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may reach the network unasked: connecting anywhere but to this machine fails."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "local"
        assert host in ("local", "127.0.0.1", "::1", "localhost"), f"a connection to {host} was tried"
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def hcnet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Hcnet:
    """The program in this process: `hcnet("pretrain", "--size", "pico")` -> exit code, standard output and error."""
    from hcnet_cli.cli import main

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["hcnet", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def folder_of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet-style folder: 3 classes that differ in color, 24 training and 10 validation images."""
    root = tmp_path_factory.mktemp("images") / "colors"
    random = np.random.RandomState(0)
    for split, count in (("train", 24), ("val", 10)):
        for number in range(count):
            label = number % 3
            folder = root / split / ("red", "green", "blue")[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.randint(0, 120, (20, 24, 3))
            pixels[..., label] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def small_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, a few images of two classes, and `results`, which holds a run on them; read-only."""
    import small_data

    root = tmp_path_factory.mktemp("classifier")
    line = ["pretrain", "--recipe", "digits", *SMALL_MODEL, "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    line += ["--set", "data.img_size=16", "--out", root / "results"]
    run_here(*line, "--data", small_data.classes(root / "data"))
    return root


def environment() -> dict[str, str]:
    """For a process of the program beside others."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_here(*arguments: str | Path) -> None:
    """The program in this process, for fixtures that several tests share: a process of its own takes seconds to start.

    What is drawn before must not matter (rng.py), so a run that comes after others is the run of a fresh process.
    """
    from hcnet_cli.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hcnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code


def only_run(results: Path) -> Path:
    (folder,) = (results / "runs").iterdir()
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal whatever happened on the way: weights, metrics, and the log but for its times."""
    times = ("images_per_second", "data_wait")
    info = runs.read_record(folder / "run.json")
    assert info.status == "finished", info.error
    return {
        "log": [{k: v for k, v in e.items() if k not in times} for e in runs.read_log(folder / "metrics.jsonl")],
        "metrics": info.metrics,
        "best": (folder / "best.safetensors").read_bytes(),
        "last": (folder / "last" / "model.safetensors").read_bytes(),
    }


SMALL_MODEL = ("--set", "model.depths=[1,1,1,1]", "--set", "model.dims=[8,8,16,16]")
