"""What a trainer reads: packed documents, conversations with loss on the assistant's tokens only, and their batches."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast

from apexlib.files import content_hash
from apexlib.text.cache import cached, corpus_hash

IGNORED = -100  # the label that transformers leaves out of the loss
_COUNTS = ("dropped_prompt", "dropped_answer", "dropped_special", "eos_added")

Item = dict[str, Tensor]
Messages = list[dict[str, str]]


class PackedTokens(Dataset):
    """Blocks of equal length from one stream of documents; the labels are the input (the model shifts them itself).

    `blocks` are unsigned integers (block, position); `left_over` counts the tokens behind the last full block.
    """

    def __init__(self, stream: np.ndarray, length: int) -> None:
        if length < 2:
            raise ValueError(f"length={length}: need two tokens or more, to predict one from another")
        if len(stream) < length:
            raise ValueError(f"the documents have {len(stream)} tokens, EOS included: need {length} for one block")
        n_blocks, self.left_over = divmod(len(stream), length)
        self.blocks = stream[: n_blocks * length].reshape(n_blocks, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Item:
        tokens = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens.clone()}


class ChatTokens(Dataset):
    """Conversations of different lengths, as (tokens, labels); batch them with `collate`."""

    def __init__(self, examples: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Item:
        tokens, labels = (torch.from_numpy(part.astype(np.int64)) for part in self.examples[index])
        return {"input_ids": tokens, "labels": labels}


def pack(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int, *, cache: Path | None = None
) -> PackedTokens:
    """Join the documents, each ended by EOS, and cut the stream into blocks of `length` tokens.

    Text that looks like a special token is encoded as text. The short rest at the end is left out and counted
    (`left_over`). `cache` is a folder that keeps the stream by a hash of documents and tokenizer, for every length.

    >>> from apexlib.text.tokenizer import train_tokenizer
    >>> documents = ["to be or not to be"] * 2
    >>> blocks = pack(documents, train_tokenizer(documents, 261), length=8)  # 261 tokens: a token a byte
    >>> len(blocks), blocks[0]["input_ids"].shape, blocks.left_over
    (4, torch.Size([8]), 6)
    """
    _check_tokenizer(tokenizer)
    stored = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"

    def encode() -> bytes:
        stream: list[bytes] = []
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        options["verbose"] = False  # documents may be longer than the model's context
        for start in range(0, len(documents), 256):
            encoded = tokenizer(list(documents[start : start + 256]), **options)
            stream += [np.array([*ids, tokenizer.eos_token_id], stored).tobytes() for ids in encoded["input_ids"]]
        return b"".join(stream)

    words = tokenizer.backend_tokenizer.to_str()
    key = content_hash("stream", 2, corpus_hash(documents), words, tokenizer.eos_token_id)
    return PackedTokens(np.frombuffer(cached(cache, "stream", key, encode), dtype=stored), length)


def encode_chat(
    examples: Sequence[dict], tokenizer: PreTrainedTokenizerFast, *, max_length: int, cache: Path | None = None
) -> tuple[ChatTokens, pd.DataFrame]:
    """Encode conversations by the tokenizer's chat template, with loss on the assistant's tokens and their EOS only.

    The template's mark ({% generation %}) tells the assistant's words; without one, each turn is found by rendering the
    conversation up to it. Where the template writes no EOS after an answer one is added (`eos_added`). Left out, and
    counted, are examples that contain a special token as text (it would become one) and examples longer than
    `max_length` tokens: by the prompt (everything before the first answer), or by an answer (cut, it would lose its
    EOS). `cache` is a folder that keeps the result by a hash of messages, tokenizer, template and `max_length`.

    The report has one row: examples, kept, dropped_prompt, dropped_answer, dropped_special, eos_added, tokens,
    trained_tokens, trained_share (of the kept tokens).

    >>> from apexlib import load_chat, train_tokenizer
    >>> dataset, report = encode_chat(load_chat("skills", limit=20), train_tokenizer(["a"]), max_length=128)
    >>> len(dataset), int(report.dropped_answer[0])
    (20, 0)
    """
    _check_tokenizer(tokenizer)
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer {_name(tokenizer)!r} has no chat template: set one, or use train_tokenizer")
    conversations = [example["messages"] for example in examples]
    words, settings = tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map
    key = content_hash("chat", 1, conversations, words, settings, tokenizer.get_chat_template(), max_length)
    stored = np.load(BytesIO(cached(cache, "chat", key, lambda: _encoded(conversations, tokenizer, max_length))))
    tokens, labels = stored["tokens"], stored["labels"]
    ends = stored["lengths"].cumsum()[:-1]
    row = {"examples": len(examples), "kept": len(ends) + 1, **dict(zip(_COUNTS, stored["counts"], strict=True))}
    row |= {"tokens": len(tokens), "trained_tokens": int((labels != IGNORED).sum())}
    report = pd.DataFrame([row | {"trained_share": row["trained_tokens"] / row["tokens"]}])
    return ChatTokens(zip(np.split(tokens, ends), np.split(labels, ends), strict=True)), report


def collate(
    pad_token_id: int, *, side: str = "right", multiple_of: int | None = None
) -> Callable[[Sequence[Item]], Item]:
    """Make a data collator that pads to the longest item of a batch, or on to a multiple of `multiple_of` tokens.

    The attention mask comes from the lengths, never from the ids, so a pad token that is also EOS is no trouble. With
    padding on the left the first token of an item has no label: the model would predict it from padding. A batch
    without any label is an error: its loss would be NaN.

    >>> items = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6, 0], [7, 0])]
    >>> collate(pad_token_id=0)(items)["attention_mask"]
    tensor([[1, 1, 1],
            [1, 1, 0]])
    """
    if side not in ("right", "left"):
        raise ValueError(f"side {side!r}: need 'right' or 'left'")
    if not isinstance(pad_token_id, int) or pad_token_id < 0:
        raise ValueError(f"pad_token_id={pad_token_id!r}: need a token id; a tokenizer without one can lend its EOS")
    return partial(_collate, pad_token_id=pad_token_id, side=side, multiple_of=multiple_of)


def in_one_row(items: Sequence[Item]) -> Item:
    """Collate items one after another, without padding; logits are computed only where the next token has a label.

    Positions start anew with each item, by which transformers keeps them apart, in families that heed `position_ids`.
    The first token of an item has no label: it is predicted from nothing. A batch without any is an error.

    >>> items = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6, 0], [7, 0])]
    >>> {name: each.tolist() for name, each in in_one_row(items).items()}  # doctest: +NORMALIZE_WHITESPACE
    {'input_ids': [[5, 6, 0, 7, 0]], 'labels': [[-100, 6, 0, -100, 0]], 'position_ids': [[0, 1, 2, 0, 1]],
     'logits_to_keep': [0, 1, 3], 'shift_labels': [[6, 0, 0]]}
    """
    named = zip(*_tokens_and_labels(items), strict=True)
    lists = [{"input_ids": ids.tolist(), "labels": goals.tolist()} for ids, goals in named]
    batch = _with_labels(DataCollatorWithFlattening()(lists), items)
    following = pad(batch["labels"][0, 1:], (0, 1), value=IGNORED)
    kept = (following != IGNORED).nonzero()[:, 0]
    return batch | {"logits_to_keep": kept, "shift_labels": following[kept][None]}


def batches(
    dataset: Dataset, batch_size: int, *, collator: Callable | None = None, limit: int | None = None
) -> list[Item]:
    """Batch the first `limit` items (default: all) in order; the last batch may be smaller.

    >>> blocks = PackedTokens(np.arange(20, dtype=np.int32), length=4)
    >>> [batch["input_ids"].shape[0] for batch in batches(blocks, 2)]
    [2, 2, 1]
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size={batch_size}, limit={limit}: need at least one item")
    if collator is None and isinstance(dataset, ChatTokens):
        raise ValueError("conversations differ in length: need collator=collate(pad_token_id)")
    items, join = range(min(len(dataset), limit or len(dataset))), collator or default_collate
    return [join([dataset[i] for i in items[start : start + batch_size]]) for start in items[::batch_size]]


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    if not getattr(tokenizer, "is_fast", False):
        kind = type(tokenizer).__name__
        raise ValueError(f"tokenizer {kind} is not a fast one: need one that tells where its tokens stand in the text")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {_name(tokenizer)!r} has no EOS token: need one to end documents and answers")


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _collate(items: Sequence[Item], *, pad_token_id: int, side: str, multiple_of: int | None) -> Item:
    tokens, labels = _tokens_and_labels(items)
    missing = -max(map(len, tokens)) % (multiple_of or 1)
    if side == "left":
        labels = [torch.cat([torch.full_like(row[:1], IGNORED), row[1:]]) for row in labels]

    def join(rows: list[Tensor], fill: int) -> Tensor:
        joined = pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)
        return pad(joined, (0, missing) if side == "right" else (missing, 0), value=fill)

    mask = [torch.ones_like(row) for row in tokens]
    batch = {"input_ids": join(tokens, pad_token_id), "attention_mask": join(mask, 0), "labels": join(labels, IGNORED)}
    return _with_labels(batch, items)


