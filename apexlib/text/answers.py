"""How well a model answers: what it writes, and what it chooses."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apexlib.evaluation import in_evaluation, on_device
from apexlib.progress import progress


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
