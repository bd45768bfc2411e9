"""How far a run is: bars where somebody watches, lines for a log, and how long it will take by what is recorded."""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

_BETWEEN_LINES = 60.0  # seconds; how often a log is told of trials
_LOOK: dict[str, Any] = {"bar_format": "{desc} |{bar}| [{elapsed}{postfix}]", "leave": False, "dynamic_ncols": True}


@dataclass(frozen=True)
class Counts:
    """Trials of a notebook so far: done `before` it started, done `now`, of how many."""

    before: int = 0
    now: int = 0
    total: int = 0


def read_counts(file: Path) -> Counts:
    """Add up what the sets of a notebook have written to the file that `trials.COUNTS` names."""
    with suppress(OSError, ValueError):
        lines = file.read_text(encoding="utf-8").splitlines()
        before, now, total = map(sum, zip(*(map(int, line.split()) for line in lines), strict=True))
        return Counts(before, now, total)
    return Counts()


def seconds_left(elapsed: float, counts: Counts, past: Mapping[str, Any]) -> float | None:
    """Seconds that a notebook will still take: as recorded, and ever more by the pace of the trials done now.

    `past`: the `seconds` that it took and how many `trials` it ran then (unless said, all). None: nothing tells.

    >>> seconds_left(100.0, Counts(), {"seconds": 300.0})
    200.0
    >>> seconds_left(100.0, Counts(before=30, total=60), {"seconds": 300.0})  # only half of the trials are to be run
    50.0
    >>> seconds_left(100.0, Counts(now=10, total=60), {})
    500.0
    """
    due, recorded = counts.total - counts.before, past.get("seconds")
    if recorded is not None and due:
        ran = past.get("trials", counts.total)
        recorded = recorded * due / ran if ran else None
    by_record = None if recorded is None else max(0.0, recorded - elapsed)
    if counts.now < 1 or due < 1:
        return by_record
    share, by_pace = counts.now / due, elapsed * (due - counts.now) / counts.now
    return by_pace if by_record is None else share * by_pace + (1 - share) * by_record


class RunBars:
    """Two bars on a terminal, of the run and of its notebook; elsewhere a line a minute while trials are done.

    `expected`: the notebooks in their order, each with what is recorded of it, as for `seconds_left`.
    """

    def __init__(self, expected: Mapping[str, Mapping[str, Any]]) -> None:
        self.expected, self.name = dict(expected), ""
        hidden = True if os.environ.get("TQDM_DISABLE") else None  # None: unless on a terminal
        self.run, self.notebook = tqdm(disable=hidden, **_LOOK), tqdm(disable=hidden, **_LOOK)

    def close(self) -> None:
        """Take both bars away."""
        self.notebook.close()
        self.run.close()

    def begin(self, name: str) -> None:
        """Turn to the next notebook."""
        self.name, self.began = name, time.monotonic()
        self.said, self.counts = self.began, Counts()
        self.notebook.reset()  # its clock
        self.show(0, 1, Counts())

    def show(self, cell: int, cells: int, counts: Counts) -> None:
        """Show where the notebook is, `cell` counted from 1; called every second, so that the clocks move."""
        now = time.monotonic()
        left = seconds_left(now - self.began, counts, self.expected[self.name])
        done = f"trials {counts.before + counts.now} of {counts.total}" if counts.total else ""
        if self.run.disable:
            if counts != self.counts and now - self.said >= _BETWEEN_LINES:
                say(f"  {done}, about {duration(left)} left" if left else f"  {done}")
                self.said, self.counts = now, counts
            return
        names = [*self.expected]
        turn = names.index(self.name)
        later = [self.expected[name].get("seconds") for name in names[turn + 1 :]]
        whole = None if None in (left, *later) else left + sum(later)
        _show(self.run, f"notebook {turn + 1} of {len(names)}", whole, turn, len(names))
        told = (self.name, f"cell {cell} of {cells}" if cell else "", done)
        _show(self.notebook, "  ".join(filter(None, told)), left, max(0, cell - 1), cells)


def _show(bar: tqdm, text: str, left: float | None, done: int, total: int) -> None:
    """Show a bar of time if it is known how much is `left`, else of what is `done`."""
    elapsed = bar.format_dict["elapsed"]
    bar.n, bar.total = (elapsed, elapsed + left) if left else (done, total)
    bar.set_description_str(text, refresh=False)
    bar.set_postfix_str(f"about {tqdm.format_interval(left)} left" if left else "", refresh=False)
    bar.refresh()


def duration(seconds: float) -> str:
    """Write a time for people.

    >>> duration(3.21), duration(754)
    ('3.2 s', '12 min 34 s')
    """
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def say(text: str) -> None:
    """Write a line to stderr, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
