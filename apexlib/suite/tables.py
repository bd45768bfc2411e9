"""The tables of the experiments, from models, runs and their results: what notebooks 01 to 06 save and draw."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from apexlib.activations import activation_statistics
from apexlib.analysis.difference import biography, imbalance_table, masking_curve, weight_difference
from apexlib.analysis.function_spectrum import head_table, hidden_table
from apexlib.analysis.spectrum import update_table
from apexlib.plan import ExpansionPlan
from apexlib.suite.comparison import Comparison, runs_table
from apexlib.suite.folders import home, locate
from apexlib.suite.inputs import data_files, load_model
from apexlib.suite.runs import untouched_run
from apexlib.suite.trials import Trial, run_trials

ORDERS = ("advantageous", "random", "disadvantageous")  # in which units are masked

Batches = Sequence[Mapping[str, Tensor]]


def unit_statistics(
    models: pd.DataFrame, assessment: Batches, *, top: float, revision: str | None = None
) -> pd.DataFrame:
    """Measure the activations of every unit of every model (`activation_statistics`), with its `tokens_trained`."""
    tables = []
    for row in models.itertuples():
        statistics = activation_statistics(load_model(row.path, revision=revision), assessment, top=top)
        tables.append(statistics.assign(model=row.model, seed=row.seed, tokens_trained=row.tokens))
    return pd.concat(tables, ignore_index=True)


def masking_table(
    models: pd.DataFrame,
    statistics: pd.DataFrame,
    evaluation: Batches,
    *,
    fractions: Mapping[str, Sequence[float]],
    draws: int,
    revision: str | None = None,
) -> pd.DataFrame:
    """Silence shares of the units of every model (`fractions`, per component) in each of ORDERS, `draws` at random.

    `statistics` rank the units, by `seed`. Columns: those of `masking_curve`, its seed called `draw`, `model`, `seed`.
    """
    curves = []
    for row in models.itertuples():
        network = load_model(row.path, revision=revision)
        mine = statistics[statistics["seed"] == row.seed]
        for component in [name for name in fractions if name in set(mine["component"])]:
            for order in ORDERS:
                asked = {"fractions": [0, *fractions[component]], "order": order, "component": component}
                curve = masking_curve(network, mine, evaluation, seeds=range(draws), **asked)
                curves.append(curve.rename(columns={"seed": "draw"}).assign(model=row.model, seed=row.seed))
    return pd.concat(curves, ignore_index=True)


def imbalance_by_model(statistics: pd.DataFrame) -> pd.DataFrame:
    """From `unit_statistics`, the imbalance of every layer (`imbalance_table`), by `model`, `seed` and `tokens`."""
    parts = statistics.groupby(["model", "seed", "tokens_trained"], sort=False)
    tables = [
        imbalance_table(part).assign(model=name, seed=seed, tokens=tokens) for (name, seed, tokens), part in parts
    ]
    return pd.concat(tables, ignore_index=True)


def beside_untouched(
    tuning: Comparison, bases: Mapping[int, str], folder: Path, *, chat: Mapping[str, Any], retention: Mapping[str, Any]
) -> Comparison:
    """Add the base models as they are, measured as the tuned ones: method "base" at rate 0, chosen."""
    asked = {"chat": chat, "retention": retention}
    trials = [
        Trial(f"base-seed{seed}", {"base": path, **asked}, (Path(locate(path)), *data_files(asked)))
        for seed, path in bases.items()
    ]
    results = run_trials(untouched_run, trials, folder)
    named = [Trial(path, {"variant": "base", "learning_rate": 0.0, "seed": seed}) for seed, path in bases.items()]
    base = runs_table(named, results, home()).assign(chosen=True)
    runs = pd.concat([base, tuning.runs], ignore_index=True)
    return Comparison(runs, tuning.results | dict(zip(base["path"], results, strict=True)), tuning.rates)


def families_table(tuning: Comparison) -> pd.DataFrame:
    """Share of right answers (`exact_match`) of each chosen run on each family of tasks, and number of `examples`."""
    return pd.DataFrame(
        {"method": run.method, "seed": run.seed, "family": family, "examples": count, "exact_match": share}
        for run in tuning.runs[tuning.runs["chosen"]].itertuples()
        for family, (share, count) in tuning.results[run.path]["families"].items()
    )


def answers_table(tuning: Comparison) -> pd.DataFrame:
    """Whether each chosen run answers each example right: `correct`, 0 or 1."""
    return pd.DataFrame(
        {"method": run.method, "seed": run.seed, "example": example, "correct": correct}
        for run in tuning.runs[tuning.runs["chosen"]].itertuples()
        for example, correct in enumerate(tuning.results[run.path]["correct"])
    )


def curves_table(training: Comparison) -> pd.DataFrame:
    """The curve of every run, a row per point; `retention_loss` at its end."""
    same = ["method", "learning_rate", "chosen", "seed", "path", "retention_loss"]
    curves = pd.concat(
        pd.DataFrame(training.results[run["path"]]["curve"]).assign(**run[same]) for _, run in training.runs.iterrows()
    )
    last = curves["tokens"] == curves.groupby("path")["tokens"].transform("max")
    curves["retention_loss"] = curves["retention_loss"].where(last).astype(float)
    return curves[["method", "learning_rate", "chosen", "seed", "tokens", "loss", "retention_loss", "path"]]


def token_ratios(curves: pd.DataFrame, methods: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """Tokens after which a method reaches the last loss of "full", over the tokens of "full"; inf if it never does."""
    rows = []
    for method in methods:
        for seed in seeds:
            of_seed = curves[curves["seed"] == seed]
            goal = of_seed[of_seed["method"] == "full"].sort_values("tokens").iloc[-1]
            reached = tokens_to_reach(of_seed[of_seed["method"] == method], goal["loss"])
            rows.append({"method": method, "seed": seed, "ratio": reached / goal["tokens"]})
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
    """Read the chosen runs of notebook 03, base models among them; all must still have their models."""
    runs = pd.read_csv(results / "instruction.csv")
    runs = runs[runs["chosen"]].reset_index(drop=True)
    if runs["method"].eq("base").all() or not runs["method"].eq("base").any():
        raise ValueError("instruction.csv: need the base and at least one chosen run")
    if gone := [path for path in runs["path"] if not Path(locate(path)).is_dir()]:
        raise FileNotFoundError(f"{gone[0]}: a chosen run has lost its models; run notebook 03 again")
    return runs


def updates_of_stages(runs: pd.DataFrame) -> pd.DataFrame:
    """Measure what every stage of every tuned run did to each matrix (`update_table`): `stage`, `method`, `seed`."""
    tables = [
        update_table(_base_of(run, runs), folder).assign(stage=stage, method=run.method, seed=run.seed)
        for run in _tuned(runs).itertuples()
        for stage, folder in enumerate(_stages(run.path))
    ]
    return pd.concat(tables, ignore_index=True)


def function_tables(runs: pd.DataFrame, blocks: Batches) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure W_V W_O of every head and the hidden states over `blocks`, for base models and last stages."""
    tables: tuple[list[pd.DataFrame], ...] = ([], [])
    for run in runs.itertuples():
        network = load_model(run.path if run.method == "base" else str(_stages(run.path)[-1]))
        for kept, table in zip(tables, (head_table(network), hidden_table(network, blocks)), strict=True):
            kept.append(table.assign(method=run.method, seed=run.seed))
    heads, hidden = (pd.concat(kept, ignore_index=True) for kept in tables)
    return heads, hidden


