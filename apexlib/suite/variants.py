"""The methods that experiments compare, by name: each is a training method with its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from apexlib.operators import OPERATORS
from apexlib.plan import ApexConfig
from apexlib.training.methods import METHODS, Name


@dataclass(frozen=True)
class Variant:
    """A method with its settings: what is compared with what."""

    method: Name
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of ApexConfig away from their defaults
    options: Mapping[str, Any] = field(default_factory=dict)  # of `method_of`

    def config(self, *, stages: int, seed: int, samples: int) -> ApexConfig:
        """Settings of a run; a variant's own number of stages goes before `stages`."""
        return replace(ApexConfig(stages=stages, seed=seed, assessment_samples=samples), **self.changes)


_SMALL = {name: value for name, value in vars(ApexConfig.preset("2.4%")).items() if value != vars(ApexConfig())[name]}

VARIANTS: dict[str, Variant] = {
    # "direct": the rows of "apex", without operators; "apex": the paper's 52 %
    **{name: Variant(name) for name in METHODS if name != "apex"},
    "apex": Variant("apex"),
    "apex-2.4%": Variant("apex", _SMALL),
    "apex-all": Variant("apex", {"direct_heads": 1.0, "direct_channels": 1.0, "train_norms": True}),  # every weight
    # ablations of "apex", one thing changed each
    **{name: Variant("apex", {"strategy": name}) for name in ("random", "reversed", "magnitude")},
    "no-operator": Variant("direct"),
    **{name: Variant("apex", {"operator": name}) for name in OPERATORS if name != "monarch"},
    **{f"stages-{stages}": Variant("apex", {"stages": stages}) for stages in (1, 2, 3, 4)},
    "halve": Variant("apex", {"stages": 3, "halve_fraction": True}),  # one thing changed from "stages-3"
    **{name: Variant("apex", {"statistic": name}) for name in ("mean", "ema", "ema_rank")},
    **{f"operator-lr-{scale:g}": Variant("apex", {"operator_lr_scale": scale}) for scale in (4.0, 10.0)},
    "balance": Variant("apex", {"balance_weight": 0.01}),
}
