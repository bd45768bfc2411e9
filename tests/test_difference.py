"""Masking curves and imbalance against their literal definitions."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VARIANTS
from hypothesis import given
from hypothesis import strategies as st

from apexlib.activations import activation_statistics
from apexlib.architectures import model_components
from apexlib.difference import imbalance_table, masking_curve
from apexlib.evaluation import perplexity

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
