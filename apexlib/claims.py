"""The ledger of claims: each with a rule written before the run, an interval over seeds, and a verdict."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

LEVEL = 0.95


def interval(values: Sequence[float], *, level: float = LEVEL) -> tuple[float, float]:
    """Student's t interval of the mean of independent values; a single value gives (−∞, ∞): it says nothing of spread.

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
    half = t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def summarise(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Mean and 95 % interval of `value` over the rows of each group: columns `by`, `mean`, `low`, `high`, `n`.

    Rows of a group must be independent: average over what is not (layers, random draws) first. A single row has no
    interval: low = high = mean, n = 1.
    """
    rows = []
    for key, group in table.groupby(by, sort=False):
        key = key if isinstance(key, tuple) else (key,)
        low, high = interval(group[value]) if len(group) > 1 else (group[value].mean(),) * 2
        rows.append(dict(zip(by, key, strict=True), mean=group[value].mean(), low=low, high=high, n=len(group)))
    return pd.DataFrame(rows)


def read_claims(path: Path) -> dict[str, dict[str, str]]:
    """Read the ledger (`data/claims.yaml`): claims by `id`, each with source, statement, value and unit."""
    import yaml

    try:
        claims = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        raise ValueError(f"{path}: need a list of claims, each a mapping")
    for row, claim in enumerate(claims, start=1):
        if missing := {"id", "source", "statement", "value", "unit"} - set(claim):
            raise ValueError(f"{path}, claim {row}: no {', '.join(sorted(missing))}")
        if not isinstance(claim["id"], str):
            raise ValueError(f"{path}, claim {row}: id {claim['id']!r}: need text")
    return {claim["id"]: claim for claim in claims}


def decide(measured: Mapping[Hashable, Sequence[float]], claims: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """Apply the ledger's rule to what was measured: one row per claim, one value per seed.

    Columns: `claim`, `statement`, `mean`, `low`, `high`, `n`, `verdict`. The rule asks whether the value is above 0:
    "reproduced" if the whole interval is, "not reproduced" if it lies below, else "inconclusive at this scale"; fewer
    than three seeds are always inconclusive.
    """
    if unknown := set(measured) - set(claims):
        raise ValueError(f"claims {sorted(unknown)} are not in the ledger; known: {', '.join(claims)}")
    rows = []
    for name, values in measured.items():
        low, high = interval(values)
        verdict = "inconclusive at this scale"
        if len(values) >= 3 and (low > 0 or high < 0):
            verdict = "reproduced" if low > 0 else "not reproduced"
        row = {"claim": name, "statement": claims[name]["statement"], "mean": float(np.mean(values))}
        rows.append(row | {"low": low, "high": high, "n": len(values), "verdict": verdict})
    return pd.DataFrame(rows)


def claims_table(results_dir: Path) -> pd.DataFrame:
    """Join the verdicts that notebooks wrote to a results folder (`claims_*.csv`), in the order of their names."""
    paths = sorted(Path(results_dir).glob("claims_*.csv"))
    if not paths:
        raise FileNotFoundError(f"{results_dir}: no claims_*.csv; need a run of the notebooks")
    return pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
