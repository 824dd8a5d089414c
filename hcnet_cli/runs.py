"""The run folder: its name, its record (run.json) and its log (metrics.jsonl)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, notice
from hcnet_cli.files import sync, write_text, writing
from hcnet_cli.header import read_metadata
from hcnet_cli.plausible import implausible
from hcnet_cli.recipe import Recipe

SCHEMA = 1
WAIT_VARIABLE = "HCNET_WAIT"  # in the environment: a run that another process trains is waited for, not refused
WAITING = "Waiting for another process that is working"
RUN_FOLDERS = ("last", "previous", ".last.tmp", "final", "explain")
RUN_FILES = ("best.safetensors", "metrics.jsonl", "nonfinite.json", "log.txt", "recipe.yaml")
CLEARED = {"schema_version": SCHEMA, "status": "cleared"}


class DataInfo(BaseModel):
    """The data a run saw. `name` is what tables group by.

    `digest` covers the contents and names of all files, the classes and their order; with `trust` "names", only names
    and sizes. `bits` are those of images of more than 8 bits, if there are any. `left_out` counts what the folder
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
        lines = [f"16-bit images are read as {self.bits}-bit (data.bits)."] if self.bits else []
        if self.left_out:
            counts = ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.items())
            lines.append(f"Left out of the data: {counts}. `hcnet check` names them.")
        return [*lines, *self.notes]


class Session(BaseModel):
    """One command that took part in a run."""

    git_commit: str = ""
    git_dirty: bool = False
    argv: list[str] = []
    host: str = ""
    machine: str = ""
    device: str = ""
    processes: int = 1
    versions: dict[str, str] = {}
    started: str = ""
    from_step: int = 0

    @property
    def code(self) -> str:
        return (self.git_commit[:12] or "unknown") + ("+changes" if self.git_dirty else "")


class RunInfo(BaseModel):
    """run.json. Metrics are in per cent and belong to best.safetensors (step `best_step`).

    Commit, command, machine and versions are those of the last session; `sessions` has all.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    schema_version: int = SCHEMA
    # "cleared": --fresh is removing the files of the run; see RunFolder.clear
    status: Literal["running", "interrupted", "failed", "finished", "cleared"] = "running"
    task: str
    protocol: str  # shipped recipe followed, such as "pretrain/imagenet"
    changes: dict[str, Any] = {}  # where the recipe departs from it (dotted key -> value)
    size: str  # of HcNet; "" for another model
    model: str = ""  # another model's name
    variant: str = ""  # "", "no-refinement", "kernel_size=3" ...
    seed: int
    fingerprint: str
    config: str = ""  # digest of all that can change a number but the seed: equal for the runs of one row
    recipe_digest: str = ""  # of recipe.yaml as it was written
    data: DataInfo
    steps_done: int = 0
    steps_total: int
    steps_per_epoch: int | None = None
    batch_size: int
    metrics: dict[str, float] = {}
    metric_notes: dict[str, str] = {}  # the protocols of scores that have several: {"mIoU": "ss, whole"}
    evaluations: list[dict[str, Any]] = []  # scores added by `hcnet evaluate`: name, settings, argv, at
    best_step: int | None = None
    weights: str = ""  # digest of the tensors in best.safetensors
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
    sessions: list[Session] = []
    altered: bool = Field(default=False, exclude=True)  # run.json was changed after it was written

    def all_sessions(self) -> list[Session]:
        """Every command that took part; records from before they were kept have one."""
        return self.sessions or [Session(**{key: getattr(self, key) for key in Session.model_fields if key in SHARED})]

    @property
    def code(self) -> str:
        """The versions of the code that took part, in their order."""
        return ", then ".join(dict.fromkeys(session.code for session in self.all_sessions()))


SHARED = RunInfo.model_fields.keys()  # of a session and the record itself


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
        write_text(self.record, record_text(info))

    def clear(self) -> None:
        """Forgets an earlier run in this folder (--fresh); only files a run writes.

        A folder must never hold files that belong to nobody, wherever this is killed. So run.json first says "cleared",
        whole or not at all, and goes last: until then the folder is the old run, after that nobody goes on with it.
        """
        if not any((self.path / name).exists() for name in (*RUN_FILES, *RUN_FOLDERS)):
            return
        write_text(self.record, json.dumps(CLEARED) + "\n")
        with writing(self.path):
            for name in RUN_FOLDERS:
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            for name in RUN_FILES:
                (self.path / name).unlink(missing_ok=True)
            sync(self.path)
            self.record.unlink(missing_ok=True)

    def is_cleared(self) -> bool:
        """Whether a --fresh was stopped while it removed the files of an earlier run."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self.record.read_text(encoding="utf-8"))
            return isinstance(content, dict) and content.get("status") == CLEARED["status"]
        return False

    def has_progress(self) -> bool:
        """Whether there are checkpoints or weights of a run, whosever."""
        return any((self.path / name).exists() for name in ("last", "previous", "best.safetensors"))

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
    if data.get("status") == CLEARED["status"]:
        raise UserError(
            f"{path.parent} was being cleared by --fresh, which was stopped.",
            hint="The next training command with this --name removes the rest and starts from the beginning.",
        )
    try:
        info = RunInfo.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    if reason := implausible(vars(info) | {"data": vars(info.data)}):
        raise UserError(
            f"{path}: {reason}, which cannot be.",
            hint="Restore the file, start that run over with --fresh, or give this one another --name.",
        )
    # records from before there was a checksum have no `config`
    info.altered = data.get("checksum", "" if info.config else None) not in (None, _checksum(data))
    return info


