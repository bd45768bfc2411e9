"""What of a model trains: a table of it, groups for an optimizer, the plain weights that it composes to."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apexlib.architectures import family_of
from apexlib.projections import Float32, SplitProjection, is_norm


def trainable_table(model: PreTrainedModel) -> pd.DataFrame:
    """Count what trains, one row per weight of the plain model, tied ones once, then one per tensor of M, v and s.

    Columns: `weight`, its key; `kind`: "head", "channel", "embedding", "norm", "operator" or "other"; `trainable` and
    `total` parameters; `share`. M, v and s are no part of the plain model: their `total` is 0 and their `share` NaN, so
    that `table["trainable"].sum() / table["total"].sum()` is the share that the paper means by 52 %.
    """
    kinds, added = _kinds(model), _added(model)
    counts: dict[tuple[bool, str], list[int]] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        is_added = id(parameter) in added
        if isinstance(model.get_submodule(path), SplitProjection) and not is_added:
            name = f"{path}.{'bias' if leaf.startswith('bias') else 'weight'}"
        row = counts.setdefault((is_added, name.replace(".plain.", ".")), [0, 0])
        row[0] += parameter.numel() * parameter.requires_grad
        row[1] += parameter.numel() * (not is_added)
    rows = [
        (name, "operator" if is_added else kinds.get(name.rpartition(".")[0], "other"), trainable, total)
        for (is_added, name), (trainable, total) in sorted(counts.items(), key=lambda item: item[0][0])
    ]
    table = pd.DataFrame(rows, columns=["weight", "kind", "trainable", "total"])
    return table.assign(share=table["trainable"] / table["total"].where(table["total"] > 0))


def parameter_groups(
    model: nn.Module, lr: float, *, operator_lr_scale: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group what trains for an optimizer: M, v and s learn at `lr · operator_lr_scale`, all else at `lr`.

    v and s rest at one and never decay, nor do biases and norms. Rows decay towards zero, as weights do in any
    fine-tuning; see `ApexConfig.decay_to_start`. Empty groups are left out.
    """
    added = _added(model)
    groups: dict[str, list[nn.Parameter]] = {"operators": [], "scales": [], "weights": [], "vectors": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = "weights" if parameter.dim() > 1 else "vectors"
            groups[added.get(id(parameter), plain)].append(parameter)
    rates = dict.fromkeys(("operators", "scales"), lr * operator_lr_scale)
    decays = dict.fromkeys(("operators", "weights"), weight_decay)
    return [
        {"name": name, "params": parameters, "lr": rates.get(name, lr), "weight_decay": decays.get(name, 0.0)}
        for name, parameters in groups.items()
        if parameters
    ]


@torch.no_grad()
def composed_weights(model: PreTrainedModel, *, split: bool = True) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Yield each plain weight that trains: its key, its value before the cast in `fuse`, its dtype after it.

    Tied weights come once. Without `split`, only what is in no projection in split form.
    """
    seen = set(_added(model))
    for path, module in model.named_modules():
        if not isinstance(module, SplitProjection):
            half = isinstance(module, Float32)
            for leaf, parameter in (module.plain if half else module).named_parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{leaf}".lstrip("."), parameter.detach(), module.dtype if half else parameter.dtype
        elif split:
            dtype, wide = module.frozen.dtype, module.rows.dtype
            yield f"{path}.weight", module.whole(module.compose(module.rows), module.frozen.to(wide)), dtype
            if module.bias_rows is not None:
                bias = module.whole(module.composed_bias()[:, None], module.bias_frozen[:, None].to(wide))
                yield f"{path}.bias", bias.flatten(), dtype


def _added(model: nn.Module) -> dict[int, Literal["operators", "scales"]]:
    """Tell the parameters that the plain model does not have, M and v, s, by their ids."""
    kinds: dict[int, Literal["operators", "scales"]] = {}
    for module in model.modules():
        if isinstance(module, SplitProjection) and module.mixer is not None:
            kinds |= {id(parameter): "operators" for parameter in module.mixer.operator.parameters()}
            kinds |= {id(scale): "scales" for scale in (module.mixer.v, module.s) if scale is not None}
    return kinds


def _kinds(model: PreTrainedModel) -> dict[str, str]:
    """Kind of each module that has one, by its name."""
    roles, layers = {}, None
    with suppress(ValueError):  # a family without known units still has embeddings and norms
        family = family_of(model)
        layers = f"{family.layers}."
        roles = dict.fromkeys((family.query, family.key, family.value, family.output), "head")
        roles |= dict.fromkeys((family.gate, family.up, family.down), "channel")
        roles.pop("", None)  # no up, no FFN
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    kinds = {}
    for name, module in model.named_modules():
        if module in vocabulary:
            kinds[name] = "embedding"
        elif is_norm(getattr(module, "plain", module)):
            kinds[name] = "norm"
        elif layers and name.startswith(layers):
            kinds[name] = roles.get(name.removeprefix(layers).partition(".")[2], "other")
    return kinds
