"""The run folder: its name, its record (run.json) and its log (metrics.jsonl)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, did_you_mean, notice
from hcnet_cli.files import read_text, remove_stale, sync, write_text, writing
from hcnet_cli.header import read_metadata
from hcnet_cli.locks import Lock
from hcnet_cli.plain_json import parse_json, read_json
from hcnet_cli.privacy import host_id
from hcnet_cli.recipe import Recipe
from hcnet_cli.record import CLEARED, DataInfo, RunInfo, Session, now, read_record, record_text, text_digest

__all__ = ["DataInfo", "RunInfo", "Session", "now", "read_record", "record_text", "text_digest"]  # with what is below

WAIT_VARIABLE = "HCNET_WAIT"  # in the environment: a run that another process trains is waited for, not refused
LINK_VARIABLE = "HCNET_LINK"  # in the environment: a path that becomes a link to the folder of the run
WAITING = "Waiting for another process that is working"
FINGERPRINT = re.compile("[0-9a-f]{8}")  # the end of a run's name
LOG_BYTES = 256 * 2**20  # of a metrics.jsonl; a run of 1.5 million steps writes some 10 MiB
RUN_FOLDERS = (
    *("last", "previous", ".last.tmp", "final", "progress", "explain"),
    *("failure", ".failure.tmp", "profile", "track"),
)
RUN_FILES = (
    *("best.safetensors", "metrics.jsonl", "nonfinite.json", "log.txt", "recipe.yaml", "model.py"),
    *("batches.png", "progress.png"),
)


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
        self.replaced = path / "replaced.safetensors"
        self.model_file = path / "model.py"  # a copy of the file of the user's own that the model is made by
        self.batches_file = path / "batches.png"  # the first batches as the model gets them
        self.waited = False
        self.held: Lock | None = None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a command works in the folder; a second one gets a UserError at once.

        With WAIT_VARIABLE in the environment it waits instead, as the cells of studies do that share a run.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path)
            if not lock.acquire(timeout=1):  # `is_locked` holds it for a moment
                self.waited = bool(os.environ.get(WAIT_VARIABLE))
                if not self.waited:
                    owner = lock.owner()
                    raise UserError(
                        f"Another process is working in {self.path}{f' ({owner})' if owner else ''}.",
                        hint="Wait for it, stop it, or give this run another --name.",
                    )
                notice(f"{WAITING} in {self.path}.")
                while not lock.acquire(timeout=0.5):
                    time.sleep(0.5)
        self.held = lock
        try:
            remove_stale(self.path, ".*.[0-9]*.tmp", seconds=0)  # whoever wrote them is gone
            self._link()
            yield
        finally:
            self.held = None
            lock.release()

    def _link(self) -> None:
        """Makes the link that LINK_VARIABLE names lead here."""
        if name := os.environ.get(LINK_VARIABLE):
            link = Path(name)
            with writing(link):
                link.parent.mkdir(parents=True, exist_ok=True)
                fresh = link.with_name(f".{link.name}.{os.getpid()}.tmp")
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(os.path.relpath(self.path.resolve(), link.parent.resolve()))
                os.replace(fresh, link)

    def require_lock(self) -> None:
        """RunFailed if the lock that this command holds was taken over by another one."""
        if self.held is not None:
            self.held.require()

    def is_locked(self) -> bool:
        """Whether a command works in the folder; True too where that cannot be found out, as on a read-only disk."""
        return Lock(self.path).is_held()

    def read(self) -> RunInfo | None:
        """The record, or None for a folder without one. UserError for one that cannot be understood.

        A run that was killed could not write so: it is "interrupted", though its record says "running", once its
        process is gone from this machine, or silent on another one.
        """
        if not os.path.lexists(self.record):
            return None
        info = read_record(self.record)
        if info.status == "running":
            owner = Lock(self.path).owner()
            here = info.host in (host_id(), platform.node()) and not self.is_locked()
            if here or (owner is not None and owner.is_gone):
                info.status = "interrupted"
        return info

    def require(self) -> RunInfo:
        """The record; UserError for a folder without one, too."""
        info = self.read()
        if info is None:
            raise UserError(f"{self.path} is not a run: it has no run.json.", hint="Runs lie in results/runs/.")
        return info

    def require_weights(self) -> RunInfo:
        """The record; UserError for a folder without one, or without weights."""
        info = self.require()
        if not self.best.is_file():
            hint = "Training writes it at the first evaluation: go on with it."
            if self.replaced.exists():
                hint += f" The weights of the run before are in {self.replaced}."
            raise UserError(f"{self.path} has no best.safetensors.", hint=hint)
        return info

    def write(self, info: RunInfo) -> None:
        self.require_lock()
        write_text(self.record, record_text(info))

    def clear(self) -> None:
        """Forgets an earlier run in this folder (--fresh); only files a run writes. Its best weights are set aside.

        A folder must never hold files that belong to nobody, wherever this is killed. So run.json first says "cleared",
        whole or not at all, and goes last: until then the folder is the old run, after that nobody goes on with it.
        """
        if not any((self.path / name).exists() for name in (*RUN_FILES, *RUN_FOLDERS)):
            return
        write_text(self.record, json.dumps(CLEARED) + "\n")
        with writing(self.path):
            self.set_aside()
            for name in RUN_FOLDERS:
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            for name in RUN_FILES:
                (self.path / name).unlink(missing_ok=True)
            sync(self.path)
            self.record.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Keeps the best weights as `replaced` until a new run has finished, unless those of an older run are kept."""
        if self.best.exists() and not self.replaced.exists():
            self.best.replace(self.replaced)

    def remove(self) -> None:
        """Forgets the run in this folder, its weights too."""
        self.clear()
        with writing(self.path):
            self.replaced.unlink(missing_ok=True)

    def is_cleared(self) -> bool:
        """Whether a --fresh was stopped while it removed the files of an earlier run."""
        with contextlib.suppress(UserError):
            content = read_json(self.record)
            return isinstance(content, dict) and content.get("status") == CLEARED["status"]
        return False

    def own_model(self, label: str) -> str:
        """The option that names the run's copy of the file of the user's own that makes its model."""
        return f"--model {shlex.quote(f'{self.model_file}:{label}')}"

    def has_progress(self) -> bool:
        """Whether there are checkpoints or weights of a run, whosever."""
        return any((self.path / name).exists() for name in ("last", "previous", "best.safetensors"))

    def append(self, **entry: Any) -> None:
        """One line of metrics.jsonl; null for a number that is not finite, which JSON cannot hold."""
        self.require_lock()
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with writing(self.log_file), self.log_file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(plain) + "\n")

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`: the run goes on from there and will log it again."""
        if os.path.lexists(self.log_file):
            kept = [json.dumps(entry) for entry in read_log(self.log_file) if entry.get("step", 0) <= step]
            write_text(self.log_file, "".join(f"{line}\n" for line in kept))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a line that is no entry, such as a last one cut short by a crash, is left out.

    UserError for a log that cannot be read.
    """
    entries = []
    for line in read_text(path, LOG_BYTES).splitlines() if os.path.lexists(path) else ():
        with contextlib.suppress(ValueError):
            entry = parse_json(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def find_run(run_name: str, results: Path) -> RunFolder:
    """The folder of a run given by path, by its name under RESULTS/runs, or by the fingerprint that it ends in."""
    for path in (Path(run_name), results / "runs" / run_name):
        if path.is_dir():
            return RunFolder(path)
    folders = _folders(results / "runs")
    ending = [folder for folder in folders if FINGERPRINT.fullmatch(run_name) and folder.name.endswith(run_name)]
    if len(ending) == 1:
        return RunFolder(ending[0])
    if ending:
        raise UserError(f"{len(ending)} runs end in {run_name}: {', '.join(folder.name for folder in ending)}.")
    near = did_you_mean(path.name, [folder.name for folder in folders])
    raise UserError(f"There is no run {run_name}.{near}", hint=f"Runs lie in {results / 'runs'}.")


def own_folder(results: Path, name: str, default: str, fingerprint: str) -> RunFolder:
    """The folder of the run that a command makes: `name` if it gives one, else `default`, or where the run of this
    fingerprint is called otherwise, as `hcnet runs mv` leaves it. Of finished copies any will do; which one of several
    unfinished runs is meant is not known, so a new one begins.
    """
    usual = results / "runs" / (name or default)
    if name or os.path.lexists(usual):
        return RunFolder(usual)
    good, _ = find_runs(results)
    same = [(path, info) for path, info in good if info.fingerprint == fingerprint and not info.evaluated_only]
    finished = [path for path, info in same if info.status == "finished"]
    if not finished and len(same) > 1:
        return RunFolder(usual)
    return RunFolder([*finished, *(path for path, _ in same), usual][0])


def find_runs(results: Path) -> tuple[list[tuple[Path, RunInfo]], list[tuple[Path, str]]]:
    """All runs under results/runs, sorted by folder name; and the folders that hold none that can be believed, each
    with its reason.
    """
    good: list[tuple[Path, RunInfo]] = []
    broken: list[tuple[Path, str]] = []
    for folder in _folders(results / "runs"):
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


def _folders(root: Path) -> list[Path]:
    """The folders in `root`, sorted, with links that lead nowhere: they stand for runs that are gone."""
    if not os.path.isdir(root):
        return []
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror or error}.") from None
    return [path for path in entries if os.path.isdir(path) or not os.path.exists(path)]


def require_own_model(folder: RunFolder, recipe: Recipe, named: bool) -> None:
    """UserError for a run whose model a file of the user's own makes, where the command line does not name it."""
    if recipe.model.digest and not named:
        raise UserError(
            f"The model of this run is made by a file, {folder.model_file}, which runs only if you name it.",
            hint=f"Read the file, and give {folder.own_model(recipe.model.label)}",
        )


def trusted_weights(folder: RunFolder) -> RunInfo:
    """The record of a run that has weights; UserError for no run, no weights, and files that contradict the record."""
    info = folder.require_weights()
    if reason := contradiction(folder, info):
        raise UserError(reason, hint="Restore the file, or train the run again with --fresh.")
    return info


def with_weights(
    folder: RunFolder, model: str | None = None, data: str | None = None, *, any_weights: bool = False
) -> tuple[RunInfo, Recipe]:
    """Record and recipe of a run that has weights; UserError for no run, no weights, and files that contradict it.

    `model`: FILE.py:FUNCTION, without which a file of the user's own does not run. `data`: where its data lie now.
    `any_weights`: the weights, and the scores in the record, may be others than the record says: they are compared.
    """
    info = folder.require_weights() if any_weights else trusted_weights(folder)
    if any_weights and info.config and (reason := recipe_contradiction(folder, info)):
        raise UserError(reason, hint="Restore the file, or train the run again with --fresh.")
    recipe = rcp.resolve(folder.recipe_file).recipe
    return info, with_paths(folder, recipe, model, data)


def with_paths(folder: RunFolder, recipe: Recipe, model: str | None, data: str | None) -> Recipe:
    """The recipe of a run with the places of its model's file and of its data as the command line names them.

    UserError for a file that is not what made the run's model.
    """
    require_own_model(folder, recipe, named=model is not None)
    given = [("model.name", model, "--model"), ("data.path", data, "--data")]
    found = rcp.resolve(folder.recipe_file, [one for one in given if one[1] is not None]).recipe
    if (found.model.label, found.model.digest) != (recipe.model.label, recipe.model.digest):
        raise UserError(f"{model} is not what made the model of this run: the file has changed, or it is another.")
    return found


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
        text = read_text(folder.recipe_file)
    except UserError as error:
        return str(error)
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
    if not os.path.lexists(folder.best):
        return ""
    try:
        about = read_metadata(folder.best)
    except UserError as error:
        return str(error)
    except ValueError as error:
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
        code = (":/hcnet_cli", ":/recipes")  # what else is in the repository changes no number
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code).strip()
        return git("rev-parse", "HEAD").strip(), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return "", False
