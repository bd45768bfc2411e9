"""The runs that experiments are made of: a base model trained, tuned on conversations, trained on further text.

Source: arXiv:2505.24241, sections 4 and 5. Each is a function of its settings, as `run_trials` calls it; what trains
goes through `train_in_stages`, and an interrupted training goes on where it was.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import Dataset, Subset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from apexlib.evaluation import exact_match, final_answer, multiple_choice, pad_token, perplexity
from apexlib.files import content_hash
from apexlib.suite.inputs import conversations, documents, examples, load_model, load_tokenizer, text_blocks
from apexlib.suite.memory import peak_mb, reset_peak
from apexlib.suite.pretraining import pretrain
from apexlib.suite.trials import time_left
from apexlib.suite.variants import VARIANTS
from apexlib.text.corpora import corpus_hash
from apexlib.text.datasets import batches, collate
from apexlib.text.skills import SPLITS
from apexlib.training.stages import train_in_stages


def pretraining_run(
    *,
    folder: Path,
    tokenizer: str,
    config: Mapping[str, Any],
    corpus: str,
    skill_documents: int,
    context: int,
    checkpoints: Sequence[int],
    seed: int,
    **training: Any,
) -> dict[str, Any]:
    """Train a model from random weights, drawn for `seed`, and keep `checkpoints` in `folder`.

    `config` is that of the model (`model_type` and its fields), `training` goes to `pretrain`. Returns its log.
    """
    disable_progress_bar()  # of saving weights: small models take milliseconds
    words = load_tokenizer(tokenizer)
    dataset = text_blocks(words, corpus, "train", context, skill_documents=skill_documents)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    kept = {"checkpoints": checkpoints, "tokenizer": words}
    log = pretrain(model, dataset, folder, **kept, seed=seed, resume=True, seconds=time_left(), **training)
    return {"log": log.to_dict("records")}


def instruction_run(
    *,
    folder: Path,
    base: str,
    variant: str,
    learning_rate: float,
    seed: int,
    steps: int,
    batch_size: int,
    stages: int,
    assessment_samples: int,
    chat: Mapping[str, Any],
    retention: Mapping[str, Any],
) -> dict[str, Any]:
    """Tune the base model on conversations by one variant and measure what it learnt and what it forgot.

    `chat`: `source`, `train`, `valid` and `test` (numbers of examples), `difficulties` (of skills), `max_length`,
    `max_new_tokens`. `retention`: `corpus`, `context`, `blocks`, text of the kind the base was trained on.
    Returns `instruction_scores` and the cost of training, as JSON holds them; the stages' models stay in `folder`.
    """
    model, tokenizer = _load(base)
    dataset = conversations(tokenizer, chat, "train")
    collator = collate(pad_token(tokenizer), multiple_of=8)
    arguments = _arguments(folder, steps, batch_size, seed, learning_rate=learning_rate, lr_scheduler_type="cosine")
    settings = {"stages": stages, "samples": assessment_samples, "data_collator": collator}
    model, cost, _ = _train(model, dataset, arguments, variant, seed, **settings)
    return cost | instruction_scores(model, tokenizer, chat=chat, retention=retention)


def instruction_setting(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Take from a notebook's parameters, by their names, the arguments of `instruction_run` that all its runs share."""
    of_chat = {split: f"{split}_examples" for split in SPLITS}
    of_chat |= {name: name for name in ("source", "difficulties", "max_length", "max_new_tokens")}
    of_text = {name: f"retention_{name}" for name in ("corpus", "context", "blocks")}
    shared = {name: parameters[name] for name in ("steps", "batch_size", "stages", "assessment_samples")}
    chat = {name: parameters[given] for name, given in of_chat.items()}
    return shared | {"chat": chat, "retention": {name: parameters[given] for name, given in of_text.items()}}


