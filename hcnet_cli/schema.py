"""The sections that every recipe has. A task adds its own (`tasks/*/spec.py`); `recipe.py` puts them together.

Every field carries its description and says whether it can change a number; `docs/recipe.md` is made from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hcnet_cli.console import did_you_mean
from hcnet_cli.sizes import COMPONENTS, SIZES, ordered_components

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_PIXELS = 100_000_000  # of an image, unless a recipe says otherwise
Triple = tuple[float, float, float]
Quad = tuple[int, int, int, int]
PositiveInt = Annotated[int, Field(ge=1)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Pair = tuple[PositiveInt, PositiveInt]
Fraction = Annotated[float, Field(ge=0, le=1)]
SHAPE_FIELDS = ("depths", "dims", "kernel_size", "mlp_ratio")  # of the section `model`, HcNet's own


def field(
    default: Any, description: str, *, unit: str = "", fingerprint: Literal["always", "never", "changed"] = "always"
) -> Any:
    """A field of a recipe section.

    Args:
        default: Its value in a recipe that says nothing; `...` for a field that a recipe must give.
        description: One sentence for docs/recipe.md.
        unit: Of the value.
        fingerprint: "never" for what cannot change a number beyond the rounding of a sum (how the work is divided and
            shown, where files lie); "changed" for fields added after version 0.1, which enter the fingerprint of a run
            only where they leave their default, so that earlier runs keep theirs.
    """
    return Field(default, description=description, json_schema_extra={"unit": unit, "fingerprint": fingerprint})


class Part(BaseModel):
    """A section of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class DataPart(Part):
    """What every data format shares."""

    format: str
    path: str | None = field(None, "Data folder, or the name of an embedded set.", fingerprint="never")
    mean: Triple = field(IMAGENET_MEAN, "Mean of the channels, of values in 0..1.")
    std: Triple = field(IMAGENET_STD, "Standard deviation of the channels, of values in 0..1.")
    bits: Annotated[int, Field(ge=8, le=32)] | None = field(
        None,
        "Bits that images of more than 8 bits use: 8, 10, 12, 16; null: measured over the data.",
        fingerprint="changed",
    )
    max_pixels: PositiveInt = field(
        MAX_PIXELS,
        "An image of more is not decoded: it is treated as one that cannot be read.",
        unit="pixels",
        fingerprint="changed",
    )
    trust: Literal["content", "names"] = field(
        "content",
        "`content`: the data are known by the contents of their files; `names`: by names and sizes alone, which misses "
        "what is changed in place.",
        fingerprint="never",
    )


NORMALISATION = "RGB in 0..1, minus mean, divided by std"  # what every format does with its mean and std


class EvaluationPart(Part):
    """How one score is made. The first entry of `evaluation` is measured during training and decides which weights
    are best; the others score those weights.
    """

    when: Literal["training", "end", "asked"] = field(
        "asked",
        "`training`: at every evaluation; `end`: once, when training ends; `asked`: by `hcnet evaluate` alone.",
        fingerprint="never",
    )


class Model(Part):
    """The backbone: a size of HcNet, a model of timm, or a function of your own. Shape fields left at null are the
    size's own (sizes.py); so is the drop path of a recipe that says nothing.
    """

    size: str = field("pico", f"Size of HcNet: {', '.join(SIZES)}.")
    name: str = field(
        "",
        "Another backbone instead of HcNet: a name of timm, or FILE.py:FUNCTION, a function that returns a module with "
        "timm's `forward_intermediates` and `feature_info`.",
        fingerprint="changed",
    )
    args: dict[str, Any] = field({}, "Arguments of the model named by `name`.", fingerprint="changed")
    depths: Quad | None = field(None, "Blocks of each stage.")
    dims: Quad | None = field(None, "Channels of each stage.")
    kernel_size: PositiveInt | None = field(None, "Side of the learned stencils, odd.", unit="pixels")
    mlp_ratio: PositiveFloat | None = field(None, "Hidden channels of the refinement over those of the stage.")
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = field(
        None, "Drop path of the last block; it grows linearly from 0."
    )
    disable: tuple[str, ...] = field((), f"Components left out: {', '.join(COMPONENTS)}.")
    grad_checkpointing: bool = field(
        False, "Compute each block again in the backward pass: less memory, more time.", fingerprint="never"
    )

    @field_validator("size")
    @classmethod
    def _known_size(cls, size: str) -> str:
        if size not in SIZES:
            raise ValueError(f'unknown size "{size}" (known: {", ".join(SIZES)}).{did_you_mean(size, SIZES)}')
        return size

    @field_validator("disable")
    @classmethod
    def _known_components(cls, disable: tuple[str, ...]) -> tuple[str, ...]:
        for name in disable:
            if name not in COMPONENTS:
                raise ValueError(
                    f'unknown component "{name}" (known: {", ".join(COMPONENTS)}).{did_you_mean(name, COMPONENTS)}'
                )
        ordered_components(disable)
        return disable

    @model_validator(mode="after")
    def _own_arguments(self) -> Model:
        shape = [key for key in SHAPE_FIELDS if getattr(self, key) is not None]
        if self.name and (shape or self.disable):
            key = shape[0] if shape else "disable"
            raise ValueError(f"model.{key} belongs to HcNet; {self.name} takes its arguments in model.args.")
        if self.args and not self.name:
            raise ValueError("model.args are those of the model that model.name names; HcNet has fields of its own.")
        return self

    @property
    def label(self) -> str:
        """What runs and tables call it: the size of HcNet, or the name of another model."""
        return self.name.rpartition(":")[2] or self.size


