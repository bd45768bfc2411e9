"""Means with intervals, differences example by example, and rank correlation."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of independent values; (−∞, ∞) of one, which says nothing of spread.

    >>> low, high = interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values {values.tolist()}: need at least one, all finite")
    if len(values) == 1:
        return -np.inf, np.inf
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def summarise(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Mean and 95 % interval of `value` over the rows of each group: columns `by`, `mean`, `low`, `high`, `n`.

    Rows of a group must be independent: average over what is not (layers, random draws) first. A single row has no
    interval: low = high = mean, n = 1.
    """
    rows = []
    for key, group in table.groupby(by, sort=False):
        low, high = interval(group[value]) if len(group) > 1 else (group[value].mean(),) * 2
        rows.append(dict(zip(by, key, strict=True), mean=group[value].mean(), low=low, high=high, n=len(group)))
    return pd.DataFrame(rows)


def spearman(x: pd.Series, y: pd.Series) -> float:
    """Correlate ranks, ties at their mean rank (Spearman); NaN of fewer than three pairs or of a constant.

    >>> float(spearman(pd.Series([1, 2, 3]), pd.Series([1, 9, 4])))
    0.5
    """
    if len(x) < 3 or min(x.nunique(), y.nunique()) < 2:
        return np.nan
    return x.corr(y, method="spearman")


def paired_over_examples(correct: pd.DataFrame, *, of: str) -> pd.DataFrame:
    """Compare the share of right answers of one method with every other's, example by example.

    `correct` has a row per `method`, `seed` and `example`, with `correct` 0 or 1. The interval is Student's t over
    examples of the difference (mean over seeds): it says what another draw of test examples could change, where that
    over seeds says what other models and orders could. Columns: `method`, `difference`, `low`, `high`, `examples`.
    """
    share = correct.pivot_table(index="example", columns="method", values="correct")
    rows = []
    for method in share.columns.drop(of):
        difference = (share[of] - share[method]).dropna()
        rows.append((method, difference.mean(), *interval(difference), len(difference)))
    return pd.DataFrame(rows, columns=["method", "difference", "low", "high", "examples"])
