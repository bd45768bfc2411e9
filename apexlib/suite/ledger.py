"""The ledger of claims: each with a rule written before the run, an interval over seeds, and a verdict.

A claim's words stand in `data/claims.yaml` and name the measure that decides it, one of `MEASURES` here: a function of
the folder of a run's result tables that returns one value per training seed, above 0 where the claim holds.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apexlib.analysis.intervals import interval

LEDGER = Path(__file__).parents[2] / "data" / "claims.yaml"
MEASURES: dict[str, Callable[..., pd.Series]] = {}  # by the name that a claim gives


@dataclass(frozen=True)
class Claim:
    """One entry of the ledger; what each field means stands at the head of `data/claims.yaml`."""

    number: int
    id: str
    source: str
    statement: str
    expected: str
    measure: str
    rule: str
    unit: str
    notebooks: tuple[str, ...]  # the last one decides the claim
    limits: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def values(self, results: Path) -> pd.Series:
        """Measure the claim from the tables in `results`: one value per seed, none where a table or run is missing."""
        try:
            values = MEASURES[self.measure](Path(results), **self.arguments).dropna()
        except FileNotFoundError:
            return pd.Series(dtype=float)
        if not np.isfinite(values).all():
            raise ValueError(f"claim {self.number} ({self.id}): need finite values, got {values.to_dict()}")
        return values


def read_claims(path: Path = LEDGER) -> list[Claim]:
    """Read and check a ledger, in the order of its numbers."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: need a list of claims")
    claims = [_claim(entry, f"{path}, claim {row}") for row, entry in enumerate(content, start=1)]
    for name in ("number", "id", "statement"):
        values = [getattr(claim, name) for claim in claims]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"{path}: {name} {twice[0]!r} is there {values.count(twice[0])} times, need it once")
    return sorted(claims, key=lambda claim: claim.number)


def choose(claims: Sequence[Claim], only: Collection[int | str]) -> list[Claim]:
    """Take the claims that `only` names: by number, by id, or by the notebook that decides them."""
    chosen = []
    for name in only:
        found = [claim for claim in claims if name in (claim.number, claim.id, claim.notebooks[-1])]
        if not found:
            known = f"1 to {max(claim.number for claim in claims)}, {', '.join(claim.id for claim in claims)}"
            raise ValueError(f"claim {name!r} is not in the ledger; known: {known}")
        chosen += found
    return [claim for claim in claims if claim in chosen]


def claims_table(
    results_dir: Path, only: Collection[int | str] | None = None, *, claims: Sequence[Claim] | None = None
) -> pd.DataFrame:
    """Decide every claim from the result tables in a folder: what the paper says, what was measured, the verdict.

    `only` takes some of them: numbers, ids, or names of the notebooks that decide them. `claims` are those of the
    project's ledger unless given. Columns: `number`, `claim` (its id), `statement`, `source`, `expected`, `mean`,
    `low`, `high` (95 % interval), `n` (seeds), `unit`, `verdict`, `rule`, `limits`, `notebook` (that decides it),
    `scale` (the folder's name: the profile).
    """
    results = Path(results_dir)
    claims = read_claims() if claims is None else claims
    rows = []
    for claim in claims if only is None else choose(claims, only):
        row = {"number": claim.number, "claim": claim.id}
        row |= {name: getattr(claim, name) for name in ("statement", "source", "expected")}
        row |= decide(values := claim.values(results).to_list()) | {"unit": claim.unit}
        limits = " ".join(filter(None, [claim.limits, example_noise(results, claim) if values else ""]))
        row |= {"rule": claim.rule, "limits": limits, "notebook": claim.notebooks[-1]}
        rows.append(row | {"scale": results.name})
    order = ["number", "claim", "statement", "source", "expected", "mean", "low", "high", "n", "unit", "verdict"]
    return pd.DataFrame(rows, columns=[*order, "rule", "limits", "notebook", "scale"])


