"""The ledger of claims: each with a rule written before the run, an interval over seeds, and a verdict.

A claim's words stand in `data/claims.yaml` and name the measure that decides it, one of `apexlib.suite.measures`.
"""

import inspect
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, StrictInt, TypeAdapter, ValidationError, field_validator

from apexlib.analysis.intervals import interval
from apexlib.suite.measures import MEASURES, per_seed, read_table
from apexlib.suite.notebooks import load_yaml, unknown

LEDGER = Path(__file__).parents[2] / "data" / "claims.yaml"
COLUMNS = ["number", "claim", "statement", "source", "expected", "mean", "low", "high", "n", "unit", "needs", "goal"]
COLUMNS += ["margin", "because", "verdict", "p", "together", "rule", "limits", "notebook", "scale"]
_LEVEL = SIMULTANEOUS = 0.05  # error of a verdict; of all verdicts "together"
Words = Annotated[str, Field(min_length=1)]


class Claim(BaseModel, frozen=True, extra="forbid"):
    """One entry of the ledger; what each field means stands at the head of `data/claims.yaml`."""

    number: StrictInt
    id: Words
    source: Words
    statement: Words
    expected: Words
    measure: Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]  # its name: its arguments
    rule: Words
    needs: Literal["more", "at least"] = "more"
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # the smallest difference that would matter
    because: Words
    goal: float = 0.0  # what the value is compared with
    unit: Words
    notebooks: Annotated[tuple[Words, ...], Field(min_length=1)]  # the last one decides the claim
    gate: Words | None = None  # a table that says whether the comparison is one of fine-tuning
    limits: Words

    @field_validator("measure")
    @classmethod
    def _can_be_called(cls, measure: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        ((name, arguments),) = measure.items()
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}; known: {', '.join(MEASURES)}")
        try:
            inspect.signature(MEASURES[name]).bind(Path(), **arguments)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from None
        return measure

    @property
    def arguments(self) -> dict[str, Any]:
        return next(iter(self.measure.values()))

    @property
    def methods(self) -> set[str]:
        """Those whose runs the measure compares, where it names them."""
        named = (self.arguments.get(name, ()) for name in ("of", "over", "method"))
        return {each for found in named for each in ((found,) if isinstance(found, str) else found)}

    def values(self, results: Path) -> pd.Series:
        """Measure the claim from the tables in `results`: one value per seed, none where a table or run is missing."""
        (name,) = self.measure
        try:
            values = MEASURES[name](results, **self.arguments).dropna()
        except FileNotFoundError:
            return pd.Series(dtype=float)
        if (values == np.inf).any():
            raise ValueError(f"claim {self.number} ({self.id}): need finite values, got {values.to_dict()}")
        return values


def read_claims(path: Path = LEDGER) -> list[Claim]:
    """Read and check a ledger, in the order of its numbers."""
    ledger = TypeAdapter(Annotated[list[Claim], Field(min_length=1)])
    try:
        claims = ledger.validate_python(load_yaml(Path(path), str(path)))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        first = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
        raise ValueError(f"{path}: {'; '.join(map(_fault, first[:10]))}") from None
    for name in ("number", "id", "statement"):
        values = [getattr(claim, name) for claim in claims]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"{path}: {name} {twice[0]!r} is there {values.count(twice[0])} times, need it once")
    return sorted(claims, key=lambda claim: claim.number)


def choose(claims: Sequence[Claim], only: Collection[int | str]) -> list[Claim]:
    """Take the claims that `only` names: by number, by id, or by the notebook that decides them."""
    chosen = []
    for name in only:
        if not (found := [claim for claim in claims if name in (claim.number, claim.id, claim.notebooks[-1])]):
            numbers = [f"1 to {max(claim.number for claim in claims)}"]
            raise unknown("claim", name, [claim.id for claim in claims] if isinstance(name, str) else numbers)
        chosen += found
    return [claim for claim in claims if claim in chosen]


def compared(claims: Sequence[Claim]) -> set[str]:
    """Name the methods whose runs claims compare, whose rates those take, and what notebooks set everything beside."""
    from apexlib.suite.variants import VARIANTS  # which loads torch

    named = {"apex", "full", "full-all"}.union(*(claim.methods for claim in claims))
    return named | {VARIANTS[name].rate_of for name in named if name in VARIANTS}


