"""What a figure shows, in a sentence made from the numbers of its table."""

import numpy as np
import pandas as pd

from apexlib.analysis.intervals import spearman, summarise
from apexlib.plot.style import ROLES

_list = ", ".join


def sentence(name: str, table: pd.DataFrame) -> str:
    """Say what the figure of that name shows of its `table`; "" where the table is not the one of the notebooks.

    >>> table = pd.DataFrame({"method": ["full", "apex"], "mean": [0.1, 0.2], "null": 1.0})
    >>> sentence("update_rank", table)
    'Over a random matrix: from 0.1 (full) to 0.2 (apex).'
    """
    try:
        return SENTENCES[name](table)
    except KeyError:  # a column: plots also take tables as they were measured
        return ""


def loss_curve(table: pd.DataFrame) -> str:
    said = _from_to(table[table["split"] == "valid"], ["model"], "loss")
    return f"Held-out loss in nats per token, {said}."


def activation_distribution(table: pd.DataFrame) -> str:
    layers = table.groupby(["component", "layer"], sort=False)["activation"]
    shares = layers.agg(lambda a: a.nlargest(max(1, len(a) // 10)).sum() / a.sum()).groupby("component", sort=False)
    held = " and ".join(f"{share:.0%} of the activation of {component}s" for component, share in shares.mean().items())
    return f"The most active tenth of a layer's units, at least one, has {held} (means over layers)."


def masking_curve(table: pd.DataFrame) -> str:
    said = []
    for component, rows in table[table["share"] > 0.09].groupby("component", sort=False):
        first = rows[rows["share"] == rows["share"].min()]
        first = first.set_index(first["order"].fillna("paired"))
        cost, more = (_measured(first.loc[order]) for order in ("advantageous", "paired"))
        most = f"the most active {first['share'].iloc[0]:.0%} of {component}s"
        said.append(f"{most} costs {cost}, {more} more than the least active")
    return f"In nats per token, silencing {'; '.join(said)}."


def imbalance(table: pd.DataFrame) -> str:
    return f"Coefficient of variation, {_from_to(table, ['model', 'component'], 'mean')}."


def expansion(table: pd.DataFrame) -> str:
    size = table.assign(value=table["value"] ** 2).groupby(["panel", "role"])["value"].sum() ** 0.5
    moved = size["change"] / size["before"]
    return f"Change of the rows over their norm: {_list(f'{ROLES[role][0]} {moved[role]:.1%}' for role in ROLES)}."


def rates(table: pd.DataFrame) -> str:
    chosen, ends = table[table["chosen"]], (table["learning_rate"].min(), table["learning_rate"].max())
    rates = [f"{rate:g} for {_list(rows['method'])}" for rate, rows in chosen.groupby("learning_rate")]
    at_end = chosen.loc[chosen["learning_rate"].isin(ends), "method"]
    return f"Chosen: {'; '.join(rates)}; at an end of the grid: {_list(at_end) or 'none'}."


def instruction(table: pd.DataFrame) -> str:
    said = []
    for panel, rows in table.dropna(subset="low").groupby("panel", sort=False):
        first = rows.iloc[0]
        said.append(f"{panel.strip('←→ ')}: {first['method']} {_measured(first, '.3f')}, {_range(rows, '.3f')}")
    return f"Of {_seeds(table)}, {'; '.join(said)}."


def by_share(table: pd.DataFrame) -> str:
    panel = table["panel"].iloc[0]
    least = table[table["panel"] == panel].sort_values("trainable").groupby("method", sort=False).head(1)
    said = _list(f"{row['method']} {_measured(row)} ({row['trainable']:.1%} train)" for _, row in least.iterrows())
    return f"At the smallest share of each, {panel.partition(',')[0]}: {said} nats per token."


def trade_off(table: pd.DataFrame) -> str:
    chosen = table[table["chosen"] == True].drop_duplicates("method").set_index("method")  # noqa: E712, levels have none
    learns, forgets = chosen["valid_loss"].idxmin(), chosen["retention_loss"].idxmin()
    untouched = table.set_index("method")["retention_loss"]["untouched"]
    return (
        f"At the chosen rates {learns} learns most (validation loss {chosen['valid_loss'].min():.3f}) and {forgets} "
        f"forgets least (retention loss {chosen['retention_loss'].min():.3f}; the untouched model: {untouched:.3f})."
    )


def continued(table: pd.DataFrame) -> str:
    panel = table["panel"].iloc[-1]
    end = table[(table["panel"] == panel) & (table["tokens"] == table["tokens"].max())]
    others = end[end[["mean", "low", "high"]].any(axis=1)]  # than the one that they are compared with
    said = _list(f"{row['method']} {_measured(row)}" for _, row in others.iterrows())
    return f"After {end['tokens'].max() / 1e6:.2g} million tokens, {panel}: {said} nats per token."


def constructed_ranks(table: pd.DataFrame) -> str:
    last = table[table["strength"] == table["strength"].max()]
    return f"At a size of {last['strength'].max():g}, {_range(last, '+.1%', by='case')}."


def effective_rank(table: pd.DataFrame) -> str:
    before = table.dropna(subset="share").groupby("role", as_index=False)["share"].mean()
    tuned = table.dropna(subset="mean")
    chance = f"moved as far by chance, {tuned['null'].min():+.3%} to {tuned['null'].max():+.3%}"
    over = _range(before, ".2f", by="role", value="share")
    return f"Before, over a random matrix and means over layers: {over}; the change: {_range(tuned, '+.3%')}; {chance}."


def update_rank(table: pd.DataFrame) -> str:
    return f"Over a random matrix: {_range(table, '.2g')}."


def rank_gain(table: pd.DataFrame) -> str:
    by_seed = [spearman(rows["erank_change"], rows["answer_loss_gain"]) for _, rows in table.groupby("seed")]
    known = pd.DataFrame({"of": "all", "correlation": by_seed}).dropna()
    said = [_measured(row) for _, row in summarise(known, ["of"], "correlation").iterrows()]
    return f"Spearman's correlation over methods, within a seed: {_list(said) or 'unknown'}, {_seeds(table)}."


def movement_by_role(table: pd.DataFrame) -> str:
    of_runs, lives = table.dropna(subset="relative"), table.dropna(subset="stage")
    method = of_runs["method"].iloc[0]
    moved = of_runs[of_runs["method"] == method].groupby("role", sort=False)["relative"].mean()
    roles = lives.pivot(index=["layer", "unit"], columns="stage", values="role")
    later = (roles[roles[roles.columns[0]] == "frozen"] != "frozen").any(axis=1).mean()
    said = _list(f"{ROLES[role][0]} {moved[role]:.1%}" for role in ROLES if role in moved)
    return f"Movement under {method}: {said}; {later:.0%} of the units frozen at first were trained in a later stage."


def ablations(table: pd.DataFrame) -> str:
    said = []
    for panel, rows in table.groupby("panel", sort=False):
        clear = rows[((rows["low"] > 0) | (rows["high"] < 0)) & (rows["n"] > 1)]
        named = _list(f"{row['method']} {row['mean']:+.2g}" for _, row in clear.iterrows())
        said.append(f"{panel.partition(',')[0]}: {named or 'none'}")
    return f"Clear of APEX unchanged, by their interval over {table['n'].max():g} seeds: {'; '.join(said)}."


def decomposition(table: pd.DataFrame) -> str:
    panel = table["panel"].iloc[0]
    said = []
    for setting, rows in table[table["panel"] == panel].groupby("setting", sort=False):
        steps = _list(f"{row['method']} {_measured(row)}" for _, row in rows.iterrows())
        said.append(f"{setting}: {steps}")
    return f"Change of the {panel.partition(',')[0]}, {'; '.join(said)}."


SENTENCES = {
    each.__name__: each
    for each in (
        loss_curve, activation_distribution, masking_curve, imbalance, expansion, instruction, by_share,
        trade_off, continued, constructed_ranks, effective_rank, update_rank, rank_gain, movement_by_role, ablations,
        decomposition,
    )
} | {"learning_rates": rates, "continued_rates": rates, "continued_lengths": continued}  # fmt: skip


def _measured(row: pd.Series, digits: str = "+.3g") -> str:
    """A mean and its interval, if there is one."""
    if not row["high"] > row["low"]:
        return f"{row['mean']:{digits}}"
    return f"{row['mean']:{digits}} [{row['low']:{digits}}, {row['high']:{digits}}]"


def _range(table: pd.DataFrame, digits: str, *, by: str = "method", value: str = "mean") -> str:
    low, high = (table.loc[place] for place in (table[value].idxmin(), table[value].idxmax()))
    return f"from {low[value]:{digits}} ({low[by]}) to {high[value]:{digits}} ({high[by]})"


def _from_to(table: pd.DataFrame, by: list[str], value: str) -> str:
    """How `value` goes from the first to the last number of tokens, for each group."""
    first, last = table["tokens"].min(), table["tokens"].max()
    means = table.groupby([*by, "tokens"], sort=False)[value].mean().unstack("tokens")
    names = [" ".join(np.atleast_1d(name)) for name in means.index]
    said = [f"{name} {a:.2f} to {b:.2f}" for name, a, b in zip(names, means[first], means[last], strict=True)]
    return f"from {first / 1e6:g} to {last / 1e6:.2g} million tokens: {_list(said)}"


def _seeds(table: pd.DataFrame) -> str:
    return f"{table['seed'].nunique()} seeds"
