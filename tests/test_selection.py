"""Laws of selection; the oracle sorts a list of tuples, the reference for chance enumerates every set."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apexlib.analysis.budget import equal_statistics
from apexlib.analysis.difference import selection_stability
from apexlib.operators import OPERATORS, operator_class
from apexlib.plan import ApexConfig, ExpansionPlan, LayerPlan
from apexlib.selection import select, unit_counts

STRATEGIES = ["advantage", "random", "reversed", "magnitude", "gradient"]
UNIT_NORMS = {"magnitude": "weight_norm", "gradient": "gradient_norm"}
laws = settings(max_examples=25, deadline=None)


def statistics_table(heads=8, channels=40, layers=2, seed=0, ties=False) -> pd.DataFrame:
    """Statistics as they are gathered, every column a strategy may ask for; with `ties`, few distinct values."""
    rng = np.random.default_rng(seed)
    sizes = [
        (layer, component, n) for layer in range(layers) for component, n in (("head", heads), ("channel", channels))
    ]
    table = pd.concat(
        [pd.DataFrame({"layer": layer, "component": component, "unit": range(n)}) for layer, component, n in sizes],
        ignore_index=True,
    )
    rows = len(table)
    table["activation"] = rng.integers(0, 3, rows).astype(float) if ties else rng.lognormal(size=rows)
    table["rank_score"] = rng.integers(-2, 3, rows) if ties else rng.permutation(rows)
    for column in ("ema", "ema_rank", "weight_norm", "gradient_norm"):
        table[column] = rng.integers(0, 4, rows).astype(float) if ties else rng.normal(size=rows)
    return table.assign(tokens=1000, batches=10)


@st.composite
def settings_of_a_run(draw) -> ApexConfig:
    percent = draw(st.integers(1, 50))
    shares = [draw(st.integers(2 * percent, 100)) / 100 for _ in range(2)]
    strategy = draw(st.sampled_from(STRATEGIES))
    statistic = draw(st.sampled_from(["rank", "mean", "ema", "ema_rank"]))
    return ApexConfig(percent / 100, *shares, strategy=strategy, statistic=statistic)


@st.composite
def tables(draw) -> pd.DataFrame:
    sizes = {"heads": draw(st.integers(1, 12)), "channels": draw(st.integers(2, 60))}
    return statistics_table(
        **sizes, layers=draw(st.integers(1, 3)), seed=draw(st.integers(0, 999)), ties=draw(st.booleans())
    )


SCORES = {"rank": "rank_score", "mean": "activation", "ema": "ema", "ema_rank": "ema_rank"}


@given(tables(), settings_of_a_run())
@laws
def test_a_plan_is_the_sorted_list_cut_in_pieces(table, config):
    assume(config.strategy != "random")
    score = UNIT_NORMS.get(config.strategy, SCORES[config.statistic])
    plans = {(plan.layer, plan.component): plan for plan in select(table, config).layers}
    for key, rows in table.groupby(["layer", "component"]):
        n = len(rows)
        if n < 2:
            assert key not in plans
            continue
        plan = plans.pop(key)
        order = [u for *_, u in sorted(zip(rows[score], rows["activation"], rows["unit"], strict=True))]
        k = max(1, round(config.fraction * 100) * n // 100)
        share = config.direct_heads if plan.component == "head" else config.direct_channels
        total = max(2 * k, round(share * 100) * n // 100)
        low, direct, high = order[:k], order[k : total - k], order[n - k :]
        source, target = (low, high) if config.strategy == "reversed" else (high, low)
        assert (plan.source, plan.target) == (tuple(sorted(source)), tuple(sorted(target)))
        assert plan.direct == tuple(sorted(direct))
        assert plan.units == n
    assert not plans


@given(tables(), settings_of_a_run(), st.integers(0, 3))
@laws
def test_roles_are_disjoint_and_of_the_announced_size(table, config, stage):
    for plan in select(table, config, stage=stage).layers:
        taken = [*plan.source, *plan.target, *plan.direct]
        assert len(taken) == len(set(taken))
        assert set(taken) <= set(range(plan.units))
        counts = unit_counts(plan.units, plan.component, config, stage=stage)
        assert (len(plan.source), len(plan.direct)) == counts
        assert len(plan.source) == len(plan.target) >= 1


@given(tables(), settings_of_a_run(), st.randoms(use_true_random=False))
@laws
def test_the_order_of_rows_does_not_matter(table, config, random):
    rows = list(range(len(table)))
    random.shuffle(rows)
    shuffled = table.iloc[rows]
    assert select(shuffled, config) == select(table, config)
    assert select(shuffled.astype({"component": "category", "rank_score": "Int64"}), config) == select(table, config)


@given(st.integers(0, 99), settings_of_a_run())
@laws
def test_only_the_order_of_scores_matters(seed, config):
    table = statistics_table(seed=seed)
    columns = ["activation", "ema", "ema_rank", "weight_norm"]
    stretched = table.assign(**{c: np.exp(table[c]) - 7 for c in columns}, rank_score=3 * table["rank_score"] - 1)
    assert select(stretched, config) == select(table, config)


@given(st.integers(0, 99), settings_of_a_run(), st.permutations(range(20)))
@laws
def test_renaming_units_renames_the_plan(seed, config, names):
    assume(config.strategy != "random")
    table = statistics_table(heads=20, channels=20, seed=seed)
    renamed = select(table.assign(unit=[names[u] for u in table["unit"]]), config).layers
    for before, after in zip(select(table, config).layers, renamed, strict=True):
        for role in ("source", "target", "direct"):
            assert getattr(after, role) == tuple(sorted(names[u] for u in getattr(before, role)))


def test_ties_are_broken_by_activation_then_by_unit():
    table = pd.DataFrame({"layer": 0, "component": "channel", "unit": range(8), "rank_score": 0})
    config = ApexConfig(fraction=0.25, direct_channels=0.625)
    (plan,) = select(table.assign(activation=[3.0, 1, 4, 1, 5, 9, 2, 6]), config).layers
    assert (plan.source, plan.target, plan.direct) == ((5, 7), (1, 3), (6,))
    (plan,) = select(table.assign(activation=1.0), config).layers
    assert (plan.source, plan.target, plan.direct) == ((6, 7), (0, 1), (2,))


def test_reversed_trains_the_same_units():
    table = statistics_table()
    for forth, back in zip(select(table).layers, select(table, ApexConfig(strategy="reversed")).layers, strict=True):
        assert (forth.source, forth.target, forth.direct) == (back.target, back.source, back.direct)


def test_random_selection_depends_on_seed_stage_layer_and_component_only():
    config = ApexConfig(strategy="random", direct_heads=0.465)
    table, other = (statistics_table(heads=40, seed=seed) for seed in (0, 1))
    plan = select(table, config)
    assert select(other, config) == plan
    assert select(table, config, seed=0) == select(table, config, stage=0) == plan
    assert len({layer.source for layer in plan.layers}) == len(plan.layers)
    assert select(table, config, seed=1).layers != plan.layers
    assert select(table, config, stage=1).layers != plan.layers
    assert select(table, replace(config, seed=1)).layers == select(table, config, seed=1).layers
    drawn = [u for seed in range(80) for layer in select(table, config, seed=seed).layers for u in layer.source]
    expected = len(drawn) / 40
    assert np.abs(np.bincount(drawn, minlength=40) - expected).max() < 5 * expected**0.5


def test_a_plan_depends_on_no_thread_count_and_no_hash_seed(tmp_path):
    table = statistics_table(seed=5, ties=True)
    table.to_csv(tmp_path / "statistics.csv", index=False)
    code = "import pandas, apexlib.selection as s; print(s.select(pandas.read_csv('statistics.csv')))"
    environment = os.environ | {"OMP_NUM_THREADS": "4", "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(select(table))


def test_a_plan_is_made_and_read_without_torch(tmp_path):
    statistics_table().to_csv(tmp_path / "statistics.csv", index=False)
    code = """
