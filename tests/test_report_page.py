"""The HTML page: whole and self-contained as text, and opened in a real Chromium: sorting, curves, pictures, phones."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import chromium
import pytest
from PIL import Image
from synthetic_runs import make_run, picture

from hcnet_cli.record import data_card, read_record
from hcnet_cli.report import figures, page, plots, report
from hcnet_cli.table import Column, Row, Table

EVIL = "</script><img src=x onerror=window.hacked=1><b>"
needs_chromium = pytest.mark.skipif(chromium.find() is None, reason="no chromium or chrome here")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page") / "results"
    for seed in range(3):
        make_run(root, seed=seed, score=98.5 + 0.3 * seed)
    make_run(root, "digits", "t", score=99.2)
    make_run(root, variant="no-refinement", score=97.1, machine=EVIL, argv=["hcnet", EVIL])
    make_run(root, seed=7, done=0.4, status="interrupted", changes={"optim.lr": EVIL})
    make_run(root, "imagenet-1k", "t", score=82.71)
    make_run(root, "imagenet-1k", "s", score=83.34)
    make_run(root, "imagenet-1k", "b", score=83.0, done=0.5, status="running")
    for seed in range(2):
        make_run(root, "digit-scenes", seed=seed, pictures=3)
        make_run(root, "digit-stuff", seed=seed, pictures=2)
    (root / "runs" / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def ablation() -> Table:
    columns = [Column("arm", "arm"), Column("top1", "top-1", "percent", best=True)]
    rows = [Row("measured", {"arm": name, "top1": value}) for name, value in [("full", 98.6), ("no-gate", 97.4)]]
    arms = [
        ("no-gate", -1.2, -1.9, -0.5),
        ("no-conservation", 0.1, -0.6, 0.8),
        ("no-refinement", -0.4, *2 * [float("nan")]),
    ]
    return Table("ablation", "Ablation: components on digits", columns, rows, ["Paired by seed."], forest=arms)


@pytest.fixture(scope="module")
def text(results, ablation) -> str:
    return report([results], fmt="html", extra=[ablation])


@pytest.fixture(scope="module")
def tab(text, tmp_path_factory):
    """A Chromium with the page in a file; each test loads it."""
    file = tmp_path_factory.mktemp("html") / "report.html"
    file.write_text(text, encoding="utf-8")
    with chromium.page() as browser:
        browser.file = file
        yield browser


def load(tab, width: int = 1280, dark: bool = False):
    tab.view(width, dark=dark)
    tab.open(tab.file)
    return tab


def enter(tab, field: str, value: str) -> None:
    """Types into a field or chooses in a list, as far as the page can tell."""
    events = "f.dispatchEvent(new Event('input')); f.dispatchEvent(new Event('change'));"
    tab.js(f"(f => {{ f.value = '{value}'; {events} }})(document.querySelector('{field}'))")


# --- as text --------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    VOID = frozenset({"meta", "link", "img", "input", "br", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.loads += [values[a] for a in ("src", "href") if a in values and tag != "a"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass  # an SVG element without content

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained(text):
    """Elements close, ids are unique, every link inside leads somewhere, and nothing is loaded from anywhere."""
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert len(set(outline.ids)) == len(outline.ids)
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
    assert all(uri.startswith("data:") for uri in outline.loads)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text.replace("url(#", ""))


def test_names_in_runs_are_text_not_markup(text):
    assert EVIL not in text
    assert "&lt;img src=x" in text


def test_every_measured_number_leads_to_its_run(text, results):
    """Each run has its record on the page: command, recipe, code, machine, data."""
    assert (
        text.count("<dt>command</dt>")
        == text.count("<dt>code</dt>")
        == len(list((results / "runs").glob("*/run.json")))
    )
    for name in (folder.parent.name for folder in (results / "runs").glob("*/run.json")):
        assert name in text


def test_published_only_page_says_how_to_begin(tmp_path):
    text = report([tmp_path], fmt="html")
    assert "hcnet pretrain --size pico" in text
    assert "HcNet-T" in text


def test_refresh_is_there_only_when_asked(results):
    assert "location.reload(), 5000" in report([results], fmt="html", refresh=5)
    assert "location.reload" not in report([results], fmt="html")


def test_large_pictures_are_made_smaller_and_damaged_ones_left_out(tmp_path):
    noise = Image.effect_noise((1600, 1200), 90)
    folder = make_run(tmp_path, "digit-scenes") / "final" / "pictures"
    folder.mkdir(parents=True)
    noise.save(folder / "00.png")
    (folder / "01.png").write_bytes(b"\x89PNG no picture")
    picture(folder / "02.png", 2)
    text = report([tmp_path], fmt="html")
    assert text.count("data:image/jpeg;base64,") == 1
    assert text.count("data:image/png;base64,") == 1
    assert "1 more picture lies in" in text
    assert len(text) < 600_000 + len(report([tmp_path / "none"], fmt="html"))


def test_a_run_shows_its_first_batches_and_its_data(tmp_path):
    folder = make_run(tmp_path)
    picture(folder / "batches.png", 0)
    info = read_record(folder / "run.json")
    info.data.card = data_card("images", {"cat": 30, "dog": 10}, [(32, 48)])
    (folder / "run.json").write_text(info.model_dump_json())
    text = report([tmp_path], fmt="html")
    assert "the first training batches" in text
    assert "how it learns, and what is wrong" in text
    assert "2 classes of 10 to 30 images, 3.0 to 1; 48 x 32 pixels, of 1 images" in text


def test_page_stops_taking_pictures(tmp_path, monkeypatch):
    """With very many pictures the page stays small and counts the rest."""
    monkeypatch.setattr(page, "ALL_PICTURES_BYTES", 5_000)
    for number in range(4):
        make_run(tmp_path, "digit-scenes", pictures=5, changes={"optim.lr": number}, name=f"r{number}")
    shown = report([tmp_path], fmt="html").count("data:image/png")
    assert 0 < shown < 16
    assert f"{20 - shown} more pictures" in report([tmp_path], fmt="html")


def test_curves_are_thinned_and_keep_the_last_point():
    log = [{"step": i, "loss": float(i)} for i in range(1, 5001)]
    thin = plots.thinned(log, "loss")
    assert len(thin) == plots.CURVE_POINTS
    assert (thin[0], thin[-1]) == ([1, 1.0], [5000, 5000.0])
    assert plots.thinned([{"step": 1, "loss": float("nan")}, {"step": 2}], "loss") == []


def test_five_hundred_runs(tmp_path):
    """As many runs as a year makes are one page of a few megabytes."""
    for number in range(500):
        name = f"run-{number}"
        make_run(tmp_path, seed=number % 5, changes={"optim.lr": number // 5}, fingerprint=f"{number:08x}", name=name)
    text = report([tmp_path], fmt="html")
    assert text.count("<dt>command</dt>") == 500
    assert len(text) < 6_000_000
    assert report([tmp_path], fmt="markdown").count("\n| HcNet-pico") == 100


def luminance(color: str) -> float:
    color = color.lstrip("#")
    color = "".join(c * 2 for c in color) if len(color) == 3 else color
    parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_enough_contrast(theme):
    """WCAG AA (4.5 to 1) for every text colour on every ground it stands on."""
    css = (Path(page.__file__).parent / "page.css").read_text()
    block = re.findall(r":root[^{]*\{([^}]*)\}", css)[0 if theme == "light" else 1]
    colors = dict(re.findall(r"--([\w-]+): (#\w+)", block))
    for ink in ("ink", "muted", "hot", "cool"):
        for ground in ("bg", "panel", "hot-soft", "shade"):
            a, b = sorted((luminance(colors[ink]), luminance(colors[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, f"{ink} on {ground}"


def test_the_two_dark_palettes_are_one():
    """The system's dark and the button's dark are written twice in CSS; they must not drift apart."""
    css = (Path(page.__file__).parent / "page.css").read_text()
    blocks = [re.findall(r"--[\w-]+: #\w+", block) for block in re.findall(r":root[^{]*\{([^}]*)\}", css)]
    assert blocks[1] == blocks[2]


# --- figures --------------------------------------------------------------------------------------------------------


def boxes(figure: str) -> list[tuple[float, float, float, float]]:
    found = re.findall(r'<text class="label[^"]*" x="([\d.]+)" y="([\d.]+)">([^<]+)</text>', figure)
    return [(float(x), float(y) - figures.FONT, float(x) + len(t) * figures.LETTER, float(y) + 3) for x, y, t in found]


@pytest.mark.parametrize("width", [580, 350])
def test_scatter_labels_do_not_collide(width):
    """Twenty models in one corner: what is labelled is legible, inside the picture, and measured models come first."""
    points = [figures.Point(4 + i / 10, 80 + i % 4, "published", f"Family{i}", "x") for i in range(20)]
    points += [figures.Point(4.5, 81.5, "measured", "HcNet-pico, no-refinement", "x", half=0.4)]
    figure = figures.scatter(points, "MACs (G)", "top-1", width, 400)
    labels = boxes(figure)
    assert len(labels) >= 4
    assert "HcNet-pico, no-refinement</text>" in figure
    for a, b in combinations(labels, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert all(a[0] >= 0 and a[2] <= width for a in labels)


def test_scatter_positions_are_logarithmic():
    """Equal ratios in x are equal distances, and higher is up."""
    points = [figures.Point(x, y, "measured", str(x), "") for x, y in [(1, 70), (10, 75), (100, 80)]]
    figure = figures.scatter(points, "x", "y", 600, 400)
    xs, ys = zip(
        *[map(float, m) for m in re.findall(r'<circle class="dot[^>]*cx="([\d.]+)" cy="([\d.]+)"', figure)], strict=True
    )
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] > ys[1] > ys[2]


def test_scatter_takes_one_point_and_equal_points():
    for points in ([(1.0, 5.0)], [(2.0, 80.0), (2.0, 80.0)]):
        figure = figures.scatter([figures.Point(x, y, "measured", "m", "") for x, y in points], "x", "y", 350, 330)
        assert "nan" not in figure
        assert figure.count("<circle") == len(points)


def test_forest_tells_sure_from_unsure(ablation):
    """An interval without zero is in full colour; without an interval there is a mark and no whisker."""
    figure = figures.forest(ablation.forest, "difference", 760)
    assert figure.count('class="whisker measured"') == 1
    assert figure.count('class="whisker unsure"') == 1
    assert figure.count("<rect") == 3
    assert "−1.20 [−1.90, −0.50]" in figure
    assert '<path class="zero"' in figure
    assert "nan" not in figure


# --- in a browser ---------------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_opens_without_errors_and_fits(tab, width, dark):
    """No console errors, nothing asked of the network, pictures load, and nothing sticks out of a phone's viewport."""
    load(tab, width, dark)
    assert tab.js(
        "Promise.all([...document.images].filter(i => i.src).map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert tab.js("document.querySelectorAll('#charts path.curve').length") > 0
    assert tab.js("document.documentElement.scrollWidth") <= width
    wide = f"e => e.getBoundingClientRect().right > {width} + 0.5 && !e.closest('.scroll, svg, dialog, pre')"
    assert tab.js(f"[...document.querySelectorAll('body *')].filter({wide}).map(e => e.outerHTML.slice(0, 80))") == []
    if width == 390:
        assert (
            tab.js("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length") == 0
        )
    lightness = tab.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert lightness < 60 if dark else lightness > 200
    assert tab.js("window.hacked === undefined")
    assert tab.errors == []


COLUMN = """(() => { const t = document.querySelector('table');
  const i = [...t.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === 'top-1');
  return [...t.tBodies[0].rows].map(r => r.cells[i].dataset.v); })()"""
SORT = "[...document.querySelectorAll('table')[0].tHead.rows[0].cells].find(c => c.textContent.trim() === '%s')"


@needs_chromium
def test_tables_sort_by_click_and_by_key(tab):
    """From the highest, from the lowest, then the first order again; aria-sort says which; the keyboard does too."""
    load(tab)
    first = tab.js(COLUMN)
    head = SORT % "top-1"
    tab.js(f"{head}.querySelector('button').click()")
    assert tab.js(f"{head}.ariaSort") == "descending"
    values = [float(v) for v in tab.js(COLUMN) if v]
    assert values == sorted(values, reverse=True)
    tab.js(f"{head}.querySelector('button').focus()")
    tab.key("Enter")
    assert tab.js(f"{head}.ariaSort") == "ascending"
    values = [float(v) for v in tab.js(COLUMN) if v]
    assert values == sorted(values)
    tab.key(" ")
    assert tab.js(f"{head}.ariaSort") is None
    assert tab.js(COLUMN) == first


@needs_chromium
def test_missing_values_stay_below_whichever_way(tab):
    load(tab)
    rows = "[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[4].dataset.v === '')"
    for _ in range(2):
        tab.js(SORT % "images/s" + ".querySelector('button').click()")
        missing = tab.js(rows)
        assert missing == sorted(missing)
        assert any(missing)
        assert not all(missing)


@needs_chromium
def test_theme_button_turns_the_page(tab):
    load(tab)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = tab.js(ground)
    tab.js("document.querySelector('#theme').click()")
    assert tab.js(ground) != light
    assert tab.js("document.querySelector('#theme').textContent") == "Light"
    tab.js("document.querySelector('#theme').click()")
    assert tab.js(ground) == light


@needs_chromium
def test_a_numbers_link_opens_its_run(tab):
    load(tab)
    tab.js("document.querySelector('tr.measured td.source a').click()")
    tab.js("new Promise(done => setTimeout(done, 100))")
    assert tab.js("document.getElementById(location.hash.slice(1)).open")
    assert tab.js("document.getElementById(location.hash.slice(1)).textContent.includes('hcnet pretrain')")


@needs_chromium
def test_curves_follow_the_choice(tab):
    """Unchecking a run takes its curve away; another data set draws its own metric; finding hides names."""
    load(tab)
    curves = "[...document.querySelectorAll('#charts figure')].map(f => f.querySelectorAll('path.curve').length)"
    assert tab.js(curves) == [3, 3, 3]  # what is trained now comes first
    assert tab.js("document.querySelector('#curve-runs label').title") == "HcNet-B, seed 0"
    enter(tab, "#curve-group", "digits: top1")
    assert tab.js(curves) == [6, 6, 6]
    tab.js("document.querySelector('#curve-runs input').click()")
    assert tab.js(curves) == [5, 5, 5]
    enter(tab, "#curve-group", "digit-stuff: mIoU")
    assert tab.js(curves) == [2, 2, 2]
    assert "mIoU" in tab.js("document.querySelectorAll('#charts figcaption')[1].textContent")
    enter(tab, "#curve-find", "seed 1")
    assert tab.js("[...document.querySelectorAll('#curve-runs label')].filter(l => l.offsetParent).length") == 1
    assert tab.errors == []


@needs_chromium
def test_a_single_point_is_seen_and_an_axis_has_one_notation(tmp_path):
    run = make_run(tmp_path)
    lines = [{"step": step, "lr": lr, "loss": 1.0} for step, lr in ((100, 1.5e-3), (440, 5e-4))]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"step": 440, "top1": 90.0}])))
    (tmp_path / "page.html").write_text(report([tmp_path], fmt="html"), encoding="utf-8")
    with chromium.page() as tab:
        tab.file = tmp_path / "page.html"
        load(tab)
        circles = "[...document.querySelectorAll('#charts figure')].map(f => f.querySelectorAll('circle').length)"
        assert tab.js(circles) == [0, 1, 0]
        ticks = "[...document.querySelectorAll('#charts figure:nth-child(3) text.tick[text-anchor=end]')]"
        assert tab.js(f"{ticks}.map(t => t.textContent).filter(t => t.includes('e') || t.includes('.'))") == [
            *("5e-4", "1e-3", "1.5e-3"),
        ]


