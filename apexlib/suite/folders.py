"""Where things lie: the project's root, the folders of a profile, what a result or a setting names by its path."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path

PLAY = "play"  # a profile, and the folder of its notebooks: what is run in JupyterLab
_RECORDED = ("cpu", "cpu-avx2", "study")  # profiles whose results are kept in the repository


class NotReadyError(FileNotFoundError):
    """Something has to be run first; in a notebook, the message is all that is shown."""

    def _render_traceback_(self) -> list[str]:  # asked for by IPython
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Folders:
    """The folders of one profile, below the project's root; none is made before something is written to it."""

    results: Path
    figures: Path
    models: Path
    cache: Path
    runs: Path
    executed: Path  # notebooks, for readers


def project_root(start: Path | None = None) -> Path:
    """Find the project's folder: `start` (default: the working directory) or the nearest one above it."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(f"{start} is not inside the project: need a folder with pyproject.toml and notebooks/")


def folders(profile: str, root: Path | None = None) -> Folders:
    """Name the folders of `profile`.

    In a notebook that JupyterLab runs, recorded results are not written over: their folders there are those of "play".

    >>> folders("cpu", Path("project")).results.as_posix()
    'project/data/results/cpu'
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", profile):
        raise ValueError(f"profile {profile!r}: need letters, digits, '_', '-' or '.', since it names a folder")
    if root is None and profile in _RECORDED and os.environ.get("JPY_SESSION_NAME"):  # set by Jupyter's server
        profile = PLAY
    root = root or project_root()
    own = {name: root / "data" / name / profile for name in ("results", "models", "runs")}
    own |= {"figures": root / "figures" / profile, "executed": root / "notebooks" / "executed" / profile}
    return Folders(**own, cache=root / "data" / "cache")


def home() -> Path:
    """The project's folder; outside a project, the working directory."""
    with suppress(FileNotFoundError):
        return project_root()
    return Path.cwd()


def locate(name: str | Path) -> str:
    """A file or folder of the project, or a pattern of files, by its path from the root; any other name as it is."""
    inside = home() / name
    return str(inside) if inside.exists() or glob(str(inside)) else str(name)


def relative(path: Path) -> str:
    """The path from the project's root, if it lies below it: what `locate` finds again, wherever the project lies."""
    path = Path(path).resolve()
    return path.relative_to(home()).as_posix() if path.is_relative_to(home()) else str(path)
