"""The runs whose results can be known when the analysis of a study is fixed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hcnet_cli.grouping import Run
from hcnet_cli.study.analysis import Fixed
from hcnet_cli.study.design import Design
from hcnet_cli.study.record import RunSearch, StudyRecord, likeness


def with_known(asked: Fixed, design: Design, search: RunSearch, before: StudyRecord | None) -> Fixed:
    """The analysis with the number of finished runs; `before` also tells of runs that are gone."""
    by_seed = _finished_by_seed(design, search)
    most = sum(by_seed.values())
    if before:
        of_record = sum(cell.state == "finished" for cell in before.cells)
        most = max(most, of_record, before.primary.finished if before.primary else 0)
    others = sum(number for seed, number in by_seed.items() if seed not in asked.seeds)
    return asked.model_copy(update={"finished": most, "other_seeds": others})


def _finished_by_seed(design: Design, search: RunSearch) -> Counter[int]:
    """How many runs of the study's arms are finished with each seed, whether it is asked for or not."""
    number: Counter[int] = Counter()
    for seed in sorted({seed for _, _, seed in search.alike}):
        for arm in design.arms:
            found: dict[str, Path] = {}  # by task
            for task in design.tasks:
                source = design.sources.get(task, "")
                recipe = design.recipe(arm, task, seed, str(found.get(source, "")))
                if (source and source not in found) or likeness(recipe) not in search.alike:
                    continue
                folder = search.find(recipe, None)
                if folder and folder.name in search.names and Run(*search.names[folder.name]).finished:
                    found[task] = folder
                    number[seed] += 1
    return number
