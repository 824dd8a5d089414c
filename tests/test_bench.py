"""hcnet bench: turns, ratios and memory by hand-made contenders and known patterns; never by the clock."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Done
from PIL import Image
from timm.data import create_dataset

from hcnet_cli import device, profile
from hcnet_cli.bench import choices, tables, turns
from hcnet_cli.bench import data as bench_data
from hcnet_cli.bench import models as bench
from hcnet_cli.bench.models import Contender, Measurement, Settings
from hcnet_cli.bench.turns import take_turns

Hcnet = Callable[..., Done]
CPU = torch.device("cpu")
TINY = ("--models", "pico,reference", "--img-size", "32", "--batch-size", "1", "--rounds", "1")
MIB = 2**20


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass a turn, one to warm up, and small matrices."""
    monkeypatch.setattr(bench, "SECONDS", {"rate": 0.0, "latency": 0.0})
    monkeypatch.setattr(bench, "WARM_UP", 1)
    monkeypatch.setattr(bench, "matrix_product", lambda *_: (lambda: None, 2 * 64**3))


def contender(model: str, rates: list[float], **values: Any) -> Contender:
    given = {"mode": "infer", "precision": "fp32", "compiled": False, "macs": 10**9, "rates": rates, **values}
    return Contender(model, **given)


def measurement(*contenders: Contender, **values: Any) -> Measurement:
    matmul = {mode: {precision: [50.0, 100.0] for precision in profile.DTYPES} for mode in choices.MODES}
    return Measurement(Settings(8, 224, 3, CPU), list(contenders), matmul, **values)


# turns and figures


def test_contenders_alternate_and_every_round_begins_with_the_next() -> None:
    played: list[str] = []
    told: list[str] = []

    def job(name: str) -> Callable[[], int]:
        def run() -> int:
            played.append(name)
            return len(played)

        return run

    rounds = list(take_turns({name: job(name) for name in "abc"}, 4, told.append, []))
    assert "".join(played) == "abcbcacababc"
    assert rounds[1] == {"b": 4, "c": 5, "a": 6}
    assert told[1] == "round 2 of 4"


def test_a_round_cut_short_does_not_count() -> None:
    turns = iter([1, 2, 3])

    def job() -> int:
        for turn in turns:
            return turn
        raise KeyboardInterrupt

    rounds = take_turns({"a": job, "b": job}, 2, lambda _: None, [])
    assert next(rounds) == {"a": 1, "b": 2}
    with pytest.raises(KeyboardInterrupt):
        next(rounds)


def test_ratios_are_taken_within_rounds_against_the_reference() -> None:
    """In the second round the machine was three times slower for all: medians of rates hide what ratios show."""
    fast = contender("hcnet_tiny", [20.0, 8.0, 22.0])
    unit = contender("reference", [10.0, 4.0, 20.0])
    (table,) = tables.tables(measurement(fast, unit))
    first, second = (row.values for row in table.rows)
    assert first["ratio"] == 2.0
    assert second["ratio"] == 1.0
    assert first["images_per_second"] == 20.0
    assert first["spread"] == "8.0–22.0"
    assert any("to reference, fp32 eager" in note for note in table.notes)


def test_the_unit_is_the_reference_in_eager_fp32_else_the_first_that_ran() -> None:
    broken = contender("hcnet_tiny", [], error="no")
    others = [
        contender("reference", [1.0], compiled=True),
        contender("reference", [1.0], precision="bf16"),
        contender("resnet50", [1.0]),
    ]
    unit = contender("reference", [1.0])
    assert tables.baseline([broken, *others, unit]) is unit
    assert tables.baseline([broken, *others]) is others[0]
    assert tables.baseline([broken]) is None


