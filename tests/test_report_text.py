"""Tables as text: what each format must carry, that it is well-formed, and that the same runs give the same bytes."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from synthetic_runs import make_run

from hcnet_cli.console import UserError
from hcnet_cli.report import FORMATS, format_for, render, report, report_check
from hcnet_cli.report.text import latex_labels
from hcnet_cli.table import Column, Row, Table, mark_best, number

TEXT_FORMATS = [fmt for fmt in FORMATS if fmt != "html"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of every kind: seeds, a changed recipe, an unfinished and a failed run, benchmarks, broken folders."""
    root = tmp_path_factory.mktemp("report") / "results"
    for seed in range(3):
        make_run(root, seed=seed, score=98.5 + 0.3 * seed)
    make_run(root, variant="no-refinement", score=97.1)
    make_run(root, changes={"optim.lr": 0.004, "model.depths": [1, 1]}, fingerprint="0badf00d", score=96.2)
    make_run(root, seed=5, done=0.4, status="interrupted", score=99.9)
    make_run(root, seed=6, done=0.05, status="failed", error="a | b_c")
    make_run(root, "imagenet-1k", "t", score=82.71)
    make_run(root, "imagenet-1k", "s", score=83.34)
    make_run(root, "digit-scenes", pictures=1)
    make_run(root, "digit-stuff", metric_notes={"mIoU": "single scale, whole image, 11 of 11 classes"})
    (root / "runs" / "half").mkdir()
    (root / "runs" / "half" / "run.json").write_text('{"schema_v')
    return root


