"""The Trainer of one stage: any `transformers.Trainer`, with the optimizer, schedule, loss and states of its stage."""

import copy
import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from apexlib.activations import ActivationRecorder, NotFiniteError
from apexlib.projections import composed_once
from apexlib.text.datasets import IGNORED
from apexlib.training import checkpoints, sharding
from apexlib.training.checkpoints import RunFolder, checkpoint_folder
from apexlib.training.checks import first_not_finite
from apexlib.training.interruption import Interrupted, Stop
from apexlib.training.loggers import Loggers
from apexlib.training.methods import Method


@dataclass(frozen=True)
class Stage:
    """One stage of a run, as its Trainer sees it."""

    number: int
    start: int  # steps of the run before it
    epoch: float  # steps that an epoch of the run takes
    method: Method
    recorder: ActivationRecorder | None  # gathers the statistics behind the next plan
    folder: RunFolder
    stop: Stop
    loggers: Loggers
    whole: nn.Module | None  # under an engine that shards, what takes the values back of the copy that trains
    unit: str  # class of the modules that FSDP2 shards, "" without it


class WholeRun(DefaultFlowCallback):
    """Lets a stage log, evaluate and save at the steps where the whole run is to, and count the run's epochs."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_step_end(self, args, state, control, **_) -> None:
        run, epoch = copy.copy(state), self.stage.epoch
        run.global_step, run.max_steps = self.stage.start + state.global_step, self.stage.folder.borders[-1]
        run.compute_steps(args, run.max_steps)
        run.epoch = state.epoch = run.global_step / epoch
        super().on_step_end(args, run, control)
        if run.global_step // epoch > (run.global_step - 1) // epoch or run.global_step == run.max_steps:
            super().on_epoch_end(args, run, control)
        if state.global_step == state.max_steps:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **_) -> None:
        """That of the stage's part of the data means nothing."""


