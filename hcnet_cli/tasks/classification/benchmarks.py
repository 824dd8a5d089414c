"""ImageNet's further test sets, in the layouts that their authors publish, for a model of ImageNet-1K's 1,000 classes.

imagenet-v2       FOLDER/<number>/*         0 to 999, the place of the class among the sorted ids (Recht et al. 2019)
imagenet-real     FOLDER/**/ILSVRC2012_val_<number>.*    labels of Beyer et al. 2020, as timm ships them
imagenet-a        FOLDER/<id>/*             200 of the classes (Hendrycks et al. 2021)
imagenet-r        FOLDER/<id>/*             200 of the classes (Hendrycks et al. 2021)
imagenet-sketch   FOLDER/<id>/*             (Wang et al. 2019)
imagenet-c        FOLDER/<corruption>/<severity>/<id>/*  (Hendrycks and Dietterich 2019)
"""

from __future__ import annotations

import os
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import RealLabelsImagenet
from torch.utils.data import Dataset

from hcnet_cli.console import UserError
from hcnet_cli.data.folders import LeftOut, Packed, reading_folder, subfolders, walk
from hcnet_cli.data.identity import Trust, identify
from hcnet_cli.data.images import read_image
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.files import is_image
from hcnet_cli.schema import MAX_PIXELS
from hcnet_cli.tasks.classification.imagenet import synsets
from hcnet_cli.tasks.classification.spec import CORRUPTIONS_OF_C, IN_FOLDERS, ImageFolder

TITLES = {"imagenet-v2": "ImageNet-V2", "imagenet-real": "ReaL labels", "imagenet-a": "ImageNet-A"}
TITLES |= {"imagenet-r": "ImageNet-R", "imagenet-sketch": "ImageNet-Sketch", "imagenet-c": "ImageNet-C"}
WHOLE = {"imagenet-v2": 10_000, "imagenet-a": 7_500, "imagenet-r": 30_000, "imagenet-sketch": 50_889}  # images
SEVERITIES = ("1", "2", "3", "4", "5")
OF_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\b")


@dataclass(frozen=True, eq=False)
class Benchmark:
    """The images of a test set. Labels are numbers among the 1,000 classes.

    `labels`: one of each image; ReaL has several, in `several`. `only`: the classes that are scored, sorted; None: all.
    `groups`: (corruption, severity) by number, `group` [N] the number of each image; without groups both are empty.
    """

    name: str
    root: Path
    names: Packed  # [N], relative to `root`
    labels: NDArray[np.int64]  # [N]
    digest: str
    bits: int | None
    several: Sequence[Sequence[int]] = ()  # [N]
    only: tuple[int, ...] | None = None
    groups: Sequence[tuple[str, str]] = ()
    group: NDArray[np.int64] | None = None
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def sample_name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    @property
    def protocol(self) -> str:
        """What is scored, and how, for the record."""
        whole = WHOLE.get(self.name, len(self))
        images = f"{len(self):,} images" if len(self) == whole else f"{len(self):,} of {whole:,} images"
        parts = [TITLES[self.name], f"{images} ({self.digest})"]
        if self.only is not None:
            parts.append(f"over its {len(self.only)} classes")
        if self.several:
            parts.append(f"any label of an image is right, {self.unlabelled:,} without one left out")
        if self.group is not None:
            corruptions = dict.fromkeys(corruption for corruption, _ in self.groups)
            severities = dict.fromkeys(severity for _, severity in self.groups)
            parts.append(
                f"mean over {len(corruptions)} corruptions and severities {', '.join(severities)}, not normalised"
            )
            sizes = set(np.bincount(self.group).tolist())
            if len(sizes) > 1:
                parts.append(f"{min(sizes):,} to {max(sizes):,} images of each severity")
        return ", ".join(parts)


def part_of(name: str) -> tuple[int, ...]:
    """The numbers of the 200 classes of imagenet-a and imagenet-r, as timm lists them."""
    text = pkgutil.get_data("timm.data", f"_info/{name.replace('-', '_')}_synsets.txt")
    assert text is not None
    numbers = {synset: number for number, synset in enumerate(synsets())}
    return tuple(sorted(numbers[synset] for synset in text.decode().split()))


def require(name: str, classes: Sequence[str], root: Path, config: ImageFolder) -> Benchmark:
    """As `read`; UserError for a model of other classes than ImageNet-1K's."""
    if list(classes) != synsets():
        raise UserError(
            f"{name} needs a model of the 1,000 classes of ImageNet-1K; this one has {len(classes):,} "
            f"({', '.join(classes[:3])}, ...)."
        )
    return read(name, root, config.trust, config.bits, config.max_pixels)