def claims_table(
    results_dir: Path, only: Collection[int | str] | None = None, *, claims: Sequence[Claim] | None = None
) -> pd.DataFrame:
    """Decide every claim from the result tables in a folder: what the paper says, what was measured, the verdict.

    `only` takes some of them, as `choose` does; `claims` are those of the project's ledger unless given. Columns: those
    of the ledger and of `decide`; `together`, what is left of the verdict if 5 % is the error of all of the table's
    together (Holm, Scand. J. Statist. 1979); `claim` is the id, `limits` has what the draw of test examples adds,
    `notebook` decides the claim, `scale` is the folder's name: the profile.
    """
    results, rows = Path(results_dir), []
    claims = read_claims() if claims is None else claims
    for claim in claims if only is None else choose(claims, only):
        values = claim.values(results).to_list()
        own = {"claim": claim.id, "notebook": claim.notebooks[-1], "scale": results.name}
        if failed := _closed_gate(results, claim):
            own["limits"], values = f"{claim.limits} No verdict: {failed}.", []
        if values and (noise := example_noise(results, claim)):
            own["limits"] = f"{claim.limits} {noise}"
        decided = decide(values, margin=claim.margin, needs=claim.needs, goal=claim.goal)
        rows.append(claim.model_dump() | decided | own)
    table = pd.DataFrame(rows, columns=COLUMNS)
    ordered = table["p"].sort_values()  # NaN last
    holds = (ordered * (ordered.count() - np.arange(len(ordered)))).cummax() < SIMULTANEOUS
    return table.assign(together=table["verdict"].where(holds | (table["n"] == 0), "undecided"))


def repeated(claims: pd.DataFrame, other: Path) -> pd.DataFrame:
    """Add to a `claims_table` the `verdict` of another run's, as `elsewhere`: "" where it has none.

    `other` is the folder of a run of the same profile on other kernels, threads or machine.
    """
    there = (Path(other) / "claims.csv").is_file()
    found = read_table(Path(other), "claims", ["claim", "verdict"]).set_index("claim")["verdict"] if there else {}
    return claims.assign(elsewhere=[found.get(name, "") for name in claims["claim"]])


def _closed_gate(results: Path, claim: Claim) -> str:
    """Say what of a claim's gate does not hold for the methods that it compares; "" if all does or there is no gate."""
    if claim.gate is None or not (results / f"{claim.gate}.csv").is_file():
        return ""
    gate = read_table(results, claim.gate, ["method", "condition", "value", "holds"])
    failed = gate[~gate["holds"].astype(bool) & gate["method"].isin({"all", *claim.methods})]
    said = (f"{row.condition} of {row.method} is {row.value:.3g}" for row in failed.itertuples())
    return "; ".join(said).replace(" of all is", " is")


def decide(values: Sequence[float], *, margin: float = 0.0, needs: str = "more", goal: float = 0.0) -> dict[str, Any]:
    """Apply a claim's rule to one value per seed: `mean`, `low`, `high` of its 95 % interval, `n`, `verdict` and `p`.

    The interval, less the goal, is compared with the margin. A claim that needs "more" is "reproduced" above +margin,
    "opposite" below −margin, and finds "no difference" in between; one that needs "at least" is "reproduced" above
    −margin and "opposite" below. Across a border, or with fewer than three seeds: "undecided"; none: "not measured".
    Where some are −∞ (a run that never reached what it is measured by) there is no interval: "opposite" if all are, or
    if the median is by a sign test; `high` is then the best of the others. `p`, two-sided, is the smallest level at
    which a verdict would be given.

    >>> decide([0.9, 1.0, 1.1])["verdict"], decide([0.9, 1.0, 1.1], margin=2)["verdict"]
    ('reproduced', 'no difference')
    """
    row = {"mean": np.nan, "low": np.nan, "high": np.nan, "n": len(values), "verdict": "not measured", "p": np.nan}
    if not len(values):
        return row
    values = np.asarray(values, dtype=float)
    row |= {"mean": float(values.mean()), "verdict": "undecided", "p": 1.0}
    if (never := np.isinf(values)).any():
        from scipy.stats import binom

        row["p"] = float(min(1.0, 2 * binom.sf((values - goal < -margin).sum() - 1, len(values), 0.5)))
        row["high"] = np.nan if never.all() else float(values.max())
        return row | {"verdict": "opposite"} if row["p"] < _LEVEL or (never.all() and len(values) >= 3) else row
    row["low"], row["high"] = interval(values)
    if len(values) >= 3:
        borders = {"reproduced": (margin if needs == "more" else -margin, np.inf), "opposite": (-np.inf, -margin)}
        borders |= {"no difference": (-margin, margin)} if needs == "more" else {}
        errors = {verdict: _error(values - goal, *ends) for verdict, ends in borders.items()}
        best = min(errors, key=errors.get)
        row |= {"p": errors[best], "verdict": best if errors[best] < _LEVEL else "undecided"}
    return row


