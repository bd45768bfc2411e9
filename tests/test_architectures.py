"""The table of architectures: every unit of every family, exactly once; unknown models refused."""

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

from apexlib.activations import activation_statistics
from apexlib.architectures import FAMILIES, model_components, unit_weight_norms

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


def test_every_listed_family_has_a_test_model():
    assert {family for family, _ in VARIANTS.values()} | {"gemma3"} == set(FAMILIES)


def test_the_multimodal_gemma3_is_covered_by_its_text_part(batch):
    text = build("gemma3").config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=47)
    table = activation_statistics(Gemma3ForConditionalGeneration(config).eval(), [batch])
    assert len(table) == 2 * (2 + 24)


def test_an_unknown_model_type_raises_and_lists_the_known():
    model = BertLMHeadModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match="model type 'bert' is not supported; known: gemma, gemma2"):
        model_components(model)


def test_modules_that_contradict_the_config_are_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(16, 20)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.v_proj: axis 0 has 20 entries; .* need 8"):
        model_components(model)


def test_a_wrapped_model_is_refused_with_advice(tiny_model):
    model = tiny_model("llama")
    wrapped = torch.nn.Module()
    wrapped.config, wrapped.module = model.config, model
    with pytest.raises(ValueError, match="need an unwrapped"):
        model_components(wrapped)


def test_experts_are_announced_as_not_covered(tiny_model):
    with pytest.warns(UserWarning, match="mixtral: the experts' channels are not units here"):
        parts = model_components(tiny_model("mixtral"))
    assert {part.component for part in parts} == {"head"}


def test_components_are_known_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2))
    assert [(part.component, part.units) for part in model_components(model)] == [("head", 32), ("channel", 11008)] * 2


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_weight_norms_add_up_to_the_norm_of_the_layer(variant, tiny_model):
    model = tiny_model(variant)
    for part in model_components(model):
        modules = {slot.module for slot in part.slots.values()}
        total = sum(model.get_submodule(name).weight.double().square().sum() for name in modules)
        torch.testing.assert_close(unit_weight_norms(model, part).square().sum(), total)
