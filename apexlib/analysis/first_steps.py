"""The first steps of training after an expansion, under any settings: real ones, each taken once."""

import copy
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from apexlib.activations import activation_statistics
from apexlib.analysis.budget import calibrate, plan_budget
from apexlib.analysis.spectrum import measures, singular_values
from apexlib.architectures import model_components
from apexlib.evaluation import perplexity
from apexlib.expansion import expand
from apexlib.inspection import parameter_groups, trainable_table
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.selection import select

STEPS = (0, 1, 2, 4, 8, 16, 32)  # after which the weights are kept
_RUNS = 4  # settings whose weights are kept
_EXPANDS = ("operator", "train_embeddings", "train_norms", "train_queries", "train_rows", "ffn", "seed")


class _Run(NamedTuple):
    model: PreTrainedModel
    optimizer: Optimizer
    states: dict[int, dict[str, Tensor]]  # what trains, by the steps taken


class FirstSteps:
    """A model and what AdamW makes of it in a few steps on `batches`, taken in turn, once it is expanded.

    `statistics` rank the units (default: taken on the batches). The model itself stays as it is; what trains is kept at
    each of `STEPS`, for the last four settings asked for: for models of which there is room for so many copies.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, Tensor]],
        statistics: pd.DataFrame | None = None,
        *,
        learning_rate: float = 1e-3,
    ) -> None:
        self.model, self.learning_rate = model, learning_rate
        self.batches = [{name: each.to(model.device) for name, each in batch.items()} for batch in batches]
        if not self.batches or any("input_ids" not in batch for batch in self.batches):
            raise ValueError(f"batches: {len(self.batches)} of them; need one or more, each with input_ids")
        self.batches = [{"labels": batch["input_ids"], **batch} for batch in self.batches]
        self.statistics = activation_statistics(model, self.batches) if statistics is None else statistics
        slots = [(slot.module, part) for part in model_components(model) for slot in part.slots.values()]
        self.parts = dict(slots)  # the component of each projection
        self.loss = perplexity(model, self.batches[:1])["loss"]  # before any step
        self._runs: dict[ApexConfig, _Run] = {}
        self._measured: dict[tuple, tuple[dict[str, np.ndarray], dict[str, object]]] = {}
        self.budget, self._speed = cache(self.budget), cache(calibrate)

    def plan(self, config: ApexConfig) -> ExpansionPlan:
        """Select units as the method does in its first stage."""
        return select(self.statistics, config)

    def after(self, config: ApexConfig, steps: int) -> PreTrainedModel:
        """Return the model expanded under `config` after so many steps, one of `STEPS`; good until the next call."""
        if steps not in STEPS:
            raise ValueError(f"steps {steps}: need one of {', '.join(map(str, STEPS))}")
        run = self._runs.pop(config, None) or self._started(config)
        if steps not in run.states:
            _load(run.model, run.states[taken := max(run.states)])
            for step in range(taken + 1, steps + 1):  # an interrupted run is lost, its optimizer would be ahead
                with torch.enable_grad():
                    run.model.train()(**self.batches[(step - 1) % len(self.batches)]).loss.backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
                if step in STEPS:
                    run.states[step] = _kept(run.model)
        self._runs[config] = run
        while len(self._runs) > _RUNS:
            del self._runs[next(iter(self._runs))]
        return _load(run.model, run.states[steps]).eval()

    def measured(
        self, config: ApexConfig, steps: int, weight: str
    ) -> tuple[dict[str, Float[Tensor, "rows columns"]], dict[str, Float[np.ndarray, " rank"]], dict[str, object]]:
        """Return W, ΔW and M (where units are paired) of a projection, their singular values, and the table's row.

        M is that of all projections of the layer's heads or channels but queries and keys.
        """
        model, key = self.after(config, steps), (config, steps, weight)
        module, before = model.get_submodule(weight), self.model.get_submodule(weight).weight.detach()
        with torch.no_grad():
            found = {"W": module.weight, "ΔW": module.weight - before}
            if (mixer := getattr(module, "mixer", None)) is not None:
                found["M"] = mixer.operator.dense()
        if key not in self._measured:
            sigma = {name: singular_values(each) for name, each in found.items()}
            self._measured[key] = sigma, self._row(model, config, steps, weight, sigma)
        return found, *self._measured[key]

    def _row(
        self, model: PreTrainedModel, config: ApexConfig, steps: int, weight: str, sigma: Mapping[str, np.ndarray]
    ) -> dict[str, object]:
        own = ("fraction", "direct_heads", "direct_channels", "operator")
        row = {name: getattr(config, name) for name in own} | {"steps": steps, "weight": weight}
        had = {name: measures(each) for name, each in sigma.items()}
        row |= {f"{name}_{each}": had[name][each] for name in had for each in ("frobenius", "effective_rank")}
        counts = trainable_table(model)
        row |= {"trainable": counts["trainable"].sum(), "share": counts["trainable"].sum() / counts["total"].sum()}
        row["loss"] = perplexity(model, self.batches[:1])["loss"]
        return row | self.budget("apex", config)[["train_mib", "seconds_per_step"]].to_dict()

    def budget(self, method: str, config: ApexConfig | None = None) -> pd.Series:
        """Predict what a run of a method on such batches needs: the row of `plan_budget`."""
        batch, length = self.batches[0]["input_ids"].shape
        shape, speed = self.model.config, self._speed(self.model.device)
        return plan_budget(shape, config, batch=batch, length=length, methods=[method], flops_per_second=speed).iloc[0]

    @property
    def table(self) -> pd.DataFrame:
        """Everything measured so far, a row per settings, steps and projection.

        Columns: the settings; `steps`, `weight`; Frobenius norm and effective rank of W, ΔW and M, such as
        `ΔW_effective_rank`; what trains, M, v and s included, and its share of the plain model's parameters; `loss` on
        the first batch in nats per token; `train_mib` and `seconds_per_step`, predicted by `plan_budget`.
        """
        return pd.DataFrame([row for _, row in self._measured.values()])

    def _started(self, config: ApexConfig) -> _Run:
        plan = self.plan(config)
        model = expand(copy.deepcopy(self.model), plan, **{name: getattr(config, name) for name in _EXPANDS})
        groups = parameter_groups(model, self.learning_rate, operator_lr_scale=config.operator_lr_scale)
        return _Run(model, AdamW(groups), {0: _kept(model)})


def _kept(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


@torch.no_grad()
def _load(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    for name, each in state.items():
        model.get_parameter(name).copy_(each)
    return model
