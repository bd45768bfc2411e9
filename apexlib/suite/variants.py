"""The methods that experiments compare, by name: each is a training method with its settings."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from apexlib.analysis.budget import config_for_share, lora_rank_for_share, trained_share
from apexlib.operators import OPERATORS
from apexlib.plan import ApexConfig
from apexlib.training.methods import METHODS, Name, method_of


@dataclass(frozen=True)
class Variant:
    """A method with its settings: what is compared with what."""

    method: Name
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of ApexConfig away from their defaults
    options: Mapping[str, Any] = field(default_factory=dict)  # of `method_of`
    share: float | None = None  # of the parameters that train: what LoRA of the rank `_rank` trains
    rate: float = 1.0  # its learning rates, in units of those of a comparison
    rate_of: str | None = None  # a variant whose chosen rate it takes, where both are compared
    length: float | None = None  # of continued pre-training: the share of its steps over which the rate falls to zero

    def config(self, *, stages: int, seed: int, samples: int, shape: PretrainedConfig) -> ApexConfig:
        """Settings of a run; a variant's own number of stages goes before `stages`. A share needs the model's shape."""
        config = replace(ApexConfig(stages=stages, seed=seed, assessment_samples=samples), **self.changes)
        if self.share is None or self.method == "lora":
            return config
        found = _once(_config_beside_lora, shape, self.share, replace(config, seed=0))
        return replace(found, seed=seed)

    def method_options(self, shape: PretrainedConfig) -> Mapping[str, Any]:
        """Options of the method, with the rank that gives LoRA its share."""
        rank = self.share is not None and self.method == "lora"
        return {**self.options, "lora_rank": _once(_rank, shape, self.share)} if rank else self.options


_solved: dict[tuple[Any, ...], Any] = {}  # a process trains by one share again and again


def _once(solve: Callable[..., Any], shape: PretrainedConfig, *given: Any) -> Any:
    """Solve for a share of a model of that shape, or take what was found before."""
    key = (solve, shape.to_json_string(), *given)
    if key not in _solved:
        _solved[key] = solve(shape, *given)
    return _solved[key]


def _rank(shape: PretrainedConfig, share: float) -> int:
    """The rank of LoRA that comes nearest to the share, of those that rows of units can train as much as."""
    nearest = lora_rank_for_share(shape, share)
    for rank in sorted(range(1, 2 * nearest), key=lambda rank: abs(rank - nearest)):
        with suppress(ValueError):
            config_for_share(shape, trained_share(shape, method_of("lora", ApexConfig(), lora_rank=rank)))
            return rank
    raise ValueError(f"share {share}: no rank of LoRA below {2 * nearest} trains as much as pairs of units may")


def _config_beside_lora(shape: PretrainedConfig, share: float, config: ApexConfig) -> ApexConfig:
    """Settings like `config` that train as much as LoRA of the rank for the share."""
    lora = method_of("lora", config, lora_rank=_once(_rank, shape, share))
    return config_for_share(shape, trained_share(shape, lora), config)


# What is compared in fine-tuning trains matrices of layers, no embeddings or norms: half of them, or all in "full".
# The less of a model trains, the larger the steps that it needs: `_RATES` bring all methods into one grid.
_ALIKE = {"matrices_only": True, "lora_scale": 8.0}
_DORA = {"lora_dora": True}
_HALF = {"direct_heads": 0.5, "direct_channels": 0.5, "train_embeddings": False}
_RATES = {"apex": 2.0, "direct": 2.0, "hft": 2.0, "lora": 2.0}
_RATE_OF = {"restart": "full", "gmt": "full", "direct": "apex"}  # each one thing changed
_BY_SHARE = {
    "2.4%": {"apex": 30.0, "direct": 30.0, "lora": 6.0, "dora": 6.0},
    "10%": {"apex": 7.0, "direct": 7.0, "lora": 3.0, "dora": 3.0},
    "25%": {"apex": 3.0, "direct": 3.0, "lora": 2.0, "dora": 2.0},
}
_BY_ROWS = {"75%": 1.5, "100%": 1.0}  # of rows that train, instead of half of them; all without operators: "restart"
_STRATEGIES = ("random", "reversed", "magnitude", "gradient")
_EVERYTHING = {  # continued pre-training: every weight trains, and APEX has operators on top
    "full-all": Variant("full"),
    "apex-all": Variant("apex", {"fraction": 0.125, "direct_heads": 1.0, "direct_channels": 1.0, "train_norms": True}),
    "restart-all": Variant("restart", rate_of="full-all"),
}


def settings_of(name: str) -> dict[str, Any]:
    """All that decides what a variant trains, its name beside it: a run that is given these needs no other variant."""
    return {"name": name, **asdict(replace(VARIANTS[name], rate_of=None))}


def _half(method: Name = "apex", **changes: Any) -> Variant:
    return Variant(method, _HALF | changes, _ALIKE if method == "direct" else {}, rate=_RATES["apex"], rate_of="apex")


VARIANTS: dict[str, Variant] = {
    # "direct": the rows of "apex", without operators
    **{name: Variant(name, _HALF, _ALIKE, rate=_RATES.get(name, 1.0), rate_of=_RATE_OF.get(name)) for name in METHODS},
    "dora": Variant("lora", _HALF, _ALIKE | _DORA, rate=_RATES["lora"]),
    **{
        f"{name}-{share}": Variant(method, options=options, share=float(share[:-1]) / 100, rate=rate, rate_of=leader)
        for share, rates in _BY_SHARE.items()
        for name, rate in rates.items()
        for method, options in [("lora", _ALIKE | _DORA) if name == "dora" else (name, _ALIKE)]
        for leader in [f"apex-{share}" if name == "direct" else None]
    },
    "operator-2.4%": Variant("apex", {"train_rows": False}, share=0.024, rate=30.0),  # rows stay
    **{
        f"operator-lr-{scale:g}-2.4%": Variant(
            "apex", {"operator_lr_scale": scale}, share=0.024, rate=30.0, rate_of="apex-2.4%"
        )
        for scale in (0.1, 3.0, 10.0, 100.0)
    },
    **{
        f"{name}-rows-{rows}": Variant(
            name,
            _HALF | dict.fromkeys(("direct_heads", "direct_channels"), float(rows[:-1]) / 100),
            _ALIKE if name == "direct" else {},
            rate=rate,
            rate_of=f"apex-rows-{rows}" if name == "direct" else None,
        )
        for rows, rate in _BY_ROWS.items()
        for name in (("apex", "direct") if rows != "100%" else ("apex",))
    },
    **_EVERYTHING,
    **{  # runs of their own lengths, each with a rate of its own that falls to zero at its end
        f"{name}-{length:.0%}": replace(every, length=length, rate_of=None)
        for name, every in _EVERYTHING.items()
        for length in (1 / 6, 1 / 3, 2 / 3, 1.0)
    },
    # ablations of "apex", one thing changed each
    **{name: _half(strategy=name) for name in _STRATEGIES},
    "no-operator": _half("direct"),
    **{f"direct-{name}": _half("direct", strategy=name) for name in _STRATEGIES},
    "direct-random-1": _half("direct", strategy="random", stages=1),  # of the rows of the first stage only
    **{name: _half(operator=name) for name in OPERATORS if name != "monarch"},
    **{f"stages-{stages}": _half(stages=stages) for stages in (1, 2, 3, 4)},
    "halve": _half(stages=3, halve_fraction=True),  # one thing changed from "stages-3"
    **{name: _half(statistic=name) for name in ("mean", "ema", "ema_rank")},
    **{f"operator-lr-{scale:g}": _half(operator_lr_scale=scale) for scale in (0.1, 4.0, 10.0, 100.0)},
    "balance": _half(balance_weight=0.01),
}

# From full fine-tuning to APEX, one thing changed at a time: of each step, which two are compared. They add up.
STEPS = {
    "half, at random": ("full", "direct-random-1"),
    "others in stage 2": ("direct-random-1", "direct-random"),
    "by advantage": ("direct-random", "direct"),
    "operators": ("direct", "apex"),
    "all: APEX": ("full", "apex"),
}
