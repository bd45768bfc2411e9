"""Streaming activation statistics of heads and channels: the advantage assessment of APEX (arXiv:2505.24241)."""

import inspect
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, Self

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from apexlib.architectures import Component, model_components
from apexlib.evaluation import in_evaluation, on_device
from apexlib.fused_ffn import FusedFFN, counted, wide
from apexlib.progress import progress

EMA_DECAY = 0.9  # the moving averages that the paper compares with the plain rank score


def activation_statistics(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    top: float = 0.1875,
    statistic: Literal["gate", "product"] = "gate",
) -> pd.DataFrame:
    """Assess every head and channel of `model` over `batches`, in evaluation mode and without gradients.

    A batch is what the model's forward takes (`input_ids`, `attention_mask`, …; `labels` are left out). The table is
    that of `ActivationRecorder.table`. The model comes back in the mode it was in, without hooks, also after an error.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    ...                      vocab_size=32)
    >>> batch = {"input_ids": torch.arange(20).view(2, 10)}
    >>> table = activation_statistics(LlamaForCausalLM(config), [batch])
    >>> table.groupby("component", sort=False).size().to_dict()
    {'head': 8, 'channel': 48}
    """
    with in_evaluation(model), ActivationRecorder(model, top=top, statistic=statistic) as recorder:
        for batch in progress(batches, "assessing"):
            inputs = on_device(model, batch, labels=False)
            model.base_model(**inputs, use_cache=False)
    return recorder.table()


class NotFiniteError(ValueError, FloatingPointError):
    """An activation is NaN or infinite."""


