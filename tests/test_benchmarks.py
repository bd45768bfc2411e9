"""The benchmark measures what it says: equal functions, counted bytes, ratios within a round. No time is asserted."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_expansion import perturb
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from apexlib.analysis.budget import equal_statistics
from apexlib.expansion import Mixer, expand
from apexlib.projections import SplitProjection
from apexlib.selection import select
from benchmarks import effective_rank
from benchmarks.activation_space import ActivationMixer, ActivationProjection, expand_on_activations
from benchmarks.breakdown import KINDS, flops, seconds_by_kind
from benchmarks.cases import TINY as SMALL
from benchmarks.cases import Study, scaling_studies, step_studies
from benchmarks.measure import MIB, on_threads, peak_and_kinds, peak_of, ratios, taking_turns
from benchmarks.studies import forecasts, measure, overheads
from benchmarks.targets import STEPS, Target, _worst, targets
from benchmarks.workloads import APEX, METHODS, Case, llama_config, workload

TINY = Case("Llama", "model", 32, 80, 2, 4, 64, 2, 12)
BLOCK = replace(TINY, name="FFN", kind="block")


@pytest.mark.parametrize("case", [TINY, BLOCK, replace(TINY, autocast=True), replace(TINY, checkpointing=True)])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_what_trains_and_leaves_no_gradient(case, method):
    work = workload(case, method)
    tuned = [p for p in work.module.parameters() if p.requires_grad and p.numel()]
    before = [p.detach().clone() for p in tuned]
    for _ in range(2):
        work.step()
    moved = [not torch.equal(p, old) for p, old in zip(tuned, before, strict=True)]
    assert sum(moved) >= len(moved) / 2  # a factor of M or of LoRA waits for the other
    assert all(p.grad is None for p in work.model.parameters())


def test_the_activation_space_scheme_computes_the_same_function():
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config(TINY)).double()
    plan = select(equal_statistics(base), APEX)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(TINY)).double()
    perturb(expand(model, plan)).train()
    expand_on_activations(base, plan).double().train()
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, ActivationProjection):
                split = model.get_submodule(name)
                rows = split.rows.T if module.reads else split.rows
                module.delta.copy_(
                    rows - (module.weight[:, : len(split.rows)] if module.reads else module.weight[: len(rows)])
                )
                if module.s is not None:
                    module.s.copy_(split.s[0])
            elif isinstance(module, ActivationMixer):
                mixer = model.get_submodule(name.rpartition(".")[0])
                (mixer,) = (child for child in mixer.children() if isinstance(child, Mixer))
                module.v.copy_(mixer.v)
                module.second.copy_(mixer.operator.second)
                if module.first is not None:
                    module.first.copy_(mixer.operator.first)
        base.lm_head.weight.copy_(model.lm_head.weight)
        base.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
        ids = torch.arange(24).view(2, 12)
        assert any(isinstance(module, SplitProjection) for module in model.modules())
        assert_close(base(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


def test_a_peak_is_the_most_that_lives_at_once():
    def run():
        first = torch.zeros(3 * MIB // 4)
        del first
        second, third = torch.zeros(MIB // 4), torch.zeros(MIB // 4)
        return second, third

    assert peak_of(run, resident=5) == 5 + 3 * MIB
    kept = []
    peak = peak_of(run, 0, prepare=lambda: kept.append(torch.zeros(4 * MIB // 4)))
    assert peak == 7 * MIB
    freed = [torch.zeros(2 * MIB // 4)]
    assert peak_of(lambda: kept.clear() or freed.append(torch.zeros(1)), 0, prepare=lambda: None) < MIB


def test_methods_with_less_to_keep_need_less_memory():
    case = replace(BLOCK, d_model=64, d_ff=176, length=128)
    peaks = {}
    for method in ("full", "apex-split", "apex", "apex-recompute"):
        work = workload(case, method)
        work.step()
        peaks[method], _ = peak_and_kinds(work)
    assert peaks["apex-recompute"] < peaks["apex"] < peaks["apex-split"] < peaks["full"]


def test_ratios_are_taken_within_a_round():
    times = pd.DataFrame({"full": [1.0, 10.0, 2.0], "apex": [0.5, 5.0, 1.0]})  # the second round was disturbed
    table = ratios(times, "full").set_index("method")
    assert table.loc["apex", ["ratio", "ratio_low", "ratio_high"]].tolist() == [0.5, 0.5, 0.5]
    calls = []
    turns = taking_turns({name: lambda n=name: calls.append(n) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "abcbcacab"
    assert turns.shape == (3, 3)


def test_every_study_makes_a_tidy_table():
    study = Study(TINY, METHODS, 1)
    steps = measure(study)
    assert steps["method"].tolist() == list(METHODS)
    assert (steps[["seconds", "ratio", "peak_mib", "trainable", "flops"]] > 0).all().all()
    whole = steps[[*KINDS]].sum(axis=1).set_axis(steps["method"])
    assert whole["full"] == pytest.approx(1)
    assert (steps.loc[0, ["products", "attention", "optimizer"]] > 0).all()
    extra = overheads(TINY, 1)
    assert extra["quantity"].tolist() == ["statistics", "assessment", "generate", "expand", "fuse"]
    forecast = forecasts([study], steps)
    assert set(forecast["phase"]) == {"train", "assess", "fuse"}
    assert forecast.loc[forecast["phase"] == "train", "error"].abs().max() < 0.02


def test_the_forecast_of_fusing_lets_go_of_what_is_fused():
    """Frozen rows go as their weights come: at a small share of trained rows they are most of the model."""
    study = Study(replace(TINY, d_model=128, d_ff=384, layers=6), ("full", "apex", "apex-2.4%"), 1)
    table = forecasts([study], measure(study))
    assert table.loc[table["phase"] == "fuse", "error"].abs().max() < 0.02


def test_targets_are_what_was_measured_beside_what_it_must_be():
    names = {target.case for target in STEPS} - {""}
    assert names <= {study.case.name for study in step_studies("cpu", quick=False)}
    quick = {study.case.name: study.methods for study in step_studies("cpu", quick=True)}
    for target in STEPS:
        for name, methods in quick.items():
            assert name.removeprefix(SMALL) != target.case or {target.method, target.over} <= {*methods}
    rows = [(name, method, number + 2.0) for name in quick for number, method in enumerate(quick[name])]
    measured = pd.DataFrame(rows, columns=["case", "method", "ratio"]).assign(peak_mib=3.0, compile_seconds=1.0)
    measured["flops"] = 2 * measured["ratio"]
    extra = pd.DataFrame({"quantity": ["statistics", "generate", "fuse"], "share": [0.5, 0.05, 0.0]})
    table = targets(measured, extra, pd.DataFrame({"error": [0.01, -0.2]}))
    assert len(table) == len(STEPS) + 4
    assert table["holds"].equals(table["measured"] <= table["must"])
    times = table[: len(STEPS)][[target.column == "ratio" for target in STEPS]]
    assert times["floor"].tolist() == pytest.approx(times["measured"].tolist())
    assert table["floor"].notna().sum() == len(times)
    assert table["measured"].tolist()[-4:] == [0.5, 0.0, 1.05, 0.2]
    worst = pd.DataFrame({"case": ["a", "a", "b", "b", "c"], "method": ["x", "y", "x", "y", "x"]})
    worst["ratio"] = [1.0, 2.0, 3.0, 2.0, 9.0]
    assert _worst(worst, Target("", "", "x", 1.0, over="y")) == (1.5, "b")


def test_flops_are_those_of_the_products():
    x, weight = torch.randn(7, 5), torch.randn(3, 5)
    assert flops(lambda: torch.nn.functional.linear(x, weight)) == 2 * 7 * 5 * 3
    assert flops(lambda: torch.zeros(7, 3).addmm_(x, weight.T).relu()) == 2 * 7 * 5 * 3
    counts = {name: flops(workload(BLOCK, name).step) for name in ("full", "apex", "apex-split", "apex-recompute")}
    tokens, size = BLOCK.tokens, BLOCK.d_model * BLOCK.d_ff
    assert counts["full"] == 3 * 3 * 2 * tokens * size
    assert counts["apex"] == counts["apex-split"] < counts["full"]
    assert counts["apex-recompute"] - counts["apex"] == 2 * 2 * tokens * size  # gate and up once more


def test_time_is_shared_out_among_kinds_of_work():
    with torch.profiler.profile() as profiler:
        (torch.randn(64, 64) @ torch.randn(64, 64)).relu().double()
    found = seconds_by_kind(profiler)
    assert all(found[kind] > 0 for kind in ("products", "copies_and_casts", "elementwise"))
    assert found["attention"] == found["optimizer"] == 0


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with on_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_what_the_page_says_of_the_forms_of_the_ffn_is_in_the_table():
    table = pd.read_csv(Path(__file__).parents[1] / "data" / "results" / "bench" / "steps.csv")
    both = table[table["method"].isin(["apex", "apex-split"])].pivot(index=["case", "tokens"], columns="method")
    ratio, peak = (both[column].dropna() for column in ("ratio", "peak_mib"))
    assert len(ratio) >= 8
    assert (ratio["apex"] - ratio["apex-split"]).abs().max() <= 0.1
    long = peak[peak.index.get_level_values("tokens") >= 1000]
    assert (long["apex"] < long["apex-split"]).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cases_cover_what_they_should(device):
    studies = step_studies(device, quick=False)
    assert {study.case.kind for study in studies} == {"block", "model"}
    assert any(study.case.compiled for study in studies)
    assert len({study.case.name for study in studies}) == len(studies) == len(step_studies(device, quick=True))
    assert all("full" in study.methods and study.case.device == device for study in studies)
    assert {axis for axis, _ in scaling_studies(device, quick=False)} == {"tokens", "width", "layers", "k"}


def test_the_throughput_of_effective_rank_is_recorded_too(tmp_path, capsys):
    effective_rank.main(["--rows", "32", "--columns", "48", "--repeats", "1", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "effective_rank_speed.csv")
    assert (table["error"] <= 1e-6).all()
    assert (table["ratio"] > 0).all()


def test_effective_rank_is_measured_against_every_way_to_singular_values():
    table = effective_rank.peers({"flat": (24, 24), "wide": (24, 40)})
    assert table.groupby("matrix").size().tolist() == [5, 5]
    assert (table["error"] <= 1e-5).all()
    assert (table.loc[table["way"].str.contains("^ours|SciPy in float64"), "error"] <= 1e-8).all()
    assert (table.loc[table["way"] == "ours", "ratio"] == 1).all()
