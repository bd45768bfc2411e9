"""The methods that experiments compare, by name: each is a training method with its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from apexlib.plan import ApexConfig
from apexlib.training.methods import Name

_SMALL = ApexConfig.preset("2.4%")


@dataclass(frozen=True)
class Variant:
    """A method with its settings: what is compared with what."""

    method: Name
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of ApexConfig away from their defaults
    options: Mapping[str, Any] = field(default_factory=dict)  # of `method_of`

    def config(self, *, stages: int, seed: int, samples: int) -> ApexConfig:
        """Settings of a run; a variant's own number of stages goes before `stages`."""
        return replace(ApexConfig(stages=stages, seed=seed, assessment_samples=samples), **self.changes)


_EVERYTHING = {"direct_heads": 1.0, "direct_channels": 1.0, "train_norms": True}

VARIANTS: dict[str, Variant] = {
    "full": Variant("full"),
    "lora": Variant("lora"),
    "hft": Variant("hft"),
    "gmt": Variant("gmt"),
    "direct": Variant("direct"),  # the rows of "apex", without operators
    "apex": Variant("apex"),  # the paper's 52 %
    "apex-2.4%": Variant(
        "apex",
        {name: getattr(_SMALL, name) for name in ("fraction", "direct_heads", "direct_channels", "train_embeddings")},
    ),
    "apex-all": Variant("apex", _EVERYTHING),  # operators, and every weight trains
    # ablations of "apex", one thing changed each
    "random": Variant("apex", {"strategy": "random"}),
    "reversed": Variant("apex", {"strategy": "reversed"}),
    "magnitude": Variant("apex", {"strategy": "magnitude"}),
    "no-operator": Variant("direct"),
    "diagonal": Variant("apex", {"operator": "diagonal"}),
    "low_rank": Variant("apex", {"operator": "low_rank"}),
    "dense": Variant("apex", {"operator": "dense"}),
    **{f"stages-{stages}": Variant("apex", {"stages": stages}) for stages in (1, 2, 3, 4)},
    "halve": Variant("apex", {"stages": 3, "halve_fraction": True}),  # one thing changed from "stages-3"
    **{name: Variant("apex", {"statistic": name}) for name in ("mean", "ema", "ema_rank")},
    "operator-lr-4": Variant("apex", {"operator_lr_scale": 4.0}),
    "operator-lr-10": Variant("apex", {"operator_lr_scale": 10.0}),
    "balance": Variant("apex", {"balance_weight": 0.01}),
}
