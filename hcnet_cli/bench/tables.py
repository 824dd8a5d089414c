"""What `hcnet bench` shows and writes: tables, the Markdown page, the JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import hcnet_cli
from hcnet_cli import report, runs
from hcnet_cli.bench.choices import REFERENCE
from hcnet_cli.bench.models import Contender, Measurement
from hcnet_cli.bench.turns import other_load_notes, ratio
from hcnet_cli.report.escape import in_markdown, markdown_code, to_json
from hcnet_cli.table import Column, Row, Table

SPEED_ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")


def baseline(asked: Sequence[Contender]) -> Contender | None:
    """What the ratios of a mode are to: the reference in eager fp32, else the first contender that ran."""
    ran = [c for c in asked if c.rates]
    return next((c for c in ran if (c.model, c.form) == (REFERENCE, "fp32 eager")), ran[0] if ran else None)


def figures(contender: Contender, unit: Contender | None, made: Measurement) -> dict[str, Any]:
    """A contender's fields and, where it ran, the figures of its row."""
    fields = dataclasses.asdict(contender)
    if not contender.rates or unit is None or contender.macs is None:
        return fields
    rate, peak = statistics.median(contender.rates), max(made.matmul[contender.mode][contender.precision])
    factor = 3 if contender.mode == "train" else 1  # backward: twice the work of forward
    gflops = 2 * contender.macs * factor * rate / 1e9
    return {
        **fields,
        "images_per_second": rate,
        "ratio": ratio(contender.rates, unit.rates),
        "spread": f"{_short(min(contender.rates))}–{_short(max(contender.rates))}",
        "latency_ms": statistics.median(contender.latencies) if contender.latencies else None,
        "peak_mib": None if contender.peak_bytes is None else contender.peak_bytes / 2**20,
        "gflops": gflops,
        "share": 100 * gflops / peak,
    }


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


COLUMNS = (
    Column("model", "model"),
    Column("form", "form"),
    Column("images_per_second", "images/s", "short"),
    Column("ratio", "ratio", "percent"),
    Column("spread", "min–max", secondary=True),
    Column("latency_ms", "latency (ms)", "short", secondary=True),
    Column("peak_mib", "peak (MiB)", "short", secondary=True),
    Column("share", "of peak (%)", "short", secondary=True),
    Column("gflops", "GFLOP/s", "short", secondary=True),
    Column("params_m", "#params (M)", "number", secondary=True),
    Column("macs_g", "MACs (G)", "number", secondary=True),
    Column("layout", "layout", secondary=True),
)
TITLES = {"infer": "Inference", "train": "Training step"}


def tables(made: Measurement) -> list[Table]:
    """One table for each mode."""
    return [_table(made, mode) for mode in made.modes]


def _table(made: Measurement, mode: str) -> Table:
    settings, asked, unit = made.settings, made.of(mode), baseline(made.of(mode))
    rows: list[Row] = []
    notes: list[str] = []
    for contender in asked:
        values = {**figures(contender, unit, made), "form": contender.form}
        values["params_m"] = None if contender.params is None else contender.params / 1e6
        values["macs_g"] = None if contender.macs is None else contender.macs / 1e9
        mark = f"[{len(notes) + 1}]" if contender.error else ""
        notes += [f"{mark} {contender.error}"] if mark else []
        rows.append(Row("measured", values, mark=mark))
    columns = [c for c in COLUMNS if c.key != "latency_ms" or mode == "infer"]
    if unit is None:
        nothing = "Stopped before a round of it ended." if made.stopped else "Nothing ran to the end of a round."
        return Table("bench", TITLES[mode], columns, rows, [*notes, nothing], whole="--output FILE.md")
    rounds = len(unit.rates)
    peaks = [f"{max(rates):,.0f} GFLOP/s in {precision}" for precision, rates in made.matmul[mode].items()]
    notes += [
        f"images/s: median of {rounds} round{'s' * (rounds != 1)}, in each of which every contender has a turn; "
        "min–max: over the rounds.",
        f"ratio: to {unit.model}, {unit.form}, in the same round; median over the rounds.",
        f"peak: tensors allocated in one {'training step' if mode == 'train' else 'pass'} above what lay there before "
        "(activations, gradients, temporaries; not weights).",
        "of peak: achieved GFLOP/s (two for a MAC" + (", three times those of the forward pass" * (mode == "train"))
        + f") as a share of a large matrix product's, measured in the same rounds: {', '.join(peaks)}.",
    ]  # fmt: skip
    if made.stopped and rounds < settings.rounds:
        notes.append(f"Stopped after {rounds} of {settings.rounds} rounds.")
    notes += other_load_notes(made.others)
    title = f"{TITLES[mode]}: batch {settings.batch_size}, {settings.img_size} x {settings.img_size}"
    return Table("bench", title, columns, rows, notes, whole="--output FILE.md")


