"""The card of a run or a study: a page of Markdown that says what was scored, how, on what, and what was not.

Its table of runs is what `hcnet card --verify` reads back and compares: each figure stands on the page once. A card is
for the public (`privacy.py`), and begins with the header that the Hugging Face hub reads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hcnet_cli import __version__
from hcnet_cli.console import UserError, duration
from hcnet_cli.files import read_text
from hcnet_cli.grouping import Run, changes_text, comparable_scores, init_label
from hcnet_cli.report.escape import from_markdown, in_markdown, markdown_code
from hcnet_cli.report.text import markdown
from hcnet_cli.results import command, metric_notes, model_name, public_record, public_table, published_protocol
from hcnet_cli.runs import RunFolder, RunInfo
from hcnet_cli.study.record import StudyRecord
from hcnet_cli.study.table import Found, count, table
from hcnet_cli.tasks import TASKS

HEADER = ("run", "seed", "scores", "weights", "data", "code")
MOST_CLASSES = 20  # that are named
DECIMALS = 2  # of a score, as in the tables
SCORE = re.compile(r"\b(\w+) (-?\d+\.\d+)(?:, |$)")
FACTS = "How it was made"
LIMITS = "Limits"


class Claim(NamedTuple):
    """What a card says of one run, as the texts of its table's cells."""

    run: str
    seed: str
    scores: str  # "top1 89.42, top5 98.00"
    weights: str
    data: str
    code: str

    def by_name(self) -> dict[str, str]:
        return dict(SCORE.findall(self.scores))


def run_card(folder: RunFolder, info: RunInfo, about: dict[str, Any], load: str = "") -> str:
    """The card of a run with weights, whose metadata are `about`.

    load: what `timm.create_model` takes where the card is of a folder that timm loads, such as "local-dir:FOLDER".
    """
    if info.task not in TASKS:
        raise UserError(f"{folder.record} is of a task that hcnet {__version__} does not know: {info.task}.")
    info = public_record(info)
    spec, name = TASKS[info.task], folder.path.resolve().name
    return _page(
        spec.hub_tags if load else spec.hub_tags[:1],
        f"{model_name(info)} on {info.data.name}",
        [f"{_capital(spec.subject)}: one run of hcnet {__version__}."],
        _claims([_claim(name, info)]),
        _list(FACTS, _facts(info, about)),
        *([_use(load, own=not info.model)] if load else []),
        _limits([info], ["One run with one seed: how much another seed changes the score was not measured."]),
    )


def study_card(record: StudyRecord, found: Found) -> str:
    """The card of a study. UserError where none of its runs counts."""
    runs: list[Run] = []
    for task in record.tasks:
        counted, _ = count(record, task, found)
        runs += [run for by_seed in counted.values() for run in by_seed.values()]
    if not runs:
        raise UserError(f"No run of the study {record.name} counts yet.", hint=f"hcnet studies {record.name}")
    made = public_table(table(record, found), None)
    rows = [dataclasses.replace(row, runs=()) for row in made.rows]  # links would lead nowhere from here
    made = dataclasses.replace(made, rows=rows, columns=[c for c in made.columns if c.key != "source"])
    infos = [public_record(run.info) for run in runs]
    specs = [TASKS[task] for task in record.tasks]
    return _page(
        list(dict.fromkeys(spec.hub_tags[0] for spec in specs)),
        made.title,
        [f"A study by hcnet {__version__}: arms are compared seed by seed, intervals are over seeds."],
        markdown([made], (), None).partition("\n\n")[2].strip(),
        "## Its runs\n\n" + _claims([_claim(run.name, info) for run, info in zip(runs, infos, strict=True)]),
        _list(FACTS, _data_facts(infos[0])),
        _limits(infos, []),
    )


# --- parts ------------------------------------------------------------------------------------------------------------


def _page(tags: Sequence[str], title: str, lines: Sequence[str], *parts: str) -> str:
    library = ["library_name: timm"] if "timm" in tags else []
    header = "\n".join(["---", *library, f"tags: [{', '.join([*tags, 'hcnet'])}]", "---"])
    return "\n\n".join([header, f"# {in_markdown(title)}", *lines, *parts]) + "\n"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _claim(name: str, info: RunInfo) -> Claim:
    scores = ", ".join(f"{key} {value:.{DECIMALS}f}" for key, value in comparable_scores(info).items())
    return Claim(name, str(info.seed), scores, info.weights, info.data.digest, info.code)


def _claims(claims: Sequence[Claim]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *([in_markdown(text) for text in claim] for claim in claims)]
    note = "Scores are in per cent. `hcnet card --verify THIS_FILE RUN` makes them again and compares all but the seed."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


