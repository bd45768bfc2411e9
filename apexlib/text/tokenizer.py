"""A byte-level BPE tokenizer with a chat template, trained in seconds on the documents at hand."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from apexlib.files import content_hash
from apexlib.text.cache import cached, corpus_hash
from apexlib.text.rows import SEPARATOR

PAD = "<|pad|>"  # another token than EOS: else padding would hide the real ends of documents and answers
TURNS = ("<|system|>", "<|user|>", "<|assistant|>")

# The generation block marks what the assistant writes, its EOS included, for return_assistant_tokens_mask.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|>{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- elif message['role'] in ('system', 'user') -%}
{{ '<|' + message['role'] + '|>' + message['content'] }}
{%- else -%}
{{ raise_exception('role ' + message['role'] + ': need system, user or assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


def train_tokenizer(
    documents: Sequence[str], vocab_size: int = 2048, *, cache: Path | None = None
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `vocab_size` tokens; any Unicode text survives encoding and decoding.

    Each digit is a token of its own. `<|endoftext|>` ends and separates documents (EOS and BOS), `<|pad|>` pads. Text
    that looks like such a token becomes one, unless it is encoded with `split_special_tokens=True`: `pack` does so, and
    `encode_chat` drops such examples. `cache` is a folder that keeps the tokenizer by a hash of the documents.

    >>> tokenizer = train_tokenizer(["to be or not to be"] * 2, vocab_size=270)
    >>> tokenizer.decode(tokenizer("not 42 é")["input_ids"])
    'not 42 é'
    >>> question = [{"role": "user", "content": "to be?"}]
    >>> tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    '<|user|>to be?<|assistant|>'
    """
    special = [SEPARATOR, PAD, *TURNS]
    if vocab_size < (smallest := 256 + len(special)):
        raise ValueError(f"vocab_size={vocab_size}: need {smallest} or more, for 256 bytes and the special tokens")
    if not documents:
        raise ValueError("no documents: need at least one to train a tokenizer on")

    def train() -> bytes:
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        model.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        settings = {"vocab_size": vocab_size, "min_frequency": 2, "special_tokens": special, "show_progress": False}
        model.train_from_iterator(documents, trainers.BpeTrainer(**settings, initial_alphabet=alphabet))
        return model.to_str().encode()

    key = content_hash("tokenizer", 1, tokenizers.__version__, vocab_size, corpus_hash(documents))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(cached(cache, "tokenizer", key, train).decode()),
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PAD,
        extra_special_tokens=list(TURNS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # it would drop the space before a full stop
    )
