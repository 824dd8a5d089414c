"""timm's pretrained weights, from the Hugging Face hub or its cache on this machine: for `--pretrained` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import timm
from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from hcnet_cli.console import UserError, notice

WEIGHTS = "model.safetensors"
PATIENCE = 3.0  # seconds for the hub's first answer; huggingface_hub itself asks six times, for 23 seconds


def pretrained_weights(name: str) -> Path:
    """The file of a model's weights. UserError, with the way to get it by hand, where it cannot be had."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    place = (config.hf_hub_id or "") if config is not None else ""
    if config is None or not (place or config.url):
        tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
        known = f"Weights of {name.partition('.')[0]}: {', '.join(tags)}; write NAME.TAG." if tags else ""
        raise UserError(f"There are no weights in timm of {name}.", hint=known or "--init FILE takes others.")
    if not place:
        raise UserError(
            f"The weights of {name} are not on the Hugging Face hub.",
            hint=f"Download {config.url} and name the file with --init.",
        )
    repository, _, revision = place.partition("@")
    notice(f"Weights: {repository}, from the Hugging Face hub or its cache on this machine.")
    try:
        return _fetch(repository, config.hf_hub_filename or WEIGHTS, revision or None)
    except Exception as error:
        raise UserError(
            f"The weights of {name} are not in the cache, and the Hugging Face hub was not reached.",
            hint=f"Where there is a network: hf download {repository} {WEIGHTS} --local-dir DIR; bring the file here "
            f"and give --init DIR/{WEIGHTS} instead of --pretrained.",
        ) from error


def _fetch(repository: str, filename: str, revision: str | None) -> Path:
    """From the cache, else from the hub if it answers at all."""
    try:
        return Path(hf_hub_download(repository, filename, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)  # raises where there is no network, or offline mode
        return Path(hf_hub_download(repository, filename, revision=revision))


def expected_normalisation(name: str) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and standard deviation of the channels that the weights of a model of timm were trained with."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return None if config is None else (config.mean, config.std)
