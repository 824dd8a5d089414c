"""Any bytes, and any JSON, as the records of a results folder: the runs beside them are reported all the same."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import edited, examples, watched
from synthetic_runs import make_run

from hcnet_cli import report, runs
from hcnet_cli.console import UserError
from hcnet_cli.published import COLUMNS, SPECS, read_published
from hcnet_cli.record import checksum
from hcnet_cli.report import page
from hcnet_cli.results import collect
from hcnet_cli.study.record import Cell, StudyRecord
from hcnet_cli.study.table import tables

FORMATS = st.sampled_from([*["json"] * 15, *report.FORMATS])  # the page takes far longer than reading
EDITS = st.lists(
    st.tuples(st.integers(0, 5000), st.sampled_from(["set", "insert", "cut"]), st.binary(max_size=9)), min_size=1
)
HOSTILE = st.sampled_from(
    ["9" * 5000, "1e999", "-1e308", "NaN", "Infinity", "1" + "0" * 400, '"\\ud800"', '"\\u001b[2J[/x]"', "[" * 20_000,
     "[" * 40 + "]" * 40, '{"a": {"a": {"a": 1}}}', "null", "true", "-1", '"' + "x" * 100_000 + '"', "[]", "{}", '""',
     "9223372036854775807", "1e18", '["a", 1, null]', '{"": ""}', '{"top1": 1e308}', '"<script>"', '"/etc/passwd"']
)  # fmt: skip
ANY_JSON = st.one_of(HOSTILE, st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None), max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
).map(json.dumps))  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, `good`; a run to be damaged, `bad`; and a study of both."""
    place = tmp_path_factory.mktemp("records") / "results"
    make_run(place, name="good", score=97.25, config="0" * 16)
    make_run(place, size="t", name="bad", seed=1, score=97.5, pictures=1, config="", variant="no-gate",
             init={"source": "a", "digest": "b", "seed": 3}, sessions=[{"argv": ["hcnet"], "host": "x"}])  # fmt: skip
    info = runs.read_record(place / "runs" / "good" / "run.json")
    (place / "runs" / "good" / "run.json").write_text(runs.record_text(info.model_copy(update={"config": ""})))
    cells = [
        Cell(arm=a, task="pretrain", seed=s, run=r, state="finished")
        for a, s, r in [("full", 0, "good"), ("x", 1, "bad")]
    ]
    record = StudyRecord(name="s", title="t", arms={"full": {}, "x": {}}, tasks=["pretrain"], seeds=[0, 1], cells=cells)
    (place / "studies").mkdir()
    (place / "studies" / "s.json").write_text(record.model_dump_json())
    return place


def reported(results: Path, fmt: str) -> None:
    """The report is made, and the whole run is in it."""
    with watched():
        made = report.report([results], fmt=fmt, extra=tables([results])[0], output=results / "r")
    assert "97.25" in made


def with_value(content: Any, choose: int, text: str) -> str:
    """The JSON text of `content` with one of its values, at any depth, replaced by `text`."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(content)
    node, key = places[choose % len(places)]
    node[key] = "@@"
    return json.dumps(content).replace('"@@"', text)


class Damaged:
    """A file that holds something else inside the block."""

    def __init__(self, file: Path, content: bytes | str) -> None:
        self.file, self.before = file, file.read_bytes()
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.file.write_bytes(self.before)


@examples()
@given(edits=EDITS, fmt=FORMATS)
def test_a_damaged_run_json(results: Path, edits: list[tuple[int, str, bytes]], fmt: str) -> None:
    file = results / "runs" / "bad" / "run.json"
    with Damaged(file, edited(file.read_bytes(), edits)):
        reported(results, fmt)


@examples()
@given(choose=st.integers(0, 300), value=ANY_JSON, signed=st.booleans(), fmt=FORMATS)
def test_any_value_in_run_json(results: Path, choose: int, value: str, signed: bool, fmt: str) -> None:
    file = results / "runs" / "bad" / "run.json"
    content = json.loads(file.read_text())
    text = with_value(content, choose, value)
    if signed:
        try:
            content = json.loads(text)
            text = json.dumps({**content, "checksum": checksum(content)})
        except (ValueError, RecursionError):
            pass
    with Damaged(file, text):
        reported(results, fmt)


@examples()
@given(
    lines=st.lists(
        st.one_of(ANY_JSON, st.builds('{{"step": {}, "loss": {}, "top1": {}}}'.format, ANY_JSON, ANY_JSON, ANY_JSON))
    )
)
def test_any_metrics_jsonl(results: Path, lines: list[str]) -> None:
    with Damaged(results / "runs" / "bad" / "metrics.jsonl", "\n".join(lines)), watched():
        found = collect([results])
        json.dumps(page._curves(found.runs, {run.folder: run.name for run in found.runs}), allow_nan=False)


@examples()
@given(edits=EDITS, choose=st.integers(0, 300), value=ANY_JSON, whole=st.booleans(), fmt=FORMATS)
def test_any_study(
    results: Path, edits: list[tuple[int, str, bytes]], choose: int, value: str, whole: bool, fmt: str
) -> None:
    file = results / "studies" / "s.json"
    text = with_value(json.loads(file.read_text()), choose, value).encode("utf-8", "surrogatepass")
    with Damaged(file, text if whole else edited(file.read_bytes(), edits)):
        reported(results, fmt)


CELLS = st.one_of(
    st.sampled_from(["", "1", "83.9", "1e300", "nan", "inf", "-0", "1_0", "0x10", "٣", "=1+1", "\x1b[2J", "\u202e"]),
    st.floats().map(str),
    st.text(max_size=9),
)  # fmt: skip
GOOD = {
    "table": "imagenet",
    "protocol": SPECS["imagenet"].protocols["pretrain/imagenet"],
    "model": "A-B",
    "source": "x",
    "top1": "80",
}


@examples()
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), CELLS, max_size=3), max_size=4),
    edits=st.one_of(st.just([]), EDITS),
    fmt=FORMATS,
)
def test_any_published_csv(
    results: Path, rows: list[dict[str, str]], edits: list[tuple[int, str, bytes]], fmt: str
) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({**GOOD, "model": f"A-{i}", **row} for i, row in enumerate(rows))
    file = results.parent / "mine.csv"
    file.write_bytes(edited(text.getvalue().encode("utf-8", "surrogatepass"), edits))
    try:
        with watched():
            read_published([file])
    except UserError as error:
        said = str(error)
    else:
        said = ""
        with watched():
            report.report([results], fmt=fmt, published=[file])
    assert said.isprintable()
