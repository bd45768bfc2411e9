"""Which units expand into which others: activation statistics to an `ExpansionPlan` (APEX, arXiv:2505.24241).

In each layer the k highest-ranked heads or channels are the *source* (advantageous), the k lowest the *target*
(disadvantageous); the next-lowest are tuned directly, without an operator; the rest is frozen.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from itertools import combinations, pairwise
from operator import index
from pathlib import Path
from reprlib import repr as abbreviate
from typing import Any, Literal, Self, get_args

import numpy as np
import pandas as pd

from apexlib.files import atomic_write

Component = Literal["head", "channel"]

_CHOICES = {
    "operator": ("monarch", "diagonal", "low_rank", "dense"),
    "ffn": ("split", "fused", "recompute"),
    "strategy": ("advantage", "random", "reversed", "magnitude"),
    "statistic": ("rank", "mean", "ema", "ema_rank"),
}
_SCORES = {"rank": "rank_score", "mean": "activation", "ema": "ema", "ema_rank": "ema_rank"}
_LARGEST = 2**31 - 1  # no model has more layers or units; a bound against hostile files


@dataclass(frozen=True)
class ApexConfig:
    """Settings of a run; the defaults are the paper's for instruction tuning, and its "52 %" (see `preset`).

    >>> ApexConfig(operator="butterfly")
    Traceback (most recent call last):
    ValueError: operator: unknown 'butterfly'; known: monarch, diagonal, low_rank, dense
    """

    fraction: float = 0.1875  # K, of a layer's heads and of its channels: |source| = |target| = ⌊K·n⌋; in (0, 0.5]
    direct_heads: float = 0.5625  # share of heads that train in all, source and target included; in [2K, 1]
    direct_channels: float = 0.465  # the same of channels
    stages: int = 2
    operator: str = "monarch"
    strategy: str = "advantage"  # see `select`
    statistic: str = "rank"  # what "advantage" and "reversed" rank by
    balance_weight: float = 0.0  # λ of the loss term that evens activations out
    operator_lr_scale: float = 1.0  # learning rate of M, v, s relative to the weights'
    assessment_samples: int = 1024  # sequences in the pass before the first stage
    train_embeddings: bool = True  # and the LM head
    train_norms: bool = False
    ffn: str = "fused"  # how a gated FFN trains: see `expand`
    halve_fraction: bool = False  # halve K at each stage; earlier targets stay directly tuned, never selected again
    align: int = 1  # round numbers of channels down to a multiple of it (16 suits hardware); 1 is the paper's ⌊K·n⌋
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), type(field.default))
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}: unknown {value!r}; known: {', '.join(known)}")
        if not 0 < self.fraction <= 0.5:
            raise ValueError(f"fraction: need a share in (0, 0.5], so that source and target fit, got {self.fraction}")
        for name in ("direct_heads", "direct_channels"):
            if not 2 * self.fraction <= (share := getattr(self, name)) <= 1:
                least = f"{2 * self.fraction:g} (2·fraction: source and target train)"
                raise ValueError(f"{name}: need a total share from {least} to 1, got {share}")
        for name in ("stages", "assessment_samples", "align"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: need at least 1, got {getattr(self, name)}")
        for name in ("balance_weight", "operator_lr_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: need at least 0, got {getattr(self, name)}")
        _index(self.seed, "seed")

    @classmethod
    def preset(cls, name: Literal["52%", "2.4%"]) -> Self:
        """Settings for a trainable share of LLaMA-2-7B: d = 4096, 32 layers of 32 heads and 11008 channels, untied.

        A head is 4·128·d weights (q, k, v, o), a channel 3·d (gate, up, down); the whole model is 6 738 415 616.

        "52%", the paper's: 18 heads (6 source, 6 target, 6 direct) and 5118 channels (2064, 2064, 990) in each layer,
        embeddings and LM head. 1 207 959 552 + 2 012 479 488 + 262 144 000, and 7 633 920 in M, v and s: 51.8 %.

        "2.4%", ours, the paper does not spell its own out: one pair of heads, the fewest there can be, 35 pairs of
        channels, nothing else. 134 217 728 + 27 525 120, and 123 296 in M, v and s: 2.40 %.
        """
        if name == "52%":
            return cls()
        if name == "2.4%":
            return cls(fraction=0.0032, direct_heads=0.0625, direct_channels=0.0064, train_embeddings=False)
        raise ValueError(f"unknown preset {name!r}; known: 52%, 2.4%")

    def to_json(self, path: str | Path) -> None:
        """Write the settings to a file."""
        _write_json(asdict(self), path)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read settings; absent ones take their default, unknown ones and wrong types are refused."""
        return _read_json(path, lambda value: _build(cls, value))