def _tokens_and_labels(items: Sequence[Item]) -> tuple[list[Tensor], list[Tensor]]:
    tokens, labels = ([item[name].long() for item in items] for name in ("input_ids", "labels"))
    if any(len(ids) != len(goals) for ids, goals in zip(tokens, labels, strict=True)):
        raise ValueError("an item has more or fewer labels than tokens: need one for each")
    return tokens, labels


def _with_labels(batch: Item, items: Sequence[Item]) -> Item:
    if (batch["labels"] == IGNORED).all():
        raise ValueError(f"a batch of {len(items)} items has no label to learn from: need one other than {IGNORED}")
    return batch


def _encoded(conversations: Sequence[Messages], tokenizer: PreTrainedTokenizerFast, max_length: int) -> bytes:
    """Tokens and labels of the conversations that are kept, their lengths, and the `_COUNTS`, as a file of numpy."""
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())
    encode = _by_generation_mark if marked else _by_rendered_prefixes
    special = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special_text = re.compile("|".join(special))
    template = f"chat template of {_name(tokenizer)!r}"
    counts = dict.fromkeys(_COUNTS, 0)
    kept, shortest = [], None
    for number, messages in enumerate(conversations, 1):
        if any(special_text.search(message["content"]) for message in messages):
            counts["dropped_special"] += 1
            continue
        try:
            tokens, trained, added = _end_turns(*encode(messages, tokenizer), tokenizer.eos_token_id)
        except (TemplateError, ValueError) as error:
            raise ValueError(f"example {number}, {template}: {error}") from error
        if not trained.any():
            raise ValueError(f"example {number}: the {template} marks no token as the assistant's")
        n_tokens = int(trained.nonzero()[0][-1]) + 1  # nothing is learnt from what follows the last answer
        shortest = min(n_tokens, shortest or n_tokens)
        if n_tokens > max_length:
            counts["dropped_prompt" if trained.argmax() >= max_length else "dropped_answer"] += 1
            continue
        counts["eos_added"] += added
        kept.append((tokens[:n_tokens], np.where(trained, tokens, IGNORED)[:n_tokens]))
    if not kept:
        prompts, answers, special, _ = counts.values()
        long = f"{prompts} prompts and {answers} answers pass max_length={max_length} (the shortest needs {shortest})"
        raise ValueError(f"none of {len(conversations)} examples is left: {long}, {special} contain a special token")
    tokens, labels = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    lengths = [len(tokens) for tokens, _ in kept]
    np.savez(file := BytesIO(), tokens=tokens, labels=labels, lengths=lengths, counts=list(counts.values()))
    return file.getvalue()


