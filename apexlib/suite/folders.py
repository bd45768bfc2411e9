"""Where results lie: the project's root and the folders of a profile."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """The folders of one profile, below the project's root; none is made before something is written to it."""

    results: Path
    figures: Path
    models: Path
    cache: Path
    runs: Path


def project_root(start: Path | None = None) -> Path:
    """Find the project's folder: `start` (default: the working directory) or the nearest one above it."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(f"{start} is not inside the project: need a folder with pyproject.toml and notebooks/")


def folders(profile: str, root: Path | None = None) -> Folders:
    """Name the folders of `profile`.

    >>> folders("cpu", Path("project")).results.as_posix()
    'project/data/results/cpu'
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", profile):
        raise ValueError(f"profile {profile!r}: need letters, digits, '_', '-' or '.', since it names a folder")
    root = root or project_root()
    data = root / "data"
    return Folders(
        results=data / "results" / profile,
        figures=root / "figures" / profile,
        models=data / "models" / profile,
        cache=data / "cache",
        runs=data / "runs" / profile,
    )
