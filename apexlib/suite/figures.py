"""The figures of the suite: a `plot_*` function for each kind of tidy table, and in `FIGURES` what is drawn with it.

`draw_figure` writes the table of a figure and draws it, `redraw_figure` draws it again from that file alone. No torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from apexlib.suite.style import DOTTED, LEVEL, PALETTE, around, band, finish, groups, new_figure, save_figure, write_csv

ORDERS = {  # order of masking: its name in a legend, colour, marker
    "advantageous": ("most active first", PALETTE[3], "o"),
    "random": ("at random", PALETTE[7], "s"),
    "disadvantageous": ("least active first", PALETTE[0], "^"),
}
SLANTED = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}  # names below an axis
DOTS = {"linestyle": "none", "mec": "white", "mew": 0.4}  # markers that may lie on one another
ROLES = {  # role of a unit in a plan: its name in a legend, colour
    "source": ("advantageous", PALETTE[3]),
    "target": ("disadvantageous", PALETTE[0]),
    "direct": ("directly tuned", PALETTE[2]),
    "frozen": ("frozen", "0.85"),
}


def plot_loss_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw training loss against tokens, one line per model (mean over seeds, band: their range).

    Columns: `model`, `seed`, `tokens`, `loss` and `split` ("train": lines, "valid": markers, "reference": a level to
    compare with, named by its `model`).
    """
    measured = table[table["split"] != "reference"]
    for model, rows, look in groups(measured, "model"):
        train = rows[rows["split"] == "train"].groupby("tokens")["loss"].agg(mean="mean", low="min", high="max")
        band(ax, train.index / 1e6, train, color=look["color"], label=f"{model}, training")
        valid = rows[rows["split"] == "valid"].groupby("tokens")["loss"].mean()
        ax.plot(valid.index / 1e6, valid, **look, **DOTS, ms=5, label=f"{model}, held out")
    for name, loss in table.loc[table["split"] == "reference", ["model", "loss"]].itertuples(index=False):
        ax.axhline(loss, **DOTTED)
        ax.annotate(name, (0.99, loss), (0, 2), ("axes fraction", "data"), "offset points", ha="right")
    return finish(ax, table, legend="inside", xlabel="tokens seen (millions)", ylabel="loss (nats per token)")


