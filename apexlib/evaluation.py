"""How well a model does: its loss on held-out text, its answers, its choices."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    """Bring a batch to where the model is, with or without its labels."""
    return {name: value.to(model.device) for name, value in batch.items() if labels or name != "labels"}


def perplexity(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, quiet: bool = False) -> pd.Series:
    """Mean next-token loss over all labelled tokens: `loss` (nats per token), `perplexity` (exp of it), `tokens`.

    Labels are those of the batch (−100: not counted), else its own tokens without padding; the first token of a
    sequence is predicted from nothing and never counted, so padding on either side changes nothing. Evaluation mode,
    no gradients; every token weighs the same, however the batches are cut. Raises ValueError if no token is labelled.
    """
    total, tokens = 0.0, 0
    with in_evaluation(model):
        for batch in batches if quiet else progress(batches, "evaluating"):
            inputs = on_device(model, {"labels": batch["input_ids"], **batch})
            if "attention_mask" in inputs:  # padding to the end, where no model sees it
                order = (inputs["attention_mask"] == 0).long().argsort(dim=1, stable=True)
                inputs = {name: value.gather(1, order) for name, value in inputs.items()}
                inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            pairs = zip(logits if logits.dtype == torch.float64 else logits.float(), labels, strict=True)
            losses = [cross_entropy(*pair, ignore_index=-100, reduction="sum") for pair in pairs]  # fit a CPU's cache
            total += torch.stack(losses).double().sum().item()
            tokens += int((labels != -100).sum())
    if not tokens:
        raise ValueError("no labelled token in the batches: need at least one label other than -100")
    loss = total / tokens
    return pd.Series({"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens})


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    extract: Callable[[str], str] = str.strip,
    quiet: bool = False,
) -> pd.DataFrame:
    """Let the model answer and compare with `answer`, one row per example, in order.

    The prompt is everything before the last message, in the tokenizer's chat template; decoding is greedy.
    `extract` takes the answer out of what the model wrote. Columns: `example`, `family` and `difficulty` where the
    examples have them, `answer`, `output` (as written), `correct`.
    """
    for row, example in enumerate(examples):
        if not isinstance(answer := example.get("answer"), str):
            raise ValueError(f"example {row}: answer {answer!r} is {type(answer).__name__}; need text")
    prompts = [_prompt(tokenizer, example["messages"][:-1]) for example in examples]
    outputs: dict[int, str] = {}
    pad = pad_token(tokenizer)
    with in_evaluation(model):
        for rows in _by_length([len(prompt) for prompt in prompts], batch_size, "" if quiet else "answering"):
            length = max(len(prompts[row]) for row in rows)
            ids = torch.tensor([[pad] * (length - len(prompts[row])) + prompts[row] for row in rows])
            mask = torch.tensor([[0] * (length - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
            inputs = on_device(model, {"input_ids": ids, "attention_mask": mask})
            ends = {"pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id}
            written = model.generate(**inputs, **ends, max_new_tokens=max_new_tokens, do_sample=False)[:, length:]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            outputs |= dict(zip(rows, texts, strict=True))
    table = []
    for row, example in enumerate(examples):
        said = {name: example[name] for name in ("family", "difficulty") if name in example}
        found = {"answer": example["answer"], "output": outputs[row]}
        table.append({"example": row} | said | found | {"correct": extract(outputs[row]) == example["answer"]})
    return pd.DataFrame(table)


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    quiet: bool = False,
) -> pd.DataFrame:
    """Let the model choose among `choices` by the likelihood it gives each as its answer, one row per example.

    A choice is scored by its mean log-probability per token (nats), the end of the turn left out, so that longer
    choices are not at a disadvantage. `batch_size` choices are read at a time. Columns: `example`, `family` where the
    examples have one, `answer`, `chosen`, `score`, `correct`.
    """
    pairs = []
    for row, example in enumerate(examples):
        if example.get("answer") not in (choices := list(example.get("choices", ()))):
            raise ValueError(f"example {row}: answer {example.get('answer')!r} is not among its choices {choices}")
        prompt = _prompt(tokenizer, example["messages"][:-1])
        for choice in choices:
            if not (ids := tokenizer(choice, add_special_tokens=False)["input_ids"]):
                raise ValueError(f"example {row}: choice {choice!r} has no tokens")
            pairs.append((prompt, ids))
    scores: dict[int, float] = {}
    with in_evaluation(model):
        lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
        for part in _by_length(lengths, batch_size, "" if quiet else "choosing"):
            found = _mean_log_probabilities(model, [pairs[i] for i in part], pad_token(tokenizer))
            scores |= dict(zip(part, found, strict=True))
    table, in_order = [], (scores[i] for i in range(len(pairs)))
    for row, example in enumerate(examples):
        scored = [(next(in_order), choice) for choice in example["choices"]]
        score, chosen = max(scored, key=itemgetter(0))  # the first of equals
        family = {"family": example["family"]} if "family" in example else {}
        found = {"answer": example["answer"], "chosen": chosen, "score": score}
        table.append({"example": row} | family | found | {"correct": chosen == example["answer"]})
    return pd.DataFrame(table)


def _by_length(lengths: Sequence[int], size: int, task: str) -> Iterable[list[int]]:
    """Cut row numbers into batches of rows of about one length, so that there is little padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return progress(batches, task) if task else batches


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, else its EOS, which the attention mask keeps out."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _mean_log_probabilities(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], pad: int
) -> list[float]:
    """Score each answer after its prompt; padding stands on the right, where no token sees it."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), length), pad)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end], mask[row, :end] = torch.tensor(prompt + answer), 1
        answers[row, len(prompt) : end] = True
    ids, mask, answers = (tensor.to(model.device) for tensor in (ids, mask, answers))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logp = logits[answers[:, 1:]].float().log_softmax(-1)  # of the tokens of answers only
    logp = logp.gather(1, ids[answers][:, None])[:, 0].cpu().split([len(answer) for _, answer in pairs])
    return [float(part.mean()) for part in logp]
