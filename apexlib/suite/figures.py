"""The figures of the suite: one function for each form of tidy table; what is drawn with it stands in `figures.yaml`.

A function draws on an `ax`, `finish` completes it. Equal tables give equal bytes; no torch.
"""

from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from apexlib.files import atomic_write

PALETTE = (  # seaborn's "colorblind": told apart with any colour vision
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LEVEL = {"color": "0.4", "linewidth": 0.8}  # a line across
DOTTED = LEVEL | {"linestyle": ":"}  # that is there to compare with
SLANTED = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}  # names below an axis
UPRIGHT = {"rotation": 90, "ha": "left", "va": "top"}  # the name of a level, beside it
DOTS = {"linestyle": "none", "mec": "white", "mew": 0.4}  # markers that may lie on one another
ROLES = {  # role of a unit in a plan: its name in a legend, colour
    "source": ("advantageous", PALETTE[3]),
    "target": ("disadvantageous", PALETTE[0]),
    "direct": ("directly tuned", PALETTE[2]),
    "frozen": ("frozen", "0.85"),
}


def loss_curve(table: pd.DataFrame, ax: Axes) -> None:
    """Draw training loss against tokens, one line per model (mean over seeds, band: their range).

    Columns: `model`, `seed`, `tokens`, `loss` and `split` ("train": lines, "valid": markers, "reference": a level to
    compare with, named by its `model`).
    """
    for model, rows, look in groups(table[table["split"] != "reference"], "model"):
        train = rows[rows["split"] == "train"].groupby("tokens")["loss"].agg(mean="mean", low="min", high="max")
        ax.plot(train.index / 1e6, train["mean"], color=look["color"], label=f"{model}, training")
        ax.fill_between(train.index / 1e6, train["low"], train["high"], color=look["color"], alpha=0.2, linewidth=0)
        valid = rows[rows["split"] == "valid"].groupby("tokens")["loss"].mean()
        ax.plot(valid.index / 1e6, valid, **look, **DOTS, ms=5, label=f"{model}, held out")
    for name, loss in table.loc[table["split"] == "reference", ["model", "loss"]].itertuples(index=False):
        ax.axhline(loss, **DOTTED)
        ax.annotate(name, (0.99, loss), (0, 2), ("axes fraction", "data"), "offset points", ha="right")


def activation_distribution(table: pd.DataFrame, ax: Axes) -> None:
    """Draw every unit's `activation` over its layer's mean, sorted, one line per `layer`; zeros at the lower edge."""
    colours = mpl.colormaps["viridis"](np.linspace(0, 1, table["layer"].nunique() + 2)[1:-1])
    for colour, (layer, rows) in zip(colours, table.groupby("layer"), strict=True):
        values = rows["activation"].sort_values(ascending=False).to_numpy()
        share = (np.arange(len(values)) + 0.5) / len(values)
        marker = "o" if len(values) <= 32 else None
        ax.plot(share, np.maximum(values / values.mean(), 1e-4), color=colour, marker=marker, label=f"layer {layer}")
    ax.axhline(1, **DOTTED)
    low, high = ax.dataLim.intervaly
    ax.set(yscale="log" if high > 20 * low else "linear", xlim=(0, 1))
    ax.legend(ncols=2 if len(colours) > 4 else 1)


def lines(
    table: pd.DataFrame,
    ax: Axes,
    *,
    by: str,
    x: str,
    y: str = "mean",
    unit: float = 1,
    looks: Mapping[str, tuple[str, int, str]] | None = None,
    alpha: float = 0.2,
    level: Mapping[str, Any] | None = None,
    log: bool = False,
    ticks: int = 0,
    tick_format: str = "",
) -> None:
    """Draw `y` against `x` in the given unit, a line for each value of `by`, averaged where an x has several rows.

    "mean" gets a band from `low` to `high`; rows that are `chosen` are filled; `by_chance` is dotted. A `level` lies
    across. On a `log` axis 0 is drawn at the left edge. Each x has a tick, if there are at most so many `ticks`.
    """
    ax.set_xscale("log" if log else "linear")
    edge = table.loc[table[x] > 0, x].min() / 2 if log else 0
    for name, rows, look in groups(table, by, looks=looks):
        rows = rows.groupby(x).mean(numeric_only=True)
        at = rows.index.where(rows.index > 0, edge) / unit
        ax.plot(at, rows[y], **look, label=name, mfc="white" if "chosen" in rows else None)
        if "chosen" in rows:
            ax.plot(at[rows["chosen"] > 0], rows.loc[rows["chosen"] > 0, y], **look, linestyle="none")
        if y == "mean":
            ax.fill_between(at, rows["low"], rows["high"], color=look["color"], alpha=alpha, linewidth=0)
        if "by_chance" in rows:
            ax.plot(at, rows["by_chance"], color=look["color"], linestyle=":", linewidth=1)
    if level:
        ax.axhline(**LEVEL | level)
    if "by_chance" in table:
        ax.plot([], [], color="0.4", linestyle=":", linewidth=1, label="random rows as large")
    if (values := table[x].drop_duplicates().sort_values()).size <= ticks:
        names = [f"{value / unit:{tick_format}}" for value in values] if tick_format else None
        ax.set_xticks(values.where(values > 0, edge) / unit, names)
        ax.minorticks_off()


