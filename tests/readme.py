"""The parts of README and docs that are made from results: `make readme` writes them, a test compares them."""

import ast
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd
import torch
from conftest import OTHER_LAYOUTS, VARIANTS, build, smallest
from transformers import AutoModelForCausalLM, PreTrainedModel

from apexlib import ApexConfig, activation_statistics, expand, fuse, model_components, select
from apexlib.analysis.intervals import summarise
from apexlib.architectures import FAMILIES, NOT_COVERED
from apexlib.suite.comparison import token_ratios
from apexlib.suite.differences import paired_differences
from apexlib.suite.figures import told
from apexlib.suite.ledger import choose, claims_table, measured, read_claims, repeated
from apexlib.suite.measures import matched
from apexlib.suite.overview import WORDS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results" / "cpu"
BENCH = ROOT / "data" / "results" / "bench"
STUDY = ROOT / "data" / "results" / "study"
SIZES = {"0.46 M, five bases": "460k", "0.84 M, five bases": "840k", "1.5 M, five bases": "1500k"}
SIZES = {size: STUDY.with_name(f"study-{name}") for size, name in SIZES.items()} | {"2.7 M, one base": STUDY}
OF_SMALL_MODELS = (5, 6, 7, 8)  # claims on what training does, of which the shipped base has no checkpoints
STEPS = ROOT / "figures" / "study-840k"  # with those of the study, and others
OPERATORS = STUDY.with_name("study-operators")
SETS = {"256 × 5": "study-256", "1,280 × 1": "study", "5,120 × 1": "study-5120", "20,480 × 1": "study-20480"}
SET_PAIRS = (("lora", "full"), ("direct-random-1", "full"), ("apex", "full"), ("apex", "direct-random-1"))
TOKENS = ROOT / "data" / "results" / "study-tokens"
DORA = ROOT / "data" / "results" / "study-dora"
DORA_PAIRS = (("dora", "lora"), ("dora-2.4%", "lora-2.4%"), ("dora", "full"), ("dora-2.4%", "full"))
GRADIENT = ROOT / "data" / "results" / "study-gradient"
FRESH = 5  # the first seed of `study-gradient` that was run after the others had been looked at
GRADIENT_PAIRS = (("direct-gradient", "direct"), ("direct-gradient", "direct-random"), ("direct-gradient", "full"))
GRADIENT_PAIRS += (("gradient", "direct-gradient"), ("gradient", "apex"))
MEASURES = {"answer_loss": "answer loss, nats", "exact_match": "exact match", "retention_loss": "retention, nats"}
_INTERVAL = "{0[mean]:+.4f} [{0[low]:+.4f}, {0[high]:+.4f}]"
ADVICE = {  # by a claim's number and verdict
    52: {
        "reproduced": "Half of the rows, drawn at random, learn as much as all: take them where memory is short.",
        "opposite": "Train all rows where memory allows: half of them learns less.",
    },
    53: {
        "reproduced": "Draw other rows half way: that learns more than training the first ones all the way.",
        "no difference": "Keep the rows that were drawn first: a second stage with others learns no more.",
        "opposite": "Keep the rows that were drawn first: a second stage with others learns less.",
    },
    54: {
        "reproduced": "Choose rows by their advantage: they learn more than rows drawn at random.",
        "no difference": "Draw rows at random: those chosen by their advantage learn no more.",
        "opposite": "Draw rows at random: those chosen by their advantage learn less.",
    },
    22: {
        "reproduced": "Add operators to rows that train: they learn more.",
        "no difference": "Leave operators out where the rows they write to train themselves: they add nothing.",
        "opposite": "Leave operators out where the rows they write to train themselves: they learn less.",
    },
    20: {
        "reproduced": "For a few per cent of the weights, APEX learns more than LoRA.",
        "no difference": "For a few per cent of the weights, LoRA and APEX learn as much.",
        "opposite": "For a few per cent of the weights, take LoRA: APEX of that size learns less.",
    },
}


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


