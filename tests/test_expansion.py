"""Expand, train, fuse: the laws of METHOD 4 on every family, against slow literal formulas in float64."""

import copy
import pickle
import random
import subprocess
import sys

import conftest
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from apexlib.activations import ActivationRecorder, activation_statistics
from apexlib.analysis.budget import equal_statistics
from apexlib.architectures import model_components
from apexlib.evaluation import in_evaluation, perplexity
from apexlib.expansion import Mixer, expand, expand_rows, fuse, is_expanded
from apexlib.inspection import composed_weights, parameter_groups, trainable_table
from apexlib.operators import OPERATORS, make_operator
from apexlib.plan import ApexConfig, ExpansionPlan, LayerPlan
from apexlib.projections import SplitProjection, composed_once
from apexlib.selection import select

pytestmark = pytest.mark.filterwarnings("ignore:.*experts' channels are not units", "ignore:.*is deprecated")

EVERY = {"train_embeddings": True, "train_norms": True}
OPERATOR_KINDS = tuple(OPERATORS)
# four groups of two query heads, since with two groups every order is its own inverse and no pair has a neighbour
GROUPED = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
VARIANTS = (
    *conftest.VARIANTS,
    *(f"{family} grouped" for family in ("llama", "qwen3", "phi", "phi3", "olmo2", "mixtral")),
)


def build(variant, **options):
    """A tiny model; "grouped" ones have more units than those that all tests share."""
    family, _, grouped = variant.partition(" ")
    return conftest.build(family, **(GROUPED if grouped else {}), **options)


def layer_plan(part, pairs, direct, order):
    """A plan for `part` with that many units, taken from the front of `order`."""
    cuts = (order[:pairs], order[pairs : 2 * pairs], order[2 * pairs : 2 * pairs + direct])
    target, source, direct = (tuple(sorted(units)) for units in cuts)
    return LayerPlan(part.layer, part.component, source, target, direct, part.units)