def weight(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `value` as an image, a row per `unit`, a `column` each, sorted by the `role` that the left edge marks."""
    roles = table.drop_duplicates("unit").set_index("unit")["role"].sort_index()
    roles = roles.sort_values(key=lambda role: role.map([*ROLES].index), kind="stable")
    matrix = table.pivot(index="unit", columns="column", values="value").loc[roles.index].to_numpy()
    limit = np.quantile(np.abs(matrix), 0.995)
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02).ax.tick_params(labelsize=6)
    rows, strip = np.arange(len(roles)), -0.06 * matrix.shape[1]
    for role, (name, colour) in ROLES.items():
        ax.barh(rows[roles == role], width=strip, height=1.0, left=-0.5, color=colour, linewidth=0, label=name)
    ax.set(xlim=(strip - 0.5, matrix.shape[1] - 0.5), ylim=(len(matrix) - 0.5, -0.5))
    ax.grid(visible=False)


def trade_off(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `valid_loss` against `retention_loss`, a line per `method`; those `chosen` filled, the lowest large.

    A row without `valid_loss` is a level of `retention_loss`, named by its method; one that is far to the right is
    told at the edge.
    """
    is_level = table["valid_loss"].isna()
    for method, rows, look in groups(table[~is_level], "method", sort_by="learning_rate"):
        points, chosen = rows[["retention_loss", "valid_loss"]].to_numpy().T, rows["chosen"].to_numpy(bool)
        ax.plot(*points, **look, linewidth=0.9, label=method, mfc="white")
        ax.plot(*points[:, :1], **look, mfc="white", ms=7, linestyle="none")
        ax.plot(*points[:, chosen], **look, ms=7 if chosen[0] else None, linestyle="none")
    far, beyond = ax.get_xlim()[1], []
    for name, loss in table.loc[is_level, ["method", "retention_loss"]].itertuples(index=False):
        if loss > far:
            beyond.append(f"{name}: {loss:.2f} →")
        else:
            ax.axvline(loss, **DOTTED)
            ax.annotate(name, (loss, 0.98), (2, 0), ("data", "axes fraction"), "offset points", **UPRIGHT)
    ax.annotate("\n".join(beyond), (0.99, 0.02), xycoords="axes fraction", ha="right", va="bottom")


def comparison(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `mean` with `low` and `high` of each `method`, in order from above; a line through the first."""
    rows, colours = range(len(table)), [PALETTE[3], *[PALETTE[0]] * (len(table) - 1)]
    ax.axvline(table["mean"].iloc[0], **DOTTED)
    ax.errorbar(table["mean"], rows, xerr=around(table), fmt="none", ecolor="0.55", capsize=2, linewidth=1)
    ax.scatter(table["mean"], rows, color=colours, s=18, zorder=3)
    ax.set(ylim=(len(table) - 0.5, -0.5), yticks=rows, yticklabels=table["method"])
    ax.grid(axis="y", visible=False)


def by_method(table: pd.DataFrame, ax: Axes, *, null_name: str) -> None:
    """Draw `mean` with `low` and `high` of each `method`, in order, beside `null`: what a null model gives."""
    x = range(len(table))
    ax.errorbar(x, table["mean"], yerr=around(table), fmt="o", color=PALETTE[0], capsize=2, label="measured")
    ax.plot(x, table["null"], "_", color=PALETTE[3], ms=11, mew=1.6, label=null_name)
    ax.axhline(0, **LEVEL)
    ax.set_xticks(x, table["method"], **SLANTED)
    ax.set_xlim(-0.6, len(table) - 0.4)
    ax.margins(y=0.4)


def rank_gain(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `answer_loss_gain` against `erank_change` (relative), one marker per run, one colour per `method`."""
    for method, rows, look in groups(table, "method"):
        ax.plot(rows["erank_change"], rows["answer_loss_gain"], **look, **DOTS, ms=6)
        ax.plot([], [], **look, linestyle="none", ms=4, label=method)
    ax.axvline(0, **LEVEL)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def movement_by_role(table: pd.DataFrame, ax: Axes) -> None:
    """Draw how far units moved (`relative`: ‖ΔW‖ / ‖W‖ of a unit, averaged), by `role` in the plan and `method`."""
    methods = list(dict.fromkeys(table["method"]))
    width = 0.8 / len(ROLES)
    for step, (role, (name, colour)) in enumerate(ROLES.items()):
        rows = table[table["role"] == role].groupby("method")["relative"].mean().reindex(methods)
        ax.bar(np.arange(len(methods)) + (step - 1.5) * width, rows, width, color=colour, label=name)
    ax.set_xticks(range(len(methods)), methods, **SLANTED)
    ax.grid(visible=False, axis="x")


def biography(table: pd.DataFrame, ax: Axes) -> None:
    """Draw the `role` of every `unit` (of a `layer`, `component`), sorted by their roles, a column per `stage`."""
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


_PLOTS = (loss_curve, activation_distribution, lines, weight, trade_off, comparison, by_method, rank_gain)
PLOTS = {each.__name__: each for each in (*_PLOTS, movement_by_role, biography)}
FIGURES = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))