def decide(values: Sequence[float]) -> dict[str, Any]:
    """Apply the rule to one value per seed: `mean`, `low`, `high` of its 95 % interval, `n` and `verdict`.

    The rule asks whether the value is above 0: "reproduced" if the whole interval is, "not reproduced" if it lies
    below, else "inconclusive at this scale"; fewer than three seeds are always inconclusive; none: "not measured".

    >>> decide([0.9, 1.0, 1.1])["verdict"], decide([0.1, 1.0, 1.9])["verdict"]
    ('reproduced', 'inconclusive at this scale')
    """
    if not len(values):
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0, "verdict": "not measured"}
    low, high = interval(values)
    verdict = "inconclusive at this scale"
    if len(values) >= 3 and (low > 0 or high < 0):
        verdict = "reproduced" if low > 0 else "not reproduced"
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values), "verdict": verdict}


def measured(row: Any) -> str:
    """Write a row of `claims_table` for people: mean and interval, three digits of the wider end, and the unit.

    >>> from types import SimpleNamespace as Row
    >>> measured(Row(mean=0.13724, low=0.03951, high=0.23498, n=3, unit="nats per token"))
    '+0.137 [+0.040, +0.235] nats per token'
    >>> measured(Row(mean=np.nan, low=np.nan, high=np.nan, n=0, unit="nats per token"))
    '–'
    """
    if row.n == 0:
        return "–"
    ends = [row.mean] if row.n == 1 else [row.mean, row.low, row.high]
    largest = max(map(abs, ends))
    digits = min(9, max(0, 2 - int(np.floor(np.log10(largest))))) if largest else 1
    mean, *around = (f"{end:+.{digits}f}" for end in ends)
    unit = "" if row.unit == "none" else f" {row.unit}"
    return f"{mean} [{', '.join(around)}]{unit}" if around else f"{mean}{unit}, one seed"


def example_noise(results: Path, claim: Claim) -> str:
    """Say by how much a difference in exact match may move through the draw of test examples alone; "" for others.

    Two shares of right answers over the same n examples, each with one right and one wrong answer added (Agresti and
    Caffo 2000): 1.96 · √(Σ p (1 − p) / (n + 2)), as if the answers of the two methods had nothing to do with each
    other, which is the worst case. More seeds do not shrink it.
    """
    if claim.arguments.get("column") != "exact_match":
        return ""
    try:
        families = _read(results, "instruction_families", ["method", "seed", "examples"])
    except FileNotFoundError:
        return ""
    n = int(families.groupby(["method", "seed"])["examples"].sum().min())
    runs = (
        _per_seed(results, claim.arguments["table"], claim.arguments[side], "exact_match") for side in ("of", "over")
    )
    shares = [(run.mean() * n + 1) / (n + 2) for run in runs]
    noise = 1.96 * np.sqrt(sum(share * (1 - share) for share in shares) / (n + 2))
    return f"{n} test examples: their draw alone may move the difference by ±{noise:.3f}."


def measure(function: Callable[..., pd.Series]) -> Callable[..., pd.Series]:
    """Enter `function(results, …)` among the measures that a claim may name."""
    MEASURES[function.__name__] = function
    return function


@measure
def masking_gap(results: Path, *, component: str, fraction: float, more: str, less: str, times: float = 1) -> pd.Series:
    """Increase of loss with `fraction` of units masked in the order `more`, less `times` that in the order `less`."""
    table = _read(results, "masking", ["component", "order", "fraction", "seed", "increase"])
    table = table[(table["component"] == component) & np.isclose(table["fraction"], fraction)]
    increase = table.groupby(["order", "seed"])["increase"].mean().unstack("order")  # mean over random draws
    if not {more, less} <= set(increase):
        return pd.Series(dtype=float)
    return increase[more] - times * increase[less]


