"""`hcnet export`: a trained model as a file for other programs, left only if it computes what the run computed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.export import Dim

from hcnet_cli import build, checkpoint, engine
from hcnet_cli.console import UserError, notice, status_line, warn
from hcnet_cli.data.images import Size
from hcnet_cli.engine import Graph, Task
from hcnet_cli.files import new_folder, replacing, write_text, writing
from hcnet_cli.header import read_metadata
from hcnet_cli.models import backbone as backbones
from hcnet_cli.recipe import Recipe
from hcnet_cli.report.card import run_card
from hcnet_cli.runs import RunFolder, RunInfo

SIZES: tuple[Size, ...] = ((256, 320), (224, 224), (160, 352))  # height, width; tried where a file is for any size
TOLERANCE = 1e-4  # of logits, or relative (see Graph)
OPSET = 20
KEY = "hcnet"  # of the metadata, in every format
LOCAL = "local-dir:FOLDER"
OTHER = {"onnx": "pt2", "pt2": "onnx", "torchscript": "pt2", "timm": "pt2"}  # what to try instead
EXTRA = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
Run = Callable[..., Any]  # of tensors: one, or several


def check_extra(fmt: str) -> None:
    """UserError unless the packages that a format takes are installed. Loads none."""
    if missing := [name for name in EXTRA.get(fmt, ()) if importlib.util.find_spec(name) is None]:
        raise UserError(f"{fmt} needs {', '.join(missing)}.", hint="pip install 'hcnet[export]'")


def export(folder: RunFolder, info: RunInfo, recipe: Recipe, fmt: str, output: Path, features: bool = False) -> None:
    """Writes the best weights of a run to `output` in one of FORMATS; with `features` its backbone, up to the maps.

    The file is compared with the model on images of several sizes, then by the run's score on its validation data,
    which maps have not; it replaces `output` only after that. UserError where the model cannot be written so, or the
    file computes otherwise.
    """
    about = read_metadata(folder.best)
    model = _task(folder, recipe, about).model
    graph = _image_to_maps(model, recipe) if features else _image_to_logits(model)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    own, fixed = _sizes(recipe)
    with status_line() as tell, writing(output), replacing(output) as temporary:
        tell(f"Writing the model as {fmt} (this can take minutes)")
        try:
            size = own if fixed else None
            file, largest = _written(graph, fmt, temporary, size, own, about)
        except UserError:
            if fixed or own is None:
                raise
            size = own  # a graph for every size may leave out small images, whose last map is a single pixel
            file, largest = _written(graph, fmt, temporary, size, own, about)
        score = ""
        if not features:
            tell("Scoring the file on the validation data")
            score = " " + _score(folder, info, recipe, functools.partial(_put, _InPlace(file)))
    sizes = "images of any size" if size is None else f"images of {size[0]} x {size[1]}"
    notice(f"Wrote {output} for {sizes}. Largest difference to PyTorch: {largest:.1e}.{score}")


def export_parts(folder: RunFolder, info: RunInfo, recipe: Recipe, fmt: str, output: Path) -> None:
    """Writes the best weights of a run as a folder: graphs, and the program that says what goes between them.

    Each graph is compared with the model, then the predictions and the scores of all together. UserError as `export`.
    """
    about = read_metadata(folder.best)
    task = _task(folder, recipe, about)
    parts: Any = build.task_part(recipe, "export")
    about |= parts.settings(task)
    files: dict[str, Run] = {}
    differences = []
    with status_line() as tell, new_folder(output) as made:
        for name, graph in parts.graphs(task).items():
            file = f"{name}{ENDINGS[fmt]}"
            tell(f"Writing {file} (this can take minutes)")
            files[name], largest = _written(graph, fmt, made / file, None, None, about)
            differences.append(largest)
        program = Path(parts.PROGRAM.__file__)
        write_text(made / program.name, program.read_text(encoding="utf-8"))
        tell("Scoring the files on the validation data")
        exported = parts.ExportedTask(task, files, about)
        score = _score(folder, info, recipe, exported.in_place_of, parts.DECIMALS)
        compared = exported.compare()
    written = f"{', '.join(f'{name}{ENDINGS[fmt]}' for name in files)} and {program.name}"
    notice(f"Wrote {output}: {written}. Largest difference to PyTorch: {max(differences):.1e}. {compared}{score}")


def export_folder(folder: RunFolder, info: RunInfo, recipe: Recipe, output: Path, load: str = LOCAL) -> str:
    """Writes a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: weights, config, card.

    Returns sentences that say how it compares with the run. `load`: what the card says that timm takes.
    """
    about = read_metadata(folder.best)
    model = _task(folder, recipe, about).model
    try:
        with writing(output):
            output.mkdir(parents=True)
        checkpoint.save_tensors(output / "model.safetensors", model.state_dict())
        write_text(output / "config.json", json.dumps(timm_config(model, about), indent=2) + "\n")
        write_text(output / "README.md", run_card(folder, info, about, load))
        loaded = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
        largest = _compare(_image_to_logits(model), loaded, [(about["img_size"], about["img_size"])], "timm")
        score = _score(folder, info, recipe, functools.partial(_put, loaded))
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return f"Largest difference to the run's model: {largest:.1e}. {score}"


def _task(folder: RunFolder, recipe: Recipe, about: dict[str, Any]) -> Any:
    predictor = build.build_predictor(recipe, [str(name) for name in about["classes"]])
    build.load_own(predictor.task, folder.path)
    return predictor.task.eval().requires_grad_(False)


def _image_to_logits(model: nn.Module, outputs: Sequence[str] = ("logits",)) -> Graph:
    def image(count: int, size: Size, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(count, 3, *size, generator=generator),)

    return Graph(model, ["image"], outputs, image, [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}])


class _Maps(nn.Module):
    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.indices = backbones.Pyramid.of(backbone).indices
        self.backbone = backbone

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone.forward_intermediates(image, indices=self.indices, intermediates_only=True))


def _image_to_maps(model: Any, recipe: Recipe) -> Graph:
    """The maps of the backbone at strides 4 to 32. UserError for a model without."""
    backbone = getattr(model, "backbone", model)
    maker = getattr(backbone, "forward_intermediates", None)
    if maker is None or not backbones.takes_noise(maker):
        backbone = backbones.FeatureMaps(recipe.model.name, backbone)
    names = [f"stride{stride}" for stride in backbones.STRIDES]
    return _image_to_logits(_Maps(backbone), names)._replace(relative=True)


def _sizes(recipe: Recipe) -> tuple[Size | None, bool]:
    """The size of a classifier's images (None for other tasks), and whether its model takes no other."""
    size = getattr(recipe.data, "img_size", None)
    fixed = bool(recipe.model.name and backbones.size_argument(recipe.model.name, size))
    return (size, size) if size else None, fixed


