"""The forms of figures: each draws a tidy table on an `ax`; `finish` labels it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from apexlib.plot.style import DOTS, DOTTED, IMAGE, LEVEL, MARKERS, METHODS, PALETTE, ROLES, SLANTED, STANDING


def loss_curve(table: pd.DataFrame, ax: Axes, *, x: str = "tokens", unit: float = 1e6) -> None:
    """Draw training loss against `x` in the given unit, one line per model (mean over seeds, band: their range).

    Columns: `model`, `x`, `loss` and `split` ("train": lines, "valid": markers, "reference": a level to compare with,
    named by its `model`).
    """
    need(table, "model", x, "loss", "split")
    for model, rows, look in groups(table[table["split"] != "reference"], "model"):
        train = rows[rows["split"] == "train"].groupby(x)["loss"].agg(mean="mean", low="min", high="max")
        ax.plot(train.index / unit, train["mean"], color=look["color"], label=f"{model}, training")
        ax.fill_between(train.index / unit, train["low"], train["high"], color=look["color"], alpha=0.2, linewidth=0)
        valid = rows[rows["split"] == "valid"].groupby(x)["loss"].mean()
        if len(valid):
            ax.plot(valid.index / unit, valid, **look | DOTS, ms=5, label=f"{model}, held out")
    for name, loss in table.loc[table["split"] == "reference", ["model", "loss"]].itertuples(index=False):
        ax.axhline(loss, **DOTTED)
        ax.annotate(name, (0.99, loss), (0, 2), ("axes fraction", "data"), "offset points", ha="right")


def distribution(table: pd.DataFrame, ax: Axes, value: str) -> None:
    """Draw `value` of every unit over its layer's mean, sorted, one line per `layer`; zeros at the lower edge.

    Of several seeds the units at the same place are averaged.
    """
    table = table.assign(seed=table.get("seed", 0))
    colours = mpl.colormaps["viridis"](np.linspace(0, 1, table["layer"].nunique() + 2)[1:-1])
    for colour, (layer, rows) in zip(colours, table.groupby("layer"), strict=True):
        seeds = [seed[value].sort_values(ascending=False).to_numpy() for _, seed in rows.groupby("seed")]
        values = np.mean([each / each.mean() for each in seeds], axis=0)
        share = (np.arange(len(values)) + 0.5) / len(values)
        marker = "o" if len(values) <= 32 else None
        ax.plot(share, np.maximum(values, 1e-4), color=colour, marker=marker, label=f"layer {layer}")
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
    level: Mapping[str, Any] | None = None,
    ticks: int = 0,
    tick_format: str = "",
    overlap: Literal["", "dodge", "nest"] = "",
    intervals: bool = True,
    named_at_end: bool = False,
) -> None:
    """Draw `y` against `x` in the given unit, a line for each value of `by`, averaged where an x has several rows.

    "mean" gets a band from `low` to `high`, unless no `intervals` are to be drawn; rows that are `chosen` are filled;
    `by_chance` is dotted. A `level` lies across. Each x has a tick, if there are at most so many `ticks`. Where lines
    would hide one another, each is a little to the right of the one before, with a bar for its band ("dodge"), or
    thinner ("nest"). `named_at_end`: names stand where lines end.
    """
    need(table, by, x, *(("mean", "low", "high") if y == "mean" else (y,)))
    step, ends = np.ptp(table[x]) / unit / 60 if overlap == "dodge" else 0, []
    for number, (name, rows, look) in enumerate(groups(table, by, looks=looks)):
        if overlap == "nest":
            look = look | {"linewidth": 2.6 / (1 + number), "markersize": 6 / (1 + number)}
        rows = rows.groupby(x).mean(numeric_only=True)
        at = rows.index / unit + number * step
        ax.plot(at, rows[y], **look, label=name, mfc="white" if "chosen" in rows else None)
        ends.append((at[-1], rows[y].iloc[-1], name, look["color"]))
        if "chosen" in rows:
            ax.plot(at[rows["chosen"] > 0], rows.loc[rows["chosen"] > 0, y], **look | {"linestyle": "none"})
        if y == "mean" and intervals and (rows["high"] > rows["low"]).any():
            if step or len(rows) == 1:  # a band of one point has no width
                ax.errorbar(at, rows["mean"], yerr=around(rows), fmt="none", ecolor=look["color"], linewidth=0.9)
            else:
                ax.fill_between(at, rows["low"], rows["high"], color=look["color"], alpha=0.2, linewidth=0)
        if "by_chance" in rows:
            ax.plot(at, rows["by_chance"], color=look["color"], linestyle=":", linewidth=1)
    if level:
        ax.axhline(**LEVEL | level)
    if "by_chance" in table:
        ax.plot([], [], color="0.4", linestyle=":", linewidth=1, label="random rows as large")
    if (values := table[x].drop_duplicates().sort_values()).size <= ticks:
        names = [f"{value / unit:{tick_format}}" for value in values] if tick_format else None
        ax.set_xticks(values / unit, names)
        ax.minorticks_off()
    if named_at_end:
        name_ends(ends, ax)


def name_ends(ends: Iterable[tuple[float, float, str, str]], ax: Axes) -> None:
    """Write names beside the right edge of `ax`, apart, each near the end of its line: x, y, name and colour."""
    size, (low, high) = FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points(), ax.get_ylim()
    apart, ends = 1.3 * size * ax.figure.dpi / 72 / ax.bbox.height, sorted(ends, key=lambda end: end[1])
    wanted = (np.array([y for _, y, _, _ in ends]) - low) / (high - low)
    steps = apart * np.arange(len(ends))
    heights = np.maximum.accumulate(wanted - steps) + steps  # pushed up by those below
    for height, (x, y, name, colour) in zip(heights - (heights - wanted).mean(), ends, strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        place = {"xytext": (1.04, height), "textcoords": "axes fraction", "va": "center", "fontsize": size}
        ax.annotate(name, (x, y), color="0.15", arrowprops=leader, **place)


def by_method(table: pd.DataFrame, ax: Axes, *, null_name: str) -> None:
    """Draw `mean` with `low` and `high` of each `method`, in order, beside `null`: what a null model gives."""
    need(table, "method", "mean", "low", "high", "null")
    x, room = range(len(table)), places(table["method"], ax)
    ax.errorbar(x, table["mean"], yerr=around(table), fmt="o", color=PALETTE[0], capsize=2, label="measured")
    ax.plot(x, table["null"], "_", color=PALETTE[3], ms=min(11, 0.8 * room), mew=1.6, label=null_name)
    ax.axhline(0, **LEVEL)
    ax.set_xlim(-0.6, len(table) - 0.4)
    ax.margins(y=0.4)


def places(names: Sequence[str], ax: Axes) -> float:
    """Name the places 0, 1, … of an axis, slanted or standing, as there is room; return that of each, in points."""
    size = FontProperties(size=mpl.rcParams["xtick.labelsize"]).get_size_in_points()
    room = ax.bbox.width / ax.figure.dpi * 72 / len(names)
    ax.set_xticks(range(len(names)), names, **(SLANTED if room > 2 * size else STANDING), size=min(size, 0.95 * room))
    return room


def signed(matrix: np.ndarray, ax: Axes) -> AxesImage:
    """Draw a matrix as an image, blue below zero and red above."""
    limit = np.quantile(np.abs(matrix), 0.995) or 1
    ax.grid(visible=False)
    return ax.imshow(matrix, **IMAGE, cmap="RdBu_r", vmin=-limit, vmax=limit)


def roles(table: pd.DataFrame, ax: Axes) -> None:
    """Draw a table of roles, by their numbers in ROLES, as an image."""
    shades = mpl.colors.ListedColormap([colour for _, colour in ROLES.values()])
    ax.imshow(table, **IMAGE, cmap=shades, vmin=-0.5, vmax=len(ROLES) - 0.5)
    ax.grid(visible=False)


def groups(
    table: pd.DataFrame, by: str, *, sort_by: str = "", looks: Mapping[str, tuple[str, int, str]] | None = None
) -> Iterator[tuple[str, pd.DataFrame, dict[str, str]]]:
    """Yield the name and the rows of each group, in order of appearance, with a colour and a marker to draw it in.

    A method that trains a small share of the weights ("lora-2.4%") has the colour of the whole one and dashes; one of
    many rows ("apex-rows-75%") or of continued pre-training ("full-all") has the colour. `looks` sets groups and order:
    of each its name in a legend, the number of its colour in PALETTE, its marker.
    """
    names = table[by].dropna().unique()
    whole = [re.sub(r"(-all|-rows)?(-[\d.]+%)?$", "", str(name)) for name in names]
    colours = {name: colour for name, colour in METHODS.items() if name in whole}
    left = cycle(sorted({*range(len(PALETTE))} - {*colours.values()}))
    colours |= {name: next(left) for name in dict.fromkeys(whole) if name not in colours}
    count, markers, used = len(MARKERS), [], set()  # of many no two look alike
    for n, name in enumerate(whole):
        turns = (MARKERS[(n + n // count + turn) % count] for turn in range(count))
        markers.append(next((marker for marker in turns if (colours[name], marker) not in used), MARKERS[n % count]))
        used.add((colours[name], markers[-1]))
    looks = looks or dict(zip(names, zip(names, map(colours.get, whole), markers, strict=True), strict=True))
    for value, (name, colour, marker) in looks.items():
        if len(rows := table[table[by] == value]):
            few = re.search(r"(?<!-rows)-[\d.]+%$", str(name))
            look = {"color": PALETTE[colour], "marker": marker, "linestyle": "--" if few else "-"}
            yield name, rows.sort_values(sort_by) if sort_by else rows, look


def need(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table without rows, or without one of these columns."""
    if missing := [name for name in columns if name not in table]:
        has = ", ".join(map(str, table)) or "none"
        raise ValueError(f"the table has no column {', '.join(missing)}: need {', '.join(columns)}; it has {has}")
    if table.empty:
        raise ValueError("the table has no rows, nothing to draw")