def machine(device: torch.device) -> str:
    """The processor or GPU that was measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.*\S)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def facts(device: torch.device, argv: Sequence[str], threads: int) -> dict[str, str]:
    """Where figures come from, asked before the clock runs: command, machine, system, versions, commit, date."""
    commit, dirty = runs.git_state()
    libraries = f"torch {torch.__version__}, timm {timm.__version__}, hcnet {hcnet_cli.__version__}"
    return {
        "command": shlex.join(["hcnet", *argv[1:]]),
        "machine": f"{machine(device)}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)} used, {device}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": f"Python {platform.python_version()}, {libraries}",
        "environment": ", ".join(f"{name}={os.environ[name]}" for name in SPEED_ENVIRONMENT if name in os.environ)
        or "PyTorch's own allocator and threads",
        "commit": (commit or "unknown") + (" with changes" if dirty else ""),
        "date": runs.now(),
    }


def markdown(title: str, known: Mapping[str, str], made: Sequence[Table]) -> str:
    """A page that says how it was made, then the tables."""
    facts = [
        f"- {what}: {(markdown_code if what in ('command', 'commit') else in_markdown)(text)}"
        for what, text in known.items()
    ]
    return "\n".join([f"# {title}", "", *facts, "", report.render(made, "markdown")])


def page(made: Measurement, known: Mapping[str, str]) -> str:
    """The Markdown file."""
    settings = made.settings
    protocol = (
        f"batch {settings.batch_size}, {settings.img_size} x {settings.img_size}, contenders alternating "
        f"in {settings.rounds} round{'s' * (settings.rounds != 1)} after warm-up (docs/speed.md)"
    )
    text = markdown("Speed, side by side", {**known, "protocol": protocol}, tables(made))
    if settings.device.type == "cpu":
        text += f"\n## On a GPU\n\nNot measured here. This fills it:\n\n    {gpu_command(made)}\n"
    return text


def gpu_command(made: Measurement) -> str:
    """The same bench on a CUDA device."""
    settings, asked = made.settings, made.contenders
    words = ["hcnet", "bench"]
    for flag, key in (("--models", "model"), ("--mode", "mode"), ("--precision", "precision")):
        words += [flag, ",".join(dict.fromkeys(getattr(contender, key) for contender in asked))]
    words += ["--compile"] if any(c.compiled for c in asked) else []
    words += ["--batch-size", str(settings.batch_size), "--img-size", str(settings.img_size)]
    words += ["--rounds", str(settings.rounds), "--device", "cuda", "--output", "speed-gpu.md"]
    return shlex.join(words)


def json_text(made: Measurement, known: Mapping[str, str]) -> str:
    """Everything, with the figures of each round."""
    modes = []
    for mode in made.modes:
        unit = baseline(made.of(mode))
        modes.append(
            {
                "mode": mode,
                "unit": None if unit is None else f"{unit.model}, {unit.form}",
                "matmul_gflops": made.matmul.get(mode, {}),
                "contenders": [figures(contender, unit, made) for contender in made.of(mode)],
            }
        )
    settings = {**dataclasses.asdict(made.settings), "device": str(made.settings.device)}
    whole = {**known, **settings, "stopped": bool(made.stopped), "cores_of_others": made.others, "modes": modes}
    return to_json(whole) + "\n"
