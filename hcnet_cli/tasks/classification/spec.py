"""Image classification, declared: recipe sections, metrics, table, published protocols, embedded data."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hcnet_cli.console import UserError
from hcnet_cli.schema import ClassWeights, DataPart, EvaluationPart, Fraction, FromTo, Line, Part, Side, field, in_order
from hcnet_cli.tasks.spec import Column, Format, Metric, Option, Spec

FOLDER = "hcnet_cli.tasks.classification"


class Classes(Part):
    """A linear layer on the pooled features."""

    kind: Literal["linear"] = "linear"
    loss: Literal["cross-entropy", "focal", "balanced-softmax"] = field(
        "cross-entropy",
        "`focal`: samples that are classified well count less (Lin et al. 2017); `balanced-softmax`: the logits of "
        "training are shifted by the logarithm of each class's training images (Ren et al. 2020).",
        fingerprint="changed",
    )
    focal_gamma: float = field(2.0, "focal: the exponent of 1 - p.", fingerprint="changed", gt=0, le=10)
    class_weights: ClassWeights = field(
        "none",
        "Weights of the classes in the loss: `balanced`: inverse to their training images; or a list.",
        example="balanced",
        fingerprint="changed",
    )

    @model_validator(mode="after")
    def _one_correction(self) -> Classes:
        if self.loss == "balanced-softmax" and self.class_weights != "none":
            raise ValueError('"head.class_weights" corrects for the same skew as the loss balanced-softmax: use one')
        return self


# timm's names of augmentation policies: auto_augment_transform, rand_augment_transform, augment_and_mix_transform. timm
# itself ignores a part without a number, which is a slip: "rand-m9-mstd-inc1" has no deviation.
_NUMBER, _SHARE = r"[0-9]{1,3}(?:\.[0-9]{1,6})?", r"(?:0\.[0-9]{1,6}|1(?:\.0)?)"
POLICY = re.compile(
    rf"(?:v0|v0r|original|originalr|3a)(?:-mstd{_NUMBER})?"
    rf"|rand(?:-m[0-9]{{1,2}}|-n[1-9]|-p{_SHARE}|-mstd{_NUMBER}|-mmax[1-9][0-9]?|-inc[01]|-t(?:weights|3a|3aw))*"
    rf"|augmix(?:-m[0-9]{{1,2}}|-w[1-9]|-d[1-9]|-a(?!0(?:\.0+)?(?:-|$)){_NUMBER}|-b[01]|-mstd{_NUMBER})*"
)


def _policy(name: str) -> str:
    if not POLICY.fullmatch(name):
        none = "; for none, write null" if name.lower() in ("", "none", "no", "off", "false") else ""
        raise ValueError(f"it takes a policy of timm: rand-..., augmix-..., v0, v0r, original, originalr or 3a{none}")
    return name


CropShare = Annotated[float, Field(ge=0.1, le=1)]
AreaShare = Annotated[float, Field(ge=0.001, le=1)]
Alpha = Annotated[float, Field(ge=0, le=100)]


class ImageFolder(DataPart):
    """Folders of images by class, with timm's augmentation (names as in timm.data.create_transform and Mixup)."""

    format: Literal["image-folder"]
    img_size: Side = field(224, "Height and width of the images.", unit="pixels")
    scale: Annotated[tuple[AreaShare, AreaShare], AfterValidator(in_order)] = field(
        (0.08, 1.0), "Random resized crop: part of the area, from and to."
    )
    ratio: FromTo = field((3 / 4, 4 / 3), "Random resized crop: width over height, from and to.", example=(0.75, 1.33))
    hflip: Fraction = field(0.5, "Probability of a horizontal flip.")
    vflip: Fraction = field(0.0, "Probability of a vertical flip.")
    color_jitter: Fraction | None = field(0.4, "Colour jitter; timm leaves it out beside `auto_augment`.")
    auto_augment: Annotated[str, AfterValidator(_policy)] | None = field(
        "rand-m9-mstd0.5-inc1", "timm's name of an automatic augmentation; null: none."
    )
    interpolation: Literal["bicubic", "bilinear"] = field("bicubic", "How images are resized.")
    re_prob: Fraction = field(0.25, "Probability of random erasing.")
    re_mode: Literal["pixel", "const", "rand"] = field("pixel", "What random erasing fills in.")
    re_count: int = field(1, "Regions that random erasing erases.", ge=1, le=100)
    mixup: Alpha = field(0.8, "Mixup's alpha; 0: none.")
    cutmix: Alpha = field(1.0, "CutMix's alpha; 0: none.")
    mixup_prob: Fraction = field(1.0, "Probability that a batch is mixed.")
    mixup_switch_prob: Fraction = field(0.5, "Probability of CutMix where both are on.")
    smoothing: float = field(0.1, "Label smoothing.", ge=0, lt=1)
    crop_pct: CropShare = field(0.875, "Evaluation: side of the centre crop over the resized side.")
    order: Literal["images", "shards"] = field(
        "images",
        "Order of training. `images`: all are shuffled; `shards`, for slow storage: first the tars are shuffled, then "
        "their images within windows of `window`, so that a tar is read once and as a whole.",
        fingerprint="changed",
    )
    window: Annotated[int, Field(ge=2, le=10**7)] = field(
        10_000, "order shards: images that are shuffled among each other.", unit="images", fingerprint="changed"
    )
    folds: Annotated[int, Field(ge=2, le=100)] | None = field(
        None,
        "Cross-validation: the training images are divided into so many parts; a run is scored on part `train.seed` "
        "modulo `folds` and trained on the others. `val/` is not used.",
        example=5,
        fingerprint="changed",
    )


