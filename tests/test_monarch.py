"""Laws of the expansion operators; the oracle multiplies explicit permutation and block-diagonal matrices."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from apexlib.expansion import Mixer, expand, fuse
from apexlib.inspection import trainable_table
from apexlib.operators import OPERATORS, Operator, make_operator, monarch_blocks, operator_class
from apexlib.plan import ApexConfig, ExpansionPlan, LayerPlan


def parameter_count(kind, k, **options):
    return operator_class(kind).count(k, **options)


KINDS = sorted(OPERATORS)
SIZES = st.one_of(st.integers(1, 60), st.sampled_from([64, 97, 128, 2 * 61, 144, 211]))


def operator_away_from_zero(kind: str, k: int, *, seed: int = 0, **options):
    """An operator in float64 whose every factor is random."""
    operator = make_operator(kind, k, generator=torch.Generator().manual_seed(seed), **options).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return operator


def literal_matrix(kind: str, operator) -> torch.Tensor:
    """M entry by entry, from the definition."""
    if kind == "dense":
        return operator.matrix
    if kind == "diagonal":
        return torch.diag(operator.diagonal)
    if kind == "low_rank":
        return operator.up @ operator.down
    m, n, _ = operator.second.shape
    size = n * m
    permutation = torch.zeros(size, size, dtype=torch.float64)
    for block in range(n):
        for row in range(m):
            permutation[row * n + block, block * m + row] = 1  # Π: entry `row` of block `block` goes to block `row`
    first = torch.eye(size, dtype=torch.float64) if operator.first is None else torch.block_diag(*operator.first)
    matrix = permutation.T @ torch.block_diag(*operator.second) @ permutation @ first
    return matrix[: operator.k, : operator.k]  # zero rows in, surplus rows out


@pytest.mark.parametrize("kind", KINDS)
@given(k=SIZES, d=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_block_product_is_the_dense_product(kind, k, d, seed):
    operator = operator_away_from_zero(kind, k, seed=seed)
    rows = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = literal_matrix(kind, operator)
    assert_close(operator.dense(), matrix)
    assert_close(operator(rows), matrix @ rows)
    assert_close(operator(rows.T.contiguous().T), matrix @ rows)  # any memory layout
    assert_close(operator(rows).T, rows.T @ matrix.T)  # W Mᵀ by transposing


@pytest.mark.parametrize("k", [6, 12, 35, 36])
def test_every_target_row_can_read_every_source_row(k):
    assert operator_away_from_zero("monarch", k).dense().count_nonzero() == k * k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 4, 6, 7, 9, 14])
def test_gradients(kind, k):
    operator = operator_away_from_zero(kind, k)
    rows = torch.randn(k, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in operator.named_parameters()]

    def product(rows, *parameters):
        return torch.func.functional_call(operator, dict(zip(names, parameters, strict=True)), (rows,))

    inputs = (rows, *(parameter.detach().requires_grad_() for parameter in operator.parameters()))
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 6, 7, 9, 14])
def test_gradients_without_a_graph_are_those_of_autograd(kind, k):
    operator = operator_away_from_zero(kind, k)
    factors = list(operator._parameters.values())
    rows, grad = (torch.randn(k, 3, dtype=torch.float64) for _ in range(2))
    inputs = [each for each in (rows.requires_grad_(), *factors) if each is not None]
    with torch.no_grad():
        found = [each for each in type(operator).gradients(grad, rows, *factors) if each is not None]
    assert not any(each.requires_grad for each in found)
    for ours, theirs in zip(found, torch.autograd.grad(operator(rows), inputs, grad), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_can_be_differentiated_again(kind):
    operator = operator_away_from_zero(kind, 6)
    factors = list(operator._parameters.values())
    rows, grad = (torch.randn(6, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    by_rows, *by_factors = type(operator).gradients(grad, rows, *factors)
    (found,) = torch.autograd.grad(sum(each.square().sum() for each in by_factors), rows)
    assert_close(by_rows, operator.dense().T @ grad)

    def of_rows(rows):
        gradients = torch.autograd.grad(operator(rows), factors, grad, create_graph=True)
        return sum(each.square().sum() for each in gradients)

    assert_close(found, torch.autograd.grad(of_rows(rows), rows)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_backward_of_a_composition_keeps_nothing_of_its_own(kind):
    mixer = Mixer(operator_away_from_zero(kind, 13), dim=1).double()
    rows, kept = [torch.randn(30, 200, dtype=torch.float64, requires_grad=True) for _ in range(3)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mixer(rows, [None] * 3, torch.float64)
    there = {tensor.data_ptr() for tensor in (*rows, *mixer.parameters())}
    assert {tensor.data_ptr() for tensor in kept} == there


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_over_rows_is_a_product_for_each(kind):
    operator = operator_away_from_zero(kind, 12)
    many = torch.randn(3, 12, 5, dtype=torch.float64)
    assert_close(torch.func.vmap(operator)(many), torch.stack([operator(rows) for rows in many]))
    gradients = torch.func.vmap(torch.func.grad(lambda rows: operator(rows).square().sum()))(many)
    expected = [torch.func.grad(lambda rows: operator(rows).square().sum())(rows) for rows in many]
    assert_close(gradients, torch.stack(expected))


@pytest.mark.parametrize("kind", KINDS)
@given(k=SIZES)
@settings(max_examples=20, deadline=None)
def test_an_operator_starts_at_zero_and_still_trains(kind, k):
    operator = make_operator(kind, k, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(k, 3)
    product = operator(rows)
    assert torch.equal(product, torch.zeros(k, 3))
    weights = torch.randn(k, 3)
    assert torch.equal(weights + product, weights)
    (product - torch.randn(k, 3)).square().sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in operator.parameters())
    optimizer = torch.optim.SGD(operator.parameters(), lr=0.1)
    optimizer.step()
    assert operator(rows).abs().sum() > 0


def test_no_monarch_operator_costs_more_than_a_dense_one():
    for k in range(1, 601):
        n, m = monarch_blocks(k)
        assert n * m >= k
        count = parameter_count("monarch", k)
        assert count <= k * k
        if k > 5:
            assert count <= 2.6 * k**1.5
        divisor = max(n for n in range(1, k + 1) if k % n == 0 and n * n <= k)
        if (k > 5 or k == 4) and 2 * divisor >= k**0.5:  # well factored: the method's own choice, unpadded
            assert (n, m) == (divisor, k // divisor)
            assert count == k * (n + m)


@pytest.mark.parametrize("root", [2, 3, 8, 16, 45])
def test_a_square_size_costs_two_k_root_k(root):
    assert parameter_count("monarch", root**2) == 2 * root**3


@pytest.mark.parametrize("k", [7, 11, 22, 31, 34, 62, 97])
def test_padding_is_the_cheapest_there_is(k):
    n, m = monarch_blocks(k)
    assert n * m > k
    sides = range(1, k + 1)
    assert parameter_count("monarch", k) == min(n * m * (n + m) for n in sides for m in sides if n * m >= k)


@pytest.mark.parametrize("kind", KINDS)
def test_the_analytic_count_is_the_count(kind):
    for k in [*range(1, 40), 97, 128, 384, 768]:
        built = make_operator(kind, k, device="meta")
        assert parameter_count(kind, k) == sum(parameter.numel() for parameter in built.parameters())
    assert parameter_count("low_rank", 12, rank=3) == 2 * 3 * 12
    assert make_operator("low_rank", 12, rank=3).dense().shape == (12, 12)


def test_low_rank_costs_by_default_as_much_as_monarch_allows():
    for k in range(2, 600):
        count, more = parameter_count("low_rank", k), 2 * k
        assert count <= parameter_count("monarch", k) < count + more


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [9, 13])
def test_autocast_changes_nothing(kind, k):
    operator = operator_away_from_zero(kind, k).float()
    rows = torch.randn(k, 8, requires_grad=True)
    expected = operator(rows)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), rows)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            product = operator(rows)
            assert torch.is_autocast_enabled("cpu")
            assert operator(rows.bfloat16()).dtype == torch.float32
        assert product.dtype == torch.float32
        assert torch.equal(product, expected)
        (gradient,) = torch.autograd.grad(product.square().sum(), rows)
        assert torch.equal(gradient, expected_gradient)
    assert torch.isfinite(operator(rows * 1e6)).all()  # beyond float16's range


@pytest.mark.parametrize("kind", KINDS)
def test_an_operator_is_float32_whatever_the_default_is(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = make_operator(kind, 12)
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_the_operator(kind):
    def made(seed):
        return make_operator(kind, 12, generator=torch.Generator().manual_seed(seed)).state_dict()

    again, other = made(0), made(1)
    for name, value in made(0).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == (value.abs().sum() == 0)


BOUNDS = [("monarch", "first", 64**-0.5), ("monarch_release", "first", 1 / 64), ("low_rank", "down", 4096**-0.5)]


@pytest.mark.parametrize(("kind", "factor", "bound"), BOUNDS)
def test_the_first_factor_is_uniform_as_a_linear_layer_or_as_the_release_has_it(kind, factor, bound):
    drawn = getattr(make_operator(kind, 64 * 64, generator=torch.Generator().manual_seed(0)), factor)
    assert 0.99 * bound < drawn.abs().max() <= bound
    assert_close(drawn.std().item(), bound / 3**0.5, atol=0, rtol=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, 12, 13])
def test_operators_live_on_meta_and_survive_copying_loading_and_compiling(kind, k):
    generator = torch.Generator().manual_seed(0)
    on_meta = make_operator(kind, k, device="meta", generator=generator)
    assert on_meta(torch.empty(k, 2, device="meta")).shape == (k, 2)
    with torch.device("meta"):
        assert {p.device.type for p in make_operator(kind, k, generator=generator).parameters()} == {"meta"}
    operator, rows = operator_away_from_zero(kind, k).float(), torch.randn(k, 4)
    assert torch.equal(copy.deepcopy(operator)(rows), operator(rows))
    loaded = make_operator(kind, k)
    loaded.load_state_dict(operator.state_dict())
    assert torch.equal(loaded(rows), operator(rows))
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(compiled(rows), operator(rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_agrees_with_the_cpu(kind):
    made = [make_operator(kind, 13, generator=torch.Generator().manual_seed(0), device=d) for d in ("cpu", "cuda")]
    for on_cpu, on_cuda in zip(*(operator.parameters() for operator in made), strict=True):
        assert torch.equal(on_cpu, on_cuda.cpu())
    operator, rows = operator_away_from_zero(kind, 13).float(), torch.randn(13, 8)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        product = copy.deepcopy(operator).cuda()(rows.cuda())
    assert product.dtype == torch.float32
    assert_close(product.cpu(), operator(rows), atol=1e-2, rtol=1e-2)  # TF32, where it is on


class ShiftOperator(Operator):
    """Target row i reads source row i + 1, at k parameters."""

    @classmethod
    def factors(cls, k):
        return {"weights": (k,)}

    @staticmethod
    def product(rows, weights):
        return weights[:, None] * rows.roll(-1, 0)


def test_a_new_operator_is_a_class_and_a_row(monkeypatch, tiny_model):
    with pytest.raises(ValueError, match=r"operator: unknown 'shift'; known: monarch, .*dense"):
        ApexConfig(operator="shift")
    monkeypatch.setitem(OPERATORS, "shift", ShiftOperator)
    config, model = ApexConfig(operator="shift"), tiny_model("llama")
    assert parameter_count("shift", 7) == 7
    plan = ExpansionPlan((LayerPlan(1, "channel", source=(1, 4), target=(2, 9), direct=(), units=24),), config)
    weight = model.model.layers[1].mlp.gate_proj.weight.detach().clone()
    expand(model, plan, operator=config.operator)
    table = trainable_table(model)
    assert table["trainable"][table["weight"].str.endswith("operator.weights")].tolist() == [2]
    with torch.no_grad():
        model.model.layers[1].mlp.apex_channel.operator.weights.copy_(torch.tensor([3.0, 5.0]))
    moved = fuse(model).model.layers[1].mlp.gate_proj.weight - weight
    assert_close(moved[[2, 9]], torch.stack([3 * weight[4], 5 * weight[1]]))


def test_what_a_new_operator_lacks_is_refused():
    with pytest.raises(NotImplementedError):
        Operator(4)
    with pytest.raises(NotImplementedError):
        Operator.product(torch.ones(4, 2))


def test_errors_name_what_is_needed():
    with pytest.raises(ValueError, match="at least one row, got k=0"):
        make_operator("monarch", 0)
    with pytest.raises(ValueError, match="at least one row, got k=-1"):
        parameter_count("dense", -1)
    for call in (make_operator, parameter_count):
        with pytest.raises(ValueError, match=r"unknown operator 'butterfly'; known: monarch, .*dense"):
            call("butterfly", 4)
    with pytest.raises(ValueError, match="rank from 1 to 4, got 5"):
        make_operator("low_rank", 4, rank=5)
    with pytest.raises(ValueError, match="MonarchOperator maps 4 rows, got 5"):
        make_operator("monarch", 4)(torch.zeros(5, 2))