def varied_plan(model, seed=0):
    """Pairs and direct units of every layer and component, numbers and units drawn from a seed."""
    draw = random.Random(seed)
    layers = []
    for part in model_components(model):
        pairs = draw.randint(min(1, part.units // 2), part.units // 2)
        direct = draw.randint(0 if pairs else 1, part.units - 2 * pairs)
        layers.append(layer_plan(part, pairs, direct, draw.sample(range(part.units), part.units)))
    return ExpansionPlan(tuple(layers))


@st.composite
def plans(draw, model):
    """Any plan: k odd, prime, 1 or n/2, with or without direct units, layers and components left out."""
    layers = []
    for part in model_components(model):
        pairs = draw(st.integers(0, part.units // 2))
        direct = draw(st.integers(0, part.units - 2 * pairs))
        if pairs + direct:
            layers.append(layer_plan(part, pairs, direct, draw(st.permutations(range(part.units)))))
    return ExpansionPlan(tuple(layers)) if layers else varied_plan(model)


def perturb(model, size=0.1, seed=0):
    """Move everything that trains, operators and scales too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def train(model, batch, steps=3, lr=1e-2, **groups):
    """Take real AdamW steps in training mode."""
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, **groups))
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def logits(model, batch, *, training=False):
    was_training = model.training
    model.train(training)
    try:
        return model(**batch, use_cache=False).logits
    finally:
        model.train(was_training)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, expected):
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def projections(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitProjection)}


def bodies(model):
    """What makes a model a plain one: classes, attributes, parameters and their flags, hooks, modes."""
    described = {}
    for name, module in model.named_modules():
        own = {key: repr(value) for key, value in vars(module).items() if not key.startswith("_") and key != "config"}
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        parameters = {
            key: (p.dtype, tuple(p.shape), p.requires_grad, p.device, type(p))
            for key, p in module._parameters.items()
            if p is not None
        }
        described[name] = (
            id(module),
            type(module),
            list(module._parameters),
            list(module._buffers),
            own,
            hooks,
            parameters,
        )
    return described


def expanded(variant, seed=0, **options):
    model = build(variant, **{key: options.pop(key) for key in ("dtype", "attention") if key in options})
    return expand(model, varied_plan(model, seed), **options)


# the function


@pytest.mark.parametrize("variant", VARIANTS)
def test_expanding_keeps_every_bit_and_fusing_keeps_the_function(variant, batch):
    base = build(variant)
    model = expanded(variant, **EVERY)
    assert torch.equal(logits(model, batch), logits(base, batch))
    assert_close(logits(model, batch, training=True), logits(base, batch), atol=1e-5, rtol=1e-5)
    perturb(model)
    for change in (lambda: None, lambda: train(model, batch)):
        change()
        fused = fuse(copy.deepcopy(model))
        assert not torch.allclose(logits(fused, batch), logits(base, batch), atol=1e-2)  # there is something to keep
        assert torch.equal(logits(model, batch), logits(fused, batch))
        assert_close(logits(model, batch, training=True), logits(fused, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "variant", ["llama grouped", "llama-mha-bias", "qwen3", "phi3 grouped", "olmo2 grouped", "gpt2", "gpt_neox", "opt"]
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_plan_keeps_the_function(variant, data, batch):
    # in float32 rounding alone may pass the bound; norms and softmax still round to it inside transformers
    model = build(variant, dtype=torch.float64)
    before = logits(model, batch)
    operator = data.draw(st.sampled_from(OPERATOR_KINDS))
    expand(model, data.draw(plans(model)), operator=operator, train_embeddings=data.draw(st.booleans()))
    assert torch.equal(logits(model, batch), before)
    perturb(model)
    split, plain = logits(model, batch, training=True), logits(model, batch)
    assert torch.equal(logits(fuse(model), batch), plain)
    assert_close(split, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pairs", [0, 1, 3, 7, 12])
def test_every_number_of_pairs_and_no_frozen_unit_at_all(pairs, batch):
    model = build("llama")
    order = random.Random(pairs).sample(range(24), 24)
    plan = [
        layer_plan(part, min(pairs, part.units // 2), 24, order if part.units == 24 else [1, 0])
        for part in model_components(model)
    ]
    expand(model, ExpansionPlan(tuple(plan)))
    assert all(len(module.frozen) == 0 for module in projections(model).values())
    perturb(model)
    split = logits(model, batch, training=True)
    assert_close(split, logits(fuse(model), batch), atol=1e-5, rtol=1e-5)


# the formula


def literal(base, part, plan, rows, matrix, v, scales):
    """METHOD 4 by loops over units in the model's own numbering: each weight (and bias) of the component.

    `rows[module, leaf]` lists the trained slices by their index in the plain weight; everything may need gradients.
    """
    weights = {}
    for role, slot in part.slots.items():
        module = base.get_submodule(slot.module)
        for leaf in ("weight", "bias"):
            plain = getattr(module, leaf)
            if plain is None or (leaf == "bias" and slot.is_input):
                continue
            axis = slot.axis if leaf == "weight" else 0
            start = list(plain.detach().movedim(axis, 0).unbind())
            for index, row in rows[slot.module, leaf].items():
                start[index] = row
            stack = weights.get((slot.module, leaf), (list(start), axis))[0]
            weights[slot.module, leaf] = (stack, axis)
            if role in ("query", "key"):
                continue
            _, copies, dim = slot.index.shape
            for i, target in enumerate(plan.target):
                for query_head in range(copies):
                    for a in range(dim):
                        here = slot.index[target, query_head, a]
                        mixed = v[i * dim + a] * start[here]
                        for j, source in enumerate(plan.source):
                            for b in range(dim):
                                there = slot.index[source, query_head, b]
                                mixed = mixed + matrix[i * dim + a, j * dim + b] * start[there]
                        stack[here] = mixed
            if not slot.is_input:
                for j, source in enumerate(plan.source):
                    for b in range(dim):
                        here = slot.index[source, 0, b]
                        stack[here] = scales[role][j * dim + b] * start[here]
    return {f"{name}.{leaf}": torch.stack(stack).movedim(0, axis) for (name, leaf), (stack, axis) in weights.items()}


def literal_weights(base, model, plan):
    """Every expanded weight of `model` by the literal formula, differentiable in the parameters of `model`."""
    parts = {(part.layer, part.component): part for part in model_components(base)}
    weights = {}
    for layer in plan.layers:
        part = parts[layer.layer, layer.component]
        rows, scales, matrix, v = {}, {}, None, None
        for role, slot in part.slots.items():
            split = model.get_submodule(slot.module)
            for leaf, tensor in (("weight", split.rows), ("bias", split.bias_rows)):
                if tensor is not None:
                    places = split.order[: len(tensor)].tolist()
                    rows[slot.module, leaf] = dict(zip(places, tensor.unbind(), strict=True))
            if layer.source:
                matrix, v = split.mixer.operator.dense(), split.mixer.v
                if role not in ("query", "key") and not slot.is_input:
                    scales[role] = split.s[
                        [
                            r for r, s in part.slots.items() if s.module == slot.module and r not in ("query", "key")
                        ].index(role)
                    ]
        weights |= literal(base, part, layer, rows, matrix, v, scales)
    return weights


@given(
    k=st.integers(1, 3), direct=st.integers(0, 2), d=st.integers(1, 3), scaled=st.booleans(), seed=st.integers(0, 99)
)
@settings(max_examples=20, deadline=None)
def test_the_formula_is_the_formula(k, direct, d, scaled, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2 * k + direct, d), (k, k), (k,), (k,))
    rows, matrix, v, s = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    found = expand_rows(rows, lambda source: matrix @ source, v, s if scaled else None)
    expected = rows.clone()
    for column in range(d):
        for i in range(k):
            expected[i, column] = v[i] * rows[i, column]
            expected[i, column] += sum(matrix[i, j] * rows[k + j, column] for j in range(k))
            expected[k + i, column] *= s[i] if scaled else 1
    assert_close(found, expected)


class Norm64(nn.Module):
    """An RMS norm that stays in float64; the stock ones compute in float32 and would hide small errors."""

    def __init__(self, plain):
        super().__init__()
        self.weight = plain.weight

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.fixture
def softmax64(monkeypatch):
    """A softmax that keeps float64, where the stock models ask for float32."""
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim=-1, dtype=None: x.softmax(dim))


def exact(variant):
    """A float64 model whose norms stay in float64."""
    model = build(variant, dtype=torch.float64)
    for name, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Norm64(module))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_gradients_equal_the_literal_formula(variant, batch, softmax64):
    base, model = exact(variant), exact(variant)
    plan = varied_plan(base, seed=3)
    expand(model, plan)
    for name, module in projections(model).items():  # at the start, `order` says where each slice came from
        plain = base.get_submodule(name)
        slices = torch.cat([module.rows, module.frozen])
        assert torch.equal(slices, plain.weight.movedim(module.layout.axis, 0)[module.order])
    perturb(model, 0.3)
    weights = literal_weights(base, model, plan)
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        assert_close(
            getattr(model.get_submodule(path), leaf), weight, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    plain = dict(base.named_parameters())
    others = {name: p for name, p in model.named_parameters() if name in plain and p.requires_grad}  # embeddings, head
    found = model.train()(**batch, use_cache=False).logits
    expected = functional_call(base.train(), {**weights, **others}, kwargs={**batch, "use_cache": False}).logits
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    pairs = zip(
        names,
        torch.autograd.grad((found * direction).sum(), parameters),
        torch.autograd.grad((expected * direction).sum(), parameters),
        strict=True,
    )
    for name, ours, theirs in pairs:
        scale = max(1.0, theirs.abs().max().item())
        assert_close(ours / scale, theirs / scale, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("operator", OPERATOR_KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_composition_has_exact_gradients(operator, count):
    generator = torch.Generator().manual_seed(0)
    mixer = Mixer(make_operator(operator, 6, generator=generator), dim=3).double()
    perturb(mixer, 0.5)
    wide = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    matrices = [torch.randn(2 * 6 + 2 * 3, 2 + number, **wide) for number in range(count)]
    scales = [torch.randn(1, 6, **wide) for _ in range(count - 1)]
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def composed(*inputs):
        given, values = (inputs[:count], [*inputs[count : 2 * count - 1], None]), inputs[2 * count - 1 :]
        return functional_call(mixer, dict(zip(names, values, strict=True)), (*given, torch.float64))

    inputs = (*matrices, *scales, *parameters)
    for found, rows, s in zip(composed(*inputs), matrices, [*scales, None], strict=True):
        assert_close(found, expand_rows(rows, mixer.operator, mixer.v, None if s is None else s[0]))
    assert torch.autograd.gradcheck(composed, inputs)
    assert torch.autograd.gradgradcheck(composed, inputs)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox", "phi3", "olmo2 grouped"])
def test_gradients_in_evaluation_mode_are_those_of_training_mode(variant, batch):
    model = perturb(expanded(variant, dtype=torch.float64))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((model.train(mode)(**batch, use_cache=False).logits * direction).sum(), parameters)
        for mode in (True, False)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


# what trains and what does not


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_is_planned_trains(variant, batch):
    base, model = build(variant), build(variant)
    plan = varied_plan(model)
    train_norms = "qwen" in variant
    model(**batch, labels=batch["input_ids"]).loss.backward()  # gradients from before must not linger
    expand(model, plan, train_embeddings="gpt" in variant, train_norms=train_norms)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train(model, batch)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert set(map(id, optimizer.state)) == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    fuse(model)
    planned = {(layer.layer, layer.component): layer for layer in plan.layers}
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in base.named_parameters()}
    for part in model_components(base):
        layer = planned[part.layer, part.component]
        for slot in part.slots.values():
            units = slot.index[[*layer.target, *layer.source, *layer.direct]].flatten()
            kept[f"{slot.module}.weight"].index_fill_(slot.axis, units, False)
            if not slot.is_input and base.get_submodule(slot.module).bias is not None:
                kept[f"{slot.module}.bias"][units] = False
    for name, parameter in model.named_parameters():
        start = base.get_parameter(name)
        if name in trainable:  # embeddings, norms
            assert not torch.equal(parameter, start), name
        else:
            assert torch.equal(parameter[kept[name]], start[kept[name]]), name
            if not kept[name].all():
                assert not torch.equal(parameter, start), name


@pytest.mark.parametrize("train_embeddings", [True, False])
@pytest.mark.parametrize("train_norms", [True, False])
@pytest.mark.parametrize("variant", ["llama", "phi", "gpt2", "opt"])
def test_embeddings_head_and_norms_train_on_request(variant, train_embeddings, train_norms):
    model = build(variant)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    expand(model, varied_plan(model), train_embeddings=train_embeddings, train_norms=train_norms)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert {p.requires_grad for p in module.parameters()} == {train_embeddings}
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm) or "RMS" in type(module).__name__]
    assert norms
    assert {p.requires_grad for module in norms for p in module.parameters()} == {train_norms}


def test_optimizer_groups_scale_operators_and_spare_vectors():
    model = expanded("llama-mha-bias", **EVERY)
    groups = {g["name"]: g for g in parameter_groups(model, 1e-3, operator_lr_scale=3.0, weight_decay=0.1)}
    names = {id(p): name for name, p in model.named_parameters()}
    members = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert all(".operator." in name for name in members["operators"])
    assert all(name.endswith((".v", ".s")) for name in members["scales"])
    assert all(name.endswith(("rows", "embed_tokens.weight", "lm_head.weight")) for name in members["weights"])
    assert all(name.endswith(("bias_rows", "norm.weight")) for name in members["vectors"])
    assert sum(map(len, members.values())) == sum(p.requires_grad for p in model.parameters())
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "operators": (3e-3, 0.1),
        "scales": (3e-3, 0.0),
        "weights": (1e-3, 0.1),
        "vectors": (1e-3, 0.0),
    }
    assert [g["name"] for g in parameter_groups(build("llama"), 1e-3)] == ["weights", "vectors"]


@pytest.mark.parametrize("statistic", ["gate", "product"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_of_an_expanded_model_number_units_as_the_plain_model(variant, statistic, batch):
    plain, model = build(variant, dtype=torch.float64), expanded(variant, dtype=torch.float64)
    expected = activation_statistics(plain, [batch], statistic=statistic)
    with ActivationRecorder(model.train(), statistic=statistic) as recorder:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        in_training = recorder.table()
        model.eval()(**batch)  # where inputs run in the order of the plain model again
    assert_close(torch.tensor(recorder.table()["activation"]), torch.tensor(in_training["activation"]))
    assert not any(getattr(module, "observers", None) for module in model.modules())
    for found in (in_training, activation_statistics(model.train(), [batch], statistic=statistic)):
        columns = ["layer", "component", "unit", "rank_score", "ema_rank", "tokens", "batches"]
        assert found[columns].equals(expected[columns])
        assert_close(torch.tensor(found["activation"]), torch.tensor(expected["activation"]), rtol=1e-6, atol=1e-9)


# there and back


EACH_PROJECTION = ("llama-mha-bias", "gpt2", "phi3", "gpt_neox", "gemma")


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, torch.float32) for variant in VARIANTS]
    + [(variant, dtype) for variant in EACH_PROJECTION for dtype in (torch.float64, torch.bfloat16, torch.float16)],
)
def test_fusing_at_the_start_gives_the_base_back(variant, dtype):
    model = build(variant, dtype=dtype)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.train() if hasattr(model, "model") else model.train()
    config, before, body = copy.deepcopy(model.config), state(model), bodies(model)
    for options in ({}, EVERY, {"train_embeddings": False}):
        expand(model, varied_plan(model), **options)
        assert is_expanded(model)
        fuse(model)
        assert not is_expanded(model)
        assert_same_state(model, before)
        assert bodies(model) == body
        assert model.config.to_dict() == config.to_dict()
        assert not {"save_pretrained", "push_to_hub", "_expansion"} & set(vars(model))


def test_twenty_cycles_leave_every_bit(batch):
    model = build("gpt2", dtype=torch.bfloat16)
    before, body = state(model), bodies(model)
    for seed in range(20):
        fuse(expand(model, varied_plan(model, seed), operator=OPERATOR_KINDS[seed % 4], **EVERY))
    assert_same_state(model, before)
    assert bodies(model) == body


def test_the_seed_alone_draws_the_operators():
    torch.manual_seed(1)
    first = state(expanded("llama", seed=1))
    expected = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), expected)  # expanding draws nothing from the global generator
    second, other = build("llama"), build("llama")
    expand(second, varied_plan(second, 1), seed=0)  # as it is where none is given
    assert_same_state(second, first)
    expand(other, varied_plan(other, 1), seed=7)
    assert any(not torch.equal(tensor, first[name]) for name, tensor in other.state_dict().items())


def test_a_state_loads_into_a_model_expanded_by_the_same_plan_or_one_of_the_same_size(batch):
    model = perturb(expanded("llama"))
    twin, other = expanded("llama"), build("llama")
    mirrored = [
        LayerPlan(
            p.layer,
            p.component,
            *(tuple(sorted(p.units - 1 - u for u in r)) for r in (p.source, p.target, p.direct)),
            p.units,
        )
        for p in varied_plan(other).layers
    ]
    expand(other, ExpansionPlan(tuple(mirrored)))
    for loaded in (twin, other):
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(logits(loaded, batch, training=True), logits(model, batch, training=True))
        assert_same_state(fuse(loaded), state(fuse(copy.deepcopy(model))))


@pytest.mark.case("a cache of keys and values filled in evaluation, used in training", "refused")
@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox"])
def test_a_cache_that_numbers_heads_otherwise_is_refused_in_training(variant, batch):
    model = expanded(variant)
    tokens = batch["input_ids"]
    with torch.no_grad():
        cached = model.eval()(input_ids=tokens[:, :-1], use_cache=True).past_key_values
        step = {"input_ids": tokens[:, -1:], "past_key_values": cached}
        with pytest.raises(
            ValueError, match=rf"past_key_values of {tokens.shape[1] - 1} tokens: .* need an empty cache"
        ):
            model.train()(**step)
        whole = model.eval()(input_ids=tokens).logits[:, -1]
        torch.testing.assert_close(model(**step).logits[:, -1], whole, rtol=1e-4, atol=1e-5)
        model.train()(input_ids=tokens)  # which fills a cache of its own
        hooks = [*fuse(model).base_model._forward_pre_hooks]
    assert hooks == []


@pytest.mark.case("`copy.deepcopy` and pickling of an expanded model", "works")
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_independent_and_whole(clone, dtype, batch):
    model = perturb(expanded("llama-mha-bias", dtype=dtype, **EVERY))
    before = state(model)
    twin = clone(model)
    assert_same_state(twin, before)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    mlp = twin.model.layers[0].mlp
    assert mlp.gate_proj.mixer is mlp.up_proj.mixer is mlp.apex_channel
    assert mlp.apex_channel is not model.model.layers[0].mlp.apex_channel
    train(twin, batch)
    assert_same_state(model, before)
    fused = logits(twin, batch)
    assert torch.equal(logits(fuse(twin), batch), fused)


@pytest.mark.case(
    "`save_pretrained` of an expanded model, by any Trainer: the plain model, tied weights and bfloat16 too", "works"
)
@pytest.mark.parametrize(
    ("variant", "dtype"), [(v, torch.float32) for v in VARIANTS] + [(v, torch.bfloat16) for v in EACH_PROJECTION]
)
@pytest.mark.parametrize("tied", [False, True])
def test_an_expanded_model_is_saved_as_what_fusing_would_make_of_it(variant, dtype, tied, tmp_path):
    model = perturb(expand(build(variant, dtype=dtype, tie_word_embeddings=tied), varied_plan(build(variant)), **EVERY))
    before, original = state(model), copy.deepcopy(model)
    model.save_pretrained(tmp_path / "expanded", state_dict=model.state_dict())  # as a Trainer gives it
    assert is_expanded(model)
    assert_same_state(model, before)
    fuse(original).save_pretrained(tmp_path / "fused")
    files = [path.name for path in (tmp_path / "fused").iterdir()]
    assert sorted(files) == sorted(path.name for path in (tmp_path / "expanded").iterdir())
    for name in files:
        assert (tmp_path / "expanded" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes(), name


def test_a_copy_is_saved_as_itself(tmp_path):
    model = perturb(expanded("llama"))
    twin = copy.deepcopy(model)
    perturb(twin, 0.5)
    twin.save_pretrained(tmp_path)
    assert_same_state(fuse(twin), state(type(twin).from_pretrained(tmp_path, attn_implementation="eager")))


def test_a_plain_state_does_not_load_into_an_expanded_model():
    model = expanded("llama")
    before = state(model)
    with pytest.raises(ValueError, match=r"q_proj\.weight: of a plain model; need the state of an expanded one"):
        model.load_state_dict(build("llama").state_dict(), strict=False)
    assert_same_state(model, before)


LOAD = """
import sys
sys.modules["apexlib"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), (folder, info)
    found = model(**torch.load(folder + "/batch.pt"), use_cache=False).logits
    assert torch.equal(found, torch.load(folder + "/logits.pt")), folder
"""


@pytest.mark.case("a fused folder where only `transformers` is installed", "works")
def test_a_fused_folder_loads_where_apexlib_is_not_installed(tmp_path, batch):
    folders = []
    for variant in ("llama", "gemma", "gpt2", "phi3", "opt", "olmo2"):
        model = perturb(expanded(variant))
        plain = set(build(variant).state_dict())
        folders.append(str(tmp_path / variant))
        fuse(model).save_pretrained(folders[-1])
        assert set(model.state_dict()) == plain
        torch.save(batch, f"{folders[-1]}/batch.pt")
        torch.save(logits(model, batch), f"{folders[-1]}/logits.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# precision


@pytest.mark.case("a model in float16 or bfloat16: rows and operators train in float32", "works")
@pytest.mark.parametrize(
    ("variant", "dtype"), [(variant, torch.bfloat16) for variant in VARIANTS] + [("llama", torch.float16)]
)
def test_half_precision_models_train_in_float32_and_compute_in_their_dtype(variant, dtype, batch):
    base, model = build(variant, dtype=dtype), expanded(variant, dtype=dtype, **EVERY)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {dtype}
    found = logits(model, batch)
    assert found.dtype == dtype
    assert torch.equal(found, logits(base, batch))
    train(model, batch)
    assert logits(model, batch, training=True).dtype == dtype
    found = logits(model, batch)
    fuse(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model, batch), found)


def test_embedding_gradients_add_up_in_float32():
    model = expanded("llama", dtype=torch.bfloat16)
    embedding = model.get_input_embeddings()
    embedding(torch.full((1, 3000), 5)).sum().backward()  # a sum of ones stalls at 256 in bfloat16
    assert embedding.weight.grad[5].unique().tolist() == [3000.0]


def stages(model, size):
    """Expand, add a small update to what trains, fuse, three times; return the update asked for, weight by weight."""
    asked = {}
    for stage in range(3):
        expand(model, varied_plan(model, seed=stage), train_embeddings=False)
        before = {name: weight.clone() for name, weight, _ in composed_weights(model)}
        generator = torch.Generator().manual_seed(stage)
        with torch.no_grad():
            for module in projections(model).values():
                module.rows.add_(size * torch.randn(module.rows.shape, generator=generator))
        for name, weight, _ in composed_weights(model):
            asked[name] = asked.get(name, 0) + weight - before[name]
        fuse(model)
    return asked


def lost(model, base, asked):
    error = sum(
        (model.get_parameter(n).float() - base.get_parameter(n).float() - u).square().sum() for n, u in asked.items()
    )
    return (error / sum(update.square().sum() for update in asked.values())).sqrt().item()


def test_stages_on_a_float32_master_lose_nothing_and_bfloat16_loses_much():
    base = build("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.05)  # about the size of pre-trained weights
    master, half = copy.deepcopy(base).float(), copy.deepcopy(base)
    asked = stages(master, 1e-4)
    assert lost(master, base, asked) < 0.01
    assert lost(half, base, stages(half, 1e-4)) > 0.2


def test_bfloat16_autocast_trains_a_float32_model(batch):
    base, model = build("llama").train(), expanded("llama").train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(**batch, labels=batch["input_ids"])
        found = model(**batch, labels=batch["input_ids"])
    assert found.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert_close(found.loss, expected.loss, rtol=2e-2, atol=0)
    found.loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.apex_channel.v.add_(1e-3)  # 1.001 is 1 in bfloat16
        plain = mlp.gate_proj.compose(mlp.gate_proj.rows)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mlp.gate_proj.compose(mlp.gate_proj.rows), plain)


# machinery around a training step


@pytest.mark.parametrize("train_embeddings", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_changes_no_gradient(variant, reentrant, train_embeddings, batch):
    gradients = []
    for checkpointing in (False, True):
        model = perturb(expanded(variant, train_embeddings=train_embeddings)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.case("`torch.compile`, the training step in one graph", "works")
@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_torch_compile_takes_the_training_step_in_one_graph(variant, batch):
    """With the aot_eager backend: the same tracing as inductor's, without minutes of code generation."""
    model = perturb(expanded(variant, attention="sdpa")).train()
    block = model.get_submodule(
        "model.layers.0.mlp"
        if hasattr(model, "model")
        else "transformer.h.0.mlp"
        if hasattr(model, "transformer")
        else "gpt_neox.layers.0.mlp"
    )
    x = torch.randn(2, 9, 16)
    expected = torch.autograd.grad(block(x).square().sum(), [p for p in block.parameters() if p.requires_grad])
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), [p for p in block.parameters() if p.requires_grad])
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# the table of what trains


def test_the_table_counts_each_weight_of_the_plain_model_once():
    model = build("gpt2")  # tied
    plain = trainable_table(model)
    assert list(plain.columns) == ["weight", "kind", "trainable", "total", "share"]
    assert plain["weight"].tolist() == [name for name, _ in model.named_parameters()]
    assert plain["trainable"].sum() == plain["total"].sum() == sum(p.numel() for p in model.parameters())
    assert set(plain["kind"]) == {"head", "channel", "embedding", "norm", "other"}  # other: positions
    plan = varied_plan(model)
    expand(model, plan)
    table = trainable_table(model)
    base = table[table["kind"] != "operator"]
    assert base[["weight", "kind", "total"]].equals(plain[["weight", "kind", "total"]])
    assert table["trainable"].sum() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = {(layer.layer, layer.component): layer for layer in plan.layers}
    shares = base.set_index("weight")["share"]
    for part in model_components(build("gpt2")):
        layer = layers[part.layer, part.component]
        tuned = len(layer.target) + len(layer.source) + len(layer.direct)
        for slot in part.slots.values():
            assert shares[f"{slot.module}.weight"] == pytest.approx(tuned / part.units)
            assert slot.is_input or shares[f"{slot.module}.bias"] == pytest.approx(tuned / part.units)
    operators = table[table["kind"] == "operator"]
    assert operators["total"].sum() == 0
    assert operators["share"].isna().all()
    half = build("gpt2", dtype=torch.bfloat16)
    assert trainable_table(expand(half, plan)).equals(table)


@pytest.mark.parametrize(("preset", "share"), [("52%", 0.5180), ("2.4%", 0.02395)])
def test_presets_train_their_share_of_llama_2_7b(preset, share):
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=32, **shape), dtype=torch.bfloat16)
    config = ApexConfig.preset(preset)
    options = {"train_embeddings": config.train_embeddings, "train_queries": config.train_queries}
    expand(model, select(equal_statistics(model), config), **options)
    assert all(p.is_meta for p in model.parameters())
    table = trainable_table(model)
    assert table["total"].sum() == 6_738_415_616
    assert table["trainable"].sum() / table["total"].sum() == pytest.approx(share, rel=1e-3)
    assert {p.dtype for p in fuse(model).parameters()} == {torch.bfloat16}


