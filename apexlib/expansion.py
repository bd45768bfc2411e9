"""Expand the units of a plan in place, train, fuse back into plain modules (APEX, arXiv:2505.24241).

While expanded, a projection holds its trainable slices (`rows`: target N, source P, direct D) and the rest (`frozen`)
as two tensors. In training it runs as two dense products, the trainable one composed from `rows`, the operator M and
the scales v and s; the units of a layer then run in the order [N | P | D | F], which neither attention nor the FFN
notices. In evaluation it composes its whole weight in the model's order and runs as the plain module would.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apexlib.architectures import Component, Slot, family_of, model_components
from apexlib.fused_ffn import MODES, FusedFFN, leave_form, take_form
from apexlib.operators import OPERATORS, Operator, make_operator
from apexlib.selection import ExpansionPlan, LayerPlan

_HALF = (torch.float16, torch.bfloat16)
_FLOATING = (*_HALF, torch.float32, torch.float64)
_MIXERS = {"head": "apex_head", "channel": "apex_channel"}


def expand(
    model: PreTrainedModel,
    plan: ExpansionPlan,
    *,
    operator: str = "monarch",
    train_embeddings: bool = True,
    train_norms: bool = False,
    ffn: Literal["split", "fused", "recompute"] = "fused",
    seed: int = 0,
) -> PreTrainedModel:
    """Expand `model` in place by `plan`, so that only source, target and direct units train.

    The function does not change: in evaluation mode, not by one bit. Biases train with their rows; `train_embeddings`
    adds token embeddings and LM head, `train_norms` every norm; the rest is frozen. What trains is float32, in a
    half-precision model too, but `fuse` rounds it to the model's dtype: for several stages load the model in float32
    and train under autocast. `seed` draws the random factor of M. Whatever cannot be expanded raises ValueError and
    leaves the model as it is.

    A gated FFN trains as one function (see `fused_ffn`) that keeps less for backward than plain autograd: "fused" gate
    and up before the activation, "recompute" only its input, at the price of three more products; "split" is plain
    autograd. All give the same function and gradients; an FFN without a gate or of an unknown activation is split.

    In training mode, attention maps and caches number heads in the order in which the layer runs them. In evaluation
    mode each forward pass composes every weight: fuse before generating much text.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    ...                      vocab_size=32)
    >>> model = LlamaForCausalLM(config)
    >>> plan = ExpansionPlan((LayerPlan(0, "channel", source=(1, 7), target=(0, 9), direct=(3,), units=24),))
    >>> mlp = expand(model, plan).model.layers[0].mlp
    >>> [(name, tuple(p.shape)) for name, p in mlp.gate_proj.named_parameters()]
    [('rows', (5, 16)), ('frozen', (19, 16)), ('s', (1, 2))]
    >>> [(name, tuple(p.shape)) for name, p in mlp.apex_channel.named_parameters()]
    [('v', (2,)), ('operator.second', (1, 2, 2))]
    >>> fuse(model).model.layers[0].mlp.gate_proj
    Linear(in_features=16, out_features=24, bias=False)
    """
    generator = torch.Generator().manual_seed(seed)
    if ffn not in MODES:
        raise ValueError(f"ffn {ffn!r}: need one of {', '.join(MODES)}")
    planned = _match(model, plan, operator)
    whole = _trained_whole(model, train_embeddings, train_norms)
    _check_weights(model, [name for part, _ in planned for name in _by_module(part)], list(whole))
    model._before_expansion = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    model.save_pretrained = model.push_to_hub = _refuse_to_save
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        for part, layer in planned:
            _expand_component(model, part, layer, operator, generator)
            _fuse_ffn(model, part, ffn)
        for name, dtype in whole.items():
            _train_whole(model, name, dtype)
    except BaseException:  # out of memory, say
        fuse(model)
        raise
    return model


@torch.no_grad()
def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Write what was trained into plain weights, in place: modules, keys, shapes, dtypes and unit order of the base.

    Weights are composed in float32 and cast once, one projection at a time. Rows outside the plan keep their bits,
    `requires_grad` is again what it was. Raises ValueError, and changes nothing, where a trained value is not finite.
    """
    before = getattr(model, "_before_expansion", None)
    if not isinstance(before, dict):
        raise ValueError(f"{type(model).__name__}: is not expanded, or fused already; need the model given to `expand`")
    _check_fusable(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitProjection):
            _unsplit(module)
        elif isinstance(module, FusedFFN):
            leave_form(module)
        elif isinstance(module, Mixer):
            _replace(model, name, None)
        elif isinstance(module, _Float32):
            for parameter in module.plain.parameters():
                parameter.data = parameter.data.to(module.dtype)
            _replace(model, name, module.plain)
    for name, trained in before.items():
        parameter = model.get_parameter(name)
        parameter.requires_grad_(trained)
        parameter.grad = None
    del model._before_expansion, model.save_pretrained, model.push_to_hub
    return model


