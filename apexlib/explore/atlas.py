"""An atlas of units: every head or channel of every layer in one picture, one of them in words, and a plan of some."""

from typing import Any

import pandas as pd
from ipywidgets import BoundedIntText, Dropdown, IntRangeSlider, SelectionSlider, Text
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from apexlib.analysis.difference import biography
from apexlib.analysis.masked_losses import Mask, Masking
from apexlib.analysis.unit_ranks import KEYS, Statistics, UnitRanks
from apexlib.explore.panel import Point, View, numbers, tokens_html
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.plot.forms import roles
from apexlib.plot.style import IMAGE, ROLES

_COLOURS = {  # of a map: column, its unit
    "activation": "activation (squared norm per token)",
    "rank_score": "rank score (batches in the Top-K less in the Min-K)",
    "role": "role in the plan",
    "movement": "movement ‖Δw‖ / ‖w‖",
}
_AROUND = 14  # tokens before and after one that drives a unit


class Units(View):
    """See all units at one or several checkpoints, by name, and one of them at work; those chosen are a `plan`.

    They are chosen by ranks, or by hand in the layer shown: "1, 4 > 0, 7", sources > targets. A stroke over the map
    makes those under it sources, and as many of the lowest ranks targets; one over the ranks chooses these in every
    layer; a click shows a unit. `movement` is a `weight_difference`. With `model`, `tokenizer` and `text`, as in
    `Masks`, one sees what masking a unit alone costs, and the passages that drive it.
    """

    def __init__(
        self, statistics: Statistics, plan: ExpansionPlan | None = None, movement: Any = None, **at_work: Any
    ) -> None:
        self.state = state = UnitRanks(statistics, movement)
        self.masking = Masking(statistics=state.first, **at_work) if at_work else None
        self.given, self.by_hand, self._here, sizes = plan, {}, (), state.units.items()
        self.start = {name: (0, max(1, int(ApexConfig.fraction * count))) for name, count in sizes}
        names = list(state.statistics)
        super().__init__(
            checkpoint=SelectionSlider(options=names, value=names[-1], disabled=len(names) == 1),
            component=Dropdown(options=list(state.units), value=list(state.units)[-1]),
            colour=Dropdown(options=list(_COLOURS)[: 3 if movement is None else 4]),
            layer=Dropdown(options=state.layers),
            unit=BoundedIntText(max=max(state.units.values())),
            **{f"{name}_ranks": IntRangeSlider(value=self.start[name], max=n // 2) for name, n in sizes},
            by_hand=Text(placeholder="sources > targets"),
        )

    @property
    def plan(self) -> ExpansionPlan:
        """The plan given, until ranks or units are chosen; then that of these."""
        ranks, sizes = {name: self[f"{name}_ranks"] for name in self.start}, self.state.units
        if self.given and ranks == self.start and not any(self.by_hand.values()):
            return self.given
        texts = ((here, text.partition(">")[::2]) for here, text in self.by_hand.items() if text)
        by_hand = {here: [numbers(part, sizes[here[1]], here[1]) for part in parts] for here, parts in texts}
        return self.state.plan(self["checkpoint"], ranks, by_hand)

    @property
    def table(self) -> pd.DataFrame:
        """The units at the checkpoint: those of `UnitRanks.table`, with their `role` in the plan."""
        roles = biography([self.plan])[[*KEYS, "role"]]
        return self.state.table(self["checkpoint"]).merge(roles, how="left", on=KEYS).fillna({"role": "frozen"})

    def adapt(self) -> None:
        here = self["layer"], self["component"]
        if here != self._here:  # each layer has its own text
            self._here, self.controls["by_hand"].value = here, self.by_hand.get(here, "")
        self.by_hand[here] = self["by_hand"]
        self.controls["unit"].max = self.state.units[self["component"]] - 1

    def pointed(self, picture: int, how: str, start: Point, end: Point) -> str | None:
        (layer, component), state = self._here, self.state
        (left, right), (top, bottom) = (sorted(map(round, pair)) for pair in zip(start, end, strict=True))
        table = state.table(self["checkpoint"]).query("component == @component")
        if picture == 1:  # ranks of one layer
            order = table.query("layer == @layer").sort_values("rank")["unit"].tolist()
            if how == "drag":
                targets = left > len(order) / 2  # as far from the bottom as their sources from the top
                ranks = (len(order) - right, len(order) - left + 1) if targets else (left - 1, right)
                self.move(**{f"{component}_ranks": [min(max(rank, 0), len(order) // 2) for rank in ranks]})
                return None
            left, top = order[min(max(left, 1), len(order)) - 1], state.layers.index(layer)
        if how == "hover":
            where = state.layers[top], component, left
            return _told(self.table.set_index(KEYS, drop=False).loc[where])
        if how == "click":
            self.move(layer=state.layers[top], unit=left)
        elif picture == 0:
            for layer in state.layers[top : bottom + 1]:
                lowest = table.query("layer == @layer").sort_values("rank", ascending=False)["unit"].tolist()
                sources = range(left, right + 1)
                targets = sorted([unit for unit in lowest if unit not in sources][: len(sources)])
                self.by_hand[layer, component] = f"{left}-{right} > {', '.join(map(str, targets))}"
            self._here = ()  # so that its text is read again
            self.move(layer=state.layers[top], unit=left)
        return None

    def draw(self, atlas: Axes, profile: Axes) -> str:
        (layer, component), unit, colour = self._here, self["unit"], self["colour"]
        units = self.table.query("component == @component")
        _draw_map(units, colour, self.state, atlas)
        atlas.plot(unit, self.state.layers.index(layer), "s", ms=9, mfc="none", mec="black")
        atlas.set(xlabel=f"{component}, as numbered in the model", ylabel="layer", title=_COLOURS[colour])
        own = units.query("layer == @layer").sort_values("rank")
        for role, these in own.groupby("role", sort=False):
            profile.plot(these["rank"], these["activation"], ".", color=ROLES[role][1], label=ROLES[role][0])
        one = own.set_index("unit", drop=False).loc[unit]
        profile.plot(one["rank"], one["activation"], "s", ms=9, mfc="none", mec="black")
        profile.set(yscale="log", xlabel=f"rank in layer {layer}", ylabel="activation (squared norm per token)")
        profile.legend()
        return _told(one) + (self._passages(layer, component, unit) if self.masking else "")

    def _passages(self, layer: int, component: str, unit: int) -> str:
        """Say what masking a unit alone costs, and show the text around the tokens at which it is largest."""
        masking = self.masking
        cost = masking.loss(Mask(component, "by hand", ((layer, (unit,)),))) - masking.loss()
        sizes = [each[:, unit] for each in masking.outputs(component, layer)]
        html = f"; masking it alone: {cost:+.4f} nats per token. Where its output is largest (red: how large):"
        for row in sorted(range(len(sizes)), key=lambda row: -sizes[row].max())[:3]:
            place = int(sizes[row].argmax())
            part = slice(max(0, place - _AROUND), place + _AROUND)
            pieces = map(masking.tokenizer.decode, masking.rows[row][0][part, None])
            values = sizes[row][part].tolist()
            told = zip(pieces, values, map("{:.3g}".format, values), strict=True)
            html += tokens_html(told, sizes[row].max(), place - part.start)
        return html


def _told(unit: pd.Series) -> str:
    """Put a row of the table into words."""
    values = ", ".join(f"{name} {unit[name]:.4g}" for name in ("activation", "rank_score", "movement") if name in unit)
    where = f"<b>layer {unit['layer']}, {unit['component']} {unit['unit']}</b>"
    return f"{where}: {values}, rank {unit['rank']}, {ROLES[unit['role']][0]}"


def _draw_map(units: pd.DataFrame, colour: str, state: UnitRanks, ax: Axes) -> None:
    """Draw one column of all units of a component, a row per layer, in colours that all checkpoints share."""
    matrix = units.pivot(index="layer", columns="unit", values=colour)
    if colour == "role":
        roles(matrix.map([*ROLES].index), ax)
    else:
        low, high = state.limits(units["component"].iloc[0], colour)
        norms = {"activation": LogNorm(low, high, clip=True), "rank_score": Normalize(-high, high)}
        cmap = "RdBu_r" if colour == "rank_score" else "viridis"
        image = ax.imshow(matrix, **IMAGE, cmap=cmap, norm=norms.get(colour, Normalize(0, high)))
        ax.figure.colorbar(image, ax=ax, pad=0.02)
    ax.set_yticks(range(len(matrix)), matrix.index)
    ax.grid(visible=False)
