"""Data as arrays: what comes out is what `pack` and `encode_chat` give, splits keep apart, damage is noticed."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from apexlib.suite import prepared
from apexlib.suite.experiments import text_loss
from apexlib.suite.prepared import check, conversations, examples, prepare, stream
from apexlib.text.corpora import load_chat, load_corpus
from apexlib.text.datasets import encode_chat, pack
from apexlib.text.skills import skills_text, split_of
from apexlib.text.tokenizer import train_tokenizer


def write_sources(folder):
    """A few files of each kind, as `prepare` takes them: text, and conversations of three tasks."""
    for name, start in (("general", 0), ("domain", 400)):
        documents = list(dict.fromkeys(skills_text(900)))[start : start + 300]
        for part, some in (("train", documents[:260]), ("valid", documents[260:])):
            (folder / f"{name}-{part}.txt").write_text("\n<|endoftext|>\n".join(some), encoding="utf-8")

    def rows(first, last):
        for n in range(first, last):
            question, result = f"{n} + {n % 7}", str(n + n % 7)
            yield "svamp", question, f"{question} = {result}\n#### {result}", {"answer": result}
            two = {"answer": "AB"[n % 2], "choices": ["odd", "even"]}
            yield "arc_easy", f"{n + 1}\nA. odd\nB. even", f"{'AB'[n % 2]}. {two['choices'][n % 2]}", two
            yield "gsm8k", f"what is {n}?", f"it is\n#### {n}", {"answer": str(n)}

    for name, span in (("train", (0, 60)), ("test-all", (1000, 1012))):
        lines = [
            {"task": task, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]}
            | ({} if name == "train" else own)
            for task, asked, told, own in rows(*span)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    texts = {name: sorted(folder.glob(f"{name}-*.txt")) for name in ("general", "domain")}
    return {**texts, "chat": sorted(folder.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def data(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(**sources, out=folder, vocabulary=300, max_length=128)
    return folder


def test_streams_are_what_pack_gives(sources, data):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    for name in ("general", "domain"):
        train, held_out = (load_corpus(path, split="all") for path in sources[name])
        valid = [text for text in train if split_of(text) == "valid"]
        for split, documents in (("valid", valid), ("test", held_out)):
            expected = pack(documents, tokenizer, 2).blocks.ravel()
            np.testing.assert_array_equal(stream(f"prepared:{data}/{name}", split), expected)
        seen = tokenizer.decode(stream(f"prepared:{data}/{name}", "train")).split("<|endoftext|>")
        assert set(filter(None, seen)) == set(train) - set(valid)
    again = train_tokenizer([text for text in load_corpus(sources["general"][0], split="all")
                             if split_of(text) != "valid"], 300)  # fmt: skip
    assert again.get_vocab() == tokenizer.get_vocab()  # of training text alone


def test_conversations_are_what_encode_chat_gives(sources, data):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    source, found = f"prepared:{data}", {}
    for split in ("train", "valid", "test"):
        dataset = conversations(source, split)
        found[split] = {(item["input_ids"].numpy().tobytes(), item["labels"].numpy().tobytes()) for item in dataset}
    for path, splits in zip(sources["chat"], (("test",), ("train", "valid")), strict=True):
        dataset, _ = encode_chat(load_chat(path, split="all"), tokenizer, max_length=128)
        expected = {(item["input_ids"].numpy().tobytes(), item["labels"].numpy().tobytes()) for item in dataset}
        assert set.union(*(found[split] for split in splits)) == expected
    assert not found["train"] & found["valid"]
    assert len(conversations(source, "train", 5)) == 5


def test_what_is_asked_of_a_model(data):
    asked = examples(f"prepared:{data}")
    assert {example["family"] for example in asked} == {"arithmetic", "arc_easy"}  # gsm8k: its loss only
    assert len(asked) == 24
    assert [example["messages"] for example in examples(f"prepared:{data}", 3)] == [e["messages"] for e in asked[:3]]
    for example in asked:
        told = example["messages"][-1]["content"]
        if example["family"] == "arc_easy":
            assert example["answer"] == told  # a choice is scored as it is trained
            assert example["choices"] == ["A. odd", "B. even"]
        else:
            assert told.endswith(f"#### {example['answer']}")


def test_damage_is_noticed(sources, data, tmp_path):
    manifest = prepare(**sources, out=tmp_path, vocabulary=300, max_length=128)
    assert check(tmp_path) == manifest == check(data)  # the same bytes each time
    path = tmp_path / "domain-test.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"domain-test\.npy is missing or not the file"):
        check(tmp_path)
    with pytest.raises(FileNotFoundError, match="need a folder made by"):
        check(tmp_path / "nowhere")


def test_sources_without_a_held_out_file_are_refused(sources, tmp_path):
    with pytest.raises(ValueError, match="no document for split 'test'"):
        prepare(sources["general"][:1], sources["domain"], sources["chat"], tmp_path, vocabulary=300)
    with pytest.raises(ValueError, match="vocabulary=70000: need at most 65536"):
        prepare(**sources, out=tmp_path, vocabulary=70000)


def test_a_prepared_text_is_a_corpus_to_every_run(data, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    model = tiny_model("llama", vocab_size=300)
    loss = text_loss(model, tokenizer, corpus=f"prepared:{data}/general", context=16, blocks=4)
    documents = tokenizer.decode(stream(f"prepared:{data}/general", "valid")).split("<|endoftext|>")
    (data / "valid.txt").write_text("\n<|endoftext|>\n".join(filter(None, documents)), encoding="utf-8")
    blocks = pack(load_corpus(data / "valid.txt", split="all"), tokenizer, 16)
    from apexlib.evaluation import perplexity
    from apexlib.text.datasets import batches

    assert loss == pytest.approx(perplexity(model, batches(blocks, 4, limit=4))["loss"], rel=1e-5)
    assert prepared.is_prepared("prepared:x")