def first_roles(runs: pd.DataFrame, run: Any) -> pd.DataFrame | None:
    """Tell the roles of units in a run (`biography`); without a plan of its own, those of the APEX run of its seed.

    "direct" has a plan of one role only, which counts as none. None where there is no plan at all.
    """
    apex = runs[(runs["method"] == "apex") & (runs["seed"] == run.seed)]
    own = [] if run.method == "direct" else _plans(run.path)
    plans = own or [plan for path in apex["path"] for plan in _plans(path)]
    return biography(plans) if plans else None


def movement_table(runs: pd.DataFrame) -> pd.DataFrame:
    """How far every unit moved in every tuned run (`weight_difference`), with its `role` in the first stage."""
    tables = []
    for run in _tuned(runs).itertuples():
        if (roles := first_roles(runs, run)) is not None:
            moved = weight_difference(_base_of(run, runs), _stages(run.path)[-1])
            moved = moved.merge(roles[roles["stage"] == 0], on=["layer", "component", "unit"])
            tables.append(moved.assign(method=run.method, seed=run.seed))
    if not tables:
        raise ValueError("no run has a plan.json: need one of method apex")
    return pd.concat(tables, ignore_index=True)


def movement_by_role(units: pd.DataFrame) -> pd.DataFrame:
    """Average `movement_table` over the units of a component and role, per run; `units` is their number."""
    by = ["method", "seed", "component", "role"]
    summary = units.groupby(by, sort=False, as_index=False)[["change", "relative", "cosine"]].mean()
    return summary.assign(units=units.groupby(by, sort=False)["unit"].size().to_numpy())


def above_first(table: pd.DataFrame, variants: Sequence[str], measure: str) -> pd.DataFrame:
    """How much larger `measure` is than that of the first variant, within each `seed`: `method`, `above`."""
    by_seed = table.pivot(index="seed", columns="variant", values=measure)
    above = by_seed.sub(by_seed[variants[0]], axis=0)[list(variants)]
    return above.melt(var_name="method", value_name="above", ignore_index=False).reset_index()


def _tuned(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["method"] != "base"]


def _base_of(run: Any, runs: pd.DataFrame) -> str:
    """The base model of a run's seed; where the seed has none, the first."""
    bases = runs[runs["method"] == "base"].set_index("seed")["path"]
    return locate(bases.get(run.seed, bases.iloc[0]))


def _stages(path: str) -> list[Path]:
    """The models that the stages of a run have left, in order."""
    found = sorted(Path(locate(path)).glob("stage-*"), key=lambda stage: int(stage.name.removeprefix("stage-")))
    if not found:
        raise FileNotFoundError(f"{path}: need stage-0, stage-1, … of a run")
    return found


def _plans(path: str) -> list[ExpansionPlan]:
    return [ExpansionPlan.from_json(file) for stage in _stages(path) if (file := stage / "plan.json").is_file()]
