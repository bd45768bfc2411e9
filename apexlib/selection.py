"""The choice of units: from activation statistics to an `ExpansionPlan` (APEX, arXiv:2505.24241).

In each layer the k highest-ranked heads or channels are the *source* (advantageous), the k lowest the *target*
(disadvantageous); the next-lowest are tuned directly, without an operator; the rest is frozen.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from apexlib.plan import COMPONENTS, ApexConfig, ComponentName, ExpansionPlan, LayerPlan

UNIT_NORMS = {"magnitude": "weight_norm", "gradient": "gradient_norm"}  # strategies that rank by what no pass records
_SCORES = {"rank": "rank_score", "mean": "activation", "ema": "ema", "ema_rank": "ema_rank"}


def select(
    statistics: pd.DataFrame,
    config: ApexConfig | None = None,
    *,
    seed: int | None = None,
    stage: int = 0,
    previous: Sequence[ExpansionPlan] = (),
) -> ExpansionPlan:
    """Choose source, target and direct units of every layer and component, `unit_counts` of each.

    `statistics` has one row per layer, component and unit, in any order, with `activation` and the column ranked by.
    `config.strategy` says how units are ranked:

    - "advantage": by `config.statistic`, that is by column `rank_score`, `activation` (mean), `ema` or `ema_rank`;
    - "reversed": the same units, but source and target change places, so that the same rows train;
    - "magnitude": by column `weight_norm`, that of `weight_norms`;
    - "gradient": by column `gradient_norm`, that of `gradient_norms`;
    - "random": by a permutation drawn for `seed` (default: `config.seed`), stage, layer and component.

    Equal scores are ranked as `units_in_order` says. A component with fewer than two units has no pair and is left out,
    and so are, with `config.spread_heads`, the heads of the layers that `_layers_with_heads` does not draw. With
    `config.halve_fraction`, `previous` holds the plans of all earlier stages.

    >>> table = pd.DataFrame({"layer": 0, "component": "channel", "unit": range(8), "activation": 1.0})
    >>> table["rank_score"] = [0, 5, -5, 0, 0, 0, 0, 0]
    >>> plan = select(table, ApexConfig(direct_channels=0.5)).layers[0]
    >>> plan.source, plan.target, plan.direct
    ((1,), (2,), (0, 3))
    """
    config = config or ApexConfig()
    seed = config.seed if seed is None else seed
    if config.halve_fraction and len(previous) != stage:
        raise ValueError(f"previous: stage {stage} needs the plans of the {stage} before it, got {len(previous)}")
    score = {**UNIT_NORMS, "random": "activation"}.get(config.strategy, _SCORES[config.statistic])
    _check_statistics(statistics, score)
    drawn, layers = _layers_with_heads(statistics, config, seed, stage), []
    for (layer, component), table in statistics.groupby(["layer", "component"], observed=True):
        units = len(table)
        if units < 2 or (component == "head" and layer not in drawn):
            continue
        if config.strategy == "random":
            draw = np.random.default_rng([seed, stage, layer, COMPONENTS.index(component)])
            order = draw.permutation(units).tolist()
        else:
            order = units_in_order(table, score)
        spent = _earlier_targets(previous, layer, component, units) if config.halve_fraction else set()
        pairs, direct = unit_counts(units, component, config, stage=stage, spent=len(spent))
        free = [unit for unit in order if unit not in spent]
        low, middle, high = free[:pairs], free[pairs : len(free) - pairs], free[len(free) - pairs :]
        source, target = (low, high) if config.strategy == "reversed" else (high, low)
        roles = (tuple(sorted(role)) for role in (source, target, [*spent, *middle[: direct - len(spent)]]))
        layers.append(LayerPlan(int(layer), component, *roles, units))
    if not layers:
        raise ValueError("statistics: no layer has two heads or two channels, so nothing can be paired")
    return ExpansionPlan(tuple(layers), config, seed, stage)


def units_in_order(statistics: pd.DataFrame, score: str) -> list[int]:
    """List the units of one layer and component from the lowest `score` to the highest.

    Equal scores are ranked by activation, then by unit number, the lower number lower, so that the order depends on no
    device, thread count or order of rows.

    >>> units_in_order(pd.DataFrame({"unit": [2, 1, 0], "activation": 1.0, "rank_score": [7, 0, 7]}), "rank_score")
    [1, 0, 2]
    """
    keys = [statistics[name].to_numpy(dtype) for name, dtype in (("unit", int), ("activation", float), (score, float))]
    return keys[0][np.lexsort(keys)].tolist()  # by the last key first


def unit_counts(
    units: int, component: ComponentName, config: ApexConfig, *, stage: int = 0, spent: int = 0
) -> tuple[int, int]:
    """Count the pairs and the directly tuned units that `select` takes of a component with that many units.

    There are k = ⌊fraction·units⌋ pairs, at least 1, and direct units up to ⌊share·units⌋ that train in all. Where the
    one pair alone exceeds that share, it stays. Both numbers of channels are rounded as `config.align` says. `spent`
    counts the targets of earlier stages (`halve_fraction`).

    >>> unit_counts(32, "head", ApexConfig()), unit_counts(11008, "channel", ApexConfig.preset("52%"))
    ((6, 6), (2064, 990))
    >>> unit_counts(11008, "channel", ApexConfig())  # 5104 in all, 16 · 319
    (2064, 976)
    """
    fraction = math.ldexp(config.fraction, -stage) if config.halve_fraction else config.fraction
    share, align = (config.direct_heads, 1) if component == "head" else (config.direct_channels, config.align)
    pairs = min(max(1, _floor(fraction, units, align)), (units - spent) // 2)
    return pairs, max(spent, _floor(share, units, align) - 2 * pairs)


def _layers_with_heads(statistics: pd.DataFrame, config: ApexConfig, seed: int, stage: int) -> set[int]:
    """Layers whose heads train: all, or with `config.spread_heads`, as the release does, one for each pair there is."""
    heads = statistics.loc[statistics["component"] == "head", "layer"]
    layers = sorted(heads.unique().tolist())
    if not config.spread_heads:
        return set(layers)
    drawn = np.random.default_rng([seed, stage]).permutation(layers)
    return set(drawn[: _floor(config.fraction, len(heads), 1)].tolist())


def _floor(share: float, units: int, align: int) -> int:
    count = math.floor(share * units + 1e-9)  # 0.29 · 100 is 28.999…
    return count - count % align if align <= count and 64 * align <= units else count


def _earlier_targets(previous: Sequence[ExpansionPlan], layer: int, component: str, units: int) -> set[int]:
    plans = [plan for stage in previous for plan in stage.layers if (plan.layer, plan.component) == (layer, component)]
    if other := [plan.units for plan in plans if plan.units != units]:
        here = f"previous: layer {layer}, {component}"
        raise ValueError(f"{here} has {units} units, a plan there was made for {other[0]}")
    return {unit for plan in plans for unit in plan.target}


def _check_statistics(statistics: pd.DataFrame, score: str) -> None:
    if missing := [n for n in ("layer", "component", "unit", "activation", score) if n not in statistics]:
        raise ValueError(f"statistics: no column {missing[0]!r}; there are {', '.join(map(str, statistics))}")
    if statistics.empty:
        raise ValueError("statistics: no rows")
    for name in ("layer", "unit"):
        column = statistics[name]
        if not pd.api.types.is_integer_dtype(column) or column.isna().any() or (column < 0).any():
            raise ValueError(f"statistics: column {name!r} must hold integers from 0, got {column.dtype}")
    if not (known := statistics["component"].isin(COMPONENTS)).all():
        raise ValueError(f"statistics: unknown component {statistics['component'][~known].iloc[0]!r}")
    for name in ("activation", score):
        if not pd.api.types.is_numeric_dtype(statistics[name]):
            raise ValueError(f"statistics: column {name!r} must hold numbers, got {statistics[name].dtype}")
        finite = np.isfinite(statistics[name].to_numpy(float, na_value=np.nan))
        if not finite.all():
            row = statistics[~finite].iloc[0]
            raise ValueError(f"layer {row['layer']}, {row['component']} {row['unit']}: {name} is {row[name]}")
    for (layer, component), units in statistics.groupby(["layer", "component"], observed=True)["unit"]:
        if not np.array_equal(np.sort(units), np.arange(len(units))):
            raise ValueError(f"layer {layer}, {component}: units must be 0 to {len(units) - 1}, each once")
