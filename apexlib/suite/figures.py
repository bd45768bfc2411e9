"""The figures of the suite, as files: what is drawn in each, with `apexlib.plot` and below, stands in `figures.yaml`.

A function draws on an `ax`, `finish` completes it. Equal tables give equal bytes; no torch.
"""

from collections.abc import Iterable
from io import StringIO
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import apexlib.plot
from apexlib.files import atomic_write
from apexlib.plot.forms import around, by_method, finish, groups, lines, loss_curve, need
from apexlib.plot.style import DOTS, DOTTED, LEVEL, PALETTE, STYLE, UPRIGHT
from apexlib.suite.sentences import sentence

_WIDTH, _COLUMN = 7.0, 900  # of a figure of two columns: inches, and pixels on the page of a notebook
DPI = 200  # of pictures: more pixels than that, for sharp screens; notebook 07 holds all within 1 MB
_ALONG = (("data", "axes fraction"), "offset points")  # how a name stands beside an upright line


def trade_off(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `valid_loss` against `retention_loss`, a line per `method`, its first point large, those `chosen` filled.

    A row without `valid_loss` is a level of `retention_loss`, named by its method; one that is far to the right is
    told at the edge.
    """
    need(table, "method", "valid_loss", "retention_loss", "learning_rate", "chosen")
    is_level = table["valid_loss"].isna()
    for method, rows, look in groups(table[~is_level], "method", sort_by="learning_rate"):
        points, chosen = rows[["retention_loss", "valid_loss"]].to_numpy().T, rows["chosen"].to_numpy(bool)
        ax.plot(*points, **look, linewidth=0.9, label=method, mfc="white")
        if len(rows) > 1:
            ax.plot(*points[:, :1], **look, mfc=look["color"] if chosen[0] else "white", ms=7)
        ax.plot(*points[:, chosen], **look | {"linestyle": "none"})
    levels(table[is_level].set_index("method")["retention_loss"], ax)


def rates(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `loss` against `learning_rate`, a line per `method`; those `chosen` filled, the ends of the grid marked.

    Where there is a column `seeds`, the axis says over how many the means are.
    """
    need(table, "method", "learning_rate", "loss", "chosen")
    seeds = table["seeds"].max() if "seeds" in table else 1
    over = f"mean of {seeds:g} seeds; " if seeds > 1 else ""
    ax.set(xscale="log", ylabel=f"validation loss (nats per token)\n{over}lower: better")
    line = {"by": "method", "x": "learning_rate", "y": "loss"}
    lines(table, ax, **line, ticks=1000, tick_format="g", named_at_end=True)
    for end in (table["learning_rate"].min(), table["learning_rate"].max()):
        ax.axvline(end, **DOTTED)
        ax.annotate("end of the grid", (end, 1), (0, 2), *_ALONG, ha="center")


def levels(at: pd.Series, ax: Axes) -> None:
    """Draw upright lines, named by the index; one that would stretch the axis is told at its edge."""
    low, high = ax.get_xlim()
    width, beyond = high - low, []
    for name, value in at.items():
        if low - 0.5 * width < value < high + 0.5 * width:
            ax.axvline(value, **DOTTED)
            side = "left" if value > low + 0.05 * width else "right"  # of the line, where nothing is drawn
            ax.annotate(name, (value, 0.98), (2 if side == "left" else -2, 0), *_ALONG, **UPRIGHT | {"ha": side})
            ax.set_xlim(min(low, value - 0.16 * width), max(high, value + 0.16 * width))
        else:
            beyond.append(f"{name}: {value:.2f} →" if value > high else f"← {name}: {value:.2f}")
    ax.annotate("\n".join(beyond), (0.98, 0.98), xycoords="axes fraction", ha="right", va="top")


def comparison(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `mean` with `low` and `high` of each `method`, in order from above; a line through the first.

    Where there is a `seed`, rows that have one are dots beside it, of a single run; rows without an interval are
    levels to compare with.
    """
    need(table, "method", "mean", "low", "high")
    of_runs = table.get("seed", pd.Series(index=table.index)).notna()
    runs, means = table[of_runs], table[~of_runs & table["low"].notna()]
    rows, colours = range(len(means)), [PALETTE[3], *[PALETTE[0]] * (len(means) - 1)]
    ax.axvline(means["mean"].iloc[0], **DOTTED)
    place = {name: row for row, name in zip(rows, means["method"], strict=True)}
    ax.scatter(runs["mean"], [place[name] + 0.28 for name in runs["method"]], color="0.7", s=3, linewidth=0, zorder=2)
    ax.errorbar(means["mean"], rows, xerr=around(means), fmt="none", ecolor="0.55", capsize=2, linewidth=1)
    ax.scatter(means["mean"], rows, color=colours, s=18, zorder=3)
    compared = table[~of_runs & table["low"].isna()].set_index("method")["mean"]
    top = -0.6 - 0.09 * len(means) if len(compared) else -0.5  # the names of levels need a share of the height
    ax.set(ylim=(len(means) - 0.4, top), yticks=rows, yticklabels=means["method"])
    ax.xaxis.set_major_locator(MaxNLocator(4))
    levels(compared, ax)
    ax.grid(axis="y", visible=False)


def steps(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `mean` with `low` and `high` of each `method`, in order from above, a colour for each `setting`."""
    need(table, "method", "setting", "mean", "low", "high")
    names, settings = table["method"].unique(), table["setting"].nunique()
    place = dict(zip(names, range(len(names)), strict=True))
    for number, (setting, rows, look) in enumerate(groups(table, "setting")):
        y = rows["method"].map(place).astype(float) + 0.7 * ((number + 0.5) / settings - 0.5)
        ax.errorbar(rows["mean"], y, xerr=around(rows), **look | DOTS, ms=4.5, elinewidth=1, label=setting)
    ax.axvline(0, **DOTTED)
    ax.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=names)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="y", visible=False)


