"""The parts of the study's page that are made from results; `readme` writes them."""

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd

from apexlib.analysis.intervals import summarise
from apexlib.suite.comparison import token_ratios
from apexlib.suite.differences import paired_differences
from apexlib.suite.figures import told
from apexlib.suite.ledger import choose, claims_table, measured, read_claims
from apexlib.suite.measures import matched
from apexlib.suite.overview import WORDS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results" / "cpu"
STUDY = RESULTS.with_name("study")
SIZES = {"0.46 M, five bases": "460k", "0.84 M, five bases": "840k", "1.5 M, five bases": "1500k"}
SIZES = {size: STUDY.with_name(f"study-{name}") for size, name in SIZES.items()} | {"2.7 M, one base": STUDY}
OF_SMALL_MODELS = (5, 6, 7, 8)  # claims on what training does, of which the shipped base has no checkpoints
STEPS = ROOT / "figures" / "study-840k"  # with those of the study, and others
OPERATORS = STUDY.with_name("study-operators")
SETS = {"256 × 5": "study-256", "1,280 × 1": "study", "5,120 × 1": "study-5120", "20,480 × 1": "study-20480"}
SET_PAIRS = (("lora", "full"), ("direct-random-1", "full"), ("apex", "full"), ("apex", "direct-random-1"))
TOKENS = STUDY.with_name("study-tokens")
DORA = STUDY.with_name("study-dora")
DORA_PAIRS = (("dora", "lora"), ("dora-2.4%", "lora-2.4%"), ("dora", "full"), ("dora-2.4%", "full"))
GRADIENT = STUDY.with_name("study-gradient")
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
    lines = table_head("", ["claim", "the paper", *found])
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
    columns, clear, pairs = {}, dict[str, list[str]](), _named(SET_PAIRS)
    for size, name in SETS.items():
        if not (folder := STUDY.with_name(name)).joinpath("instruction.csv").exists():
            continue
        chosen = pd.read_csv(folder / "instruction.csv").query("chosen and method != 'base'")
        full = chosen[chosen["method"] == "full"]
        said = {"seeds": f"{full['seed'].nunique()}", "rate of `full`": f"{full['learning_rate'].iloc[0]:g}"}
        said |= {f"`full`: {title}": f"{full[name].mean():.4f}" for name, title in MEASURES.items()}
        above = paired_differences(chosen, pairs, "answer_loss")
        at_one = {"table": "instruction", "column": "retention_loss", "along": "valid_loss", "over": "full"}
        for of in ("lora", "apex"):
            forgotten = -matched(folder, of=of, **at_one)
            row = {"method": f"`{of}` less `full`: retention at the same loss", "above": forgotten}
            above = pd.concat([above, pd.DataFrame(row)])
        rows = summarise(above, ["method"], "above").set_index("method")
        rows = rows.rename(index={pair: f"{pair}: answer loss" for pair in pairs})
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


def table_head(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