def plot_activation_distribution(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw every unit's activation over its layer's mean, sorted, one line per layer.

    Columns: `layer`, `unit`, `activation`. Units without any activation are drawn at the lower edge.
    """
    colours = mpl.colormaps["viridis"](np.linspace(0, 1, table["layer"].nunique() + 2)[1:-1])
    for colour, (layer, rows) in zip(colours, table.groupby("layer"), strict=True):
        values = rows["activation"].sort_values(ascending=False).to_numpy()
        share = (np.arange(len(values)) + 0.5) / len(values)
        marker = "o" if len(values) <= 32 else None
        ax.plot(share, np.maximum(values / values.mean(), 1e-4), color=colour, marker=marker, label=f"layer {layer}")
    ax.axhline(1, **DOTTED)
    low, high = ax.dataLim.intervaly
    ax.set(yscale="log" if high > 20 * low else "linear", xlim=(0, 1))
    ax.set(xlabel="units of a layer, most active first", ylabel="activation / mean of layer")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(ncols=2 if len(colours) > 4 else 1)
    return finish(ax, table)


def plot_masking_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the increase of the loss against the share of masked units, one line per order with its interval.

    Columns: `order`, `fraction`, `mean`, `low`, `high` (nats per token).
    """
    for order, (name, colour, marker) in ORDERS.items():
        rows = table[table["order"] == order].sort_values("fraction")
        band(ax, rows["fraction"], rows, color=colour, marker=marker, label=name)
    ax.axhline(0, **DOTTED)
    ax.set(xlabel="units masked in every layer", ylabel="increase of loss (nats per token)")
    if table["fraction"].nunique() <= 5:
        ax.set_xticks(sorted(table["fraction"].unique()))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return finish(ax, table, legend="inside")


def plot_imbalance(table: pd.DataFrame, ax: Axes, *, label: str = "coefficient of variation") -> Axes:
    """Draw a measure of imbalance against tokens seen, one line per model with its interval.

    Columns: `model`, `tokens`, `mean`, `low`, `high`. The untrained model (0 tokens) is drawn at the left edge.
    """
    first = table.loc[table["tokens"] > 0, "tokens"].min()
    for model, rows, look in groups(table, "model", sort_by="tokens"):
        x = rows["tokens"].where(rows["tokens"] > 0, first / 2) / 1e6
        band(ax, x, rows, **look, label=model)
    ax.set(xscale="log", xlabel="tokens seen (millions)", ylabel=label, ylim=(0, None))
    if (tokens := table["tokens"].drop_duplicates().sort_values()).size <= 8:
        ax.set_xticks(tokens.where(tokens > 0, first / 2) / 1e6, [f"{count / 1e6:.2g}" for count in tokens])
        ax.minorticks_off()
    return finish(ax, table, legend="inside")


def plot_weight(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a weight as an image, one row per unit, with each unit's role marked at the left edge.

    Columns: `unit`, `column`, `value`, `role` ("source", "target", "direct" or "frozen"). Colours are symmetric
    around zero and end at the 99.5th percentile of the magnitude.
    """
    matrix = table.pivot(index="unit", columns="column", values="value").to_numpy()
    limit = np.quantile(np.abs(matrix), 0.995)
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02).ax.tick_params(labelsize=6)
    roles = table.drop_duplicates("unit").set_index("unit")["role"].sort_index()
    strip = -0.06 * matrix.shape[1]
    for role, (name, colour) in ROLES.items():
        ax.barh(roles.index[roles == role], width=strip, height=1.0, left=-0.5, color=colour, linewidth=0, label=name)
    ax.set(xlim=(strip - 0.5, matrix.shape[1] - 0.5), ylim=(len(matrix) - 0.5, -0.5))
    ax.grid(visible=False)
    return finish(ax, table, legend="below", xlabel="input dimension", ylabel="channel, in the model's order")


def plot_rates(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the validation loss of each method against the learning rate, the chosen one filled.

    Columns: `method`, `learning_rate`, `loss` (mean over the seeds of the grid, nats per token), `chosen`.
    """
    for method, rows, look in groups(table, "method", sort_by="learning_rate"):
        ax.plot(rows["learning_rate"], rows["loss"], **look, mfc="white", label=method)
        best = rows[rows["chosen"].astype(bool)]
        ax.plot(best["learning_rate"], best["loss"], **look, linestyle="none")
    rates = sorted(table["learning_rate"].unique())
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    return finish(ax, table, legend="beside")


def plot_trade_off(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw what was learnt against what was forgotten, a line per method along its learning rates; chosen ones filled.

    Columns: `method`, `learning_rate`, `answer_loss`, `retention_loss`, `chosen`. The lowest rate is marked by size.
    """
    for method, rows, look in groups(table, "method", sort_by="learning_rate"):
        points, chosen = rows[["retention_loss", "answer_loss"]].to_numpy().T, rows["chosen"].to_numpy().astype(bool)
        ax.plot(*points, **look, linewidth=0.9, label=method, mfc="white")
        ax.plot(*points[:, :1], **look, mfc="white", ms=7, linestyle="none")
        ax.plot(*points[:, chosen], **look, ms=7 if chosen[0] else None, linestyle="none")
    ax.set(xlabel="retention loss (nats per token): forgotten", ylabel="answer loss\n(nats per token)")
    return finish(ax, table, legend="beside")


def plot_constructed_ranks(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the relative change of effective rank against the strength of an expansion, one line per kind of matrix.

    Columns: `case`, `strength`, `mean`, `low`, `high`, and `by_chance`, the mean for random rows as large (dotted).
    """
    for case, rows, look in groups(table, "case"):
        band(ax, rows["strength"], rows, **look, label=case)
        ax.plot(rows["strength"], rows["by_chance"], color=look["color"], linestyle=":", linewidth=1)
    ax.axhline(0, **LEVEL)
    ax.plot([], [], color="0.4", linestyle=":", linewidth=1, label="random rows as large")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="size of $M P$ relative to $P$", ylabel="change of effective rank")
    return finish(ax, table, legend="beside")


def plot_comparison(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw one point with its interval per method, in order from above; a line through the first for comparison.

    Columns: `method`, `mean`, `low`, `high`. The title of the panel says what is compared.
    """
    rows, colours = range(len(table)), [PALETTE[3], *[PALETTE[0]] * (len(table) - 1)]
    ax.axvline(table["mean"].iloc[0], **DOTTED)
    ax.errorbar(table["mean"], rows, xerr=around(table), fmt="none", ecolor="0.55", capsize=2, linewidth=1)
    ax.scatter(table["mean"], rows, color=colours, s=18, zorder=3)
    ax.set(ylim=(len(table) - 0.5, -0.5), yticks=rows, yticklabels=table["method"])
    ax.grid(axis="y", visible=False)
    return finish(ax, table)


def plot_token_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the held-out loss against tokens trained on, one line per method with its interval over seeds.

    Columns: `method`, `tokens`, `mean`, `low`, `high` (nats per token).
    """
    for method, rows, look in groups(table, "method", sort_by="tokens"):
        band(ax, rows["tokens"] / 1e6, rows, alpha=0.15, **look, label=method)
    return finish(ax, table, legend="inside", xlabel="tokens trained on (millions)", ylabel="loss (nats per token)")


def plot_by_method(
    table: pd.DataFrame, ax: Axes, *, label: str, null: str, percent: bool = False, from_zero: bool = False
) -> Axes:
    """Draw one value per method with its interval, beside what a null model gives.

    Columns: `method`, `mean`, `low`, `high`, `null` (all in the units of `label`; `null` names the null in the legend).
    Methods come in the order of the table.
    """
    x = range(len(table))
    ax.errorbar(x, table["mean"], yerr=around(table), fmt="o", color=PALETTE[0], capsize=2, label="measured")
    ax.plot(x, table["null"], "_", color=PALETTE[3], ms=11, mew=1.6, label=null)
    ax.axhline(0, **LEVEL)
    ax.set_xticks(x, table["method"], **SLANTED)
    ax.set(xlabel="method", ylabel=label, xlim=(-0.6, len(table) - 0.4))
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.margins(y=0.4)
    if from_zero:
        ax.set_ylim(bottom=0)
    return finish(ax, table, legend="inside")


def plot_rank_by_layer(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw effective rank over that of a random matrix of the shape against the layer, one line per kind of matrix.

    Columns: `layer`, `role`, `share`.
    """
    for role, rows, look in groups(table, "role"):
        mean = rows.groupby("layer")["share"].mean()
        ax.plot(mean.index, mean, **look, label=role)
    ax.axhline(1, **DOTTED)
    ax.set_xticks(sorted(table["layer"].unique()))
    return finish(ax, table, legend="beside", xlabel="layer", ylabel="effective rank / random")


def plot_rank_gain(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the gain of a run against its change of effective rank, one marker per run, one colour per method.

    Columns: `method`, `erank_change` (relative), `answer_loss_gain` (nats per token).
    """
    for method, rows, look in groups(table, "method"):
        ax.plot(rows["erank_change"], rows["answer_loss_gain"], **look, **DOTS, ms=6)
        ax.plot([], [], **look, linestyle="none", ms=4, label=method)
    ax.axvline(0, **LEVEL)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set(xlabel="change of effective rank", ylabel="gain in answer loss\n(nats per token)")
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    return finish(ax, table, legend="beside")


def plot_movement_by_role(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw how far units moved, by their role in the plan and by method.

    Columns: `method`, `role`, `relative` (‖ΔW‖ / ‖W‖ of a unit, averaged).
    """
    methods = list(dict.fromkeys(table["method"]))
    width = 0.8 / len(ROLES)
    for step, (role, (name, colour)) in enumerate(ROLES.items()):
        rows = table[table["role"] == role].groupby("method")["relative"].mean().reindex(methods)
        ax.bar(np.arange(len(methods)) + (step - 1.5) * width, rows, width, color=colour, label=name)
    ax.set_xticks(range(len(methods)), methods, **SLANTED)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    ax.grid(visible=False, axis="x")
    return finish(ax, table, legend="below", xlabel="method", ylabel="change of a unit / its norm")


def plot_biography(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the role of every unit in every stage, units sorted by their roles, a column per stage.

    Columns: `layer`, `component`, `unit`, `stage`, `role`.
    """
    names = list(ROLES)
    roles = table.pivot(index=["layer", "component", "unit"], columns="stage", values="role")
    codes = roles.map(names.index).sort_values(list(roles.columns)).to_numpy()
    colours = mpl.colors.ListedColormap([colour for _, colour in ROLES.values()])
    ax.imshow(codes, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", interpolation="nearest")
    for edge in range(1, codes.shape[1]):
        ax.axvline(edge - 0.5, color="white", linewidth=2)
    ax.set_xticks(range(codes.shape[1]), roles.columns)
    ax.grid(visible=False)
    for name, colour in ROLES.values():
        ax.bar(0, 0, color=colour, label=name)
    return finish(ax, table, legend="below", xlabel="stage", ylabel="units, sorted by role")


@dataclass(frozen=True)
class Figure:
    """How a figure of the suite is drawn from its table, and what it shows, in a sentence."""

    plot: Callable[..., Axes] | tuple[Callable[..., Axes], ...]  # one for all panels, or one for each
    caption: str
    width: float | None = None  # inches, as `height`; None: that of a paper's column, or of two with more panels
    height: float = 2.3


FIGURES = {  # in the order of the notebooks
    "loss_curve": Figure(
        plot_loss_curve,
        "Loss of the base models in training (lines) and on held-out text (markers); bands: range over seeds.",
    ),
    "activation_distribution": Figure(
        plot_activation_distribution, "Activation of every unit over its layer's mean: a few are far more active."
    ),
    "masking_curve": Figure(
        plot_masking_curve,
        "Increase of the loss with a share of units silenced in every layer; bands: 95 % interval over seeds.",
    ),
    "imbalance": Figure(
        plot_imbalance,
        "How unevenly activations are spread over the units of a layer, in training; bands: 95 % interval over seeds.",
    ),
    "expansion": Figure(
        plot_weight, "A gate projection before expansion, after training and fusing, and the change.", height=3.2
    ),
    "learning_rates": Figure(
        plot_rates, "Validation loss against the learning rate, instruction tuning; filled: the rate chosen."
    ),
    "instruction": Figure(
        plot_comparison,
        "Instruction tuning: what each method learnt and what it forgot; 95 % intervals over seeds, dotted: APEX.",
    ),
    "trade_off": Figure(
        plot_trade_off,
        "Learning against forgetting, from the lowest learning rate (large markers) up; filled: the rate chosen.",
        width=4.4,
    ),
    "continued_rates": Figure(
        plot_rates, "Validation loss against the learning rate, continued pre-training; filled: the rate chosen."
    ),
    "continued": Figure(
        plot_token_curve, "Continued pre-training: held-out loss against tokens; bands: 95 % interval over seeds."
    ),
    "constructed_ranks": Figure(
        plot_constructed_ranks,
        "Constructed matrices: what an expansion does to the effective rank; bands: 95 % interval over draws.",
        width=5.6,
    ),
    "effective_rank": Figure(
        (
            plot_rank_by_layer,
            partial(plot_by_method, label="change of effective rank", null="moved as far by chance", percent=True),
        ),
        "Effective rank of the weights, over that of a random matrix, and how fine-tuning changes it.",
        height=2.8,
    ),
    "update_rank": Figure(
        partial(plot_by_method, label=r"effective rank of $\Delta W$ / random", null="random matrix", from_zero=True),
        "Effective rank of what fine-tuning changed; 95 % intervals over seeds.",
        height=2.8,
    ),
    "rank_gain": Figure(
        plot_rank_gain, "Gain in answer loss against the change of effective rank, one marker per run.", width=4.4
    ),
    "movement_by_role": Figure(
        (plot_movement_by_role, plot_biography),
        "How far units moved by their role, and the roles of one run's units over its stages.",
        height=2.8,
    ),
    "ablations": Figure(
        plot_comparison,
        "APEX with one thing changed at a time, instruction tuning; 95 % intervals over seeds, dotted: unchanged.",
        height=3.0,
    ),
}


def draw_figure(table: pd.DataFrame, name: str, folder: Path) -> list[Path]:
    """Write `table` to `folder/name.csv` and draw the figure of that name in `FIGURES` from it.

    One panel for each value of the column `panel`, if there is one, in order of appearance; the value is its title.
    """
    if table.empty:
        raise ValueError(f"figure {name!r}: the table has no rows, nothing to draw")
    write_csv(table, Path(folder) / f"{name}.csv")
    return redraw_figure(name, folder)


def redraw_figure(name: str, folder: Path) -> list[Path]:
    """Draw a figure of `FIGURES` from `folder/name.csv` alone; the same bytes each time."""
    if name not in FIGURES:
        raise ValueError(f"figure {name!r} is not in FIGURES; known: {', '.join(FIGURES)}")
    figure = FIGURES[name]
    text = pd.read_csv(Path(folder) / f"{name}.csv", dtype=str, na_filter=False)
    parts = text.groupby("panel", sort=False) if "panel" in text else [("", text)]
    panels = [(title, _typed(rows)) for title, rows in parts]
    plots = [figure.plot] * len(panels) if callable(figure.plot) else figure.plot
    axes = new_figure(len(panels), width=figure.width, height=figure.height)
    for ax, plot, (title, rows) in zip(axes, plots, panels, strict=True):
        plot(rows, ax)
        ax.set_title(title)
    return save_figure(axes, name, folder=folder)


def _typed(text: pd.DataFrame) -> pd.DataFrame:
    """Give the columns of a panel's rows, read as text, the types of a table of its own; "null" and "nan" are names."""
    return pd.read_csv(StringIO(text.to_csv(index=False)), keep_default_na=False, na_values=[""])