import sys, pandas
from apexlib import ExpansionPlan, select
plan = select(pandas.read_csv("statistics.csv"))
plan.to_json("plan.json")
print(ExpansionPlan.from_json("plan.json") == plan, "torch" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "True False\n"


@given(st.integers(1, 3), st.integers(2, 40), st.integers(1, 50), st.integers(0, 99))
@laws
def test_halving_keeps_earlier_targets_tuned_and_never_takes_them_again(layers, channels, percent, seed):
    config = ApexConfig(percent / 100, 1.0, max(0.465, percent / 50), halve_fraction=True)
    plans = []
    for stage in range(4):
        table = statistics_table(heads=4, channels=channels, layers=layers, seed=seed + stage)
        plans.append(select(table, config, stage=stage, previous=plans))
    for column in zip(*(plan.layers for plan in plans), strict=True):
        spent = set()
        for stage, layer in enumerate(column):
            assert spent <= set(layer.direct)
            assert not spent & {*layer.source, *layer.target}
            k = max(1, math.floor(config.fraction / 2**stage * layer.units + 1e-9))
            assert len(layer.source) == min(k, (layer.units - len(spent)) // 2)
            share = config.direct_heads if layer.component == "head" else config.direct_channels
            total = len(layer.source) + len(layer.target) + len(layer.direct)
            assert total == max(math.floor(share * layer.units + 1e-9), len(spent) + 2 * len(layer.source))
            spent |= set(layer.target)
    with pytest.raises(ValueError, match="stage 1 needs the plans of the 1 before it, got 0"):
        select(table, config, stage=1)
    with pytest.raises(ValueError, match=f"has {channels + 1} units, a plan there was made for {channels}"):
        select(statistics_table(4, channels + 1, layers), config, stage=1, previous=plans[:1])


def test_the_first_stage_has_the_whole_fraction():
    config = ApexConfig(fraction=0.25, direct_channels=0.6, halve_fraction=True)
    assert unit_counts(64, "channel", config)[0] == unit_counts(64, "channel", config, stage=0)[0] == 16
    assert unit_counts(64, "channel", config, stage=1)[0] == 8


def test_without_halving_earlier_plans_do_not_matter():
    table = statistics_table()
    assert select(table, stage=1, previous=[select(table)]).layers == select(table).layers


def test_single_units_are_left_out():
    plan = select(statistics_table(heads=1))
    assert {layer.component for layer in plan.layers} == {"channel"}
    with pytest.raises(ValueError, match="no layer has two heads or two channels"):
        select(statistics_table(heads=1, channels=1))


def test_alignment_rounds_channels_down():
    config = ApexConfig()
    assert unit_counts(1408, "channel", config) == (256, 640 - 2 * 256)  # 264 and 654 without
    assert unit_counts(32, "head", config) == (6, 6)
    assert unit_counts(1408, "channel", ApexConfig(align=1)) == (264, 654 - 2 * 264)
    assert unit_counts(1024, "channel", config) == (192, 464 - 2 * 192)
    assert unit_counts(1023, "channel", config) == (191, 475 - 2 * 191)  # too few channels to round
    assert unit_counts(40, "channel", config) == (7, 4)
    assert unit_counts(1024, "channel", ApexConfig().of_size(0.02)) == (10, 0)  # of few pairs each counts


def test_heads_are_never_rounded():
    config = ApexConfig(fraction=0.1, direct_heads=0.3, direct_channels=0.3)
    assert unit_counts(190, "head", config) == (19, 19)
    assert unit_counts(1920, "channel", config) == (192, 192)
    assert unit_counts(1900, "channel", config) == (176, 208)  # of 190 and 570, multiples of 16


def test_shares_are_taken_as_written():
    assert unit_counts(100, "channel", ApexConfig(fraction=0.29, direct_heads=0.58, direct_channels=0.58)) == (29, 0)
    assert unit_counts(30, "channel", ApexConfig(fraction=1 / 3, direct_heads=1, direct_channels=1)) == (10, 10)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_by_name(strategy, value):
    table = statistics_table()
    config = ApexConfig(strategy=strategy, statistic="mean")
    column = UNIT_NORMS.get(strategy, "activation")
    table.loc[(table["layer"] == 1) & (table["component"] == "channel") & (table["unit"] == 7), column] = value
    with pytest.raises(ValueError, match=f"layer 1, channel 7: {column} is {value}"):
        select(table, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="activation"), "no column 'activation'"),
        (lambda t: t.drop(columns="rank_score"), "no column 'rank_score'"),
        (lambda t: t.iloc[:0], "no rows"),
        (lambda t: t.assign(unit=t["unit"] + 0.5), "column 'unit' must hold integers from 0, got float64"),
        (lambda t: t.assign(layer="0"), "column 'layer' must hold integers"),
        (lambda t: t.assign(layer=-1 - t["layer"]), "column 'layer' must hold integers from 0, got int64"),
        (lambda t: t.assign(layer=[-1, *t["layer"][1:]]), "column 'layer' must hold integers from 0, got int64"),
        (lambda t: t.assign(unit=t["unit"].astype("Int64").mask(t["unit"] == 3)), "column 'unit' must hold integers"),
        (lambda t: t.assign(component="expert"), "unknown component 'expert'"),
        (lambda t: t.assign(component=["expert", *t["component"][1:]]), "unknown component 'expert'"),
        (lambda t: t.assign(component=None), "unknown component None"),
        (lambda t: t.assign(activation=t["activation"].astype(str)), "column 'activation' must hold numbers"),
        (lambda t: t.assign(activation=t["activation"].astype("Float64").mask(t["unit"] == 3)), "activation is <NA>"),
        (lambda t: t.iloc[1:], "layer 0, head: units must be 0 to 6, each once"),
        (lambda t: pd.concat([t, t]), "layer 0, channel: units must be 0 to 79, each once"),
    ],
)
def test_tables_that_are_not_statistics_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        select(change(statistics_table()))


