"""What every result carries: when, with which software, from which commit and on which device it was made."""

import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from apexlib.files import atomic_write, file_hash, write_json

_RECORDED = ("apexlib", "torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "numpy", "pandas")


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
    here = Path(__file__).resolve().parent
    commit = git(here, "rev-parse", "HEAD")
    changed = git(here, "status", "--porcelain", "--", ".", "../notebooks", "../requirements.lock") if commit else None
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,  # of the source that is running
        "source_modified": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device(),
        "versions": {name: each.version for name in _RECORDED for each in islice(metadata.distributions(name=name), 1)},
        **facts,
    }


def git(folder: Path, *arguments: str) -> str | None:
    """What a command of git prints in `folder`; None where git cannot tell."""
    # without a lock on the index: killed in there, git would leave it, and the repository be locked to its owner
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.rstrip()
    return None


def _device() -> str:
    if (torch := sys.modules.get("torch")) is None:
        return "cpu"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
