"""Staged training around a stock `transformers.Trainer` (APEX, arXiv:2505.24241, section 3)."""

import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Subset, default_collate
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, get_scheduler, set_seed

from apexlib.activations import ActivationRecorder, NotFiniteError, activation_statistics, weight_norms
from apexlib.files import content_hash, exclusive
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.training.checkpoints import (
    RunFolder,
    complete_folder,
    copy_parameters,
    load_plain,
    place,
    read_state,
    read_tables,
    write_state,
    write_tables,
)
from apexlib.training.interruption import Interrupted, Stop
from apexlib.training.methods import Method, Name, method_of

_BY_STEP = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)


_DECISIVE = (  # arguments that the bits of a run depend on
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "gradient_checkpointing", "label_smoothing_factor", "neftune_noise_alpha"),
    *("average_tokens_across_devices", "dataloader_drop_last"),
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
    resume: bool = False,
    overwrite: bool = False,
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

    Stage s ends as a plain checkpoint `args.output_dir/stage-s` with `plan.json` and `statistics.parquet`. Inside a
    stage, `args.save_strategy`, `save_steps` and `save_total_limit` say when its state is saved and how many are kept,
    until the stage ends. `resume` goes on from the newest complete state, to the same bits as without a break, given
    the same base model, data and settings; it starts where there is none. Without it a folder that holds a run is
    refused, unless `overwrite`. SIGTERM and SIGINT save and raise `Interrupted`; a second one does not wait.

    `options` go to `method_of` (`lora_rank`, `mask_share`). Raises ValueError before anything is trained where the run
    cannot be done, RuntimeError if a parameter that should train did not move or a frozen one did, FloatingPointError
    at the first loss, gradient or weight that is not finite.
    """
    if trainer_class is None:
        from transformers import Trainer

        trainer_class = Trainer
    config = config or ApexConfig()
    how = method_of(method, config, **options)
    with Stop(args) as stop:
        run = _Run(model, how, args, config, train_dataset, eval_dataset, stop)
        run.trainer = partial(
            _stage_trainer(trainer_class),
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
        )
        identity = {"method": method, "options": options, "trainer": trainer_class.__name__, **run.identity()}
        stop.check("before the run")
        with run.alone():
            start = _first_decides(args, partial(run.folder.begin, identity, resume=resume, overwrite=overwrite))
            set_seed(args.seed)
            for stage in range(run.restore(start) if start else 0, run.stages):
                run.train(stage, start if start and place(start)[:2] == (stage, 1) else None)
                stop.check(f"after stage {stage}")
    return run.record()


class _Run:
    """A run under way: what it is made of, and what it has behind it."""

    def __init__(
        self,
        model: PreTrainedModel,
        how: Method,
        args: TrainingArguments,
        config: ApexConfig,
        train: Dataset,
        evaluation: Dataset | None,
        stop: Stop,
    ) -> None:
        self.model, self.how, self.args, self.config, self.data = model, how, args, config, train
        self.trainer: Callable = _stage_trainer
        self.stages = config.stages if how.staged else 1
        self.per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.total = _total_steps(args, len(train), self.per_step)
        _check_run(args, config, self.stages, self.total, self.per_step, train)
        self.borders = [round(self.total * stage / self.stages) for stage in range(self.stages + 1)]
        seed = args.seed if args.data_seed is None else args.data_seed
        self.order = data_order(len(train), self.total * self.per_step, seed)
        self.hashes = _check_data(train, evaluation, self.order, self.per_step)
        self.folder, self.stop = RunFolder(Path(args.output_dir)), stop
        self.statistics: pd.DataFrame | None = None  # behind the next plan
        self.seen: list[pd.DataFrame] = []
        self.histories: list[list[dict[str, float]]] = []  # of the Trainer, one a stage
        self.trainable: list[dict[str, float]] = []
        self.seconds: list[float] = []

    def identity(self) -> dict[str, Any]:
        """Name all that a run's bits depend on; another identity is another run."""
        bits = {name: bits for name, (_, bits) in _fingerprints(self.model).items()}
        arguments = {name: getattr(self.args, name, None) for name in _DECISIVE}
        return {
            "model": {"class": type(self.model).__name__, "weights": content_hash(bits)},
            "data": self.hashes,
            "config": asdict(self.config),
            "steps": self.total,
            "arguments": {name: getattr(value, "value", value) for name, value in arguments.items()},
        }

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one run at a time work in the folder."""
        with ExitStack() as held:
            if self.args.process_index == 0:
                try:
                    held.enter_context(exclusive(self.folder.path / ".lock"))
                except BlockingIOError:
                    raise FileExistsError(f"{self.folder.path}: another run is at work there") from None
            yield

    def restore(self, start: Path) -> int:
        """Go back to a saved state, or to the border before it; return the stage to go on in."""
        stage, begun, _ = place(start)
        progress = json.loads((start / "progress.json").read_text(encoding="utf-8"))
        self.histories, self.trainable = progress["histories"], progress["trainable"]
        self.seconds = progress["seconds"]
        if self.how.assesses:
            self.seen = read_tables(start / "assessed.parquet")
            self.statistics = self.seen.pop() if begun else pd.read_parquet(start / "statistics.parquet")
            for number, table in enumerate(self.seen):
                self.how.plans.append(self.how.plan(table, number))
        if stage:
            load_plain(self.model, self.folder.stage(stage - 1))
        return stage

    def train(self, stage: int, saved: Path | None) -> None:
        """Train one stage, from a state inside it or from its beginning, and save what it leaves."""
        how, config, args, model = self.how, self.config, self.args, self.model
        start, end = self.borders[stage], self.borders[stage + 1]
        if how.assesses:
            if self.statistics is None:
                self.statistics = self.assess()
            if config.strategy == "magnitude" and "weight_norm" not in self.statistics:
                self.statistics = self.statistics.merge(weight_norms(model), on=["layer", "component", "unit"])
            self.seen.append(self.statistics)
        weights = sum(parameter.numel() for parameter in model.parameters())
        trained = how.begin(model, stage, self.statistics)
        trains = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        self.trainable.append({"stage": stage, "trainable": trains, "total": weights, "share": trains / weights})
        recorder = None
        if how.assesses:
            differentiable = config.balance_weight > 0
            recorder = ActivationRecorder(model, top=config.fraction, training_only=True, differentiable=differentiable)
        watch = _Watch(self, stage)
        watch.trainer = trainer = self.trainer(
            how=how,
            offset=start,
            total=self.total,
            recorder=recorder,
            balance=config.balance_weight,
            keep=watch.keep,
            model=trained,
            args=_stage_arguments(args, end - start, resumed=saved is not None),
            train_dataset=_take(self.data, self.order[start * self.per_step : end * self.per_step]),
            callbacks=[*how.callbacks(), watch],
        )
        trainer.remove_callback(PrinterCallback)
        before = _fingerprints(trained)
        with recorder or nullcontext():
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
        if name := first_not_finite(trained.named_parameters()):  # of a token no batch held, say: no loss shows it
            trainer.halt(f"{name} is not finite")
        _check_movement(trained, before, trainer, stage)
        self.histories.append(trainer.state.log_history)
        self.model = how.end(trained)
        if recorder is not None:
            recorder.gather()
            self.statistics = recorder.table()
        if args.should_save:
            self.save_stage(stage, trainer.processing_class)

    def assess(self) -> pd.DataFrame:
        """Assess the first examples of the run's order, as many as `config.assessment_samples`."""
        size, rows = self.args.per_device_train_batch_size, self.order[: self.config.assessment_samples]
        join = self.trainer.keywords["data_collator"] or default_collate
        starts = range(0, len(rows), size)
        batches = (join([self.data[row] for row in rows[start : start + size]]) for start in starts)
        patient = (batch for batch in batches if not self.stop.check("in the assessment"))
        return activation_statistics(self.model.to(self.args.device), patient, top=self.config.fraction)

    def save_stage(self, stage: int, processing_class: Any) -> None:
        """Save what a stage leaves as a plain checkpoint, with all that the next one needs."""
        with complete_folder(self.folder.stage(stage)) as folder:
            self.model.save_pretrained(folder)
            if hasattr(processing_class, "save_pretrained"):
                processing_class.save_pretrained(folder)
            if self.how.plans:
                self.how.plans[-1].to_json(folder / "plan.json")
            if self.statistics is not None:
                self.statistics.to_parquet(folder / "statistics.parquet", index=False)
            self.save_progress(folder, stage + 1)
        self.folder.forget_steps()

    def save_progress(self, folder: Path, stages: int) -> None:
        """Save what the first `stages` stages have left, weights aside, and the statistics behind each plan so far."""
        progress = {"histories": self.histories, "trainable": self.trainable[:stages], "seconds": self.seconds}
        (folder / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        if self.seen:
            write_tables(self.seen, folder / "assessed.parquet")

    def record(self) -> TrainingRecord:
        """Sum up the finished run."""
        tables = [_stage_log(rows, stage, self.borders[stage]) for stage, rows in enumerate(self.histories)]
        log, trainable = pd.concat(tables, ignore_index=True), pd.DataFrame(self.trainable)
        return TrainingRecord(self.model, log, tuple(self.how.plans), tuple(self.seen), trainable, median(self.seconds))


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


def _check_data(
    train: Dataset, evaluation: Dataset | None, order: Sequence[int], per_step: int
) -> dict[str, str | int]:
    """Read every example of both sets once and hash them; examples in both, and steps without a label, are refused."""
    seen, silent, whole, held = set(), set(), blake2b(digest_size=16), blake2b(digest_size=16)
    for row in range(len(train)):
        tokens, trains = _tokens(train[row], f"train_dataset: example {row}", whole)
        seen.add(tokens)
        if not trains:
            silent.add(row)
    for step, start in enumerate(range(0, len(order), per_step), 1):
        if silent.issuperset(order[start : start + per_step]):
            none = f"{len(silent)} of {len(train)} examples have none"
            raise ValueError(f"train_dataset: no label of step {step} is anything but −100; {none}")
    hashes = {"examples": len(train), "train": whole.hexdigest()}
    if evaluation is None or not len(evaluation):
        return hashes
    held_out = [_tokens(evaluation[row], f"eval_dataset: example {row}", held) for row in range(len(evaluation))]
    if shared := sum(tokens in seen for tokens, _ in held_out):
        raise ValueError(f"eval_dataset: {shared} of its {len(held_out)} examples are in the training data too")
    if not any(trains for _, trains in held_out):
        raise ValueError(f"eval_dataset: no label of its {len(held_out)} examples is anything but −100")
    return hashes | {"evaluation": held.hexdigest()}


def _tokens(item: Mapping[str, Any], where: str, whole: Any) -> tuple[bytes, bool]:
    """A digest of an example's tokens, and whether any label trains (the first predicts nothing); add it to `whole`."""
    if "input_ids" not in item:
        raise ValueError(f"{where} has no input_ids but {', '.join(map(str, item))}: need it tokenised")
    tokens = np.asarray(item["input_ids"], dtype=np.int64)
    whole.update(repr(sorted(item)).encode())
    for name in sorted(item):
        value = np.asarray(item[name])
        whole.update(repr(item[name]).encode() if value.dtype == object else f"{value.dtype}{value.shape}".encode())
        whole.update(b"" if value.dtype == object else value.tobytes())
    labels = item.get("labels")
    trains = labels is None or bool((np.asarray(labels)[1:] != -100).any())
    return blake2b(tokens.tobytes(), digest_size=16).digest(), trains


def _take(dataset: Dataset, rows: list[int]) -> Dataset:
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows)