@pytest.mark.parametrize(("mode", "gflops"), [("infer", 20.0), ("train", 60.0)])
def test_achieved_operations_and_their_share_of_the_best_matrix_product(mode: str, gflops: float) -> None:
    """10 images/s of 1 GMAC are 20 GFLOP/s; a training step does the work of three forward passes."""
    (table,) = tables.tables(measurement(contender("a", [10.0], mode=mode, peak_bytes=3 * MIB, latencies=[4.0])))
    values = table.rows[0].values
    assert values["gflops"] == pytest.approx(gflops)
    assert values["share"] == pytest.approx(gflops)  # of 100 GFLOP/s, the better of the two rounds
    assert values["peak_mib"] == 3.0
    assert ("latency_ms" in [c.key for c in table.columns]) == (mode == "infer")


def test_the_default_table_fits_80_columns() -> None:
    forms = [{}, {"precision": "bf16", "compiled": True}]
    rows = [
        contender(model, [123.4, 56.7, 132.1], peak_bytes=300 * MIB, latencies=[61.4], **form)
        for model in ("hcnet_tiny", "swin_tiny_patch4_window7_224")
        for form in forms
    ]
    text = tables.report.render(tables.tables(measurement(*rows)), "rich", width=80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("swin_tiny_patch4_window7_224" in line and "123" in line and "1.00" in line for line in lines)
    assert "--output FILE.md has all" in text.replace("\n", " ")


def test_a_busy_machine_is_said() -> None:
    calm, busy = (tables.tables(measurement(contender("a", [1.0]), others=cores))[0].notes for cores in (0.1, 0.9))
    assert not any("busy" in note for note in calm)
    assert any("took 0.9 of" in note for note in busy)


def test_other_processes_are_those_that_are_not_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system counts user, nice, system, idle, waiting, interrupts and stolen time, here in hundredths."""
    stat = "cpu  100 10 50 9000 700 5 5 30 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _: stat)
    monkeypatch.setattr(turns.os, "sysconf", lambda _: 100, raising=False)
    monkeypatch.setattr(turns.time, "process_time", lambda: 0.5)
    assert turns.cpu_of_others() == pytest.approx(2.0 - 0.5)
    monkeypatch.setattr(Path, "read_text", lambda _: "something else")
    assert turns.cpu_of_others() is None


def test_a_turn_gives_images_per_second_and_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole() -> None: ...

    def single() -> None: ...

    took = {whole: 2.0, single: 0.1}
    monkeypatch.setattr(profile, "timed", lambda run, repeats, _: took[run])
    settings, repeats = Settings(8, 224, 3, CPU), {"rate": 4, "latency": 5}
    assert bench.turn_of(contender("a", []), settings, whole, single, repeats)() == (16.0, 20.0)
    one = bench.turn_of(contender("a", []), Settings(1, 224, 3, CPU), whole, None, repeats)
    assert one() == (2.0, 500.0)
    training = bench.turn_of(contender("a", [], mode="train"), settings, whole, None, repeats)
    assert training() == (16.0, None)


# memory


def test_peak_memory_of_a_known_pattern() -> None:
    """At most two of the tensors live at a time, and what was there before does not count."""
    held = torch.empty(MIB)

    def run() -> None:
        a = torch.empty(MIB)  # 4 MiB
        b = torch.empty(MIB)  # 8
        del a  # 4
        c = torch.empty(2 * MIB)  # 12
        del b, c  # 0
        torch.empty(MIB)

    peak = profile.peak_allocation(run, CPU)
    assert held.numel() == MIB
    assert peak is not None
    assert peak / MIB == pytest.approx(12.0, abs=0.01)


def test_peak_memory_counts_what_the_backward_pass_keeps() -> None:
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB

    def step() -> None:
        (x.sin().cos() * x).sum().backward()  # keeps sin(x), cos(sin(x)), and makes a gradient
        x.grad = None

    peak = profile.peak_allocation(step, CPU)
    assert peak is not None
    assert 3.9 <= peak / MIB <= 6.1


# contenders


def test_the_contenders_are_the_cross_product() -> None:
    found = bench.contenders("pico, reference,hcnet_pico", "infer,train", "fp32,bf16", True)
    assert len(found) == 2 * 2 * 2 * 2
    assert [(c.model, c.form) for c in found[:4]] == [
        ("hcnet_pico", "fp32 eager"),
        ("hcnet_pico", "fp32 compiled"),
        ("hcnet_pico", "bf16 eager"),
        ("hcnet_pico", "bf16 compiled"),
    ]
    assert [c.mode for c in found] == ["infer"] * 8 + ["train"] * 8


def test_the_reference_computes_what_the_model_computes() -> None:
    model, twin = (bench.create(name, 64, "hcnet_pico").eval() for name in ("hcnet_pico", "reference"))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits = model(images)
        torch.testing.assert_close(twin(images), logits, atol=1e-5, rtol=0)
    assert logits.std() > 1e-4


def test_models_of_a_fixed_size_get_the_size_asked_for() -> None:
    model = bench.create("swin_tiny_patch4_window7_224", 64, "")
    with torch.inference_mode():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--models", "hcnet_tiny,resnet5o"), 'Unknown model "resnet5o". Did you mean "resnet50"?'),
        (("--models", "refrence"), 'Did you mean "reference"?'),
        (("--mode", "training"), 'Unknown mode "training". Did you mean "train"?'),
        (("--precision", "fp8"), 'Unknown precision "fp8".'),
        (("--models", ","), "is empty"),
        (("--output", "speed.txt"), "speed.txt ends in neither .md nor .json."),
        (("--output", "file/speed.md"), "file/speed.md cannot be written"),
        (("--device", "tpu"), "tpu"),
        (("--rounds", "2", "data"), "--rounds times models"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_timed(
    arguments: tuple[str, ...], said: str, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("something was timed"))
    done = hcnet("bench", *arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


# from end to end


def test_inference_and_training_from_end_to_end(hcnet: Hcnet, tmp_path: Path) -> None:
    output = tmp_path / "new folder" / "speed.json"
    done = hcnet("bench", *TINY, "--mode", "infer,train", "--rounds", "2", "--device", "cpu", "--output", output)
    assert done.code == 0, done.err
    assert "Inference: batch 1, 32 x 32" in done.out
    assert "Training step: batch 1, 32 x 32" in done.out
    assert "round 2 of 2" in done.err
    found = json.loads(output.read_text())
    assert [mode["mode"] for mode in found["modes"]] == ["infer", "train"]
    for mode in found["modes"]:
        assert mode["unit"] == "reference, fp32 eager"
        ours, reference = mode["contenders"]
        assert ours["model"] == "hcnet_pico"
        assert (ours["layout"], reference["layout"]) == ("channels_last", "contiguous")
        assert len(ours["rates"]) == len(reference["rates"]) == 2
        ratios = [a / b for a, b in zip(ours["rates"], reference["rates"], strict=True)]
        assert ours["ratio"] == pytest.approx(sum(ratios) / 2)
        assert ours["params"] == reference["params"] == 1_656_104
        assert ours["macs"] == reference["macs"]
        assert ours["peak_bytes"] > 0
        assert len(ours["latencies"]) == (2 if mode["mode"] == "infer" else 0)
        assert len(mode["matmul_gflops"]["fp32"]) == 2


def test_the_page_says_how_it_was_made_and_what_was_not_measured(hcnet: Hcnet, tmp_path: Path) -> None:
    output = tmp_path / "speed.md"
    assert hcnet("bench", *TINY, "--device", "cpu", "--output", output).code == 0
    text = output.read_text()
    for what in ("command", "machine", "system", "versions", "commit", "date", "protocol"):
        assert f"\n- {what}: " in text
    assert f"`hcnet bench {' '.join(TINY)} --device cpu --output {output}`" in text
    assert torch.__version__ in text
    assert timm.__version__ in text
    assert "| hcnet\\_pico" in text or "| hcnet_pico" in text
    after = text.split("## On a GPU")[1]
    assert "Not measured here." in after
    command = re.search(r"hcnet bench (.*)", after)
    assert command is not None
    assert "--models hcnet_pico,reference" in command[1]
    assert "--device cuda" in command[1]


def test_a_contender_that_fails_is_a_row_that_says_why(hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    create = bench.create

    def failing(name: str, *arguments: Any) -> Any:
        if name == "reference":
            raise RuntimeError("out of memory\nand a long trace")
        return create(name, *arguments)

    monkeypatch.setattr(bench, "create", failing)
    done = hcnet("bench", *TINY, "--device", "cpu")
    assert done.code == 0
    assert "reference [1]" in done.out
    assert "[1] RuntimeError: out of memory" in done.out
    assert "trace" not in done.out
    assert "ratio: to hcnet_pico" in done.out
    assert hcnet("bench", *TINY, "--models", "reference", "--device", "cpu").code == 1


def test_a_contender_that_fails_on_the_way_leaves_the_others_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def seconds(run: Callable[[], None], repeats: int, _: torch.device) -> float:
        calls.append(run)
        if len(calls) > 8 and run is broken:
            raise RuntimeError("the device is gone")
        return 1.0

    def broken() -> None: ...

    def sound() -> None: ...

    monkeypatch.setattr(profile, "timed", seconds)
    runs = {"a": broken, "b": sound}
    monkeypatch.setattr(
        bench, "prepare", lambda c, settings, *_: bench.turn_of(c, settings, runs[c.model], None, {"rate": 1})
    )
    asked = [contender("a", []), contender("b", [])]
    bench.measure(asked, Settings(8, 32, 5, CPU))
    assert asked[0].error == "RuntimeError: the device is gone"
    assert asked[0].rates == []
    assert asked[1].rates == [8.0] * 5
    assert tables.tables(Measurement(Settings(8, 32, 5, CPU), asked, {"infer": {"fp32": [1.0]}}))[0].rows[0].mark


def test_ctrl_c_prints_the_finished_rounds(hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = bench.take_turns

    def interrupted(jobs: Any, rounds: int, *others: Any) -> Any:
        yield from turns(jobs, 2, *others)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "take_turns", interrupted)
    done = hcnet("bench", *TINY, "--rounds", "5", "--device", "cpu")
    assert done.code == 130
    assert "Stopped after 2 of 5 rounds." in done.out
    assert "reference" in done.out


@pytest.mark.parametrize(
    ("number", "rounds"), [(signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGTERM, 0), (signal.SIGHUP, 2)]
)
def test_a_signal_prints_the_finished_rounds_and_says_what_is_missing(
    number: int, rounds: int, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real signal in the first of two modes: its table has the rounds that ended, the other says there are none."""
    turns = bench.take_turns

    def interrupted(jobs: Any, _: int, *others: Any) -> Any:
        yield from turns(jobs, rounds, *others)
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(bench, "take_turns", interrupted)
    flags = ("--mode", "infer,train", "--rounds", "5", "--device", "cpu", "--output", tmp_path / "a.json")
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, before)  # a shell lets what it starts in the background ignore SIGINT
    try:
        done = hcnet("bench", *TINY, *flags)
        after = signal.getsignal(number)
    finally:
        signal.signal(number, inherited)
    assert done.code == 128 + number
    assert done.out.count("Stopped before a round of it ended.") == (1 if rounds else 2)
    assert ("Stopped after 2 of 5 rounds." in done.out) == bool(rounds)
    assert json.loads((tmp_path / "a.json").read_text())["stopped"] is True
    assert after is before


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with turns.stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_left_is_said_from_the_first_contender_on() -> None:
    """One ready contender took 4 s and takes 2 s a round; the other three count like it: 3 x (4 + 5 x 2) + 5 x 2."""
    asked = [contender(name, [], mode=mode) for mode in ("infer", "train") for name in "ab"]
    made = Measurement(Settings(8, 32, 5, CPU), asked)
    assert bench.time_left(made, "infer", 0) == ""
    asked[0].prepare_seconds, asked[0].turn_seconds = 4.0, 2.0
    assert bench.time_left(made, "infer", 0) == " · about 52 s left"
    asked[1].error = "out of memory"
    assert bench.time_left(made, "infer", 2) == " · about 34 s left"


