"""The mechanism of an expansion: projections in split form, and modules that train in float32.

While expanded, a projection holds its trainable slices (`rows`: target N, source P, direct D) and the rest (`frozen`)
as two tensors. In training it runs as two dense products, the trainable one composed from `rows` by the formula of
`expansion`; the units of a layer then run in the order [N | P | D | F], which neither attention nor the FFN notices. In
evaluation it composes its whole weight in the model's order and runs as the plain module would.

A module takes and leaves this form by a change of its class. So it stays the same object, and what others hold of it
goes on working: references, hooks, names of modules. A wrapper in its place would break them, when it comes and again
when it goes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from apexlib.architectures import Slot
from apexlib.fused_ffn import FusedFFN, PartlyTrained, dtype_of_products, in_one, leave_form, wide

_HALF = (torch.float16, torch.bfloat16)
_FLOATING = (*_HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layout:
    """Which rows of a projection belong to a unit, by role: a fused projection has several, query heads are some."""

    axis: int  # along which units lie in the plain weight
    is_input: bool
    widths: tuple[int, ...]  # rows per unit
    expands: tuple[bool, ...]  # query and key are tuned directly
    by_unit: bool  # roles alternate unit by unit (GPT-NeoX, query heads that share M), else they lie one after another
    reordered: bool  # what lies on the other side needs the model's order of units

    def apart(self, rows: Float[Tensor, "n d"]) -> Sequence[Tensor]:
        """Take the rows of each role."""
        if len(self.widths) == 1:
            return [rows]
        if not self.by_unit:
            return rows.split(self.sizes(len(rows)))
        return [part.flatten(0, 1) for part in rows.unflatten(0, (-1, sum(self.widths))).split(self.widths, 1)]

    def together(self, parts: Sequence[Tensor]) -> Float[Tensor, "n d"]:
        """Undo `apart`."""
        if len(parts) == 1 or not self.by_unit:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        blocks = [part.unflatten(0, (-1, width)) for part, width in zip(parts, self.widths, strict=True)]
        return torch.cat(blocks, 1).flatten(0, 1)

    def sizes(self, rows: int) -> list[int]:
        """Count the rows of each role among so many trainable or frozen ones."""
        units = rows // sum(self.widths)
        return [units * width for width in self.widths]


class SplitProjection(nn.Module):
    """A Linear or Conv1D in split form: two dense products, of which one has gradients.

    `rows` and `frozen` replace its weight, `bias_rows` and `bias_frozen` its bias; `weight` and `bias` are what they
    compose to. `mixer` is the formula with the M and v of the layer, for the rows of all projections that share them.
    """

    plain_class: type[nn.Module]
    layout: Layout
    mixer: nn.Module | None  # registered in the parent module only
    order: Tensor  # where each of [rows | frozen] lies in the plain weight; saved, so that a state says what it holds
    observers: list[Callable[[nn.Module, tuple], None]]  # called with its input, as hooks would be
    held: dict[str, Tensor] | None = None  # what it was composed to, inside `composed_once`

    @property
    def weight(self) -> Tensor:
        """The plain weight, in the model's dtype and order of units."""
        return self._held("weight", self._whole_weight)

    @property
    def bias(self) -> Tensor | None:
        """The plain bias."""
        return self._held("bias", self._whole_bias)

    def _held(self, name: str, make: Callable[[], Tensor | None]) -> Tensor | None:
        held = self.held
        if held is None or torch.is_grad_enabled():
            return make()
        if name not in held:
            held[name] = make()
        return held[name]

    def _whole_weight(self) -> Tensor:
        return self.whole(self.compose(self.rows), self.frozen)

    def _whole_bias(self) -> Tensor | None:
        if self.bias_rows is None:
            return self._parameters.get("bias")
        return self.whole(self.compose(self.bias_rows[:, None]), self.bias_frozen[:, None]).flatten()

    @property
    def input_order(self) -> Tensor | None:
        """Number in the plain model of each input, where they run in another order."""
        return self.order if self.training and self.layout.is_input and not self.layout.reordered else None

    def _load_from_state_dict(self, state: dict, prefix: str, *given: Any) -> None:
        if f"{prefix}weight" in state:
            raise ValueError(f"{prefix}weight: of a plain model; need the state of an expanded one, or to fuse first")
        super()._load_from_state_dict(state, prefix, *given)

    def forward(self, x: Float[Tensor, "*batch n_in"]) -> Float[Tensor, "*batch n_out"]:
        for observer in self.observers:
            observer(self, (x,))
        if not self.training:
            return super().forward(x)
        layout, frozen, dtype = self.layout, self.frozen, dtype_of_products(self.frozen)
        ((composed, bias),) = self.composed_with(dtype=dtype)
        sizes, output = [len(composed), len(frozen)], None
        if layout.is_input and layout.reordered:
            x = x.index_select(-1, self.order)
        if in_one(frozen) and not torch._C._are_functorch_transforms_active():
            output = PartlyTrained.apply(x.to(dtype), composed, frozen.to(dtype), layout.is_input)
        if layout.is_input:
            if output is not None:
                return output if self.bias is None else output + self.bias.to(dtype)
            tuned, rest = x.split(sizes, dim=-1)
            return linear(tuned, composed.T) + linear(rest, frozen.T, self.bias)
        if output is None:
            tuned, rest = linear(x, composed, bias), linear(x, frozen, self.bias_frozen)
        else:
            output = output if bias is None else output + torch.cat([bias, self.bias_frozen.to(dtype)])
            tuned, rest = output.split(sizes, dim=-1)
        if len(layout.widths) > 1 and not layout.by_unit:  # role by role
            tuned, rest = (y.split(layout.sizes(y.shape[-1]), dim=-1) for y in (tuned, rest))
            return torch.cat([y for pair in zip(tuned, rest, strict=True) for y in pair], dim=-1)
        output = torch.cat([tuned, rest], dim=-1) if output is None else output
        return output.index_select(-1, self.order.argsort()) if layout.reordered else output

    def compose(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Apply M, v and s to trainable rows, in their dtype."""
        return _compose([(self, rows)], rows.dtype)[0]

    def composed_bias(self) -> Float[Tensor, " n"] | None:
        """Apply M, v and s to the trainable entries of the bias."""
        return None if self.bias_rows is None else self.compose(self.bias_rows[:, None]).squeeze(1)

    def composed(self) -> dict[str, Float[Tensor, "n d"]]:
        """Compose the trainable rows of weight and bias in the model's dtype: what `fuse` writes."""
        tensors = {"weight": self.compose(self.rows)}
        if self.bias_rows is not None:
            tensors["bias"] = self.composed_bias()[:, None]
        return {name: tensor.to(self.frozen.dtype) for name, tensor in tensors.items()}

    def composed_with(self, *others: "SplitProjection", dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
        """Compose what trains of weight and bias, here and in others with the same M and v, in one function."""
        modules = (self, *others)
        rows = [(each, each.rows) for each in modules]
        entries = [(each, each.bias_rows[:, None]) for each in modules if each.bias_rows is not None]
        found = iter(_compose([*rows, *entries], dtype))
        weights = [next(found) for _ in modules]
        biases = [None if each.bias_rows is None else next(found).squeeze(1) for each in modules]
        return list(zip(weights, biases, strict=True))

    def whole(self, composed: Float[Tensor, "n d"], frozen: Float[Tensor, "m d"]) -> Tensor:
        """Lay composed and frozen rows out as the plain matrix, in the dtype of `frozen`."""
        shape = (len(self.order), frozen.shape[1])
        matrix = frozen.new_empty(shape if self.layout.axis == 0 else shape[::-1])
        by_unit = matrix.movedim(self.layout.axis, 0)
        by_unit.index_copy_(0, self.order[: len(composed)], composed.to(frozen.dtype))
        by_unit.index_copy_(0, self.order[len(composed) :], frozen)
        return matrix


def _compose(given: Sequence[tuple[SplitProjection, Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Apply M, v and s to trainable rows of projections that share them, role by role."""
    if (mixer := given[0][0].mixer) is None or not any(given[0][0].layout.expands):
        return [rows.to(dtype) for _, rows in given]
    taken, mixed, scales = [], [], []
    for module, rows in given:
        taken.append(parts := module.layout.apart(rows))
        mixed += (own := list(compress(parts, module.layout.expands)))
        scales += [module.s] * len(own) if module.s is None or len(own) == 1 else module.s.split(1)
    found = iter(mixer(mixed, scales, dtype))
    composed = []
    for (module, _), parts in zip(given, taken, strict=True):
        roles = zip(parts, module.layout.expands, strict=True)
        composed.append(module.layout.together([next(found) if mixes else part.to(dtype) for part, mixes in roles]))
    return composed


@contextmanager
def composed_once(model: nn.Module) -> Iterator[None]:
    """Compose each weight of an expanded model once for all passes inside the block that take no gradients.

    In evaluation mode, that is; the weights must not change in it, and take the memory of plain ones until its end.
    """
    inside = [m for m in model.modules() if isinstance(m, SplitProjection) and m.held is None]
    for module in inside:
        module.held = {}
    try:
        yield
    finally:
        for module in inside:
            vars(module).pop("held", None)  # it may be plain by now


class _SplitLinear(SplitProjection, nn.Linear):
    plain_class = nn.Linear


class _SplitConv1D(SplitProjection, Conv1D):
    plain_class = Conv1D


_SPLIT: dict[type, type[SplitProjection]] = {split.plain_class: split for split in (_SplitLinear, _SplitConv1D)}


def split(
    module: nn.Module,
    slots: list[Slot],
    units: Tensor,
    tuned: int,
    mixer: nn.Module | None,
    *,
    by_unit: bool,
    reordered: bool,
) -> None:
    """Bring a plain projection into split form; `units` in the order [N | P | D | F], the first `tuned` train."""
    weight, bias = module._parameters["weight"].detach(), module._parameters["bias"]
    reader, index = slots[0].is_input, [slot.index[units].to(weight.device) for slot in slots]
    index, by_unit = (index[0].unbind(1), True) if reader else ([rows.flatten(1) for rows in index], by_unit)
    layout = Layout(
        axis=slots[0].axis,
        is_input=reader,
        widths=tuple(rows.shape[1] for rows in index),
        expands=(True,) * len(index) if reader else tuple(slot.role not in ("query", "key") for slot in slots),
        by_unit=by_unit,
        reordered=reordered,
    )
    parts = ([each[part] for each in index] for part in (slice(tuned), slice(tuned, None)))
    rows, frozen = (
        torch.cat(part, dim=1).flatten() if by_unit else torch.cat([each.flatten() for each in part]) for part in parts
    )
    matrix, trained = weight.movedim(layout.axis, 0), wide(weight.dtype)
    scales = sum(layout.expands) if mixer is not None and not reader else 0
    own_bias = None if reader or bias is None else bias.detach()
    tensors = {
        "rows": matrix[rows].to(trained),
        "frozen": matrix[frozen],
        "s": torch.ones(scales, len(mixer.v), dtype=trained, device=weight.device) if scales else None,
        "bias_rows": None if own_bias is None else own_bias[rows].to(trained),
        "bias_frozen": None if own_bias is None else own_bias[frozen],
    }
    module._parameters.clear()
    module.__class__ = _SPLIT[type(module)]
    module.__dict__.update(layout=layout, mixer=mixer, observers=[])  # setattr would register the mixer once more
    for name, tensor in tensors.items():
        trains = name not in ("frozen", "bias_frozen")
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=trains))
    if reader:
        module._parameters["bias"] = bias
    module.register_buffer("order", torch.cat([rows, frozen]))


def unsplit(module: SplitProjection, composed: dict[str, Float[Tensor, "n d"]]) -> None:
    """Make a projection plain again, with its frozen rows and the `composed` ones."""
    weight, bias = module.whole(composed["weight"], module.frozen), module._parameters.get("bias")
    if "bias" in composed:
        bias = module.whole(composed["bias"], module.bias_frozen[:, None]).flatten()
    module._parameters.clear()
    del module.order, module.layout, module.mixer, module.observers
    module.__class__ = module.plain_class
    module.weight = nn.Parameter(weight)
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias))


class Float32(nn.Module):
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


def trained_whole(model: nn.Module, embeddings: bool, norms: bool) -> dict[str, torch.dtype]:
    """Name the modules that train with all their parameters, and their dtypes (tied weights change together)."""
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    dtypes = {}
    for name, module in model.named_modules():
        if (embeddings and module in vocabulary) or (norms and is_norm(module)):
            for parameter in module.parameters(recurse=False):
                dtypes[name] = parameter.dtype
    return dtypes


def train_whole(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Let all parameters of a module train, in float32 where the model is in half precision."""
    module = model.get_submodule(name)
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(wide(dtype))  # the same parameter: tied weights stay tied
    if dtype in _HALF:
        _replace(model, name, Float32(module, dtype))


@torch.no_grad()
def make_plain(model: nn.Module, composed: dict[str, dict[str, Tensor]]) -> None:
    """Undo all that is done here, with the rows in `composed` by the projection's name, else composed as they come."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitProjection):
            unsplit(module, composed.pop(name, None) or module.composed())
        elif isinstance(module, FusedFFN):
            leave_form(module)
        elif isinstance(module, Float32):
            for parameter in module.plain.parameters():
                parameter.data = parameter.data.to(module.dtype)
            _replace(model, name, module.plain)


def check_weights(model: nn.Module, projections: Iterable[str], others: Iterable[str]) -> None:
    """Refuse modules whose weights cannot be taken apart, or cannot train."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path in projections:
        module = model.get_submodule(path)
        if type(module) not in _SPLIT or "forward" in module.__dict__ or "weight" not in module._parameters:
            raise ValueError(
                f"{path}: is {type(module).__name__}, wrapped, patched or device-mapped; need a plain Linear or Conv1D"
            )
        for leaf, parameter in module.named_parameters():
            if len(names := owners[id(parameter)]) > 1:
                raise ValueError(f"{path}.{leaf}: is one with {', '.join(names)}; need a weight of its own")
    for path in (*projections, *others):
        for leaf, parameter in model.get_submodule(path).named_parameters(recurse=False):
            check_tensor(f"{path}.{leaf}", parameter)
            check_finite(f"{path}.{leaf}", parameter)
    if len({model.get_submodule(path).weight.is_meta for path in projections}) > 1:
        raise ValueError(f"{type(model).__name__}: has some weights on the meta device; need all of them there or none")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a parameter that is not there as a whole, or not in floating point."""
    if type(tensor.data) is not Tensor or not tensor.numel():
        kind, shape = type(tensor.data).__name__, tuple(tensor.shape)
        raise ValueError(f"{name}: is sharded or quantised ({kind} of shape {shape}); need the whole plain tensor")
    if tensor.dtype not in _FLOATING:
        raise ValueError(f"{name}: is {tensor.dtype}; need float16, bfloat16, float32 or float64")


def check_finite(name: str, tensor: Tensor, of: int | None = None) -> None:
    """Refuse NaN and infinite values; `of` says how many values there are where `tensor` is a part of them."""
    if tensor.is_meta or all(bound.isfinite() for bound in tensor.aminmax()):  # isfinite alone would take a copy
        return
    wrong = int((~tensor.isfinite()).sum())
    raise ValueError(f"{name}: {wrong} of {of or tensor.numel()} values are not finite in {tensor.dtype}")


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)
