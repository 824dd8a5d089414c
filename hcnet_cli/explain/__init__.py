"""Pictures of what the heat layers of a trained run do: `hcnet explain RUN`.

Four pictures, their captions and the numbers behind them: learned stencils, conduction rates, the transfer function of
the heat steps, and how far receptive fields and heat spread. Equal runs give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hcnet_cli import build
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, notice
from hcnet_cli.data.identity import file_peak
from hcnet_cli.data.images import (
    UnusableImageError,
    bits_of,
    normalise,
    read_image,
    rescale,
    resize,
    to_picture,
    to_tensor,
)
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.explain import beside
from hcnet_cli.explain.captions import captions
from hcnet_cli.explain.heat import area, heat_steps, measure, receptive_field, windows
from hcnet_cli.explain.pictures import draw
from hcnet_cli.files import replacing, writing
from hcnet_cli.models import HcNet
from hcnet_cli.models.backbone import FeatureMaps
from hcnet_cli.pictures import enlarged, panel, sheet
from hcnet_cli.recipe import Recipe
from hcnet_cli.report.escape import in_markdown, to_json
from hcnet_cli.runs import RunFolder, RunInfo, with_paths, with_weights
from hcnet_cli.sizes import SIZES
from hcnet_cli.tasks.classification import augment
from hcnet_cli.tasks.classification.spec import ClassificationEvaluation, ImageFolder
from hcnet_cli.weights import load_into

MAX_IMAGES = 16


def explain(run: Path, image: Path | None = None, out: Path | None = None, model: str | None = None) -> list[Path]:
    """Writes pictures of the run's best weights, captions.md and explain.json to `out` (RUN/explain).

    Rates and receptive fields are measured on up to MAX_IMAGES validation images of the run's data, or on `image`. Of a
    model without conduction only the receptive fields are drawn. `model`: FILE.py:FUNCTION of a run whose model a file
    of the user's own makes. UserError: no run, no weights, no HcNet, no data, no image.
    """
    info, recipe, backbone = load(run, model)
    images, source = _one_image(recipe, info, image) if image else _validation_images(recipe, info)
    folder = out or run / "explain"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    steps = heat_steps(backbone, images)
    if not steps:
        notice("This model has no heat conduction (it is disabled): only the receptive fields are drawn.")
    fields = receptive_field(lambda x: backbone.forward_intermediates(x, intermediates_only=True), windows(images))
    found = {"disabled": list(backbone.disable), **measure(steps, fields)}
    variant = f" ({info.variant})" if info.variant else ""
    name = recipe.model.label if recipe.model.name else SIZES[info.size].timm_name
    label = f"{name}{variant} · {info.task} on {info.data.name} · measured on {source}"
    texts = captions(found)
    sections = [f"\n## {name[2:].capitalize()}\n\n![{name}]({name}.png)\n\n{text}\n" for name, text in texts.items()]
    about = {"run": run.resolve().name, "model": label, "step": info.best_step, "images": len(images)}
    made = {"0-photo.png": _photo(recipe, images[0], source)} if image else {}
    made |= {f"{name}.png": content for name, content in draw(found, label).items()}
    for stage in found["stages"]:
        del stage["receptive_field"]["field"]  # one number per pixel: the picture shows it better
    made["captions.md"] = f"# Inside the heat layers\n\n{in_markdown(label)}\n{''.join(sections)}".encode()
    made["explain.json"] = to_json(_rounded({**about, "captions": texts, **found}), indent=None).encode()
    return _write(folder, made)


def compare(runs: Sequence[Path], image: Path | None, out: Path, model: str | None = None) -> list[Path]:
    """Writes receptive-fields.png and .json of the best weights of several runs, with any backbones, to `out`.

    All see the same images: `image`, or validation images of the first run's data. `model`: FILE.py:FUNCTION of runs
    whose model a file of the user's own makes.
    """
    rows, numbers = [], []
    images: list[Tensor] = []
    for run in runs:
        folder = RunFolder(run)
        own = model if (folder.require()).model_file else None
        info, recipe = with_weights(folder, own)
        if not images:
            images, source = _one_image(recipe, info, image) if image else _validation_images(recipe, info)
        backbone: Any = build.build_backbone(recipe, 0)
        state = build.read_init(str(run))[1]
        inner = backbone.model if isinstance(backbone, FeatureMaps) else backbone
        if isinstance(backbone, FeatureMaps) and not any("pyramid" in name for name in state):
            backbone.pyramid = None  # of a classifier: the model's own map, not one of random weights
        report = load_into(inner, state, str(folder.best), _without("backbone.model." if inner is not backbone else ""))
        if lacking := [name for name in (*report.missing, *report.reinitialised) if not name.startswith("norm")]:
            raise UserError(f"{folder.best} does not fit {folder.recipe_file}: it lacks {', '.join(lacking[:3])}.")
        if hasattr(backbone, "set_grad_checkpointing"):
            backbone.set_grad_checkpointing(False)
        fields = beside.measured(backbone.eval().requires_grad_(False), images)
        variant = f" ({info.variant})" if info.variant else ""
        name = f"{recipe.model.label}{variant} · {info.task} on {info.data.name}, seed {info.seed}"
        rows.append((name, fields))
        areas = [{str(share): area(field, share / 100) for share in (50, 80, 95, 99)} for field in fields]
        numbers.append({"run": run.resolve().name, "model": name, "pixels": list(fields[0].shape), "area": areas})
    made = {
        "receptive-fields.png": beside.draw(rows, f"measured on {source}"),
        "receptive-fields.json": to_json(numbers, indent=1).encode(),
    }
    return _write(out, made)


def _without(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """State dicts with a prefix taken from the names that have it."""
    return lambda state: {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _write(folder: Path, made: Mapping[str, bytes]) -> list[Path]:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():  # each file whole: the report's page may read it at any time
        with writing(folder / name), replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in made]


def _rounded(value: Any) -> Any:
    """Plain lists, and numbers of 6 significant digits: more than a picture shows."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, (float, np.floating)) else value


