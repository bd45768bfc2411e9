"""The comparisons of the paper at any scale: one run by one method, tuned on conversations or trained on further text.

Source: arXiv:2505.24241, sections 4 and 5. Every run of a comparison goes through `train_in_stages` on the same data in
the same order, with the same schedule and the same evaluation; only the `Variant` and its learning rate differ.
"""

import gc
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import Dataset, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from apexlib.baselines import Name
from apexlib.corpora import load_chat, load_corpus
from apexlib.data import ChatTokens, PackedTokens, batches, collate, encode_chat, pack
from apexlib.evaluation import exact_match, pad_token, perplexity
from apexlib.records import project_root
from apexlib.selection import ApexConfig
from apexlib.skills import skills
from apexlib.training import train_in_stages
from apexlib.trials import Trial

_SMALL = ApexConfig.preset("2.4%")


@dataclass(frozen=True)
class Variant:
    """A method with its settings: what is compared with what."""

    method: Name
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of ApexConfig away from their defaults
    options: Mapping[str, Any] = field(default_factory=dict)  # of `method_of`

    def config(self, *, stages: int, seed: int, samples: int) -> ApexConfig:
        """Settings of a run; a variant's own number of stages goes before `stages`."""
        return replace(ApexConfig(stages=stages, seed=seed, assessment_samples=samples), **self.changes)


_EVERYTHING = {"direct_heads": 1.0, "direct_channels": 1.0, "train_norms": True}

VARIANTS: dict[str, Variant] = {
    "full": Variant("full"),
    "lora": Variant("lora"),
    "hft": Variant("hft"),
    "gmt": Variant("gmt"),
    "direct": Variant("direct"),  # the rows of "apex", without operators
    "apex": Variant("apex"),  # the paper's 52 %
    "apex-2.4%": Variant(
        "apex",
        {name: getattr(_SMALL, name) for name in ("fraction", "direct_heads", "direct_channels", "train_embeddings")},
    ),
    "apex-all": Variant("apex", _EVERYTHING),  # operators, and every weight trains
    # ablations of "apex", one thing changed each
    "random": Variant("apex", {"strategy": "random"}),
    "reversed": Variant("apex", {"strategy": "reversed"}),
    "magnitude": Variant("apex", {"strategy": "magnitude"}),
    "no-operator": Variant("direct"),
    "diagonal": Variant("apex", {"operator": "diagonal"}),
    "low_rank": Variant("apex", {"operator": "low_rank"}),
    "dense": Variant("apex", {"operator": "dense"}),
    **{f"stages-{stages}": Variant("apex", {"stages": stages}) for stages in (1, 2, 3, 4)},
    **{name: Variant("apex", {"statistic": name}) for name in ("mean", "ema", "ema_rank")},
    "operator-lr-4": Variant("apex", {"operator_lr_scale": 4.0}),
    "operator-lr-10": Variant("apex", {"operator_lr_scale": 10.0}),
    "balance": Variant("apex", {"balance_weight": 0.01}),
}


