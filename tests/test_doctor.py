"""Protects `hcnet doctor`: it says what is here, and each thing that is wrong with what to do about it."""

from __future__ import annotations

import shutil
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import Hcnet

from hcnet_cli import console, device, doctor


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DECODE_SECONDS", 0.01)


def test_a_machine_in_order(hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNET_DATA_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setattr(device, "emulates_bf16", lambda _: False)
    done = hcnet("doctor", "--out", tmp_path)
    assert done.code == 0, done.out
    lines = {line[2:20].strip(): line[20:] for line in done.out.splitlines()}
    assert lines["torch"] == metadata.version("torch")
    assert lines["bf16 on CPU"] == "in hardware"
    assert lines["processor"].endswith(console.counted(torch.get_num_threads(), "thread"))
    assert "hf_abcdefghijklmnop" not in done.out
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_said_with_what_to_do(hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    version, requires = metadata.version, metadata.requires
    monkeypatch.setattr(metadata, "version", lambda name: {"timm": "0.4.5"}.get(name) or version(name))
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch==1.0"] if name == "torchvision" else requires(name))
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(10**9, 10**9, 10**6))
    done = hcnet("doctor")
    assert done.code == 1
    for text in (
        "timm: hcnet needs timm>=",
        "torchvision: it was built for torch==1.0: install the two together",
        "results: less than 5 GB is free",
        "shared memory: data workers hand batches over here",
    ):
        assert text in done.out


def test_a_processor_without_bf16_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "emulates_bf16", lambda _: True)
    found = {one.name: one for one in doctor._machine()}["bf16 on CPU"]
    assert found.value == "emulated: --precision bf16 trains many times slower here than fp32"
    assert not found.problem


def test_a_missing_package_and_extra_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["no-such-package>=1", "torch>=2", 'no-such-tool; extra == "more"']
    requires = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: wanted if name == "hcnet" else requires(name))
    found = {one.name: one for one in doctor._versions()}
    assert found["no-such-package"].problem == "pip install 'no-such-package>=1'"
    assert found["extra more"].value == "not installed (no-such-tool)"
    assert not found["torch"].problem
