"""Where text comes from: documents, conversations, questions; embedded (no download), from files, or from the Hub."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from apexlib.text.cache import text_hash
from apexlib.text.embedded import EMBEDDED, embedded
from apexlib.text.rows import file_rows, text_field
from apexlib.text.skills import SPLITS, check_split, skills, split_of

ARITHMETIC = ("addsub", "multiarith", "singleeq", "svamp", "mawps")  # each too small to be read alone
LOSS_ONLY = ("gsm8k",)  # solutions that a small model takes 150 tokens to write and does not get right

Source = str | Path | Sequence[str | Path]
Located = str | list[Path]  # the name of embedded data or of a data set on the Hub, or files

_log = logging.getLogger(__name__)
_HELD_OUT = re.compile(r"(?:^|[-_.])(?:test|valid)(?:[-_.]|$)")  # in the name of one of several files


def load_corpus(
    source: Source = "stdlib",
    *,
    split: str = "train",
    revision: str | None = None,
    subset: str | None = None,
    column: str = "text",
    cache: Path | None = None,
) -> list[str]:
    """Read the documents of one split, each once.

    `source` is one of

    - the name of an embedded text (`EMBEDDED`): "stdlib-code", "stdlib-prose" or "stdlib" (both), the source of the
      running interpreter's standard library; its docstrings, one document a module in the split of its code, with
      pydoc's topics. "python", "python-code", "python-prose": the same of installed packages, with their READMEs;
      "math" of those that "python" holds out as a whole. The order is fixed and mixed.
    - a file: .txt (documents separated by a line `<|endoftext|>`), .jsonl or .parquet (text in `column`); .txt and
      .jsonl also as .gz. Documents keep their order; a hash of the text decides the split, split="all" takes them all.
    - several files, as a list or a pattern ("data/general-*.txt.gz", sorted). Those whose name has a part "test" or
      "valid" are held out whole, as split "test"; of the others a hash takes 5 % as "valid", the rest is "train".
    - the name of a data set on the Hub, with `revision` (a commit) and, if need be, `subset`; `split` is the Hub's.

    Where nothing else is said, about 90 % of documents are train, 5 % valid, 5 % test. Blank documents, repetitions and
    library files that do not decode are left out, and counted in the log. `cache` is a folder that keeps docstrings.

    >>> documents = load_corpus("stdlib-code", split="valid")
    >>> any("import " in document for document in documents)
    True
    """
    source = _locate(source, EMBEDDED, revision, subset)
    if source in EMBEDDED:
        check_split(split)
        return [text for text, part in embedded(source, cache) if part == split]
    homes: dict[str, str] = {}  # the split of each document, in order
    read = blank = 0
    for where, row, split_for in _rows(source, split, revision, subset, documents=True):
        text = text_field(row, column, where)
        read += 1
        blank += not text.strip()
        if text.strip() and homes.get(text) != "test":  # what a held-out file has is in no other split
            homes[text] = split_for(text)
    found = [text for text, home in homes.items() if split in (home, "all")]
    return _some(found, split, len(homes), source, blank=blank, repeated=read - blank - len(homes))


def load_chat(
    source: Source = "skills",
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    subset: str | None = None,
) -> list[dict[str, Any]]:
    """Read conversations `{"messages": [{"role", "content"}, ...], ...}`; what else a row has is kept.

    `source` is "skills" (generated from `seed`: `limit` tasks, 2000 without a limit), one or several .jsonl(.gz) or
    .parquet files, or a data set on the Hub, split as in `load_corpus` (files by a hash of all but the last message).
    Several files are mixed in an order by hash; a question that a held-out file asks is left out of the others. Rows
    hold `messages`, or alpaca's `instruction`, `input` and `output`. An optional system message comes first, then user
    and assistant take turns, the assistant last; a row that differs is an error that names it.

    >>> load_chat(limit=1)[0]["messages"][-1]["role"]
    'assistant'
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: need at least one conversation, or None for all")
    source = _locate(source, ("skills",), revision, subset)
    if source == "skills":
        return skills(split, limit or 2000, seed=seed)
    rows = []
    for where, row, split_for in _rows(source, split, revision, subset):
        example = _conversation(row, where)
        question = json.dumps(example["messages"][:-1])
        rows.append((example, question, split_for(question)))
    held_out = {question for _, question, part in rows if part == "test"}
    kept = [(example, part) for example, question, part in rows if part == "test" or question not in held_out]
    examples = [example for example, part in kept if split in (part, "all")]
    if isinstance(source, list) and len(source) > 1:
        examples.sort(key=lambda example: text_hash(json.dumps(example, default=str)))
    return _some(examples, split, len(rows), source, asked_in_a_held_out_file=len(rows) - len(kept))[:limit]


