"""Whether a run agrees with the recorded one: table by table, number by number, verdict by verdict."""

from pathlib import Path

import numpy as np
import pandas as pd

from apexlib.provenance import git
from apexlib.suite.folders import folders
from apexlib.suite.outcome import changed_verdicts, recorded

TOLERANCE = 1e-6  # relative; what is nearer counts as equal
_OF_THE_MACHINE = ("seconds", "_mb")  # in names of columns: times and memory are left aside


def agreement(profile: str, root: Path) -> pd.DataFrame:
    """Hold the tables of `profile` as they are against those committed last, a row a table.

    So are those that its figures are drawn from, and what was committed of profiles that repeat it in other settings,
    whose names begin with its own: `study-256` with `study`.

    Columns: `folder`, from the root, first that of the results of `profile`; `table`; `agrees`: "equal", "to 1e-6" or
    "different"; `where`: of a table that differs, the column with the largest relative difference, how many rows differ
    there and by how much at most, or what else is another.
    """
    own = folders(profile, root)
    results = own.results.relative_to(root)
    if not any(own.results.glob("*.csv")):
        raise FileNotFoundError(f"{results}: no tables; need a run, make reproduce PROFILE={profile}")
    listed = git(root, "ls-tree", "-r", "--name-only", "HEAD", "data/results/", "figures/") or ""
    tables = {path for path in map(Path, listed.splitlines()) if path.suffix == ".csv"}
    if not any(path.parent == results for path in tables):
        raise FileNotFoundError(f"{results}: the last commit has no tables there to compare with")
    tables = {path for path in tables if f"{path.parent.name}-".startswith(f"{profile}-")}
    tables |= {path.relative_to(root) for folder in (own.results, own.figures) for path in folder.glob("*.csv")}
    rows = []
    for path in sorted(tables, key=lambda path: (path.parent != results, path)):
        there = root / path
        told = compared(recorded(there, root), pd.read_csv(there)) if there.exists() else ("different", "is missing")
        rows.append((path.parent.as_posix(), path.stem, *told))
    return pd.DataFrame(rows, columns=["folder", "table", "agrees", "where"])


def compared(before: pd.DataFrame | None, now: pd.DataFrame) -> tuple[str, str]:
    """Compare two tables row by row: whether they agree, and where they do not.

    >>> compared(pd.DataFrame({"loss": [1.0, 2.0], "seconds": 2}), pd.DataFrame({"loss": [1.0, 2.5], "seconds": 3}))
    ('different', 'loss: 1 of 2 rows, by 0.5 at most')
    """
    if before is None:
        return "different", "not recorded in the last commit"
    before, now = (table[[c for c in table if not any(w in c for w in _OF_THE_MACHINE)]] for table in (before, now))
    if other := sorted(set(before) ^ set(now)):
        return "different", f"columns: {', '.join(other)}"
    if len(before) != len(now):
        return "different", f"{len(now)} rows, recorded {len(before)}"
    if {"verdict", "number"} <= set(now) and (turned := changed_verdicts(before, now)):
        return "different", "; ".join(turned)
    worst, where, equal = TOLERANCE, "", True
    for name in before:
        old, new, by = before[name], now[name], ""
        if all(map(pd.api.types.is_numeric_dtype, (old, new))):
            old, new = (each.to_numpy(float) for each in (old, new))
            same = (old == new) | (np.isnan(old) & np.isnan(new))
            with np.errstate(invalid="ignore", over="ignore"):
                absolute = np.where(same, 0.0, np.nan_to_num(np.abs(new - old), nan=np.inf))
                scale = np.maximum(np.abs(old), np.finfo(float).tiny)
                relative = np.where(same, 0.0, np.nan_to_num(absolute / scale, nan=np.inf))
            by = f", by {absolute.max(initial=0):.3g} at most"
        else:
            relative = np.where(old.fillna("").astype(str) != new.fillna("").astype(str), np.inf, 0.0)
        equal &= not relative.any()
        if (largest := relative.max(initial=0)) > worst:
            worst, where = largest, f"{name}: {(relative > TOLERANCE).sum()} of {len(now)} rows{by}"
    return ("different", where) if where else ("equal" if equal else "to 1e-6", "")
