"""The parts of README and docs that are made from results: `make readme` writes them, a test compares them."""

import ast
import json
import re
import warnings
from pathlib import Path

import pandas as pd
import torch
from conftest import OTHER_LAYOUTS, VARIANTS, build, smallest
from study_page import RESULTS, ROOT, adapters, advice, gradients, operators, sets, sizes, study, table_head, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from apexlib import ApexConfig, activation_statistics, expand, fuse, model_components, select
from apexlib.architectures import FAMILIES, NOT_COVERED
from apexlib.suite.ledger import claims_table, measured, read_claims, repeated
from apexlib.suite.overview import WORDS

BENCH = ROOT / "data" / "results" / "bench"


def bottom() -> str:
    """The verdicts on the paper's main claims, in a few lines."""
    table = claims_table(RESULTS)
    rows = {row.number: row for row in table.itertuples()}
    counts = ", ".join(f"**{count} {verdict}**" for verdict, count in table["verdict"].value_counts().items())
    lines = [f"Of {len(table)} claims, on the model that comes with the suite:", f"{counts}.", ""]
    for question, numbers in WORDS["questions"].items():
        found = (rows[number] for number in numbers)
        said = (f"{row.statement.rstrip('.')}: *{row.verdict}*, {measured(row)}." for row in found)
        lines.append(f"- **{question}** {' '.join(said)}")
    return "\n".join(lines)


def claims() -> str:
    """The ledger's verdicts on the default run, and under other kernels."""
    table = claims_table(RESULTS)
    beside = repeated(table, RESULTS.with_name("cpu-avx2"))
    timed = {claim.number for claim in read_claims() if "step_time" in claim.measure}  # by the benchmark, not the run
    known = beside[(beside["elsewhere"] != "") & ~beside["number"].isin(timed)]
    turned = known.loc[known["elsewhere"] != known["verdict"], ["number", "elsewhere"]].itertuples(index=False)
    said = ", ".join(f"{number} ({verdict})" for number, verdict in turned) or "none"
    other = f"Of {len(known)} verdicts that the run decides, those that differ when it uses other kernels: {said}."
    if known.empty:
        other = "The same run has not been made on other kernels yet."
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    lost = table.loc[(table["together"] != table["verdict"]), "number"].tolist()
    lines = [f"{len(table)} claims: {counts}. {other}", ""]
    lines += ["| | claim | the paper | here: mean [95 % interval]; margin | n | verdict |", "|---|---|---|---|---|---|"]
    for row in table.itertuples():
        here = f"{measured(row)}; {row.margin:g}"
        cells = (row.number, row.statement, row.expected, here, row.n, f"**{row.verdict}**")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kept = "all verdicts stay" if not lost else f"claims {', '.join(map(str, lost))} become undecided, the others stay"
    return "\n".join([*lines, "", f"If 5 % is to be the error of the whole ledger (Holm), {kept}."])


def short() -> str:
    """What the tables of the default run say, in sentences."""
    runs, at_work = (pd.read_csv(RESULTS / f"{name}.csv") for name in ("instruction", "operator_share"))
    chosen = runs[runs["chosen"]].groupby("method")[["answer_loss", "retention_loss", "update_norm"]].mean()
    order = chosen.drop(index="base")["answer_loss"].sort_values()
    base, full = chosen.loc["base"], chosen.loc["full"]
    share = at_work[at_work["part"] == "M"].groupby("component")["adam_share"].mean()
    moved = runs.loc[runs["chosen"] & (runs["method"] == "apex"), "by_operator"].mean()
    fails = pd.concat(pd.read_csv(RESULTS / f"{name}_gate.csv") for name in ("instruction", "continued"))
    fails = fails[~fails["holds"]]
    said = [f"{row.condition} ({row.method}: {row.value:.3g})" for row in fails.itertuples()]
    regime = "All conditions of the gate hold." if not said else f"The gate is closed by: {'; '.join(said)}."
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in order.items())
    lines = [
        f"- **Regime.** {regime} Under full fine-tuning weights move by {full['update_norm']:.1%} of their norm, and "
        f"the loss on the base's own text goes from {base['retention_loss']:.2f} to {full['retention_loss']:.2f}.",
        f"- **Answer loss**, in nats, from the lowest: {losses}; untouched {base['answer_loss']:.2f}.",
        f"- **Operators.** Of a first step of Adam, M has {share['channel']:.1%} among channels and {share['head']:.1%}"
        f" among heads, beside the rows it works on; at the end of a stage it has made {moved:.0%} of their way.",
    ]
    return "\n".join(lines)


