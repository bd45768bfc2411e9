"""The comparisons of the paper at any scale: one run by one method, tuned on conversations or trained on further text.

Source: arXiv:2505.24241, sections 4 and 5. Every run of a comparison goes through `train_in_stages` on the same data in
the same order, with the same schedule and the same evaluation; only the `Variant` and its learning rate differ.
"""

import gc
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from apexlib.activations import activation_statistics
from apexlib.analysis.difference import imbalance_table, masking_curve
from apexlib.analysis.spectrum import update_table
from apexlib.evaluation import (
    exact_match,
    final_answer,
    multiple_choice,
    pad_token,
    perplexity,
)
from apexlib.plan import ApexConfig
from apexlib.provenance import save_table
from apexlib.suite import prepared
from apexlib.suite.folders import project_root
from apexlib.suite.prepared import PREFIX, is_prepared
from apexlib.suite.pretraining import pretrain
from apexlib.suite.trials import RESULT, Trial, run_trials
from apexlib.text.corpora import load_chat, load_corpus
from apexlib.text.datasets import ChatTokens, PackedTokens, batches, collate, encode_chat, pack
from apexlib.text.references import ngram_loss, unigram_loss
from apexlib.text.skills import skills, skills_text
from apexlib.training.methods import Name
from apexlib.training.stages import train_in_stages

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
            reads=(Path(_local(str(bases[seed]))),),
        )
        for variant in variants
        for rate in learning_rates
        for seed in seeds
    ]


def runs_table(trials: Sequence[Trial], results: Sequence[Mapping[str, Any]], folder: Path) -> pd.DataFrame:
    """One row per trial: `method`, `learning_rate`, `seed`, each number of its result, `path` of its folder."""
    rows = [
        {"method": trial.settings["variant"], **{name: trial.settings[name] for name in ("learning_rate", "seed")}}
        | {name: value for name, value in result.items() if isinstance(value, int | float)}
        | {"path": relative(Path(folder) / trial.name)}
        for trial, result in zip(trials, results, strict=True)
    ]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: `runs` is `runs_table` with `chosen`; `results` holds a run's whole result, by its path."""

    runs: pd.DataFrame
    results: Mapping[str, Mapping[str, Any]]
    rates: pd.DataFrame  # of the grid: `method`, `learning_rate`, `loss` (validation, mean over seeds), `chosen`


def compare(
    run: Callable[..., dict[str, Any]],
    variants: Sequence[str],
    bases: Mapping[int, Path],
    folder: Path,
    *,
    learning_rates: Sequence[float],
    grid_seeds: Sequence[int],
    keep_models: bool = True,
    seconds: float | None = None,
    workers: int | None = None,
    **settings: Any,
) -> Comparison:
    """Run every variant at every learning rate on `grid_seeds`, and at the rate chosen on the other seeds of `bases`.

    `run` is `instruction_run` or `continued_run`, `settings` its further arguments. Models are kept (`keep_models`) of
    the runs at the chosen rates only. For `seconds` and `workers` see `run_trials`.
    """
    deadline = None if seconds is None else time.monotonic() + seconds

    def table_of(trials: list[Trial]) -> tuple[pd.DataFrame, dict[str, Any]]:
        left = None if deadline is None else deadline - time.monotonic()
        results = run_trials(run, trials, folder, seconds=left, workers=workers)
        table = runs_table(trials, results, folder)
        return table, dict(zip(table["path"], results, strict=True))

    grid, results = table_of(grid_trials(variants, learning_rates, grid_seeds, bases, **settings))
    best = choose_rates(grid)
    rest = [seed for seed in bases if seed not in grid_seeds]
    more = [trial for name in variants for trial in grid_trials([name], [best[name]], rest, bases, **settings)]
    if keep_models:  # a run whose model was removed, when another rate was the chosen one, is made again
        again = [
            trial for name in variants for trial in grid_trials([name], [best[name]], grid_seeds, bases, **settings)
        ]
        again = [trial for trial in again if not list((Path(folder) / trial.name).glob("stage-*"))]
        for trial in again:
            (Path(folder) / trial.name / RESULT).unlink()
        more += again
    if more:
        others, found = table_of(more)
        grid = pd.concat([grid[~grid["path"].isin(others["path"])], others], ignore_index=True)
        results |= found
    runs = grid.assign(chosen=(grid["learning_rate"] == grid["method"].map(best)) & grid["seed"].isin(list(bases)))
    for path in runs.loc[~(runs["chosen"] & keep_models), "path"]:
        drop_models(_root() / path)
    rates = runs[runs["seed"].isin(grid_seeds)].groupby(["method", "learning_rate"], as_index=False, sort=False)
    rates = rates["valid_loss"].mean().rename(columns={"valid_loss": "loss"})
    return Comparison(runs, results, rates.assign(chosen=rates["learning_rate"] == rates["method"].map(best)))


