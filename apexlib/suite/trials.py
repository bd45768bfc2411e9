"""Many runs of one experiment, side by side, each kept once it is finished: an interrupted set goes on where it was."""

import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apexlib.files import content_hash, exclusive, file_hash, read_object, write_json
from apexlib.progress import hide_progress
from apexlib.provenance import provenance
from apexlib.suite.dependencies import code_of

RESULT = "trial.json"  # holds the key of a trial that has begun, and its result once it has finished
DEADLINE = "APEXLIB_DEADLINE"  # an environment variable: when the time is over, in seconds since the epoch
WORKERS = "APEXLIB_WORKERS"  # another: the address of a Dask scheduler whose workers take the trials
SHARE = "APEXLIB_SHARE"  # another: which part of the trials is to be done here, "3/16": the third of sixteen
PROCESSES = "APEXLIB_PROCESSES"  # another: how many processes of this machine take trials
COUNTS = "APEXLIB_COUNTS"  # another: a file that tells how many trials are done, for who watches from outside

_GRACE = 60.0  # seconds that a process has to save, once its parent is gone
_PATIENCE = "10s"  # until a scheduler has answered
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # the latter: of the files of weights
_busy = threading.RLock()  # held while this process runs a trial

Run = Callable[..., dict[str, Any]]
Pool = tuple[Callable[..., Future], Callable[[], int]]  # what takes a trial, and how many are taken at a time


@dataclass(frozen=True)
class Trial:
    """One run: its name, which names its folder too, and the keyword arguments of the run function."""

    name: str
    settings: Mapping[str, Any]  # as JSON holds them
    reads: tuple[Path, ...] = ()  # files and folders on whose bytes the result depends


class OutOfTimeError(TimeoutError):
    """The time given was over before all trials were done; what is done is kept. `left` names the others."""

    def __init__(self, left: Sequence[str], total: int) -> None:
        self.left = tuple(left)
        super().__init__(f"{len(left)} of {total} trials are left: {', '.join(left[:3])}{' …' if left[3:] else ''}")


def run_trials(
    run: Run, trials: Sequence[Trial], folder: Path, *, workers: int | None = None, threads: int = 1
) -> list[dict[str, Any]]:
    """Call `run(folder=…, **settings)` for each trial that is not up to date; return all results, in order.

    `run` is a function of a module; it returns what JSON can hold and may write to its folder, `folder/name`, in which
    `trial.json` keeps the result. That is up to date while settings, what is read and the code that `run` can reach
    are as they were. `workers` processes take trials one by one, each with so many `threads`, so that results do not
    depend on their number: so many as the environment variable `APEXLIB_PROCESSES` says, else one a core; one core, or
    a GPU, makes them run in this process. Where `APEXLIB_WORKERS` has the address of a Dask scheduler, its workers take
    them. A trial that fails lets the others finish, then raises RuntimeError.

    After the deadline no trial is started and OutOfTimeError is raised, as it is where others are to do some of them:
    the environment variable `APEXLIB_SHARE` gives this process its part, and a trial that another process is at is
    passed over. `run` may ask `time_left` and leave by `Interrupted`. A trial that left so, or was killed, finds in its
    folder what it has written, and can go on; any other, one that failed too, starts in an empty folder.
    """
    names = [trial.name for trial in trials]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"trials {sorted(repeated)}: need a name of its own for each")
    calls = [(run, trial, Path(folder) / trial.name, _key(run, trial)) for trial in trials]
    part, parts = map(int, os.environ.get(SHARE, "1/1").split("/"))
    done = ["result" in _written(*call[2:]) for call in calls]
    due = [call for number, call in enumerate(calls) if not done[number] and number % parts == part - 1]
    address, workers = os.environ.get(WORKERS), workers or default_workers()
    if not address and workers == 1:
        runs = (_finish(*call) for call in due if not _late())
    else:
        pool = _cluster(address, threads) if address else _processes(workers, threads, run.__module__)
        runs = _side_by_side(due, pool)
    if failures := [error for error in _counted(runs, sum(done), len(calls)) if error]:
        raise RuntimeError(f"{len(failures)} of {len(trials)} trials failed, first {failures[0]}")
    results = [_written(*call[2:]).get("result") for call in calls]
    if left := [name for name, result in zip(names, results, strict=True) if result is None]:
        raise OutOfTimeError(left, len(trials))
    return results


def time_left() -> float | None:
    """Seconds until the deadline that the environment variable `APEXLIB_DEADLINE` gives; None without one."""
    deadline = os.environ.get(DEADLINE)
    return float(deadline) - time.time() if deadline else None


def _counted(runs: Iterator[str], before: int, total: int) -> Iterator[str]:
    """Pass on what runs return, under a bar that stays; lines of `COUNTS`: done before, done now, of how many."""

    def count(*numbers: int) -> None:
        if path := os.environ.get(COUNTS):
            with suppress(OSError), open(path, "a", encoding="utf-8") as file:
                print(*numbers, file=file)

    count(before, 0, total)
    for error in tqdm(runs, desc="trials", unit="trial", total=total, initial=before, disable=hide_progress()):
        count(0, 1, 0)
        yield error


def _late() -> bool:
    return (left := time_left()) is not None and left <= 0


