"""Protects `hcnet replay`: it names the module, the parameter and the image that a step which is not finite is due to.

The models and images here are made so that the answer is known.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Done, only_run
from PIL import Image
from small_data import noise, save
from torch import Tensor, nn

from hcnet_cli.data.loader import epoch_batches
from hcnet_cli.engine.nonfinite import Origin, Watch, culprits, largest_gradient, norm_is_finite
from hcnet_cli.runs import read_log, read_record

Hcnet = Callable[..., Done]
STEP = 5
PAGE = (Path(__file__).parent.parent / "docs" / "inside-a-run.md").read_text()
NET = """
import torch
from torch import nn

class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return x * self.gain

class Contrast(nn.Module):
    def forward(self, x):
        spread = x.amax((2, 3), keepdim=True) - x.amin((2, 3), keepdim=True)  # 0 of a flat image
        return FORMULA

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(Gain(), Contrast(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

def build(num_classes):
    return Net(num_classes)
"""
PLAIN = (
    *("--set", "data.scale=[1,1]", "--set", "data.ratio=[1,1]", "--set", "data.auto_augment=null", "--workers", "0"),
    *("--set", "schedule.length=8", "--set", "schedule.warmup=0", "--set", "train.eval_every=8"),
    *("--set", "train.log_every=1", "--batch-size", "2", "--recipe", "small", "--device", "cpu"),
)


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of noise with one black image, and the path of that image, which is first read after 5 steps."""
    root = tmp_path / "photos"
    for number in range(16):
        save(root / "train" / "ab"[number // 8] / f"{number:02}.bmp", number, lambda seed: noise(seed)[:32, :32])
    for number in range(2):
        save(root / "val" / "ab"[number] / f"{number}.bmp", 50 + number)
    black = sorted((root / "train").rglob("*.bmp"))[epoch_batches(16, 2, 0, 0)[STEP][1]]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(black)
    return root, black


@pytest.mark.parametrize(
    ("formula", "precision", "named"),
    [
        ("x / spread", "bf16", "The output of body.1 (Contrast) is not finite"),
        ("x * (1 + spread.sqrt())", "fp32", "The gradient of the input (operation Sqrt) of body.1 (Contrast)"),
    ],
)
def test_the_module_and_the_file_are_named(
    formula: str,
    precision: str,
    named: str,
    photos: tuple[Path, Path],
    hcnet: Hcnet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET.replace("FORMULA", formula))
    root, black = photos
    trained = ("pretrain", "--model", "net.py:build", "--data", root, *PLAIN, "--accumulate", "1")
    done = hcnet(*trained, "--precision", precision, "--set", "train.ema_decay=null")
    assert done.code == 1
    assert f"of step {STEP + 1} is not finite" in done.err
    run = only_run(tmp_path / "results")
    assert f"hcnet replay results/runs/{run.name} --model results/runs/{run.name}/model.py:build` names" in done.err
    assert "the same command starts from the beginning." in done.err
    assert read_log(run / "metrics.jsonl")[-1]["step"] == STEP
    assert read_record(run / "run.json").steps_done == STEP
    kept = sorted(path.name for path in (run / "failure").iterdir())
    assert kept == ["failure.json", "weights.safetensors"]
    record = json.loads((run / "failure" / "failure.json").read_text())
    assert record["step"] == STEP
    assert str(black) in [sample["file"] for batch in record["batches"] for sample in batch["samples"]]

    whole, own = [line.split("  ")[0].split() for line in PAGE.splitlines() if line.startswith("hcnet replay")]
    assert whole == ["hcnet", "replay", "results/runs/RUN"]
    assert own[3:] == ["--model", "results/runs/RUN/model.py:build"]
    done = hcnet("replay", run)
    assert done.code == 2
    assert "runs only if you name it" in done.err
    done = hcnet("replay", run.name, "--model", f"{run / 'model.py'}:build")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert f"Step {STEP + 1}, 2 images" in lines[0]
    for number, kind in enumerate(dict.fromkeys(["fp32", precision])):
        assert lines[1 + 2 * number].startswith(f"{kind}: {named}")
        assert lines[2 + 2 * number].strip() == str(black)

    Image.fromarray(noise(7)[:32, :32]).save(black)
    done = hcnet("replay", run, "--model", f"{run / 'model.py'}:build")
    assert done.code == 2
    assert "holds other data than the run" in done.err
    (run / "failure" / "failure.json").write_text('{"step": -1}')
    done = hcnet("replay", run, "--model", f"{run / 'model.py'}:build")
    assert done.code == 2
    assert "failure.json is damaged: step" in done.err


class Toy(nn.Module):
    """A task around a model, as the engine sees one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss_a": self.model(batch["image"]).square().mean(), "loss_b": torch.zeros(())}


class Between(nn.Module):
    """Computes log(-1) itself, before its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * 0 - 1).log())


class Root(nn.Module):
    """The gradient of the square root of its weight, which is 0, is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sqrt()


def origin(model: nn.Module, image: Tensor) -> Origin | None:
    """As a replay watches one micro-batch."""
    watch = Watch(Toy(model))  # type: ignore[arg-type]
    losses = watch.losses({"image": image})
    if watch.origin is None:
        watch.backward(losses["loss_a"] + losses["loss_b"])
    return watch.origin


def spoiled(model: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        model.weight[1, 2] = float("inf")
    return model


ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("model", "image", "expected"),
    [
        (nn.Linear(4, 4), ONES, None),
        (nn.Linear(4, 4), ONES / 0, ("", "The batch, as the data set gives it,", "")),
        (nn.Sequential(nn.ReLU(), spoiled(nn.Linear(4, 4))), ONES, ("1", "The output", "1.weight, of magnitudes")),
        (nn.Sequential(nn.ReLU(), Between()), ONES, ("1", "What is computed before 1.second in the forward pass", "")),
        (nn.Sequential(Root(), nn.ReLU()), ONES, ("0", "The gradient of a parameter (operation Sqrt)", "0.weight")),
        (nn.Sequential(nn.Linear(4, 4), nn.Threshold(9e9, 3e38)), ONES, ("", "The output", "")),  # squared: infinite
    ],
)  # fmt: skip
def test_the_place_is_the_one_that_was_spoiled(
    model: nn.Module, image: Tensor, expected: tuple[str, str, str] | None
) -> None:
    found = origin(model, image)
    if expected is None or found is None:
        assert found is expected
        return
    assert (found.module, found.what) == expected[:2]
    assert found.parameter.startswith(expected[2])


def test_a_norm_that_overflows_is_put_down_to_the_largest_gradient() -> None:
    task: Any = Toy(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert norm_is_finite(task)
    task.model[1].weight.grad += 3e38
    assert not norm_is_finite(task)
    assert largest_gradient(task).parameter == "1.weight"


def test_culprits_are_those_of_every_subset() -> None:
    items = range(6)
    for bad in itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(1, 7)):
        assert culprits(items, lambda some: not set(bad).isdisjoint(some)) == list(bad)  # noqa: B023
        assert culprits(items, lambda some: not set(bad).isdisjoint(some), most=1) == [bad[0]]  # noqa: B023


def test_samples_that_fail_only_together_are_all_named() -> None:
    def fails(some: Sequence[int]) -> bool:
        return {1, 6} <= set(some)

    assert {1, 6} <= set(culprits(range(8), fails))
    assert culprits([1, 6], fails) == [1, 6]
