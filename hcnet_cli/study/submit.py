"""Submits studies and single runs to Slurm, once each: what is finished or in the queue is left out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.text import Text

from hcnet_cli import recipe as rcp
from hcnet_cli.console import counted, notice, out
from hcnet_cli.files import write_text, writing
from hcnet_cli.recipe import Recipe
from hcnet_cli.runs import RunFolder
from hcnet_cli.study.design import Design, model_arguments
from hcnet_cli.study.planning import later_seeds
from hcnet_cli.study.record import StudyRecord, exclusive
from hcnet_cli.study.runner import Settings, StudyProcess
from hcnet_cli.study.slurm import (
    MAX_ARRAY_SIZE,
    Array,
    Cluster,
    forget_attempts,
    max_array_size,
    queue,
    quote,
    read_jobs,
    split,
    submit,
    write_jobs,
)
from hcnet_cli.study.table import runs_by_name
from hcnet_cli.values import place_typed


def submit_study(design: Design, settings: Settings, cluster: Cluster, dry_run: bool = False) -> StudyRecord | None:
    """Submits the cells that are neither finished nor in the queue, or with `dry_run` prints how.

    Returns the record once every cell is finished, else None.
    """
    with contextlib.nullcontext() if dry_run else exclusive(settings.results / "studies" / design.name):
        process = StudyProcess(design, settings)
        if all(cell.state == "finished" for cell in process.record.cells):
            process = StudyProcess(design, settings, later_seeds(process.record, runs_by_name(settings.results)))
        process.notice_kept()
        record, folder = process.record, process.folder
        todo = [cell for cell in record.cells if cell.state != "finished"]
        if not dry_run:
            process.write_recipes()
            for cell in record.cells:
                cell.log = str((folder / f"{record.stem(cell)}.log").relative_to(settings.results))
                if cell.state == "finished":
                    link(folder / record.stem(cell), settings.results / "runs" / cell.run)
            process.write()
        if not todo:
            return record
        notice(
            f"{counted(len(record.cells), 'cell')}, {len(record.cells) - len(todo)} of them finished · {process.file}"
        )
        arrays = [(_array(process, task), *_cells(process, task)) for task in design.tasks]
        submit_arrays(folder, arrays, cluster, dry_run)
        return None


def _array(process: StudyProcess, task: str) -> Array:
    """The array of one task of a study; its cells are in the order of the record."""
    design, settings, folder = process.design, process.settings, process.folder
    of_task = f"-{task}" if len(design.tasks) > 1 else ""
    own = {}
    for arm in design.arms:
        recipe = design.recipes[arm, task]
        words = [quote(word) for pair in model_arguments(recipe).items() for word in pair]
        init = quote(recipe.init)
        if source := design.sources.get(task):
            init = f'{quote(folder)}/"$arm"-{source}-s"$seed".run'
        own[arm] = " ".join(["--init", init, *words])
    data = quote(design.recipes[design.baseline, task].data.path or "")
    return Array(
        name=design.name,
        title=f"{design.title}: {task}, {len(design.arms)} arms x {len(process.record.seeds)} seeds",
        arms=list(design.arms),
        seeds=[str(seed) for seed in process.record.seeds],
        stem=f'{quote(folder)}/"$arm"{of_task}',
        arguments=f'{task} --recipe "$stem.yaml" --data {data} --seed "$seed" --out {quote(settings.results)} '
        f'--device {quote(settings.device)} "${{own[@]}}"',
        own=own,
        file=f"{task}.sh",
    )


def _cells(process: StudyProcess, task: str) -> tuple[dict[int, str], dict[int, str]]:
    """By number: the files of each unfinished cell of a task, and those of an unfinished cell that it starts from."""
    record = process.record
    cells = [cell for cell in record.cells if cell.task == task]
    wanted = {n: cell for n, cell in enumerate(cells) if cell.state != "finished"}
    sources = {n: source for n, cell in wanted.items() if (source := process.source(cell))}
    return (
        {n: record.stem(cell) for n, cell in wanted.items()},
        {n: record.stem(source) for n, source in sources.items() if source.state != "finished"},
    )


def run_label(recipe: Recipe, words: Sequence[str]) -> str:
    """The name of a single run's folder under slurm/, equal for equal commands and contents of the files they name."""
    said = [os.getcwd(), *words, recipe.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]
    parts = (recipe.task, Path(recipe.data.path or "").name, recipe.model.label, f"s{recipe.train.seed}", digest)
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", "-".join(parts))


