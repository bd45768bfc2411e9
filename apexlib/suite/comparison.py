"""One grid of learning rates for all methods, every seed at the rate that a method does best with, and what that shows.

Source: arXiv:2505.24241, sections 4 and 5. The runs of a comparison start from the same base model within a seed; they
share data, order, schedule and evaluation, and differ by their `Variant` and its learning rate only.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from apexlib import ExpansionPlan, biography
from apexlib.analysis.intervals import summarise
from apexlib.files import read_object
from apexlib.suite.differences import paired_differences
from apexlib.suite.folders import NotReadyError, home, locate, needed, relative
from apexlib.suite.inputs import data_files
from apexlib.suite.runs import untouched_run
from apexlib.suite.trials import RESULT, Trial, run_trials
from apexlib.suite.variants import STEPS, VARIANTS, settings_of


def grid_trials(
    variants: Sequence[str], rates: Sequence[float], seeds: Sequence[int], bases: Mapping[int, Path], **settings: Any
) -> list[Trial]:
    """Make a trial for every variant, learning rate and seed, each starting from the base model of its seed.

    >>> trials = grid_trials(["full", "apex"], [1e-3], [0, 1], {0: Path("a"), 1: Path("b")}, steps=10)
    >>> [trial.name for trial in trials]
    ['full-lr0.001-seed0', 'full-lr0.001-seed1', 'apex-lr0.001-seed0', 'apex-lr0.001-seed1']
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"unknown variant {unknown[0]!r}; known: {', '.join(VARIANTS)}")
    if missing := sorted({*seeds} - {*bases}):
        raise ValueError(f"seeds {missing} of the grid: need a base for each, got those of seeds {sorted(bases)}")
    files, given = data_files(settings), {name: settings_of(name) for name in variants}
    return [
        Trial(
            f"{variant}-lr{rate:g}-seed{seed}",
            {"variant": given[variant], "learning_rate": rate, "seed": seed, "base": str(bases[seed]), **settings},
            reads=(Path(locate(bases[seed])), *files),
        )
        for variant in variants
        for rate in rates
        for seed in seeds
    ]


def runs_table(trials: Sequence[Trial], results: Sequence[Mapping[str, Any]], folder: Path) -> pd.DataFrame:
    """One row per trial: `method`, `learning_rate`, `seed`, each number of its result, `path` of its folder."""
    return pd.DataFrame(
        {"method": trial.settings["variant"]["name"]}
        | {name: trial.settings[name] for name in ("learning_rate", "seed")}
        | {name: value for name, value in result.items() if isinstance(value, int | float)}
        | {"path": relative(Path(folder) / trial.name)}
        for trial, result in zip(trials, results, strict=True)
    )


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: `runs` is `runs_table` with `chosen`; `results` holds a run's whole result, by its path."""

    runs: pd.DataFrame
    results: Mapping[str, Mapping[str, Any]]
    rates: pd.DataFrame  # of the grid: `method`, `learning_rate`, `loss` (validation, mean over seeds), `chosen`


