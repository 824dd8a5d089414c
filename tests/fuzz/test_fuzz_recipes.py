"""Recipes, options and studies of any content: they are taken, or refused in one sentence, and nothing else."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support import examples, watched

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.plain_yaml import parse_yaml
from hcnet_cli.recipe import known_keys
from hcnet_cli.study import design
from hcnet_cli.tasks import TASKS

SHIPPED = {name: parse_yaml(rcp.recipe_file(name).read_text(), name) for name in rcp.shipped()}
STUDIES = {name: parse_yaml(design.study_file(name).read_text(), name) for name in design.shipped_studies()}
KEYS = sorted({key for task in TASKS for key in known_keys(task)} | {"optim.args.betas", "data.eval_mode", "optim.eps"})
ODD = [
    "",
    "~",
    "[",
    "{}",
    "&a",
    "*a",
    "!!int 3",
    "0x10",
    "1e999",
    ".nan",
    "-",
    "1:30",
    "no",
    "\x1b[31m",
    "\u202e",
    "é",
    "\0",
]

numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**64), 10**29, 10**31, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(ODD), st.text(max_size=12))
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8) | st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)


@contextmanager
def refused_or_taken() -> Iterator[None]:
    """Within: no error but a UserError, which is a sentence."""
    said = "Taken."
    with watched():
        try:
            yield
        except UserError as error:
            said = str(error)
    assert 5 < len(said) < 2000
    assert said[-1] in ".?"


@contextmanager
def file_of(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_bytes(content)
        yield path


def mutated(data: Any, changes: list[tuple[int, int, Any]]) -> Any:
    """Plain data with some of its places exchanged, removed or doubled under another name."""
    data = copy.deepcopy(data)
    for where, how, value in changes:
        places = [
            (node, key) for node in _nodes(data) for key in (node if isinstance(node, dict) else range(len(node)))
        ]
        if not places:
            break
        node, key = places[where % len(places)]
        if how == 0:
            node[key] = value
        elif how == 1:
            del node[key]
        elif how == 2 and isinstance(node, dict):
            node[f"{key}{where % 3}"] = node[key]
        elif how == 3 and isinstance(node, dict):
            node[KEYS[where % len(KEYS)]] = value
        else:
            node[key] = [node[key], value]
    return data


def _nodes(data: Any) -> Iterator[Any]:
    if isinstance(data, dict | list):
        yield data
        for inner in data.values() if isinstance(data, dict) else data:
            yield from _nodes(inner)


def _keys(node: Any) -> list[Any]:
    return list(node if isinstance(node, dict) else range(len(node)))


changes = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 4), values), min_size=1, max_size=4)


@examples()
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes_are_no_recipe(content: bytes) -> None:
    with refused_or_taken(), file_of(content) as path:
        rcp.resolve(path)


@examples()
@given(st.text(alphabet="[]{}:-?,&*!|>'\"%@`#\n \tab01.e~<=\x85\u2028\ufeff", max_size=60))
def test_any_yaml_is_plain_data_or_refused(text: str) -> None:
    with refused_or_taken():
        json.dumps(parse_yaml(text, "test"))


@examples()
@given(st.sampled_from(sorted(SHIPPED)), st.binary(min_size=1, max_size=6), st.integers(0, 10_000), st.booleans())
def test_a_shipped_recipe_with_bytes_exchanged(name: str, patch: bytes, at: int, insert: bool) -> None:
    content = rcp.recipe_file(name).read_bytes()
    at %= len(content)
    with refused_or_taken(), file_of(content[:at] + patch + content[at + (0 if insert else len(patch)) :]) as path:
        rcp.resolve(path)


@examples()
@given(st.sampled_from(sorted(SHIPPED)), changes)
def test_a_shipped_recipe_with_values_exchanged(name: str, changes: list[tuple[int, int, Any]]) -> None:
    """Plain data goes straight into the check, and through a file."""
    data = mutated(SHIPPED[name], changes)
    with refused_or_taken():
        recipe = rcp.check(data, "mine") if isinstance(data, dict) else None
        if recipe is not None:
            rcp.fingerprint(recipe)
            rcp.changes(recipe)
    with refused_or_taken(), file_of(yaml.dump(data).encode("utf-8", "replace")) as path:
        rcp.resolve(path)


@examples()
@given(
    st.sampled_from(sorted(SHIPPED)),
    st.sampled_from(KEYS),
    st.one_of(st.text(max_size=20), values.map(str), st.just("")),
)
def test_any_set_option(name: str, key: str, value: str) -> None:
    with refused_or_taken():
        override = rcp.parse_override(f"{key}={value}")
        rcp.resolve(rcp.recipe_file(name), [(*override, f"--set {override[0]}")])


@examples()
@given(st.text(max_size=30))
def test_any_text_for_set(text: str) -> None:
    with refused_or_taken():
        override = rcp.parse_override(text)
        rcp.resolve(rcp.recipe_file("pretrain/digits"), [(*override, f"--set {override[0]}")])


@examples()
@given(st.sampled_from(sorted(STUDIES)), changes)
def test_a_shipped_study_with_values_exchanged(name: str, changes: list[tuple[int, int, Any]]) -> None:
    data = mutated(STUDIES[name], changes)
    with refused_or_taken(), file_of(yaml.dump(data).encode("utf-8", "replace")) as path:
        short, study = design.read_study(str(path))
        runs = design.study_runs(study, [], "")
        bases = [design.Base(rcp.recipe_file(run.recipe or "pretrain/digits"), (), run.init) for _, run in runs]
        design.expand(short, study, bases, results=path.parent)


@pytest.mark.parametrize("levels", [10, 1000, 100_000])
@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "a:\n ", "!!x ", "&a ", "'", "|\n", "# \n"])
def test_what_opens_and_never_closes(opening: str, levels: int) -> None:
    with refused_or_taken():
        parse_yaml(opening * levels, "test")
