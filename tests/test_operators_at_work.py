"""What operators do beside rows: the shares of a first step by hand, and what of a move is theirs."""

import pytest
import torch
from conftest import build
from torch.testing import assert_close

from apexlib import ApexConfig, activation_statistics, expand, fuse, select
from apexlib.analysis.operators_at_work import operator_moves, operator_share, rows_of_targets
from apexlib.projections import SplitProjection

HALF = ApexConfig(fraction=0.25, direct_heads=0.5, direct_channels=0.6)
BATCHES = [{"input_ids": (ids := torch.arange(2, 20).view(2, 9) + shift), "labels": ids} for shift in (0, 3)]


def expanded(variant, **options):
    model = build(variant)
    plan = select(activation_statistics(model, BATCHES, top=0.25), HALF)
    return expand(model, plan, **options), plan


def test_the_shares_are_those_of_the_gradients_of_the_plain_model():
    model, plan = expanded("llama", operator="dense")
    found = operator_share(model, BATCHES).set_index(["layer", "component", "part"]).loc[(1, "channel")]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    plain = build("llama")
    for batch in BATCHES:
        (plain(**batch).loss / len(BATCHES)).backward()
    part = next(part for part in plan.layers if (part.layer, part.component) == (1, "channel"))
    mlp, target, source = plain.model.layers[1].mlp, list(part.target), list(part.source)
    matrices = [(each.weight.detach(), each.weight.grad) for each in (mlp.gate_proj, mlp.up_proj)]
    matrices.append((mlp.down_proj.weight.detach().T, mlp.down_proj.weight.grad.T))
    hand = {
        "M": [sum(g[target] @ w[source].T for w, g in matrices)],
        "v": [sum((g[target] * w[target]).sum(1) for w, g in matrices)],
        "s": [(g[source] * w[source]).sum(1) for w, g in matrices[:2]],
        "target": [g[target] for _, g in matrices],
        "others": [g[[*source, *part.direct]] for _, g in matrices],
    }
    adam = {name: sum(float(g.abs().sum()) for g in gradients) for name, gradients in hand.items()}
    descent = {name: sum(float(g.square().sum()) for g in gradients) for name, gradients in hand.items()}
    for name, gradients in hand.items():
        assert found.loc[name, "parameters"] == sum(g.numel() for g in gradients)
        assert found.loc[name, "adam_share"] == pytest.approx(adam[name] / sum(adam.values()), rel=1e-3)
        assert found.loc[name, "descent_share"] == pytest.approx(descent[name] / sum(descent.values()), rel=1e-3)


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt_neox", "gpt2", "olmo2"])
def test_what_is_the_operators_of_a_move_is_m_times_the_source_rows(variant):
    model, _ = expanded(variant)
    start = rows_of_targets(model)
    assert operator_moves(model, start)[["moved", "by_operator"]].eq(0).all(axis=None)
    generator = torch.Generator().manual_seed(0)
    mixers = {id(m.mixer): m.mixer for m in model.modules() if isinstance(m, SplitProjection) and m.mixer is not None}
    with torch.no_grad():
        for mixer in mixers.values():
            *_, last = mixer.operator.parameters()
            last.copy_(torch.randn(last.shape, generator=generator))
    alone = operator_moves(model, start)
    assert (alone["by_operator"] > 0).all()
    torch.testing.assert_close(
        torch.tensor(alone["moved"].to_numpy()), torch.tensor(alone["by_operator"].to_numpy()), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        for mixer in mixers.values():
            mixer.v.add_(0.5)  # moves the rows, and is not the operator's
    both = operator_moves(model, start)
    assert_close(both["by_operator"].to_list(), alone["by_operator"].to_list(), rtol=1e-4, atol=1e-5)
    assert (both["moved"] != alone["moved"]).all()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    operator_moves(model, start)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_rows_of_targets_are_those_of_the_plan():
    model, plan = expanded("llama")
    part = next(part for part in plan.layers if (part.layer, part.component) == (0, "channel"))
    gate = build("llama").model.layers[0].mlp.gate_proj.weight
    assert torch.equal(rows_of_targets(model)["model.layers.0.mlp.gate_proj"], gate[list(part.target)])


def test_a_plain_model_and_no_batches_are_refused():
    with pytest.raises(ValueError, match="the model is not expanded"):
        operator_share(build("llama"), BATCHES)
    model, _ = expanded("llama")
    with pytest.raises(ValueError, match="batches: need at least one"):
        operator_share(model, [])
    fuse(model)
