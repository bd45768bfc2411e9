"""Activation statistics against literal formulas, on every supported family."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from torch.testing import assert_close
from transformers.activations import ACT2FN

from apexlib.activations import (
    ActivationRecorder,
    _sum_of_squares,
    _UnitSums,
    _variation,
    activation_statistics,
    gradient_norms,
    weight_norms,
)
from apexlib.architectures import family_of, model_components

pytestmark = pytest.mark.filterwarnings("ignore:.*experts' channels are not units")

# where a reader of the architecture finds the gate, written out once more: module, columns of its output, activation
GATES = {
    "phi": ("fc1", lambda gate: gate, "gelu_new"),
    "phi3": ("gate_up_proj", lambda gate: gate[: len(gate) // 2], "silu"),
    "gpt2": ("c_fc", lambda gate: gate, "gelu_new"),
    "gpt_neox": ("dense_h_to_4h", lambda gate: gate, "gelu"),
    "opt": ("fc1", lambda gate: gate, "relu"),
    "gemma": ("gate_proj", lambda gate: gate, "gelu_pytorch_tanh"),
    "gemma2": ("gate_proj", lambda gate: gate, "gelu_pytorch_tanh"),
    "gemma3": ("gate_proj", lambda gate: gate, "gelu_pytorch_tanh"),
}


def seen_by_attention(model, batch, monkeypatch):
    """Outputs of the heads of each layer, (batch, tokens, heads, head_dim), from inside the attention function."""
    outputs = []
    modeling = sys.modules[type(model).__module__]
    eager = modeling.eager_attention_forward

    def spy(*args, **kwargs):
        output, weights = eager(*args, **kwargs)
        outputs.append(output.detach())
        return output, weights

    monkeypatch.setattr(modeling, "eager_attention_forward", spy)
    with torch.no_grad():
        model(**batch, use_cache=False)
    return outputs


def gate_inputs(model, variant, batch):
    """Input and weight (as rows of channels) and bias of the gate projection of every layer."""
    name, _, _ = GATES.get(variant.split("-")[0], ("gate_proj", None, "silu"))
    found, handles = [], []
    for path, module in model.named_modules():
        if path.endswith(name):
            handles.append(module.register_forward_pre_hook(lambda m, args: found.append((m, args[0].detach()))))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def naive_heads(outputs, batch, groups):
    """A_head per layer and group by loops over sequences, tokens and heads, padding left out."""
    tables = []
    for output in outputs:
        heads = output.shape[2]
        sums = [0.0] * groups
        for sequence in range(output.shape[0]):
            for token in range(output.shape[1]):
                if batch["attention_mask"][sequence, token]:
                    for head in range(heads):
                        squares = output[sequence, token, head].double().square()
                        sums[head // (heads // groups)] += squares.sum().item()
        tables.append(sums)
    return torch.tensor(tables, dtype=torch.float64)


def naive_channels(model, variant, batch):
    """A_ffn per layer and channel: f(x · w_gate) token by token, padding left out."""
    _, columns, activation = GATES.get(variant.split("-")[0], ("gate_proj", lambda gate: gate, "silu"))
    activate = ACT2FN[activation]
    tables = []
    for module, hidden in gate_inputs(model, variant, batch):
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        bias = 0 if module.bias is None else module.bias
        hidden = hidden.reshape(*batch["attention_mask"].shape, -1)
        sums = 0
        for sequence in range(hidden.shape[0]):
            for token in range(hidden.shape[1]):
                if batch["attention_mask"][sequence, token]:
                    gate = columns((weight @ hidden[sequence, token] + bias).detach())
                    sums = sums + activate(gate).double().square()
        tables.append(sums)
    return torch.stack(tables)


def activations(table, component):
    rows = table[table["component"] == component]
    values = torch.tensor((rows["activation"] * rows["tokens"]).to_numpy())
    return values.view(rows["layer"].nunique(), -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_equal_a_naive_double_loop(variant, tiny_model, batch, monkeypatch):
    model = tiny_model(variant, dtype=torch.float64)
    table = activation_statistics(model, [batch])
    groups = model_components(model)[0].units
    outputs = seen_by_attention(model, batch, monkeypatch)
    assert_close(activations(table, "head"), naive_heads(outputs, batch, groups), rtol=1e-6, atol=1e-9)
    if "channel" in set(table["component"]):
        assert_close(activations(table, "channel"), naive_channels(model, variant, batch), rtol=1e-6, atol=1e-9)
    assert set(table["tokens"]) == {int(batch["attention_mask"].sum())}


@pytest.mark.parametrize("variant", VARIANTS)
def test_perturbing_a_unit_moves_its_row_and_no_other(variant, tiny_model, batch):
    model = tiny_model(variant, dtype=torch.float64)
    before = activation_statistics(model, [batch]).set_index(["layer", "component", "unit"])["activation"]
    for part in model_components(model):
        roles = [role for role, slot in part.slots.items() if not slot.is_input and role != "up"]
        for role in roles:
            slot, unit = part.slots[role], part.units // 2
            weight = model.get_submodule(slot.module).weight
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.index_fill_(slot.axis, slot.index[unit].flatten(), 0.7)
            after = activation_statistics(model, [batch]).set_index(["layer", "component", "unit"])["activation"]
            with torch.no_grad():
                weight.copy_(kept)
            moved = (after - before).abs() > 1e-9 * before.abs().clip(lower=1e-3)
            here = moved[part.layer][part.component]
            assert here[unit], (part.layer, part.component, role)
            others = here.drop(unit)
            assert others.any() == (role in family_of(model).coupled), (part.layer, part.component, role)
            assert not moved[moved.index.get_level_values("layer") < part.layer].any()


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiler_sums_the_same_squares(masked):
    values = torch.randn(2, 400, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(800) % 3 > 0 if masked else None
    torch.compiler.reset()
    found = torch.compile(_sum_of_squares, backend="aot_eager", fullgraph=True)(values, tokens)
    kept = values.double().flatten(0, 1)[tokens if masked else slice(None)]
    assert_close(found.double(), kept.square().sum(0), rtol=1e-5, atol=0)
    assert_close(_sum_of_squares(values, tokens).double(), kept.square().sum(0), rtol=1e-5, atol=0)


def test_product_statistic_sees_the_input_of_the_output_projection(tiny_model, batch):
    model = tiny_model("llama", dtype=torch.float64)
    mlp = model.model.layers[0].mlp
    seen = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    table = activation_statistics(model, [batch], statistic="product")
    handle.remove()
    product = mlp.act_fn(mlp.gate_proj(seen[0])) * mlp.up_proj(seen[0])
    expected = product[batch["attention_mask"].bool()].square().sum(0)
    assert_close(activations(table, "channel")[0], expected.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["llama", "mistral", "gpt2", "opt", "phi3"])
def test_padding_does_not_count(variant, side, tiny_model):
    model = tiny_model(variant, dtype=torch.float64, attention="sdpa")
    ids = torch.randint(2, 40, (1, 7), generator=torch.Generator().manual_seed(2))
    pads = torch.full((1, 4), 1)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    mask = (torch.arange(11) >= 4 if side == "left" else torch.arange(11) < 7).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = activation_statistics(model, [{"input_ids": ids}])
    other = activation_statistics(model, [{"input_ids": padded, "attention_mask": mask, "position_ids": positions}])
    assert_close(torch.tensor(other["activation"]), torch.tensor(plain["activation"]), rtol=1e-6, atol=1e-9)
    assert other["rank_score"].equals(plain["rank_score"])


def test_mean_activation_does_not_depend_on_the_batch_split(tiny_model):
    model = tiny_model("llama", dtype=torch.float64)
    ids = torch.randint(2, 40, (6, 100), generator=torch.Generator().manual_seed(3))  # in all, more rows than one chunk
    whole = activation_statistics(model, [{"input_ids": ids}])
    for sizes in ([1] * 6, [4, 2], [2, 4]):
        split = activation_statistics(model, [{"input_ids": part} for part in ids.split(sizes)])
        assert_close(torch.tensor(split["activation"]), torch.tensor(whole["activation"]), rtol=1e-6, atol=0)
        assert set(split["batches"]) == {len(sizes)}


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_counts_each_pass_once(variant, checkpointing, tiny_model, batch):
    expected = activation_statistics(tiny_model(variant), [batch, batch])
    model = tiny_model(variant).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    with ActivationRecorder(model) as recorder:
        for _ in range(2):
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert_close(
        torch.tensor(recorder.table().to_numpy()[:, 3:].astype(float)),
        torch.tensor(expected.to_numpy()[:, 3:].astype(float)),
    )


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_hooks_are_gone_and_the_mode_is_restored_also_after_an_error(tiny_model, batch):
    model = tiny_model("llama").train()
    before = hooks(model)
    activation_statistics(model, [batch])
    assert hooks(model) == before
    assert model.training
    with pytest.raises(IndexError):
        activation_statistics(model, [batch, {"input_ids": torch.tensor([[10**6]])}])
    assert hooks(model) == before
    assert model.training


def test_a_failed_pass_is_not_counted(tiny_model, batch):
    model = tiny_model("llama")
    with ActivationRecorder(model) as recorder:
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**6]]))
        model(**batch)
        assert recorder.batches == 1
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**6]]))
        model.model(**batch)  # what failed was a pass of the whole model, this is one of a part
    assert recorder.batches == 2
    assert_close(
        torch.tensor(recorder.table()["activation"]), torch.tensor(activation_statistics(model, [batch])["activation"])
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_activation_names_layer_and_batch(value, tiny_model, batch):
    model = tiny_model("llama-mha-bias")
    good = {name: tensor.clone() for name, tensor in batch.items()}
    recorder = ActivationRecorder(model)
    with recorder:
        model(**good)
        with torch.no_grad():
            model.model.layers[1].mlp.gate_proj.bias[5] = value
        with pytest.raises(ValueError, match=r"batch 1: channel 5 of layer 1 has a NaN or infinite"):
            model(**good)
    assert recorder.batches == 1


def test_wrong_use_is_met_with_the_value_and_the_need(tiny_model, batch):
    model = tiny_model("llama")
    for top in (0, 0.51, -1):
        with pytest.raises(ValueError, match=rf"top = {top}: need a fraction above 0 and at most 0.5"):
            activation_statistics(model, [batch], top=top)
    assert len(activation_statistics(model, [batch], top=0.5))
    with pytest.raises(ValueError, match="statistic 'up': need 'gate' or 'product'"):
        activation_statistics(model, [batch], statistic="up")
    with pytest.raises(ValueError, match="no batch was seen"):
        activation_statistics(model, [])
    with pytest.raises(ValueError, match=r"need a tensor of shape \(batch, tokens\)"):
        activation_statistics(model, [{"input_ids": batch["input_ids"], "attention_mask": torch.ones(2, 1, 9, 9)}])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rank_score_and_moving_averages_equal_their_definitions(data):
    units = data.draw(st.integers(1, 9))
    top = data.draw(st.sampled_from([0.1, 0.1875, 0.3, 0.5]))
    values = st.lists(st.integers(0, 3), min_size=units, max_size=units)  # few values: many ties
    batches = data.draw(st.lists(values, min_size=1, max_size=5))

    class Part:
        pass

    Part.units = units
    sums = _UnitSums([Part], top)
    for batch in batches:
        sums.add(torch.tensor([batch], dtype=torch.float64), tokens=2)

    count = min(max(1, int(top * units)), units // 2)

    def decay(old, new):
        pairs = zip(old or new, new, strict=True)
        return [0.9 * before + 0.1 * now for before, now in pairs]

    score, ema, ema_rank = [0] * units, None, None
    for batch in batches:
        order = sorted(range(units), key=lambda unit: (batch[unit], unit))
        sign = [(unit in order[units - count :]) - (unit in order[:count]) for unit in range(units)]
        score = [s + d for s, d in zip(score, sign, strict=True)]
        ema, ema_rank = decay(ema, [value / 2 for value in batch]), decay(ema_rank, sign)
    assert sums.rank_score[0].tolist() == score
    assert not sums.rank_score.is_floating_point()  # a count
    assert_close(sums.ema[0], torch.tensor(ema, dtype=torch.float64))
    assert_close(sums.ema_rank[0], torch.tensor(ema_rank, dtype=torch.float64))
    assert sums.rank_score.sum() == 0  # as many in the Top-K as in the Min-K


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=2, max_size=6))
def test_what_processes_have_seen_adds_up_and_moving_averages_become_their_mean(batches):
    def sums_of(rows):
        sums = _UnitSums([SimpleNamespace(units=5)], 0.3)
        for row in rows:
            sums.add(torch.tensor([row], dtype=torch.float64), tokens=2)
        return sums

    whole, parts = sums_of(batches), [sums_of(batches[0::2]), sums_of(batches[1::2])]
    combined = sums_of(batches[:1])
    combined.combine(parts)
    for name in ("total", "rank_score"):
        assert_close(getattr(combined, name), getattr(whole, name))
    for name in ("ema", "ema_rank"):
        assert_close(getattr(combined, name), (getattr(parts[0], name) + getattr(parts[1], name)) / 2)


def test_one_process_alone_has_nothing_to_gather_and_a_state_goes_on(tiny_model, batch):
    model = tiny_model("llama", dtype=torch.float64)
    recorder, later = ActivationRecorder(model, training_only=True), ActivationRecorder(model)
    with recorder:
        model.eval()(**batch)
        assert recorder.batches == 0
        model.train()(**batch)
    recorder.gather()
    later.load_state(recorder.state())
    assert_frame_equal(later.table(), recorder.table())
    expected = activation_statistics(model, [batch, {"input_ids": batch["input_ids"]}])
    with later:
        model(input_ids=batch["input_ids"])
    assert_frame_equal(later.table(), expected)


def test_gathering_takes_what_every_process_has_seen(tiny_model, batch, monkeypatch):
    model = tiny_model("llama", dtype=torch.float64)
    part = {name: tensor[:1] for name, tensor in batch.items()}
    recorders = [ActivationRecorder(model) for _ in range(3)]
    for recorder, seen in zip(recorders, ([batch], [part, batch], [batch, part, batch]), strict=True):
        with recorder, torch.no_grad():
            for each in seen:
                model(**each)
    here, there, both = recorders

    def exchange(states, mine):
        assert mine == (here.tokens, here.batches, here._sums)
        states[:] = [mine, (there.tokens, there.batches, there._sums)]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", exchange)
    here.gather()
    columns = ["activation", "rank_score", "tokens", "batches"]
    assert_frame_equal(here.table()[columns], both.table()[columns])


def test_units_keep_their_numbers_when_a_layer_runs_its_inputs_in_another_order(tiny_model, batch):
    model = tiny_model("llama", dtype=torch.float64)
    reader = model.get_submodule(model_components(model)[-1].reader.module)
    plain = activations(activation_statistics(model, [batch]), "channel")[-1]
    orders = [torch.randperm(len(plain), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    changed = orders[0].clone()
    with ActivationRecorder(model) as recorder, torch.no_grad():
        for order in (None, orders[0], orders[1], changed, orders[2], None):
            reader.input_order = order if order is not orders[2] else changed.copy_(order)  # in place
            before = recorder.state()["sums"]["channel"]["total"][-1].clone()
            model(**batch)
            gained = recorder.state()["sums"]["channel"]["total"][-1] - before
            assert_close(gained if order is None else gained[order], plain, rtol=1e-6, atol=1e-9)


def test_imbalance_does_not_depend_on_the_size_of_activations():
    for size in (1e-12, 1.0, 1e12):
        assert _variation(torch.tensor([1.0, 3.0], dtype=torch.float64) * size).item() == pytest.approx(0.5)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_component_of_one_unit_has_no_imbalance(heads, tiny_model, batch):
    model = tiny_model("llama", dtype=torch.float64, num_attention_heads=heads, num_key_value_heads=heads)
    with ActivationRecorder(model, differentiable=True) as recorder:
        model(**batch)
    table = activation_statistics(model, [batch])
    several = table if heads > 1 else table.query("component == 'channel'")
    groups = several.groupby(["layer", "component"])["activation"]
    assert recorder.imbalance.item() == pytest.approx((groups.std(ddof=0) / groups.mean()).mean(), rel=1e-9)


def test_a_cache_or_an_all_padding_batch_does_not_confuse_the_count(tiny_model, batch):
    model = tiny_model("llama")
    with ActivationRecorder(model) as recorder, torch.no_grad():
        cached = model(**batch, use_cache=True).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.tensor([[1], [0]])], dim=1)  # one new token is padding
        model(input_ids=torch.tensor([[4], [5]]), attention_mask=mask, past_key_values=cached)
        model(input_ids=batch["input_ids"], attention_mask=torch.zeros_like(mask[:, :-1]))
    assert recorder.tokens == int(batch["attention_mask"].sum()) + 1
    assert recorder.batches == 2


def test_weight_norms_have_a_row_for_every_unit(tiny_model):
    table = weight_norms(tiny_model("llama"))
    assert table.groupby("component", sort=False).size().to_dict() == {"head": 4, "channel": 48}
    assert (table["weight_norm"] > 0).all()


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_gradient_norms_are_those_of_the_mean_loss_over_labelled_tokens(variant, tiny_model):
    model = tiny_model(variant).double().train()
    ids = torch.arange(60).view(4, 15) * 7 % 48
    labels = ids.masked_fill(torch.rand(4, 15, generator=torch.Generator().manual_seed(0)) < 0.4, -100)
    rows = {"input_ids": ids, "labels": labels}
    nothing = {"input_ids": ids[:1], "labels": torch.full((1, 15), -100)}
    batches = [{name: value[part] for name, value in rows.items()} for part in (slice(1), slice(1, 4))]
    table = gradient_norms(model.requires_grad_(False), [*batches, nothing])
    assert model.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())

    logits = model.requires_grad_(True).eval()(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    norms = table.set_index(["layer", "component", "unit"])["gradient_norm"]
    for part in model_components(model):
        for unit in range(part.units):
            total = 0.0
            for slot in part.slots.values():
                gradient = model.get_submodule(slot.module).weight.grad
                total += gradient.index_select(slot.axis, slot.index[unit].flatten()).square().sum().item()
            found = norms[part.layer, part.component, unit]
            assert found == pytest.approx(math.sqrt(total), rel=1e-6)  # the loss is float32


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], "batches: no labels, only input_ids"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}], "no labelled token"),
        ([], "no labelled token"),
    ],
)
def test_gradients_of_nothing_are_refused(batches, message, tiny_model):
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        gradient_norms(model, batches)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required


def test_gradients_of_half_precision_add_up_in_float32(tiny_model):
    model = tiny_model("llama").bfloat16()
    ids = torch.arange(30).view(2, 15) * 7 % 48
    batch = {"input_ids": ids, "labels": ids}
    once, often = (gradient_norms(model, [batch] * times) for times in (1, 100))
    assert_close(torch.tensor(often["gradient_norm"]), torch.tensor(once["gradient_norm"]), rtol=1e-6, atol=0)
