"""Protects `hcnet card`: a card says what the record says, and fails where weights, data or scores are others."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import small_data
from conftest import Hcnet, only_run
from markdown_it import MarkdownIt
from synthetic_studies import made, study_of

from hcnet_cli.plain_yaml import parse_yaml
from hcnet_cli.report import card


@pytest.fixture
def root(small_classifier: Path, tmp_path: Path) -> Path:
    """A copy of the run and its data, so that a test may change them."""
    return Path(shutil.copytree(small_classifier, tmp_path / "copy"))


def cells(text: str) -> list[list[str]]:
    """The tables of a page, row by row, by a parser of Markdown."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    rows: list[list[str]] = []
    for before, token in itertools.pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("th_open", "td_open"):
            rows[-1].append("".join(span.content for span in token.children or ()))
    return rows


def test_the_card_of_a_run(root: Path, hcnet: Hcnet) -> None:
    run = only_run(root / "results")
    record = json.loads((run / "run.json").read_text())
    done = hcnet("card", run)
    assert done.code == 0, done.err
    header, page = done.out.removeprefix("---\n").split("\n---\n")
    assert parse_yaml(header, "card") == {"tags": ["image-classification", "hcnet"]}
    titles, row = cells(page)
    assert dict(zip(titles, row, strict=True)) == {
        "run": run.name,
        "seed": "0",
        "scores": ", ".join(
            f"{name} {record['metrics'][name]:.2f}" for name in ("top1", "top5", "top1_95_lower", "top1_95_upper")
        ),
        "weights": record["weights"],
        "data": record["data"]["digest"],
        "code": record["git_commit"][:12] + ("+changes" if record["git_dirty"] else "") or "unknown",
    }
    for fact in (
        "4 training and 2 validation images, 2 classes",
        "- **protocol**: pretrain/digits on data",
        "img_size 16",
        "- **classes**: a, b",
        "--set data.img_size=16",
        "another seed changes the score was not measured",
    ):
        assert fact in page
    assert str(root.parent.parent) not in done.out, "nobody's folders"
    assert hcnet("card", run, "--output", root / "new" / "card.md").code == 0
    assert (root / "new" / "card.md").read_text() == done.out


def test_verification_says_what_differs(root: Path, hcnet: Hcnet) -> None:
    run, data, page = only_run(root / "results"), root / "data", root / "card.md"
    assert hcnet("card", run, "--output", page).code == 0
    arguments = ("card", "--verify", page, run, "--data", data, "--device", "cpu")
    done = hcnet(*arguments)
    assert (done.code, "Equal to the card's table of 1 row." in done.err) == (0, True), done.err
    assert "top1: equal" in done.out

    text = page.read_text()
    score = f"top1 {json.loads((run / 'run.json').read_text())['metrics']['top1']:.2f}"
    assert text.count(score) == 1
    page.write_text(text.replace(score, "top1 12.34"))
    done = hcnet(*arguments)
    assert (done.code, "Not as the card says: top1." in done.err) == (1, True)
    assert "12.34 on the card" in done.out
    page.write_text(text)

    weights = bytearray((run / "best.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "best.safetensors").write_bytes(weights)
    done = hcnet(*arguments)
    assert (done.code, "Not as the card says: weights, top1" in done.err) == (1, True)
    assert "data: equal" in done.out
    weights[-1] ^= 1
    (run / "best.safetensors").write_bytes(weights)

    small_data.save(data / "val" / "a" / "0.bmp", 77)
    done = hcnet(*arguments)
    assert (done.code, "Not as the card says: data" in done.err) == (1, True)
    assert "weights: equal" in done.out


def test_a_code_version_that_differs_is_said_and_no_failure(root: Path, hcnet: Hcnet) -> None:
    page = root / "card.md"
    hcnet("card", only_run(root / "results"), "--output", page)
    (claim,) = card.read_card(page)
    page.write_text(page.read_text().replace(f"| {claim.code} |", "| 0123456789ab |"))
    done = hcnet("card", "--verify", page, "--out", root / "results", "--data", root / "data")
    assert done.code == 0, "the run is found by its name"
    assert "code version: differs: " in done.out
    assert "0123456789ab on the card" in done.out


def test_the_card_of_a_study(tmp_path: Path, hcnet: Hcnet) -> None:
    record = study_of(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "s.json").write_text(record.model_dump_json())
    done = hcnet("card", "s", "--out", tmp_path)
    assert done.code == 0, done.err
    _, values, _ = made(tmp_path, record)
    assert values["no-gate"]["top1_interval"] in done.out
    (tmp_path / "s.md").write_text(done.out)
    claims = card.read_card(tmp_path / "s.md")
    expected = {cell.run: json.loads((tmp_path / "runs" / cell.run / "run.json").read_text()) for cell in record.cells}
    assert {claim.run: claim.by_name()["top1"] for claim in claims} == {
        name: f"{one['metrics']['top1']:.2f}" for name, one in expected.items()
    }
    assert {claim.data for claim in claims} == {"digits-digest"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "A card is of a run or of a study."),
        (("nowhere",), "There is no run and no study nowhere"),
        (("RUN", "--output", "card.txt"), "should end in .md"),
        (("RUN", "--data", "x"), "--data is for --verify."),
        (("--verify", "text.md", "RUN"), "text.md is not a card"),
        (("--verify", "text.md", "--output", "x.md"), "--output has no place beside it"),
        (("--verify", "missing.md", "RUN"), "missing.md cannot be read"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    message: str,
    small_classifier: Path,
    tmp_path: Path,
    hcnet: Hcnet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.md").write_text("# A page\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    run = str(only_run(small_classifier / "results"))
    done = hcnet("card", *(run if word == "RUN" else word for word in arguments))
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