def scored(example: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a conversation of a test file to what decides its score: `messages`, `family`, `answer` and `choices`.

    Lettered choices become the texts a model is trained to answer with ("B. gravity"), which are compared by their
    likelihood, as "true" and "false" are; where a choice is itself a letter, the assistant's turn tells which of the
    two the answer is. What has no choices is to be written, and right where the part after the last `####` is; the
    small arithmetic sets count as one family. Of what has no `answer`, and of `LOSS_ONLY`, only the loss is measured.
    """
    task = str(example.get("task", "other"))
    row = {"messages": example["messages"], "family": "arithmetic" if task in ARITHMETIC else task}
    answer, choices = None if task in LOSS_ONLY else example.get("answer"), list(example.get("choices", ()))
    if answer is not None and choices:
        lettered = {(letter := chr(ord("A") + index)): f"{letter}. {choice}" for index, choice in enumerate(choices)}
        is_letter = answer in lettered
        if not is_letter and answer not in choices:
            raise ValueError(f"{task}: answer {answer!r} is neither one of the choices {choices} nor its letter")
        if is_letter and answer in choices:
            said = "".join(message["content"] for message in row["messages"][-1:]).strip()
            is_letter = said == lettered[answer]
            if not is_letter and said != answer:
                need = f"the assistant says {said!r}, need {lettered[answer]!r} or {answer!r}"
                raise ValueError(f"{task}: answer {answer!r} is a letter and a choice; {need}")
        if is_letter:
            answer, choices = lettered[answer], list(lettered.values())
    return row | ({} if answer is None else {"answer": answer}) | ({"choices": choices} if choices else {})


def final_answer(text: str) -> str:
    """Take the answer out of a text: what follows the last `####`, where there is one, else the whole."""
    return text.rpartition("####")[2].strip()


def _conversation(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Bring a row to `messages` and check them."""
    if "messages" in row:
        given, used = row["messages"], {"messages"}
    elif "instruction" in row:
        used = {"instruction", "input", "output"}
        asked = ("instruction", "input") if row.get("input") else ("instruction",)
        question, answer = "\n\n".join(text_field(row, name, where) for name in asked), text_field(row, "output", where)
        given = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        raise ValueError(f"{where}: no field 'messages' or 'instruction'; it has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}: 'messages' is {given!r:.40}; need a list of messages")
    messages, allowed = [], ("system", "user")
    for number, message in enumerate(given, 1):
        here = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{here}: {type(message).__name__}; need an object with 'role' and 'content'")
        role, content = text_field(message, "role", here), text_field(message, "content", here)
        if role not in allowed:
            raise ValueError(f"{here}: role {role!r}; need {' or '.join(allowed)}")
        if not content.strip():
            raise ValueError(f"{here}: the {role}'s content is empty")
        messages.append({"role": role, "content": content})
        allowed = ("assistant",) if role == "user" else ("user",)
    if role != "assistant":
        raise ValueError(f"{where}: the last message is by {role}; need the assistant's answer")
    return {"messages": messages} | {name: value for name, value in row.items() if name not in used}


def _locate(source: Source, embedded: tuple[str, ...], revision: str | None, subset: str | None) -> Located:
    """Tell an embedded name, files (as paths) and a pinned name on the Hub apart."""
    if source in embedded or (files := _files(source)):
        if revision or subset:
            raise ValueError(f"{source}: revision and subset are for data sets on the Hub")
        return source if source in embedded else files
    looks_like_file = not isinstance(source, str) or re.search(r"^[./~]|\.[A-Za-z]\w*$", source)
    if looks_like_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise FileNotFoundError(f"{str(source)!r} does not exist: need files, {', '.join(embedded)}, or a Hub name")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        need = f"to read it from the Hub, pin it: need revision=<a commit of 40 hex digits>, got {revision!r}"
        raise ValueError(f"{source!r} is no file and none of {', '.join(embedded)}; {need}")
    return source


def _files(source: Source) -> list[Path]:
    """The files that a path, a pattern or a list of such names, each once; none where nothing is there."""
    if not isinstance(source, str | Path):
        parts = {str(part): _files(part) for part in source}
        if missing := [part for part, files in parts.items() if not files]:
            raise FileNotFoundError(f"{missing[0]!r} does not exist: need a file, or a pattern that files match")
        return list(dict.fromkeys(file for files in parts.values() for file in files))
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"{source} is a folder: need a file, or a pattern such as '{source}/*.jsonl'")
    return [path] if path.is_file() else sorted(filter(Path.is_file, map(Path, glob(str(path), recursive=True))))


def _rows(
    source: Located, split: str, revision: str | None, subset: str | None, *, documents: bool = False
) -> Iterator[tuple[str, dict[str, Any], Callable[[str], str]]]:
    """Rows of files or of a data set on the Hub, each with what tells the split of its content."""
    if isinstance(source, str):
        from datasets import load_dataset

        rows = load_dataset(source, subset, revision=revision, split=split)
        yield from ((f"{source}, row {number}", row, lambda _: split) for number, row in enumerate(rows, 1))
        return
    check_split(split, (*SPLITS, "all"))
    for file in source:
        split_for = split_of
        if len(source) > 1:
            held_out = _HELD_OUT.search(file.name)
            split_for = (lambda _: "test") if held_out else (lambda content: split_of(content).replace("test", "train"))
        yield from ((*row, split_for) for row in file_rows(file, documents=documents))


def _some(found: list[Any], split: str, total: int, source: Located, **dropped: int) -> list[Any]:
    """What was found in a split, at least one; how much was dropped on the way is logged."""
    name = source if isinstance(source, str) else ", ".join(map(str, source))
    if left_out := ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in dropped.items() if count):
        _log.warning("%s: left out %s", name, left_out)
    if not found:
        several = isinstance(source, list) and len(source) > 1
        need = "need at least one, or split='all'" + several * "; files named 'test' or 'valid' are split 'test'"
        raise ValueError(f"{name}: nothing in split {split!r} of {total} rows; {need}")
    return found
