"""What values a field of a recipe or a study takes, in words: for docs/recipe.md, and for whoever typed another one."""

from __future__ import annotations

import json
import shlex
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hcnet_cli.console import did_you_mean, nearest_key
from hcnet_cli.plain_yaml import dump_yaml

NOUNS = {  # one, several
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
}
LONGEST_SHOWN = 100  # characters of a value that is not accepted


def describe(annotation: Any, constraints: Iterable[Any] = (), several: bool = False) -> str:
    """The values of a type: "a whole number from 1 to 8", "a list of 2 numbers above 0", "cosine or poly"."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe(inner[0], [*_constraints(inner[1:]), *constraints], several)
    if origin is typing.Literal:
        *others, last = map(str, inner)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (typing.Union, types.UnionType):
        return ", or ".join("null" if one is type(None) else describe(one, constraints) for one in inner)
    if origin is tuple:
        if inner[-1] is not Ellipsis:
            return f"a list of {len(inner)} {describe(inner[0], several=True)}"
        least = "one or more " if any(isinstance(one, annotated_types.MinLen) for one in constraints) else ""
        return f"a list of {least}{describe(inner[0], several=True)}"
    if annotation in NOUNS:
        return NOUNS[annotation][several] + _range(constraints)
    return "a mapping" if origin is dict else "a section"


def example(field: FieldInfo) -> Any:
    """A value that the field takes: the one declared as such, else the default; None where neither says anything."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    given: Any = extra.get("example")
    if given is None and not field.is_required() and field.get_default() not in ("", (), {}):
        return field.get_default()
    return given


def as_typed(key: str, value: Any, flag: str = "--set") -> str:
    """A value as an option to type: `--set optim.lr=0.001`, or, for a flag of its own, `--lr 0.001`."""
    word = assigned(key, value)
    return f"--set {shlex.quote(word)}" if flag.startswith("--set") else f"{flag} {shlex.quote(word.partition('=')[2])}"


def assigned(key: str, value: Any) -> str:
    """A value as --set takes it, without quotes of a shell: optim.lr=0.001."""
    if isinstance(value, list | tuple):
        return f"{key}=[{','.join(_yaml([one])[1:-1] for one in value)}]"
    return f"{key}={_yaml(value)}"


def place_typed(folder: Path, flag: str) -> str:
    """A results folder as an option to add to a command; "" for results/, where commands look by themselves."""
    return "" if folder == Path("results") else f" {flag} {shlex.quote(str(folder))}"


def as_written(key: str, value: Any) -> str:
    """A value as a line of a file: `seeds: [0, 1, 2]`."""
    return f"{key.split('.')[-1]}: {_yaml(value)}"


def _yaml(value: Any) -> str:
    plain = json.loads(json.dumps(value))
    return dump_yaml(plain, flow=True, width=10_000).removesuffix("\n...\n").strip()


def shown(value: Any) -> str:
    """A value as a recipe has it (null, true), cut short."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ..."


class Mistake(NamedTuple):
    """What is wrong with plain data. `example`: a value that the key takes, None where none is at hand."""

    key: str
    sentence: str
    example: Any = None


def first_mistake(error: ValidationError, model: type[BaseModel], data: Any, known: Iterable[str]) -> Mistake:
    """The first thing that is wrong with the data of a model; of several, a misspelt key, which explains the rest.

    known: All keys that there are, to suggest one.
    """
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    kind, place = first["type"], list(first["loc"])
    if kind.startswith("union_tag"):
        place.append(first["ctx"]["discriminator"].strip("'"))
    place, field, sections = _find(model, place)
    key = ".".join(map(str, place))
    reason = first["msg"].removeprefix("Value error, ") if kind == "value_error" else ""
    if kind == "extra_forbidden":
        *above, last = key.split(".")
        nested = f" Write {last} below {'.'.join(above)}." if key in known else nearest_key(key, known)
        return Mistake(key, f'unknown key "{key}".{nested}')
    if kind in ("missing", "union_tag_not_found") and len(place) >= len(first["loc"]):
        return Mistake(key, f'the key "{key}" is missing.', example(field) if field else None)
    if first["loc"][-1:] == ("[key]",):  # of a mapping: the key itself is what is wrong
        return Mistake(key, f"{reason}.")
    if field is None:
        keys = ", ".join(dict.fromkeys(name for section in sections for name in section.model_fields))
        what = f'"{key}" cannot be {shown(first["input"])}: it is a section with the keys {keys}'
        return Mistake(key, f"{reason or what}.")
    value = _at(data, place)
    choices = _choices(field.annotation) if isinstance(value, str) else []
    reason = reason or f"it takes {describe(field.annotation, field.metadata)}"
    end = "" if reason.endswith("?") else f".{did_you_mean(str(value), choices)}"
    return Mistake(key, f'"{key}" cannot be {shown(value)}: {reason}{end}', example(field))


def _find(model: type[BaseModel], place: list[Any]) -> tuple[list[Any], FieldInfo | None, list[type[BaseModel]]]:
    """The part of `place` down to a field, without the tags of unions; the field, or the sections in its place."""
    sections, kept, tagged = [model], [], False
    for part in place:
        fields = [one.model_fields[part] for one in sections if part in one.model_fields]
        if fields or not tagged:
            kept.append(part)
        tagged = False
        if fields:
            sections = _models(fields[0].annotation)
            tagged = len(sections) > 1
            if not sections:
                return kept, fields[0], []
    return kept, None, sections


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for one in typing.get_args(annotation) for model in _models(one)]


def _at(data: Any, place: Iterable[Any]) -> Any:
    """The value at a place in plain data, None where there is nothing."""
    for part in place:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _constraints(metadata: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for one in metadata:
        found += one.metadata if isinstance(one, FieldInfo) else [one]
    return found


def _range(constraints: Iterable[Any]) -> str:
    words: dict[str, Any] = {}
    for one in constraints:
        for bound in ("ge", "gt", "le", "lt"):
            if isinstance(one, getattr(annotated_types, bound.title())):
                words[bound] = f"{(number := getattr(one, bound)):{',' if isinstance(number, int) else 'g'}}"
    if {"ge", "le"} <= words.keys():
        return f" from {words['ge']} to {words['le']}"
    named = {"ge": "of at least", "gt": "above", "lt": "below", "le": "of at most"}
    parts = [f"{named[bound]} {words[bound]}" for bound in named if bound in words]
    return f" {' and '.join(parts)}" if parts else ""


def _choices(annotation: Any) -> list[str]:
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(map(str, inner))
    return [choice for one in inner for choice in _choices(one)]
