"""One grid of learning rates for all methods, and every seed at the rate that a method does best with.

Source: arXiv:2505.24241, sections 4 and 5. The runs of a comparison start from the same base model within a seed; they
share data, order, schedule and evaluation, and differ by their `Variant` and its learning rate only.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from apexlib.suite.folders import locate, relative
from apexlib.suite.inputs import data_files
from apexlib.suite.trials import Trial, run_trials
from apexlib.suite.variants import VARIANTS


def grid_trials(
    variants: Iterable[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    bases: Mapping[int, Path],
    **settings: Any,
) -> list[Trial]:
    """Make a trial for every variant, learning rate and seed, each starting from the base model of its seed.

    >>> trials = grid_trials(["full", "apex"], [1e-3], [0, 1], {0: Path("a"), 1: Path("b")}, steps=10)
    >>> [trial.name for trial in trials]
    ['full-lr0.001-seed0', 'full-lr0.001-seed1', 'apex-lr0.001-seed0', 'apex-lr0.001-seed1']
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"unknown variant {unknown[0]!r}; known: {', '.join(VARIANTS)}")
    files = data_files(settings)
    return [
        Trial(
            f"{variant}-lr{rate:g}-seed{seed}",
            {"variant": variant, "learning_rate": rate, "seed": seed, "base": str(bases[seed]), **settings},
            reads=(Path(locate(bases[seed])), *files),
        )
        for variant in variants
        for rate in learning_rates
        for seed in seeds
    ]


def runs_table(trials: Sequence[Trial], results: Sequence[Mapping[str, Any]], folder: Path) -> pd.DataFrame:
    """One row per trial: `method`, `learning_rate`, `seed`, each number of its result, `path` of its folder."""
    rows = [
        {"method": trial.settings["variant"], **{name: trial.settings[name] for name in ("learning_rate", "seed")}}
        | {name: value for name, value in result.items() if isinstance(value, int | float)}
        | {"path": relative(Path(folder) / trial.name)}
        for trial, result in zip(trials, results, strict=True)
    ]
    return pd.DataFrame(rows)


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
    keep_models: bool = True,
    **settings: Any,
) -> Comparison:
    """Run every variant at every learning rate on `grid_seeds`, and at the rate chosen on the other seeds of `bases`.

    `run` is `instruction_run` or `continued_run`, `settings` its further arguments. Models are kept (`keep_models`) of
    the runs at the chosen rates only.
    """

    def table_of(trials: list[Trial]) -> tuple[pd.DataFrame, dict[str, Any]]:
        results = run_trials(run, trials, folder)
        table = runs_table(trials, results, folder)
        return table, dict(zip(table["path"], results, strict=True))

    def at_the_best(seeds: Sequence[int]) -> list[Trial]:
        return [trial for name in variants for trial in grid_trials([name], [best[name]], seeds, bases, **settings)]

    grid, results = table_of(grid_trials(variants, learning_rates, grid_seeds, bases, **settings))
    best = choose_rates(grid)
    more = at_the_best([seed for seed in bases if seed not in grid_seeds])
    for trial in at_the_best(grid_seeds) if keep_models else ():
        own = Path(folder) / trial.name
        if not list(own.glob("stage-*")):  # removed, when another rate was the chosen one: the run is made again
            shutil.rmtree(own)
            more.append(trial)
    if more:
        others, found = table_of(more)
        grid = pd.concat([grid[~grid["path"].isin(others["path"])], others], ignore_index=True)
        results |= found
    runs = grid.assign(chosen=(grid["learning_rate"] == grid["method"].map(best)) & grid["seed"].isin(list(bases)))
    for path in runs.loc[~(runs["chosen"] & keep_models), "path"]:
        for stage in Path(locate(path)).glob("stage-*"):
            shutil.rmtree(stage)
    rates = runs[runs["seed"].isin(grid_seeds)].groupby(["method", "learning_rate"], as_index=False, sort=False)
    rates = rates["valid_loss"].mean().rename(columns={"valid_loss": "loss"})
    return Comparison(runs, results, rates.assign(chosen=rates["learning_rate"] == rates["method"].map(best)))


def choose_rates(runs: pd.DataFrame) -> dict[str, float]:
    """Choose for each method the learning rate of the lowest mean validation loss, over the seeds that have all rates.

    >>> runs = pd.DataFrame({"method": "full", "learning_rate": [0.1, 0.2], "seed": 0, "valid_loss": [2.0, 1.0]})
    >>> choose_rates(runs)
    {'full': 0.2}
    """
    chosen = {}
    for method, part in runs.groupby("method", sort=False):
        table = part.pivot_table(index="seed", columns="learning_rate", values="valid_loss").dropna()
        chosen[method] = float(table.mean().idxmin())
    return chosen


def rates_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Set the grid of a `Comparison` side by side: a row per method, with the rate chosen and whether it is an end."""
    best = rates[rates["chosen"]].set_index("method")["learning_rate"]
    table = rates.pivot(index="method", columns="learning_rate", values="loss").loc[rates["method"].unique()].round(4)
    ends = [rates["learning_rate"].min(), rates["learning_rate"].max()]
    return table.assign(chosen=best, at_the_end=best.isin(ends))
