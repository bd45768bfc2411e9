"""Masking curves and imbalance against their literal definitions."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VARIANTS, build
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apexlib.activations import activation_statistics
from apexlib.analysis.difference import (
    biography,
    imbalance_table,
    masked_first,
    masking_curve,
    silenced,
    weight_difference,
)
from apexlib.architectures import model_components
from apexlib.evaluation import perplexity
from apexlib.plan import ApexConfig, ExpansionPlan, LayerPlan
from apexlib.selection import select

DENSE = [variant for variant in VARIANTS if variant not in ("mixtral", "qwen3_moe")]


def removed(model, component, units):
    """Silence units by writing zeros into the columns of the output projections: the slow, literal way."""
    with torch.no_grad():
        for part in model_components(model):
            if part.component == component:
                slot = part.slots["output" if component == "head" else "down"]
                weight = model.get_submodule(slot.module).weight
                weight.index_fill_(slot.axis, slot.index[units[part.layer]].flatten(), 0.0)
    return model


@pytest.mark.parametrize("component", ["head", "channel"])
@pytest.mark.parametrize("variant", DENSE)
def test_masking_equals_zeroing_the_columns_of_the_output_projection(variant, component, tiny_model, batch):
    model = tiny_model(variant, dtype=torch.float64)
    statistics = activation_statistics(model, [batch])
    curves = {
        order: masking_curve(model, statistics, [batch], fractions=[0, 0.5], order=order, component=component)
        for order in ("advantageous", "disadvantageous")
    }
    ranked = statistics[statistics["component"] == component].sort_values(["rank_score", "activation"])
    base = perplexity(model, [batch])["loss"]
    for order, curve in curves.items():
        count = int(curve["units"].iloc[1])
        units = {
            layer: (rows["unit"].tolist()[-count:] if order == "advantageous" else rows["unit"].tolist()[:count])
            for layer, rows in ranked.groupby("layer")
        }
        expected = perplexity(removed(tiny_model(variant, dtype=torch.float64), component, units), [batch])["loss"]
        assert curve["loss"].iloc[1] == pytest.approx(expected, abs=1e-10)
        assert curve["increase"].tolist() == pytest.approx([0, expected - base], abs=1e-10)
    assert perplexity(model, [batch])["loss"] == base  # nothing stays masked


@pytest.mark.parametrize("component", ["head", "channel"])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox"])
def test_silenced_units_are_silent_inside_the_block_only(variant, component, tiny_model, batch):
    model = tiny_model(variant, dtype=torch.float64).eval()
    before = model(**batch).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parts = [part for part in model_components(model) if part.component == component]
    for units in ({0: [1], 1: [0, 1]}, {1: [0]}, {0: []}):  # a layer that is not named is left alone
        every = {layer: units.get(layer, []) for layer in (0, 1)}
        expected = removed(tiny_model(variant, dtype=torch.float64).eval(), component, every)(**batch).logits
        with silenced(model, parts, units):
            torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-10)
        assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_silencing_ends_with_the_block_however_it_ends(tiny_model):
    model = tiny_model("llama")
    parts = [part for part in model_components(model) if part.component == "head"]
    with pytest.raises(KeyboardInterrupt), silenced(model, parts, {0: [0]}):
        raise KeyboardInterrupt
    for unit in (-1, parts[0].units):
        wrong = {0: [0], 1: [unit]}
        message = f"layer 1 has no head {unit}: need 0 to {parts[0].units - 1}"
        with pytest.raises(ValueError, match=message), silenced(model, parts, wrong):
            pass
    assert not any(module._forward_pre_hooks for module in model.modules())


@given(
    st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 2)), min_size=24, max_size=24),
    st.permutations(range(2 * 24)),
)
@settings(max_examples=10, deadline=None)
def test_masking_takes_the_units_that_a_selection_would_also_where_all_are_tied(scores, rows):
    model = build("llama", num_hidden_layers=2)
    statistics = pd.concat(
        pd.DataFrame(
            {"layer": layer, "component": "channel", "unit": range(24), "rank_score": rank, "activation": mean}
        )
        for layer in (0, 1)
        for rank, mean in [zip(*scores, strict=True)]
    ).iloc[rows]
    plan = select(statistics, ApexConfig(fraction=0.25, direct_channels=0.5))
    parts = [part for part in model_components(model) if part.component == "channel"]
    for part, layer in zip(parts, plan.layers, strict=True):
        for order, chosen in (("advantageous", layer.source), ("disadvantageous", layer.target)):
            assert set(masked_first(statistics, part, order, 0)[:6]) == set(chosen)


def test_random_masks_differ_by_seed_and_are_nested(tiny_model, batch):
    model = tiny_model("llama")
    statistics = activation_statistics(model, [batch])
    ask = {"fractions": [0.25, 0.5, 1], "order": "random", "component": "channel"}
    curve = masking_curve(model, statistics, [batch], seeds=[0, 1], **ask)
    again = masking_curve(model, statistics, [batch], seeds=[0, 1], **ask)
    pd.testing.assert_frame_equal(curve, again)
    first, second = (curve[curve["seed"] == seed]["loss"].tolist() for seed in (0, 1))
    assert first[:2] != second[:2]
    assert first[2] == second[2]  # everything masked
    drawn = [masked_first(statistics, part, "random", 0) for part in model_components(model) if len(part.slots) == 3]
    assert len(drawn) > 1
    assert drawn[0] != drawn[1]  # in each layer others


def test_masking_refuses_what_it_cannot_do(tiny_model, batch):
    model = tiny_model("llama")
    statistics = activation_statistics(model, [batch])
    with pytest.raises(ValueError, match=r"fractions \[1.5\]: need values from 0 to 1"):
        masking_curve(model, statistics, [batch], fractions=[0.1, 1.5], order="random")
    with pytest.raises(ValueError, match="order 'best'"):
        masking_curve(model, statistics, [batch], fractions=[0.1], order="best")
    other = tiny_model("llama", intermediate_size=32)
    with pytest.raises(ValueError, match="statistics have 24 channels for layer 0; the model has 32"):
        masking_curve(other, statistics, [batch], fractions=[0.1], order="advantageous")
    with pytest.warns(UserWarning, match="experts"), pytest.raises(ValueError, match="mixtral has no units"):
        masking_curve(tiny_model("mixtral"), statistics, [batch], fractions=[0.1], order="advantageous")


def table(values):
    return pd.DataFrame({"layer": 3, "component": "channel", "unit": range(len(values)), "activation": values})


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0.1, 10))
@example([171.61154545005803] * 5, 1.0)  # whose Gini coefficient rounds to −3e-17
def test_imbalance_equals_its_definitions_and_ignores_scale_and_order(values, scale):
    row = imbalance_table(table(values)).iloc[0]
    x = np.array(values)
    assert row["cv"] == pytest.approx(x.std() / x.mean(), abs=1e-12)
    assert row["gini"] == pytest.approx(np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean()), abs=1e-9)
    assert 0 <= row["gini"] < 1
    assert row["above_mean"] == pytest.approx(sum(v > x.mean() for v in values) / len(values))
    scaled = imbalance_table(table([scale * v for v in reversed(values)])).iloc[0]
    assert scaled["cv"] == pytest.approx(row["cv"], abs=1e-9)
    assert scaled["gini"] == pytest.approx(row["gini"], abs=1e-9)


def test_imbalance_of_silent_and_of_single_active_units():
    assert imbalance_table(table([0.0] * 5))[["cv", "gini", "above_mean"]].iloc[0].tolist() == [0, 0, 0]
    row = imbalance_table(table([0.0] * 9 + [2.0])).iloc[0]
    assert (row["cv"], row["gini"], row["above_mean"]) == pytest.approx((3.0, 0.9, 0.1))


def slices(model, part, unit):
    """All weights of one unit, row by row or column by column, one after another: the slow, literal way."""
    values = []
    for slot in part.slots.values():
        weight = model.get_submodule(slot.module).weight.detach().double()
        for entry in slot.index[unit].flatten().tolist():
            values.append(weight[entry] if slot.axis == 0 else weight[:, entry])
    return torch.cat(values)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*experts' channels")
def test_weight_difference_equals_a_loop_over_units(variant, tiny_model):
    base, tuned = tiny_model(variant), tiny_model(variant, seed=1)
    found = weight_difference(base, tuned)
    rows = iter(found.itertuples(index=False))
    for part in model_components(base):
        for unit in range(part.units):
            old, new = slices(base, part, unit), slices(tuned, part, unit)
            row = next(rows)
            assert (row.layer, row.component, row.unit) == (part.layer, part.component, unit)
            expected = [(new - old).norm(), (new - old).norm() / old.norm(), old @ new / (old.norm() * new.norm())]
            assert [row.change, row.relative, row.cosine] == pytest.approx([x.item() for x in expected], rel=1e-9)
    assert not list(rows)


@pytest.mark.parametrize(
    ("variant", "name", "axis", "entry", "component", "unit"),
    [
        ("llama", "model.layers.1.self_attn.v_proj", 0, 5, "head", 1),  # head_dim 4, the second KV group
        ("phi3", "model.layers.1.self_attn.qkv_proj", 0, 17, "head", 0),  # rows 16 to 23 are the keys
        ("gpt2", "transformer.h.1.attn.c_attn", 1, 9, "head", 2),  # Conv1D: outputs are columns
        ("gpt2", "transformer.h.1.mlp.c_proj", 0, 7, "channel", 7),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value", 0, 13, "head", 1),  # 12 rows a head
        ("phi3", "model.layers.1.mlp.gate_up_proj", 0, 24 + 3, "channel", 3),
    ],
)
def test_moving_one_row_moves_its_unit_alone(variant, name, axis, entry, component, unit, tiny_model, tmp_path):
    base, tuned = tiny_model(variant), tiny_model(variant)
    with torch.no_grad():
        weight = tuned.get_submodule(name).weight
        weight.select(axis, entry).add_(0.5)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    found = weight_difference(tmp_path / "base", tmp_path / "tuned")
    moved = found[found["change"] > 0]
    assert moved[["layer", "component", "unit"]].values.tolist() == [[1, component, unit]]
    assert moved["change"].item() == pytest.approx(0.5 * weight.shape[1 - axis] ** 0.5, rel=1e-5)
    still = found[found["change"] == 0]
    assert still["cosine"].to_numpy() == pytest.approx(1)


def test_models_of_two_kinds_are_not_compared(tiny_model, tmp_path):
    for other in ("mistral", "gpt2"):
        wrong = tiny_model(other, **({"num_hidden_layers": 3} if other == "mistral" else {}))
        with pytest.raises(ValueError, match="need two versions of one model"):
            weight_difference(tiny_model("llama"), wrong)
    with pytest.raises(ValueError, match=r"q_proj: \(16, 16\) in base, \(16, 32\) in tuned"):
        weight_difference(tiny_model("llama", head_dim=4), tiny_model("llama", hidden_size=32, head_dim=4))
    with pytest.raises(FileNotFoundError, match="need a model or a folder with one"):
        weight_difference(tiny_model("llama"), tmp_path / "gone")


@st.composite
def stages_of_plans(draw):
    """Plans of some stages for two layers, each naming one or both."""
    plans = []
    for stage in range(draw(st.integers(1, 3))):
        layers = []
        for layer in draw(st.sampled_from([(0,), (1,), (0, 1)])):
            order = draw(st.permutations(range(6)))
            k, direct = draw(st.integers(0, 2)), draw(st.integers(1, 2))
            roles = (order[:k], order[k : 2 * k], order[2 * k : 2 * k + direct])
            layers.append(LayerPlan(layer, "channel", *(tuple(sorted(role)) for role in roles), units=6))
        plans.append(ExpansionPlan(tuple(layers), stage=stage))
    return plans


@given(stages_of_plans())
def test_a_biography_says_what_the_plans_say(plans):
    found = biography(plans)
    named = {part.layer for plan in plans for part in plan.layers}
    assert len(found) == len(plans) * len(named) * 6
    for row in found.itertuples():
        (plan,) = [plan for plan in plans if plan.stage == row.stage]
        parts = [part for part in plan.layers if part.layer == row.layer]
        roles = [role for part in parts for role in ("source", "target", "direct") if row.unit in getattr(part, role)]
        assert [row.role] == (roles or ["frozen"])


def test_biographies_need_plans_of_one_run():
    first = ExpansionPlan((LayerPlan(0, "head", (0,), (1,), (), 4),))
    wider = ExpansionPlan((LayerPlan(0, "head", (0,), (1,), (), 5),), stage=1)
    with pytest.raises(ValueError, match=r"plans of stages \[0, 0\]: need at least one, of one run, each once"):
        biography([first, first])
    with pytest.raises(ValueError, match="need at least one"):
        biography([])
    with pytest.raises(ValueError, match="layer 0, head: plans differ in its units"):
        biography([first, wider])
