"""The runs that experiments are made of: a base model trained, tuned on conversations, trained on further text.

Source: arXiv:2505.24241, sections 4 and 5. Each is a function of its settings, as `run_trials` calls it; what trains
goes through `train_in_stages`, and an interrupted training goes on where it was.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from apexlib import batches, collate, exact_match, multiple_choice, perplexity, pretrain, train_in_stages
from apexlib.analysis.operators_at_work import operator_moves, rows_of_targets
from apexlib.analysis.rank_change import movement
from apexlib.evaluation import on_device
from apexlib.files import content_hash
from apexlib.suite.inputs import conversations, documents, examples, load_model, load_tokenizer, text_blocks
from apexlib.suite.memory import peak_mb, reset_peak
from apexlib.suite.trials import time_left
from apexlib.suite.variants import Variant
from apexlib.text.answers import pad_token
from apexlib.text.cache import corpus_hash
from apexlib.text.corpora import final_answer
from apexlib.text.datasets import in_one_row
from apexlib.text.skills import SPLITS
from apexlib.training.stages import TrainingRecord

Settings = Mapping[str, Any]

_SHORT = 1024  # tokens of a step that cost less in one row, where attention is of all with all, than with padding


def pretraining_run(
    *, folder: Path, tokenizer: str, config: Settings, corpus: str, skill_documents: int, context: int, **training: Any
) -> dict[str, Any]:
    """Train a model from random weights and keep checkpoints of it in `folder`.

    `config` is that of the model (`model_type` and its fields). `training` goes to `pretrain`, whose log is returned;
    its `seed` is that of the weights too.
    """
    disable_progress_bar()  # of saving weights: small models take milliseconds
    words = load_tokenizer(tokenizer)
    dataset = text_blocks(words, corpus, "train", context, skill_documents=skill_documents)
    torch.manual_seed(training["seed"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    log = pretrain(model, dataset, folder, tokenizer=words, resume=True, seconds=time_left(), **training)
    return {"log": log.to_dict("records")}


def instruction_run(*, folder: Path, base: str, chat: Settings, retention: Settings, **training: Any) -> dict[str, Any]:
    """Tune the base model on conversations by one variant and measure its losses; `answers_run` goes on with its model.

    `chat`: `source`, `train`, `valid` and `test` (numbers of examples), `difficulties` (of skills), `max_length`,
    `max_new_tokens`. `retention`: `corpus`, `context`, `blocks`, text of the kind the base was trained on.
    `training`: `variant` (`settings_of` a name), `learning_rate`, `seed`, `steps`, `batch_size`, `stages`,
    `assessment_samples`.
    Returns `instruction_losses`, the `movement` from the base and the cost of training, as JSON holds them; the stages'
    models stay in `folder`.
    """
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base)
    data: dict[str, Any] = {"train_dataset": conversations(tokenizer, chat, "train")}
    padded = collate(pad_token(tokenizer), multiple_of=8 if torch.cuda.is_available() else None)
    short = training["batch_size"] * chat["max_length"] <= _SHORT and not torch.cuda.is_available()
    data["data_collator"] = in_one_row if short and _keeps_apart(model, data["train_dataset"], padded) else padded
    record, cost = _train(model, data, folder, lr_scheduler_type="cosine", **training)
    cost |= movement(load_model(base, dtype=torch.float32), record.model)
    return cost | instruction_losses(record.model, tokenizer, chat=chat, retention=retention)


def instruction_setting(parameters: Settings) -> dict[str, Any]:
    """Take from a notebook's parameters, by their names, the arguments of `instruction_run` that all its runs share."""
    shared = {name: parameters[name] for name in ("steps", "batch_size", "stages", "assessment_samples")}
    chat = {split: parameters[f"{split}_examples"] for split in SPLITS}
    chat |= {name: parameters[name] for name in ("source", "difficulties", "max_length", "max_new_tokens")}
    retention = {name: parameters[f"retention_{name}"] for name in ("corpus", "context", "blocks")}
    return shared | {"chat": chat, "retention": retention}


def instruction_data(chat: Settings, retention: Settings) -> dict[str, str]:
    """Hashes of the conversations and of the held-out text of a comparison."""
    tasks = [examples(chat, split) for split in SPLITS]
    return {"chat": content_hash(tasks), "retention": corpus_hash(documents(retention["corpus"], "valid"))}


