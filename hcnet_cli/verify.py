"""`hcnet card --verify`: whether a run's weights, data and scores are those that a card claims."""

from __future__ import annotations

from typing import NamedTuple

from hcnet_cli import build, engine, runs
from hcnet_cli.console import UserError
from hcnet_cli.device import pick_device, use_cores
from hcnet_cli.header import tensors_digest
from hcnet_cli.recipe import Recipe
from hcnet_cli.record import Session
from hcnet_cli.report.card import DECIMALS, Claim
from hcnet_cli.runs import RunFolder
from hcnet_cli.scores import suffixed

CODE = "code version"


class Finding(NamedTuple):
    """One comparison: what was compared, what the card says, and what is so here, or why it cannot be told."""

    what: str
    claimed: str
    found: str

    @property
    def equal(self) -> bool:
        return self.claimed == self.found

    def __str__(self) -> str:
        return f"{self.what}: " + (
            f"equal ({self.found})" if self.equal else f"differs: {self.found} here, {self.claimed} on the card"
        )


def verify(claim: Claim, folder: RunFolder, recipe: Recipe, device: str) -> list[Finding]:
    """Compares the weights, the data, the code version and every score of a claim with what is here.

    The scores are made again with the weights and the data that are here. UserError for data that cannot be opened.
    """
    where = pick_device(device)
    use_cores(where)
    try:
        weights = tensors_digest(folder.best)
    except ValueError as error:
        weights = f"a damaged file ({error})"
    data = build.open_data(recipe)
    commit, dirty = runs.git_state()
    findings = [
        Finding("weights", claim.weights, weights),
        Finding("data", claim.data, data.info.digest),
        Finding(CODE, claim.code, Session(git_commit=commit, git_dirty=dirty).code),
    ]
    claimed = claim.by_name()
    try:
        task = build.build_task(recipe, data)
        build.load_own(task, folder.path)
        job = build.scoring_job(recipe, data, task, where)
        made: dict[str, float] = {}
        first, *others = recipe.evaluation
        names = [first, *(name for name in others if any(score.endswith(f"_{name}") for score in claimed))]
        for one in build.build_evaluations(recipe, task, data, names):
            made |= suffixed(engine.evaluate(job, one)[0], one, first=one.name == first)
    except UserError as error:
        return [*findings, *(Finding(name, text, f"not made ({error})") for name, text in claimed.items())]
    found = {name: f"{value:.{DECIMALS}f}" for name, value in made.items()}
    return [*findings, *(Finding(name, text, found.get(name, "not made")) for name, text in claimed.items())]
