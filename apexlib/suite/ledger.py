"""The ledger of claims: each with a rule written before the run, an interval over seeds, and a verdict.

A claim's words stand in `data/claims.yaml` and name the measure that decides it, one of `apexlib.suite.measures`.
"""

import inspect
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, Field, StrictInt, TypeAdapter, ValidationError, field_validator

from apexlib.analysis.intervals import interval
from apexlib.suite.measures import MEASURES, per_seed, read_table

LEDGER = Path(__file__).parents[2] / "data" / "claims.yaml"
COLUMNS = ["number", "claim", "statement", "source", "expected", "mean", "low", "high", "n", "unit", "verdict"]
COLUMNS += ["rule", "limits", "notebook", "scale"]
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
    unit: Words
    notebooks: Annotated[tuple[Words, ...], Field(min_length=1)]  # the last one decides the claim
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

    def values(self, results: Path) -> pd.Series:
        """Measure the claim from the tables in `results`: one value per seed, none where a table or run is missing."""
        (name,) = self.measure
        try:
            values = MEASURES[name](results, **self.arguments).dropna()
        except FileNotFoundError:
            return pd.Series(dtype=float)
        if not np.isfinite(values).all():
            raise ValueError(f"claim {self.number} ({self.id}): need finite values, got {values.to_dict()}")
        return values


def read_claims(path: Path = LEDGER) -> list[Claim]:
    """Read and check a ledger, in the order of its numbers."""
    ledger = TypeAdapter(Annotated[list[Claim], Field(min_length=1)])
    try:
        claims = ledger.validate_python(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        first = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
        raise ValueError(f"{path}: {'; '.join(map(_fault, first[:10]))}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
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
            known = f"1 to {max(claim.number for claim in claims)}, {', '.join(claim.id for claim in claims)}"
            raise ValueError(f"claim {name!r} is not in the ledger; known: {known}")
        chosen += found
    return [claim for claim in claims if claim in chosen]


def claims_table(
    results_dir: Path, only: Collection[int | str] | None = None, *, claims: Sequence[Claim] | None = None
) -> pd.DataFrame:
    """Decide every claim from the result tables in a folder: what the paper says, what was measured, the verdict.

    `only` takes some of them, as `choose` does; `claims` are those of the project's ledger unless given. Columns: those
    of the ledger and of `decide`; `claim` is the id, `limits` has what the draw of test examples adds, `notebook`
    decides the claim, `scale` is the folder's name: the profile.
    """
    results, rows = Path(results_dir), []
    claims = read_claims() if claims is None else claims
    for claim in claims if only is None else choose(claims, only):
        values = claim.values(results).to_list()
        own = {"claim": claim.id, "notebook": claim.notebooks[-1], "scale": results.name}
        if values and (noise := example_noise(results, claim)):
            own["limits"] = f"{claim.limits} {noise}"
        rows.append(claim.model_dump() | decide(values) | own)
    return pd.DataFrame(rows, columns=COLUMNS)


def decide(values: Sequence[float]) -> dict[str, Any]:
    """Apply the rule to one value per seed: `mean`, `low`, `high` of its 95 % interval, `n` and `verdict`.

    The rule asks whether the value is above 0: "reproduced" if the whole interval is, "not reproduced" if it lies
    below, else "inconclusive at this scale"; fewer than three seeds are always inconclusive; none: "not measured".

    >>> decide([0.9, 1.0, 1.1])["verdict"], decide([0.1, 1.0, 1.9])["verdict"]
    ('reproduced', 'inconclusive at this scale')
    """
    if not len(values):
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0, "verdict": "not measured"}
    (low, high), verdict = interval(values), "inconclusive at this scale"
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