def drop_models(folder: Path) -> None:
    """Remove the models of a run's stages; its result stays."""
    for stage in Path(folder).glob("stage-*"):
        shutil.rmtree(stage)


def choose_rates(runs: pd.DataFrame, *, by: str = "method", loss: str = "valid_loss") -> dict[str, float]:
    """Choose for each method the learning rate of the lowest mean validation loss, over the seeds that have all rates.

    >>> runs = pd.DataFrame({"method": "full", "learning_rate": [0.1, 0.2], "seed": 0, "valid_loss": [2.0, 1.0]})
    >>> choose_rates(runs)
    {'full': 0.2}
    """
    chosen = {}
    for method, part in runs.groupby(by, sort=False):
        table = part.pivot_table(index="seed", columns="learning_rate", values=loss).dropna()
        chosen[method] = float(table.mean().idxmin())
    return chosen


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
    words = _tokenizer(_local(tokenizer))
    if skill_documents:
        documents = _documents(corpus, "train") + skills_text(skill_documents)
        dataset = pack(documents, words, context, cache=_root() / "data" / "cache")
    else:
        dataset = _packed(words, corpus, "train", context)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    log = pretrain(model, dataset, folder, checkpoints=checkpoints, tokenizer=words, seed=seed, **training)
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
    dataset = _conversations(tokenizer, chat, "train")
    collator = collate(pad_token(tokenizer), multiple_of=8)
    arguments = _arguments(folder, steps, batch_size, seed, learning_rate=learning_rate, lr_scheduler_type="cosine")
    settings = {"stages": stages, "samples": assessment_samples, "data_collator": collator}
    model, cost, _ = _train(model, dataset, arguments, variant, seed, **settings)
    return cost | instruction_scores(model, tokenizer, chat=chat, retention=retention)


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
        held_out = batches(_conversations(tokenizer, chat, split), 64, collator=collate(pad_token(tokenizer)))
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
    """Score every test example in its own way: `family` and `correct`, in the order of the examples."""
    examples = _examples(chat["source"], "test", chat["test"], tuple(chat["difficulties"]))
    size = 512 if torch.cuda.is_available() else 64
    how = {"batch_size": size, "quiet": True}
    tables = []
    for rows, score in (
        ([row for row, example in enumerate(examples) if "choices" in example], multiple_choice),
        ([row for row, example in enumerate(examples) if "choices" not in example], exact_match),
    ):
        own = {} if score is multiple_choice else {"max_new_tokens": chat["max_new_tokens"], "extract": final_answer}
        if rows:
            table = score(model, tokenizer, [examples[row] for row in rows], **how, **own)
            tables.append(table.set_axis(rows))
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


def difference_run(
    *,
    folder: Path,
    model: str,
    corpus: str,
    context: int,
    assessment_blocks: int,
    blocks: int,
    fractions: Mapping[str, Sequence[float]],
    draws: int,
    top: float = 0.1875,
) -> dict[str, Any]:
    """Measure how unequal the units of a model are, and what it loses without some of them, on held-out text.

    Units are ranked over `assessment_blocks` of training text; losses are those of the first `blocks` of the test
    split. `fractions` are the shares to mask, per component; without any nothing is masked. The tables `activations`,
    `imbalance` and, where units are masked, `masking` stay in `folder`; returns `parameters` and `loss`.
    """
    network, tokenizer = _load(model)
    train, held_out = (_packed(tokenizer, corpus, split, context) for split in ("train", "test"))
    test = batches(held_out, 16, limit=blocks)
    statistics = activation_statistics(network, batches(train, 16, limit=assessment_blocks), top=top)
    save_table(statistics, "activations", folder)
    save_table(imbalance_table(statistics), "imbalance", folder)
    curves = [
        masking_curve(
            network, statistics, test, fractions=[0, *fractions[part]], order=order, component=part, seeds=range(draws)
        )
        for part in fractions
        if part in set(statistics["component"])
        for order in ("advantageous", "random", "disadvantageous")
    ]
    if curves:
        save_table(pd.concat(curves).rename(columns={"seed": "draw"}), "masking", folder)
    loss = float(perplexity(network, test, quiet=True)["loss"])
    return {"parameters": network.num_parameters(), "loss": loss}


