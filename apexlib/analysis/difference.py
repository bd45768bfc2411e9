"""Parameter difference: how unequal units are, what is lost without some, how they move, whether choices agree.

Source: arXiv:2505.24241, section 2: a few heads and channels carry far larger activations than the rest; masking them
hurts more, and stronger models spread their activations more evenly.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from apexlib.activations import unit_table
from apexlib.architectures import Component, model_components
from apexlib.evaluation import perplexity
from apexlib.files import pretrained
from apexlib.plan import ComponentName, ExpansionPlan
from apexlib.progress import progress
from apexlib.selection import units_in_order

Order = Literal["advantageous", "disadvantageous", "random"]


def imbalance_table(statistics: pd.DataFrame) -> pd.DataFrame:
    """Measure how unevenly activations spread over the units of each layer and component.

    Columns: `layer`, `component`, `units`; `cv`, the coefficient of variation std / mean (population std); `cv_norm`,
    that of norms instead of squared ones, as the authors' release has it; `gini`, the Gini coefficient (0: all equal,
    → 1: all in one unit); `above_mean`, the share of units above the mean. A layer without any activation is perfectly
    even: all are 0.

    >>> table = pd.DataFrame({"layer": 0, "component": "head", "unit": range(4), "activation": [1.0, 1.0, 1.0, 5.0]})
    >>> imbalance_table(table).round(3).to_dict("records")  # doctest: +NORMALIZE_WHITESPACE
    [{'layer': 0, 'component': 'head', 'units': 4, 'cv': 0.866, 'cv_norm': 0.409, 'gini': 0.375, 'above_mean': 0.25}]
    """
    rows = []
    for (layer, component), part in statistics.groupby(["layer", "component"], sort=False):
        values = np.sort(part["activation"].to_numpy(dtype=float))
        n, total = len(values), values.sum()
        ranks = np.arange(1, n + 1)
        cv, cv_norm = (each.std() / each.mean() if total else 0.0 for each in (values, np.sqrt(values)))
        gini = max(0.0, ((2 * ranks - n - 1) * values).sum() / (n * total)) if total else 0.0  # rounds below 0
        row = {"layer": layer, "component": component, "units": n, "cv": cv, "cv_norm": cv_norm, "gini": gini}
        rows.append(row | {"above_mean": float((values > values.mean()).mean())})
    return pd.DataFrame(rows)


def masking_curve(
    model: PreTrainedModel,
    statistics: pd.DataFrame,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    fractions: Iterable[float],
    order: Order,
    component: ComponentName = "channel",
    seeds: Iterable[int] = (0,),
) -> pd.DataFrame:
    """Measure the loss of `model` on `batches` while a fraction of its units is silenced in every layer at once.

    Units go in the order in which `select` ranks them (`units_in_order` of the rank score): "advantageous" silences the
    highest first, "disadvantageous" the lowest, "random" draws them anew for each of `seeds` (larger fractions
    contain smaller ones). A silenced unit is set to zero where its output projection reads it, so the rest of the
    model, and all weights, stay as they are. A fraction above 0 silences at least one unit.

    Columns: `component`, `order`, `seed`, `fraction` (asked for), `units` (silenced per layer), `share` (they are),
    `loss` (nats per token), `increase` (over the unmasked model).
    """
    fractions = list(fractions)
    if bad := [fraction for fraction in fractions if not 0 <= fraction <= 1]:
        raise ValueError(f"fractions {bad}: need values from 0 to 1")
    if order not in ("advantageous", "disadvantageous", "random"):
        raise ValueError(f"order {order!r}: need 'advantageous', 'disadvantageous' or 'random'")
    parts = [part for part in model_components(model) if part.component == component]
    if not parts:
        raise ValueError(f"{model.config.model_type} has no units of component {component!r}")
    base = perplexity(model, batches, quiet=True)["loss"]
    runs = [(seed, fraction) for seed in (seeds if order == "random" else (0,)) for fraction in fractions]
    rows = []
    for seed, fraction in progress(runs, f"masking {order} {component}s"):
        count = masked_count(parts[0], fraction)
        chosen = {part.layer: masked_first(statistics, part, order, seed)[:count] for part in parts}
        with silenced(model, parts, chosen):
            loss = perplexity(model, batches, quiet=True)["loss"] if count else base
        row = {"component": component, "order": order, "seed": seed, "fraction": fraction, "units": count}
        rows.append(row | {"share": count / parts[0].units, "loss": loss, "increase": loss - base})
    return pd.DataFrame(rows)


@contextmanager
def silenced(model: PreTrainedModel, parts: Iterable[Component], units: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Set the outputs of `units[layer]` to zero inside the block; weights stay as they are.

    `parts` are the heads or the channels of `model_components(model)`, one part per layer; a layer that `units` leaves
    out stays as it is. A unit is silenced where its output projection reads it, in training and in evaluation mode.
    """
    with ExitStack() as hooks:
        for part in parts:
            chosen = list(units.get(part.layer, ()))
            if unknown := [unit for unit in chosen if not 0 <= unit < part.units]:
                raise ValueError(f"layer {part.layer} has no {part.component} {unknown[0]}: need 0 to {part.units - 1}")
            module = model.get_submodule(part.reader.module)
            keep = torch.ones(part.reader.index.numel(), dtype=module.weight.dtype)
            keep[part.reader.index[chosen].flatten()] = 0
            hooks.enter_context(module.register_forward_pre_hook(partial(_masked, keep)))
        yield