def submit_run(recipe: Recipe, words: Sequence[str], name: str, results: Path, cluster: Cluster, dry_run: bool) -> None:
    """Submits one training command: its words, without the program and the options of Slurm.

    Files that the words name may change before the job starts or goes on: a recipe is kept beside the script, and
    a model's file is named with its digest, so that another content is refused.
    """
    folder, task, seed = results / "slurm" / name, recipe.task, recipe.train.seed
    stem = f"{task}-s{seed}"
    done = RunFolder(folder / f"{stem}.run")
    if (info := done.read()) and info.status == "finished":
        notice(f"This run is finished: {done.path.resolve()}. Without {done.path} the same command submits it again.")
        return
    words = _with_kept_recipe(words, folder / "recipe.yaml", dry_run)
    if recipe.model.digest:
        words += ["--set", model_arguments(recipe)["--set"]]
    arguments = " ".join(map(quote, words))
    one = Array(name, f"one run: {task}", [task], [str(seed)], f'{quote(folder)}/"$arm"', arguments)
    submit_arrays(folder, [(one, {0: stem}, {})], cluster, dry_run)


def _with_kept_recipe(words: Sequence[str], kept: Path, dry_run: bool) -> list[str]:
    """The words of a command with `kept` for the user's file that --recipe names, whose content it gets."""
    words = list(words)
    for place, word in enumerate(words):
        flag, equals, file = word.partition("=")
        if flag == "--recipe" and (file := file if equals else words[place + 1]).endswith((".yaml", ".yml")):
            words[place : place + (1 if equals else 2)] = ["--recipe", str(kept)]
            if not dry_run:
                with writing(kept):
                    kept.parent.mkdir(parents=True, exist_ok=True)
                write_text(kept, rcp.dump_yaml(rcp.resolve(Path(file)).recipe))
            break
    return words


def submit_arrays(
    folder: Path,
    arrays: Sequence[tuple[Array, Mapping[int, str], Mapping[int, str]]],
    cluster: Cluster,
    dry_run: bool,
) -> None:
    """For each array: the files of its cells by number, and those of the cells that they wait for."""
    jobs = read_jobs(folder)
    queued = set() if dry_run and not jobs else set(queue())
    size = MAX_ARRAY_SIZE if dry_run else max_array_size()
    total = 0
    for array, cells, sources in arrays:
        script = folder / array.file
        wanted = {n: stem for n, stem in cells.items() if jobs.get(stem) not in queued}
        after = {n: dependency(n % size, jobs[sources[n]]) for n in wanted if n in sources}
        text = array.script(cluster)
        if dry_run:
            out.print(Text(f"# {script}\n{text}"), end="")
        else:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_text(script, text)
            forget_attempts(folder, list(wanted.values()))
        for part in split(script, wanted, after, size):
            line = shlex.join(part.line(cluster))
            if dry_run:
                out.print(f"# {line}")
                job = array.file.removesuffix(".sh").upper()  # stands for a number
            else:
                job = submit(part, cluster)
                notice(f"Job {job}: {counted(len(part.cells), 'cell')}, {cluster.cost(len(part.cells))}.")
            jobs |= {stem: f"{job}_{n}" for n, stem in part.cells.items()}
            total += len(part.cells)
            if not dry_run:
                write_jobs(folder, jobs)
        if len(wanted) < len(cells):
            notice(f"{len(cells) - len(wanted)} cells of {array.file} are in the queue already.")
    if total and not dry_run:
        shows = f"`hcnet studies {folder.name}{place_typed(folder.parent.parent, '--results')}` shows how they go"
        notice(f"{shows}; the same command again submits what is unfinished.")


def dependency(number: int, source: str) -> str:
    """What a cell with this number in its array waits for; `source`: JOB_TASK."""
    job, _, task = source.partition("_")
    return f"aftercorr:{job}" if task == str(number) else f"afterok:{source}"


def link(stem: Path, run: Path) -> None:
    """The link of a cell to its run, as the run itself makes it."""
    path = stem.with_name(f"{stem.name}.run")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(run.resolve(), path.parent.resolve()))
