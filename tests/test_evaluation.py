"""Losses against slow literal formulas."""

import math

import pytest
import torch

from apexlib.evaluation import perplexity, unigram_loss


def test_perplexity_weighs_every_labelled_token_the_same(tiny_model, batch):
    model = tiny_model("llama", dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()]  # each sequence alone, without padding
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            losses += [-logp[position, ids[position + 1]].item() for position in range(len(ids) - 1)]
    result = perplexity(model, [batch])
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["tokens"] == len(losses)
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in (0, 1)]
    assert perplexity(model, rows)["loss"] == pytest.approx(result["loss"], rel=1e-12)


def test_labels_decide_what_counts(tiny_model, batch):
    model = tiny_model("llama")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 4] = batch["input_ids"][0, 4]
    result = perplexity(model, [batch | {"labels": labels}])
    with torch.no_grad():
        logp = model(**batch).logits[0, 3].log_softmax(-1)
    assert result["tokens"] == 1
    assert result["loss"] == pytest.approx(-logp[batch["input_ids"][0, 4]].item(), rel=1e-5)
    with pytest.raises(ValueError, match="no labelled token"):
        perplexity(model, [batch | {"labels": torch.full_like(labels, -100)}])


def test_evaluation_restores_the_mode(tiny_model, batch):
    model = tiny_model("llama").train()
    perplexity(model, [batch])
    assert model.training


def test_unigram_loss_is_the_entropy_on_its_own_text():
    tokens = torch.randint(0, 7, (20_000,), generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens).double() / len(tokens)
    assert unigram_loss(tokens, tokens, 7) == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-4)
