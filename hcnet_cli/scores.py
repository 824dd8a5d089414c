"""Scores of evaluations as run.json has them: their names, how they are made, whether they are those of the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hcnet_cli.engine import Evaluation
from hcnet_cli.runs import RunInfo
from hcnet_cli.tasks import TASKS


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
    """The scores that differ from the record, with both values, for people; "" where none does. Figures that move with
    the rounding of a model's outputs are not compared.
    """
    spec = TASKS[info.task]
    exact = tuple(metric.key for metric in spec.metrics)
    rounded = tuple(figure.key for figure in spec.figures if not figure.key.startswith(exact))
    return ", ".join(
        f"{name} {value:.4f} (record: {info.metrics[name]:.4f})"
        for name, value in scores.items()
        if name in info.metrics and not name.startswith(rounded) and abs(info.metrics[name] - value) > 1e-6
    )