def study() -> str:
    """What every method of the study learnt and forgot, less what full fine-tuning did, and its verdicts."""
    if not (STUDY / "claims.csv").exists():
        return "Not run to its end yet."
    tried = pd.read_csv(STUDY / "instruction.csv")
    runs, grid = tried.query("chosen"), tried.loc[tried["method"] == "full", "learning_rate"]
    methods = [name for name in runs["method"].unique() if name not in ("base", "full")]
    means = runs.groupby("method")[["trainable", "learning_rate", "by_operator", *MEASURES]].mean()
    table = _above(runs, {f"`{method}`": ("full", method) for method in methods})
    here = means.loc[methods].reset_index(drop=True)
    table.insert(1, "trains", here["trainable"].map("{:.1%}".format))
    table.insert(2, "rate", here["learning_rate"].map("{:g}".format))
    table.insert(3, "by operators", here["by_operator"].map("{:.0%}".format).replace("nan%", "–"))
    of_full = ", ".join(f"{title} {means.loc['full', name]:.4f}" for name, title in MEASURES.items())
    here, default = (claims_table(folder).set_index("number") for folder in (STUDY, RESULTS))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in here["verdict"].value_counts().items())
    turned = here[here["verdict"] != default["verdict"]]["verdict"].items()
    said = ", ".join(f"{number} ({default.loc[number, 'verdict']}, here {verdict})" for number, verdict in turned)
    steps = pd.read_csv(STEPS / "decomposition.csv")
    steps = steps[steps["panel"] == steps["panel"].iloc[0]]
    steps["change"] = steps.apply(_INTERVAL.format, axis=1)
    changes = steps.pivot(index="setting", columns="method", values="change")
    changes = changes.loc[steps["setting"].unique(), steps["method"].unique()].rename_axis(columns=None).reset_index()
    return f"""{told("decomposition", STEPS)[0]} The answer loss, in nats:

{changes.to_markdown(index=False, disable_numparse=True)}

With the base and the conversations of the default run, means over {runs["seed"].nunique()} seeds; differences to `full`
in a seed, 95 % intervals. `full` itself: {of_full}. A lower rate forgets less;
{_at_ends(runs, grid)}

{table.to_markdown(index=False, disable_numparse=True)}

Of {len(here)} claims: {counts}. Verdicts that differ from those of the default run: {said or "none"}."""


def _at_ends(chosen: pd.DataFrame, grid: pd.Series) -> str:
    """Name the methods that chose the lowest or the highest learning rate of a grid."""
    ends = chosen.loc[chosen["learning_rate"].isin([grid.min(), grid.max()]), "method"].unique()
    return f"chosen at an end of the grid: {', '.join(f'`{name}`' for name in ends) or 'none'}."


def sizes() -> str:
    """What bases of several sizes say of the same claims: those that the page asks first, and verdicts that differ."""
    there = {size: folder for size, folder in SIZES.items() if (folder / "masking.csv").exists()}
    found = {size: _decided(claims_table(folder)) for size, folder in there.items()}
    study = found[[*SIZES][-1]]
    for number in OF_SMALL_MODELS:
        study.pop(number, None)
    lines = _table_head("", ["claim", "the paper", *found])
    for number in dict.fromkeys(chain(range(1, 7), *WORDS["questions"].values(), ADVICE)):
        rows = [table.get(number) for table in found.values()]
        claim = next(filter(None, rows))
        cells = (f"{measured(row)}: **{row.verdict}**" if row else "–" for row in rows)
        lines.append(f"| {number} | {claim.statement} | {claim.expected} | {' | '.join(cells)} |")
    for size, table in found.items():
        if table is not study and (SIZES[size] / "instruction.csv").exists():
            lines += ["", fill(" ".join(_of_size(size, table, study).split()), 120, break_on_hyphens=False)]
    return "\n".join(lines)


def _decided(table: pd.DataFrame) -> dict[int, Any]:
    """The rows of a ledger that were measured, by number."""
    return {row.number: row for row in table.itertuples() if row.verdict != "not measured"}


