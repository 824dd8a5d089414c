"""The sections that every recipe has. A task adds its own (`tasks/*/spec.py`); `recipe.py` puts them together.

Every field carries its description and says whether it can change a number; `docs/recipe.md` is made from that.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from hcnet_cli.console import did_you_mean
from hcnet_cli.sizes import COMPONENTS, SIZES, ordered_components
from hcnet_cli.values import shown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_PIXELS = 100_000_000  # of an image, unless a recipe says otherwise


def _or(word: str, known: Iterable[str]) -> str:
    return f".{meant}" if (meant := did_you_mean(word, known)) else ""


def _line(text: str) -> str:
    if not text.strip() or any(ord(one) < 32 or ord(one) == 127 for one in text):
        raise ValueError("it takes one line of text")
    return text


def in_order(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("the first number must not be above the second")
    return values


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError("each number must be above the one before")
    return values


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("it takes an odd number, for a stencil has a centre")
    return value


# Ranges hold every value that published recipes have, and an order of magnitude around them; what lies outside is a
# slip of the hand. They refuse alone: no value is changed.
Line = Annotated[str, AfterValidator(_line)]
ClassWeights = Literal["none", "balanced"] | tuple[Annotated[float, Field(gt=0, le=10_000)], ...]
Triple = tuple[float, float, float]
Fraction = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(ge=0.001, le=1)]
Factor = Annotated[float, Field(ge=0.1, le=10)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Channels = Annotated[int, Field(ge=4, le=16_384)]
Side = Annotated[int, Field(ge=8, le=16_384)]  # of an image, in pixels
Depth = Annotated[int, Field(ge=1, le=1000)]
Stencil = Annotated[int, Field(ge=3, le=63), AfterValidator(_odd)]
Sides = tuple[Side, Side]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
Duration = Annotated[int, Field(ge=1, le=10**8)]  # in steps or epochs
Seed = Annotated[int, Field(ge=0, lt=2**32)]
FromTo = Annotated[tuple[Factor, Factor], AfterValidator(in_order)]
SidesFromTo = Annotated[Sides, AfterValidator(in_order)]
SHAPE_FIELDS = ("depths", "dims", "kernel_size", "mlp_ratio")  # of the section `model`, HcNet's own


def field(
    default: Any,
    description: str,
    *,
    unit: str = "",
    example: Any = None,
    fingerprint: Literal["always", "never", "changed"] = "always",
    **limits: Any,
) -> Any:
    """A field of a recipe section.

    Args:
        default: Its value in a recipe that says nothing; `...` for a field that a recipe must give.
        description: One sentence for docs/recipe.md.
        unit: Of the value.
        example: A value to type, where the default is none.
        fingerprint: "never" for what cannot change a number beyond the rounding of a sum (how the work is divided and
            shown, where files lie); "changed" for fields added after version 0.1, which enter the fingerprint of a run
            only where they leave their default, so that earlier runs keep theirs.
        limits: Of the value, as pydantic's Field takes them: ge, gt, le, lt, min_length.
    """
    extra = {"unit": unit, "fingerprint": fingerprint, "example": example}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Part(BaseModel):
    """A section of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class DataPart(Part):
    """What every data format shares."""

    format: str
    path: Line | None = field(
        None, "Data folder, or the name of an embedded set.", example="/data/mine", fingerprint="never"
    )
    mean: tuple[Fraction, Fraction, Fraction] = field(IMAGENET_MEAN, "Mean of the channels, of values in 0..1.")
    std: tuple[Deviation, Deviation, Deviation] = field(
        IMAGENET_STD, "Standard deviation of the channels, of values in 0..1."
    )
    bits: Annotated[int, Field(ge=8, le=32)] | None = field(
        None,
        "Bits that images of more than 8 bits use: 8, 10, 12, 16; null: measured over the data.",
        example=12,
        fingerprint="changed",
    )
    max_pixels: Annotated[int, Field(ge=1, le=10**10)] = field(
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
        "timm's `forward_intermediates` and `feature_info`. A file runs only where the command line names it.",
        example="convnext_tiny",
        fingerprint="changed",
    )
    args: dict[str, Any] = field(
        {}, "Arguments of the model named by `name`.", example={"patch_size": 8}, fingerprint="changed"
    )
    digest: str = field(
        "",
        "Of the content of the file that `name` names; filled in by the program.",
        example="0123456789abcdef",
        fingerprint="changed",
        max_length=64,
    )
    depths: tuple[Depth, Depth, Depth, Depth] | None = field(None, "Blocks of each stage.", example=(2, 2, 4, 2))
    dims: tuple[Channels, Channels, Channels, Channels] | None = field(
        None, "Channels of each stage.", example=(32, 64, 128, 160)
    )
    kernel_size: Stencil | None = field(None, "Side of the learned stencils, odd.", unit="pixels", example=5)
    mlp_ratio: Annotated[float, Field(ge=0.25, le=32)] | None = field(
        None, "Hidden channels of the refinement over those of the stage.", example=4.0
    )
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = field(
        None, "Drop path of the last block; it grows linearly from 0.", example=0.1
    )
    disable: tuple[str, ...] = field((), f"Components left out: {', '.join(COMPONENTS)}.", example=("refinement",))
    grad_checkpointing: bool = field(
        False, "Compute each block again in the backward pass: less memory, more time.", fingerprint="never"
    )

    @field_validator("size")
    @classmethod
    def _known_size(cls, size: str) -> str:
        if size not in SIZES:
            raise ValueError(f"unknown size; the sizes are {', '.join(SIZES)}{_or(size, SIZES)}")
        return size

    @field_validator("disable")
    @classmethod
    def _known_components(cls, disable: tuple[str, ...]) -> tuple[str, ...]:
        for name in disable:
            if name not in COMPONENTS:
                raise ValueError(f"unknown component; known are {', '.join(COMPONENTS)}{_or(name, COMPONENTS)}")
        ordered_components(disable)
        return disable

    @field_validator("name")
    @classmethod
    def _other_model(cls, name: str) -> str:
        for size, known in SIZES.items():
            if name in (size, known.timm_name):
                raise ValueError(f"{name} is a size of HcNet: --size {size}")
        return name and _line(name)

    @model_validator(mode="after")
    def _own_arguments(self) -> Model:
        shape = [key for key in SHAPE_FIELDS if getattr(self, key) is not None]
        if self.name and (shape or self.disable):
            key = shape[0] if shape else "disable"
            raise ValueError(f"model.{key} belongs to HcNet; {self.name} takes its arguments in model.args")
        if self.args and not self.name:
            raise ValueError("model.args are those of the model that model.name names; HcNet has fields of its own")
        return self

    @property
    def label(self) -> str:
        """What runs and tables call it: the size of HcNet, or the name of another model."""
        return self.name.rpartition(":")[2] or self.size


