"""What the library measures, drawn: each function takes one of its tables, and an `ax` or none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from apexlib.analysis.intervals import summarise
from apexlib.plot.forms import around, by_method, distribution, finish, lines, loss_curve, need, places, roles, signed
from apexlib.plot.style import DOTTED, MARKERS, ORDERS, ROLES, STYLE

__all__ = ["activations", "biography", "imbalance", "masking", "movement", "spectrum", "training", "updates", "weight"]


def masking(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how the loss grows with the share of units that are masked: a `masking_curve`, or several orders of one.

    Means with 95 % intervals over `seed`s: the draws of a `masking_curve`. Other rows of a seed are averaged first.

    >>> import pandas as pd
    >>> table = pd.DataFrame({"order": "random", "share": [0.1, 0.1, 0.5, 0.5], "seed": [0, 1] * 2})
    >>> ax = masking(table.assign(increase=[0.1, 0.2, 1.0, 1.2]))
    >>> ax.get_lines()[0].get_ydata().round(2).tolist()
    [0.15, 1.1]
    """
    _one(table, "component", "model")
    means = _means(table, ["order", "share"], "increase")
    with _canvas(ax) as ax:
        lines(means, ax, by="order", x="share", looks=ORDERS, level={"y": 0, "linestyle": ":"}, ticks=5)
        labels = {"xlabel": "units masked in every layer", "ylabel": "increase of loss (nats per token)"}
        return finish(ax, table, legend="inside", percent={"x": 0}, **labels)


