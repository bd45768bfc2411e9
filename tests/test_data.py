"""Data: files with their faults named, splits by hash, a lossless tokenizer, packing, and loss on answers only."""

import copy
import gzip
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

import apexlib.text.datasets as datasets_module
from apexlib.text.cache import cached, corpus_hash
from apexlib.text.corpora import load_chat, load_corpus, scored
from apexlib.text.datasets import IGNORED, PackedTokens, batches, collate, encode_chat, in_one_row, pack
from apexlib.text.skills import SPLITS, skills, skills_text, split_of
from apexlib.text.tokenizer import train_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DOCUMENTS = ["To be, or not to be: that is the question.\n", "naïve 北京 😀 x = 42\n\tif x:", "a" * 50, "The end."]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS * 3 + skills_text(60), 400)


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


# the embedded corpora


def test_embedded_corpora_are_split_without_overlap(cache):
    code, prose, both = (
        {split: load_corpus(name, split=split, cache=cache) for split in SPLITS}
        for name in ("stdlib-code", "stdlib-prose", "stdlib")
    )
    for parts in (code, prose, both):
        everything = [document for split in SPLITS for document in parts[split]]
        assert len(everything) == len(set(everything)) > 300
        assert 0.85 < len(parts["train"]) / len(everything) < 0.95
        assert all(len(parts[split]) >= 5 for split in SPLITS)
    for split in SPLITS:
        assert Counter(both[split]) == Counter(code[split]) + Counter(prose[split])
        assert all(split_of(document) == split for document in code[split])
    assert any("import " in document for document in code["valid"])
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")
    assert text in code[split_of(text)]
    assert any("Wrap a single paragraph of text" in document for document in prose[split_of(text)])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_docstrings_are_in_the_split_of_their_code(cache, split):
    code = "\n".join(load_corpus("stdlib-code", split=split))
    prose = load_corpus("stdlib-prose", split=split, cache=cache)
    beside = [document for document in prose if document.split("\n")[0] in code]
    assert len(beside) / len(prose) > 0.7  # the others are reference topics


def test_undecodable_library_files_are_left_out_and_counted(tmp_path, monkeypatch, caplog):
    good, bad, latin = "x = 1\n", b"# \xff\n", b"# -*- coding: latin-1 -*-\n# \xe9\n"
    (tmp_path / "abc.py").write_text(good)
    (tmp_path / "ast.py").write_bytes(bad)
    (tmp_path / "bdb.py").write_bytes(latin)
    (tmp_path / "not_of_the_library.py").write_text("y = 2\n")
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "json" / "tests" / "case.py").write_text("z = 3\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with caplog.at_level(logging.WARNING):
        found = {text for split in SPLITS for text in load_corpus("stdlib-code", split=split)}
    assert found == {good, latin.decode("latin-1")}
    assert "left out 1 undecodable" in caplog.text


# local files


def write_text(path, documents, newline="\n", bom=False):
    text = f"{newline}<|endoftext|>{newline}".join(document.replace("\n", newline) for document in documents)
    content = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_rows(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a b é.txt", "a.txt.gz"])
def test_text_files(tmp_path, name, newline, bom):
    documents = ["one\n\ntwo", "three <|endoftext|> in a line", "  four"]
    write_text(tmp_path / name, documents, newline, bom)
    assert load_corpus(tmp_path / name, split="all") == documents
    assert load_corpus(str(tmp_path / name), split="all") == documents


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.jsonl", "a.parquet"])
def test_row_files(tmp_path, name):
    documents = [f"document {i}\r\n\u2028 é" for i in range(300)]
    write_rows(tmp_path / name, [{"id": i, "body": text} for i, text in enumerate(documents)])
    assert load_corpus(tmp_path / name, split="all", column="body") == documents
    parts = {split: load_corpus(tmp_path / name, split=split, column="body") for split in SPLITS}
    assert sorted(parts["train"] + parts["valid"] + parts["test"]) == sorted(documents)
    assert min(map(len, parts.values())) > 0


def test_repeated_and_blank_documents_are_left_out_and_counted(tmp_path, caplog):
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in ("b", "a", "", "b", " \n", "b")])
    assert load_corpus(tmp_path / "a.jsonl", split="all") == ["b", "a"]
    assert "left out 2 blank, 2 repeated" in caplog.text


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_what_unpacks_beyond_a_limit_is_refused_and_the_limit_can_be_moved(name, tmp_path, monkeypatch):
    document = "a document " * 90
    (write_text if "txt" in name else lambda path, texts: write_rows(path, [{"text": text} for text in texts]))(
        tmp_path / name, [document]
    )
    monkeypatch.setenv("APEXLIB_MOST_UNPACKED", "900")
    with pytest.raises(ValueError, match=f"{name}: unpacks to more than 900 bytes; raise APEXLIB_MOST_UNPACKED"):
        load_corpus(tmp_path / name, split="all")
    monkeypatch.setenv("APEXLIB_MOST_UNPACKED", "1100")
    assert load_corpus(tmp_path / name, split="all") == [document.strip("\n")]


