"""Pre-training from scratch, with plain checkpoints along the way."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from apexlib.progress import hide_progress


def pretrain(
    model: PreTrainedModel,
    dataset: Dataset,
    folder: Path,
    *,
    steps: int,
    checkpoints: Iterable[int],
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    warmup_share: float = 0.05,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop: int | None = None,
    resume: Path | None = None,
) -> pd.DataFrame:
    """Train `model` in place for `steps` steps and keep plain checkpoints along the way.

    AdamW (β = 0.9, 0.95; weight decay 0.1, none on norms and biases), gradient norm clipped at 1, linear warm-up, then
    cosine to 0; bf16 autocast on CUDA. The model after step s ∈ `checkpoints` (0: before training) goes to
    `folder/step-00s`, loadable with `from_pretrained`. Returns the log: `step`, `loss` (mean since the last row, nats
    per token), `learning_rate`, `gradient_norm`.

    The seed decides data order and dropout; the model's initial weights are the caller's.

    A long training can be cut into parts: one ends after step `stop` and keeps its whole state in `folder/state`, the
    next, with equal arguments, takes that folder as `resume` and goes on exactly: weights, optimizer, schedule, data
    order. Checkpoints are those of the part; the log is that of all parts so far.
    """
    from transformers import Trainer, TrainingArguments  # needs accelerate, which the rest of the library does not

    checkpoints = sorted(set(checkpoints))
    if bad := [step for step in checkpoints if not 0 <= step <= steps]:
        raise ValueError(f"checkpoints {bad}: need steps from 0 to {steps}")
    folder = Path(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "state"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(warmup_share * steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=max(1, steps // 40),
        save_strategy="no",
        report_to="none",
        disable_tqdm=hide_progress(),
        seed=seed,
    )
    set_seed(seed)
    callbacks = [_KeepCheckpoints(folder, checkpoints, tokenizer), *([] if stop is None else [_StopAt(stop)])]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(_state(Path(resume))))
    log = pd.DataFrame(trainer.state.log_history)
    log = log[log["loss"].notna()].rename(columns={"grad_norm": "gradient_norm"})
    return log[["step", "loss", "learning_rate", "gradient_norm"]].reset_index(drop=True)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Name the folder of the checkpoint after `step` steps.

    >>> checkpoint_folder(Path("base"), 40).as_posix()
    'base/step-00040'
    """
    return Path(folder) / f"step-{step:05d}"


def _state(folder: Path) -> Path:
    """The Trainer's own checkpoint in the state that a part has left; one without its optimizer would start it anew."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "optimizer.pt").is_file()]
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: need the state of the part before, with its optimizer; found {len(found)}")
    return found[0]


class _StopAt(TrainerCallback):
    """End the training after a step and keep its state."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


class _KeepCheckpoints(TrainerCallback):
    """Save plain models at chosen steps; the Trainer's own checkpoints know only regular intervals."""

    def __init__(self, folder: Path, steps: Iterable[int], tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.folder, self.steps, self.tokenizer = folder, set(steps), tokenizer

    def on_train_begin(self, args, state, control, model, **_) -> None:
        self._keep(model, state.global_step)

    def on_step_end(self, args, state, control, model, **_) -> None:
        self._keep(model, state.global_step)

    def _keep(self, model: PreTrainedModel, step: int) -> None:
        if step in self.steps:
            target = checkpoint_folder(self.folder, step)
            model.save_pretrained(target)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(target)
