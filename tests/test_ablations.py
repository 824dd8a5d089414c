"""Studies without training: they become the right recipes, and unlike cells never count."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from safetensors.numpy import save_file
from scipy import stats
from synthetic_runs import make_run
from synthetic_studies import DIGITS, SCORES, base, made, planned, study_of, with_recipe

from hcnet_cli import build, cache, header, runs
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.report import FORMATS, render
from hcnet_cli.sizes import COMPONENTS, INCLUDES
from hcnet_cli.study import design
from hcnet_cli.study import table as study_table
from hcnet_cli.study.design import Base, Study
from hcnet_cli.study.record import Cell, RunSearch, StudyRecord, Today, find_run

TODAY = Today(lambda _: "digits-digest")

# --- studies become recipes -------------------------------------------------------------------------------------------


def changed(recipe: rcp.Recipe, other: rcp.Recipe) -> set[str]:
    """Dotted keys of the fields that differ, of all fields."""
    return set(rcp.changed_keys(rcp.flatten(recipe.model_dump()), rcp.flatten(other.model_dump())))


@pytest.mark.parametrize("name", [name for name in design.shipped_studies() if name != "pretraining"])
def test_shipped_arms_differ_in_what_they_say_and_in_nothing_else(name: str) -> None:
    short, study = design.read_study(name)
    plan = planned(study)
    first, *others = plan.arms
    assert short == name
    assert plan.arms[first] == {}
    baseline = plan.recipes[first, "pretrain"]
    assert baseline == rcp.resolve(DIGITS).recipe  # the ordinary run: other studies share it
    for arm in others:
        recipe = plan.recipes[arm, "pretrain"]
        assert changed(recipe, baseline) == plan.arms[arm].keys()


def test_backbones_of_one_size_by_one_recipe() -> None:
    """Parameters within 10 % of HcNet-pico's, counted in models of timm; maps for both heads; equal drop path."""
    recipes = ("finetune-det/digit-scenes", "finetune-seg/digit-stuff")
    tuned = [Base(rcp.recipe_file(name), (), "pretrain") for name in recipes]
    plan = planned(design.read_study("backbones")[1], base(), *tuned)
    assert list(plan.arms) == ["hcnet", "convnext", "swin", "resnet", "vit"]
    pico = sum(p.numel() for p in timm.create_model("hcnet_pico", num_classes=10).parameters())
    for arm in list(plan.arms)[1:]:
        model = plan.recipes[arm, "pretrain"].model
        sized = {"img_size": 32} if arm == "swin" else {}
        made = timm.create_model(model.name, num_classes=10, **sized, **model.args)
        assert abs(sum(p.numel() for p in made.parameters()) / pico - 1) < 0.1, arm
        for task in ("finetune-det", "finetune-seg"):
            maps = build.build_backbone(plan.recipes[arm, task], 0)
            assert [level["reduction"] for level in maps.feature_info] == [4, 8, 16, 32]
    for task in plan.tasks:
        rates = {plan.recipes[arm, task].model.drop_path_rate for arm in plan.arms}
        assert rates == {plan.recipes["hcnet", task].model.drop_path_rate} != {None}
    assert plan.sources == {"finetune-det": "pretrain", "finetune-seg": "pretrain"}


def test_arms_by_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def build(num_classes): ...")
    short, study = design.backbones_study(f"t, swin,timm:convnext_tiny,resnet18,{mine}:build")
    assert short == "backbones"
    assert study.arms == {
        "t": {"model.size": "t"},
        "swin": design.read_study("backbones")[1].arms["swin"],
        "convnext_tiny": {"model.name": "convnext_tiny"},
        "resnet18": {"model.name": "resnet18"},
        "build": {"model.name": f"{mine}:build"},
    }
    plan = planned(study)
    assert {recipe.model.drop_path_rate for recipe in plan.recipes.values()} == {0.2}  # HcNet-T's


