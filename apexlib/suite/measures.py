"""The measures that a claim may name: functions of a run's result tables that give one value per training seed.

Each is put such that a larger value speaks for the claim. A new one is entered in `MEASURES`, below.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from apexlib.analysis.intervals import spearman


def masking_gap(results: Path, *, component: str, fraction: float, more: str, less: str) -> pd.Series:
    """Increase of loss with `fraction` of units masked in the order `more`, less that in the order `less`."""
    table = read_table(results, "masking", ["component", "order", "fraction", "seed", "increase"])
    table = table[(table["component"] == component) & np.isclose(table["fraction"], fraction)]
    increase = table.pivot_table(index="seed", columns="order", values="increase")  # mean over random draws
    increase = increase.reindex(columns=[more, less])
    return increase[more] - increase[less]


def evens_with_training(results: Path, *, component: str) -> pd.Series:
    """Spearman's correlation of tokens and evenness (−CV) over all checkpoints of the largest model."""
    models = _imbalance(results, component)
    runs = models[-1].groupby("seed") if models else ()
    return pd.Series({seed: spearman(rows["tokens"], -rows["cv"]) for seed, rows in runs}, dtype=float)


def evens_with_size(results: Path, *, component: str) -> pd.Series:
    """Coefficient of variation of the smallest model at the end of training, less that of the largest."""
    ends = [rows[rows["tokens"] == rows["tokens"].max()] for rows in _imbalance(results, component)]
    spread = [rows.set_index("seed")["cv"] for rows in ends]
    return spread[0] - spread[-1] if len(spread) > 1 else pd.Series(dtype=float)


def lead(results: Path, *, table: str, of: str, over: str, column: str, on_fewer_tokens: bool = False) -> pd.Series:
    """How far a run `of` one method is ahead of the run `over` another that starts from the same seed.

    Less is better in a column that ends in "loss", more in any other. Seeds are left out in which both methods answer
    nothing right, or both everything: a test that is too hard or too easy does not show them as equal. Both runs end
    after as many tokens, unless the first is to be compared `on_fewer_tokens`.
    """
    ahead, behind = (per_seed(results, table, run, column) for run in (of, over))
    ahead, behind = ahead.align(behind, join="inner")
    if len(ahead) and "tokens" in read_table(results, table, []):
        ends = [per_seed(results, table, run, "tokens")[ahead.index] for run in (of, over)]
        if (ends[0] >= ends[1]).any() if on_fewer_tokens else (ends[0] != ends[1]).any():
            first, second = (sorted({*each.astype(int)}) for each in ends)
            need = "fewer of the first" if on_fewer_tokens else "equal numbers"
            raise ValueError(f"{table}.csv: runs of {of} and {over} end after {first} and {second} tokens: need {need}")
    if column == "exact_match":
        kept = (ahead != behind) | ~ahead.isin([0.0, 1.0])
        ahead, behind = ahead[kept], behind[kept]
    return _better(column) * (ahead - behind)


def matched(results: Path, *, table: str, of: str, over: str, column: str, along: str) -> pd.Series:
    """How far `of` is ahead of `over` in `column` where both have come equally far `along` another column.

    A method's runs at all its learning rates, and the base model as the rate 0, are points of one curve per seed,
    linear between them, up to the point that has come furthest from the base for the better; two curves are compared
    at the end of the shorter one.
    """
    rows = read_table(results, table, ["method", "seed", "learning_rate", column, along])
    if "tokens" in rows:  # the ends of curves
        rows = rows.sort_values("tokens").groupby(["method", "seed", "learning_rate"]).tail(1)
    values = {}
    for seed, runs in rows.dropna(subset=[column]).groupby("seed"):
        curves = [_front(runs, method, column, along) for method in (of, over)]
        if all(len(curve) > 1 for curve in curves):
            reached = min(curve.index[-1] for curve in curves)
            ahead, behind = (np.interp(reached, curve.index, curve) for curve in curves)
            values[seed] = _better(column) * (ahead - behind)
    return pd.Series(values, dtype=float)


def _front(runs: pd.DataFrame, method: str, column: str, along: str) -> pd.Series:
    """What `column` is at each distance from the base, for the better, as far as runs at higher rates came further."""
    base = runs[runs["method"] == "base"]
    points = pd.concat([base, runs[runs["method"] == method]]).sort_values("learning_rate")
    distance = _better(along) * (points[along] - base[along].iloc[0]) if len(base) else pd.Series(dtype=float)
    further = distance > distance.cummax().shift(fill_value=-1)
    return points.loc[distance.index[further], column].set_axis(distance[further])


def _better(column: str) -> int:
    return -1 if column.endswith("loss") else 1


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


def step_time(results: Path, *, of: str, over: str) -> pd.Series:
    """Share of the time of a step that one method saves over another, for each model of the benchmark (no seeds)."""
    columns = ["case", "kind", "method", "ratio", "checkpointing", "compiled"]
    steps = read_table(results.parent / "bench", "steps", columns)
    usual = steps[(steps["kind"] == "model") & ~steps["checkpointing"] & ~steps["compiled"]]
    ratio = usual.pivot(index="case", columns="method", values="ratio").reindex(columns=[of, over])
    return 1 - ratio[of] / ratio[over]


def share_off(results: Path, *, method: str, expected: float) -> pd.Series:
    """Distance of the trainable share from what is `expected`, negative."""
    return -(per_seed(results, "instruction", method, "trainable") - expected).abs()


def stages_flatten(results: Path, *, of: Sequence[str]) -> pd.Series:
    """Mean gain in answer loss per stage added from one to three, less the gain of a fourth: `of` variants of those."""
    one, three, four = (per_seed(results, "ablations", variant, "answer_loss") for variant in of)
    return (one - three) / 2 - (three - four)


def tokens_saved(results: Path, *, method: str) -> pd.Series:
    """Share of conventional training's tokens that its final loss does not need; −∞ if the run never gets there."""
    return 1 - per_seed(results, "continued_ratio", method, "ratio", may_be_infinite=True)


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
    sizes = read_table(results, "models", ["model", "parameters"]).drop_duplicates("model").set_index("model")
    cv["parameters"] = cv["model"].map(sizes["parameters"])
    known = cv["parameters"].notna().all() and cv["tokens"].max() > 0
    return [rows for _, rows in cv.groupby(["parameters", "model"])] if known else []


_OTHERS = (matched, step_time, share_off, stages_flatten, tokens_saved, rank_correlation)
MEASURES = {each.__name__: each for each in (masking_gap, evens_with_training, evens_with_size, lead, *_OTHERS)}
MEASURES["rise"] = per_seed  # of a column that is itself a change, which should be a rise
