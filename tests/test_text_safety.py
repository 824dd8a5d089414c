"""Names that other people chose, in everything the program prints and writes: shown as they are, never obeyed.

Each payload is put into each place that a foreign text can enter, and everything is rendered for each medium. Whether
something is live is judged by other programs' rules: a Markdown and an HTML parser, csv, json, a tokenizer of TeX, the
Unicode database. A medium must have the structure that it has with harmless names.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rich.live
import rich.table
from conftest import Done, environment
from markdown_it import MarkdownIt
from PIL import Image
from synthetic_runs import make_run

from hcnet_cli import console, pictures, published
from hcnet_cli.console import Progress, Terminal, UserError
from hcnet_cli.report import card, escape, page, render, report, text
from hcnet_cli.runs import RunFolder, find_runs
from hcnet_cli.table import Column, Row, Table

PACKAGE = Path(__file__).parent.parent / "hcnet_cli"
HARMLESS = "PWN"
PAYLOADS = {
    "escape sequence": "\x1b[31mPWN\x1b]0;title\x07",
    "C1": "\x9b31mPWN\x9d0;title\x9c",
    "carriage return": "PWN\rgone\x08",
    "line break": "PWN\n\n# heading\n\n<b>bold</b>",
    "other line breaks": "PWN\u2028next\x85last\x0bend",
    "bidirectional": "PWN\u202egnp.exe\u2066",
    "invisible": "P\u200bW\ufeffN\u00ad\U000e0041",
    "markup": "[red]PWN[/gate]",
    "emoji code": ":bomb: [link=http://x.org]PWN[/link]",
    "formula": '=HYPERLINK("http://x.org","PWN")',
    "formula of a sum": "@SUM(PWN)",
    "formula of a difference": "-2+3+PWN",
    "tabulator": "\t=PWN",
    "link": "PWN [x](javascript:alert(1)) [y]: http://x.org",
    "picture": "![PWN](http://x.org/a.png)",
    "raw HTML": "<img src=x onerror=PWN>",
    "end of script": "</script><script>PWN</script><!--",
    "attribute": "\" onload='PWN' x=\"",
    "code": "`PWN` ```",
    "cells": "PWN | a || b & c \\\\",
    "TeX command": r"\input{PWN}\write18{PWN} ^^M",
    "TeX argument": "[5cm] PWN",
    "TeX star": "*PWN",
    "TeX mathematics": "$PWN_1^{2 %",
    "entity": "&lt;PWN&#60;",
    "template": "{{ PWN }}{% PWN %}",
    "other alphabets": "PWN 中文 café Ωß ½",
}
# Places, and how a payload gets there. What UTF-8 cannot hold cannot be in a record; file names have it, see below.
COUNTS = {"num_train": 9, "num_val": 9, "num_classes": 2}
FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "machine": lambda p: {"machine": p},
    "variant": lambda p: {"variant": p},
    "model": lambda p: {"model": p},
    "recipe protocol": lambda p: {"protocol": p},
    "changed field": lambda p: {"changes": {p: p}},
    "evaluation": lambda p: {"metric_notes": {"top1": p}},
    "argv": lambda p: {"argv": ["hcnet", "pretrain", p]},
    "error": lambda p: {"error": p, "status": "failed"},
    "source of the weights": lambda p: {"init": {"source": p}},
    "speed": lambda p: {"speed_notes": p},
    "version": lambda p: {"versions": {p: p}},
    "commit": lambda p: {"git_commit": p},
    "data": lambda p: {"data": dict.fromkeys(("name", "digest", "path"), p) | {"notes": [p], **COUNTS}},
}
MEDIA = ("terminal", "piped", "markdown", "latex", "csv", "json", "html", "pictures")
PLACES = (*FIELDS, "run name", "recipe file", "published model", "published source", "study", "class", "note")


def test_there_are_enough_injections() -> None:
    assert len(PLACES) * len(MEDIA) * len(PAYLOADS) > 840 * 4


def foreign_tables(payload: str) -> list[Table]:
    """What a study and a class list bring: titles, labels, notes, figures."""
    columns = [Column("variant", "variant"), Column("top1", "top-1", "percent"), Column("source", "source")]
    rows = [
        Row("measured", {"variant": payload, "top1": 98.6, "top1_ci": 0.1, "command": payload}, (Path("runs/a"),)),
        Row("measured", {"variant": "full", "top1": -1e300, "machine": payload}, (Path("runs/a"), Path("runs/b"))),
        Row("published", {"variant": "published", "top1": 1e300, "source": payload}),
    ]
    study = Table("ablation", payload, columns, rows, [payload, f"x {payload}"], forest=[(payload, 1.0, 0.5, 1.5)])
    classes = [Column("class", "class"), Column(payload, payload, "integer")]
    return [study, Table("check", "classes", classes, [Row("measured", {"class": payload, payload: 3})], [payload])]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Everything with one payload in every place, by medium; made once."""
    made: dict[str, dict[str, str]] = {}

    def of(payload: str) -> dict[str, str]:
        if payload not in made:
            made[payload] = _render(payload, tmp_path_factory.mktemp("text"))
        return made[payload]

    return of