def activations(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how unequal the units of one component are: `activation_statistics`, sorted, over the mean of the layer."""
    _one(table, "component", "model")
    return _unit_by_unit(table, ax, "activation", "most active first", "activation")


_MEASURES = {"cv": "coefficient of variation", "cv_norm": "coefficient of variation of norms"}
_MEASURES |= {"gini": "Gini coefficient", "above_mean": "share of units above the mean"}


def imbalance(table: pd.DataFrame, ax: Axes | None = None, *, measure: str = "cv") -> Axes:
    """Draw a measure of an `imbalance_table`, layer by layer, or in training: where it has `model` and `tokens`.

    Means over layers then, with 95 % intervals over `seed`s.
    """
    in_training = "tokens" in table
    if in_training:
        _one(table, "component")
    by, x = ("model", "tokens") if in_training else ("component", "layer")
    means = _means(table, [by, x], measure)
    with _canvas(ax) as ax:
        lines(means, ax, by=by, x=x, **({"unit": 1e6} if in_training else {"ticks": 1000}))
        labels = {"xlabel": "tokens seen (millions)" if in_training else "layer"}
        return finish(ax, table, legend="inside", ylabel=_MEASURES.get(measure, measure), ylim=(0, None), **labels)


def spectrum(table: pd.DataFrame, ax: Axes | None = None, *, by: str = "role") -> Axes:
    """Draw effective rank over that of a random matrix, by layer: a `spectrum_table`, a line for each value of `by`.

    What lies outside the layers is left out. Where the table has several `seed`s, bands are 95 % intervals.
    """
    means = _means(table if _has_means(table) else _shares(table), [by, "layer"], "share")
    with _canvas(ax) as ax:
        lines(means, ax, by=by, x="layer", level={"y": 1, "linestyle": ":"}, ticks=1000)
        return finish(ax, table, legend="beside", xlabel="layer", ylabel="effective rank / random")


def updates(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw effective rank of what training changed over that of a random matrix: an `update_table`, layer by layer.

    With the columns `method` and `seed`, as when tables of several runs are put together: by method, with 95 %
    intervals over seeds. Matrices that did not move are left out.
    """
    label = r"effective rank of $\Delta W$ / random"
    moved = table[table["frobenius"] > 0] if "frobenius" in table else table
    if "method" not in table:
        ax = spectrum(moved, ax)
        ax.set_ylabel(label)
        return ax
    _one(moved, "stage")
    means = moved if _has_means(moved) else _means(_shares(moved), ["method"], "share").assign(null=1.0)
    with _canvas(ax) as ax:
        by_method(means, ax, null_name="random matrix")
        return finish(ax, table, legend="inside", xlabel="method", ylabel=label, ylim=(0, None))


def movement(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how far units moved: a `weight_difference`, sorted within each layer, as `activations` are.

    Where it has their `role` too (merged with a `biography`): the mean of each role, by `method` or, without one, by
    component.
    """
    if "role" not in table:
        _one(table, "component", "method")
        return _unit_by_unit(table, ax, "relative", "most moved first", "change of a unit")
    by = "method" if "method" in table else "component"
    need(table, by, "role", "relative")
    if by == "method":
        _one(table, "component")
    groups = list(dict.fromkeys(table[by]))
    with _canvas(ax) as ax:
        for step, (role, (name, colour)) in enumerate(ROLES.items()):
            rows = _means(table[table["role"] == role], [by], "relative").set_index(by).reindex(groups)
            at, edge = np.arange(len(groups)) + 0.2 * (step - 1.5), {"mec": "0.35", "mew": 0.4, "ecolor": "0.35"}
            look = {"fmt": MARKERS[step], "color": colour, "elinewidth": 0.7, "label": name, **edge}
            ax.errorbar(at, rows["mean"], yerr=around(rows), **look)
        places(groups, ax)
        ax.grid(visible=False, axis="x")
        return finish(ax, table, legend="below", percent={"y": 1}, xlabel=by, ylabel="change of a unit / its norm")


def biography(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the role of every unit, stage by stage: a `biography`, its units sorted by their roles."""
    need(table, "layer", "component", "unit", "stage", "role")
    lives = table.pivot(index=["layer", "component", "unit"], columns="stage", values="role").map([*ROLES].index)
    with _canvas(ax) as ax:
        roles(lives.sort_values([*lives]), ax)
        for edge in range(1, lives.shape[1]):
            ax.axvline(edge - 0.5, color="white", linewidth=2)
        ax.set_xticks(range(lives.shape[1]), lives.columns)
        for name, colour in ROLES.values():
            ax.bar(0, 0, color=colour, label=name)
        return finish(ax, table, legend="below", xlabel="stage", ylabel="units, sorted by role")


def weight(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw a weight or an update as an image: `value`, a row per `unit`, a `column` each, sorted by the unit's `role`.

    The left edge marks the roles.
    """
    need(table, "unit", "column", "value", "role")
    own = table.drop_duplicates("unit").set_index("unit")["role"].sort_index()
    own = own.sort_values(key=lambda role: role.map([*ROLES].index), kind="stable")
    matrix = table.pivot(index="unit", columns="column", values="value").loc[own.index].to_numpy()
    with _canvas(ax) as ax:
        ax.figure.colorbar(signed(matrix, ax), ax=ax, shrink=0.8, pad=0.02).ax.tick_params(labelsize=6)
        rows, strip = np.arange(len(own)), -0.06 * matrix.shape[1]
        for role, (name, colour) in ROLES.items():
            ax.barh(rows[own == role], width=strip, height=1.0, left=-0.5, color=colour, linewidth=0, label=name)
        ax.set(xlim=(strip - 0.5, matrix.shape[1] - 0.5), ylim=(len(matrix) - 0.5, -0.5))
        return finish(ax, table, legend="below", xlabel="input dimension", ylabel="unit, sorted by role")


def training(log: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the loss of a run, step by step: the `log` of a `TrainingRecord`; dotted lines: where a stage begins.

    With a column `method`, as when logs of several runs are put together, a line for each; bands: range over `seed`s.
    """
    need(log, "stage", "step", "loss")
    named = log.assign(model=log.get("method", "loss"))
    splits = {"loss": "train", "eval_loss": "valid"}
    parts = [named.assign(split=split, loss=log[name]) for name, split in splits.items() if name in log]
    with _canvas(ax) as ax:
        loss_curve(pd.concat(parts).dropna(subset="loss"), ax, x="step", unit=1)
        for step in log.groupby("stage")["step"].min().iloc[1:]:
            ax.axvline(step, **DOTTED)
        return finish(ax, log, legend="inside", xlabel="optimizer steps", ylabel="loss (nats per token)")


def _unit_by_unit(table: pd.DataFrame, ax: Axes | None, value: str, order: str, what: str) -> Axes:
    need(table, "layer", value)
    with _canvas(ax) as ax:
        distribution(table, ax, value)
        labels = {"xlabel": f"units of a layer, {order}", "ylabel": f"{what} / mean of layer"}
        return finish(ax, table, percent={"x": 0}, **labels)


@contextmanager
def _canvas(ax: Axes | None) -> Iterator[Axes]:
    """Hand on `ax`, or that of a new figure, which then has the project's style; no other figure has it."""
    if ax is None:
        with plt.style.context(STYLE):
            yield plt.subplots(figsize=(4.4, 2.9))[1]
    else:
        yield ax


def _means(table: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Return means with intervals as they stand in the table, or make them, over means of each `seed`."""
    if _has_means(table):
        need(table, *by)
        return table
    need(table, *by, value)
    keys = [*by, "seed"] if "seed" in table else list(by)
    return summarise(table.groupby(keys, sort=False, as_index=False)[value].mean(), list(by), value)


def _has_means(table: pd.DataFrame) -> bool:
    """Whether a table says means with intervals, not only in other panels of its figure."""
    return {"mean", "low", "high"} <= set(table.dropna(axis="columns", how="all"))


def _shares(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the matrices inside layers, with their `share`: effective rank over that of a random matrix."""
    need(table, "layer", *(("share",) if "share" in table else ("effective_rank", "random")))
    inside = table[table["layer"] >= 0]
    return inside if "share" in inside else inside.assign(share=inside["effective_rank"] / inside["random"])


def _one(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table that mixes what must not be averaged."""
    for name in columns:
        if name in table and table[name].nunique() > 1:
            values = table[name].unique().tolist()
            raise ValueError(f"the table has {name} {', '.join(map(str, values))}: need one, such as {values[0]!r}")