class StageTraining(TrainerCallback):
    """What training one stage adds to a Trainer, which is its own callback: it times steps, saves, and can be stopped.

    Its state is saved whole after a step, or before the first: parameters that train, optimizer, schedule, random
    numbers, running loss, statistics; and is read where the Trainer would read its own checkpoint.
    """

    def __init__(self, *, stage: Stage, **rest: Any) -> None:
        self.stage = stage
        self.saved: dict[str, Any] | None = None  # the state to go on from; `own`: what is of this process in it
        super().__init__(**rest)
        given = self.callback_handler.callbacks
        given[:] = [
            WholeRun(stage) if isinstance(each, DefaultFlowCallback) else stage.loggers.in_place_of(each)
            for each in given
        ]
        self.add_callback(self)
        draws = stage.method.config.decay_to_start and self.args.weight_decay
        weights = [p for p in self.model.parameters() if p.requires_grad and p.dim() > 1] if draws else []
        self.start = {parameter: parameter.detach().clone() for parameter in weights}

    @property
    def run_step(self) -> int:
        """How many steps of the whole run are done."""
        return self.stage.start + self.state.global_step

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """What TRL's Trainers would do to data has been done."""
        return dataset

    # under FSDP2

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.stage.unit:
            sharding.set_up(self.accelerator, self.args, self.stage.unit)
            self.is_fsdp_enabled = True

    def autocast_smart_context_manager(self, *given: Any, **named: Any) -> Any:
        """Under FSDP2 accelerate casts nothing itself, and as it is set up here, FSDP does not either."""
        own = super().autocast_smart_context_manager(*given, **named)
        return self.accelerator.autocast() if self.stage.unit else own

    def fill(self) -> None:
        """Give the shards their values."""
        if self.stage.unit:
            sharding.fill(self.model, self.stage.whole)

    # optimizer, schedule and loss

    def create_optimizer(self, *given: Any, **named: Any) -> torch.optim.Optimizer:
        groups = self.stage.method.groups(self.model, self.args.learning_rate, self.args.weight_decay)
        if groups is None:
            super().create_optimizer(*given, **named)
        elif self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        if self.start:
            self.optimizer.register_step_post_hook(lambda optimizer, *_: draw_to(optimizer, self.start))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        start, end = self.stage.start, self.stage.folder.borders[-1]
        whole, warmup = super().create_scheduler(end, optimizer), self.args.get_warmup_steps(end) if start else 0

        def later(step: int, rate: Callable[[int], float]) -> float:  # a fresh optimizer warms up anew
            return rate(start + step) * min(1.0, (step + 1) / (warmup + 1))

        rates = [partial(later, rate=rate) for rate in whole.lr_lambdas]
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rates)
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: Any, *given: Any, **named: Any) -> Any:
        try:
            result = super().compute_loss(model, inputs, *given, **named)
            loss, *rest = result if isinstance(result, tuple) else (result,)
            if not model.training:
                return result
            if not loss.isfinite():
                raise NotFiniteError(f"the loss is {loss.item()}")
        except NotFiniteError as error:
            labels = inputs.get("labels")
            if labels is not None and not (labels[:, 1:] != IGNORED).any():
                self.halt("no label of the batch is anything but −100")
            self.check_weights()
            self.halt(str(error))
        if self.stage.recorder is not None and (balance := self.stage.method.config.balance_weight):
            term = balance * self.stage.recorder.imbalance
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
            with nullcontext() if self.stage.unit else composed_once(self.model):  # which would gather all of it
                return super().evaluate(*given, **named)
        except Interrupted:
            _set_random_state(before)
            self.save_state(evaluated=False)
            raise

    def _determine_best_metric(self, *given: Any, **named: Any) -> bool:
        best = super()._determine_best_metric(*given, **named)
        if best and self.args.load_best_model_at_end:
            self._keep_plain(self.stage.folder.path / checkpoints.BEST)
        return best

    def log(self, *given: Any, **named: Any) -> None:
        """Log by the steps of the whole run, to every logger."""
        self.state.global_step += self.stage.start
        try:
            super().log(*given, **named)
        finally:
            self.state.global_step -= self.stage.start

    def halt(self, reason: str) -> None:
        """End the run: a number is not finite."""
        raise FloatingPointError(f"step {self.run_step}: {reason}; what was saved before is kept")

    def check_weights(self) -> None:
        """Halt if a weight is not finite: that of a token which no batch held shows in no loss."""
        if name := first_not_finite(self.model.named_parameters()):
            self.halt(f"{name} is not finite")

    # what happens around its steps

    def on_train_begin(self, args, state, control, **_) -> None:
        done = self.stage.folder.progress
        if state.best_metric is None:
            state.best_metric = done.best
        if not state.global_step:  # of the stage; a state inside it has its own
            state.num_input_tokens_seen = self._initial_num_input_tokens_seen = done.tokens
        if self.saved is None:
            self.fill()
        else:
            self.optimizer.load_state_dict(sharding.optimizer_state(self.saved["optimizer"], self.optimizer))
            self.lr_scheduler.load_state_dict(self.saved["scheduler"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(self.saved["scaler"])
            self._tr_loss = torch.tensor(self.own["loss"], device=args.device)
            self._total_loss_scalar, self._globalstep_last_logged = self.own["total_loss"], self.saved["last_logged"]
            if not self.saved["evaluated"]:  # it was cut short
                _set_random_state(self.own["random"])
                self._determine_best_metric(self._evaluate(None, None, skip_scheduler=True), None)
                self.own["random"] = _random_state()
        if self.run_step == 0:
            self._keep_if_asked()

    def on_step_begin(self, args, state, control, **_) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        self.stage.method.change_gradients(self.model)

    def on_step_end(self, args, state, control, **_) -> None:
        self.stage.folder.progress.seconds.append(time.perf_counter() - self._began)
        self._keep_if_asked()
        if self.stage.stop.asked():
            control.should_save = True

    def on_save(self, args, state, control, **_) -> None:
        if state.global_step < state.max_steps:
            self.stage.stop.check(f"after step {self.run_step}")

    def on_prediction_step(self, args, state, control, **_) -> None:
        self.stage.stop.check(f"in the evaluation after step {self.run_step}")

    # saving and going on, where the Trainer would write and read its own checkpoints

    def save_state(self, *, evaluated: bool) -> None:
        """Save all that going on takes; `evaluated`: whether what was due after the last step is done."""
        from accelerate.utils import gather_object

        self.check_weights()
        sharding.reshard(self.model)
        scaler, recorder = self.accelerator.scaler, self.stage.recorder
        own = {"random": _random_state(), "loss": self._tr_loss.item(), "total_loss": self._total_loss_scalar}
        own["recorder"] = None if recorder is None else recorder.state()
        state = {
            "parameters": {name: p for name, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "last_logged": self._globalstep_last_logged,
            "evaluated": evaluated,
            "processes": gather_object([own]),  # what differs between the processes of a run
        }
        state = sharding.gathered(state)
        if not self.args.should_save:
            return
        with self.stage.folder.complete(self.stage.folder.step(self.stage.number, self.state.global_step)) as folder:
            checkpoints.write_state(state, folder)
            self.state.save_to_json(str(folder / "trainer_state.json"))
            self.stage.folder.progress.save(folder)
        if limit := self.args.save_total_limit:
            self.stage.folder.forget_steps(keep=limit)

    def _keep_if_asked(self) -> None:
        if self.run_step in self.stage.folder.kept:
            self._keep_plain(checkpoint_folder(self.stage.folder.path, self.run_step))

    def _keep_plain(self, kept: Path) -> None:
        self.check_weights()
        whole = self.model if self.stage.whole is None else sharding.bring_back(self.model, self.stage.whole)
        if self.args.should_save:
            with self.stage.folder.complete(kept) as folder:
                checkpoints.save_plain(whole, self.processing_class, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # then the stage is saved
            self.save_state(evaluated=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.fill()
        hollow = bool(self.stage.unit) and self.args.process_index > 0
        self.saved = checkpoints.read_state(Path(resume_from_checkpoint), hollow=hollow)
        self.own = self.saved["processes"][self.args.process_index]
        checkpoints.load_trained(self.model, self.saved["parameters"])
        if self.stage.recorder is not None:
            self.stage.recorder.load_state(self.own["recorder"])

    def _load_rng_state(self, checkpoint: str) -> None:
        _set_random_state(self.own["random"])


@torch.no_grad()
def draw_to(optimizer: torch.optim.Optimizer, start: Mapping[nn.Parameter, Tensor]) -> None:
    """Give back, after a step that has decayed weights to zero, what makes it a decay to `start`; operators stay.

    Of W, rate times decay is taken off by an optimizer that decays apart from its moments, as AdamW does.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("name") != "operators" else ():
            if parameter in start:
                parameter.add_(start[parameter], alpha=float(group["lr"]) * group["weight_decay"])


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state_all()}  # of each device, if there are any


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state.get("cuda", ()))