def test_curves_leave_out_what_all_runs_share_and_begin_with_the_best(tmp_path):
    for seed in range(3):
        changes = {"schedule.length": 20, "optim.lr": 0.1 * (seed + 1)}
        make_run(tmp_path, seed=seed, score=90.0 + seed, changes=changes)
    labels = re.findall(r'"label":"([^"]+)"', report([tmp_path], fmt="html"))
    assert labels == [f"HcNet-pico, seed {seed} (optim.lr={0.1 * (seed + 1)})" for seed in (2, 1, 0)]


@needs_chromium
def test_run_list_is_found_by_words(tab):
    load(tab)
    enter(tab, "#run-find", "imagenet hcnet-s")
    assert tab.js("[...document.querySelectorAll('#run-list > details')].filter(d => d.offsetParent).length") == 1


@needs_chromium
def test_pictures_open_large_and_close_by_key(tab):
    load(tab)
    tab.js("document.querySelector('.picture').click()")
    assert tab.js("document.querySelector('#zoom').open && document.querySelector('#zoom img').naturalWidth > 0")
    tab.key("Escape")
    assert not tab.js("document.querySelector('#zoom').open")


@needs_chromium
def test_a_phone_can_see_all_columns(tab):
    """Hidden columns come back by a button, inside a region that scrolls by itself and takes the keyboard."""
    load(tab, 390)
    count = (
        "[...document.querySelectorAll('section')[0].querySelectorAll('thead th')].filter(c => c.offsetParent).length"
    )
    before = tab.js(count)
    tab.js("document.querySelector('button.columns').click()")
    assert tab.js(count) > before
    assert tab.js("document.querySelector('button.columns').ariaPressed") == "true"
    assert tab.js("document.documentElement.scrollWidth") <= 390
    assert tab.js("document.querySelector('.scroll').tabIndex") == 0


OVERLAPS = """[...document.querySelectorAll('.figures svg')].filter(s => s.checkVisibility()).flatMap(s => {
  const boxes = [...s.querySelectorAll('.label')].map(t => [t.textContent, t.getBoundingClientRect()]), bad = [];
  for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1)) {
    const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (x > 1 && y > 3) bad.push(a + ' / ' + b);
  }
  return bad; })"""


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_labels_do_not_collide_as_drawn(tab, width):
    """With the fonts of this machine, no label of a figure lies over another."""
    load(tab, width)
    overlaps = tab.js(OVERLAPS)
    assert overlaps == []
