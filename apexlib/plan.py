"""The data of a run: its settings, and which units expand into which others (APEX, arXiv:2505.24241).

Frozen dataclasses without tensors, JSON both ways. `selection` makes a plan, `expansion` carries it out.
"""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import combinations, pairwise
from operator import index
from pathlib import Path
from reprlib import repr as abbreviate
from typing import Any, Literal, Self, get_args

from apexlib.files import write_json

ComponentName = Literal["head", "channel"]
COMPONENTS: tuple[ComponentName, ...] = get_args(ComponentName)
FFN_FORMS = ("split", "fused", "recompute")  # kept for backward: all of plain autograd, pre-activations, only the input

_LEAST = {"stages": 1, "assessment_samples": 1, "align": 1, "balance_weight": 0, "operator_lr_scale": 0}
_CHOICES = {
    "ffn": FFN_FORMS,
    "strategy": ("advantage", "random", "reversed", "magnitude", "gradient"),
    "statistic": ("rank", "mean", "ema", "ema_rank"),
}


class _Json:
    """A dataclass that is JSON in a file; whatever is wrong with one, the error names the file."""

    def to_json(self, path: str | Path) -> None:
        """Write all fields to a file."""
        write_json(asdict(self), Path(path))

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read and validate; absent fields take their default, where they have one, unknown ones are refused."""

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len(value := dict(pairs)) != len(pairs):
                raise ValueError("a key is given twice")
            return value

        try:
            return cls._built_of(json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once))
        except (ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _built_of(cls, value: Any) -> Self:
        if not isinstance(value, dict):
            raise ValueError(f"need an object with the fields of {cls.__name__}, got {type(value).__name__}")
        if unknown := sorted(set(value) - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown field {unknown[0]!r} in {cls.__name__}")
        if missing := [field.name for field in fields(cls) if field.default is MISSING and field.name not in value]:
            raise ValueError(f"no field {missing[0]!r} in {cls.__name__}")
        return cls(**value)


@dataclass(frozen=True)
class ApexConfig(_Json):
    """Settings of a run; the defaults are the paper's for instruction tuning, and its "52 %" (see `preset`).

    Which units, with n heads or channels in a layer:

    - `fraction`: K, the share of them that is source, and as many target: ⌊K·n⌋; in (0, 0.5]. 0.1875: 6 of 32 heads.
    - `direct_heads`: share of heads that train in all, source and target included; from 2K to 1.
    - `direct_channels`: the same of channels; from 2K to 1.
    - `strategy`: how units are chosen (see `select`): "advantage" (the paper's), "random", "reversed", "magnitude" or
      "gradient".
    - `statistic`: what "advantage" and "reversed" rank by: "rank" (the paper's), "mean", "ema" or "ema_rank".
    - `assessment_samples`: sequences in the pass before the first stage that ranks units; at least 1. The paper: 10³
      to 10⁴.
    - `spread_heads`: where a share is less than a pair a layer, put pairs in so many layers, drawn at random.
    - `align`: round numbers of channels down to a multiple of it, as hardware multiplies them well, in a layer that has
      64 times as many or more; 1 is the paper's ⌊K·n⌋, which `preset` has.
    - `halve_fraction`: halve K at each stage; earlier targets stay directly tuned, never selected again.

    What trains in them, and how:

    - `stages`: how often units are assessed, expanded, trained and fused, in equal parts of the run; at least 1. The
      paper: 2 to 4.
    - `operator`: the form of M, a name in `OPERATORS`: "monarch" (the paper's), "monarch_release", "diagonal",
      "low_rank" or "dense".
    - `operator_lr_scale`: learning rate of M, v and s over that of the weights; at least 0.
    - `decay_to_start`: weight decay draws weights to their stage's start, not to zero.
    - `balance_weight`: λ of the loss term that evens activations out; at least 0, the default: none.
    - `train_embeddings`: train the embeddings and the LM head too.
    - `train_norms`: train the norms too.
    - `train_queries`: train queries and keys of heads that train.
    - `train_rows`: train the rows of units; without them only M, v and s train.
    - `ffn`: the form in which a gated FFN trains, "fused", "split" or "recompute", by memory and time: see `expand`.
    - `seed`: of what is drawn at random; from 0.

    >>> ApexConfig(operator="butterfly")
    Traceback (most recent call last):
    ValueError: operator: unknown 'butterfly'; known: monarch, monarch_release, diagonal, low_rank, dense
    """

    fraction: float = 0.1875
    direct_heads: float = 0.5625
    direct_channels: float = 0.465
    stages: int = 2
    operator: str = "monarch"
    strategy: str = "advantage"
    statistic: str = "rank"
    balance_weight: float = 0.0
    operator_lr_scale: float = 1.0
    decay_to_start: bool = False
    assessment_samples: int = 1024
    train_embeddings: bool = True
    train_norms: bool = False
    train_queries: bool = True
    train_rows: bool = True
    spread_heads: bool = False
    ffn: str = "fused"
    halve_fraction: bool = False
    align: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            allowed = (int, float) if kind is float else kind  # an int may stand for a float, a bool for nothing else
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{name}: need {kind.__name__}, got {type(value).__name__}")
            if kind is float and not math.isfinite(value):
                raise ValueError(f"{name}: need a finite number, got {value}")
        for name, known in (("operator", _operators(self.operator)), *_CHOICES.items()):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}: unknown {value!r}; known: {', '.join(known)}")
        if not 0 < self.fraction <= 0.5:
            raise ValueError(f"fraction: need a share in (0, 0.5], so that source and target fit, got {self.fraction}")
        for name in ("direct_heads", "direct_channels"):
            if not 2 * self.fraction <= (share := getattr(self, name)) <= 1:
                least = f"{2 * self.fraction:g} (2·fraction: source and target train)"
                raise ValueError(f"{name}: need a total share from {least} to 1, got {share}")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}: need at least {least}, got {value}")
        _index(self.seed, "seed")

    @classmethod
    def preset(cls, name: Literal["52%", "2.4%"]) -> Self:
        """Settings for a trainable share of LLaMA-2-7B: d = 4096, 32 layers of 32 heads and 11008 channels, untied.

        A head is 4·128·d weights (q, k, v, o), a channel 3·d (gate, up, down); the whole model is 6 738 415 616.
        "52%", the paper's: 18 heads (6 source, 6 target, 6 direct) and 5118 channels (2064, 2064, 990) in each layer,
        embeddings and LM head. 1 207 959 552 + 2 012 479 488 + 262 144 000, and 7 633 920 in M, v and s: 51.8 %.
        "2.4%", a reading of what the paper does not spell out: 3 % of the channels (165 pairs in each layer) and of the
        heads, without queries and keys (15 pairs, in 15 of the layers), nothing else. 129 761 280 + 31 457 280, and
        203 040 in M, v and s: 2.40 %. On another model `config_for_share` finds what gives that share.
        """
        sizes = {"52%": cls(align=1), "2.4%": cls().of_size(0.03)}
        if name not in sizes:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(sizes)}")
        return sizes[name]

    def of_size(self, ratio: float) -> Self:
        """These settings with that ratio of heads and channels in pairs, unrounded, and nothing else trained."""
        shares = {"fraction": ratio / 2, "direct_heads": ratio, "direct_channels": ratio}
        alone = {"train_embeddings": False, "train_norms": False, "train_queries": False, "spread_heads": True}
        return replace(self, align=1, **shares, **alone)


@dataclass(frozen=True)
class LayerPlan(_Json):
    """Units of one layer to read from (`source`), to overwrite (`target`) and to tune directly (`direct`).

    Each is in ascending order, the model's own; the i-th lowest source is paired with the i-th lowest target. `units`
    is how many the layer has. Source and target may both be empty: such a layer is tuned directly only.

    >>> LayerPlan(layer=0, component="head", source=(1, 3), target=(0, 3), direct=(), units=4)
    Traceback (most recent call last):
    ValueError: layer 0, head: units [3] are both source and target
    """

    layer: int
    component: ComponentName
    source: tuple[int, ...]
    target: tuple[int, ...]
    direct: tuple[int, ...]
    units: int

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise ValueError(f"component: unknown {self.component!r}; known: {', '.join(COMPONENTS)}")
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
class ExpansionPlan(_Json):
    """A `LayerPlan` for every layer and component that expands, in ascending order, and what it was made with.

    Whether it fits a model is for `expand` to check.
    """

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

    @classmethod
    def _built_of(cls, value: Any) -> Self:
        if isinstance(value, dict):
            value = dict(value)
            if isinstance(value.get("layers"), list):
                value["layers"] = tuple(LayerPlan._built_of(layer) for layer in value["layers"])
            if value.get("config") is not None:
                value["config"] = ApexConfig._built_of(value["config"])
        return super()._built_of(value)


def _operators(asked: str) -> tuple[str, ...]:
    """Names of the operators; only the default is known without asking their registry, which loads torch."""
    if asked == ApexConfig.operator:
        return (asked,)
    from apexlib.operators import OPERATORS

    return tuple(OPERATORS)


def _index(value: Any, name: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**31:
        raise ValueError(f"{name}: need an integer from 0 to {2**31 - 1}, got {abbreviate(value)}")
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
