"""Weights from elsewhere: read them without running code from the file, and say exactly what fitted."""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hcnet_cli.console import UserError

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
MIN_MATCHED = 0.5  # of the model's backbone parameters; less is a mistake, not a choice


class IgnoredObject(OrderedDict[str, Any]):
    """Stands in for a pickled object that is not a tensor: takes its contents, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()  # the restricted unpickler fills nothing but plain containers


# Harmless by name: configurations that trainers leave beside the weights. Everything else that is not a tensor or a
# plain container makes the file refused.
CONFIG_CLASSES = ("yacs.config.CfgNode", "argparse.Namespace", "easydict.EasyDict", "types.SimpleNamespace")


def read_weights(path: Path) -> dict[str, Tensor]:
    """A flat state dict from a .safetensors file or a PyTorch checkpoint.

    A checkpoint's weights may lie under `model`, `state_dict`, `model_ema` or `state_dict_ema`. Nothing in the file is
    run: tensors and plain containers are made, pickled configurations (CONFIG_CLASSES) are skipped, the rest refused.
    """
    if not path.is_file():
        raise UserError(f"There is no weights file {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}.") from None
    try:
        with (
            torch.serialization.safe_globals([(IgnoredObject, name) for name in CONFIG_CLASSES]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of old pickles' formats; what matters is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes; nothing of it has run
        text = str(error)
        if "Unsupported global" in text or "GLOBAL " in text or "weights_only" in text.lower():
            culprit = text.split("GLOBAL ")[1].split()[0] if "GLOBAL " in text else "an object that is not a tensor"
            raise UserError(
                f"{path} was refused: its pickle asks for {culprit}, which could run code.",
                hint="Only tensors and plain containers are read. Ask its author for a .safetensors file.",
            ) from None
        raise UserError(f"{path} is damaged or not a PyTorch checkpoint.") from None
    for key in ("model", "state_dict", "model_ema", "state_dict_ema"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{path} holds no state dict.")
    return tensors


def digest(state: Mapping[str, Tensor]) -> str:
    """16 hex digits over names and values, whatever file they came from."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


@dataclass
class LoadReport:
    """What became of each tensor: loaded, re-initialised (other shape), missing in the file, or not needed here."""

    source: str
    digest: str  # of the tensors in the file
    loaded: int
    total: int
    reinitialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    config: str = ""  # of the run that made the weights (RunInfo.config), where they say
    seed: int | None = None  # of that run

    def __str__(self) -> str:
        lines = [f"Weights from {self.source}: {self.loaded} of {self.total} tensors loaded."]
        for what, names in (
            ("re-initialised (shape differs)", self.reinitialised),
            ("missing in the file", self.missing),
            ("not needed here", self.unexpected),
        ):
            if names:
                shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
                lines.append(f"  {what}: {shown}")
        return "\n".join(lines)


def check_dtypes(named: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """UserError for tensors whose kind of number is not the model's: copying would cast them without a word."""
    for name, value in named.items():
        if name in own and value.is_floating_point() != own[name].is_floating_point():
            kind, needed = (str(x.dtype).removeprefix("torch.") for x in (value, own[name]))
            raise UserError(
                f"{source}: {name} holds {kind}, the model needs {needed}.",
                hint="Quantised or converted weights cannot be loaded; name the original ones.",
            )


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    remap: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> LoadReport:
    """Copies what fits from `state` into `model` and tells what did not.

    `remap` translates foreign names first. Prefixes that wrappers add are stripped where that makes a name known.
    UserError when fewer than MIN_MATCHED of the model's parameters find a tensor of their shape, as numbers go.
    """
    try:
        state = remap(dict(state))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    own = model.state_dict()
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        key = name
        while key not in own and key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        named[key if key in own else name] = value
    check_dtypes(named, own, source)
    fits = {name for name, value in named.items() if name in own and value.shape == own[name].shape}
    report = LoadReport(
        source=source,
        digest=digest(state),
        loaded=len(fits),
        total=len(own),
        reinitialised=sorted(name for name in named if name in own and name not in fits),
        missing=sorted(name for name in own if name not in named),
        unexpected=sorted(name for name in named if name not in own),
    )
    matched = sum(own[name].numel() for name in fits) / max(1, sum(value.numel() for value in own.values()))
    if matched < MIN_MATCHED:
        raise UserError(
            f"{source} does not fit this model: only {len(fits)} of {len(own)} tensors "
            f"({matched:.0%} of the numbers) match.",
            hint="Give the --size, and the --set model options, that the weights were trained with.",
        )
    model.load_state_dict({name: named[name] for name in fits}, strict=False)
    return report
