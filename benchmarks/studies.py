"""The tables of the benchmark: steps, scaling, overheads, forecasts, and what the suite promises of itself."""

from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from transformers import PreTrainedModel

from apexlib.activations import ActivationRecorder
from apexlib.analysis.budget import equal_statistics, plan_budget
from apexlib.expansion import expand, fuse
from apexlib.progress import progress
from apexlib.selection import select
from benchmarks.cases import Study
from benchmarks.measure import MIB, peak_memory, peak_of, peak_resident, ratios, seconds, taking_turns
from benchmarks.workloads import PLANNED, SMALL, Case, llama_config, workload


def measure(study: Study) -> pd.DataFrame:
    """One row per method: seconds, ratio to full fine-tuning with quartiles, peak memory and its ratio."""
    case = study.case
    works = {method: workload(case, method) for method in study.methods}
    times = taking_turns({method: work.step for method, work in works.items()}, study.rounds, device=case.device)
    table = ratios(times, "full")
    resident = pd.Series({method: peak_resident(case, method) / MIB for method in study.resident}, dtype=float)
    peaks = pd.Series({method: peak_memory(work, case.device) / MIB for method, work in works.items()})
    table["peak_mib"], table["resident_mib"] = table["method"].map(peaks), table["method"].map(resident)
    table["peak_ratio"], table["resident_ratio"] = (table[n] / table[n].iloc[0] for n in ("peak_mib", "resident_mib"))
    trainable = {
        method: sum(p.numel() for p in w.module.parameters() if p.requires_grad) for method, w in works.items()
    }
    table["trainable"] = table["method"].map(trainable)
    facts = {name: getattr(case, name) for name in ("kind", "d_model", "d_ff", "layers", "tokens", "autocast")}
    facts |= {"checkpointing": case.checkpointing, "embeddings": case.embeddings, "compiled": case.compiled}
    return table.assign(**facts | {"threads": torch.get_num_threads(), "device": case.device})


def steps(studies: list[Study]) -> pd.DataFrame:
    """Every study's table, one after another."""
    return pd.concat([measure(s).assign(case=s.case.name) for s in progress(studies, "steps")], ignore_index=True)


def throughput(cases: list[Case], rounds: int) -> pd.DataFrame:
    """Tokens a second of full training, with quartiles, a row per model and precision."""
    rows = []
    for case in progress(cases, "throughput"):
        forms = {"float32": case, "bf16": replace(case, autocast=True)}
        works = {precision: workload(form, "full") for precision, form in forms.items()}
        times = taking_turns({name: work.step for name, work in works.items()}, rounds, device=case.device)
        for precision, work in works.items():
            low, middle, high = (case.tokens / times[precision].quantile(q) for q in (0.75, 0.5, 0.25))
            row = {"model": case.name, "parameters": work.model.num_parameters(), "precision": precision}
            rows.append(row | {"tokens_per_second": middle, "low": low, "high": high})
    return pd.DataFrame(rows).assign(threads=torch.get_num_threads())


def scaling(studies: dict[tuple[str, float], Study]) -> pd.DataFrame:
    """How time and memory grow, `axis` by `axis`."""
    tables = [measure(s).assign(axis=axis, value=value) for (axis, value), s in progress(studies.items(), "scaling")]
    return pd.concat(tables, ignore_index=True)


def overheads(case: Case, rounds: int) -> pd.DataFrame:
    """What comes on top of steps: columns `quantity`, `share` of a step (of a forward pass, for assessment), quartiles.

    `statistics`: gathered while training; `assessment`: a batch assessed, over its plain forward pass; `generate`: 128
    tokens by the expanded model, over those by the plain one; `fuse` and `expand`: of one layer.
    """
    work = workload(case, "apex")

    recorder = ActivationRecorder(work.model, training_only=True)  # made once for a stage

    def recorded() -> None:
        with recorder:
            work.step()

    times = taking_turns({"step": work.step, "recorded": recorded}, rounds, device=case.device)
    rows = [_share("statistics", times["recorded"] / times["step"] - 1)]
    plain = workload(case, "full")

    @torch.no_grad()
    def forward() -> None:
        plain.model.eval().base_model(input_ids=plain.inputs[0], use_cache=False)

    def assessed() -> None:
        with ActivationRecorder(plain.model):
            forward()

    passes = taking_turns({"forward": forward, "assessed": assessed}, rounds, device=case.device)
    rows.append(_share("assessment", passes["assessed"] / passes["forward"] - 1))

    def written(model: PreTrainedModel) -> None:
        ids, cached = plain.inputs[0][:1, :8], {"use_cache": True, "pad_token_id": 0}
        model.eval().generate(ids, min_new_tokens=128, max_new_tokens=128, do_sample=False, **cached)

    models = {"plain": plain.model, "expanded": work.model}
    texts = taking_turns({name: partial(written, m) for name, m in models.items()}, rounds, device=case.device)
    rows.append(_share("generate", texts["expanded"] / texts["plain"] - 1))
    plan = select(equal_statistics(plain.model), case.config)
    changes = [
        (seconds(lambda: expand(plain.model, plan), case.device), seconds(lambda: fuse(plain.model), case.device))
        for _ in range(rounds)
    ]
    for name, values in zip(("expand", "fuse"), zip(*changes, strict=True), strict=True):
        rows.append(_share(name, pd.Series(values) / case.layers / times["step"].median()))
    return pd.DataFrame(rows)


