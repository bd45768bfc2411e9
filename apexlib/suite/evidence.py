"""The experiments on real text at the scale of one GPU."""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from apexlib.analysis.intervals import paired_over_examples, summarise
from apexlib.analysis.rank_change import (
    beside_null,
    rank_changes,
    rank_correlation,
    rank_gain,
    rank_panels,
    update_ranks,
)
from apexlib.files import clear_partial, file_hash
from apexlib.plan import ApexConfig
from apexlib.provenance import save_table
from apexlib.suite.experiments import (
    VARIANTS,
    Comparison,
    compare,
    continued_run,
    difference_run,
    instruction_run,
    pretraining_run,
    rank_run,
    reference_run,
    relative,
    runs_table,
    tokens_to_reach,
    untouched_run,
)
from apexlib.suite.prepared import MANIFEST, PREFIX, check, prepare
from apexlib.suite.trials import RESULT, OutOfTimeError, Run, Trial, run_trials
from apexlib.training.checkpoints import checkpoint_folder

UNFINISHED = 3  # exit code: pieces are left
_LAUNCH = 0.03  # seconds that a step of a small model takes at least, whatever its products cost: an assumption
_AROUND = 4.0  # seconds of a training around its steps: loading, assessment, checks, saving: an assumption
_AT_ONCE = 64  # questions that are answered side by side
_ALONE = 2.0  # seconds of a piece without training: an assumption