class ActivationRecorder:
    """Gather statistics from every forward pass of `model` inside the `with` block, also during training.

    `top` is the fraction K of the units that count as Top-K and as Min-K of a batch (0 < top ≤ 0.5). `statistic` says
    where channels are seen: "gate", the output of the activation function (the paper's), or "product", the input of
    the FFN's output projection (for an FFN without a gate the two are the same). Heads are always seen at the input
    of the attention's output projection.

    `training_only` passes over what runs in evaluation mode. With `differentiable`, `imbalance` holds, after each pass,
    the mean over layers and components of the coefficient of variation of its activations, as a term of a loss.

    Padding is left out by the 2-D `attention_mask` of the forward pass. A pass that gradient checkpointing repeats in
    backward is counted once. The first NaN or infinite activation raises ValueError and names layer and batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        top: float = 0.1875,
        statistic: Literal["gate", "product"] = "gate",
        training_only: bool = False,
        differentiable: bool = False,
    ) -> None:
        if not 0 < top <= 0.5:
            raise ValueError(f"top = {top}: need a fraction above 0 and at most 0.5 (Top-K and Min-K are disjoint)")
        if statistic not in ("gate", "product"):
            raise ValueError(f"statistic {statistic!r}: need 'gate' or 'product'")
        self.model, self.top, self.statistic = model, top, statistic
        self.training_only, self.differentiable = training_only, differentiable
        self.imbalance: Tensor | None = None
        self.components = model_components(model)
        self.tokens = 0
        self.batches = 0
        names = dict.fromkeys(part.component for part in self.components)
        self._sums = {name: _UnitSums([p for p in self.components if p.component == name], top) for name in names}
        self._attached = ExitStack()
        self._pass: torch.nn.Module | None = None  # the module whose forward opened the running pass
        self._rows: Tensor | None = None  # which tokens of the running pass are no padding; None: all
        self._tokens = 0
        self._observers: list[_Observer] = []

    def __enter__(self) -> Self:
        # the outermost forward marks a pass: what backward recomputes runs outside it
        attach = self._attached.enter_context
        for module in (self.model, self.model.base_model):
            attach(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            attach(module.register_forward_hook(self._end, always_call=True))
        for part in self.components:
            reader = self.model.get_submodule(part.reader.module)
            observer = _Observer(self, part, reader, of_product=part.component == "head" or self.statistic == "product")
            self._observers.append(observer)
            if not observer.of_product:
                attach(self.model.get_submodule(part.activation).register_forward_hook(observer))
            elif (observers := getattr(reader, "observers", None)) is None:
                attach(reader.register_forward_pre_hook(observer))
            else:  # an expanded projection, compiled once for all layers, which no hook of their own would let it be
                observers.append(observer)
                self._attached.callback(observers.remove, observer)
            block = self.model.get_submodule(part.reader.module.rpartition(".")[0])
            if isinstance(block, FusedFFN) and not self.differentiable:  # a loss term needs the activations themselves
                block.observers.append(observer)
                self._attached.callback(block.observers.remove, observer)
        return self

    def __exit__(self, *_: object) -> None:
        self._attached.close()
        self._pass, self._observers = None, []

    def gather(self) -> None:
        """Add up what the processes of a distributed run have seen, so that all of them hold the same statistics."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        states: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, (self.tokens, self.batches, self._sums))
        self.tokens = sum(tokens for tokens, _, _ in states)
        self.batches = sum(batches for _, batches, _ in states)
        for component, sums in self._sums.items():
            sums.combine([others[component] for _, _, others in states])

    def state(self) -> dict[str, Any]:
        """What was gathered so far, as tensors and numbers."""
        sums = {name: {key: getattr(sums, key) for key in sums.gathered} for name, sums in self._sums.items()}
        return {"tokens": self.tokens, "batches": self.batches, "sums": sums}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.tokens, self.batches = state["tokens"], state["batches"]
        for component, sums in self._sums.items():
            vars(sums).update(state["sums"][component])

    def table(self) -> pd.DataFrame:
        """One row per layer, component and unit, in that order, units numbered as in the model.

        Columns: `layer`, `component` ("head" or "channel"), `unit`; `activation`, the mean squared norm per token;
        `rank_score`, the number of batches in which the unit was in the Top-K less those in which it was in the
        Min-K; `ema` and `ema_rank`, moving averages of both (decay 0.9, started at the first batch); `tokens`,
        `batches`. Within a batch, ties are ranked by unit number.
        """
        if not self.batches:
            raise ValueError("no batch was seen: need at least one forward pass over one token that is no padding")
        tables = []
        for part in self.components:
            sums = self._sums[part.component]
            row = sums.parts.index(part)
            averages = {"ema": sums.ema[row], "ema_rank": sums.ema_rank[row]}
            mean, rank = sums.total[row] / self.tokens, sums.rank_score[row]
            tables.append(unit_table(part, activation=mean, rank_score=rank, **averages))
        return pd.concat(tables, ignore_index=True).assign(tokens=self.tokens, batches=self.batches)

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if self._pass not in (None, module) or (self.training_only and not module.training):
            return
        self._pass = module
        inputs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
        mask = inputs.get("attention_mask")
        self._rows, self._tokens = None, tokens.numel()
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ValueError("attention_mask: need a tensor of shape (batch, tokens) that is 0 on padding")
            rows = mask[:, -tokens.shape[1] :].reshape(-1).bool()  # with a cache the mask also covers what went before
            if not rows.all():
                self._rows, self._tokens = rows, int(rows.sum())

    @torch.compiler.disable
    def _end(self, module: torch.nn.Module, _: tuple, output: object) -> None:
        if self._pass is not module:
            return
        self._pass = None
        if output is None or not self._tokens:  # the forward raised, or the batch was all padding
            return
        squares = {(each.part.component, each.part.layer): each.by_unit() for each in self._observers}
        if self.differentiable:
            self.imbalance = torch.stack([_variation(values) for values in squares.values() if len(values) > 1]).mean()
        for component, sums in self._sums.items():
            seen = [squares[component, part.layer].detach() for part in sums.parts]
            batch = torch.stack([each.to(seen[0].device) for each in seen]).double().cpu()
            if not batch.isfinite().all():
                row, unit = (~batch.isfinite()).nonzero()[0].tolist()
                raise NotFiniteError(
                    f"batch {self.batches}: {component} {unit} of layer {sums.parts[row].layer} has a NaN or infinite "
                    "activation; nothing can be ranked"
                )
            sums.add(batch, self._tokens)
        self.tokens += self._tokens
        self.batches += 1