def grid_trials(
    variants: Iterable[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    bases: Mapping[int, Path],
    **settings: Any,
) -> list[Trial]:
    """Make a trial for every variant, learning rate and seed, each starting from the base model of its seed.

    >>> trials = grid_trials(["full", "apex"], [1e-3], [0, 1], {0: Path("a"), 1: Path("b")}, steps=10)
    >>> [trial.name for trial in trials]
    ['full-lr0.001-seed0', 'full-lr0.001-seed1', 'apex-lr0.001-seed0', 'apex-lr0.001-seed1']
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"unknown variant {unknown[0]!r}; known: {', '.join(VARIANTS)}")
    return [
        Trial(
            f"{variant}-lr{rate:g}-seed{seed}",
            {"variant": variant, "learning_rate": rate, "seed": seed, "base": str(bases[seed]), **settings},
            reads=(Path(bases[seed]),),
        )
        for variant in variants
        for rate in learning_rates
        for seed in seeds
    ]


def choose_rates(runs: pd.DataFrame, *, by: str = "method", loss: str = "valid_loss") -> dict[str, float]:
    """Choose, for each method, the learning rate with the lowest mean validation loss over the seeds that have all rates.

    >>> runs = pd.DataFrame({"method": "full", "learning_rate": [0.1, 0.2], "seed": 0, "valid_loss": [2.0, 1.0]})
    >>> choose_rates(runs)
    {'full': 0.2}
    """
    chosen = {}
    for method, part in runs.groupby(by, sort=False):
        table = part.pivot_table(index="seed", columns="learning_rate", values=loss).dropna()
        chosen[method] = float(table.mean().idxmin())
    return chosen


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
    dataset = _conversations(tokenizer, chat, "train")
    collator = collate(pad_token(tokenizer), multiple_of=8)
    arguments = _arguments(folder, steps, batch_size, seed, learning_rate=learning_rate, lr_scheduler_type="cosine")
    settings = {"stages": stages, "samples": assessment_samples, "data_collator": collator}
    model, cost, _ = _train(model, dataset, arguments, variant, seed, **settings)
    return cost | instruction_scores(model, tokenizer, chat=chat, retention=retention)


def instruction_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    chat: Mapping[str, Any],
    retention: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure a model on held-out conversations and on text of the kind its base was trained on.

    `valid_loss` and `answer_loss` (nats per token of the answers of the validation and the test split), `families`
    (share of exact matches and number of examples, per family of the test split), `exact_match` (mean of the shares),
    `retention_loss` (nats per token).
    """
    losses = {}
    for split, name in (("valid", "valid_loss"), ("test", "answer_loss")):
        held_out = batches(_conversations(tokenizer, chat, split), 64, collator=collate(pad_token(tokenizer)))
        losses[name] = float(perplexity(model, held_out, quiet=True)["loss"])
    examples = _examples(chat["source"], "test", chat["test"], tuple(chat["difficulties"]))
    answers = exact_match(model, tokenizer, examples, max_new_tokens=chat["max_new_tokens"], quiet=True)
    families = answers.groupby("family")["correct"].agg(["mean", "size"])
    return {
        **losses,
        "exact_match": float(families["mean"].mean()),
        "families": {name: [float(share), int(count)] for name, share, count in families.itertuples()},
        "retention_loss": text_loss(model, tokenizer, **retention),
    }


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
    splits = {split: _packed(tokenizer, text["corpus"], split, text["context"]) for split in ("train", "valid", "test")}
    valid, test = (Subset(splits[split], range(min(text["blocks"], len(splits[split])))) for split in ("valid", "test"))
    start = float(perplexity(model, batches(test, 16), quiet=True)["loss"])
    rate = {"learning_rate": learning_rate, "lr_scheduler_type": "constant_with_warmup"}
    watch = {"eval_strategy": "steps", "eval_steps": max(1, steps // evaluations)}
    arguments = _arguments(folder, steps, batch_size, seed, per_device_eval_batch_size=16, **rate, **watch)
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
    held_out = _packed(tokenizer, corpus, "valid", context)
    return float(perplexity(model, batches(held_out, 16, limit=blocks), quiet=True)["loss"])


def tokens_to_reach(curve: pd.DataFrame, loss: float) -> float:
    """Tokens after which a curve (`tokens`, `loss`) first falls to `loss`, by linear interpolation; inf if it never does.

    >>> tokens_to_reach(pd.DataFrame({"tokens": [0, 10, 20], "loss": [4.0, 3.0, 2.5]}), 2.75)
    15.0
    """
    curve = curve.sort_values("tokens")
    tokens, losses = curve["tokens"].to_numpy(float), curve["loss"].to_numpy(float)
    for i in range(len(tokens)):
        if losses[i] <= loss:
            if i == 0:
                return float(tokens[0])
            share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
            return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))
    return math.inf


def _train(
    model: PreTrainedModel, dataset: Dataset, arguments: TrainingArguments, variant: str, seed: int, **settings: Any
) -> tuple[PreTrainedModel, dict[str, float], pd.DataFrame]:
    """Train by a variant; return the model in evaluation mode, what it cost, and the log."""
    how, given = VARIANTS[variant], {name: settings.pop(name) for name in ("stages", "samples")}
    config = how.config(seed=seed, **given)
    before = _reset_peak()
    record = train_in_stages(model, dataset, arguments, config, method=how.method, **how.options, **settings)
    cost = {
        "trainable": float(record.trainable["share"].mean()),
        "seconds_per_step": getattr(record, "seconds_per_step", math.nan),
        "peak_memory_mb": _peak_mb() - before,
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


def _root() -> Path:
    """The project's folder; outside a project, the working directory."""
    with suppress(FileNotFoundError):
        return project_root()
    return Path.cwd()


def _load(base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    place = _root() / base if (_root() / base).is_dir() else base
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, _tokenizer(place)


@cache
def _tokenizer(place: str | Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(place)


@cache
def _examples(source: str, split: str, count: int, difficulties: tuple[int, ...]) -> list[dict[str, Any]]:
    """Conversations of a split; each with an `answer` and a `family`, the source itself where none is given."""
    if source == "skills":
        return skills(split, count, difficulties=difficulties)
    examples = load_chat(source, split=split, limit=count)
    return [{"answer": each["messages"][-1]["content"], "family": Path(source).stem} | each for each in examples]


def _conversations(tokenizer: PreTrainedTokenizerFast, chat: Mapping[str, Any], split: str) -> ChatTokens:
    return _encoded(tokenizer, chat["source"], split, chat[split], tuple(chat["difficulties"]), chat["max_length"])


@cache
def _encoded(tokenizer: PreTrainedTokenizerFast, source: str, split: str, count: int, *rest: Any) -> ChatTokens:
    difficulties, max_length = rest
    return encode_chat(_examples(source, split, count, difficulties), tokenizer, max_length=max_length)[0]


@cache
def _documents(corpus: str, split: str) -> list[str]:
    return load_corpus(corpus, split=split)


def _packed(tokenizer: PreTrainedTokenizerFast, corpus: str, split: str, context: int) -> PackedTokens:
    return pack(_documents(corpus, split), tokenizer, context, cache=_root() / "data" / "cache")


def _reset_peak() -> float:
    """Start measuring the peak anew where the system can; return the memory held now, in MB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def _peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return _status_mb("VmHWM")


def _status_mb(entry: str) -> float:
    """A size of this process as Linux tells it, in MB; NaN elsewhere."""
    with suppress(OSError):
        if found := re.search(rf"{entry}:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024 / 1e6
    return math.nan
