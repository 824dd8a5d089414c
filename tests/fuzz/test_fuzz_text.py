"""Any Unicode in every format: each must be read back by a program that does not know ours."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment
from markdown_it import MarkdownIt
from support import examples, watched

from hcnet_cli import pictures
from hcnet_cli.console import visible
from hcnet_cli.report import escape, figures, page, render
from hcnet_cli.table import Column, Row, Table, is_number

SPECIAL = "\\`*_{}[]<>()#+-.!|$~^&%@=:\"'/\t\r\n\x1b\x9b\u202e\u2028\u200b\ud800\udcffé中 012ab"
TEXTS = st.text(st.one_of(st.sampled_from(SPECIAL), st.characters(codec=None)), max_size=40)
NUMBERS = st.one_of(st.none(), st.floats(), st.integers())
ROWS = st.lists(st.tuples(TEXTS, NUMBERS, TEXTS), min_size=1, max_size=4)
COLUMNS = (Column("a", "a"), Column("b", "b", "number", best=True), Column("c", "c"))


def table(title: str, rows: list[tuple[str, float | None, str]]) -> Table:
    made = [Row("measured", dict(zip("abc", cells, strict=True)), (Path("runs/x"),)) for cells in rows]
    return Table("x", title, COLUMNS, made, [title, *(cells[2] for cells in rows)])


def hidden(shown: str) -> set[str]:
    return {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")} - {"\n"}


@examples()
@given(TEXTS)
def test_what_is_visible_is_read_back(text: str) -> None:
    """Nothing hidden is left, one line is one line, and a reader of escapes gets the text (but for backslashes)."""
    with watched():
        shown = visible(text)
    assert not hidden(shown)
    assert len(shown.splitlines()) <= 1
    if "\\" not in text:
        read = re.sub(r"\\(U[\da-f]{8}|u[\da-f]{4}|x[\da-f]{2})", lambda m: chr(int(m[1][1:], 16)), shown)
        assert re.sub(r"\\([nrt])", lambda m: {"n": "\n", "r": "\r", "t": "\t"}[m[1]], read) == text


@examples()
@given(TEXTS, ROWS)
def test_csv_gives_the_cells_back(title: str, rows: list[tuple[str, float | None, str]]) -> None:
    with watched():
        shown = render([table(title, rows)], "csv")
    header, *read = csv.reader(io.StringIO(shown))
    assert header == ["title", "a", "b", "c"]
    for cells, (a, b, c) in zip(read, rows, strict=True):
        for cell, given_text in zip((cells[0], cells[1], cells[3]), (title, a, c), strict=True):
            assert cell.removeprefix("'") == visible(given_text).removeprefix("'")
            if re.match(r"\s*[=+\-@]", cell):
                float(cell.rstrip("%"))
        assert float(cells[2]) == pytest.approx(b, rel=1e-6, abs=0) if is_number(b) else cells[2] == ""


@examples()
@given(TEXTS, ROWS)
def test_markdown_has_its_columns_and_nothing_live(title: str, rows: list[tuple[str, float | None, str]]) -> None:
    with watched():
        shown = render([table(title, rows)], "markdown")
    assert not hidden(shown)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(shown)
    kinds = [token.type for token in tokens]
    assert kinds.count("tr_open") == len(rows) + 1
    assert kinds.count("th_open") + kinds.count("td_open") == 3 * (len(rows) + 1)
    assert kinds.count("heading_open") == 1
    spans = [span for token in tokens for span in token.children or ()]
    assert {span.type for span in spans} <= {"text", "text_special", "strong_open", "strong_close", "code_inline"}
    assert kinds.count("html_block") == 2, "the list of runs folds"
    assert [t.content for t in tokens if t.type == "html_block" and "details" not in t.content] == []
    if (plain := visible(title).strip()) and "  " not in plain:
        assert "".join(span.content for span in tokens[1].children or ()) == plain


@examples()
@given(TEXTS, ROWS)
def test_latex_is_balanced(title: str, rows: list[tuple[str, float | None, str]]) -> None:
    with watched():
        shown = render([table(title, rows)], "latex")
    bare = re.sub(r"\\([A-Za-z]+|[^A-Za-z])", "", re.sub("^%.*", "", shown, flags=re.MULTILINE))
    depth = 0
    for char in bare:
        depth += (char == "{") - (char == "}")
        assert depth >= 0
    assert depth == 0
    assert not set(bare) & set("%#~^_")
    assert bare.count("$") % 2 == 0
    assert bare.count("&") == 2 * (len(rows) + 1)
    assert not re.search(r"^\s*[\[*(]", shown, re.MULTILINE)
    assert all(ord(char) < 0x180 for char in bare)


@examples()
@given(TEXTS, ROWS)
def test_json_gives_everything_back(title: str, rows: list[tuple[str, float | None, str]]) -> None:
    with watched():
        shown = render([table(title, rows)], "json")
    assert not hidden(shown)
    (read,) = json.loads(shown)["tables"]
    assert read["title"] == title
    assert [(row["a"], row["c"]) for row in read["rows"]] == [(a, c) for a, _, c in rows]


@examples()
@given(TEXTS, ROWS, st.integers(20, 200))
def test_terminals_obey_nothing(title: str, rows: list[tuple[str, float | None, str]], width: int) -> None:
    with watched():
        shown = render([table(title, rows)], "rich", width=width)
    assert not hidden(shown)


class Texts(HTMLParser):
    def __init__(self, shown: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(shown)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("p", "svg", "path", "text", "circle", "title", "rect")
        self.found += [value or "" for name, value in attrs if name in ("title", "aria-label")]

    def handle_data(self, data: str) -> None:
        self.found.append(data)


@examples()
@given(TEXTS)
def test_html_has_no_element_but_ours(text: str) -> None:
    template = Environment(autoescape=True, finalize=page._shown).from_string('<p title="{{ x }}">{{ x }}</p>')
    points = [figures.Point(x, 1.0, "measured", text, text) for x in (1.0, 2.0)]
    with watched():
        shown = template.render(x=text)
        drawn = figures.scatter(points, text, text, 500, 300) + figures.forest([(text, 1.0, 0.5, 2.0)], text, 700)
    attribute, *content = Texts(shown).found
    assert attribute == "".join(content) == visible(text, keep="\n")
    labels = Texts(drawn).found
    assert not text.strip() or visible(text) in labels
    assert not hidden(drawn)


@examples()
@given(TEXTS)
def test_pictures_take_any_name(text: str) -> None:
    with watched():
        line = pictures.one_line(text)
        (file,) = pictures.file_names([f"{text}.jpg/{text}x.jpg"])
    assert not hidden(line)
    assert "\n" not in line
    assert not set(file) & set('\\/:*?"<>|')


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)


@examples()
@given(JSON)
def test_any_content_is_json(content: object) -> None:
    with watched():
        shown = escape.to_json(content)
    assert not hidden(shown)
    read = json.loads(shown, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
    assert json.dumps(read) == json.dumps(escape._finite(content))
