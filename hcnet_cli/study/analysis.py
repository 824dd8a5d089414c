"""The primary analysis of a study: what is tested and how, fixed before its runs are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from hcnet_cli.console import UserError
from hcnet_cli.schema import Part
from hcnet_cli.statistics import MOST_SIGN_FLIPS, SIGNIFICANT
from hcnet_cli.tasks import TASKS
from hcnet_cli.values import as_typed, first_mistake

MAX_SEEDS = 20  # of --until
Points = Annotated[float, Field(gt=0, le=100)]


class Analysis(Part):
    """The key `primary` of a study file.

    Args:
        test: The test whose p decides; the other one is secondary.
        metric: The metric that it is about; "": that of the study's first task. Other metrics are secondary.
        alpha: Level of the test, of all arms together; intervals are at 1 - alpha.
        margin: Points; a difference that is shown to be smaller counts as none.
        until: Half-width in points that the interval of each arm is to have: seeds are added by Stein's rule.
        max_seeds: Seeds at most, with `until`.
    """

    test: Literal["paired-t", "sign-flip"] = "paired-t"
    metric: str = ""
    alpha: Annotated[float, Field(gt=0, le=0.5)] = SIGNIFICANT
    margin: Points | None = None
    until: Points | None = None
    max_seeds: Annotated[int, Field(ge=2, le=100)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Analysis:
        if self.max_seeds and not self.until:
            raise ValueError("max_seeds is for a study with until")
        if self.until and self.test != "paired-t":
            raise ValueError("until has a t-test of its own, so that the test must be paired-t")
        return self

    @property
    def most_seeds(self) -> int:
        return self.max_seeds or MAX_SEEDS

    def check(self, tasks: Sequence[str], seeds: Sequence[int]) -> Analysis:
        """The same with the metric's name. UserError where tasks or seeds do not allow it."""
        metrics = [TASKS[task].primary.key for task in tasks]
        if self.metric and self.metric not in metrics:
            raise UserError(
                f'The primary metric "{self.metric}" is none of this study.', hint=f"Its metrics: {', '.join(metrics)}."
            )
        if self.test == "sign-flip" and len(seeds) > MOST_SIGN_FLIPS:
            raise UserError(
                f"The exact sign-flip test takes at most {MOST_SIGN_FLIPS} seeds.", hint="Use the paired t-test."
            )
        if self.until and not 2 <= len(seeds) <= self.most_seeds:
            raise UserError(
                f"--until begins with at least two seeds and at most --max-seeds {self.most_seeds}, not {len(seeds)}.",
                hint="--seeds names the first ones; five or more waste fewer later: --seeds 0,1,2,3,4",
            )
        return self.model_copy(update={"metric": self.metric or metrics[0]})

    def describe(self, arms: int) -> str:
        """In words, for an analysis whose metric is known; `arms` are compared with the baseline."""
        title = next(m.title for spec in TASKS.values() for m in spec.metrics if m.key == self.metric)
        test = {"paired-t": "paired t-test", "sign-flip": "exact sign-flip test"}[self.test]
        if self.until:
            test = f"t-test of Stein's two stages (until ±{self.until:g}, at most {self.most_seeds} seeds)"
        corrected = f", Holm-corrected over {arms} arms" if arms > 1 else ""
        margin = f"; equivalence within ±{self.margin:g}" if self.margin else ""
        return f"{title}, {test}, two-sided, p < {self.alpha:g}{corrected}{margin}"


class Fixed(Part):
    """An analysis as it was fixed, with the seeds planned.

    Args:
        finished: Runs of the study's arms that were finished by then, whatever their seeds and wherever they are now.
        other_seeds: Those of them with seeds that were not planned.
    """

    analysis: Analysis
    seeds: tuple[int, ...]
    finished: int = 0
    other_seeds: int = 0


def with_flags(analysis: Analysis, flags: Mapping[str, Any]) -> Analysis:
    """The analysis of a study file with what flags (by field) change in it. UserError for what does not fit."""
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return Analysis.model_validate({**analysis.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        if not error.errors()[0]["loc"]:  # of several fields
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"{message[0].upper()}{message[1:]}.") from None
        key, sentence, example = first_mistake(error, Analysis, given, ())
        flag = f"--{key.replace('_', '-')}"
        hint = "" if example is None else f"For example: {as_typed(key, example, flag)}"
        raise UserError(sentence.replace(f'"{key}"', flag, 1).replace(", or null", ""), hint=hint) from None


def fix(asked: Fixed, before: Fixed | None, finished: bool) -> Fixed:
    """The analysis of a study that is about to start or to continue.

    While no run is `finished`, or where those that were are gone, it may change. Else the one of `before` stays;
    UserError if `asked` names something else, or other seeds for the first stage of `until`.
    """
    analysis = asked.analysis
    if before is None or not finished:
        return before if before and (before.analysis, before.seeds) == (analysis, asked.seeds) else asked
    for name in sorted(analysis.model_fields_set):
        now, then = getattr(analysis, name), getattr(before.analysis, name)
        if now != then:
            raise UserError(
                f"The primary analysis of this study was fixed before its runs were known: {name} is "
                f"{'not set' if then is None else then} and cannot become {now}.",
                hint="Leave it as it was. What is looked for afterwards is secondary: report it as such, or test it on "
                "other seeds in a study file of another name.",
            )
    if before.analysis.until and asked.seeds != before.seeds:
        raise UserError(
            f"The first seeds of this study were fixed as {','.join(map(str, before.seeds))}; --until adds the others."
        )
    return before
