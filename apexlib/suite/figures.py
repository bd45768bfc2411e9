"""Figures from result tables: one style, one way to save; never imports torch.

A `plot_*` function draws a tidy table on an `ax` and returns the `ax`. `save_figure` writes SVG, PNG and the plotted
table as CSV; equal tables give equal bytes. The figures of the suite stand in `FIGURES`: `draw_figure` writes the table
of one and draws it, `redraw_figure` draws it again from that file alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from apexlib.files import atomic_write

Plot = Callable[[pd.DataFrame, Axes], Axes]

COLUMN = 3.4  # width of a paper's column in inches; two columns: 7.0
PALETTE = sns.color_palette("colorblind").as_hex()
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ORDERS = {  # order of masking: its name in a legend, colour, marker
    "advantageous": ("most active first", PALETTE[3], "o"),
    "random": ("at random", PALETTE[7], "s"),
    "disadvantageous": ("least active first", PALETTE[0], "^"),
}
ROLES = {  # role of a unit in a plan: its name in a legend, colour
    "source": ("advantageous", PALETTE[3]),
    "target": ("disadvantageous", PALETTE[0]),
    "direct": ("directly tuned", PALETTE[2]),
    "frozen": ("frozen", "0.85"),
}
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.4,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "svg.hashsalt": "apexlib",  # element ids that do not change from run to run
    "svg.fonttype": "path",
}


def new_figure(columns: int = 1, *, width: float | None = None, height: float = 2.3) -> list[Axes]:
    """Open a figure in the suite's style with `columns` panels side by side; sizes in inches."""
    mpl.rcParams.update(STYLE)
    width = width or (COLUMN if columns == 1 else 2 * COLUMN + 0.2)
    _, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    return list(axes[0])


def save_figure(ax: Axes | Iterable[Axes], name: str, *, folder: Path = Path("figures")) -> list[Path]:
    """Write the figure of `ax` as `name.svg` and `name.png`, and what its `plot_*` functions drew as `name.csv`.

    Panels are told apart in the CSV by a column `panel`, their title.
    """
    axes = list(ax) if isinstance(ax, Iterable) else [ax]
    tables = [getattr(each, "_plotted", None) for each in axes]
    if any(table is None for table in tables):
        raise ValueError(f"figure {name!r}: every ax must come from a plot_* function, so that its data are saved too")
    if len(axes) > 1:
        tables = [table.assign(panel=each.get_title()) for each, table in zip(axes, tables, strict=True)]
    figure, paths = axes[0].figure, [Path(folder) / f"{name}.{ending}" for ending in ("svg", "png", "csv")]
    with atomic_write(paths[0]) as file, mpl.rc_context({"svg.hashsalt": STYLE["svg.hashsalt"]}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})
    with atomic_write(paths[1]) as file:
        figure.savefig(file, dpi=200, metadata={"Software": None})
    _write_plotted(pd.concat(tables, ignore_index=True), paths[2])
    return paths


def draw_figure(table: pd.DataFrame, name: str, folder: Path) -> list[Path]:
    """Write `table` to `folder/name.csv` and draw the figure of that name in `FIGURES` from it.

    One panel for each value of the column `panel`, if there is one, in order of appearance; the value is its title.
    """
    if table.empty:
        raise ValueError(f"figure {name!r}: the table has no rows, nothing to draw")
    _write_plotted(table, Path(folder) / f"{name}.csv")
    return redraw_figure(name, folder)


def redraw_figure(name: str, folder: Path) -> list[Path]:
    """Draw a figure of `FIGURES` from `folder/name.csv` alone; the same bytes each time."""
    if name not in FIGURES:
        raise ValueError(f"figure {name!r} is not in FIGURES; known: {', '.join(FIGURES)}")
    figure = FIGURES[name]
    text = pd.read_csv(Path(folder) / f"{name}.csv", dtype=str, na_filter=False)
    panels = [(title, _typed(rows)) for title, rows in (_groups(text, "panel") if "panel" in text else [("", text)])]
    plots = [figure.plot] * len(panels) if callable(figure.plot) else figure.plot
    axes = new_figure(len(panels), width=figure.width, height=figure.height)
    for ax, plot, (title, rows) in zip(axes, plots, panels, strict=True):
        plot(rows, ax)
        ax.set_title(title)
    return save_figure(axes, name, folder=folder)


