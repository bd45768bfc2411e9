"""The loggers of a run, which `report_to` or `callbacks` name: to each of them all stages are one run."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

_LOGGERS = tuple(INTEGRATION_TO_CALLBACK.values())


class Loggers:
    """What the Trainers of all stages share instead of loggers of their own; it tells the arguments of the run."""

    def __init__(self, args: TrainingArguments) -> None:
        self.args, self._shared = args, {}

    def in_place_of(self, callback: TrainerCallback) -> Any:
        """Return the run's logger of that kind, made of `callback` in the first stage; `callback` if it is none."""
        if not isinstance(callback, _LOGGERS):
            return callback
        return self._shared.setdefault(type(callback), _OneRun(callback, self.args))

    def finish(self, model: nn.Module) -> None:
        """Tell each logger that the run has ended, with that model."""
        for each in self._shared.values():
            each.finish(model)


class _OneRun:
    """A logger that begins with the first stage and ends with the run, where Trainers begin and end it each time."""

    def __init__(self, logger: TrainerCallback, args: TrainingArguments) -> None:
        self.logger, self.args, self.begun, self.last = logger, args, False, ()

    def __getattr__(self, event: str) -> Any:
        return getattr(self.logger, event)

    def on_train_begin(self, args, state, control, **named) -> None:
        if not self.begun:
            self.logger.on_train_begin(self.args, state, control, **named)
        self.begun = True

    def on_train_end(self, args, state, control, processing_class=None, **_) -> None:
        self.last = state, control, processing_class  # not the optimizer, whose memory the next stage needs

    def finish(self, model: nn.Module) -> None:
        if self.last:
            state, control, processing_class = self.last
            self.logger.on_train_end(self.args, state, control, model=model, processing_class=processing_class)
