"""`hcnet bench data`: the training input pipeline alone, beside timm's on the same folder with the same augmentation.

What is measured and how: docs/speed.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor

from hcnet_cli import build, rng
from hcnet_cli import recipe as rcp
from hcnet_cli.bench import tables
from hcnet_cli.bench.turns import Stopped, cores_of_others, other_load_notes, ratio, stoppable, take_turns
from hcnet_cli.console import UserError, about, notice, status_line
from hcnet_cli.data import archive, embedded, loader
from hcnet_cli.data.images import read_image
from hcnet_cli.recipe import Recipe
from hcnet_cli.report.escape import to_json
from hcnet_cli.table import Column, Row, Table
from hcnet_cli.tasks.classification import augment, shards
from hcnet_cli.tasks.classification.spec import SPEC, ImageFolder

SAMPLE = 64  # images of a turn for the parts before the loader
TURN = 128  # images that each process delivers in a loader's turn, about
TIMMS_NAMES = {  # of the recipe's settings, each an argument of timm's loader by the same name
    *("re_prob", "re_mode", "re_count", "scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment"),
    *("interpolation", "mean", "std"),
}
ENDLESS = 10**9  # optimizer steps
BICUBIC = Image.Resampling.BICUBIC
SHARDS = ".shards"  # in the folder that is made, which does not count it as data
PICTURES = 128  # in the folder that is made where none is named


@dataclass(eq=False)
class Pipeline:
    """One way to the same batches. Figures are images/s, one of each kind for a round."""

    name: str
    decode: Callable[[int], Any]
    augment: Callable[[int], Any]  # decode and augment
    batches: Callable[[int], Iterator[Tensor]]  # from a start that the number of the round chooses
    size: int  # images there are
    figures: dict[str, list[float]] = field(default_factory=lambda: {"decode": [], "augment": [], "loader": []})


@dataclass
class Measurement:
    pipelines: list[Pipeline]
    data: str
    batch_size: int
    img_size: int
    workers: int
    rounds: int
    others: float | None = None
    stopped: int = 0  # the number of the signal that ended it


def read_recipe(name: str, data: str, img_size: int | None) -> Recipe:
    """The recipe whose augmentation is timed, for the folder `data`."""
    changes: list[tuple[str, Any, str]] = [("data.path", data, "--data")]
    changes += [("data.img_size", img_size, "--img-size")] if img_size is not None else []
    recipe = rcp.resolve(rcp.recipe_file(name, SPEC.name), changes).recipe
    if (Path(data) / archive.INFO).is_file():
        raise UserError(f"{data} holds shards.", hint="Without --data, shards are timed beside the folder they are of.")
    if not isinstance(recipe.data, ImageFolder):
        raise UserError(f"The recipe {name} is for {recipe.task}.", hint="Only pretraining reads image folders.")
    return recipe


@contextlib.contextmanager
def folder(data: str | None) -> Iterator[tuple[str, str]]:
    """The folder to read and what to call it: the one named, or one of synthetic photographs for the time being."""
    if data is not None:
        yield str(embedded.data_folder(data)), data
        return
    with tempfile.TemporaryDirectory(prefix="hcnet-bench-") as temporary:
        notice(f"No --data: making {PICTURES} synthetic JPEGs of 500 x 375 in a temporary folder.")
        size = make_pictures(Path(temporary), PICTURES)
        shards.write(Path(temporary), Path(temporary) / SHARDS, 10**9)
        yield temporary, f"{PICTURES} synthetic JPEGs of 500 x 375 ({size / PICTURES / 1000:.0f} kB each)"


def make_pictures(root: Path, count: int) -> int:
    """An image folder of photo-like noise (detail at every scale, little colour), quality 90; bytes of all of it.

    Decoding costs what it costs for a photograph: the files are as large as ImageNet's, about 110 kB.
    """
    random = np.random.RandomState(0)
    width, height = 1500, 1125
    canvas = np.full((height, width, 3), 128, dtype=np.float32)
    for scale, light, colour in ((128, 45, 20), (32, 25, 8), (8, 14, 3), (2, 18, 3), (1, 28, 5)):
        for channels, strength in ((1, light), (3, colour)):
            noise = random.randn(height // scale + 1, width // scale + 1, channels).astype(np.float32)
            planes = (Image.fromarray(noise[..., c]).resize((width, height), BICUBIC) for c in range(channels))
            canvas += strength * np.stack([np.asarray(plane) for plane in planes], axis=-1)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    total = 0
    for number in range(count + 2):
        split = "val" if number >= count else "train"
        file = root / split / f"class{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        x, y = random.randint(width - 500), random.randint(height - 375)
        Image.fromarray(pixels[y : y + 375, x : x + 500]).save(file, quality=90)
        total += file.stat().st_size if split == "train" else 0
    return total


# --- the pipelines ----------------------------------------------------------------------------------------------------


def ours(recipe: Recipe, batch_size: int, workers: int, name: str = "hcnet") -> Pipeline:
    """The pipeline of `hcnet pretrain`, up to normalised batches on this processor."""
    assert isinstance(recipe.data, ImageFolder)
    data = build.open_data(recipe)
    images, normalise = data.train, augment.Normalise(recipe.data.mean, recipe.data.std)
    batches = loader.TrainLoader(
        images, batch_size=batch_size, accumulate=1, total_steps=ENDLESS, seed=0, workers=workers, collate=data.collate
    )

    def start(number: int) -> Iterator[Tensor]:
        for batch in batches.iterate(number * batches.steps_per_epoch):
            yield normalise(batch)

    return Pipeline(
        name,
        lambda index: read_image(images.sample_path(index)),
        lambda index: images[loader.SampleRequest(index, rng.derive("bench", index), 0)],
        start,
        len(images),
    )


def timms_shards(recipe: Recipe, root: str, batch_size: int, workers: int) -> Pipeline:
    """Timm's reader of WebDataset tars, which goes through them from their beginning, behind its default loader."""
    options: Any = {"root": root, "split": "train", "is_training": True, "batch_size": batch_size}
    plain, single, images = (create_dataset("wds/", **options) for _ in range(3))
    timm_loader(single, recipe, batch_size, 0, prefetcher=True)  # gives it the transform
    batches = timm_loader(images, recipe, batch_size, workers, prefetcher=True)
    decoded, augmented = (itertools.chain.from_iterable(itertools.repeat(one)) for one in (plain, single))

    def start(_: int) -> Iterator[Tensor]:
        for pixels, _ in itertools.chain.from_iterable(itertools.repeat(batches)):
            yield pixels

    return Pipeline("timm, shards", lambda _: next(decoded), lambda _: next(augmented), start, len(images))


