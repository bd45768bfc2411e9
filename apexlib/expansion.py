"""Expansion: what advantageous units know is written into disadvantageous ones (APEX, arXiv:2505.24241).

With W_gate, W_up (d_ff × d, rows are channels) and W_down (d × d_ff, columns are channels), N the target units of a
layer and P its source units:

    W_gate[N] ← v ⊙ W_gate[N] + M W_gate[P]        W_gate[P] ← s ⊙ W_gate[P]
    W_up[N]   ← v ⊙ W_up[N]   + M W_up[P]          W_up[P]   ← s' ⊙ W_up[P]
    W_down[:, N] ← W_down[:, N] ⊙ v + W_down[:, P] Mᵀ

The same holds for heads, with all rows of `v_proj` and columns of `o_proj` of a unit; queries and keys are tuned
directly. M = 0 and v = s = s' = 1 at the start, so that the function does not change. `projections` is the mechanism.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from apexlib.architectures import Component, Slot, family_of, model_components
from apexlib.fused_ffn import take_form, wide
from apexlib.inspection import composed_weights
from apexlib.operators import Operator, make_operator, operator_class, without_autocast
from apexlib.plan import FFN_FORMS, ExpansionPlan, LayerPlan
from apexlib.projections import (
    SplitProjection,
    check_finite,
    check_tensor,
    check_weights,
    composed_once,
    make_plain,
    split,
    train_whole,
    trained_whole,
)

_MIXERS = {"head": "apex_head", "channel": "apex_channel"}
_Slots = dict[str, list[Slot]]  # of each projection


def expand_rows(
    rows: Float[Tensor, "n d"],
    M: Callable[[Float[Tensor, "k d"]], Float[Tensor, "k d"]],  # noqa: N803
    v: Float[Tensor, " k"],
    s: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, "n d"]:
    """The formula: of trainable rows [N | P | D] make [v ⊙ N + M P | s ⊙ P | D]; without `s`, P stays as it is.

    Columns of an output projection come as rows of its transpose, a bias as a matrix of one column.

    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # one target, one source, one direct row
    >>> expand_rows(rows, lambda source: 10 * source, v=torch.tensor([2.0]), s=torch.tensor([0.5]))
    tensor([[32.0000, 44.0000],
            [ 1.5000,  2.0000],
            [ 5.0000,  6.0000]])
    """
    k = len(v)
    target, source, direct = rows.split([k, k, len(rows) - 2 * k])
    target = torch.addcmul(M(source), v[:, None], target)
    source = source if s is None else s[:, None] * source
    return torch.cat([target, source, direct])


def expand(
    model: PreTrainedModel,
    plan: ExpansionPlan,
    *,
    operator: str = "monarch",
    train_embeddings: bool = True,
    train_norms: bool = False,
    train_queries: bool = True,
    train_rows: bool = True,
    ffn: Literal["split", "fused", "recompute"] = "fused",
    seed: int = 0,
) -> PreTrainedModel:
    """Expand `model` in place by `plan`, so that only source, target and direct units train.

    The function does not change: in evaluation mode, not by one bit. Biases train with their rows; `train_embeddings`
    adds token embeddings and LM head, `train_norms` every norm; the rest is frozen. Without `train_queries` queries and
    keys stay as they are, without `train_rows` all rows do, and M, v and s train alone. What trains is float32, in a
    half-precision model too, but `fuse` rounds it to the model's dtype: for several stages load the model in float32
    and train under autocast. `seed` draws the random factor of M. Whatever cannot be expanded raises ValueError and
    leaves the model as it is.

    A gated FFN trains as one function (see `fused_ffn`) that keeps less for backward than plain autograd: "fused" gate
    and up before the activation, "recompute" only its input, at the price of three more products; "split" is plain
    autograd. All give the same function and gradients; an FFN without a gate or of an unknown activation is split.

    In training mode attention maps number heads in the order in which the layer runs them, and a filled cache of keys
    and values, which may have another order, raises ValueError. In evaluation mode a forward pass composes every
    weight; `generate` does so once for all its passes, as does `composed_once`. `save_pretrained` writes the plain
    model that `fuse` would make, so that any Trainer saves it; its state, `state_dict`, is that of what trains.

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
    if ffn not in FFN_FORMS:
        raise ValueError(f"ffn {ffn!r}: need one of {', '.join(FFN_FORMS)}")
    planned = _match(model, plan, operator)
    whole = trained_whole(model, train_embeddings, train_norms)
    resting = [name for _, _, slots in planned for name, own in slots.items() if _rests(name, own, train_queries)]
    check_weights(model, [name for _, _, slots in planned for name in slots], list(whole))
    # all that an expanded model remembers of itself: which parameters trained before, a check, and how it is saved
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    model._expansion = trained, model.base_model.register_forward_pre_hook(_refuse_cache, with_kwargs=True)
    model.save_pretrained, model.generate = partial(_save_plain, model), partial(_generate, model)
    for parameter in model.parameters():
        parameter.requires_grad_(False).grad = None
    try:
        for part, layer, slots in planned:
            _expand_component(model, part, layer, slots, operator, generator)
            if "up" in part.slots:
                path = part.reader.module.rpartition(".")[0]
                modules = [*(part.slots[role].module for role in ("gate", "up", "down")), part.activation]
                take_form(model.get_submodule(path), tuple(name.removeprefix(f"{path}.") for name in modules), ffn)
        for name in resting if train_rows else [name for _, _, slots in planned for name in slots]:
            for leaf in ("rows", "bias_rows"):
                if (rows := getattr(model.get_submodule(name), leaf)) is not None:
                    rows.requires_grad_(False)
        for name, dtype in whole.items():
            train_whole(model, name, dtype)
    except BaseException:  # out of memory, say: nothing has trained, so that one projection after the other is composed
        _undo(model, {})
        raise
    return model


