"""The comparisons: what a run measures, how a learning rate is chosen, what is kept."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import smallest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apexlib.analysis.budget import config_for_share, lora_rank_for_share, trained_share
from apexlib.analysis.intervals import interval, paired_over_examples
from apexlib.evaluation import perplexity
from apexlib.plan import ApexConfig
from apexlib.provenance import save_table
from apexlib.suite import runs, trials, variants
from apexlib.suite.bases import base_models, check_bases, masked_models, measured_models, models_table, reference_losses
from apexlib.suite.comparison import (
    Comparison,
    above_goal,
    beside_untouched,
    choose_rates,
    compare,
    curves_table,
    decomposition,
    gate_table,
    grid_trials,
    rates_table,
    token_ratios,
    tokens_to_reach,
)
from apexlib.suite.differences import by_share, paired_differences
from apexlib.suite.folders import NotReadyError, locate, relative
from apexlib.suite.inputs import conversations, data_files, documents, examples, load_tokenizer, text_blocks
from apexlib.suite.runs import (
    answers_run,
    continued_run,
    instruction_run,
    instruction_setting,
    pretraining_run,
    untouched_run,
)
from apexlib.suite.variants import VARIANTS, Variant, settings_of
from apexlib.text.corpora import load_corpus
from apexlib.text.datasets import batches, collate, encode_chat, in_one_row, pack
from apexlib.text.skills import skills, skills_text
from apexlib.text.tokenizer import train_tokenizer
from apexlib.training.interruption import TIME_IS_OVER, Interrupted
from apexlib.training.methods import METHODS, method_of

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
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), use_cache=False, **shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = skills_text(400)
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return folder


@pytest.fixture
def settings(base):
    retention = {"corpus": str(base / "text.txt"), "context": 16, "blocks": 4}
    own = {"steps": 4, "batch_size": 4, "stages": 2, "assessment_samples": 4, "retention": retention}
    return {"base": str(base), "learning_rate": 1e-2, "seed": 0, **own}


SHAPE = LlamaConfig(
    hidden_size=160,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    vocab_size=4096,
    tie_word_embeddings=True,
)
GIVEN = {"stages": 2, "seed": 3, "samples": 7, "shape": SHAPE}


def share_of(name, shape=SHAPE):
    variant = VARIANTS[name]
    config = variant.config(**GIVEN | {"shape": shape})
    return trained_share(shape, method_of(variant.method, config, **variant.method_options(shape)))


def test_every_variant_is_a_method_with_a_valid_configuration():
    assert set(METHODS) <= set(VARIANTS)
    for name, variant in VARIANTS.items():
        config = variant.config(**GIVEN)
        assert (config.seed, config.assessment_samples) == (3, 7)
        assert method_of(variant.method, config, **variant.method_options(SHAPE))
        if name.startswith("stages-"):
            assert config.stages == int(name[-1])


def test_a_share_is_solved_for_once_by_what_it_depends_on(monkeypatch):
    solved = []
    monkeypatch.setattr(variants, "_solved", {})
    monkeypatch.setattr(variants, "config_for_share", lambda *given: solved.append(given) or config_for_share(*given))
    configs = [VARIANTS["apex-2.4%"].config(**GIVEN | {"seed": seed}) for seed in (0, 1)]
    assert len(solved) == 2  # whether the rank has a match, and these settings
    assert configs[1] == replace(configs[0], seed=1)
    wide = LlamaConfig(**SHAPE.to_dict() | {"intermediate_size": 1024})
    others = [VARIANTS["apex-2.4%"].config(**GIVEN | {"shape": wide})]
    others += [VARIANTS[name].config(**GIVEN) for name in ("apex-10%", "operator-2.4%")]
    assert len(solved) == 7  # two of the other model, two of another share, these settings
    assert len({config.direct_channels for config in (configs[0], *others)}) == 4


def test_ablations_change_one_thing_each():
    several = {name for name, variant in VARIANTS.items() if variant.share or "-all" in name or "-rows-" in name}
    for name in VARIANTS.keys() - several:
        before = {"halve": "stages-3", "direct-random-1": "direct-random"}.get(name, "apex")
        start = vars(VARIANTS[before].config(**GIVEN))
        own = vars(VARIANTS[name].config(**GIVEN))
        assert sum(own[field] != value for field, value in start.items()) <= 1, name


def test_what_a_run_is_given_is_all_of_its_variant_and_survives_a_file():
    for name, variant in VARIANTS.items():
        named, *own = json.loads(json.dumps(settings_of(name))).items()
        assert named == ("name", name)
        assert Variant(**dict(own)) == replace(variant, rate_of=None)  # which chooses rates, and is no part of a run


def test_a_variant_has_its_rates_in_units_of_its_own(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "twice", replace(VARIANTS["full"], rate=2.0))
    half = settings | {"learning_rate": settings["learning_rate"] / 2}
    one = instruction_run(folder=tmp_path / "one", variant=settings_of("full"), chat=CHAT, **settings)
    two = instruction_run(folder=tmp_path / "two", variant=settings_of("twice"), chat=CHAT, **half)
    assert one["update_norm"] > 0
    assert {name: one[name] for name in ("update_norm", "valid_loss", "retention_loss")}.items() <= two.items()


def test_what_is_compared_trains_as_much():
    layers = 160 * 160 * 4 * 6 + 3 * 160 * 512 * 6
    total = layers + 4096 * 160 + 13 * 160  # embeddings; norms, which none of these trains
    for name in ("full", "restart", "gmt"):
        assert share_of(name) == pytest.approx(layers / total)
    for name in ("hft", "direct"):
        assert share_of(name) == pytest.approx(layers / total / 2)
    assert share_of("direct") < share_of("apex") < 1.02 * share_of("direct")  # operators come on top
    lora = share_of("lora-2.4%")
    assert lora == pytest.approx(0.024, rel=0.2)  # in steps of a rank
    assert lora < share_of("dora-2.4%") < 1.25 * lora  # of the same rank, with a norm for each row
    for name in ("apex-2.4%", "direct-2.4%", "operator-2.4%"):
        assert share_of(name) == pytest.approx(lora, rel=0.05)
    assert share_of("direct-rows-75%") == pytest.approx(0.75 * layers / total)
    assert share_of("direct-rows-75%") < share_of("apex-rows-75%") < 1.02 * share_of("direct-rows-75%")
    assert share_of("restart") < share_of("apex-rows-100%") < 1.02 * share_of("restart")
    assert share_of("apex-25%") == pytest.approx(share_of("lora-25%"), rel=0.05)
    assert share_of("full-all") == 1


def test_a_rank_that_rows_of_units_cannot_match_is_passed_over():
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    coarse = LlamaConfig(vocab_size=4096, tie_word_embeddings=True, **sizes)  # a pair of heads: 0.7 % of all
    with pytest.raises(ValueError, match="need one within 5 %"):
        config_for_share(coarse, trained_share(coarse, method_of("lora", ApexConfig(), lora_rank=3)))
    assert lora_rank_for_share(coarse, 0.024) == 3
    assert VARIANTS["lora-2.4%"].method_options(coarse)["lora_rank"] == 2
    found = {name: share_of(name, coarse) for name in ("lora-2.4%", "apex-2.4%", "direct-2.4%", "operator-2.4%")}
    assert found == pytest.approx(dict.fromkeys(found, found["lora-2.4%"]), rel=0.06)


RUNS = pd.DataFrame(
    [
        ("full", rate, seed, rate == 2e-4, 100 * rate, 2.0 + 1000 * rate)
        for rate in (1e-4, 2e-4, 4e-4)
        for seed in range(3)
    ],
    columns=["method", "learning_rate", "seed", "chosen", "update_norm", "retention_loss"],
)


def gate(runs=RUNS, chosen=2e-4, base_rate=2e-3, unigram=4.0):
    rates = runs[["method", "learning_rate"]].drop_duplicates().assign(loss=1.0)
    rates["chosen"] = rates["learning_rate"] == chosen
    runs = runs.assign(chosen=runs["learning_rate"] == chosen)
    table = gate_table(Comparison(runs, {}, rates), base_rate=base_rate, full="full", unigram=unigram)
    return set(table.loc[~table["holds"], "condition"])


def test_the_gate_lets_fine_tuning_through_and_nothing_else():
    assert gate() == set()
    for base_rate in (5e-4, 2e-2):
        assert gate(base_rate=base_rate) == {"rate, in units of the base's"}
        adapters = RUNS.assign(method="lora")  # of which that is not asked
        assert "rate, in units of the base's" not in gate(adapters, base_rate=base_rate)
    assert gate(RUNS[RUNS["seed"] < 2]) == {"seeds that choose"}
    assert gate(RUNS[(RUNS["seed"] < 2) | RUNS["chosen"]]) == {"seeds that choose"}  # a third came after the choice
    assert gate(RUNS.assign(update_norm=0.11)) == {"update of full, in units of the weights"}
    assert gate(unigram=2.6) == {"loss of full on the base's text below unigram, nats"}
    for rate in (1e-4, 4e-4):
        assert gate(chosen=rate) == {"place of the rate in the grid"}


def test_curves_start_at_the_base_and_forgetting_is_known_at_both_ends():
    runs = pd.DataFrame({"method": ["a", "b"], "learning_rate": 0.1, "chosen": True, "seed": 0, "path": ["a", "b"]})
    points = {"a": [(0, 4.0, 1.0), (8, 3.0, None), (16, 2.0, None)], "b": [(0, 4.0, 1.0), (16, 1.0, None)]}
    results = {
        path: {"curve": [dict(zip(("tokens", "loss", "retention_loss"), point, strict=True)) for point in curve]}
        for path, curve in points.items()
    }
    table = curves_table(Comparison(runs.assign(retention_loss=[1.5, 1.75]), results, pd.DataFrame()))
    assert table["method"].tolist() == ["base", "a", "a", "a", "b", "b"]
    assert table["retention_loss"].fillna(0).tolist() == [1.0, 1.0, 0, 1.5, 1.0, 1.75]
    assert table.loc[0, ["learning_rate", "tokens", "loss", "chosen"]].tolist() == [0.0, 0, 4.0, False]


def test_an_unknown_variant_and_seeds_without_a_base_are_named():
    with pytest.raises(ValueError, match=r"unknown variant 'apx'; known: apex, full"):
        grid_trials(["apx"], [1e-3], [0], {0: "base"})
    with pytest.raises(ValueError, match=r"seeds \[1, 2\] of the grid: need a base for each, got those of seeds \[0\]"):
        grid_trials(["apex"], [1e-3], [0, 1, 2], {0: Path("a")})


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


@pytest.mark.parametrize("variant", ["full-all", "apex", "lora", "no-operator"])
def test_an_instruction_run_measures_the_model_it_leaves(variant, settings, base, tmp_path):
    result = instruction_run(folder=tmp_path, variant=settings_of(variant), chat=CHAT, **settings)
    last = sorted(tmp_path.glob("stage-*"))[-1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(last), AutoTokenizer.from_pretrained(base)
    result |= answers_run(folder=tmp_path, model=str(last), chat=CHAT, **settings)
    for split, name in (("valid", "valid_loss"), ("test", "answer_loss")):
        tokens, _ = encode_chat(skills(split, CHAT[split], difficulties=[1]), tokenizer, max_length=64)
        loss = perplexity(model, batches(tokens, 7, collator=collate(tokenizer.pad_token_id)), quiet=True)["loss"]
        assert result[name] == pytest.approx(loss, rel=1e-5)
    shares = [share for share, _ in result["families"].values()]
    assert result["exact_match"] == pytest.approx(np.mean(shares))
    assert sum(result["correct"]) == pytest.approx(sum(share * count for share, count in result["families"].values()))
    assert len(result["correct"]) == 28
    assert result["seconds_per_step"] > 0
    assert (result["trainable"] == 1) == (variant == "full-all")
    assert result["update_norm"] > 0
    assert ("by_operator" in result) == (variant == "apex")
    assert result.get("by_operator", 0.5) > 0
    start = untouched_run(folder=tmp_path, base=settings["base"], chat=CHAT, retention=settings["retention"])
    assert result["answer_loss"] < start["answer_loss"]
    assert start.keys() | {"trainable", "seconds_per_step", "peak_memory_mb", "by_operator"} >= result.keys()


@pytest.mark.parametrize("variant", ["full", "hft", "gmt", "lora", "apex"])
def test_conversations_in_one_row_train_as_padded_ones_do(variant, settings, tmp_path, monkeypatch):
    seen = []

    def joined(items):
        seen.append(len(items))
        return in_one_row(items)

    monkeypatch.setattr(runs, "in_one_row", joined)
    found = []
    for longest in (1024, 0):
        monkeypatch.setattr(runs, "_SHORT", longest)
        found.append(
            instruction_run(folder=tmp_path / str(longest), variant=settings_of(variant), chat=CHAT, **settings)
        )
        assert seen[-4:] == [4] * 4
        assert set(seen[:-4]) <= {2, 4}
    measured = [name for name in found[0] if name not in ("seconds_per_step", "peak_memory_mb")]
    assert [found[0][name] for name in measured] == pytest.approx([found[1][name] for name in measured], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "apart", "changes"),
    [
        ("llama", True, {"use_cache": False}),
        ("llama", False, {"use_cache": True}),  # transformers looks for several in a row only where none is continued
        ("bloom", False, {"use_cache": False}),
    ],
)
def test_examples_share_a_row_only_where_the_model_keeps_them_apart(family, apart, changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(smallest(family, **changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    items = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(2, 9), torch.arange(4, 20))]
    assert runs._keeps_apart(model, items, collate(0)) == apart


def test_without_tokens_to_write_only_the_loss_on_answers_is_measured(base, tmp_path):
    chat = CHAT | {"max_new_tokens": 0}
    assert answers_run(folder=tmp_path, model=str(base), base=str(base), chat=chat).keys() == {"answer_loss"}


def test_the_same_run_twice_gives_the_same_numbers(settings, tmp_path):
    first, second = (
        instruction_run(folder=tmp_path / name, variant=settings_of("apex"), chat=CHAT, **settings)
        for name in ("one", "two")
    )
    costs = {"seconds_per_step", "peak_memory_mb"}
    assert {k: v for k, v in first.items() if k not in costs} == {k: v for k, v in second.items() if k not in costs}


@pytest.mark.parametrize("variant", ["full", "apex"])
def test_a_run_out_of_time_goes_on_to_the_numbers_of_one_left_alone(variant, settings, tmp_path, monkeypatch):
    asked, interrupted = {"variant": settings_of(variant), "chat": CHAT, **settings}, 0
    whole = instruction_run(folder=tmp_path / "whole", **asked)
    for seconds in (0.02 * 1.3**attempt for attempt in range(40)):
        monkeypatch.setattr(runs, "time_left", lambda seconds=seconds: seconds)
        try:
            parts = instruction_run(folder=tmp_path / "parts", **asked)
            break
        except Interrupted:
            interrupted += 1
    assert interrupted
    for run in (parts, whole):
        del run["seconds_per_step"], run["peak_memory_mb"]
    assert parts == (pytest.approx(whole, rel=1e-4) if torch.cuda.is_available() else whole)  # a GPU sums in any order


def test_pretraining_out_of_time_goes_on_to_the_same_log(base, tmp_path, monkeypatch):
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "vocab_size": len(AutoTokenizer.from_pretrained(base))}
    asked = {"corpus": str(base / "text.txt"), "skill_documents": 0, "context": 16, "checkpoints": [0, 20], "steps": 20}
    asked |= {"tokenizer": str(base), "config": config, "batch_size": 4, "learning_rate": 1e-3, "seed": 0}
    whole, interrupted = pretraining_run(folder=tmp_path / "whole", **asked), 0
    for seconds in (0.02 * 1.3**attempt for attempt in range(40)):
        monkeypatch.setattr(runs, "time_left", lambda seconds=seconds: seconds)
        try:
            parts = pretraining_run(folder=tmp_path / "parts", **asked)
            break
        except Interrupted:
            interrupted += 1
    assert interrupted
    assert parts == whole
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "step-00020").state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_continued_run_draws_its_curve_from_the_base_on(settings, base, tmp_path):
    text = {"corpus": str(base / "text.txt"), "context": 16, "blocks": 6}
    result = continued_run(folder=tmp_path, variant=settings_of("apex"), evaluations=2, text=text, **settings)
    assert [point["tokens"] for point in result["curve"]] == [0, 2 * 4 * 16, 4 * 4 * 16]
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = pack(load_corpus(base / "text.txt", split="test"), tokenizer, 16)
    for folder, point in ((base, result["curve"][0]), (tmp_path / "stage-1", result["curve"][-1])):
        model = AutoModelForCausalLM.from_pretrained(folder)
        loss = perplexity(model, batches(held_out, 2, limit=6), quiet=True)["loss"]
        assert point["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_run_of_its_own_length_takes_a_share_of_the_steps_under_a_rate_that_falls_to_zero(settings, base, tmp_path):
    text = {"corpus": str(base / "text.txt"), "context": 16, "blocks": 6}
    settings |= {"steps": 24, "retention": settings["retention"]}
    result = continued_run(
        folder=tmp_path / "run", variant=settings_of("apex-all-33%"), evaluations=3, text=text, **settings
    )
    assert [point["tokens"] for point in result["curve"]] == [0, 8 * 4 * 16]
    data = {"train_dataset": text_blocks(load_tokenizer(base), text["corpus"], "train", 16)}
    own = {name: value for name, value in settings.items() if name not in ("base", "retention")} | {"steps": 8}
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stage-1", dtype=torch.float32).state_dict()
    for schedule in ("cosine", "constant_with_warmup"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        by_hand = {"variant": settings_of("apex-all"), "lr_scheduler_type": schedule}
        record, _ = runs._train(model, data, tmp_path / schedule, **own, **by_hand)
        same = [torch.equal(left[name], value) for name, value in record.model.state_dict().items()]
        assert all(same) == (schedule == "cosine")


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
    return {
        "valid_loss": abs(learning_rate - (0.1 if variant["name"] == "full" else 0.2)) + seed,
        "text": "not a number",
    }


def fake_measure(folder, model, variant, learning_rate, seed, base):
    """A measure that a folder of a model can bear."""
    with (folder.parent.parent / "measured").open("a") as calls:
        calls.write(f"{folder.parent.name}\n")
    assert Path(model).name == "stage-0"
    assert Path(model).is_dir()
    return {"score": 10 * seed + learning_rate}


@pytest.fixture
def given_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "default_workers", lambda: 1)
    monkeypatch.chdir(tmp_path)
    return {"bases": dict.fromkeys((0, 1), tmp_path / "b"), "folder": tmp_path, "grid_seeds": [0]}


def test_compare_finishes_the_chosen_rate_and_keeps_its_models_only(tmp_path, given_runs):
    found = compare(fake, ["full", "apex"], learning_rates=[0.1, 0.2], **given_runs)
    runs = found.runs.set_index(["method", "seed", "learning_rate"])["chosen"]
    assert runs[runs].index.tolist() == [("full", 0, 0.1), ("full", 1, 0.1), ("apex", 0, 0.2), ("apex", 1, 0.2)]
    assert len(runs) == 6
    kept = {path.parent.name for path in tmp_path.glob("*/stage-0")}
    assert kept == {"full-lr0.1-seed0", "apex-lr0.2-seed0", "full-lr0.1-seed1", "apex-lr0.2-seed1"}
    assert set(found.results) == set(found.runs["path"])
    assert found.rates.loc[found.rates["chosen"], "loss"].tolist() == [0, 0]

    before = (tmp_path / "calls").read_text()
    assert compare(fake, ["full", "apex"], learning_rates=[0.1, 0.2], **given_runs).runs.equals(found.runs)
    assert (tmp_path / "calls").read_text() == before
    # another grid makes another rate the best one: its model was removed, so that run is made again
    other = compare(fake, ["apex"], learning_rates=[0.1], **given_runs)
    assert (tmp_path / "calls").read_text()[len(before) :].split() == ["apex-lr0.1-seed0", "apex-lr0.1-seed1"]
    assert sorted(other.runs["seed"]) == [0, 1]
    assert other.runs["chosen"].all()


def test_compare_measures_the_chosen_runs_once_and_again_when_they_are_made_again(tmp_path, given_runs):
    asked = {"learning_rates": [0.1, 0.2], "measure": fake_measure, **given_runs}
    runs = compare(fake, ["full", "apex"], **asked).runs
    assert runs["score"].notna().equals(runs["chosen"])
    chosen = runs[runs["chosen"]]
    assert chosen["score"].tolist() == pytest.approx((10 * chosen["seed"] + chosen["learning_rate"]).tolist())
    measured = (tmp_path / "measured").read_text().split()
    assert measured == ["full-lr0.1-seed0", "full-lr0.1-seed1", "apex-lr0.2-seed0", "apex-lr0.2-seed1"]
    assert compare(fake, ["full", "apex"], **asked).runs.equals(runs)
    assert (tmp_path / "measured").read_text().split() == measured
    shutil.rmtree(tmp_path / "full-lr0.1-seed1")
    assert compare(fake, ["full", "apex"], **asked).runs.equals(runs)
    assert (tmp_path / "measured").read_text().split() == [*measured, "full-lr0.1-seed1"]


def halting(folder, variant, learning_rate, seed, base):
    """A run that leaves when the time is over, for the first time."""
    if seed == 1 and not (folder / "state").exists():
        (folder / "state").touch()
        raise Interrupted(TIME_IS_OVER, "after step 1")
    return fake(folder, variant, learning_rate, seed, base)


def test_a_run_of_another_seed_that_ran_out_of_time_goes_on(tmp_path, given_runs):
    with pytest.raises(trials.OutOfTimeError, match=r"1 of 2 trials are left: full-lr0\.1-seed1"):
        compare(halting, ["full"], learning_rates=[0.1], **given_runs)
    compare(halting, ["full"], learning_rates=[0.1], **given_runs)
    assert (tmp_path / "full-lr0.1-seed1" / "state").exists()


def test_a_variant_that_has_the_rate_of_another_needs_no_grid(given_runs):
    asked = {"learning_rates": [0.1, 0.2], **given_runs}
    found = compare(fake, ["restart", "full"], **asked)
    assert set(found.rates["method"]) == {"full"}
    runs = found.runs[found.runs["method"] == "restart"]
    assert runs[["seed", "learning_rate", "chosen"]].to_numpy().tolist() == [[0, 0.1, True], [1, 0.1, True]]
    alone = compare(fake, ["restart"], **asked)  # without the other it chooses for itself
    assert alone.rates["learning_rate"].tolist() == [0.1, 0.2]


def test_a_run_of_a_length_of_its_own_has_a_rate_of_its_own(given_runs):
    found = compare(fake, ["full-all", "restart-all-33%", "full-all-100%"], learning_rates=[0.1, 0.2], **given_runs)
    assert found.rates.groupby("method").size().to_dict() == {"full-all": 2, "restart-all-33%": 2, "full-all-100%": 2}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, in whose folder of notebooks we are."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def test_a_trial_reads_its_base_from_the_root_wherever_it_is_made(project):
    (project / "models" / "base").mkdir(parents=True)
    (trial,) = grid_trials(["full"], [1e-3], [0], {0: "models/base"})
    assert [path.is_dir() for path in trial.reads] == [True]


def test_a_trial_reads_the_files_that_its_settings_name(project):
    names = ["a.txt", "b.txt", "chat.jsonl"]
    for name in names:
        (project / name).touch()
    settings = {"text": {"corpus": "[ab].txt"}, "chat": {"source": "chat.jsonl"}, "retention": {"corpus": "stdlib"}}
    assert data_files(settings) == tuple(project / name for name in names)
    (trial,) = grid_trials(["full"], [1e-3], [0], {0: "base"}, **settings)
    assert trial.reads[1:] == data_files(settings)


def test_what_is_located_is_named_by_its_path_from_the_root(project):
    (project / "models").mkdir()
    (project / "text-a.txt").touch()
    assert locate("models") == str(project / "models")
    assert locate("text-*.txt") == str(project / "text-*.txt")
    assert [locate(name) for name in ("gpt2", "owner/name", "stdlib")] == ["gpt2", "owner/name", "stdlib"]
    assert relative(locate("models")) == "models"
    assert relative(project.parent / "elsewhere") == str(project.parent / "elsewhere")


@pytest.fixture
def results(tmp_path):
    """Models of two sizes, the larger one trained for fewer steps, on two seeds and on one."""
    rows = [("small", seed, step, 1) for seed in (0, 1) for step in (0, 10)] + [("large", 0, 5, 2)]
    table = pd.DataFrame(rows, columns=["model", "seed", "step", "parameters"])
    table["path"] = table["model"] + table["seed"].astype(str) + "-" + table["step"].astype(str)
    table.assign(loss=2.0, tokens=table["step"]).to_csv(tmp_path / "models.csv", index=False)
    return tmp_path


def test_a_base_is_the_last_checkpoint_of_its_own_size(results):
    assert base_models(results, "small", [1, 0]) == {1: "small1-10", 0: "small0-10"}
    assert base_models(results, "large", [0]) == {0: "large0-5"}
    assert base_models(results / "none", "data/models/other", [0, 2]) == dict.fromkeys((0, 2), "data/models/other")
    for model, seeds in (("large", [0, 1]), ("huge", [1])):
        with pytest.raises(ValueError, match=rf"model '{model}': no base model for seeds \[1\]; .*'small': \[0, 1\]"):
            base_models(results, model, seeds)


def test_units_are_masked_in_a_given_model_part_by_part_or_in_the_largest_seed_by_seed(results):
    trained = models_table(results)
    given = masked_models(trained, "owner/name", 3)
    assert given[["model", "seed", "part", "parts"]].to_numpy().tolist() == [["name", n, n, 3] for n in range(3)]
    assert set(given["path"]) == {"owner/name"}
    largest = masked_models(trained, None, 3)
    assert largest[["path", "part", "parts"]].to_numpy().tolist() == [["large0-5", 0, 1]]


def test_a_base_that_does_not_beat_the_strongest_reference_is_refused(results):
    models = models_table(results)
    check_bases(models, {})
    check_bases(models, {"unigram": 4.0, "trigram": 2.1})
    models.loc[models["step"] == 0, "loss"] = 9.0  # before training nothing is asked of it
    check_bases(models, {"unigram": 4.0})
    with pytest.raises(ValueError, match=r"held-out loss not below that of token triples, 2\.000:(.|\n)*large"):
        check_bases(models, {"unigram": 4.0, "trigram": 2.0})


def test_references_are_ordered_by_what_they_know(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, held_out = (pack(load_corpus(base / "text.txt", split=split), tokenizer, 16) for split in ("train", "test"))
    found = reference_losses(["trigram", "unigram", "bigram"], train, held_out.blocks, len(tokenizer))
    assert list(found) == ["trigram", "unigram", "bigram"]
    assert found["trigram"] < found["bigram"] < found["unigram"] < math.log(len(tokenizer))
    counts = np.bincount(train.blocks[:4096].ravel(), minlength=len(tokenizer)) + 1
    assert found["unigram"] == pytest.approx(-np.log(counts / counts.sum())[held_out.blocks].mean())
    with pytest.raises(ValueError, match=r"unknown reference 'fourgram'; known: unigram, bigram, trigram"):
        reference_losses(["fourgram"], train, held_out.blocks, len(tokenizer))


def test_models_are_measured_where_they_lie(base, project):
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = batches(pack(load_corpus(base / "text.txt", split="test"), tokenizer, 16), 4)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(project / "models" / "one")
    row = {"model": "one", "seed": 3, "step": 2, "tokens": 7, "path": "models/one"}
    (found,) = measured_models([row], held_out).to_dict("records")
    assert {name: found[name] for name in row} == row
    assert found["parameters"] == model.num_parameters()
    assert found["loss"] == pytest.approx(perplexity(model, held_out)["loss"])


def test_untouched_models_stand_beside_the_tuned_ones(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "default_workers", lambda: 1)
    asked = {"chat": CHAT, "retention": settings["retention"]}
    tuning = Comparison(pd.DataFrame({"method": ["apex"], "chosen": True, "path": "run"}), {"run": {}}, pd.DataFrame())
    found = beside_untouched(tuning, {3: settings["base"]}, tmp_path, **asked)
    base, tuned = found.runs.to_dict("records")
    assert (base["method"], base["seed"], base["learning_rate"], base["chosen"]) == ("base", 3, 0, True)
    assert (base["path"], tuned["path"]) == (relative(settings["base"]), "run")
    assert found.results[base["path"]] == untouched_run(folder=tmp_path, base=settings["base"], **asked)


def test_the_arguments_of_a_run_come_from_the_parameters_of_a_notebook():
    chat = {"source": "skills", "train_examples": 1, "valid_examples": 2, "test_examples": 3, "difficulties": [1]}
    chat |= {"max_length": 4, "max_new_tokens": 5}
    text = {"retention_corpus": "stdlib", "retention_context": 6, "retention_blocks": 7}
    steps = {"steps": 8, "batch_size": 9, "stages": 10, "assessment_samples": 11}
    found = instruction_setting({**chat, **text, **steps, "profile": "cpu", "pd": pd})
    assert {name: found[name] for name in steps} == steps
    assert found["retention"] == {"corpus": "stdlib", "context": 6, "blocks": 7}
    assert set(found["chat"]) == set(CHAT)
    assert [found["chat"][split] for split in ("train", "valid", "test")] == [1, 2, 3]


def test_steps_from_full_fine_tuning_to_apex_add_up_and_say_on_what(tmp_path):
    generator = np.random.default_rng(0)
    methods = ["full", "direct-random-1", "direct-random", "direct", "apex", "lora"]
    runs = pd.DataFrame({"method": np.repeat(methods, 3), "seed": [0, 1, 2] * 6, "chosen": True, "loss": 0.0})
    runs["loss"] = generator.normal(size=len(runs))
    tried = runs.assign(chosen=False, loss=np.nan)  # other rates of the grid, which count for nothing
    facts = {"model": "data/models/tiny", "chat": {"train": 1600}, "steps": 400, "batch_size": 8}
    save_table(pd.concat([tried, runs]), "instruction", tmp_path, **facts)
    gate = pd.DataFrame({"method": ["all", "apex", "lora"], "holds": [True, False, False]})
    save_table(gate, "instruction_gate", tmp_path)
    assert decomposition(tmp_path, {"loss": ""})["setting"].unique().tolist() == ["tiny, 1,600 × 2, outside the gate"]
    save_table(gate.assign(holds=[True, True, False]), "instruction_gate", tmp_path)
    found = decomposition(tmp_path, {"loss": "a title"})
    assert found["setting"].unique().tolist() == ["tiny, 1,600 × 2"]
    assert found["panel"].unique().tolist() == ["a title"]
    *steps, total = found["mean"]
    by_method = runs.groupby("method")["loss"].mean()
    assert sum(steps) == pytest.approx(total) == pytest.approx(by_method["apex"] - by_method["full"])
    assert found["n"].tolist() == [3] * 5
    save_table(runs[runs["method"] == "full"], "instruction", tmp_path, **facts)
    assert decomposition(tmp_path, {"loss": "a title"}).empty
    with pytest.raises(NotReadyError, match="run notebook 03 first"):
        decomposition(tmp_path / "nowhere", {"loss": "a title"})


def test_a_ratio_is_of_the_tokens_that_full_training_took():
    curves = [("full", 0, 0, 4.0), ("full", 0, 20, 2.0), ("apex", 0, 0, 4.0), ("apex", 0, 20, 0.0)]
    curves += [("full", 1, 0, 4.0), ("full", 1, 20, 2.0), ("apex", 1, 0, 4.0), ("apex", 1, 20, 3.0)]
    table = pd.DataFrame(curves, columns=["method", "seed", "tokens", "loss"])
    found = token_ratios(table, ["full", "apex"], [0, 1], goal="full")
    assert found["ratio"].tolist() == [1.0, 1.0, 0.5, math.inf]


def test_differences_are_within_a_seed_and_steps_add_up():
    table = pd.DataFrame({"method": ["apex", "dense", "full"] * 2, "seed": [0] * 3 + [1] * 3})
    table["loss"] = [1.0, 1.5, 2.5, 10.0, 9.0, 7.0]
    pairs = {"a": ("apex", "dense"), "b": ("dense", "full"), "c": ("apex", "full"), "d": ("apex", "lora")}
    found = paired_differences(table, pairs, "loss").pivot(index="seed", columns="method", values="above")
    assert found["a"].tolist() == [0.5, -1.0]
    assert (found["a"] + found["b"]).tolist() == found["c"].tolist() == [1.5, -3.0]
    assert "d" not in found
    assert paired_differences(table, {}, "loss").empty


def test_by_share_sets_methods_that_differ_in_what_trains_beside_full_fine_tuning():
    trains = {"base": 0, "full": 0.8, "restart": 0.8, "apex": 0.4, "apex-10%": 0.1, "apex-rows-75%": 0.6}
    trains |= {"direct-10%": 0.1, "direct-random": 0.4, "lora-2.4%": 0.02, "operator-2.4%": 0.02, "apex-all-33%": 1.0}
    runs = pd.DataFrame([(name, seed) for seed in (0, 1) for name in trains], columns=["method", "seed"])
    runs["trainable"], runs["loss"] = runs["method"].map(trains), np.random.default_rng(0).normal(size=len(runs))
    found = by_share(runs, {"loss": "a title"}).set_index(["method", "trainable"])
    of = runs.pivot(index="seed", columns="method", values="loss")
    expected = {("apex", 0.4): "apex", ("apex", 0.1): "apex-10%", ("apex", 0.6): "apex-rows-75%"}
    expected |= {("direct", 0.1): "direct-10%", ("direct", 0.8): "restart", ("lora", 0.02): "lora-2.4%"}
    means = {key: (of[name] - of["full"]).mean() for key, name in expected.items()}
    assert found["mean"].to_dict() == pytest.approx(means)
    assert set(found["panel"]) == {"a title"}
    assert by_share(runs[runs["method"] != "full"], {"loss": "a title"}).empty


def test_a_choice_at_the_end_of_the_grid_is_marked():
    rates = pd.DataFrame({"method": ["full"] * 3 + ["apex"] * 3, "learning_rate": [0.1, 0.2, 0.3] * 2, "loss": 1.0})
    table = rates_table(rates.assign(chosen=[True, False, False, False, True, False]))
    assert table.index.tolist() == ["full", "apex"]
    assert table["chosen"].tolist() == [0.1, 0.2]
    assert table["at_the_end"].tolist() == [True, False]


@pytest.fixture
def files(project):
    """Text and conversations of three tasks in a project, each as a file to train on and one that is held out."""
    whole = list(dict.fromkeys(skills_text(400)))[:200]
    for name, some in (("train", whole[:160]), ("valid", whole[160:])):
        (project / f"text-{name}.txt").write_text("\n<|endoftext|>\n".join(some), encoding="utf-8")
    for name, span in (("train", range(60)), ("test-all", range(1000, 1012))):
        rows = []
        for n in span:
            sums = {"task": "svamp", "answer": str(n + 1)}, f"{n} + 1", f"{n} + 1 = {n + 1}\n#### {n + 1}"
            letter = {"task": "arc_easy", "answer": "AB"[n % 2], "choices": ["even", "odd"]}
            choice = letter, f"{n}\nA. even\nB. odd", f"{'AB'[n % 2]}. {['even', 'odd'][n % 2]}"
            written = {"task": "gsm8k", "answer": str(n)}, f"what is {n}?", f"it is\n#### {n}"
            for own, asked, told in (sums, choice, written):
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
                rows.append(json.dumps({"messages": turns, **own}))
        (project / f"chat-{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return project, whole


def test_text_may_come_from_a_pattern_of_files(files, base):
    project, names = files
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = {split: documents("text-*.txt", split) for split in ("train", "valid", "test")}
    assert set(found["test"]) == set(names[160:])
    assert {text for part in found.values() for text in part} == set(names)
    for split, texts in found.items():
        expected = pack(texts, tokenizer, 16).blocks
        np.testing.assert_array_equal(text_blocks(tokenizer, "text-*.txt", split, 16).blocks, expected)
    assert list((project / "data" / "cache").rglob("*"))  # tokenised once


def test_conversations_may_come_from_a_pattern_of_files_and_are_scored_each_in_its_way(files, base, tmp_path):
    chat = {**CHAT, "source": "chat-*.jsonl", "train": None, "valid": None, "test": None, "max_length": 128}
    asked = examples(chat, "test")
    assert len(asked) == 3 * 12
    assert {row["family"] for row in asked if "answer" in row} == {"arithmetic", "arc_easy"}  # gsm8k: its loss only
    assert all(row["answer"] == row["messages"][-1]["content"] for row in asked if "choices" in row)
    train, valid = ({row["messages"][0]["content"] for row in examples(chat, split)} for split in ("train", "valid"))
    assert not train & valid
    assert len(train | valid) == 3 * 60
    retention = {"corpus": "text-*.txt", "context": 16, "blocks": 4}
    result = untouched_run(folder=tmp_path, base=str(base), chat=chat, retention=retention)
    assert len(result["correct"]) == 2 * 12
    assert set(result["families"]) == {"arithmetic", "arc_easy"}
    assert len(conversations(AutoTokenizer.from_pretrained(base), {**chat, "train": 5}, "train")) == 5


def test_a_curve_is_compared_with_the_goal_of_its_own_seed():
    rows = [(m, seed, t, loss + seed) for m, loss in (("full", 3.0), ("apex", 2.5)) for seed in (0, 1) for t in (0, 8)]
    curves = pd.DataFrame(rows, columns=["method", "seed", "tokens", "loss"])
    above = above_goal(curves.iloc[::-1], "full")
    assert above.groupby("method")["loss"].agg(["min", "max"]).T.to_dict("list") == {
        "apex": [-0.5, -0.5],
        "full": [0, 0],
    }
    assert above[["method", "seed", "tokens"]].equals(curves.iloc[::-1][["method", "seed", "tokens"]])