class _Observer:
    """A hook that sees one component's activations; a `ChannelObserver` of a fused FFN, which tells it their squares.

    The inputs of an expanded projection are numbered by its `input_order`, where they run in another order.
    """

    def __init__(
        self, recorder: ActivationRecorder, part: Component, reader: torch.nn.Module, *, of_product: bool
    ) -> None:
        self.recorder, self.part, self.reader, self.of_product = recorder, part, reader, of_product
        self.squares: Tensor | None = None
        self._units: tuple[tuple, Tensor] | None = None

    def __call__(self, _: torch.nn.Module, inputs: tuple, output: Tensor | None = None) -> None:
        if self.listens():
            seen = inputs[0] if output is None else output
            self.take_squares(_sum_of_squares(seen if self.recorder.differentiable else seen.detach(), self.tokens()))

    def listens(self) -> bool:
        """Whether a pass is running that counts."""
        return self.recorder._pass is not None

    def tokens(self) -> Tensor | None:
        """Which tokens of the pass are no padding; None: all."""
        return self.recorder._rows

    def take_squares(self, squares: Float[Tensor, " inputs"]) -> None:
        """Take each input's sum of squares over the tokens of this pass, in the order in which the layer runs them."""
        self.squares = squares

    def by_unit(self) -> Float[Tensor, " units"]:
        """Hand on the sums of the pass that ends, by unit."""
        squares, self.squares = self.squares, None
        units = self._unit_of_input(getattr(self.reader, "input_order", None), squares.device)
        return squares.new_zeros(self.part.units).index_add_(0, units, squares)

    def _unit_of_input(self, order: Tensor | None, device: torch.device) -> Tensor:
        made_for = (order, None if order is None else order._version, device)
        if self._units is None or self._units[0][0] is not order or self._units[0][1:] != made_for[1:]:
            index = self.part.reader.index
            units = torch.empty(index.numel(), dtype=torch.int64)
            units[index.flatten()] = torch.arange(len(index)).repeat_interleave(index[0].numel())
            self._units = made_for, (units if order is None else units[order.cpu()]).to(device)
        return self._units[1]


def _sum_of_squares(activation: Float[Tensor, "*batch n"], tokens: Tensor | None) -> Float[Tensor, " n"]:
    """Sum the squares of the columns over `tokens` (None: all), in float32 at least."""
    rows = activation.flatten(0, -2)
    rows = rows if tokens is None else counted(rows, tokens.to(rows.device))
    if torch.compiler.is_compiling():
        return rows.to(wide(rows.dtype)).square().sum(0)
    sums = [chunk.to(wide(rows.dtype)).square().sum(0) for chunk in rows.split(512)]  # no copy of all rows
    return torch.stack(sums).sum(0)


