"""The ranks of units at one or several checkpoints, and plans that one makes of them by ranks or by hand."""

from collections.abc import Mapping, Sequence
from functools import cache

import pandas as pd

from apexlib.plan import ExpansionPlan, LayerPlan

KEYS = ["layer", "component", "unit"]
Statistics = pd.DataFrame | Mapping[str, pd.DataFrame]  # of one checkpoint, or of several by name


class UnitRanks:
    """Activation statistics by checkpoint, and how far units moved, a `weight_difference`."""

    def __init__(self, statistics: Statistics, movement: pd.DataFrame | None = None) -> None:
        self.statistics = statistics if isinstance(statistics, Mapping) else {"": statistics}
        self.first, self.movement = next(iter(self.statistics.values())), movement
        self.units = (self.first.groupby("component", sort=False)["unit"].max() + 1).to_dict()
        self.layers = sorted(self.first["layer"].unique().tolist())
        self.table = cache(self.table)

    def table(self, checkpoint: str) -> pd.DataFrame:
        """The statistics of a checkpoint with `rank` (1: the highest of its layer) and `movement`, if there is one."""
        table = self.statistics[checkpoint]
        best = table.sort_values(["rank_score", "activation", "unit"], ascending=False)  # as in `units_in_order`
        table = table.assign(rank=best.groupby(["layer", "component"]).cumcount() + 1)
        if self.movement is None:
            return table
        return table.merge(self.movement[[*KEYS, "relative"]].rename(columns={"relative": "movement"}), on=KEYS)

    def limits(self, component: str, column: str) -> tuple[float, float]:
        """Least and greatest magnitude above zero of a column at any checkpoint."""
        tables = pd.concat([self.table(name) for name in self.statistics])
        values = tables.loc[tables["component"] == component, column].abs()
        return float(values[values > 0].min()), float(values.max())

    def plan(
        self,
        checkpoint: str,
        ranks: Mapping[str, tuple[int, int]],
        by_hand: Mapping[tuple[int, str], Sequence[tuple[int, ...]]],
    ) -> ExpansionPlan:
        """Make a plan without directly tuned units.

        `ranks` of a component are the places (from, before) from the top that are sources in every layer, and from the
        bottom that are targets; source and target chosen `by_hand` for a layer and component stand in their place.
        """
        layers = []
        for (layer, component), own in self.table(checkpoint).groupby(["layer", "component"]):
            order, (first, last) = own.sort_values("rank")["unit"].tolist(), ranks[component]
            by_rank = [tuple(sorted(order[first:last])), tuple(sorted(order[::-1][first:last]))]
            source, target = by_hand.get((layer, component), by_rank)
            if source or target:
                layers.append(LayerPlan(int(layer), component, source, target, direct=(), units=len(order)))
        return ExpansionPlan(tuple(layers))
