"""Views: what they show follows from the controls, what they say is what the library measures, and nothing twice."""

import ast
import copy
import re
import time
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from apexlib import (
    ApexConfig,
    activation_statistics,
    effective_rank,
    expand,
    explore,
    masking_curve,
    parameter_groups,
    perplexity,
    select,
    silenced,
    train_tokenizer,
    trainable_table,
    weight_difference,
)
from apexlib.analysis.first_steps import FirstSteps
from apexlib.analysis.masked_losses import NOTHING, Mask, Masking
from apexlib.analysis.unit_ranks import UnitRanks
from apexlib.architectures import model_components
from apexlib.explore.panel import numbers, tokens_html
from apexlib.suite.inputs import load_model, load_tokenizer
from apexlib.suite.notebooks import read_notebook

ROOT = Path(__file__).parents[1]
WORDS = "to be or not to be, that is the question: whether 'tis nobler in the mind to suffer <b>$1$</b>\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS], 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build("llama", vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=None)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    ids = torch.tensor(tokenizer(WORDS * 2)["input_ids"])[:96].view(6, 16)
    return [{"input_ids": part} for part in ids.split(4)]


@pytest.fixture(scope="module")
def masking(model, tokenizer, blocks, statistics):
    return Masking(model, tokenizer, blocks, statistics)


@pytest.fixture(scope="module")
def statistics(model, blocks):
    return activation_statistics(model, blocks)


# ------------------------------------------------------------------------------------------------- losses under masks