def _of_size(size: str, table: Mapping[int, Any], study: Mapping[int, Any]) -> str:
    """How the verdicts of a smaller size differ from those of the study, and what to know of its runs."""
    both = [number for number in table if number in study]
    turned = [number for number in both if table[number].verdict != study[number].verdict]
    said = ", ".join(f"{number} ({study[number].verdict}, here {table[number].verdict})" for number in turned)
    counts = pd.Series([row.verdict for row in table.values()]).value_counts().items()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in counts)
    of_answers = ", ".join(str(number) for number in both if table[number].unit == "share of answers")
    tried = [pd.read_csv(folder / "instruction.csv") for folder in (SIZES[size], STUDY)]
    right = [runs.query("chosen and method == 'full'")["exact_match"].mean() for runs in tried]
    grid = tried[0].loc[tried[0]["method"] == "full", "learning_rate"]
    ends_at = pd.read_csv(SIZES[size] / "continued.csv").query("chosen and tokens == tokens.max()")
    pair = {"apex-all": ("restart-all", "apex-all")}
    beside = summarise(paired_differences(ends_at, pair, "loss"), ["method"], "above").iloc[0]
    little = f": claims on shares of answers ({of_answers}) mean little there" if right[0] < 0.2 else ""
    of_size = size.partition(",")[0]
    return f"""Of {len(table)} claims that bases of {of_size} measure: {counts}. The study measures {len(both)} of them
        and comes to another verdict on {len(turned)}: {said or "none"}. Fully fine-tuned, they give {right[0]:.0%} of
        the answers that are asked for, the study's base {right[1]:.0%}{little}. Continued
        pre-training (38), `apex-all` less `restart-all`, which has a fresh optimizer half way as APEX has, and no more:
        {_INTERVAL.format(beside)} nats. Of the rates, {_at_ends(tried[0].query("chosen"), grid)}"""


