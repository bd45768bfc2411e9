"""Staged training around a stock `transformers.Trainer` (APEX, arXiv:2505.24241, section 3)."""

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments, set_seed

from apexlib.activations import ActivationRecorder, activation_statistics, gradient_norms, weight_norms
from apexlib.files import content_hash, exclusive, pretrained
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.selection import UNIT_NORMS
from apexlib.training import sharding
from apexlib.training.bar import show_stages
from apexlib.training.checkpoints import BEST, Progress, RunFolder, fault, position, save_plain, stage_borders
from apexlib.training.checks import check_run, decisive_arguments, fingerprints, unexpected_movement
from apexlib.training.data import Streamed, check_data, prepare
from apexlib.training.interruption import Stop
from apexlib.training.loggers import Loggers
from apexlib.training.methods import METHODS, Method, Name, method_of
from apexlib.training.trainer import Stage, StageTraining

_REMEMBERED = 8  # assessments; that of a model of 7 B parameters takes 30 MB
_assessed: dict[str, pd.DataFrame] = {}  # by `_Run.assessed_by`, the oldest first


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
    eval_dataset: Dataset | dict[str, Dataset] | None = None,
    data_collator: Callable | None = None,
    processing_class: Any = None,
    trainer_class: type | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoints: Collection[int] = (),
    seconds: float | None = None,
    **options: Any,
) -> TrainingRecord:
    """Train `model` in place by `method`, stage by stage: assess, select, expand, train, fuse.

    `args` speaks of the whole run: its steps (or epochs) are cut into `config.stages` equal parts, its learning-rate
    schedule runs once over all of them, and its data order, shuffled by `args.data_seed` or `args.seed` (or that of the
    data, if `train_sampling_strategy` is "sequential"), is one order of which every stage takes the next slice. The
    first stage assesses `config.assessment_samples` examples in a pass without training; each later one uses what was
    gathered while the stage before it trained. With strategy "gradient" every stage begins with the gradients of as
    many examples, the next in order, for which `plan_budget` forecasts neither time nor memory. Every stage has a fresh
    optimizer, and warms up anew, for as many steps as the run does, below what the schedule says. Methods without
    stages ("full", "lora", "gmt") run the same steps on the same data as one.

    `trainer_class` is any subclass of `Trainer`; it prepares the data once, for assessment and all stages, so that
    TRL's take messages, text or preferences. For a stock Trainer, examples are tokenised: mappings with `input_ids`
    and, unless the collator makes them, `labels`. A data set that can only be iterated over keeps its own order.
    `options` go to `method_of` (`lora_rank`, `lora_scale`, `lora_dora`, `mask_share`, `matrices_only`) or to the
    Trainer (`compute_metrics`, `callbacks`, and what its class takes more); one that ends training early ends the run.

    Stage s ends as a plain checkpoint `args.output_dir/stage-s` with `plan.json` and `statistics.parquet`. Inside a
    stage, `args.save_strategy`, `save_steps` and `save_total_limit` say when its state is saved and how many are kept,
    until the stage ends. After the steps `checkpoints` of the whole run (0: before training), the plain model goes to
    `args.output_dir/step-00040` and the like; `stage-s` has no second copy of it. `args.load_best_model_at_end` keeps
    that of the best evaluation of all stages in `args.output_dir/best` and returns it. Neither is there for "lora".

    `resume` goes on from the newest complete state, to the same bits as without a break, given the same base model,
    data and settings; it starts where there is none. Without it a folder that holds a run is refused, unless
    `overwrite`. SIGTERM and SIGINT save and raise `Interrupted`, a second one does not wait; after `seconds`, counted
    from the call, the run leaves in the same way.

    Under FSDP2 (`args.fsdp`, or `accelerate launch --use_fsdp --fsdp_version 2`) a stage shards decoder layers. Then
    the model has values on the first process only, which are those that count, and so has the record's; elsewhere it is
    on the meta device.

    Raises ValueError before anything is trained where the run cannot be done, FloatingPointError at the first loss,
    gradient or weight that is not finite; warns, once a stage is saved, of parameters that should train and did not
    move, or are frozen and did. In the end `requires_grad` of each parameter is what it was.

    One bar shows stage, step, loss and the time left, on a terminal and in JupyterLab, unless `args.disable_tqdm`.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    base = trainer_class or transformers.Trainer  # which needs accelerate; the rest of the library does not
    kind, known = type("StageTrainer", (StageTraining, base), {}), signature(METHODS.get(method, Method)).parameters
    own = {name: options.pop(name) for name in [*options] if name in known}
    options |= {"eval_dataset": eval_dataset, "data_collator": data_collator, "processing_class": processing_class}
    with Stop(args, seconds) as stop, ExitStack() as held:
        made = method_of(method, config or ApexConfig(), **own)
        check_run(model, args, made, checkpoints)
        data, options, collate = prepare(base, model, args, train_dataset, options)
        run = _Run(model, made, args, data, frozenset(checkpoints))
        named = {"method": method, "options": own, "trainer": base.__name__}
        named["data"] = check_data(run.data, options["eval_dataset"], run.order, run.per_step)
        stop.check("before the run")
        start = run.begin(named, held, resume=resume, overwrite=overwrite)
        if not run.holds:
            sharding.hollow(model)
        set_seed(args.seed)
        for stage in range(run.restore(start) if start else 0, run.stages):
            if run.method.assesses and run.statistics is None:
                run.statistics = run.assess(collate, stop)
            if (column := run.ranked_by) and column not in run.statistics:
                run.statistics = run.with_norms(column, run.borders[stage], collate, stop)
            run.train(stage, partial(kind, **options), stop, start)
            stop.check(f"after stage {stage}")
            if run.folder.progress.ended:
                break
        if args.load_best_model_at_end:
            run.load_best()
        run.loggers.finish(run.model)
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_(required[name])
    return run.record()


class _Run:
    """A run under way: what it is made of, and what it has behind it."""

    def __init__(
        self, model: PreTrainedModel, method: Method, args: TrainingArguments, data: Dataset, kept: frozenset[int]
    ) -> None:
        self.model, self.method, self.args, self.config = model, method, args, method.config
        self.engine = sharding.engine_of(args)
        self.holds = self.engine != "fsdp" or args.process_index == 0  # whether this process has the model's values
        self.stages = stages = self.config.stages if method.staged else 1
        self.per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if streamed := not hasattr(data, "__len__"):
            data = Streamed(data, args.max_steps * self.per_step)
        by_epochs = max(1, int(args.num_train_epochs * len(data) / self.per_step))
        steps = args.max_steps if args.max_steps > 0 else by_epochs
        if (size := len(data)) < self.per_step:
            raise ValueError(f"train_dataset: {size} examples, fewer than the {self.per_step} of one step")
        if steps < stages:
            raise ValueError(f"{steps} steps for {stages} stages: need at least one step a stage (data set of {size})")
        if outside := sorted(step for step in kept if not 0 <= step <= steps):
            raise ValueError(f"checkpoints {outside}: need steps from 0 to {steps}")
        seed, count = args.seed if args.data_seed is None else args.data_seed, steps * self.per_step
        in_order = streamed or args.train_sampling_strategy == "sequential"
        self.data, self.order = data, data_order(size, count, None if in_order else seed)
        self.borders = stage_borders(steps, stages)
        self.folder, self.loggers = RunFolder(Path(args.output_dir), self.borders, kept), Loggers(args)
        self.statistics: pd.DataFrame | None = None  # behind the next plan
        self.weights = ""  # a hash of those that the run starts from, on the first process

    def begin(self, named: Mapping[str, Any], held: ExitStack, **choice: bool) -> Path | None:
        """Lock the folder while it is `held` and find the state to go on from; the first process decides for all."""
        from accelerate.utils import broadcast_object_list

        answer: list[Any] = [None]
        if self.args.process_index == 0:
            self.weights = content_hash(fingerprints(self.model))
            identity = named | {  # all that the run's bits depend on: another identity is another run
                "model": {"class": type(self.model).__name__, "weights": self.weights},
                "config": asdict(self.config),
                "steps": self.borders[-1],
                "arguments": decisive_arguments(self.args),
            }
            identity |= {"engine": self.engine} if self.engine else {}
            try:
                held.enter_context(exclusive(self.folder.path / ".lock"))
                answer = [self.folder.begin(identity, **choice)]
            except BlockingIOError:
                answer = [FileExistsError(f"{self.folder.path}: another run is at work there")]
            except (OSError, ValueError) as error:
                answer = [error]
        if isinstance(found := broadcast_object_list(answer)[0], Exception):
            raise found
        return found

    def restore(self, start: Path) -> int:
        """Go back to a saved state, or to the border before it; return the stage to go on in."""
        stage, begun, _ = position(start)
        self.folder.progress = Progress.read(start)
        if self.method.assesses:
            assessed = self.folder.progress.assessed
            self.statistics = assessed.pop() if begun else pd.read_parquet(start / "statistics.parquet")
            for number, table in enumerate(assessed):
                self.method.plan(table, number)
        if stage and self.holds:
            _load_plain(self.model, self.folder.model(stage - 1))
        return self.stages if self.folder.progress.ended else stage

    def train(self, number: int, make_trainer: Callable, stop: Stop, found: Path | None) -> None:
        """Train one stage, from its beginning or from the state `found` if that is inside it; save what it leaves."""
        saved = found if found and position(found)[:2] == (number, 1) else None
        method, config, args, model, progress = self.method, self.config, self.args, self.model, self.folder.progress
        start, end = self.borders[number], self.borders[number + 1]
        if method.assesses:
            progress.assessed.append(self.statistics)
        weights = sum(parameter.numel() for parameter in model.parameters())
        unit = sharding.layer_class(model) if self.engine == "fsdp" else ""
        whole = method.begin(model, number, self.statistics)
        trained = sharding.copy_to_shard(whole) if self.engine else whole
        trains = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        options = {"top": config.fraction, "training_only": True, "differentiable": config.balance_weight > 0}
        recorder = ActivationRecorder(trained, **options) if method.assesses else None
        rows = self.order[start * self.per_step : end * self.per_step]
        data = self.data.select(rows) if hasattr(self.data, "select") else Subset(self.data, rows)
        own, epoch = copy.copy(args), len(self.data) / self.per_step
        around = (method, recorder, self.folder, stop, self.loggers)
        stage = Stage(number, start, epoch, *around, whole if self.engine else None, unit)
        vars(own).update(max_steps=end - start, train_sampling_strategy="sequential")
        own.eval_on_start = args.eval_on_start and saved is None and not start
        trainer = make_trainer(stage=stage, model=trained, args=own, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        show_stages(trainer, self.stages)
        before = fingerprints(whole) if self.holds else {}
        with recorder or nullcontext():
            trainer.train(resume_from_checkpoint=saved and str(saved))
        trainer.check_weights()
        if self.engine:
            sharding.bring_back(trained, whole)
        unexpected = unexpected_movement(whole, before, number) if self.holds else []
        state = trainer.state
        progress.ended, progress.best = state.global_step < end - start, state.best_metric
        progress.tokens = state.num_input_tokens_seen
        progress.histories.append(state.log_history)
        progress.trainable.append({"stage": number, "trainable": trains, "total": weights, "share": trains / weights})
        self.model = method.end(whole)
        if recorder is not None:
            recorder.gather()
            self.statistics = recorder.table()
        if args.should_save:
            self.save_stage(number, trainer.processing_class)
        for said in unexpected:  # whatever it is, what was trained is kept
            warnings.warn(said, RuntimeWarning, stacklevel=3)

    def assess(self, collate: Callable, stop: Stop) -> pd.DataFrame:
        """Assess the first examples of the run's order, as many as `config.assessment_samples`.

        Runs of one process that start alike, such as those of a grid, assess once.
        """
        taken = {*signature(self.model.base_model.forward).parameters}  # not what is of a loss
        batches = [{name: each[name] for name in each if name in taken} for each in self.batches(0, collate)]
        key = "" if self.args.world_size > 1 else self.assessed_by(batches)  # processes ask together
        if key in _assessed:
            return _assessed[key].copy()
        shards = self.engine == "fsdp"
        model = sharding.sharded_for_reading(self.model) if shards else self.model.to(self.args.device)
        statistics = activation_statistics(model, _stoppable(batches, stop), top=self.config.fraction)
        if key:
            _assessed[key] = statistics.copy()
            for oldest in [*_assessed][:-_REMEMBERED]:
                del _assessed[oldest]
        return statistics

    def assessed_by(self, batches: Sequence[Mapping[str, Tensor]]) -> str:
        """A hash of all that decides what an assessment finds."""
        kind = [type(self.model).__qualname__, self.model.config.to_json_string(), self.weights, str(self.args.device)]
        tokens = [{name: each.tolist() for name, each in batch.items()} for batch in batches]
        return content_hash(kind, tokens, self.config.fraction)

    def batches(self, step: int, collate: Callable) -> list[dict[str, Any]]:
        """Collate the examples from a step of the run on, as many as are assessed."""
        rows = self.order[step * self.per_step :][: self.config.assessment_samples]
        size = self.args.per_device_train_batch_size
        cut = (rows[start : start + size] for start in range(0, len(rows), size))
        return [collate([self.data[row] for row in batch]) for batch in cut]

    @property
    def ranked_by(self) -> str | None:
        """The column that selection needs beside what passes record."""
        return UNIT_NORMS.get(self.config.strategy) if self.method.assesses else None

    def with_norms(self, column: str, step: int, collate: Callable, stop: Stop) -> pd.DataFrame:
        """Add that column to the statistics, the same on all processes."""
        from accelerate.utils import broadcast_object_list

        if column == "gradient_norm":
            model = self.model.to(self.args.device)
            norms = [gradient_norms(model, _stoppable(self.batches(step, collate), stop))]
        else:
            norms = [weight_norms(self.model) if self.holds else None]
        return self.statistics.merge(broadcast_object_list(norms)[0], on=["layer", "component", "unit"])

    def save_stage(self, stage: int, processing_class: Any) -> None:
        """Save what a stage leaves: the plain model, unless it is kept already, with all that the next one needs."""
        with self.folder.complete(self.folder.stage(stage)) as folder:
            if self.borders[stage + 1] not in self.folder.kept or self.folder.progress.ended:
                save_plain(self.model, processing_class, folder)
            if self.method.plans:
                self.method.plans[-1].to_json(folder / "plan.json")
            if self.statistics is not None:
                self.statistics.to_parquet(folder / "statistics.parquet", index=False)
            self.folder.progress.save(folder)
        self.folder.forget_steps()

    def load_best(self) -> None:
        """Go back to the model of the best evaluation."""
        if why := fault(best := self.folder.path / BEST):
            said = f"load_best_model_at_end: {best} {why}; the last model is returned"
            warnings.warn(said, RuntimeWarning, stacklevel=3)
        elif self.holds:
            _load_plain(self.model, best)

    def record(self) -> TrainingRecord:
        """Sum up the finished run."""
        done = self.folder.progress
        rows = [{"stage": stage} | row for stage, history in enumerate(done.histories) for row in history]
        rows = [row for row in rows if "loss" in row or "eval_loss" in row]
        log = pd.DataFrame(rows, columns=None if rows else ["stage", "step"])
        log = log.rename(columns={"grad_norm": "gradient_norm"})
        named = [name for name in ("stage", "step", "loss", "eval_loss") if name in log]
        others = sorted(name for name in log if name not in named and not name.startswith("eval_"))
        plans, statistics, trainable = tuple(self.method.plans), tuple(done.assessed), pd.DataFrame(done.trainable)
        return TrainingRecord(self.model, log[[*named, *others]], plans, statistics, trainable, median(done.seconds))


def data_order(size: int, count: int, seed: int | None) -> list[int]:
    """List the rows of a whole run, `count` of them: each epoch, with a seed, is a permutation of `size` examples."""
    if seed is None:
        return [row % size for row in range(count)]
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(size, generator=generator) for _ in range(math.ceil(count / size))]
    return torch.cat(epochs)[:count].tolist()


def _stoppable(batches: Sequence[dict[str, Any]], stop: Stop) -> Iterator[dict[str, Any]]:
    for batch in batches:
        stop.check("in the assessment")
        yield batch


def _load_plain(model: PreTrainedModel, folder: Path) -> None:
    """Load a plain checkpoint into a model in place, bit by bit."""
    widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)  # widening loses nothing
    loaded, info = pretrained(type(model), folder, dtype=widest, output_loading_info=True)
    if faults := {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}:
        raise ValueError(f"{folder}: does not fit {type(model).__name__}: {faults}")
    model.load_state_dict(loaded.state_dict())