@pytest.mark.parametrize(
    ("settings_", "column"),
    [
        ({"statistic": "ema"}, "ema"),
        ({"statistic": "ema_rank"}, "ema_rank"),
        ({"strategy": "magnitude"}, "weight_norm"),
        ({"strategy": "gradient"}, "gradient_norm"),
    ],
)
def test_a_statistic_that_was_not_gathered_is_named(settings_, column):
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        select(statistics_table().drop(columns=column), ApexConfig(**settings_))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fraction": 0.0}, r"fraction: need a share in \(0, 0.5\].* got 0.0"),
        ({"fraction": 0.51, "direct_heads": 1.0, "direct_channels": 1.0}, "fraction: need a share"),
        ({"fraction": math.nan}, "fraction: need a finite number"),
        ({"fraction": "0.1"}, "fraction: need float, got str"),
        ({"fraction": True}, "fraction: need float, got bool"),
        ({"fraction": 0.25}, r"direct_channels: need a total share from 0.5 .* to 1, got 0.465"),
        ({"direct_heads": 1.1}, "direct_heads: need a total share"),
        ({"stages": 0}, "stages: need at least 1, got 0"),
        ({"stages": 2.0}, "stages: need int, got float"),
        ({"align": 0}, "align: need at least 1"),
        ({"assessment_samples": True}, "assessment_samples: need int, got bool"),
        ({"operator": "none"}, "operator: unknown 'none'; known: monarch"),
        ({"strategy": None}, "strategy: need str, got NoneType"),
        ({"strategy": "best"}, "strategy: unknown 'best'; known: advantage, random, reversed, magnitude, gradient"),
        ({"statistic": "gate"}, "statistic: unknown 'gate'; known: rank, mean, ema, ema_rank"),
        ({"balance_weight": -1}, "balance_weight: need at least 0"),
        ({"train_norms": 1}, "train_norms: need bool, got int"),
        ({"seed": -1}, "seed: need an integer from 0"),
        ({"seed": 2**31}, "seed: need an integer from 0 to 2147483647, got 2147483648"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ApexConfig(**wrong)


def test_the_least_settings_are_allowed():
    least = {"stages": 1, "assessment_samples": 1, "align": 1, "balance_weight": 0, "operator_lr_scale": 0}
    assert vars(ApexConfig(**least)).items() >= least.items()
    assert ApexConfig(seed=2**31 - 1).seed == 2**31 - 1


def test_presets_are_unrounded_and_the_small_one_trains_pairs_only():
    assert unit_counts(1100, "channel", ApexConfig.preset("52%")) == (206, 99)
    small = ApexConfig.preset("2.4%")
    assert unit_counts(2049, "channel", small) == (30, 1)
    assert [small.train_embeddings, small.train_norms, small.train_queries] == [False] * 3


def test_every_known_operator_can_be_configured():
    for kind in OPERATORS:
        assert ApexConfig(operator=kind).operator == kind


def layer_plan(**changes) -> LayerPlan:
    return LayerPlan(
        **({"layer": 3, "component": "head", "source": (4, 6), "target": (0, 5), "direct": (1,), "units": 8} | changes)
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": (0, 4)}, r"layer 3, head: units \[0\] are both source and target"),
        ({"source": (1, 32), "target": (1, 32), "units": 33}, r"units \[1, 32\] are both source and target"),
        ({"direct": (4,)}, r"units \[4\] are both source and direct"),
        ({"direct": (5,)}, r"units \[5\] are both target and direct"),
        ({"source": (4, 4)}, "source: unit 4 is repeated"),
        ({"source": (6, 4)}, "source: unit 4 comes after 6, need ascending order"),
        ({"source": (4, 8)}, "source: unit 8 is out of range, there are 8"),
        ({"source": (-1, 4)}, "source: need an integer from 0 to"),
        ({"source": (True, 4)}, "source: need an integer from 0 to .* got True"),
        ({"source": (4.0, 6)}, "source: need an integer .* got 4.0"),
        ({"source": ("4", "6")}, "source: need an integer .* got '4'"),
        ({"source": "46"}, "source: need a tuple of unit numbers, got str"),
        ({"source": {4: 6}}, "source: need a tuple of unit numbers, got dict"),
        ({"source": (4,)}, "need as many sources as targets, got 1 and 2"),
        ({"source": (), "target": (), "direct": ()}, "selects no unit"),
        ({"component": "expert"}, "component: unknown 'expert'; known: head, channel"),
        ({"component": []}, "component: unknown"),
        ({"layer": -1}, "layer: need an integer"),
        ({"layer": None}, "layer: need an integer"),
        ({"units": 10**30}, "units: need an integer"),
    ],
)
def test_bad_layer_plans_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        layer_plan(**wrong)


