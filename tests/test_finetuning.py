"""Protects what fine-tuning adds: frozen parts, layer-wise rates, averages, patience, and losses for skewed classes."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import small_data
import timm
import torch
import torch.nn.functional as F
from conftest import Hcnet, outcome
from PIL import Image
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from synthetic_runs import make_run
from test_engine import Regression, make_job
from test_other_models import MY_NET, TASKS, arguments, data, here, stopped_at_step_2, untimed
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from hcnet_cli import engine, optim, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, units
from hcnet_cli.data.balance import class_counts, class_weights
from hcnet_cli.engine.profiler import Profiler
from hcnet_cli.engine.step import Stepper
from hcnet_cli.header import read_metadata
from hcnet_cli.models import backbone, layers
from hcnet_cli.pretrained import best_pretraining
from hcnet_cli.runs import RunFolder
from hcnet_cli.tasks.classification.loss import ClassLoss
from hcnet_cli.tasks.segmentation.task import SegmentationTask
from hcnet_cli.tasks.segmentation.upernet import UPerNet

__all__ = ["data", "here", "untimed"]  # fixtures
HCNET = ("--set", "model.depths=[1,1,2,1]", "--set", "model.dims=[8,8,16,16]")


def words(task: str, model: str, data: dict[str, Path], *more: str) -> list[str]:
    """A training command; "" is HcNet."""
    if model:
        return arguments(task, model, data, *more)
    return [task, *HCNET, "--set", "model.drop_path_rate=0.5", *TASKS[task], "--data", str(data[task]), *more]


def parts(weights: dict[str, torch.Tensor], pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(those whose name matches, the others)."""
    matching = {name: value for name, value in weights.items() if re.match(pattern, name)}
    return matching, {name: value for name, value in weights.items() if name not in matching}


# --- freezing ---------------------------------------------------------------------------------------------------------

FROZEN = {  # task, model, --freeze -> names of all that must stay, statistics of batch norm among them
    ("pretrain", "", "1"): r"stem|stages\.0",
    ("pretrain", "resnet18", "backbone"): r"(?!fc)",
    ("pretrain", "vit_tiny_patch16_224", "1"): r"cls_token|pos_embed|patch_embed|blocks\.0",
    ("finetune-det", "", "backbone"): r"backbone",
    ("finetune-det", "resnet18", "2"): r"backbone\.model\.(conv1|bn1|layer[12])",
}


