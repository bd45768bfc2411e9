"""Staged training around a stock `transformers.Trainer` (APEX, arXiv:2505.24241, section 3)."""

import copy
import math
import statistics as stats
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Subset, default_collate
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, get_scheduler, set_seed

from apexlib.activations import ActivationRecorder, NotFiniteError, activation_statistics, weight_norms
from apexlib.baselines import Method, Name, method_of
from apexlib.records import atomic_write
from apexlib.selection import ApexConfig, ExpansionPlan

_BY_STEP = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)


@dataclass(frozen=True)
class TrainingRecord:
    """What a run leaves: the plain model, one log over all stages, the plans and the statistics behind each."""

    model: PreTrainedModel
    log: pd.DataFrame
    plans: tuple[ExpansionPlan, ...]
    statistics: tuple[pd.DataFrame, ...]
    trainable: pd.DataFrame  # per stage: parameters that train, of all, share
    seconds_per_step: float  # median time of an optimizer step: no assessment, evaluation, saving or data loading


def train_in_stages(
    model: PreTrainedModel,
    train_dataset: Dataset,
    args: TrainingArguments,
    config: ApexConfig | None = None,
    *,
    method: Name = "apex",
    eval_dataset: Dataset | None = None,
    data_collator: Callable | None = None,
    trainer_class: type | None = None,
    processing_class: Any = None,
    **options: Any,
) -> TrainingRecord:
    """Train `model` in place by `method`, stage by stage: assess, select, expand, train, fuse.

    `args` speaks of the whole run: its steps (or epochs) are cut into `config.stages` equal parts, its learning-rate
    schedule runs once over all of them, and its data order, drawn from `args.data_seed` or `args.seed`, is one shuffled
    order of which every stage takes the next slice. The first stage assesses `config.assessment_samples` examples in a
    pass without training; each later one uses what was gathered while the stage before it trained. Every stage has a
    fresh optimizer. Methods without stages ("full", "lora", "gmt") run the same steps on the same data as one.

    Examples are tokenised: mappings with `input_ids` and, unless the collator makes them, `labels`. `trainer_class` is
    any subclass of `Trainer`, with the tokenizer as `processing_class` where it wants one (TRL's `SFTTrainer`).

    Stage s ends as a plain checkpoint `args.output_dir/stage-s` with `plan.json` and `statistics.parquet`.
    `options` go to `method_of` (`lora_rank`, `mask_share`). Raises ValueError before anything is trained where the run
    cannot be done, RuntimeError if a parameter that should train did not move or a frozen one did.
    """
    if trainer_class is None:
        from transformers import Trainer

        trainer_class = Trainer
    config = config or ApexConfig()
    how = method_of(method, config, **options)
    stages = config.stages if how.staged else 1
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    total = _total_steps(args, len(train_dataset), per_step)
    _check_run(args, config, stages, total, per_step, train_dataset)
    borders = [round(total * stage / stages) for stage in range(stages + 1)]
    seed = args.seed if args.data_seed is None else args.data_seed
    order = data_order(len(train_dataset), total * per_step, seed)
    _check_data(train_dataset, eval_dataset, order, per_step)
    set_seed(args.seed)

    statistics = _assess(model, train_dataset, order, data_collator, args, config) if how.assesses else None
    logs, seen, trainable, clock = [], [], [], _Clock()
    for stage in range(stages):
        if statistics is not None:
            if config.strategy == "magnitude":
                statistics = statistics.merge(weight_norms(model), on=["layer", "component", "unit"])
            seen.append(statistics)
        start, end = borders[stage], borders[stage + 1]
        weights = sum(parameter.numel() for parameter in model.parameters())
        trained = how.begin(model, stage, statistics)
        trains = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        trainable.append({"stage": stage, "trainable": trains, "total": weights, "share": trains / weights})
        recorder = None
        if how.assesses:
            differentiable = config.balance_weight > 0
            recorder = ActivationRecorder(model, top=config.fraction, training_only=True, differentiable=differentiable)
        trainer = _stage_trainer(trainer_class)(
            how=how,
            offset=start,
            total=total,
            recorder=recorder,
            balance=config.balance_weight,
            model=trained,
            args=_stage_arguments(args, end - start),
            train_dataset=_take(train_dataset, order[start * per_step : end * per_step]),
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            callbacks=[*how.callbacks(), clock],
        )
        trainer.remove_callback(PrinterCallback)
        before = _fingerprints(trained)
        with recorder or nullcontext():
            trainer.train()
        if name := first_not_finite(trained.named_parameters()):  # of a token no batch held, say: no loss shows it
            trainer.stop(f"{name} is not finite")
        _check_movement(trained, before, trainer, stage)
        logs.append(_stage_log(trainer.state.log_history, stage, start))
        model = how.end(trained)
        if recorder is not None:
            recorder.gather()
            statistics = recorder.table()
        if args.should_save:
            _save_stage(model, Path(args.output_dir) / f"stage-{stage}", how.plans, statistics)
    log = pd.concat(logs, ignore_index=True)
    seconds = stats.median(clock.seconds)
    return TrainingRecord(model, log, tuple(how.plans), tuple(seen), pd.DataFrame(trainable), seconds)


