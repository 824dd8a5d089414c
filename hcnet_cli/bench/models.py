"""`hcnet bench`: models timed side by side in one process, the contenders taking turns.

What is measured and how: docs/speed.md.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from hcnet_cli import kernels, model_names, optim, profile, rng
from hcnet_cli.bench.choices import PLAIN, REFERENCE, choices, unknown
from hcnet_cli.bench.turns import Stopped, cores_of_others, stoppable, take_turns
from hcnet_cli.console import UserError, about, status_line, warn
from hcnet_cli.device import pick_device, pick_precision, warn_of_emulation
from hcnet_cli.models import HcNet, backbone, remap_official_state_dict
from hcnet_cli.models.literal import ReferenceHcNet
from hcnet_cli.own_model import is_own
from hcnet_cli.sizes import SIZES

Turn = Callable[[], "tuple[float, float | None] | None"]  # images/s, ms at batch 1 in inference; None once it failed
SECONDS = {"rate": 0.5, "latency": 0.15}  # about what a contender gets of a round, but one pass at least
WARM_UP = 3  # passes: compilation, choice of kernels, the optimizer's state


@dataclass(frozen=True)
class Settings:
    batch_size: int
    img_size: int
    rounds: int
    device: torch.device
    threads: int = 1  # of PyTorch on the CPU


def settings(batch_size: int, img_size: int, rounds: int, device: str, threads: int | None) -> Settings:
    """The settings of a bench; CPU threads are set for the process."""
    if threads is not None:
        torch.set_num_threads(threads)
    return Settings(batch_size, img_size, rounds, pick_device(device), torch.get_num_threads())


@dataclass(eq=False)
class Contender:
    """A model in one form, and what was measured of it. Lists have an entry for each round."""

    model: str
    mode: str  # of MODES
    precision: str
    compiled: bool
    layout: str = ""
    params: int | None = None
    macs: int | None = None  # of one image, forward
    peak_bytes: int | None = None  # of one pass or step, see profile.peak_allocation
    rates: list[float] = field(default_factory=list)  # images/s
    latencies: list[float] = field(default_factory=list)  # ms at batch 1
    kernels: list[str] = field(default_factory=list)  # what kernels.accelerate did
    prepare_seconds: float = 0.0  # to build, compile and warm up
    turn_seconds: float = 0.0  # of a round, about
    error: str = ""

    @property
    def form(self) -> str:
        return f"{self.precision} {'compiled' if self.compiled else 'eager'}"


@dataclass
class Measurement:
    """One bench. `matmul`: GFLOP/s of a matrix product in each precision, by mode and round."""

    settings: Settings
    contenders: list[Contender]
    matmul: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    others: float | None = None  # cores that other processes took while the clock ran
    stopped: int = 0  # the number of the signal that ended it

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(c.mode for c in self.contenders))

    def of(self, mode: str) -> list[Contender]:
        return [c for c in self.contenders if c.mode == mode]


# --- what is asked for ------------------------------------------------------------------------------------------------


def contenders(models: str, modes: str, precisions: str, compiled: bool) -> list[Contender]:
    """The cross product of comma lists; with `compiled` each form twice. UserError for a name nobody knows."""
    asked = choices(models, modes, precisions)
    for name in asked.models:
        plain = name.removesuffix(PLAIN)
        if plain != REFERENCE and not timm.is_model(plain) and not is_own(plain):
            raise unknown(plain)
    forms = itertools.product(asked.modes, asked.models, asked.precisions, (False, True) if compiled else (False,))
    return [Contender(model, mode, precision, form) for mode, model, precision, form in forms]


# --- one contender ----------------------------------------------------------------------------------------------------


def create(name: str, img_size: int, literal_of: str) -> nn.Module:
    """A model with random weights, the same at every call; the reference has those of the HcNet it spells out."""
    if name == REFERENCE:
        model = create(literal_of, img_size, "")
        assert isinstance(model, HcNet)
        return literal(model)
    with rng.seeded(0):
        return backbone.create(name.removesuffix(PLAIN), 1000, {}, img_size=img_size)


def literal(model: HcNet) -> ReferenceHcNet:
    """The official formulation of a model, with its weights."""
    twin = ReferenceHcNet(model.depths, [info["num_chs"] for info in model.feature_info], model.num_classes)
    weights = model.state_dict()
    for name, tensor in remap_official_state_dict(twin.state_dict()).items():  # views: what is copied arrives in twin
        tensor.copy_(weights[name])
    return twin


def prepare(
    contender: Contender, settings: Settings, literal_of: str, layouts: dict[tuple[str, ...], torch.memory_format]
) -> Turn:
    """Builds, compiles and warms up; fills in what needs no clock. Raises whatever the model or compiler raises.

    layouts: what was found fastest for the same model, shared between its eager and compiled forms.
    """
    device, training = settings.device, contender.mode == "train"
    dtype = profile.DTYPES[contender.precision]
    if training:
        pick_precision(contender.precision, device)
    model = create(contender.model, settings.img_size, literal_of)
    contender.params = profile.count_params(model)
    contender.macs = profile.count_macs(model, torch.zeros(1, 3, settings.img_size, settings.img_size))
    images = torch.randn(settings.batch_size, 3, settings.img_size, settings.img_size).to(device)
    if training:
        model.train().to(device)
    else:
        model = reparameterize_model(model.eval()).to(device, dtype)  # folds in fp32, then rounds
        images = images.to(dtype)
    if isinstance(model, HcNet) and not contender.model.endswith(PLAIN):
        contender.kernels = kernels.accelerate(model, inference=not training)

    def passes(forward: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], object]:
        if training:
            return training_step(model, forward, images, dtype)
        return torch.inference_mode()(partial(forward, images))

    if isinstance(model, ReferenceHcNet):
        layout = torch.contiguous_format
    elif isinstance(model, HcNet):
        layout = torch.channels_last
    else:
        key = (contender.model, contender.mode, contender.precision)
        if key not in layouts:
            layouts[key] = faster_layout(model, images, device, passes)
        layout = layouts[key]
    model.to(memory_format=layout)
    if not isinstance(model, HcNet):  # HcNet converts images itself, as it must with those of a data loader
        images = images.contiguous(memory_format=layout)
    contender.layout = "channels_last" if layout is torch.channels_last else "contiguous"

    forward: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if contender.compiled else model
    whole = passes(forward, images)
    single = None if training or settings.batch_size == 1 else passes(forward, images[:1].clone())
    runs_of = {"rate": whole} | ({"latency": single} if single else {})
    # Compilation happens at the first pass, and these settings matter only then. A model's graphs are kept for good.
    with (
        torch._inductor.config.patch(freezing=not training),
        torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10_000),
    ):
        for run, _ in itertools.product(runs_of.values(), range(WARM_UP)):
            run()
        contender.peak_bytes = profile.peak_allocation(whole, device)
    seconds = {kind: profile.timed(run, 1, device) for kind, run in runs_of.items()}
    repeats = {kind: max(1, round(SECONDS[kind] / took)) for kind, took in seconds.items()}
    contender.turn_seconds = sum(repeats[kind] * took for kind, took in seconds.items())
    return turn_of(contender, settings, whole, single, repeats)


def turn_of(
    contender: Contender,
    settings: Settings,
    whole: Callable[[], object],
    single: Callable[[], object] | None,
    repeats: dict[str, int],
) -> Turn:
    """A contender's part of a round: passes or steps on a batch (`whole`), then passes on one image (`single`)."""
    device = settings.device

    def turn() -> tuple[float, float | None] | None:
        if contender.error:
            return None
        try:
            rate = settings.batch_size * repeats["rate"] / profile.timed(whole, repeats["rate"], device)
            if contender.mode == "train":
                return rate, None
            if single is None:
                return rate, 1000 / rate
            return rate, 1000 * profile.timed(single, repeats["latency"], device) / repeats["latency"]
        except Exception as error:
            contender.error = reason(error)
            contender.rates.clear()
            return None

    return turn