@pytest.mark.parametrize(("flags", "emulated"), [("fma avx2", True), ("avx512f avx512_bf16", False)])
def test_bf16_without_hardware_is_said_once(
    flags: str, emulated: bool, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text
    text = f"model name : a processor\nflags\t\t: {flags}\n"
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **k: text if str(path) == "/proc/cpuinfo" else read(path, *a, **k)
    )
    device.warn_of_emulation.cache_clear()
    assert device.emulates_bf16(CPU) is emulated
    flags_of_train = ("--models", "pico", "--mode", "infer,train", "--precision", "bf16", "--device", "cpu")
    assert hcnet("bench", *TINY, *flags_of_train).err.count("bf16 is emulated") == emulated
    device.warn_of_emulation.cache_clear()
    assert device.pick_precision("bf16", CPU) == "bf16"
    device.warn_of_emulation.cache_clear()


def test_half_precision_training_on_the_cpu_is_refused_as_a_row(hcnet: Hcnet) -> None:
    done = hcnet("bench", *TINY, "--models", "pico", "--mode", "train", "--precision", "fp16,bf16", "--device", "cpu")
    assert done.code == 0
    assert "fp16 training needs a GPU." in done.out
    assert "bf16 eager" in done.out


# the input pipeline


def pipeline(name: str, rates: list[float]) -> bench_data.Pipeline:
    figures = {"decode": [300.0] * 3, "augment": [150.0] * 3, "loader": rates}
    return bench_data.Pipeline(name, lambda _: None, lambda _: None, lambda _: iter(()), 1, figures)


