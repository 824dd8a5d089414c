"""Protects the names of finished runs: a recipe has the fingerprint it had before optimizers other than AdamW existed.

tests/golden/fingerprints.json holds `fingerprint(recipe, data="d")` of every shipped recipe, as the older code computed
it: "NAME", then overrides (the digits had 8 epochs then); " slide" stands for data.eval_mode=slide. A field added since
must keep it at its default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hcnet_cli import recipe as rcp

GOLDEN: dict[str, str] = json.loads((Path(__file__).parent / "golden" / "fingerprints.json").read_text())
DIGITS = rcp.recipes_dir() / "pretrain" / "digits.yaml"


def fingerprint(file: Path, *overrides: tuple[str, Any]) -> str:
    return rcp.fingerprint(rcp.resolve(file, [(key, value, "test") for key, value in overrides]).recipe, data="d")


@pytest.mark.parametrize("line", GOLDEN)
def test_a_shipped_recipe_keeps_its_fingerprint(line: str) -> None:
    name, *rest = line.split()
    given = [part if "=" in part else "data.eval_mode=slide" for part in rest]
    overrides = [rcp.parse_override(text) for text in given]
    assert fingerprint(rcp.recipes_dir() / f"{name}.yaml", *overrides) == GOLDEN[line]


def test_an_old_recipe_file_is_the_same_recipe(tmp_path: Path) -> None:
    """`betas` and `eps` once stood in `optim` itself: same recipe, same fingerprint, no departure from its protocol."""
    data = yaml.safe_load(DIGITS.read_text())
    data["optim"] |= {"betas": [0.9, 0.999], "eps": 1e-8}
    old = tmp_path / "old.yaml"
    old.write_text(yaml.dump(data))
    assert fingerprint(old) == fingerprint(DIGITS)
    assert rcp.resolve(old).recipe == rcp.resolve(DIGITS).recipe
    assert rcp.changes(rcp.resolve(old).recipe) == {}
    data["optim"] |= {"eps": 1e-6}
    old.write_text(yaml.dump(data))
    assert fingerprint(old) == fingerprint(DIGITS, ("optim.args.eps", 1e-6)) != fingerprint(DIGITS)
    assert rcp.resolve(old, [("optim.args.eps", 0.5, "--set")]).recipe.optim.args["eps"] == 0.5


def test_what_changes_the_optimizer_changes_the_fingerprint() -> None:
    same = fingerprint(DIGITS, ("optim.args.betas", [0.9, 0.999]), ("optim.args.eps", 1e-8))
    assert same == fingerprint(DIGITS) == fingerprint(DIGITS, ("optim.name", "adamw"))
    others = [
        [("optim.name", "lion")],
        [("optim.name", "sgd")],
        [("optim.name", "sgd"), ("optim.args.momentum", 0.8)],
        [("optim.args.betas", [0.9, 0.95])],
        [("optim.args.amsgrad", True)],
    ]
    assert len({fingerprint(DIGITS), *(fingerprint(DIGITS, *one) for one in others)}) == 6


def test_any_key_may_be_set_below_a_dictionary_and_nowhere_else() -> None:
    recipe = rcp.resolve(DIGITS, [("optim.name", "sgd", "--set"), ("optim.args.momentum", 0.8, "--set")]).recipe
    assert recipe.optim.args == {"momentum": 0.8}
    assert rcp.changes(recipe)["optim.args.momentum"] == 0.8
    whole = rcp.resolve(DIGITS, [("optim.name", "sgd", "--set"), ("optim.args", {"momentum": 0.8}, "--set")]).recipe
    assert whole == recipe
    for key, value, message in (
        ("optim.argz.momentum", 0.8, 'unknown recipe key "optim.argz.momentum"'),
        ("optim.args.eps", True, '"optim.args.eps" cannot be true: it takes a number'),
        ("optim.args.betas", 0.9, '"optim.args.betas" cannot be 0.9: it takes a list of 2 numbers'),
        ("optim.args.eps.small", 1, '"optim.args.eps.small" cannot be set: eps is not a section'),
        ("optim.args", 3, '"optim.args" cannot be 3'),
    ):
        with pytest.raises(rcp.UserError) as error:
            rcp.resolve(DIGITS, [("optim.args.eps", 1e-6, "--set"), (key, value, "--set")])
        assert message in str(error.value)
