"""Losses against slow literal formulas."""

import inspect
import math
from contextlib import suppress

import pytest
import torch

from apexlib import evaluation
from apexlib.evaluation import in_evaluation, on_device, perplexity
from apexlib.text.answers import exact_match, multiple_choice
from apexlib.text.datasets import batches, collate, encode_chat
from apexlib.text.tokenizer import train_tokenizer


def test_perplexity_weighs_every_labelled_token_the_same(tiny_model, batch):
    model = tiny_model("llama", dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()]  # each sequence alone, without padding
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            losses += [-logp[position, ids[position + 1]].item() for position in range(len(ids) - 1)]
    result = perplexity(model, [batch])
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["tokens"] == len(losses)
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in (0, 1)]
    assert perplexity(model, rows)["loss"] == pytest.approx(result["loss"], rel=1e-12)


def test_losses_of_half_precision_are_taken_in_float32(tiny_model, batch):
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert perplexity(model, [{"input_ids": ids}])["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_bar_is_shown_unless_quiet_is_asked_for(tiny_model, batch, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluation, "progress", lambda items, description: shown.append(description) or items)
    loss = perplexity(tiny_model("llama"), [batch], quiet=True)["loss"]
    assert not shown
    assert perplexity(tiny_model("llama"), [batch])["loss"] == loss
    assert shown == ["evaluating"]


def test_a_batch_has_its_labels_or_not_and_stays_where_it_is_for_a_model_that_is_offloaded(tiny_model):
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, -100]])}
    model = tiny_model("llama")
    assert list(on_device(model, batch)) == ["input_ids", "labels"]
    assert list(on_device(model, batch, labels=False)) == ["input_ids"]
    model.to("meta")
    assert on_device(model, batch)["input_ids"] is batch["input_ids"]


@pytest.mark.parametrize("variant", ["llama", "gpt2", "opt", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("labelled", [False, True])
def test_padding_and_batches_change_neither_what_is_scored_nor_how(variant, labelled, tiny_model):
    model = tiny_model(variant, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 40, (length,), generator=generator) for length in (5, 9, 3, 12, 7, 2, 8)]
    items = [{"input_ids": ids, "labels": ids} for ids in texts]
    alone = perplexity(model, [{"input_ids": ids[None]} for ids in texts])
    assert alone["tokens"] == sum(len(ids) - 1 for ids in texts)
    for side in ("left", "right"):
        for size in (3, 7):
            padded = batches(items, size, collator=collate(1, side=side))
            if not labelled:
                padded = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in padded]
            found = perplexity(model, padded)
            assert found["tokens"] == alone["tokens"]
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_left_padding_teaches_no_first_token():
    items = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6, 7], [8, 9])]
    assert collate(0, side="left")(items)["labels"].tolist() == [[-100, 6, 7], [-100, -100, 9]]
    assert collate(0, side="right")(items)["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]  # the model shifts them


def test_answers_that_cannot_be_compared_or_read_are_refused(answering):
    model, tokenizer, *_ = answering
    ask = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "5"}]
    with pytest.raises(ValueError, match=r"example 1: answer 5 is int; need text"):
        exact_match(model, tokenizer, [{"messages": ask, "answer": "5"}, {"messages": ask, "answer": 5}])
    with pytest.raises(ValueError, match=r"example 0: choice '' has no tokens"):
        multiple_choice(model, tokenizer, [{"messages": ask, "answer": "b", "choices": ["", "b"]}])


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


