"""A training step that several devices share, for the planner: what an engine holds and sends at each of its moments.

On the meta device no process has a partner, so that engines are imitated: their own buffers are allocated and freed
where they do so, and counted with the rest. FSDP2 shards and gathers by decoder layers, as accelerate sets it up.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

_ZERO_BUCKET = 500_000_000  # gradients that DeepSpeed reduces at a time, unless it is told otherwise


class Alone:
    """One device, which holds all there is; `gathered` and `gradients` are the bytes of both at this moment."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], devices: int) -> None:
        self.model, self.layers, self.devices = model, layers, devices
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.gathered = self.gradients = self.sent = 0
        self._attached = ExitStack()

    def __enter__(self) -> Self:
        for parameter in self.trained:
            self._attached.callback(parameter.register_post_accumulate_grad_hook(self.take_gradient).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._attached.close()

    def parameters(self) -> list[Tensor]:
        """What this device holds of the parameters between steps."""
        return list(self.model.parameters())

    def moments(self) -> dict[nn.Parameter, Tensor]:
        """What it holds for AdamW, by parameter; of what is left out, its two moments."""
        return {}

    def buffers(self) -> list[Tensor]:
        """What it holds for gradients between steps."""
        return []

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Hear that a gradient is there."""
        self.gradients += parameter.grad.nbytes

    def finish(self) -> None:
        """Hear that backward has ended."""

    def forget(self) -> None:
        """Hear that gradients are gone, after the optimizer's step."""
        self.gradients = 0

    def part(self, size: int) -> int:
        """Of `size` things, those that one device has."""
        return math.ceil(size / self.devices)

    def send(self, size: int) -> None:
        """Note that all devices gather, or reduce and scatter, that many bytes in a ring."""
        self.sent += size * (self.devices - 1) // self.devices


class Ddp(Alone):
    """Data parallel: all is on each device, and gradients once more, in the buckets in which they are averaged."""

    def buffers(self) -> list[Tensor]:
        return [torch.empty_like(parameter) for parameter in self.trained]

    def finish(self) -> None:
        for _ in range(2):
            self.send(sum(parameter.nbytes for parameter in self.trained))


class Zero2(Alone):
    """ZeRO 2: parameters are on each device; gradients, AdamW's state and a copy of what trains are shared out."""

    def moments(self) -> dict[nn.Parameter, Tensor]:
        return {parameter: parameter.new_zeros(3, self.part(parameter.numel())) for parameter in self.trained}

    def buffers(self) -> list[Tensor]:
        bucket = min(_ZERO_BUCKET, sum(parameter.numel() for parameter in self.trained))
        return [torch.empty(bucket, device="meta")]

    def take_gradient(self, parameter: nn.Parameter) -> None:
        self.shards.append(parameter.new_empty(self.part(parameter.numel())))
        self.gradients += self.shards[-1].nbytes
        parameter.grad = None

    def finish(self) -> None:
        for _ in range(2):  # gradients are reduced and scattered, what was updated is gathered
            self.send(sum(parameter.nbytes for parameter in self.trained))

    def forget(self) -> None:
        super().forget()
        self.shards.clear()

    def __enter__(self) -> Self:
        self.shards: list[Tensor] = []
        return super().__enter__()


@dataclass(eq=False)
class _Unit:
    """Modules whose parameters FSDP2 gathers together."""

    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    kept: bool  # from forward to backward
    padded: int = 0  # bytes that all devices hold of it
    trained: int = 0  # of which gradients
    flat: Tensor | None = field(default=None, repr=False)  # what was gathered, before it is taken apart
    open: Tensor | None = None  # the parameters themselves
    shard: Tensor | None = None  # of the gradients


class Fsdp2(Alone):
    """FSDP2: each device holds a part of all, gathers a unit before it runs, and the one before it while it does."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], devices: int) -> None:
        super().__init__(model, layers, devices)
        self.units = list(self._units())
        for unit in self.units:
            sizes = [self._padded(parameter) for parameter in unit.parameters]
            unit.padded = sum(sizes)
            unit.trained = sum(s for p, s in zip(unit.parameters, sizes, strict=True) if p.requires_grad)

    def _units(self) -> Iterator[_Unit]:
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        inside = getattr(self.model, "base_model", self.model).modules()
        inner = {id(module) for layer in self.layers for module in layer.modules()}
        norms = [m for m in inside if "Norm" in type(m).__name__ and id(m) not in inner][-1:]
        tied = head is not None and embedding.weight is head.weight
        tail = [*norms, *([embedding] if tied else []), *([head] if head is not None else [])]
        groups = [] if tied else [([embedding], False)]
        groups += [([layer], False) for layer in self.layers] + [(tail, True), ([self.model], True)]
        seen: set[nn.Parameter] = set()
        for modules, kept in groups[:-1]:
            own = dict.fromkeys(p for module in modules for p in module.parameters() if p not in seen)
            seen.update(own)
            yield _Unit(modules, list(own), kept)
        if rest := [parameter for parameter in self.model.parameters() if parameter not in seen]:
            yield _Unit([self.model], rest, True)

    def _padded(self, parameter: Tensor) -> int:
        rows = len(parameter) if parameter.dim() else 1
        return parameter.nbytes // max(rows, 1) * self.part(rows) * self.devices

    def parameters(self) -> list[Tensor]:
        return [self._bytes(self.part(unit.padded)) for unit in self.units]

    def moments(self) -> dict[nn.Parameter, Tensor]:
        return {p: p.new_zeros(2, self.part(self._padded(p)) // p.itemsize) for p in self.trained}

    def __enter__(self) -> Self:
        self._last: Tensor | None = None  # what was gathered last in forward, kept until the next is
        self._reduced: Tensor | None = None  # gradients on their way, kept until the next are
        self._current: _Unit | None = None  # whose backward runs
        for unit in self.units:
            for module in unit.modules:
                self._attached.callback(module.register_forward_pre_hook(lambda *_, unit=unit: self._open(unit)).remove)
            hook = unit.modules[-1].register_forward_hook(lambda _, __, output, unit=unit: self._close(unit, output))
            self._attached.callback(hook.remove)
        return super().__enter__()

    def _bytes(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def _gather(self, unit: _Unit) -> Tensor:
        self.send(unit.padded)
        return self._bytes(unit.padded)

    def _count(self) -> None:
        held = [self._last, self._reduced, *(tensor for unit in self.units for tensor in (unit.flat, unit.open))]
        self.gathered = sum(tensor.nbytes for tensor in held if tensor is not None)

    def _open(self, unit: _Unit) -> None:
        if self._current is None and unit.open is None:
            flat = self._gather(unit)
            self._last = None
            unit.open, self._last = self._bytes(unit.padded), flat
            self._count()

    def _close(self, unit: _Unit, output: Any) -> None:
        if self._current is not None:  # a pass that gradient checkpointing repeats
            return
        if not unit.kept:
            unit.open = None
        first = (
            output
            if isinstance(output, Tensor)
            else next(iter(output.values() if hasattr(output, "values") else output))
        )
        if isinstance(first, Tensor) and first.requires_grad and unit.modules != [self.model]:
            first.register_hook(lambda _: self._before(unit))
        self._count()

    def _before(self, unit: _Unit) -> None:
        self._last = None
        self._after(self._current)
        if unit.open is None:
            unit.flat = self._gather(unit) if unit.flat is None else unit.flat
            unit.open, unit.flat = self._bytes(unit.padded), None
        self._current, index = unit, self.units.index(unit)
        if index and (ahead := self.units[index - 1]).open is None:
            ahead.flat = self._gather(ahead)
        self._count()

    def _after(self, unit: _Unit | None) -> None:
        if unit is None:
            return
        unit.open = self._reduced = None
        if unit.trained:
            self._reduced = self._bytes(unit.trained)
            self.send(unit.trained)
            for parameter in unit.parameters:
                if parameter.grad is not None:
                    self.gradients -= parameter.grad.nbytes
                    parameter.grad = None
            unit.shard = self._bytes(self.part(unit.trained))
            self.gradients += unit.shard.nbytes
        self._count()

    def finish(self) -> None:
        self._after(self._current)
        for unit in self.units:
            if unit.modules == [self.model]:
                self._after(unit)
            unit.open = unit.flat = None
        self._current = self._reduced = None
        self._count()

    def forget(self) -> None:
        super().forget()
        for unit in self.units:
            unit.shard = None


STRATEGIES: dict[str, type[Alone]] = {"ddp": Ddp, "fsdp": Fsdp2, "zero2": Zero2}
