"""Ablations without training: studies become the right recipes, statistics are right, unlike cells never count."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic_runs import make_run

from hcnet_cli import recipe as rcp
from hcnet_cli import runs
from hcnet_cli.console import UserError
from hcnet_cli.report import FORMATS, render
from hcnet_cli.sizes import COMPONENTS, ordered_components
from hcnet_cli.study import design
from hcnet_cli.study.design import Base, Cell, Study, StudyRecord, compare, holm

DIGITS = rcp.recipes_dir() / "pretrain" / "digits.yaml"

# --- statistics -------------------------------------------------------------------------------------------------------


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_comparison_worked_out_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) with 2 degrees of freedom, t(0.975) = 4.30265."""
    c = compare(by_seed(91, 93, 92), by_seed(90, 91, 89))
    assert c is not None
    assert c.n == 3
    assert c.difference == pytest.approx(2)
    assert (c.low, c.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert c.p == pytest.approx(0.0741799, abs=1e-6)
    assert c.effect == pytest.approx(2 * math.sqrt(1 / math.pi), abs=1e-9)  # J(2) = Gamma(1) / Gamma(1/2)
    assert c.p_wilcoxon is None


def test_a_comparison_is_scipys() -> None:
    a, b = [97.2, 96.4, 98.1, 97.5, 96.9], [97.9, 96.2, 98.8, 98.6, 97.0]
    c = compare(by_seed(*a), by_seed(*b))
    assert c is not None
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    assert (c.p, c.low, c.high) == pytest.approx((test.pvalue, low, high))


def test_pairs_are_of_one_seed_whatever_the_order() -> None:
    """Seeds differ by far more than arms: only pairing by seed finds the difference, any other pairing loses it."""
    full = {3: 80.0, 0: 50.0, 4: 90.0, 1: 60.0, 2: 70.0}
    arm = {0: 50.9, 1: 61.1, 2: 71.0, 3: 80.8, 4: 91.2}
    c = compare(arm, full)
    assert c is not None
    assert c.p is not None
    assert c.p < 0.001
    assert c.difference == pytest.approx(1.0)
    in_file_order = stats.ttest_rel(list(arm.values()), list(full.values())).pvalue
    unpaired = stats.ttest_ind(list(arm.values()), list(full.values())).pvalue
    assert in_file_order > 0.5
    assert unpaired > 0.5
    for order in itertools.permutations(range(5)):
        wrong = compare({seed: arm[order[seed]] for seed in range(5)}, full)
        assert wrong is not None
        if order != (0, 1, 2, 3, 4):
            assert wrong.p is None or wrong.p > 0.05


def test_only_seeds_that_both_have_are_compared() -> None:
    c = compare({0: 1.0, 2: 5.0, 7: 100.0}, {0: 0.0, 2: 3.0, 5: -100.0})
    assert c is not None
    assert (c.n, c.difference) == (2, 1.5)
    assert compare({0: 1.0}, {1: 1.0}) is None


def test_one_seed_is_a_number_without_a_claim() -> None:
    assert compare(by_seed(97.0), by_seed(98.0)) == design.Comparison(1, -1.0)


@pytest.mark.parametrize("shift", [0.0, -0.2785515])
def test_equal_differences_give_no_false_certainty(shift: float) -> None:
    """Every seed differs alike, but for rounding: t would be infinite (or 0 / 0), so nothing is claimed."""
    full = by_seed(97.21448467966574, 96.65738161559888, 98.05013927576601)
    c = compare({seed: value + shift for seed, value in full.items()}, full)
    assert c is not None
    assert c.difference == pytest.approx(shift)
    assert (c.low, c.high, c.p, c.p_wilcoxon, c.effect) == (None,) * 5


def signed_rank_p(differences: list[float]) -> float:
    """Two-sided p by counting out every pattern of signs."""
    d = [round(x, 9) for x in differences if x]
    sizes = sorted(abs(x) for x in d)
    rank = {size: (2 * sizes.index(size) + 1 + sizes.count(size)) / 2 for size in sizes}

    def statistic(signs: tuple[int, ...]) -> float:
        return sum(sign * rank[abs(x)] for sign, x in zip(signs, d, strict=True))

    seen = statistic(tuple(1 if x > 0 else -1 for x in d))
    every = [statistic(signs) for signs in itertools.product((-1, 1), repeat=len(d))]
    more = sum(value >= seen - 1e-9 for value in every) / len(every)
    less = sum(value <= seen + 1e-9 for value in every) / len(every)
    return min(1.0, 2 * min(more, less))


@pytest.mark.parametrize(
    "differences",
    [
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.5],
        [-1.0, 2.0, 3.0, -4.0, 5.0, 6.0, 7.0],
        [0.28, 0.28, 0.56, -0.28, 0.84, 0.0, 0.28, 1.12],  # ties and a zero, as on digits
    ],
)
def test_wilcoxon_is_counted_out(differences: list[float]) -> None:
    c = compare({s: 90 + d for s, d in enumerate(differences)}, dict.fromkeys(range(len(differences)), 90.0))
    assert c is not None
    assert c.p_wilcoxon == pytest.approx(signed_rank_p(differences))
    if 0.0 not in differences:
        assert c.p_wilcoxon == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_wilcoxon_needs_six_differences_and_manages_many() -> None:
    five = compare(by_seed(1, 2, 3, 4, 5, 0), dict.fromkeys(range(6), 0.0))  # the sixth is none
    assert five is not None
    assert five.p_wilcoxon is None
    many = {s: math.sin(s) + 0.3 for s in range(20)}
    c = compare(many, dict.fromkeys(many, 0.0))
    assert c is not None
    assert c.p_wilcoxon == pytest.approx(stats.wilcoxon(list(many.values())).pvalue)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.02]) == [0.04, None, 0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_rejects_what_the_step_down_procedure_rejects(ps: list[float]) -> None:
    """From the smallest p: rejected while p <= 0.05 / (arms left)."""
    rejected = set()
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[i] * (len(ps) - rank) > 0.05:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(ps)) if p is not None and p <= 0.05} == rejected


