"""Parameter difference: how unequal units are, and how much a model loses without some of them (METHOD 1 of APEX).

Source: arXiv:2505.24241, section 2: a few heads and channels carry far larger activations than the rest; masking them
hurts more, and stronger models spread their activations more evenly.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from apexlib.architectures import Component, Kind, model_components
from apexlib.evaluation import perplexity
from apexlib.records import progress

Order = Literal["advantageous", "disadvantageous", "random"]


def imbalance_table(statistics: pd.DataFrame) -> pd.DataFrame:
    """Measure how unevenly activations spread over the units of each layer and component.

    Columns: `layer`, `component`, `units`; `cv`, the coefficient of variation std / mean (population std); `gini`, the
    Gini coefficient (0: all equal, → 1: all in one unit); `above_mean`, the share of units above the mean. A layer
    without any activation is perfectly even: cv = gini = above_mean = 0.

    >>> table = pd.DataFrame({"layer": 0, "component": "head", "unit": range(4), "activation": [1.0, 1.0, 1.0, 5.0]})
    >>> imbalance_table(table).round(3).to_dict("records")
    [{'layer': 0, 'component': 'head', 'units': 4, 'cv': 0.866, 'gini': 0.375, 'above_mean': 0.25}]
    """
    rows = []
    for (layer, component), part in statistics.groupby(["layer", "component"], sort=False):
        values = np.sort(part["activation"].to_numpy(dtype=float))
        n, total = len(values), values.sum()
        ranks = np.arange(1, n + 1)
        cv = values.std() / values.mean() if total else 0.0
        gini = ((2 * ranks - n - 1) * values).sum() / (n * total) if total else 0.0
        row = {"layer": layer, "component": component, "units": n}
        rows.append(row | {"cv": cv, "gini": gini, "above_mean": float((values > values.mean()).mean())})
    return pd.DataFrame(rows)


def masking_curve(
    model: PreTrainedModel,
    statistics: pd.DataFrame,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    fractions: Iterable[float],
    order: Order,
    component: Kind = "channel",
    seeds: Iterable[int] = (0,),
) -> pd.DataFrame:
    """Measure the loss of `model` on `batches` while a fraction of its units is silenced in every layer at once.

    Units go in the order of `statistics` (rank score, then mean activation, then unit number): "advantageous" silences
    the highest first, "disadvantageous" the lowest, "random" draws them anew for each of `seeds` (larger fractions
    contain smaller ones). A silenced unit is set to zero where its output projection reads it, so the rest of the
    model, and all weights, stay as they are. A fraction above 0 silences at least one unit.

    Columns: `component`, `order`, `seed`, `fraction` (asked for), `units` (silenced per layer), `loss` (nats per
    token), `increase` (over the unmasked model).
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
        count = max(1, math.floor(fraction * parts[0].units + 1e-9)) if fraction else 0
        chosen = {part.layer: _in_order(statistics, part, order, seed)[:count] for part in parts}
        with silenced(model, parts, chosen):
            loss = perplexity(model, batches, quiet=True)["loss"] if count else base
        row = {"component": component, "order": order, "seed": seed, "fraction": fraction, "units": count}
        rows.append(row | {"loss": loss, "increase": loss - base})
    return pd.DataFrame(rows)


@contextmanager
def silenced(model: PreTrainedModel, parts: Iterable[Component], units: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Set the outputs of `units[layer]` to zero inside the block, for the components `parts` (one per layer)."""
    handles = []
    try:
        for part in parts:
            module = model.get_submodule(part.reader.module)
            features = part.reader.index[list(units[part.layer])].flatten()
            keep = torch.ones(part.reader.index.numel(), dtype=module.weight.dtype, device=module.weight.device)
            keep[features.to(keep.device)] = 0
            handles.append(module.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep, *args[1:])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_order(statistics: pd.DataFrame, part: Component, order: Order, seed: int) -> list[int]:
    rows = statistics[(statistics["layer"] == part.layer) & (statistics["component"] == part.component)]
    if sorted(rows["unit"]) != list(range(part.units)):
        raise ValueError(
            f"statistics have {len(rows)} {part.component}s for layer {part.layer}; the model has {part.units}"
        )
    if order == "random":
        return np.random.default_rng([seed, part.layer]).permutation(part.units).tolist()
    ascending = order == "disadvantageous"
    ranked = rows.sort_values(["rank_score", "activation", "unit"], ascending=[ascending, ascending, True])
    return ranked["unit"].tolist()
