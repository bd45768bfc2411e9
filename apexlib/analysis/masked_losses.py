"""What is lost without some units, token by token: a model's losses on a text under any mask of heads or channels.

Where `masking_curve` measures a mean over a text, this keeps every token, and measures each mask once.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apexlib.activations import activation_statistics
from apexlib.analysis.difference import Order, masked_count, masked_first, silenced
from apexlib.architectures import Component, model_components
from apexlib.evaluation import in_evaluation, on_device

_LENGTH = 256  # tokens of a piece of a text


class Mask(NamedTuple):
    """Units to silence, layer by layer, and how they were chosen."""

    component: str
    order: str
    units: tuple[tuple[int, tuple[int, ...]], ...]  # (layer, units in ascending order)

    @property
    def layers(self) -> str:
        """The layers, as a text."""
        return ", ".join(str(layer) for layer, _ in self.units)

    @property
    def silences(self) -> tuple:
        """What decides the loss."""
        chosen = tuple(each for each in self.units if each[1])
        return (self.component, chosen) if chosen else ()


NOTHING = Mask("", "", ())


class Masking:
    """A model, a text and the losses measured on it.

    `text` is a text, or what `pack` or `batches` makes of one; `statistics` rank the units (default: taken on it).
    Beside each mask stand `draws` random ones of its size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str | Iterable[Mapping[str, Tensor]],
        statistics: pd.DataFrame | None = None,
        *,
        draws: int = 4,
    ) -> None:
        if draws < 1:
            raise ValueError(f"draws {draws}: need at least one random mask to compare with")
        self.model, self.tokenizer, self.draws = model, tokenizer, draws
        self.rows = list(_rows(text, tokenizer))
        if not any((labels[1:] != -100).any() for _, labels in self.rows):
            raise ValueError("text: no token to predict; need two tokens or more, and a label for one of them")
        self.parts: dict[str, dict[int, Component]] = {}
        for part in model_components(model):
            self.parts.setdefault(part.component, {})[part.layer] = part
        if statistics is None:
            statistics = activation_statistics(model, [{"input_ids": ids[None]} for ids, _ in self.rows])
        self.statistics = statistics
        self._losses: dict[tuple, list[np.ndarray]] = {}
        self._outputs: dict[tuple[str, int], list[np.ndarray]] = {}
        self._asked: dict[Mask, None] = {}  # in order

    def mask(self, component: str, order: Order, share: float, layers: Iterable[int], *, seed: int = 0) -> Mask:
        """Choose ⌊share·n⌋ units of each layer, at least one if any, in an order of `masking_curve`."""
        if not 0 <= share <= 1:
            raise ValueError(f"share {share}: need a value from 0 to 1")
        parts = [self.parts[component][layer] for layer in layers]
        counts = [masked_count(part, share) for part in parts]
        chosen = (self._first(part, order, count, seed) for part, count in zip(parts, counts, strict=True))
        return Mask(component, order, tuple((part.layer, units) for part, units in zip(parts, chosen, strict=True)))

    def random_like(self, mask: Mask) -> list[Mask]:
        """Draw masks of as many units in each layer."""
        sizes = [(self.parts[mask.component][layer], len(units)) for layer, units in mask.units]
        drawn = (
            [(part.layer, self._first(part, "random", size, seed)) for part, size in sizes]
            for seed in range(self.draws)
        )
        return [mask._replace(order="random", units=tuple(units)) for units in drawn]

    def token_losses(self, mask: Mask = NOTHING) -> list[Float[np.ndarray, " tokens"]]:
        """Measure the losses (nats) of each sequence; NaN for its first token, and where there is no label."""
        self._asked.setdefault(mask)
        if (key := mask.silences) not in self._losses:
            self._losses[key] = [self._measured(*row, mask) for row in self.rows]
        return self._losses[key]

    def loss(self, mask: Mask = NOTHING) -> float:
        """Mean loss in nats per token, that of `perplexity`."""
        return float(np.nanmean(np.concatenate(self.token_losses(mask)), dtype=float))

    def logits(self, ids: Int[Tensor, " tokens"], mask: Mask = NOTHING) -> Float[Tensor, "tokens vocabulary"]:
        """Run the model on one sequence under a mask."""
        parts = self.parts.get(mask.component, {}).values()
        with in_evaluation(self.model), silenced(self.model, parts, dict(mask.units)):
            return self.model(**on_device(self.model, {"input_ids": ids[None]}), use_cache=False).logits[0].float()

    def outputs(self, component: str, layer: int) -> list[Float[np.ndarray, "tokens units"]]:
        """Measure the norm of each unit's output, as its projection reads it, at each token of each sequence."""
        if (component, layer) not in self._outputs:
            slot, found = self.parts[component][layer].reader, []

            def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found.append(inputs[0][0][:, slot.index.to(inputs[0].device)].float().norm(dim=(-2, -1)).cpu().numpy())

            with self.model.get_submodule(slot.module).register_forward_pre_hook(keep):
                for ids, _ in self.rows:
                    self.logits(ids)
            self._outputs[component, layer] = found
        return self._outputs[component, layer]

    @property
    def table(self) -> pd.DataFrame:
        """Every mask measured so far, one row each.

        Columns: `component`, `order`, `layers`; `units` silenced, their `share` in these layers; `loss` in nats per
        token, `increase` over the plain model; `silenced`, the units by layer.
        """
        rows, base = [], self.loss()
        for mask in self._asked:
            count, loss = sum(len(units) for _, units in mask.units), self.loss(mask)
            share = count / max(1, sum(self.parts[mask.component][layer].units for layer, _ in mask.units))
            row = {"component": mask.component, "order": mask.order, "layers": mask.layers, "units": count}
            row |= {"share": share, "loss": loss, "increase": loss - base, "silenced": dict(mask.units)}
            rows.append(row)
        return pd.DataFrame(rows)

    def _measured(self, ids: Int[Tensor, " n"], labels: Int[Tensor, " n"], mask: Mask) -> Float[np.ndarray, " n"]:
        logits = self.logits(ids, mask)[:-1]
        targets = labels[1:].to(logits.device)
        losses = cross_entropy(logits, targets, reduction="none").masked_fill(targets == -100, torch.nan)
        return pad(losses, (1, 0), value=torch.nan).cpu().numpy()

    def _first(self, part: Component, order: Order, count: int, seed: int) -> tuple[int, ...]:
        have = self.statistics[["layer", "component"]].eq([part.layer, part.component]).all(axis=1).sum()
        if have != part.units:
            there = f"statistics: {have} {part.component}s in layer {part.layer}"
            raise ValueError(f"{there}; need the {part.units} of this model")
        return tuple(sorted(masked_first(self.statistics, part, order, seed)[:count]))


def _rows(
    text: str | Iterable[Mapping[str, Tensor]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
    """Yield the tokens of each sequence, without padding, and their labels."""
    if isinstance(text, str):
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0].long()
        text = [{"input_ids": piece} for piece in ids.split(_LENGTH)]
    for number, item in enumerate(text):
        if not isinstance(item, Mapping) or "input_ids" not in item:
            raise ValueError(f"text: item {number} is {type(item).__name__}; need a text, or blocks with input_ids")
        ids = torch.atleast_2d(item["input_ids"])
        kept = torch.atleast_2d(item.get("attention_mask", torch.ones_like(ids))).bool()
        labels = torch.atleast_2d(item.get("labels", ids))
        yield from ((own[keep], label[keep]) for own, label, keep in zip(ids, labels, kept, strict=True))
