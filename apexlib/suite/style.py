"""What figures share: their style, how groups of rows are drawn, and one way to save them; never imports torch.

A `plot_*` function draws a tidy table on an `ax` and finishes it with `finish`; `save_figure` writes SVG, PNG and the
plotted table as CSV. Equal tables give equal bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from apexlib.files import atomic_write

COLUMN = 3.4  # width of a paper's column in inches; two columns: 7.0
PALETTE = (  # seaborn's "colorblind": told apart with any colour vision
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LEVEL = {"color": "0.4", "linewidth": 0.8}  # a line across
DOTTED = LEVEL | {"linestyle": ":"}  # that is there to compare with


def new_figure(columns: int = 1, *, width: float | None = None, height: float = 2.3) -> list[Axes]:
    """Open a figure in the suite's style with `columns` panels side by side; sizes in inches."""
    plt.style.use(Path(__file__).with_name("figures.mplstyle"))
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