def timms(recipe: Recipe, root: str, batch_size: int, workers: int, prefetcher: bool) -> Pipeline:
    """Timm's `create_loader`: by default it collates bytes, and normalises and erases whole batches on the device."""
    plain, images = (create_dataset("", root=root, split="train", is_training=True) for _ in range(2))
    batches = timm_loader(images, recipe, batch_size, workers, prefetcher)

    def start(_: int) -> Iterator[Tensor]:
        for pixels, _ in itertools.chain.from_iterable(itertools.repeat(batches)):
            yield pixels

    name = "timm" if prefetcher else "timm without prefetcher"
    return Pipeline(name, lambda index: plain[index], lambda index: images[index], start, len(images))


def timm_loader(images: Any, recipe: Recipe, batch_size: int, workers: int, prefetcher: bool) -> Any:
    """Gives a data set of timm the recipe's transform and returns the loader."""
    config = recipe.data
    assert isinstance(config, ImageFolder)
    batches = create_loader(
        images,
        input_size=(3, config.img_size, config.img_size),
        batch_size=batch_size,
        is_training=True,
        num_workers=workers,
        use_prefetcher=prefetcher,
        persistent_workers=False,  # idle ones would go on reading during the turns of others
        device=torch.device("cpu"),
        **config.model_dump(include=TIMMS_NAMES),
    )
    augment.allow_zero_bits(images.transform)
    return batches


# --- taking turns -----------------------------------------------------------------------------------------------------


def measure(recipe: Recipe, root: str, data: str, *, batch_size: int, workers: int, rounds: int) -> Measurement:
    """Times the pipelines, alternating; one thread in every process."""
    assert isinstance(recipe.data, ImageFolder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipelines = [ours(recipe, batch_size, workers)]
        pipelines += [timms(recipe, root, batch_size, workers, prefetcher) for prefetcher in (True, False)]
        if (tars := Path(root) / SHARDS).is_dir():
            moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(tars)})})
            pipelines.append(ours(moved, batch_size, workers, "hcnet, shards"))
            if importlib.util.find_spec("webdataset"):
                pipelines.append(timms_shards(recipe, str(tars), batch_size, workers))
        made = Measurement(pipelines, data, batch_size, recipe.data.img_size, workers, rounds)
        for pipeline in pipelines:  # the files come from the disk once, before the clock runs
            for index in _sample(pipeline):
                pipeline.augment(index)
        numbers = itertools.count()
        jobs = {pipeline: _turn(pipeline, made, numbers) for pipeline in pipelines}
        used: list[tuple[float, float]] = []
        finished, begun = pipelines[0].figures["loader"], time.monotonic()

        def tell_round(text: str) -> None:
            left = (time.monotonic() - begun) / max(1, len(finished)) * (rounds - len(finished))
            tell(f"{text} · about {about(left)} left" if finished else text)

        try:
            with status_line() as tell, stoppable():
                for found in take_turns(jobs, rounds, tell_round, used):
                    for pipeline, rates in found.items():
                        for kind, rate in rates.items():
                            pipeline.figures[kind].append(rate)
        except Stopped as signal:
            made.rounds, made.stopped = len(finished), signal.number
        if not workers:  # workers are other processes too
            made.others = cores_of_others(used)
        return made
    finally:
        torch.set_num_threads(threads)


