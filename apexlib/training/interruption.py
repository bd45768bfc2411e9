"""SIGTERM and SIGINT as a request to save and leave, heard where a run can do so."""

import signal
import threading
from types import FrameType
from typing import Any, Self

import torch

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A run that a signal ended; `code` is what its process should exit with: 143 (SIGTERM) or 130 (SIGINT)."""

    def __init__(self, number: int, where: str) -> None:
        self.code = 128 + number
        super().__init__(f"{signal.Signals(number).name} {where}: saved; resume=True (--resume) goes on from there")


class Stop:
    """Inside the block, notes the first of the signals for whoever asks; the next one acts as it would outside.

    All processes of a distributed run hear of a signal to one of them; they have to ask together.
    """

    def __init__(self, args: Any) -> None:
        self.args, self.number = args, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def asked(self) -> bool:
        """Whether a signal has come."""
        if self.args.world_size > 1:
            number = torch.tensor(self.number, device=self.args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        return bool(self.number)

    def check(self, where: str) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.asked():
            raise Interrupted(self.number, where)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()