@pytest.mark.parametrize(("task", "model", "what"), FROZEN)
def test_what_is_frozen_stays_and_the_rest_is_trained(
    task: str, model: str, what: str, data: dict[str, Path], here: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from weights that training left before; interrupted and continued, the run is the same."""
    none = () if task == "pretrain" else ("--init", "none")
    first = hcnet(*words(task, model, data, *none, "--name", "start"))
    assert first.code == 0, first.err
    line = words(task, model, data, "--init", "results/runs/start", "--freeze", what, "--name", "frozen")
    line += ["--seed", "1", "--set", "optim.weight_decay=0.5"]
    done = hcnet(*line)
    assert done.code == 0, done.err
    before, after = (load_file(here / f"results/runs/{name}/best.safetensors") for name in ("start", "frozen"))
    same, trained = parts(after, FROZEN[task, model, what])
    assert same
    assert all(torch.equal(value, before[name]) for name, value in same.items())
    assert {name for name, value in trained.items() if torch.equal(value, before[name])} <= {
        name for name in trained if "running" in name or "num_batches" in name
    }
    kept = parts(load_file(here / "results/runs/frozen/last/optimizer.safetensors"), FROZEN[task, model, what])
    assert kept[0] == {}
    info = runs.read_record(here / "results/runs/frozen/run.json")
    numbers = sum(value.numel() for name, value in trained.items() if "running" not in name and "num_" not in name)
    assert info.params_trained == numbers
    assert numbers < info.params
    assert f"{units(numbers, 1e6)} M of them trained" in done.err
    if what == "backbone":
        return
    again = [*line, "--name", "again"]
    stopped_at_step_2(monkeypatch, lambda: hcnet(*again))
    assert hcnet(*again).code == 0
    assert outcome(here / "results/runs/again") == outcome(here / "results/runs/frozen")


@pytest.mark.parametrize(
    ("name", "what", "frozen"),
    [
        ("hcnet_pico", 0, r"stem"),
        ("hcnet_pico", 4, r"stem|stages"),
        ("hcnet_pico", "backbone", r"(?!head\.fc)"),
        ("swin_tiny_patch4_window7_224", 2, r"patch_embed|layers\.[01]"),
        ("convnext_atto", 1, r"stem|stages\.0"),
        ("convnext_atto", "backbone", r"(?!head\.fc)"),
        ("vit_tiny_patch16_224", 11, r"cls_token|pos_embed|patch_embed|blocks\.(\d|10)\."),
        ("efficientnet_b0", 3, r"conv_stem|bn1|blocks\.[012]"),
        ("pvt_v2_b0", 1, r"patch_embed|stages\.0"),
    ],
)
def test_the_frozen_parts_of_families(name: str, what: str | int, frozen: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    layers.freeze(model, what)
    assert all(one.requires_grad != bool(re.match(frozen, key)) for key, one in model.named_parameters())
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training != bool(re.match(frozen, key))


def test_no_graph_is_kept_in_front_of_what_is_trained() -> None:
    model = UPerNet(backbone.create("resnet18", 0, {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}), 3, channels=8)
    layers.freeze(model, 2)  # maps come from layer1, layer2, layer3 and layer4
    maps = model.backbone.forward_intermediates(torch.zeros(2, 3, 64, 64))
    assert [one.requires_grad for one in maps] == [False, False, True, True]


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("my_net.py:build", "1", "MyNet does not say what its stages are: it has no group_matcher"),
        ("my_net.py:build", "backbone", "MyNet does not say which layer is its head"),
        ("resnet18", "5", "train.freeze: ResNet has 4 stages, not 5"),
        ("", "stem", "it takes none or backbone, or a whole number from 0 to 1,000"),
    ],
)
def test_what_cannot_be_frozen_is_refused_in_a_sentence(
    name: str, what: str, words: str, data: dict[str, Path], here: Path, hcnet: Hcnet
) -> None:
    done = hcnet(*words_of(name, data), "--freeze", what)
    assert (done.code, words in done.err, "Traceback" in done.err) == (2, True, False), done.err


def words_of(name: str, data: dict[str, Path], *more: str) -> list[str]:
    return words("pretrain", name, data, *more)


# --- layer-wise rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["hcnet_pico", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "efficientnet_b0"]
)
def test_rates_of_layers_are_timms(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    expected = {
        id(one): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.7)
        for one in group["params"]
    }
    ours = layers.learning_rate_scales(model, 0.7)
    assert {id(one): ours[name] for name, one in model.named_parameters()} == pytest.approx(expected)


def test_rates_of_layers_counted_by_hand() -> None:
    """HcNet with 1, 1, 2 and 1 blocks in segmentation: a stem, five blocks (a downsampling belongs to the block behind
    it), and the head, whose rate is whole.
    """
    model = UPerNet(timm.create_model("hcnet_pico", num_classes=0, depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)), 3)
    by_hand = {
        "backbone.stem": 0.5**6,
        "backbone.stages.0.blocks.0": 0.5**5,
        "backbone.stages.1.downsample": 0.5**4,
        "backbone.stages.1.blocks.0": 0.5**4,
        "backbone.stages.2.downsample": 0.5**3,
        "backbone.stages.2.blocks.0": 0.5**3,
        "backbone.stages.2.blocks.1": 0.5**2,
        "backbone.stages.3.downsample": 0.5,
        "backbone.stages.3.blocks.0": 0.5,
        "norms": 1.0,
        "decode_head": 1.0,
        "auxiliary_head": 1.0,
    }
    made = optim.build_optimizer(
        model, name="sgd", args={}, lr=0.1, weight_decay=0.05, no_decay="1d",
        scales=layers.learning_rate_scales(model, 0.5),
    )  # fmt: skip
    names = {one: name for name, one in model.named_parameters()}
    seen = set()
    for group in made.param_groups:
        for one in group["params"]:
            (prefix,) = [key for key in by_hand if names[one].startswith(f"{key}.")]
            assert group.get("lr_scale", 1.0) == by_hand[prefix], names[one]
            assert group["weight_decay"] == (0.05 if one.ndim > 1 else 0.0)
            seen.add(names[one])
    assert seen == set(names.values())


def test_a_step_moves_each_layer_by_its_rate() -> None:
    """SGD: the change of a parameter is its rate times its gradient."""
    changes = []
    for scales in ({}, {"0.weight": 0.25, "0.bias": 0.25}):
        task = Regression(dropout=0.0)
        job = make_job(task, ema=False)
        job.clip_grad = None
        job.optimizer = optim.build_optimizer(
            task.model, name="sgd", args={}, lr=0.02, weight_decay=0.0, no_decay="1d", scales=scales
        )
        before = {name: value.clone() for name, value in task.model.state_dict().items()}
        Stepper(job, Profiler(job, Path(), 0)).step(4, [next(job.train.iterate(0))])
        changes.append({name: value - before[name] for name, value in task.model.state_dict().items()})
    for name, whole in changes[0].items():
        torch.testing.assert_close(changes[1][name], whole * (0.25 if name.startswith("0.") else 1.0))
        assert whole.abs().max() > 0


# --- resume, accumulation, processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("pretrain", ("head.loss=focal", "head.class_weights=balanced")),
        ("finetune-det", ()),
        ("finetune-seg", ("train.freeze=1", "head.class_weights=balanced")),
    ],
)
def test_interrupted_is_as_uninterrupted(
    task: str,
    settings: tuple[str, ...],
    data: dict[str, Path],
    here: Path,
    hcnet: Hcnet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, with rates by layer and an average, which is what is evaluated, kept and said."""
    common = ("optim.layer_decay=0.75", "train.ema_decay=0.5")
    more = [word for one in (*common, *settings) for word in ("--set", one)]
    line = words(task, "", data, *more, *(() if task == "pretrain" else ("--init", "none")))
    whole = hcnet(*line, "--name", "whole")
    assert whole.code == 0, whole.err
    assert "the moving average (train.ema_decay 0.5) is evaluated and kept as best.safetensors" in whole.err
    stopped_at_step_2(monkeypatch, lambda: hcnet(*line, "--name", "again"))
    assert hcnet(*line, "--name", "again").code == 0
    assert outcome(here / "results/runs/again") == outcome(here / "results/runs/whole")
    run = here / "results/runs/whole"
    best, average, last = (load_file(run / name) for name in BEST_AVERAGE_LAST)
    assert all(torch.equal(best[name], value) for name, value in average.items())
    assert not all(torch.equal(best[name], value) for name, value in last.items())
    assert read_metadata(run / "best.safetensors")["ema_decay"] == 0.5


BEST_AVERAGE_LAST = ("best.safetensors", "last/ema.safetensors", "last/model.safetensors")


def test_two_processes_are_one(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    """With a frozen front, rates by layer, an average and weighted classes."""
    more = ("--freeze", "1", "--set", "optim.layer_decay=0.75", "--set", "train.ema_decay=0.5")
    more += ("--set", "head.class_weights=[0.5,2]", "--set", "model.drop_path_rate=0.0")
    fresh.run_two(*words("pretrain", "resnet18", data, *more, "--name", "two"))
    assert hcnet(*words("pretrain", "resnet18", data, *more, "--accumulate", "2", "--name", "one")).code == 0
    two, one = (load_file(here / f"results/runs/{name}/best.safetensors") for name in ("two", "one"))
    for name, value in two.items():
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-6, msg=name)
    frozen = parts(two, r"conv1|bn1|layer1")[0]
    assert all(torch.equal(value, one[name]) for name, value in frozen.items())


# --- patience ---------------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_that_is_then_finished(
    data: dict[str, Path], here: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this learning rate no score improves: the first evaluation is the best, and two more end the run."""
    line = words("pretrain", "", data, "--lr", "1e-30", "--set", "schedule.length=9", "--set", "train.eval_every=1")
    line += ["--set", "train.patience=2"]
    done = hcnet(*line, "--name", "whole")
    assert done.code == 0, done.err
    assert "Stopped early at step 3 of 9: no better score (train.patience)." in done.err
    info = runs.read_record(here / "results/runs/whole/run.json")
    assert (info.status, info.steps_done, info.stopped_early) == ("finished", 3, True)
    stopped_at_step_2(monkeypatch, lambda: hcnet(*line, "--name", "again"))
    assert hcnet(*line, "--name", "again").code == 0
    assert outcome(here / "results/runs/again") == outcome(here / "results/runs/whole")
    assert "This run is finished" in hcnet(*line, "--name", "again").err
    shutil.rmtree(here / "results/runs/again")
    report = " ".join(hcnet("report").out.split())
    assert "stopped early at step 3 of 9" in report
    assert "cut short" not in report


@pytest.mark.parametrize("seed", range(5))
def test_patience_is_a_function_of_the_recorded_scores(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definition, wherever the run is interrupted: stop after 2 evaluations in a row that are not above the
    best before them.
    """
    scores = np.random.RandomState(seed).randint(0, 4, 12).astype(float)
    scores = np.sort(scores) if seed == 0 else scores  # rises, but for plateaus
    expected = next((2 * n for n in range(3, 13) if all(scores[i] <= max(scores[: n - 2]) for i in (n - 2, n - 1))), 24)

    def scripted(job: engine.Job, *_: Any) -> tuple[dict[str, float], Any]:
        return {"score": scores[position[0] // 2 - 1]}, job.task.evaluator()

    position = [0]
    for name, pauses in (("whole", ()), ("paused", (1, 2, 5, 8))):
        folder = tmp_path / name
        for pause in (*pauses, None):
            task = Regression()
            task.at_step = (lambda at: lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == at else None)(pause)
            folder.mkdir(exist_ok=True)
            job = make_job(task, total=24, eval_every=2)
            job.patience = 2
            state = engine.restore(job, folder)
            step = Stepper.step

            def counted(self: Stepper, number: int, batches: Any, step: Any = step) -> Any:
                position[0] = number + 1
                return step(self, number, batches)

            with monkeypatch.context() as patch:
                patch.setattr("hcnet_cli.engine.loop.evaluate", scripted)
                patch.setattr(Stepper, "step", counted)
                engine.fit(job, RunFolder(folder), state, lambda _: None)
        assert state.step == expected


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 2


TARGET = torch.tensor([0, 1, 2, 2, 1, 0])
WEIGHTS, COUNTS = [0.5, 1.0, 4.0], [60, 30, 10]


def test_losses_equal_their_equations(logits: torch.Tensor) -> None:
    """Lin et al. 2017, equation 5, with p of softmax; Ren et al. 2020, equation 4. Written out, sample by sample."""
    focal = balanced = weighted = 0.0
    for z, y in zip(logits.double().tolist(), TARGET.tolist(), strict=True):
        p = math.exp(z[y]) / sum(map(math.exp, z))
        focal += -WEIGHTS[y] * (1 - p) ** 1.5 * math.log(p) / 6
        weighted += -WEIGHTS[y] * math.log(p) / 6
        shifted = [n * math.exp(one) for n, one in zip(COUNTS, z, strict=True)]
        balanced += -math.log(shifted[y] / sum(shifted)) / 6
    assert ClassLoss(gamma=1.5, weights=WEIGHTS)(logits, TARGET).item() == pytest.approx(focal, rel=1e-5)
    assert ClassLoss(weights=WEIGHTS)(logits, TARGET).item() == pytest.approx(weighted, rel=1e-5)
    assert ClassLoss(counts=COUNTS)(logits, TARGET).item() == pytest.approx(balanced, rel=1e-5)


def test_losses_equal_torchs_where_torch_has_them(logits: torch.Tensor) -> None:
    smooth = ClassLoss(smoothing=0.1)(logits, TARGET)
    torch.testing.assert_close(smooth, F.cross_entropy(logits, TARGET, label_smoothing=0.1))
    soft = torch.eye(3)[TARGET] * 0.7 + 0.1
    torch.testing.assert_close(ClassLoss()(logits, soft), F.cross_entropy(logits, soft))
    torch.testing.assert_close(ClassLoss(counts=[7, 7, 7])(logits, TARGET), F.cross_entropy(logits, TARGET))
    whole = F.cross_entropy(logits, TARGET, torch.tensor(WEIGHTS), label_smoothing=0.1, reduction="sum") / 6
    torch.testing.assert_close(ClassLoss(smoothing=0.1, weights=WEIGHTS)(logits, TARGET), whole)
    margin, two = logits[:, 0], torch.stack([torch.zeros(6), logits[:, 0]], dim=1)  # softmax of two is a sigmoid
    truth = TARGET % 2
    sigmoid = sigmoid_focal_loss(margin, truth.float(), alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(ClassLoss(gamma=2.0)(two, truth), sigmoid)


def test_micro_batches_average_to_the_batch(logits: torch.Tensor) -> None:
    loss = ClassLoss(gamma=2.0, weights=WEIGHTS)
    halves = (loss(logits[:3], TARGET[:3]) + loss(logits[3:], TARGET[3:])) / 2
    torch.testing.assert_close(loss(logits, TARGET), halves)
    task = SegmentationTask(nn.Identity(), "abc", class_weights=WEIGHTS)
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    label = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    label[0, :2] = 255
    each = [task.pixel_loss(maps[i : i + 1], label[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(task.pixel_loss(maps, label), sum(each) / 2)
    by_hand = sum(
        -WEIGHTS[y] * maps[b, :, i, j].log_softmax(0)[y].item()
        for b in range(2) for i in range(4) for j in range(4) if (y := int(label[b, i, j])) < 3
    )  # fmt: skip
    assert task.pixel_loss(maps, label).item() == pytest.approx(by_hand / label.numel(), rel=1e-5)


def test_balanced_weights_are_scikit_learns(data: dict[str, Path], tmp_path: Path) -> None:
    """Images of classes, and pixels of the training labels without those that are ignored."""
    skewed = small_data.classes(tmp_path / "skewed")
    for number in range(5):
        small_data.save(skewed / f"train/a/more{number}.bmp", 50 + number)
    images = small_data.opened(skewed)
    assert class_counts(images).tolist() == [7, 2]
    y = np.repeat([0, 1], [7, 2])
    expected = compute_class_weight("balanced", classes=np.unique(y), y=y)
    np.testing.assert_allclose(class_weights("balanced", images), expected)
    scenes = small_data.opened(data["finetune-seg"])
    labels = [np.asarray(Image.open(file)) for file in (data["finetune-seg"] / "annotations/training").iterdir()]
    pixels = np.concatenate([label.ravel() for label in labels])
    pixels = pixels[pixels > 0]  # 0 is ignored, 1 .. 3 are classes
    expected = compute_class_weight("balanced", classes=np.unique(pixels), y=pixels)
    np.testing.assert_allclose(class_weights("balanced", scenes), expected)
    assert class_weights("none", scenes) == ()
    with pytest.raises(UserError, match=r"The data have 3 classes, and head.class_weights has 2 numbers"):
        class_weights((1.0, 2.0), scenes)


def test_the_record_has_the_weights_and_one_correction_is_enough(
    data: dict[str, Path], here: Path, hcnet: Hcnet
) -> None:
    line = words("pretrain", "", data, "--name", "run", "--set", "head.class_weights=[0.5,2]")
    assert "from 0.5 to 2" in hcnet(*line).err
    assert runs.read_record(here / "results/runs/run/run.json").class_weights == [0.5, 2.0]
    both = hcnet(*line, "--set", "head.loss=balanced-softmax")
    assert both.code == 2
    assert "corrects for the same skew as the loss balanced-softmax" in both.err


# --- what cannot have been meant --------------------------------------------------------------------------------------


def test_what_has_no_effect_or_is_a_slip_is_said(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    more = ("--freeze", "backbone", "--set", "optim.layer_decay=0.8", "--set", "head.focal_gamma=3")
    more += ("--set", "train.ema_decay=0.9999", "--set", "train.patience=4")
    said = " ".join(hcnet(*words("pretrain", "", data, *more, "--dry-run")).err.split())
    for words_ in (
        "optim.layer_decay has no effect: train.freeze is backbone",
        "head.focal_gamma has no effect: the loss is cross-entropy",
        "train.ema_decay 0.9999 is for longer runs: after 3 steps 100% of the average is what training started from",
        "train.patience has no effect",
        "Random weights are frozen (train.freeze backbone)",
    ):
        assert words_ in said, said


# --- docs/finetuning.md -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs/finetuning.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def own_net() -> str:
    """A model of the user's own, with the methods that the page shows."""
    (methods,) = re.findall(r"```python\nclass .*?\n(.*?)```", PAGE, flags=re.DOTALL)
    return MY_NET.replace("    def forward(self, x):", f"{methods}\n    def forward(self, x):")


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_runs(
    line: str, data: dict[str, Path], here: Path, hcnet: Hcnet, own_net: str
) -> None:
    """As far as its plan, on small data and, where the command names no model, with a small HcNet."""
    (here / "my_net.py").write_text(own_net)
    _, task, *rest = shlex.split(line)
    start = words("pretrain", "", data, "--name", "start", "--set", "schedule.length=1", "--set", "train.eval_every=1")
    if "results/runs/start" in rest:
        assert hcnet(*start).code == 0
    rest = [word for word in rest if word != "--dry-run"]
    more = () if "--model" in rest else HCNET
    small = ("--recipe", "digits", "--set", "train.batch_size=4") if task == "ablate" else TASKS[task]
    folder = data["pretrain" if task == "ablate" else task]
    if "data.folds=5" in rest:  # more images than folds
        folder = shutil.copytree(folder, here / "more")
        for image in list((folder / "train").rglob("*.*")):
            for number in range(4):
                shutil.copy(image, image.with_stem(f"{image.stem}-{number}"))
    none = ("--init", "none") if task.startswith("finetune") else ()
    done = hcnet(task, *small, *more, *none, *rest, "--data", folder, "--dry-run")
    assert done.code == 0, done.err
    if "--freeze" in rest:
        assert "of them trained" in done.out
    if "--sweep" in rest:
        assert "lr=0.003" in done.out


def test_auto_compares_scores_on_one_data_set_alone(tmp_path: Path) -> None:
    """The most training images first; of data sets with as many, the one that was trained on last."""

    def pretrained_on(data: str, images: int, name: str, score: float, finished: str) -> None:
        run = make_run(tmp_path, name=name, score=score, finished=finished, log=False)
        record = json.loads((run / "run.json").read_text())
        record["data"] |= {"name": data, "digest": data, "num_train": images}
        (run / "run.json").write_text(json.dumps(record))
        (run / "best.safetensors").touch()

    recipe = rcp.resolve(rcp.recipes_dir() / "finetune-det/digit-scenes.yaml").recipe
    for name, expected in (
        (("few", 10, "a", 99.0, "2026-01-03"), "a"),
        (("old", 20, "b", 98.0, "2026-01-01"), "b"),
        (("new", 20, "c", 50.0, "2026-01-02"), "c"),
        (("new", 20, "d", 60.0, "2026-01-01"), "d"),
        (("new", 20, "e", 40.0, "2026-01-04"), "d"),
    ):
        pretrained_on(*name)
        assert best_pretraining(recipe, tmp_path) == str(tmp_path / "runs" / expected)