def _masked(keep: Float[Tensor, " n"], _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0] * keep.to(inputs[0].device), *inputs[1:]  # between passes the module may be on no device


def weight_difference(base: PreTrainedModel | str | Path, tuned: PreTrainedModel | str | Path) -> pd.DataFrame:
    """Measure how far each unit's weights moved from `base` to `tuned`, two models or folders of one architecture.

    A unit's weights w are all its slices (query, key, value, output of a head; gate, up, down of a channel), biases
    left out. Columns: `layer`, `component`, `unit` (numbered as in the model); `change`, ‖w_tuned − w_base‖;
    `relative`, that over ‖w_base‖; `cosine`, ⟨w_base, w_tuned⟩ / ‖w_base‖ ‖w_tuned‖. Sums are in float64; what is
    undefined (weights that are all zero) is NaN.
    """
    before, after = (_loaded(source) for source in (base, tuned))
    parts = model_components(before)
    if _layout(parts) != _layout(model_components(after)):
        raise ValueError("base and tuned have different layers or units: need two versions of one model")
    tables = []
    for part in parts:
        sums = torch.zeros(4, part.units, dtype=torch.float64)
        for slot in part.slots.values():
            old, new = (model.get_submodule(slot.module).weight.detach().double().cpu() for model in (before, after))
            if old.shape != new.shape:
                raise ValueError(f"{slot.module}: {tuple(old.shape)} in base, {tuple(new.shape)} in tuned")
            products = ((new - old).square(), old.square(), new.square(), old * new)
            sums += torch.stack([each.sum(1 - slot.axis)[slot.index].sum((1, 2)) for each in products])
        (change, old_norm, new_norm), product = sums[:3].sqrt(), sums[3]
        cosine = product / (old_norm * new_norm)
        tables.append(unit_table(part, change=change, relative=change / old_norm, cosine=cosine))
    return pd.concat(tables, ignore_index=True)