def record_text(info: RunInfo) -> str:
    """The text of run.json, with a checksum over its content."""
    data = json.loads(info.model_dump_json())
    return json.dumps({**data, "checksum": _checksum(data)}, indent=2, ensure_ascii=False) + "\n"


def _checksum(data: Mapping[str, Any]) -> str:
    content = {key: value for key, value in data.items() if key != "checksum"}
    return text_digest(json.dumps(content, sort_keys=True))


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    """All runs under results/runs, sorted by folder name; and the folders that hold none that can be believed, each
    with its reason.
    """
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
        elif reason := contradiction(RunFolder(folder), info):
            broken.append((folder, f"{reason[:-1]}, so the run is not counted."))
        else:
            good.append((folder, info))
    return good, broken


# --- whether the files of a run belong together -----------------------------------------------------------------------


def contradiction(folder: RunFolder, info: RunInfo) -> str:
    """What in a run's folder contradicts its record, as a sentence; "" if nothing does. Reads no tensors.

    Records without `config` are older than what is compared here.
    """
    if info.altered:
        return f"{folder.record} was changed after it was written (its checksum does not match)."
    if not info.config:
        return ""
    return recipe_contradiction(folder, info) or weights_contradiction(folder, info)


def recipe_contradiction(folder: RunFolder, info: RunInfo) -> str:
    """How recipe.yaml contradicts the record; "" if it does not. A change without an effect on numbers is none."""
    try:
        text = folder.recipe_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{folder.recipe_file} cannot be read ({getattr(error, 'strerror', None) or 'it is not text'})."
    if text_digest(text) == info.recipe_digest:
        return ""
    try:
        recipe = rcp.resolve(folder.recipe_file).recipe
    except UserError as error:
        return f"{folder.recipe_file} is not the recipe of this run: {error}"
    found = run_fingerprint(recipe, info.data.digest, str(info.init.get("digest") or ""))
    if (found, recipe.train.seed, recipe.task) == (info.fingerprint, info.seed, info.task):
        return ""
    return f"{folder.recipe_file} is not the recipe of this run (fingerprint {found}, {info.fingerprint} in run.json)."


def weights_contradiction(folder: RunFolder, info: RunInfo) -> str:
    """How best.safetensors contradicts the record; "" if it does not, or there is none.

    A run that is not finished may have newer weights than its record says: it can be killed between the two.
    """
    if not folder.best.exists():
        return ""
    try:
        about = read_metadata(folder.best)
    except (OSError, ValueError) as error:
        return f"{folder.best} is damaged: {error}."
    if not about.get("fingerprint"):
        return f"{folder.best} does not say which run it is of." if info.weights else ""
    if about["fingerprint"] != info.fingerprint:
        return f"{folder.best} is of another run (fingerprint {about['fingerprint']}, {info.fingerprint} in run.json)."
    ours = {"task": info.task, "seed": info.seed, "data_digest": info.data.digest, "config": info.config}
    for key, value in ours.items():
        if about.get(key, value) != value:
            return f"{folder.best} is of a run with {key} {about[key]}, {folder.record} says {value}."
    if info.status != "finished" or not info.weights:
        return ""
    if str(about.get("step")) != str(info.best_step):
        return f"{folder.best} is of step {about.get('step')}, {folder.record} of step {info.best_step}."
    scored: Any = about.get("metrics")
    if not isinstance(scored, dict) or about.get("weights") != info.weights:
        return f"{folder.best} holds other weights than {folder.record} says."
    for name, value in scored.items():
        if info.metrics.get(name) != value:
            return f"{folder.best} scored {name} {value}, {folder.record} says {info.metrics.get(name)}."
    return ""


def run_fingerprint(recipe: Recipe, data: str, init: str) -> str:
    """The fingerprint of a run, from its recipe and the digests of its data and of the weights it starts from."""
    return rcp.fingerprint(recipe, data=data, **({"init": init} if init else {}))


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