def _share(quantity: str, values: pd.Series) -> dict[str, float | str]:
    low, middle, high = (values.quantile(q) for q in (0.25, 0.5, 0.75))
    return {"quantity": quantity, "share": middle, "share_low": low, "share_high": high, "rounds": len(values)}


def forecasts(studies: list[Study], measured: pd.DataFrame) -> pd.DataFrame:
    """Peak memory that `plan_budget` forecasts beside what was measured, by case, method and phase.

    Models only, without autocast or compilation, which it does not forecast. All methods of the library are planned.
    """
    rows = []
    for study in progress(studies, "forecasts"):
        case = study.case
        methods = [method for method in study.methods if method in PLANNED]
        if case.kind == "block" or case.autocast or case.compiled or case.device == "cuda":
            continue
        for method, config in _configs(case, methods, study.methods):
            name = method.partition("-")[0]
            table = plan_budget(
                llama_config(case),
                config,
                batch=case.batch,
                length=case.length,
                methods=[name],
                gradient_checkpointing=case.checkpointing,
            )
            here = (measured["case"] == case.name) & (measured["method"] == method)
            found = {"train": measured.loc[here, "peak_mib"].item()}
            if name == "apex" and not case.checkpointing:
                found |= _other_phases(case, method)
            for phase, value in found.items():
                rows.append((case.name, method, phase, table[f"{phase}_mib"].item(), value))
    table = pd.DataFrame(rows, columns=["case", "method", "phase", "forecast_mib", "measured_mib"])
    return table.assign(error=table["forecast_mib"] / table["measured_mib"] - 1)


def _configs(case: Case, planned: list[str], methods: tuple[str, ...]) -> list:
    config = replace(case.config, train_embeddings=case.embeddings)
    pairs = [(method, config) for method in planned]
    pairs += [
        (f"apex-{form}", replace(config, ffn=form)) for form in ("split", "recompute") if f"apex-{form}" in methods
    ]
    return pairs + ([("apex-2.4%", SMALL)] if "apex-2.4%" in methods else [])


def _other_phases(case: Case, method: str) -> dict[str, float]:
    plain = workload(case, "full")
    weights = sum(p.nbytes for p in plain.model.parameters()) + plain.inputs[0].nbytes

    def assess() -> None:
        with ActivationRecorder(plain.model), torch.no_grad():
            plain.model.eval().base_model(input_ids=plain.inputs[0], use_cache=False)

    assess_peak = peak_of(assess, weights, case.device)
    return {"assess": assess_peak / MIB, "fuse": _fuse_peak(case, method) / MIB}


def _fuse_peak(case: Case, method: str) -> int:
    """Fusing frees what was there before: count from before the model exists."""
    made = []

    def prepare() -> None:
        made.append(workload(case, method))
        made[0].step()

    return peak_of(lambda: fuse(made[0].model), 0, case.device, prepare=prepare)


def targets(measured: pd.DataFrame, extra: pd.DataFrame, forecast: pd.DataFrame) -> pd.DataFrame:
    """What the suite promises of a step of APEX, beside what was measured; the first block and model are meant.

    Columns: `quantity`, `bound` (a ratio, at most), `measured`, `holds`.
    """
    half = [case for case in measured["case"].unique() if case == "Llama 7 × 512, bfloat16"]  # not of --quick
    block, model = (measured[measured["kind"] == kind]["case"].iloc[0] for kind in ("block", "model"))
    frozen = next((case for case in measured["case"].unique() if case.endswith("embeddings frozen")), None)

    def value(case: str, method: str, column: str = "ratio") -> float:
        return measured.loc[(measured["case"] == case) & (measured["method"] == method), column].item()

    share = extra.set_index("quantity")["share"]

    def against(case: str, other: str) -> float:
        return value(case, "apex") / value(case, other)

    rows = [
        ("FFN block: step to full fine-tuning", 0.90, value(block, "apex")),
        ("FFN block: step to full fine-tuning, equally fused", 0.92, against(block, "full-fused")),
        ("FFN block: step to the activation-space scheme", 0.70, against(block, "activation-space")),
        ("FFN block: peak memory", 0.75, value(block, "apex", "peak_ratio")),
        ("FFN block, recomputing: step", 1.12, value(block, "apex-recompute")),
        ("FFN block, recomputing: peak memory", 0.55, value(block, "apex-recompute", "peak_ratio")),
        ("model: step, embeddings trained", 0.94, value(model, "apex")),
        ("model: step, embeddings frozen", 0.88, value(frozen, "apex")),
        ("model: peak memory, embeddings trained", 0.77, value(model, "apex", "peak_ratio")),
        ("model: peak memory, embeddings frozen", 0.70, value(frozen, "apex", "peak_ratio")),
        ("model: step to the activation-space scheme", 0.78, against(model, "activation-space")),
        ("statistics gathered in training, share of a step", 0.02, share["statistics"]),
        ("fusing a layer, in steps", 1.0, share["fuse"]),
        ("generating 128 tokens, to the plain model", 1.1, 1 + share["generate"]),
        ("forecast of peak memory, largest error", 0.10, forecast["error"].abs().max()),
    ]
    for case in half:
        rows.append((f"{case}: step to full fine-tuning", 1.0, value(case, "apex")))
        rows.append((f"{case}: step to LoRA", 0.9, against(case, "lora")))
    rows += [
        (f"{case}, APEX 2.4 %: step to LoRA", 1.0, value(case, "apex-2.4%") / value(case, "lora"))
        for case in dict.fromkeys((block, model, *half))
    ]
    table = pd.DataFrame(rows, columns=["quantity", "bound", "measured"])
    return table.assign(holds=table["measured"] <= table["bound"])
