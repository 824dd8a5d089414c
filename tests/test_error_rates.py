"""Few studies of every case of tests/simulations/error_rates.py: no test errs far more often than it says.

The committed results have 2,000 studies a case (results/simulations/). Here bounds are four binomial standard
deviations wide.
"""

from __future__ import annotations

import csv
import math

import pytest
from simulations import error_rates

STUDIES = 200
SLOW = "BCa"
EVERY = [(title, case) for title, cases in error_rates.CASES.items() for case in cases]


@pytest.mark.parametrize(("title", "case"), EVERY, ids=[f"{title}: {case.what}" for title, case in EVERY])
def test_no_test_errs_more_often_than_it_says(title: str, case: error_rates.Case) -> None:
    studies = 30 if case.what.startswith(SLOW) else STUDIES
    (rate,) = error_rates.rates(studies, [case])
    low, high = case.expected
    slack = [4 * math.sqrt(max(bound, 1) * max(100 - bound, 1) / studies) for bound in case.expected]
    assert low - slack[0] <= rate <= high + slack[1]


def test_the_bounds_can_fail() -> None:
    """What --until avoids is outside of the bounds that hold for --until, already with few studies."""
    peeking = error_rates.CASES["False positives of what --until avoids"][1]
    (rate,) = error_rates.rates(STUDIES, [peeking])
    assert rate > 6 + 4 * math.sqrt(6 * 94 / STUDIES)


def test_the_committed_results_are_of_these_cases_and_within_their_bounds() -> None:
    with (error_rates.RESULTS / "error_rates.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["table"], row["case"]) for row in rows] == [(title, case.what) for title, case in EVERY]
    for row in rows:
        assert float(row["expected_from"]) <= float(row["per_cent"]) <= float(row["expected_to"]), row["case"]
    assert {row["studies"] for row in rows} == {str(error_rates.STUDIES)}