def _list(title: str, facts: Sequence[tuple[str, str]]) -> str:
    lines = [f"- **{name}**: {text}" for name, text in facts if text]
    return "\n".join([f"## {title}", "", *lines])


def _data_facts(info: RunInfo) -> list[tuple[str, str]]:
    data = info.data
    counts = f"{data.num_train:,} training and {data.num_val:,} validation images, {data.num_classes} classes"
    return [("data", in_markdown(f"{data.name}: {counts}"))]


def _facts(info: RunInfo, about: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, escaped text) of all that shaped the figure; a text is empty where nothing is known."""
    classes = [str(name) for name in about.get("classes") or ()]
    more = f" and {len(classes) - MOST_CLASSES} more" if len(classes) > MOST_CLASSES else ""
    of_input = {key: value for key, value in about.items() if key in INPUT}
    params, macs = info.params, info.macs
    sessions = info.all_sessions()
    length = f"{info.steps_done:,} of {info.steps_total:,} steps of {info.batch_size} images, seed {info.seed}"
    plain = [
        ("protocol", published_protocol(info) or f"{info.protocol or 'own'} on {info.data.name}"),
        ("departs in", changes_text(info)),
        ("evaluation", metric_notes(info.metric_notes)),
        ("training", f"{length}, {info.precision}, {duration(info.train_seconds)} on {info.device}"),
        ("started from", init_label(info) or "random weights"),
        ("model", f"{params:,} parameters" if params else ""),
        ("MACs", f"{macs / 1e6:,.1f} M for an image of {info.macs_input}" if macs else ""),
        ("input", "; ".join(f"{key} {_shown(value)}" for key, value in of_input.items())),
        ("classes", ", ".join(classes[:MOST_CLASSES]) + more),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.versions.items())),
    ]
    commands = dict.fromkeys(command(session.argv) for session in sessions if session.argv)
    typed = ("command", "; then ".join(map(markdown_code, commands)))
    return [*_data_facts(info), *((name, in_markdown(text)) for name, text in plain), typed]


INPUT = ("img_size", "crop_pct", "interpolation", "mean", "std", "normalisation", "reduce_zero_label")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _use(load: str, own: bool) -> str:
    imports = "import timm\n" + "import hcnet_cli.models  # registers HcNet with timm\n" * own
    code = f'{imports}\nmodel = timm.create_model("{load}", pretrained=True)'
    return f"## Use\n\n```python\n{code}\n```"


def _limits(infos: Sequence[RunInfo], lines: Sequence[str]) -> str:
    """What was not measured, and what is known of the data."""
    first = infos[0]
    found = [*lines]
    if first.status != "finished":
        found.append(f"The run is not finished ({first.status}): the scores are its best so far.")
    if not first.evaluated_only:
        found.append(
            "The weights are those of the best evaluation on these same validation data, so that their scores there "
            "are too high on average."
        )
    found.append(
        "Not measured: scores on any other data, on damaged or unusual images, and differences between "
        "groups in the data."
    )
    found += dict.fromkeys(_data_nature(info) for info in infos)
    for info in infos:
        found += info.data.remarks()
        if info.unreadable_images:
            found.append(f"{info.unreadable_images} training images could not be read; others took their places.")
    if any("+changes" in info.code for info in infos):
        found.append("The code had uncommitted changes (+changes): its commit alone does not say what ran.")
    return "\n".join([f"## {LIMITS}", "", *(f"- {in_markdown(line)}" for line in dict.fromkeys(found))])


def _data_nature(info: RunInfo) -> str:
    spec, name = TASKS[info.task], info.data.name
    if name == spec.embedded:
        return f"The data {name} come with hcnet, for trying things out: {spec.embedded_note}. They are no benchmark."
    if name == spec.benchmark:
        return f"The data have the classes and counts of {name}; its authors describe how they were collected."
    return f"The data {name} are a folder of their owner's: nothing here says how they were collected and labelled."


# --- read back --------------------------------------------------------------------------------------------------------


def read_card(file: Path) -> list[Claim]:
    """The rows of a card's table of runs. UserError for a file without one."""
    rows = [
        [from_markdown(cell) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in read_text(file, 2**20).splitlines()
        if line.lstrip().startswith("|")
    ]
    if list(HEADER) not in rows:
        raise UserError(f"{file} is not a card: it has no table with the columns {', '.join(HEADER)}.")
    after = rows[rows.index(list(HEADER)) + 2 :]
    claims = [Claim(*row) for row in after if len(row) == len(HEADER)]
    if not claims or len(claims) < len(after) or any(not claim.by_name() for claim in claims):
        raise UserError(f"{file} has a damaged table of runs.", hint="hcnet card RUN makes a card.")
    return claims
