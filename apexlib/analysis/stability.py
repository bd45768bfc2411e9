"""Whether two selections of units agree by more than chance."""

from functools import lru_cache

import numpy as np
import pandas as pd

from apexlib.plan import ExpansionPlan


def selection_stability(first: ExpansionPlan, second: ExpansionPlan, *, level: float = 0.01) -> pd.DataFrame:
    """Compare two plans for one model: made from two halves of the data, say, or by two statistics.

    One row per layer, component and role ("source", "target"): sizes of both sets, their overlap and Jaccard index, the
    index expected of two independent random sets of these sizes (`chance`, exact, from the hypergeometric distribution
    of the overlap) and the probability of at least this overlap between those (`p_value`).
    A selection is called `noise` if `p_value` exceeds `level`, or if less than a tenth of the way from chance to
    identity is covered: (jaccard − chance) / (1 − chance) < 0.1. Few units can never be told from chance.

    >>> from apexlib import LayerPlan
    >>> plan = ExpansionPlan((LayerPlan(0, "head", source=(6, 7), target=(0, 1), direct=(), units=32),))
    >>> selection_stability(plan, plan)[["role", "jaccard", "p_value", "noise"]].round(4).values.tolist()
    [['source', 1.0, 0.002, False], ['target', 1.0, 0.002, False]]
    """
    if len({tuple((layer.layer, layer.component) for layer in plan.layers) for plan in (first, second)}) > 1:
        raise ValueError("the plans are for different layers: compare plans for one model")
    sizes = ["units", "first", "second", "overlap"]
    columns = ["layer", "component", "role", *sizes, "jaccard", "chance", "p_value", "noise"]
    rows = []
    for one, two in zip(first.layers, second.layers, strict=True):
        if one.units != two.units:
            here = f"layer {one.layer}, {one.component}"
            raise ValueError(f"{here}: {one.units} units in one plan, {two.units} in the other")
        for role in ("source", "target"):
            chosen, again = set(getattr(one, role)), set(getattr(two, role))
            if not chosen | again:
                continue
            counts = (one.units, len(chosen), len(again), len(chosen & again))
            jaccard = len(chosen & again) / len(chosen | again)
            chance, p_value = _by_chance(*counts)
            noise = p_value > level or jaccard - chance < 0.1 * (1 - chance)
            rows.append((one.layer, one.component, role, *counts, jaccard, chance, p_value, noise))
    return pd.DataFrame(rows, columns=columns)


@lru_cache(maxsize=4096)
def _by_chance(units: int, first: int, second: int, overlap: int) -> tuple[float, float]:
    """Expected Jaccard index, and probability of at least `overlap`, of two random sets of `units` things."""
    from scipy.stats import hypergeom

    common = hypergeom(units, first, second)
    possible = np.arange(max(0, first + second - units), min(first, second) + 1)
    expected = (common.pmf(possible) * possible / (first + second - possible)).sum()
    return float(expected), float(common.sf(overlap - 1))