def test_plans_hold_plain_integers_in_ascending_order():
    first, second = layer_plan(layer=np.int64(5), source=[np.int64(4), np.int64(6)]), layer_plan(component="channel")
    plan = ExpansionPlan([first, second])
    assert (plan.layers, plan.seed, plan.stage) == ((second, first), 0, 0)
    assert type(first.layer) is type(first.source[0]) is int
    assert ExpansionPlan((second, first)) == plan
    assert hash(plan) == hash(ExpansionPlan((first, second)))
    assert layer_plan(source=(), target=()).direct == (1,)  # tuned directly only
    with pytest.raises(ValueError, match="layer 3, head: planned twice"):
        ExpansionPlan((layer_plan(), layer_plan(units=9)))
    with pytest.raises(ValueError, match="at least one layer"):
        ExpansionPlan(())
    with pytest.raises(ValueError, match="need LayerPlans, got dict"):
        ExpansionPlan(({},))
    with pytest.raises(ValueError, match="config: need an ApexConfig, got dict"):
        ExpansionPlan((first,), config={"seed": 0})


@given(tables(), settings_of_a_run(), st.integers(0, 5))
@laws
def test_plans_and_settings_survive_json(tmp_path_factory, table, config, stage):
    path = tmp_path_factory.mktemp("json") / "ünder score.json"
    plan = select(table, config, stage=stage)
    plan.to_json(path)
    assert ExpansionPlan.from_json(path) == plan
    config.to_json(path)
    assert ApexConfig.from_json(path) == config