def parsed(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as GitHub's parser sees them: tables of rows of cells."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found: list[list[list[str]]] = []
    for before, token in itertools.pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif before.type in ("td_open", "th_open"):
            found[-1][-1].append(token.content)
    return found


@pytest.mark.parametrize("fmt", FORMATS)
def test_same_runs_same_bytes(folder, fmt):
    assert report([folder], fmt=fmt, width=80) == report([folder], fmt=fmt, width=80)


def test_the_ending_of_a_file_names_the_format():
    assert format_for(Path("REPORT.MD")) == "markdown"
    assert format_for(None) == "rich"
    assert [format_for(Path(f"report.{ending}")) for ending in FORMATS.values()] == list(FORMATS)
    with pytest.raises(UserError, match=r"Unknown ending of a report \"\.docx\""):
        format_for(Path("report.docx"))


def test_markdown_tables_are_whole(folder):
    """Every row has its header's number of cells, and the required columns of the ImageNet table are there."""
    tables = parsed(report([folder], fmt="markdown"))
    assert len(tables) == 10
    for table in tables:
        assert {len(row) for row in table} == {len(table[0])}
    assert tables[0][0][:7] == ["model", "image", "#params (M)", "MACs (G)", "images/s", "top-1", "top-5"]


def test_best_measured_and_best_published_are_marked_apart(folder):
    """Bold is the best finished run, underline the best published row; an unfinished run is never best."""
    text = report([folder], fmt="markdown", table="imagenet")
    assert "**83.34**" in text
    assert "<u>84.5</u>" in text
    assert "**98.80 ± 0.75**" in text
    assert "**99.90**" not in text
    assert "HcNet-pico (interrupted at 40 %)" in text


def test_cells_never_measured_say_so(folder):
    text = report([folder], fmt="markdown", table="imagenet")
    assert "–: not measured" in text


def test_macs_convention_stands_under_every_table(folder):
    text = report([folder], fmt="markdown")
    assert text.count("norms, pooling and element-wise work are not counted") == len(parsed(text))


def test_departures_are_named_under_the_table(folder):
    text = report([folder], fmt="markdown", table="imagenet")
    assert "[1] Departs from pretrain/digits: optim.lr=0.004, model.depths=[1, 1]." in text


def test_links_lead_to_the_runs_from_where_the_file_lies(folder):
    output = folder / "tables" / "all.md"
    links = re.findall(r"\]\(([^)]+)\)", report([folder], fmt="markdown", output=output))
    assert len(links) == 11
    assert all((output.parent / link / "run.json").resolve().is_file() for link in links)


def test_data_sets_never_share_a_table(folder):
    """No table of the JSON holds measured rows of two data sets."""
    for table in json.loads(report([folder], fmt="json"))["tables"]:
        assert len({row["data"] for row in table["rows"]}) == 1


def test_csv_and_json_carry_every_column(folder):
    """Source, protocol, command, commit, seeds and steps are in both, and the numbers agree."""
    rows = list(csv.DictReader(io.StringIO(report([folder], fmt="csv"))))
    tables = json.loads(report([folder], fmt="json"))["tables"]
    flat = [row for table in tables for row in table["rows"]]
    assert len(rows) == len(flat)
    for name in ("protocol", "source", "command", "commit", "machine", "seeds", "steps_done", "metric_notes", "runs"):
        assert name in rows[0]
        assert name in flat[0]
    for a, b in zip(rows, flat, strict=True):
        assert (float(a["top1"]) if a["top1"] else None) == b.get("top1")
    assert all(row["source"] for row in rows)


def test_broken_folders_are_one_line_each(folder):
    lines = [line for line in report([folder], fmt="markdown").splitlines() if "runs/half" in line]
    assert len(lines) == 1


@pytest.mark.parametrize("width", [60, 80, 100, 300])
def test_the_terminal_is_never_too_narrow(folder, width):
    """No line is wider than the terminal; at 80 columns nothing is cut short."""
    text = report([folder], fmt="rich", width=width)
    assert max(map(len, text.splitlines())) <= width
    if width >= 80:
        assert "…" not in text


def test_tables_with_no_run_are_left_out_on_the_terminal_only_beside_runs(folder, tmp_path):
    """The demo's own table is not buried under the papers'; --table and an empty folder show them."""
    assert "PVT recipe" not in report([folder], fmt="rich", width=80)
    assert "PVT recipe" in report([folder], table="coco", fmt="rich", width=80)
    assert "PVT recipe" in report([tmp_path], fmt="rich", width=80)


@pytest.mark.parametrize("fmt", ["rich", "markdown", "latex", "json"])
def test_no_runs_shows_published_tables_and_how_to_begin(tmp_path, fmt):
    text = report([tmp_path / "results"], fmt=fmt, width=80)
    assert "HcNet-T" in text
    assert "hcnet pretrain --size pico" in text


def test_names_that_mean_something_to_a_format_are_escaped(tmp_path):
    make_run(tmp_path, changes={"a|b_c": "<i>&%$#"}, machine="x|y", name="na_me & co")
    text = report([tmp_path], fmt="markdown", table="imagenet")
    assert {len(row) for row in parsed(text)[1]} == {len(parsed(text)[1][0])}
    assert r"a\textbar{}b\_c=\textless{}i\textgreater{}\&\%\$\#" in report([tmp_path], fmt="latex", table="imagenet")


def test_latex_is_balanced(folder):
    """Environments and braces close, every row of a tabular has its columns' number of cells."""
    text = report([folder], fmt="latex")
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") > 0
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        for line in body.splitlines():
            if line.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
    assert text.isascii() or not re.search(r"[^\x00-\u017f]", text)


def test_latex_sources_have_letters_and_departures_numbers(folder):
    text = report([folder], fmt="latex", table="imagenet")
    assert re.search(r"HcNet-pico \[1\]\\textsuperscript\{[a-z]+\}", text)
    assert set(re.findall(r"\\textsuperscript\{(\w+)\}", text)) > {"a", "b", "z", "aa"}
    assert not re.search(r"\\textsuperscript\{\d", text)


def test_latex_labels_name_what_a_table_is_of(folder):
    """The same in a report of all tables and of one; no two alike."""
    text = report([folder], fmt="latex")
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(labels) == 10
    assert {"tab:imagenet-1k-val-from-scratch", "tab:digits-val", "tab:coco-1x-multi-scale"} < set(labels)
    assert set(re.findall(r"\\ref\{(.*?)\}", text)) < set(labels)
    alone = re.findall(r"\\label\{(.*?)\}", report([folder], fmt="latex", table="coco"))
    assert alone == [label for label in labels if label in alone]


def test_tables_of_one_name_have_labels_of_their_own():
    made = [Table("x", title, [], []) for title in ("ox val: classes", "ox val: boxes", "图", "图", "cats val: a")]
    assert latex_labels(made) == ["tab:ox-val-classes", "tab:ox-val-boxes", "tab:x", "tab:x-2", "tab:cats-val"]


def test_latex_compiles(folder, tmp_path):
    tex = shutil.which("pdflatex") or shutil.which("tectonic")
    if tex is None:
        pytest.skip("no pdflatex or tectonic here")
    (tmp_path / "tables.tex").write_text(report([folder], fmt="latex"), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage[a4paper,margin=2cm]{geometry}\usepackage{booktabs}"
        r"\begin{document}\input{tables}\end{document}"
    )
    options = ["-interaction=nonstopmode", "-halt-on-error"] if "pdflatex" in tex else []
    done = subprocess.run([tex, *options, "paper.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 0
    assert "Float too large" not in done.stdout + done.stderr


@pytest.mark.parametrize(("given", "meant"), [("markdwn", "markdown"), ("imagnet", "imagenet")])
def test_unknown_names_get_a_suggestion(given, meant):
    with pytest.raises(UserError, match=f'Did you mean "{meant}"'):
        report([], **({"fmt": given} if meant in FORMATS else {"table": given}))


def test_a_published_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*gone\.csv"):
        report([], published=[tmp_path / "gone.csv"])


def test_other_modules_tables_are_printed_alike():
    """A table made elsewhere (the ablation's) goes through every format."""
    columns = [Column("arm", "arm"), Column("top1", "top-1", "percent", best=True), Column("p", "p", "p")]
    rows = [
        Row("measured", {"arm": "full", "top1": 98.6, "top1_ci": 0.21}),
        Row("measured", {"arm": "no-gate", "top1": 97.0, "p": 0.0004}),
    ]
    table = Table("ablation", "Ablation on digits", columns, mark_best(rows, columns), ["Paired by seed."])
    for fmt in TEXT_FORMATS:
        text = render([table], fmt, width=80)
        assert "Ablation on digits" in text
        assert "0.0004" in text or "0.001" in text
    assert "**98.60 ± 0.21**" in report([], table="ablation", fmt="markdown", extra=[table])


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (28.62, "number", "28.62"),
        (4.22, "number", "4.22"),
        (267.24, "number", "267.2"),
        (1038.0, "number", "1,038"),
        (0.0063, "number", "0.0063"),
        (1.6, "number", "1.60"),
        (20.0, "short", "20"),
        (94.81, "short", "94.8"),
        (1290.4, "short", "1,290"),
        (98.6, "percent", "98.60"),
        (-0.29, "difference", "−0.29"),
        (0.5, "difference", "+0.50"),
        (0.0002, "p", "< 0.001"),
    ],
)
def test_numbers_are_printed_for_people(value, style, text):
    assert number(value, style) == text


# --- check ----------------------------------------------------------------------------------------------------------


def test_check_is_quiet_when_tables_are_what_the_runs_give(folder, tmp_path):
    for name, fmt in [("all.md", "markdown"), ("imagenet.csv", "csv"), ("coco.tex", "latex"), ("all.html", "html")]:
        output = tmp_path / name
        output.write_text(report([folder], table=name.split(".")[0], fmt=fmt, output=output), encoding="utf-8")
    (tmp_path / "notes.md").write_text("mine")
    assert report_check([folder], tmp_path) == []


def test_check_names_file_and_line_of_a_difference(folder, tmp_path):
    output = tmp_path / "all.md"
    text = report([folder], fmt="markdown", output=output)
    output.write_text(text.replace("82.71", "83.71"))
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "82.71" in line)
    assert report_check([folder], tmp_path) == [f"{output} differs from what the runs give, from line {line} on."]
    output.write_bytes(text.replace("\n", "\r\n").encode())  # as git checks out on Windows
    assert report_check([folder], tmp_path) == []
    output.write_bytes("HcNet – T".encode("cp1252"))  # as other editors save
    with pytest.raises(UserError, match="is not UTF-8"):
        report_check([folder], tmp_path)


def test_check_without_anything_to_compare_says_so(folder, tmp_path):
    with pytest.raises(UserError, match="no report files"):
        report_check([folder], tmp_path)
    (tmp_path / "all.md").write_text("x")
    with pytest.raises(UserError, match="no runs"):
        report_check([tmp_path], tmp_path)


def test_check_says_that_all_agree_and_takes_no_other_output(folder, tmp_path, hcnet):
    output = tmp_path / "all.md"
    output.write_text(report([folder], fmt="markdown", output=output))
    done = hcnet("report", "--results", folder, "--check", tmp_path)
    assert (done.code, done.out) == (0, "")
    assert "agree with the runs" in done.err
    done = hcnet("report", "--results", folder, "--check", tmp_path, "--output", tmp_path / "new.md")
    assert done.code == 2
    assert "--output has no place" in done.err
