"""Run one notebook through papermill in a kernel of this interpreter; check that it finished and kept its promises."""

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from apexlib.suite.bars import Counts, RunBars, duration, read_counts, say
from apexlib.suite.folders import RUNNER
from apexlib.suite.memory import KEEP_FREED, resident_mb
from apexlib.suite.notebooks import Notebook
from apexlib.suite.trials import COUNTS

Stamps = dict[str, list[int]]  # path below the root → size, time of change in ns

_LONG_CELL = 5.0  # seconds; where there is no progress bar, shorter cells get no line of their own


@dataclass(frozen=True)
class Execution:
    """What came of one notebook; no `problem`: every cell completed and every artifact is there, new and whole."""

    problem: str
    seconds: float
    peak_memory_mb: int | None  # resident, of the kernel's own process
    out_of_time: bool = False  # the deadline passed before it was done; `problem` says what is left
    trials: int | None = None  # that it ran; None: it has none


def execute(
    notebook: Notebook,
    values: Mapping[str, Any],
    *,
    root: Path,
    copy: Path,
    environment: Mapping[str, str],
    bars: RunBars,
) -> Execution:
    """Run `notebook` in its folder with the parameters `values`, under more `environment` variables, into `copy`."""
    import papermill

    for name in ("papermill", "asyncio"):  # repeats what is said here; complains of what an interrupt cuts off
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = {path: stamps(root, path) for path in notebook.writes}
    follower, out_of_time = _Follower(notebook, copy.with_suffix(".trials"), bars), False
    environment = {**environment, COUNTS: str(follower.file)}
    # papermill formats paths with the parameters
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook.path, copy))
    with follower, copy.with_suffix(".log").open("w+", encoding="utf-8", errors="replace") as log:
        try:
            executed = papermill.execute_notebook(
                source,
                target,
                parameters=dict(values),
                kernel_name="python3",
                language="python",
                cwd=notebook.path.parent,
                progress_bar=False,
                kernel_manager_class=_own_kernel(root, copy.parent / ".ipython", log, follower, environment),
                timeout_func=lambda cell: max(0.1, follower.ends_by - time.monotonic()),  # 0 would mean no limit
                store_widget_state=False,  # a view is kept as its picture
                iopub_timeout=60,  # for output still under way at the end of a cell; the default is too short
                on_cell_start=follower.cell_starts,
                on_cell_executed=follower.cell_ends,
            )
            problem = _broken_promise(notebook, executed, before, root)
        except Exception as error:  # whatever stopped this notebook, others may still run
            out_of_time = getattr(error, "ename", "") == "OutOfTimeError"
            problem = error.evalue if out_of_time else _explain(error, follower, log)
    seconds, trials = time.monotonic() - follower.began, follower.counts.now if follower.counts.total else None
    return Execution(problem, seconds, follower.peak_memory_mb, out_of_time, trials)