def test_the_loss_without_a_mask_is_the_perplexitys(masking, model, blocks):
    assert masking.loss() == pytest.approx(perplexity(model, blocks)["loss"], abs=1e-6)
    for component in ("head", "channel"):
        assert masking.loss(masking.mask(component, "advantageous", 0, [0, 1])) == masking.loss()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_masked_loss_is_that_of_the_silenced_model(masking, model, blocks, data):
    component = data.draw(st.sampled_from(["head", "channel"]))
    count = {"head": 2, "channel": 24}[component]
    chosen = data.draw(st.lists(st.sets(st.integers(0, count - 1)), min_size=2, max_size=2))
    units = {layer: tuple(sorted(own)) for layer, own in enumerate(chosen)}
    parts = [part for part in model_components(model) if part.component == component]
    with silenced(model, parts, units):
        expected = perplexity(model, blocks)["loss"]
    assert masking.loss(Mask(component, "by hand", tuple(units.items()))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("order", ["advantageous", "disadvantageous", "random"])
def test_masks_are_those_of_the_masking_curve(masking, model, statistics, blocks, order):
    asked = {"fractions": [0.1, 0.5], "order": order, "seeds": [0]}
    curve = masking_curve(model, statistics, blocks, **asked)
    losses = [masking.loss(masking.mask("channel", order, share, [0, 1])) for share in asked["fractions"]]
    np.testing.assert_allclose(losses, curve["loss"], atol=1e-6)


def test_random_masks_are_as_large_and_the_first_is_the_random_order(masking):
    mask = masking.mask("channel", "advantageous", 0.3, [1])
    drawn = masking.random_like(mask)
    assert [[len(units) for _, units in each.units] for each in drawn] == [[7]] * 4
    assert len({each.units for each in drawn}) == 4
    assert masking.mask("channel", "random", 0.3, [1]) == drawn[0]


def test_padding_and_labels_count_as_in_the_perplexity(model, tokenizer, blocks):
    ids = blocks[0]["input_ids"].clone()
    labels = ids.masked_fill(torch.arange(16) < 5, -100)
    for side in (slice(0, 3), slice(13, 16)):
        mask = torch.ones_like(ids)
        mask[1, side] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        assert Masking(model, tokenizer, [batch]).loss() == pytest.approx(perplexity(model, [batch])["loss"], abs=1e-6)


def test_a_text_is_cut_into_pieces_and_blocks_need_no_batch(model, tokenizer):
    text = WORDS * 12
    rows = [ids for ids, _ in Masking(model, tokenizer, text).rows]
    assert torch.cat(rows).tolist() == tokenizer(text)["input_ids"]
    assert max(map(len, rows)) == 256
    block = {"input_ids": rows[0], "labels": rows[0]}
    assert len(Masking(model, tokenizer, [block]).token_losses()[0]) == len(rows[0])


def test_a_model_is_asked_once_and_left_as_it_was(model, tokenizer, blocks):
    calls, masking = [], Masking(model.train(), tokenizer, blocks)
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    mask = masking.mask("head", "advantageous", 0.5, [0])
    for _ in range(2):
        assert masking.loss(mask) == masking.loss(mask._replace(order="by hand"))
        _ = masking.table
    hook.remove()
    assert len(calls) == 2 * len(masking.rows)  # the mask and the plain model
    assert model.training
    model.eval()


def test_the_table_has_every_mask_once(model, tokenizer, blocks):
    masking = Masking(model, tokenizer, blocks)
    mask = masking.mask("channel", "advantageous", 0.25, [0, 1])
    assert masking.loss(mask) == masking.loss(mask)
    row = masking.table.set_index("order").loc["advantageous"]
    assert row[["component", "layers", "units", "share"]].tolist() == ["channel", "0, 1", 12, 0.25]
    assert row["increase"] == masking.loss(mask) - masking.loss(NOTHING)
    assert row["silenced"] == dict(mask.units)
    assert len(masking.table) == 2


def test_what_no_mask_can_be_made_of_is_refused(model, tokenizer, blocks, statistics):
    nothing = dict.fromkeys(((), "", "a"), "no token to predict")
    for text, said in {**nothing, ("words",): "item 0 is str", (1,): "item 0 is int; need a text, or blocks"}.items():
        with pytest.raises(ValueError, match=said):
            Masking(model, tokenizer, text)
    with pytest.raises(ValueError, match="draws 0: need at least one"):
        Masking(model, tokenizer, blocks, statistics, draws=0)
    with pytest.raises(ValueError, match="share 2: need a value from 0 to 1"):
        Masking(model, tokenizer, blocks, statistics).mask("head", "random", 2, [0])
    other = Masking(model, tokenizer, blocks, statistics.query("unit < 10"))
    with pytest.raises(ValueError, match="10 channels in layer 0; need the 24"):
        other.mask("channel", "advantageous", 0.5, [0])


# ------------------------------------------------------------------------------------------------------------- helpers


@given(st.sets(st.integers(0, 30)))
def test_numbers_are_read_back_from_any_way_of_writing_them(chosen):
    assert numbers(", ".join(map(str, chosen)), 31, "head") == tuple(sorted(chosen))
    ranges = ",".join(f"{one}-{min(30, one + 2)}" for one in chosen)
    assert set(numbers(ranges, 31, "head")) == {each for one in chosen for each in range(one, min(30, one + 2) + 1)}


@pytest.mark.parametrize("text", ["8", "-1", "3-1", "a", "1 2-", "0-8", "1.5"])
def test_numbers_that_are_none_are_refused_in_words(text):
    with pytest.raises(ValueError, match=r"head .* need numbers or ranges from 0 to 7"):
        numbers(text, 8, "head")


def test_tokens_are_text_and_no_markup():
    html = tokens_html([("<b>", 1.0, '"'), ("x\n", -9.0, "")], 2.0, mark=1)
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "213, 94, 0, 0.38" in html
    assert "1, 115, 178, 0.75" in html
    assert html.count("outline: 2px solid") == 1


# --------------------------------------------------------------------------------------------------------------- views


def moved(view, **values):
    """What a view shows after controls were moved."""
    for name, value in values.items():
        view.controls[name].value = value
    return "".join(each.value for each in view.pictures), view.words.value, view.said.value


def follows(view, **values):
    """Whether what is shown changes with each control by itself, and comes back with it."""
    for name, value in values.items():
        before, old = moved(view), view.controls[name].value
        after = moved(view, **{name: value})
        assert after[:2] != before[:2], name
        assert after[2] == "", name
        assert moved(view, **{name: old})[1:] == before[1:], name  # a picture may keep what was measured
    return True


@pytest.fixture
def masks(model, tokenizer, blocks):
    return explore.masks(model, tokenizer, blocks)


def test_masks_follow_their_controls(masks):
    simple = {"component": "head", "order": "disadvantageous", "share": 0.5, "layers": (1,), "sequence": 2}
    assert follows(masks, **simple, after_token=3)
    moved(masks, order="by hand")
    assert follows(masks, by_hand="0, 3-5")
    assert masks.mask.units == ((0, ()), (1, ()))


def test_masks_show_the_loss_and_say_what_is_wrong(masks):
    loss = masks.state.loss(masks.mask)
    assert f"{loss:.3f} nats per token" in masks.words.value
    shown = moved(masks)
    assert moved(masks, layers=())[2].count("layers: none is chosen; need one or more") == 1
    assert moved(masks)[:2] == shown[:2]  # stays
    _, _, said = moved(masks, layers=(0,), order="by hand", by_hand="1, 24")
    assert "channel &#x27;24&#x27;: need numbers or ranges from 0 to 23" in said
    assert moved(masks, by_hand="1, 23")[2] == ""
    assert masks.mask == Mask("channel", "by hand", ((0, (1, 23)),))


def test_a_view_without_a_front_end_is_its_picture(masks):
    bundle = masks._repr_mimebundle_()
    assert bundle["text/plain"] == "Masks"
    assert bundle["image/png"].startswith("iVBOR")
    assert "application/vnd.jupyter.widget-view+json" in bundle


@pytest.fixture
def atlas(model, tokenizer, blocks, statistics):
    other = build("llama", vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=None, seed=1)
    tables = {"early": activation_statistics(other, blocks), "late": statistics}
    with torch.random.fork_rng():
        change = weight_difference(model, other)
    return explore.units(tables, movement=change, model=model, tokenizer=tokenizer, text=blocks)


def test_units_follow_their_controls(atlas):
    simple = {"checkpoint": "early", "component": "head", "colour": "role", "layer": 1, "unit": 5}
    assert follows(atlas, **simple, channel_ranks=(2, 9), by_hand="1, 2 > 3, 4")
    assert moved(atlas, colour="movement") != moved(atlas, colour="rank_score")


def test_a_selection_is_a_plan_for_the_model(atlas, model):
    moved(atlas, checkpoint="late", channel_ranks=(1, 4), head_ranks=(0, 0))
    ranked = atlas.table.query("component == 'channel' and layer == 0").set_index("rank")["unit"].sort_index()
    first, second = atlas.plan.layers
    assert set(first.source) == set(ranked.loc[2:4])
    assert set(first.target) == set(ranked.loc[21:23])
    moved(atlas, layer=1, by_hand="0-1 > 5, 7")
    assert atlas.plan.layers == (first, replace(second, source=(0, 1), target=(5, 7)))
    assert atlas.controls["by_hand"].value == "0-1 > 5, 7"
    assert moved(atlas, layer=0)[2] == ""
    assert atlas.controls["by_hand"].value == ""  # each layer has its own
    expand(build("llama"), atlas.plan)
    said = moved(atlas, by_hand="1, 2 > 3")[2]
    assert "need as many sources as targets, got 2 and 1" in said


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 1), st.integers(0, 1))
def test_any_ranges_give_a_valid_plan_or_say_that_there_is_none(statistics, one, two, head, more):
    ranks = {"channel": (min(one, two), max(one, two)), "head": (0, min(head, more))}
    ranked = UnitRanks(statistics)
    if not any(last > first for first, last in ranks.values()):
        with pytest.raises(ValueError, match="a plan needs at least one layer"):
            ranked.plan("", ranks, {})
        return
    for layer in ranked.plan("", ranks, {}).layers:
        first, last = ranks[layer.component]
        assert len(layer.source) == len(layer.target) == last - first


