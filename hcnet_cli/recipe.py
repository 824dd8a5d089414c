"""The recipe: every number of an experiment as typed, frozen data. YAML and overrides in, checked recipe out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.sizes import COMPONENTS, SIZES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]
Quad = tuple[int, int, int, int]
PositiveInt = Annotated[int, Field(ge=1)]
Pair = tuple[PositiveInt, PositiveInt]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A section of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Model(Part):
    """The backbone. Shape fields left at null are the size's own (models/hcnet.py); so is the drop path of a recipe
    that says nothing, filled in when it is resolved.
    """

    size: str = "pico"
    depths: Quad | None = None
    dims: Quad | None = None
    kernel_size: PositiveInt | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    disable: tuple[str, ...] = ()
    grad_checkpointing: bool = False

    @model_validator(mode="after")
    def _known_names(self) -> Model:
        if self.size not in SIZES:
            raise ValueError(f'unknown size "{self.size}" (known: {", ".join(SIZES)}).{did_you_mean(self.size, SIZES)}')
        for name in self.disable:
            if name not in COMPONENTS:
                raise ValueError(
                    f'unknown component "{name}" (known: {", ".join(COMPONENTS)}).{did_you_mean(name, COMPONENTS)}'
                )
        return self

    @property
    def label(self) -> str:
        return self.size


class Classes(Part):
    """Image classification: a linear head."""

    kind: Literal["linear"] = "linear"


class MaskRCNN(Part):
    """FPN and Mask R-CNN; the defaults are the reference's (Swin detection, mmdetection)."""

    kind: Literal["mask-rcnn"]
    with_masks: bool = True  # without: Faster R-CNN
    fpn_channels: PositiveInt = 256
    box_head_channels: PositiveInt = 1024
    mask_head_channels: PositiveInt = 256
    num_mask_convs: Annotated[int, Field(ge=0)] = 4
    anchor_scale: Annotated[float, Field(gt=0)] = 8.0
    rpn_pre_train: PositiveInt = 2000
    rpn_post_train: PositiveInt = 1000
    rpn_pre_test: PositiveInt = 1000
    rpn_post_test: PositiveInt = 1000
    rpn_batch: PositiveInt = 256
    box_batch: PositiveInt = 512
    score_thresh: Fraction = 0.05
    nms_thresh: Fraction = 0.5
    max_detections: PositiveInt = 100


class UPerNet(Part):
    """UPerHead and auxiliary FCN head; the defaults are the reference's (Swin segmentation, mmsegmentation)."""

    kind: Literal["upernet"]
    channels: PositiveInt = 512
    aux_channels: PositiveInt = 256
    pool_scales: tuple[PositiveInt, ...] = (1, 2, 3, 6)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    aux_weight: Annotated[float, Field(ge=0)] = 0.4
    init_std: Annotated[float, Field(gt=0)] = 0.01  # of the classifiers' weights; narrow heads want more


class ImageFolder(Part):
    """Folders of images by class, with timm's augmentation (names as in timm.data.create_transform and Mixup)."""

    format: Literal["image-folder"]
    path: str | None = None
    img_size: PositiveInt = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: Fraction = 0.5
    vflip: Fraction = 0.0
    color_jitter: float | None = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    re_prob: Fraction = 0.25
    re_mode: Literal["pixel", "const", "rand"] = "pixel"
    re_count: PositiveInt = 1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: Fraction = 1.0
    mixup_switch_prob: Fraction = 0.5
    smoothing: Fraction = 0.1
    crop_pct: Annotated[float, Field(gt=0)] = 0.875
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD


class Coco(Part):
    """A COCO folder: train2017/, val2017/, annotations/instances_*.json."""

    format: Literal["coco"]
    path: str | None = None
    img_scale: Pair = (1333, 800)
    multiscale: tuple[PositiveInt, ...] = ()
    crop_scales: tuple[PositiveInt, ...] = (400, 500, 600)
    crop_range: Pair = (384, 600)
    hflip: Fraction = 0.5
    min_side: Annotated[int, Field(ge=0)] = 32
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    eval_backend: Literal["faster-coco-eval", "pycocotools"] = "faster-coco-eval"