def write_published(file: Path, name: str) -> None:
    protocol = next(iter(published.SPECS["imagenet"].protocols.values()))
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("table", "protocol", "model", "source", "img_size", "params_m", "macs_g", "top1"))
        for number in range(3):
            writer.writerow(("imagenet", protocol, f"{name} {number}", name, 224, 10 + number, 1e-300, 80 + number))


def _render(payload: str, root: Path) -> dict[str, str]:
    for number, fields in enumerate(FIELDS.values()):
        folder = make_run(root, seed=number, name=f"run{number}", score=90.0, log=number < 3)
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        (folder / "run.json").write_text(json.dumps(record | fields(payload)), encoding="utf-8")
    folder = make_run(root, seed=99, name=payload.replace("/", "∕"), pictures=1, score=91.0)
    (folder / "recipe.yaml").write_bytes(payload.encode())
    write_published(root / "published.csv", payload)
    try:
        published.read_published([root / "published.csv"])
    except UserError:  # its reader refuses what is hidden
        assert obeyed(payload)
        write_published(root / "published.csv", console.visible(payload))
    extra = foreign_tables(payload)
    made = {
        fmt: report([root], fmt=fmt, extra=extra, width=100) for fmt in ("rich", "markdown", "latex", "csv", "json")
    }
    made["html"] = report([root], fmt="html", extra=extra, refresh=5)
    about = {"classes": [payload], "interpolation": payload}
    made["cards"] = "".join(
        card.run_card(RunFolder(path), info, about, "local-dir:FOLDER") for path, info in find_runs(root)[0]
    )
    made["terminal"] = text.rich_text(extra, [payload], 100, color=True)
    made["piped"] = made.pop("rich")
    return made


