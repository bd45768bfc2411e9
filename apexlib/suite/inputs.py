"""What runs and notebooks read: models, texts and conversations by name, each read once in a process."""

from collections.abc import Mapping
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from apexlib import encode_chat, load_chat, load_corpus, pack
from apexlib.files import pretrained
from apexlib.suite.folders import home, locate
from apexlib.text.corpora import final_answer, scored
from apexlib.text.datasets import ChatTokens, PackedTokens
from apexlib.text.skills import skills, skills_text

_CACHE = Path("data", "cache")  # below the project's root


def load_model(name: str, *, revision: str | None = None, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Load a model by its folder, from the project's root, or its name on the Hub; on a GPU where there is one."""
    disable_progress_bar()  # of weights: small models take milliseconds
    model = pretrained(AutoModelForCausalLM, locate(name), revision=revision, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@cache
def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model, by the names of `load_model`."""
    return pretrained(AutoTokenizer, locate(name), revision=revision)


@cache
def documents(corpus: str, split: str = "train", *, skill_documents: int = 0) -> list[str]:
    """The documents of a split: of an embedded text, a file or a pattern of files (`load_corpus`), and skills."""
    texts = load_corpus(locate(corpus), split=split, cache=home() / _CACHE)
    return texts + skills_text(skill_documents) if skill_documents else texts


def text_blocks(
    tokenizer: PreTrainedTokenizerFast, corpus: str, split: str, context: int, *, skill_documents: int = 0
) -> PackedTokens:
    """The `documents` of a split as blocks of `context` tokens; encoded once, and kept by hash."""
    return pack(documents(corpus, split, skill_documents=skill_documents), tokenizer, context, cache=home() / _CACHE)


def examples(chat: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
    """The first conversations of a split of `chat["source"]`, as many as `chat[split]` says (None: all).

    Each has a `family`, and an `answer` unless only its loss is measured; `difficulties` are those of skills.
    """
    return _examples(chat["source"], split, chat[split], tuple(chat["difficulties"]))


@cache
def _examples(source: str, split: str, count: int | None, difficulties: tuple[int, ...]) -> list[dict[str, Any]]:
    if source == "skills":
        return skills(split, count, difficulties=difficulties)
    family = {"family": Path(source).stem}
    return [
        scored(each) if "task" in each else {"answer": final_answer(each["messages"][-1]["content"])} | family | each
        for each in load_chat(locate(source), split=split, limit=count)
    ]


def conversations(tokenizer: PreTrainedTokenizerFast, chat: Mapping[str, Any], split: str) -> ChatTokens:
    """The `examples` of a split as tokens, without those longer than `chat["max_length"]`; kept by hash."""
    return encode_chat(examples(chat, split), tokenizer, max_length=chat["max_length"], cache=home() / _CACHE)[0]


def data_files(settings: Mapping[str, Any]) -> tuple[Path, ...]:
    """The local files that the settings of a run name as `corpus` or `source`, at any depth."""
    found: set[Path] = set()
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {*data_files(value)}
        elif name in ("corpus", "source"):
            found |= {Path(path) for path in glob(locate(value))}
    return tuple(sorted(found))