class SceneParsing(Part):
    """ADE20K's SceneParsing layout: images/ and annotations/, each with training/ and validation/."""

    format: Literal["scene-parsing"]
    path: str | None = None
    num_classes: PositiveInt | None = None  # null: as many as the folder names
    reduce_zero_label: bool = True
    ignore_index: Annotated[int, Field(ge=0, le=255)] = 255
    img_scale: Pair = (2048, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)
    crop_size: PositiveInt = 512
    cat_max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.75
    hflip: Fraction = 0.5
    photometric: bool = True
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    eval_mode: Literal["whole", "slide"] = "whole"
    eval_stride: PositiveInt = 341
    multi_scale: bool = False  # evaluate the best weights at several scales too, when training ends


class Optim(Part):
    """AdamW. `no_decay`: "1d" = biases and every 1-D parameter (Swin's ImageNet rule); "norm" = parameters whose name
    contains `norm` (Swin's detection and segmentation rule: biases are decayed).
    """

    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    no_decay: Literal["1d", "norm"] = "1d"


class Schedule(Part):
    """Learning rate over steps; durations in `unit`, code counts optimizer steps (optim.lr_at).

    `warmup_inside` (cosine): the cosine runs from step 0 and warm-up hides its beginning, as in the released code;
    otherwise the cosine starts after warm-up. `milestones` and `gamma` are multistep's, `power` is poly's.
    """

    kind: Literal["cosine", "multistep", "poly"] = "cosine"
    unit: Literal["epochs", "steps"] = "epochs"
    length: PositiveInt
    warmup: Annotated[float, Field(ge=0)] = 0
    warmup_unit: Literal["epochs", "steps"] = "epochs"
    warmup_ratio: Fraction = 1.0e-3
    warmup_inside: bool = False
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    power: float = 1.0


class Train(Part):
    """How the run is driven. `batch_size` is the total over processes and micro-batches; `eval_every` counts in the
    schedule's unit.
    """

    batch_size: PositiveInt
    accumulate: PositiveInt = 1
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    eval_every: PositiveInt = 1
    eval_batch_size: PositiveInt | None = None
    save_every: Annotated[float, Field(gt=0)] = 10.0  # minutes between checkpoints besides those at evaluations
    log_every: PositiveInt = 50
    workers: Annotated[int, Field(ge=0)] = 8
    compile: bool = False


class Recipe(Part):
    """A whole experiment. `protocol` names the shipped recipe it follows; see `changes` for where it departs."""

    task: Literal["pretrain", "finetune-det", "finetune-seg"]
    protocol: str
    model: Model = Model()
    head: Annotated[Classes | MaskRCNN | UPerNet, Field(discriminator="kind")] = Classes()
    data: Annotated[ImageFolder | Coco | SceneParsing, Field(discriminator="format")]
    optim: Optim
    schedule: Schedule
    train: Train
    init: str = Field(default="none", min_length=1)

    @model_validator(mode="after")
    def _belongs_together(self) -> Recipe:
        parts = {
            "pretrain": ("linear", "image-folder"),
            "finetune-det": ("mask-rcnn", "coco"),
            "finetune-seg": ("upernet", "scene-parsing"),
        }
        if (self.head.kind, self.data.format) != parts[self.task]:
            raise ValueError(f"{self.task} takes head {parts[self.task][0]} and data format {parts[self.task][1]}")
        return self


# What cannot change a number (beyond the rounding of a sum): how the work is divided and shown, and where files lie.
# Data and weights enter the fingerprint by content.
NOT_IN_FINGERPRINT = frozenset(
    {
        "data.eval_backend",
        "data.multi_scale",
        "data.path",
        "init",
        "model.grad_checkpointing",
        "train.accumulate",
        "train.compile",
        "train.eval_batch_size",
        "train.log_every",
        "train.save_every",
        "train.workers",
    }
)
# What a run may vary without departing from its protocol.
FREE = NOT_IN_FINGERPRINT | {"model.size", "model.disable", "train.seed", "train.precision"}


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number, only true and false are booleans, a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'the key "{key}" stands twice', node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, origin: str) -> Any:
    """Plain data from YAML text; `origin` names the source in the UserError for text that is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{origin}{where} is not valid YAML: {getattr(error, 'problem', error)}.") from None


def dump_yaml(recipe: Recipe) -> str:
    data = recipe.model_dump(mode="json")
    return yaml.dump(data, sort_keys=False, default_flow_style=None, width=110)


# --- shipped recipes --------------------------------------------------------------------------------------------------


def recipes_dir() -> Path:
    """The shipped recipes: inside the wheel, or at the top of a source checkout."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def shipped() -> list[str]:
    """Names of the shipped recipes, such as "pretrain/imagenet"."""
    root = recipes_dir()
    return sorted(str(file.relative_to(root).with_suffix("")).replace("\\", "/") for file in root.glob("*/*.yaml"))


