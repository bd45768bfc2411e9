"""A gated FFN in split form as one autograd function: y = Σ (f(x Gᵀ + b) ⊙ (x Uᵀ + c)) D over its parts.

Channels of a gated FFN are independent, so the FFN is the sum of a part that trains and a part that is frozen. Plain
autograd keeps four tensors of tokens × channels and makes as many again in backward; this keeps the two pre-activations
or none, takes the tokens in chunks that fit a cache, and computes weight gradients for the part that trains only. The
oracle is the split form: the plain module's own code over split projections.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation


class ChannelObserver(Protocol):
    """An observer of channels to whom their sums of squares over tokens are enough, so that the FFN may stay fused.

    It enters itself in `FusedFFN.observers`, and as a hook on a module inside, by which the split form tells it.
    """

    of_product: bool  # squares of f(gate) ⊙ up, else of f(gate)

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor | None = None) -> None: ...

    def listens(self) -> bool:
        """Whether it wants the sums of this pass."""

    def tokens(self) -> Tensor | None:
        """Which tokens count; None: all."""

    def take_squares(self, squares: Float[Tensor, " channels"]) -> None:
        """Take each channel's sum, channels in the order in which the FFN runs them."""


class Part(NamedTuple):
    """Some channels of a gated FFN; `down` has a row for each, as `gate` and `up` have."""

    gate: Float[Tensor, "n d_in"]
    up: Float[Tensor, "n d_in"]
    down: Float[Tensor, "n d_out"]
    gate_bias: Float[Tensor, " n"] | None
    up_bias: Float[Tensor, " n"] | None


class _Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # of the gradient and the pre-activation


_SILU = _Activation(silu, torch.ops.aten.silu_backward)
_GELU = _Activation(gelu, torch.ops.aten.gelu_backward)
_TANH = {"approximate": "tanh"}
_GELU_TANH = _Activation(partial(gelu, **_TANH), partial(torch.ops.aten.gelu_backward.default, **_TANH))
_ACTIVATIONS = {SiLUActivation: _SILU, nn.SiLU: _SILU, GELUActivation: _GELU, GELUTanh: _GELU_TANH}


def literal_ffn(x: Tensor, activation: _Activation, bias: Tensor | None, parts: list[Part]) -> Tensor:
    """The formula, for autograd to differentiate."""
    outputs = [
        (activation.value(linear(x, part.gate, part.gate_bias)) * linear(x, part.up, part.up_bias)) @ part.down
        for part in parts
    ]
    return sum(outputs) if bias is None else sum(outputs) + bias