def untouched_run(*, folder: Path, base: str, chat: Settings, retention: Settings) -> dict[str, Any]:
    """Measure the base model as `instruction_run` and `answers_run` measure a tuned one."""
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base)
    losses = instruction_losses(model, tokenizer, chat=chat, retention=retention)
    return movement(model, model) | losses | answers_run(folder=folder, model=base, base=base, chat=chat)


def instruction_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, chat: Settings, retention: Settings
) -> dict[str, float]:
    """`valid_loss`, on the answers of the validation split, and `retention_loss`, both in nats per token."""
    losses = {"valid_loss": answer_loss(model, tokenizer, chat, "valid")}
    return losses | {"retention_loss": text_loss(model, tokenizer, **retention)}


def answers_run(*, folder: Path, model: str, base: str, chat: Settings, **_: Any) -> dict[str, Any]:
    """Measure a tuned model (`model`, a folder) on the test split of conversations; `base` has its tokenizer.

    `answer_loss` (nats per token of the answers) and, unless `max_new_tokens` is 0, `families` (share of right answers
    and number of examples, per family), `exact_match` (mean of the shares), `correct` (one 0 or 1 per example). An
    example with `choices` is right where the likeliest is the answer; any other where the final answer that the model
    writes is.
    """
    tuned, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(base)
    loss = {"answer_loss": answer_loss(tuned, tokenizer, chat, "test")}
    if not chat["max_new_tokens"]:
        return loss
    asked = pd.Series([example for example in examples(chat, "test") if "answer" in example])
    by_choice = asked.map(lambda example: "choices" in example)
    every = {"batch_size": 512 if torch.cuda.is_available() else 256, "quiet": True}
    writing = {"max_new_tokens": chat["max_new_tokens"], "extract": final_answer}
    chosen = multiple_choice(tuned, tokenizer, asked[by_choice].tolist(), **every).set_axis(asked.index[by_choice])
    written = exact_match(tuned, tokenizer, asked[~by_choice].tolist(), **every, **writing)
    answers = pd.concat([chosen, written.set_axis(asked.index[~by_choice])]).sort_index()
    families = answers.groupby("family")["correct"].agg(["mean", "size"])
    return loss | {
        "exact_match": float(families["mean"].mean()),
        "families": {name: [float(share), int(count)] for name, share, count in families.itertuples()},
        "correct": answers["correct"].astype(int).tolist(),
    }


def continued_run(
    *, folder: Path, base: str, evaluations: int, text: Settings, retention: Settings, **training: Any
) -> dict[str, Any]:
    """Go on training the base model on other text by one variant; measure the loss there along the way.

    `text`: `corpus`, `context`, `blocks` (held-out ones, of the validation and of the test split each). The learning
    rate stays constant after its warm-up, so that every point of the curve is a run of that length; that of a variant
    with a `length` of its own falls to zero, and its curve has the two ends. Returns the cost of
    training, the `movement` from the base, `curve` (a list of `tokens` and `loss`, test split, with the base model and
    its `retention_loss` at 0 tokens, at `evaluations` evenly spaced points), and, at the end, `valid_loss` and
    `retention_loss`. `training`: as in `instruction_run`.
    """
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base)
    train, test = (text_blocks(tokenizer, text["corpus"], split, text["context"]) for split in ("train", "test"))
    data = {"train_dataset": train, "eval_dataset": Subset(test, range(min(text["blocks"], len(test))))}
    start = {"tokens": 0} | _losses_of_base(base, tuple(text.items()), tuple(retention.items()))
    steps, tokens = training["steps"], training["batch_size"] * text["context"]
    schedule, every = "constant_with_warmup", max(1, steps // evaluations)
    if (length := training["variant"]["length"]) is not None:
        schedule, every = "cosine", max(1, round(length * steps))
        training["steps"] = every
    points = {"eval_strategy": "steps", "eval_steps": every, "per_device_eval_batch_size": 16}
    record, cost = _train(model, data, folder, lr_scheduler_type=schedule, **points, **training)
    seen = record.log.dropna(subset=["eval_loss"])
    curve = pd.DataFrame({"tokens": seen["step"].astype(int) * tokens, "loss": seen["eval_loss"]})
    cost |= movement(load_model(base, dtype=torch.float32), record.model)
    cost["valid_loss"] = text_loss(record.model, tokenizer, **text)
    cost["retention_loss"] = text_loss(record.model, tokenizer, **retention)
    return cost | {"curve": [start, *curve.to_dict("records")]}


@cache  # a process trains from one base again and again
def _losses_of_base(base: str, text: tuple[tuple[str, Any], ...], retention: tuple[tuple[str, Any], ...]) -> Settings:
    """The losses of an untouched model on the test split of a text, and on text of the kind it was trained on."""
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base)
    losses = {"loss": text_loss(model, tokenizer, split="test", **dict(text))}
    return losses | {"retention_loss": text_loss(model, tokenizer, **dict(retention))}