def test_the_ratios_of_pipelines_are_to_timms_default_in_the_same_round() -> None:
    pipelines = [
        pipeline("hcnet", [120.0, 60.0, 130.0]),
        pipeline("timm", [100.0, 50.0, 100.0]),
        pipeline("timm without prefetcher", [50.0, 25.0, 50.0]),
    ]
    ours, unit, half = bench_data.summary(bench_data.Measurement(pipelines, "data", 64, 224, 4, 3))
    assert ours["ratio"] == pytest.approx(1.2)
    assert (unit["ratio"], half["ratio"]) == (1.0, 0.5)
    assert (ours["loader"], ours["per_core"], ours["spread"]) == (120.0, 30.0, "60–130")


def test_what_is_timed_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sampled image once for each part; of the loader, the first batches of all workers are for free."""
    calls: list[str] = []

    def batches(_: int) -> Any:
        while True:
            calls.append("batch")
            yield torch.zeros(8, 3, 4, 4)

    one = bench_data.Pipeline("a", lambda _: calls.append("decode"), lambda _: calls.append("augment"), batches, 10)
    made = bench_data.Measurement([one], "data", batch_size=8, img_size=4, workers=2, rounds=1)
    monkeypatch.setattr(bench_data, "TURN", 24)
    rates = bench_data._turn(one, made, iter([0]))()
    assert set(rates) == {"decode", "augment", "loader"}
    assert [calls.count(kind) for kind in ("decode", "augment", "batch")] == [10, 10, 2 + 2 * 3]


def test_synthetic_pictures_cost_what_photographs_do(tmp_path: Path) -> None:
    total = bench_data.make_pictures(tmp_path, 6)
    files = sorted((tmp_path / "train").rglob("*.jpg"))
    assert len(files) == 6
    assert total == sum(file.stat().st_size for file in files)
    assert 90_000 < total / 6 < 130_000
    pixels = np.asarray(Image.open(files[0])).astype(float)
    assert pixels.shape == (375, 500, 3)
    neighbours = np.corrcoef(pixels[:, 1:, 0].ravel(), pixels[:, :-1, 0].ravel())[0, 1]
    assert neighbours > 0.7, "not white noise"
    assert len({file.read_bytes() for file in files}) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_the_pipelines_beside_each_other(
    workers: int, hcnet: Hcnet, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "TURN", 8)
    flags = ("--batch-size", "8", "--img-size", "16", "--rounds", "2", "--workers", workers)
    threads = torch.get_num_threads()
    done = hcnet("bench", "data", "--data", folder_of_images, *flags, "--output", tmp_path / "data.json")
    assert done.code == 0, done.err
    assert torch.get_num_threads() == threads
    assert "timm without prefetcher" in done.out
    found = json.loads((tmp_path / "data.json").read_text())
    assert [one["model"] for one in found["pipelines"]] == ["hcnet", "timm", "timm without prefetcher"]
    for one in found["pipelines"]:
        assert {kind: len(rates) for kind, rates in one["rounds"].items()} == {"decode": 2, "augment": 2, "loader": 2}
    assert found["workers"] == workers


def test_both_pipelines_augment_with_the_same_settings(folder_of_images: Path) -> None:
    """Every setting of the recipe reaches timm's loader: the transforms are alike, part by part."""
    recipe = bench_data.read_recipe("imagenet", str(folder_of_images), 32)
    unusual = {"scale": (0.3, 0.9), "ratio": (0.5, 1.5), "hflip": 0.3, "vflip": 0.2, "re_mode": "rand", "re_count": 3}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=unusual)})
    ours = bench_data.build.open_data(recipe).train.transform
    images = create_dataset("", root=str(folder_of_images), split="train", is_training=True)
    bench_data.timm_loader(images, recipe, batch_size=8, workers=0, prefetcher=False)
    timms = images.transform.transforms
    names = [type(part).__name__ for part in ours.parts]
    assert [type(part).__name__ for part in timms] == [*names, "MaybeToTensor", "Normalize", "RandomErasing"]
    for one, other in zip((*ours.parts[:3], ours.erase), (*timms[:3], timms[-1]), strict=True):
        assert repr(one) == repr(other)
    assert [repr(op) for op in ours.parts[3].ops] == [repr(op) for op in timms[3].ops]