def data_order(size: int, count: int, seed: int) -> list[int]:
    """Draw the order of a whole run: `count` indices, epoch after epoch, each a permutation of `size` examples.

    >>> data_order(3, 7, seed=0)
    [2, 0, 1, 2, 1, 0, 1]
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(size, generator=generator) for _ in range(math.ceil(count / size))]
    return torch.cat(epochs)[:count].tolist()


def _total_steps(args: TrainingArguments, size: int, per_step: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    return max(1, math.floor(args.num_train_epochs * size / per_step))


def _check_run(
    args: TrainingArguments, config: ApexConfig, stages: int, total: int, per_step: int, train: Dataset
) -> None:
    if len(train) < per_step:
        raise ValueError(f"train_dataset: {len(train)} examples, fewer than the {per_step} of one step")
    if total < stages:
        raise ValueError(
            f"{total} steps for {stages} stages: need at least one step a stage (data set of {len(train)})"
        )
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule not in _BY_STEP:
        raise ValueError(
            f"lr_scheduler_type {schedule!r}: need one that depends on the step alone: {', '.join(_BY_STEP)}"
        )
    if args.deepspeed or args.fsdp:
        raise ValueError("DeepSpeed and FSDP shard weights, which expansion needs whole; use DDP or one process")
    kind = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if config.balance_weight and args.gradient_checkpointing and kind:
        raise ValueError("balance_weight > 0: need gradient checkpointing without reentry, use_reentrant=False")


def _check_data(train: Dataset, evaluation: Dataset | None, order: Sequence[int], per_step: int) -> None:
    """Read every example of both sets once: those that are in both and steps without any label are refused."""
    seen, silent = set(), set()
    for row in range(len(train)):
        tokens, trains = _tokens(train[row], f"train_dataset: example {row}")
        seen.add(tokens)
        if not trains:
            silent.add(row)
    for step, start in enumerate(range(0, len(order), per_step), 1):
        if silent.issuperset(order[start : start + per_step]):
            none = f"{len(silent)} of {len(train)} examples have none"
            raise ValueError(f"train_dataset: no label of step {step} is anything but −100; {none}")
    if evaluation is None or not len(evaluation):
        return
    held_out = [_tokens(evaluation[row], f"eval_dataset: example {row}") for row in range(len(evaluation))]
    if shared := sum(tokens in seen for tokens, _ in held_out):
        raise ValueError(f"eval_dataset: {shared} of its {len(held_out)} examples are in the training data too")
    if not any(trains for _, trains in held_out):
        raise ValueError(f"eval_dataset: no label of its {len(held_out)} examples is anything but −100")


def _tokens(item: Mapping[str, Any], where: str) -> tuple[bytes, bool]:
    """A digest of an example's tokens, and whether any label trains; the first one predicts nothing."""
    if "input_ids" not in item:
        raise ValueError(f"{where} has no input_ids but {', '.join(map(str, item))}: need it tokenised")
    tokens = np.asarray(item["input_ids"], dtype=np.int64)
    labels = item.get("labels")
    trains = labels is None or bool((np.asarray(labels)[1:] != -100).any())
    return blake2b(tokens.tobytes(), digest_size=16).digest(), trains


def _take(dataset: Dataset, rows: list[int]) -> Dataset:
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows)


def _assess(
    model: PreTrainedModel,
    dataset: Dataset,
    order: list[int],
    collator: Callable | None,
    args: TrainingArguments,
    config: ApexConfig,
) -> pd.DataFrame:
    size, rows = args.per_device_train_batch_size, order[: config.assessment_samples]
    join = collator or default_collate
    batches = (join([dataset[row] for row in rows[start : start + size]]) for start in range(0, len(rows), size))
    return activation_statistics(model.to(args.device), batches, top=config.fraction)


def _stage_arguments(args: TrainingArguments, steps: int) -> TrainingArguments:
    """The arguments of one stage: its steps, its data in the order given, no checkpoints of an expanded model."""
    own = copy.copy(args)
    own.max_steps = steps
    own.train_sampling_strategy = "sequential"
    own.save_strategy = type(args.save_strategy)("no")
    own.load_best_model_at_end = False
    return own