@torch.no_grad()
def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Write what was trained into plain weights, in place: modules, keys, shapes, dtypes and unit order of the base.

    Weights are composed in float32 and cast once. Rows outside the plan keep their bits, `requires_grad` is again what
    it was. Raises ValueError, and changes nothing, where a trained value is not finite: so all trainable rows are
    composed before the first is written, which takes, for that long, as much memory as they do in the model's dtype.
    """
    if not hasattr(model, "_expansion"):
        raise ValueError(f"{type(model).__name__}: is not expanded, or fused already; need the model given to `expand`")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            check_tensor(name, parameter)
    composed = {}
    for path, module in model.named_modules():
        if isinstance(module, SplitProjection):
            composed[path] = module.composed()
            for leaf, rows in composed[path].items():
                check_finite(f"{path}.{leaf}", rows, of=len(module.order) * rows.shape[1])
    for name, weight, dtype in composed_weights(model, split=False):
        check_finite(name, weight.to(dtype))
    return _undo(model, composed)


def is_expanded(model: nn.Module) -> bool:
    """Whether `model` holds expanded projections."""
    return any(isinstance(module, SplitProjection) for module in model.modules())


class Mixer(nn.Module):
    """M and v of the heads or the channels of one layer, shared by the projections that hold them."""

    def __init__(self, operator: Operator, dim: int) -> None:
        super().__init__()
        self.dim = dim  # rows per unit: head_dim, or 1
        self.v = nn.Parameter(torch.ones(operator.k, device=next(operator.parameters()).device))
        self.operator = operator

    def forward(
        self,
        matrices: Sequence[Float[Tensor, "n _"]],
        scales: Sequence[Float[Tensor, "1 k"] | None],
        dtype: torch.dtype,
    ) -> Sequence[Float[Tensor, "n _"]]:
        """Apply the formula to each of several matrices, with the same M and v, and cast the result."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            sources = torch.cat([rows[len(self.v) : 2 * len(self.v)] for rows in matrices], 1)
            mixed = self.operator(sources).split([rows.shape[1] for rows in matrices], 1)
            given = zip(matrices, scales, mixed, strict=True)
            found = (expand_rows(rows, lambda _, m=m: m, self.v, None if s is None else s[0]) for rows, s, m in given)
            return [rows.to(dtype) for rows in found]
        with without_autocast(self.v.device):
            factors = self.operator._parameters.values()
            return _Composed.apply(type(self.operator), len(matrices), dtype, self.v, *factors, *matrices, *scales)


