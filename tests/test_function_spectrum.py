"""Head products and hidden states against dense products and stacked states."""

import numpy as np
import pytest
import torch
from conftest import VARIANTS
from torch.nn.functional import linear

from apexlib.analysis.function_spectrum import head_table, hidden_table
from apexlib.analysis.spectrum import SPECTRAL_MEASURES, spectral_measures

pytestmark = pytest.mark.filterwarnings("ignore:.*experts' channels")
SEPARATE = [name for name in VARIANTS if name not in ("phi3", "gpt2") and not name.startswith("gpt_neox")]


@pytest.mark.parametrize("variant", SEPARATE)
def test_head_products_equal_the_dense_ones(variant, tiny_model):
    model = tiny_model(variant)
    config, table = model.config, head_table(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    served = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    layers = (model.model.decoder if variant.startswith("opt") else model.model).layers
    assert len(table) == len(layers) * config.num_attention_heads
    for row in table.itertuples():
        attention = layers[row.layer].self_attn
        output = next(getattr(attention, name) for name in ("o_proj", "dense", "out_proj") if hasattr(attention, name))
        value = attention.v_proj.weight[row.unit * head_dim :][:head_dim].double()
        head = row.unit * served + row.copy
        product = output.weight[:, head * head_dim :][:, :head_dim].double() @ value
        expected = spectral_measures(product)
        assert [getattr(row, name) for name in SPECTRAL_MEASURES] == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("variant", ["phi3", "gpt2", "gpt_neox"])
def test_head_products_of_fused_projections_follow_from_what_heads_do(variant, tiny_model):
    """One token attends to itself alone, so what attention writes is linear in it: the sum of W_V W_O x over heads."""
    model = tiny_model(variant, dtype=torch.float64)
    attention = {"gpt2": lambda m: m.transformer.h[1].attn, "phi3": lambda m: m.model.layers[1].self_attn}
    module = attention.get(variant, lambda m: m.gpt_neox.layers[1].attention)(model)
    reader = {"gpt2": "c_proj", "phi3": "o_proj"}.get(variant, "dense")
    heads = model.config.num_attention_heads
    seen = {}
    getattr(module, reader).register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    products = torch.zeros(heads, 16, 16, dtype=torch.float64)
    weight = getattr(module, reader).weight
    weight = weight.T if variant == "gpt2" else weight
    rope = (torch.ones(1, 1, 4, dtype=torch.float64), torch.zeros(1, 1, 4, dtype=torch.float64))
    for direction in range(17):  # the last one is zero: what biases alone give
        x = torch.eye(17, 16, dtype=torch.float64)[direction].view(1, 1, 16)
        with torch.no_grad():
            module(hidden_states=x, position_embeddings=rope, attention_mask=None)
        columns = [linear(h, w) for h, w in zip(seen["heads"].view(heads, 4), weight.split(4, dim=1), strict=True)]
        stack = torch.stack(columns)
        if direction < 16:
            products[:, :, direction] = stack
        else:
            products -= stack[:, :, None]
    table = head_table(model)
    mine = table[table["layer"] == 1]
    expected = [spectral_measures(product.detach())["effective_rank"] for product in products]
    assert mine["effective_rank"].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_hidden_states_are_those_of_the_model_without_padding(variant, tiny_model, batch):
    model = tiny_model(variant).train()
    table = hidden_table(model, [batch, batch])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        states = model.eval()(**batch, output_hidden_states=True).hidden_states
    keep = batch["attention_mask"].bool()
    assert table["layer"].tolist() == list(range(len(states)))
    assert set(table["tokens"]) == {2 * int(keep.sum())}
    for row, state in zip(table.itertuples(), states[:-1], strict=False):  # the last of them is normed
        expected = spectral_measures(torch.cat([state[keep]] * 2).double())
        assert [getattr(row, name) for name in SPECTRAL_MEASURES] == pytest.approx(expected.tolist(), rel=1e-5)


def test_hidden_states_come_batch_by_batch_and_must_be_finite(tiny_model, batch):
    model = tiny_model("llama", dtype=torch.float64)
    parts = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(2)]
    np.testing.assert_allclose(hidden_table(model, parts), hidden_table(model, [batch]), rtol=1e-7)
    with pytest.raises(ValueError, match="no batch was seen"):
        hidden_table(model, [])
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="hidden states at layer 1 hold NaN"):
        hidden_table(model, [batch])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
