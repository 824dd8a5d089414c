"""`hcnet studies`: where the cells of every study are; and the options that submit to Slurm."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcnet_cli.console import UserError, out, warn
from hcnet_cli.privacy import mask

if TYPE_CHECKING:
    from hcnet_cli.study.slurm import Cluster

WATCH_SECONDS = 10
On = Annotated[str | None, typer.Option("--on", help="slurm: submit to Slurm instead of training here, and end.")]
Partition = Annotated[str | None, typer.Option("--partition", help="Slurm: the partition.")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=0, help="Slurm: GPUs of a run (default 0).")]
Cpus = Annotated[int | None, typer.Option("--cpus", min=1, help="Slurm: cores of a run.")]
Time = Annotated[str | None, typer.Option("--time", help="Slurm: time limit of one start of a run, such as 12:00:00.")]
AtOnce = Annotated[int | None, typer.Option("--at-once", min=1, help="Slurm: runs at a time, of each array.")]
SbatchArgs = Annotated[str | None, typer.Option("--sbatch-args", help="Slurm: further options of sbatch, in quotes.")]
OPTIONS: dict[str, tuple[Any, Any]] = {  # parameter -> annotation, default
    "on": (On, None),
    "partition": (Partition, None),
    "gpus": (Gpus, None),
    "cpus": (Cpus, None),
    "time": (Time, None),
    "at_once": (AtOnce, None),
    "sbatch_args": (SbatchArgs, None),
}


def cluster(given: dict[str, Any]) -> Cluster | None:
    """What the options of Slurm say; None without --on. UserError for options that cannot be."""
    flags = {name: f"--{name.replace('_', '-')}" for name in OPTIONS}
    if given["on"] is None:
        for name, flag in flags.items():
            if given[name] is not None:
                raise UserError(f"{flag} is for --on slurm.")
        return None
    if given["on"] != "slurm":
        raise UserError(f"--on {given['on']}: known is slurm.")
    if given.get("fresh"):
        raise UserError("--fresh cannot be combined with --on slurm: each requeue would start over.")
    if "\\" in str(given["out_dir"]):
        raise UserError(f"--out {given['out_dir']}: Slurm takes the backslash for an escape in the name of its log.")
    from hcnet_cli.study.slurm import Cluster

    return Cluster(
        partition=given["partition"] or "",
        gpus=given["gpus"] or 0,
        cpus=given["cpus"] or 0,
        time=given["time"] or "",
        at_once=given["at_once"] or 0,
        args=given["sbatch_args"] or "",
    )


def ordinary_command() -> list[str]:
    """The words of this command line without the program, the options of Slurm and --dry-run."""
    flags = {f"--{name.replace('_', '-')}" for name in OPTIONS}
    words, rest = [], iter(sys.argv[1:])
    for word in rest:
        if word in flags:
            next(rest, None)
        elif word != "--dry-run" and word.partition("=")[0] not in flags:
            words.append(word)
    if mask(words) != words:
        raise UserError("The command holds what looks like a password or a token, and the script would keep it.")
    return words


def studies(
    name: Annotated[str | None, typer.Argument(help="One study, or one run on Slurm; all when left out.")] = None,
    results: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every 10 seconds, until all is over or Ctrl-C.")
    ] = False,
) -> None:
    """Show every cell of the studies: waiting, running, requeued, failed with its last error, finished with its score.

    What is known comes from the records of the runs; squeue says what still waits. Slurm's accounting is not needed.
    """
    from hcnet_cli.study.status import statuses

    while True:
        found, notes = statuses(results, name or "")
        if watch and out.is_terminal:
            out.clear()
        for one in found:
            out.print(str(one))
            if name or len(found) == 1:
                out.print(one.grid())
        for note in notes:
            warn(note)
        if not found and not notes:
            raise UserError(f"There are no studies in {results}.", hint="`hcnet ablate` makes one.")
        if not watch or all(one.is_over for one in found):
            return
        time.sleep(WATCH_SECONDS)