def around(table: pd.DataFrame, mean: str = "mean", low: str = "low", high: str = "high") -> np.ndarray:
    """Return how far down and up the bars of an interval reach from its mean, as `errorbar` needs it."""
    return np.abs(table[[low, high]].to_numpy().T - table[mean].to_numpy())


def finish(ax: Axes, table: pd.DataFrame, *, legend: str = "", percent: Mapping | None = None, **labels: Any) -> Axes:
    """Label the axes, add a legend and keep the plotted table with the ax, for `save_figure`.

    `legend`: "inside", "beside" the ax where it would hide something, or one "below" all panels of the figure.
    `percent`: the decimals of an axis, "x" or "y", that shows shares; None: of each number as many as it needs.
    """
    ax.set(**labels)
    for axis, decimals in (percent or {}).items():
        look = PercentFormatter(1, decimals) if decimals is not None else FuncFormatter(_percent)
        getattr(ax, f"{axis}axis").set_major_formatter(look)
        getattr(ax, f"{axis}axis").set_minor_formatter(NullFormatter())  # a logarithmic one names the least of them
    if legend == "inside":
        ax.legend()
    elif legend == "beside" or (legend and not ax.figure.get_layout_engine()):  # which would make room below
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    elif legend == "below" and not ax.figure.legends:
        columns = 4 if ax.figure.get_figwidth() > 5 else 2
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    ax._plotted = table
    return ax


def _percent(share: float, _: int) -> str:
    return f"{100 * share:.6g}%".replace("-", "\N{MINUS SIGN}")