def rank_gain(table: pd.DataFrame, ax: Axes) -> None:
    """Draw `answer_loss_gain` less the mean of its `seed` against `erank_change` (relative), a marker per run."""
    need(table, "method", "seed", "erank_change", "answer_loss_gain")
    gain = table["answer_loss_gain"]
    table = table.assign(answer_loss_gain=gain - gain.groupby(table["seed"]).transform("mean"))
    for method, rows, look in groups(table, "method"):
        ax.plot(rows["erank_change"], rows["answer_loss_gain"], **look | DOTS, ms=6)
        ax.plot([], [], **look | {"linestyle": "none"}, ms=4, label=method)
    ax.axvline(0, **LEVEL)
    ax.axhline(0, **LEVEL)
    ax.xaxis.set_major_locator(MaxNLocator(4))


PLOTS = {each.__name__: each for each in (loss_curve, lines, rates, trade_off, comparison, steps, by_method, rank_gain)}
PLOTS |= {name: getattr(apexlib.plot, name) for name in apexlib.plot.__all__}
FIGURES = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))


def plot(table: pd.DataFrame, ax: Axes, name: str, panel: int = 0) -> Axes:
    """Draw a table on `ax` as the figure of that name in `FIGURES` draws it in a panel."""
    panels = FIGURES[name]["panels"]
    chosen = panels[panel % len(panels)]
    PLOTS[chosen["plot"]](table, ax, **chosen.get("marks", {}))
    return finish(ax, table, **chosen.get("axes", {}))


class Drawing(list[Path]):
    """The files of a figure; displayed in a notebook: its picture, its caption and, in a sentence, what it shows."""

    def __init__(self, paths: Iterable[Path], figure: Figure) -> None:
        super().__init__(paths)
        self.figure = figure

    def _ipython_display_(self) -> None:
        from IPython.display import Image, Markdown, display

        _, picture, table = self
        plt.close(self.figure)  # else it is shown once more, at the end of the cell
        width = round(_COLUMN * self.figure.get_figwidth() / _WIDTH)
        display(Image(picture, width=width), Markdown(" ".join(told(picture.stem, table.parent))))


