"""A model in evaluation mode, and its loss on held-out text."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from apexlib.progress import progress
from apexlib.projections import composed_once


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Hold `model` in evaluation mode and take no gradients inside the block; then each module has its mode again.

    Its weights must not change inside: those of an expanded model are composed once.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), composed_once(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def on_device(model: PreTrainedModel, batch: Mapping[str, Tensor], *, labels: bool = True) -> dict[str, Tensor]:
    """Bring a batch to where the model is, with or without its labels; one that is offloaded fetches it itself."""
    given = {name: value for name, value in batch.items() if labels or name != "labels"}
    return given if model.device.type == "meta" else {name: value.to(model.device) for name, value in given.items()}


def perplexity(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, quiet: bool = False) -> pd.Series:
    """Mean next-token loss over all labelled tokens: `loss` (nats per token), `perplexity` (exp of it), `tokens`.

    Labels are those of the batch (−100: not counted), else its own tokens without padding; the first token of a
    sequence is predicted from nothing and never counted, so padding on either side changes nothing. Evaluation mode,
    no gradients; every token weighs the same, however the batches are cut. Raises ValueError if no token is labelled.
    """
    total, tokens = 0.0, 0
    chooses = "logits_to_keep" in signature(model.forward).parameters
    with in_evaluation(model):
        for batch in batches if quiet else progress(batches, "evaluating"):
            inputs = on_device(model, {"labels": batch["input_ids"], **batch})
            if "attention_mask" in inputs:  # padding to the end, where no model sees it
                order = (inputs["attention_mask"] == 0).long().argsort(dim=1, stable=True)
                inputs = {name: value.gather(1, order) for name, value in inputs.items()}
                inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
            labels = inputs.pop("labels")[:, 1:]
            asked = (labels != -100).any(0).nonzero()[:, 0].cpu()  # positions of which some row needs the logits
            options = {"logits_to_keep": asked} if chooses else {}
            logits = model(**inputs, **options, use_cache=False).logits
            logits = logits if chooses else logits[:, asked]
            pairs = zip(logits if logits.dtype == torch.float64 else logits.float(), labels[:, asked], strict=True)
            losses = [cross_entropy(*pair, ignore_index=-100, reduction="sum") for pair in pairs]  # fit a CPU's cache
            total += torch.stack(losses).double().sum().item()
            tokens += int((labels != -100).sum())
    if not tokens:
        raise ValueError("no labelled token in the batches: need at least one label other than -100")
    loss = total / tokens
    return pd.Series({"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens})
