"""What can be said of data and weights before PyTorch is loaded: whether they are there, and what they look like."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

from hcnet_cli import model_names
from hcnet_cli.console import UserError, launch
from hcnet_cli.files import is_image, parquet_files
from hcnet_cli.header import check_content
from hcnet_cli.own_model import is_own
from hcnet_cli.pretrained import TIMM, find_init, weights_file
from hcnet_cli.recipe import Recipe
from hcnet_cli.tasks import FIRST_TASK, TASKS

MOVED = "If it was moved or renamed, name it with --data."
PARQUET = "Parquet files"
EMBEDDED = frozenset(spec.embedded for spec in TASKS.values())


def check_inputs(recipe: Recipe, results: Path, eval_only: bool = False) -> None:
    """UserError for data, or weights to start from, that are not there or are plainly of another kind."""
    check_data(recipe, eval_only=eval_only)
    check_model(recipe)
    if recipe.init == TIMM:
        if not recipe.model.name or is_own(recipe.model.name):
            raise UserError(
                f"There are no weights in timm of {recipe.model.name or 'HcNet'}.",
                hint="--pretrained goes with --model NAME, a name of timm; --init names weights of HcNet.",
            )
    elif recipe.init not in ("auto", "none"):
        check_content(weights_file(recipe.init))
    elif recipe.init == "auto" and not recipe.model.name and recipe.data.path not in EMBEDDED:
        # another model is built first: whether it can carry the head at all comes before "pretrain it first"
        find_init(recipe, results)


def check_batch(recipe: Recipe) -> None:
    """UserError for a micro-batch that cannot be mixed in pairs."""
    section, train = recipe.data, recipe.train
    mixed = getattr(section, "mixup_prob", 0) and (getattr(section, "mixup", 0) or getattr(section, "cutmix", 0))
    micro = train.batch_size // (train.accumulate * launch().world_size)
    if mixed and micro % 2:
        raise UserError(
            f"Mixup and CutMix mix images in pairs, and a micro-batch of {micro} is odd.",
            hint="Choose a --batch-size whose share for each process and micro-batch is even, or mix nothing: "
            "--set data.mixup_prob=0",
        )


def check_model(recipe: Recipe) -> None:
    """UserError for a model that timm does not have."""
    if recipe.model.name and model_names.is_unknown(recipe.model.name):
        raise model_names.unknown_model(recipe.model.name)


def check_data(recipe: Recipe, hint: str = "", eval_only: bool = False) -> None:
    """UserError unless the data folder has the layout of the recipe's format, as far as its folders show.

    hint: what to do about a folder that is not there; what it should hold, where none is given. eval_only: the
    validation part is enough.
    """
    path, form = recipe.data.path or "", recipe.spec.formats[recipe.data.format]
    if path in EMBEDDED:
        return
    root = Path(os.path.expanduser(path))
    check_folder(str(root), hint or f"Its layout is to be {form.layout}.")
    if eval_only and form.validation_only(root):
        return
    if form.recognise(root):
        form.require(root)
        return
    packed = _packed(root)
    if recipe.task == FIRST_TASK and packed == PARQUET:
        raise UserError(
            f"{root} holds Parquet files, which are read as tars alone.",
            hint=f"Write the tars once with hcnet shards {shlex.quote(str(root))} OUT, then train with --data OUT.",
        )
    if recipe.task != FIRST_TASK and packed:
        raise UserError(
            f"{root} holds {packed}, and {recipe.task} reads files in folders alone.",
            hint=f"Its layout is to be {form.layout}.",
        )
    others = [name for name, spec in TASKS.items() if any(other.recognise(root) for other in spec.formats.values())]
    found = sorted(entry.name for entry in root.iterdir())
    inside = f"It has {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}." if found else "It is empty."
    raise UserError(
        f"The data folder {root} is not laid out as {recipe.task} reads it: {form.layout}.",
        hint=f"It looks like data for another command: hcnet {others[0]} --data {shlex.quote(str(root))}"
        if others
        else "It has the validation part alone, which is enough to score weights: --eval-only --init RUN"
        if form.validation_only(root)
        else _like(root) or inside,
    )


def _packed(root: Path) -> str:
    """What a folder holds images in, if these are no files of their own; "" otherwise."""
    if parquet_files(root):
        return PARQUET
    return "tars" if any(root.glob("*.tar*")) or any(root.glob("*/*.tar*")) else ""


def _like(root: Path) -> str:
    """What a folder looks like that people have before they split or convert it, and what to do; "" if unknown."""
    files = [Path(entry.name) for entry in os.scandir(root) if entry.is_file()]
    images = {file.stem for file in files if is_image(os.fsencode(file))}
    if any(file.suffix == ".json" and file.stem in images for file in files):
        return "It has a JSON file for each image, as LabelMe writes them: make one COCO file of each split from them."
    folders = [entry.path for entry in os.scandir(root) if entry.is_dir()]
    if len(folders) > 1 and all(
        any(is_image(os.fsencode(one.name)) for one in os.scandir(folder)) for folder in folders
    ):
        return (
            f"It looks like one folder of images for each of {len(folders)} classes. Move the folders into "
            f"{root / 'train'}; then either move some images of each class into {root / 'val'}/<class>/, or "
            "cross-validate with --set data.folds=5."
        )
    return ""


def task_of(data: str) -> str:
    """The command whose data a folder looks like, or whose embedded set has this name.

    A folder that no fine-tuning task recognises is taken as the data of the task that starts from no other.
    """
    for spec in TASKS.values():
        if data == spec.embedded:
            return spec.name
    for spec in TASKS.values():
        if spec.name != FIRST_TASK and any(form.recognise(Path(data)) for form in spec.formats.values()):
            return spec.name
    return FIRST_TASK


def check_folder(path: str, hint: str = "") -> None:
    """UserError unless this is a folder, or an embedded set's name."""
    if path not in EMBEDDED and not Path(path).is_dir():
        what = "is a file, not a folder" if Path(path).exists() else "does not exist"
        raise UserError(f"The data folder {path} {what}.", hint=hint)


def layouts() -> str:
    """What a data folder may hold, for a hint."""
    known = [f"{spec.name}: {form.layout}" for spec in TASKS.values() for form in spec.formats.values()]
    return "A data folder holds, for " + "; for ".join(known) + "."


# --- the device -------------------------------------------------------------------------------------------------------

DEVICES = "Known: auto, cpu, cuda, cuda:N, mps."
NO_CUDA, NO_CUDA_HINT = "PyTorch sees no CUDA device here.", "Use --device cpu, or install a CUDA build."


def check_device(name: str) -> None:
    """UserError for a device that PyTorch cannot have, as far as its build and the system's driver show."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f'There is no device "{name}".', hint=DEVICES)
    if name.startswith("cuda") and has_no_cuda():
        raise UserError(NO_CUDA, hint=NO_CUDA_HINT)


@functools.cache
def has_no_cuda() -> bool:
    """Whether PyTorch surely has no CUDA device: it is built without, or the driver's library cannot be loaded."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        version = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    built = {key: not re.search(rf"^{key}\b.*= None$", version, re.MULTILINE) for key in ("cuda", "hip")}
    if built["hip"]:
        return False
    if built["cuda"] and sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return True
    return not built["cuda"]