def _by_generation_mark(messages: Messages, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], np.ndarray]:
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    options["tokenizer_kwargs"] = {"return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer.apply_chat_template(messages, **options)
    trained = np.array(encoded["assistant_masks"], dtype=bool)
    offsets = encoded["offset_mapping"]
    for i in range(1, len(trained)):  # the mask stops at the first token of a last character of several
        if trained[i - 1] and offsets[i][0] < offsets[i - 1][1]:
            trained[i] = True
    return encoded["input_ids"], trained


def _by_rendered_prefixes(messages: Messages, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], np.ndarray]:
    """Find the answers in the rendered text. The prompt is never tokenized alone: tokens may merge across its end."""

    def render(part: Messages, **options: bool) -> str:
        text = tokenizer.apply_chat_template(part, tokenize=False, **options)
        if not full.startswith(text):
            raise ValueError(
                f"it renders the first {len(part)} messages in another way when more follow: need a template with "
                "{% generation %} around the assistant's words, or conversations of one answer"
            )
        return text

    full = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
    trained = np.zeros(len(starts), dtype=bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(render(messages[:i], add_generation_prompt=True))
            turn = full[start : len(render(messages[: i + 1]))].rstrip()
            said, eos, _ = turn.partition(tokenizer.eos_token)
            trained |= (starts < start + len(said + eos)) & (ends > start)
    return encoded["input_ids"], trained


def _end_turns(tokens: list[int], trained: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Make EOS the last label of each turn, and count where the template had none so that one is added."""
    ids = np.array(tokens, dtype=np.int32)
    unfinished = trained & ~np.append(trained[1:], False) & (ids != eos)
    followed = unfinished & np.append(ids[1:] == eos, False)
    missing = np.flatnonzero(unfinished & ~followed) + 1
    trained = trained | np.roll(followed, 1)  # the last one has no follower
    return np.insert(ids, missing, eos), np.insert(trained, missing, True), len(missing)
