"""Weights from elsewhere: read them without running code from the file, and say exactly what fitted."""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hcnet_cli.console import UserError, notice, visible
from hcnet_cli.header import check_content, read_metadata

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
MIN_MATCHED = 0.5  # of the model's backbone parameters; less is a mistake, not a choice


class IgnoredObject(OrderedDict[str, Any]):
    """Stands in for a pickled object that is not a tensor: takes its contents, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()  # the restricted unpickler fills nothing but plain containers


# Harmless by name: configurations that trainers leave beside the weights. Everything else that is not a tensor or a
# plain container makes the file refused.
CONFIG_CLASSES = ("yacs.config.CfgNode", "argparse.Namespace", "easydict.EasyDict", "types.SimpleNamespace")


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
SHARED = 16  # times that tensors of several names may show the same bytes of a file (tied weights)
PARTS = ("state_dict_ema", "model_ema", "state_dict", "model")  # moving averages first, as timm.models.load_state_dict
LONGEST_SHOWN = 100  # characters of a file's own text in a message
NAME_LENGTH = 300  # characters; the longest names of timm have 80
HEADROOM = 2**30  # bytes that reading may take beyond copies of the file


def read_weights(path: Path) -> dict[str, Tensor]:
    """A flat state dict from a .safetensors file or a PyTorch checkpoint.

    A checkpoint's weights may lie under one of PARTS; of several the first is read, which is said. Nothing in the file
    is run: tensors and plain containers are made, pickled configurations (CONFIG_CLASSES) skipped, the rest refused.
    """
    if not path.exists():
        raise UserError(f"There is no weights file {path}.")
    check_content(path)
    num_bytes = path.stat().st_size
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path, num_bytes)
    parts = [key for key in PARTS if isinstance(content, Mapping) and _holds_tensors(content.get(key))]
    if len(parts) > 1:
        notice(f"{path} holds {' and '.join(parts)}: the weights are those of {parts[0]}.")
    if parts:
        content = content[parts[0]]
    tensors = plain_tensors(content, num_bytes, path) if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{path} holds no state dict.")
    return tensors


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        read_metadata(path)
        return load_file(path)
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise UserError(
            f"{path} is not a readable safetensors file: {visible(str(error)[:LONGEST_SHOWN]).rstrip('.')}."
        ) from None


def _read_checkpoint(path: Path, num_bytes: int) -> Any:
    """What torch.load makes of a PyTorch checkpoint. UserError for a damaged one, and for one that asks for more."""
    unpacked = _unpacked_size(path)
    if unpacked > num_bytes:
        raise UserError(
            f"{path} is a compressed archive: its {num_bytes:,} bytes unpack to {unpacked:,}.",
            hint="PyTorch writes its checkpoints uncompressed; load it there and save it again.",
        )
    try:
        with (
            torch.serialization.safe_globals([(IgnoredObject, name) for name in CONFIG_CLASSES]),
            warnings.catch_warnings(),
            memory_limit(SHARED * num_bytes + HEADROOM),
        ):
            warnings.simplefilter("ignore")  # of old pickles' formats; what matters is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes; nothing of it has run
        if culprit := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} was refused: its pickle asks for {visible(culprit[1][:LONGEST_SHOWN])}, which could run code.",
                hint="Only tensors and plain containers are read. Ask its author for a .safetensors file.",
            ) from None
        raise UserError(f"{path} is damaged or not a PyTorch checkpoint of tensors.") from None


def _unpacked_size(path: Path) -> int:
    """The bytes of all entries of a zip archive; 0 for another file, and for an archive that torch.load will refuse."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except Exception:  # zipfile has many for damaged archives
        return 0


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Allocations that need more than `num_bytes` of further address space fail inside. Where Linux is not, no limit.

    A pickle of 100 bytes can ask for a tensor, or a bytearray, of any size.
    """
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [used + num_bytes, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def plain_tensors(found: Mapping[Any, Any], num_bytes: int, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict from a file of `num_bytes`, each dense, contiguous and on the CPU, with a name that
    can be shown. What is no tensor is left out. UserError for other kinds of tensors, and for tensors that claim more
    than the file can hold, such as views that repeat one element.
    """
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > NAME_LENGTH:
            raise UserError(f"{path}: {visible(repr(name)[:LONGEST_SHOWN])} cannot be the name of a tensor.")
        if kind := special_kind(value):
            raise UserError(
                f"{path}: {name} is a {kind} tensor; weights are plain numbers.",
                hint="Name the original weights, before they were converted.",
            )
    claimed = sum(value.numel() * value.element_size() for value in tensors.values())
    if claimed > SHARED * num_bytes:
        raise UserError(f"{path} claims tensors of {claimed:,} bytes, but is a file of {num_bytes:,}.")
    return {name: value.detach().resolve_neg().contiguous() for name, value in tensors.items()}


def special_kind(value: Tensor) -> str:
    """In what a tensor differs from a plain one, as an adjective; "" for a plain one."""
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return "sparse"
    if value.is_quantized:
        return "quantised"
    if value.device.type != "cpu":
        return value.device.type
    if value.dtype not in DTYPES:
        return str(value.dtype).removeprefix("torch.")
    return "" if type(value) in (Tensor, nn.Parameter) else "wrapped"


def digest(state: Mapping[str, Tensor]) -> str:
    """16 hex digits over names and values, whatever file they came from."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu()
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        # a tensor of one element or none may have any stride, which `view` refuses: the copy has a plain one
        plain = value.flatten().clone(memory_format=torch.contiguous_format)
        total.update(plain.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


@dataclass
class LoadReport:
    """What became of each tensor: loaded (some in another shape: position tables of other images or windows),
    re-initialised (other shape), missing in the file, or not needed here.
    """

    source: str
    digest: str  # of the tensors in the file
    loaded: int
    total: int
    reinitialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    config: str = ""  # of the run that made the weights (RunInfo.config), where they say
    seed: int | None = None  # of that run
    resampled: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"Weights from {self.source}: {self.loaded} of {self.total} tensors loaded."]
        for what, names in (
            ("resampled to other images or windows", self.resampled),
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


def strip_prefixes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names without the prefixes that wrappers add, where that makes a name known."""
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        key = name
        while key not in own and key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        named[key if key in own else name] = value
    return named


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    remap: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    hint: str = "Give the --size, and the --set model options, that the weights were trained with.",
) -> LoadReport:
    """Copies what fits from `state` into `model` and tells what did not.

    `remap` translates foreign names first. `hint`: what to do where the weights are of another model. Prefixes that
    wrappers add are stripped where that makes a name known. UserError when fewer than MIN_MATCHED of the model's
    parameters find a tensor of their shape, as numbers go.
    """
    own = model.state_dict()
    shapes = {name: value.shape for name, value in strip_prefixes(state, own).items()}
    try:
        state = remap(dict(state))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    named = strip_prefixes(state, own)
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
        resampled=sorted(name for name in fits if shapes.get(name, named[name].shape) != named[name].shape),
    )
    matched = sum(own[name].numel() for name in fits) / max(1, sum(value.numel() for value in own.values()))
    if matched < MIN_MATCHED:
        raise UserError(
            f"{source} does not fit this model: only {len(fits)} of {len(own)} tensors "
            f"({matched:.0%} of the numbers) match.",
            hint=hint,
        )
    model.load_state_dict({name: named[name] for name in fits}, strict=False)
    return report