def biography(plans: Sequence[ExpansionPlan]) -> pd.DataFrame:
    """Tell the role of every unit in every stage: "source", "target", "direct" or "frozen".

    Columns: `layer`, `component`, `unit`, `stage`, `role`; every layer and component that any of the plans names, its
    units numbered as in the model.

    >>> from apexlib.plan import LayerPlan
    >>> layers = [LayerPlan(0, "head", source=(1 - stage,), target=(stage,), direct=(), units=3) for stage in (0, 1)]
    >>> plans = [ExpansionPlan((layer,), stage=stage) for stage, layer in enumerate(layers)]
    >>> biography(plans).pivot(index="unit", columns="stage", values="role").values.tolist()
    [['target', 'source'], ['source', 'target'], ['frozen', 'frozen']]
    """
    if not plans or len({plan.stage for plan in plans}) < len(plans):
        raise ValueError(f"plans of stages {[plan.stage for plan in plans]}: need at least one, of one run, each once")
    units: dict[tuple[int, str], int] = {}
    for part in (part for plan in plans for part in plan.layers):
        if units.setdefault((part.layer, part.component), part.units) != part.units:
            raise ValueError(f"layer {part.layer}, {part.component}: plans differ in its units; need one model's")
    roles = {
        (part.layer, part.component, unit, plan.stage): role
        for plan in plans
        for part in plan.layers
        for role in ("source", "target", "direct")
        for unit in getattr(part, role)
    }
    each = [(*where, unit) for where, count in sorted(units.items()) for unit in range(count)]
    rows = [(*unit, plan.stage, roles.get((*unit, plan.stage), "frozen")) for plan in plans for unit in each]
    return pd.DataFrame(rows, columns=["layer", "component", "unit", "stage", "role"])


def selection_stability(first: ExpansionPlan, second: ExpansionPlan, *, level: float = 0.01) -> pd.DataFrame:
    """Compare two plans for one model: made from two halves of the data, say, or by two statistics.

    One row per layer, component and role ("source", "target"): sizes of both sets, their overlap and Jaccard index, the
    index expected of two independent random sets of these sizes (`chance`, exact, from the hypergeometric distribution
    of the overlap) and the probability of at least this overlap between those (`p_value`).
    A selection is called `noise` if `p_value` exceeds `level`, or if less than a tenth of the way from chance to
    identity is covered: (jaccard − chance) / (1 − chance) < 0.1. Few units can never be told from chance.

    >>> from apexlib.plan import LayerPlan
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


def _loaded(source: PreTrainedModel | str | Path) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        return source
    if not Path(source).is_dir():
        raise FileNotFoundError(f"{source}: need a model or a folder with one")
    return pretrained(AutoModelForCausalLM, source, dtype="auto")


def _layout(parts: Iterable[Component]) -> list[tuple[str, torch.Size]]:
    return [(slot.module, slot.index.shape) for part in parts for slot in part.slots.values()]


def masked_count(part: Component, fraction: float) -> int:
    """How many units of a layer a fraction is: at least one above 0."""
    return max(1, math.floor(fraction * part.units + 1e-9)) if fraction else 0


def masked_first(statistics: pd.DataFrame, part: Component, order: Order, seed: int) -> list[int]:
    """List the units of a layer in an order of `masking_curve`."""
    rows = statistics[(statistics["layer"] == part.layer) & (statistics["component"] == part.component)]
    if sorted(rows["unit"]) != list(range(part.units)):
        raise ValueError(
            f"statistics have {len(rows)} {part.component}s for layer {part.layer}; the model has {part.units}"
        )
    if order == "random":
        return np.random.default_rng([seed, part.layer]).permutation(part.units).tolist()
    ascending = units_in_order(rows, "rank_score")
    return ascending if order == "disadvantageous" else ascending[::-1]


def _by_chance(units: int, first: int, second: int, overlap: int) -> tuple[float, float]:
    """Expected Jaccard index, and probability of at least `overlap`, of two random sets of `units` things."""
    from scipy.stats import hypergeom

    common = hypergeom(units, first, second)
    possible = np.arange(max(0, first + second - units), min(first, second) + 1)
    expected = (common.pmf(possible) * possible / (first + second - possible)).sum()
    return float(expected), float(common.sf(overlap - 1))