def told(name: str, folder: Path) -> list[str]:
    """Say what the figure of that name shows: its caption, and a sentence from the table beside it in `folder`."""
    table = pd.read_csv(Path(folder) / f"{name}.csv", keep_default_na=False, na_values=[""])
    return [text for text in (FIGURES[name]["caption"], sentence(name, table)) if text]


def draw_figure(table: pd.DataFrame, name: str, folder: Path) -> Drawing:
    """Write `table` to `folder/name.csv` and draw the figure of that name in `FIGURES` from it.

    One panel for each value of the column `panel`, if there is one, in order of appearance; the value is its title.
    In a notebook, `display` what is returned.
    """
    if table.empty:
        raise ValueError(f"figure {name!r}: the table has no rows, nothing to draw")
    return _draw(StringIO(_csv(table)), name, folder)


def redraw_figure(name: str, folder: Path) -> Drawing:
    """Draw a figure of `FIGURES` from `folder/name.csv` alone; the same bytes each time."""
    return _draw(Path(folder) / f"{name}.csv", name, folder)


@plt.style.context(STYLE)
def _draw(source: Path | StringIO, name: str, folder: Path) -> Drawing:
    if name not in FIGURES:
        raise ValueError(f"figure {name!r} is not in FIGURES; known: {', '.join(FIGURES)}")
    text = pd.read_csv(source, dtype=str, na_filter=False)
    parts = list(text.groupby("panel", sort=False)) if "panel" in text else [("", text)]
    size = dict(FIGURES[name].get("size", {}))
    if (row := size.pop("row", 0)) and "method" in text:
        size["height"] = max(size["height"], row * (4 + text["method"].nunique()))
    axes = new_figure(len(parts), **size)
    try:
        for number, (ax, (title, rows)) in enumerate(zip(axes, parts, strict=True)):
            # the types of a table of its own; "null" and "nan" are names
            typed = pd.read_csv(StringIO(rows.to_csv(index=False)), keep_default_na=False, na_values=[""])
            plot(typed, ax, name, number).set_title(title)
    except ValueError as error:
        plt.close(axes[0].figure)
        raise ValueError(f"figure {name!r}: {error}") from None
    return Drawing(save_figure(axes, name, folder=folder), axes[0].figure)


def new_figure(columns: int = 1, *, width: float | None = None, height: float = 2.3) -> list[Axes]:
    """Open a figure with `columns` panels side by side; sizes in inches."""
    width = width or (3.4 if columns == 1 else _WIDTH)  # one or two columns of a paper
    _, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    return list(axes[0])


def save_figure(ax: Axes | Iterable[Axes], name: str, *, folder: Path = Path("figures")) -> list[Path]:
    """Write the figure of `ax` as `name.svg` and `name.png`, and the table that was drawn on it as `name.csv`.

    Panels are told apart in the CSV by a column `panel`, their title.
    """
    axes = list(ax) if isinstance(ax, Iterable) else [ax]
    tables = [getattr(each, "_plotted", None) for each in axes]
    if any(table is None for table in tables):
        raise ValueError(f"figure {name!r}: every ax must come from apexlib.plot, so that its data are saved too")
    if len(axes) > 1:
        tables = [table.assign(panel=each.get_title()) for each, table in zip(axes, tables, strict=True)]
    figure, paths = axes[0].figure, [Path(folder) / f"{name}.{ending}" for ending in ("svg", "png", "csv")]
    with atomic_write(paths[0]) as file, mpl.rc_context({"svg.hashsalt": "apexlib"}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})
    with atomic_write(paths[1]) as file:
        figure.savefig(file, dpi=DPI, metadata={"Software": None})
    with atomic_write(paths[2]) as file:
        file.write_bytes(_csv(pd.concat(tables, ignore_index=True)).encode())
    return paths


def _csv(table: pd.DataFrame) -> str:
    """The table of a figure, with six digits."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
