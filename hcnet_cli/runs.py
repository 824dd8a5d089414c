"""The run folder: its name, its record (run.json) and its log (metrics.jsonl)."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, notice
from hcnet_cli.files import write_text, writing
from hcnet_cli.recipe import Recipe
from hcnet_cli.tasks import TASKS

SCHEMA = 1
WAIT_VARIABLE = "HCNET_WAIT"  # in the environment: a run that another process trains is waited for, not refused
WAITING = "Waiting for another process that is working"


class DataInfo(BaseModel):
    """The data a run saw. `name` is what tables group by.

    `digest` covers the contents and names of all files, the classes and their order; with `trust` "names", only names
    and sizes. `bits` are those of grey images of more than 8 bits, if there are any. `left_out` counts what the folder
    holds and the run does not use, by reason. `notes` belong under every table that shows the run.
    """

    name: str
    digest: str
    path: str
    num_train: int
    num_val: int
    num_classes: int
    split: str = "val"
    trust: Literal["content", "names"] = "content"
    bits: int | None = None
    left_out: dict[str, int] = {}
    notes: list[str] = []

    def remarks(self) -> list[str]:
        """What people must know of the data before a run, a line each."""
        lines = [f"16-bit grey images are read as {self.bits}-bit (data.bits)."] if self.bits else []
        if self.left_out:
            counts = ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.items())
            lines.append(f"Left out of the data: {counts}. `hcnet check` names them.")
        return [*lines, *self.notes]


class RunInfo(BaseModel):
    """run.json. Metrics are in per cent and belong to best.safetensors (step `best_step`)."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    schema_version: int = SCHEMA
    status: Literal["running", "interrupted", "failed", "finished"] = "running"
    task: str
    protocol: str  # shipped recipe followed, such as "pretrain/imagenet"
    changes: dict[str, Any] = {}  # where the recipe departs from it (dotted key -> value)
    size: str  # of HcNet; "" for another model
    model: str = ""  # another model's name
    variant: str = ""  # "", "no-refinement", "kernel_size=3" ...
    seed: int
    fingerprint: str
    data: DataInfo
    steps_done: int = 0
    steps_total: int
    batch_size: int
    metrics: dict[str, float] = {}
    metric_notes: dict[str, str] = {}  # the protocols of scores that have several: {"mIoU": "ss, whole"}
    evaluations: list[dict[str, Any]] = []  # scores added by `hcnet evaluate`: name, settings, argv, at
    best_step: int | None = None
    params: int | None = None
    macs: int | None = None
    macs_input: str = ""  # "3x224x224"
    img_size: int | None = None
    images_per_second: float | None = None  # inference, see speed_notes
    speed_notes: str = ""
    kernels: list[str] = []  # the faster forms that training used
    train_images_per_second: float | None = None
    data_wait_share: float | None = None  # of the training time, 0..1
    peak_memory_mb: float | None = None
    device: str = ""
    precision: str = ""
    processes: int = 1
    init: dict[str, Any] = {}
    unreadable_images: int = 0
    evaluated_only: bool = False  # no training: weights that --init named
    git_commit: str = ""
    git_dirty: bool = False
    argv: list[str] = []
    versions: dict[str, str] = {}
    machine: str = ""
    host: str = ""  # the computer's name
    started: str = ""
    finished: str = ""
    train_seconds: float = 0.0
    error: str = ""


def run_name(recipe: Recipe, data_name: str, fingerprint: str) -> str:
    """<task>-<data>-<size>[-<variant>]-s<seed>-<fingerprint>."""
    shape = rcp.variant(recipe)
    parts = [
        recipe.task,
        data_name,
        recipe.model.label,
        *([shape] if shape else []),
        f"s{recipe.train.seed}",
        fingerprint,
    ]
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", "-".join(parts))


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# --- the folder -------------------------------------------------------------------------------------------------------


