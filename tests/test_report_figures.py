"""Protects figures for papers: what they show, their width and fonts, colours that all can tell apart, equal bytes."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from synthetic_runs import make_run

from hcnet_cli import calibration, charts
from hcnet_cli.console import UserError
from hcnet_cli.report import figures, final, paper, plots
from hcnet_cli.results import collect, tables
from hcnet_cli.table import Column, Row, Table
from hcnet_cli.tasks.detection import errors

ARMS = [("no-gate", -1.2, -1.9, -0.5), ("no-source", 0.1, -0.6, 0.8), ("$x_1$", -0.4, float("nan"), float("nan"))]
ABLATION = Table(
    "ablation",
    "Ablation",
    [Column("arm", "arm"), Column("top1", "top-1", "percent", best=True)],
    [Row("measured", {"arm": "full", "top1": 98.6})],
    forest=ARMS,
)
EVIL = "--><script>alert(1)</script> 图"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paper")
    for seed in range(2):
        make_run(root, seed=seed, score=98.0 + seed)
    make_run(root, "digits", "t", score=99.2, changes={"optim.lr": EVIL})
    make_run(root, seed=7, done=0.4, status="interrupted")
    return root


@pytest.fixture(scope="module")
def written(results: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("figures") / "new"
    final_folder = next((results / "runs").glob("pretrain-digits-t-*")) / "final"
    final_folder.mkdir()
    bins = [calibration.Bin(0.4, 0.5, 10, 0.45, 0.5)._asdict(), calibration.Bin(0.9, 1.0, 30, 0.95, 0.8)._asdict()]
    (final_folder / "calibration.json").write_text(json.dumps({"bins": bins}))
    (final_folder / "confusion.json").write_text("[1, 2]")
    found = collect([results])
    measured = [table for table in tables(found, "imagenet") if table.measured]
    return folder, paper.write_figures([*measured, ABLATION], found, folder)


def test_every_figure_of_the_page_is_there_twice(results: Path, written: tuple[Path, list[str]]) -> None:
    folder, lines = written
    run = next(path.name for path in (results / "runs").iterdir() if path.name.startswith("pretrain-digits-t-"))
    assert lines == [
        "digits-macs: digits, top-1 against MACs (G)",
        "digits-params: digits, top-1 against #params (M)",
        "ablation-differences: Ablation, difference to full with 95 % intervals",
        "digits-loss-curve: digits, training loss",
        "digits-top1-curve: digits, validation top-1 (%)",
        "digits-lr-curve: digits, learning rate",
        f"{run}-reliability: HcNet-T on digits, reliability (run {run})",
    ]
    names = {line.split(":")[0] for line in lines}
    assert names == {path.stem for path in folder.glob("*.pdf")} == {path.stem for path in folder.glob("*.svg")}
    assert not [path for path in folder.iterdir() if path.suffix not in (".pdf", ".svg")]


def test_a_runs_figures_keep_their_names(tmp_path: Path) -> None:
    """Whatever else lies in the folder; another run under the same name has other names."""

    def drawn(folder: Path) -> set[str]:
        found = collect([folder])
        return {line.split(":")[0] for line in paper.write_figures(tables(found, "imagenet"), found, folder / "f")}

    def add(folder: Path, **fields: object) -> None:
        run = make_run(folder, log=False, **fields)  # type: ignore[arg-type]
        bins = [calibration.Bin(0.4, 0.5, 10, 0.45, 0.5)._asdict()]
        (run / "final").mkdir()
        (run / "final" / "calibration.json").write_text(json.dumps({"bins": bins}))

    add(tmp_path / "a", name="best", fingerprint="0badf00d", changes={"optim.lr": 0.1})
    add(tmp_path / "b", name="best", fingerprint="0badf00d", changes={"optim.lr": 0.1})
    add(tmp_path / "b", changes={"optim.lr": 0.01}, fingerprint="00000000")
    add(tmp_path / "c", name="best", fingerprint="12345678")
    own = {name for name in drawn(tmp_path / "a") if "reliability" in name}
    assert own == {"best-0badf00d-reliability"}
    assert own < {name for name in drawn(tmp_path / "b") if "reliability" in name}
    assert not own & drawn(tmp_path / "c")


def test_a_figure_has_a_column_its_fonts_and_no_date(written: tuple[Path, list[str]]) -> None:
    """TrueType letters inside each PDF (no Type 3), a width of 3.3 or 6.9 inches, letters as outlines in SVG."""
    folder, _ = written
    for file in folder.glob("*.pdf"):
        content = file.read_bytes()
        assert b"/FontFile2" in content
        assert b"/Type3" not in content
        assert b"Date" not in content
        width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", content)[1])
        assert width == pytest.approx(3.3 * 72) or width == pytest.approx(6.9 * 72)
    for file in folder.glob("*.svg"):
        text = file.read_text()
        assert "<text" not in text
        assert "<dc:date" not in text
        assert "<script" not in text
        assert text.count("-->") == text.count("<!--")


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    table = Table("imagenet", "Mine", ABLATION.columns, ABLATION.rows, forest=ARMS)
    for folder in ("one", "two"):
        paper.write_figures([table], collect([tmp_path]), tmp_path / folder)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 2
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_scatter_shows_the_values(results: Path) -> None:
    """What matplotlib draws is what the table says, intervals included."""
    points = [
        plots.Point(0.3, 98.5, "measured", "HcNet-pico", "", 0.5),
        plots.Point(4.2, 83.0, "published", "Swin", ""),
    ]
    axes = paper.scatter(plots.Scatter("macs", "", "MACs (G)", "top-1 (%)", points)).axes[0]
    marks = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert marks == [[[0.3, 98.5]], [[4.2, 83.0]]]
    (whisker,) = axes.collections
    assert whisker.get_segments()[0].tolist() == [[0.3, 98.0], [0.3, 99.0]]
    assert axes.get_xscale() == "log"
    wide = plots.Point(0.3, 33.1, "measured", "HcNet-pico", "", 131.83)  # of two folds, say
    assert wide.ends == (0.0, 100.0)
    assert {text.get_text() for text in axes.texts} == {"HcNet-pico", "Swin"}


def test_names_keep_clear_of_the_intervals_of_others() -> None:
    spots = {("measured", "HcNet-T"): [(100.0, 100.0)], ("measured", "HcNet-S"): [(140.0, 60.0)]}
    whisker = ((140.0, 20.0), (140.0, 150.0))
    frame = (0.0, 0.0, 300.0, 200.0)
    (_, before, _), *_ = figures.place_labels(spots, frame)
    (name, after, _), *_ = figures.place_labels(spots, frame, [whisker])
    assert before[0] < 140 < before[2]
    assert name == ("measured", "HcNet-T")
    assert after[2] < 140


def test_curves_hold_every_finished_run(results: Path) -> None:
    """The seeds of a setting are lines of one colour and one name."""
    finished = [run for run in collect([results]).runs if run.finished]
    ((_, _, figure), *_) = paper._curves(finished)
    lines = figure.axes[0].lines
    assert len(lines) == 3
    assert len({line.get_color() for line in lines}) == 2
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1] == "HcNet-pico (2 seeds)"
    logged = [json.loads(line) for line in (finished[0].folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in logged if "loss" in entry]
    assert all(list(line.get_xdata()) == steps for line in lines)


def test_a_curve_of_one_evaluation_is_a_point(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 440, "top1": 98.5}\n')
    ((_, _, figure),) = paper._curves(collect([tmp_path]).runs)
    (line,) = figure.axes[0].lines
    assert line.get_marker() == "o"


def test_bars_of_a_run_are_its_numbers(tmp_path: Path) -> None:
    precision = {"0.50": [1.0] * 101}
    kinds = {"class": {"count": 3, "AP50_lost": 2.5}, "missed": {"count": 1, "AP50_lost": -0.5}}
    (tmp_path / "errors.json").write_text(json.dumps({"errors": kinds, "precision": precision}))
    classes = [{"name": "cat", "IoU": 40.0}, {"name": "dog", "IoU": 60.0}, {"name": "absent", "IoU": None}]
    (tmp_path / "per_class.json").write_text(json.dumps({"mIoU": 50.0, "classes": classes}))
    cells = {"cells": [["a", "a", 3], ["a", "b", 1], ["b", "b", 2]]}
    (tmp_path / "confusion.json").write_text(json.dumps(cells))
    with matplotlib.style.context(paper.STYLE):
        made = dict(final.drawings(tmp_path, 3.3, 6.9))
    assert [bar.get_width() for bar in made["errors by kind"].axes[0].patches] == [2.5, 0.0]
    assert [bar.get_width() for bar in made["IoU of the classes"].axes[0].patches] == [60.0, 40.0]
    texts = made["IoU of the classes"].axes[0].texts
    assert [(text.get_position()[0] > 1, text.get_text()) for text in texts] == [(True, "60.0"), (True, "40.0")]
    assert made["confusion"].axes[0].images[0].get_array().tolist() == [[75.0, 25.0], [0.0, 100.0]]
    assert made["precision over recall"].axes[0].lines[0].get_ydata().tolist() == [100.0] * 101


def axes_of(monkeypatch: pytest.MonkeyPatch, columns: int) -> list[Axes]:
    """Axes on which the next picture of `charts.drawn` is drawn."""
    found = list(np.atleast_1d(Figure().subplots(1, columns)))
    monkeypatch.setattr(charts, "drawn", lambda width, height, draw, columns=1: draw(*found) or b"")
    return found


def test_bars_of_classes_say_what_light_ones_are_and_end_at_100(monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = axes_of(monkeypatch, 1)
    charts.class_bars(["cat", "dog"], [20.0, 100.0], "IoU of the classes", "IoU (%)")
    assert axes.get_title() == "IoU of the classes; dashed: the mean, 60.0; light: below it"
    assert axes.get_xlim() == (0, 100)
    assert [text.get_text() for text in axes.texts] == ["100.0", "20.0"]
    assert all(text.get_position()[0] > 1 for text in axes.texts)  # beside the axes: no line crosses them


def test_costs_of_errors_say_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, right = axes_of(monkeypatch, 2)
    errors.draw({}, 50.0, {"class": errors.Kind(3, 2.5)})
    assert "low scores count too" in right.get_xlabel()
    assert "do not add up" in right.get_xlabel()


# --- colours ----------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", DEFICIENCIES)
def test_colours_can_be_told_apart(eye: str) -> None:
    """By any eye: CIE76 distances of 20 and more, ten times what is just noticed."""
    for palette in (paper.LINES, (charts.HOT, charts.COOL, charts.INK)):
        seen = [lab(np.array(DEFICIENCIES[eye]) @ linear(colour)) for colour in palette]
        assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) >= 20


def test_lines_and_letters_have_contrast_on_white() -> None:
    """WCAG 2: 3 to 1 for lines, 4.5 to 1 for letters."""

    def contrast(colour: str) -> float:
        return 1.05 / (float(np.dot([0.2126, 0.7152, 0.0722], linear(colour))) + 0.05)

    assert min(map(contrast, paper.LINES)) >= 3
    assert min(map(contrast, (charts.HOT, charts.COOL, charts.INK, charts.MUTED))) >= 4.5


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_nothing_to_draw_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to draw"):
        paper.write_figures([], collect([tmp_path]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("more", [["--format", "latex"], ["--watch"], ["--output", "x.md"]])
def test_figures_stand_alone(hcnet, tmp_path: Path, more: list[str]) -> None:
    done = hcnet("report", "--results", tmp_path, "--figures", tmp_path / "f", *more)
    assert done.code == 2
    assert f"{more[0]} has no place beside it" in done.err


def test_names_are_cut_by_the_letters_that_are_drawn() -> None:
    """The DejaVu Sans of charts is wider than the font of pictures."""
    name = charts.shortened("swin_tiny_patch4_window7_224, window_size=4+embed_dim=24 (schedule.length=3)", 7, 165)
    figure = Figure(dpi=72)
    text = figure.text(0, 0, name, fontsize=7, fontfamily="DejaVu Sans")
    width = text.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width
    assert name.endswith("…")
    assert 155 < width <= 166
    assert charts.shortened("short", 7, 165) == "short"
