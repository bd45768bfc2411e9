"""Whether a run agrees with the recorded one: table by table, number by number, verdict by verdict."""

import io
from pathlib import Path

import numpy as np
import pandas as pd

from apexlib.provenance import git
from apexlib.suite.folders import folders
from apexlib.suite.outcome import changed_verdicts

TOLERANCE = 1e-6  # relative; what is nearer counts as equal
_OF_THE_MACHINE = ("seconds", "_mb")  # in names of columns: times and memory are left aside


def agreement(profile: str, root: Path) -> pd.DataFrame:
    """Hold the tables of `profile` as they are against those committed last, a row a table.

    Columns: `table`; `agrees`: "equal", "to 1e-6" or "different"; `where`: of a table that differs, the column with the
    largest relative difference, how many rows differ there and by how much at most, or what else is another.
    """
    results = folders(profile, root).results
    if not (tables := sorted(results.glob("*.csv"))):
        raise FileNotFoundError(f"{results.relative_to(root)}: no tables; need a run, make reproduce PROFILE={profile}")
    rows = []
    for path in tables:
        recorded = git(root, "show", f"HEAD:./{path.relative_to(root).as_posix()}")
        if recorded is None:
            rows.append((path.stem, "different", "not recorded in the last commit"))
        else:
            rows.append((path.stem, *compared(pd.read_csv(io.StringIO(recorded)), pd.read_csv(path))))
    found = git(root, "ls-tree", "--name-only", "HEAD", f"{results.relative_to(root).as_posix()}/") or ""
    gone = {Path(name).stem for name in found.splitlines() if name.endswith(".csv")} - {path.stem for path in tables}
    rows += [(name, "different", "is missing") for name in sorted(gone)]
    return pd.DataFrame(rows, columns=["table", "agrees", "where"])


def compared(recorded: pd.DataFrame, now: pd.DataFrame) -> tuple[str, str]:
    """Compare two tables row by row: whether they agree, and where they do not.

    >>> compared(pd.DataFrame({"loss": [1.0, 2.0], "seconds": 2}), pd.DataFrame({"loss": [1.0, 2.5], "seconds": 3}))
    ('different', 'loss: 1 of 2 rows, by 0.5 at most')
    """
    recorded, now = (table[[c for c in table if not any(w in c for w in _OF_THE_MACHINE)]] for table in (recorded, now))
    if other := sorted(set(recorded) ^ set(now)):
        return "different", f"columns: {', '.join(other)}"
    if len(recorded) != len(now):
        return "different", f"{len(now)} rows, recorded {len(recorded)}"
    if {"verdict", "number"} <= set(now) and (turned := changed_verdicts(recorded, now)):
        return "different", "; ".join(turned)
    worst, where, equal = TOLERANCE, "", True
    for name in recorded:
        old, new = recorded[name], now[name]
        if not all(pd.api.types.is_numeric_dtype(each) for each in (old, new)):
            differs = (old.astype(str) != new.astype(str)).to_numpy()
            relative, absolute = np.where(differs, np.inf, 0.0), None
        else:
            old, new = (each.to_numpy(float) for each in (old, new))
            same = (old == new) | (np.isnan(old) & np.isnan(new))
            with np.errstate(invalid="ignore"):
                absolute = np.where(same, 0.0, np.nan_to_num(np.abs(new - old), nan=np.inf))
                relative = np.where(same, 0.0, absolute / np.maximum(np.abs(old), np.finfo(float).tiny))
            relative = np.nan_to_num(relative, nan=np.inf)
        equal &= not relative.any()
        if relative.size and relative.max() > worst:
            worst, count = relative.max(), int((relative > TOLERANCE).sum())
            by = "" if absolute is None else f", by {absolute.max():.3g} at most"
            where = f"{name}: {count} of {len(now)} rows{by}"
    return ("different", where) if where else ("equal" if equal else "to 1e-6", "")