# --- studies become recipes -------------------------------------------------------------------------------------------


def base(*overrides: tuple[str, Any], file: Path = DIGITS, init: str = "none") -> Base:
    return Base(file, tuple((key, value, f"--set {key}") for key, value in overrides), init)


def planned(study: Study, *bases: Base) -> design.Plan:
    return design.plan("mine", study, bases or (base(),))


@pytest.mark.parametrize("name", [name for name in design.shipped_studies() if name != "pretraining"])
def test_shipped_arms_differ_in_what_they_say_and_in_nothing_else(name: str) -> None:
    short, study = design.read_study(name)
    plan = planned(study)
    first, *others = plan.arms
    assert short == name
    assert plan.arms[first] == {}
    reference = plan.recipes[first, "pretrain"]
    assert reference == rcp.resolve(DIGITS).recipe  # the ordinary run: other studies share it
    for arm in others:
        recipe = plan.recipes[arm, "pretrain"]
        assert rcp.differences(recipe, reference).keys() == plan.arms[arm].keys()


def test_components_and_stencil_are_what_their_names_say() -> None:
    arms = design.read_study("components")[1].arms
    assert list(arms.values())[1:] == [{"model.disable": [name]} for name in COMPONENTS]
    plan = planned(design.read_study("stencil")[1])
    assert [rcp.variant(recipe) for recipe in plan.recipes.values()] == [
        *("", "kernel_size=3", "kernel_size=7", "no-anisotropy")
    ]


