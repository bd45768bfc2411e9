"""What figures share: their style, how groups of rows are drawn, and one way to save them; never imports torch.

A `plot_*` function draws a tidy table on an `ax` and finishes it with `finish`; `save_figure` writes SVG, PNG and the
plotted table as CSV. Equal tables give equal bytes.
"""

from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from apexlib.files import atomic_write

COLUMN = 3.4  # width of a paper's column in inches; two columns: 7.0
PALETTE = (  # seaborn's "colorblind": told apart with any colour vision
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LEVEL = {"color": "0.4", "linewidth": 0.8}  # a line across
DOTTED = LEVEL | {"linestyle": ":"}  # that is there to compare with
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
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
    write_csv(pd.concat(tables, ignore_index=True), paths[2])
    return paths


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write the table of a figure, with six digits."""
    with atomic_write(path) as file:
        table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


def groups(table: pd.DataFrame, by: str, *, sort_by: str = "") -> Iterator[tuple[str, pd.DataFrame, dict[str, str]]]:
    """Yield the name and the rows of each group, in order of appearance, with a colour and a marker to draw it in."""
    parts = table.groupby(by, sort=False)
    for (name, rows), colour, marker in zip(parts, cycle(PALETTE), cycle(MARKERS), strict=False):
        yield name, rows.sort_values(sort_by) if sort_by else rows, {"color": colour, "marker": marker}


def band(ax: Axes, x: pd.Series, rows: pd.DataFrame, *, alpha: float = 0.2, **look: str) -> None:
    """Draw `mean` against `x` as a line, and a band in its colour from `low` to `high`."""
    ax.plot(x, rows["mean"], **look)
    ax.fill_between(x, rows["low"], rows["high"], color=look["color"], alpha=alpha, linewidth=0)


def around(table: pd.DataFrame, mean: str = "mean", low: str = "low", high: str = "high") -> np.ndarray:
    """Return how far down and up the bars of an interval reach from its mean, as `errorbar` needs it."""
    return np.abs(table[[low, high]].to_numpy().T - table[mean].to_numpy())


def finish(ax: Axes, table: pd.DataFrame, *, legend: str | None = None, **labels: str) -> Axes:
    """Label the axes, add a legend and keep the plotted table with the ax, for `save_figure`.

    `legend`: "inside", "beside" the ax where it would hide something, or one "below" all panels of the figure.
    """
    ax.set(**labels)
    if legend == "inside":
        ax.legend()
    elif legend == "beside":
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    elif legend == "below" and not ax.figure.legends:
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    ax._plotted = table
    return ax
