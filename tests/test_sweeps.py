"""Protects `hcnet ablate --sweep`: its arms, what it refuses, and what it says of the best of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from synthetic_studies import base, made, planned, study_of

from hcnet_cli.console import UserError
from hcnet_cli.study import design
from hcnet_cli.study.design import Study

LR = "optim.lr=1e-3,3e-3,1e-2"


def test_an_arm_for_each_value_and_for_each_pair_of_two() -> None:
    short, study = design.sweep_study([LR])
    assert (short, list(study.arms)) == ("sweep-lr", ["lr=0.001", "lr=0.003", "lr=0.01"])
    assert [one.optim.lr for one in planned(study).recipes.values()] == [0.001, 0.003, 0.01]
    _, grid = design.sweep_study([LR, "model.depths=[1,1,1,1],[2,2,4,2]"])
    assert "lr=0.003+depths=2-2-4-2" in grid.arms
    recipes = planned(grid).recipes.values()
    assert {(one.optim.lr, one.model.depths) for one in recipes} == set(
        itertools.product((0.001, 0.003, 0.01), ((1, 1, 1, 1), (2, 2, 4, 2)))
    )
    _, twins = design.sweep_study(["data.mixup=0,0.8", "head.loss=cross-entropy,focal", "train.ema_decay=null,0.9"])
    assert "mixup=0+loss=cross-entropy+ema_decay=null" in twins.arms


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["optim.lr"], "is not KEY=VALUE,VALUE with two values or more"),
        (["optim.lr=0.1"], "with two values or more"),
        (["optim.lr=1e-3,0.001"], "lr=0.001 is there twice"),
        ([LR, "optim.lr=1,2"], "--sweep optim.lr is there twice"),
        (["train.batch_size=4,8"], "train.batch_size is the same for all arms"),
        (["optim.rate=1,2"], 'unknown recipe key "optim.rate"'),
        (["optim.lr=1,many"], '"optim.lr" cannot be "many"'),
        (["model.name=a/b,c"], "cannot be the name of an arm"),
        ([f"optim.lr={','.join(f'0.{i:03}' for i in range(1, 102))}"], "at most 100"),
        (["optim.lr=[1,2"], "--sweep optim.lr"),
    ],
)
def test_mistakes_are_one_sentence(given: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        planned(design.sweep_study(given)[1])
    assert words in str(refused.value)


def test_the_best_value_is_named_as_a_selection(tmp_path: Path) -> None:
    """Only where every arm sets the same fields: in an ablation the best arm was not looked for."""
    scores = {"full": (90.0, 91.0), "no-gate": (95.0, 94.0)}
    record = study_of(tmp_path, scores)
    assert "is a selection" not in made(tmp_path, record)[2]
    arms = {"full": {"optim.lr": 0.001}, "no-gate": {"optim.lr": 0.003}}
    said = made(tmp_path, record.model_copy(update={"arms": arms}))[2]
    assert "the highest of 2 is no-gate (94.50). Choosing it on the validation data is a selection" in said


def test_unlike_budgets_are_refused_unless_asked_for(tmp_path: Path) -> None:
    _, study = design.sweep_study([LR])
    patient = base(("train.patience", 3))
    with pytest.raises(UserError, match="their budgets differ") as refused:
        planned(study, patient)
    assert "--early-stopping" in str(refused.value.hint)
    told = study.model_copy(update={"early_stopping": True})
    assert {one.train.patience for one in planned(told, patient).recipes.values()} == {3}
    with pytest.raises(UserError, match=r"train.patience is the same for all arms"):
        planned(Study(title="t", arms={"a": {}, "b": {"train.patience": 2}}, early_stopping=True))
    early = {"steps_done": 88, "best_step": 44, "stopped_early": True}
    _, rows, said = made(tmp_path, study_of(tmp_path, {"full": (90.0, 91.0), "no-gate": (95.0, 94.0)}, full_1=early))
    assert "1 of 4 runs were stopped early (train.patience), after 88 to 88 steps" in said
    assert rows["full"]["top1_n"] == 2
