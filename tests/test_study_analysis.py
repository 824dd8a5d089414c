"""The primary analysis of a study, its verdicts, and what is said of its power before hours are spent."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from synthetic_runs import make_run
from synthetic_studies import DIGITS, SCORES, base, made, planned, study_of, with_recipe

from hcnet_cli import recipe as rcp
from hcnet_cli import runs, statistics
from hcnet_cli.console import UserError
from hcnet_cli.report import render
from hcnet_cli.study import analysis, design, planning, words
from hcnet_cli.study import table as study_table
from hcnet_cli.study.analysis import Analysis, Fixed
from hcnet_cli.study.design import Study
from hcnet_cli.study.record import StudyRecord

# --- the primary analysis ---------------------------------------------------------------------------------------------


def test_an_analysis_is_fixed_before_the_first_run_and_not_changed_after_it() -> None:
    def asked(seeds: tuple[int, ...], known: int = 0, **flags: Any) -> Fixed:
        return Fixed(analysis=analysis.with_flags(Analysis(), flags), seeds=seeds, finished=known)

    fixed = analysis.fix(asked((0, 1, 2), margin=0.2, test=None), None, False)
    assert (fixed.analysis.margin, fixed.seeds, fixed.finished) == (0.2, (0, 1, 2), 0)
    other = asked((0, 1), margin=0.3)
    assert analysis.fix(other, fixed, False) == other  # nothing is known yet
    assert analysis.fix(asked((0, 1, 2), 6, margin=0.2), fixed, False) == fixed  # the same, whose runs are gone
    assert analysis.fix(asked((0, 1, 2, 3)), fixed, True) == fixed  # flags left out: as it was
    with pytest.raises(UserError, match=r"margin is 0.2 and cannot become 0.3"):
        analysis.fix(other, fixed, True)
    with pytest.raises(UserError, match="test is paired-t and cannot become sign-flip"):
        analysis.fix(asked((0, 1, 2), test="sign-flip"), fixed, True)
    until = analysis.fix(asked((0, 1, 2), until=0.5), None, False)
    with pytest.raises(UserError, match="first seeds of this study were fixed as 0,1,2"):
        analysis.fix(asked((0, 1, 2, 3), until=0.5), until, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"margin": -1.0}, "--margin cannot be -1.0: it takes a number above 0 and of at most 100."),
        ({"margin": math.nan}, "--margin"),
        ({"until": math.inf}, "--until"),
        ({"max_seeds": 5}, "Max_seeds is for a study with until"),
        ({"until": 0.5, "test": "sign-flip"}, "must be paired-t"),
        ({"test": "wilcoxon"}, '--test cannot be "wilcoxon": it takes paired-t or sign-flip.'),
    ],
)
def test_flags_that_make_no_analysis_are_one_sentence(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        analysis.with_flags(Analysis(), flags)


@pytest.mark.parametrize(
    ("asked", "seeds", "words"),
    [
        (Analysis(metric="mIoU"), (0, 1), 'primary metric "mIoU" is none of this study'),
        (Analysis(test="sign-flip"), range(21), "at most 20 seeds"),
        (Analysis(until=0.5), (0,), "at least two seeds"),
        (Analysis(until=0.5, max_seeds=3), (0, 1, 2, 3), "at most --max-seeds 3, not 4"),
    ],
)
def test_an_analysis_that_the_study_does_not_allow(asked: Analysis, seeds: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        design.expand("mine", Study(title="x", arms={"a": {}, "b": {"optim.lr": 1}}, primary=asked), [base()], seeds)


def test_the_study_file_fixes_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("title: x\narms: {a: {}, b: {optim.lr: 1}}\nprimary: {test: sign-flip, margin: 0.2}\nseeds: [0, 1]")
    asked = planned(design.read_study(str(file))[1]).analysis
    assert (asked.test, asked.margin, asked.metric, asked.alpha) == ("sign-flip", 0.2, "top1", 0.05)
    file.write_text("title: x\narms: {a: {}, b: {}}\nprimary: {marge: 0.2}")
    with pytest.raises(UserError, match=r'unknown key "primary.marge". Did you mean "primary.margin"'):
        design.read_study(str(file))


def fixed(record: StudyRecord, seeds: tuple[int, ...] = (), finished: int = 0, **fields: Any) -> StudyRecord:
    asked = Analysis(**fields).check(record.tasks, record.seeds)
    chosen = Fixed(analysis=asked, seeds=seeds or tuple(record.seeds), finished=finished)
    return record.model_copy(update={"primary": chosen})


def test_equivalence_within_the_margin_is_a_verdict(tmp_path: Path) -> None:
    full = (97.0, 97.6, 98.1, 96.9, 97.3)
    scores = {
        "full": full,
        "no-gate": tuple(f + d for f, d in zip(full, (0.05, -0.04, 0.02, -0.05, 0.03), strict=True)),
        "no-refinement": tuple(f + d for f, d in zip(full, (0.9, -1.0, 0.7, -0.8, 0.3), strict=True)),
    }
    table, rows, notes = made(tmp_path, fixed(study_of(tmp_path, scores), margin=0.2))
    assert [rows[arm]["top1_verdict"] for arm in ("no-gate", "no-refinement")] == ["equivalent", "unresolved"]
    assert "equivalent to full within ±0.2: no-gate." in notes
    assert "seeds still needed for 0.20: " in notes
    assert "Fixed before training." in notes
    assert "p (equivalence)" in [column.title for column in table.columns]


def test_the_number_of_seeds_in_the_words_is_that_of_the_power_functions(tmp_path: Path) -> None:
    scores = {"full": (97.0, 97.0, 97.0, 97.0), "no-gate": (97.5, 96.5, 97.5, 96.5)}
    record = fixed(study_of(tmp_path, scores)).model_copy(update={"detect": 0.4})
    _, _, notes = made(tmp_path, record)
    spread = math.sqrt(4 * 0.25 / 3)
    needed = next(n for n in range(2, 99) if statistics.t_power(0.4, spread, n) >= 0.8)
    assert f"with 80 % power; seeds still needed for 0.40: {needed - 4}." in notes


def test_the_bca_interval_is_two_numbers_too_and_its_note_goes_with_it(tmp_path: Path) -> None:
    full = (97.0, 97.6, 98.1, 96.9, 97.3, 97.7, 97.2, 97.4)
    worse = tuple(f - d for f, d in zip(full, (0.3, 0.1, 0.6, 0.2, 0.5, 0.4, 0.2, 0.3), strict=True))
    record = fixed(study_of(tmp_path, {"full": full, "no-gate": worse}))
    table, rows, notes = made(tmp_path, record)
    low, high = rows["no-gate"]["top1_bootstrap_low"], rows["no-gate"]["top1_bootstrap_high"]
    assert low < rows["no-gate"]["top1_difference"] < high < 0
    assert rows["no-gate"]["top1_bootstrap"] == f"[{low:.2f}, {high:.2f}]".replace("-", "−")
    assert "BCa interval: bootstrap over seeds" in notes
    effect = f"{rows['no-gate']['top1_effect']:.2f}".replace("-", "−")
    assert f" {effect} |" in render([table], "markdown")
    shutil.rmtree(tmp_path / "runs" / "no-gate-1")
    assert "BCa" not in made(tmp_path, record)[2]


def test_the_sign_flip_test_decides_where_it_is_primary(tmp_path: Path) -> None:
    """Six equal differences: no t, but the smallest p that six signs can have."""
    full = (97.0, 97.5, 98.0, 96.9, 97.2, 97.8)
    scores = {"full": full, "no-gate": tuple(value - 1 for value in full)}
    _, rows, notes = made(tmp_path, fixed(study_of(tmp_path, scores), test="sign-flip"))
    assert rows["no-gate"]["top1_p"] == 2 / 2**6
    assert (rows["no-gate"]["top1_verdict"], rows["no-gate"]["top1_p_t"]) == ("worse", None)
    assert "there is no spread, and so no interval and no t-test" in notes
    few = {arm: values[:4] for arm, values in scores.items()}
    few["no-gate"] = (96.0, 96.4, 97.0, 95.8)
    _, rows, notes = made(tmp_path / "few", fixed(study_of(tmp_path / "few", few), test="sign-flip"))
    assert rows["no-gate"]["top1_verdict"] == "unresolved"
    assert "4 seeds cannot have p < 0.05 in the sign-flip test; 6 can" in notes
    wide = {"full": full, "no-gate": tuple(value + d for value, d in zip(full, (1, -1, 1, -1, 1, -1), strict=True))}
    for test, said in (("sign-flip", True), ("paired-t", False)):
        _, _, notes = made(tmp_path / test, fixed(study_of(tmp_path / test, wide), test=test))
        assert "with 80 % power" in notes
        assert ("80 % power of the t-test (sign-flip needs somewhat more)" in notes) is said


def test_two_stages_have_their_own_interval(tmp_path: Path) -> None:
    scores = {"full": (0.0,) * 5, "no-gate": (1.0, 2.0, 3.0, 4.0, 0.0)}
    record = fixed(study_of(tmp_path, scores), (0, 1, 2), until=2.0)
    _, rows, notes = made(tmp_path, record)
    row = rows["no-gate"]
    assert (row["top1_high"] - row["top1_low"]) / 2 == pytest.approx(4.302653 / math.sqrt(5), abs=1e-5)
    assert row["top1_p_sign_flip"] is None
    assert "those of the two stages" in notes
    assert "takes" not in notes.split("Primary analysis")[0]  # the interval is as narrow as it was to be
    narrow = fixed(record, (0, 1, 2), until=0.5)
    _, _, notes = made(tmp_path, narrow)  # n s^2 t^2 / 0.5^2 = 74.05, as if --max-seeds had ended it
    assert "the interval of no-gate is ±1.92 with 5 seeds; ±0.5 takes 75 (--max-seeds)" in notes


def test_means_over_unequal_seeds_are_said_not_to_subtract(tmp_path: Path) -> None:
    record = fixed(study_of(tmp_path))
    assert "common seeds" not in made(tmp_path, record)[2]
    shutil.rmtree(tmp_path / "runs" / "no-gate-1")
    _, rows, notes = made(tmp_path, record)
    assert "top-1: the mean of full is over 3 seeds, no-gate over 2: a difference is over the common seeds" in notes
    apart = rows["no-gate"]["top1"] - rows["full"]["top1"]
    assert rows["no-gate"]["top1_difference"] != pytest.approx(apart)


def test_a_first_stage_that_is_not_whole_is_said_with_the_verdict(tmp_path: Path) -> None:
    full = (0.0,) * 5
    record = fixed(study_of(tmp_path, {"full": full, "no-gate": (1.0, 1.1, 1.2, 1.1, 1.0)}), (0, 1, 2), until=2.0)
    shutil.rmtree(tmp_path / "runs" / "no-gate-1")
    _, rows, notes = made(tmp_path, record)
    caveat = "of the first 3 seeds, whose spread decided the number of the others, no-gate has 2 (missing: 1): its"
    assert notes.index(caveat) < notes.index("better than full")
    assert "the spread is that of those that count of the first 3 seeds" in notes
    shutil.rmtree(tmp_path / "runs" / "no-gate-2")
    _, rows, notes = made(tmp_path, record)
    assert rows["no-gate"]["top1_p"] is None
    assert "the first seeds of no-gate show no spread" in notes
    assert "every seed gives the same difference" not in notes


def test_seeds_that_were_added_later_are_named(tmp_path: Path) -> None:
    _, _, notes = made(tmp_path, fixed(study_of(tmp_path), (0, 1), finished=2))
    assert "Seeds added when results of the first 2 were known: 2. p is too small if" in notes
    assert "Fixed when 2 runs of the study's arms were finished already: p is too small if the analysis" in notes


def test_seeds_that_were_added_to_a_single_one_are_named(tmp_path: Path) -> None:
    record = fixed(study_of(tmp_path), (0,)).model_copy(update={"asked": [0, 1, 2, 9]})
    _, _, notes = made(tmp_path, record)
    assert "Seeds added when results of seed 0 were known: 1, 2. p is too small if" in notes
    assert "Seeds that were asked for and have no result: 9." in notes


def test_the_table_fits_80_columns_with_its_verdicts(tmp_path: Path) -> None:
    scores = {name.replace("gate", "conservation"): values for name, values in SCORES.items()}
    text = render([made(tmp_path, fixed(study_of(tmp_path, scores), margin=0.2))[0]], "rich", width=80)
    row = next(line for line in text.splitlines() if "no-conservation" in line and "worse" in line)
    assert len(row) <= 80


# --- planning ---------------------------------------------------------------------------------------------------------


def test_the_spread_comes_from_the_studys_own_pairs(tmp_path: Path) -> None:
    record = fixed(study_of(tmp_path))
    spread = planning.find_spread(
        planned(design.disable_study(["gate"])[1]), record, study_table.runs_by_name(tmp_path)
    )
    pairs = [[a - b for a, b in zip(SCORES[arm], SCORES["full"], strict=True)] for arm in ("no-gate", "no-refinement")]
    assert spread.sd == pytest.approx(math.sqrt(sum(stats.tvar(p) for p in pairs) / 2))
    assert "6 finished pairs of this study" in spread.source


def test_else_from_earlier_runs_of_like_recipe_else_a_guess(tmp_path: Path) -> None:
    plan = planned(design.disable_study(["gate"])[1])
    record = StudyRecord(name="s", title="x", arms=dict(plan.arms), tasks=["pretrain"], seeds=[0], cells=[])
    assert planning.find_spread(plan, record, {}).source.startswith("a guess")
    for seed, score in enumerate((97.0, 98.0, 99.0)):
        recipe = rcp.resolve(DIGITS, [("train.seed", seed, ""), ("optim.lr", 1e-4, "")]).recipe
        with_recipe(make_run(tmp_path, seed=seed, score=score, name=f"a{seed}"), recipe)
        info = runs.read_record(tmp_path / "runs" / f"a{seed}" / "run.json").model_copy(update={"config": "c"})
        info.recipe_digest = runs.text_digest((tmp_path / "runs" / f"a{seed}" / "recipe.yaml").read_text())
        (tmp_path / "runs" / f"a{seed}" / "run.json").write_text(runs.record_text(info))
    found = study_table.runs_by_name(tmp_path)
    spread = planning.find_spread(plan, record, found)
    assert spread.sd == pytest.approx(math.sqrt(2))  # of two independent runs
    assert "3 earlier runs of like recipe in 1 variants" in spread.source
    longer = planned(design.disable_study(["gate"])[1], base(("schedule.length", 99)))
    assert planning.find_spread(longer, record, found).source.startswith("a guess")


def test_too_few_seeds_are_said_before(tmp_path: Path) -> None:
    study = design.disable_study(["all"])[1]

    def lines(n: int, **fields: Any) -> dict[str, str]:
        plan = design.expand("mine", study.model_copy(update={"primary": Analysis(**fields)}), [base()], range(n))
        record = StudyRecord(
            name="s", title="x", arms=dict(plan.arms), tasks=["pretrain"], seeds=list(range(n)), cells=[],
            primary=Fixed(analysis=plan.analysis, seeds=plan.seeds),
        )  # fmt: skip
        return planning.power_lines(plan, record, {})

    assert lines(1)["power"].startswith("none: one seed shows no difference")
    assert lines(7, test="sign-flip")["power"].startswith(
        "none: 7 seeds cannot have p < 0.05 whatever they show; 8 can"
    )
    assert "needs 8 seeds to show anything" in lines(5)["power"]
    expected = statistics.smallest_difference(planning.GUESS, 10, 0.05 / 5)
    assert f"10 seeds show a difference of {expected:.2f} with 80 % power" in lines(10)["power"]
    assert "with this spread 8 in all, at most 20" in lines(5, until=0.5)["seeds"]  # (2.776 * 0.5 / 0.5)^2 = 7.7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"primary": {"analysis": {"metric": "mIoU"}, "seeds": [0]}},
            "its primary metric 'mIoU' is none of its tasks'",
        ),
        ({"primary": {"analysis": {"metric": "top1", "alpha": 0}, "seeds": [0]}}, "alpha"),
        ({"primary": {"analysis": {"metric": "top1"}, "seeds": "all"}}, "seeds"),
        ({"detect": -1}, "detect"),
        ({"detect": 1e400}, "not finite"),
    ],
)
def test_a_record_with_another_analysis_than_it_can_have_is_a_line(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    data = study_of(tmp_path).model_dump() | change
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "s.json").write_text(json.dumps(data).replace("Infinity", "1e400"))
    tables, (line,) = study_table.tables([tmp_path])
    assert tables == []
    assert words in line


@pytest.mark.parametrize(("sizes", "said"), [((1.5, 1.62), False), ((0.101, 11.18), True), ((), False)])
def test_arms_of_unlike_size_are_named(sizes: tuple[float, ...], said: bool) -> None:
    notes = words.unlike_sizes({f"arm {i}": {"params_m": size} for i, size in enumerate(sizes)})
    assert notes == (["The arms differ in size: arm 0 0.101 M, arm 1 11.2 M parameters."] if said else [])
