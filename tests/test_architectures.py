"""The table of architectures: every unit of every family, exactly once; unknown models refused."""

import pandas as pd
import pytest
import torch
from conftest import VARIANTS, build
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
)

from apexlib import architectures
from apexlib.activations import activation_statistics, weight_norms
from apexlib.architectures import FAMILIES, Family, model_components, register_family
from apexlib.expansion import expand
from apexlib.selection import select

pytestmark = pytest.mark.filterwarnings("ignore:.*experts' channels are not units")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_slots_of_a_layer_cover_each_weight_once(variant, tiny_model):
    model = tiny_model(variant)
    claimed = {}
    for part in model_components(model):
        for slot in part.slots.values():
            claimed.setdefault((slot.module, slot.axis), []).append(slot.index.flatten())
    for (module, axis), indices in claimed.items():
        size = model.get_submodule(module).weight.shape[axis]
        assert torch.cat(indices).sort().values.tolist() == list(range(size)), module


@pytest.mark.case("Gemma 3 with pictures, by its text part", "works")
def test_the_multimodal_gemma3_is_covered_by_its_text_part(batch):
    text = build("gemma3").config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=47)
    table = activation_statistics(Gemma3ForConditionalGeneration(config).eval(), [batch])
    assert len(table) == 2 * (2 + 24)


@pytest.mark.case("decoders: any other model type, hybrids, MLA, state spaces", "refused")
def test_an_unknown_model_type_raises_and_lists_the_known():
    model = BertLMHeadModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match="model type 'bert' is not supported; known: apertus, arcee"):
        model_components(model)


class TwinConfig(LlamaConfig):
    model_type = "llama_twin"


def test_a_family_is_one_row_also_from_outside(monkeypatch, batch):
    monkeypatch.setattr(architectures, "FAMILIES", dict(FAMILIES))
    plain = build("llama")
    config = TwinConfig(**{**plain.config.to_dict(), "model_type": "llama_twin"})
    twin = type(plain)._from_config(config, attn_implementation="eager").eval()
    twin.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="model type 'llama_twin' is not supported"):
        model_components(twin)
    register_family("llama_twin", FAMILIES["llama"])
    register_family("llama_twin", FAMILIES["llama"])  # a notebook's cell runs twice
    assert activation_statistics(twin, [batch]).equals(activation_statistics(plain, [batch]))
    plan = select(activation_statistics(twin, [batch]))
    expand(twin, plan)
    assert torch.equal(twin(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: register_family("llama", FAMILIES["gpt2"]), "'llama': is known already, as another family"),
        (lambda: register_family("", FAMILIES["gpt2"]), "need a model_type, a string that is not empty"),
        (lambda: register_family("mine", {"query": "q"}), "and a Family, got str and dict"),
        (lambda: register_family("mine", Family(gate=None)), "gate: need the name of a module, got NoneType"),
    ],
)
def test_families_that_would_mislead_are_refused(register, message):
    known = dict(FAMILIES)
    with pytest.raises(ValueError, match=message):
        register()
    assert known == FAMILIES


def test_only_a_fused_projection_is_read_as_interleaved(monkeypatch, tiny_model):
    model, plain = tiny_model("llama"), model_components(tiny_model("llama"))
    monkeypatch.setitem(FAMILIES, "llama", Family(interleaved=True))
    for part, expected in zip(model_components(model), plain, strict=True):
        for role, slot in part.slots.items():
            assert torch.equal(slot.index, expected.slots[role].index), role


def test_modules_that_contradict_the_config_are_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(16, 20)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.v_proj: axis 0 has 20 entries; .* need 8"):
        model_components(model)
    model.model.layers[1].self_attn.v_proj.weight.data = torch.zeros(128)  # as sharding or quantising leaves it
    with pytest.raises(ValueError, match=r"self_attn.v_proj: weight of shape \(128,\); need a matrix"):
        model_components(model)


@pytest.mark.case("a model in a wrapper (PEFT, DDP)", "refused")
def test_a_wrapped_model_is_refused_with_advice(tiny_model):
    model = tiny_model("llama")
    wrapped = torch.nn.Module()
    wrapped.config, wrapped.module = model.config, model
    with pytest.raises(ValueError, match="need an unwrapped"):
        model_components(wrapped)


@pytest.mark.case("mixtures of experts: their attention; experts are no units", "partly")
def test_experts_are_announced_as_not_covered(tiny_model):
    with pytest.warns(UserWarning, match="mixtral: the experts' channels are not units here") as told:
        parts = model_components(tiny_model("mixtral"))
    assert [warning.filename for warning in told if "experts" in str(warning.message)] == [__file__]
    assert {part.component for part in parts} == {"head"}


def test_components_are_known_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2))
    assert [(part.component, part.units) for part in model_components(model)] == [("head", 32), ("channel", 11008)] * 2


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_weight_norms_add_up_to_the_norm_of_the_layer(variant, tiny_model):
    model = tiny_model(variant)
    table = weight_norms(model)
    assert table.index.equals(pd.RangeIndex(len(table)))
    norms = table.set_index(["layer", "component"])["weight_norm"]
    for part in model_components(model):
        modules = {slot.module for slot in part.slots.values()}
        total = sum(model.get_submodule(name).weight.double().square().sum().item() for name in modules)
        assert norms[part.layer, part.component].pow(2).sum() == pytest.approx(total, rel=1e-12)
