"""What `hcnet bench` is asked to time, checked before PyTorch is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hcnet_cli import files, model_names
from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.sizes import SIZES

REFERENCE = "reference"  # the literal form; the word "literal" is understood too
PLAIN = ":plain"  # after the name of an HcNet: without hcnet_cli.kernels
MODES = ("infer", "train")
PRECISIONS = ("fp32", "bf16", "fp16")
ENDINGS = (".md", ".json")


class Choices(NamedTuple):
    """What is timed: every combination of these."""

    models: list[str]  # as `model_name` gives them
    modes: list[str]
    precisions: list[str]


def choices(models: str, modes: str, precisions: str) -> Choices:
    """The words of three comma lists. UserError for a name nobody knows."""
    names = list(dict.fromkeys(model_name(word) for word in _words(models)))
    for what, given, known in (("mode", modes, MODES), ("precision", precisions, PRECISIONS)):
        for word in _words(given):
            if word not in known:
                hint = f"Known: {', '.join(known)}."
                raise UserError(f'Unknown {what} "{word}".{did_you_mean(word, known)}', hint=hint)
    return Choices(names, _words(modes), _words(precisions))


def _words(text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UserError("A list of models, modes or precisions is empty.", hint="Names are separated by commas.")
    return words


def model_name(word: str) -> str:
    """The name in timm's registry of a typed word (that name itself, or a size), with ":plain" kept; or "reference"."""
    name, plain = word.removesuffix(PLAIN), word.endswith(PLAIN)
    if name in SIZES:
        name = SIZES[name].timm_name
    elif name == "literal":
        name = REFERENCE
    if name != REFERENCE and model_names.is_unknown(name):
        raise unknown(name)
    if plain and name not in model_names.OURS:
        raise UserError(f"{word}: only HcNets have kernels to leave out.", hint=f"Write {name} without {PLAIN}.")
    return name + PLAIN if plain else name


def check_output(output: Path | None) -> None:
    """UserError, before anything is timed, for a file that cannot be written in the end."""
    if output is None:
        return
    if output.suffix not in ENDINGS:
        raise UserError(f"{output} ends in neither {' nor '.join(ENDINGS)}.", hint="The ending chooses the format.")
    files.check_output(output)


def unknown(name: str) -> UserError:
    """What is said of a name that neither timm nor this program knows."""
    hint = f"Known: {REFERENCE}, the sizes {', '.join(SIZES)}, every model of timm, and FILE.py:FUNCTION."
    like = did_you_mean(name, [REFERENCE, *SIZES, *model_names.registered()])
    return UserError(f'Unknown model "{name}".{like}', hint=hint)
