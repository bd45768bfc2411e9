"""The expansion applied to activations, token by token, as the method's own release does it; here to compare with.

A plain implementation of the formula of its own, independent of `apexlib.expansion`: a projection keeps its whole base
weight frozen, adds a second product with a trainable difference of the selected slices, and mixes activations with M, v
and s. It costs (2 + 3r) / 3 of full fine-tuning in dense products at a trainable share r, and M once per token.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel

from apexlib.architectures import model_components
from apexlib.operators import monarch_blocks
from apexlib.plan import ExpansionPlan


class ActivationMixer(nn.Module):
    """M (Monarch, n blocks of m × m, then m blocks of n × n) and v of one layer, for rows of activations."""

    def __init__(self, k: int) -> None:
        super().__init__()
        n, m = monarch_blocks(k)
        self.k, self.n, self.m = k, n, m
        self.v = nn.Parameter(torch.ones(k))
        self.first = nn.Parameter(torch.empty(n, m, m).uniform_(-(m**-0.5), m**-0.5)) if m > 1 else None
        self.second = nn.Parameter(torch.zeros(m, n, n))

    def mix(self, x: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
        """Compute x Mᵀ, that is M applied to each token."""
        blocks = self._padded(x).view(len(x), self.n, self.m).transpose(0, 1)
        if self.first is not None:
            blocks = torch.bmm(blocks, self.first.transpose(1, 2))
        return self._cut(torch.bmm(blocks.permute(2, 1, 0), self.second.transpose(1, 2)))

    def mix_transposed(self, x: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
        """Compute x M."""
        rows = self._padded(x).view(len(x), self.n, self.m).permute(2, 0, 1)
        blocks = torch.bmm(rows, self.second).permute(2, 1, 0)
        if self.first is not None:
            blocks = torch.bmm(blocks, self.first)
        return blocks.transpose(0, 1).reshape(len(x), -1)[:, : self.k]

    def _padded(self, x: Tensor) -> Tensor:
        return pad(x, (0, self.n * self.m - self.k)) if self.n * self.m > self.k else x

    def _cut(self, rows: Float[Tensor, "m tokens n"]) -> Tensor:
        return rows.permute(1, 2, 0).reshape(rows.shape[1], -1)[:, : self.k]


class ActivationProjection(nn.Module):
    """A projection with its units in the order [N | P | D | F]; it mixes outputs or, where it reads units, inputs."""

    def __init__(self, plain: nn.Linear, order: Tensor, tuned: int, mixer: ActivationMixer | None, reads: bool) -> None:
        super().__init__()
        weight = plain.weight.detach()
        self.weight = nn.Parameter(weight[:, order] if reads else weight[order], requires_grad=False)
        self.bias = None
        if plain.bias is not None:
            bias = plain.bias.detach().clone()
            self.bias = nn.Parameter(bias if reads else bias[order], requires_grad=False)
        shape = (len(weight), tuned) if reads else (tuned, weight.shape[1])
        self.delta = nn.Parameter(weight.new_zeros(shape))
        self.s = nn.Parameter(weight.new_ones(mixer.k)) if mixer is not None and not reads else None
        self.mixer, self.tuned, self.reads = [mixer], tuned, reads  # in a list: registered in the layer once

    def forward(self, x: Float[Tensor, "*batch n_in"]) -> Float[Tensor, "*batch n_out"]:
        mixer, shape = self.mixer[0], x.shape[:-1]
        x = x.flatten(0, -2)
        if self.reads:
            if mixer is not None:
                target, source, rest = x.split([mixer.k, mixer.k, x.shape[1] - 2 * mixer.k], dim=1)
                x = torch.cat([mixer.v * target, source + mixer.mix_transposed(target), rest], dim=1)
            y = linear(x, self.weight, self.bias) + linear(x[:, : self.tuned], self.delta)
        else:
            y = linear(x, self.weight, self.bias)
            own = y[:, : self.tuned] + linear(x, self.delta)
            if mixer is not None:
                target, source, direct = own.split([mixer.k, mixer.k, self.tuned - 2 * mixer.k], dim=1)
                own = torch.cat([mixer.v * target + mixer.mix(source), self.s * source, direct], dim=1)
            y = torch.cat([own, y[:, self.tuned :]], dim=1)
        return y.unflatten(0, shape)


def expand_on_activations(
    model: PreTrainedModel, plan: ExpansionPlan, *, train_embeddings: bool = True
) -> PreTrainedModel:
    """Replace the projections of every planned layer, in place; for models with as many key as query heads."""
    model.requires_grad_(False)
    parts = {(part.layer, part.component): part for part in model_components(model)}
    for layer in plan.layers:
        part = parts[layer.layer, layer.component]
        tuned = [*layer.target, *layer.source, *layer.direct]
        units = torch.tensor(tuned + sorted(set(range(part.units)) - set(tuned)))
        copies, dim = part.reader.index.shape[1:]
        if copies > 1:
            raise ValueError("grouped queries: the scheme has no form for them; need one key head per query head")
        mixer = ActivationMixer(len(layer.source) * dim) if layer.source else None
        for number, slot in enumerate(part.slots.values()):
            path, _, leaf = slot.module.rpartition(".")
            parent = model.get_submodule(path)
            own = None if slot.role in ("query", "key") else mixer
            order = slot.index[units].flatten()
            setattr(
                parent, leaf, ActivationProjection(getattr(parent, leaf), order, len(tuned) * dim, own, slot.is_input)
            )
            if number == 0 and mixer is not None:
                parent.add_module(f"mixer_{part.component}", mixer)
    if train_embeddings:
        model.get_input_embeddings().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    return model