def plot_loss_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw training loss against tokens, one line per model (mean over seeds, band: their range).

    Columns: `model`, `seed`, `tokens`, `loss` and `split` ("train": lines, "valid": markers, "reference": a level to
    compare with, named by its `model`).
    """
    measured = table[table["split"] != "reference"]
    for colour, marker, (model, rows) in zip(
        _cycle(PALETTE), _cycle(MARKERS), _groups(measured, "model"), strict=False
    ):
        train = rows[rows["split"] == "train"].groupby("tokens")["loss"].agg(["mean", "min", "max"])
        ax.plot(train.index / 1e6, train["mean"], color=colour, label=f"{model}, training")
        ax.fill_between(train.index / 1e6, train["min"], train["max"], color=colour, alpha=0.2, linewidth=0)
        valid = rows[rows["split"] == "valid"].groupby("tokens")["loss"].mean()
        ax.plot(valid.index / 1e6, valid, marker, color=colour, mec="white", mew=0.4, ms=5, label=f"{model}, held out")
    for name, loss in table.loc[table["split"] == "reference", ["model", "loss"]].itertuples(index=False):
        ax.axhline(loss, color="0.4", linewidth=0.8, linestyle=":")
        ax.annotate(name, (0.99, loss), (0, 2), ("axes fraction", "data"), "offset points", ha="right")
    ax.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    ax.legend()
    return _remember(ax, table)


def plot_activation_distribution(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw every unit's activation over its layer's mean, sorted, one line per layer.

    Columns: `layer`, `unit`, `activation`. Units without any activation are drawn at the lower edge.
    """
    layers = sorted(table["layer"].unique())
    colours = sns.color_palette("viridis", len(layers)).as_hex()
    for colour, layer in zip(colours, layers, strict=True):
        values = table.loc[table["layer"] == layer, "activation"].sort_values(ascending=False).to_numpy()
        share = (np.arange(len(values)) + 0.5) / len(values)
        marker = "o" if len(values) <= 32 else None
        ax.plot(share, np.maximum(values / values.mean(), 1e-4), color=colour, marker=marker, label=f"layer {layer}")
    ax.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    low, high = ax.dataLim.intervaly
    ax.set(yscale="log" if high > 20 * low else "linear", xlim=(0, 1))
    ax.set(xlabel="units of a layer, most active first", ylabel="activation / mean of layer")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(ncols=2 if len(layers) > 4 else 1)
    return _remember(ax, table)


def plot_masking_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the increase of the loss against the share of masked units, one line per order with its interval.

    Columns: `order`, `fraction`, `mean`, `low`, `high` (nats per token).
    """
    for order, (name, colour, marker) in ORDERS.items():
        rows = table[table["order"] == order].sort_values("fraction")
        ax.plot(rows["fraction"], rows["mean"], color=colour, marker=marker, label=name)
        ax.fill_between(rows["fraction"], rows["low"], rows["high"], color=colour, alpha=0.2, linewidth=0)
    ax.axhline(0, color="0.4", linewidth=0.8, linestyle=":")
    ax.set(xlabel="units masked in every layer", ylabel="increase of loss (nats per token)")
    if table["fraction"].nunique() <= 5:
        ax.set_xticks(sorted(table["fraction"].unique()))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend()
    return _remember(ax, table)


def plot_imbalance(table: pd.DataFrame, ax: Axes, *, label: str = "coefficient of variation") -> Axes:
    """Draw a measure of imbalance against tokens seen, one line per model with its interval.

    Columns: `model`, `tokens`, `mean`, `low`, `high`. The untrained model (0 tokens) is drawn at the left edge.
    """
    first = table.loc[table["tokens"] > 0, "tokens"].min()
    for colour, marker, (model, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "model"), strict=False):
        rows = rows.sort_values("tokens")
        x = rows["tokens"].where(rows["tokens"] > 0, first / 2) / 1e6
        ax.plot(x, rows["mean"], color=colour, marker=marker, label=model)
        ax.fill_between(x, rows["low"], rows["high"], color=colour, alpha=0.2, linewidth=0)
    ax.set(xscale="log", xlabel="tokens seen (millions)", ylabel=label)
    ax.set_ylim(bottom=0)
    if (tokens := table["tokens"].drop_duplicates().sort_values()).size <= 8:
        ax.set_xticks(tokens.where(tokens > 0, first / 2) / 1e6, [f"{count / 1e6:.2g}" for count in tokens])
        ax.minorticks_off()
    ax.legend()
    return _remember(ax, table)


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
        units = roles.index[roles == role]
        ax.barh(units, width=strip, height=1.0, left=-0.5, color=colour, linewidth=0, label=name)
    ax.set(xlim=(strip - 0.5, matrix.shape[1] - 0.5), ylim=(len(matrix) - 0.5, -0.5))
    ax.set(xlabel="input dimension", ylabel="channel, in the model's order")
    ax.grid(visible=False)
    _legend_for_all(ax)
    return _remember(ax, table)


def plot_rates(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the validation loss of each method against the learning rate, the chosen one filled.

    Columns: `method`, `learning_rate`, `loss` (mean over the seeds of the grid, nats per token), `chosen`.
    """
    for colour, marker, (method, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "method"), strict=False):
        rows = rows.sort_values("learning_rate")
        ax.plot(rows["learning_rate"], rows["loss"], color=colour, marker=marker, mfc="white", label=method)
        best = rows[rows["chosen"].astype(bool)]
        ax.plot(best["learning_rate"], best["loss"], color=colour, marker=marker, linestyle="none")
    rates = sorted(table["learning_rate"].unique())
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _remember(ax, table)


