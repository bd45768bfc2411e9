"""Intervals and verdicts."""

import numpy as np
import pandas as pd
import pytest

from apexlib.claims import decide, interval, summarise


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
        ([], "not measured"),
    ],
)
def test_the_verdict_follows_the_interval(values, verdict):
    row = decide(values)
    assert row["verdict"] == verdict
    assert row["n"] == len(values)
    assert row["mean"] == pytest.approx(np.mean(values) if values else np.nan, nan_ok=True)


def test_summaries_are_per_group():
    table = pd.DataFrame({"m": ["a", "a", "a", "b"], "x": [1.0, 2.0, 3.0, 7.0]})
    rows = summarise(table, ["m"], "x").set_index("m")
    assert rows.loc["a", ["low", "high"]].tolist() == list(interval([1.0, 2.0, 3.0]))
    assert rows.loc["b", ["mean", "low", "high", "n"]].tolist() == [7.0, 7.0, 7.0, 1]
