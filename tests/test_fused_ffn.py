"""The fused FFN against plain autograd of the literal formula in float64, and where it steps aside."""

import copy
import pickle
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expansion import layer_plan, perturb
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from apexlib import fused_ffn
from apexlib.activations import ActivationRecorder, activation_statistics
from apexlib.architectures import model_components
from apexlib.expansion import expand, fuse
from apexlib.fused_ffn import _ACTIVATIONS, FusedFFN, GatedFFN, PartlyTrained, _chunks, _parts, literal_ffn
from apexlib.operators import OPERATORS
from apexlib.plan import ExpansionPlan

GATED = ["llama", "llama-mha-bias", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2"]
SIZES = [(4, 5), (5, 3), (1, 0), (12, 0), (0, 7), (4, 16), (0, 24), (8, 0)]  # pairs, direct, of 24 channels


def channel_plan(model, pairs, direct, seed=0):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [part for part in model_components(model) if part.component == "channel"]
    return ExpansionPlan(tuple(layer_plan(part, pairs, direct, order) for part in parts))


def blocks(variant, pairs=4, direct=5, modes=("split", "fused", "recompute"), dtype=torch.float64, **options):
    """The same FFN, expanded and moved away from its start, in several forms."""
    found = []
    for mode in modes:
        model = build(variant, dtype=dtype)
        expand(model, channel_plan(model, pairs, direct), ffn=mode, **options)
        perturb(model, 0.3)
        found.append(model.model.layers[0].mlp.train())
    return found


def tuned(block):
    return [parameter for parameter in block.parameters() if parameter.requires_grad and parameter.numel()]


def outcome(block, x, gradient):
    """Output, gradient by the input, gradients by all that trains."""
    x = x.clone().requires_grad_()
    output = block(x)
    return output, *torch.autograd.grad(output, [x, *tuned(block)], gradient)


def assert_equal_outcomes(found, expected, tolerance=1e-9):
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))


def batch(tokens=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(2, tokens, 16, generator=generator).to(dtype) for _ in range(2))


@pytest.mark.parametrize(
    ("variant", "pairs", "direct"),
    [(variant, 4, 5) for variant in GATED] + [(v, *size) for v in ("llama-mha-bias", "phi3") for size in SIZES[1:]],
)
def test_every_form_has_the_gradients_of_plain_autograd(variant, pairs, direct):
    split, *others = blocks(variant, pairs, direct)
    assert not isinstance(split, FusedFFN)
    for block in others:
        assert isinstance(block, FusedFFN)
        assert_equal_outcomes(outcome(block, *batch()), outcome(split, *batch()))