def test_pretraining_is_an_axis_of_weights_and_of_nothing_else(tmp_path: Path) -> None:
    """The arm starts from the best pretrain run by its path, so that the study knows its cells again."""
    study = design.read_study("pretraining")[1]
    scenes = Base(rcp.recipe_file("finetune-det/digit-scenes"), ())
    with pytest.raises(UserError, match="no finished pretrain run of size pico"):
        design.plan("mine", study, [scenes], (), tmp_path)
    folders = {seed: make_run(tmp_path, seed=seed, score=90.0 + seed) for seed in (0, 1)}
    for folder in folders.values():
        (folder / "best.safetensors").touch()
    plan = design.plan("mine", study, [scenes], (), tmp_path)
    scratch, pretrained = (plan.recipes[arm, "finetune-det"] for arm in plan.arms)
    assert (scratch.init, pretrained.init) == ("none", str(folders[1]))
    assert rcp.differences(scratch, pretrained).keys() == {"init"}
    with pytest.raises(UserError, match="stands under runs too"):
        design.plan("mine", study, [Base(scenes.file, (), "weights.safetensors")], (), tmp_path)


def test_disable_makes_an_arm_of_each_and_one_of_several() -> None:
    _, study = design.disable_study(["refinement", "gate+refinement"])
    assert study.arms == {
        "full": {},
        "no-refinement": {"model.disable": ["refinement"]},
        "no-refinement-no-gate": {"model.disable": ["refinement", "gate"]},
    }
    assert design.disable_study(["all"])[1].arms == design.read_study("components")[1].arms
    same = [planned(design.disable_study([text])[1]) for text in ("gate+refinement", "refinement+gate")]
    assert same[0].recipes == same[1].recipes  # one order, so that the runs are shared


@pytest.mark.parametrize("names", [c for n in range(1, 6) for c in itertools.combinations(COMPONENTS, n)])
def test_combinations_are_refused_just_where_the_model_refuses_them(names: tuple[str, ...]) -> None:
    """The rule stands here once more, without torch; the model's own is the judge."""
    try:
        ordered_components(names)
        meaningful = True
    except ValueError:
        meaningful = False
    if meaningful:
        design.disable_study(["+".join(names)])
    else:
        with pytest.raises(UserError, match=r"without (conduction|anisotropy) there is no"):
            design.disable_study(["+".join(names)])


def test_the_example_of_the_docs_is_a_study(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "ablations.md").read_text()
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    _, study = design.read_study(str(tmp_path / "mine.yaml"))
    bases = [
        Base(rcp.recipe_file(run.recipe), tuple((k, v, "the study") for k, v in run.changes.items()), run.init)
        for _, run in design.study_runs(study, [], "")
    ]
    plan = design.plan("mine", study, bases)
    assert plan.tasks == ("pretrain", "finetune-det", "finetune-seg")
    assert plan.from_pretrain == {"finetune-det", "finetune-seg"}


def test_a_name_of_a_study_covers_all_that_shapes_it_but_the_seeds() -> None:
    study = design.disable_study(["gate"])[1]
    name = planned(study).name
    assert name.startswith("mine-pretrain-digits-pico-")
    assert design.plan("mine", study, [base()], (4, 5)).name == name
    assert planned(study, base(("schedule.length", 3))).name != name
    assert planned(study, base(("data.path", "/elsewhere/digits"))).name != name
    assert planned(study, base(("train.workers", 2))).name == name