OPTIONS = [{"train_rows": False}, {"train_rows": False, "ffn": "split"}, {"train_queries": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("variant", ["llama", "llama-mha-bias", "olmo2", "qwen3", "gpt2", "phi3", "gpt_neox"])
def test_rows_that_rest_have_no_gradient_and_change_no_other(variant, options, batch):
    plan = varied_plan(exact(variant), seed=3)
    if "train_queries" in options and variant in ("phi3", "gpt2", "gpt_neox"):
        with pytest.raises(ValueError, match=r"holds queries and values in one weight; need train_queries=True"):
            expand(exact(variant), plan, **options)
        return
    whole, model = perturb(expand(exact(variant), plan), 0.3), expand(exact(variant), plan, **options)
    model.load_state_dict(whole.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    resting = {name for name, _ in rows_of(model)} - trainable
    queries = {name for name in resting if "q_proj" in name or "k_proj" in name}
    assert resting == (queries if "train_queries" in options else {name for name, _ in rows_of(model)})
    found, expected = gradients(model, batch), gradients(whole, batch)
    assert set(found) == set(expected) - resting
    for name, gradient in found.items():
        assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    before = {name: rows.clone() for name, rows in rows_of(model)}
    train(model, batch)
    assert {name for name, rows in rows_of(model) if torch.equal(rows, before[name])} == resting


def gradients(model, batch):
    model.train()(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rows_of(model):
    return [(name, p.detach()) for name, p in model.named_parameters() if "rows" in name.rpartition(".")[2]]


# refusals


def spoil_adapter(model):
    class Wrapped(nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj.__class__ = Wrapped


def spoil_forward(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.forward = linear.forward


def spoil_dtype(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)


def spoil_shards(model):
    model.model.layers[1].mlp.down_proj.weight.data = torch.empty(0)


def spoil_columns(model):
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(model.model.layers[1].mlp.up_proj.weight.data.flatten())


def spoil_meta(model):
    model.model.layers[1].mlp.up_proj.to("meta")


def spoil_sharing(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def spoil_values(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")


def spoil_pruning(model):
    prune.random_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)


def spoil_parametrisation(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)


def spoil_quantised(model):
    model.is_quantized = True


def spoil_packed(model):
    packed = nn.Module()
    packed.qweight = torch.zeros(2, 3, dtype=torch.int32)
    model.model.layers[1].mlp.down_proj = packed


def spoil_embeddings(model):
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.to(torch.int8)


SPOILED = {
    spoil_adapter: r"layers.1.mlp.up_proj: is Wrapped, wrapped, patched or .*; need a plain Linear or Conv1D",
    spoil_forward: r"layers.1.mlp.up_proj: is Linear, wrapped, patched or .*; need a plain Linear or Conv1D",
    spoil_dtype: r"layers.1.mlp.up_proj.weight: is torch.int8; need float16",
    spoil_shards: r"no whole weight matrix \(quantised or sharded\?\)",
    spoil_columns: r"layers.1.mlp.up_proj: weight of shape \(384,\); need a matrix \(quantised or sharded\?\)",
    spoil_meta: r"has some weights on the meta device; need all of them there or none",
    spoil_sharing: r"layers.0.mlp.up_proj.weight: is one with .*layers.0.* model.layers.1.*; need a weight of its own",
    spoil_values: r"layers.1.mlp.up_proj.weight: 1 of 384 values are not finite in torch.float32",
    spoil_pruning: r"layers.1.mlp.up_proj: is Linear, .* need a plain Linear or Conv1D",
    spoil_parametrisation: r"layers.1.mlp.up_proj: is ParametrizedLinear",
    spoil_quantised: r"LlamaForCausalLM: is quantised; need weights in floating point",
    spoil_packed: r"a projection has no whole weight matrix \(quantised or sharded\?\)",
    spoil_embeddings: r"model.embed_tokens.weight: is torch.int8; need float16",
}


@pytest.mark.case("quantised, pruned, patched or shared weights: one line, and the model as it was", "refused")
@pytest.mark.parametrize("spoil", SPOILED)
def test_models_that_cannot_be_expanded_are_left_alone(spoil):
    model = build("llama")
    plan = varied_plan(model)
    spoil(model)
    before, body = model.state_dict(), bodies(model)
    with pytest.raises(ValueError, match=SPOILED[spoil]):
        expand(model, plan)
    assert bodies(model) == body
    assert "save_pretrained" not in vars(model)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert tensor.is_meta or torch.equal(after[name].nan_to_num(), tensor.nan_to_num())


@pytest.mark.case("weights that are sharded already (`DTensor`)", "refused")
def test_a_sharded_tensor_is_refused():
    class Shard(torch.Tensor):
        pass

    model = build("llama")
    weight = model.model.layers[1].mlp.up_proj.weight.data
    model.model.layers[1].mlp.up_proj._parameters["weight"] = nn.Parameter(weight.as_subclass(Shard))
    with pytest.raises(
        ValueError, match=r"up_proj.weight: is sharded or quantised \(Shard of shape \(24, 16\)\); need"
    ):
        expand(model, varied_plan(model))
    model = expanded("llama")  # and sharded later
    rows = model.model.layers[1].mlp.up_proj.rows
    before, rows.data = rows.data, rows.data[:0]
    with pytest.raises(ValueError, match=r"up_proj.rows: is sharded or quantised \(Tensor of shape \(0, 16\)\)"):
        fuse(model)
    rows.data = before
    assert not is_expanded(fuse(model))


def test_plans_and_options_that_do_not_fit_are_refused():
    model = build("llama")
    plan, before, body = varied_plan(model), state(model), bodies(model)
    channel = {"component": "channel", "source": (1,), "target": (2,), "direct": ()}
    wrong = {
        r"layer 2, channel: LlamaForCausalLM has channels and heads in layers 0 to 1 only": LayerPlan(
            2, **channel, units=24
        ),
        r"layer 1, channel: planned for 32 units, LlamaForCausalLM has 24": LayerPlan(1, **channel, units=32),
    }
    for message, layer in wrong.items():
        with pytest.raises(ValueError, match=message):
            expand(model, ExpansionPlan((*plan.layers[:1], layer)))
    with pytest.raises(ValueError, match="plan: need an ExpansionPlan, got dict"):
        expand(model, {})
    direct = LayerPlan(1, "channel", source=(), target=(), direct=(1,), units=24)  # without an operator, even
    for each in (plan, ExpansionPlan((direct,))):
        with pytest.raises(ValueError, match=r"unknown operator 'butterfly'; known: monarch, .*dense"):
            expand(model, each, operator="butterfly")
    with pytest.raises(ValueError, match="LlamaForCausalLM: is not expanded, or fused already"):
        fuse(model)
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        expand(model, plan, seed="x")
    assert_same_state(model, before)
    assert bodies(model) == body
    experts = build("mixtral")
    with pytest.raises(ValueError, match="layer 0, channel: MixtralForCausalLM has heads in layers 0 to 1 only"):
        expand(experts, ExpansionPlan((LayerPlan(0, **channel, units=12),)))


def test_a_failure_halfway_leaves_the_model_plain(monkeypatch):
    model = build("gpt2", dtype=torch.bfloat16)
    before, body, plan = state(model), bodies(model), varied_plan(model)
    made = []

    def fail_at_last(*args, **kwargs):
        made.append(make_operator(*args, **kwargs))
        if len(made) == 4:
            raise torch.OutOfMemoryError
        return made[-1]

    monkeypatch.setattr("apexlib.expansion.make_operator", fail_at_last)
    with pytest.raises(torch.OutOfMemoryError):
        expand(model, plan, **EVERY)
    assert_same_state(model, before)
    assert bodies(model) == body


def test_expanding_or_fusing_twice_is_refused():
    model = perturb(expanded("llama"))
    before = state(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM: is expanded already; fuse it before"):
        expand(model, varied_plan(model))
    with pytest.raises(ValueError, match="LlamaModel: is not expanded, or fused already; need the model given to"):
        fuse(model.model)
    assert_same_state(model, before)
    fuse(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM: is not expanded, or fused already"):
        fuse(model)


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        ("model.layers.1.self_attn.v_proj.rows", "model.layers.1.self_attn.v_proj.weight"),
        ("model.layers.1.self_attn.q_proj.bias_rows", "model.layers.1.self_attn.q_proj.bias"),
        ("model.layers.1.mlp.apex_channel.v", "model.layers.1.mlp.gate_proj.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_fused(name, blamed, value):
    model = expanded("llama-mha-bias", **EVERY)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    before = {key: tensor.nan_to_num(7.0, 8.0, 9.0) for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{blamed}: \d+ of \d+ values are not finite in torch.float32"):
        fuse(model)
    assert is_expanded(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0, 8.0, 9.0), before[key])


def test_each_weight_is_composed_once_per_fuse(monkeypatch):
    model, composed = perturb(expanded("llama-mha-bias")), counted_compositions(monkeypatch)
    expected = sum(1 if module.bias_rows is None else 2 for module in projections(model).values())
    fuse(model)
    assert len(composed) == expected


def counted_compositions(monkeypatch):
    composed = []
    compose = SplitProjection.compose
    monkeypatch.setattr(SplitProjection, "compose", lambda self, rows: composed.append(self) or compose(self, rows))
    return composed


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2", "gpt_neox", "phi3"])
def test_generating_composes_each_weight_once_and_writes_what_the_fused_model_writes(variant, batch, monkeypatch):
    model = build(variant)
    expand(model, varied_plan(model)).eval()
    perturb(model)
    written = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    composed = counted_compositions(monkeypatch)
    tokens = model.generate(batch["input_ids"][:1], **written)
    weights = sum(1 + (m.bias_rows is not None) for m in model.modules() if isinstance(m, SplitProjection))
    assert len(composed) == weights
    assert torch.equal(tokens, fuse(model).generate(batch["input_ids"][:1], **written))
    assert "generate" not in vars(model)


def test_what_measures_an_expanded_model_composes_each_weight_once(batch, monkeypatch):
    model = build("llama")
    expand(model, varied_plan(model))
    perturb(model)
    composed = counted_compositions(monkeypatch)
    loss = perplexity(model, [batch] * 3, quiet=True)["loss"]
    assert len(composed) == sum(isinstance(module, SplitProjection) for module in model.modules())
    with in_evaluation(model):  # in which another one is entered and left
        first = perplexity(model, [batch], quiet=True)["loss"]
        second = perplexity(model, [batch], quiet=True)["loss"]
    assert first == second == pytest.approx(loss)
    assert loss == pytest.approx(perplexity(fuse(model), [batch], quiet=True)["loss"])


def test_composed_weights_are_not_kept_beyond_a_measurement_or_where_gradients_are_taken(batch):
    model = build("llama")
    expand(model, varied_plan(model))
    perturb(model)

    def loss():
        return perplexity(model, [batch], quiet=True)["loss"]

    def fresh():
        return perplexity(fuse(copy.deepcopy(model)), [batch], quiet=True)["loss"]

    before = loss()
    perturb(model, seed=1)
    assert abs(loss() - before) > 1e-3
    assert loss() == fresh()
    with composed_once(model.eval()):
        model(**batch)
        with torch.no_grad():
            model(**batch)
        model(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError), composed_once(model):
        raise RuntimeError
    perturb(model, seed=2)
    assert loss() == fresh()
    assert all(module.held is None for module in model.modules() if isinstance(module, SplitProjection))


def test_what_hangs_on_the_model_is_one_record_and_a_way_to_save():
    model = build("llama")
    before = set(vars(model))
    expand(model, varied_plan(model))
    assert set(vars(model)) - before == {"_expansion", "save_pretrained", "generate"}
    fuse(model)
    assert set(vars(model)) == before


def test_what_overflows_in_the_cast_is_not_fused():
    model = expanded("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.rows[0] = 1e6
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.down_proj.weight: \d+ of 384 values are not finite in torch.float16"
    ):
        fuse(model)
    assert is_expanded(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", ["llama", "gpt2", "phi3", "olmo2", "gpt_neox"])
def test_a_cuda_device_gives_the_same(variant, batch):
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    base, model = build(variant).cuda(), build(variant).cuda()
    expand(model, varied_plan(model), **EVERY)
    assert torch.equal(logits(model, batch), logits(base, batch))
    train(model, batch)
    split = logits(model, batch, training=True)
    fuse(model)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert_close(logits(model, batch), split, atol=1e-4, rtol=1e-4)
