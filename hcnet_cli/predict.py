"""`hcnet predict`: what a trained run says of photos, as files that other programs read, and as pictures."""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hcnet_cli import __version__, build, engine, pictures
from hcnet_cli.console import RunFailed, UserError, notice, status_line, warn
from hcnet_cli.data.folders import LeftOut, counted, reading_folder, walk
from hcnet_cli.data.identity import THREADS, file_peak
from hcnet_cli.data.images import UnusableImageError, bits_of, read_image
from hcnet_cli.data.loader import start_worker, watching_workers
from hcnet_cli.device import pick_device
from hcnet_cli.engine import Predictor
from hcnet_cli.files import is_image, replacing, write_text, writing
from hcnet_cli.header import read_metadata
from hcnet_cli.recipe import Recipe
from hcnet_cli.report import gallery
from hcnet_cli.runs import RunFolder, RunInfo

MAX_PICTURES = 100  # that are drawn; the file of predictions has every image
TOLD_EVERY = 2.0  # seconds


class Photo(NamedTuple):
    """An image file, and what the output calls it: see `find_photos`."""

    path: Path
    name: str


def find_photos(named: Sequence[Path]) -> list[Photo]:
    """The files as given, and all images in the folders and below, in sorted order, none twice.

    Of links and the file they lead to the file is taken. An image is called by its path in the folder that was named,
    or its own name; where that would name two images, all are called by their paths as given. UserError where there is
    no image at all.
    """
    found: list[Photo] = []
    places: list[tuple[str, bool]] = []  # the real path of each, and whether a link leads there
    left_out: LeftOut = {}
    for path in named:
        if path.is_dir():
            with reading_folder(path):
                inside = walk(os.fsencode(path), is_image, "files that are not images", left_out)
            photos = [Photo(path / os.fsdecode(name), os.fsdecode(name)) for name in inside]
        else:
            photos = [Photo(path, path.name)]
        root = os.path.realpath(path if path.is_dir() else path.parent)
        for photo in photos:
            real = os.path.realpath(photo.path)
            found.append(photo)
            places.append((real, real != os.path.join(root, photo.name)))
    chosen: dict[str, int] = {}
    for i in sorted(range(len(found)), key=lambda i: places[i][1]):  # links last
        chosen.setdefault(places[i][0], i)
    photos = [found[i] for i in sorted(chosen.values())]
    left_out["repetitions of the same file"] = [str(found[i].path) for i in set(range(len(found))) - {*chosen.values()}]
    for reason, count in counted(left_out).items():
        notice(f"Left out: {reason}: {count:,}.")
    if not photos:
        raise UserError(f"There is no image in {', '.join(map(str, named))}.")
    if len({photo.name for photo in photos}) < len(photos):
        return [Photo(photo.path, str(photo.path)) for photo in photos]
    return photos


def measure_bits(photos: Sequence[Photo], max_pixels: int) -> int | None:
    """The bits that photos of more than 8 bits use, as training measures them over its images; None: there are none."""
    peak, told = 0, time.monotonic()
    with status_line() as tell, ThreadPoolExecutor(THREADS) as pool:
        peaks = pool.map(functools.partial(file_peak, max_pixels=max_pixels), [photo.path for photo in photos])
        for number, found in enumerate(peaks, 1):
            peak = max(peak, found)
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                tell(f"Looking for images of more than 8 bits: {number:,} of {len(photos):,} images")
    bits = bits_of(peak)
    if bits:
        notice(
            f"Images of more than 8 bits are read as {bits}-bit, measured over these photos: the run was trained on "
            "none. --set data.bits=N in training sets the number."
        )
    return bits


@dataclass
class Outcome:
    """How many images were predicted; those that could not be read, each with its reason; the number of the signal
    that stopped it before the last image, or 0.
    """

    done: int = 0
    unreadable: list[str] = field(default_factory=list)
    stopped: int = 0


class _Photos(Dataset[Any]):
    """(image, item, "") of each photo, or (None, None, why it cannot be used). An image only where it is drawn."""

    def __init__(
        self, photos: Sequence[Photo], prepare: Callable[[Image.Image], Any], read: Callable[..., Any]
    ) -> None:
        self.photos, self.prepare, self.read = photos, prepare, read

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, i: int) -> tuple[Image.Image | None, tuple[int, int], Any, str]:
        try:
            image = self.read(self.photos[i].path)
        except UnusableImageError as error:
            return None, (0, 0), None, error.reason
        return image if i < MAX_PICTURES else None, (image.height, image.width), self.prepare(image), ""