def instruction_data(chat: Mapping[str, Any], retention: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the conversations and of the held-out text of a comparison."""
    tasks = [examples(chat, split) for split in SPLITS]
    return {"chat": content_hash(tasks), "retention": corpus_hash(documents(retention["corpus"], "valid"))}


def untouched_run(*, folder: Path, base: str, chat: Mapping[str, Any], retention: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the base model as `instruction_run` measures a tuned one."""
    model, tokenizer = _load(base)
    return instruction_scores(model.eval(), tokenizer, chat=chat, retention=retention)


def instruction_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    chat: Mapping[str, Any],
    retention: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure a model on held-out conversations and on text of the kind its base was trained on.

    `valid_loss` and `answer_loss` (nats per token of the answers of the validation and the test split), `families`
    (share of right answers and number of examples, per family of the test split), `exact_match` (mean of the shares),
    `correct` (one 0 or 1 per example of the test split), `retention_loss` (nats per token). An example with
    `choices` is right where the likeliest is the answer; any other where the final answer that the model writes is.
    """
    losses = {}
    for split, name in (("valid", "valid_loss"), ("test", "answer_loss")):
        held_out = batches(conversations(tokenizer, chat, split), 64, collator=collate(pad_token(tokenizer)))
        losses[name] = float(perplexity(model, held_out, quiet=True)["loss"])
    answers = _answers(model, tokenizer, chat)
    families = answers.groupby("family")["correct"].agg(["mean", "size"])
    return {
        **losses,
        "exact_match": float(families["mean"].mean()),
        "families": {name: [float(share), int(count)] for name, share, count in families.itertuples()},
        "correct": answers["correct"].astype(int).tolist(),
        "retention_loss": text_loss(model, tokenizer, **retention),
    }


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chat: Mapping[str, Any]) -> pd.DataFrame:
    """Score every test example that has an answer, in its own way: `family` and `correct`, in the examples' order."""
    asked = [example for example in examples(chat, "test") if "answer" in example]
    by_choice = [row for row, example in enumerate(asked) if "choices" in example]
    by_text = [row for row, example in enumerate(asked) if "choices" not in example]
    writing = {"max_new_tokens": chat["max_new_tokens"], "extract": final_answer}
    tables = []
    for rows, score, options in ((by_choice, multiple_choice, {}), (by_text, exact_match, writing)):
        if rows:
            options = {"batch_size": 512 if torch.cuda.is_available() else 64, "quiet": True} | options
            tables.append(score(model, tokenizer, [asked[row] for row in rows], **options).set_axis(rows))
    return pd.concat(tables).sort_index()


def continued_run(
    *,
    folder: Path,
    base: str,
    variant: str,
    learning_rate: float,
    seed: int,
    steps: int,
    batch_size: int,
    stages: int,
    assessment_samples: int,
    evaluations: int,
    text: Mapping[str, Any],
    retention: Mapping[str, Any],
) -> dict[str, Any]:
    """Go on training the base model on other text by one variant; measure the loss there along the way.

    `text`: `corpus`, `context`, `blocks` (held-out ones, of the validation and of the test split each). The learning
    rate stays constant after its warm-up, so that every point of the curve is a run of that length. Returns the cost of
    training, `curve` (a list of `tokens` and `loss`, test split, with the base model at 0 tokens, at `evaluations`
    evenly spaced points), and, at the end, `valid_loss` and `retention_loss`.
    """
    model, tokenizer = _load(base)
    splits = {
        split: text_blocks(tokenizer, text["corpus"], split, text["context"]) for split in ("train", "valid", "test")
    }
    valid, test = (Subset(splits[split], range(min(text["blocks"], len(splits[split])))) for split in ("valid", "test"))
    start = float(perplexity(model, batches(test, 16), quiet=True)["loss"])
    schedule = {"learning_rate": learning_rate, "lr_scheduler_type": "constant_with_warmup"}
    points = {"eval_strategy": "steps", "eval_steps": max(1, steps // evaluations), "per_device_eval_batch_size": 16}
    arguments = _arguments(folder, steps, batch_size, seed, **schedule, **points)
    settings = {"stages": stages, "samples": assessment_samples, "eval_dataset": test}
    model, cost, log = _train(model, splits["train"], arguments, variant, seed, **settings)
    seen = log.dropna(subset=["eval_loss"])
    curve = [{"tokens": 0, "loss": start}] + [
        {"tokens": int(step) * batch_size * text["context"], "loss": float(loss)}
        for step, loss in zip(seen["step"], seen["eval_loss"], strict=True)
    ]
    valid_loss = float(perplexity(model, batches(valid, 16), quiet=True)["loss"])
    return cost | {"curve": curve, "valid_loss": valid_loss, "retention_loss": text_loss(model, tokenizer, **retention)}


def text_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, corpus: str, context: int, blocks: int
) -> float:
    """Loss on the first held-out blocks of a corpus (validation split), in nats per token."""
    held_out = text_blocks(tokenizer, corpus, "valid", context)
    return float(perplexity(model, batches(held_out, 16, limit=blocks), quiet=True)["loss"])


def _load(base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return load_model(base, dtype=torch.float32), load_tokenizer(base)


def _train(
    model: PreTrainedModel, dataset: Dataset, arguments: TrainingArguments, variant: str, seed: int, **settings: Any
) -> tuple[PreTrainedModel, dict[str, float], pd.DataFrame]:
    """Train by a variant; return the model in evaluation mode, what it cost, and the log."""
    chosen = VARIANTS[variant]
    config = chosen.config(seed=seed, stages=settings.pop("stages"), samples=settings.pop("samples"))
    before = reset_peak()
    settings |= {"method": chosen.method, **chosen.options, "resume": True, "seconds": time_left()}
    record = train_in_stages(model, dataset, arguments, config, **settings)
    cost = {
        "trainable": float(record.trainable["share"].mean()),
        "seconds_per_step": record.seconds_per_step,
        "peak_memory_mb": peak_mb() - before,
    }
    return record.model.eval(), cost, record.log


def _arguments(folder: Path, steps: int, batch_size: int, seed: int, **own: Any) -> TrainingArguments:
    """The authors' optimizer: AdamW with β = (0.9, 0.95), no weight decay, 5 % warm-up (theirs 3 %, of longer runs)."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        warmup_steps=max(1, round(0.05 * steps)),
        weight_decay=0.0,
        adam_beta2=0.95,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        **own,
    )
