"""The figures of the benchmarks, from the tables that they write; never imports torch."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from apexlib.plot.forms import around, finish, groups
from apexlib.plot.style import DOTTED, LEVEL, MARKERS, PALETTE, STYLE
from apexlib.suite.figures import new_figure, save_figure


@plt.style.context(STYLE)
def draw(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Draw the figures of all tables."""
    measured = tables["steps"]
    first = [measured[measured["kind"] == kind]["case"].iloc[0] for kind in ("block", "model")]
    panels = new_figure(2, height=2.8)
    for ax, case in zip(panels, first, strict=True):
        plot_step_costs(measured[measured["case"] == case], ax).set_title(case)
    save_figure(panels, "step_costs", folder=folder)
    for quantity in ("seconds", "peak_mib"):
        panels = new_figure(4, height=2.2)
        for ax, (axis, table) in zip(panels, tables["scaling"].groupby("axis", sort=False), strict=True):
            plot_scaling(table, ax, quantity).set_title("model" if axis == "layers" else "FFN block")
        save_figure(panels, f"scaling_{quantity}", folder=folder)
    if "forecast" in tables:
        (ax,) = new_figure(height=2.8)
        save_figure(plot_forecast(tables["forecast"], ax), "forecast", folder=folder)


def plot_step_costs(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw time and peak memory of a training step, relative to full fine-tuning, one line per method.

    Columns: `method`, `ratio`, `ratio_low`, `ratio_high` (quartiles), `peak_ratio`.
    """
    rows, spread = np.arange(len(table))[::-1], around(table, "ratio", "ratio_low", "ratio_high")
    ax.errorbar(table["ratio"], rows + 0.14, xerr=spread, fmt=MARKERS[0], color=PALETTE[0], lw=1, label="time")
    ax.plot(table["peak_ratio"], rows - 0.14, MARKERS[1], color=PALETTE[1], label="peak memory")
    ax.axvline(1, **DOTTED)
    ax.set_yticks(rows, table["method"])
    ax.set_xlim(left=0)
    return finish(ax, table, legend="below", xlabel="of a step of full fine-tuning")


def plot_scaling(table: pd.DataFrame, ax: Axes, quantity: str = "seconds") -> Axes:
    """Draw how `quantity` ("seconds" or "peak_mib") of a step grows along `axis`, one line per method.

    Columns: `axis`, `value`, `method` and `quantity`.
    """
    for method, rows, look in groups(table, "method", sort_by="value"):
        ax.plot(rows["value"], rows[quantity], **look, label=method)
    values = sorted(table["value"].unique())
    axis = table["axis"].iloc[0]
    ax.set(xscale="log", yscale="log", xlabel={"k": "share of units paired", "width": "d_model"}.get(axis, axis))
    ax.set_xticks(values, [f"{value:g}" for value in values], rotation=45)
    ax.xaxis.minorticks_off()
    _plain_log_ticks(ax.yaxis)
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel({"seconds": "seconds per step", "peak_mib": "peak memory (MiB)"}[quantity])
    return finish(ax, table, legend="below")


def plot_forecast(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw forecast against measured peak memory, one marker per phase; the band is ± 10 %.

    Columns: `phase`, `forecast_mib`, `measured_mib`.
    """
    low, high = table["measured_mib"].min() / 1.3, table["measured_mib"].max() * 1.3
    line = np.array([low, high])
    ax.fill_between(line, 0.9 * line, 1.1 * line, color="0.85", linewidth=0, label="± 10 %")
    ax.plot(line, line, **LEVEL)
    for phase, rows, look in groups(table, "phase"):
        dots = look | {"linestyle": "none", "mec": "white", "mew": 0.4, "ms": 5}
        ax.plot(rows["measured_mib"], rows["forecast_mib"], **dots, label=phase)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (ax.xaxis, ax.yaxis):
        _plain_log_ticks(axis)
    return finish(ax, table, legend="inside", xlabel="measured peak memory (MiB)", ylabel="forecast (MiB)")


def _plain_log_ticks(axis: Axis) -> None:
    """Label 1, 2 and 5 of each decade, in plain digits."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