def _above(runs: pd.DataFrame, pairs: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """What the second method of each of `pairs` learnt and forgot, less what the first did, a row a pair."""
    table = pd.DataFrame({"": list(pairs)})
    for name, title in MEASURES.items():
        rows = summarise(paired_differences(runs, pairs, name), ["method"], "above").set_index("method")
        table[title] = [_INTERVAL.format(rows.loc[pair]) for pair in pairs]
    return table


def _named(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {f"`{name}` less `{than}`": (than, name) for name, than in pairs}


def adapters() -> str:
    """What DoRA adds to LoRA of the same rank, at two ranks."""
    if not (DORA / "instruction.csv").exists():
        return "Not run to its end yet."
    chosen = pd.read_csv(DORA / "instruction.csv").query("chosen and method != 'base'")
    means = chosen.groupby("method")[["trainable", "learning_rate"]].mean()
    said = [f"`{name}` {row.trainable:.1%} at {row.learning_rate:g}" for name, row in means.iterrows()]
    table = _above(chosen, _named(DORA_PAIRS)).to_markdown(index=False, disable_numparse=True)
    return f"""Means over {chosen["seed"].nunique()} seeds, 95 % intervals. What trains, and the rate:
{", ".join(said)}.

{table}"""


def operators() -> str:
    """What operators add to rows that train, at rates over three decades and drawn otherwise, and alone."""
    if not (OPERATORS / "instruction.csv").exists():
        return "Not run to its end yet."
    chosen = pd.read_csv(OPERATORS / "instruction.csv").query("chosen and method != 'base'")
    methods = [name for name in chosen["method"].unique() if not name.startswith(("full", "direct"))]
    pairs = _named((name, "direct-2.4%" if name.endswith("-2.4%") else "direct") for name in methods)
    table = _above(chosen, pairs)
    moved = chosen.groupby("method")["by_operator"].mean()[methods].map("{:.0%}".format).replace("nan%", "–")
    table.insert(1, "by operators", moved.to_numpy())
    above = summarise(paired_differences(chosen, pairs, "answer_loss"), ["method"], "above").set_index("method")
    learnt = [f"{name} ({_INTERVAL.format(row)})" for name, row in above.loc[[*pairs]].iterrows() if row["high"] < 0]
    return f"""Means over {chosen["seed"].nunique()} seeds, 95 % intervals; by operators: their part of what rows moved.

{table.to_markdown(index=False, disable_numparse=True)}

A lower answer loss, clear of zero: {"; ".join(learnt) or "none"}."""


def gradients() -> str:
    """What rows chosen by their gradients learnt and forgot, less what others did: seeds known before, fresh ones."""
    if not (GRADIENT / "instruction.csv").exists():
        return "Not run to its end yet."
    chosen = pd.read_csv(GRADIENT / "instruction.csv").query("chosen and method != 'base'")
    tables = []
    for fresh, runs in chosen.groupby(chosen["seed"] >= FRESH):  # the fresh ones last
        tables.append(table := _above(runs, _named(GRADIENT_PAIRS)))
        table.insert(1, "seeds", f"{runs['seed'].min()} to {runs['seed'].max()}{', fresh' if fresh else ''}")
    rate = chosen.loc[chosen["method"] == "apex", "learning_rate"].iloc[0]
    shown = pd.concat(tables).to_markdown(index=False, disable_numparse=True)
    (name, than), margin = GRADIENT_PAIRS[0], choose(read_claims(), ["selection-direct"])[0].margin
    above = paired_differences(runs, {name: (than, name)}, "answer_loss")
    tested = summarise(above, ["method"], "above").iloc[0]
    clear = "clear of zero" if tested["low"] * tested["high"] > 0 else "not clear of zero"
    size = "and smaller than" if max(-tested["low"], tested["high"]) < margin else "and not within"
    return f"""Means over seeds, 95 % intervals; at the rate of `apex`, {rate:g}.

{shown}

The test, `{name}` less `{than}` on the fresh seeds: {_INTERVAL.format(tested)} nats,
{clear} {size} the margin of {margin:g}."""


def sets() -> str:
    """What full fine-tuning learnt from few and many conversations, and what others learnt and forgot less that."""
    columns, clear = {}, dict[str, list[str]]()
    for size, name in SETS.items():
        if not (folder := STUDY.with_name(name)).joinpath("instruction.csv").exists():
            continue
        chosen = pd.read_csv(folder / "instruction.csv").query("chosen and method != 'base'")
        full = chosen[chosen["method"] == "full"]
        said = {"seeds": f"{full['seed'].nunique()}", "rate of `full`": f"{full['learning_rate'].iloc[0]:g}"}
        said |= {f"`full`: {title}": f"{full[name].mean():.4f}" for name, title in MEASURES.items()}
        above = paired_differences(chosen, _named(SET_PAIRS), "answer_loss")
        at_one = {"table": "instruction", "column": "retention_loss", "along": "valid_loss", "over": "full"}
        for of in ("lora", "apex"):
            forgotten = -matched(folder, of=of, **at_one)
            row = {"method": f"`{of}` less `full`: retention at the same loss", "above": forgotten}
            above = pd.concat([above, pd.DataFrame(row)])
        rows = summarise(above, ["method"], "above").set_index("method")
        rows = rows.rename(index={pair: f"{pair}: answer loss" for pair in _named(SET_PAIRS)})
        columns[size] = said | rows.apply(_INTERVAL.format, axis=1).to_dict()
        for row in rows.index[rows["low"] * rows["high"] > 0]:
            clear.setdefault(row, []).append(size)
    shown = pd.DataFrame(columns).rename_axis("conversations").reset_index()
    said = "; ".join(f"{row}, at {', '.join(sizes)}" for row, sizes in clear.items())
    return f"""Differences in nats, within a seed, 95 % intervals.

{shown.to_markdown(index=False, disable_numparse=True)}

Clear of zero, of which chance makes one in twenty: {said or "none"}."""


def tokens() -> str:
    """Loss after continued pre-training at each length, and the tokens that each method needs for the same loss."""
    if not (TOKENS / "continued.csv").exists():
        return "Not run to its end yet."
    curves = pd.read_csv(TOKENS / "continued.csv")
    grid = curves[curves["learning_rate"] > 0]["learning_rate"]
    curves = curves[curves["chosen"] & curves["method"].str.endswith("%")]
    lengths = curves[curves["tokens"] > 0].assign(method=curves["method"].str.rpartition("-")[0])
    methods, seeds = list(lengths["method"].unique()), list(lengths["seed"].unique())
    table = lengths.pivot_table(index="tokens", columns="method", values="loss")
    above = [
        paired_differences(part, {name: (methods[0], name) for name in methods}, "loss").assign(tokens=number)
        for number, part in lengths.groupby("tokens")
    ]
    said = summarise(pd.concat(above), ["tokens", "method"], "above").set_index(["tokens", "method"])
    rates = lengths.pivot_table(index="tokens", columns="method", values="learning_rate")
    shown = pd.DataFrame({"tokens": [f"{number:,}" for number in table.index]})
    shown[methods[0]] = table[methods[0]].map("{:.4f}".format).to_numpy()
    for name in methods[1:]:
        shown[f"{name}, above that"] = [_INTERVAL.format(said.loc[number, name]) for number in table.index]
    shown["peak rates"] = [", ".join(f"{rates.loc[number, name]:g}" for name in methods) for number in table.index]
    start = curves[curves["tokens"] == 0].drop_duplicates("seed")
    joined = pd.concat([lengths, *(start.assign(method=name) for name in methods)])
    lines = [f"By three seeds, {_at_ends(curves, grid)}", ""]
    for name in methods[1:]:
        need, instead = (
            token_ratios(joined, [one], seeds, goal=other)["ratio"]
            for one, other in ((name, methods[0]), (methods[0], name))
        )
        reached = int((need < math.inf).sum())
        never = "never reaches" if not reached else f"reaches in {reached} of {len(need)} seeds"
        lines.append(
            f"`{name}` {never} the last loss of `{methods[0]}`"
            + (f", with {need.median():.0%} of its tokens (median)" if reached > len(need) / 2 else "")
            + f"; `{methods[0]}` reaches that of `{name}` with {instead.median():.0%} of the tokens "
            f"({instead.min():.0%} to {'never' if instead.max() == math.inf else f'{instead.max():.0%}'})."
        )
    last = lengths[lengths["tokens"] == lengths["tokens"].max()]
    apart = summarise(paired_differences(last, {"": tuple(methods[:0:-1])}, "loss"), ["method"], "above").iloc[0]
    lines.append(f"At the last length `{methods[1]}` less `{methods[2]}`: {_INTERVAL.format(apart)} nats.")
    return "\n".join([shown.to_markdown(index=False, disable_numparse=True), "", *lines])


def advice() -> str:
    """What verdicts of the study, or of the default run while there is none, say that one should do."""
    table = claims_table(STUDY if (STUDY / "claims.csv").exists() else RESULTS)
    lines, rows = [], {row.number: row for row in table.itertuples()}
    for number, words in ADVICE.items():
        open_still = f"{rows[number].statement.rstrip('.')}: {rows[number].verdict}."
        lines.append(f"- {words.get(rows[number].verdict, open_still)} (Claim {number}: {measured(rows[number])}.)")
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
    lines = _table_head("", methods)
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
        *_table_head("APEX over full fine-tuning, or what is named", ["must", "aim", "floor", "measured", "holds"]),
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
    lines += _table_head("", [name.replace("_", " ") for name in (*floors, "measured", *kinds)])
    shown = steps[(steps["kind"] == "model") & steps["method"].isin(["full", "apex", "apex-2.4%", "lora"])]
    for _, row in shown.iterrows():
        cells = [f"{row[name]:.2f}" for name in (*floors, "ratio", *kinds)]
        lines.append(f"| {row['case']}, {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table_head(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]


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
        *_table_head("matrix", ["by", "seconds", "of ours", "relative error"]),
    ]
    for row in peers.itertuples():
        cells = (row.way, f"{row.seconds:.1f}", f"{row.ratio:.1f}", f"{row.error:.0e}")
        lines.append(f"| {row.matrix}, {row.rows} × {row.columns} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def devices() -> str:
    """Peak memory of each device and what it sends in a step, by model, strategy and method, as planned."""
    table = pd.read_csv(BENCH / "devices.csv")
    methods = list(table["method"].unique())
    lines = _table_head("model", ["devices", *methods])
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
