"""Effective rank against a float64 SVD and its laws; tables from models and from files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VARIANTS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import apexlib.analysis.spectrum as module
from apexlib import ExpansionPlan, LayerPlan, expand
from apexlib.analysis.spectrum import (
    SPECTRAL_MEASURES,
    effective_rank,
    marchenko_pastur_rank,
    rounding_noise,
    singular_values,
    spectral_measures,
    spectrum_table,
    update_table,
)

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def literal(matrix):
    """Every measure as its formula stands, on a float64 SVD."""
    s = np.linalg.svd(np.asarray(matrix, dtype=float), compute_uv=False)
    p, q = s / s.sum(), s**2 / (s**2).sum()
    return {
        "effective_rank": np.exp(-sum(x * np.log(x) for x in p if x > 0)),
        "effective_rank_sq": np.exp(-sum(x * np.log(x) for x in q if x > 0)),
        "stable_rank": sum(s**2) / s[0] ** 2,
        "participation_ratio": sum(s**2) ** 2 / sum(s**4),
        "srank": next(k for k in range(1, len(s) + 1) if s[:k].sum() >= 0.99 * s.sum()),
        "nuclear": sum(s),
        "spectral": s[0],
        "frobenius": np.sqrt(sum(s**2)),
    }


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(sigma, columns, seed=0):
    """A matrix with these singular values."""
    left, _ = torch.linalg.qr(draw((len(sigma), len(sigma)), seed))
    right, _ = torch.linalg.qr(draw((columns, len(sigma)), seed + 1))
    return left * torch.as_tensor(sigma, dtype=torch.float64) @ right.T


@given(SHAPES, st.integers(0, 9))
def test_every_measure_equals_its_formula(shape, seed):
    matrix = draw(shape, seed)
    found, expected = spectral_measures(matrix), literal(matrix)
    assert list(found.index) == list(SPECTRAL_MEASURES) == list(expected)
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-9)
    assert effective_rank(matrix) == found["effective_rank"]


@given(SHAPES, st.integers(0, 9), st.floats(1e-150, 1e150))
def test_ranks_ignore_scale_transposition_rotation_and_order(shape, seed, scale):
    matrix = draw(shape, seed)
    ranks = list(SPECTRAL_MEASURES[:5])
    expected = spectral_measures(matrix)[ranks]
    rotation, _ = torch.linalg.qr(draw((shape[0], shape[0]), seed + 1))
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    for other in (matrix * scale, matrix.T, rotation @ matrix, matrix[:, order]):
        np.testing.assert_allclose(spectral_measures(other)[ranks], expected, rtol=1e-7)


@given(SHAPES, st.integers(1, 12), st.integers(0, 9))
def test_bounds(shape, rank, seed):
    rank = min(rank, *shape)
    matrix = draw((shape[0], rank), seed) @ draw((rank, shape[1]), seed + 1)
    found = spectral_measures(matrix)
    assert 1 <= found["effective_rank"] <= rank * (1 + 1e-6)
    # each entropy of the energy is at most that of the amplitudes, and falls with the order of Rényi
    chain = found[["effective_rank", "effective_rank_sq", "participation_ratio", "stable_rank"]].to_numpy()
    assert (chain[:-1] >= chain[1:] * (1 - 1e-9)).all()


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_identity_and_rank_one(n):
    assert spectral_measures(torch.eye(n))[list(SPECTRAL_MEASURES[:5])].tolist() == pytest.approx([n] * 5)
    one = spectral_measures(torch.ones(n, 3))
    assert one[list(SPECTRAL_MEASURES[:5])].tolist() == pytest.approx([1] * 5, abs=1e-6)
    assert one["spectral"] == pytest.approx(np.sqrt(3 * n))


def test_the_zero_matrix_has_rank_zero():
    assert spectral_measures(torch.zeros(3, 4)).eq(0).all()
    assert effective_rank(np.zeros((1, 1))) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_finite_matrix_is_refused(value):
    matrix = torch.ones(3, 4)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match=r"shape \(3, 4\) holds NaN or infinite values"):
        effective_rank(matrix)
    with pytest.raises(ValueError, match=r"shape \(3,\): need a matrix"):
        effective_rank(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(0, 3\): need a matrix with at least one entry"):
        effective_rank(torch.ones(0, 3))


RANK = np.arange(192)
SPECTRA = {
    "flat": np.ones(192),
    "power 0.5": (RANK + 1.0) ** -0.5,
    "power 4": (RANK + 1.0) ** -4,
    "condition 1e8": 1e-8 ** (RANK / 191),
    "condition 1e12": 1e-12 ** (RANK / 191),
    "condition 1e100": 1e-100 ** (RANK / 191),
    "spike": np.r_[1e7, np.ones(191)],
    "rank 12": (RANK < 12) * 1.0,
    "rank 190": (RANK < 190) * 1.0,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_gram_matrix_is_exact_enough_or_not_used(name, dtype):
    matrix = with_spectrum(SPECTRA[name], 400).to(dtype)
    assert effective_rank(matrix) == pytest.approx(literal(matrix.double())["effective_rank"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(96, 200), (200, 96), (96, 96)])
@pytest.mark.parametrize("rank", [1, 5, 12, 13])
def test_low_rank_is_exact_down_to_rounding(rank, shape, dtype, monkeypatch):
    """Up to an eighth of the full rank without an SVD of the whole, and with the rounding noise below the gap."""
    matrix = (draw((shape[0], rank)) @ draw((rank, shape[1]), 1)).to(dtype)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    if rank <= 12:
        monkeypatch.setattr(module, "_svd", None)
    found = singular_values(matrix)
    assert len(found) == 96
    np.testing.assert_allclose(found[:rank], expected[:rank], rtol=1e-9)
    if dtype == torch.float32 and rank <= 12:
        np.testing.assert_allclose(found[rank:].sum(), expected[rank:].sum(), rtol=1e-3)
    assert effective_rank(matrix) == pytest.approx(
        literal(matrix.double())["effective_rank"], rel=1e-9 if rank <= 12 else 1e-6
    )


def test_an_svd_is_taken_only_where_it_must_be(monkeypatch):
    taken = []
    svd = module._svd
    monkeypatch.setattr(module, "_svd", lambda *given: taken.append(1) or svd(*given))
    for name in ("flat", "power 0.5", "condition 1e8"):
        singular_values(with_spectrum(SPECTRA[name], 400))
    singular_values(torch.cat([draw((100, 300)), torch.zeros(50, 300)]))  # rows of zeros are exact
    assert not taken
    singular_values(with_spectrum(SPECTRA["condition 1e100"], 400))
    assert taken


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (64, 64)])
def test_parts_add_up_to_the_whole(shape, monkeypatch):
    matrix = draw(shape).float()
    whole = singular_values(matrix)
    monkeypatch.setattr(module, "_CHUNK", 700)
    np.testing.assert_allclose(singular_values(matrix), whole, rtol=0, atol=1e-11)
    np.testing.assert_allclose(singular_values(matrix.T.contiguous()), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (256, 32), (48, 480)])
def test_marchenko_pastur_is_what_gaussian_matrices_have(shape):
    sampled = np.mean([effective_rank(draw(shape, seed)) for seed in range(8)])
    assert marchenko_pastur_rank(*shape) == pytest.approx(sampled, rel=0.01)
    assert marchenko_pastur_rank(*shape) == marchenko_pastur_rank(*shape[::-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_noise_is_as_large_as_what_rounding_does(dtype):
    matrix = draw((400, 500), seed=3)
    noise, error = rounding_noise(matrix, dtype), matrix.to(dtype).double() - matrix
    assert noise.norm().item() == pytest.approx(2**0.5 * error.norm().item(), rel=0.02)
    assert error.abs().max() < noise.abs().max() < 2 * error.abs().max()
    assert rounding_noise(torch.zeros(2, 2), dtype).eq(0).all()


def test_an_update_from_rounded_checkpoints_shows_its_noise_floor():
    weight = draw((256, 704)) * 0.02
    update = draw((256, 16), 1) @ draw((16, 704), 2) * 2e-5

    def layer(values, dtype):
        linear = nn.Linear(704, 256, bias=False, dtype=dtype)
        linear.weight.data.copy_(values)
        return linear

    exact, coarse = (
        update_table(layer(weight, dtype), layer(weight + update, dtype)).iloc[0]
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert exact["effective_rank"] == pytest.approx(literal(update)["effective_rank"], rel=1e-4)
    assert exact["above_noise"] == 16
    assert coarse["effective_rank"] > 3 * exact["effective_rank"]
    assert coarse["noise_frobenius"] > 0.5 * coarse["frobenius"]
    assert coarse["noise_effective_rank"] == pytest.approx(marchenko_pastur_rank(256, 704), rel=0.02)
    assert coarse["above_noise"] <= 16


def matrices(model):
    """Name and value of each matrix; experts one by one."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            yield name, parameter
        elif parameter.dim() == 3:
            yield from ((f"{name}[{index}]", part) for index, part in enumerate(parameter))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_has_one_row_per_matrix(variant, tiny_model):
    model = tiny_model(variant)
    table = spectrum_table(model)
    assert table["weight"].tolist() == [name for name, _ in matrices(model)]
    for row, (_, matrix) in zip(table.itertuples(), matrices(model), strict=True):
        assert (row.rows, row.columns) == tuple(matrix.shape)
        assert row.effective_rank == pytest.approx(literal(matrix.detach())["effective_rank"], rel=1e-6)
        assert row.random == marchenko_pastur_rank(*matrix.shape)