def test_gate_and_up_in_one_may_have_a_bias():
    found = []
    for mode in ("split", "fused", "recompute"):
        model = build("phi3", dtype=torch.float64)
        block = model.model.layers[0].mlp
        block.gate_up_proj = torch.nn.Linear(16, 48, dtype=torch.float64)
        with torch.no_grad():
            block.gate_up_proj.weight.copy_(torch.linspace(-1, 1, 48 * 16).sin().view(48, 16))
            block.gate_up_proj.bias.copy_(torch.linspace(-1, 1, 48))
        perturb(expand(model, channel_plan(model, 4, 5), ffn=mode), 0.3)
        assert isinstance(block, FusedFFN) == (mode != "split")
        found.append(outcome(block.train(), *batch()))
    for each in found[1:]:
        assert_equal_outcomes(each, found[0])


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_gets_its_gradients(operator):
    split, *others = blocks("llama-mha-bias", operator=operator)
    for block in others:
        assert_equal_outcomes(outcome(block, *batch()), outcome(split, *batch()))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sampled_from([1, 255, 256, 257, 600]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    trains=st.lists(st.booleans(), min_size=17, max_size=17),
    biased=st.booleans(),
    keep=st.booleans(),
    kind=st.sampled_from(sorted(_ACTIVATIONS, key=lambda each: each.__name__)),
)
def test_any_parts_in_any_number_of_chunks(tokens, sizes, trains, biased, keep, kind):
    generator, activation = torch.Generator().manual_seed(0), _ACTIVATIONS[kind]
    shapes = [(tokens, 5), *([(6,)] if biased else [None])]
    for n in sizes:
        shapes += [(n, 5), (n, 5), (n, 6), *([(n,), (n,)] if biased else [None, None])]
    tensors = [None if s is None else torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    for tensor, wanted in zip(tensors, [True, *trains], strict=False):
        if tensor is not None:
            tensor.requires_grad_(wanted)
    x, bias, *flat = tensors
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    gradient = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    expected = literal_ffn(x, activation, bias, _parts(flat))
    found = GatedFFN.apply(x, activation, keep, [], bias, *flat)
    assert_close(found, expected, rtol=1e-11, atol=1e-11)
    ours, theirs = (torch.autograd.grad(y, leaves, gradient) for y in (found, expected))
    assert_equal_outcomes(ours, theirs)


@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_second_derivatives_are_those_of_plain_autograd(mode):
    seconds = []
    for block in blocks("llama-mha-bias", modes=("split", mode)):
        x, gradient = batch(4)
        x.requires_grad_()
        own = [x, *tuned(block)]
        first = torch.autograd.grad(block(x), own, gradient, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), own))
    assert_equal_outcomes(seconds[1], seconds[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_checkpointing_inside_a_block_changes_nothing(mode, reentrant):
    (block,) = blocks("llama", modes=(mode,))
    expected = outcome(block, *batch())
    assert_equal_outcomes(outcome(block, *batch()), expected, 0)
    x, gradient = batch()
    x.requires_grad_()
    checkpoint(block, x, use_reentrant=reentrant).backward(gradient)
    assert_equal_outcomes([x.grad, *(p.grad for p in tuned(block))], expected[1:], 1e-12)


@pytest.mark.parametrize("reads", [True, False])
def test_one_product_of_a_partly_trained_weight_has_the_gradients_of_its_formula(reads):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 9 if reads else 5), (4, 5), (5, 5)]
    x, tuned, frozen = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    given = (x.requires_grad_(), tuned.requires_grad_())
    whole = torch.cat([tuned, frozen])
    assert_close(PartlyTrained.apply(x, tuned, frozen, reads), x @ (whole if reads else whole.T))
    assert torch.autograd.gradcheck(lambda x, tuned: PartlyTrained.apply(x, tuned, frozen, reads), given)
    assert torch.autograd.gradgradcheck(lambda x, tuned: PartlyTrained.apply(x, tuned, frozen, reads), given)
    assert torch.autograd.gradcheck(lambda x: PartlyTrained.apply(x, tuned.detach(), frozen, reads), given[:1])
    assert torch.autograd.gradcheck(lambda tuned: PartlyTrained.apply(x.detach(), tuned, frozen, reads), given[1:])


def test_a_graph_that_is_kept_can_be_used_again():
    (block,) = blocks("llama", modes=("fused",))
    x, gradient = batch()
    output = block(x)
    first, second = (torch.autograd.grad(output, tuned(block), gradient, retain_graph=True) for _ in range(2))
    assert_equal_outcomes(second, first, 0)