def test_fine_tuning_from_the_arms_own_pretraining() -> None:
    files = [rcp.recipe_file(name) for name in ("finetune-det/digit-scenes", "pretrain/digits")]
    plan = planned(design.disable_study(["gate"])[1], base(file=files[0], init="pretrain"), base(file=files[1]))
    assert plan.tasks == ("pretrain", "finetune-det")
    assert plan.recipe("no-gate", "finetune-det", 3, "results/runs/x").init == "results/runs/x"
    assert plan.recipe("no-gate", "pretrain", 3, "").init == "none"
    assert plan.recipe("no-gate", "finetune-det", 3).train.seed == 3
    with pytest.raises(UserError, match="but there is none in it"):
        planned(design.disable_study(["gate"])[1], base(file=files[0], init="pretrain"))
    scratch = planned(design.disable_study(["gate"])[1], base(file=files[0]))
    assert scratch.recipes["full", "finetune-det"].init == "none"  # "auto" would depend on what runs there are


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"a": {}, "b": {"model.kernel_sise": 3}}, 'arm b: unknown recipe key "model.kernel_sise". Did you mean'),
        ({"a": {}, "b": {"model.kernel_size": "three"}}, "arm b"),
        ({"a": {}, "b": {"schedule.length": 3}}, "arm b: schedule.length is the same for all arms"),
        ({"a": {}, "b": {"train": {"seed": 3}}}, "arm b: train.seed is the same for all arms"),
        ({"a": {}, "b": {"model.disable": ["conduction", "gate"]}}, "arm b: without conduction there is no gate"),
        ({"a": {"optim.lr": 1e-3}, "b": {"optim.lr": 0.001}}, "The arms a and b are the same recipe"),
        ({"a": {}, "b": {"data.re_prob": 0.5}}, "--set data.re_prob: the arm b sets data.re_prob too"),
    ],
)
def test_an_arm_that_cannot_be_compared_is_one_sentence(arms: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        planned(Study(title="x", arms=arms), base(("data.re_prob", 0.0)))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: x\narm: {a: {}, b: {}}", 'unknown key "arm". Did you mean "arms"?'),
        ("arms: {a: {}, b: {}}", 'the key "title" is missing'),
        ("title: x\narms: {a: {}}", "at least two arms"),
        ("title: x\narms: {a: {}, a b: {}}", '"a b" cannot be the name of an arm'),
        ("title: x\narms: {a: {}, ../b: {}}", '"../b" cannot be the name of an arm'),
        ("title: x\narms: {a: {}, b: {}}\nseeds: [0, -1]", '"seeds.1" cannot be -1'),
        ("title: x\narms: {a: {}, b: {}}\nruns: [{recipe: x, int: none}]", 'key "runs.0.int". Did you mean "init"?'),
        ("title: x\narms: {a: {}, a: {}}", 'the key "a" stands twice'),
        ("- 1", "not a mapping"),
    ],
)  # fmt: skip
def test_a_bad_study_file_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml") as error:
        design.read_study(str(file))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# --- the run of a cell ------------------------------------------------------------------------------------------------


def with_recipe(folder: Path, recipe: rcp.Recipe) -> Path:
    (folder / "recipe.yaml").write_text(rcp.dump_yaml(recipe))
    return folder


def test_a_cell_finds_the_run_of_its_recipe_whoever_asked_for_it(tmp_path: Path) -> None:
    cell = planned(design.disable_study(["gate"])[1]).recipe("full", "pretrain", 1)
    resolved = rcp.resolve(DIGITS, [("train.seed", 1, ""), ("train.precision", "fp32", "")])
    with_recipe(make_run(tmp_path, seed=1, name="unfinished", done=0.5, status="running"), resolved.recipe)
    mine = with_recipe(make_run(tmp_path, seed=1, name="any-name"), resolved.recipe)
    for number, (key, value) in enumerate(
        [("optim.lr", 1e-4), ("train.seed", 2), ("data.path", "/other/digits"), ("init", "some.safetensors")]
    ):
        other = rcp.resolve(DIGITS, [("train.seed", 1, ""), (key, value, "")]).recipe
        with_recipe(make_run(tmp_path, seed=1, name=f"z{number}"), other)
    with_recipe(make_run(tmp_path, seed=1, name="zz", evaluated_only=True), resolved.recipe)
    assert design.find(cell, runs.find_runs(tmp_path)) == mine
    for folder in (mine, tmp_path / "runs" / "unfinished"):  # a broken record is found by its recipe
        (folder / "run.json").write_text("{")
    assert design.find(cell, runs.find_runs(tmp_path)) in (mine, tmp_path / "runs" / "unfinished")


def test_a_cell_of_a_named_precision_takes_no_other(tmp_path: Path) -> None:
    plan = planned(design.disable_study(["gate"])[1], base(("train.precision", "bf16")))
    ran = rcp.resolve(DIGITS, [("train.precision", "fp32", "")]).recipe
    with_recipe(make_run(tmp_path), ran)
    assert design.find(plan.recipe("full", "pretrain", 0), runs.find_runs(tmp_path)) is None


# --- the table --------------------------------------------------------------------------------------------------------

SCORES = {"full": (98.0, 97.0, 98.5), "no-gate": (97.0, 96.2, 97.3), "no-refinement": (98.2, 96.9, 98.4)}


