"""Pre-training from scratch: full training in one stage, with plain checkpoints along the way."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from apexlib.progress import hide_progress
from apexlib.training.checkpoints import checkpoint_folder as checkpoint_folder
from apexlib.training.checks import resolve_precision
from apexlib.training.stages import train_in_stages


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
    precision: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_steps: int = 200,
    resume: bool = False,
    seconds: float | None = None,
) -> pd.DataFrame:
    """Train `model` in place for `steps` steps and keep plain checkpoints along the way.

    AdamW (β = 0.9, 0.95; weight decay 0.1, none on norms and biases), gradient norm clipped at 1, linear warm-up, then
    cosine to 0; `precision` as in `resolve_precision`. The model after step s ∈ `checkpoints` (0: before training) goes
    to `checkpoint_folder(folder, s)`, loadable with `from_pretrained`. Returns the log: `step`, `loss` (mean since the
    last row, nats per token), `learning_rate`, `gradient_norm`.

    The seed decides data order and dropout; the model's initial weights are the caller's. The state is saved every
    `save_steps` steps, at SIGTERM and SIGINT, and after `seconds`; `resume` goes on there, as in `train_in_stages`.
    """
    optimizer = {"learning_rate": learning_rate, "weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 1.0}
    schedule = {"max_steps": steps, "lr_scheduler_type": "cosine", "warmup_steps": round(warmup_share * steps)}
    saving = {"save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 1}
    shown = {"logging_steps": max(1, steps // 40), "report_to": "none", "disable_tqdm": hide_progress()}
    given = optimizer | schedule | saving | shown
    bf16, on_gpu = resolve_precision(precision) == "bf16", torch.cuda.is_available()
    given |= {"bf16": bf16, "use_cpu": bf16 and not on_gpu, "dataloader_pin_memory": on_gpu}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=batch_size, seed=seed, **given)
    along = {"checkpoints": set(checkpoints), "processing_class": tokenizer, "resume": resume, "seconds": seconds}
    record = train_in_stages(model, dataset, arguments, method="full", **along)
    return record.log[["step", "loss", "learning_rate", "gradient_norm"]]
