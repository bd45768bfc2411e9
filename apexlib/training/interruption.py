"""SIGTERM, SIGINT and a limit of time as requests to save and leave, heard where a run can do so."""

import math
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import torch

TIME_IS_OVER = 3  # exit code; a signal's is 128 + its number, so that it counts for more
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A run that left before its end; its process should exit with `code`: 143 (SIGTERM), 130 or `TIME_IS_OVER`."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(code, where)  # what an exception keeps, it can be pickled with
        self.code, self.where = code, where

    def __str__(self) -> str:
        reason = "time is over" if self.code == TIME_IS_OVER else signal.Signals(self.code - 128).name
        return f"{reason} {self.where}: saved; resume=True (--resume) goes on from there"


class Stop:
    """Inside the block, notes the first signal, or that `seconds` have passed since it was made, for whoever asks.

    A second signal acts as it would outside. All processes of a distributed run hear of a signal to one of them, or of
    the time of one; they have to ask together.
    """

    def __init__(self, args: Any, seconds: float | None = None) -> None:
        self.args, self.code = args, 0
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def asked(self) -> bool:
        """Whether to leave."""
        if not self.code and time.monotonic() >= self.deadline:
            self.code = TIME_IS_OVER
        if self.args.world_size > 1:
            code = torch.tensor(self.code, device=self.args.device)
            torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX)
            self.code = int(code)
        return bool(self.code)

    def check(self, where: str) -> None:
        """Raise `Interrupted` if it is time to leave."""
        if self.asked():
            raise Interrupted(self.code, where)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.code = 128 + number
        self.__exit__()