def test_detection_is_compared_by_boxes_and_masks(tmp_path: Path) -> None:
    """A hand-made study of two seeds: paired mean differences of both metrics, and the median of memory."""
    cells = []
    for arm, boxes, masks in (("full", (40.0, 42.0), (30.0, 31.0)), ("other", (41.0, 44.0), (29.0, 30.5))):
        for seed in (0, 1):
            folder = make_run(
                tmp_path,
                "digit-scenes",
                name=f"{arm}-{seed}",
                log=False,
                seed=seed,
                variant="" if arm == "full" else arm,
                metrics={"box_AP": boxes[seed], "mask_AP": masks[seed]},
                peak_memory_mb=100.0 + seed,
            )
            cells.append(Cell(arm=arm, task="finetune-det", seed=seed, state="finished", run=folder.name))
    arms = {"full": {}, "other": {"model.mlp_ratio": 2}}
    record = StudyRecord(name="s", title="t", arms=arms, tasks=["finetune-det"], seeds=[0, 1], cells=cells)
    table, rows, notes = made(tmp_path, record)
    assert (rows["other"]["box_AP_difference"], rows["other"]["mask_AP_difference"]) == (1.5, -0.75)
    assert {"box_AP", "mask_AP", "memory_mb"} <= {column.key for column in table.columns}
    assert (rows["full"]["memory_mb"], "mask AP (secondary)" in notes) == (100, True)


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
        design.expand("mine", study, [scenes], (), tmp_path)
    folders = {seed: make_run(tmp_path, seed=seed, score=90.0 + seed) for seed in (0, 1)}
    for folder in folders.values():
        (folder / "best.safetensors").touch()
    plan = design.expand("mine", study, [scenes], (), tmp_path)
    scratch, pretrained = (plan.recipes[arm, "finetune-det"] for arm in plan.arms)
    assert (scratch.init, pretrained.init) == ("none", str(folders[1]))
    assert changed(scratch, pretrained) == {"init"}
    with pytest.raises(UserError, match="is set under runs too"):
        design.expand("mine", study, [Base(scenes.file, (), "weights.safetensors")], (), tmp_path)


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
def test_combinations_without_a_meaning_are_refused_with_their_origin(names: tuple[str, ...]) -> None:
    """A component cannot be disabled together with one that includes it."""
    if any(included in names for name in names for included in INCLUDES.get(name, ())):
        with pytest.raises(UserError, match=r"--disable .*: without (conduction|anisotropy) there is no"):
            design.disable_study(["+".join(names)])
    else:
        design.disable_study(["+".join(names)])


def test_the_example_of_the_docs_is_a_study(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "ablations.md").read_text()
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    _, study = design.read_study(str(tmp_path / "mine.yaml"))
    bases = [
        Base(rcp.recipe_file(run.recipe), tuple((k, v, "the study") for k, v in run.changes.items()), run.init)
        for _, run in design.study_runs(study, [], "")
    ]
    plan = design.expand("mine", study, bases)
    assert plan.tasks == ("pretrain", "finetune-det", "finetune-seg")
    assert plan.sources == {"finetune-det": "pretrain", "finetune-seg": "pretrain"}


def test_a_name_of_a_study_covers_all_that_shapes_it_but_the_seeds() -> None:
    study = design.disable_study(["gate"])[1]
    name = planned(study).name
    assert name.startswith("mine-pretrain-digits-pico-")
    assert design.expand("mine", study, [base()], (4, 5)).name == name
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
        (
            {"a": {}, "b": {"model.disable": ["conduction", "gate"]}},
            'arm b: "model.disable" cannot be ["conduction", "gate"]: without conduction there is no gate',
        ),
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
        ("title: x\narms: {a: {}, b: {}}\nseeds: [0, -1]", '"seeds" cannot be [0, -1]: it takes a list of one or'),
        ("title: x\narms: {a: {}, b: {}}\nseeds: [0, 0]", "a repeated seed is no new evidence"),
        ("title: x\narms: {a: {}, b: {}}\nseeds: []", '"seeds" cannot be []'),
        ("title: x\narms: {a: {}, b: {}}\nseeds: 3", '"seeds" cannot be 3'),
        ("title: ''\narms: {a: {}, b: {}}", '"title" cannot be ""'),
        ("title: x\narms: {}", "at least two arms"),
        ("title: x\narms: [a, b]", '"arms" cannot be ["a", "b"]: it takes a mapping'),
        ("title: x\narms: {a: 3, b: {}}", '"arms" cannot be'),
        ("title: x\narms: {a: {}, '': {}}", '"" cannot be the name of an arm'),
        (f"title: x\narms: {{a: {{}}, {'b' * 61}: {{}}}}", "cannot be the name of an arm"),
        ("title: x\narms: {" + ", ".join(f"a{n}: {{}}" for n in range(101)) + "}", "at most 100"),
        ("title: x\narms: {a: {}, b: {}}\nruns: [3]", '"runs.0" cannot be 3: it is a section with the keys recipe'),
        ("title: x\narms: {a: {}, b: {}}\nruns: {recipe: x}", '"runs" cannot be'),
        ("- 1", "is not a mapping"),
        ("", "is not a mapping"),
        ("a: &x [*x]", "anchors"),
        ("title: x\narms: {a: {}, b: {}}\nruns: [{recipe: x, int: none}]", 'Did you mean "runs.0.init"?'),
        ("title: x\narms: {a: {}, a: {}}", 'the key "a" appears twice'),
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
    assert find_run(cell, runs.find_runs(tmp_path), TODAY) == mine
    for folder in (mine, tmp_path / "runs" / "unfinished"):  # a broken record is found by its recipe
        (folder / "run.json").write_text("{")
    assert find_run(cell, runs.find_runs(tmp_path), TODAY) in (mine, tmp_path / "runs" / "unfinished")