@pytest.fixture(params=PAYLOADS.values(), ids=PAYLOADS)
def payload(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def obeyed(shown: str) -> set[str]:
    """The characters in a text that are obeyed or hidden, by the Unicode database; line feeds are ours."""
    return {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and c != "\n"}


def without_styles(shown: str) -> str:
    """Without what rich writes for bold, dim, italic, underlined: not red, no window titles."""
    return re.sub(r"\x1b\[[0-4](;[0-4])*m", "", shown)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("medium", ["terminal", "piped"])
def test_terminals_obey_nothing(rendered, payload: str, medium: str) -> None:
    shown = rendered(payload)[medium]
    assert not obeyed(without_styles(shown))
    flat = re.sub(r"\s", "", without_styles(shown))
    assert re.sub(r"\s", "", console.visible(payload)) in flat, "brackets and all are there"


def markdown_structure(shown: str) -> tuple[list[str], list[str]]:
    """Kinds of blocks and spans, and where links lead, by a parser with GitHub's tables."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(shown)
    spans = [span for token in tokens for span in token.children or ()]
    kinds = [f"{t.type} {t.content if t.type in ('html_block', 'html_inline') else ''}" for t in [*tokens, *spans]]
    links = [
        str(span.attrs.get("href") or span.attrs.get("src")) for span in spans if span.type in ("link_open", "image")
    ]
    return [kind for kind in kinds if not kind.startswith(("text ", "softbreak"))], links


@pytest.mark.parametrize("which", ["markdown", "cards"])
def test_markdown_keeps_its_structure(rendered, payload: str, which: str) -> None:
    kinds, links = markdown_structure(rendered(payload)[which])
    expected, _ = markdown_structure(rendered(HARMLESS)[which])
    assert Counter(kinds) - Counter(expected) == Counter(), "no further link, picture, element, heading or code"
    assert Counter(expected) - Counter(kinds) == Counter()
    assert not [link for link in links if re.match(r"[\w+.-]*:|//|#", link)]
    assert not obeyed(rendered(payload)[which])


CONTROL = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
OF_TEXT = {*"&%$#_{}\\", "textbackslash", "textasciitilde", "textasciicircum", "textasciigrave", "textless"}
OF_TEXT |= {"textgreater", "textbar", "times", "cdot", "to", "ldots", "pm"}


def commands(shown: str) -> Counter[str]:
    lines = [line for line in shown.splitlines() if not line.startswith("%")]
    return Counter(name for line in lines for name in CONTROL.findall(line) if name not in OF_TEXT)


def test_latex_keeps_its_structure(rendered, payload: str) -> None:
    shown = rendered(payload)["latex"]
    assert commands(shown) == commands(rendered(HARMLESS)["latex"])
    assert not re.search(r"^\s*[\[*(]", shown, re.MULTILINE), "an argument of the line before"
    bare = CONTROL.sub("", re.sub("^%.*", "", shown, flags=re.MULTILINE))
    assert bare.count("{") == bare.count("}")
    assert "%" not in bare
    assert "#" not in bare
    assert bare.count("$") % 2 == 0
    assert not obeyed(shown)
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", shown, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}


def test_spreadsheets_run_nothing(rendered, payload: str) -> None:
    rows, expected = (list(csv.reader(io.StringIO(rendered(p)["csv"]))) for p in (payload, HARMLESS))
    assert [len(row) for row in rows] == [len(row) for row in expected]
    for cell in (cell for row in rows for cell in row):
        assert not obeyed(cell)
        assert "\n" not in cell
        if re.match(r"\s*[=+\-@＝＋－＠]", cell):
            float(cell)  # raises for what is no number


def test_negative_numbers_stay_numbers() -> None:
    for value in (-2.5, "-2.5", "+1e-3", "-.5", "-3 %"[:2]):
        assert escape.in_csv(value) == value
    assert escape.in_csv("-cmd") == "'-cmd"


def test_json_gives_the_same_text_back(rendered, payload: str) -> None:
    shown = rendered(payload)["json"]
    assert not obeyed(shown)
    content = json.loads(shown, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {row["variant"] for table in content["tables"] if table["name"] == "ablation" for row in table["rows"]} == {
        payload, "full", "published",
    }  # fmt: skip
    assert [row[payload] for table in content["tables"] for row in table["rows"] if payload in row] == [3]


class Elements(HTMLParser):
    """(element, its attributes' names) of a page, its addresses, and the content of its scripts."""

    def __init__(self, shown: str) -> None:
        super().__init__()
        self.kinds: set[tuple[str, ...]] = set()
        self.addresses: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(shown)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.add((tag, *sorted(name for name, _ in attrs)))
        self.addresses += [(tag, value or "") for name, value in attrs if name in ("href", "src")]
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def test_the_page_has_no_element_but_its_own(rendered, payload: str) -> None:
    shown, expected = (Elements(rendered(p)["html"]) for p in (payload, HARMLESS))
    assert shown.kinds - {("span", "class")} <= expected.kinds
    assert all(where.startswith("#" if tag == "a" else "data:image/") for tag, where in shown.addresses)
    curves, script = shown.scripts
    assert len(json.loads(curves)) == len(json.loads(expected.scripts[0])) > 0
    assert script == expected.scripts[1]
    assert not obeyed(rendered(payload)["html"])


def test_the_page_forbids_all_but_its_one_script(rendered) -> None:
    """The policy names the digest of the script, by an independent tool where there is one."""
    import base64
    import hashlib

    shown = rendered(HARMLESS)["html"]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', shown)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    script = Elements(shown).scripts[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy[1]
    assert not re.search(r"\son\w+=|javascript:", re.sub(r"<script.*?</script>", "", shown, flags=re.DOTALL))


def test_numbers_without_meaning_do_not_break_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path, score=90.0)
    entries = [{"step": 1, "loss": 1e300}, {"step": 10**400, "loss": 1.0}, {"step": 2, "loss": -1e17, "lr": 10**400}]
    entries += [{"step": -5, "loss": 1.0}, {"step": 3, "loss": 2.5, "top1": 1e308}, {"step": "x"}]
    with (folder / "metrics.jsonl").open("w") as file:
        for entry in entries:
            file.write(json.dumps(entry) + "\n")
        file.write('{"step": 4, "loss": NaN}\n{"step": 5, "loss": Infinity}\n')
    columns = [Column("variant", "v"), Column("top1", "top-1", best=True), Column("macs_g", "MACs")]
    values = (1e300, 1e-300, float("nan"), float("inf"), -1.0, 10**400, 2.0, 3.0)
    rows = [Row("measured", {"variant": f"m{v}"[:9], "top1": v, "top1_ci": v, "macs_g": v}) for v in values]
    arms = [("a", 1.0, float("-inf"), float("inf")), ("b", 1e300, -1e300, 1e300), ("c", float("nan"), 0.0, 1.0)]
    table = Table("x", "x", columns, rows, forest=arms)
    shown = report([tmp_path], fmt="html", extra=[table])
    curves = json.loads(Elements(shown).scripts[0], parse_constant=lambda name: pytest.fail(name))
    assert curves[0]["loss"] == [[3, 2.5]]
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', re.sub("<script.*", "", shown, flags=re.DOTALL).split("<svg")[1])
    for fmt in ("rich", "markdown", "latex", "csv", "json"):
        render([table], fmt, width=80)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PAYLOADS.values(), "\udcff\ud800", "x" * 3_000_000, "𝕏\uffff\U0010ffff", ""])