def training_step(
    model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward under autocast, loss, backward, optimizer step. No loss scaling for fp16: it costs next to nothing."""
    targets = torch.randint(getattr(model, "num_classes", 1000), (len(images),)).to(images.device)
    optimizer = optim.build_optimizer(model, name="adamw", args={}, lr=1e-6, weight_decay=0.05, no_decay="1d")

    def run() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(forward(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def faster_layout(
    model: nn.Module, images: Tensor, device: torch.device, passes: Callable[[nn.Module, Tensor], Callable[[], object]]
) -> torch.memory_format:
    """Contiguous or channels_last, whichever a short eager trial finds faster."""
    best: dict[torch.memory_format, float] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        run = passes(model.to(memory_format=layout), images.contiguous(memory_format=layout))
        run()
        best[layout] = min(profile.timed(run, 1, device) for _ in range(3))
    return min(best, key=lambda layout: best[layout])


def matrix_product(precision: str, device: torch.device) -> tuple[Callable[[], object], int]:
    """A product of two large squares, and its floating point operations. Smaller squares where it is slow (fp16)."""
    size, limit = 256, 8192 if device.type == "cuda" else 2048
    while True:
        run = partial(torch.mm, *(torch.randn(size, size).to(device, profile.DTYPES[precision]) for _ in range(2)))
        run()
        if size >= limit or profile.timed(run, 1, device) > 0.05:
            return run, 2 * size**3
        size *= 2


# --- taking turns -----------------------------------------------------------------------------------------------------


def measure(asked: list[Contender], settings: Settings) -> Measurement:
    """Times the contenders, one mode after another. What fails says why in `error` and is left out.

    A signal, such as Ctrl-C, ends it with the finished rounds.
    """
    made = Measurement(settings, asked)
    names = (contender.model.removesuffix(PLAIN) for contender in asked)
    literal_of = next((name for name in names if name in model_names.OURS), SIZES["t"].timm_name)
    used: list[tuple[float, float]] = []  # by others, in how many seconds
    if any(contender.precision == "bf16" for contender in asked):
        warn_of_emulation(settings.device)
    with status_line() as tell:
        try:
            with stoppable():
                for mode in made.modes:
                    _measure_mode(made, mode, literal_of, tell, used)
                    gc.collect()
                    torch._dynamo.reset()
                    if settings.device.type == "cuda":
                        torch.cuda.empty_cache()
        except Stopped as signal:
            made.stopped = signal.number
    made.others = cores_of_others(used)
    return made


def _measure_mode(
    made: Measurement, mode: str, literal_of: str, tell: Callable[[str], None], used: list[tuple[float, float]]
) -> None:
    settings, asked = made.settings, made.of(mode)
    layouts: dict[tuple[str, ...], torch.memory_format] = {}
    jobs: dict[Contender | str, Turn] = {}
    for number, contender in enumerate(asked, 1):
        what = "compiling" if contender.compiled else "preparing"
        name = f"{contender.model}, {contender.form}"
        tell(f"{mode}: {what} {number} of {len(asked)}: {name}{time_left(made, mode, 0)}")
        begun = time.perf_counter()
        try:
            jobs[contender] = prepare(contender, settings, literal_of, layouts)
            contender.prepare_seconds = time.perf_counter() - begun
        except Exception as error:  # a model or a compiler can raise anything; the others are still worth timing
            contender.error = reason(error)
            warn(f"{name}, {mode}: {contender.error}")
    if not jobs:
        return
    precisions = dict.fromkeys(c.precision for c in asked if c in jobs)
    jobs |= {precision: _matmul_turn(precision, settings.device) for precision in precisions}
    matmul = made.matmul[mode] = {precision: [] for precision in precisions}

    def tell_round(text: str) -> None:
        tell(f"{mode}: {text}{time_left(made, mode, len(next(iter(matmul.values()))))}")

    for found in take_turns(jobs, settings.rounds, tell_round, used):
        for who, (rate, latency) in ((who, figures) for who, figures in found.items() if figures):
            (matmul[who] if isinstance(who, str) else who.rates).append(rate)
            if latency is not None and not isinstance(who, str):
                who.latencies.append(latency)


def time_left(made: Measurement, mode: str, rounds: int) -> str:
    """What is left after some rounds of a mode: contenders that wait are taken to be like those that are ready."""
    ready = [c for c in made.contenders if c.prepare_seconds]
    if not ready:
        return ""
    waiting = sum(not c.prepare_seconds and not c.error for c in made.contenders)
    each = sum(c.prepare_seconds + made.settings.rounds * c.turn_seconds for c in ready) / len(ready)
    of_round = sum(c.turn_seconds for c in ready if c.mode == mode)
    return f" · about {about(waiting * each + (made.settings.rounds - rounds) * of_round)} left"


def _matmul_turn(precision: str, device: torch.device) -> Turn:
    run, operations = matrix_product(precision, device)
    return lambda: (operations / profile.timed(run, 1, device) / 1e9, None)


def reason(error: Exception) -> str:
    """What went wrong in one line."""
    first, *_ = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{kind}{first.strip()}"[:200].rstrip(": ")
