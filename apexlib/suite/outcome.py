"""What a run leaves behind, in a few lines: where it is, what the verdicts are, which page to open."""

import io
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd

from apexlib.provenance import git
from apexlib.suite.folders import folders
from apexlib.suite.notebooks import Profile, writer_of

_NAMED = 4  # changed verdicts; more are counted


def outcome(profile: Profile, root: Path, notebooks: Collection[str]) -> Iterator[str]:
    """Say where results of `profile` are and, if the one that decides claims is among the `notebooks` run, verdicts."""
    own = folders(profile.name, root)
    kinds = {"tables": (own.results, "*.csv"), "figures": (own.figures, "*.svg"), "models": (own.models, "*/")}
    for kind, (folder, pattern) in (kinds | {"notebooks": (own.executed, "*.ipynb")}).items():
        if count := len([*folder.glob(pattern)]):
            yield f"{kind:<10} {count} in {os.path.relpath(folder)}"
    table = own.results / "claims.csv"
    name = table.relative_to(root).as_posix()
    if writer_of(name, profile.read_notebooks(root / "notebooks")) in notebooks:
        with suppress(OSError, ValueError, KeyError):
            yield from _verdicts(pd.read_csv(table), recorded(table, root))
    pages = filter(Path.is_file, (own.figures / "overview.html", own.figures / "overview.pdf"))
    yield from (f"{'to open':<10} {os.path.relpath(page)}" for page in [*pages][:1])


def recorded(table: Path, root: Path) -> pd.DataFrame | None:
    """Read a table as the last commit of `root` has it; None if it has none."""
    text = git(root, "show", f"HEAD:./{table.relative_to(root).as_posix()}")
    return pd.read_csv(io.StringIO(text)) if text else None


def _verdicts(now: pd.DataFrame, before: pd.DataFrame | None) -> Iterator[str]:
    """Count verdicts, and name those that are others in the table that was committed, if one was."""
    counts = now["verdict"].value_counts()
    yield f"{'verdicts':<10} {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}"
    if before is not None:
        changed = changed_verdicts(before, now)
        more = [f"{len(changed) - _NAMED} more"] if len(changed) > _NAMED else []
        yield f"{'changed':<10} {'; '.join([*changed[:_NAMED], *more]) or 'none'} (against the last commit)"


def changed_verdicts(before: pd.DataFrame, now: pd.DataFrame) -> list[str]:
    """Name the claims whose verdict is another in a later table of claims."""
    old, new = (table.set_index("number")["verdict"] for table in (before, now))
    pairs = pd.DataFrame({"old": old, "new": new}).dropna().query("old != new")
    return [f"claim {row.Index} {row.new}, was {row.old}" for row in pairs.itertuples()]
