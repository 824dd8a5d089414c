"""Shared by the tests of `make gpu`: the device, and a small job on it.

HCNET_TEST_DEVICE=cpu runs the same tests without a GPU, to see that they themselves work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products; read when CUDA starts

import pytest
import torch
from conftest import SMALL_MODEL

from hcnet_cli import build
from hcnet_cli import recipe as rcp
from hcnet_cli.engine import Job, to_device
from hcnet_cli.engine.profiler import Profiler
from hcnet_cli.engine.step import Stepper

NAME = os.environ.get("HCNET_TEST_DEVICE", "cuda")
DEVICE = torch.device(NAME)
MISSING = "" if NAME == "cpu" or torch.cuda.is_available() else "PyTorch sees no CUDA device on this machine"
needs_device = pytest.mark.skipif(bool(MISSING), reason=MISSING)
needs_cuda = pytest.mark.skipif(bool(MISSING) or NAME == "cpu", reason=MISSING or "what is measured exists on CUDA")
LENGTH = 6  # optimizer steps of a run
RUN = (
    *("pretrain", "--recipe", "small", *SMALL_MODEL, "--batch-size", "8", "--workers", "0", "--device", NAME),
    *("--set", "data.img_size=32", "--set", f"schedule.length={LENGTH}", "--set", "schedule.warmup=0"),
    *("--set", "train.eval_every=3", "--set", "train.log_every=1"),
)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Sums in a fixed order: two runs then differ only where the program's own state differs."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before


def make_job(data: Path, device: torch.device = DEVICE, **values: Any) -> Job:
    """A job on a folder of images. `values`: recipe fields with "__" for the dot; fp16 is possible on a CPU too."""
    given = {
        "data.path": str(data), "data.img_size": 32, "model.depths": [1, 1, 2, 1], "model.dims": [16, 16, 32, 32],
        "schedule.length": LENGTH, "schedule.warmup": 0, "train.eval_every": LENGTH, "train.log_every": 1,
        "train.batch_size": 8, "train.workers": 0, "train.precision": "fp32", "train.kernels": False,
        **{name.replace("__", "."): value for name, value in values.items()},
    }  # fmt: skip
    recipe = rcp.resolve(rcp.recipe_file("small", "pretrain"), [(key, given[key], "") for key in given]).recipe
    splits = build.open_data(recipe)
    return build.build_job(recipe, splits, build.build_task(recipe, splits), device)


def make_stepper(job: Job) -> Stepper:
    return Stepper(job, Profiler(job, Path(), 0))


def batches_of(job: Job, count: int) -> list[dict[str, Any]]:
    """The first micro-batches of a job, on its device."""
    stream = job.train.iterate(0)
    return [to_device(next(stream), job.device) for _ in range(count)]