def plot_trade_off(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw what was learnt against what was forgotten, a line per method along its learning rates; chosen ones filled.

    Columns: `method`, `learning_rate`, `answer_loss`, `retention_loss`, `chosen`. The lowest rate is marked by size.
    """
    for colour, marker, (method, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "method"), strict=False):
        rows = rows.sort_values("learning_rate")
        places = rows[["retention_loss", "answer_loss"]].to_numpy().T
        ax.plot(*places, color=colour, linewidth=0.9, label=method, marker=marker, mfc="white")
        ax.plot(*places[:, :1], color=colour, marker=marker, mfc="white", ms=7, linestyle="none")
        chosen = rows["chosen"].to_numpy().astype(bool)
        size = 7 if chosen[0] else None
        ax.plot(*places[:, chosen], color=colour, marker=marker, ms=size, linestyle="none")
    ax.set(xlabel="retention loss (nats per token): forgotten", ylabel="answer loss\n(nats per token)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _remember(ax, table)


def plot_constructed_ranks(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the relative change of effective rank against the strength of an expansion, one line per kind of matrix.

    Columns: `case`, `strength`, `mean`, `low`, `high`, and `by_chance`, the mean for random rows as large (dotted).
    """
    for colour, marker, (case, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "case"), strict=False):
        ax.plot(rows["strength"], rows["mean"], color=colour, marker=marker, label=case)
        ax.fill_between(rows["strength"], rows["low"], rows["high"], color=colour, alpha=0.2, linewidth=0)
        ax.plot(rows["strength"], rows["by_chance"], color=colour, linestyle=":", linewidth=1)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.plot([], [], color="0.4", linestyle=":", linewidth=1, label="random rows as large")
    ax.set(xlabel="size of $M P$ relative to $P$", ylabel="change of effective rank")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _remember(ax, table)


def plot_comparison(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw one point with its interval per method, in order from above; a line through the first for comparison.

    Columns: `method`, `mean`, `low`, `high`. The title of the panel says what is compared.
    """
    places = np.arange(len(table))
    around = np.abs(table[["low", "high"]].to_numpy().T - table["mean"].to_numpy())
    ax.axvline(table["mean"].iloc[0], color="0.4", linewidth=0.8, linestyle=":")
    ax.errorbar(table["mean"], places, xerr=around, fmt="none", ecolor="0.55", capsize=2, linewidth=1)
    colours = [PALETTE[3], *[PALETTE[0]] * (len(table) - 1)]
    ax.scatter(table["mean"], places, color=colours, s=18, zorder=3)
    ax.set(ylim=(len(table) - 0.5, -0.5))
    ax.set_yticks(places, table["method"])
    ax.grid(axis="y", visible=False)
    return _remember(ax, table)


def plot_token_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the held-out loss against tokens trained on, one line per method with its interval over seeds.

    Columns: `method`, `tokens`, `mean`, `low`, `high` (nats per token).
    """
    for colour, marker, (method, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "method"), strict=False):
        rows = rows.sort_values("tokens")
        ax.plot(rows["tokens"] / 1e6, rows["mean"], color=colour, marker=marker, label=method)
        ax.fill_between(rows["tokens"] / 1e6, rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel="tokens trained on (millions)", ylabel="loss (nats per token)")
    ax.legend()
    return _remember(ax, table)


