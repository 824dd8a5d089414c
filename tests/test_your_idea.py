"""Protects docs/your-idea.md: its model is what it says, and each of its commands runs, on small data and few steps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_data
import timm
import torch
from conftest import Done
from test_other_models import TASKS

from hcnet_cli import runs
from hcnet_cli.models.backbone import create

Hcnet = Callable[..., Done]
TEXT = (Path(__file__).parent.parent / "docs" / "your-idea.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hcnet_cli.profile.throughput", lambda *_, **__: 1.0)
    (content,) = re.findall(r"```python my_hcnet.py\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_hcnet.py").write_text(content)
    return tmp_path


def test_the_model_is_hcnet_with_a_second_step(here: Path) -> None:
    """With share 0 it is HcNet-pico; with share 1 a heat step is the usual one, applied twice."""
    mine: Any = create("my_hcnet.py:MyHcNet", 3, {}, drop_path_rate=0.1, img_size=32).eval()
    usual: Any = timm.create_model("hcnet_pico", num_classes=3).eval()
    lacking = mine.load_state_dict(usual.state_dict(), strict=False)
    assert not lacking.unexpected_keys
    assert all(name.endswith("conduction.share") for name in lacking.missing_keys)
    assert len(lacking.missing_keys) == sum(usual.depths)
    image, u = torch.randn(2, 3, 32, 32), torch.randn(2, 32, 8, 8)
    assert torch.equal(mine(image), usual(image))
    step, once = mine.stages[0].blocks[0].conduction, usual.stages[0].blocks[0].conduction
    with torch.no_grad():
        step.share.fill_(1.0)
        torch.testing.assert_close(step(u), once(once(u)))
        assert not torch.allclose(step(u), once(u))


def test_each_command_runs(here: Path, hcnet: Hcnet) -> None:
    data = dict(zip(TASKS, (make(here / name) for name, make in small_data.MAKERS.items()), strict=True))
    said = ""
    for line in COMMANDS:
        program, command, *words = shlex.split(line)
        assert program == "hcnet"
        task = {"ablate": "pretrain"}.get(command, command)
        if command == "ablate":  # its cells are the commands above; tests/test_ablate_cli.py starts some
            words.append("--dry-run")
        short = [*TASKS[task], "--data", str(data[task])] if task in TASKS else []
        if command == "ablate":  # which takes the two of its flags by --set
            short = [*short, "--set", "train.workers=0", "--set", "train.batch_size=4"]
            for flag in ("--workers", "--batch-size"):
                at = short.index(flag)
                del short[at : at + 2]
        done = hcnet(command, *words, *short)
        assert done.code == 0, f"{line}\n{done.out}{done.err}"
        said += done.out + done.err
    infos = [info for _, info in runs.find_runs(Path("results"))[0]]
    assert {info.task for info in infos if info.model == "MyHcNet"} == set(TASKS)
    tuned = [info for info in infos if info.task != "pretrain"]
    assert all("MyHcNet" in str(info.init) for info in tuned)  # --init auto has found the model's own pretraining
    table = hcnet("report", "--format", "markdown").out
    assert "| MyHcNet" in table
    assert "| HcNet-pico" in table