def default_workers() -> int:
    """As many processes as were asked for, else one a core that this process may use, or one where there is a GPU."""
    if asked := os.environ.get(PROCESSES):
        return int(asked)
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _written(folder: Path, key: str) -> dict[str, Any]:
    """Read what the file of a trial holds; {} if it was not written under `key`."""
    with suppress(OSError, ValueError):
        if (content := read_object(folder / RESULT)).get("key") == key:
            return content
    return {}


def _side_by_side(calls: Sequence[tuple], pool: AbstractContextManager[Pool]) -> Iterator[str]:
    if not calls:
        return
    waiting, running = list(calls), dict[Future, str]()
    with pool as (submit, workers):
        while running or (waiting and not _late()):
            while waiting and len(running) < workers() and not _late():
                call = waiting.pop(0)
                running[submit(*call)] = call[1].name
            wait(running, return_when=FIRST_COMPLETED)
            for future in filter(Future.done, list(running)):
                name, gone = running.pop(future), future.cancelled()
                error = None if gone else future.exception()
                if gone or isinstance(error, BrokenExecutor):
                    waiting = []  # the pool takes no more
                died = "its scheduler is gone" if gone else error and f"its process died ({error}); out of memory?"
                yield f"{name}: {died}" if died else future.result()


@contextmanager
def _processes(workers: int, threads: int, module: str) -> Iterator[Pool]:
    """Start processes on this machine."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)  # a plain fork loses torch's threads, a server imports once for all
    context.set_forkserver_preload([module])
    arguments = (threads, dict(os.environ))  # a server keeps the environment that it started with
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_worker, initargs=arguments) as pool:
        yield partial(pool.submit, _finish), lambda: workers


def _worker(threads: int, environment: Mapping[str, str]) -> None:
    """Prepare a process: its threads, no bars, and an end with the parent, which a killed one cannot order."""
    os.environ.update(environment)
    os.environ.update(_QUIET)
    import torch

    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)
        _busy.acquire(timeout=_GRACE)  # a training saves before it ends, if it can
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _cluster(address: str, threads: int) -> Iterator[Pool]:
    """Reach the workers of a scheduler; one that dies has its trial taken by another, which goes on with it."""
    with scheduler(address) as client:
        given = (threads, os.getcwd(), os.environ.get(DEADLINE, ""))
        submit = client.get_executor(pure=False).submit
        yield partial(submit, _visit, *given), lambda: len(client.ncores()) or 1


def scheduler(address: str) -> Any:
    """Connect to a Dask scheduler that has workers."""
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(f"workers {address}: need Dask, pip install 'apexlib[cluster]', here and there") from None
    try:
        client = Client(address, timeout=_PATIENCE, set_as_default=False)
    except Exception as error:  # whatever a name makes it raise
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"workers {address}: need the address of a Dask scheduler ({found})") from error
    if not client.ncores():
        client.close()
        raise ValueError(f"workers {address}: has none yet; need `dask worker {address}`")
    return client


def _visit(threads: int, folder: str, deadline: str, run: Run, trial: Trial, *where: Any) -> str:
    """Run a trial in a worker of a cluster as in a process of the machine that sends it."""
    import torch

    with _busy:
        os.environ |= {**_QUIET, DEADLINE: deadline}
        torch.set_num_threads(threads)
        if os.path.isdir(folder):
            os.chdir(folder)
            if _key(run, trial) == where[-1]:  # a worker may be older than the code
                return _finish(run, trial, *where)
    need = f"need {folder} as it is here, and its worker started anew"
    return f"{trial.name}: {platform.node()} has other files, code or versions; {need}"


def _finish(run: Run, trial: Trial, folder: Path, key: str) -> str:
    """Run one trial, in a clean folder unless it has begun before, and keep its result; return what went wrong."""
    with suppress(BlockingIOError), _busy, exclusive(folder.with_name(f".{folder.name}.lock")):
        if "result" in (written := _written(folder, key)):  # another process was faster
            return ""
        if not written:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json({"key": key}, folder / RESULT)
        began = time.monotonic()
        try:
            result = run(folder=folder, **trial.settings)
        except Exception as error:  # whatever stopped this trial, the others may still run
            (folder / RESULT).unlink(missing_ok=True)  # it may be what lies there
            return f"{trial.name}: {type(error).__name__}: {error}"
        except KeyboardInterrupt as stop:
            from apexlib.training.interruption import TIME_IS_OVER  # loads torch, as whoever left by it has

            if getattr(stop, "code", None) != TIME_IS_OVER:
                raise
            return ""  # without a result it counts as left
        facts = provenance(seconds=round(time.monotonic() - began, 1), settings=dict(trial.settings))
        write_json({"key": key, "result": result, **facts}, folder / RESULT)
    return ""  # done, or another process is at it


_hash = cache(lambda file, size, changed: file_hash(file))


def _key(run: Run, trial: Trial) -> str:
    """Hash of all that decides a result: settings, bytes that are read, code, software."""
    files = [file for path in trial.reads for file in sorted(path.rglob("*")) or [path] if file.is_file()]
    hashes = [_hash(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return content_hash(dict(trial.settings), hashes, _software(run))


@cache  # of this process, which goes on with the code it has loaded
def _software(run: Run) -> list[Any]:
    """The code that a run can reach, and the versions of what computes."""
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers")]
    return [f"{run.__module__}.{run.__qualname__}", code_of(run), *versions]