def test_a_plan_that_is_given_stays_until_others_are_chosen(statistics):
    given_plan = UnitRanks(statistics).plan("", {"channel": (0, 2), "head": (0, 0)}, {})
    view = explore.units(statistics, given_plan)
    assert view.plan is given_plan
    assert set(view.table.query("component == 'channel'")["role"]) == {"source", "target", "frozen"}
    moved(view, channel_ranks=(0, 3))
    assert len(view.plan.layers[0].source) > 0
    assert view.plan != given_plan


def test_a_unit_is_largest_where_the_view_says(atlas, model, blocks):
    state, slot = atlas.masking, atlas.masking.parts["head"][1].reader
    seen = []
    hook = model.get_submodule(slot.module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(blocks[0]["input_ids"][:1])
    hook.remove()
    expected = seen[0][0][:, slot.index[1].flatten()].norm(dim=1)
    assert_close(torch.from_numpy(atlas.masking.outputs("head", 1)[0][:, 1]), expected)
    cost = state.loss(Mask("head", "by hand", ((1, (1,)),))) - state.loss()
    assert f"{cost:+.4f} nats" in moved(atlas, component="head", layer=1, unit=1)[1]


def pointed(view, picture, how, *corners):
    """What a view shows after a pointer was at corners of a picture, in its data's coordinates."""
    left, box = 160 * sum(view.widths[:picture]), 160 * np.array([view.widths[picture], view.height])
    shares = [(view.axes[picture].transData.transform(corner) - (left, 0)) / box for corner in corners]
    told = " ".join(f"{x} {1 - y}" for x, y in shares)
    view.pointer.value = f"{picture} {how} {told} {time.time()}"
    return moved(view)


def test_a_pointer_over_the_map_tells_shows_and_chooses(atlas):
    moved(atlas, layer=0, head_ranks=(0, 0))
    said = pointed(atlas, 0, "hover", (5, 1), (5, 1))[2]
    one = atlas.table.query("component == 'channel' and layer == 1 and unit == 5").iloc[0]
    assert said.startswith("<b>layer 1, channel 5</b>: activation")
    assert f"{one['activation']:.4g}" in said
    assert (atlas["layer"], atlas["unit"]) == (0, 0)
    pointed(atlas, 0, "click", (7, 1), (7, 1))
    assert (atlas["layer"], atlas["unit"]) == (1, 7)
    pointed(atlas, 0, "drag", (9, 1), (6, 0))  # from any corner to any other
    for layer in atlas.plan.layers:
        ranks = atlas.table.query("component == 'channel' and layer == @layer.layer").set_index("unit")["rank"]
        lowest = [unit for unit in ranks.sort_values(ascending=False).index if unit not in range(6, 10)]
        assert (layer.source, set(layer.target)) == ((6, 7, 8, 9), set(lowest[:4]))
    assert len(atlas.plan.layers) == 2
    assert atlas["by_hand"].startswith("6-9 > ")


@pytest.mark.parametrize(("over", "chosen"), [((3, 6), (2, 6)), ((20, 23), (1, 5))])
def test_a_pointer_over_the_ranks_chooses_pairs_from_either_end(atlas, over, chosen):
    pointed(atlas, 1, "drag", *((rank, atlas.axes[1].get_ylim()[0] * 1.1) for rank in over))
    assert atlas["channel_ranks"] == chosen
    pointed(atlas, 1, "click", *[(3, atlas.axes[1].get_ylim()[0] * 1.1)] * 2)
    assert atlas.table.query("component == 'channel' and layer == 0 and rank == 3")["unit"].item() == atlas["unit"]


def test_where_the_plan_is_none_a_pointer_says_so_and_a_stroke_mends_it(atlas):
    moved(atlas, layer=0, by_hand="1, 2 > 3")
    assert "need as many sources as targets, got 2 and 1" in pointed(atlas, 0, "hover", (5, 1), (5, 1))[2]
    assert pointed(atlas, 0, "drag", (4, 0), (5, 0))[2] == ""
    assert "need as many sources as targets, got 20 and 4" in pointed(atlas, 0, "drag", (0, 0), (19, 0))[2]


def test_a_pointer_outside_of_the_axes_does_nothing(atlas):
    before = moved(atlas)
    assert pointed(atlas, 0, "click", (-5, 0), (-5, 0)) == before
    assert pointed(atlas, 0, "drag", (60, 9), (0, 0)) == before


def test_a_stroke_masks_units_and_a_click_on_a_token_asks_what_follows(masks):
    pointed(masks, 2, "drag", (3, 1), (8, 1))
    assert masks.mask == Mask("channel", "by hand", ((1, (3, 4, 5, 6, 7, 8)),))
    assert pointed(masks, 2, "hover", (4, 0), (4, 0))[2] == "layer 0, channel 4"
    masks.pointer.value = "-1 click 3 0 3 0 1"
    assert masks["after_token"] == 3
    assert 'data-token="3" style="background' in masks.words.value


@pytest.fixture(scope="module")
def expansion(model, blocks, statistics):
    return explore.expansion(model, blocks, statistics, ApexConfig(direct_heads=1.0, direct_channels=0.5))


def test_an_expansion_follows_its_controls(expansion):
    names = {"fraction": 0.25, "direct_channels": 0.75, "operator": "diagonal", "steps": 8}
    assert follows(expansion, **names, weight="model.layers.1.self_attn.v_proj")
    moved(expansion, fraction=0.5)
    assert expansion["direct_channels"] == 1.0  # source and target are part of it
    assert expansion.words.value.startswith('<div style="line-height: 1.4"><b>')
    moved(expansion, fraction=0.1875, direct_channels=0.5)
    assert expansion.plan == select(expansion.state.statistics, expansion.config)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_what_is_shown_is_what_the_method_makes_of_a_matrix(model, blocks, statistics, steps):
    config, state = ApexConfig(direct_channels=0.5, operator="dense"), FirstSteps(model, blocks, statistics)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found, sigma, row = state.measured(config, steps, "model.layers.1.mlp.down_proj")
    own = expand(copy.deepcopy(model), select(statistics, config), operator="dense").train()
    optimizer = torch.optim.AdamW(parameter_groups(own, 1e-3))
    for step in range(steps):
        ids = blocks[step % len(blocks)]["input_ids"]
        own(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mlp, table = own.eval().model.layers[1].mlp, trainable_table(own)
    assert_close(found["W"], mlp.down_proj.weight, rtol=0, atol=1e-6)
    assert_close(found["ΔW"], mlp.down_proj.weight - before["model.layers.1.mlp.down_proj.weight"], rtol=0, atol=1e-6)
    assert_close(found["M"], mlp.apex_channel.operator.dense(), rtol=0, atol=1e-6)
    assert row["W_effective_rank"] == pytest.approx(effective_rank(mlp.down_proj.weight), rel=1e-4)
    assert row["share"] == table["trainable"].sum() / table["total"].sum()
    assert row["loss"] == pytest.approx(perplexity(own, blocks[:1])["loss"], rel=1e-5)
    assert sigma["M"].any() == (steps > 0)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_going_back_trains_nothing_and_gives_the_same(model, blocks, statistics):
    state, shown = FirstSteps(model, blocks, statistics), "model.layers.0.mlp.up_proj"
    there = state.measured(ApexConfig(), 4, shown)[0]["W"].clone()
    further = state.measured(ApexConfig(), 8, shown)[0]["W"].clone()
    state.batches = None
    assert torch.equal(state.measured(ApexConfig(), 4, shown)[0]["W"], there)
    assert torch.equal(state.measured(ApexConfig(), 8, shown)[0]["W"], further)
    assert not torch.equal(there, further)
    assert state.table[["steps", "weight"]].values.tolist() == [[4, shown], [8, shown]]
    straight = FirstSteps(model, blocks, statistics).measured(ApexConfig(), 8, shown)[0]["W"]
    assert_close(straight, further, rtol=0, atol=1e-7)


def test_what_no_steps_can_be_taken_of_is_refused(model, blocks, statistics):
    for batches in ([], [{"labels": torch.ones(1, 2)}]):
        with pytest.raises(ValueError, match=f"batches: {len(batches)} of them; need one or more, each with input_ids"):
            FirstSteps(model, batches, statistics)
    with pytest.raises(ValueError, match="steps 3: need one of 0, 1, 2, 4"):
        FirstSteps(model, blocks, statistics).after(ApexConfig(), 3)


@pytest.fixture
def runs():
    return explore.runs(ROOT / "data" / "results" / "cpu")


def test_runs_follow_their_controls(runs):
    claims = pd.read_csv(ROOT / "data" / "results" / "cpu" / "claims.csv")
    assert follows(runs, claim="small-lora", measure="retention_loss", methods=("full", "lora"))
    for verdict in claims["verdict"].unique():
        moved(runs, verdict=verdict)
        assert set(runs.table["verdict"]) == {verdict}
        assert runs["claim"] in set(runs.table["claim"])
    moved(runs, verdict="all", words="LORA Forgets")
    assert runs.table["statement"].str.contains("LoRA").all()
    shown = runs.words.value
    assert "no claim has them; need others" in moved(runs, words="no such words")[2]
    assert moved(runs, words="")[1] == shown


def test_claims_of_any_verdict_can_be_shown(runs):
    claims = runs.table
    for claim in pd.concat([claims.drop_duplicates("verdict"), claims[~np.isfinite(claims["mean"])]]).itertuples():
        _, words, said = moved(runs, claim=claim.claim)
        assert said == ""
        assert claim.verdict in words


def test_claims_are_found_by_their_words_where_some_have_no_text():
    folder = ROOT / "data" / "results" / "cpu"
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("claims", "instruction")}
    tables["claims"]["elsewhere"] = pd.Series(["a zebra"], index=[1])
    view = explore.runs(tables)
    assert len(view.table) == len(tables["claims"])
    moved(view, words="zebra")
    assert view.table["number"].tolist() == [2]
    moved(view, words="nan")
    assert not view.table["statement"].eq(tables["claims"]["statement"][0]).any()


def test_the_chart_is_the_mean_over_seeds(runs):
    table = pd.read_csv(ROOT / "data" / "results" / "cpu" / "instruction.csv").query("method == 'apex'")
    for measure in ("valid_loss", "answer_loss"):  # of every run, and of those at the chosen rate
        moved(runs, measure=measure, methods=("apex",))
        expected = table.groupby("learning_rate")[measure].mean().dropna()
        assert runs.chart["learning_rate"].tolist() == expected.index.tolist()
        np.testing.assert_allclose(runs.chart["mean"], expected)
    assert len(expected) == 1


def test_runs_take_tables_with_values_per_seed():
    folder = ROOT / "data" / "results" / "cpu"
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("claims", "instruction")}
    plain = moved(explore.runs(tables))
    assert plain == moved(explore.runs(folder))
    values = pd.DataFrame({"claim": tables["claims"]["claim"].iloc[0], "seed": [0, 1], "value": [0.4, 0.5]})
    assert moved(explore.runs(tables | {"values": values}))[0] != plain[0]
    with pytest.raises(ValueError, match="tables claims: need instruction too"):
        explore.runs({"claims": tables["claims"]})
    with pytest.raises(FileNotFoundError):
        explore.runs(ROOT / "nowhere")


