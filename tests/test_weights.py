"""Protects what comes from outside: nothing in a file is run, and what did not fit is said."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_weights import PTH, SAFETENSORS
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import nn

from hcnet_cli.console import UserError
from hcnet_cli.weights import digest, load_into, read_weights

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)}


def assert_same(state: dict[str, torch.Tensor]) -> None:
    assert state.keys() == STATE.keys()
    assert all(state[name].equal(value) for name, value in STATE.items())


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_ema", "state_dict_ema"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_checkpoints_of_the_usual_layouts(key: str | None, legacy: bool, tmp_path: Path) -> None:
    content = STATE if key is None else {key: STATE, "epoch": 3, "lr": 0.1}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert_same(read_weights(tmp_path / "w.pth"))


def test_a_moving_average_comes_first_and_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As timm reads such a file."""
    raw = {name: value + 1 for name, value in STATE.items()}
    for raw_key, key in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        torch.save({raw_key: raw, key: STATE}, tmp_path / "w.pth")
        found = read_weights(tmp_path / "w.pth")
        assert_same(found)
        assert found.keys() == load_state_dict(str(tmp_path / "w.pth")).keys()
        assert f"holds {key} and {raw_key}: the weights are those of {key}." in capfd.readouterr().err
    torch.save({"model": STATE, "model_ema": {"decay": 0.999}}, tmp_path / "w.pth")  # without tensors: no weights
    assert_same(read_weights(tmp_path / "w.pth"))
    assert capfd.readouterr().err == ""


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert_same(read_weights(tmp_path / "w.safetensors"))


def test_pickled_configurations_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code saves a yacs CfgNode (a dict subclass with attributes) beside the weights."""

    class CfgNode(dict[str, Any]):
        pass

    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    config.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", yacs)
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    node = CfgNode(MODEL=CfgNode(DEPTHS=[3, 8, 18, 3]), LR=1e-3)
    node.__dict__["__immutable__"] = True
    content = {"model": STATE, "config": node, "args": argparse.Namespace(lr=1), "epoch": 299}
    torch.save(content, tmp_path / "ckpt.pth")
    monkeypatch.delitem(sys.modules, "yacs")
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert_same(read_weights(tmp_path / "ckpt.pth"))


class Bomb:
    """A pickle that would run a command when loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_file_that_would_run_code_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    bomb, file = {"model": STATE, "x": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth"
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"bomb\.pth"):
        read_weights(file)
    assert not (tmp_path / "ran").exists()


def test_a_refusal_names_what_the_file_asked_for(tmp_path: Path) -> None:
    torch.save({"model": STATE, "x": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"system"):
        read_weights(tmp_path / "bomb.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut"])
def test_damaged_files_are_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        read_weights(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights file"):
        read_weights(tmp_path / "none.pth")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no state dict"):
        read_weights(tmp_path / "w.pth")


def net(classes: int = 5) -> nn.Module:
    return nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "head": nn.Linear(8, classes)})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone."])
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    source, target = net(), net()
    account = load_into(target, {prefix + name: value for name, value in source.state_dict().items()}, "w")
    assert (account.loaded, account.total) == (4, 4)
    assert all(target.state_dict()[name].equal(value) for name, value in source.state_dict().items())


def test_the_account_names_everything_that_did_not_fit() -> None:
    state = {**net(classes=7).state_dict(), "extra": torch.zeros(1)}
    del state["stem.bias"]
    account = load_into(net(), state, "w")
    assert account.loaded == 1
    assert account.reinitialised == ["head.bias", "head.weight"]
    assert account.missing == ["stem.bias"]
    assert account.unexpected == ["extra"]
    assert "1 of 4" in str(account)
    assert "head.bias" in str(account)


def test_too_little_matched_is_an_error() -> None:
    with pytest.raises(UserError, match="does not fit this model"):
        load_into(net(), {"head.bias": torch.zeros(5)}, "w")


HOSTILE = [("pth", name) for name in PTH] + [("safetensors", name) for name in SAFETENSORS]


@pytest.mark.filterwarnings("ignore")  # of torch, about the tensors that the test makes
@pytest.mark.parametrize(("ending", "name"), HOSTILE, ids=[f"{name}.{ending}" for ending, name in HOSTILE])
def test_a_hostile_file_is_one_sentence_and_takes_no_memory(ending: str, name: str, tmp_path: Path) -> None:
    """Each was a traceback, a hang, or filled the memory."""
    file = tmp_path / f"w.{ending}"
    {"pth": PTH, "safetensors": SAFETENSORS}[ending][name](file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        read_weights(file)
    assert time.monotonic() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert str(error.value).isprintable()
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404 Not Found</html>", "web page"),
        (b"404: Not Found", r'text \("404: Not Found"\)'),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_download_that_went_wrong_is_called_what_it_is(
    content: bytes, what: str, ending: str, tmp_path: Path
) -> None:
    (tmp_path / f"w.{ending}").write_bytes(content)
    with pytest.raises(UserError, match=what):
        read_weights(tmp_path / f"w.{ending}")


@pytest.mark.parametrize("legacy", [False, True])
def test_unusual_tensors_that_are_whole_become_plain(legacy: bool, tmp_path: Path) -> None:
    base = torch.arange(6.0)
    state = {
        "tied": base,
        "tied too": base,
        "transposed": base.view(2, 3).t(),
        "expanded": base[:2].expand(3, 2),
        "negated": torch.complex(torch.ones(2), torch.ones(2)).conj().imag,
        "parameter": nn.Parameter(base.clone()),
        "empty": torch.empty(0, 4),
        "empty, of no stride": torch.ones(6).as_strided((0,), (0,)),
        "one element, of a wide stride": torch.ones(6).as_strided((1,), (5,)),
        "scalar": torch.tensor(3),
    }
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    found = read_weights(tmp_path / "w.pth")
    assert found.keys() == state.keys()
    assert all(found[name].equal(value) for name, value in state.items())
    assert all(type(value) is torch.Tensor and value.is_contiguous() for value in found.values())
    assert not any(value.requires_grad or value.is_neg() for value in found.values())
    assert len(digest(found)) == 16
