"""The measures that a claim may name: functions of a run's result tables that give one value per training seed.

Each is put such that the claim holds where its value is above 0. A new one is entered in `MEASURES`, below.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from apexlib.analysis.intervals import spearman


def masking_gap(results: Path, *, component: str, fraction: float, more: str, less: str, times: float = 1) -> pd.Series:
    """Increase of loss with `fraction` of units masked in the order `more`, less `times` that in the order `less`."""
    table = read_table(results, "masking", ["component", "order", "fraction", "seed", "increase"])
    table = table[(table["component"] == component) & np.isclose(table["fraction"], fraction)]
    increase = table.groupby(["order", "seed"])["increase"].mean()  # over random draws
    increase = increase.unstack("order").reindex(columns=[more, less])
    return increase[more] - times * increase[less]


def evens_with_training(results: Path, *, component: str, share: float) -> pd.Series:
    """Coefficient of variation of the largest model after about `share` of its training, less that at the end."""
    models = _imbalance(results, component)
    return _at(models[-1], share) - _at(models[-1], 1.0) if models else pd.Series(dtype=float)


def evens_with_size(results: Path, *, component: str) -> pd.Series:
    """Coefficient of variation of the smallest model at the end of training, less that of the largest."""
    models = _imbalance(results, component)
    return _at(models[0], 1.0) - _at(models[-1], 1.0) if len(models) > 1 else pd.Series(dtype=float)


def lead(results: Path, *, table: str, of: str, over: str, column: str, margin: float = 0.0) -> pd.Series:
    """How far a run `of` one method is ahead of the run `over` another that starts from the same seed, plus `margin`.

    Less is better in a column that ends in "loss", more in any other. With a margin, seeds are left out in which both
    methods answer nothing right, or both everything: a test that is too hard or too easy does not show them as equal.
    """
    ahead, behind = (per_seed(results, table, run, column) for run in (of, over))
    ahead, behind = ahead.align(behind, join="inner")
    if len(ahead) and "tokens" in read_table(results, table, []):
        ends = [per_seed(results, table, run, "tokens")[ahead.index] for run in (of, over)]
        if (ends[0] != ends[1]).any():
            raise ValueError(f"{table}.csv: runs of {of} and {over} end after different numbers of tokens; need equal")
    if margin and column == "exact_match":
        kept = (ahead != behind) | ~ahead.isin([0.0, 1.0])
        ahead, behind = ahead[kept], behind[kept]
    sign = -1 if column.endswith("loss") else 1
    return sign * (ahead - behind) + margin


def per_seed(results: Path, table: str, of: str, column: str, *, may_be_infinite: bool = False) -> pd.Series:
    """One number per seed for a method (or variant), at its chosen learning rate and its last evaluation."""
    rows = read_table(results, table, ["seed", column])
    key = "variant" if "variant" in rows else "method"
    rows = rows[rows[key] == of]
    if "chosen" in rows:
        rows = rows[rows["chosen"].astype(bool)]
    if "tokens" in rows:
        rows = rows.sort_values("tokens").groupby("seed").tail(1)
    values = rows.set_index("seed")[column].astype(float).sort_index()
    where = f"{table}.csv, {key} {of}"
    if len(twice := values.index[values.index.duplicated()]):
        raise ValueError(f"{where}: seed {twice[0]} is there twice; need one run each")
    if values.isna().any() or (np.isinf(values).any() and not may_be_infinite):
        raise ValueError(f"{where}: need a finite {column} for every seed, got {values.to_dict()}")
    return values


def time_saved(results: Path, *, of: str, over: str, limit: float) -> pd.Series:
    """`limit` less the seconds per step of one method over those of another."""
    seconds = [per_seed(results, "instruction", name, "seconds_per_step") for name in (of, over)]
    return limit - seconds[0] / seconds[1]


def share_within(results: Path, *, method: str, expected: float, tolerance: float) -> pd.Series:
    """`tolerance` less the distance of the trainable share from what is `expected`."""
    return tolerance - (per_seed(results, "instruction", method, "trainable") - expected).abs()


def stages_flatten(results: Path) -> pd.Series:
    """Mean gain in answer loss per stage added from one to three, less the gain of a fourth."""
    one, three, four = (per_seed(results, "ablations", f"stages-{n}", "answer_loss") for n in (1, 3, 4))
    return (one - three) / 2 - (three - four)


def tokens_saved(results: Path, *, method: str, share: float) -> pd.Series:
    """1 / ratio − 1 / `share`, ratio: tokens to conventional training's final loss over its tokens; ∞ if never."""
    return 1 / per_seed(results, "continued_ratio", method, "ratio", may_be_infinite=True) - 1 / share


def rank_correlation(results: Path) -> pd.Series:
    """Spearman's correlation of change of effective rank and gain over the methods of a seed, if three or more."""
    table = read_table(results, "rank_gain", ["method", "seed", "erank_change", "answer_loss_gain"])
    runs = table[table["method"] != "base"].groupby("seed")
    values = {seed: spearman(rows["erank_change"], rows["answer_loss_gain"]) for seed, rows in runs}
    return pd.Series(values, dtype=float)


def read_table(results: Path, table: str, columns: Collection[str]) -> pd.DataFrame:
    """Read a result table that has these columns; "null" in it is a name, not a missing value."""
    rows = pd.read_csv(results / f"{table}.csv", keep_default_na=False, na_values=["", "nan"])
    if missing := [column for column in columns if column not in rows]:
        raise ValueError(f"{results / table}.csv: no column {', '.join(missing)}; it has {', '.join(rows)}")
    return rows


def _imbalance(results: Path, component: str) -> list[pd.DataFrame]:
    """Per model, from the smallest to the largest: the coefficient of variation by tokens and seed, mean over layers.

    Nothing where the size of a measured model is not known, or none was measured in training.
    """
    table = read_table(results, "imbalance", ["component", "model", "tokens", "seed", "cv"])
    table = table[table["component"] == component]
    cv = table.groupby(["model", "tokens", "seed"], as_index=False, sort=False)["cv"].mean()
    sizes = read_table(results, "models", ["model", "parameters"]).drop_duplicates("model").sort_values("parameters")
    known = cv["model"].isin(sizes["model"]).all() and cv["tokens"].max() > 0
    models = [cv[cv["model"] == name] for name in sizes["model"]] if known else []
    return [rows for rows in models if len(rows)]


def _at(rows: pd.DataFrame, share: float) -> pd.Series:
    """The coefficient of variation per seed after about `share` of a model's training."""
    near = rows["tokens"].iloc[(rows["tokens"] - share * rows["tokens"].max()).abs().argmin()]
    return rows[rows["tokens"] == near].set_index("seed")["cv"]


_OTHERS = (time_saved, share_within, stages_flatten, tokens_saved, rank_correlation)
MEASURES = {each.__name__: each for each in (masking_gap, evens_with_training, evens_with_size, lead, *_OTHERS)}
MEASURES["rise"] = per_seed  # of a column that is itself a change, which should be a rise