def llama(width: int, layers: int, heads: int, groups: int, channels: int) -> dict[str, Any]:
    """Fields of a Llama's configuration; with fewer `groups` than heads, queries share keys and values."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": channels}
    attention = {"num_attention_heads": heads, "num_key_value_heads": groups, "tie_word_embeddings": True}
    return {"model_type": "llama", **shape, **attention, "initializer_range": 0.7 / width**0.5}


@dataclass(frozen=True)
class Scale:
    """How large everything is. `models` maps names to configurations, the smallest first; the last one is tuned."""

    models: Mapping[str, Mapping[str, Any]]
    pretraining: Mapping[str, Any]  # `context`, `steps`, `batch_size`, `learning_rate`; `parts`; sixteenths `kept`
    rivals: tuple[str, ...]  # of `reference_run`: what a base model must beat
    blocks: int  # held-out blocks of text
    difference: Mapping[str, Any]  # arguments of `difference_run`
    instruction: Mapping[str, Any]  # arguments of `instruction_run`, and the grid: `methods`, `learning_rates`
    conversations: Mapping[str, Any]  # `train`, `valid`, `test` (None: all), `max_new_tokens`
    continued: Mapping[str, Any]  # arguments of `continued_run`, and the grid
    knobs: tuple[str, ...] = ()  # variants of "apex", at its learning rate
    knob_seeds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0, 1, 2)
    grid_seeds: tuple[int, ...] = (0,)  # on which learning rates are chosen

    def chosen(self, seeds: Sequence[int]) -> "Scale":
        """The same with other seeds; the first one chooses."""
        return replace(self, seeds=tuple(seeds), grid_seeds=tuple(seeds[:1]), knob_seeds=tuple(seeds[:1]))


_TUNED = ("full", "apex", "lora", "hft", "gmt", "direct", "random", "apex-2.4%")
_GPU = Scale(
    models={"8m": llama(256, 8, 8, 4, 704), "25m": llama(512, 7, 16, 8, 1408)},
    pretraining={"context": 512, "steps": 1920, "batch_size": 32, "learning_rate": 1.5e-3}
    | {"parts": 1, "kept": (0, 1, 2, 4, 8, 16)},
    rivals=("unigram", "bigram", "trigram"),
    blocks=128,
    difference={
        "assessment_blocks": 512,
        "fractions": {"channel": [0.02, 0.05, 0.1, 0.2, 0.3, 0.5], "head": [0.25, 0.5, 0.75]},
        "draws": 3,
    },
    instruction={
        "methods": _TUNED,
        "learning_rates": (2e-4, 6e-4, 2e-3),
        "steps": 300,
        "batch_size": 128,
        "stages": 2,
        "assessment_samples": 1024,
    },
    conversations={"train": None, "valid": None, "test": None, "max_new_tokens": 48},
    continued={
        "methods": ("full", "apex", "apex-all", "direct", "random", "reversed"),
        "learning_rates": (3e-4, 1e-3),
        "steps": 240,
        "batch_size": 16,
        "stages": 2,
        "assessment_samples": 512,
        "evaluations": 10,
    },
    knobs=("operator-lr-4", "operator-lr-10", "stages-3", "balance"),
)
SCALES = {
    "toy": Scale(
        models={"tiny": llama(16, 2, 4, 2, 32), "toy": llama(32, 2, 4, 2, 64)},
        pretraining={
            "context": 64,
            "steps": 48,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "parts": 1,
            "kept": (0, 2, 16),
        },
        rivals=(),  # a toy shows that the path works; it has learnt nothing
        blocks=16,
        difference={"assessment_blocks": 32, "fractions": {"channel": [0.1, 0.5], "head": [0.25]}, "draws": 2},
        instruction=_GPU.instruction
        | {"learning_rates": (1e-3, 1e-2), "steps": 6, "batch_size": 8}
        | {"assessment_samples": 16},
        conversations={"train": 64, "valid": 16, "test": 32, "max_new_tokens": 4},
        continued=_GPU.continued
        | {"methods": ("full", "apex", "direct"), "learning_rates": (1e-2,), "steps": 4}
        | {"batch_size": 4, "assessment_samples": 8, "evaluations": 2},
        knobs=("stages-3",),
        seeds=(0, 1),
    ),
    "25m": _GPU,
    "110m": replace(
        _GPU,
        models={"25m": _GPU.models["25m"], "110m": llama(768, 16, 12, 6, 2048)},
        pretraining=_GPU.pretraining | {"learning_rate": 8e-4, "parts": 1},
        instruction=_GPU.instruction | {"methods": ("full", "apex", "lora", "direct"), "learning_rates": (1e-4, 4e-4)},
        continued=_GPU.continued | {"methods": ("full", "apex", "direct"), "learning_rates": (3e-4,)},
        knobs=(),
    ),
}


@dataclass(frozen=True)
class Work:
    """One call's work: what to do, from which data, where to, until when."""

    scale: Scale
    data: Path
    out: Path
    seconds: float | None = None
    workers: int | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def source(self) -> str:
        """The name of the prepared data."""
        return PREFIX + relative(self.data)

    @property
    def facts(self) -> dict[str, Any]:
        """What goes into the provenance of a table, and the hash of all data."""
        return {"data": file_hash(self.data / MANIFEST)}

    @property
    def left(self) -> float | None:
        """Seconds that are left."""
        return None if self.seconds is None else self.seconds - (time.monotonic() - self.began)

    def trials(self, run: Run, trials: Sequence[Trial], folder: str) -> list[dict[str, Any]]:
        """Run trials within the time that is left."""
        return run_trials(run, trials, self.out / folder, seconds=self.left, workers=self.workers)

    def compare(self, run: Run, folder: str, bases: Mapping[int, Path], **settings: Any) -> Comparison:
        """Compare methods within the time that is left; `settings` hold the grid too."""
        grid = {"grid_seeds": self.scale.grid_seeds, "seconds": self.left, "workers": self.workers} | settings
        return compare(run, grid.pop("methods"), bases, self.out / folder, **grid)

    def save(self, table: pd.DataFrame, name: str, **facts: Any) -> pd.DataFrame:
        """Write a result table, and return it."""
        save_table(table, name, self.out / "tables", **self.facts, **facts)
        return table

    def draw(self, table: pd.DataFrame, name: str) -> None:
        """Draw a figure of the suite from its table."""
        import matplotlib.pyplot as plt

        from apexlib.suite.figures import draw_figure

        draw_figure(table, name, self.out / "figures")
        plt.close()


def gather(work: Work) -> None:
    """Do all the work there is, in the order of its weight; tables are written as soon as their pieces are done.

    Raises OutOfTimeError when the time is over before all is done, ValueError where a base model is none.
    """
    check(work.data)
    for folder in ("tables", "figures"):
        clear_partial(work.out / folder)  # of a killed call
    models = base_models(work)
    unit_difference(work, models)
    last = models[(models["model"] == list(work.scale.models)[-1]) & models["is_final"]]
    bases = {row.seed: Path(row.folder) for row in last.itertuples()}
    tuned = instruction_tuning(work, bases)
    effective_ranks(work, bases, tuned)
    continued_pretraining(work, bases)
    turned_knobs(work, bases, tuned)