def study_of(
    results: Path, scores: Mapping[str, tuple[float, ...]] = SCORES, data: str = "digits", **cells: Mapping[str, Any]
) -> StudyRecord:
    """A study whose cells are made-up runs; `cells` override fields of a run: {"no_gate_1": {...}}."""
    made = []
    for arm, values in scores.items():
        for seed, value in enumerate(values):
            fields: dict[str, Any] = {"seed": seed, "variant": "" if arm == "full" else arm}
            fields |= cells.get(f"{arm}_{seed}".replace("-", "_"), {})
            folder = make_run(results, data, score=value, log=False, name=f"{arm}-{seed}", **fields)
            made.append(Cell(arm=arm, task="pretrain", seed=seed, state="finished", run=folder.name))
    arms = {arm: {} if arm == "full" else {"model.disable": [arm[3:]]} for arm in scores}
    seeds = list(range(max(map(len, scores.values()))))
    return StudyRecord(
        name="s", title="parts", arms=arms, tasks=["pretrain"], seeds=seeds, cells=made, argv=["hcnet", "ablate"]
    )


def made(results: Path, record: StudyRecord) -> tuple[design.Table, dict[str, Mapping[str, Any]], str]:
    table = design.table(record, design.by_name(results))
    return table, {str(row.values["model"]): row.values for row in table.rows}, "\n".join(table.notes)


def test_the_table_holds_means_intervals_differences_and_corrected_p(tmp_path: Path) -> None:
    table, rows, notes = made(tmp_path, study_of(tmp_path))
    low, high = stats.t.interval(0.95, 2, loc=0, scale=stats.sem(SCORES["full"]))
    assert rows["full"]["top1"] == pytest.approx(sum(SCORES["full"]) / 3)
    assert rows["full"]["top1_ci"] == pytest.approx((high - low) / 2)
    assert "top1_difference" not in rows["full"]
    raw = [stats.ttest_rel(SCORES[arm], SCORES["full"]).pvalue for arm in ("no-gate", "no-refinement")]
    assert rows["no-gate"]["top1_difference"] == pytest.approx(-1.0)
    assert rows["no-gate"]["top1_p_uncorrected"] == pytest.approx(raw[0])
    assert rows["no-gate"]["top1_p"] == pytest.approx(2 * raw[0])
    assert rows["no-refinement"]["top1_p"] == pytest.approx(max(2 * raw[0], raw[1]))
    assert rows["no-gate"]["params_m"] == pytest.approx(1.66)
    assert [arm[0] for arm in table.forest] == ["no-gate", "no-refinement"]
    assert table.forest[0][1:] == tuple(rows["no-gate"][f"top1_{k}"] for k in ("difference", "low", "high"))
    assert "no difference from full is shown for" in notes
    assert "Holm-corrected over 2 arms" in notes
    assert "No Wilcoxon test" in notes
    assert "hcnet ablate" in notes
    assert all(len(row.runs) == 3 for row in table.rows)


def test_what_is_shown_and_what_is_not_is_said_in_words(tmp_path: Path) -> None:
    scores = {
        "full": (98.0, 97.0, 98.5, 97.7),
        "no-gate": (95.0, 94.1, 95.4, 94.6),
        "no-refinement": (98.3, 96.8, 98.5, 97.6),
    }
    _, rows, notes = made(tmp_path, study_of(tmp_path, scores))
    assert rows["no-gate"]["top1_p"] < 0.05
    assert "differs from full (corrected p < 0.05): no-gate." in notes
    assert "no difference from full is shown for no-refinement" in notes