def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chat: Settings, split: str) -> float:
    """Loss on the answers of a split of conversations, in nats per token."""
    by_length = sorted(conversations(tokenizer, chat, split), key=lambda item: len(item["input_ids"]))
    held_out = batches(by_length, 64, collator=collate(pad_token(tokenizer)))
    return float(perplexity(model, held_out, quiet=True)["loss"])


@torch.no_grad()
def _keeps_apart(model: PreTrainedModel, examples: Dataset, padded: Callable[[Any], Any]) -> bool:
    """Whether a model takes examples in one row as it takes them padded: not each family heeds positions."""
    pairs = (batches(examples, 2, collator=collator, limit=2)[0] for collator in (padded, in_one_row))
    try:
        losses = [float(model(**on_device(model, pair)).loss) for pair in pairs]
    except TypeError:  # of an argument that it does not know
        return False
    return math.isclose(*losses, rel_tol=1e-5)


def text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    corpus: str,
    context: int,
    blocks: int,
    split: str = "valid",
) -> float:
    """Loss on the first blocks of a held-out split of a corpus, in nats per token."""
    held_out = batches(text_blocks(tokenizer, corpus, split, context), 16, limit=blocks)
    return float(perplexity(model, held_out, quiet=True)["loss"])


def _train(
    model: PreTrainedModel,
    data: Settings,
    folder: Path,
    variant: Settings,
    stages: int,
    assessment_samples: int,
    **own: Any,
) -> tuple[TrainingRecord, dict[str, float]]:
    """Train by a variant; return what it leaves and what it cost.

    The authors' optimizer: AdamW with β = (0.9, 0.95), no weight decay, 5 % warm-up (theirs 3 %, of longer runs). `own`
    are `steps`, `batch_size` and further arguments of the Trainer, `seed` among them. Where there are operators,
    `by_operator` is ‖M P‖ / ‖ΔW[N]‖, mean over projections and stages.
    """
    steps, on_gpu = own.pop("steps"), torch.cuda.is_available()
    own |= {"max_steps": steps, "warmup_steps": max(1, round(0.05 * steps)), "logging_steps": max(1, steps // 20)}
    own |= {"per_device_train_batch_size": own.pop("batch_size"), "weight_decay": 0.0, "adam_beta2": 0.95}
    own |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    chosen, before = Variant(**{name: each for name, each in variant.items() if name != "name"}), reset_peak()
    own["learning_rate"] *= chosen.rate
    arguments = TrainingArguments(str(folder), bf16=on_gpu, dataloader_pin_memory=on_gpu, **own)
    config = chosen.config(seed=arguments.seed, stages=stages, samples=assessment_samples, shape=model.config)
    method = {"method": chosen.method, **chosen.method_options(model.config), "resume": True, "seconds": time_left()}
    record = train_in_stages(model, args=arguments, config=config, trainer_class=_ObservedTrainer, **data, **method)
    cost = {"trainable": float(record.trainable["share"].mean()), "seconds_per_step": record.seconds_per_step}
    if moves := [pd.read_csv(path) for path in sorted(folder.glob("operators-*.csv"))]:
        cost["by_operator"] = float(pd.concat(moves).eval("by_operator / moved").mean())
    return record, cost | {"peak_memory_mb": peak_mb() - before}


class _ObservedTrainer(Trainer):
    """Leaves, of each stage with operators, how far they and all else have moved the target rows."""

    def train(self, *args: Any, **options: Any) -> Any:
        start, trained = rows_of_targets(self.model), super().train(*args, **options)
        if start:
            folder = Path(self.args.output_dir)
            table = operator_moves(self.model, start)
            table.to_csv(folder / f"operators-{len(list(folder.glob('stage-*')))}.csv", index=False)
        return trained
