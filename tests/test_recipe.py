"""Protects the recipe: what is typed is what is run, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from hcnet_cli import recipe as rcp
from hcnet_cli import recipe_reference
from hcnet_cli.build import steps_of_schedule
from hcnet_cli.console import UserError
from hcnet_cli.plain_yaml import dump_yaml, parse_yaml
from hcnet_cli.tasks import TASKS
from hcnet_cli.values import assigned

DIGITS = rcp.recipes_dir() / "pretrain" / "digits.yaml"


def resolve(*overrides: tuple[str, object]) -> rcp.Recipe:
    return rcp.resolve(DIGITS, [(key, value, f"--set {key}") for key, value in overrides]).recipe


@pytest.mark.parametrize("name", rcp.shipped())
def test_shipped_recipes_are_whole_and_open_with_their_command(name: str) -> None:
    """Each recipe checks, departs from nothing, is named after its file and says how to run it and what to expect."""
    file = rcp.recipe_file(name)
    recipe = rcp.resolve(file).recipe
    assert recipe.protocol == name
    assert rcp.changes(recipe) == {}
    header = "".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    for word in (f"hcnet {recipe.task}", "Batch", "Expect"):
        assert word in header or word.replace("hcnet", "hcnet_cli") in header


@pytest.mark.parametrize("name", rcp.shipped())
def test_a_resolved_recipe_can_be_run_again(name: str, tmp_path: Path) -> None:
    """recipe.yaml in a run folder resolves to the same recipe."""
    recipe = rcp.resolve(rcp.recipe_file(name)).recipe
    copy = tmp_path / "recipe.yaml"
    copy.write_text(rcp.dump_yaml(recipe))
    assert rcp.resolve(copy).recipe == recipe


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optim.lrr", 1, 'unknown recipe key "optim.lrr". Did you mean "optim.lr"?'),
        ("optim", 1, "It is a section"),
        ("optim.lr", "fast", '"optim.lr" cannot be "fast"'),
        ("optim.lr", True, '"optim.lr" cannot be true'),
        ("train.workers", None, '"train.workers" cannot be null'),
        ("optim.lr", -1, "above 0 and of at most 100."),
        ("optim.lr", float("nan"), '"optim.lr" cannot be NaN: it takes a number above 0'),
        ("model.size", "tt", 'Did you mean "t"?'),
        ("model.disable", ["gat"], 'Did you mean "gate"?'),
        ("train.batch_size", 0, "from 1 to 1,048,576."),
        ("schedule.kind", "cosin", "cosine"),
        ("data.re_prob", 3, "from 0 to 1."),
        ("task", "finetune-det", "unknown key"),
    ],
)
def test_a_bad_override_is_one_sentence_that_names_the_flag(key: str, value: object, words: str) -> None:
    with pytest.raises(UserError) as error:
        resolve((key, value))
    assert words in str(error.value)
    assert f"--set {key}" in str(error.value) or key == "task"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [", "line 1"),
        ("a: 1\na: 2", "appears twice"),
        ("- 1", "not a mapping"),
        ("task: pretrain\nprotocol: x\noptimizer: {}", 'unknown key "optimizer". Did you mean "optim"?'),
        ("task: pretrain\nprotocol: x", "is missing"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml") as error:
        rcp.resolve(file)
    assert words in str(error.value)


def test_yaml_means_what_people_write() -> None:
    """PyYAML alone reads 1e-3 as text, `no` as False, 12:30 as a number of minutes, 010 as 8 and 0x10 as 16."""
    text = (
        "{a: 1e-3, b: 1.e3, c: .5, d: -2E+5, e: no, f: on, g: 12:30, h: 10, i: true, j: null, k: 1_0, l: 010, 1.0: 0x9}"
    )
    assert parse_yaml(text, "test") == {
        "a": 1e-3, "b": 1e3, "c": 0.5, "d": -2e5, "e": "no", "f": "on", "g": "12:30", "h": 10, "i": True, "j": None,
        "k": "1_0", "l": "010", "1.0": "0x9",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [*x]", "anchors"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "anchors"),
        ("a: !!python/object/apply:os.system [ls]", "tags"),
        ("!!int abc", "tags"),
        ("[" * 100_000, "more than 20 levels"),
        ("- " * 100_000, "more than 20 levels"),
        (f"a: {'9' * 5000}", "more than 30 digits"),
        ("\n".join(f"k{n}: 1" for n in range(30_000)), "more than 10,000"),
        ("? [a]\n: b", "a key must be text"),
        ("a: \x1b[31m", "U+001B"),
        ("a: 1\nb: \0", "(line 2)"),
        ("a: \udcff", "U+DCFF"),
    ],
)
def test_yaml_is_plain_data_alone(text: str, words: str) -> None:
    """What loops, grows, nests or names code is one sentence, at once."""
    with pytest.raises(UserError) as error:
        parse_yaml(text, "mine.yaml")
    assert words in str(error.value)
    assert len(str(error.value)) < 200


@given(st.text() | st.from_regex(r"[-+]?[0-9]{1,3}[eE.:_x]?[0-9]{0,40}", fullmatch=True))
@example("1234567890123456")
@example("12e4567890123456")
@example("true")
@example("~")
def test_every_text_survives_the_round_trip(value: str) -> None:
    assert parse_yaml(dump_yaml({"x": value, "y": [value] * 2}), "test") == {"x": value, "y": [value] * 2}
    assert yaml.safe_load(dump_yaml({"x": value})) == {"x": value}
    for typed in (value, [value, "a, b"]):
        assert rcp.parse_override(assigned("model.digest", typed)) == ("model.digest", typed)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_the_round_trip(value: float) -> None:
    """A recipe written by dump_yaml and read back is bit for bit the same."""
    assert parse_yaml(dump_yaml({"x": value}), "test") == {"x": value}
    assert rcp.parse_override(f"optim.lr={value!r}") == ("optim.lr", value)


def test_the_fingerprint_covers_what_can_change_a_number_and_nothing_else() -> None:
    base = resolve()
    free = {
        "data.path": "/elsewhere",
        "data.trust": "names",
        "train.workers": 7,
        "train.accumulate": 2,
        "train.compile": True,
        "train.log_every": 3,
        "train.save_every": 1.0,
        "train.eval_batch_size": 5,
        "model.grad_checkpointing": True,
    }
    without = rcp.not_in_fingerprint(base)
    assert set(free) | {"init", "train.kernels", "evaluation.val.when", "evaluation.val.path"} == without
    for key, value in free.items():
        assert rcp.fingerprint(resolve((key, value))) == rcp.fingerprint(base), key
    for key, value in rcp.flatten(base.model_dump()).items():
        if key in without or not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        changed = value + 1 if isinstance(value, int) else value / 2 or 0.3
        assert rcp.fingerprint(resolve((key, changed))) != rcp.fingerprint(base), key
    assert rcp.fingerprint(base, data="a") != rcp.fingerprint(base, data="b")


def test_changes_are_what_departs_from_the_protocol() -> None:
    """Seed, size and division of work are free; the model's shape is told by its variant."""
    assert rcp.changes(resolve(("train.seed", 3), ("model.size", "s"), ("train.workers", 3))) == {}
    assert rcp.changes(resolve(("schedule.length", 3), ("optim.lr", 0.1))) == {"optim.lr": 0.1, "schedule.length": 3}
    shaped = resolve(
        ("model.kernel_size", 3), ("model.disable", ["refinement", "conduction"]), ("model.depths", [1, 1, 2, 1])
    )
    assert rcp.changes(shaped) == {}
    assert rcp.variant(shaped) == "no-conduction+no-refinement+depths=1-1-2-1+kernel_size=3"