def test_without_data_a_folder_is_made_and_removed(
    hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "PICTURES", 4)
    monkeypatch.setattr(bench_data, "TURN", 4)
    monkeypatch.setattr(bench_data.tempfile, "tempdir", str(tmp_path))
    output = tmp_path / "pipeline.md"
    done = hcnet("bench", "data", "--batch-size", "2", "--img-size", "16", "--rounds", "1", "--output", output)
    assert done.code == 0, done.err
    assert "synthetic JPEGs" in done.err
    assert "4 synthetic JPEGs of 500 x 375" in output.read_text()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_embedded_digits_are_data_too_and_ctrl_c_keeps_the_rounds_so_far(
    hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_data, "TURN", 8)
    real = bench_data.take_turns

    def interrupted(*arguments: Any) -> Any:
        yield next(real(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_data, "take_turns", interrupted)
    flags = ("--data", "digits", "--recipe", "digits", "--batch-size", "8", "--output", tmp_path / "a.json")
    done = hcnet("bench", "data", *flags)
    assert done.code == 130, done.err
    assert "Stopped after 1 of the rounds" in done.out
    assert json.loads((tmp_path / "a.json").read_text())["stopped"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "nowhere"), "The data folder nowhere does not exist."),
        (("--recipe", "imagenett"), "imagenet"),
        (("--output", "speed.csv"), "ends in neither"),
        (("--data", "IMAGES", "--batch-size", "999"), "fewer than one batch of 999"),
    ],
)
def test_mistakes_about_data_are_one_sentence(
    arguments: tuple[str, ...], said: str, hcnet: Hcnet, folder_of_images: Path
) -> None:
    words = [str(folder_of_images) if word == "IMAGES" else word for word in arguments]
    done = hcnet("bench", "data", *words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_an_hcnet_without_its_kernels_is_a_contender(hcnet: Hcnet, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    flags = ("--models", "pico,pico:plain,literal", "--mode", "infer,train", "--img-size", "32", "--batch-size", "2")
    assert hcnet("bench", *flags, "--rounds", "1", "--device", "cpu", "--output", output).code == 0
    for mode in json.loads(output.read_text())["modes"]:
        with_kernels, plain, literal = mode["contenders"]
        assert plain["model"] == "hcnet_pico:plain"
        assert literal["model"] == "reference"
        assert with_kernels["kernels"]
        assert plain["kernels"] == literal["kernels"] == []
    assert hcnet("bench", "--models", "resnet18:plain").code == 2