def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path):
    with gzip.open(tmp_path / "bomb.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(600):
            file.write(b" " * 1_000_000)
    with pytest.raises(ValueError, match=r"bomb.txt.gz: unpacks to more than 500,000,000 bytes"):
        load_corpus(tmp_path / "bomb.txt.gz", split="all")


ROW = json.dumps({"text": "fine"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"\xef\xbb\xbf\n \n", "a.txt is empty"),
        ("a.txt.gz", b"", "a.txt.gz is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz is empty"),
        ("a.txt.gz", b"no gzip", "a.txt.gz: not readable as gzip"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz: not readable as gzip"),
        ("a.txt", b"<|endoftext|>\n\n<|endoftext|>", "a.txt: nothing in split 'all' of 0 rows"),
        ("a.txt", b"one\ntwo\nthr\xffee\n", "a.txt, line 3: byte 0xff is not UTF-8"),
        ("a.txt", "text".encode("utf-16"), "a.txt, line 1: byte 0xff is not UTF-8"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", ROW * 16 + b'{"text": "\xe9"}\n', "a.jsonl, line 17: byte 0xe9 is not UTF-8"),
        ("a.jsonl", ROW * 16 + b'{"text": "cut\n', "a.jsonl, row 17: not JSON"),
        ("a.jsonl", ROW + b"\n" + b"[1]\n", "a.jsonl, row 3: a JSON list; need an object"),
        ("a.jsonl", ROW * 16 + b'{"txt": "x"}\n', "a.jsonl, row 17: no field 'text'; it has 'txt'"),
        ("a.jsonl", ROW + b'{"text": 3}\n', "a.jsonl, row 2: field 'text' is int; need a string"),
        ("a.jsonl", ROW + b'{"text": null}\n', "a.jsonl, row 2: field 'text' is NoneType"),
        ("a.jsonl", ROW + b'{"text": "\\ud800"}\n', "a.jsonl, row 2: .* half a surrogate"),
        ("a.jsonl", b"[" * 99999 + b"\n", "a.jsonl, row 1: not JSON"),
        ("a.parquet", b"", "a.parquet is empty"),
        ("a.parquet", b"PAR1 no", "a.parquet, after row 0: not readable as parquet"),
        ("a.csv", b"text\n", "a.csv: unknown kind of file; need .jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / name, split="all")


def test_a_bad_parquet_row_is_named(tmp_path):
    write_rows(tmp_path / "a.parquet", [{"text": "x"}, {"text": None}])
    with pytest.raises(ValueError, match=r"a.parquet, row 2: field 'text' is NoneType"):
        load_corpus(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 1: no field 'body'; it has 'text'"):
        load_corpus(tmp_path / "a.parquet", column="body")
    write_rows(tmp_path / "none.parquet", [])
    with pytest.raises(ValueError, match=r"none.parquet: nothing in split 'train' of 0 rows"):
        load_corpus(tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("missing.txt", {}, FileNotFoundError, "'missing.txt' does not exist"),
        ("./missing", {}, FileNotFoundError, "'./missing' does not exist"),
        ("/no/where", {}, FileNotFoundError, "'/no/where' does not exist"),
        ("a/b/c", {}, FileNotFoundError, "'a/b/c' does not exist"),
        (Path("missing"), {}, FileNotFoundError, "'missing' does not exist"),
        (".", {}, ValueError, "is a folder"),
        ("stdlibs", {}, ValueError, "'stdlibs' is no file and none of stdlib, .*revision=.*got None"),
        ("owner/name-2.1", {"revision": "main"}, ValueError, "commit of 40 hex digits>, got 'main'"),
        ("skills", {}, ValueError, "'skills' is no file and none of stdlib"),
        ("stdlib", {"split": "all"}, ValueError, "split 'all': need one of train, valid, test"),
        ("stdlib", {"revision": COMMIT}, ValueError, "revision and subset are for data sets on the Hub"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source, options, error, message):
    with pytest.raises(error, match=message):
        load_corpus(source, **options)


def test_hub_data_are_read_at_the_pinned_commit(monkeypatch):
    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": ""}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_corpus("owner/name", revision=COMMIT, subset="en", split="train[:1%]") == ["one", "two"]
    assert calls == [(("owner/name", "en"), {"revision": COMMIT, "split": "train[:1%]"})]
    with pytest.raises(ValueError, match=r"owner/name, row 1: no field 'messages' or 'instruction'; it has 'text'"):
        load_chat("owner/name", revision=COMMIT)


# several files


def parts_of(names, documents):
    """The splits that several files must give, by the rule as it is written: (train, valid, test), each in order."""
    train, valid, test = [], [], []
    held_out = [set(re.split(r"[-_.]", name)) & {"test", "valid"} for name in names]
    away = {text for out, some in zip(held_out, documents, strict=True) if out for text in some}
    for out, some in zip(held_out, documents, strict=True):
        for text in some:
            part = test if out else valid if split_of(text) == "valid" else train
            if text not in part and (out or text not in away):
                part.append(text)
    return {"train": train, "valid": valid, "test": test}


texts = st.lists(st.integers(0, 60).map(lambda n: f"document {n}"), min_size=1, max_size=40)  # of 61, 4 are valid
file_names = st.sampled_from(
    ["a", "a-train", "a-valid", "test-b", "b_test_2", "contest", "valid", "invalidated", "c.test"]
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(file_names, texts, min_size=2, max_size=4), st.booleans())
def test_several_files_are_split_by_name_then_by_hash(tmp_path_factory, files, as_pattern):
    folder = tmp_path_factory.mktemp("files")
    for name, documents in files.items():
        write_text(folder / f"{name}.txt.gz", documents)
    names = sorted(f"{name}.txt.gz" for name in files) if as_pattern else [f"{name}.txt.gz" for name in files]
    source = str(folder / "*.txt.gz") if as_pattern else [folder / name for name in names]
    expected = parts_of(names, [files[name.removesuffix(".txt.gz")] for name in names])
    for split, documents in expected.items():
        if documents:
            found = load_corpus(source, split=split)
            assert sorted(found) == sorted(documents)  # a repeated one may stand where either of its files has it
            if split != "test":
                assert found == documents
        else:
            with pytest.raises(ValueError, match=rf"nothing in split '{split}' of \d+ rows; .*; files named 'test'"):
                load_corpus(source, split=split)
    whole = load_corpus(source, split="all")
    assert whole == list(dict.fromkeys(text for name in names for text in files[name.removesuffix(".txt.gz")]))
    assert sorted(whole) == sorted(text for documents in expected.values() for text in documents)


def test_one_file_is_split_by_hash_however_it_is_given(tmp_path):
    documents = [f"document {i}" for i in range(300)]
    write_text(tmp_path / "a-test.txt", documents)
    for source in (tmp_path / "a-test.txt", [tmp_path / "a-test.txt"], str(tmp_path / "a-*.txt")):
        for split in SPLITS:
            assert load_corpus(source, split=split) == [text for text in documents if split_of(text) == split]


@given(st.permutations(["train-a", "train-b", "b-test"]), st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_conversations_of_several_files_are_mixed(tmp_path_factory, order, n):
    folder = tmp_path_factory.mktemp("chat")
    for name in order:
        write_rows(folder / f"{name}.jsonl", [chat(f"{name} {i}", "answer") | {"task": name} for i in range(200)])
    found = {split: load_chat([folder / f"{name}.jsonl" for name in order], split=split) for split in (*SPLITS, "all")}
    assert found["train"] == load_chat(str(folder / "*.jsonl"))  # whatever the order of files
    assert load_chat(str(folder / "*.jsonl"), limit=n) == found["train"][:n]
    assert {row["task"] for row in found["test"]} == {"b-test"}
    assert len(found["test"]) == 200
    counts = Counter(row["task"] for row in found["train"][:100])
    assert min(counts["train-a"], counts["train-b"]) > 25
    assert 5 <= len(found["valid"]) <= 40
    for row in found["valid"]:
        assert split_of(json.dumps(row["messages"][:-1])) == "valid"
    assert sorted(map(str, found["all"])) == sorted(str(row) for split in SPLITS for row in found[split])


def test_a_question_that_a_held_out_file_asks_is_in_no_other_split(tmp_path, caplog):
    write_rows(tmp_path / "train.jsonl", [chat(f"question {i}", "as in train") for i in range(100)])
    write_rows(tmp_path / "test.jsonl", [chat(f"question {i}", "as in test") for i in range(0, 100, 2)])
    found = {split: load_chat(str(tmp_path / "*.jsonl"), split=split) for split in SPLITS}
    assert "left out 50 asked in a held out file" in caplog.text
    assert {row["messages"][1]["content"] for row in found["test"]} == {"as in test"}
    seen = {int(row["messages"][0]["content"].split()[1]) % 2 for row in found["train"] + found["valid"]}
    assert (seen, len(found["train"] + found["valid"])) == ({1}, 50)


@pytest.mark.parametrize("load", [load_corpus, load_chat])
def test_files_that_are_not_there_are_named(load, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    for source, message in (
        (str(tmp_path / "b-*.jsonl"), "b-\\*.jsonl' does not exist"),
        ([tmp_path / "a.jsonl", tmp_path / "gone.jsonl"], "gone.jsonl' does not exist: need a file"),
        ([str(tmp_path / "a.jsonl"), "stdlib"], "'stdlib' does not exist: need a file"),
        ([], "does not exist"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load(source)
    with pytest.raises(ValueError, match=r"is a folder: need a file, or a pattern"):
        load([tmp_path / "a.jsonl", tmp_path])
    with pytest.raises(ValueError, match="revision and subset are for data sets on the Hub"):
        load([tmp_path / "a.jsonl"], revision=COMMIT)


# conversations


def test_chat_files(tmp_path):
    rows = [chat(f"question {i}", "answer", system="s" if i % 2 else None) | {"task": "t"} for i in range(200)]
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        write_rows(tmp_path / name, rows)
        assert load_chat(tmp_path / name, split="all") == rows
        assert load_chat(tmp_path / name, split="all", limit=3) == rows[:3]
        parts = [load_chat(tmp_path / name, split=split) for split in SPLITS]
        assert sorted(str(row) for part in parts for row in part) == sorted(map(str, rows))
        assert all(parts)


def test_a_question_is_in_one_split_whatever_its_answer(tmp_path):
    write_rows(tmp_path / "a.jsonl", [chat("the same question", f"answer {i}") for i in range(50)])
    (message,) = chat("the same question")["messages"]
    home = split_of(json.dumps([message]))
    assert len(load_chat(tmp_path / "a.jsonl", split=home)) == 50
    for split in set(SPLITS) - {home}:
        with pytest.raises(ValueError, match=f"nothing in split '{split}' of 50 rows"):
            load_chat(tmp_path / "a.jsonl", split=split)


def test_alpaca_rows(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7},
        {"instruction": "Hi", "input": "", "output": "Ho", "id": 8},
    ]
    for name in ("a.jsonl", "a.parquet"):
        write_rows(tmp_path / name, rows)
        examples = load_chat(tmp_path / name, split="all")
        assert examples == [chat("Add.\n\n1 2", "3") | {"id": 7}, chat("Hi", "Ho") | {"id": 8}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "no field 'messages' or 'instruction'; it has 'text'"),
        ({"messages": []}, "'messages' is .*; need a list of messages"),
        ({"messages": "hi"}, "'messages' is 'hi'; need a list"),
        ({"messages": ["hi"]}, "message 1: str; need an object"),
        ({"messages": [{"content": "x"}]}, "message 1: no field 'role'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1: field 'content' is list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1: role 'tool'; need system or user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "message 1: role 'assistant'; need system or user"),
        ({"messages": chat("x", "y")["messages"] * 2 + chat("x")["messages"]}, "last message is by user"),
        ({"messages": chat("x")["messages"] * 2}, "message 2: role 'user'; need assistant"),
        ({"messages": chat("x", "y")["messages"] + [{"role": "system", "content": "x"}]}, "message 3: role 'system'"),
        (chat("x", " \n"), "message 2: the assistant's content is empty"),
        ({"instruction": "x"}, "no field 'output'"),
        ({"instruction": "x", "input": 3, "output": "y"}, "field 'input' is int"),
    ],
)
def test_a_bad_conversation_is_named_with_its_row(tmp_path, row, message):
    write_rows(tmp_path / "a.jsonl", [chat("x", "y")] * 4 + [row])
    with pytest.raises(ValueError, match=rf"a.jsonl, row 5(, |: ).*{message}"):
        load_chat(tmp_path / "a.jsonl", split="all")


def test_skills_are_a_chat_source():
    assert load_chat(limit=1)[0]["messages"][-1]["role"] == "assistant"
    assert load_chat(limit=30, split="valid", seed=2) == skills("valid", 30, seed=2)
    with pytest.raises(ValueError, match="limit=0"):
        load_chat(limit=0)
    with pytest.raises(ValueError, match="'stdlib' is no file and none of skills"):
        load_chat("stdlib")


# hashes and the cache


@settings(max_examples=50)
@given(st.lists(st.text(max_size=3), max_size=4), st.lists(st.text(max_size=3), max_size=4))
def test_equal_hashes_mean_equal_corpora(left, right):
    assert (corpus_hash(left) == corpus_hash(right)) == (left == right)


def test_what_is_cached_is_checked(tmp_path, caplog):
    built = []

    def build():
        built.append(1)
        return b"content"

    assert [cached(tmp_path, "name", "ab" * 32, build) for _ in range(3)] == [b"content"] * 3
    assert len(built) == 1
    (file,) = tmp_path.iterdir()
    for damage in (b"", file.read_bytes()[:-1], file.read_bytes()[:-1] + b"?"):
        file.write_bytes(damage)
        assert cached(tmp_path, "name", "ab" * 32, build) == b"content"
        assert "damaged" in caplog.text
    assert len(built) == 4
    cached(tmp_path, "name", "cd" * 32, build)
    assert len(built) == 5


# the tokenizer


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives(tokenizer, text):
    encoded = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(encoded) == text
    assert not set(encoded) & set(tokenizer.all_special_ids)


def test_text_that_looks_like_a_special_token(tokenizer):
    text = "a<|endoftext|>b<|user|>"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # what everybody must know
    assert tokenizer.eos_token_id not in tokenizer(text, split_special_tokens=True)["input_ids"]
    blocks = pack([text], tokenizer, 8)
    assert not set(blocks.blocks.ravel().tolist()) & set(tokenizer.all_special_ids)


def test_corpus_and_tokenizer_are_the_same_in_another_process(tokenizer):
    program = (
        "from apexlib.text.corpora import *; from apexlib.text.tokenizer import *; from apexlib.text.skills import *;"
        "import json, sys; print(corpus_hash(load_corpus('stdlib-code', split='test')));"
        "documents = json.loads(sys.argv[1]) * 3 + skills_text(60);"
        "print(train_tokenizer(documents, 400).backend_tokenizer.to_str())"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, json.dumps(DOCUMENTS)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"},
    )
    corpus, vocabulary = other.stdout.strip().split("\n", 1)
    assert corpus == corpus_hash(load_corpus("stdlib-code", split="test"))
    assert vocabulary == tokenizer.backend_tokenizer.to_str()


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    example = chat("Copy: é 12.", "é 12", "b", "c", system="s")["messages"]
    for options in ({}, {"add_generation_prompt": True}):
        assert loaded.apply_chat_template(example, **options) == tokenizer.apply_chat_template(example, **options)
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.all_special_ids == tokenizer.all_special_ids


def test_the_tokenizer_is_cached_by_content(tmp_path):
    first = train_tokenizer(DOCUMENTS, 300, cache=tmp_path)
    again = train_tokenizer(DOCUMENTS, 300, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    train_tokenizer(DOCUMENTS[:2], 300, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_template_prompts_and_refuses_unknown_roles(tokenizer):
    text = tokenizer.apply_chat_template(chat("q", system="s")["messages"], tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>s<|user|>q<|assistant|>"
    with pytest.raises(Exception, match="role tool: need system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("documents", "size", "message"), [([], 300, "no documents"), (["a"], 260, "need 261 or more")]
)
def test_a_tokenizer_needs_documents_and_room(documents, size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(documents, size)


# packing


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(st.text(max_size=30), min_size=1, max_size=8), length=st.integers(2, 12))
def test_packing_is_the_stream_in_blocks(tokenizer, documents, length):
    stream = []
    for document in documents:
        stream += [*tokenizer(document, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
    if len(stream) < length:
        with pytest.raises(ValueError, match=f"have {len(stream)} tokens, EOS included: need {length}"):
            pack(documents, tokenizer, length)
        return
    packed = pack(documents, tokenizer, length)
    joined = [token for block in packed for token in block["input_ids"].tolist()]
    assert joined == stream[: len(stream) // length * length]
    assert packed.left_over == len(stream) % length
    item = packed[len(packed) - 1]
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])


def test_packing_is_cached_for_every_length_and_usable_by_a_loader(tokenizer, tmp_path):
    plain = pack(DOCUMENTS, tokenizer, 16)
    for length in (16, 16, 8):
        packed = pack(DOCUMENTS, tokenizer, length, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert np.array_equal(packed.blocks.ravel()[: plain.blocks.size], plain.blocks.ravel())
    pack(DOCUMENTS[1:], tokenizer, 8, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    loaded = list(DataLoader(plain, batch_size=2))
    assert loaded[0]["input_ids"].shape == (2, 16)
    item = plain[0]
    item["input_ids"] += 1  # a copy: training code may write to it
    assert not torch.equal(item["input_ids"], plain[0]["input_ids"])


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    without = AutoTokenizer.from_pretrained(tmp_path)
    without.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        pack(DOCUMENTS, without, 8)
    with pytest.raises(ValueError, match="has no EOS token"):
        encode_chat([chat("a", "b")], without, max_length=8)


# conversations as tokens

TEMPLATES = {
    # like ours, but without the mark
    "eos in the turn": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # header and answer are joined by ordinary text, where tokens can merge; a line end follows EOS
    "plain words": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    # a mark that leaves EOS out
    "mark without eos": "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # no EOS anywhere
    "no eos": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    # no EOS, and the blank before the answer is not part of the prompt
    "bare words": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    # something follows EOS in the turn
    "words after eos": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }} --{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "mark, no eos": "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}


@pytest.fixture(scope="module", params=["ours", *TEMPLATES])
def templated(request, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = TEMPLATES.get(request.param, loaded.chat_template)
    return loaded


words = st.text(st.sampled_from("ab 1é😀.:\n"), min_size=1, max_size=8).map(lambda text: f"x{text}y")
emoji = st.sampled_from(["😀", "é", "42", "yes"])
conversations = st.tuples(
    st.lists(st.tuples(words, st.one_of(words, emoji)), min_size=1, max_size=3), st.one_of(st.none(), words)
).map(lambda drawn: chat(*[content for turn in drawn[0] for content in turn], system=drawn[1]))


@settings(max_examples=60, deadline=None)
@given(example=conversations)
def test_labels_are_the_answers_and_their_eos(templated, example):
    """The decoded labels, cut at EOS, are the answers; where no EOS is added, the input is the rendered text."""
    dataset, report = encode_chat([example], templated, max_length=1000)
    tokens, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    trained = labels != IGNORED
    assert torch.equal(labels[trained], tokens[trained])
    answers = [message["content"] for message in example["messages"] if message["role"] == "assistant"]
    ends = (tokens == templated.eos_token_id) & trained
    assert int(ends.sum()) == len(answers)
    assert trained[-1]
    assert ends[-1]
    said = templated.decode(tokens[trained]).split(templated.eos_token)[:-1]
    assert [text.strip() for text in said] == answers
    (row,) = report.to_dict("records")
    no_eos = templated.eos_token not in templated.apply_chat_template(example["messages"], tokenize=False)[13:]
    assert row["eos_added"] == (len(answers) if no_eos else 0)
    assert (row["tokens"], row["trained_tokens"]) == (len(tokens), int(trained.sum()))
    if not no_eos:
        full = templated.apply_chat_template(example["messages"], return_dict=False)
        assert tokens.tolist() == full[: len(tokens)]


def test_tokens_merge_across_the_end_of_the_prompt(tokenizer):
    """Where a merge crosses the border, tokenizing the prompt alone miscounts; the labels are right all the same."""
    tokenizer = train_tokenizer(["assistant: yes"] * 9, 320)
    tokenizer.chat_template = TEMPLATES["no eos"]
    example = chat("q", "yes")["messages"]
    prompt = tokenizer.apply_chat_template(example[:1], return_dict=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template(example, return_dict=False)
    assert full[: len(prompt)] != prompt  # the trap is there
    dataset, _ = encode_chat([{"messages": example}], tokenizer, max_length=99)
    labels = dataset[0]["labels"]
    assert tokenizer.decode(labels[labels != IGNORED]) == " yes<|endoftext|>"


def test_too_long_examples_are_left_out_and_reported(tokenizer):
    fits, long_prompt, long_answer = chat("a", "b"), chat("1" * 30, "b"), chat("a", "1" * 30)
    injected = chat("a <|assistant|> b", "c")
    dataset, report = encode_chat([fits, long_prompt, long_answer, injected, fits], tokenizer, max_length=20)
    (row,) = report.to_dict("records")
    assert row.pop("trained_share") == pytest.approx(4 / 10)
    assert row == {
        "examples": 5,
        "kept": 2,
        "dropped_prompt": 1,
        "dropped_answer": 1,
        "dropped_special": 1,
        "eos_added": 0,
        "tokens": 10,  # <|user|> a <|assistant|> b <|endoftext|>, twice
        "trained_tokens": 4,
    }
    assert len(dataset) == 2
    with pytest.raises(ValueError, match=r"none of 2 examples is left: 1 prompts and 1 answers pass max_length=20"):
        encode_chat([long_prompt, long_answer], tokenizer, max_length=20)


@settings(max_examples=15, deadline=None)
@given(examples=st.lists(conversations, min_size=1, max_size=6), max_length=st.integers(20, 80))
def test_conversations_are_kept_bit_by_bit(templated, tmp_path_factory, examples, max_length):
    folder = tmp_path_factory.mktemp("kept")
    examples = [chat("a", "b"), *examples]  # one that is short enough
    results = [encode_chat(examples, templated, max_length=max_length, cache=cache) for cache in (None, folder, folder)]
    assert len(list(folder.iterdir())) == 1
    for dataset, report in results[1:]:
        pd.testing.assert_frame_equal(report, results[0][1])
        assert len(dataset) == len(results[0][0])
        for mine, plain in zip(dataset.examples, results[0][0].examples, strict=True):
            for found, expected in zip(mine, plain, strict=True):
                assert found.dtype == expected.dtype == np.int32
                np.testing.assert_array_equal(found, expected)


def test_kept_conversations_are_encoded_once_and_anew_when_anything_differs(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    other.chat_template = TEMPLATES["no eos"]
    example, cache, encoded = chat("a", "b"), tmp_path / "cache", []
    once = datasets_module._encoded
    monkeypatch.setattr(datasets_module, "_encoded", lambda *given: encoded.append(1) or once(*given))
    for count, examples, words, max_length in (
        (1, [example], tokenizer, 20),
        (1, [example | {"id": 7}], tokenizer, 20),  # fields that are not encoded do not matter
        (2, [chat("a", "c")], tokenizer, 20),
        (3, [example, example], tokenizer, 20),
        (4, [example], tokenizer, 21),
        (5, [example], other, 20),
        (6, [example], train_tokenizer(DOCUMENTS, 300), 20),
        (6, [example], tokenizer, 20),
    ):
        encode_chat(examples, words, max_length=max_length, cache=cache)
        assert len(encoded) == count
    assert len(list(cache.iterdir())) == 6
    with pytest.raises(ValueError, match="none of 1 examples is left"):
        encode_chat([example], tokenizer, max_length=2, cache=cache)
    assert len(list(cache.iterdir())) == 6  # an error is not kept


@pytest.mark.parametrize("limit", range(3, 12))
def test_an_example_is_kept_whole_or_not_at_all(tokenizer, limit):
    example = chat("ab", "1234")  # <|user|> ab <|assistant|> 1 2 3 4 <|endoftext|>
    prompt = len(tokenizer.apply_chat_template(example["messages"][:1], return_dict=False, add_generation_prompt=True))
    dataset, report = encode_chat([example, chat("a", "b")], tokenizer, max_length=max(limit, 5))
    whole = prompt + 5
    expected = "kept" if max(limit, 5) >= whole else "dropped_answer"
    assert report[expected][0] == (2 if expected == "kept" else 1)
    assert all(item["labels"][-1] == tokenizer.eos_token_id for item in dataset)


def test_a_template_that_cannot_be_used_is_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    two_turns = [chat("a", "b", "c", "d")]
    for template, message in [
        # the last answer is written in another way
        ("{% for m in messages %}[{{ '!' if loop.last else '' }}{{ m['content'] }}]{% endfor %}", "in another way"),
        ("{{ raise_exception('no thanks') }}", "no thanks"),
        ("hello{% generation %}{% endgeneration %}", "marks no token as the assistant's"),
        (None, f"tokenizer '{re.escape(str(tmp_path))}' has no chat template"),
    ]:
        loaded.chat_template = template
        with pytest.raises(ValueError, match=message):
            encode_chat(two_turns, loaded, max_length=50)


# batches


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    multiple_of=st.sampled_from([None, 1, 8]),
)
def test_padding_is_undone_by_the_mask(lengths, side, multiple_of):
    lengths = [max(lengths) + 1, *lengths]  # one at least has a token to predict
    items = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in lengths]  # id 0 is pad, EOS and content
    batch = collate(0, side=side, multiple_of=multiple_of)(items)
    width = batch["input_ids"].shape[1]
    assert width % (multiple_of or 1) == 0
    assert max(lengths) <= width < max(lengths) + (multiple_of or 1)
    for row, item in enumerate(items):
        kept = batch["attention_mask"][row].bool()
        assert int(kept.sum()) == len(item["input_ids"])
        assert torch.equal(kept, kept.sort(descending=side == "right").values)  # in one piece, at its side
        assert torch.equal(batch["input_ids"][row][kept], item["input_ids"])
        unseen = int(side == "left")  # what would be predicted from padding
        assert torch.equal(batch["labels"][row][kept][unseen:], item["labels"][unseen:])
        assert (batch["labels"][row][kept][:unseen] == IGNORED).all()
        assert (batch["labels"][row][~kept] == IGNORED).all()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    multiple_of=st.sampled_from([None, 1, 8]),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_batches_are_those_of_transformers(tokenizer, lengths, side, multiple_of, dtype):
    generator = torch.Generator().manual_seed(len(lengths))
    items = [
        {name: torch.randint(9, (n,), generator=generator).to(dtype) for name in ("input_ids", "labels")}
        for n in lengths
    ]
    items[0]["labels"][1:] = IGNORED
    padder = copy.deepcopy(tokenizer)
    padder.padding_side = side
    lists = [{name: value.tolist() for name, value in item.items()} for item in items]
    expected = DataCollatorForSeq2Seq(padder, pad_to_multiple_of=multiple_of)(lists)
    if side == "left":  # what transformers would have predicted from padding
        expected["labels"][expected["attention_mask"].cumsum(1) == 1] = IGNORED
    if (expected["labels"] == IGNORED).all():
        return
    found = collate(tokenizer.pad_token_id, side=side, multiple_of=multiple_of)(items)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype == torch.int64
        assert torch.equal(value, expected[name])


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), variant=st.sampled_from(["llama", "qwen3", "gemma2"])
)
def test_items_in_one_row_give_the_gradients_of_padded_ones(lengths, variant):
    generator = torch.Generator().manual_seed(len(lengths))
    ids = [torch.randint(48, (n,), generator=generator) for n in [4, *lengths]]
    unseen = [torch.rand(len(each), generator=generator) < 0.5 for each in ids]
    unseen[0][-1] = False
    items = [{"input_ids": i, "labels": i.masked_fill(u, IGNORED)} for i, u in zip(ids, unseen, strict=True)]
    found = []
    for join in (collate(1), in_one_row):
        model = build(variant, dtype=torch.float64, use_cache=False)
        loss = model(**join(items)).loss
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)  # norms are in float32 inside, whatever the model is in
    labelled = sum(int((item["labels"][1:] != IGNORED).sum()) for item in items)
    assert model(**in_one_row(items)).logits.shape[:2] == (1, labelled)


def test_a_batch_without_a_label_is_refused():
    blind = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([IGNORED, IGNORED])}
    seeing = {"input_ids": torch.tensor([1]), "labels": torch.tensor([1])}
    join = pickle.loads(pickle.dumps(collate(0)))  # as a loader's worker gets it
    assert join([blind, seeing])["labels"].tolist() == [[IGNORED, IGNORED], [1, IGNORED]]
    with pytest.raises(ValueError, match="2 items has no label to learn from"):
        join([blind, blind])
    unseen = {"input_ids": torch.tensor([1, 3]), "labels": torch.tensor([1, 3])}
    assert in_one_row([blind, unseen])["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 3]]
    with pytest.raises(ValueError, match="2 items has no label to learn from"):
        in_one_row([blind, seeing])
    for labels in (torch.tensor([1, 2, 3]), torch.tensor([1])):
        with pytest.raises(ValueError, match="an item has more or fewer labels than tokens"):
            join([seeing, blind | {"labels": labels}])
        with pytest.raises(ValueError, match="an item has more or fewer labels than tokens"):
            in_one_row([seeing, blind | {"labels": labels}])
    with pytest.raises(ValueError, match="pad_token_id=None"):
        collate(None)
    with pytest.raises(ValueError, match="side 'middle'"):
        collate(0, side="middle")


def test_batches_keep_order_and_limit(tokenizer):
    blocks = PackedTokens(np.arange(30, dtype=np.int32), 3)
    assert [batch["input_ids"].shape[0] for batch in batches(PackedTokens(np.arange(20), 4), 2)] == [2, 2, 1]
    for limit, sizes in ((None, [4, 4, 2]), (6, [4, 2]), (4, [4]), (99, [4, 4, 2])):
        found = batches(blocks, 4, limit=limit)
        assert [len(batch["input_ids"]) for batch in found] == sizes
        assert torch.cat([batch["input_ids"] for batch in found]).ravel().tolist() == list(range(3 * sum(sizes)))
    examples, _ = encode_chat(skills("train", 7), tokenizer, max_length=200)
    assert len(batches(examples, 3, collator=collate(tokenizer.pad_token_id))) == 3
    with pytest.raises(ValueError, match="need collator"):
        batches(examples, 3)
    with pytest.raises(ValueError, match="batch_size=0"):
        batches(blocks, 0)


# larger data that lie beside the project


@pytest.fixture
def shared():
    folder = os.environ.get("APEXLIB_SHARED_DATA")
    if not folder:
        pytest.skip("set APEXLIB_SHARED_DATA to the folder of the real data sets")
    return Path(folder)


def test_a_real_corpus(shared, tokenizer, tmp_path):
    documents = load_corpus(shared / "corpus" / "domain-valid.txt.gz", split="all")
    assert len(documents) == 17  # as its README says
    assert sum(len(document.split()) for document in documents) == 46146 - 16  # which counts the separators as words
    assert len(pack(documents, tokenizer, 256, cache=tmp_path)) > 100


def test_a_real_instruction_set(shared, tokenizer):
    examples = load_chat(shared / "instruct" / "test-gsm8k.jsonl", split="all")
    assert len(examples) == 1187
    assert all(example["messages"][-1]["content"].endswith(f"#### {example['answer']}") for example in examples[:50])
    _, report = encode_chat(examples, tokenizer, max_length=1024)
    assert report.kept[0] + report.dropped_prompt[0] + report.dropped_answer[0] == 1187
    assert 0.2 < report.trained_share[0] < 0.8


def test_a_real_set_of_several_files(shared, caplog):
    pattern = str(shared / "instruct" / "*.jsonl")
    found = {split: load_chat(pattern, split=split) for split in SPLITS}
    assert not caplog.text  # its README says that no test question is in train
    assert (len(found["test"]), len(found["train"]) + len(found["valid"])) == (8384, 27349)
    assert 0.04 < len(found["valid"]) / 27349 < 0.06
    assert len({example["task"] for example in found["test"][:200]}) >= 5
    families = Counter(scored(example)["family"] for example in found["test"])
    assert families["arithmetic"] == 611
    choices = [scored(example) for example in found["test"] if "choices" in example]
    assert all(example["answer"] in example["choices"] for example in choices)
    assert all(example["answer"] == example["messages"][-1]["content"] for example in choices)