def _written(
    graph: Graph, fmt: str, path: Path, size: Size | None, own: Size | None, about: dict[str, Any]
) -> tuple[Run, float]:
    """Writes a file for images of `size` (None: any), reads it back and compares; (the file, largest difference)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        FORMATS[fmt](graph, path, size, about)
        file = LOADERS[fmt](path)
        tried = [size] if size else [*([own] if own else []), *SIZES]
        return file, _compare(graph, file, tried, fmt)


# --- formats ----------------------------------------------------------------------------------------------------------


def _program(graph: Graph, size: Size | None) -> Any:
    """The exported program, for images of any size or of `size` alone."""
    dynamic = tuple({0: Dim.DYNAMIC} if size else dict(one) for one in graph.dynamic)
    example = graph.example(2, size or SIZES[0], torch.Generator().manual_seed(0))
    try:
        return torch.export.export(graph.module, example, dynamic_shapes=dynamic)
    except Exception as error:  # the exporter raises almost anything
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"This model cannot be exported for images of any size: {reason}.") from None


def _write_pt2(graph: Graph, path: Path, size: Size | None, about: dict[str, Any]) -> None:
    content = {KEY: json.dumps(about)}
    with path.open("wb") as file:
        torch.export.save(_program(graph, size), file, extra_files=content)


def _load_pt2(path: Path) -> Run:
    with path.open("rb") as file:
        module: Run = torch.export.load(file).module()
    return module


def _write_onnx(graph: Graph, path: Path, size: Size | None, about: dict[str, Any]) -> None:
    import onnx

    made: Any = torch.onnx.export(
        _program(graph, size),
        dynamo=True,
        input_names=graph.inputs,
        output_names=graph.outputs,
        opset_version=OPSET,
        verbose=False,
    )
    proto = made.model_proto
    _name_axes(proto.graph)
    onnx.helper.set_model_props(proto, {KEY: json.dumps(about)})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _name_axes(graph: Any) -> None:
    """The symbols of the image's axes (s77, s53, ...) as words, wherever the file uses them."""
    words = {}
    for one in graph.input:
        if one.name == "image":
            axes = zip(one.type.tensor_type.shape.dim, ("batch", "", "height", "width"), strict=True)
            words = {axis.dim_param: word for axis, word in axes if axis.dim_param}
    for one in (*graph.input, *graph.value_info, *graph.output):
        for axis in one.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\w+", lambda found: words.get(found[0], found[0]), axis.dim_param)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*tensors: Tensor) -> Any:
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        made = [torch.from_numpy(one) for one in session.run(None, dict(zip(names, arrays, strict=True)))]
        return made if len(made) > 1 else made[0]

    return run