LAYER = json.dumps({"layer": 0, "component": "head", "source": [1], "target": [0], "direct": [], "units": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "need an object with the fields of ExpansionPlan, got list"),
        ("null", "got NoneType"),
        ("{}", "no field 'layers'"),
        ('{"layers": []}', "at least one layer"),
        ('{"layers": {}}', "at least one layer"),
        ('{"layers": "ab"}', "at least one layer"),
        ('{"layers": [3]}', "need an object with the fields of LayerPlan, got int"),
        (f'{{"layers": [{LAYER}], "hook": "os.system"}}', "unknown field 'hook' in ExpansionPlan"),
        (json.dumps({"layers": [], **dict.fromkeys("qwertzuiopasdfghjkl")}), "unknown field 'a'"),
        (f'{{"layers": [{LAYER}], "layers": [{LAYER}]}}', "a key is given twice"),
        (f'{{"layers": [{LAYER}], "stage": true}}', "stage: need an integer"),
        (f'{{"layers": [{LAYER}], "seed": 1e3}}', "seed: need an integer"),
        (f'{{"layers": [{LAYER}], "config": []}}', "fields of ApexConfig, got list"),
        (f'{{"layers": [{LAYER}], "config": {{"fraction": NaN}}}}', "fraction: need a finite number"),
        (f'{{"layers": [{LAYER}], "config": {{"fraction": 1{"0" * 400}}}}}', "too large"),
        (f'{{"layers": [{LAYER}], "config": {{"verbose": 1}}}}', "unknown field 'verbose' in ApexConfig"),
        (f'{{"layers": [{LAYER.replace("[1]", "[true]")}]}}', "source: need an integer .* got True"),
        (f'{{"layers": [{LAYER.replace("[1]", "[1.0]")}]}}', "source: need an integer .* got 1.0"),
        (f'{{"layers": [{LAYER.replace("[1]", "[1000000000]")}]}}', "unit 1000000000 is out of range, there are 2"),
        (f'{{"layers": [{LAYER.replace("[1]", "[" + "9" * 4000 + "]")}]}}', "source: need an integer"),
        (f'{{"layers": [{LAYER.replace("[1]", "[" + "9" * 9000 + "]")}]}}', "integer string conversion"),
        (f'{{"layers": [{LAYER.replace("[1]", "[0]")}]}}', r"units \[0\] are both source and target"),
        (f'{{"layers": [{LAYER.replace("units", "size")}]}}', "unknown field 'size' in LayerPlan"),
        ("[" * 100_000, "recursion"),
        ("\xff", "decode"),
    ],
)
def test_hostile_plans_are_refused_by_file_name(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"plan\.json: .*{message}"):
        ExpansionPlan.from_json(path)