def test_a_cell_of_a_named_precision_takes_no_other(tmp_path: Path) -> None:
    plan = planned(design.disable_study(["gate"])[1], base(("train.precision", "bf16")))
    ran = rcp.resolve(DIGITS, [("train.precision", "fp32", "")]).recipe
    with_recipe(make_run(tmp_path), ran)
    assert find_run(plan.recipe("full", "pretrain", 0), runs.find_runs(tmp_path), TODAY) is None


def test_records_answer_for_many_cells_and_a_recipe_is_read_only_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two arms that no record tells apart but by its fingerprint, each with a run that the study named before."""
    monkeypatch.setattr(cache, "known_data", lambda *given: cache.KnownData("digits", "digits-digest"))
    recipes = {name: rcp.resolve(DIGITS, [("optim.weight_decay", value, ""), ("train.precision", "fp32", "")]).recipe
               for name, value in (("a", 0.01), ("b", 0.02))}  # fmt: skip
    for name, recipe in recipes.items():
        text = rcp.dump_yaml(recipe)
        written = {"config": "0" * 16, "recipe_digest": runs.text_digest(text)}
        fingerprint = runs.run_fingerprint(recipe, "digits-digest", "")
        with_recipe(make_run(tmp_path, name=name, fingerprint=fingerprint, **written), recipe)
    found = runs.find_runs(tmp_path)
    search = RunSearch(found, TODAY)
    named = {name: Cell(arm="x", task="pretrain", seed=0, run=name) for name in "ab"}
    fresh = rcp.resolve(DIGITS, [("optim.weight_decay", 0.03, "")]).recipe
    replaced = named["a"].model_copy(update={"fingerprint": "00000000"})
    for before in (None, named["b"], replaced):  # in doubt: the recipe of the run decides
        assert search.find(recipes["a"], before) == find_run(recipes["a"], found, TODAY) == tmp_path / "runs" / "a"
    monkeypatch.setattr(rcp, "resolve", lambda *given: pytest.fail("a recipe was read"))
    for name, recipe in recipes.items():
        assert search.find(recipe, named[name]) == tmp_path / "runs" / name
    assert search.find(fresh, None) is None
    assert find_run(fresh, found, TODAY) is None


@pytest.mark.parametrize("change", ["nothing", "the data", "the weights"])
def test_a_run_on_what_lay_at_the_same_paths_before_answers_no_cell(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(1, dtype=np.float32)}, weights)
    recipe = rcp.resolve(DIGITS, [("init", str(weights), ""), ("train.precision", "fp32", "")]).recipe
    init = header.tensors_digest(weights)
    with_recipe(
        make_run(
            tmp_path,
            name="mine",
            init={"digest": init},
            config="0" * 16,
            fingerprint=runs.run_fingerprint(recipe, "digits-digest", init),
            recipe_digest=runs.text_digest(rcp.dump_yaml(recipe)),
        ),
        recipe,
    )
    if change == "the weights":
        save_file({"a": np.ones(1, dtype=np.float32)}, weights)
    monkeypatch.setattr(cache, "known_data", lambda *given: None)
    today = Today(lambda _: "other" if change == "the data" else "digits-digest")
    found = runs.find_runs(tmp_path)
    named = Cell(arm="x", task="pretrain", seed=0, run="mine")
    folder = tmp_path / "runs" / "mine" if change == "nothing" else None
    assert find_run(recipe, found, today) == folder
    assert [RunSearch(found, today).find(recipe, before) for before in (None, named)] == [folder, folder]
    assert [(what[: len(change)], names) for what, names in today.changed.items()] == (
        [] if change == "nothing" else [(change, {"mine"})]
    )


# --- the table --------------------------------------------------------------------------------------------------------


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
    assert [rows[arm]["top1_verdict"] for arm in ("no-gate", "no-refinement")] == ["worse", "unresolved"]
    assert "top-1: not resolved for no-refinement" in notes
    assert "Holm-corrected over 2 arms" in notes
    assert "It is the default: none was fixed before training." in notes
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
    assert [rows[arm]["top1_verdict"] for arm in ("no-gate", "no-refinement")] == ["worse", "unresolved"]
    assert "worse than full (corrected p < 0.05): no-gate." in notes
    assert "not resolved for no-refinement" in notes


def test_a_killed_and_a_corrupt_cell_are_named_and_not_averaged(tmp_path: Path) -> None:
    record = study_of(tmp_path, no_gate_1={"status": "running", "steps_done": 200})
    corrupt = next(cell.run for cell in record.cells if (cell.arm, cell.seed) == ("no-refinement", 2))
    (tmp_path / "runs" / corrupt / "run.json").write_text('{"schema_version": 1, "st')
    table, rows, notes = made(tmp_path, record)
    killed = next(cell.run for cell in record.cells if (cell.arm, cell.seed) == ("no-gate", 1))
    assert f"Not counted: no-gate, seed 1: running at 200 of 440 steps [{killed}]." in notes
    broken = tmp_path / "runs" / corrupt / "run.json"
    assert f"Not counted: no-refinement, seed 2: {broken} " in notes
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


def test_a_run_that_was_replaced_does_not_count_for_its_cell(tmp_path: Path) -> None:
    """A study took a --name run, which was then trained again with another recipe."""
    record = study_of(tmp_path)
    for cell in record.cells:
        cell.fingerprint = runs.read_record(tmp_path / "runs" / cell.run / "run.json").fingerprint
    cell = next(cell for cell in record.cells if (cell.arm, cell.seed) == ("no-gate", 1))
    file = tmp_path / "runs" / cell.run / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": "replaced"}))
    _, rows, notes = made(tmp_path, record)
    assert "Not counted: no-gate, seed 1: its run was replaced by one of another recipe, data or start" in notes
    assert rows["no-gate"]["top1_n"] == rows["full"]["top1_n"] - 1


def test_a_seed_of_another_config_is_not_averaged_into_its_arm(tmp_path: Path) -> None:
    record = study_of(tmp_path, no_gate_1={"weights": "w"}, no_gate_2={"weights": "w"})
    _, _, notes = made(tmp_path, record)
    assert "no-gate, seed 2: its weights are those of no-gate-1, to the byte" in notes


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
    assert "Not run: seed 1 of no-gate." in notes
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


def test_an_arm_whose_records_are_not_believed_is_not_called_unfinished(tmp_path: Path) -> None:
    record = study_of(tmp_path)
    for seed in range(3):
        (tmp_path / "runs" / f"no-gate-{seed}" / "run.json").write_text("{")
    table, _, notes = made(tmp_path, record)
    assert table.label(table.rows[-1]) == "no-gate (not counted)"
    assert notes.count("Not counted: no-gate, seed ") == 3
    assert "no-gate (not counted)" in render([table], "markdown")


def test_an_arm_or_a_study_without_a_run_is_still_a_table(tmp_path: Path) -> None:
    record = study_of(tmp_path)
    for cell in record.cells:
        if cell.arm == "no-gate":
            cell.run = ""
    table, _, _ = made(tmp_path, record)
    assert [row.kind for row in table.rows] == ["measured", "measured", "unfinished"]
    assert "no-gate (unfinished)" in [table.label(row) for row in table.rows]
    empty = tmp_path / "empty"
    empty.mkdir()
    table, _, notes = made(empty, record)
    assert notes.count("Not counted") == 6
    assert "Not run: seeds 0, 1, 2 of no-gate." in notes
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


def test_the_sign_flip_test_stands_beside_t(tmp_path: Path) -> None:
    full = (97.0, 97.5, 98.0, 96.9, 97.2, 97.8)
    arm = tuple(value - 1 - 0.1 * number for number, value in enumerate(full))
    table, rows, notes = made(tmp_path, study_of(tmp_path, {"full": full, "no-gate": arm}))
    assert rows["no-gate"]["top1_p_sign_flip"] == 2 / 2**6
    assert "p (sign-flip)" in [column.title for column in table.columns]
    assert "without correction" in notes


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
    assert "\nbox AP (secondary): worse than full" in notes
    assert notes.startswith("top-1: worse than full")
    assert rows["full"]["params_m"] == pytest.approx(1.66)  # the classifier's


def test_every_format_prints_it_and_a_study_file_that_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    record = study_of(tmp_path)
    (tmp_path / "studies" / "s.json").write_text(record.model_dump_json())
    (tmp_path / "studies" / "t.json").write_text("{")
    tables, broken = study_table.tables([tmp_path])
    assert len(tables) == 1
    assert len(broken) == 1
    assert "t.json" in broken[0]
    for fmt in FORMATS:
        if fmt != "html":
            assert "no-gate" in render(tables, fmt, width=100)
