"""The records of runs: a claim with its interval and verdict, and any measure of any method at any learning rate."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from ipywidgets import Dropdown, Layout, SelectMultiple, Text
from matplotlib.axes import Axes

from apexlib.analysis.records import Records
from apexlib.explore.panel import BLUE, GREEN, GREY, RED, View
from apexlib.plot.style import DOTTED

VERDICTS = {"reproduced": GREEN, "opposite": RED, "no difference": BLUE}  # the others: GREY


class Runs(View):
    """Look through the ledger of claims, `table`, and the runs by method and learning rate, `chart`.

    `results` is a folder with `claims.csv` and `instruction.csv`, or these tables by name, with `values` (`claim`,
    `seed`, `value`) where there are any.
    """

    def __init__(self, results: str | Path | Mapping[str, pd.DataFrame]) -> None:
        self.state = state = Records(results)
        methods = state.runs["method"].unique().tolist()
        super().__init__(
            (3.3, 4.3),
            verdict=Dropdown(options=["all", *state.claims["verdict"].unique()]),
            words=Text(placeholder="LoRA forgets"),
            claim=Dropdown(options=_options(state.claims), layout=Layout(width="38em", max_width="100%")),
            measure=Dropdown(options=state.measures),
            methods=SelectMultiple(options=methods, value=[name for name in methods if name != "base"][:6], rows=5),
        )

    @property
    def table(self) -> pd.DataFrame:
        """The claims that the filter leaves."""
        return self.state.chosen(self["verdict"], self["words"])

    def adapt(self) -> None:
        if (names := self.table["claim"].tolist()) and names != [value for _, value in self.controls["claim"].options]:
            kept = self["claim"]
            self.controls["claim"].options = _options(self.table)
            self.controls["claim"].value = kept if kept in names else names[0]

    def draw(self, left: Axes, right: Axes) -> str:
        if self.table.empty:
            raise ValueError(f"verdict {self['verdict']!r}, words {self['words']!r}: no claim has them; need others")
        claim = self.table.set_index("claim").loc[self["claim"]]
        values = self.state.values.query("claim == @claim.name")["value"]
        left.axvspan(claim["goal"] - claim["margin"], claim["goal"] + claim["margin"], color="0.9", label="± margin")
        left.axvline(claim["goal"], **DOTTED)
        left.plot(values, [0.5] * len(values), "o", mfc="none", color="0.4", label="a seed each" * bool(len(values)))
        if np.isfinite(claim["mean"]):
            ends, colour = np.abs(claim[["low", "high"]] - claim["mean"]), VERDICTS.get(claim["verdict"], GREY)
            look = {"fmt": "o", "capsize": 4, "color": colour, "label": "mean, 95 % interval"}
            left.errorbar(claim["mean"], 1, xerr=[[end] for end in ends], **look)
        left.set(ylim=(0, 2.4), yticks=[], xlabel=claim["unit"], title=f"claim {claim['number']}: {claim['verdict']}")
        left.legend(loc="upper left", frameon=True)
        for number, (method, rows) in enumerate(self.chart.groupby("method", sort=False)):
            if (rows["learning_rate"] == 0).all():  # the base, untrained
                right.axhline(rows["mean"].iloc[0], **DOTTED, label=method)
                continue
            ends, at = [rows["mean"] - rows["min"], rows["max"] - rows["mean"]], rows["learning_rate"] * 1.03**number
            right.errorbar(at, rows["mean"], yerr=ends, marker="os^Dv"[number % 5], capsize=2, lw=1, label=method)
        rates = sorted({rate for rate in self.chart["learning_rate"] if rate > 0})
        right.set(xscale="log", xlabel="learning rate (methods set apart; bars: all seeds)", ylabel=self["measure"])
        right.set_xticks(rates, [f"{rate:g}" for rate in rates])
        right.minorticks_off()
        right.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
        told = "".join(f"<br><b>{name}:</b> {escape(str(claim[name]))}" for name in ("rule", "because", "limits"))
        number = f"{claim['mean']:.3g} [{claim['low']:.3g}, {claim['high']:.3g}] {claim['unit']}, n = {claim['n']}"
        return f"<b>{escape(claim['statement'])}</b><br>{number}: <b>{claim['verdict']}</b>{told}"

    @property
    def chart(self) -> pd.DataFrame:
        """What the chart shows: `Records.chart`."""
        return self.state.chart(self["measure"], self["methods"])


def _options(claims: pd.DataFrame) -> list[tuple[str, str]]:
    """Name each claim in a list by its number and the start of its statement."""
    return [(f"{row.number}: {row.statement:.70}", row.claim) for row in claims.itertuples()]
