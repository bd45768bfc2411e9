"""One bar for all stages of a training: stage, step, loss and the time that is left."""

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from apexlib.progress import hide_progress


def show_stages(trainer: Any, stages: int) -> None:
    """Put a bar of the whole run in the place of a stage Trainer's own; none where nobody watches."""
    given = trainer.callback_handler.callbacks
    if own := next((each for each in given if type(each) is DEFAULT_PROGRESS_CALLBACK), None):
        trainer.remove_callback(own)  # it would also print what is logged
        if not hide_progress():
            trainer.add_callback(_StageBar(trainer.stage, stages))


class _StageBar(ProgressCallback):
    """Counts steps from the first stage on; the bar of the last stage stays."""

    def __init__(self, stage: Any, stages: int) -> None:
        super().__init__()
        self.stage, self.stages, self.losses = stage, stages, dict[str, float]()

    def on_train_begin(self, args, state, control, **_) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            steps = {"initial": self.stage.start + state.global_step, "total": self.stage.folder.borders[-1]}
            told = f"stage {self.stage.number + 1} of {self.stages}"
            self.training_bar = tqdm(desc=told, unit="step", **steps)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        self.losses |= {name: logs[name] for name in ("loss", "eval_loss") if name in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.losses)

    def on_train_end(self, args, state, control, **named) -> None:
        goes_on = self.stage.number + 1 < self.stages and state.global_step == state.max_steps
        if goes_on and (bar := self.training_bar) is not None:
            bar.leave, bar.total = False, bar.n  # a widget that is not full would stay, in red
        super().on_train_end(args, state, control, **named)