def plot_by_method(
    table: pd.DataFrame, ax: Axes, *, label: str, null: str, percent: bool = False, from_zero: bool = False
) -> Axes:
    """Draw one value per method with its interval, beside what a null model gives.

    Columns: `method`, `mean`, `low`, `high`, `null` (all in the units of `label`; `null` names the null in the legend).
    Methods come in the order of the table.
    """
    places = np.arange(len(table))
    bars = np.stack([table["mean"] - table["low"], table["high"] - table["mean"]])
    ax.errorbar(places, table["mean"], yerr=bars, fmt="o", color=PALETTE[0], capsize=2, label="measured")
    ax.plot(places, table["null"], "_", color=PALETTE[3], ms=11, mew=1.6, label=null)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xticks(places, table["method"], rotation=35, ha="right", rotation_mode="anchor")
    ax.set(xlabel="method", ylabel=label, xlim=(-0.6, len(table) - 0.4))
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.margins(y=0.4)
    if from_zero:
        ax.set_ylim(bottom=0)
    ax.legend()
    return _remember(ax, table)


def plot_rank_by_layer(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw effective rank over that of a random matrix of the shape against the layer, one line per kind of matrix.

    Columns: `layer`, `role`, `share`.
    """
    for colour, marker, (role, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "role"), strict=False):
        mean = rows.groupby("layer")["share"].mean()
        ax.plot(mean.index, mean, color=colour, marker=marker, label=role)
    ax.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    ax.set_xticks(sorted(table["layer"].unique()))
    ax.set(xlabel="layer", ylabel="effective rank / random")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _remember(ax, table)


def plot_rank_gain(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the gain of a run against its change of effective rank, one marker per run, one colour per method.

    Columns: `method`, `erank_change` (relative), `answer_loss_gain` (nats per token).
    """
    for colour, marker, (method, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "method"), strict=False):
        ax.plot(rows["erank_change"], rows["answer_loss_gain"], marker, color=colour, mec="white", mew=0.4, ms=6)
        ax.plot([], [], marker, color=colour, ms=4, label=method)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set(xlabel="change of effective rank", ylabel="gain in answer loss\n(nats per token)")
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _remember(ax, table)


