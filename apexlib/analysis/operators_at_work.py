"""What the operators of an expanded model do beside the rows they work on: in a first step, and in a whole stage.

Target rows train themselves, so every change that M can make they can make too (see `expand_rows`): what M, v and s add
is another path for the same gradient. How wide it is can be measured on any checkpoint, before a run.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apexlib.analysis.spectrum import layer_and_role
from apexlib.expansion import is_expanded
from apexlib.projections import SplitProjection


def operator_share(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> pd.DataFrame:
    """Share that M, v, s and rows have in the first step of training on `batches`, from one pass over them.

    A row per layer, component and `part` ("M", "v", "s", "target": the rows M writes to, "others": the rows beside
    them). To first order a step of gradient descent lowers the loss by Σ g² times its rate, one of Adam by Σ |g|:
    `descent_share` and `adam_share` are the part's share of these sums over the layer's component. `parameters` counts.
    Needs an expanded model, at any point of its training; gradients are removed again.
    """
    if not is_expanded(model):
        raise ValueError("the model is not expanded: it has no operators; need expand(model, plan) first")
    training, total = model.training, 0
    model.train()
    try:
        for batch in batches:
            model(**batch).loss.backward()
            total += 1
        if not total:
            raise ValueError("batches: need at least one")
        sums: dict[tuple, dict[str, float]] = {}
        for key, gradient in _gradients(model):
            row = sums.setdefault(key, {"parameters": 0, "descent": 0.0, "adam": 0.0})
            row["parameters"] += gradient.numel()
            row["descent"] += float(gradient.double().square().sum()) / total**2
            row["adam"] += float(gradient.double().abs().sum()) / total
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
    keys = ("layer", "component", "part")
    table = pd.DataFrame([dict(zip(keys, key, strict=True)) | row for key, row in sums.items()])
    for name in ("descent", "adam"):
        table[f"{name}_share"] = table[name] / table.groupby(["layer", "component"])[name].transform("sum")
    return table.sort_values(["layer", "component"], kind="stable", ignore_index=True)


def rows_of_targets(model: nn.Module) -> dict[str, Tensor]:
    """Copy the target rows of every expanded projection, as composed now: what `operator_moves` starts from."""
    with torch.no_grad():
        return {name: module.compose(module.rows)[_targets(module)] for name, module in _mixed(model)}


@torch.no_grad()
def operator_moves(model: nn.Module, start: Mapping[str, Tensor]) -> pd.DataFrame:
    """How far target rows have moved since `start`, and how much of that is M P, a row per expanded projection.

    Columns: `weight`, `layer`, `role`; `moved`, ‖ΔW[N]‖; `by_operator`, ‖M P‖ (Frobenius). Before `fuse`.
    """
    rows = []
    for name, module in _mixed(model):
        (layer, role), targets, now = layer_and_role(name), _targets(module), module.compose(module.rows)
        with _without_operator(module):
            added = now - module.compose(module.rows)
        row = {"weight": name, "layer": layer, "role": role, "moved": float((now[targets] - start[name]).norm())}
        rows.append(row | {"by_operator": float(added[targets].norm())})
    return pd.DataFrame(rows)


def _mixed(model: nn.Module) -> Iterator[tuple[str, SplitProjection]]:
    """The projections whose rows an operator works on."""
    for name, module in model.named_modules():
        if isinstance(module, SplitProjection) and module.mixer is not None and any(module.layout.expands):
            yield name, module


@contextmanager
def _without_operator(module: SplitProjection) -> Iterator[None]:
    """M = 0 inside the block: the last factor of an operator makes it so."""
    *_, last = module.mixer.operator.parameters()
    kept = last.detach().clone()
    last.zero_()
    try:
        yield
    finally:
        last.copy_(kept)


@torch.no_grad()
def _targets(module: SplitProjection) -> Tensor:
    """Which trainable rows are targets: those that v = 0 and M = 0 leave nothing of."""
    ones, mixer = torch.ones_like(module.rows[:, :1]), module.mixer
    scales = [scale for scale in (mixer.v, module.s) if scale is not None]
    kept = [scale.clone() for scale in scales]
    with _without_operator(module):
        for scale, value in zip(scales, (0, 1), strict=False):
            scale.fill_(value)
        found = module.compose(ones).squeeze(1) == 0
        for scale, value in zip(scales, kept, strict=True):
            scale.copy_(value)
    return found


def _gradients(model: PreTrainedModel) -> Iterator[tuple[tuple[int, str, str], Tensor]]:
    """Every gradient of units and operators, with layer, component and part."""
    mixers: set[int] = set()
    for name, module in _mixed(model):
        layer, component = layer_and_role(name)[0], "head" if module.mixer.dim > 1 else "channel"
        targets = _targets(module)
        parts: list[tuple[str, Any]] = [("s", module.s)]
        if id(module.mixer) not in mixers:
            mixers.add(id(module.mixer))
            parts += [("v", module.mixer.v), *(("M", factor) for factor in module.mixer.operator.parameters())]
        for part, parameter in parts:
            if parameter is not None and parameter.grad is not None:
                yield (layer, component, part), parameter.grad
        if module.rows.grad is not None:
            for part, chosen in (("target", targets), ("others", ~targets)):
                yield (layer, component, part), module.rows.grad[chosen]
