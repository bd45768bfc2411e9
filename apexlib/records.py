"""Where results lie and what they carry: folders of a profile, provenance, hashes, writes that are never half done."""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from tqdm.auto import tqdm

T = TypeVar("T")

_PARTIAL = ".partial-"  # how the names of unfinished files and folders begin
_RECORDED = ("apexlib", "torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "numpy", "pandas")


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


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it and put it in place of `path`, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{_PARTIAL}{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success flush it and put it in place of `folder`, else remove it.

    A `folder` that is there must be empty, unless `replace`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        temporary.chmod(0o755)
        if folder.exists():
            remove_folder(folder) if replace else folder.rmdir()
        temporary.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that, whenever this is interrupted, it is there whole or not at all."""
    aside = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{folder.name}-", dir=folder.parent))
    folder.rename(aside / folder.name)
    shutil.rmtree(aside)


def clear_partial(folder: Path) -> list[Path]:
    """Remove what killed writers left in `folder`; nobody may be writing there."""
    left = sorted(Path(folder).glob(f"{_PARTIAL}*"))
    for path in left:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return left


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside the block; BlockingIOError if another process holds it.

    The system lets go of it when its holder ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(value: Any, path: Path) -> Path:
    """Write `value` as JSON with sorted keys, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return Path(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(*parts: Any) -> str:
    """SHA-256, in hex, of values that JSON can hold; equal values give equal hashes, whatever the order of keys.

    >>> content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def source_files(module: str) -> list[Path]:
    """The library's files that `module` needs: its own and those of all modules it imports, at any depth.

    >>> [path.stem for path in source_files("evaluation")]
    ['evaluation', 'records']
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = Path(__file__).with_name(f"{name}.py")
        if name in found or not path.is_file():
            continue
        found[name] = path
        text = path.read_text(encoding="utf-8")
        waiting += re.findall(r"^\s*(?:from|import) apexlib\.(\w+)", text, flags=re.M)
        waiting += re.findall(r"\w+", " ".join(re.findall(r"^\s*from apexlib import (.+)$", text, flags=re.M)))
    return [found[name] for name in sorted(found)]


def save_table(table: pd.DataFrame, name: str, folder: Path, **facts: Any) -> Path:
    """Write `table` to `folder/name.csv` and its provenance, with any `facts` given, to `folder/name.json`.

    An empty table is refused: a result file without a result reads as a success.
    """
    if table.empty:
        raise ValueError(f"table {name!r} has no rows: nothing to save")
    path = Path(folder) / f"{name}.csv"
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")
    write_json(provenance(sha256=file_hash(path), rows=len(table), **facts), path.with_suffix(".json"))
    return path


def provenance(**facts: Any) -> dict[str, Any]:
    """Record when, with which software and on which device a result was made; `facts` are added as given.

    Only what is named here is recorded: no environment variable, user or host name.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device(),
        "versions": {name: version for name in _RECORDED if (version := _version(name))},
        **facts,
    }


def _commit() -> dict[str, Any]:
    """Commit of the source that is running, and whether library or notebooks differ from it."""

    def git(*arguments: str) -> str | None:
        # without a lock on the index: killed in there, git would leave it, and the repository be locked to its owner
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *arguments]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        return None

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", ".", "../notebooks", "../requirements.lock") if commit else None
    return {"commit": commit, "source_modified": None if changed is None else bool(changed)}


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is None:
        return "cpu"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Iterate over `items` under a progress bar, unless `hide_progress()`."""
    return tqdm(items, desc=description, total=total, disable=hide_progress(), leave=False)


def hide_progress() -> bool:
    """Whether a progress bar would only flood a log: neither a terminal nor JupyterLab, or TQDM_DISABLE is set."""
    return bool(os.environ.get("TQDM_DISABLE")) or not ("ipykernel" in sys.modules or sys.stderr.isatty())