def _stage_arguments(args: TrainingArguments, steps: int, *, resumed: bool) -> TrainingArguments:
    """The arguments of one stage: its steps, and its data in the order given."""
    own = copy.copy(args)
    own.max_steps = steps
    own.train_sampling_strategy = "sequential"
    own.load_best_model_at_end = False
    own.eval_on_start = args.eval_on_start and not resumed
    return own


def _stage_trainer(base: type) -> type:
    """A Trainer of the given class whose optimizer, schedule and loss are those of one stage of a run."""

    class StageTrainer(base):
        def __init__(
            self, *, how: Method, offset: int, total: int, recorder: Any, balance: float, keep: Callable, **rest: Any
        ) -> None:
            self.how, self.offset, self.total, self.recorder, self.balance = how, offset, total, recorder, balance
            self.keep, self.saved = keep, None
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
                self.halt(f"{name} is not finite" if name else str(error))
            if not model.training:
                return result
            loss, *rest = result if isinstance(result, tuple) else (result,)
            if not loss.isfinite():
                self.halt(_reason(model, inputs, loss))
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
                    self.halt(f"the gradient of {name} is not finite")
            return loss

        def evaluate(self, *given: Any, **named: Any) -> dict[str, float]:
            before = _random_state()
            try:
                return super().evaluate(*given, **named)
            except Interrupted:
                _set_random_state(before)
                self.keep(evaluated=False)
                raise

        def state_to_save(self, *, evaluated: bool) -> dict[str, Any]:
            """All that continuing takes; what differs between the processes of a run comes from each of them."""
            scaler = self.accelerator.scaler
            own = {"random": _random_state(), "loss": self._tr_loss.item(), "total_loss": self._total_loss_scalar}
            own |= {"recorder": None if self.recorder is None else self.recorder.state()}
            processes = [own]
            if self.args.world_size > 1:
                processes = [None] * self.args.world_size
                torch.distributed.all_gather_object(processes, own)
            return {
                "parameters": {name: p for name, p in self.model.named_parameters() if p.requires_grad},
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "last_logged": self._globalstep_last_logged,
                "evaluated": evaluated,
                "processes": processes,
            }

        def own_saved(self) -> dict[str, Any]:
            return self.saved["processes"][self.args.process_index]

        def restore_loop(self) -> None:
            """Once training has begun again: the running mean of the loss, and an evaluation that was cut short."""
            own = self.own_saved()
            self._tr_loss = torch.tensor(own["loss"], device=self.args.device)
            self._total_loss_scalar = own["total_loss"]
            self._globalstep_last_logged = self.saved["last_logged"]
            if not self.saved["evaluated"]:
                _set_random_state(own["random"])
                self._evaluate(None, None, skip_scheduler=True)
                own["random"] = _random_state()

        # where the Trainer would write and read its own checkpoints

        def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
            if self.state.global_step < self.state.max_steps:  # then the stage is saved
                self.keep(evaluated=True)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            folder = Path(resume_from_checkpoint)
            self.saved = read_state(folder)
            copy_parameters(self.model, self.saved["parameters"], folder)
            if self.recorder is not None:
                self.recorder.load_state(self.own_saved()["recorder"])

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                self.optimizer.load_state_dict(self.saved["optimizer"])
                self.lr_scheduler.load_state_dict(self.saved["scheduler"])

        def _load_scaler(self, checkpoint: str | None) -> None:
            if checkpoint is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(self.saved["scaler"])

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                _set_random_state(self.own_saved()["random"])

        def halt(self, reason: str) -> None:
            step = self.offset + self.state.global_step
            raise FloatingPointError(f"step {step}: {reason}; what was saved before is kept")

    return StageTrainer


