"""Scores of evaluations as run.json has them: their names, how they are made, whether they are those of the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hcnet_cli.engine import Evaluation
from hcnet_cli.grouping import comparable_scores
from hcnet_cli.runs import RunInfo


def suffixed(names: Mapping[str, Any], evaluation: Evaluation, first: bool) -> dict[str, Any]:
    """Scores under the names that run.json has for them: those of the first evaluation are plain."""
    return {name if first else f"{name}_{evaluation.name}": value for name, value in names.items()}


def protocols(evaluations: Sequence[Evaluation], first: bool = True) -> dict[str, str]:
    """How each score that has several protocols is made, for the tables."""
    notes: dict[str, str] = {}
    for number, one in enumerate(evaluations):
        own = {one.task.primary: one.task.protocol} if one.task.protocol else {}
        notes |= suffixed({**own, **one.task.protocols}, one, first and number == 0)
    return notes


def differing_scores(info: RunInfo, scores: Mapping[str, float]) -> str:
    """The scores that differ from the record, with both values, for people; "" where none does."""
    return ", ".join(
        f"{name} {scores[name]:.4f} (record: {value:.4f})"
        for name, value in comparable_scores(info).items()
        if name in scores and abs(value - scores[name]) > 1e-6
    )