def test_settings_from_a_file_are_complete_or_default(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"stages": 3, "balance_weight": 0}')
    assert ApexConfig.from_json(path) == ApexConfig(stages=3)
    path.write_text('{"stage": 3}')
    with pytest.raises(ValueError, match=r"config\.json: unknown field 'stage' in ApexConfig"):
        ApexConfig.from_json(path)
    with pytest.raises(FileNotFoundError):
        ApexConfig.from_json(tmp_path / "absent.json")


@pytest.fixture(scope="module")
def llama_2_7b():
    config = transformers.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(("name", "share", "count"), [("52%", 0.52, 3_490_216_960), ("2.4%", 0.024, 161_421_600)])
def test_presets_hit_their_share_of_llama_2_7b(llama_2_7b, name, share, count):
    config = ApexConfig.preset(name)
    total = sum(weight.numel() for weight in llama_2_7b.parameters())
    assert total == 6_738_415_616
    embeddings = llama_2_7b.model.embed_tokens.weight.numel() + llama_2_7b.lm_head.weight.numel()
    trainable = embeddings if config.train_embeddings else 0
    plan = select(equal_statistics(llama_2_7b), config)
    with_heads = {part.layer for part in plan.layers if part.component == "head"}
    head_pairs, direct_heads = unit_counts(32, "head", config)
    channel_pairs, direct_channels = unit_counts(11008, "channel", config)
    for number, layer in enumerate(llama_2_7b.model.layers):
        heads, channels = 2 * head_pairs + direct_heads, 2 * channel_pairs + direct_channels
        attention = 4 * 4096 * 4096 if config.train_queries else 2 * 4096 * 4096
        if number in with_heads:
            trainable += attention * heads // 32
            trainable += operator_class("monarch").count(head_pairs * 128) + 2 * head_pairs * 128  # M; v, s
        trainable += sum(weight.numel() for weight in layer.mlp.parameters()) * channels // 11008
        trainable += operator_class("monarch").count(channel_pairs) + 3 * channel_pairs  # M; v, s, s'
    assert len(with_heads) == (15 if name == "2.4%" else 32)
    assert trainable == count  # as the docstring says
    assert trainable / total == pytest.approx(share, rel=0.005)


@given(st.integers(1, 12), st.integers(2, 8), st.floats(0.002, 0.5), st.integers(0, 3))
@laws
def test_heads_are_spread_over_as_many_layers_as_their_share_allows(layers, heads, fraction, seed):
    config = ApexConfig(fraction=fraction, direct_heads=2 * fraction, direct_channels=1.0, spread_heads=True)
    rows = [(layer, name, unit) for layer in range(layers) for name in ("head", "channel") for unit in range(heads)]
    table = pd.DataFrame(rows, columns=["layer", "component", "unit"]).assign(activation=1.0, rank_score=0)
    plan = select(table, config, seed=seed)
    chosen = [part for part in plan.layers if part.component == "head"]
    assert plan == select(table.sample(frac=1.0, random_state=seed), config, seed=seed)
    if math.floor(fraction * heads + 1e-9):
        assert len(chosen) == layers
    else:
        assert len(chosen) == math.floor(fraction * heads * layers + 1e-9)
        assert all(len(part.source) == 1 for part in chosen)
    assert sum(part.component == "channel" for part in plan.layers) == layers


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match=r"unknown preset '60%'; known: 52%, 2\.4%"):
        ApexConfig.preset("60%")