@dataclass(frozen=True)
class LayerPlan:
    """Units of one layer to read from (`source`), to overwrite (`target`) and to tune directly (`direct`).

    Each is in ascending order, the model's own; the i-th lowest source is paired with the i-th lowest target. `units`
    is how many the layer has. Source and target may both be empty: such a layer is tuned directly only.

    >>> LayerPlan(layer=0, component="head", source=(1, 3), target=(0, 3), direct=(), units=4)
    Traceback (most recent call last):
    ValueError: layer 0, head: units [3] are both source and target
    """

    layer: int
    component: Component
    source: tuple[int, ...]
    target: tuple[int, ...]
    direct: tuple[int, ...]
    units: int

    def __post_init__(self) -> None:
        if self.component not in get_args(Component):
            raise ValueError(f"component: unknown {self.component!r}; known: {', '.join(get_args(Component))}")
        object.__setattr__(self, "layer", _index(self.layer, "layer"))
        here = f"layer {self.layer}, {self.component}"
        object.__setattr__(self, "units", _index(self.units, f"{here}: units"))
        roles = ("source", "target", "direct")
        for role in roles:
            object.__setattr__(self, role, _indices(getattr(self, role), self.units, f"{here}: {role}"))
        for first, second in combinations(roles, 2):
            if shared := sorted(set(getattr(self, first)) & set(getattr(self, second))):
                raise ValueError(f"{here}: units {shared} are both {first} and {second}")
        if len(self.source) != len(self.target):
            raise ValueError(f"{here}: need as many sources as targets, got {len(self.source)} and {len(self.target)}")
        if not self.source and not self.direct:
            raise ValueError(f"{here}: selects no unit; leave it out of the plan")


@dataclass(frozen=True)
class ExpansionPlan:
    """A `LayerPlan` for every layer and component that expands, in ascending order, and what it was made with."""

    layers: tuple[LayerPlan, ...]
    config: ApexConfig | None = None
    seed: int = 0
    stage: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.layers, list | tuple) or not self.layers:
            raise ValueError("layers: a plan needs at least one layer")
        if wrong := [type(layer).__name__ for layer in self.layers if not isinstance(layer, LayerPlan)]:
            raise ValueError(f"layers: need LayerPlans, got {wrong[0]}")
        if not isinstance(self.config, ApexConfig | None):
            raise ValueError(f"config: need an ApexConfig, got {type(self.config).__name__}")
        object.__setattr__(self, "seed", _index(self.seed, "seed"))
        object.__setattr__(self, "stage", _index(self.stage, "stage"))
        object.__setattr__(self, "layers", tuple(sorted(self.layers, key=lambda plan: (plan.layer, plan.component))))
        for first, second in pairwise(self.layers):
            if (first.layer, first.component) == (second.layer, second.component):
                raise ValueError(f"layer {first.layer}, {first.component}: planned twice")

    def to_json(self, path: str | Path) -> None:
        """Write the plan to a file."""
        _write_json(asdict(self), path)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read and validate a plan; whether it fits a model is for `expand` to check."""

        def build(value: Any) -> Self:
            value = dict(_object(cls, value))
            if isinstance(value.get("layers"), list):
                value["layers"] = tuple(_build(LayerPlan, layer) for layer in value["layers"])
            if value.get("config") is not None:
                value["config"] = _build(ApexConfig, value["config"])
            return _build(cls, value)

        return _read_json(path, build)


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
    - "magnitude": by column `weight_norm`;
    - "random": by a permutation drawn for `seed` (default: `config.seed`), stage, layer and component.

    Equal scores are ranked by activation, then by unit number, the lower number lower: a plan depends on no device,
    thread count or order of rows. A component with fewer than two units has no pair and is left out.
    With `config.halve_fraction`, `previous` holds the plans of all earlier stages.

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
    score = {"magnitude": "weight_norm", "random": "activation"}.get(config.strategy, _SCORES[config.statistic])
    _check_statistics(statistics, score)
    layers = []
    for (layer, component), table in statistics.groupby(["layer", "component"], observed=True):
        table = table.sort_values("unit")
        units = len(table)
        if units < 2:
            continue
        if config.strategy == "random":
            draw = np.random.default_rng([seed, stage, layer, get_args(Component).index(component)])
            order = draw.permutation(units).tolist()
        else:
            keys = [table[name].to_numpy(float) for name in ("activation", score)]
            order = np.lexsort(keys).tolist()  # by the last key first; stable, so ties keep the order of units
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


def unit_counts(
    units: int, component: Component, config: ApexConfig, *, stage: int = 0, spent: int = 0
) -> tuple[int, int]:
    """Count the pairs and the directly tuned units that `select` takes of a component with that many units.

    There are k = ⌊fraction·units⌋ pairs, at least 1, and direct units up to ⌊share·units⌋ that train in all. Where the
    one pair alone exceeds that share, it stays. `spent` counts the targets of earlier stages (`halve_fraction`).

    >>> unit_counts(32, "head", ApexConfig()), unit_counts(11008, "channel", ApexConfig())
    ((6, 6), (2064, 990))
    """
    fraction = math.ldexp(config.fraction, -stage) if config.halve_fraction else config.fraction
    share, align = (config.direct_heads, 1) if component == "head" else (config.direct_channels, config.align)
    pairs = min(max(1, _floor(fraction, units, align)), (units - spent) // 2)
    return pairs, max(spent, _floor(share, units, align) - 2 * pairs)


def selection_stability(first: ExpansionPlan, second: ExpansionPlan, *, level: float = 0.01) -> pd.DataFrame:
    """Compare two plans for one model: made from two halves of the data, say, or by two statistics.

    One row per layer, component and role ("source", "target"): sizes of both sets, their overlap and Jaccard index, the
    index expected of two independent random sets of these sizes (`chance`, exact, from the hypergeometric distribution
    of the overlap) and the probability of at least this overlap between those (`p_value`).
    A selection is called `noise` if `p_value` exceeds `level`, or if less than a tenth of the way from chance to
    identity is covered: (jaccard − chance) / (1 − chance) < 0.1. Few units can never be told from chance.

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
    possible = range(max(0, first + second - units), min(first, second) + 1)
    weights = [_log_choose(first, s) + _log_choose(units - first, second - s) for s in possible]
    total = _log_choose(units, second)
    chances = [math.exp(weight - total) for weight in weights]
    expected = math.fsum(p * s / (first + second - s) for p, s in zip(chances, possible, strict=True))
    return expected, min(1.0, math.fsum(p for p, s in zip(chances, possible, strict=True) if s >= overlap))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _floor(share: float, units: int, align: int) -> int:
    count = math.floor(share * units + 1e-9)  # 0.29 · 100 is 28.999…
    return count - count % align if count >= align else count