@measure
def evens_with_training(results: Path, *, component: str, share: float) -> pd.Series:
    """Coefficient of variation of the largest model after about `share` of its training, less that at the end."""
    cv, names = _imbalance(results, component)
    if not names or cv["tokens"].max() == 0:
        return pd.Series(dtype=float)
    return _evenness(cv, names[-1], share) - _evenness(cv, names[-1], 1.0)


@measure
def evens_with_size(results: Path, *, component: str) -> pd.Series:
    """Coefficient of variation of the smallest model at the end of training, less that of the largest."""
    cv, names = _imbalance(results, component)
    if len(names) < 2 or cv["tokens"].max() == 0:
        return pd.Series(dtype=float)
    return _evenness(cv, names[0], 1.0) - _evenness(cv, names[-1], 1.0)


@measure
def lead(results: Path, *, table: str, of: str, over: str, column: str, margin: float = 0.0) -> pd.Series:
    """By how much a run `of` one method is ahead of one `over` whom it should be, plus `margin`.

    Less is better in a column that ends in "loss", more in any other. With a margin, seeds are left out in which both
    methods answer nothing, or both everything: they are equal for want of a test, not because they are as good.
    """
    runs = {"ahead": _per_seed(results, table, of, column), "behind": _per_seed(results, table, over, column)}
    both = pd.DataFrame(runs).dropna()
    if len(both) and "tokens" in _read(results, table, []):
        ends = [_per_seed(results, table, name, "tokens")[both.index] for name in (of, over)]
        if (ends[0] != ends[1]).any():
            raise ValueError(f"{table}.csv: runs of {of} and {over} end after different numbers of tokens; need equal")
    if margin and column == "exact_match":
        both = both[(both["ahead"] != both["behind"]) | ~both["ahead"].isin([0.0, 1.0])]
    sign = -1 if column.endswith("loss") else 1
    return sign * (both["ahead"] - both["behind"]) + margin


@measure
def rise(results: Path, *, table: str, of: str, column: str) -> pd.Series:
    """The value of `column` itself, which is a change."""
    return _per_seed(results, table, of, column)


@measure
def time_saved(results: Path, *, of: str, over: str, limit: float) -> pd.Series:
    """`limit` less the seconds per step of one method over those of another."""
    seconds = [_per_seed(results, "instruction", name, "seconds_per_step") for name in (of, over)]
    return limit - seconds[0] / seconds[1]


@measure
def share_within(results: Path, *, method: str, expected: float, tolerance: float) -> pd.Series:
    """`tolerance` less the distance of the trainable share from what is `expected`."""
    return tolerance - (_per_seed(results, "instruction", method, "trainable") - expected).abs()


@measure
def stages_flatten(results: Path) -> pd.Series:
    """Mean gain in answer loss per stage added from one to three, less the gain of a fourth."""
    one, three, four = (_per_seed(results, "ablations", f"stages-{n}", "answer_loss") for n in (1, 3, 4))
    return (one - three) / 2 - (three - four)


@measure
def tokens_saved(results: Path, *, method: str, share: float) -> pd.Series:
    """1 / ratio − 1 / `share`, ratio: tokens to conventional training's final loss over its tokens; ∞ if never."""
    return 1 / _per_seed(results, "continued_ratio", method, "ratio", may_be_infinite=True) - 1 / share


@measure
def rank_correlation(results: Path) -> pd.Series:
    """Spearman's correlation of change of effective rank and gain over the methods of a seed, if three or more."""
    table = _read(results, "rank_gain", ["method", "seed", "erank_change", "answer_loss_gain"])
    runs = table[table["method"] != "base"].groupby("seed")
    values = {
        seed: rows["erank_change"].corr(rows["answer_loss_gain"], method="spearman")
        for seed, rows in runs
        if len(rows) >= 3
    }
    return pd.Series(values, dtype=float)