def compare(
    run: Callable[..., dict[str, Any]],
    variants: Sequence[str],
    bases: Mapping[int, Path],
    folder: Path,
    *,
    learning_rates: Sequence[float],
    grid_seeds: Sequence[int],
    measure: Callable[..., dict[str, Any]] | None = None,
    **settings: Any,
) -> Comparison:
    """Run every variant at every learning rate on `grid_seeds`, and at the rate chosen on the other seeds of `bases`.

    `run` is `instruction_run` or `continued_run`, `settings` its further arguments. A variant that has the rate of
    another one of `variants` (`rate_of`) needs no grid. Models are kept of the runs at the chosen rates only; each is
    given to `measure`, such as `answers_run`, with the settings of its run, and what that returns is part of the run's
    result.
    """
    folder = Path(folder)
    followed = {name: getattr(VARIANTS.get(name), "rate_of", None) for name in variants}
    leader = {name: of if of in variants else name for name, of in followed.items()}
    grid = grid_trials([n for n in variants if leader[n] == n], learning_rates, grid_seeds, bases, **settings)
    on_grid = runs_table(grid, tried := run_trials(run, grid, folder), folder)
    best, chosen = choose_rates(on_grid), []
    for name in variants:
        chosen += grid_trials([name], [best[leader[name]]], [*bases], bases, **settings)
    names = {trial.name for trial in chosen}
    for run_folder in (folder / trial.name for trial in grid if trial.name in names):
        if not list(run_folder.glob("stage-*")):  # removed, when another rate was the chosen one
            shutil.rmtree(run_folder)  # the run is made again
    results = run_trials(run, chosen, folder)
    if measure:
        found = run_trials(measure, [_after(trial, folder) for trial in chosen], folder)
        results = [result | more for result, more in zip(results, found, strict=True)]
    others = [trial for trial in grid if trial.name not in names]
    for stage in (stage for trial in others for stage in (folder / trial.name).glob("stage-*")):
        shutil.rmtree(stage)
    results += [result for trial, result in zip(grid, tried, strict=True) if trial.name not in names]
    runs = runs_table([*chosen, *others], results, folder)
    runs["chosen"] = [*[True] * len(chosen), *[False] * len(others)]
    rates = on_grid.groupby(["method", "learning_rate"], as_index=False, sort=False)["valid_loss"].mean()
    rates["chosen"] = rates["learning_rate"] == rates["method"].map(best)
    return Comparison(runs, dict(zip(runs["path"], results, strict=True)), rates.rename(columns={"valid_loss": "loss"}))


def _after(trial: Trial, folder: Path) -> Trial:
    """A trial on what another has trained: it lies in its folder and goes with it."""
    run = folder / trial.name
    model = {"model": relative(stages_of(run)[-1])}
    return Trial(f"{trial.name}/measured", {**trial.settings, **model}, (run / RESULT,))


def choose_rates(runs: pd.DataFrame) -> dict[str, float]:
    """Choose the learning rate of each method's lowest mean validation loss, over the seeds that have all rates."""
    pivot = {"index": "seed", "columns": "learning_rate", "values": "valid_loss"}
    tables = {method: part.pivot_table(**pivot).dropna() for method, part in runs.groupby("method", sort=False)}
    return {method: float(table.mean().idxmin()) for method, table in tables.items()}