def _write_torchscript(graph: Graph, path: Path, size: Size | None, about: dict[str, Any]) -> None:
    example = graph.example(2, size or SIZES[0], torch.Generator().manual_seed(0))
    traced: Any = torch.jit.trace(graph.module, example, check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={KEY: json.dumps(about)})


def _load_torchscript(path: Path) -> Run:
    loaded: Run = torch.jit.load(str(path))
    return loaded


FORMATS: dict[str, Callable[[Graph, Path, Size | None, dict[str, Any]], None]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "torchscript": _write_torchscript,
}
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2"}  # of the graphs in a folder
LOADERS: dict[str, Callable[[Path], Run]] = {"onnx": _load_onnx, "pt2": _load_pt2, "torchscript": _load_torchscript}


def timm_config(model: Any, about: dict[str, Any]) -> dict[str, Any]:
    """What timm reads from the config.json of a model on the hub, with the run's preprocessing."""
    size = about["img_size"]
    return {
        "architecture": about["model"],
        "num_classes": len(about["classes"]),
        "num_features": model.num_features,
        "label_names": about["classes"],
        "model_args": about["model_args"],
        "pretrained_cfg": {
            **{key: about[key] for key in ("mean", "std", "interpolation", "crop_pct")},
            "input_size": [3, size, size],
            "num_classes": len(about["classes"]),
            "custom_load": False,
        },
    }


# --- whether it is the same model -------------------------------------------------------------------------------------


@torch.inference_mode()
def _compare(graph: Graph, file: Run, sizes: Sequence[Size], fmt: str) -> float:
    """The largest difference of the outputs for 1, 2 and more images; UserError where it exceeds TOLERANCE."""
    largest, generator = 0.0, torch.Generator().manual_seed(0)
    for count, size in enumerate([*sizes, sizes[0]], 1):
        given = graph.example(count, size, generator)
        expected = graph.module(*given)
        try:
            found = file(*given)
        except Exception as error:  # runtimes raise almost anything
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"The {fmt} file fails on images of {size}: {reason}", hint=f"Use --format {OTHER[fmt]}."
            ) from None
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        difference = max(_difference(*pair, graph.relative) for pair in pairs)
        if not difference <= TOLERANCE:
            raise UserError(
                f"The {fmt} file computes otherwise than the model on images of {size} "
                f"(difference {difference:.1e}), so it was not kept.",
                hint=f"Use --format {OTHER[fmt]}.",
            )
        largest = max(largest, difference)
    return largest


def _difference(found: Tensor, expected: Tensor, relative: bool) -> float:
    if found.shape != expected.shape:
        return float("inf")
    unit = max(1.0, float(expected.abs().max())) if relative else 1.0
    return float((found - expected).abs().max()) / unit


class _InPlace(nn.Module):
    """The file where the task has its model."""

    def __init__(self, file: Run) -> None:
        super().__init__()
        self.file = [file]  # in a list, so that it is no submodule

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.file[0](images))


def _put(model: nn.Module, task: Task) -> Task:
    task.model = model
    return task


def _score(
    folder: RunFolder, info: RunInfo, recipe: Recipe, use_file: Callable[[Task], Task], decimals: int = 2
) -> str:
    """A sentence: the run's score, made again with the file. UserError where it differs in a digit that is shown.

    `use_file`: the task that predicts with the file, from the run's task.
    """
    try:
        data = build.open_data(recipe)
    except UserError as error:
        warn(f"The score was not compared: {error}")
        return "Its score was not compared."
    if data.info.digest != info.data.digest:
        warn(f"The score was not compared: {data.info.path} holds other data than the run was validated on.")
        return "Its score was not compared."
    where = torch.device("cpu")
    task = build.build_task(recipe, data)
    build.load_own(task, folder.path)
    job = build.scoring_job(recipe, data, task, where, info.processes)
    first = job.evaluations[0]
    exported = use_file(first.task)
    metrics, _ = engine.evaluate(job, dataclasses.replace(first, task=exported))
    names = [one.key for one in recipe.spec.metrics if one.key == task.primary or one.in_studies]
    found, recorded = (
        ", ".join(f"{name} {scores[name]:.{decimals}f}" for name in names if name in scores)
        for scores in (metrics, info.metrics)
    )
    if found != recorded:
        raise UserError(f"The file scores {found}, the run {recorded}: it was not kept.")
    return f"On the run's validation data: {found}, as the run."