def test_pictures_take_any_name(name: str) -> None:
    image = Image.new("RGB", (40, 30))
    shown = pictures.panel(
        pictures.draw_objects(image, [pictures.DrawnObject(name, (1, 2, 3), (1, 1, 9, 9))]), name, name
    )
    assert pictures.sheet([shown], name, [(name, (9, 9, 9))] * 3).width < 4000
    (file,) = pictures.file_names([name or "x"])
    assert not obeyed(file)
    assert "/" not in file
    assert not file.startswith(".")
    assert len(file.encode()) < 255


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF\n", b"BM" + b"\0" * 60, b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 99]
)
def test_the_page_opens_no_picture_but_png(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(content)
    assert page._image(file) is None
    os.mkfifo(tmp_path / "b.png")
    assert page._image(tmp_path / "b.png") is None


def test_the_page_leaves_out_pictures_that_are_too_large(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    assert page._image(tmp_path / "a.png") is None


# --- what is printed --------------------------------------------------------------------------------------------------


def on_terminal(show: Callable[[Terminal], object]) -> str:
    file = io.StringIO()
    show(Terminal(file=file, force_terminal=True, width=1000, soft_wrap=True))
    return file.getvalue()


def row(terminal: Terminal, payload: str) -> rich.table.Table:
    grid = rich.table.Table("key", payload, title=payload, caption=payload)
    grid.add_row(payload, payload)
    return grid


def live(terminal: Terminal, payload: str) -> None:
    with rich.live.Live(console=terminal, auto_refresh=False) as shown:
        shown.update(row(terminal, payload), refresh=True)


SHOWN: dict[str, Callable[[Terminal, str], object]] = {
    "a line": lambda terminal, payload: terminal.print(payload),
    "a styled line": lambda terminal, payload: terminal.print(payload, style="bold"),
    "rich's own text": lambda terminal, payload: terminal.print(rich.text.Text(payload)),
    "a table": lambda terminal, payload: terminal.print(row(terminal, payload)),
    "a live table": live,
}


@pytest.mark.parametrize("way", SHOWN)
def test_a_terminal_takes_nothing_for_markup_or_commands(way: str, payload: str) -> None:
    """Cursor movements of a live table are ours: it is compared with what it writes for a harmless name."""
    shown = on_terminal(lambda terminal: SHOWN[way](terminal, payload))
    codes = set(re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f][^A-Za-z]*[A-Za-z]?", shown))
    assert codes <= set(re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f][^A-Za-z]*[A-Za-z]?", on_terminal(
        lambda terminal: SHOWN[way](terminal, HARMLESS)
    )))  # fmt: skip
    assert {c for c in obeyed(shown) if unicodedata.category(c) != "Cc"} == set()
    if way != "rich's own text":  # which drops five of the control characters by itself
        assert console.visible(payload) in shown