def test_drop_path_is_the_sizes_own_unless_the_recipe_says_otherwise() -> None:
    assert resolve(("model.size", "s")).model.drop_path_rate == 0.3
    assert resolve(("model.drop_path_rate", 0.0)).model.drop_path_rate == 0.0


def test_durations_in_steps() -> None:
    plan = steps_of_schedule(resolve(("schedule.length", 20), ("schedule.warmup", 2)), 22)
    assert (plan.total, plan.warmup, plan.eval_every, plan.shortened) == (440, 44, 22, False)
    short = steps_of_schedule(resolve(("schedule.length", 1), ("schedule.warmup", 20)), 22)
    assert (short.total, short.warmup, short.shortened) == (22, 11, True)


def test_the_papers_arithmetic() -> None:
    """REFERENCE: batch 256, 300 epochs of 1,281,167 images; the release at 4 x 256 with lr 1e-3 x 1024 / 512."""
    paper = rcp.resolve(rcp.recipe_file("imagenet", "pretrain")).recipe
    release = rcp.resolve(rcp.recipe_file("imagenet-release", "pretrain")).recipe
    assert steps_of_schedule(paper, 1_281_167 // paper.train.batch_size).total == 1_501_200
    assert steps_of_schedule(release, 1_281_167 // release.train.batch_size).total == 375_300
    assert release.optim.lr == pytest.approx(1e-3 * release.train.batch_size / 512)
    assert release.schedule.min_lr == pytest.approx(5e-6 * 2)
    assert release.schedule.warmup_ratio * release.optim.lr == pytest.approx(5e-7 * 2)


def test_the_reference_is_the_one_generated_from_the_code() -> None:
    committed = (Path(__file__).parent.parent / "docs" / "recipe.md").read_text()
    assert committed == recipe_reference.markdown(), "python -m hcnet_cli.recipe_reference > docs/recipe.md"


def test_every_field_is_explained() -> None:
    """Each key of each shipped recipe has a description, and lists the tasks that have it."""
    explained = {entry.key: entry for entry in recipe_reference.entries()}
    for name in rcp.shipped():
        recipe = rcp.resolve(rcp.recipe_file(name)).recipe
        for key in rcp.flatten(recipe.model_dump()):
            if not key.startswith(("optim.args.", "model.args.")):
                assert len(explained[key].description) > 5, key
    assert explained["optim.no_decay"].tasks == tuple(TASKS)
    assert recipe_reference.explain_field("optim.no_decay")[0] == "optim.no_decay"
    with pytest.raises(UserError, match=r'Did you mean "optim\.lr"'):
        recipe_reference.explain_field("optim.lrr")


def test_recipes_are_found_by_short_name_and_misspelling_is_answered() -> None:
    assert rcp.recipe_file("digits", "pretrain") == DIGITS
    with pytest.raises(UserError, match='Did you mean "imagenet"'):
        rcp.recipe_file("imagent", "pretrain")
    with pytest.raises(UserError, match=r"no recipe file missing\.yaml"):
        rcp.recipe_file("missing.yaml")
