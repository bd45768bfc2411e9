"""Spectra of what a model computes rather than of how it stores it: products of heads, and hidden states.

Single weights of a head are not unique: W_V and W_O may exchange any invertible factor. Their product may not.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from apexlib.analysis.spectrum import measures, singular_values
from apexlib.architectures import family_of, model_components
from apexlib.evaluation import in_evaluation, on_device
from apexlib.progress import progress


def head_table(model: PreTrainedModel) -> pd.DataFrame:
    """Measure W_V W_O of every head: what it writes to the residual stream for what it reads there, d_model × d_model.

    Of rank head_dim at most, so its singular values are those of R_V R_Oᵀ, with W_V = Q_V R_V and W_O = R_Oᵀ Q_Oᵀ: no
    d_model × d_model matrix is formed. Biases and norms are left out. Columns: `layer`, `unit` (a head, or the
    key/value group that serves it), `copy` (query head of the group), and the `SPECTRAL_MEASURES`.
    """
    parts = [part for part in model_components(model) if part.component == "head"]
    rows = []
    for part in progress(parts, "heads"):
        value, output = (
            model.get_submodule(slot.module).weight.detach().double().cpu().movedim(slot.axis, 0)[slot.index]
            for slot in (part.slots["value"], part.slots["output"])
        )  # unit, copy, dim, d_model
        for unit, copy in np.ndindex(*output.shape[:2]):
            first, second = (torch.linalg.qr(side.T, mode="r").R for side in (value[unit, 0], output[unit, copy]))
            row = {"layer": part.layer, "unit": unit, "copy": copy}
            rows.append(row | measures(singular_values(first @ second.T)))
    return pd.DataFrame(rows)


def hidden_table(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> pd.DataFrame:
    """Measure the hidden states that enter the first layer and leave each one, over all tokens that are no padding.

    Columns: `layer` (0: the embeddings; l: behind the l-th layer), `tokens`, and the `SPECTRAL_MEASURES` of the
    matrix tokens × d_model, not centred. Only its float64 Gram matrix is kept, d_model × d_model, so singular values
    below 1.5e-8 of the largest are lost. The model comes back in the mode it was in, without hooks.
    """
    layers = model.get_submodule(family_of(model).layers)
    grams: list[Tensor | float] = [0.0] * (len(layers) + 1)
    tokens = 0

    def add(number: int, states: Tensor | tuple) -> None:
        flat = (states[0] if isinstance(states, tuple) else states).detach().flatten(0, -2)
        flat = flat[mask.to(flat.device)].double()
        grams[number] = grams[number] + (flat.T @ flat).cpu()

    with in_evaluation(model), ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(lambda _, args: add(0, args)))
        for number, layer in enumerate(layers, start=1):
            hooks.enter_context(layer.register_forward_hook(lambda _, __, output, number=number: add(number, output)))
        for batch in progress(batches, "hidden states"):
            inputs = on_device(model, batch, labels=False)
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).flatten().bool()
            tokens += int(mask.sum())
            model.base_model(**inputs, use_cache=False)
    if not tokens:
        raise ValueError("no batch was seen: need at least one forward pass over one token that is no padding")
    rows = []
    for layer, gram in enumerate(grams):
        if not gram.isfinite().all():
            raise ValueError(f"hidden states at layer {layer} hold NaN or infinite values")
        sigma = np.sqrt(np.linalg.eigvalsh(gram.numpy())[::-1].clip(min=0))
        rows.append({"layer": layer, "tokens": tokens} | measures(sigma))
    return pd.DataFrame(rows)