@pytest.fixture
def spectrum(model, tokenizer, tmp_path):
    tuned = build("llama", vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=None, seed=2)
    model.save_pretrained(tmp_path / "base")
    return explore.spectrum(tmp_path / "base", {"tuned": tuned, "same": model})


def test_a_spectrum_follows_its_controls_and_measures_once(spectrum, monkeypatch):
    weights = spectrum.state.weights
    assert follows(spectrum, weight=weights[3], models=("tuned",))
    table = spectrum.table
    assert not table.duplicated(["weight", "model", "matrix"]).any()
    monkeypatch.setattr("apexlib.analysis.spectra.singular_values", None)
    moved(spectrum, weight=weights[3])
    pd.testing.assert_frame_equal(spectrum.table, table)


def test_a_spectrum_is_that_of_the_matrix_and_of_its_update(spectrum, model):
    name = spectrum["weight"]
    sigma, edge = spectrum.state.sigma(name, "base", False)
    matrix = model.get_parameter(name).detach()
    np.testing.assert_allclose(sigma, torch.linalg.svdvals(matrix.double()).numpy(), rtol=1e-6)
    assert edge == pytest.approx(matrix.norm() * (matrix.shape[0] ** -0.5 + matrix.shape[1] ** -0.5))
    assert spectrum.table.query("model == 'same' and matrix == 'ΔW'")["effective_rank"].eq(0).all()