class RunFolder:
    """One run's folder. Only the main process writes; `lock` keeps a second command out.

    `waited`: another process was at work here, and this one has waited for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "run.json"
        self.recipe_file = path / "recipe.yaml"
        self.log_file = path / "metrics.jsonl"
        self.best = path / "best.safetensors"
        self.waited = False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a command works in the folder; a second one gets a UserError at once.

        With WAIT_VARIABLE in the environment it waits instead, as the cells of studies do that share a run.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=1)  # `is_locked` holds it for a moment
            except Timeout:
                self.waited = bool(os.environ.get(WAIT_VARIABLE))
                if not self.waited:
                    raise UserError(
                        f"Another process is working in {self.path}.",
                        hint="Wait for it, stop it, or give this run another --name.",
                    ) from None
                notice(f"{WAITING} in {self.path}.")
                lock.acquire(poll_interval=0.5)
        try:
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        """Whether a command works in the folder; True too where that cannot be found out, as on a read-only disk."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            return True
        lock.release()
        return False

    def read(self) -> RunInfo | None:
        """The record, or None for a folder without one. UserError for one that cannot be understood.

        A run that was killed on this machine could not write so: it is "interrupted", though its record says "running".
        """
        if not self.record.exists():
            return None
        info = read_record(self.record)
        if info.status == "running" and info.host == platform.node() and not self.is_locked():
            info.status = "interrupted"
        return info

    def write(self, info: RunInfo) -> None:
        write_text(self.record, info.model_dump_json(indent=2) + "\n")

    def clear(self) -> None:
        """Forgets an earlier run in this folder (--fresh); only files a run writes."""
        for name in (
            "run.json",
            "recipe.yaml",
            "metrics.jsonl",
            "best.safetensors",
            "nonfinite.json",
            "log.txt",
        ):
            (self.path / name).unlink(missing_ok=True)
        for name in ("last", "previous", "final", "explain"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def append(self, **entry: Any) -> None:
        """One line of metrics.jsonl."""
        with writing(self.log_file), self.log_file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`: the run goes on from there and will log it again."""
        if self.log_file.exists():
            kept = [json.dumps(entry) for entry in read_log(self.log_file) if entry.get("step", 0) <= step]
            write_text(self.log_file, "".join(f"{line}\n" for line in kept))


def read_record(path: Path) -> RunInfo:
    """A run.json as RunInfo, or a UserError saying why it cannot be."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}.",
            hint="Start that run over with --fresh, or give this one another --name.",
        ) from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise UserError(f"{path} is of version {version}; this program reads version {SCHEMA}.")
    try:
        return RunInfo.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line cut short by a crash is left out."""
    entries = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    entries.append(entry)
    return entries


def find_runs(results: Path) -> tuple[list[tuple[Path, RunInfo]], list[tuple[Path, str]]]:
    """All runs under results/runs, sorted by folder name; and the folders that hold none, each with its reason."""
    good: list[tuple[Path, RunInfo]] = []
    broken: list[tuple[Path, str]] = []
    root = results / "runs"
    for folder in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []:
        try:
            info = RunFolder(folder).read()
        except UserError as error:
            broken.append((folder, str(error)))
            continue
        if info is None:
            broken.append((folder, f"{folder} has no run.json."))
        else:
            good.append((folder, info))
    return good, broken


def best_pretraining(recipe: Recipe, results: Path) -> str | None:
    """The finished run, of the task that this one starts from, of the same model on the most training images; of
    several the one with the best score, then the newest.
    """
    source = TASKS[recipe.spec.starts_from]
    candidates = [
        (info.data.num_train, info.metrics.get(source.primary.key, 0.0), info.finished, str(folder))
        for folder, info in find_runs(results)[0]
        if (info.task, info.status, info.model or info.size) == (source.name, "finished", recipe.model.label)
        and info.variant == rcp.variant(recipe)
        and (folder / "best.safetensors").exists()
    ]
    return max(candidates)[-1] if candidates else None


def explain_missing_pretraining(recipe: Recipe, results: Path) -> tuple[str, str]:
    """(that there is none, the command that makes one), for people; no full stops."""
    shape = rcp.variant(recipe)
    label = recipe.model.label + (f" ({shape})" if shape else "")
    source = recipe.spec.starts_from
    flag = f"--set model.name={recipe.model.name}" if recipe.model.name else f"--size {recipe.model.size}"
    command = f"hcnet {source} {flag}" + (" with the same --set options" if shape else "")
    kind = "model" if recipe.model.name else "size"
    return f"There is no finished {source} run of {kind} {label} under {results}", command


def find_init(recipe: Recipe, results: Path) -> str:
    """What `init` means here: "auto" is the best pretraining, or "none", with a notice, where embedded data have none.

    A task that trains from scratch starts from nothing.
    """
    if recipe.init != "auto":
        return recipe.init
    if not recipe.spec.starts_from:
        return "none"
    if found := best_pretraining(recipe, results):
        return found
    lacking, command = explain_missing_pretraining(recipe, results)
    if recipe.data.path not in {spec.embedded for spec in TASKS.values()}:
        hint = f"Run `{command}` first, name weights with --init, or start from scratch with --init none."
        raise UserError(f"{lacking}.", hint=hint)
    notice(f"{lacking}: starting from scratch (`{command}` makes one).")
    return "none"


def git_state() -> tuple[str, bool]:
    """Commit of the code that runs and whether it was changed since; ("", False) outside a checkout."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout

    try:
        top = Path(git("rev-parse", "--show-toplevel").strip())
        if not (top / "hcnet_cli").is_dir():  # an environment that lies inside someone else's repository
            return "", False
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return "", False