def is_expanded(model: nn.Module) -> bool:
    """Whether `model` holds expanded projections."""
    return any(isinstance(module, SplitProjection) for module in model.modules())


def trainable_table(model: PreTrainedModel) -> pd.DataFrame:
    """Count what trains, one row per weight of the plain model, tied ones once, then one per tensor of M, v and s.

    Columns: `weight`, its key; `kind`: "head", "channel", "embedding", "norm", "operator" or "other"; `trainable` and
    `total` parameters; `share`. M, v and s are no part of the plain model: their `total` is 0 and their `share` NaN, so
    that `table["trainable"].sum() / table["total"].sum()` is the share that the paper means by 52 %.
    """
    kinds = _kinds(model)
    counts: dict[tuple[bool, str], list[int]] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        added = isinstance(module, Mixer | Operator) or (isinstance(module, SplitProjection) and leaf == "s")
        if isinstance(module, SplitProjection) and not added:
            name = f"{path}.{'bias' if leaf.startswith('bias') else 'weight'}"
        row = counts.setdefault((added, name.replace(".plain.", ".")), [0, 0])
        row[0] += parameter.numel() * parameter.requires_grad
        row[1] += parameter.numel() * (not added)
    rows = [
        (name, "operator" if added else kinds.get(_parent(name), "other"), trainable, total)
        for (added, name), (trainable, total) in sorted(counts.items(), key=lambda item: item[0][0])
    ]
    table = pd.DataFrame(rows, columns=["weight", "kind", "trainable", "total"])
    return table.assign(share=table["trainable"] / table["total"].where(table["total"] > 0))