class Optim(Part):
    """The optimizer, by timm's factory."""

    name: str = field("adamw", "Optimizer, by its name in timm.", fingerprint="changed")
    args: dict[str, Any] = field(
        {}, "Further arguments of the optimizer. adamw: `betas: [0.9, 0.999]`, `eps: 1e-8`.", fingerprint="changed"
    )
    lr: PositiveFloat = field(..., "Peak learning rate. It is never scaled by the batch size.")
    weight_decay: Annotated[float, Field(ge=0)] = field(
        0.05, "Weight decay of the parameters that `no_decay` does not except."
    )
    clip_grad: PositiveFloat | None = field(None, "Largest norm of all gradients together; null: no clipping.")
    no_decay: Literal["1d", "norm"] = field(
        "1d",
        "Parameters without weight decay. `1d`: biases and all with one dimension (Swin on ImageNet); `norm`: those "
        "with `norm` in their name (Swin's detection and segmentation, where biases decay).",
    )

    @model_validator(mode="before")
    @classmethod
    def _adamw_defaults(cls, data: Any) -> Any:
        """A recipe says what AdamW runs with, as every other number."""
        if isinstance(data, Mapping) and data.get("name", "adamw") == "adamw":
            given = data.get("args", {})
            if isinstance(given, Mapping):
                args = {"betas": [0.9, 0.999], "eps": 1.0e-8, **given}
                args["betas"] = _floats("betas", args["betas"], 2)
                (args["eps"],) = _floats("eps", [args["eps"]], 1)
                return {**data, "args": args}
        return data


def _floats(key: str, values: Any, count: int) -> list[float]:
    """`values` as floats: 1 and 1.0 are the same number and must give the same fingerprint."""
    plain = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
    if not plain or len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f'"optim.args.{key}" must be {"a number" if count == 1 else f"{count} numbers"}')
    return [float(value) for value in values]


class Schedule(Part):
    """Learning rate over steps (optim.lr_at). Durations are in `unit`; the code counts optimizer steps."""

    kind: Literal["cosine", "multistep", "poly"] = field("cosine", "Shape of the learning rate after the warm-up.")
    unit: Literal["epochs", "steps"] = field("epochs", "Unit of `length`, `milestones` and `train.eval_every`.")
    length: PositiveInt = field(..., "Length of the training.", unit="schedule.unit")
    warmup: Annotated[float, Field(ge=0)] = field(
        0, "Length of the linear warm-up; at most half of the training.", unit="schedule.warmup_unit"
    )
    warmup_unit: Literal["epochs", "steps"] = field("epochs", "Unit of `warmup`.")
    warmup_ratio: Fraction = field(1.0e-3, "Learning rate of the first step over the peak.")
    warmup_inside: bool = field(
        False, "cosine: it runs from step 0 and the warm-up hides its beginning, as in the authors' code."
    )
    min_lr: Annotated[float, Field(ge=0)] = field(0.0, "cosine, poly: learning rate at the end.")
    milestones: tuple[int, ...] = field((), "multistep: when the rate falls.", unit="schedule.unit")
    gamma: PositiveFloat = field(0.1, "multistep: factor at each milestone.")
    power: float = field(1.0, "poly: the exponent.")


class Train(Part):
    """Batches, precision, evaluation and checkpoints."""

    batch_size: PositiveInt = field(..., "Images per optimizer step, over all processes and micro-batches.")
    accumulate: PositiveInt = field(
        1, "Micro-batches per optimizer step. Results change only where batch norm is used.", fingerprint="never"
    )
    seed: NaturalInt = field(0, "Seed of everything random.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(
        "auto", "`auto`: bf16 on a GPU that computes it, fp16 on an older one, fp32 elsewhere."
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = field(
        None, "Decay of the moving average of the weights, which is then evaluated; null: none."
    )
    eval_every: PositiveInt = field(1, "Interval between evaluations.", unit="schedule.unit")
    eval_batch_size: PositiveInt | None = field(
        None, "Images at a time in evaluation; null: as in training.", fingerprint="never"
    )
    save_every: PositiveFloat = field(
        10.0, "Time between checkpoints, besides those at evaluations.", unit="minutes", fingerprint="never"
    )
    log_every: PositiveInt = field(50, "Optimizer steps between lines of the log.", unit="steps", fingerprint="never")
    workers: NaturalInt = field(8, "Processes that load data; 0: the main process.", fingerprint="never")
    compile: bool = field(False, "Use torch.compile.", fingerprint="never")
    kernels: bool = field(
        True,
        "Use the faster forms of layers (docs/speed.md); `HCNET_KERNELS=0` turns them off too.",
        fingerprint="never",
    )