def stamps(root: Path, path: str) -> Stamps:
    """Stat the file `path` below `root` or, if `path` ends in "/", every visible file in that folder."""
    names = glob("**", root_dir=root / path, recursive=True) if path.endswith("/") else [""]
    stats = {file.relative_to(root).as_posix(): file.stat() for name in names if (file := root / path / name).is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class _Follower:
    """Follow a notebook while it runs: the cell it is in, how long cells take, trials, how much memory it needs."""

    def __init__(self, notebook: Notebook, file: Path, bars: RunBars) -> None:
        self.file, self.bars, self.counts = file, bars, Counts()
        self.tick: asyncio.TimerHandle | None = None
        self.limit, self.total = notebook.timeout_minutes, 1 + len(notebook.cells)
        self.numbers: dict[int, int] = {}  # index in the executed copy → which of the notebook's own code cells
        self.index, self.source = 0, ""
        self.began = self.cell_began = time.monotonic()
        self.ends_by = math.inf  # known once the kernel has started
        self.kernel: Any = None
        self.peak_memory_mb: int | None = None

    def __enter__(self) -> None:
        self.file.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        if self.tick:
            self.tick.cancel()
        self.counts = read_counts(self.file)
        self.file.unlink(missing_ok=True)

    def show(self) -> None:
        self.bars.show(len(self.numbers), self.total, read_counts(self.file))

    def keep_showing(self, loop: asyncio.AbstractEventLoop) -> None:
        """Show how far the notebook is, now and every second while the loop runs, as it does in every cell."""
        self.show()
        self.tick = loop.call_later(1.0, self.keep_showing, loop)

    def cell_starts(self, cell: Any, cell_index: int) -> None:
        if _is_own_code(cell):
            self.index, self.source, self.cell_began = cell_index, cell.source, time.monotonic()
            if not self.numbers:
                self.ends_by = self.cell_began + 60 * self.limit
            self.numbers[cell_index] = len(self.numbers) + 1
            self.show()

    def cell_ends(self, cell: Any, cell_index: int, **_: Any) -> None:
        if cell_index not in self.numbers:
            return
        if not math.isnan(peak := resident_mb(self.kernel.provisioner.pid)):
            self.peak_memory_mb = round(peak)
        seconds = time.monotonic() - self.cell_began
        if self.bars.run.disable and seconds > _LONG_CELL:
            say(f"  code cell {self.numbers[cell_index]} of {self.total} took {duration(seconds)}")


def _own_kernel(root: Path, ipython: Path, log: TextIO, follower: _Follower, more: Mapping[str, str]) -> type:
    """Make a kernel manager that starts this very interpreter, whatever kernels are installed; it can import `root`."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",  # beside other work, threads that spin take several times as long
        "GLIBC_TUNABLES": KEEP_FREED,
        "OPENBLAS_NUM_THREADS": "1",  # two libraries' threads on the same cores wait for each other
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        RUNNER: "1",
        "TQDM_DISABLE": "1",  # bars would flood the executed copy
        "IPYTHONDIR": str(ipython),  # a user's own start-up files are not part of the run
        **more,
    }

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict(python_arguments=["-Xfrozen_modules=off"]))

        async def start_kernel(self, **options: Any) -> None:
            follower.kernel = self
            follower.keep_showing(asyncio.get_running_loop())
            await super().start_kernel(env=environment, stdout=log, stderr=log, **options)  # what no cell catches

    return OwnKernel


def _broken_promise(notebook: Notebook, executed: Any, before: Mapping[str, Stamps], root: Path) -> str:
    """Name the first cell that did not complete, or artifact that is missing, empty, old or lacks a promised column."""
    own = [cell for cell in executed.cells if _is_own_code(cell)]
    for number, cell in enumerate(own, 1):
        if cell.source.strip() and (cell.metadata.papermill.status != "completed" or cell.execution_count is None):
            left = any(output.get("ename") == "SystemExit" for output in cell.outputs)  # to papermill, a success
            fate = "left the notebook by sys.exit" if left else "was not run"
            return f"code cell {number} of {len(own)} {fate}{_quote(cell.source.splitlines())}"
    for path, columns in notebook.writes.items():
        after = stamps(root, path)
        if not after:
            return f"promised {path}, but did not write it"
        if all(before[path].get(name) == stamp for name, stamp in after.items()):
            return f"promised {path}, but left an older one in place"
        if not any(size for size, _ in after.values()):
            return f"promised {path}, but it is empty"
        if path.endswith(".csv"):
            table = pd.read_csv(root / path, nrows=1, encoding="utf-8-sig")
            if missing := [column for column in columns if column not in table]:
                return f"promised {path} with {', '.join(missing)}; its columns are {', '.join(table)}"
            if table.empty:
                return f"promised {path}, but it has no rows"
    return ""


def _explain(error: Exception, follower: _Follower, log: TextIO) -> str:
    """Say which cell failed and why, with its source and the end of the traceback."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    index, source = getattr(error, "cell_index", follower.index), getattr(error, "source", follower.source)
    if hasattr(error, "ename"):  # raised in the notebook
        said, trace = f"{error.ename}: {error.evalue}".removesuffix(": "), "\n".join(error.traceback).splitlines()
    elif isinstance(error, CellTimeoutError) and time.monotonic() >= follower.ends_by:
        said, trace = f"not done after {follower.limit:g} minutes, the notebook's timeout_minutes", []
    else:
        log.seek(0)
        trace = [line for line in log.read().splitlines() if not line.startswith("[IPKernelApp]")]
        died = isinstance(error, DeadKernelError)
        said = "the kernel died (out of memory?)" if died else f"{type(error).__name__}: {error}"
    number = follower.numbers.get(index)
    where = f"code cell {number} of {follower.total}" if number else "before the first cell"
    report = f"{where}: {said}{_quote(source.splitlines())}{_quote(trace[-20:])}"
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", report)  # colours of a terminal


def _is_own_code(cell: Any) -> bool:
    return cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])


def _quote(lines: Sequence[str], limit: int = 30) -> str:
    return "".join(f"\n    | {line}" for line in [*lines[:limit], *["…"] * (len(lines) > limit)])
