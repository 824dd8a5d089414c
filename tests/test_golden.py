"""Golden loss curves: the first 20 of 30 steps of each task on the embedded data give the losses in tests/golden/.

A refactor leaves the curves alone. A change that is meant to move them records them again, in a commit that says why:

    python tests/test_golden.py

Conditions: fp32, one thread, random initial weights, every loss part of every step. Tolerances are about ten times the
difference between this curve and one computed without AVX (ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import fresh
import pytest

from hcnet_cli.cli import main
from hcnet_cli.runs import RunFolder

GOLDEN = Path(__file__).parent / "golden"
COMMON = "--size pico --device cpu --precision fp32 --workers 0 --seed 0 --init none"
SETTINGS = (
    *("train.log_every=1", "train.eval_every=30"),
    *("schedule.unit=steps", "schedule.length=30", "schedule.warmup=10", "schedule.warmup_unit=steps"),
)
# Low learning rates for the two dense tasks: at their recipes' own, rounding alone moves the losses by per cents.
STEPS = 20  # that are compared: the last warm-up step is the tenth
RUNS = {"pretrain": [], "finetune-det": ["--lr", "1e-5"], "finetune-seg": ["--lr", "1e-4", "--single-scale"]}
TOLERANCE = {"pretrain": 1e-4, "finetune-det": 2e-4, "finetune-seg": 2e-4}
# Which proposals survive NMS can hang on a last bit, and this loss is a mean over them.
TOLERANCE_OF_PART = {("finetune-det", "loss_cls"): 5e-3, ("finetune-det", "loss"): 2e-3}


def curve(task: str, results: Path) -> dict[str, list[float]]:
    """Loss part -> its value at each of the 30 steps."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    done = fresh.run(task, *COMMON.split(), *RUNS[task], *settings, "--out", results)
    assert done.code == 0, done.err
    return read_curve(results)


def read_curve(results: Path) -> dict[str, list[float]]:
    (log,) = (results / "runs").glob("*/metrics.jsonl")
    entries = [json.loads(text) for text in log.read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    return {part: [step[part] for step in steps] for part in steps[0] if part.startswith("loss")}


def first_steps(task: str, results: Path) -> dict[str, list[float]]:
    """The same run in this process, stopped after STEPS steps: what is drawn depends on no other run (rng.py)."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    append = RunFolder.append

    def until(folder: RunFolder, **entry: Any) -> None:
        append(folder, **entry)
        if entry["step"] == STEPS:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", until)
        line = [task, *COMMON.split(), *RUNS[task], *settings, "--out", str(results)]
        patch.setattr(sys, "argv", ["hcnet", *line])
        with pytest.raises(SystemExit):
            main()
    return read_curve(results)


@pytest.mark.parametrize("task", RUNS)
def test_the_loss_curve_is_the_golden_one(task: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{task}.json").read_text())
    made = first_steps(task, tmp_path)
    assert made.keys() == golden.keys()
    for part, values in golden.items():
        tolerance = TOLERANCE_OF_PART.get((task, part), TOLERANCE[task])
        assert made[part] == pytest.approx(values[:STEPS], rel=tolerance), part
        assert len(made[part]) == STEPS < len(values)


if __name__ == "__main__":
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found = curve(name, Path(folder))
        lines = [f' "{part}": {json.dumps([float(f"{v:.8g}") for v in values])}' for part, values in found.items()]
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