class GatedFFN(torch.autograd.Function):
    """`literal_ffn` of x (tokens, d_in) with a backward of its own; `keep` says whether it finds the pre-activations.

    Each of `sums` is told the values of f(gate) or of f(gate) ⊙ up, chunk by chunk.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: _Activation, keep: bool, sums: Any, bias: Tensor | None, *flat: Any):
        parts = _parts(flat)
        output = x.new_empty(len(x), parts[0].down.shape[1])
        kept = [x.new_empty(len(x), len(part.gate)) for part in parts for _ in range(2)] if keep else []
        for rows in _chunks(x):
            out = output[rows]
            if bias is not None:
                out.copy_(bias)
            for number, part in enumerate(parts):
                gate, up = _pre_activations(x[rows], part, [each[rows] for each in kept[2 * number : 2 * number + 2]])
                hidden = activation.value(gate)
                for squares in sums:
                    squares.add(number, hidden, rows, of_product=False)
                hidden.mul_(up)
                for squares in sums:
                    squares.add(number, hidden, rows, of_product=True)
                out.addmm_(hidden, part.down, beta=int(number > 0 or bias is not None))
        ctx.activation = activation
        ctx.save_for_backward(x, bias, *flat, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        needed = ctx.needs_input_grad
        x, bias, *rest = ctx.saved_tensors
        flat, kept = rest[: len(needed) - 5], rest[len(needed) - 5 :]
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: let autograd find both
            return _twice_differentiable(ctx, grad, x, bias, flat)
        parts, wanted = _parts(flat), _parts(needed[5:])
        gradients = [dict.fromkeys(Part._fields) for _ in parts]
        grad_x = torch.empty_like(x) if needed[0] else None
        for rows in _chunks(x):
            for number, (part, wants, grads) in enumerate(zip(parts, wanted, gradients, strict=True)):
                pre = [each[rows] for each in kept[2 * number : 2 * number + 2]]
                gate, up = pre or _pre_activations(x[rows], part)
                value = ctx.activation.value(gate)
                if wants.down:
                    grads["down"] = _added(grads["down"], (value * up).T, grad[rows])
                grad_hidden = grad[rows] @ part.down.T
                grad_up = value.mul_(grad_hidden)
                grad_gate = ctx.activation.backward(grad_hidden.mul_(up), gate)
                del grad_hidden
                for name, grad_pre in (("gate", grad_gate), ("up", grad_up)):
                    if getattr(wants, name):
                        grads[name] = _added(grads[name], grad_pre.T, x[rows])
                    if getattr(wants, f"{name}_bias"):
                        own, before = grad_pre.sum(0, dtype=wide(x.dtype)), grads[f"{name}_bias"]
                        grads[f"{name}_bias"] = own if before is None else own + before
                    if grad_x is not None:
                        grad_x[rows].addmm_(grad_pre, getattr(part, name), beta=int(number > 0 or name == "up"))
        weights = [None if found is None else found.to(x.dtype) for grads in gradients for found in grads.values()]
        return grad_x, None, None, None, grad.sum(0) if needed[4] else None, *weights


class PartlyTrained(torch.autograd.Function):
    """x Wᵀ, or x W where W `reads` units, of W = [tuned | frozen]: one product each way, and a gradient for `tuned`."""

    @staticmethod
    def forward(x: Tensor, tuned: Tensor, frozen: Tensor, reads: bool) -> Tensor:
        whole = torch.cat([tuned, frozen])
        return x @ (whole if reads else whole.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.reads = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, tuned, frozen), grad_x, grad_tuned = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            whole = torch.cat([tuned, frozen])
            grad_x = grad @ (whole.T if ctx.reads else whole)
        if ctx.needs_input_grad[1]:
            left, right = (x, grad) if ctx.reads else (grad, x)
            grad_tuned = left[..., : len(tuned)].flatten(0, -2).T @ right.flatten(0, -2)
        return grad_x, grad_tuned, None, None


class FusedFFN(nn.Module):
    """A gated FFN whose projections are split; it runs as one function where nothing has to see inside.

    A plain module takes this form by a change of class, `take_form`, as projections do. A compiler gets the formula. In
    evaluation and under `torch.func` it falls back to the split form, and where a module inside has a hook that is not
    one of the `observers`: it may need the tensors themselves.
    """

    plain_class: type[nn.Module]
    names: tuple[str, str, str, str]  # of gate, up, down and the activation in this module
    keeps: bool  # pre-activations, for backward
    observers: list[ChannelObserver]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        if not self.training or torch._C._are_functorch_transforms_active():
            return super().forward(*inputs, **named)
        gate, up, down, activation = (self.get_submodule(name) for name in self.names)
        seen = any(_has_other_hooks(module, self.observers) for module in (gate, up, down, activation))
        if seen or not down.training:
            return super().forward(*inputs, **named)
        (x,) = (*inputs, *named.values())
        dtype, known = dtype_of_products(down.frozen), _ACTIVATIONS[type(activation)]
        parts = [part for part in _channels(gate, up, down, dtype) if len(part.gate)]
        bias = None if down.bias is None else down.bias.to(dtype)
        sums = [_SquareSums(parts, observer, x.device) for observer in self.observers if observer.listens()]
        rows = x.to(dtype).flatten(0, -2)
        if torch.compiler.is_compiling():
            output = _for_compiler(rows, known, sums, bias, parts)
        else:
            keep = self.keeps and torch.is_grad_enabled()
            output = GatedFFN.apply(rows, known, keep, sums, bias, *_flat(parts))
        for squares in sums:
            squares.observer.take_squares(torch.cat(squares.sums))
        return output.unflatten(0, x.shape[:-1])

    def __reduce__(self) -> tuple:  # its class is made on the fly; copy and pickle know the plain one
        return _blank, (self.plain_class,), self.__dict__


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the weights of a model of `dtype` train, and in which sums are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_of_products(weight: Tensor) -> torch.dtype:
    """Dtype in which activations are multiplied by a weight: its own, or autocast's."""
    device = weight.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # `without_autocast` tells why not by torch's own word
    return torch.get_autocast_dtype(device) if on else weight.dtype


def in_one(frozen: Tensor) -> bool:
    """Whether one product with a copy of the whole weight stands for two: for a compiler, which has less to do."""
    return torch.compiler.is_compiling() and not frozen.requires_grad


def counted(values: Float[Tensor, "tokens n"], tokens: Tensor) -> Float[Tensor, "_ n"]:
    """The rows of those tokens, for a sum; for a compiler, which needs to know how many there are, zeros elsewhere."""
    return values.where(tokens[:, None], 0) if torch.compiler.is_compiling() else values[tokens]


def take_form(module: nn.Module, names: tuple[str, str, str, str], mode: str) -> None:
    """Let a gated FFN with split projections run as `mode`, where its activation is known and it is not patched."""
    known = type(module.get_submodule(names[3])) in _ACTIVATIONS
    if mode != "split" and known and "forward" not in module.__dict__:
        module.__class__ = _fused_class(type(module))
        module.__dict__.update(names=names, keeps=mode == "fused", observers=[])


def leave_form(module: FusedFFN) -> None:
    """Make the module plain again."""
    for name in ("names", "keeps", "observers"):
        del module.__dict__[name]
    module.__class__ = module.plain_class


class _SquareSums:
    """Sums of squares for one observer in one pass, over the tokens that it counts, part by part."""

    def __init__(self, parts: list[Part], observer: ChannelObserver, device: torch.device) -> None:
        self.observer, self.tokens = observer, observer.tokens()
        self.sums = [torch.zeros(len(part.gate), dtype=torch.float64, device=device) for part in parts]

    def add(self, number: int, values: Tensor, rows: slice, *, of_product: bool) -> None:
        if of_product == self.observer.of_product:
            values = values if self.tokens is None else counted(values, self.tokens[rows].to(values.device))
            self.sums[number] += values.to(wide(values.dtype)).square().sum(0)