def test_composed_rows_are_the_float32_ones_rounded_once():
    (block,) = blocks("llama", modes=("fused",), dtype=torch.float32)
    projections = (block.down_proj, block.gate_proj, block.up_proj)
    exact = block.down_proj.composed_with(*projections[1:], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block.down_proj.composed_with(*projections[1:], dtype=torch.bfloat16)
    for (ours, _), (theirs, _), module in zip(rounded, exact, projections, strict=True):
        assert torch.equal(ours, theirs.bfloat16())
        assert_close(theirs, module.compose(module.rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_as_near_to_float64_as_the_split_form(dtype):
    (exact,) = blocks("llama", modes=("split",), dtype=torch.float32)
    reference = outcome(exact.double(), *batch(64))
    errors = []
    for block in blocks("llama", modes=("split", "fused", "recompute"), dtype=torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            x, gradient = batch(64, torch.float32)
            output = block(x)
        assert output.dtype == dtype
        output.backward(gradient.to(dtype))
        assert {p.grad.dtype for p in tuned(block)} == {torch.float32}
        gradients = [p.grad.double() for p in tuned(block)]
        pairs = zip(gradients, reference[2:], strict=True)
        errors.append(sum(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs))
    assert max(errors[1:]) <= 1.2 * errors[0] + 1e-7


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 256), (torch.float32, 256), (torch.bfloat16, 1024)])
def test_a_chunk_is_as_much_as_the_caches_of_all_threads_hold(dtype, size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = torch.empty(10 * size, 2, dtype=dtype)
    sizes = [len(x[rows]) for rows in _chunks(x)]
    assert sizes == [3 * size, 3 * size, 3 * size, size]


@pytest.mark.parametrize("keep", [True, False])
def test_gradients_of_many_chunks_of_half_precision_add_up_in_float32(keep):
    generator = torch.Generator().manual_seed(0)
    shapes = [(99 * 1024, 5), (7, 5), (7, 5), (7, 6), (7,), (7,)]  # all positive: a sum of few bits would lose some
    x, *flat = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    halves = [tensor.bfloat16().requires_grad_() for tensor in flat]
    exact = [half.detach().double().requires_grad_() for half in halves]
    gradient = torch.rand(len(x), 6, generator=generator, dtype=torch.float64).bfloat16()
    activation = _ACTIVATIONS[torch.nn.SiLU]
    ours = GatedFFN.apply(x.bfloat16(), activation, keep, [], None, *halves)
    theirs = literal_ffn(x.bfloat16().double(), activation, None, _parts(exact))
    found = torch.autograd.grad(ours, halves, gradient)
    for mine, right in zip(found, torch.autograd.grad(theirs, exact, gradient.double()), strict=True):
        assert (mine.double() - right).norm() < 2**-8 * right.norm()


@pytest.mark.parametrize(("mode", "kept", "again"), [("fused", 4, 0), ("recompute", 0, 2)])
def test_pre_activations_are_kept_for_backward_or_made_again(mode, kept, again, monkeypatch):
    (block,), (x, gradient), saved, made = blocks("llama", modes=(mode,)), batch(), [], []
    really = fused_ffn._pre_activations
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.shape) or each, lambda each: each):
        output = block(x)
    assert sum(shape[0] == x[..., 0].numel() for shape in saved) == 1 + kept  # the input, and two of either part
    monkeypatch.setattr(fused_ffn, "_pre_activations", lambda *given: made.append(1) or really(*given))
    output.backward(gradient)
    assert len(made) == again


@pytest.mark.parametrize("statistic", ["gate", "product"])
@pytest.mark.parametrize("variant", ["llama-mha-bias", "phi3", "gemma"])
def test_statistics_are_gathered_without_leaving_the_fused_form(variant, statistic, batch, monkeypatch):
    tables = []
    for mode in ("split", "fused", "recompute"):
        model = build(variant, dtype=torch.float64)
        perturb(expand(model, channel_plan(model, 4, 5), ffn=mode)).train()
        calls = []
        monkeypatch.setattr(GatedFFN, "apply", lambda *given, a=GatedFFN.apply, c=calls: c.append(1) or a(*given))
        with ActivationRecorder(model, statistic=statistic) as recorder:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        monkeypatch.undo()
        assert len(calls) == (0 if mode == "split" else 2)  # layers
        tables.append(recorder.table())
    for table in tables[1:]:
        assert_close(torch.tensor(table["activation"]), torch.tensor(tables[0]["activation"]), rtol=1e-9, atol=1e-12)
        assert table["rank_score"].equals(tables[0]["rank_score"])


@pytest.mark.parametrize("statistic", ["gate", "product"])
@pytest.mark.parametrize(("variant", "pairs", "direct"), [("llama-mha-bias", 4, 5), ("phi3", 4, 5), ("gemma", 12, 0)])
def test_a_compiler_gets_a_formula_of_the_same_values(variant, pairs, direct, statistic, batch, monkeypatch):
    gradients, tables, products = [], [], []
    for compiling in (False, True):
        model, calls = build(variant, dtype=torch.float64), []
        perturb(expand(model, channel_plan(model, pairs, direct))).train()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        for function in (GatedFFN, PartlyTrained):
            told, apply = partial(calls.append, function), function.apply
            monkeypatch.setattr(function, "apply", lambda *given, t=told, a=apply: t() or a(*given))
        with ActivationRecorder(model, statistic=statistic) as recorder:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        monkeypatch.undo()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.numel()})
        tables.append(recorder.table())
        products.append((calls.count(GatedFFN), calls.count(PartlyTrained)))
    assert products == [(2, 0), (0, 6 if pairs < 12 else 0)]  # layers; of three matrices each, where rows are frozen
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, rtol=1e-8, atol=1e-12)
    assert_close(torch.tensor(tables[1]["activation"]), torch.tensor(tables[0]["activation"]), rtol=1e-9, atol=1e-12)


