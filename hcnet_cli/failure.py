"""The record of a step whose loss or gradient was not finite: RUN/failure/, which `hcnet replay` reads. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcnet_cli.console import UserError
from hcnet_cli.plain_json import read_json
from hcnet_cli.runs import RunFolder

RECORD, WEIGHTS = "failure.json", "weights.safetensors"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sample(_Strict):
    """A training sample as that step saw it: its number in the data set, the key of all its randomness, its file."""

    sample: int = Field(ge=0)
    key: int = Field(ge=0, lt=2**63)
    file: str


class MicroBatch(_Strict):
    """The samples that one process computed at a time, in their order."""

    process: int = Field(ge=0)
    step_key: int = Field(ge=0, lt=2**63)
    samples: list[Sample] = Field(min_length=1)


class Failure(_Strict):
    """What failure.json holds. `step`: how many were made before the one that failed. `later_steps`: optimizer steps
    that were made before the host saw it (fp16 on a GPU).
    """

    step: int = Field(ge=0)
    seed: int
    precision: str
    losses: dict[str, str]
    later_steps: int = 0
    weights: str  # digest of weights.safetensors
    batches: list[MicroBatch]

    @property
    def samples(self) -> list[Sample]:
        return [sample for batch in self.batches for sample in batch.samples]


def read_failure(folder: RunFolder) -> tuple[Failure, Path]:
    """The record and the file of the weights before that step; UserError for a run without them."""
    place = folder.path / "failure"
    if not os.path.lexists(place / RECORD):
        raise UserError(
            f"{folder.path} has no failure to replay.",
            hint="Training writes failure/ when a loss or a gradient is not finite.",
        )
    try:
        failure = Failure.model_validate(read_json(place / RECORD))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{place / RECORD} is damaged: {key} cannot be understood.") from None
    if not (place / WEIGHTS).is_file():
        raise UserError(f"{place} has no {WEIGHTS}: the step cannot be replayed.")
    return failure, place / WEIGHTS