def _has_other_hooks(module: nn.Module, observers: list[ChannelObserver]) -> bool:
    """Whether the module has hooks that are not observers; torch has no public way to ask."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if module._backward_hooks or module._backward_pre_hooks or nn.modules.module._has_any_global_hook():
        return True
    return any(hook not in observers for hook in hooks)


def _channels(gate: Any, up: Any, down: Any, dtype: torch.dtype) -> tuple[Part, Part]:
    """The channels that train, composed in one function, and the frozen ones."""
    readers = [gate] if gate is up else [gate, up]
    tuned = down.composed_with(*readers, dtype=dtype)
    frozen = [(each.frozen, each.bias_frozen) for each in (down, *readers)]

    def part(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Part:
        (written, _), *read = pairs
        weights, biases = zip(*read, strict=True)
        if len(read) == 1:  # one projection holds gate, then up
            weights, biases = weights[0].chunk(2), (None, None) if biases[0] is None else biases[0].chunk(2)
        tensors = (*weights, written, *biases)
        return Part(*(None if tensor is None else tensor.to(dtype) for tensor in tensors))

    return part(tuned), part(frozen)


def _for_compiler(x: Tensor, activation: _Activation, sums: Any, bias: Tensor | None, parts: list[Part]) -> Tensor:
    """The formula over all parts at once, for a compiler to differentiate and to join what surrounds its products."""

    def product(x: Tensor, name: str, *, reads: bool = False) -> Tensor:
        weights = [getattr(part, name) for part in parts]
        if len(parts) > 1 and in_one(weights[1]):
            return PartlyTrained.apply(x, *weights, reads)
        return x @ (torch.cat(weights) if reads else torch.cat(weights).T)

    def biased(name: str) -> Tensor:
        biases = [getattr(part, f"{name}_bias") for part in parts]
        return product(x, name) if biases[0] is None else product(x, name) + torch.cat(biases)

    value = activation.value(biased("gate"))
    hidden = value * biased("up")
    sizes = [len(part.gate) for part in parts]
    for squares in sums:
        for number, (gates, products) in enumerate(zip(value.split(sizes, 1), hidden.split(sizes, 1), strict=True)):
            squares.add(number, gates, slice(None), of_product=False)
            squares.add(number, products, slice(None), of_product=True)
    output = product(hidden, "down", reads=True)
    return output if bias is None else output + bias


def _twice_differentiable(ctx: Any, grad: Tensor, x: Tensor, bias: Tensor | None, flat: list[Tensor | None]) -> tuple:
    inputs = [x, bias, *flat]
    wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
    with torch.enable_grad():
        # views: a gradient by the saved tensors themselves would run through what made them
        fresh = [None if t is None else t.view_as(t) for t in inputs]
        output = literal_ffn(fresh[0], ctx.activation, fresh[1], _parts(fresh[2:]))
        chosen = [t for t, need in zip(fresh, wanted, strict=True) if need]
        found = iter(torch.autograd.grad(output, chosen, grad, create_graph=True))
    gradients = [next(found) if need else None for need in wanted]
    return gradients[0], None, None, None, *gradients[1:]


def _pre_activations(x: Tensor, part: Part, out: list[Tensor] | None = None) -> list[Tensor]:
    out = out or [x.new_empty(len(x), len(part.gate)) for _ in range(2)]
    for weight, bias, target in ((part.gate, part.gate_bias, out[0]), (part.up, part.up_bias, out[1])):
        if bias is None:
            torch.mm(x, weight.T, out=target)
        else:
            torch.addmm(bias, x, weight.T, out=target)
    return out


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Add a product to a sum, in place but where parts of half precision begin to add up in float32."""
    if total is None:
        return left @ right
    exact = left.dtype == wide(left.dtype)
    return total.addmm_(left, right) if exact else total.to(wide(total.dtype)).add_(left @ right)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of tokens: on a CPU so few that a thread keeps its part in its cache, elsewhere enough to fill the device.

    In half precision products are over so soon that sums in float32 and calls weigh more than the cache.
    """
    of_thread = 256 if x.dtype == wide(x.dtype) else 1024
    size = 4096 if x.device.type == "cuda" else of_thread * torch.get_num_threads()
    return (slice(start, start + size) for start in range(0, len(x), size))


def _parts(flat: Any) -> list[Part]:
    size = len(Part._fields)
    return [Part(*flat[start : start + size]) for start in range(0, len(flat), size)]


def _flat(parts: list[Part]) -> list[Tensor | None]:
    return [tensor for part in parts for tensor in part]


@cache
def _fused_class(plain: type[nn.Module]) -> type[FusedFFN]:
    return type(f"Fused{plain.__name__}", (FusedFFN, plain), {"plain_class": plain, "__module__": __name__})


def _blank(plain: type[nn.Module]) -> FusedFFN:
    fused = _fused_class(plain)
    return fused.__new__(fused)