def run() -> str:
    """Where and with what the default run was made, and how good its base models are."""
    facts = json.loads((RESULTS / "models.json").read_text(encoding="utf-8"))
    models = pd.read_csv(RESULTS / "models.csv")
    final = models[models["step"] == models["step"].max()].groupby("model")
    losses = ", ".join(
        f"{name} ({int(part['parameters'].iloc[0]):,} parameters) {part['loss'].mean():.2f}"
        for name, part in sorted(final, key=lambda item: item[1]["parameters"].iloc[0])
    )
    shipped = pd.read_csv(ROOT / "data" / "models" / "python-3m" / "evaluation.csv")
    told = json.loads((ROOT / "data" / "models" / "python-3m" / "training.json").read_text(encoding="utf-8"))
    bits = shipped.pivot(index="predictor", columns="corpus", values="bits_per_byte")
    base = "; ".join(
        f"{corpus} {bits.loc['model', corpus]:.2f} (trigrams {bits.loc['trigram', corpus]:.2f}, "
        f"xz {bits.loc['xz -9e', corpus]:.2f})"
        for corpus in shipped["corpus"].unique()
    )
    versions = facts["versions"]
    return (
        f"Run on {facts['device']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"Python {facts['python']}. The shipped base has {told['parameters']:,} parameters and has seen "
        f"{told['settings']['tokens'] / 1e6:.0f} million tokens; held-out text in bits per byte: {base}. The small "
        f"models of notebook 00, after {models['tokens'].max() / 1e6:.1f} million tokens, in nats per token: {losses}; "
        f"token frequencies alone {facts['unigram_loss']:.2f}."
    )