def test_one_product_of_a_split_projection_is_for_a_compiler_alone(monkeypatch):
    model, calls = build("gpt2", dtype=torch.float64), []
    perturb(expand(model, channel_plan(model, 4, 5))).train()
    block, (x, _) = model.transformer.h[0].mlp, batch()
    apply = PartlyTrained.apply
    monkeypatch.setattr(PartlyTrained, "apply", lambda *given: calls.append(1) or apply(*given))
    expected = block(x)
    assert not calls
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(block(x), expected)
    assert len(calls) == 2
    torch.func.vjp(block, x)
    assert len(calls) == 2


def test_several_recorders_share_the_fused_form(batch, monkeypatch):
    model = build("llama", dtype=torch.float64)
    perturb(expand(model, channel_plan(model, 4, 5))).train()
    recorders = [ActivationRecorder(model, statistic=statistic) for statistic in ("gate", "product", "gate")]
    with ExitStack() as stack:
        for recorder in recorders:
            stack.enter_context(recorder)
        assert fused_calls(model, monkeypatch, lambda m: m(**batch, use_cache=False)) == 2
    assert not any(getattr(module, "observers", None) for module in model.modules())
    for recorder in recorders:
        expected = activation_statistics(model, [batch], statistic=recorder.statistic)
        assert_close(torch.tensor(recorder.table()["activation"]), torch.tensor(expected["activation"]))


def fused_calls(block, monkeypatch, run):
    calls = []
    monkeypatch.setattr(GatedFFN, "apply", lambda *given, a=GatedFFN.apply: calls.append(1) or a(*given))
    run(block)
    monkeypatch.undo()
    return len(calls)


def test_it_steps_aside_where_something_must_see_inside(monkeypatch, batch):
    x = torch.randn(2, 9, 16)
    (block,) = blocks("llama", modes=("fused",), dtype=torch.float32)
    assert fused_calls(block, monkeypatch, lambda b: b(x)) == 1
    assert fused_calls(block, monkeypatch, lambda b: b.eval()(x)) == 0
    block.train()
    assert fused_calls(block, monkeypatch, lambda b: torch.func.vjp(b, x)) == 0
    seen = []
    for place in (block.act_fn, block.down_proj, block.gate_proj):
        handle = place.register_forward_hook(lambda *given: seen.append(given[-1].shape))
        assert fused_calls(block, monkeypatch, lambda b: b(x)) == 0
        handle.remove()
    assert seen == [(2, 9, 24), (2, 9, 16), (2, 9, 24)]
    handle = block.up_proj.register_full_backward_hook(lambda *_: None)
    assert fused_calls(block, monkeypatch, lambda b: b(x)) == 0
    handle.remove()
    model = build("llama")
    expand(model, channel_plan(model, 4, 5)).train()
    with ActivationRecorder(model, differentiable=True) as recorder:  # a loss term: gradients through activations
        assert fused_calls(model, monkeypatch, lambda m: m(**batch, use_cache=False)) == 0
    assert torch.autograd.grad(recorder.imbalance, model.model.layers[0].mlp.gate_proj.rows)[0].any()


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}])
def test_an_unknown_activation_stays_split(change):
    model = build("llama", **change)
    expand(model, channel_plan(model, 4, 5))
    assert not any(isinstance(module, FusedFFN) for module in model.modules())


def test_a_patched_block_stays_as_it_is():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = mlp.forward
    expand(model, channel_plan(model, 4, 5))
    assert [isinstance(layer.mlp, FusedFFN) for layer in model.model.layers] == [False, True]


def test_an_unknown_form_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="ffn 'slab': need one of split, fused, recompute"):
        expand(model, channel_plan(model, 4, 5), ffn="slab")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_fused_and_whole(clone):
    model = build("llama")
    plain = type(model.model.layers[0].mlp)
    expand(model, channel_plan(model, 4, 5), ffn="recompute")
    twin = clone(model)
    for layer in twin.model.layers:
        assert type(layer.mlp) is type(model.model.layers[0].mlp)
        assert not layer.mlp.keeps
        assert layer.mlp.gate_proj.mixer is layer.mlp.apex_channel
    assert {type(layer.mlp) for layer in fuse(twin).model.layers} == {plain}
    assert isinstance(model.model.layers[0].mlp, FusedFFN)