def test_progress_notices_and_mistakes_obey_nothing(payload: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.notice(payload)
    console.warn(payload)
    console.print_error(payload, payload)
    with console.status_line() as tell:
        tell(payload)
    with Progress(2, metric=payload) as progress:
        progress.begin(payload)
        progress.evaluated(1, {payload: 1.0}, 1.0)
        progress.step(2, {"loss": 1.0, "images_per_second": 1.0, "data_wait": 0.0})
    shown = capsys.readouterr().err
    assert not obeyed(shown)
    assert shown.count(console.visible(payload)) >= 6
    assert len(shown.splitlines()) == 8


@pytest.mark.parametrize(
    "words",
    [
        ("{}",),
        ("pretrain", "--{}"),
        ("pretrain", "--epochs", "{}"),
        ("pretrain", "--recipe", "{}"),
        ("pretrain", "--data", "nowhere/{}", "--dry-run"),
        ("pretrain", "--set", "{}"),
        ("pretrain", "--set", "{}=1"),
        ("pretrain", "--name", "a/{}"),
        ("report", "--table", "{}"),
        ("report", "--format", "{}"),
        ("report", "--published", "{}"),
        ("report", "--results", "nowhere/{}"),
        ("report", "--output", "{}.x"),
        ("ablate", "--study", "{}"),
        ("ablate", "--disable", "{}"),
        ("recipes", "show", "{}"),
        ("recipes", "explain", "{}"),
        ("check", "nowhere/{}"),
        ("evaluate", "nowhere/{}"),
        ("explain", "nowhere/{}"),
        ("bench", "--models", "{}"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["escape sequence", "markup", "bidirectional", "line break"])
def test_a_mistake_in_any_argument_is_one_sentence(
    words: tuple[str, ...], name: str, hcnet: Callable[..., Done]
) -> None:
    done = hcnet(*(word.replace("{}", PAYLOADS[name]) for word in words))
    assert done.code == 2, done.err
    assert not obeyed(done.out + done.err)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert len(done.err.splitlines()) <= 3, "a notice, an error and a hint"


def test_nothing_else_prints() -> None:
    """All that leaves goes through console.py, or is a report that report/ rendered. No console takes markup."""
    found: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called = ast.unparse(node.func)
            place = f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)[:60]}"
            if path.name != "console.py" and called in (
                "print",
                "Console",
                "rich.console.Console",
                "rich.print",
                "input",
            ):
                found.append(place)
            if called in ("sys.stdout.write", "sys.stderr.write") and not ast.unparse(node.args[0]).startswith(
                "render("
            ):
                found.append(place)
            if any(keyword.arg == "markup" and ast.unparse(keyword.value) != "False" for keyword in node.keywords):
                found.append(place)
    # those that render by themselves: `hcnet card`, `hcnet report`, and docs/recipe.md, made by a developer
    assert [place.split(" ")[-1] for place in found] == ["sys.stdout.write(text)"] * 2 + ["end='')"]


# --- encodings and places that take no text ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encodings") / "results"
    make_run(root, machine="中文 – ± ·", name="caf\u00e9")
    make_run(root, variant="k3", name="\udcff-name")
    return root


def command(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    env = {**environment(), **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "hcnet_cli", *words], env=env, timeout=60, **options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_encoding_of_the_terminal(encoding: str, results: Path) -> None:
    env = {"PYTHONIOENCODING": encoding}
    done = command("report", "--results", results, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    if encoding == "ascii":
        assert "+-: half" in shown or "------" in shown
        assert r"caf\xe9" in shown
        assert "\\u2500" not in shown, "the frame of a table is drawn with hyphens"
    assert r"\udcff-name" in "".join(shown.split())  # a long path is broken at hyphens


def test_ascii_for_our_own_characters() -> None:
    """Every character that the program's own texts use beyond ASCII has a readable form."""
    constants = {
        node.value
        for path in PACKAGE.rglob("*.py")
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))  # a docstring
        for node in ast.iter_child_nodes(statement)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    own = {c for constant in constants for c in constant if not c.isascii()}
    of_escapes = set("＝＋－＠ω\ud800\udfff") | escape.LATEX_LETTERS | escape.ACCENTS
    assert own - of_escapes <= set(console.PLAIN)
    assert all(form.isascii() and form for form in console.PLAIN.values())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("closed", [">&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_closed_and_full_outputs_give_no_traceback(closed: str, results: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = f'"{sys.executable}" -X faulthandler -m hcnet_cli report --results "{results}" > {log} 2>&1 {closed}'
    done = subprocess.run(["bash", "-c", line], env=environment(), timeout=60)
    assert done.returncode == (2 if ">/dev/full" in f" {closed}".replace("2>/dev/full", "") else 0)
    assert "Traceback" not in log.read_text()
    assert "Exception ignored" not in log.read_text()


def test_every_medium_is_rendered(rendered) -> None:
    assert set(rendered(HARMLESS)) == set(MEDIA) - {"pictures"} | {"cards"}
