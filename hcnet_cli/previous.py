"""What lies in a run folder before a run starts: a run of the same recipe, of another one, or files of nobody."""

from __future__ import annotations

import shlex

from hcnet_cli import build, checkpoint, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, notice, warn
from hcnet_cli.privacy import home
from hcnet_cli.recipe import Recipe
from hcnet_cli.record import DataInfo
from hcnet_cli.runs import RunFolder, RunInfo
from hcnet_cli.values import place_typed


def previous_record(folder: RunFolder, info: RunInfo, recipe: Recipe) -> RunInfo | None:
    """The record of an earlier run of this very recipe in the folder; UserError if the folder holds another's, or
    files whose run is not known.
    """
    earlier = folder.read()
    if earlier is None:
        _check_ownerless(folder, info)
    elif earlier.altered:
        warn(f"{folder.record} was changed after it was written: its checksum does not match.")
    if earlier is not None and earlier.fingerprint != info.fingerprint:
        theirs = rcp.resolve(folder.recipe_file).recipe if folder.recipe_file.exists() else None
        keys = rcp.changed_keys(rcp.identity(recipe), rcp.identity(theirs)) if theirs else {}
        shown = ", ".join(f"{key} ({b!r} there, {a!r} here)" for key, (a, b) in keys.items())
        raise UserError(
            f"{folder.path} holds a run of another recipe: {shown or 'the data or the initial weights differ'}.",
            hint="Choose another --name, or give --fresh to replace it.",
        )
    return earlier


def notice_others(folder: RunFolder, recipe: Recipe, data: DataInfo, fingerprint: str, asked: Recipe) -> None:
    """Names runs of this very recipe that this one is not: their data, the weights that `init: auto` meant there, or
    the numbers that `train.precision: auto` meant, were others. `asked` is the recipe with what `auto` is in it.
    """
    if folder.record.exists():  # this one has begun
        return
    for path, other in runs.find_runs(folder.path.parent.parent)[0]:
        done = other.status == "finished"
        same_data = other.data.digest == data.digest
        if (
            path == folder.path
            or other.fingerprint == fingerprint  # under a name of its own
            or other.evaluated_only
            or not (done or other.steps_done)
            or (other.task, other.seed, other.variant) != (recipe.task, recipe.train.seed, rcp.variant(recipe))
            or (not same_data and (done or other.data.path != home(data.path)))
        ):
            continue
        try:
            theirs = rcp.resolve(path / "recipe.yaml").recipe
        except UserError:  # of another version
            continue
        if rcp.changed_keys(rcp.identity(recipe), rcp.identity(theirs)).keys() - {"train.precision"}:
            continue
        was = f"{path} is finished" if done else f"{path} was stopped at step {other.steps_done} of {other.steps_total}"
        back = "finds" if done else "goes on with"
        precision = recipe.train.precision
        if other.precision != precision:
            notice(
                f"{was}, in {other.precision}. This is a new run, in {precision}; --precision {other.precision} {back} "
                "the old one."
            )
        elif same_data and theirs.init != recipe.init:
            if asked.init == recipe.init:
                continue  # the other weights were asked for
            notice(
                f"{was}, from {theirs.init}. This is a new run, from {recipe.init}; --init {shlex.quote(theirs.init)} "
                f"{back} the old one."
            )
        else:
            changed = "the weights to start from are" if same_data else f"the data{_counts(other.data, data)} are"
            notice(
                f"{was}. This is a new run, since {changed} other ones now. To go on with the old run, restore what it "
                "began with and give the same command."
            )


def _counts(before: DataInfo, now: DataInfo) -> str:
    """How many images there were and are, where the numbers differ."""
    if (before.num_train, before.num_val) == (now.num_train, now.num_val):
        return ""
    was, is_now = (f"{one.num_train:,} training and {one.num_val:,} validation images" for one in (before, now))
    return f" ({is_now}, {was} then)"


def identity(info: RunInfo) -> dict[str, str]:
    """What checkpoints and weights say of the run that they are of."""
    return {"fingerprint": info.fingerprint, "task": info.task, "data_digest": info.data.digest}


def _check_ownerless(folder: RunFolder, info: RunInfo) -> None:
    """UserError for checkpoints or weights without a run.json, unless the checkpoints say that they are of this run."""
    if not folder.has_progress():
        return
    found = checkpoint.owner(folder.path)
    if found and found[0] == identity(info):
        warn(f"{folder.record} is missing; the checkpoint of step {found[1]} is of this very recipe and data.")
        return
    if not found:
        what = "weights or damaged checkpoints"
    elif theirs := found[0].get("fingerprint"):
        what = f"a checkpoint of step {found[1]} of another run (fingerprint {theirs}, {info.fingerprint} here)"
    else:
        what = f"a checkpoint of step {found[1]} that does not say which run it is of"
    raise UserError(
        f"{folder.path} has no run.json, but {what}.",
        hint="Restore run.json, choose another --name, or give --fresh to remove what is there.",
    )


def check_finished(folder: RunFolder, info: RunInfo) -> None:
    """UserError for a finished run whose files contradict its record, or whose weights are gone or cut short."""
    if info.evaluated_only:
        name = folder.path.name
        raise UserError(
            f"{folder.path} holds a score of weights that were not trained here, under the name of this run.",
            hint=f"Give it another name, then train: hcnet runs mv {name} {name}-evaluated"
            f"{place_typed(folder.path.parent.parent, '--out')}",
        )
    if reason := runs.contradiction(folder, info):
        of_weights = not info.altered and not runs.recipe_contradiction(folder, info)
        lost = f"This run is finished, but its weights are lost: {reason}" if of_weights else reason
        raise UserError(lost, hint="Restore the file, or train the run again with --fresh.")
    try:
        build.read_init(str(folder.path))
    except UserError as error:
        raise UserError(
            f"This run is finished, but its weights are lost: {error}", hint="Train it again with --fresh."
        ) from None