@given(st.integers(2, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n // 2), st.integers(1, n // 2))))
@laws
def test_chance_agrees_with_enumeration(sizes):
    units, first, second = sizes
    one = set(range(first))
    others = [set(other) for other in combinations(range(units), second)]
    (row,) = (
        selection_stability(plan_of(units, range(first)), plan_of(units, range(second)))
        .query("role == 'source'")
        .to_dict("records")
    )
    assert row["chance"] == pytest.approx(np.mean([len(one & other) / len(one | other) for other in others]))
    assert row["p_value"] == pytest.approx(np.mean([len(one & other) >= row["overlap"] for other in others]))


def plan_of(units, source) -> ExpansionPlan:
    source = tuple(int(unit) for unit in source)
    target = tuple([unit for unit in range(units) if unit not in source][: len(source)])
    return ExpansionPlan((LayerPlan(0, "channel", source, target, (), units),))


def test_chance_agrees_with_simulation_at_full_size():
    rng = np.random.default_rng(0)
    one = np.zeros(11008, bool)
    one[:2064] = True
    overlaps = np.array([one[rng.permutation(11008)[:2064]].sum() for _ in range(400)])
    simulated = overlaps / (2 * 2064 - overlaps)
    chance = selection_stability(plan_of(11008, range(2064)), plan_of(11008, range(2064)))["chance"].iloc[0]
    assert abs(simulated.mean() - chance) < 4 * simulated.std() / 400**0.5


def test_unrelated_selections_are_noise_and_equal_ones_are_not():
    config = ApexConfig(strategy="random")
    table = statistics_table(heads=32, channels=500, layers=32)
    random = selection_stability(select(table, config), select(table, config, seed=1))
    assert random["noise"].mean() > 0.95
    assert random["jaccard"].mean() == pytest.approx(random["chance"].mean(), abs=0.02)
    equal = selection_stability(select(table), select(table))
    assert not equal["noise"].any()
    assert (equal["jaccard"] == 1).all()
    assert len(equal) == 2 * 2 * 32


def test_halves_that_share_a_signal_are_told_from_noise():
    table = statistics_table(heads=32, channels=500)
    halves = [
        table.assign(activation=table["activation"] * np.random.default_rng(s).lognormal(0, 0.1, len(table)))
        for s in (1, 2)
    ]
    report = selection_stability(*(select(half, ApexConfig(statistic="mean")) for half in halves))
    assert not report["noise"].any()
    assert 0.5 < report["jaccard"].mean() < 1


def test_two_units_can_never_be_told_from_chance():
    report = selection_stability(plan_of(2, [1]), plan_of(2, [1]))
    assert report["p_value"].tolist() == pytest.approx([0.5, 0.5])
    assert report["noise"].all()


def test_plans_for_different_models_are_not_compared():
    plan = select(statistics_table())
    with pytest.raises(ValueError, match="different layers"):
        selection_stability(plan, select(statistics_table(layers=3)))
    with pytest.raises(ValueError, match="layer 0, channel: 40 units in one plan, 41 in the other"):
        selection_stability(plan, select(statistics_table(channels=41)))


@pytest.mark.parametrize(("way", "noise"), [(0.05, True), (0.09, True), (0.12, False), (0.5, False)])
def test_an_overlap_that_no_chance_gives_is_noise_still_if_it_is_small(way, noise):
    units, size = 11008, 2064
    chance = selection_stability(plan_of(units, range(size)), plan_of(units, range(size)))["chance"].iloc[0]
    jaccard = chance + way * (1 - chance)
    both = round(2 * size * jaccard / (1 + jaccard))
    row = selection_stability(plan_of(units, range(size)), plan_of(units, range(size - both, 2 * size - both))).iloc[0]
    assert row["p_value"] < 1e-6
    assert row["noise"] == noise