def plot(table: pd.DataFrame, ax: Axes, name: str, panel: int = 0) -> Axes:
    """Draw a table on `ax` as the figure of that name in `FIGURES` draws it in a panel."""
    panels = FIGURES[name]["panels"]
    chosen = panels[panel % len(panels)]
    PLOTS[chosen["plot"]](table, ax, **chosen.get("marks", {}))
    return finish(ax, table, **chosen.get("axes", {}))


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
    text = pd.read_csv(Path(folder) / f"{name}.csv", dtype=str, na_filter=False)
    parts = list(text.groupby("panel", sort=False)) if "panel" in text else [("", text)]
    axes = new_figure(len(parts), **FIGURES[name].get("size", {}))
    for number, (ax, (title, rows)) in enumerate(zip(axes, parts, strict=True)):
        # the types of a table of its own; "null" and "nan" are names
        typed = pd.read_csv(StringIO(rows.to_csv(index=False)), keep_default_na=False, na_values=[""])
        plot(typed, ax, name, number).set_title(title)
    return save_figure(axes, name, folder=folder)


def new_figure(columns: int = 1, *, width: float | None = None, height: float = 2.3) -> list[Axes]:
    """Open a figure in the suite's style with `columns` panels side by side; sizes in inches."""
    plt.style.use(Path(__file__).with_name("figures.mplstyle"))
    width = width or (3.4 if columns == 1 else 7.0)  # one or two columns of a paper
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
    with atomic_write(paths[0]) as file, mpl.rc_context({"svg.hashsalt": "apexlib"}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})
    with atomic_write(paths[1]) as file:
        figure.savefig(file, dpi=200, metadata={"Software": None})
    write_csv(pd.concat(tables, ignore_index=True), paths[2])
    return paths


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write the table of a figure, with six digits."""
    with atomic_write(path) as file:
        table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


def groups(
    table: pd.DataFrame, by: str, *, sort_by: str = "", looks: Mapping[str, tuple[str, int, str]] | None = None
) -> Iterator[tuple[str, pd.DataFrame, dict[str, str]]]:
    """Yield the name and the rows of each group, in order of appearance, with a colour and a marker to draw it in.

    `looks` sets groups and order: of each its name in a legend, the number of its colour in PALETTE, its marker.
    """
    names = table[by].dropna().unique()
    looks = looks or dict(zip(names, zip(names, cycle(range(len(PALETTE))), cycle(MARKERS)), strict=False))
    for value, (name, colour, marker) in looks.items():
        rows = table[table[by] == value]
        yield name, rows.sort_values(sort_by) if sort_by else rows, {"color": PALETTE[colour], "marker": marker}


def around(table: pd.DataFrame, mean: str = "mean", low: str = "low", high: str = "high") -> np.ndarray:
    """Return how far down and up the bars of an interval reach from its mean, as `errorbar` needs it."""
    return np.abs(table[[low, high]].to_numpy().T - table[mean].to_numpy())


def finish(ax: Axes, table: pd.DataFrame, *, legend: str = "", percent: Mapping | None = None, **labels: Any) -> Axes:
    """Label the axes, add a legend and keep the plotted table with the ax, for `save_figure`.

    `legend`: "inside", "beside" the ax where it would hide something, or one "below" all panels of the figure.
    `percent`: the decimals of an axis, "x" or "y", that shows shares.
    """
    ax.set(**labels)
    for axis, decimals in (percent or {}).items():
        getattr(ax, f"{axis}axis").set_major_formatter(PercentFormatter(1, decimals))
    if legend == "inside":
        ax.legend()
    elif legend == "beside":
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    elif legend == "below" and not ax.figure.legends:
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    ax._plotted = table
    return ax
