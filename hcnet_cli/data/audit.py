"""What `hcnet check` knows of a data set: its images, its classes, and what was found. Every format builds its own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcnet_cli.console import UserError
from hcnet_cli.data.folders import LeftOut
from hcnet_cli.data.identity import Identity
from hcnet_cli.data.images import Size
from hcnet_cli.data.member import Source
from hcnet_cli.schema import MAX_PIXELS

FILES_SHOWN = 3  # in the line of a finding


@dataclass(frozen=True)
class Item:
    """An image and what its data set says of it."""

    path: Source
    split: str
    label: str = ""  # its class, where an image has one
    size: Size | None = None  # (height, width), where the annotations give it
    annotation: str = ""  # its label file, where it has one


@dataclass(frozen=True)
class Finding:
    """One kind of thing worth knowing. `wrong`: it spoils training or its scores, and the command exits with 1.

    Each entry of `files` is a file, or a list of files that show the same picture.
    """

    what: str
    files: Sequence[str | list[str]]
    wrong: bool = False

    def __str__(self) -> str:
        shown = "; ".join(map(_brief, self.files[:FILES_SHOWN]))
        more = f"; and {len(self.files) - FILES_SHOWN:,} more" if len(self.files) > FILES_SHOWN else ""
        return f"{'WRONG: ' if self.wrong else ''}{self.what} ({len(self.files):,}): {shown}{more}"


def _brief(file: str | list[str]) -> str:
    """Of equal files the first and the last, which lie in different splits if any do."""
    if isinstance(file, str):
        return file
    return f"{file[0]} = {file[-1]}" + (f" and {len(file) - 2:,} more" if len(file) > 2 else "")


@dataclass
class Audit:
    """A data set under inspection.

    `classes`: how many `unit` each class has in each split. `count_pixels`, for formats with a label file per image,
    reads an item's label and counts its pixels by class, the ignored ones last: [number of classes + 1]. `problems`:
    why training refuses the data.
    """

    data: str
    root: Path
    layout: str
    unit: str
    items: list[Item]
    classes: dict[str, dict[str, float]]
    count_pixels: Callable[[Item], NDArray[np.int64]] | None = None
    bits: int | None = None  # of images of more than 8 bits
    max_pixels: int = MAX_PIXELS
    folds: bool = False  # training images are scored too: data.folds
    problems: list[UserError] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # on the classes
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # pixels by split and class, after `note_pixels`
    sizes: dict[str, list[Size]] = field(default_factory=lambda: defaultdict(list))  # of the images, by split

    @property
    def images(self) -> dict[str, int]:
        """The number of images of each split."""
        return dict(Counter(item.split for item in self.items))

    @property
    def wrong(self) -> bool:
        return bool(self.problems) or any(finding.wrong for finding in self.findings)

    def note(self, what: str, files: Sequence[str | list[str]], wrong: bool = False) -> None:
        """Adds a finding, if any file shows it."""
        if files:
            self.findings.append(Finding(what, files, wrong))

    def note_identity(self, identity: Identity, left_out: LeftOut, notes: Sequence[str]) -> None:
        """Adds what is left out, what changed unseen, and what is to be known of the data."""
        unseen = "files changed though their size, times and inode did not (a run may have taken the old content)"
        self.note(unseen, list(identity.changed), wrong=True)
        for reason, names in left_out.items():
            self.note(f"left out: {reason}", [self.relative(name) for name in sorted(names)])
        if identity.bits:
            self.remarks.append(f"16-bit images are read as {identity.bits}-bit (data.bits).")
        self.remarks.extend(notes)

    def note_pixels(self, counts: Mapping[str, NDArray[np.int64]]) -> None:
        """Adds each class's share of the pixels, from the sums of `count_pixels` over each split."""
        first = next(iter(counts), "")  # the one that is trained on
        for split, pixels in counts.items():
            strange = [
                name
                for name, own, trained in zip(self.classes, pixels[:-1], counts[first][:-1], strict=False)
                if own and not trained
            ]
            self.note(f"classes in {split} labels that no {first} label has, so that they cannot be learned", strange)
            self.counts[split] = dict(zip(self.classes, pixels[:-1].tolist(), strict=False))
            shares = 100 * pixels / pixels.sum()
            for name, share in zip(self.classes, shares.tolist(), strict=False):  # the last is no class
                self.classes[name][split] = share
            self.note(f"classes in no {split} label", [name for name, of in self.classes.items() if not of[split]])
            self.remarks.append(f"{shares[-1]:.2f}% of the {split} pixels are ignored.")

    def relative(self, file: Source) -> str:
        """A path below the data folder, without that folder."""
        return str(file).removeprefix(f"{self.root}/")


def distinct(names: Sequence[str]) -> list[str]:
    """Class names, each once: a name that several classes have gets the number of the class."""
    taken = Counter(names)
    made = []
    for number, name in enumerate(names):
        own = name
        while taken[own] > 1 or (own != name and own in taken):
            own = f"{own} ({number})"
        taken[own] += 1 if own != name else 0
        made.append(own)
    return made