def test_rows_say_where_a_weight_lies(tiny_model):
    table = spectrum_table(tiny_model("mixtral")).set_index("weight")
    assert table.loc["model.layers.1.self_attn.v_proj.weight", ["layer", "role"]].tolist() == [1, "v_proj"]
    assert table.loc["model.layers.0.mlp.experts.down_proj[3]", ["layer", "role"]].tolist() == [0, "down_proj"]
    assert table.loc["lm_head.weight", ["layer", "role"]].tolist() == [-1, "lm_head"]


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_gives_the_table_of_its_model(shard, dtype, tiny_model, tmp_path):
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=11)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "5KB")
    table, expected = spectrum_table(tmp_path), spectrum_table(model)
    by_name = expected.set_index("weight").loc[table["weight"]].reset_index()
    pd.testing.assert_frame_equal(table, by_name)
    layers = [int(name.split(".")[2]) for name in table["weight"] if ".layers." in name]
    assert layers == sorted(layers)


def test_processes_measure_a_folder_side_by_side(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    pd.testing.assert_frame_equal(spectrum_table(tmp_path, processes=2), spectrum_table(tmp_path), check_exact=True)
    with pytest.raises(ValueError, match="processes 2: need a folder"):
        spectrum_table(model, processes=2)


def test_updates_of_folders_and_of_models_agree(tiny_model, tmp_path):
    base, tuned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[3] += 1.0
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    table = update_table(tmp_path / "base", tuned).set_index("weight")
    for row in table.itertuples():
        weights = [model.get_parameter(row.Index).detach().double() for model in (base, tuned)]
        chance = torch.randn(weights[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        chance *= (weights[1] - weights[0]).norm() / chance.norm()
        expected = [literal(matrix)["effective_rank"] for matrix in (*weights, weights[0] + chance)]
        assert [row.before, row.after, row.by_chance] == pytest.approx(expected, rel=1e-6)
    others = table.drop(index=(name := "model.layers.1.mlp.up_proj.weight"))
    assert others[["effective_rank", "frobenius", "relative", "above_noise"]].eq(0).all(axis=None)
    assert table.loc[name, ["effective_rank", "above_noise"]].tolist() == pytest.approx([1, 1])
    assert table.loc[name, "frobenius"] == pytest.approx(4, rel=1e-6)  # 16 entries moved by 1
    again = update_table(base, tmp_path / "tuned").set_index("weight")
    pd.testing.assert_frame_equal(again.loc[table.index], table)


def test_updates_of_several_models_are_those_of_each(tiny_model):
    precisions = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    base, *tuned = (tiny_model("llama", dtype=dtype) for dtype in precisions)
    with torch.no_grad():
        for number, model in enumerate(tuned[:2], 1):  # the third is the base itself
            model.model.layers[1].mlp.up_proj.weight.add_(draw((24, 16), number).to(model.dtype))
    table = update_table(base, tuned)
    for number, model in enumerate(tuned):
        own = table[table["tuned"] == number].drop(columns="tuned").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, update_table(base, model), check_exact=True)
    with pytest.raises(ValueError, match=r"is in base, not in tuned"):
        update_table(base, [tuned[0], tiny_model("gpt2")])
    with pytest.raises(ValueError, match="tuned: need at least one model"):
        update_table(base, [])


def test_what_cannot_be_measured_is_named(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: need a folder with safetensors files"):
        spectrum_table(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        spectrum_table(tmp_path)
    with pytest.raises(ValueError, match="LayerNorm has no weight matrix"):
        spectrum_table(nn.LayerNorm(3))
    save_file({"a": torch.ones(2, 2), "b": torch.full((2, 2), torch.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^b: matrix of shape \(2, 2\) holds NaN"):
        spectrum_table(tmp_path)
    save_file({"a": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a is torch.int8: need 16 bits or more"):
        spectrum_table(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        spectrum_table(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ("[", "need JSON with a weight_map"),
        (json.dumps({"weight_map": {"a": "../else.safetensors"}}), "is no file of this folder"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors is missing"),
    ):
        index.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            spectrum_table(tmp_path)
    with pytest.raises(ValueError, match=r"is in base, not in tuned"):
        update_table(tiny_model("llama"), tiny_model("gpt2"))
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight: \(24, 16\) in base, \(32, 16\) in tuned"):
        update_table(tiny_model("llama"), tiny_model("llama", intermediate_size=32))
    model = tiny_model("llama")
    plan = ExpansionPlan((LayerPlan(0, "channel", source=(1,), target=(0,), direct=(), units=24),))
    with pytest.raises(ValueError, match="the model is expanded"):
        spectrum_table(expand(model, plan))


def test_what_float64_cannot_hold_is_refused_and_what_it_can_is_measured():
    assert effective_rank(np.eye(3) * 2.0**1021) == pytest.approx(3)
    assert effective_rank(np.eye(3) * 2.0**-1070) == pytest.approx(3)
    with pytest.raises(ValueError, match=r"entries up to 1\.5e\+308: the singular values or their sum overflow"):
        effective_rank(np.full((2, 2), 1.5e308))


def test_a_view_that_runs_backwards_is_measured_as_its_copy_is():
    matrix = np.random.default_rng(0).normal(size=(5, 7))
    assert effective_rank(matrix[::-1, ::-1]) == pytest.approx(effective_rank(matrix), rel=1e-12)
    assert effective_rank(matrix.T[::2]) == pytest.approx(effective_rank(matrix.T[::2].copy()), rel=1e-12)


def test_names_with_digits_of_other_kinds_are_names(tmp_path):
    save_file({"layers.².q.weight": torch.eye(3), "layers.10.q.weight": torch.eye(3)}, tmp_path / "model.safetensors")
    table = spectrum_table(tmp_path).set_index("weight")
    assert table["layer"].to_dict() == {"layers.².q.weight": -1, "layers.10.q.weight": 10}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_refused_by_name(dtype, tmp_path):
    save_file({"a.weight": torch.eye(4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight is torch\.float8.*: need 16 bits or more"):
        spectrum_table(tmp_path)


def test_an_index_that_is_too_deep_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json: need JSON with a weight_map"):
        spectrum_table(tmp_path)