def _earlier_targets(previous: Sequence[ExpansionPlan], layer: int, component: str, units: int) -> set[int]:
    plans = [plan for stage in previous for plan in stage.layers if (plan.layer, plan.component) == (layer, component)]
    if other := [plan.units for plan in plans if plan.units != units]:
        raise ValueError(
            f"previous: layer {layer}, {component} has {units} units, a plan there was made for {other[0]}"
        )
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
    if not (known := statistics["component"].isin(get_args(Component))).all():
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


def _check_type(name: str, value: Any, kind: type) -> None:
    """Refuse a value that is not of `kind`; an int may stand for a float, a bool for nothing else."""
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: need {kind.__name__}, got {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}: need a finite number, got {value}")


def _index(value: Any, name: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= _LARGEST:
        raise ValueError(f"{name}: need an integer from 0 to {_LARGEST}, got {abbreviate(value)}")
    return number


def _indices(values: Any, units: int, name: str) -> tuple[int, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name}: need a tuple of unit numbers, got {type(values).__name__}")
    indices = tuple(_index(value, name) for value in values)
    for first, second in pairwise(indices):
        if first >= second:
            fault = "is repeated" if first == second else f"comes after {first}, need ascending order"
            raise ValueError(f"{name}: unit {second} {fault}")
    if indices and indices[-1] >= units:
        raise ValueError(f"{name}: unit {indices[-1]} is out of range, there are {units}")
    return indices


def _write_json(value: Any, path: str | Path) -> None:
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _read_json(path: str | Path, build: Callable[[Any], Any]) -> Any:
    """Read a file and build from it; whatever is wrong with either, the error names the file."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(value := dict(pairs)) != len(pairs):
            raise ValueError("a key is given twice")
        return value

    try:
        return build(json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once))
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _object(cls: type, value: Any) -> dict[str, Any]:
    """Refuse JSON that is not an object with the fields of `cls`."""
    if not isinstance(value, dict):
        raise ValueError(f"need an object with the fields of {cls.__name__}, got {type(value).__name__}")
    if unknown := sorted(set(value) - {field.name for field in fields(cls)}):
        raise ValueError(f"unknown field {unknown[0]!r} in {cls.__name__}")
    if missing := [field.name for field in fields(cls) if field.default is MISSING and field.name not in value]:
        raise ValueError(f"no field {missing[0]!r} in {cls.__name__}")
    return value


def _build(cls: type, value: Any) -> Any:
    return cls(**_object(cls, value))