CORRUPTIONS_OF_C = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
IN_FOLDERS = {  # evaluations on images of a folder of their own -> its layout (benchmarks.py reads it)
    "imagenet-v2": "folders named 0 to 999, the places of the classes",
    "imagenet-real": "ImageNet's validation images by their own names, ILSVRC2012_val_00000001.JPEG, in any folders",
    "imagenet-a": "folders named by the ids of its 200 classes, n01498041",
    "imagenet-r": "folders named by the ids of its 200 classes, n01443537",
    "imagenet-sketch": "folders named by the ids of the 1,000 classes, n01440764",
    "imagenet-c": "CORRUPTION/SEVERITY/CLASS, such as gaussian_noise/1/n01440764",
}
SHORT = {  # evaluation -> the title of its top-1
    "imagenet-v2": "V2",
    "imagenet-real": "ReaL",
    "imagenet-a": "A",
    "imagenet-r": "R",
    "imagenet-sketch": "Sketch",
    "imagenet-c": "C",
    "knn": "kNN",
    "probe": "probe",
    "corruptions": "corrupted",
}
LOOKS_LIKE = {  # how a folder inside is called; by default as a class of ImageNet
    "imagenet-v2": r"\d{1,3}",
    "imagenet-c": "|".join(CORRUPTIONS_OF_C),
    "imagenet-real": "",
}


On = Literal[
    "val",
    "knn",
    "probe",
    "corruptions",
    "imagenet-v2",
    "imagenet-real",
    "imagenet-a",
    "imagenet-r",
    "imagenet-sketch",
    "imagenet-c",
]


class ClassificationEvaluation(EvaluationPart):
    """Top-1 and top-5 of whole images, resized and cropped."""

    on: On = field(
        "val",
        "What is scored: `val`: the run's validation images; `knn`, `probe`: their features, by nearest neighbours and "
        "by a linear probe; `corruptions`: them, corrupted by hcnet; the others are ImageNet's further test sets "
        "(docs/evaluation.md).",
        fingerprint="changed",
    )
    path: Line | None = field(
        None,
        "Folder of the images of ImageNet's further test sets; null: for imagenet-real, the run's validation images.",
        example="/data/imagenet-a",
        fingerprint="never",
    )
    img_size: Side | None = field(
        None,
        "Height and width of the images; null: as in training.",
        unit="pixels",
        example=224,
        fingerprint="changed",
    )
    crop_pct: CropShare | None = field(
        None, "Side of the centre crop over the resized side; null: the data's.", example=0.9, fingerprint="changed"
    )