def _stage_trainer(base: type) -> type:
    """A Trainer of the given class whose optimizer, schedule and loss are those of one stage of a run."""

    class StageTrainer(base):
        def __init__(self, *, how: Method, offset: int, total: int, recorder: Any, balance: float, **rest: Any) -> None:
            self.how, self.offset, self.total, self.recorder, self.balance = how, offset, total, recorder, balance
            super().__init__(**rest)

        def create_optimizer(self, *given: Any, **named: Any) -> torch.optim.Optimizer:
            groups = self.how.groups(self.model, self.args.learning_rate, self.args.weight_decay)
            if groups is None:
                return super().create_optimizer(*given, **named)
            if self.optimizer is None:
                kind, options = base.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(groups, **options)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
            optimizer = optimizer or self.optimizer
            whole = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=self.args.get_warmup_steps(self.total),
                num_training_steps=self.total,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            )
            later = [lambda step, rate=rate: rate(step + self.offset) for rate in whole.lr_lambdas]
            self.lr_scheduler = LambdaLR(optimizer, later)
            return self.lr_scheduler

        def compute_loss(self, model: nn.Module, inputs: Any, *given: Any, **named: Any) -> Any:
            try:
                result = super().compute_loss(model, inputs, *given, **named)
            except NotFiniteError as error:
                name = first_not_finite(model.named_parameters())
                self.stop(f"{name} is not finite" if name else str(error))
            if not model.training:
                return result
            loss, *rest = result if isinstance(result, tuple) else (result,)
            if not loss.isfinite():
                self.stop(_reason(model, inputs, loss))
            if self.balance:
                term = self.balance * self.recorder.imbalance
                if self.model_accepts_loss_kwargs and named.get("num_items_in_batch") is not None:
                    term = term / self.current_gradient_accumulation_steps  # else the Trainer divides
                loss = loss + term
            return (loss, *rest) if rest else loss

        def training_step(self, *given: Any, **named: Any) -> Tensor:
            loss = super().training_step(*given, **named)
            if self.accelerator.sync_gradients and self.accelerator.scaler is None:  # a scaler skips such a step itself
                gradients = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
                if name := first_not_finite(gradients):
                    self.stop(f"the gradient of {name} is not finite")
            return loss

        def stop(self, reason: str) -> None:
            step = self.offset + self.state.global_step
            raise FloatingPointError(f"step {step}: {reason}; what was saved before is kept")

    return StageTrainer


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first tensor that holds NaN or an infinite value; one synchronisation with the device for all.

    >>> first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, math.nan])), ("c", torch.ones(1))])
    'b'
    """
    filled = ((name, tensor.detach()) for name, tensor in tensors if tensor.numel())
    found = [(name, torch.linalg.vector_norm(tensor, math.inf).isfinite()) for name, tensor in filled]
    if not found or torch.stack([finite.to(found[0][1].device) for _, finite in found]).all():
        return None
    return next(name for name, finite in found if not finite)


def _reason(model: nn.Module, inputs: Mapping[str, Any], loss: Tensor) -> str:
    """Say why a loss is not finite, as far as it can be seen."""
    labels = inputs.get("labels")
    if labels is not None and not (labels[:, 1:] != -100).any():
        return "no label of the batch is anything but −100"
    name = first_not_finite(model.named_parameters())
    return f"{name} is not finite" if name else f"the loss is {loss.item()}"


class _Clock(TrainerCallback):
    """Times every optimizer step, from its first forward pass to its update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def _fingerprints(model: nn.Module) -> dict[str, tuple[bool, int]]:
    """Whether each parameter trains, and a hash of its bits, taken where it lies."""
    return {name: (p.requires_grad, _bits_hash(p.detach())) for name, p in model.named_parameters()}


def _bits_hash(tensor: Tensor, chunk: int = 1 << 22) -> int:
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    bits, total = tensor.contiguous().flatten().view(integers[tensor.element_size()]), 0
    for start in range(0, len(bits), chunk):
        part = bits[start : start + chunk].long()
        place = torch.arange(start, start + len(part), device=part.device)
        total += int((part * (place * 2654435761 % 2147483647 + 1)).sum())  # a plain sum could cancel: ±lr around one
    return total


def _check_movement(model: nn.Module, before: Mapping[str, tuple[bool, int]], trainer: Any, stage: int) -> None:
    after = _fingerprints(model)
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized]
    whole = {
        name: name.partition(".operator.")[0] for name in before
    }  # a factor of M waits for the other to leave zero
    mobile = {whole[name] for name, (_, bits) in before.items() if after[name][1] != bits}
    still = [name for name, (trains, _) in before.items() if trains and whole[name] not in mobile]
    moved = [name for name, (trains, bits) in before.items() if not trains and after[name][1] != bits]
    for names, what in (
        (left_out, "should train but are not in the optimizer"),
        (moved, "are frozen but changed"),
        (still, "should train but did not move (no gradient, or a learning rate of 0 throughout)"),
    ):
        if names:
            raise RuntimeError(f"stage {stage}: {len(names)} parameters {what}: {', '.join(names[:3])} …")


def _stage_log(history: list[dict[str, float]], stage: int, offset: int) -> pd.DataFrame:
    rows = [row for row in history if "loss" in row or "eval_loss" in row]
    table = pd.DataFrame(rows, columns=None if rows else ["step"]).rename(columns={"grad_norm": "gradient_norm"})
    table["step"] += offset
    table.insert(0, "stage", stage)
    return table.drop(columns=[name for name in table if name.startswith("eval_") and name != "eval_loss"])


def _save_stage(
    model: PreTrainedModel, folder: Path, plans: Sequence[ExpansionPlan], statistics: pd.DataFrame | None
) -> None:
    model.save_pretrained(folder)
    if plans:
        plans[-1].to_json(folder / "plan.json")
    if statistics is not None:
        with atomic_write(folder / "statistics.parquet") as temporary:
            statistics.to_parquet(temporary, index=False)
