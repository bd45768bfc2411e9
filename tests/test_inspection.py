"""Tables of what trains and groups for an optimizer, where families and plain modules differ."""

import pytest
import torch
from conftest import build
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from apexlib.activations import activation_statistics
from apexlib.expansion import expand
from apexlib.inspection import parameter_groups, trainable_table
from apexlib.plan import ApexConfig
from apexlib.selection import select


def expanded(variant):
    model, batch = build(variant), {"input_ids": torch.arange(20).view(2, 10)}
    config = ApexConfig(fraction=0.25, direct_heads=0.5, direct_channels=0.6)
    return expand(model, select(activation_statistics(model, [batch]), config))


def test_a_weight_that_no_projection_splits_keeps_its_own_name():
    model = build("mixtral")
    names = {name for name, _ in model.named_parameters()}
    assert set(trainable_table(model)["weight"]) == names
    assert [name for name in names if name.rpartition(".")[2] not in ("weight", "bias")]


def test_plain_weights_come_first_in_the_order_of_the_model():
    table = trainable_table(expanded("llama"))
    plain = [name for name, _ in build("llama").named_parameters()]
    of_operators = table["kind"] == "operator"
    assert of_operators.any()
    assert table["weight"][~of_operators].tolist() == plain
    assert of_operators.is_monotonic_increasing


def test_by_default_all_learns_at_one_rate_and_nothing_decays():
    groups = parameter_groups(expanded("llama"), 3e-4)
    assert {group["name"] for group in groups} == {"operators", "scales", "weights"}
    assert {group["lr"] for group in groups} == {3e-4}
    assert {group["weight_decay"] for group in groups} == {0.0}


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_what_a_layer_holds_itself_is_of_no_kind(variant):
    model = build(variant)
    layers = {"gpt2": "transformer.h", "llama": "model.layers"}[variant]
    model.get_submodule(f"{layers}.1").extra = nn.Parameter(torch.zeros(1))
    table = trainable_table(model).set_index("weight")
    assert table.loc[f"{layers}.1.extra"].to_dict() == {"kind": "other", "trainable": 1, "total": 1, "share": 1.0}


def test_a_family_without_known_units_has_embeddings_and_norms_all_the_same():
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32, state_size=4)
    table = trainable_table(MambaForCausalLM(config)).set_index("weight")
    assert set(table["kind"]) == {"embedding", "norm", "other"}
    assert table.loc["backbone.embeddings.weight", "kind"] == "embedding"
    assert (table["share"] == 1).all()