def test_a_killed_and_a_corrupt_cell_are_named_and_not_averaged(tmp_path: Path) -> None:
    record = study_of(tmp_path, no_gate_1={"status": "running", "steps_done": 200})
    corrupt = next(cell.run for cell in record.cells if (cell.arm, cell.seed) == ("no-refinement", 2))
    (tmp_path / "runs" / corrupt / "run.json").write_text('{"schema_version": 1, "st')
    table, rows, notes = made(tmp_path, record)
    killed = next(cell.run for cell in record.cells if (cell.arm, cell.seed) == ("no-gate", 1))
    assert f"Not counted: no-gate, seed 1: running at 200 of 440 steps [{killed}]." in notes
    assert "Not counted: no-refinement, seed 2: its record cannot be read" in notes
    assert corrupt in notes
    assert rows["full"]["top1_n"] == 3
    assert (rows["no-gate"]["top1_n"], rows["no-gate"]["top1"]) == (2, pytest.approx((97.0 + 97.3) / 2))
    assert rows["no-gate"]["top1_difference"] == pytest.approx((97.0 - 98.0 + 97.3 - 98.5) / 2)
    assert (rows["no-refinement"]["top1_n"], rows["no-refinement"]["top1"]) == (2, pytest.approx((98.2 + 96.9) / 2))
    assert all(run.name not in (killed, corrupt) for row in table.rows for run in row.runs)


@pytest.mark.parametrize(
    ("change", "aspect"),
    [
        ({"steps_total": 880, "steps_done": 880}, "budget: 880 steps of 64 instead of 440 steps of 64"),
        ({"batch_size": 32}, "budget"),
        ({"precision": "bf16"}, "precision: bf16 instead of fp32"),
        ({"git_commit": "ffff" * 10}, "code version: ffffffffffff instead of 3f2a9c1d4b7e"),
        ({"git_dirty": True}, "code version: 3f2a9c1d4b7e with changes instead of"),
        ({"metric_notes": {"top1": "center crop"}}, "evaluation: top1: center crop instead of plain"),
        ({"metrics": {"top5": 99.0}}, "its record has no top1"),
        ({"metrics": {"top1": math.nan}}, ""),  # JSON's null: a record that is not in order
        ({"seed": 7}, "its run has seed 7"),
    ],
)
def test_unlike_cells_are_named_with_the_reason_and_not_averaged(
    tmp_path: Path, change: dict[str, Any], aspect: str
) -> None:
    _, rows, notes = made(tmp_path, study_of(tmp_path, no_gate_2=change))
    assert "Not counted: no-gate, seed 2: " in notes
    assert aspect in notes
    assert rows["no-gate"]["top1"] == pytest.approx((97.0 + 96.2) / 2)
    assert (rows["no-gate"]["top1_n"], rows["full"]["top1_n"]) == (2, 3)


def test_other_data_of_the_same_name_are_unlike(tmp_path: Path) -> None:
    record = study_of(tmp_path)
    file = tmp_path / "runs" / record.cells[0].run / "run.json"
    data = json.loads(file.read_text())
    data["data"]["digest"] = "other"
    file.write_text(json.dumps(data))
    _, rows, notes = made(tmp_path, record)
    assert "Not counted: full, seed 0: unlike the others in data" in notes
    # and the seed has lost its partner in the other arms
    assert "Not counted: no-gate, seed 0: full has no run of this seed to compare it with" in notes
    assert rows["no-gate"]["top1_difference"] == pytest.approx((96.2 - 97.0 + 97.3 - 98.5) / 2)


def test_missing_gone_and_failed_cells_are_listed(tmp_path: Path) -> None:
    record = study_of(tmp_path)
    record.cells[0].run = "deleted"
    record.cells[4] = Cell(arm="no-gate", task="pretrain", seed=1)
    record.cells[8] = Cell(arm="no-refinement", task="pretrain", seed=2, state="failed", error="It broke.", log="a.log")
    _, rows, notes = made(tmp_path, record)
    assert "Not counted: full, seed 0: its run is gone [deleted]." in notes
    assert "Not counted: no-gate, seed 1: not run." in notes
    assert "Not counted: no-refinement, seed 2: not run; failed: It broke (log: a.log)." in notes
    assert rows["no-gate"]["top1_n"] == 1


def test_one_seed_gives_numbers_without_a_claim(tmp_path: Path) -> None:
    table, rows, notes = made(tmp_path, study_of(tmp_path, {arm: values[:1] for arm, values in SCORES.items()}))
    assert rows["no-gate"]["top1_difference"] == pytest.approx(-1)
    assert rows["no-gate"]["top1_p"] is None
    assert table.forest == []
    assert "these are numbers, not findings" in notes
    assert "is shown" not in notes
    assert "±" not in render([table], "markdown")


