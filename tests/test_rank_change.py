"""Laws of changes of effective rank: the first-order formula, the constructed cases, and tables over runs."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apexlib.analysis.rank_change import (
    beside_null,
    constructed_changes,
    final_stage,
    log_rank_change,
    movement,
    random_rows,
    rank_changes,
    rank_correlation,
    rank_gain,
    rank_panels,
    update_ranks,
)
from apexlib.analysis.spectrum import effective_rank


@given(rows=st.integers(2, 12), columns=st.integers(2, 12), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_formula_is_the_derivative(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, step = random_rows(rows, columns, generator), random_rows(rows, columns, generator)
    size = 1e-6 * torch.linalg.svdvals(weight).min().item()
    quotient = math.log(effective_rank(weight + size * step) / effective_rank(weight - size * step)) / (2 * size)
    rounding = 1e-14 / size  # of two ranks that hardly differ
    assert log_rank_change(weight, step).item() == pytest.approx(quotient, rel=1e-3, abs=1e-3 + rounding)


def test_it_rises_if_what_grows_lies_below_the_bound():
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    bound = sigma.sum() / effective_rank(torch.diag(sigma))
    for index, value in enumerate(sigma):
        step = torch.zeros(4, 4, dtype=torch.float64)
        step[index, index] = 1
        assert (log_rank_change(torch.diag(sigma), step) > 0) == (value < bound)


def test_constructed_cases_change_as_theory_demands():
    study = constructed_changes([0.5, 1.0], 2)
    assert len(study) == 5 * 3 * 2
    assert study[study["strength"] == 0]["change"].abs().max() < 1e-9
    expanded = study[study["strength"] > 0]
    assert (expanded["change"] * expanded["sign"] > 0)[expanded["sign"] != 0].all()
    assert set(expanded["sign"]) == {-1, 0, 1}
    with pytest.raises(AssertionError):  # rows at random do not keep to the row space, and so not to the sign
        pd.testing.assert_series_equal(np.sign(expanded["change"]), np.sign(expanded["chance"]), check_names=False)


def some_updates() -> pd.DataFrame:
    """Two methods, two seeds, two stages, two layers and an embedding, with numbers that all differ."""
    names = ["method", "seed", "stage", "layer"]
    levels = [["full", "apex"], [0, 1], [0, 1], [-1, 0, 1]]
    table = pd.MultiIndex.from_product(levels, names=names).to_frame(index=False)
    number = np.arange(1, len(table) + 1)
    table = table.assign(role="up_proj", weight="w", rows=4, columns=4, relative=0.1)
    measured = {"before": 2.0, "after": 2 + number / 100, "by_chance": 2.01, "random": 3.0, "effective_rank": 1.5}
    return table.assign(**measured, frobenius=1.0, noise_frobenius=number / 1000)


def test_changes_are_relative_and_of_the_last_stage():
    updates = some_updates()
    ranks = rank_changes(updates)
    np.testing.assert_allclose(ranks["change"], np.arange(1, len(ranks) + 1) / 200)
    np.testing.assert_allclose(ranks["change_by_chance"], 0.005)
    final = final_stage(ranks)
    assert set(final["stage"]) == {1}
    assert set(final["layer"]) == {0, 1}
    table = beside_null(final, "change", "change_by_chance").set_index("method")
    for method in ("full", "apex"):
        per_seed = final[final["method"] == method].groupby("seed")["change"].mean()
        assert table.loc[method, "mean"] == pytest.approx(per_seed.mean())
        assert table.loc[method, "null"] == pytest.approx(0.005)
    panels = rank_panels(ranks)
    assert set(panels["panel"]) == {"before fine-tuning", "by fine-tuning"}
    assert set(panels["share"].dropna()) == {2 / 3}


def test_an_update_that_did_not_move_has_no_rank():
    updates = some_updates()
    updates.loc[updates["method"] == "full", "frobenius"] = 0.0
    moved = update_ranks(updates)
    assert set(moved["method"]) == {"apex"}
    assert set(moved["rank_share"]) == {0.5}
    np.testing.assert_allclose(moved["noise_share"], moved["noise_frobenius"])


def test_gain_is_over_the_base_of_the_seed():
    losses = {("base", 0): 3.0, ("full", 0): 2.0, ("full", 1): 1.5, ("apex", 0): 2.5, ("apex", 1): 1.0}
    runs = pd.DataFrame([(*key, loss) for key, loss in losses.items()], columns=["method", "seed", "answer_loss"])
    gain = rank_gain(rank_changes(some_updates()), runs).set_index(["method", "seed"])
    assert gain["answer_loss_gain"].to_dict() == {k: 3.0 - v for k, v in losses.items() if k[0] != "base"}
    np.testing.assert_allclose(gain["erank_change_excess"], gain["erank_change"] - gain["erank_change_by_chance"])


def test_correlation_is_over_the_methods_of_a_seed():
    gain = pd.DataFrame(
        {
            "seed": [0, 0, 0, 1, 1, 1, 2, 2],
            "erank_change": [1, 2, 3] * 2 + [1, 2],
            "answer_loss_gain": [1, 4, 9] * 2 + [0, 1],
        }
    )
    gain.loc[gain["seed"] == 1, "answer_loss_gain"] *= -1
    table = rank_correlation(gain).set_index("seed")
    assert table["correlation"].round(9).tolist()[:2] == [1.0, -1.0]
    assert math.isnan(table.loc[2, "correlation"])
    assert table["methods"].tolist() == [3, 3, 2]


def test_movement_is_of_all_matrices_in_layers_at_once(tiny_model):
    base, model = tiny_model("llama"), tiny_model("llama")
    assert movement(base, model) == {"update_norm": 0, "erank_change": 0}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    names = [name for name, p in base.named_parameters() if "layers" in name and p.dim() == 2]
    old, new = ([dict(each.named_parameters())[name].detach().double() for name in names] for each in (base, model))
    moved = sum((b - a).square().sum() for a, b in zip(old, new, strict=True)) / sum(a.square().sum() for a in old)
    found = movement(base, model)
    assert found["update_norm"] == pytest.approx(moved.sqrt().item())
    changes = [effective_rank(b) / effective_rank(a) - 1 for a, b in zip(old, new, strict=True)]
    assert found["erank_change"] == pytest.approx(np.mean(changes))
