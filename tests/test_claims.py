"""Intervals and verdicts."""

import numpy as np
import pandas as pd
import pytest

from apexlib.claims import decide, interval, read_claims, summarise

LEDGER = {"up": {"statement": "It rises."}, "down": {"statement": "It falls."}}


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(2.0, 3.0, size=(4000, 3))
    covered = np.mean([low < 2.0 < high for low, high in map(interval, draws)])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_interval_and_none_or_nan_is_refused():
    assert interval([1.0]) == (-np.inf, np.inf)
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="need at least one, all finite"):
            interval(values)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 0.9], "reproduced"),
        ([-1.0, -1.1, -0.9], "not reproduced"),
        ([1.0, -1.0, 0.5], "inconclusive at this scale"),
        ([1.0, 1.1], "inconclusive at this scale"),
        ([1.0], "inconclusive at this scale"),
    ],
)
def test_the_verdict_follows_the_interval(values, verdict):
    row = decide({"up": values}, LEDGER).iloc[0]
    assert row["verdict"] == verdict
    assert row["n"] == len(values)
    assert row["mean"] == pytest.approx(np.mean(values))


def test_a_claim_that_is_not_in_the_ledger_cannot_be_decided():
    with pytest.raises(ValueError, match=r"claims \['sideways'\] are not in the ledger; known: up, down"):
        decide({"sideways": [1.0]}, LEDGER)


def test_an_incomplete_claim_is_named(tmp_path):
    (tmp_path / "claims.yaml").write_text("- {id: a, source: s, statement: t, value: v}")
    with pytest.raises(ValueError, match=r"claims.yaml, claim 1: no unit"):
        read_claims(tmp_path / "claims.yaml")


def test_summaries_are_per_group():
    table = pd.DataFrame({"m": ["a", "a", "a", "b"], "x": [1.0, 2.0, 3.0, 7.0]})
    rows = summarise(table, ["m"], "x").set_index("m")
    assert rows.loc["a", ["low", "high"]].tolist() == list(interval([1.0, 2.0, 3.0]))
    assert rows.loc["b", ["mean", "low", "high", "n"]].tolist() == [7.0, 7.0, 7.0, 1]
