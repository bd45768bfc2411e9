"""Figures from result tables: one style, one way to save; never imports torch.

A `plot_*` function draws a tidy table on an `ax` and returns the `ax`. `save_figure` writes SVG, PNG and the plotted
table as CSV; equal tables give equal bytes.
"""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from apexlib.records import atomic_write

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
    with atomic_write(paths[2]) as file:
        pd.concat(tables, ignore_index=True).to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
    return paths


def plot_loss_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw training loss against tokens, one line per model (mean over seeds, band: their range).

    Columns: `model`, `seed`, `tokens`, `loss` and `split` ("train": lines, "valid": markers).
    """
    for colour, marker, (model, rows) in zip(_cycle(PALETTE), _cycle(MARKERS), _groups(table, "model"), strict=False):
        train = rows[rows["split"] == "train"].groupby("tokens")["loss"].agg(["mean", "min", "max"])
        ax.plot(train.index / 1e6, train["mean"], color=colour, label=f"{model}, training")
        ax.fill_between(train.index / 1e6, train["min"], train["max"], color=colour, alpha=0.2, linewidth=0)
        valid = rows[rows["split"] == "valid"].groupby("tokens")["loss"].mean()
        ax.plot(valid.index / 1e6, valid, marker, color=colour, mec="white", mew=0.4, ms=5, label=f"{model}, held out")
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
    if not ax.figure.legends:  # one for all panels
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
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
    if not ax.figure.legends:
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
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
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel({"seconds": "seconds per step", "peak_mib": "peak memory (MiB)"}[quantity])
    if not ax.figure.legends:
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
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
    ax.set(xlabel="measured peak memory (MiB)", ylabel="forecast (MiB)")
    ax.legend()
    return _remember(ax, table)


def _groups(table: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    return list(table.groupby(column, sort=False))


def _cycle(values: Iterable[str]) -> list[str]:
    return list(values) * 4


def _remember(ax: Axes, table: pd.DataFrame) -> Axes:
    """Keep the plotted table with the ax, for `save_figure`."""
    ax._plotted = table
    return ax
