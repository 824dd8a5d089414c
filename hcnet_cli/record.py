"""The record of a run, run.json: its fields, and the one place that reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

from hcnet_cli.console import UserError
from hcnet_cli.plain_json import read_json
from hcnet_cli.plausible import implausible

SCHEMA = 1
CLEARED = {"schema_version": SCHEMA, "status": "cleared"}


Count = Annotated[int, Field(ge=0, le=2**53)]  # a record may be anybody's: numbers that can be computed with


class DataCard(BaseModel):
    """What the training data look like. `classes`: how many `unit` ("images", "objects", "pixels") each class has, the
    commonest first, at most CLASSES_KEPT of them; `empty`: classes without any. `width`, `height`: smallest, median and
    largest of `sized` images, in pixels.
    """

    unit: str = ""
    classes: dict[str, Count] = {}
    num_classes: Count = 0
    empty: Count = 0
    smallest: Count = 0  # count of the rarest class that has any
    largest: Count = 0  # of the commonest
    width: tuple[Count, Count, Count] | None = None
    height: tuple[Count, Count, Count] | None = None
    sized: Count = 0

    @property
    def imbalance(self) -> float | None:
        """How often the commonest class is there for the rarest; None where nothing was counted."""
        return self.largest / self.smallest if self.smallest else None

    def balance_text(self) -> str:
        """Counts of the classes and how far they are apart; "" where nothing was counted."""
        if not self.imbalance:
            return ""
        plural = "es" if self.num_classes != 1 else ""
        text = f"{self.num_classes:,} class{plural} of {self.smallest:,}"
        if self.imbalance == 1:
            text += f" {self.unit} each"
        else:
            text += f" to {self.largest:,} {self.unit}, {self.imbalance:.{1 if self.imbalance < 10 else 0}f} to 1"
        return f"{text}, {self.empty:,} without any" if self.empty else text

    def size_text(self) -> str:
        """Sizes of the images; "" where none was looked at."""
        if self.width is None or self.height is None:
            return ""
        sides = [f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,})"
                 for low, middle, high in (self.width, self.height)]  # fmt: skip
        return f"{sides[0]} x {sides[1]} pixels, of {self.sized:,} images"

    def __str__(self) -> str:
        return "; ".join(filter(None, [self.balance_text(), self.size_text()]))


CLASSES_KEPT = 1000  # in a card


def data_card(unit: str, counts: Mapping[str, float], sizes: Sequence[tuple[int, int]]) -> DataCard:
    """The card of classes with these counts and of images of these sizes (height, width)."""
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    some = [int(count) for _, count in ordered if count]
    heights, widths = ([sorted(side) for side in zip(*sizes, strict=True)]) if sizes else ([], [])
    return DataCard(
        unit=unit,
        classes={name: int(count) for name, count in ordered[:CLASSES_KEPT]},
        num_classes=len(counts),
        empty=len(counts) - len(some),
        smallest=min(some, default=0),
        largest=max(some, default=0),
        width=_three(widths),
        height=_three(heights),
        sized=len(sizes),
    )


def _three(ordered: Sequence[int]) -> tuple[int, int, int] | None:
    """Smallest, median and largest."""
    return (ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None


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
    card: DataCard | None = None  # records from before there were cards have none

    def remarks(self) -> list[str]:
        """What people must know of the data before a run, a line each."""
        lines = [f"16-bit images are read as {self.bits}-bit (data.bits)."] if self.bits else []
        if self.left_out:
            counts = ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.items())
            lines.append(f"Left out of the data: {counts}. `hcnet check` names them.")
        return [*lines, *self.notes]


class InitInfo(TypedDict, total=False):
    """What became of the weights that a run started from: the fields of weights.LoadReport."""

    source: str
    digest: str
    loaded: int
    total: int
    reinitialised: list[str]
    missing: list[str]
    unexpected: list[str]
    resampled: list[str]
    config: str
    seed: int | None


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
    job: str = ""  # of Slurm: JOB, or JOB_TASK
    node: str = ""  # of Slurm
    restarts: int = 0  # how often Slurm had requeued the job
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
    model_file: str = ""  # digest of model.py, where the model is made by a file of the user's own
    variant: str = ""  # "", "no-refinement", "kernel_size=3" ...
    seed: int
    fingerprint: str
    config: str = ""  # digest of all that can change a number but the seed: equal for the runs of one row
    recipe_digest: str = ""  # of recipe.yaml as it was written
    data: DataInfo
    steps_done: int = 0
    steps_total: int
    stopped_early: bool = False  # by train.patience, after steps_done of steps_total
    steps_per_epoch: int | None = None
    batch_size: int
    metrics: dict[str, float] = {}
    metric_notes: dict[str, str] = {}  # the protocols of scores that have several: {"mIoU": "ss, whole"}
    evaluations: list[dict[str, Any]] = []  # scores added by `hcnet evaluate`: name, settings, argv, at
    best_step: int | None = None
    weights: str = ""  # digest of the tensors in best.safetensors
    params: int | None = None
    params_trained: int | None = None  # without those that are frozen
    class_weights: list[float] = []  # in the loss, in the order of the classes; empty: none
    macs: int | None = None
    macs_input: str = ""  # "3x224x224"
    img_size: int | None = None  # of training: a side, or the short side of the scale; older records: of macs_input
    images_per_second: float | None = None  # inference, see speed_notes
    speed_notes: str = ""
    kernels: list[str] = []  # the faster forms that training used
    train_images_per_second: float | None = None
    data_wait_share: float | None = None  # of the training time, 0..1
    peak_memory_mb: float | None = None
    device: str = ""
    precision: str = ""
    processes: int = 1
    init: InitInfo = {}
    unreadable_images: int = 0
    evaluated_only: bool = False  # no training: weights that --init named
    git_commit: str = ""
    git_dirty: bool = False
    argv: list[str] = []
    versions: dict[str, str] = {}
    machine: str = ""
    host: str = ""  # a digest of the computer's name (privacy.host_id)
    job: str = ""
    node: str = ""
    restarts: int = 0
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


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_record(path: Path) -> RunInfo:
    """A run.json as RunInfo, or a UserError saying why it cannot be."""
    try:
        data = read_json(path)
    except UserError as error:
        raise UserError(str(error), hint="Start that run over with --fresh, or give this one another --name.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA or isinstance(version, bool):
        raise UserError(f"{path} is of version {str(version)[:20]}; this program reads version {SCHEMA}.")
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
    info.altered = data.get("checksum", "" if info.config else None) not in (None, checksum(data))
    return info


def record_text(info: RunInfo) -> str:
    """The text of run.json, with a checksum over its content."""
    data = json.loads(info.model_dump_json())
    return json.dumps({**data, "checksum": checksum(data)}, indent=2, ensure_ascii=False) + "\n"


def checksum(data: Mapping[str, Any]) -> str:
    content = {key: value for key, value in data.items() if key != "checksum"}
    return text_digest(json.dumps(content, sort_keys=True))


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