def test_an_arm_or_a_study_without_a_run_is_still_a_table(tmp_path: Path) -> None:
    record = study_of(tmp_path)
    for cell in record.cells:
        if cell.arm == "no-gate":
            cell.run = ""
    table, _, _ = made(tmp_path, record)
    assert [row.kind for row in table.rows] == ["measured", "measured", "unfinished"]
    empty = tmp_path / "empty"
    empty.mkdir()
    table, _, notes = made(empty, record)
    assert notes.count("Not counted") == 9
    assert {row.kind for row in table.rows} == {"unfinished"}


def test_speeds_stand_side_by_side_only_if_measured_alike(tmp_path: Path) -> None:
    speeds: dict[str, Any] = {
        f"{a}_{s}": {"images_per_second": v + s} for a, v in (("full", 100.0), ("no_gate", 200.0)) for s in range(3)
    }
    two = {arm: SCORES[arm] for arm in ("full", "no-gate")}
    _, rows, _ = made(tmp_path / "a", study_of(tmp_path / "a", two, **speeds))
    assert [rows[arm]["images_per_second"] for arm in two] == [101.0, 201.0]
    speeds["full_1"]["speed_notes"] = "other threads"
    _, rows, _ = made(tmp_path / "b", study_of(tmp_path / "b", two, **speeds))
    assert [rows[arm]["images_per_second"] for arm in two] == [None, None]


def test_six_seeds_bring_the_signed_rank_test(tmp_path: Path) -> None:
    full = (97.0, 97.5, 98.0, 96.9, 97.2, 97.8)
    arm = tuple(value - 1 - 0.1 * number for number, value in enumerate(full))
    table, rows, notes = made(tmp_path, study_of(tmp_path, {"full": full, "no-gate": arm}))
    assert rows["no-gate"]["top1_p_wilcoxon"] == pytest.approx(2 / 2**6)
    assert "p (Wilcoxon)" in [column.title for column in table.columns]
    assert "No Wilcoxon test" not in notes


def test_three_tasks_are_one_table(tmp_path: Path) -> None:
    names = {"pretrain": "digits", "finetune-det": "digit-scenes", "finetune-seg": "digit-stuff"}
    cells = []
    for task, data in names.items():
        for arm, loss in (("full", 0.0), ("no-gate", 1.0)):
            for seed in range(3):
                folder = make_run(
                    tmp_path, data, seed=seed, score=50 + seed - loss * (1 + 0.1 * seed), log=False,
                    variant="" if arm == "full" else arm,
                )  # fmt: skip
                cells.append(Cell(arm=arm, task=task, seed=seed, run=folder.name, state="finished"))
    record = StudyRecord(
        name="s", title="gate", arms={"full": {}, "no-gate": {"model.disable": ["gate"]}}, tasks=list(names),
        seeds=[0, 1, 2], cells=cells,
    )  # fmt: skip
    table, rows, notes = made(tmp_path, record)
    for metric in ("top1", "box_AP", "mIoU"):
        assert rows["no-gate"][f"{metric}_difference"] == pytest.approx(-1.1)
    assert [arm[0] for arm in table.forest] == ["no-gate, top-1", "no-gate, box AP", "no-gate, mIoU"]
    assert "box AP: differs from full" in notes
    assert rows["full"]["params_m"] == pytest.approx(1.66)  # the classifier's


def test_every_format_prints_it_and_a_study_file_that_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    record = study_of(tmp_path)
    (tmp_path / "studies" / "s.json").write_text(record.model_dump_json())
    (tmp_path / "studies" / "t.json").write_text("{")
    tables, broken = design.tables([tmp_path])
    assert len(tables) == 1
    assert len(broken) == 1
    assert "t.json" in broken[0]
    for fmt in FORMATS:
        if fmt != "html":
            assert "no-gate" in render(tables, fmt, width=100)
