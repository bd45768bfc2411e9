"""How well a model predicts held-out text."""

import math
from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from apexlib.records import progress


def perplexity(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, quiet: bool = False) -> pd.Series:
    """Mean next-token loss over all labelled tokens: `loss` (nats per token), `perplexity` (exp of it), `tokens`.

    Labels are those of the batch (−100: not counted), else its own tokens without padding. Evaluation mode, no
    gradients; every token weighs the same, however the batches are cut. Raises ValueError if no token is labelled.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        with torch.no_grad():
            for batch in batches if quiet else progress(batches, "evaluating"):
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                labels = inputs.pop("labels", None)
                if labels is None:
                    labels = inputs["input_ids"]
                    if "attention_mask" in inputs:
                        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
                logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
                targets = labels[:, 1:].flatten()
                logits = logits if logits.dtype == torch.float64 else logits.float()
                total += cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
                tokens += int((targets != -100).sum())
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError("no labelled token in the batches: need at least one label other than -100")
    loss = total / tokens
    return pd.Series({"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens})


def unigram_loss(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """Loss, in nats per token, of predicting each token of `test` from its frequency in `train` (add-one smoothed).

    A language model that does not beat this has learned nothing from context.

    >>> round(unigram_loss(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1]), vocabulary=2), 4)  # -ln(4/6 · 2/6) / 2
    0.752
    """
    counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[test.flatten()].mean().item()
