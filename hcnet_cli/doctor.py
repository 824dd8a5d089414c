"""`hcnet doctor`: what this machine and this environment offer, and what in them is wrong. One page for an issue."""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image, features

from hcnet_cli import __version__, device, runs
from hcnet_cli.cache import cache_dir
from hcnet_cli.console import UserError, counted
from hcnet_cli.cores import cores
from hcnet_cli.files import check_output, existing_parent
from hcnet_cli.privacy import home, mask

LOW_DISK = 5 * 10**9  # bytes; two checkpoints of the largest size and its best weights
DECODE_SECONDS = 0.5
PHOTO = (375, 500)  # height, width: ImageNet's most frequent
VARIABLES = re.compile(r"HCNET_\w+|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|(SLURM|TORCHELASTIC|NCCL)_\w+|WORLD_SIZE|RANK")
PROGRAMS = ("torchrun", "sbatch", "nvidia-smi")


class Finding(NamedTuple):
    """A line of the page; `problem` says what to do about it, "" where nothing is wrong."""

    name: str
    value: str
    problem: str = ""


def findings(results: Path) -> Iterator[Finding]:
    """All lines, in order. What cannot be found out on this system is left out."""
    commit, dirty = runs.git_state()
    yield Finding("hcnet", f"{__version__}{f', commit {commit[:12]}' if commit else ''}{'+changes' if dirty else ''}")
    yield Finding("system", f"Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield from _versions()
    yield from _machine()
    yield from _devices()
    yield from _places(results)
    yield Finding("decoding", _decoding())
    yield Finding(
        "programs", ", ".join(name for name in PROGRAMS if shutil.which(name)) or "none of " + ", ".join(PROGRAMS)
    )
    if found := sorted(name for name in os.environ if VARIABLES.fullmatch(name)):
        yield Finding("variables", home(" ".join(mask([f"{name}={os.environ[name]}" for name in found]))))


def _versions() -> Iterator[Finding]:
    """Every package that hcnet, or one of these, requires: its version, and whether it is one that is asked for."""
    wanted = [Requirement(text) for text in metadata.requires("hcnet") or []]
    extras = sorted(
        {extra for one in wanted if one.marker for extra in re.findall(r'extra == "([\w-]+)"', str(one.marker))}
    )
    direct = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in direct:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield Finding(one.name, "missing", f"pip install '{one}'")
            continue
        wrong = "" if one.specifier.contains(version, prereleases=True) else f"hcnet needs {one}: pip install '{one}'"
        if one.name == "torchvision":
            wrong = wrong or _pair()
        yield Finding(one.name, version, wrong)
    for extra in extras:
        asked = [
            one
            for one in wanted
            if one.marker is not None and one.marker.evaluate({"extra": extra}) and one not in direct
        ]
        missing = [one.name for one in asked if not _installed(one.name)]
        yield Finding(f"extra {extra}", "installed" if not missing else f"not installed ({', '.join(missing)})")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _pair() -> str:
    """What is wrong where torchvision was built for another torch, as its own metadata say."""
    for text in metadata.requires("torchvision") or []:
        one = Requirement(text)
        if one.name == "torch" and not one.specifier.contains(metadata.version("torch"), prereleases=True):
            return f"it was built for torch{one.specifier}: install the two together"
    return ""


def _machine() -> Iterator[Finding]:
    usable = cores()
    total = os.cpu_count() or usable
    name = _first(Path("/proc/cpuinfo"), r"model name\s*: (.*)") or platform.processor() or platform.machine()
    yield Finding(
        "processor", f"{name}, {usable} of {total} cores usable, {counted(torch.get_num_threads(), 'thread')}"
    )
    emulated = device.emulates_bf16(torch.device("cpu"))
    yield Finding(
        "bf16 on CPU",
        "emulated: --precision bf16 trains many times slower here than fp32" if emulated else "in hardware",
    )
    memory = {key: _first(Path("/proc/meminfo"), rf"{key}:\s*(\d+) kB") for key in ("MemTotal", "MemAvailable")}
    if memory["MemTotal"]:
        total_, free = (int(memory[key]) * 1024 / 2**30 for key in ("MemTotal", "MemAvailable"))
        limit = _memory_limit()
        limited = f", {limit / 2**30:.1f} GiB for this process" if limit and limit / 2**30 < total_ else ""
        yield Finding(
            "memory", f"{free:.1f} of {total_:.1f} GiB free{limited}", "less than 2 GiB is free" if free < 2 else ""
        )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free
        low = "data workers hand batches over here: give the container more (docker --shm-size), or use --workers 0"
        yield Finding("shared memory", f"{size / 2**30:.1f} GiB free", low if size < 2**28 else "")


def _memory_limit() -> int:
    """Bytes that the control group of this process may use; 0 where none is set or that cannot be found out."""
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of version 2 and 1
        if found := _first(Path("/sys/fs/cgroup") / file, r"^(\d+)$"):
            return int(found)
    return 0


def _first(file: Path, pattern: str) -> str:
    """What the first match of a pattern in a system file holds; "" where there is none."""
    try:
        found = re.search(pattern, file.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            bf16 = "bf16 emulated" if device.emulates_bf16(torch.device("cuda", number)) else "bf16"
            yield Finding(f"cuda:{number}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}")
    elif torch.version.cuda and shutil.which("nvidia-smi"):
        problem = "the driver may be too old for this PyTorch, or CUDA_VISIBLE_DEVICES hides the card"
        yield Finding("cuda", f"PyTorch for CUDA {torch.version.cuda} sees no device", problem)
    else:
        yield Finding("cuda", "none")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")


def _places(results: Path) -> Iterator[Finding]:
    for name, path in (("results", results), ("cache", cache_dir())):
        free = shutil.disk_usage(existing_parent(path)).free
        problem = "less than 5 GB is free" if free < LOW_DISK else ""
        try:
            check_output(existing_parent(path) / ".hcnet-doctor")
        except UserError as error:
            problem = str(error)
        yield Finding(name, f"{home(str(path))}, {free / 10**9:.0f} GB free", problem)


def _decoding() -> str:
    """Photos decoded in a second by one core, as training reads them."""
    pixels = np.random.default_rng(0).integers(0, 255, (*(side // 8 for side in PHOTO), 3), dtype=np.uint8)
    photo = io.BytesIO()
    Image.fromarray(pixels).resize(PHOTO[::-1], Image.Resampling.BICUBIC).save(photo, "JPEG", quality=90)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < DECODE_SECONDS:
        with Image.open(photo) as file:
            file.convert("RGB")
        count += 1
    rate = count / (time.perf_counter() - begun)
    turbo = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg (not turbo)"
    return f"{rate:.0f} JPEGs of {PHOTO[1]} x {PHOTO[0]} a second and core, {turbo}"
