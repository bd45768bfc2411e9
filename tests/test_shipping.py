"""A shipped base: what is in its folder, what its card says, and that its numbers are those of the definition."""

import json
import lzma
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apexlib.suite.shipping import PROMPTS, continuation, evaluation_table, ship_base
from apexlib.text.datasets import pack
from apexlib.text.skills import skills_text
from apexlib.text.tokenizer import train_tokenizer
from apexlib.training.checkpoints import checkpoint_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny model with two checkpoints, and the text it is measured on."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(skills_text(50), 300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    for step in (0, 4):
        torch.manual_seed(step)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, tie_word_embeddings=True))
        model.save_pretrained(checkpoint_folder(folder, step))
        tokenizer.save_pretrained(checkpoint_folder(folder, step))
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(skills_text(400)), encoding="utf-8")
    return folder


def shipped(run, folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(run, 4))
    train = pack(skills_text(200), tokenizer, 16)
    config = json.loads((checkpoint_folder(run, 4) / "config.json").read_text())
    told = {
        "config": config,
        "tokens": 64_000,
        "corpus": "a text",
        "skill_documents": 7,
        "data": "0123456789abcdef" * 4,
    }
    told |= {"steps": 4, "batch_size": 2, "context": 16, "learning_rate": 0.01, "precision": "bf16"}
    options = {"weaker": [0], "last": 4, "corpora": {str(run / "text.txt"): "words of ours"}, "blocks": 6}
    return ship_base(run, folder, train=train, settings=told, **options | changes)


def test_the_folder_loads_in_bf16_with_its_weaker_versions_and_a_card(run, tmp_path):
    table = shipped(run, tmp_path / "small")
    for place, step in ((tmp_path / "small", 4), (checkpoint_folder(tmp_path / "small", 0), 0)):
        model = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
        source = AutoModelForCausalLM.from_pretrained(checkpoint_folder(run, step)).bfloat16()
        assert model.dtype == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
        assert len(AutoTokenizer.from_pretrained(place)) == 300
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    for row in table.itertuples():
        assert f"| {row.predictor} | {row.bits_per_byte:.3f}" in card
    for said in ("# small", "0.1 million tokens", "words of ours", "`0123456789abcdef…`", "after 0 steps", *PROMPTS):
        assert said in card
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "small" / "evaluation.csv"), table, check_dtype=False)
    assert json.loads((tmp_path / "small" / "training.json").read_text())["settings"]["learning_rate"] == 0.01


def test_bits_per_byte_are_those_of_the_held_out_text(run):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(run, 4))
    train = pack(skills_text(200), tokenizer, 16)
    corpus = str(run / "text.txt")
    table = evaluation_table({"m": str(checkpoint_folder(run, 4))}, train, [corpus], blocks=5).set_index("predictor")
    from apexlib.text.corpora import load_corpus

    tokens = pack(load_corpus(corpus, split="valid"), tokenizer, 16).blocks[:5].astype(np.int64)
    text = "".join(tokenizer.decode(row) for row in tokens.tolist()).encode()
    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder(run, 4))
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits[:, :-1].double().log_softmax(-1)
    loss = -logits.gather(-1, torch.tensor(tokens)[:, 1:, None]).mean().item()
    assert table.loc["m", "loss"] == pytest.approx(loss, rel=1e-4)
    assert table.loc["m", "bits_per_byte"] == pytest.approx(loss / math.log(2) * tokens.size / len(text), rel=1e-4)
    assert {"unigram", "bigram", "trigram"} <= set(table.index)
    packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert table.loc["xz -9e", "bits_per_byte"] == pytest.approx(8 * packed / len(text))
    assert math.isnan(table.loc["xz -9e", "loss"])


def test_a_sample_begins_with_its_prompt_and_is_the_same_each_time(run):
    model = str(checkpoint_folder(run, 4))
    found = [continuation(model, "1 + 1", tokens=8) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].startswith("1 + 1")
    assert len(found[0]) > len("1 + 1")