def test_a_random_matrix_ends_at_the_edge():
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    state = explore.spectrum(torch.nn.Linear(300, 200, bias=False)).state
    state.models["base"]["weight"] = lambda: matrix
    sigma, edge = state.sigma.__wrapped__("weight", "base", False)
    assert sigma[0] == pytest.approx(edge, rel=0.05)


def test_models_that_differ_have_no_common_spectrum(model):
    with pytest.raises(ValueError, match=r"other: has no model.*; need versions of one model"):
        explore.spectrum(model, {"other": torch.nn.Linear(3, 3)})


def test_tab_offers_the_views_alone_and_then_their_arguments():
    assert dir(explore) == ["expansion", "masks", "runs", "spectrum", "units"]
    assert [*signature(explore.masks).parameters] == ["model", "tokenizer", "text", "statistics"]


# --------------------------------------------------------------------------------------------------------- notebooks

LOOKS = {
    "01_parameter_difference": [explore.masks],
    "02_expansion_step_by_step": [explore.units, explore.expansion],
    "03_instruction_tuning": [explore.runs],
    "05_effective_rank": [explore.spectrum],
}


def view_cells(name):
    """The cells of a notebook that are views, and the place of each from the end."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    views = [place for place, cell in enumerate(cells) if "explore" in cell.metadata.get("tags", [])]
    return [(cells[place].source, len(cells) - place) for place in views]


@pytest.mark.parametrize("name", LOOKS)
def test_a_notebook_ends_with_a_view_that_decides_nothing(name):
    views, notebook = view_cells(name), read_notebook(ROOT / "notebooks" / f"{name}.ipynb", "cpu")
    assert [place for _, place in views] == [*range(len(views) + 1, 1, -1)]  # before what the notebook does not show
    for source, _ in views:
        assert not re.search(r"save_|draw_figure|open\(|to_csv|write", source.partition("\n")[2])
        assert (source in notebook.cells, source in notebook.deciding) == (True, False)
    assert len(notebook.cells) == len(notebook.deciding) + len(views)
    assert not any("explore" in cell for cell in notebook.deciding)


@pytest.fixture(scope="module")
def shipped():
    folder = str(ROOT / "data" / "models" / "python-3m")
    base, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    tokens = tokenizer((ROOT / "apexlib" / "plan.py").read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    blocks = [{"input_ids": tokens[:, : 8 * 128].view(8, 128)}]
    return {"folder": folder, "base": base, "tokenizer": tokenizer, "blocks": blocks}


def test_the_views_of_the_notebooks_open_on_the_shipped_base(shipped):
    folder, blocks, results = shipped["folder"], shipped["blocks"], ROOT / "data" / "results" / "cpu"
    statistics = activation_statistics(shipped["base"], blocks)
    plan = select(statistics)
    run = {"method": "apex", "seed": 0, "base": folder, "path": f"{folder}/step-03400"}
    around = {
        "largest": pd.DataFrame([{"path": folder, "seed": 0}]), "first": statistics.assign(seed=0), "revision": None,
        "text": lambda path, split, count: blocks, "load_model": load_model, "load_tokenizer": load_tokenizer,
        "base": shipped["base"], "fused": load_model(run["path"]), "tokenizer": shipped["tokenizer"], "plan": plan,
        "held_out": blocks, "assessment": blocks, "training": blocks, "torch": torch, "config": ApexConfig(),
        "source": folder, "activation_statistics": activation_statistics, "statistics": statistics, "pd": pd,
        "tuned": pd.DataFrame([run]),
        "stages_of": lambda path: [path], "verdicts": pd.read_csv(results / "claims.csv"),
        "paths": SimpleNamespace(results=results),
        "compared": SimpleNamespace(runs=pd.read_csv(results / "instruction.csv")),
    }  # fmt: skip
    for name, kinds in LOOKS.items():
        names = dict(around)
        for (source, _), kind in zip(view_cells(name), kinds, strict=True):
            *lines, last = ast.parse(source).body
            exec(compile(ast.Module(lines, []), name, "exec"), names)
            began = time.perf_counter()
            view = eval(compile(ast.Expression(last.value), name, "eval"), names)
            assert isinstance(view, kind)
            assert view.said.value == ""
            assert time.perf_counter() - began < 60  # seconds, on a machine that does much else