def check_evaluation(entry: EvaluationPart, classes: Sequence[str]) -> None:
    """UserError for images that are not there or are plainly of another kind, and for a model of other classes than
    theirs, as far as their number shows. `classes`: of the model; empty where they are not known.
    """
    assert isinstance(entry, ClassificationEvaluation)
    if entry.on not in IN_FOLDERS:
        return
    if classes and len(classes) != 1000:
        raise UserError(
            f"{entry.on} needs a model of the 1,000 classes of ImageNet-1K; this one has {len(classes):,} "
            f"({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})."
        )
    hint = f"--data FOLDER, where {entry.on} lies: {IN_FOLDERS[entry.on]}."
    if entry.path is None:
        if entry.on == "imagenet-real":
            return
        raise UserError(f"{entry.on} needs the folder of its images.", hint=hint)
    root = Path(os.path.expanduser(entry.path))
    if not root.is_dir():
        raise UserError(
            f"The folder {root} of {entry.on} {'is a file' if root.exists() else 'does not exist'}.", hint=hint
        )
    pattern = LOOKS_LIKE.get(entry.on, r"n\d{8}")
    if pattern and not any(re.fullmatch(pattern, one.name) for one in root.iterdir()):
        raise UserError(f"{root} is not laid out as {entry.on} is.", hint=hint)


def is_image_folder(root: Path) -> bool:
    """Class folders, or tars of them: see data/archive.py."""
    if any(root.glob("train/*.parquet")):
        return False
    return (root / "train").is_dir() or (root / "_info.json").is_file() or any(root.glob("*train*.t*"))


def is_validation_only(root: Path) -> bool:
    if (root / "train").exists() or is_image_folder(root):
        return False
    return (root / "val").is_dir() or any(root.glob("*val*.t*"))


SPEC = Spec(
    name="pretrain",
    help="""Train a classifier from scratch: ImageNet-1K, any folder of images by class, or the embedded digits.

    The same command again goes on where the run stopped. Under torchrun it is the same run on more processes.
    """,
    module=f"{FOLDER}.task",
    heads={"linear": Classes},
    formats={
        "image-folder": Format(
            config=ImageFolder,
            module=f"{FOLDER}.image_folder",
            layout="train/<class>/ and val/<class>/ with the images inside",
            recognise=is_image_folder,
            validation_only=is_validation_only,
        ),
    },
    evaluation=ClassificationEvaluation,
    evaluations={"val": {"when": "training"}},
    further=(*IN_FOLDERS, "knn", "probe", "corruptions"),
    in_folders=tuple(IN_FOLDERS),
    check_evaluation=check_evaluation,
    options=(
        Option(
            "data_order",
            ("--data-order",),
            str,
            "images (default: all are shuffled), or shards: tars are shuffled, then windows; for slow storage.",
            key="data.order",
        ),
    ),
    embedded="digits",
    embedded_note="1,797 real handwritten digits, drawn 32 x 32 on textures",
    default_recipe="imagenet",
    size_keys=("data.img_size",),
    small_recipe="small",
    small_sides=(32, 96),
    data_variable="HCNET_IMAGENET",
    ablation_length=3,
    table="imagenet",
    subject="image classification",
    hub_tags=("image-classification", "timm"),
    metrics=(Metric("top1", "top-1"), Metric("top5", "top-5")),
    figures=(
        Metric("nll", "NLL"),
        Metric("ece", "ECE"),
        Metric("brier", "Brier"),
        *(Metric(f"top1_{on.replace('-', '')}", title) for on, title in SHORT.items()),
    ),
    columns=(
        Column("model", "model"),
        Column("img_size", "image", "integer"),
        Column("params_m", "#params (M)", "number"),
        Column("macs_g", "MACs (G)", "number"),
        Column("images_per_second", "images/s", "short"),
        Column("top1", "top-1", "percent", best=True),
        Column("top5", "top-5", "percent", best=True, secondary=True),
        Column("nll", "NLL", "number", secondary=True, measured_only=True),
        Column("ece", "ECE (%)", "percent", secondary=True, measured_only=True),
        Column("brier", "Brier", "number", secondary=True, measured_only=True),
        *(
            Column(f"top1_{on.replace('-', '')}", title, "percent", secondary=True, measured_only=True)
            for on, title in SHORT.items()
        ),
    ),
    benchmark="imagenet-1k",
    protocols={
        "pretrain/imagenet": "ImageNet-1K val, from scratch",
        "pretrain/imagenet-release": "ImageNet-1K val, from scratch",
    },
    compare_by_image_size=True,
    times_inference=True,
)
