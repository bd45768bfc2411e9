"""Many runs of one experiment, side by side, each kept once it is finished: an interrupted set goes on where it was."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apexlib.files import content_hash, file_hash, write_json
from apexlib.progress import hide_progress
from apexlib.provenance import provenance
from apexlib.suite.folders import source_files

RESULT = "trial.json"

Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One run: its name, which names its folder too, and the keyword arguments of the run function, as JSON holds them.

    `reads` are files and folders on whose bytes the result depends.
    """

    name: str
    settings: Mapping[str, Any]
    reads: tuple[Path, ...] = ()


class OutOfTimeError(TimeoutError):
    """The time given was over before all trials were done; what is done is kept. `left` names the others."""

    def __init__(self, left: Sequence[str], total: int) -> None:
        self.left = tuple(left)
        super().__init__(f"{len(left)} of {total} trials are left: {', '.join(left[:3])}{' …' if left[3:] else ''}")


def run_trials(
    run: Run, trials: Sequence[Trial], folder: Path, *, workers: int | None = None, seconds: float | None = None
) -> list[dict[str, Any]]:
    """Call `run(folder=…, **settings)` for each trial that has not been run yet; return all results, in order.

    `run` is a function of a module; it returns what JSON can hold and may write to its folder, `folder/name`, in which
    `trial.json` then keeps result, settings and provenance. A trial is up to date while its settings, what it reads and
    the library's source are those it was run with.

    On CPUs, `workers` processes (default: one a core) take trials one by one, each with a single thread, which small
    models use best and which makes results independent of the number of workers. With a GPU, or on a single core,
    trials run in this process, one after another. After `seconds` no further trial is started and
    OutOfTimeError is raised. A trial that fails lets the others finish, then raises RuntimeError.
    """
    if repeated := {trial.name for trial in trials if sum(other.name == trial.name for other in trials) > 1}:
        raise ValueError(f"trials {sorted(repeated)}: need a name of its own for each")
    folder, began = Path(folder), time.monotonic()
    due = [trial for trial in trials if stored(trial, folder) is None]
    workers = workers or default_workers()
    failures: dict[str, str] = {}

    def late() -> bool:
        return seconds is not None and time.monotonic() - began > seconds

    finished = (
        _one_by_one(run, due, folder, late)
        if workers == 1
        else _side_by_side(run, due, folder, min(workers, max(1, len(due))), late)
    )
    done = len(trials) - len(due)
    with tqdm(total=len(trials), initial=done, desc="trials", disable=hide_progress(), leave=False) as bar:
        for trial, error in finished:
            bar.update()
            if error:
                failures[trial.name] = error
    if failures:
        name, error = next(iter(failures.items()))
        raise RuntimeError(f"{len(failures)} of {len(trials)} trials failed, first {name}: {error}")
    results = {trial.name: stored(trial, folder) for trial in trials}
    if left := [name for name, result in results.items() if result is None]:
        raise OutOfTimeError(left, len(trials))
    return list(results.values())


def default_workers() -> int:
    """One process a core that this process may use; a single one where there is a GPU to share."""
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stored(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """Return the result of a trial that is up to date, None for any other."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((Path(folder) / trial.name / RESULT).read_text(encoding="utf-8"))
        if kept["key"] == _key(trial):
            return kept["result"]
    return None


def _one_by_one(
    run: Run, trials: Sequence[Trial], folder: Path, late: Callable[[], bool]
) -> Iterator[tuple[Trial, str]]:
    for trial in trials:
        if late():
            return
        yield trial, _finish(run, trial, folder)


def _side_by_side(
    run: Run, trials: Sequence[Trial], folder: Path, workers: int, late: Callable[[], bool]
) -> Iterator[tuple[Trial, str]]:
    waiting, running = list(trials), dict[Future, Trial]()
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_worker) as pool:
        try:
            while running or (waiting and not late()):
                while waiting and len(running) < workers and not late():
                    trial = waiting.pop(0)
                    running[pool.submit(_finish, run, trial, folder)] = trial
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), _outcome(future)
        finally:
            pool.shutdown(cancel_futures=True)


def _outcome(future: Future) -> str:
    error = future.exception()
    return future.result() if error is None else f"its process died ({error}); out of memory?"


def _worker() -> None:
    """Prepare a process: one thread, no bars, and an end with the parent, which a killed one cannot order."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of weights: a line for every file
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _finish(run: Run, trial: Trial, folder: Path) -> str:
    """Run one trial in a clean folder and keep its result; return what went wrong."""
    place = Path(folder) / trial.name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    key, began = _key(trial), time.monotonic()
    try:
        result = run(folder=place, **trial.settings)
    except Exception as error:  # whatever stopped this trial, the others may still run
        return f"{type(error).__name__}: {error}"
    facts = provenance(seconds=round(time.monotonic() - began, 1), settings=dict(trial.settings))
    write_json({"key": key, "result": result, **facts}, place / RESULT)
    return ""


def _key(trial: Trial) -> str:
    """Hash of all that decides a result: settings, bytes that are read, software."""
    read = [file for path in trial.reads for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    hashes = [_hash(file, file.stat().st_size, file.stat().st_mtime_ns) for file in read if file.is_file()]
    return content_hash(dict(trial.settings), hashes, _software())


@cache
def _hash(file: Path, size: int, changed: int) -> str:
    return file_hash(file)


@cache
def _software() -> list[str]:
    """Hashes of the library's source, and the versions of what computes."""
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers")]
    return [*(file_hash(path) for path in source_files()), *versions]
