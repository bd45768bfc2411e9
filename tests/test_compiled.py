"""torch.compile of an expanded model, by counts of graphs, breaks and compilations; values are those of eager mode.

With the aot_eager backend: the same tracing as inductor's, without minutes of code generation.
"""

import random
from dataclasses import replace

import pytest
import torch
from conftest import build
from pandas.testing import assert_frame_equal
from test_expansion import layer_plan, perturb
from test_training import SMALL, Blocks, arguments, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import TrainerCallback

from apexlib.architectures import family_of, model_components
from apexlib.expansion import expand, fuse
from apexlib.plan import ExpansionPlan
from apexlib.projections import composed_once
from apexlib.training.stages import train_in_stages


@pytest.fixture
def compiler():
    torch.compiler.reset()
    counters.clear()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


def even_plan(model, seed):
    """As many pairs and direct units in each layer, and others with another seed."""
    draw = random.Random(seed)
    layers = []
    for part in model_components(model):
        pairs, direct = (part.units // 4 or 1, part.units // 4 if part.units > 2 else 0)
        layers.append(layer_plan(part, pairs, direct, draw.sample(range(part.units), part.units)))
    return ExpansionPlan(tuple(layers))


def begun(model, seed):
    """Expand and move away from the start."""
    return perturb(expand(model, even_plan(model, seed), seed=seed), seed=seed).train()


def layers_of(model):
    return model.get_submodule(family_of(model).layers)


def gradients(model, batch):
    """The loss, and the gradient of all that trains."""
    loss = model(**batch, use_cache=False).logits.square().mean()  # by labels, transformers would warn inside
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found | {"loss": loss.detach()}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def whole_batch(batch):
    return {"input_ids": batch["input_ids"]}


def compiled_layers(model, compiler):
    for layer in layers_of(model):
        layer.compile(backend=compiler)
    return model


VARIANTS = ["llama", "qwen2", "phi3", "gpt2", "gpt_neox"]


@pytest.mark.case("`torch.compile`, a model in one graph", "works")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_one_graph_with_the_gradients_of_eager_mode(variant, whole_batch, compiler):
    expected = gradients(begun(build(variant, attention="sdpa"), 0), whole_batch)
    model = begun(build(variant, attention="sdpa"), 0)
    model.compile(backend=compiler, fullgraph=True)
    assert_equal_gradients(gradients(model, whole_batch), expected)
    assert compiler.frame_count == 1


@pytest.mark.case("`torch.compile` by layers, one trace for all equal ones, also in the next stage", "works")
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_layers_share_one_trace_also_in_the_next_stage(variant, whole_batch, compiler):
    model = compiled_layers(begun(build(variant, attention="sdpa"), 0), compiler)
    expected = gradients(begun(build(variant, attention="sdpa"), 0), whole_batch)
    assert_equal_gradients(gradients(model, whole_batch), expected)
    assert len(layers_of(model)) > 1
    assert compiler.frame_count == 1
    assert not counters["graph_break"]
    begun(fuse(model), 1)
    next_stage = begun(fuse(begun(build(variant, attention="sdpa"), 0)), 1)
    assert_equal_gradients(gradients(model, whole_batch), gradients(next_stage, whole_batch))
    assert compiler.frame_count == 1


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_a_whole_model_is_not_compiled_again_in_the_next_stage(variant, whole_batch, compiler):
    model = begun(build(variant, attention="sdpa"), 0)
    model.compile(backend=compiler)
    gradients(model, whole_batch)
    begun(fuse(model), 1)
    next_stage = begun(fuse(begun(build(variant, attention="sdpa"), 0)), 1)
    assert_equal_gradients(gradients(model, whole_batch), gradients(next_stage, whole_batch))
    assert compiler.frame_count == 1


def test_a_trace_asks_only_what_older_releases_of_torch_can_trace(whole_batch, compiler, monkeypatch):
    """They stop at `is_autocast_available`, a layer's every product."""
    monkeypatch.delattr(torch.amp, "is_autocast_available")
    gradients(compiled_layers(begun(build("llama", attention="sdpa"), 0), compiler), whole_batch)
    assert compiler.frame_count == 1


def test_under_autocast_gradients_are_those_of_eager_mode_but_for_rounding(whole_batch, compiler):
    model, eager = (begun(build("llama", attention="sdpa"), 0) for _ in range(2))
    exact = gradients(begun(build("llama", attention="sdpa"), 0), whole_batch)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients(each, whole_batch) for each in (compiled_layers(model, compiler), eager))

    def error(given):
        return sum((given[name] - exact[name]).norm() / exact[name].norm() for name in exact).item()

    assert 0 < error(found) <= 1.2 * error(expected)
    assert compiler.frame_count == 1


def test_frozen_rows_that_somebody_trains_after_all_get_their_gradients(whole_batch, compiler):
    model, eager = (begun(build("llama", attention="sdpa"), 0) for _ in range(2))
    for each in (model, eager):
        each.model.layers[0].mlp.up_proj.frozen.requires_grad_(True)
        each.model.layers[1].self_attn.v_proj.frozen.requires_grad_(True)
    found = gradients(compiled_layers(model, compiler), whole_batch)
    assert_equal_gradients(found, gradients(eager, whole_batch))
    assert sum("frozen" in name for name in found) == 2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_evaluation_is_compiled_too_and_composes_anew_what_has_changed(variant, whole_batch, compiler):
    eager = begun(build(variant, attention="sdpa"), 0).eval()
    model = compiled_layers(begun(build(variant, attention="sdpa"), 0).eval(), compiler)
    for seed in (1, 2):
        for each in (model, eager):
            perturb(each, seed=seed)
        expected = eager(**whole_batch, use_cache=False).logits
        assert_close(model(**whole_batch, use_cache=False).logits, expected)
        with composed_once(model):
            for _ in range(2):
                assert_close(model(**whole_batch, use_cache=False).logits, expected)
    assert not counters["graph_break"]


class Compiled(TrainerCallback):
    """How many graphs there are at the end of each stage."""

    def __init__(self):
        self.graphs = []

    def on_train_end(self, args, state, control, **_):
        self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.mark.case("`torch_compile`, the Trainer's, over several stages", "works")
@pytest.mark.parametrize("by_layers", [False, True])
def test_stages_that_are_compiled_are_those_of_eager_mode(tiny_model, tmp_path, compiler, by_layers, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(by_layers).lower())
    config, seen = replace(SMALL, stages=2), Compiled()
    eager = run(tiny_model, tmp_path / "eager", config=config)
    assert not counters["stats"]
    model = tiny_model("llama")
    args = arguments(tmp_path / "compiled", torch_compile_backend="aot_eager")
    compiled = train_in_stages(model, Blocks(), args, config, callbacks=[seen])
    for ours, theirs in zip(compiled.statistics, eager.statistics, strict=True):
        assert_frame_equal(ours, theirs, rtol=1e-3 if torch.cuda.is_available() else 1e-4)
    assert compiled.plans == eager.plans
    for name, weight in eager.model.state_dict().items():
        assert_close(compiled.model.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    first, second = seen.graphs
    assert 0 < first == second <= 5  # the model and its head, or embedding, positions, a layer, norm and head