def recipe_file(name: str, task: str = "") -> Path:
    """The file of a recipe given by path, by full name or (with `task`) by short name."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"There is no recipe file {name}.", hint="`hcnet recipes ls` lists the shipped ones.")
        return Path(name)
    for candidate in (name, f"{task}/{name}"):
        if candidate in shipped():
            return recipes_dir() / f"{candidate}.yaml"
    known = [full for full in shipped() if not task or full.startswith(f"{task}/")]
    short = {**{full: full for full in known}, **{full.split("/", 1)[1]: full for full in known}}
    hint = f"Shipped: {', '.join(known)}."
    raise UserError(f'There is no recipe "{name}".{did_you_mean(name, short)}', hint=hint)


# --- from data to a checked recipe ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """A checked recipe, and for each value (dotted key) that is not the recipe file's where it came from ("default":
    the file says nothing).
    """

    recipe: Recipe
    sources: Mapping[str, str] = field(default_factory=dict)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """`optim.lr=1e-3` -> ("optim.lr", 0.001); the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f'"--set {text}" is not KEY=VALUE.', hint="For example: --set optim.weight_decay=0.1")
    return key.strip(), parse_yaml(value, f"--set {key.strip()}")


def resolve(file: Path, overrides: Iterable[tuple[str, Any, str]] = ()) -> Resolved:
    """The recipe in `file` with overrides (dotted key, value, source) laid over it, checked.

    Raises UserError naming the first unknown key (with a suggestion) or bad value.
    """
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {file} cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise UserError(f"The recipe {file} is not a mapping of keys to values.")
    base = check(data, str(file))
    known = flatten(base.model_dump())
    unsaid = known.keys() - flatten(data).keys()
    sources: dict[str, str] = {}
    nested: Any = data
    for key, value, source in overrides:
        if key not in known:
            section = [k for k in known if k.startswith(f"{key}.")]
            tip = f" It is a section: set one of {', '.join(section)}." if section else did_you_mean(key, known)
            raise UserError(
                f'{source}: unknown recipe key "{key}".{tip}',
                hint="`hcnet recipes show NAME` prints a recipe.",
            )
        *sections, last = key.split(".")
        node = nested
        for section_name in sections:
            node = node.setdefault(section_name, {})
        node[last] = value
        sources[key] = source
    recipe = check(data, str(file), sources)
    sources = dict.fromkeys(unsaid, "default") | sources
    if recipe.model.drop_path_rate is None:
        sources["model.drop_path_rate"] = f"size {recipe.model.size}"
        model = recipe.model.model_copy(update={"drop_path_rate": SIZES[recipe.model.size].drop_path_rate})
        recipe = recipe.model_copy(update={"model": model})
    return Resolved(recipe, sources)


