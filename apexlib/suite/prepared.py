"""Data prepared once: a tokenizer and everything it reads as arrays of token ids, so that a run needs no text.

A folder of `prepare` is a source of data as a corpus or a file is, by the name `prepared:FOLDER`. It holds
`tokenizer/`, `general-SPLIT.npy` and `domain-SPLIT.npy` (uint16 streams of documents, each ended by EOS),
`chat-SPLIT-{tokens,trained,offsets}.npy` (conversations one after another; whether a token is to be learnt; where each
conversation begins), `chat-test.jsonl` (what to ask and how it is scored) and `manifest.json`, the hash of each file.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from apexlib.files import atomic_write, file_hash, write_json
from apexlib.text.corpora import load_chat, load_corpus
from apexlib.text.datasets import IGNORED, ChatTokens, encode_chat, pack
from apexlib.text.questions import scored
from apexlib.text.skills import SPLITS, split_of
from apexlib.text.tokenizer import train_tokenizer

PREFIX = "prepared:"
MANIFEST = "manifest.json"
_HELD_OUT = re.compile(r"(?:^|[-_.])(?:test|valid)(?:[-_.]|$)")


def prepare(
    general: Sequence[Path],
    domain: Sequence[Path],
    chat: Sequence[Path],
    out: Path,
    *,
    vocabulary: int = 8192,
    max_length: int = 512,
) -> dict[str, Any]:
    """Train a tokenizer on the general text, encode all data into the folder `out`, and return the manifest.

    Files whose name has a part "valid" or "test" are held out whole, as split "test": all that is reported comes from
    them. Of the other files a hash of the content takes 5 % as split "valid", on which alone anything is chosen; the
    rest trains. Conversations longer than `max_length` tokens are left out and counted.
    """
    if vocabulary > 2**16:
        raise ValueError(f"vocabulary={vocabulary}: need at most {2**16}, ids are kept in two bytes")
    out = Path(out)
    texts = {"general": _documents(general), "domain": _documents(domain)}
    tokenizer = train_tokenizer(texts["general"]["train"], vocabulary)
    tokenizer.save_pretrained(out / "tokenizer")
    counts: dict[str, Any] = {}
    for name, splits in texts.items():
        for split, documents in splits.items():
            stream = pack(documents, tokenizer, 2).blocks.astype(np.uint16).ravel()
            counts[f"{name}-{split}"] = {"documents": len(documents), "tokens": len(stream)}
            _save(stream, out / f"{name}-{split}.npy")
    for split, examples in _conversations(chat).items():
        encoded, report = encode_chat(examples, tokenizer, max_length=max_length)
        counts[f"chat-{split}"] = {name: int(report[name].iloc[0]) for name in report if name != "trained_share"}
        _save_chat(encoded, out, split)
        if split == "test":
            lines = "".join(json.dumps(scored(example), ensure_ascii=False) + "\n" for example in examples)
            with atomic_write(out / "chat-test.jsonl") as temporary:
                temporary.write_text(lines, encoding="utf-8")
    hashes = {path.relative_to(out).as_posix(): file_hash(path) for path in _files(out)}
    manifest = {"vocabulary": len(tokenizer), "max_length": max_length, "counts": counts, "sha256": hashes}
    write_json(manifest, out / MANIFEST)
    return manifest


def is_prepared(source: str) -> bool:
    """Whether a name of data is one of a prepared folder.

    >>> is_prepared("prepared:data/cache/evidence/general"), is_prepared("stdlib")
    (True, False)
    """
    return str(source).startswith(PREFIX)


def folder_of(source: str) -> Path:
    """The path in `prepared:PATH`."""
    return Path(source.removeprefix(PREFIX))


def stream(source: str, split: str) -> np.ndarray:
    """The tokens of one split of a text, `prepared:FOLDER/general` or `prepared:FOLDER/domain`; read when touched."""
    place = folder_of(source)
    return np.load(place.with_name(f"{place.name}-{split}.npy"), mmap_mode="r")


def conversations(source: str, split: str, count: int | None = None) -> ChatTokens:
    """The first `count` conversations of a split of `prepared:FOLDER` (default: all), in a mixed order."""
    place = folder_of(source)
    tokens, trained, offsets = (
        np.load(place / f"chat-{split}-{name}.npy") for name in ("tokens", "trained", "offsets")
    )
    labels = np.where(trained, tokens.astype(np.int32), IGNORED)
    borders = offsets[: None if count is None else count + 1]
    return ChatTokens([(tokens[a:b], labels[a:b]) for a, b in pairwise(borders)])


def examples(source: str, count: int | None = None) -> list[dict[str, Any]]:
    """The first `count` test conversations of `prepared:FOLDER` that can be scored, in a mixed order."""
    lines = (folder_of(source) / "chat-test.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "answer" in row][:count]


def check(folder: Path) -> dict[str, Any]:
    """Read the manifest of a prepared folder and compare every file with its hash."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder / MANIFEST}: need a folder made by `python -m apexlib.suite.evidence --prepare`"
        )
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, known in manifest["sha256"].items():
        if not (folder / name).is_file() or file_hash(folder / name) != known:
            raise ValueError(f"{folder / name} is missing or not the file that was prepared: prepare the data again")
    return manifest


def _documents(files: Sequence[Path]) -> dict[str, list[str]]:
    """The documents of each split: held-out files whole, the others by hash."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in files:
        for document in load_corpus(Path(path), split="all"):
            found[_split(path, document)].append(document)
    if empty := [split for split, documents in found.items() if not documents]:
        raise ValueError(f"{', '.join(map(str, files))}: no document for split {empty[0]!r}; need a held-out file too")
    return found


def _conversations(files: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """The conversations of each split, ordered by hash, so that the first n are a fair sample of all files."""
    found: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for path in files:
        for example in load_chat(Path(path), split="all"):
            found[_split(path, json.dumps(example["messages"][:-1]))].append(example)
    for examples_of_split in found.values():
        examples_of_split.sort(key=lambda example: hashlib.sha256(json.dumps(example).encode()).digest())
    return found


def _split(path: Path, content: str) -> str:
    if _HELD_OUT.search(Path(path).name):
        return "test"
    return "valid" if split_of(content) == "valid" else "train"


def _save_chat(encoded: ChatTokens, out: Path, split: str) -> None:
    lengths = [len(tokens) for tokens, _ in encoded.examples]
    tokens, labels = (np.concatenate(parts) for parts in zip(*encoded.examples, strict=True))
    _save(tokens.astype(np.uint16), out / f"chat-{split}-tokens.npy")
    _save(labels != IGNORED, out / f"chat-{split}-trained.npy")
    _save(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), out / f"chat-{split}-offsets.npy")


def _save(array: np.ndarray, path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