def base_models(work: Work) -> pd.DataFrame:
    """Train the base models part by part; one row per model, seed and checkpoint, with its folder."""
    scale, how = work.scale, dict(work.scale.pretraining)
    parts, steps = how.pop("parts"), how["steps"]
    kept = sorted({steps * share // 16 for share in how.pop("kept")})
    borders = [steps * part // parts for part in range(parts + 1)]
    words = str(work.data / "tokenizer")
    manifest = json.loads((work.data / MANIFEST).read_text(encoding="utf-8"))
    place, runs = work.out / "bases", [(name, seed) for name in scale.models for seed in scale.seeds]
    limits = {"vocab_size": manifest["vocabulary"], "max_position_embeddings": 4 * how["context"]}
    common = {"tokenizer": words, "corpus": f"{work.source}/general", "skill_documents": 0, **how}

    def part_of(name: str, seed: int, part: int) -> Trial:
        start, stop = borders[part], borders[part + 1]
        own = {"config": {**scale.models[name], **limits}, "seed": seed}
        own["checkpoints"] = [step for step in kept if start < step <= stop or start == step == 0]
        return Trial(f"{name}-seed{seed}-part{part}", common | own, (work.data / MANIFEST,))

    for part in range(parts):
        logs = work.trials(pretraining_run, [part_of(name, seed, part) for name, seed in runs], "bases")
    rows = [
        {"model": name, "seed": seed, "step": step, "folder": str(checkpoint_folder(folder, step).resolve())}
        for name, seed in runs
        for part in range(parts)
        for folder in [place / f"{name}-seed{seed}-part{part}"]
        for step in part_of(name, seed, part).settings["checkpoints"]
    ]
    models = pd.DataFrame(rows).assign(tokens=lambda t: t["step"] * how["batch_size"] * how["context"])
    train = [
        pd.DataFrame(log["log"]).assign(model=name, seed=seed, split="train")
        for (name, seed), log in zip(runs, logs, strict=True)
    ]
    curve = pd.concat(train).assign(tokens=lambda t: t["step"] * how["batch_size"] * how["context"])
    return _measured(work, models.assign(is_final=models["step"] == steps), curve)


def _measured(work: Work, models: pd.DataFrame, curve: pd.DataFrame) -> pd.DataFrame:
    """Measure every checkpoint on held-out text, and refuse base models that are none."""
    scale = work.scale
    text = {"corpus": f"{work.source}/general", "context": scale.pretraining["context"], "blocks": scale.blocks}
    reads = (work.data / MANIFEST,)
    asked = Trial("references", {"tokenizer": str(work.data / "tokenizer"), **text}, reads)
    (references,) = work.trials(reference_run, [asked], "difference")
    measured = work.trials(difference_run, _difference_trials(work, models), "difference")
    models = models.assign(**{name: [row[name] for row in measured] for name in ("parameters", "loss")})
    goal = min((references[name] for name in scale.rivals), default=math.inf)
    if len(worse := models[models["is_final"] & (models["loss"] >= goal)]):
        found = worse[["model", "seed", "loss"]].to_dict("records")
        raise ValueError(f"base models that do not beat {', '.join(scale.rivals)} ({goal:.3f} nats per token): {found}")
    table = models.assign(path=[relative(Path(folder)) for folder in models["folder"]])
    columns = ["model", "seed", "step", "tokens", "parameters", "loss", "path"]
    losses = {f"{name}_loss": value for name, value in references.items()}
    work.save(table[columns], "models", **losses, pretraining=dict(scale.pretraining))
    levels = pd.DataFrame(
        {"model": f"{name}s alone", "seed": -1, "split": "reference", "tokens": 0, "loss": loss}
        for name, loss in references.items()
    )
    curve = pd.concat([curve, models.assign(split="valid"), levels])[["model", "seed", "split", "tokens", "loss"]]
    work.draw(work.save(curve.reset_index(drop=True), "loss_curve"), "loss_curve")
    return models


def _difference_trials(work: Work, models: pd.DataFrame) -> list[Trial]:
    scale = work.scale
    text = {"corpus": f"{work.source}/general", "context": scale.pretraining["context"], "blocks": scale.blocks}
    return [
        Trial(
            f"{row.model}-seed{row.seed}-step{row.step}",
            {**text, **scale.difference, "model": row.folder}
            | {"fractions": scale.difference["fractions"] if row.is_final else {}},
            (Path(row.folder),),
        )
        for row in models.itertuples()
    ]


def unit_difference(work: Work, models: pd.DataFrame) -> None:
    """Tables and figures of notebook 01, of every size and checkpoint."""
    trials = _difference_trials(work, models)

    def collected(name: str, rows: pd.DataFrame, **columns: str) -> pd.DataFrame:
        tables = [
            pd.read_csv(work.out / "difference" / trials[i].name / f"{name}.csv").assign(
                **{column: models.loc[i, given] for column, given in columns.items()}
            )
            for i in rows.index
        ]
        return pd.concat(tables, ignore_index=True)

    names = list(work.scale.models)
    final, first = models["is_final"], models["seed"] == work.scale.seeds[0]
    largest = models["model"] == names[-1]
    units = collected(
        "activations", models[final & first & largest], model="model", seed="seed", tokens_trained="tokens"
    )
    work.save(units, "activations")
    units = units.sort_values("component", kind="stable")
    work.draw(
        units.assign(panel=units["component"] + f"s of {names[-1]}, seed {work.scale.seeds[0]}"),
        "activation_distribution",
    )
    masking = work.save(collected("masking", models[final], model="model", seed="seed"), "masking_sizes")
    masking = work.save(masking[masking["model"] == names[-1]], "masking")
    by = ["component", "order", "fraction"]
    curves = summarise(masking.groupby([*by, "seed"], as_index=False)["increase"].mean(), by, "increase")
    work.draw(curves.assign(panel=curves["component"] + f"s of {names[-1]}"), "masking_curve")
    imbalance = work.save(collected("imbalance", models, model="model", seed="seed", tokens="tokens"), "imbalance")
    by = ["component", "model", "tokens"]
    spread = imbalance.groupby([*by, "seed"], as_index=False, sort=False)["cv"].mean()
    spread = summarise(spread, by, "cv").sort_values("component", kind="stable")
    work.draw(spread.assign(panel=spread["component"] + "s"), "imbalance")


def _tuning(work: Work) -> dict[str, Any]:
    """Arguments of `instruction_run` beside the grid's."""
    scale = work.scale
    chat = {"source": work.source, **work.facts, **scale.conversations, "difficulties": [], "max_length": 0}
    text = {"corpus": f"{work.source}/general", "context": scale.pretraining["context"], "blocks": scale.blocks}
    return {"chat": chat, "retention": text}


def instruction_tuning(work: Work, bases: Mapping[int, Path]) -> pd.DataFrame:
    """Tables and figures of notebook 03; returns `instruction`."""
    setting = _tuning(work)
    tuning = work.compare(instruction_run, "instruction", bases, **work.scale.instruction, **setting)
    names = [f"base-seed{seed}" for seed in bases]
    own = [{"base": str(path), **setting} for path in bases.values()]
    trials = [Trial(name, each, (path,)) for name, each, path in zip(names, own, bases.values(), strict=True)]
    untouched = work.trials(untouched_run, trials, "instruction")
    rows = [
        Trial(name, {"variant": "base", "learning_rate": 0.0, "seed": seed})
        for name, seed in zip(names, bases, strict=True)
    ]
    base = runs_table(rows, untouched, work.out / "instruction").assign(chosen=True)
    base["path"] = [relative(path) for path in bases.values()]
    results = tuning.results | dict(zip(base["path"], untouched, strict=True))
    table = pd.concat([base, tuning.runs], ignore_index=True)
    table["exact_match"] = table["exact_match"].where(table["chosen"])
    facts = {"setting": {**work.scale.instruction, **setting}}
    work.save(table, "instruction", **facts)
    work.draw(work.save(tuning.rates, "learning_rates"), "learning_rates")
    grid = tuning.runs[tuning.runs["seed"].isin(work.scale.grid_seeds)]
    by = ["method", "learning_rate", "chosen"]
    work.draw(grid.groupby(by, sort=False, as_index=False)[["answer_loss", "retention_loss"]].mean(), "trade_off")
    chosen = table[table["chosen"]]
    families = [
        {"method": run.method, "seed": run.seed, "family": family, "examples": count, "exact_match": share}
        for run in chosen.itertuples()
        for family, (share, count) in results[run.path]["families"].items()
    ]
    work.save(pd.DataFrame(families), "instruction_families", **facts)
    answers = [
        {"method": run.method, "seed": run.seed, "example": example, "correct": correct}
        for run in chosen.itertuples()
        for example, correct in enumerate(results[run.path]["correct"])
    ]
    work.save(paired_over_examples(pd.DataFrame(answers), of="apex"), "instruction_pairs", **facts)
    titles = {"exact_match": "right answers (share)", "answer_loss": "answer loss (nats)"}
    titles["retention_loss"] = "retention loss (nats)"
    tuned = chosen[chosen["method"] != "base"].sort_values("method", key=lambda m: m != "apex", kind="stable")
    panels = [summarise(tuned, ["method"], name).assign(panel=title) for name, title in titles.items()]
    work.draw(pd.concat(panels, ignore_index=True), "instruction")
    return table


def effective_ranks(work: Work, bases: Mapping[int, Path], table: pd.DataFrame) -> None:
    """Tables and figures of notebook 05 on weights: does effective rank rise, and does the rise go with the gain."""
    tuned = table[table["chosen"] & (table["method"] != "base")]
    folders = [work.out / "instruction" / Path(path).name for path in tuned["path"]]
    trials = [
        Trial(folder.name, {"base": str(bases[seed]), "run": str(folder.resolve())}, (folder / RESULT,))
        for folder, seed in zip(folders, tuned["seed"], strict=True)
    ]
    work.trials(rank_run, trials, "ranks")
    updates = pd.concat(
        [
            pd.read_csv(work.out / "ranks" / trial.name / "updates.csv").assign(method=run.method, seed=run.seed)
            for trial, run in zip(trials, tuned.itertuples(), strict=True)
        ],
        ignore_index=True,
    )
    ranks = work.save(rank_changes(updates), "effective_rank")
    work.save(updates.drop(columns=["before", "after", "by_chance"]), "updates")
    work.draw(rank_panels(ranks), "effective_rank")
    work.draw(beside_null(update_ranks(updates), "rank_share", "null"), "update_rank")
    gain = work.save(rank_gain(ranks, table[table["chosen"]]), "rank_gain")
    work.draw(gain, "rank_gain")
    work.save(rank_correlation(gain), "rank_correlation")


def continued_pretraining(work: Work, bases: Mapping[int, Path]) -> None:
    """Tables and figures of notebook 04."""
    scale = work.scale
    text = {"context": scale.pretraining["context"], "blocks": scale.blocks}
    setting = {"text": {"corpus": f"{work.source}/domain", **work.facts, **text}}
    setting["retention"] = {"corpus": f"{work.source}/general", **text}
    training = work.compare(continued_run, "continued", bases, **scale.continued, **setting)
    facts = {"setting": {**scale.continued, **setting}}
    same = ["method", "learning_rate", "chosen", "seed", "path", "retention_loss"]
    curves = pd.concat(
        pd.DataFrame(training.results[run["path"]]["curve"]).assign(**run[same]) for _, run in training.runs.iterrows()
    )
    last = curves["tokens"] == curves.groupby("path")["tokens"].transform("max")
    curves["retention_loss"] = curves["retention_loss"].where(last).astype(float)
    columns = ["method", "learning_rate", "chosen", "seed", "tokens", "loss", "retention_loss", "path"]
    work.save(curves[columns], "continued", **facts)
    work.draw(work.save(training.rates, "continued_rates"), "continued_rates")
    kept = curves[curves["chosen"]]
    work.draw(summarise(kept, ["method", "tokens"], "loss"), "continued")

    def ratio(method: str, seed: int) -> float:
        mine, full = (kept[(kept["method"] == name) & (kept["seed"] == seed)] for name in (method, "full"))
        goal = full.sort_values("tokens").iloc[-1]
        return tokens_to_reach(mine, goal["loss"]) / goal["tokens"]

    rows = [
        {"method": name, "seed": seed, "ratio": ratio(name, seed)}
        for name in scale.continued["methods"]
        for seed in bases
    ]
    work.save(pd.DataFrame(rows), "continued_ratio", **facts)


def turned_knobs(work: Work, bases: Mapping[int, Path], table: pd.DataFrame) -> None:
    """APEX with one thing changed, at its learning rate: the table and the figure of notebook 06."""
    scale, setting = work.scale, _tuning(work)
    if not scale.knobs:
        return
    apex = table[table["chosen"] & (table["method"] == "apex")]
    how = scale.instruction | {"methods": ("apex", *scale.knobs)}
    how = {**how, "learning_rates": [float(apex["learning_rate"].iloc[0])], "grid_seeds": scale.knob_seeds}
    some = {seed: bases[seed] for seed in scale.knob_seeds}
    runs = work.compare(instruction_run, "instruction", some, **how, **setting).runs
    variants = runs.rename(columns={"method": "variant"}).drop(columns=["path", "chosen"])
    work.save(variants, "ablations", setting={**how, **setting})
    above = variants.pivot(index="seed", columns="variant", values="valid_loss")
    above = above.sub(above["apex"], axis=0)[["apex", *scale.knobs]].melt(var_name="method", value_name="above")
    panels = [summarise(above, ["method"], "above").assign(panel="validation loss above APEX (nats)")]
    match = summarise(variants.rename(columns={"variant": "method"}), ["method"], "exact_match")
    work.draw(pd.concat([*panels, match.assign(panel="right answers (share)")], ignore_index=True), "ablations")


def pieces(scale: Scale, data: Path) -> pd.DataFrame:
    """Count the pieces of work: `piece`, `count`, and what each is about.

    `model` and `variant` name what is trained or measured, in `steps` of `batch` sequences of `length` tokens;
    `evaluated` are tokens that only pass forward, `written` how often the model is asked for one more token.
    """
    counts = json.loads((Path(data) / MANIFEST).read_text(encoding="utf-8"))["counts"]
    base, tuning, further, context = scale.pretraining, scale.instruction, scale.continued, scale.pretraining["context"]
    seeds, last = len(scale.seeds), list(scale.models)[-1]
    held_out = min(scale.blocks * context, counts["general-test"]["tokens"])
    chat = scale.conversations
    test = counts["chat-test"]["tokens"] * 4 if chat["test"] is None else 10000  # every choice once
    talk = math.ceil(counts["chat-train"]["tokens"] / counts["chat-train"]["kept"])  # tokens of a conversation
    asked = [json.loads(line) for line in (Path(data) / "chat-test.jsonl").read_text(encoding="utf-8").splitlines()]
    opened = sum("answer" in each and "choices" not in each for each in asked)
    opened = opened if chat["test"] is None else min(opened, chat["test"])
    answering = {"evaluated": test + held_out, "written": math.ceil(opened / _AT_ONCE) * chat["max_new_tokens"]}
    idle = {"model": last, "variant": "full", "steps": 0, "batch": 1, "length": context, "evaluated": 0, "written": 0}
    rows: list[dict[str, Any]] = []

    def add(piece: str, count: int, **how: Any) -> None:
        rows.append({"piece": piece, "count": count, **idle, **how})

    def runs(how: Mapping[str, Any]) -> int:
        return len(how["learning_rates"]) * len(scale.grid_seeds) + len(set(scale.seeds) - set(scale.grid_seeds))

    for name in scale.models:
        part = {"steps": base["steps"] // base["parts"], "batch": base["batch_size"]}
        add(f"base {name}, a part", seeds * base["parts"], model=name, **part)
        add(f"difference {name}", seeds * len(base["kept"]), model=name, evaluated=held_out * 10)
    tuned = {"steps": tuning["steps"], "batch": tuning["batch_size"], "length": talk, **answering}
    tuned["evaluated"] += tuning["assessment_samples"] * talk
    for variant in tuning["methods"]:
        add(f"instruction {variant}", runs(tuning), variant=variant, **tuned)
    add("instruction, untuned", seeds, length=talk, **answering)
    for variant in scale.knobs:
        add(f"knob {variant}", len(scale.knob_seeds), variant=variant, **tuned)
    steps = {"steps": further["steps"], "batch": further["batch_size"]}
    seen = held_out * (further["evaluations"] + 3) + further["assessment_samples"] * context
    for variant in further["methods"]:
        add(f"continued {variant}", runs(further), variant=variant, evaluated=seen, **steps)
    add("effective rank", len(tuning["methods"]) * seeds)
    return pd.DataFrame(rows)


def plan(scale: Scale, data: Path, *, tflops: float) -> pd.DataFrame:
    """Say what each of `pieces` takes: `tokens` trained on, `peak_gib` of memory, `seconds` of one, `minutes` of all.

    FLOPs and memory are those of `plan_budget`, in float32; `tflops` is what the machine reaches in dense products, in
    10¹² FLOP/s. What no product explains is assumed: a step takes at least 0.03 s, a third of that where the model only
    writes a token, and a piece 4 s around its steps.
    """
    from apexlib.analysis.budget import plan_budget

    table = pieces(scale, data)
    words = json.loads((Path(data) / MANIFEST).read_text(encoding="utf-8"))["vocabulary"]

    @cache
    def budget(model: str, method: str, config: ApexConfig, batch: int, length: int) -> pd.Series:
        shape = AutoConfig.for_model(**scale.models[model], vocab_size=words, max_position_embeddings=length)
        return plan_budget(shape, config, batch=batch, length=length, methods=[method]).iloc[0]

    rows = []
    for piece in table.itertuples():
        how, size = VARIANTS[piece.variant], (piece.batch, piece.length)
        cost = budget(piece.model, how.method, _sized(how.config(stages=1, seed=0, samples=1)), *size)
        full = budget(piece.model, "full", ApexConfig(stages=1), *size)["flops_per_step"]
        forward = full / 3 / (piece.batch * piece.length)
        step = max(cost["flops_per_step"] / (tflops * 1e12), _LAUNCH)
        seconds = piece.steps * step + piece.evaluated * forward / (tflops * 1e12) + piece.written * _LAUNCH / 3
        seconds += _AROUND if piece.steps else _ALONE
        peak = cost["train_mib"] / 1024 if piece.steps else math.nan
        rows.append((piece.steps * piece.batch * piece.length, peak, seconds, piece.count * seconds / 60))
    costs = pd.DataFrame(rows, columns=["tokens", "peak_gib", "seconds", "minutes"])
    return pd.concat([table[["piece", "count", "steps"]], costs], axis=1)


def _sized(config: ApexConfig) -> ApexConfig:
    """Settings of the same cost: which units are chosen, and how fast they learn, costs nothing."""
    same = ("strategy", "statistic", "stages", "seed", "assessment_samples", "operator_lr_scale", "balance_weight")
    return replace(config, **{name: getattr(ApexConfig(stages=1), name) for name in same})


def seconds_in(text: str) -> float:
    """Read a length of time.

    >>> seconds_in("9m"), seconds_in("8m30s"), seconds_in("45s")
    (540.0, 510.0, 45.0)
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or not found:
        raise argparse.ArgumentTypeError(f"{text!r}: need a time such as 9m, 8m30s or 45s")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code: 0 all done, 3 pieces are left, 1 an error."""
    parser = argparse.ArgumentParser(prog="python -m apexlib.suite.evidence", description=__doc__)
    parser.add_argument("--prepare", action="store_true", help="encode the data of --general, --domain and --chat")
    for name in ("general", "domain", "chat"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", help="files; held out where named valid or test")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--data", type=Path, help="folder of prepared data")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="25m")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--budget", type=seconds_in, help="start no piece after this time: 9m, 8m30s")
    parser.add_argument("--workers", type=int, help="pieces at a time (default: a core each, one on a GPU)")
    parser.add_argument("--plan", action="store_true", help="say what there is to do and how long it takes")
    parser.add_argument("--tflops", type=float, default=150.0, help="10¹² FLOP/s reached in training, for --plan")
    given = parser.parse_args(arguments)
    needed = ("general", "domain", "chat", "out") if given.prepare else ("data",) if given.plan else ("data", "out")
    if missing := [name for name in needed if getattr(given, name) is None]:
        parser.error(f"need --{missing[0]}")
    scale = SCALES[given.scale].chosen(given.seeds) if given.seeds else SCALES[given.scale]
    disable_progress_bar()  # of loading and saving weights
    try:
        return _do(given, scale)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _do(given: argparse.Namespace, scale: Scale) -> int:
    if given.prepare:
        manifest = prepare(given.general, given.domain, given.chat, given.out, vocabulary=given.vocabulary)
        print(json.dumps(manifest["counts"], indent=1))
        return 0
    if given.plan:
        table = plan(scale, given.data, tflops=given.tflops)
        print(table.to_string(index=False, float_format="{:.2f}".format, na_rep=""))
        print(f"{table['count'].sum()} pieces, {table['minutes'].sum():.1f} minutes at {given.tflops:g} TFLOP/s")
        return 0
    try:
        gather(Work(scale, given.data, given.out, seconds=given.budget, workers=given.workers))
    except OutOfTimeError:
        total, done = pieces(scale, given.data)["count"].sum(), len(list(given.out.glob(f"*/*/{RESULT}")))
        print(f"about {max(1, total - done)} of {total} pieces are left: call again")
        return UNFINISHED
    print(f"all done: {given.out / 'tables'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
