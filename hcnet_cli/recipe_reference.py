"""The fields of a recipe in words: `hcnet recipes explain`, and docs/recipe.md.

python -m hcnet_cli.recipe_reference > docs/recipe.md
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.recipe import Recipe, sections
from hcnet_cli.schema import Part
from hcnet_cli.tasks import TASKS

TOP = {
    "task": ("text", f"The task, which is the command: {', '.join(TASKS)}."),
    "protocol": ("text", "The shipped recipe this one follows; tables name it, and say where a run departs from it."),
    "init": ("text", "Weights to start from: a run folder, a weights file, `none`, or `auto`: the best pretraining."),
}


@dataclass(frozen=True)
class Entry:
    """One field. `tasks` that have it; `owner`: the class of its section, for sections that differ between tasks."""

    key: str
    type: str
    default: str
    unit: str
    description: str
    tasks: tuple[str, ...]
    changes_numbers: bool

    def lines(self) -> list[str]:
        facts = [f"type {self.type}", f"default {self.default}"]
        if self.unit:
            facts.append(f"in {self.unit}")
        facts.append(f"tasks: {', '.join(self.tasks)}")
        same = [] if self.changes_numbers else ["It changes no number: a run with another value is the same run."]
        return [self.key, f"  {self.description}", f"  {', '.join(facts)}.", *(f"  {line}" for line in same)]


def entries() -> list[Entry]:
    """Every field of every task's recipes, a field that several tasks share once."""
    found: dict[tuple[str, type[Part] | None], Entry] = {}
    for key, (kind, description) in TOP.items():
        default = "required" if Recipe.model_fields[key].is_required() else "none"
        found[key, None] = Entry(key, kind, default, "", description, tuple(TASKS), key != "init")
    for task in TASKS:
        for section, parts in sections(task).items():
            for part in parts:
                for entry in _of_section(part, section, task):
                    owner = part if section not in ("model", "optim", "schedule", "train") else None
                    before = found.get((entry.key, owner))
                    tasks = (*before.tasks, task) if before else (task,)
                    found[entry.key, owner] = Entry(**{**vars(entry), "tasks": tasks})
    return list(found.values())


def _of_section(part: type[Part], section: str, task: str) -> Iterator[Entry]:
    given = TASKS[task].evaluations.get(section.removeprefix("evaluation."), {})
    for name, info in part.model_fields.items():
        extra: dict[str, Any] = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        default = given.get(name, info.get_default()) if section.startswith("evaluation.") else info.get_default()
        yield Entry(
            key=f"{section}.{name}",
            type=_type(info.annotation),
            default="required" if info.is_required() else _value(default),
            unit=str(extra.get("unit", "")),
            description=info.description or "Names the kind of this section.",
            tasks=(task,),
            changes_numbers=extra.get("fingerprint", "always") != "never",
        )


def _type(annotation: Any) -> str:
    """How a type reads: `number`, `whole number`, `list of 3 numbers`, "a" or "b"."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _type(one) for one in inner)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return f"list of {_plural(inner[0])}"
        return f"list of {len(inner)} {_plural(inner[0])}"
    if origin is dict:
        return "mapping"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(annotation, "section")


def _plural(annotation: Any) -> str:
    return {"whole number": "whole numbers", "number": "numbers", "text": "texts"}[_type(annotation)]


def _value(value: Any) -> str:
    return json.dumps(value, default=list, ensure_ascii=False).strip('"') or "empty"


def explain_field(key: str) -> list[str]:
    """Lines for people about a field, about all fields of a section, or, for "", about the sections."""
    every = entries()
    if not key:
        names = dict.fromkeys(entry.key.rpartition(".")[0] or entry.key for entry in every)
        return ["Sections and fields of a recipe:", *(f"  {name}" for name in names)]
    found = [entry for entry in every if entry.key == key or entry.key.startswith(f"{key}.")]
    if not found:
        known = [entry.key for entry in every]
        raise UserError(f'There is no recipe field "{key}".{did_you_mean(key, known)}')
    return [line for entry in found for line in entry.lines()]


def markdown() -> str:
    """docs/recipe.md."""
    lines = [
        "# The recipe, field by field",
        "",
        "Generated by `python -m hcnet_cli.recipe_reference` from the descriptions in the code; a test compares.",
        "`hcnet recipes explain optim.no_decay` prints one field. Any field can be set on the command line:",
        "`--set optim.weight_decay=0.1`. A field marked * changes no number: a run with another value is the same run.",
    ]
    section = ""
    for entry in sorted(entries(), key=_order):
        name = entry.key.rpartition(".")[0]
        heading = _heading(name, entry)
        if heading != section:
            section = heading
            lines += ["", f"## {section}", "", "| field | type | default | unit | meaning |", "|---|---|---|---|---|"]
        mark = "" if entry.changes_numbers else " *"
        cells = (f"`{entry.key}`{mark}", entry.type, f"`{entry.default}`", entry.unit, entry.description)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _order(entry: Entry) -> tuple[int, int]:
    names = ["", "model", "optim", "schedule", "train", "head", "data", "evaluation"]
    section = entry.key.rpartition(".")[0].split(".")[0]
    return names.index(section), list(TASKS).index(entry.tasks[0])


def _heading(section: str, entry: Entry) -> str:
    if section in ("", "model", "optim", "schedule", "train"):
        return f"`{section}`" if section else "Top level"
    return f"`{section}` of {', '.join(entry.tasks)}"


if __name__ == "__main__":
    print(markdown(), end="")