def read(
    name: str, root: Path, trust: Trust = "content", bits: int | None = None, max_pixels: int = MAX_PIXELS
) -> Benchmark:
    """Lists the images of a test set; every file is read once for the digest, unless `trust` says otherwise.

    UserError for a folder that is not laid out as the set is, and for one without images.
    """
    with reading_folder(root):
        made = _real(root) if name == "imagenet-real" else _grouped(root) if name == "imagenet-c" else _flat(name, root)
    if not made["labels"]:
        raise UserError(f"{root} holds no images of {name}.", hint=f"{name}: {IN_FOLDERS[name]}")
    facts = {"benchmark": name, "labels": made["labels"], "several": made.get("several", [])}
    identity = identify(root, made["names"], facts, trust=trust, bits=bits, max_pixels=max_pixels)
    arrays: dict[str, Any] = {k: np.array(made[k], dtype=np.int64) for k in ("labels", "group") if k in made}
    rest = {**made, **arrays, "names": Packed(made["names"])}
    return Benchmark(name=name, root=root, digest=identity.digest, bits=identity.bits, **rest)


def _by_class(name: str, root: Path, below: str, numbers: dict[str, int]) -> tuple[list[bytes], list[int]]:
    """The images of the class folders in root/below, relative to root, and their class numbers."""
    names: list[bytes] = []
    labels: list[int] = []
    left_out: LeftOut = {}
    for folder in subfolders(root / below):
        if folder not in numbers:
            raise UserError(f"{root / below / folder} is no class of {name}.", hint=f"{name}: {IN_FOLDERS[name]}")
        prefix = os.fsencode(os.path.join(below, folder, ""))
        found = walk(os.fsencode(root / below / folder), is_image, "files that are not images", left_out)
        names += [prefix + one for one in found]
        labels += [numbers[folder]] * len(found)
    return names, labels


def _flat(name: str, root: Path) -> dict[str, Any]:
    if name == "imagenet-v2":  # "10" is class 10, whatever sorting names as text gives
        names, labels = _by_class(name, root, "", {str(number): number for number in range(1000)})
        return {"names": names, "labels": labels}
    only = part_of(name) if name in ("imagenet-a", "imagenet-r") else None
    ids = synsets()
    names, labels = _by_class(name, root, "", {ids[i]: i for i in (range(len(ids)) if only is None else only)})
    return {"names": names, "labels": labels, "only": only}


def _real(root: Path) -> dict[str, Any]:
    left_out: LeftOut = {}
    names: list[bytes] = []
    several: list[list[int]] = []
    unlabelled = 0
    real = RealLabelsImagenet(range(50_000)).real_labels
    for one in walk(os.fsencode(root), is_image, "files that are not images", left_out):
        if match := OF_VALIDATION.search(os.fsdecode(os.path.basename(one))):
            labels = real.get(f"ILSVRC2012_val_{match[1]}.JPEG")
            if labels is None:
                raise UserError(f"{root / os.fsdecode(one)} is no validation image of ImageNet: there are 50,000.")
            if labels:
                names.append(one)
                several.append([int(label) for label in labels])
            unlabelled += not labels
    return {"names": names, "labels": [labels[0] for labels in several], "several": several, "unlabelled": unlabelled}


def _grouped(root: Path) -> dict[str, Any]:
    """The images of the 15 corruptions that count, by corruption and severity; the four further ones are left out.

    UserError where a corruption lacks a severity that another one has.
    """
    numbers = {synset: number for number, synset in enumerate(synsets())}
    found: dict[str, Any] = {"names": [], "labels": [], "groups": [], "group": []}
    for corruption in CORRUPTIONS_OF_C:
        severities = subfolders(root / corruption) if (root / corruption).is_dir() else []
        for severity in severities:
            if severity not in SEVERITIES:
                raise UserError(f"{root / corruption / severity} is no severity: they are 1 to 5.")
            names, labels = _by_class("imagenet-c", root, os.path.join(corruption, severity), numbers)
            if labels:
                found["group"] += [len(found["groups"])] * len(labels)
                found["groups"].append((corruption, severity))
                found["names"] += names
                found["labels"] += labels
    _require_even(root, found["groups"])
    return found


def _require_even(root: Path, groups: Sequence[tuple[str, str]]) -> None:
    of: dict[str, set[str]] = {}
    for corruption, severity in groups:
        of.setdefault(corruption, set()).add(severity)
    everywhere = {severity for _, severity in groups}
    if missing := [f"{name}/{severity}" for name, own in of.items() for severity in sorted(everywhere - own)]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{root} lacks {', '.join(missing[:3])}{more}: a mean over uneven severities says little.",
            hint="Unpack them, or leave out the corruption or the severity as a whole.",
        )


class BenchmarkImages(Dataset[dict[str, Any]]):
    """Items as image_folder.ImageFolder has them in evaluation. `target` counts among `Benchmark.only`."""

    def __init__(
        self, images: Benchmark, transform: Callable[[Image.Image], dict[str, Any]], max_pixels: int = MAX_PIXELS
    ) -> None:
        self.images, self.transform, self.max_pixels = images, transform, max_pixels
        only = images.only
        self.targets = images.labels if only is None else np.searchsorted(only, images.labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, key, _ = request
        path = os.path.join(self.images.root, self.images.sample_name(index))
        image = read_image(path, bits=self.images.bits, max_pixels=self.max_pixels)
        return {**self.transform(image), "sample": index, "key": key, "target": int(self.targets[index])}