def load(run: Path, model: str | None = None) -> tuple[RunInfo, Recipe, HcNet]:
    """Record, recipe and backbone (best weights, evaluation mode) of a run of any task. Its data are not needed.

    `model`: FILE.py:FUNCTION, without which a file of the user's own does not run.
    """
    folder = RunFolder(run)
    info = folder.require_weights()
    recipe = with_paths(folder, rcp.resolve(folder.recipe_file).recipe, model, None)
    known_other = recipe.model.name and not recipe.model.digest  # a model of timm need not be built to be refused
    backbone: Any = None if known_other else build.build_backbone(recipe, 0)
    if not isinstance(backbone, HcNet):
        raise UserError(
            f"{run} is of {recipe.model.name}: only HcNet has heat layers to explain.",
            hint="Receptive fields of any model: hcnet explain RUN RUN --out FOLDER",
        )
    report = load_into(backbone, build.read_init(str(run))[1], str(folder.best))
    lacking = [name for name in (*report.missing, *report.reinitialised) if not name.startswith("norm.")]
    if lacking:  # apart from the classifier's final norm, which nothing here uses
        raise UserError(
            f"{folder.best} does not fit the model in {folder.recipe_file}: it lacks {', '.join(lacking[:3])}."
        )
    parts = {name.split(".")[0] for name in backbone.state_dict()} - {"norm"}
    further = [name for name in report.unexpected if name.removeprefix("backbone.").split(".")[0] in parts]
    if further:
        raise UserError(
            f"{folder.best} does not fit the model in {folder.recipe_file}: that has no {', '.join(further[:3])}."
        )
    backbone.set_grad_checkpointing(False)
    return info, recipe, backbone.eval().requires_grad_(False)


def _validation_images(recipe: Recipe, info: RunInfo) -> tuple[list[Tensor], str]:
    """Up to MAX_IMAGES images [3, H, W] as evaluation sees them, evenly spread over the validation images."""
    try:
        data: Any = build.open_data(recipe)
        if isinstance(recipe.data, ImageFolder):
            data.val = data.val.with_transform(_transform(recipe))
        chosen = np.linspace(0, len(data.val) - 1, min(MAX_IMAGES, len(data.val))).round()
        items = [data.val[SampleRequest(int(index), 0, 0)] for index in chosen]
    except UserError as error:
        raise UserError(
            f"The validation images of this run cannot be used: {error}",
            hint="Name an image file instead: hcnet explain RUN --image FILE",
        ) from None
    if isinstance(recipe.data, ImageFolder):
        images = _normalised(recipe.data, items)
    else:
        images = [item["images"][0] if "images" in item else item["image"] for item in items]
    return images, f"{len(images)} validation image{'s' * (len(images) > 1)}"


def _photo(recipe: Recipe, image: Tensor, name: str) -> bytes:
    """A PNG of the image [3, H, W] that was measured on, as the model got it."""
    config: Any = recipe.data
    shown = enlarged(to_picture(image, config.mean, config.std))
    content = io.BytesIO()
    size = f"{image.shape[2]} x {image.shape[1]}, as the model gets it"
    sheet([panel(shown, "image")], f"{name}: {size}").save(content, "PNG")
    return content.getvalue()


def _normalised(config: ImageFolder, items: list[dict[str, Any]]) -> list[Tensor]:
    return list(augment.Normalise(config.mean, config.std)(augment.collate(items)))


def _transform(recipe: Recipe) -> augment.Transform:
    """What a classifier's evaluation makes of an image, in the size of the first entry of `evaluation`."""
    config, entry = recipe.data, next(iter(recipe.evaluation.values()))
    assert isinstance(config, ImageFolder)
    assert isinstance(entry, ClassificationEvaluation)
    return augment.eval_transform(
        img_size=entry.img_size or config.img_size,
        crop_pct=entry.crop_pct or config.crop_pct,
        interpolation=config.interpolation,
    )


def _one_image(recipe: Recipe, info: RunInfo, file: Path) -> tuple[list[Tensor], str]:
    """The image in `file` as the run's evaluation would see it: [3, H, W]. Of more than 8 bits where the run's are not:
    with as many as it uses.
    """
    config: Any = recipe.data
    try:
        bits = info.data.bits or config.bits or bits_of(file_peak(file, config.max_pixels))
        image = read_image(file, bits=bits, max_pixels=config.max_pixels)
    except UnusableImageError as error:
        raise UserError(str(error)) from None
    if isinstance(config, ImageFolder):
        return _normalised(config, [_transform(recipe)(image)]), file.name
    size = rescale((image.height, image.width), config.img_scale)
    return [normalise(resize(to_tensor(image), size), config.mean, config.std)], file.name