class _Watch(TrainerCallback):
    """Follows one stage: times its steps, saves its state, ends it when a signal has come."""

    trainer: Any

    def __init__(self, run: _Run, stage: int) -> None:
        self.run, self.stage = run, stage

    def on_train_begin(self, args, state, control, **_) -> None:
        if self.trainer.saved is not None:
            self.trainer.restore_loop()

    def on_step_begin(self, args, state, control, **_) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        self.run.seconds.append(time.perf_counter() - self.began)
        if self.run.stop.asked():
            control.should_save = True

    def on_save(self, args, state, control, **_) -> None:
        if state.global_step < state.max_steps:
            self.run.stop.check(f"after step {self.trainer.offset + state.global_step}")

    def on_prediction_step(self, args, state, control, **_) -> None:
        self.run.stop.check(f"in the evaluation after step {self.trainer.offset + state.global_step}")

    def keep(self, *, evaluated: bool) -> None:
        """Save the state of the stage under way."""
        trainer, run = self.trainer, self.run
        if name := first_not_finite(trainer.model.named_parameters()):
            trainer.halt(f"{name} is not finite")
        state = trainer.state_to_save(evaluated=evaluated)
        if not trainer.args.should_save:
            return
        with complete_folder(run.folder.step(self.stage, trainer.state.global_step)) as folder:
            write_state(state, folder)
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            run.save_progress(folder, self.stage)
        if limit := trainer.args.save_total_limit:
            run.folder.forget_steps(keep=limit)


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
    named = [name for name in ("stage", "step", "loss", "eval_loss") if name in table]
    others = sorted(name for name in table if name not in named and not name.startswith("eval_"))
    return table[[*named, *others]]


def _first_decides(args: TrainingArguments, decide: Callable[[], Any]) -> Any:
    """Let the first process decide for all, or fail for all."""
    answer: list[Any] = [None]
    if args.process_index == 0:
        try:
            answer = [decide()]
        except (OSError, ValueError) as error:
            answer = [error]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