def _sample(pipeline: Pipeline) -> range:
    return range(0, pipeline.size, max(1, pipeline.size // SAMPLE))[:SAMPLE]


def _turn(pipeline: Pipeline, made: Measurement, numbers: Iterator[int]) -> Callable[[], dict[str, float]]:
    """Images/s of the parts, one image after another, and of the loader once its first batches are there."""

    def turn() -> dict[str, float]:
        rates, sample = {}, _sample(pipeline)
        for kind, part in (("decode", pipeline.decode), ("augment", pipeline.augment)):
            begun = time.perf_counter()
            for index in sample:
                part(index)
            rates[kind] = len(sample) / (time.perf_counter() - begun)
        processes = max(1, made.workers)
        count = processes * max(1, round(TURN / made.batch_size))
        batches = pipeline.batches(next(numbers))
        for _ in range(processes):
            next(batches)
        begun = time.perf_counter()
        for _ in range(count):
            pixels = next(batches)
        rates["loader"] = made.batch_size * count / (time.perf_counter() - begun)
        assert pixels.dtype is torch.float32, "all deliver normalised images"
        assert pixels.shape == (made.batch_size, 3, made.img_size, made.img_size)
        batches.close()  # type: ignore[attr-defined]  # a generator; ends the workers
        return rates

    return turn


# --- results ----------------------------------------------------------------------------------------------------------


def summary(made: Measurement) -> list[dict[str, Any]]:
    """A row for each pipeline; ratios are to timm's default. None before a round has ended."""
    if not made.rounds:
        return []
    unit = next(p for p in made.pipelines if p.name == "timm")
    return [
        {
            "model": pipeline.name,
            **{kind: statistics.median(rates) for kind, rates in pipeline.figures.items()},
            "spread": f"{min(pipeline.figures['loader']):.0f}–{max(pipeline.figures['loader']):.0f}",
            "per_core": statistics.median(pipeline.figures["loader"]) / max(1, made.workers),
            "ratio": ratio(pipeline.figures["loader"], unit.figures["loader"]),
        }
        for pipeline in made.pipelines
    ]


COLUMNS = (
    Column("model", "pipeline"),
    Column("decode", "decode", "short"),
    Column("augment", "decode, augment", "short"),
    Column("loader", "loader", "short"),
    Column("ratio", "ratio", "percent"),
    Column("spread", "min–max", secondary=True),
    Column("per_core", "a process", "short", secondary=True),
)


def table(made: Measurement) -> Table:
    notes = [
        f"Images/s: medians over the rounds ({made.rounds}) of alternating pipelines, one thread a process; min–max: "
        "of the loader, over the rounds.",
        "ratio: loader, to timm's create_loader as it is by default, in the same round; median over the rounds.",
        "decode, augment: one image after another in this process. loader: whole batches of normalised images, from "
        + (f"{made.workers} worker processes." if made.workers else "this process."),
        "hcnet and timm's default leave normalising and erasing to the device, which here is this processor.",
    ]
    if made.stopped:
        notes.append(f"Stopped after {made.rounds} of the rounds asked for.")
    notes += other_load_notes(made.others)
    title = f"Input pipeline: {made.data}, {made.img_size} x {made.img_size}, batch {made.batch_size}"
    rows = [Row("measured", values) for values in summary(made)]
    return Table("bench", title, COLUMNS, rows, notes, whole="--output FILE.md")


def page(made: Measurement, known: Mapping[str, str]) -> str:
    return tables.markdown("Speed of the input pipeline", known, [table(made)])


def json_text(made: Measurement, known: Mapping[str, str]) -> str:
    """Everything, with the figures of each round."""
    pairs = zip(summary(made), made.pipelines if made.rounds else (), strict=True)
    fields = {name: value for name, value in vars(made).items() if name != "pipelines"}
    fields["stopped"] = bool(made.stopped)
    fields["pipelines"] = [{**values, "rounds": pipeline.figures} for values, pipeline in pairs]
    return to_json({**known, **fields}) + "\n"
