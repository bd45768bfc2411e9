"""Files and folders that are whole or not there, locks, hashes, and models that others have saved."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

_PARTIAL = ".partial-"  # how the names of unfinished files and folders begin


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it and put it in place of `path`, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path.with_suffix(""), path.suffix)
    temporary.touch()
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success flush it and put it in place of `folder`, else remove it.

    A `folder` that is there must be empty, unless `replace`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(folder)
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if folder.exists():
            remove_folder(folder) if replace else folder.rmdir()
        temporary.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something, before anything is computed for it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder; need a new one")


def _beside(path: Path, suffix: str = "") -> Path:
    """A name that no other writer takes; files and folders are made under it, so that they keep the umask."""
    return path.with_name(f"{_PARTIAL}{path.name}-{uuid4().hex[:12]}{suffix}")


def pretrained(kind: Any, source: str | Path, **options: Any) -> Any:
    """Load what `kind` loads (a class of transformers) from a folder or the Hub; code beside it is never run.

    Weights are read from safetensors files only, so nothing is unpickled.
    """
    if kind.__name__ not in ("AutoConfig", "AutoTokenizer"):  # which would keep the word as a setting of theirs
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # whatever a damaged file makes a loader raise
        raise ValueError(f"{source}: not loaded, {type(error).__name__}: {error}") from error


def untrained(kind: Any, config: Any, **options: Any) -> Any:
    """Make what `kind` makes of a configuration (a class of transformers), with random weights."""
    try:
        return kind.from_config(config, **options)
    except (ValueError, ImportError):
        raise
    except Exception as error:  # whatever sizes that are none and names of nothing make it raise
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{config.model_type}: no model can be made of its configuration, {said}") from error


def remove_folder(folder: Path) -> None:
    """Remove a folder so that, whenever this is interrupted, it is there whole or not at all."""
    (aside := _beside(folder)).mkdir()
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
    """Hold the lock file `path` in the block, at most until its process ends; BlockingIOError if another holds it."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, blocking=False):
            yield
    except Timeout:
        raise BlockingIOError(f"{path}: held by another process") from None


def _flush(path: Path) -> None:
    windows = os.name == "nt"  # there a folder has no handle, and a file is flushed by who may write to it
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(value: Any, path: Path) -> Path:
    """Write `value` as JSON with sorted keys, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return Path(path)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; ValueError names the file and what is wrong with it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: need an object, got {type(value).__name__}")
    return value


def read_hashes(path: Path, version: int) -> dict[str, str]:
    """Read `files` from an object of that `format`: hashes by name, all of them inside the folder of `path`."""
    value = read_object(path)
    files = value.get("files")
    if value.get("format") != version or not isinstance(files, dict):
        raise ValueError(f"{path.name}: need format {version}, with files; got format {value.get('format')!r}")
    inside = {name: bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts for name in files}
    if bad := [name for name, found in files.items() if not inside[name] or not isinstance(found, str)]:
        raise ValueError(f"{path.name}: {bad[0]!r} is no file of this folder")
    return files


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