class _UnitSums:
    """Running sums over batches for all layers of one component, arrays of shape (layers, units)."""

    gathered = ("total", "rank_score", "ema", "ema_rank")

    def __init__(self, parts: list[Component], top: float) -> None:
        self.parts = parts
        shape = (len(parts), parts[0].units)
        self.count = min(max(1, math.floor(top * shape[1] + 1e-9)), shape[1] // 2)  # 0 of one unit alone
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.rank_score = torch.zeros(shape, dtype=torch.int64)
        self.ema: Tensor | None = None
        self.ema_rank: Tensor | None = None

    def add(self, squares: Float[Tensor, "layers units"], tokens: int) -> None:
        self.total += squares
        rank = self._rank(squares)
        self.rank_score += rank
        mean, rank = squares / tokens, rank.double()
        self.ema = mean if self.ema is None else EMA_DECAY * self.ema + (1 - EMA_DECAY) * mean
        self.ema_rank = rank if self.ema_rank is None else EMA_DECAY * self.ema_rank + (1 - EMA_DECAY) * rank

    def combine(self, others: list["_UnitSums"]) -> None:
        """Become the sum of `others`; moving averages become their mean, since no order joins parallel batches."""
        for name in self.gathered:
            values = torch.stack([getattr(other, name) for other in others])
            setattr(self, name, values.mean(0) if name.startswith("ema") else values.sum(0))

    def _rank(self, squares: Float[Tensor, "layers units"]) -> Tensor:
        """+1 for the Top-K of each layer, −1 for its Min-K, else 0; ties by unit number, so that no device decides."""
        rank = torch.zeros_like(self.rank_score)
        order = squares.argsort(dim=1, stable=True)
        rank.scatter_(1, order[:, : self.count], -1)
        rank.scatter_(1, order[:, order.shape[1] - self.count :], 1)
        return rank


def weight_norms(model: PreTrainedModel) -> pd.DataFrame:
    """Frobenius norm of every unit's weights, taken in float64: columns `layer`, `component`, `unit`, `weight_norm`."""
    return _unit_norms(model, "weight_norm", unit_weights(model))


def gradient_norms(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> pd.DataFrame:
    """Frobenius norm of the gradient of every unit's weights: `layer`, `component`, `unit`, `gradient_norm`.

    The gradient is that of the mean loss over all labelled tokens of `batches`, which have `labels`, in evaluation
    mode; it takes memory as a step of full fine-tuning does. Raises ValueError if no token is labelled.
    """
    weights = unit_weights(model)
    sums = {name: torch.zeros_like(weight, dtype=wide(weight.dtype)) for name, weight in weights.items()}
    frozen, tokens = [weight for weight in weights.values() if not weight.requires_grad], 0
    try:
        for weight in frozen:
            weight.requires_grad_()
        with in_evaluation(model), torch.enable_grad():
            for batch in progress(batches, "gradients"):
                if "labels" not in batch:
                    raise ValueError(f"batches: no labels, only {', '.join(batch)}; need them for a loss")
                inputs = on_device(model, batch)
                if not (labelled := int((inputs["labels"][:, 1:] != -100).sum())):
                    continue
                add_gradients(model(**inputs, use_cache=False).loss * labelled, weights, sums)
                tokens += labelled
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    if not tokens:
        raise ValueError("no labelled token in the batches: need at least one label other than -100")
    return _unit_norms(model, "gradient_norm", {name: total / tokens for name, total in sums.items()})


def add_gradients(loss: Tensor, weights: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add the gradient of a loss by each weight to its sum."""
    for name, gradient in zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True):
        sums[name].add_(gradient)


def unit_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices that units have a part of, by the name of their module."""
    modules = {slot.module for part in model_components(model) for slot in part.slots.values()}
    return {name: model.get_submodule(name).weight for name in sorted(modules)}


def _unit_norms(model: PreTrainedModel, column: str, of: Mapping[str, Tensor]) -> pd.DataFrame:
    """Norm of every unit's part of what stands for each matrix."""
    tables = []
    for part in model_components(model):
        squares = torch.zeros(part.units, dtype=torch.float64)
        for slot in part.slots.values():
            values = of[slot.module].detach().double()
            squares += values.square().sum(dim=1 - slot.axis).cpu()[slot.index].sum(dim=(1, 2))
        tables.append(unit_table(part, **{column: squares.sqrt()}))
    return pd.concat(tables, ignore_index=True)


def unit_table(part: Component, **columns: Any) -> pd.DataFrame:
    """One row per unit of a component, numbered as in the model: `layer`, `component`, `unit` and the columns given."""
    return pd.DataFrame({"layer": part.layer, "component": part.component, "unit": range(part.units), **columns})


def _variation(values: Float[Tensor, " units"]) -> Tensor:
    """Coefficient of variation, with a gradient of zero, not NaN, where all values are equal."""
    return values.var(unbiased=False).clamp_min(torch.finfo(values.dtype).tiny).sqrt() / values.mean().clamp_min(1e-30)
