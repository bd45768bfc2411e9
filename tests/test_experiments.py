"""The comparisons: what a run measures, how a learning rate is chosen, what is kept."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apexlib.analysis.intervals import interval, paired_over_examples
from apexlib.evaluation import perplexity
from apexlib.plan import ApexConfig
from apexlib.suite import experiments, trials
from apexlib.suite.experiments import (
    VARIANTS,
    choose_rates,
    compare,
    continued_run,
    grid_trials,
    instruction_run,
    pretraining_run,
    tokens_to_reach,
    untouched_run,
)
from apexlib.text.datasets import batches, collate, encode_chat, pack
from apexlib.text.skills import skills, skills_text
from apexlib.text.tokenizer import train_tokenizer
from apexlib.training.methods import method_of

CHAT = {"source": "skills", "train": 40, "valid": 14, "test": 28, "difficulties": [1]}
CHAT |= {"max_length": 64, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random model with a tokenizer, as a folder; beside it a text to read."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(skills_text(50), 300)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    documents = skills_text(400)
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture
def settings(base):
    retention = {"corpus": str(base / "text.txt"), "context": 16, "blocks": 4}
    own = {"steps": 4, "batch_size": 4, "stages": 2, "assessment_samples": 4, "retention": retention}
    return {"base": str(base), "learning_rate": 1e-2, "seed": 0, **own}


def test_every_variant_is_a_method_with_a_valid_configuration():
    for name, variant in VARIANTS.items():
        config = variant.config(stages=2, seed=3, samples=7)
        assert (config.seed, config.assessment_samples) == (3, 7)
        assert method_of(variant.method, config, **variant.options)
        if name.startswith("stages-"):
            assert config.stages == int(name[-1])


def test_ablations_change_one_thing_each():
    default = vars(ApexConfig())
    several = {"apex-2.4%", "apex-all"}
    for name in VARIANTS.keys() - several:
        changed = [field for field, value in VARIANTS[name].changes.items() if default[field] != value]
        assert len(changed) <= 1, name


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match=r"unknown variant 'apx'; known: full, lora"):
        grid_trials(["apx"], [1e-3], [0], {0: "base"})


@given(st.lists(st.floats(0.1, 5), min_size=6, max_size=6))
def test_the_rate_chosen_has_the_lowest_mean_loss(losses):
    rows = [("m", rate, seed) for rate in (0.1, 0.2, 0.3) for seed in (0, 1)]
    runs = pd.DataFrame(rows, columns=["method", "learning_rate", "seed"]).assign(valid_loss=losses)
    means = {rate: (losses[2 * i] + losses[2 * i + 1]) / 2 for i, rate in enumerate((0.1, 0.2, 0.3))}
    assert means[choose_rates(runs)["m"]] == min(means.values())


def test_a_seed_without_all_rates_has_no_say_in_the_choice():
    runs = pd.DataFrame({"method": "m", "learning_rate": [1.0, 2.0, 2.0], "seed": [0, 0, 1]})
    assert choose_rates(runs.assign(valid_loss=[1.0, 1.1, 0.1])) == {"m": 1.0}


@given(st.lists(st.integers(0, 20), min_size=2, max_size=8), st.integers(0, 20))
def test_tokens_to_reach_is_where_the_drawn_curve_crosses(losses, goal):
    curve = pd.DataFrame({"tokens": np.arange(len(losses)) * 10, "loss": losses})
    found = tokens_to_reach(curve, goal)
    if min(losses) > goal:
        assert found == math.inf
    else:
        fine = np.linspace(0, 10 * (len(losses) - 1), 500 * (len(losses) - 1) + 1)
        below = np.interp(fine, curve["tokens"], losses) <= goal + 1e-9
        assert abs(fine[below.argmax()] - found) <= 0.03


def test_pairs_over_examples_match_the_literal_formula():
    rng = np.random.default_rng(0)
    rows = [(m, s, e, int(rng.random() < p)) for m, p in (("a", 0.7), ("b", 0.4)) for s in (0, 1) for e in range(30)]
    table = pd.DataFrame(rows, columns=["method", "seed", "example", "correct"])
    differences = []
    for example in range(30):
        mine = [correct for m, _, e, correct in rows if e == example and m == "a"]
        other = [correct for m, _, e, correct in rows if e == example and m == "b"]
        differences.append(sum(mine) / 2 - sum(other) / 2)
    (row,) = paired_over_examples(table, of="a").itertuples()
    assert (row.method, row.examples) == ("b", 30)
    assert (row.low, row.high) == pytest.approx(interval(differences))
    assert row.difference == pytest.approx(np.mean(differences))


@pytest.mark.parametrize("variant", ["full", "apex", "lora", "no-operator"])
def test_an_instruction_run_measures_the_model_it_leaves(variant, settings, base, tmp_path):
    result = instruction_run(folder=tmp_path, variant=variant, chat=CHAT, **settings)
    last = sorted(tmp_path.glob("stage-*"))[-1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(last), AutoTokenizer.from_pretrained(base)
    test, _ = encode_chat(skills("test", 28, difficulties=[1]), tokenizer, max_length=64)
    loss = perplexity(model, batches(test, 7, collator=collate(tokenizer.pad_token_id)), quiet=True)["loss"]
    assert result["answer_loss"] == pytest.approx(loss, rel=1e-5)
    shares = [share for share, _ in result["families"].values()]
    assert result["exact_match"] == pytest.approx(np.mean(shares))
    assert sum(result["correct"]) == pytest.approx(sum(share * count for share, count in result["families"].values()))
    assert len(result["correct"]) == 28
    assert result["seconds_per_step"] > 0
    assert (result["trainable"] == 1) == (variant == "full")
    start = untouched_run(folder=tmp_path, base=settings["base"], chat=CHAT, retention=settings["retention"])
    assert result["answer_loss"] < start["answer_loss"]


def test_the_same_run_twice_gives_the_same_numbers(settings, tmp_path):
    first, second = (
        instruction_run(folder=tmp_path / name, variant="apex", chat=CHAT, **settings) for name in ("one", "two")
    )
    costs = {"seconds_per_step", "peak_memory_mb"}
    assert {k: v for k, v in first.items() if k not in costs} == {k: v for k, v in second.items() if k not in costs}


def test_a_continued_run_draws_its_curve_from_the_base_on(settings, base, tmp_path):
    text = {"corpus": str(base / "text.txt"), "context": 16, "blocks": 6}
    result = continued_run(folder=tmp_path, variant="apex", evaluations=2, text=text, **settings)
    assert [point["tokens"] for point in result["curve"]] == [0, 2 * 4 * 16, 4 * 4 * 16]
    tokenizer = AutoTokenizer.from_pretrained(base)
    from apexlib.text.corpora import load_corpus

    held_out = pack(load_corpus(base / "text.txt", split="test"), tokenizer, 16)
    for folder, point in ((base, result["curve"][0]), (tmp_path / "stage-1", result["curve"][-1])):
        model = AutoModelForCausalLM.from_pretrained(folder)
        loss = perplexity(model, batches(held_out, 2, limit=6), quiet=True)["loss"]
        assert point["loss"] == pytest.approx(loss, rel=1e-4)


def test_pretraining_starts_from_the_weights_of_its_seed(base, tmp_path):
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "vocab_size": len(AutoTokenizer.from_pretrained(base))}
    text = {"corpus": str(base / "text.txt"), "skill_documents": 3, "context": 16}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = pretraining_run(
            folder=tmp_path / name, tokenizer=str(base), config=config, checkpoints=[0, 2], steps=2, batch_size=4,
            learning_rate=1e-3, seed=seed, **text,
        )  # fmt: skip
        assert len(result["log"]) == 2
    weights = [
        {
            step: AutoModelForCausalLM.from_pretrained(tmp_path / name / f"step-{step:05d}").lm_head.weight
            for step in (0, 2)
        }
        for name in "abc"
    ]
    for step in (0, 2):
        assert torch.equal(weights[0][step], weights[1][step])
        assert not torch.equal(weights[0][step], weights[2][step])
    assert not torch.equal(weights[0][0], weights[0][2])


def fake(folder, variant, learning_rate, seed, base):
    """A run whose loss is lowest at a rate of its own."""
    with (folder.parent / "calls").open("a") as calls:
        calls.write(f"{folder.name}\n")
    (folder / "stage-0").mkdir()
    return {"valid_loss": abs(learning_rate - (0.1 if variant == "full" else 0.2)) + seed, "text": "not a number"}


def test_compare_finishes_the_chosen_rate_and_keeps_its_models_only(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "default_workers", lambda: 1)
    monkeypatch.setattr(experiments, "_root", lambda: tmp_path)
    how = {"bases": {0: tmp_path / "b", 1: tmp_path / "b"}, "folder": tmp_path, "grid_seeds": [0]}
    found = compare(fake, ["full", "apex"], learning_rates=[0.1, 0.2], **how)
    runs = found.runs.set_index(["method", "seed", "learning_rate"])["chosen"]
    assert runs[runs].index.tolist() == [("full", 0, 0.1), ("apex", 0, 0.2), ("full", 1, 0.1), ("apex", 1, 0.2)]
    assert len(runs) == 6
    kept = {path.parent.name for path in tmp_path.glob("*/stage-0")}
    assert kept == {"full-lr0.1-seed0", "apex-lr0.2-seed0", "full-lr0.1-seed1", "apex-lr0.2-seed1"}
    assert set(found.results) == set(found.runs["path"])
    assert found.rates.loc[found.rates["chosen"], "loss"].tolist() == [0, 0]

    before = (tmp_path / "calls").read_text()
    assert compare(fake, ["full", "apex"], learning_rates=[0.1, 0.2], **how).runs.equals(found.runs)
    assert (tmp_path / "calls").read_text() == before
    # another grid makes another rate the best one: its model was removed, so that run is made again
    other = compare(fake, ["apex"], learning_rates=[0.1], **how)
    assert (tmp_path / "calls").read_text()[len(before) :].split() == ["apex-lr0.1-seed1", "apex-lr0.1-seed0"]
    assert sorted(other.runs["seed"]) == [0, 1]
    assert other.runs["chosen"].all()


def test_a_trial_reads_its_base_from_the_root_wherever_it_is_made(tmp_path, monkeypatch):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(experiments, "_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path / "notebooks")
    (trial,) = grid_trials(["full"], [1e-3], [0], {0: "models/base"})
    assert [path.is_dir() for path in trial.reads] == [True]