def reference_run(*, folder: Path, tokenizer: str, corpus: str, context: int, blocks: int) -> dict[str, float]:
    """Losses, on the blocks of `difference_run`, of models that no network is: `unigram`, `bigram` and `trigram`."""
    words = _tokenizer(_local(tokenizer))
    train, test = (_packed(words, corpus, split, context) for split in ("train", "test"))
    seen, asked = train.blocks.ravel(), test.blocks[:blocks]
    return {
        "unigram": unigram_loss(
            torch.from_numpy(seen.astype("int64")), torch.from_numpy(asked[:, 1:].astype("int64")), len(words)
        ),
        "bigram": ngram_loss(seen, asked, len(words), order=2),
        "trigram": ngram_loss(seen, asked, len(words), order=3),
    }


def rank_run(*, folder: Path, base: str, run: str) -> dict[str, Any]:
    """Measure the update of every matrix by a run; the table `updates`, with its last `stage`, stays in `folder`."""
    stages = sorted(int(path.name.removeprefix("stage-")) for path in (_root() / run).glob("stage-*"))
    if not stages:
        raise FileNotFoundError(f"{run}: need stage-0, stage-1, … of a run")
    updates = update_table(_local(base), _root() / run / f"stage-{stages[-1]}")
    save_table(updates.assign(stage=stages[-1]), "updates", folder)
    return {"stages": len(stages)}


def tokens_to_reach(curve: pd.DataFrame, loss: float) -> float:
    """Tokens after which a curve (`tokens`, `loss`) first falls to `loss`, linear between points; inf if it never does.

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
        "seconds_per_step": record.seconds_per_step,
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


def relative(path: Path) -> str:
    """The path from the project's root, if it lies below it."""
    path = path.resolve()
    return path.relative_to(_root()).as_posix() if path.is_relative_to(_root()) else str(path)


def _root() -> Path:
    """The project's folder; outside a project, the working directory."""
    with suppress(FileNotFoundError):
        return project_root()
    return Path.cwd()


def _local(name: str) -> str:
    """A folder of the project by its path from the root; any other name as it is."""
    return str(_root() / name) if (_root() / name).is_dir() else name


def _load(base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    place = _local(base)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, _tokenizer(place)


@cache
def _tokenizer(place: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(place)


@cache
def _examples(source: str, split: str, count: int, difficulties: tuple[int, ...]) -> list[dict[str, Any]]:
    """Conversations of a split; each with an `answer` and a `family`, the source itself where none is given."""
    if source == "skills":
        return skills(split, count, difficulties=difficulties)
    if is_prepared(source):
        return prepared.examples(_place(source), count)
    examples = load_chat(source, split=split, limit=count)
    named = {"family": Path(source).stem}
    return [{"answer": final_answer(each["messages"][-1]["content"])} | named | each for each in examples]


def _conversations(tokenizer: PreTrainedTokenizerFast, chat: Mapping[str, Any], split: str) -> ChatTokens:
    return _encoded(tokenizer, chat["source"], split, chat[split], tuple(chat["difficulties"]), chat["max_length"])


@cache
def _encoded(tokenizer: PreTrainedTokenizerFast, source: str, split: str, count: int, *rest: Any) -> ChatTokens:
    difficulties, max_length = rest
    if is_prepared(source):  # encoded once, up to a length of its own
        return prepared.conversations(_place(source), split, count)
    return encode_chat(_examples(source, split, count, difficulties), tokenizer, max_length=max_length)[0]


@cache
def _documents(corpus: str, split: str) -> list[str]:
    return load_corpus(corpus, split=split)


def _packed(tokenizer: PreTrainedTokenizerFast, corpus: str, split: str, context: int) -> PackedTokens:
    if is_prepared(corpus):
        return PackedTokens(prepared.stream(_place(corpus), split), context)
    return pack(_documents(corpus, split), tokenizer, context, cache=_root() / "data" / "cache")


def _place(source: str) -> str:
    """A prepared source with its path from the project's root made whole."""
    return f"{PREFIX}{_root() / prepared.folder_of(source)}"


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