def parameter_groups(
    model: nn.Module, lr: float, *, operator_lr_scale: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group what trains for an optimizer: M, v and s learn at `lr · operator_lr_scale`, all else at `lr`.

    v and s rest at one and never decay, nor do biases and norms. Rows decay towards zero, as weights do in any
    fine-tuning, not towards their pre-trained values. Empty groups are left out.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    operators = {id(parameter) for mixer in mixers for parameter in mixer.operator.parameters()}
    scales = {id(mixer.v) for mixer in mixers}
    scales |= {id(module.s) for module in model.modules() if isinstance(module, SplitProjection)}
    groups: dict[str, list[nn.Parameter]] = {"operators": [], "scales": [], "weights": [], "vectors": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "operators" if id(parameter) in operators else "scales" if id(parameter) in scales else None
            groups[name or ("weights" if parameter.dim() > 1 else "vectors")].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": lr * operator_lr_scale if name in ("operators", "scales") else lr,
            "weight_decay": weight_decay if name in ("operators", "weights") else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]


@torch.no_grad()
def composed_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Yield each plain weight that trains: its key, its value before the cast in `fuse`, its dtype after it."""
    seen: set[int] = set()  # tied weights come once
    for path, module in model.named_modules():
        if isinstance(module, SplitProjection):
            dtype, wide = module.frozen.dtype, module.rows.dtype
            yield f"{path}.weight", module.whole(module.rows, module.frozen.to(wide)), dtype
            if module.bias_rows is not None:
                bias = module.whole(module.bias_rows[:, None], module.bias_frozen[:, None].to(wide))
                yield f"{path}.bias", bias.flatten(), dtype
        elif not isinstance(module, Mixer | Operator):
            half = isinstance(module, _Float32)
            for leaf, parameter in (module.plain if half else module).named_parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{leaf}".lstrip("."), parameter.detach(), module.dtype if half else parameter.dtype


class Mixer(nn.Module):
    """M and v of the heads or the channels of one layer, shared by the projections that hold them."""

    def __init__(self, operator: Operator, dim: int) -> None:
        super().__init__()
        self.dim = dim  # rows per unit: head_dim, or 1
        self.v = nn.Parameter(torch.ones(operator.k, device=next(operator.parameters()).device))
        self.operator = operator

    def forward(
        self, rows: Float[Tensor, "n d"], copies: int = 1, scale: Float[Tensor, " k"] | None = None
    ) -> Float[Tensor, "n d"]:
        """Compose [N | P | D] to v ⊙ N + M P, s ⊙ P and D; several copies (query heads) one by one."""
        k = len(self.v) * copies
        target, source, direct = rows.split([k, k, len(rows) - 2 * k])
        target, source = (
            rearrange(block, "(unit copy dim) d -> (unit dim) (copy d)", copy=copies, dim=self.dim)
            for block in (target, source)
        )
        target = self.v[:, None] * target + self.operator(source)
        source = source if scale is None else scale[:, None] * source
        target, source = (
            rearrange(block, "(unit dim) (copy d) -> (unit copy dim) d", copy=copies, dim=self.dim)
            for block in (target, source)
        )
        return torch.cat([target, source, direct])


@dataclass(frozen=True)
class _Layout:
    """How units lie in a projection, role by role (a fused projection has several)."""

    axis: int  # along which units lie in the plain weight
    is_input: bool
    widths: tuple[int, ...]  # rows per unit
    expands: tuple[bool, ...]  # query and key are tuned directly
    copies: int  # query heads per unit that share M and v
    by_unit: bool  # roles alternate unit by unit (GPT-NeoX), else they lie one after another
    reordered: bool  # what lies on the other side needs the model's order of units


class SplitProjection(nn.Module):
    """A Linear or Conv1D in split form: two dense products, of which one has gradients.

    A projection takes this form by a change of class: it stays the same object, with its hooks and its mode. `rows` and
    `frozen` replace its weight, `bias_rows` and `bias_frozen` its bias; `weight` and `bias` are what they compose to.
    """

    plain_class: type[nn.Module]
    layout: _Layout
    mixer: Mixer | None  # registered in the parent module only
    order: Tensor  # where each of [rows | frozen] lies in the plain weight; saved, so that a state says what it holds

    @property
    def weight(self) -> Tensor:
        """The plain weight, in the model's dtype and order of units."""
        return self.whole(self.rows, self.frozen)

    @property
    def bias(self) -> Tensor | None:
        """The plain bias."""
        if self.bias_rows is None:
            return self._parameters.get("bias")
        return self.whole(self.bias_rows[:, None], self.bias_frozen[:, None]).flatten()

    @property
    def input_order(self) -> Tensor | None:
        """Number in the plain model of each input, where they run in another order."""
        return self.order if self.training and self.layout.is_input and not self.layout.reordered else None

    def forward(self, x: Float[Tensor, "*batch n_in"]) -> Float[Tensor, "*batch n_out"]:
        if not self.training:
            return super().forward(x)
        layout, dtype = self.layout, self.frozen.dtype
        composed = self.compose(self.rows).to(dtype)
        if layout.is_input:
            x = x.index_select(-1, self.order) if layout.reordered else x
            tuned, rest = x.split([len(composed), len(self.frozen)], dim=-1)
            return linear(tuned, composed.T) + linear(rest, self.frozen.T, self.bias)
        bias = None if self.bias_rows is None else self.compose(self.bias_rows[:, None]).squeeze(1).to(dtype)
        tuned, rest = linear(x, composed, bias), linear(x, self.frozen, self.bias_frozen)
        if len(layout.widths) > 1 and not layout.by_unit:  # role by role
            tuned, rest = (y.split(self._sizes(y.shape[-1]), dim=-1) for y in (tuned, rest))
            return torch.cat([y for pair in zip(tuned, rest, strict=True) for y in pair], dim=-1)
        output = torch.cat([tuned, rest], dim=-1)
        return output.index_select(-1, self.order.argsort()) if layout.reordered else output

    def compose(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Apply M, v and s to trainable rows, in their dtype."""
        layout = self.layout
        if self.mixer is None or not any(layout.expands):
            return rows
        sizes = self._sizes(len(rows))
        blocks = (
            rows.unflatten(0, (-1, sum(layout.widths))).split(layout.widths, 1) if layout.by_unit else rows.split(sizes)
        )
        scales = repeat(None) if self.s is None else iter(self.s.unbind())
        composed = [
            self.mixer(block.flatten(0, -2), layout.copies, next(scales)).view_as(block) if expands else block
            for block, expands in zip(blocks, layout.expands, strict=True)
        ]
        return torch.cat(composed, dim=int(layout.by_unit)).flatten(0, -2) if len(composed) > 1 else composed[0]

    def whole(self, rows: Float[Tensor, "n d"], frozen: Float[Tensor, "m d"]) -> Tensor:
        """Compose the plain matrix in the dtype of `frozen`."""
        composed = self.compose(rows).to(frozen.dtype)
        shape = (len(self.order), frozen.shape[1])
        matrix = frozen.new_empty(shape if self.layout.axis == 0 else shape[::-1])
        by_unit = matrix.movedim(self.layout.axis, 0)
        by_unit.index_copy_(0, self.order[: len(composed)], composed)
        by_unit.index_copy_(0, self.order[len(composed) :], frozen)
        return matrix

    def _sizes(self, rows: int) -> list[int]:
        """Of so many trainable or frozen rows, how many belong to each role."""
        units = rows // sum(self.layout.widths)
        return [units * width for width in self.layout.widths]


class _SplitLinear(SplitProjection, nn.Linear):
    plain_class = nn.Linear


class _SplitConv1D(SplitProjection, Conv1D):
    plain_class = Conv1D


_SPLIT: dict[type, type[SplitProjection]] = {split.plain_class: split for split in (_SplitLinear, _SplitConv1D)}


def _split(
    module: nn.Module,
    slots: list[Slot],
    units: Tensor,
    tuned: int,
    mixer: Mixer | None,
    *,
    by_unit: bool,
    reordered: bool,
) -> None:
    """Bring a plain projection into split form; `units` in the order [N | P | D | F], the first `tuned` train."""
    weight, bias = module._parameters["weight"].detach(), module._parameters["bias"]
    reader, index = slots[0].is_input, [slot.index[units].flatten(1) for slot in slots]
    layout = _Layout(
        axis=slots[0].axis,
        is_input=reader,
        widths=tuple(rows.shape[1] for rows in index),
        expands=tuple(slot.role not in ("query", "key") for slot in slots),
        copies=slots[0].index.shape[1] if reader else 1,
        by_unit=by_unit,
        reordered=reordered,
    )
    parts = (slice(tuned), slice(tuned, None))
    tuned_rows, frozen_rows = (
        torch.cat([rows[part] for rows in index], dim=1).flatten()
        if by_unit
        else torch.cat([rows[part].flatten() for rows in index])
        for part in parts
    )
    order = torch.cat([tuned_rows, frozen_rows]).to(weight.device)
    rows, frozen = order[: len(tuned_rows)], order[len(tuned_rows) :]
    matrix, wide = weight.movedim(layout.axis, 0), _wide(weight.dtype)
    scales = sum(layout.expands) if mixer is not None and not reader else 0
    own_bias = None if reader or bias is None else bias.detach()
    tensors = {
        "rows": matrix[rows].to(wide),
        "frozen": matrix[frozen],
        "s": torch.ones(scales, len(mixer.v), dtype=wide, device=weight.device) if scales else None,
        "bias_rows": None if own_bias is None else own_bias[rows].to(wide),
        "bias_frozen": None if own_bias is None else own_bias[frozen],
    }
    module._parameters.clear()
    module.__class__ = _SPLIT[type(module)]
    module.__dict__.update(layout=layout, mixer=mixer)  # by setattr, nn.Module would register the mixer once more
    for name, tensor in tensors.items():
        trains = name not in ("frozen", "bias_frozen")
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=trains))
    if reader:
        module._parameters["bias"] = bias
    module.register_buffer("order", order)


def _unsplit(module: SplitProjection) -> None:
    weight, bias = module.weight, module.bias
    module._parameters.clear()
    del module.order, module.__dict__["layout"], module.__dict__["mixer"]
    module.__class__ = module.plain_class
    module.weight = nn.Parameter(weight)
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias))


class _Float32(nn.Module):
    """A module of a half-precision model whose parameters train in float32; it computes in the model's dtype."""

    def __init__(self, plain: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.plain, self.dtype = plain, dtype

    @property
    def weight(self) -> nn.Parameter:
        return self.plain.weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if type(self.plain) is nn.Embedding:  # lookup and cast commute, and this way gradients add up in float32
            return self.plain(*args, **kwargs).to(self.dtype)
        cast = {name: parameter.to(self.dtype) for name, parameter in self.plain.named_parameters()}
        return functional_call(self.plain, cast, args, kwargs)


def _expand_component(
    model: PreTrainedModel, part: Component, layer: LayerPlan, operator: str, generator: torch.Generator
) -> None:
    family, reader = family_of(model), part.reader
    tuned = [*layer.target, *layer.source, *layer.direct]
    units = torch.tensor(tuned + sorted(set(range(part.units)) - set(tuned)))
    mixer = None
    if layer.source:
        weight, dim = model.get_submodule(reader.module).weight, reader.index.shape[2]
        matrix = make_operator(operator, len(layer.source) * dim, generator=generator, device=weight.device)
        mixer = Mixer(matrix, dim).to(_wide(weight.dtype))
        model.get_submodule(_parent(reader.module)).add_module(_MIXERS[part.component], mixer)
    for name, slots in _by_module(part).items():
        by_unit = family.interleaved and len(slots) > 1
        reordered = bool(family.coupled) and part.component == "head"
        _split(model.get_submodule(name), slots, units, len(tuned), mixer, by_unit=by_unit, reordered=reordered)


def _fuse_ffn(model: PreTrainedModel, part: Component, mode: str) -> None:
    if "up" in part.slots:
        path = _parent(part.reader.module)
        modules = [part.slots[role].module for role in ("gate", "up", "down")]
        names = tuple(name.removeprefix(f"{path}.") for name in (*modules, part.activation))
        take_form(model.get_submodule(path), names, mode)


def _trained_whole(model: PreTrainedModel, embeddings: bool, norms: bool) -> dict[str, torch.dtype]:
    """Name the modules that train with all their parameters, and their dtypes (tied weights change together)."""
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    dtypes = {}
    for name, module in model.named_modules():
        if (embeddings and module in vocabulary) or (norms and _is_norm(module)):
            for parameter in module.parameters(recurse=False):
                dtypes[name] = parameter.dtype
    return dtypes


def _train_whole(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    module = model.get_submodule(name)
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(_wide(dtype))  # the same parameter: tied weights stay tied
    if dtype in _HALF:
        _replace(model, name, _Float32(module, dtype))


def _match(model: PreTrainedModel, plan: ExpansionPlan, operator: str) -> list[tuple[Component, LayerPlan]]:
    """Find the component of each layer plan; refuse a plan or a model that does not fit."""
    here = type(model).__name__
    if not isinstance(plan, ExpansionPlan):
        raise ValueError(f"plan: need an ExpansionPlan, got {type(plan).__name__}")
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; known: {', '.join(OPERATORS)}")
    if is_expanded(model):
        raise ValueError(f"{here}: is expanded already; fuse it before expanding it again")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{here}: is quantised; need weights in floating point")
    try:
        parts = {(part.layer, part.component): part for part in model_components(model)}
    except (AttributeError, IndexError) as error:
        raise ValueError(f"{here}: a projection has no whole weight matrix (quantised or sharded?): {error}") from error
    planned = []
    for layer in plan.layers:
        part = parts.get((layer.layer, layer.component))
        if part is None:
            known = " and ".join(f"{component}s" for component in sorted({component for _, component in parts}))
            raise ValueError(
                f"layer {layer.layer}, {layer.component}: {here} has {known} in layers 0 to {max(parts)[0]} only"
            )
        if part.units != layer.units:
            raise ValueError(
                f"layer {layer.layer}, {layer.component}: planned for {layer.units} units, {here} has {part.units}"
            )
        planned.append((part, layer))
    return planned


def _check_weights(model: PreTrainedModel, projections: list[str], others: list[str]) -> None:
    """Refuse modules whose weights cannot be taken apart, or cannot train."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path in projections:
        module = model.get_submodule(path)
        if type(module) not in _SPLIT or "forward" in module.__dict__ or "weight" not in module._parameters:
            raise ValueError(
                f"{path}: is {type(module).__name__}, wrapped, patched or reparametrised; need a plain Linear or Conv1D"
            )
        for leaf, parameter in module.named_parameters():
            if len(names := owners[id(parameter)]) > 1:
                raise ValueError(f"{path}.{leaf}: is one with {', '.join(names)}; need a weight of its own")
    for path in (*projections, *others):
        for leaf, parameter in model.get_submodule(path).named_parameters(recurse=False):
            _check_tensor(f"{path}.{leaf}", parameter)
            _check_finite(f"{path}.{leaf}", parameter)
    if len({model.get_submodule(path).weight.is_meta for path in projections}) > 1:
        raise ValueError(f"{type(model).__name__}: has some weights on the meta device; need all of them there or none")


def _check_fusable(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _check_tensor(name, parameter)
    for name, weight, dtype in composed_weights(model):
        _check_finite(name, weight.to(dtype))
        del weight  # before the next is composed: one matrix at a time


def _check_tensor(name: str, tensor: Tensor) -> None:
    if type(tensor.data) is not Tensor or not tensor.numel():
        kind, shape = type(tensor.data).__name__, tuple(tensor.shape)
        raise ValueError(f"{name}: is sharded or quantised ({kind} of shape {shape}); need the whole plain tensor")
    if tensor.dtype not in _FLOATING:
        raise ValueError(f"{name}: is {tensor.dtype}; need float16, bfloat16, float32 or float64")


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or all(bound.isfinite() for bound in tensor.aminmax()):  # isfinite alone would take a copy
        return
    wrong = int((~tensor.isfinite()).sum())
    raise ValueError(f"{name}: {wrong} of {tensor.numel()} values are not finite in {tensor.dtype}")


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
        elif _is_norm(getattr(module, "plain", module)):
            kinds[name] = "norm"
        elif layers and name.startswith(layers):
            kinds[name] = roles.get(name.removeprefix(layers).partition(".")[2], "other")
    return kinds


def _by_module(part: Component) -> dict[str, list[Slot]]:
    modules: dict[str, list[Slot]] = {}
    for slot in part.slots.values():
        modules.setdefault(slot.module, []).append(slot)
    return modules


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the weights of a model of `dtype` train."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _replace(model: nn.Module, name: str, module: nn.Module | None) -> None:
    parent, leaf = model.get_submodule(_parent(name)), name.rpartition(".")[2]
    delattr(parent, leaf) if module is None else setattr(parent, leaf, module)


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "an expanded model would reload with weights missing; need a plain one: fuse first, `fuse(model)`"
    )