def predict(
    folder: RunFolder, info: RunInfo, recipe: Recipe, photos: Sequence[Photo], output: Path, device: str
) -> Outcome:
    """Predicts with the run's best weights, and writes to `output`: a folder that exists, or a page (.html).

    A signal such as Ctrl-C ends it after the image at hand, a second Ctrl-C at once: what is predicted by then is
    written. UserError for weights that do not fit the recipe, RunFailed where a data worker died.
    """
    where = pick_device(device)
    about = read_metadata(folder.best)
    predictor = build.build_predictor(recipe, [str(name) for name in about["classes"]])
    build.load_own(predictor.task, folder.path)
    predictor.task.to(where).eval()
    page = output.suffix == ".html"
    origin = {"run": folder.path.resolve().name, "weights": info.weights, "hcnet": __version__}
    bits = info.data.bits or recipe.data.bits or measure_bits(photos, recipe.data.max_pixels)
    read = functools.partial(read_image, bits=bits, max_pixels=recipe.data.max_pixels)
    loader = DataLoader(
        _Photos(photos, predictor.prepare, read),
        batch_size=predictor.batch_size,
        num_workers=min(build.workers(recipe), math.ceil(len(photos) / predictor.batch_size)),
        collate_fn=list,
        worker_init_fn=start_worker,
    )
    names = pictures.file_names([photo.name for photo in photos])
    outcome, drawn, died = Outcome(), [], None
    begun = time.monotonic()
    with engine.Stopper() as stopper:
        try:
            with watching_workers(), suppress(KeyboardInterrupt), status_line() as tell, torch.inference_mode():
                for number, image, size, prediction in _predictions(predictor, loader, photos, where, outcome, tell):
                    photo, file = photos[number], None
                    if image is not None:
                        picture = predictor.draw(image, prediction, photo.name)
                        if page:
                            drawn.append((photo.name, _jpeg(picture)))
                        else:
                            file = _save(picture, output, names[number])
                    if not page:
                        predictor.keep(output, names[number], photo.name, size, prediction, file)
                    outcome.done += 1
                    if stopper.received:
                        break
        except RunFailed as error:  # a data worker died
            died = error
        seconds = time.monotonic() - begun
        notice(f"Predicted {_images(outcome.done)} in {seconds:.1f} s, {outcome.done / seconds:.1f} a second.")
        if left := len(photos) - outcome.done - len(outcome.unreadable):
            outcome.stopped = stopper.received or signal.SIGINT
            warn(f"Stopped: {left:,} of {_images(len(photos))} {'was' if left == 1 else 'were'} not looked at.")
        if outcome.done:
            _write(predictor, output, origin, drawn, outcome.done)
    if died is not None:
        raise died
    if not outcome.done and not outcome.stopped:
        which = "The only image cannot" if len(photos) == 1 else f"None of the {len(photos)} images can"
        raise UserError(f"{which} be read{'' if len(photos) == 1 else ', the first'}: {outcome.unreadable[0]}.")
    return outcome


def _save(picture: Image.Image, output: Path, name: str) -> str:
    """Writes a picture; returns its file relative to `output`."""
    file = f"pictures/{name}"
    with writing(output / file):
        (output / "pictures").mkdir(exist_ok=True)
        with replacing(output / file) as temporary:
            picture.save(temporary, "PNG")
    return file


def _write(predictor: Predictor, output: Path, origin: dict[str, Any], drawn: list[tuple[str, str]], done: int) -> None:
    """Writes the page of what is drawn, or the file of all predictions."""
    if output.suffix == ".html":
        left = done - len(drawn)
        note = f"{left:,} more image{' is' if left == 1 else 's are'} not shown." if left else ""
        write_text(output, gallery.html(origin["run"], drawn, note))
        notice(f"Wrote {output}.")
    else:
        files = ", ".join(map(str, predictor.finish(output, origin)))
        more = f" and pictures of the first {MAX_PICTURES}" if done > MAX_PICTURES else " and pictures"
        notice(f"Wrote {files}{more} ({output / 'pictures'}).")


def _predictions(
    predictor: Predictor,
    loader: DataLoader[Any],
    photos: Sequence[Photo],
    where: torch.device,
    outcome: Outcome,
    tell: Callable[[str], None],
) -> Iterator[tuple[int, Image.Image | None, tuple[int, int], Any]]:
    """(number, image if it is drawn, size, prediction) of each photo that can be read, in order."""
    begun = told = time.monotonic()
    seen = 0
    to_device = functools.partial(engine.to_device, device=where)
    for batch in loader:
        numbers = range(seen, seen + len(batch))
        seen += len(batch)
        good = [(n, *rest) for n, (*rest, reason) in zip(numbers, batch, strict=True) if not reason]
        outcome.unreadable += [
            f"{photos[n].path} ({reason})" for n, (*_, reason) in zip(numbers, batch, strict=True) if reason
        ]
        found = predictor.predict([item for *_, item in good], to_device) if good else []
        for (n, image, size, _), prediction in zip(good, found, strict=True):
            yield n, image, size, prediction
        now = time.monotonic()
        if now - told > TOLD_EVERY and seen < len(photos):
            told = now
            tell(f"{seen:,} of {len(photos):,} images, {seen / (now - begun):.1f} a second")


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _jpeg(picture: Image.Image) -> str:
    """The picture as a data URI."""
    small = io.BytesIO()
    picture.save(small, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"