def _read(results: Path, table: str, columns: Collection[str]) -> pd.DataFrame:
    rows = pd.read_csv(results / f"{table}.csv", keep_default_na=False, na_values=["", "nan"])  # "null" is a name
    if missing := [column for column in columns if column not in rows]:
        raise ValueError(f"{results / table}.csv: no column {', '.join(missing)}; it has {', '.join(rows)}")
    return rows


def _per_seed(results: Path, table: str, run: str, column: str, *, may_be_infinite: bool = False) -> pd.Series:
    """One number per seed for a method (or variant), at its chosen learning rate and its last evaluation."""
    rows = _read(results, table, ["seed", column])
    key = "variant" if "variant" in rows else "method"
    rows = rows[rows[key] == run]
    if "chosen" in rows:
        rows = rows[rows["chosen"].astype(bool)]
    if "tokens" in rows:
        rows = rows.sort_values("tokens").groupby("seed").tail(1)
    values = rows.set_index("seed")[column].astype(float).sort_index()
    where = f"{table}.csv, {key} {run}"
    if values.index.has_duplicates:
        raise ValueError(
            f"{where}: seed {values.index[values.index.duplicated()][0]} is there twice; need one run each"
        )
    if values.isna().any() or (np.isinf(values).any() and not may_be_infinite):
        raise ValueError(f"{where}: need a finite {column} for every seed, got {values.to_dict()}")
    return values


def _imbalance(results: Path, component: str) -> tuple[pd.DataFrame, list[str]]:
    """Mean coefficient of variation over layers per model, tokens and seed; the models' names, smallest first.

    No name where the sizes of the models measured are not known.
    """
    table = _read(results, "imbalance", ["component", "model", "tokens", "seed", "cv"])
    table = table[table["component"] == component]
    cv = table.groupby(["model", "tokens", "seed"], as_index=False, sort=False)["cv"].mean()
    sizes = _read(results, "models", ["model", "parameters"]).drop_duplicates("model").sort_values("parameters")
    names = [name for name in sizes["model"] if name in set(cv["model"])]
    return cv, names if set(cv["model"]) == set(names) else []


def _evenness(cv: pd.DataFrame, model: str, share: float) -> pd.Series:
    rows = cv[cv["model"] == model]
    near = rows["tokens"].iloc[(rows["tokens"] - share * rows["tokens"].max()).abs().argmin()]
    return rows[rows["tokens"] == near].set_index("seed")["cv"]


def _claim(entry: Any, where: str) -> Claim:
    """Build a claim from its entry in the ledger, or say what is wrong with that."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: need a mapping, got {entry!r}")
    names = [each.name for each in fields(Claim) if each.name != "arguments"]
    if missing := [name for name in names if entry.get(name) in (None, "", [])]:
        raise ValueError(f"{where}: no {', '.join(missing)}")
    if extra := [str(name) for name in entry if name not in names]:
        raise ValueError(f"{where}: unknown {', '.join(extra)}; known: {', '.join(names)}")
    kinds = {"number": int, "notebooks": list, "measure": dict}
    for name in names:
        if type(entry[name]) is not (kind := kinds.get(name, str)):
            raise ValueError(f"{where}, {name}: need {kind.__name__}, got {entry[name]!r}")
    if len(entry["measure"]) != 1:
        raise ValueError(f"{where}, measure: need one function with its arguments, got {entry['measure']!r}")
    ((name, arguments),) = entry["measure"].items()
    if name not in MEASURES:
        raise ValueError(f"{where}: unknown measure {name!r}; known: {', '.join(MEASURES)}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}, measure {name}: need a mapping of arguments, got {arguments!r}")
    try:
        inspect.signature(MEASURES[name]).bind(Path(), **arguments)
    except TypeError as error:
        raise ValueError(f"{where}, measure {name}: {error}") from None
    given = {"measure": name, "arguments": arguments, "notebooks": tuple(entry["notebooks"])}
    return Claim(**{key: entry[key] for key in names if key not in given}, **given)