class Optim(Part):
    """The optimizer, by timm's factory."""

    name: str = field("adamw", "Optimizer, by its name in timm.", fingerprint="changed")
    args: dict[str, Any] = field(
        {},
        "Further arguments of the optimizer. adamw: `betas: [0.9, 0.999]`, `eps: 1e-8`.",
        example={"betas": [0.9, 0.999]},
        fingerprint="changed",
    )
    lr: float = field(..., "Peak learning rate. It is never scaled by the batch size.", example=0.001, gt=0, le=100)
    weight_decay: float = field(0.05, "Weight decay of the parameters that `no_decay` does not except.", ge=0, le=10)
    clip_grad: Annotated[float, Field(gt=0, le=1e6)] | None = field(
        None, "Largest norm of all gradients together; null: no clipping.", example=5.0
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = field(
        None,
        "Factor on the learning rate from each layer to the one before it: the head has `lr`, the last block "
        "`lr` times this, the stem the smallest; null: all have `lr`.",
        example=0.75,
        fingerprint="changed",
    )
    no_decay: Literal["1d", "norm"] = field(
        "1d",
        "Parameters without weight decay. `1d`: biases and all with one dimension (Swin on ImageNet); `norm`: those "
        "with `norm` in their name (Swin's detection and segmentation, where biases decay). Never those that the model "
        "spares itself, by timm's `no_weight_decay()`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _adamw_defaults(cls, data: Any) -> Any:
        """A recipe says what AdamW runs with, as every other number; the usual arguments are checked for all."""
        args = data.get("args", {}) if isinstance(data, Mapping) else None
        if not isinstance(args, Mapping):
            return data
        if data.get("name", "adamw") == "adamw":
            args = {"betas": [0.9, 0.999], "eps": 1.0e-8, **args}
            if not isinstance(args["betas"], list | tuple) or len(args["betas"]) != 2:
                raise _wrong_argument("betas", args["betas"])
        args = {key: _floats(key, value, value) if key in LIMITS else value for key, value in args.items()}
        return {**data, "args": args}


LIMITS: dict[
    str, tuple[Callable[[float], bool], str, str]
] = {  # of arguments that most optimizers share: what they take, an example
    "betas": (lambda value: 0 <= value < 1, "a list of 2 numbers of at least 0 and below 1", "[0.9,0.999]"),
    "eps": (lambda value: 0 < value <= 1, "a number above 0 and of at most 1", "1e-8"),
}


def _floats(key: str, value: Any, whole: Any) -> Any:
    """The numbers of an argument as floats: 1 and 1.0 are the same number and must give the same fingerprint."""
    if isinstance(value, list | tuple) and key == "betas":
        return [_floats(key, one, whole) for one in value]
    if value is None and key != "betas":  # some optimizers have a default of their own
        return None
    if type(value) not in (int, float) or not LIMITS[key][0](value):
        raise _wrong_argument(key, whole)
    return float(value)


def _wrong_argument(key: str, value: Any) -> ValueError:
    _, takes, example = LIMITS[key]
    typed = shlex.quote(f"optim.args.{key}={example}")
    return ValueError(f'"optim.args.{key}" cannot be {shown(value)}: it takes {takes}, such as --set {typed}')


class Schedule(Part):
    """Learning rate over steps (optim.lr_at). Durations are in `unit`; the code counts optimizer steps."""

    kind: Literal["cosine", "multistep", "poly"] = field("cosine", "Shape of the learning rate after the warm-up.")
    unit: Literal["epochs", "steps"] = field("epochs", "Unit of `length`, `milestones` and `train.eval_every`.")
    length: Duration = field(..., "Length of the training.", unit="schedule.unit", example=100)
    warmup: float = field(
        0,
        "Length of the linear warm-up; at most half of the training.",
        unit="schedule.warmup_unit",
        example=5,
        ge=0,
        le=10**8,
    )
    warmup_unit: Literal["epochs", "steps"] = field("epochs", "Unit of `warmup`.")
    warmup_ratio: Fraction = field(1.0e-3, "Learning rate of the first step over the peak.")
    warmup_inside: bool = field(
        False, "cosine: it runs from step 0 and the warm-up hides its beginning, as in the authors' code."
    )
    min_lr: float = field(0.0, "cosine, poly: learning rate at the end.", example=1e-5, ge=0, le=0.1)
    milestones: Annotated[tuple[Duration, ...], AfterValidator(_ascending)] = field(
        (), "multistep: when the rate falls, ascending.", unit="schedule.unit", example=(8, 11)
    )
    gamma: float = field(0.1, "multistep: factor at each milestone.", gt=0, lt=1)
    power: float = field(1.0, "poly: the exponent.", gt=0, le=10)


class Train(Part):
    """Batches, precision, evaluation and checkpoints."""

    batch_size: BatchSize = field(..., "Images per optimizer step, over all processes and micro-batches.", example=256)
    accumulate: BatchSize = field(
        1,
        "Micro-batches per optimizer step. Results change only with batch norm, and dropout of other models.",
        fingerprint="never",
    )
    seed: Seed = field(0, "Seed of everything random.", example=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(
        "auto", "`auto`: bf16 on a GPU that computes it, fp16 on an older one, fp32 elsewhere."
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = field(
        None,
        "Decay of the moving average of the weights, which is then what is evaluated and kept; null: none.",
        example=0.9999,
    )
    freeze: Literal["none", "backbone"] | Annotated[int, Field(ge=0, le=1000)] = field(
        "none",
        "Part of the model that is not trained: `backbone`: all but the head; a number: the stem and as many stages, "
        "or blocks of a vision transformer. Its batch norm keeps its statistics, and nothing in it is dropped.",
        example=2,
        fingerprint="changed",
    )
    patience: Annotated[int, Field(ge=1, le=100_000)] | None = field(
        None,
        "Training stops early when so many evaluations in a row bring no better score; null: never.",
        unit="evaluations",
        example=10,
        fingerprint="changed",
    )
    eval_every: Duration = field(1, "Interval between evaluations.", unit="schedule.unit")
    eval_batch_size: BatchSize | None = field(
        None, "Images at a time in evaluation; null: a micro-batch of training.", example=64, fingerprint="never"
    )
    save_every: float = field(
        10.0,
        "Time between checkpoints, besides those at evaluations.",
        unit="minutes",
        fingerprint="never",
        gt=0,
        le=10_000,
    )
    log_every: Duration = field(50, "Optimizer steps between lines of the log.", unit="steps", fingerprint="never")
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)] = field(
        "auto",
        "Processes that load data; 0: the main process; `auto`: as many as there are cores for, 16 at most.",
        fingerprint="never",
    )
    compile: bool = field(False, "Use torch.compile.", fingerprint="never")
    kernels: bool = field(
        True,
        "Use the faster forms of layers (docs/speed.md); `HCNET_KERNELS=0` turns them off too.",
        fingerprint="never",
    )