def plot_movement_by_role(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw how far units moved, by their role in the plan and by method.

    Columns: `method`, `role`, `relative` (‖ΔW‖ / ‖W‖ of a unit, averaged).
    """
    methods = list(dict.fromkeys(table["method"]))
    width = 0.8 / len(ROLES)
    for step, (role, (name, colour)) in enumerate(ROLES.items()):
        rows = table[table["role"] == role].groupby("method")["relative"].mean().reindex(methods)
        ax.bar(np.arange(len(methods)) + (step - 1.5) * width, rows, width, color=colour, label=name)
    ax.set_xticks(range(len(methods)), methods, rotation=35, ha="right", rotation_mode="anchor")
    ax.set(xlabel="method", ylabel="change of a unit / its norm")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    ax.grid(visible=False, axis="x")
    _legend_for_all(ax)
    return _remember(ax, table)


def plot_biography(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the role of every unit in every stage, units sorted by their roles, a column per stage.

    Columns: `layer`, `component`, `unit`, `stage`, `role`.
    """
    names = list(ROLES)
    roles = table.pivot(index=["layer", "component", "unit"], columns="stage", values="role")
    codes = roles.apply(lambda column: column.map(names.index)).sort_values(list(roles.columns)).to_numpy()
    colours = mpl.colors.ListedColormap([colour for _, colour in ROLES.values()])
    ax.imshow(codes, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", interpolation="nearest")
    for edge in range(1, codes.shape[1]):
        ax.axvline(edge - 0.5, color="white", linewidth=2)
    ax.set_xticks(range(codes.shape[1]), roles.columns)
    ax.set(xlabel="stage", ylabel="units, sorted by role")
    ax.grid(visible=False)
    for name, colour in ROLES.values():
        ax.bar(0, 0, color=colour, label=name)
    _legend_for_all(ax)
    return _remember(ax, table)


def plot_step_costs(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw time and peak memory of a training step, relative to full fine-tuning, one line per method.

    Columns: `method`, `ratio`, `ratio_low`, `ratio_high` (quartiles), `peak_ratio`.
    """
    place = np.arange(len(table))[::-1]
    spread = np.abs(table[["ratio_low", "ratio_high"]].to_numpy().T - table["ratio"].to_numpy())
    ax.errorbar(table["ratio"], place + 0.14, xerr=spread, fmt=MARKERS[0], color=PALETTE[0], lw=1, label="time")
    ax.plot(table["peak_ratio"], place - 0.14, MARKERS[1], color=PALETTE[1], label="peak memory")
    ax.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    ax.set_yticks(place, table["method"])
    ax.set(xlabel="of a step of full fine-tuning")
    ax.set_xlim(left=0)
    _legend_for_all(ax, ncols=2)
    return _remember(ax, table)


def plot_scaling(table: pd.DataFrame, ax: Axes, quantity: str = "seconds") -> Axes:
    """Draw how `quantity` ("seconds" or "peak_mib") of a step grows along `axis`, one line per method.

    Columns: `axis`, `value`, `method` and `quantity`.
    """
    for colour, marker, (method, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "method"), strict=False):
        rows = rows.sort_values("value")
        ax.plot(rows["value"], rows[quantity], color=colour, marker=marker, label=method)
    values = sorted(table["value"].unique())
    axis = table["axis"].iloc[0]
    ax.set(xscale="log", yscale="log", xlabel={"k": "share of units paired", "width": "d_model"}.get(axis, axis))
    ax.set_xticks(values, [f"{value:g}" for value in values], rotation=45)
    ax.xaxis.minorticks_off()
    _plain_log_ticks(ax.yaxis)
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel({"seconds": "seconds per step", "peak_mib": "peak memory (MiB)"}[quantity])
    _legend_for_all(ax)
    return _remember(ax, table)


def plot_forecast(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw forecast against measured peak memory, one marker per phase; the band is ± 10 %.

    Columns: `phase`, `forecast_mib`, `measured_mib`.
    """
    low, high = table["measured_mib"].min() / 1.3, table["measured_mib"].max() * 1.3
    line = np.array([low, high])
    ax.fill_between(line, 0.9 * line, 1.1 * line, color="0.85", linewidth=0, label="± 10 %")
    ax.plot(line, line, color="0.4", linewidth=0.8)
    for colour, marker, (phase, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "phase"), strict=False):
        ax.plot(
            rows["measured_mib"], rows["forecast_mib"], marker, color=colour, mec="white", mew=0.4, ms=5, label=phase
        )
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (ax.xaxis, ax.yaxis):
        _plain_log_ticks(axis)
    ax.set(xlabel="measured peak memory (MiB)", ylabel="forecast (MiB)")
    ax.legend()
    return _remember(ax, table)


@dataclass(frozen=True)
class Figure:
    """How a figure of the suite is drawn from its table, and what it shows, in a sentence."""

    plot: Plot | tuple[Plot, ...]  # one for all panels, or one for each
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
        plot_token_curve,
        "Continued pre-training: held-out loss against tokens; bands: 95 % interval over seeds.",
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


def _plain_log_ticks(axis: Axis) -> None:
    """Label 1, 2 and 5 of each decade, in plain digits."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_for_all(ax: Axes, ncols: int = 4) -> None:
    """One legend below all panels of a figure."""
    if not ax.figure.legends:
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=ncols)


def _groups(table: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    return list(table.groupby(column, sort=False))


def _cycle(values: Iterable[str]) -> list[str]:
    return list(values) * 4


def _typed(text: pd.DataFrame) -> pd.DataFrame:
    """Give the columns of a panel's rows, read as text, the types of a table of its own; "null" and "nan" are names."""
    return pd.read_csv(StringIO(text.to_csv(index=False)), keep_default_na=False, na_values=[""])


def _write_plotted(table: pd.DataFrame, path: Path) -> None:
    with atomic_write(path) as file:
        table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


def _remember(ax: Axes, table: pd.DataFrame) -> Axes:
    """Keep the plotted table with the ax, for `save_figure`."""
    ax._plotted = table
    return ax