def performance() -> str:
    """Time and peak memory of a step by method, from the benchmark; the targets, and where the time goes."""
    if not (BENCH / "steps.csv").exists() or "floor" not in pd.read_csv(BENCH / "steps.csv"):
        return "Not measured yet: `make bench`."
    steps, overheads, forecast, targets = (
        pd.read_csv(BENCH / f"{name}.csv") for name in ("steps", "overheads", "forecast", "targets")
    )
    cases, by_case = list(steps["case"].unique()), steps.set_index(["case", "method"])
    methods = list(steps.groupby("method", sort=False).size().sort_values(ascending=False, kind="stable").index)
    lines = table_head("", methods)
    for case in cases:
        cells = []
        for method in methods:
            cells.append("–")
            if (case, method) in by_case.index:
                row = by_case.loc[case, method]
                cells[-1] = (
                    f"{row['ratio']:.2f} ± {(row['ratio_high'] - row['ratio_low']) / 2:.2f}, {row['peak_ratio']:.2f}"
                )
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    share = overheads.set_index("quantity")["share"]
    facts = json.loads((BENCH / "steps.json").read_text(encoding="utf-8"))
    compiled = steps[steps["compiled"]].set_index("method")["compile_seconds"]
    full = steps[(steps["method"] == "full") & (steps["kind"] == "model") & ~steps["checkpointing"]]
    speeds = ", ".join(f"{row.tokens / row.seconds:,.0f} ({row.case})" for row in full.itertuples())
    lines += [
        "",
        f"Time and peak memory relative to full fine-tuning: median ± half of what lies between quartiles, of "
        f"{steps['rounds'].min()} to {steps['rounds'].max()} rounds in turn, and the peak; {facts['device']} and "
        f"{steps['threads'].max()} of all, torch {facts['versions']['torch']}. "
        f"Gathering statistics while training takes {share['statistics']:.1%} of a step, assessing a batch "
        f"{share['assessment']:.1%} of its forward pass, fusing a layer {share['fuse']:.2f} of a step. `plan_budget` "
        f"forecast all {len(forecast)} peaks to within {forecast['error'].abs().max():.1%}. To compile took "
        + ", ".join(f"{seconds:.0f} s ({method})" for method, seconds in compiled.items())
        + f" of CPU time. Tokens a second of full fine-tuning: {speeds}.",
        "",
        f"Of {len(targets)} targets {targets['holds'].sum()} hold:",
        "",
        *table_head("APEX over full fine-tuning, or what is named", ["must", "aim", "floor", "measured", "holds"]),
    ]
    for row in targets.itertuples():
        aim, floor = ("" if pd.isna(value) else f"{value:.3g}" for value in (row.aim, row.floor))
        cells = (f"≤ {row.must:g}", aim, floor, f"{row.measured:.3g}")
        lines.append(f"| {row.quantity} | " + " | ".join([*cells, "yes" if row.holds else "**no**"]) + " |")
    kinds = list(steps.columns[steps.columns.get_loc("products") : steps.columns.get_loc("rest") + 1])
    bytes_too = "floor_bytes" in steps
    read = "; of bytes of weights, gradients, the optimizer's state and what is kept for backward" if bytes_too else ""
    floors = ["floor", *(["floor_bytes"] if bytes_too else [])]
    lines += ["", f"Where the time goes, in steps of full fine-tuning; the floor: of FLOPs of products{read}.", ""]
    lines += table_head("", [name.replace("_", " ") for name in (*floors, "measured", *kinds)])
    shown = steps[(steps["kind"] == "model") & steps["method"].isin(["full", "apex", "apex-2.4%", "lora"])]
    for _, row in shown.iterrows():
        cells = [f"{row[name]:.2f}" for name in (*floors, "ratio", *kinds)]
        lines.append(f"| {row['case']}, {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def effective_rank() -> str:
    """How long the effective rank takes, and how far off it is, by ours and by what a user would call else."""
    speed, peers = (pd.read_csv(BENCH / f"effective_rank_{name}.csv") for name in ("speed", "peers"))
    facts = json.loads((BENCH / "effective_rank_speed.json").read_text(encoding="utf-8"))
    exact = speed[speed["dtype"] == "float32"]
    rows, columns = facts["shape"]
    lines = [
        f"On matrices of {rows} × {columns} with {len(exact)} spectra, in float32 on one thread, it is "
        f"{exact['ratio'].min():.1f} to {exact['ratio'].max():.1f} times as fast as `torch.linalg.svdvals`, and off by "
        f"{exact['error'].max():.0e} at most, relative to a float64 SVD (`svdvals` in float32: "
        f"{exact['svdvals_error'].max():.0e}). Matrices of a 7 B model, in float32, seconds of CPU time:",
        "",
        *table_head("matrix", ["by", "seconds", "of ours", "relative error"]),
    ]
    for row in peers.itertuples():
        cells = (row.way, f"{row.seconds:.1f}", f"{row.ratio:.1f}", f"{row.error:.0e}")
        lines.append(f"| {row.matrix}, {row.rows} × {row.columns} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def devices() -> str:
    """Peak memory of each device and what it sends in a step, by model, strategy and method, as planned."""
    table = pd.read_csv(BENCH / "devices.csv")
    methods = list(table["method"].unique())
    lines = table_head("model", ["devices", *methods])
    for (model, number, strategy), rows in table.groupby(["model", "devices", "strategy"], sort=False):
        gib = rows.set_index("method")[["train_mib", "traffic_mib"]] / 1024
        cells = [f"{gib.loc[m, 'train_mib']:.3g}, {gib.loc[m, 'traffic_mib']:.3g}" for m in methods]
        lines.append(f"| {model} | {number}{'' if number == 1 else f', {strategy}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def support() -> str:
    """What was expanded, trained away from the start and fused, for each model of the tests; exact means ≤ 1e-5."""
    rows: dict[tuple[str, ...], list[str]] = {}
    warnings.filterwarnings("ignore", ".*experts' channels are not units")  # the table says so
    models = [(family, build(variant)) for variant, (family, _) in VARIANTS.items()]
    others = sorted(set(FAMILIES) - {"gemma3", *(family for family, _ in models)})  # gemma3_text beside a picture
    layouts = [*((family, {}) for family in others), *OTHER_LAYOUTS.items()]
    models += [(family, AutoModelForCausalLM.from_config(smallest(family, **own)).eval()) for family, own in layouts]
    for family, model in models:
        parts = model_components(model)
        heads, channels = parts[0], next((part for part in parts if part.component == "channel"), None)
        copies = heads.slots["query"].index.shape[1]
        attention = "heads" if copies == 1 else "KV groups" if heads.units > 1 else "one KV group (too few to pair)"
        ffn = "–" if channels is None else "gated" if "up" in channels.slots else "plain"
        slots = [slot for part in (heads, channels) if part for slot in part.slots.values()]
        modules = [model.get_submodule(slot.module) for slot in slots]
        fused = "fused" if len({slot.module for slot in slots}) < len(slots) else "separate"
        biases = "biases" if any(module.bias is not None for module in modules) else "no biases"
        difference = fused_difference(model)
        exact = "exact" if difference <= 1e-5 else f"differs by {difference:.0e}"
        rows.setdefault((attention, ffn, f"{fused}, {biases}", exact), []).append(family)
    lines = ["| model types | attention units | FFN | projections | expanded = fused |", "|---|---|---|---|---|"]
    lines += [f"| {', '.join(dict.fromkeys(types))} | {' | '.join(cells)} |" for cells, types in rows.items()]
    lines += ["", "| not supported | because |", "|---|---|"]
    for why in dict.fromkeys(NOT_COVERED.values()):
        lines.append(f"| {', '.join(each for each in NOT_COVERED if NOT_COVERED[each] == why)} | {why} |")
    return "\n".join(lines)


def fused_difference(model: PreTrainedModel) -> float:
    """Expand half of the units, move all that trains at random, and compare logits in training mode with fused ones."""
    half = ApexConfig(fraction=0.25, direct_heads=0.5, direct_channels=0.6)
    batch = {"input_ids": torch.arange(2, 20).view(2, 9)}
    expand(model, select(activation_statistics(model, [batch], top=0.25), half)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
        torch.manual_seed(0)  # a router may draw experts in training
        before = model(**batch, use_cache=False).logits
        torch.manual_seed(0)
        return (fuse(model)(**batch, use_cache=False).logits - before).abs().max().item()


def reliability() -> str:
    """What `make test-long` did to runs and files, and what was lost."""
    rows = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS.parent / "reliability").glob("*.json"))
    ]
    lines = ["| fault | injected | survived | results lost |", "|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['tried']:,} | {r['survived']:,} | {r['tried'] - r['survived'] or 'none'} |" for r in rows
    ]
    return "\n".join(lines)


def cases() -> str:
    """What works, what is refused: the cases that tests say they try, `@pytest.mark.case(what, outcome)`."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.case":
                    what, outcome = map(ast.literal_eval, mark.args)
                    found.append((what, outcome, f"[{path.stem.removeprefix('test_')}](../tests/{path.name})"))
    order = ["works", "partly", "refused"]
    rows = [
        f"| {what} | {outcome} | {where} |"
        for what, outcome, where in sorted(found, key=lambda row: order.index(row[1]))
    ]
    return "\n".join([f"{len(rows)} cases.", "", "| | | tried in |", "|---|---|---|", *rows])


SECTIONS = {
    "adapters": adapters,
    "advice": advice,
    "bottom": bottom,
    "cases": cases,
    "claims": claims,
    "devices": devices,
    "effective_rank": effective_rank,
    "gradients": gradients,
    "operators": operators,
    "performance": performance,
    "reliability": reliability,
    "run": run,
    "sets": sets,
    "short": short,
    "sizes": sizes,
    "study": study,
    "support": support,
    "tokens": tokens,
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str) -> str:
    """Fill every section of `text` between its markers."""
    for name in re.findall(r"<!-- (\w+): made by `make readme` -->", text):
        start, end = f"<!-- {name}: made by `make readme` -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, ends, after = rest.partition(end)
        if not ends or start in rest:
            raise ValueError(f"section {name!r}: need one, that ends")
        text = f"{before}{start}{SECTIONS[name]()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
