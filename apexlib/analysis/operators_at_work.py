"""What the operators of an expanded model do beside the rows they work on: in a first step, and in a whole stage.

Target rows train themselves, so every change that M can make they can make too (see `expand_rows`): what M, v and s add
is another path for the same gradient. How wide it is can be measured on any checkpoint, before a run.
"""

from collections.abc import Iterable, Iterator, Mapping

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
    if not (batches := list(batches)):
        raise ValueError("batches: need at least one")
    training, total = model.training, len(batches)
    model.train()
    try:
        for batch in batches:
            model(**batch).loss.backward()
        sums: dict[tuple, dict[str, float]] = {}
        for key, gradient in _gradients(model):
            row = sums.setdefault(key, {"parameters": 0, "descent": 0.0, "adam": 0.0})
            row["parameters"] += gradient.numel()
            row["descent"] += float(gradient.double().square().sum()) / total**2
            row["adam"] += float(gradient.double().abs().sum()) / total
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
    table = pd.DataFrame.from_dict(sums, "index").rename_axis(["layer", "component", "part"]).reset_index()
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
        *_, last = module.mixer.operator.parameters()  # where the last factor of M is zero, M is
        kept = last.clone()
        try:
            last.zero_()
            added = now - module.compose(module.rows)
        finally:
            last.copy_(kept)
        row = {"weight": name, "layer": layer, "role": role, "moved": float((now[targets] - start[name]).norm())}
        rows.append(row | {"by_operator": float(added[targets].norm())})
    return pd.DataFrame(rows)


def _mixed(model: nn.Module) -> Iterator[tuple[str, SplitProjection]]:
    """The projections whose rows an operator works on."""
    for name, module in model.named_modules():
        if isinstance(module, SplitProjection) and module.mixer is not None and any(module.layout.expands):
            yield name, module


def _targets(module: SplitProjection) -> Tensor:
    """Which trainable rows are targets: the first units of each role that the operator works on."""
    layout, mixer = module.layout, module.mixer
    units = torch.arange(len(module.rows) // sum(layout.widths))
    targets = units[:, None] < len(mixer.v) // mixer.dim
    roles = zip(layout.widths, layout.expands, strict=True)
    found = [(targets & expands).expand(-1, width) for width, expands in roles]
    return torch.cat(found, dim=1).flatten() if layout.by_unit else torch.cat([role.flatten() for role in found])


def _gradients(model: PreTrainedModel) -> Iterator[tuple[tuple[int, str, str], Tensor]]:
    """Every gradient of units and operators, with layer, component and part."""
    seen: set[int] = set()  # projections share M and v
    for name, module in _mixed(model):
        mixer, targets = module.mixer, _targets(module)
        layer, component = layer_and_role(name)[0], "head" if mixer.dim > 1 else "channel"
        for part, parameter in (
            ("s", module.s),
            ("v", mixer.v),
            *(("M", each) for each in mixer.operator.parameters()),
        ):
            if parameter is not None and parameter.grad is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (layer, component, part), parameter.grad
        if module.rows.grad is not None:
            for part, chosen in (("target", targets), ("others", ~targets)):
                yield (layer, component, part), module.rows.grad[chosen]
