"""Studies whose cells are made-up runs, and designs of the digits' recipe: for tests of everything about studies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthetic_runs import make_run

from hcnet_cli import recipe as rcp
from hcnet_cli.study import design
from hcnet_cli.study import table as study_table
from hcnet_cli.study.design import Base, Design, Study
from hcnet_cli.study.record import Cell, StudyRecord
from hcnet_cli.table import Table

DIGITS = rcp.recipes_dir() / "pretrain" / "digits.yaml"
SCORES = {"full": (98.0, 97.0, 98.5), "no-gate": (97.0, 96.2, 97.3), "no-refinement": (98.2, 96.9, 98.4)}


def base(*overrides: tuple[str, Any], file: Path = DIGITS, init: str = "none") -> Base:
    return Base(file, tuple((key, value, f"--set {key}") for key, value in overrides), init)


def planned(study: Study, *bases: Base) -> Design:
    return design.expand("mine", study, bases or (base(),))


def with_recipe(folder: Path, recipe: rcp.Recipe) -> Path:
    (folder / "recipe.yaml").write_text(rcp.dump_yaml(recipe))
    return folder


def study_of(
    results: Path, scores: Mapping[str, tuple[float, ...]] = SCORES, data: str = "digits", **cells: Mapping[str, Any]
) -> StudyRecord:
    """A study whose cells are made-up runs; `cells` override fields of a run: {"no_gate_1": {...}}."""
    made = []
    for arm, values in scores.items():
        for seed, value in enumerate(values):
            fields: dict[str, Any] = {"seed": seed, "variant": "" if arm == "full" else arm}
            fields |= cells.get(f"{arm}_{seed}".replace("-", "_"), {})
            folder = make_run(results, data, score=value, log=False, name=f"{arm}-{seed}", **fields)
            made.append(Cell(arm=arm, task="pretrain", seed=seed, state="finished", run=folder.name))
    arms = {arm: {} if arm == "full" else {"model.disable": [arm[3:]]} for arm in scores}
    seeds = list(range(max(map(len, scores.values()))))
    return StudyRecord(
        name="s", title="parts", arms=arms, tasks=["pretrain"], seeds=seeds, cells=made, argv=["hcnet", "ablate"]
    )


def made(results: Path, record: StudyRecord) -> tuple[Table, dict[str, Mapping[str, Any]], str]:
    table = study_table.table(record, study_table.runs_by_name(results))
    return table, {str(row.values["variant"]): row.values for row in table.rows}, "\n".join(table.notes)