@pytest.mark.parametrize("plain", [False, True])
def test_logits_are_computed_where_a_label_follows(plain, tiny_model, batch, monkeypatch):
    model, asked, forward = tiny_model("llama"), [], type(tiny_model("llama")).forward
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, [2, 5]], labels[1, 3] = batch["input_ids"][0, [2, 5]], batch["input_ids"][1, 3]

    def known(*inputs, **options):  # says that it takes `logits_to_keep`
        asked.append(options.get("logits_to_keep"))
        return forward(model, *inputs, **options)

    if not plain:
        known.__signature__ = inspect.signature(model.forward)
    whole = model(**batch).logits.detach()
    monkeypatch.setattr(model, "forward", known)
    result = perplexity(model, [batch | {"labels": labels}])
    assert [None if each is None else each.tolist() for each in asked] == [None if plain else [1, 2, 4]]
    goals = labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), goals, ignore_index=-100)
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert result["tokens"] == 3


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_restores_the_mode_of_each_module(fails, tiny_model, batch):
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.eval()  # somebody's frozen block
    modes = {name: module.training for name, module in model.named_modules()}
    with suppress(IndexError):
        perplexity(model, [{"input_ids": torch.tensor([[10**6]])} if fails else batch])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    with in_evaluation(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()


@pytest.fixture(scope="module")
def answering():
    """A model and tokenizer that have learned one habit by heart: to repeat the user's single word."""
    from conftest import build

    words = ["ant", "bee", "cow", "dog", "eel", "fox"]
    tokenizer = train_tokenizer([" ".join(words)] * 2, 270)
    examples = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}], "answer": w, "family": w[0]}
        for w in words
    ]
    dataset, _ = encode_chat(examples, tokenizer, max_length=32)
    (batch,) = batches(dataset, len(words), collator=collate(tokenizer.pad_token_id))
    model = build("llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, examples


def test_exact_match_counts_what_the_model_writes(answering):
    model, tokenizer, examples = answering
    wrong = [examples[0] | {"answer": "bee"}]
    table = exact_match(model, tokenizer, [*examples, *wrong], max_new_tokens=8, batch_size=4)
    assert table["output"].tolist() == ["ant", "bee", "cow", "dog", "eel", "fox", "ant"]
    assert table["correct"].tolist() == [True] * 6 + [False]
    assert table["family"].tolist()[:3] == ["a", "b", "c"]
    alone = exact_match(model, tokenizer, examples, max_new_tokens=8, batch_size=1)
    assert alone["output"].tolist() == table["output"].tolist()[:6]  # padding changes nothing
    upper = exact_match(model, tokenizer, wrong, max_new_tokens=8, extract=lambda text: text.replace("ant", "bee"))
    assert upper["correct"].all()
    with pytest.raises(ValueError, match="example 1: answer None is NoneType; need text"):
        exact_match(model, tokenizer, [examples[0], {"messages": examples[0]["messages"]}])


def test_multiple_choice_takes_the_likeliest(answering):
    model, tokenizer, examples = answering
    choices = ["ant", "bee", "dog"]
    table = multiple_choice(model, tokenizer, [examples[1] | {"choices": choices}, examples[3] | {"choices": choices}])
    assert table["chosen"].tolist() == ["bee", "dog"]
    assert table["correct"].all()
    prompt = tokenizer.apply_chat_template(examples[1]["messages"][:-1], tokenize=False, add_generation_prompt=True)
    ids, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, "bee"))
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    expected = sum(logp[len(ids) - 1 + i, token].item() for i, token in enumerate(answer)) / len(answer)
    assert table["score"].iloc[0] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="answer 'fox' is not among its choices"):
        multiple_choice(model, tokenizer, [examples[5] | {"choices": choices}])


def test_the_score_of_a_choice_is_the_mean_over_its_tokens(answering):
    model, tokenizer, examples = answering
    prompt = tokenizer.apply_chat_template(examples[1]["messages"][:-1], tokenize=False, add_generation_prompt=True)
    ids, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, "bee ant bee"))
    assert len(answer) > 2
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    each = [logp[len(ids) - 1 + place, token].item() for place, token in enumerate(answer)]
    table = multiple_choice(model, tokenizer, [examples[1] | {"choices": ["bee ant bee"], "answer": "bee ant bee"}])
    assert table["score"].iloc[0] == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_choices_in_batches_score_as_one_at_a_time(answering):
    model, tokenizer, _ = answering
    longer = [
        {"messages": [{"role": "user", "content": word * n}, {"role": "assistant", "content": word}], "answer": word,
         "choices": [word, f"{word} {word}", "a" * n], "family": "f"}
        for n, word in enumerate(["ant", "bee", "cow"], 1)
    ]  # fmt: skip
    together, alone = (multiple_choice(model, tokenizer, longer, batch_size=size) for size in (64, 1))
    assert together["chosen"].tolist() == alone["chosen"].tolist()
    assert together["score"].tolist() == pytest.approx(alone["score"].tolist(), rel=1e-4)
    assert together["family"].tolist() == ["f"] * 3