def _error(values: np.ndarray, above: float, below: float) -> float:
    """The p value, two-sided, of the mean lying between two borders: the larger one-sided one, twice."""
    from scipy.stats import t

    spread, freedom = values.std(ddof=1) / np.sqrt(len(values)), len(values) - 1
    distance = min(values.mean() - above, below - values.mean())
    if spread == 0:
        return float(distance <= 0)
    return float(min(1.0, 2 * t.sf(distance / spread, freedom)))


def measured(row: Any) -> str:
    """Write a row of `claims_table` for people: mean and interval, three digits of the wider end, and the unit.

    >>> from types import SimpleNamespace as Row
    >>> measured(Row(mean=0.13724, low=0.03951, high=0.23498, n=3, unit="nats per token"))
    '+0.137 [+0.040, +0.235] nats per token'
    """
    if row.n == 0:
        return "–"
    if row.mean == -np.inf:
        best = "" if np.isnan(row.high) else f"; {row.high:+.2g} at best"
        return "did not reach it" + ("" if row.verdict == "opposite" and not best else " from every seed") + best
    ends = [row.mean] if row.n == 1 else [row.mean, row.low, row.high]
    largest = max(map(abs, ends))
    digits = min(9, max(0, 2 - int(np.floor(np.log10(largest))))) if largest else 1
    mean, *around = (f"{end:+.{digits}f}" for end in ends)
    unit = "" if row.unit == "none" else f" {row.unit}"
    if row.n > 1 and row.low == row.high:
        return f"{mean}{unit}, the same from every seed"
    return f"{mean} [{', '.join(around)}]{unit}" if around else f"{mean}{unit}, one seed"


def example_noise(results: Path, claim: Claim) -> str:
    """Say by how much a difference in exact match may move through the draw of test examples alone; "" for others.

    Two shares of right answers over the same n examples, each with one right and one wrong answer added (Agresti and
    Caffo 2000): 1.96 · √(Σ p (1 − p) / (n + 2)), as if the answers of the two methods had nothing to do with each
    other, which is the worst case. More seeds do not shrink it.
    """
    if claim.arguments.get("column") != "exact_match" or not (results / "instruction_families.csv").is_file():
        return ""
    families = read_table(results, "instruction_families", ["method", "seed", "examples"])
    n = int(families.groupby(["method", "seed"])["examples"].sum().min())
    table, *runs = (claim.arguments[name] for name in ("table", "of", "over"))
    shares = [(per_seed(results, table, run, "exact_match").mean() * n + 1) / (n + 2) for run in runs]
    noise = 1.96 * np.sqrt(sum(share * (1 - share) for share in shares) / (n + 2))
    return f"{n} test examples: their draw alone may move the difference by ±{noise:.3f}."


def _fault(error: dict[str, Any]) -> str:
    """Say where in the list of claims a fault is, what is needed there, and what is there."""
    row, field = error["loc"][:1], " ".join(map(str, error["loc"][1:]))
    where = [f"claim {number + 1}" for number in row] + [field] * bool(field)
    known = f"; known: {', '.join(Claim.model_fields)}" if error["type"] == "extra_forbidden" else ""
    there = "" if error["type"] == "missing" else f", got {reprlib.repr(error['input']):.200}"
    return ": ".join([*where, error["msg"].removeprefix("Value error, ")]) + known + there