def rates_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Set the grid of a `Comparison` side by side: a row per method, with the rate chosen and whether it is an end."""
    best = rates[rates["chosen"]].set_index("method")["learning_rate"]
    table = rates.pivot(index="method", columns="learning_rate", values="loss").loc[rates["method"].unique()].round(4)
    ends = [rates["learning_rate"].min(), rates["learning_rate"].max()]
    return table.assign(chosen=best, at_the_end=best.isin(ends))


def gate_table(tuning: Comparison, *, base_rate: float, full: str, unigram: float) -> pd.DataFrame:
    """Whether a comparison is one of fine-tuning: what has to hold, of which method (or "all"), and whether it does.

    Each method's choice of a rate lies inside the grid, by the mean of at least three seeds, and, unless it trains few
    weights or adapters, between 0.02 and 0.3 of `base_rate`, the peak of the base's own training. Training everything
    (`full`), at its choice, moves the weights by less than a tenth of their norm and leaves the loss on the base's text
    half a nat or more below `unigram`, that of token frequencies. Columns: `method`, `condition`, `value`, `least`,
    `most`, `holds`.
    """
    seeds = tuning.runs.groupby(["method", "learning_rate"])["seed"].nunique().min()
    chosen = tuning.runs[tuning.runs["chosen"] & (tuning.runs["method"] == full)]
    gap = unigram - chosen["retention_loss"].mean()
    rows = [
        ("all", "seeds that choose", seeds, 3, math.inf),
        ("all", f"update of {full}, in units of the weights", chosen["update_norm"].mean(), 0, 0.1),
        ("all", f"loss of {full} on the base's text below unigram, nats", gap, 0.5, math.inf),
    ]
    rungs = sorted(tuning.rates["learning_rate"].unique())
    for method, rate in tuning.rates[tuning.rates["chosen"]].set_index("method")["learning_rate"].items():
        rows.append((method, "place of the rate in the grid", rungs.index(rate) + 1, 2, len(rungs) - 1))
        if (variant := VARIANTS[method]).share is None and variant.method != "lora":
            rows.append((method, "rate, in units of the base's", variant.rate * rate / base_rate, 0.02, 0.3))
    table = pd.DataFrame(rows, columns=["method", "condition", "value", "least", "most"])
    slack = 1e-9  # 0.3 · 0.003 is 0.0009 to rounding
    return table.assign(holds=table["value"].between(table["least"] - slack, table["most"] + slack))


def beside_untouched(tuning: Comparison, bases: Mapping[int, str], folder: Path, **asked: Any) -> Comparison:
    """Add the base models as they are, measured as the tuned ones: method "base" at rate 0, chosen.

    `asked` are the `chat` and the `retention` of `instruction_run`.
    """
    trials = {
        path: Trial(f"base-seed{seed}", {"base": path, **asked}, (Path(locate(path)), *data_files(asked)))
        for seed, path in reversed(bases.items())  # a base that several seeds share is measured once
    }
    found = dict(zip(trials, run_trials(untouched_run, list(trials.values()), folder), strict=True))
    untouched = {"variant": {"name": "base"}, "learning_rate": 0.0}
    named = [Trial(path, {**untouched, "seed": seed}) for seed, path in bases.items()]
    base = runs_table(named, [found[path] for path in bases.values()], home()).assign(chosen=True)
    runs = pd.concat([base, tuning.runs], ignore_index=True)
    return Comparison(runs, tuning.results | {relative(home() / path): found[path] for path in found}, tuning.rates)


def curves_table(training: Comparison) -> pd.DataFrame:
    """The curves of `continued_run`s, a row per point, and method "base" with one point at 0 tokens for each seed.

    Columns: `method`, `learning_rate`, `chosen`, `seed`, `tokens`, `loss`, `retention_loss` (at both ends), `path`.
    """
    curves = []
    for run in training.runs.itertuples():
        curve = pd.DataFrame(training.results[run.path]["curve"])
        curve.loc[curve.index[-1], "retention_loss"] = run.retention_loss
        named = {name: getattr(run, name) for name in ("method", "learning_rate", "chosen", "seed", "path")}
        curves.append(curve.assign(**named))
    table = pd.concat(curves, ignore_index=True)
    base = table[table["tokens"] == 0].drop_duplicates("seed")
    table = pd.concat([base.assign(method="base", learning_rate=0.0, chosen=False), table], ignore_index=True)
    return table[["method", "learning_rate", "chosen", "seed", "tokens", "loss", "retention_loss", "path"]]


def above_goal(curves: pd.DataFrame, goal: str) -> pd.DataFrame:
    """The `curves_table` with `loss` less that of the method `goal` after as many tokens from the same seed."""
    of_goal = curves[curves["method"] == goal].set_index(["seed", "tokens"])["loss"].rename("goal")
    joined = curves.join(of_goal, on=["seed", "tokens"])
    return joined.assign(loss=joined["loss"] - joined["goal"]).drop(columns="goal")


def token_ratios(curves: pd.DataFrame, methods: Sequence[str], seeds: Sequence[int], *, goal: str) -> pd.DataFrame:
    """Tokens after which a method reaches the last loss of the method `goal`, over its tokens; inf if it never does."""
    rows = []
    for method in methods:
        for seed in seeds:
            of_seed = curves[curves["seed"] == seed]
            end = of_seed[of_seed["method"] == goal].sort_values("tokens").iloc[-1]
            reached = tokens_to_reach(of_seed[of_seed["method"] == method], end["loss"])
            rows.append({"method": method, "seed": seed, "ratio": reached / end["tokens"]})
    return pd.DataFrame(rows)


def tokens_to_reach(curve: pd.DataFrame, loss: float) -> float:
    """Tokens after which a curve (`tokens`, `loss`) first falls to `loss`, linear between points; inf if it never does.

    >>> tokens_to_reach(pd.DataFrame({"tokens": [0, 10, 20], "loss": [4.0, 3.0, 2.5]}), 2.75)
    15.0
    """
    curve = curve.sort_values("tokens")
    tokens, losses = curve["tokens"].to_numpy(float), curve["loss"].to_numpy(float)
    if not (losses <= loss).any():
        return math.inf
    i = int((losses <= loss).argmax())
    if i == 0:
        return float(tokens[0])
    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def chosen_runs(results: Path) -> pd.DataFrame:
    """Read the chosen runs of notebook 03, base models among them; all must still have their models.

    `base` is the base model of a run's seed; where the seed has none, the first.
    """
    runs = pd.read_csv(needed(results / "instruction.csv", "03")).query("chosen").reset_index(drop=True)
    if runs["method"].eq("base").all() or not runs["method"].eq("base").any():
        raise ValueError("instruction.csv: need the base and at least one chosen run")
    if gone := [path for path in runs["path"] if not Path(locate(path)).is_dir()]:
        raise NotReadyError(f"{gone[0]}: the models of this run are not there; run notebook 03 first")
    bases = runs[runs["method"] == "base"].set_index("seed")["path"]
    return runs.assign(base=[locate(bases.get(seed, bases.iloc[0])) for seed in runs["seed"]])


def stages_of(path: str) -> list[Path]:
    """The models that the stages of a run have left, in order."""
    found = sorted(Path(locate(path)).glob("stage-*"), key=lambda stage: int(stage.name.removeprefix("stage-")))
    if not found:
        raise FileNotFoundError(f"{path}: need stage-0, stage-1, … of a run")
    return found


def first_roles(runs: pd.DataFrame, run: Any) -> pd.DataFrame | None:
    """Tell the roles of units in a run (`biography`); without a plan of its own, those of the APEX run of its seed.

    "direct" has a plan of one role only, which counts as none. None where there is no plan at all.
    """
    apex = runs.loc[(runs["method"] == "apex") & (runs["seed"] == run.seed), "path"]
    for path in apex if run.method == "direct" else (run.path, *apex):
        files = [stage / "plan.json" for stage in stages_of(path)]
        if plans := [ExpansionPlan.from_json(file) for file in files if file.is_file()]:
            return biography(plans)
    return None


def decomposition(results: Path, measures: Mapping[str, str]) -> pd.DataFrame:
    """What each of `STEPS` changes in the chosen runs of notebook 03, for each of `measures`, which names a panel.

    Columns: `panel`, `setting` (base, conversations, how often each was seen, and whether a step's method failed the
    gate), `method` (the step), `mean`, `low`, `high` and `n` of the differences within a seed.
    """
    table = needed(results / "instruction.csv", "03")
    runs, told = pd.read_csv(table).query("chosen"), read_object(table.with_suffix(".json"))
    number = told["chat"]["train"]
    setting = f"{Path(told['model']).name}, {number:,} × {told['steps'] * told['batch_size'] / number:g}"
    gate = pd.read_csv(needed(results / "instruction_gate.csv", "03"))
    if not gate.loc[gate["method"].isin({"all"}.union(*STEPS.values())), "holds"].all():
        setting += ", outside the gate"
    steps = [paired_differences(runs, STEPS, name).assign(panel=title) for name, title in measures.items()]
    changes = pd.concat(steps, ignore_index=True).assign(setting=setting)
    columns = ["panel", "setting", "method"]
    return summarise(changes, columns, "above").reindex(columns=[*columns, "mean", "low", "high", "n"])