class _Composed(torch.autograd.Function):
    """`expand_rows` of several matrices. Nothing is kept for backward but what is there anyway; it makes M P anew."""

    @staticmethod
    def forward(ctx: Any, m: type[Operator], count: int, dtype: torch.dtype, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.m, ctx.count = m, count
        ctx.save_for_backward(*inputs)
        (v, *factors), matrices, scales = inputs[: -2 * count], inputs[-2 * count : -count], inputs[-count:]
        given = zip(matrices, scales, strict=True)
        found = (
            expand_rows(rows, lambda p: m.product(p, *factors), v, None if s is None else s[0]) for rows, s in given
        )
        return tuple(rows.to(dtype) for rows in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        inputs, count = ctx.saved_tensors, ctx.count
        (v, *factors), matrices, scales = inputs[: -2 * count], inputs[-2 * count : -count], inputs[-count:]
        k, shared, by_rows, by_scale = len(v), [], [], []
        with without_autocast(v.device):
            for rows, s, grad in zip(matrices, scales, grads, strict=True):
                target, source, direct = grad.to(v.dtype).split([k, k, len(rows) - 2 * k])
                through_m, *by_factor = ctx.m.gradients(target, rows[k : 2 * k], *factors)
                shared.append([(target * rows[:k]).sum(1), *by_factor])
                by_scale.append(None if s is None else (source * rows[k : 2 * k]).sum(1)[None])
                source = through_m + source if s is None else torch.addcmul(through_m, source, s.T)
                by_rows.append(torch.cat([target * v[:, None], source, direct]))
        by_shared = [None if parts[0] is None else sum(parts) for parts in zip(*shared, strict=True)]
        return None, None, None, *by_shared, *by_rows, *by_scale


def _refuse_cache(model: nn.Module, _: tuple, inputs: dict[str, Any]) -> None:
    if model.training and (cache := inputs.get("past_key_values")) is not None and (tokens := cache.get_seq_length()):
        what = f"past_key_values of {tokens} tokens: may number heads in another order than an expanded model"
        raise ValueError(f"{what} in training; need an empty cache, or model.eval()")


def _undo(model: PreTrainedModel, composed: dict[str, dict[str, Tensor]]) -> PreTrainedModel:
    """Make the model plain again, with its `composed` rows, and forget that it was expanded."""
    make_plain(model, composed)
    for module in model.modules():
        for name in [name for name, child in module.named_children() if isinstance(child, Mixer)]:
            delattr(module, name)
    trained, hook = model._expansion
    hook.remove()
    for name, before in trained.items():
        model.get_parameter(name).requires_grad_(before).grad = None
    del model._expansion, model.save_pretrained, model.generate
    return model


def _expand_component(
    model: PreTrainedModel, part: Component, layer: LayerPlan, slots: _Slots, operator: str, generator: torch.Generator
) -> None:
    family, reader = family_of(model), part.reader
    tuned = [*layer.target, *layer.source, *layer.direct]
    units = torch.tensor(tuned + sorted(set(range(part.units)) - set(tuned)))
    mixer = None
    if layer.source:
        weight, dim = model.get_submodule(reader.module).weight, reader.index.shape[2]
        matrix = make_operator(operator, len(layer.source) * dim, generator=generator, device=weight.device)
        mixer = Mixer(matrix, dim).to(wide(weight.dtype))
        model.get_submodule(reader.module.rpartition(".")[0]).add_module(_MIXERS[part.component], mixer)
    reordered = bool(family.coupled) and part.component == "head"
    for name, own in slots.items():
        by_unit = family.interleaved and len(own) > 1
        split(model.get_submodule(name), own, units, len(tuned), mixer, by_unit=by_unit, reordered=reordered)


def _match(model: PreTrainedModel, plan: ExpansionPlan, operator: str) -> list[tuple[Component, LayerPlan, _Slots]]:
    """Find the component of each layer plan and its slots by module; refuse a plan or a model that does not fit."""
    here = type(model).__name__
    if not isinstance(plan, ExpansionPlan):
        raise ValueError(f"plan: need an ExpansionPlan, got {type(plan).__name__}")
    operator_class(operator)  # an unknown kind is refused there
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
        part, wanted = parts.get((layer.layer, layer.component)), f"layer {layer.layer}, {layer.component}"
        if part is None:
            known = " and ".join(f"{component}s" for component in sorted({component for _, component in parts}))
            raise ValueError(f"{wanted}: {here} has {known} in layers 0 to {max(parts)[0]} only")
        if part.units != layer.units:
            raise ValueError(f"{wanted}: planned for {layer.units} units, {here} has {part.units}")
        slots: _Slots = {}
        for slot in part.slots.values():
            slots.setdefault(slot.module, []).append(slot)
        planned.append((part, layer, slots))
    return planned


def _rests(name: str, slots: list[Slot], train_queries: bool) -> bool:
    """Whether a projection's rows stay as they are, because it has queries and keys only."""
    directly = {slot.role in ("query", "key") for slot in slots}
    if not train_queries and len(directly) > 1:
        raise ValueError(f"{name}: holds queries and values in one weight; need train_queries=True")
    return not train_queries and True in directly


def _generate(model: PreTrainedModel, *given: Any, **options: Any) -> Any:
    with composed_once(model):
        return type(model).generate(model, *given, **options)


def _save_plain(model: PreTrainedModel, *given: Any, state_dict: object = None, **options: Any) -> None:
    """Write what `fuse` would make of an expanded model, as `save_pretrained`; whatever state a Trainer has taken."""
    inner = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, SplitProjection | Mixer))
    first = {id(parameter): name for name, parameter in model.named_parameters()}  # of tied ones
    plain = {name: weight.to(dtype) for name, weight, dtype in composed_weights(model)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(inner) or name.endswith(".bias"):
            own, name = (each.replace(".plain.", ".") for each in (first.get(id(tensor), name), name))
            plain[name] = plain.get(own, tensor.detach())
    with torch.device("meta"):  # an empty plain model, for what is told of one beside its weights
        shell = type(model)(copy.deepcopy(model.config)).to(next(iter(plain.values())).dtype)
    shell.generation_config, shell.model_tags = model.generation_config, model.model_tags
    shell.save_pretrained(*given, state_dict=plain, **options)
