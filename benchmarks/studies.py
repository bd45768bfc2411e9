"""The tables of the benchmark: steps, scaling, overheads and forecasts."""

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
from benchmarks.breakdown import KINDS, flops
from benchmarks.cases import Study
from benchmarks.measure import (
    MIB,
    compile_seconds,
    least_bytes,
    on_threads,
    peak_and_kinds,
    peak_of,
    peak_resident,
    ratios,
    seconds,
    taking_turns,
)
from benchmarks.workloads import PLANNED, SMALL, Case, llama_config, workload

FACTS = str.split("kind d_model d_ff layers tokens autocast checkpointing embeddings compiled threads device")
RATIOS = {"peak_ratio": "peak_mib", "resident_ratio": "resident_mib", "compile": "compile_seconds"}
RATIOS |= {"floor": "flops", "floor_bytes": "bytes"}


def measure(study: Study) -> pd.DataFrame:
    """One row per method, each quantity with its ratio to that of full fine-tuning.

    `ratio` of time has quartiles; `floor` is that of FLOPs of products, `floor_bytes` of `least_bytes`; `compile` that
    of CPU time of a first step; `products` and the like are shares of the time of full fine-tuning, taken under a
    profiler.
    """
    case, own = study.case, {}
    with on_threads(case.threads):
        works = {method: workload(case, method) for method in study.methods}
        for method, work in works.items():
            own[method] = {"compile_seconds": compile_seconds(work)} if case.compiled else {}
        times = taking_turns({method: work.step for method, work in works.items()}, study.rounds, device=case.device)
        for method, work in works.items():
            eager = workload(replace(case, compiled=False), method) if case.compiled else work
            own[method] |= {"flops": flops(eager.step)}
            peak, kinds = peak_and_kinds(work, case.device)
            own[method] |= {"bytes": least_bytes(work, peak), "peak_mib": peak / MIB, **kinds}
            own[method]["trainable"] = sum(p.numel() for p in work.module.parameters() if p.requires_grad)
    for method in study.resident:
        own[method]["resident_mib"] = peak_resident(case, method) / MIB
    table = ratios(times, "full").join(pd.DataFrame.from_dict(own, orient="index"), on="method")
    for name, of in RATIOS.items():
        table[name] = table[of] / table[of].iloc[0] if of in table else float("nan")
    table[[*KINDS]] /= table[[*KINDS]].iloc[0].sum()
    return table.assign(case=case.name, **{name: getattr(case, name) for name in FACTS})


def steps(studies: list[Study]) -> pd.DataFrame:
    """Every study's table, one after another."""
    return pd.concat([measure(study) for study in progress(studies, "steps")], ignore_index=True)


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

    Models only, on one thread, without autocast or compilation, which it does not forecast. All methods of the library
    are planned.
    """
    rows = []
    for study in progress(studies, "forecasts"):
        case = study.case
        methods = [method for method in study.methods if method in PLANNED]
        if case.kind == "block" or case.autocast or case.compiled or case.threads > 1 or case.device == "cuda":
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