def check(data: Mapping[str, Any], origin: str, sources: Mapping[str, str] = MappingProxyType({})) -> Recipe:
    """A Recipe from plain data, or a UserError about the first thing that is wrong, naming the flag it came from."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(_one_sentence(error, data, origin, sources)) from None
    taken = flatten(recipe.model_dump())
    for key, value in flatten(data).items():
        if isinstance(value, bool) and not isinstance(taken[key], bool):  # pydantic takes true for 1
            raise UserError(f'{sources.get(key, origin)}: "{key}" cannot be {json.dumps(value)}: it is a number.')
    return recipe


def _one_sentence(error: ValidationError, data: Mapping[str, Any], origin: str, sources: Mapping[str, str]) -> str:
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a misspelt key explains the rest
    tags = {"linear", "mask-rcnn", "upernet", "image-folder", "coco", "scene-parsing"}
    loc = [str(part) for part in first["loc"] if str(part) not in tags]
    key = ".".join(loc)
    for name, source in sources.items():
        if (first["type"] == "value_error" and name.startswith(f"{key}.")) or key.startswith(name):
            origin = source
    if first["type"] == "extra_forbidden":
        return f'{origin}: unknown key "{key}".{did_you_mean(key, _known_keys(data))}'
    if first["type"] == "missing":
        return f'{origin}: the key "{key}" is missing.'
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "value_error":
        return f"{origin}: {message if message.endswith('?') else message + '.'}"
    given = json.dumps(first["input"], default=str, ensure_ascii=False)  # as in the recipe: null, true
    return f'{origin}: "{key}" cannot be {given}: {message[0].lower()}{message[1:]}.'


def _known_keys(data: Mapping[str, Any]) -> list[str]:
    """Dotted keys a recipe of this task may have."""
    heads: dict[Any, type[Part]] = {"finetune-det": MaskRCNN, "finetune-seg": UPerNet}
    formats: dict[Any, type[Part]] = {"finetune-det": Coco, "finetune-seg": SceneParsing}
    sections: dict[str, type[Part]] = {
        "model": Model,
        "head": heads.get(data.get("task"), Classes),
        "data": formats.get(data.get("task"), ImageFolder),
        "optim": Optim,
        "schedule": Schedule,
        "train": Train,
    }
    return [
        *Recipe.model_fields,
        *(f"{name}.{key}" for name, part in sections.items() for key in part.model_fields),
    ]


# --- what a recipe says about itself ----------------------------------------------------------------------------------


def fingerprint(recipe: Recipe, **contents: str) -> str:
    """8 hex digits over what can change a number: the recipe but NOT_IN_FINGERPRINT; digests of data and weights."""
    flat = {k: v for k, v in flatten(recipe.model_dump(mode="json")).items() if k not in NOT_IN_FINGERPRINT}
    text = json.dumps({**flat, **contents}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(ours: Recipe, theirs: Recipe, but: frozenset[str] = frozenset()) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ (ours, theirs), except those in `but`."""
    a, b = flatten(ours.model_dump(mode="json")), flatten(theirs.model_dump(mode="json"))
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if key not in but and a.get(key) != b.get(key)}


def changes(recipe: Recipe) -> dict[str, Any]:
    """Where the recipe departs from the shipped protocol it names ({} for the protocol itself).

    The model's own shape is told by `variant`; size, seed and how the work is divided are free.
    """
    if recipe.protocol not in shipped():
        return {}
    base = resolve(recipes_dir() / f"{recipe.protocol}.yaml", [("model.size", recipe.model.size, "--size")]).recipe
    shape = frozenset(f"model.{name}" for name in ("depths", "dims", "kernel_size", "mlp_ratio"))
    changed = {key: ours for key, (ours, _) in sorted(differences(recipe, base, FREE | shape).items())}
    if (recipe.init == "none") != (base.init == "none"):
        changed["init"] = "none" if recipe.init == "none" else "given weights"  # a path differs between machines
    return changed


def variant(recipe: Recipe) -> str:
    """How the model departs from its size: "", "no-refinement", "kernel_size=3" or both joined with "+"."""
    parts = [f"no-{name}" for name in COMPONENTS if name in recipe.model.disable]
    for name in ("depths", "dims", "kernel_size", "mlp_ratio"):
        value = getattr(recipe.model, name)
        if value is not None:
            parts.append(f"{name}={'-'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return "+".join(parts)


@dataclass(frozen=True)
class Steps:
    """A schedule in optimizer steps; `epoch` is the steps of one pass over the data."""

    epoch: int
    total: int
    warmup: int
    milestones: tuple[int, ...]
    eval_every: int
    shortened: bool  # the warm-up was cut to half of a short run


def steps(recipe: Recipe, epoch: int) -> Steps:
    """Durations of the schedule, given the steps of one epoch. A warm-up takes at most half of the run."""
    plan = recipe.schedule

    def count(amount: float, unit: str) -> int:
        return round(amount * epoch) if unit == "epochs" else round(amount)

    total = count(plan.length, plan.unit)
    warmup = count(plan.warmup, plan.warmup_unit)
    return Steps(
        epoch=epoch,
        total=total,
        warmup=min(warmup, total // 2),
        milestones=tuple(count(milestone, plan.unit) for milestone in plan.milestones),
        eval_every=count(recipe.train.eval_every, plan.unit),
        shortened=warmup > total // 2,
    )
