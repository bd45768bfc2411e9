"""Base models: how good notebook 00 finds them, what they must be better than, and where later notebooks find them."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from apexlib import perplexity
from apexlib.suite.folders import NotReadyError, locate, relative
from apexlib.suite.inputs import load_model, load_tokenizer, text_blocks
from apexlib.text.datasets import PackedTokens
from apexlib.text.references import ngram_loss, unigram_loss

REFERENCES = {"unigram": "token frequencies", "bigram": "token pairs", "trigram": "token triples"}
_SAMPLE = 4096  # training blocks whose tokens are counted for "unigram"


def measured_models(
    trained: Sequence[Mapping[str, Any]], held_out: Collection[Mapping[str, Tensor]], *, revision: str | None = None
) -> pd.DataFrame:
    """Measure the `parameters` and the held-out `loss`, in nats per token, of models given as rows with a `path`."""
    rows = []
    for row in trained:
        network = load_model(row["path"], revision=revision)
        rows.append({**row, "parameters": network.num_parameters(), "loss": perplexity(network, held_out)["loss"]})
    return pd.DataFrame(rows)[["model", "seed", "step", "tokens", "parameters", "loss", "path"]]


def reference_losses(
    names: Sequence[str], train: PackedTokens, held_out: Int[np.ndarray, "blocks length"], vocabulary: int
) -> dict[str, float]:
    """Losses on held-out blocks of models that only count tokens, pairs or triples of them (REFERENCES)."""
    if unknown := [name for name in names if name not in REFERENCES]:
        raise ValueError(f"unknown reference {unknown[0]!r}; known: {', '.join(REFERENCES)}")
    sample, test = (torch.from_numpy(part.astype("int64")) for part in (train.blocks[:_SAMPLE], held_out))
    losses = {"unigram": unigram_loss(sample, test, vocabulary)}
    for order, name in enumerate(REFERENCES, start=1):
        if name in names and order > 1:
            losses[name] = ngram_loss(train.blocks.ravel(), held_out, vocabulary, order=order)
    return {name: losses[name] for name in names}


def unigram_of(base: str, *, corpus: str, context: int, blocks: int) -> float:
    """The loss of token frequencies on the held-out blocks of a corpus, in the tokens of the model `base`."""
    tokenizer = load_tokenizer(base)
    train, valid = (text_blocks(tokenizer, corpus, split, context) for split in ("train", "valid"))
    return reference_losses(["unigram"], train, valid.blocks[:blocks], len(tokenizer))["unigram"]


def check_bases(models: pd.DataFrame, references: Mapping[str, float]) -> None:
    """Refuse final models whose held-out loss is not below each of `references`: they are no base for anything."""
    name = min(references, key=references.get, default=None)
    goal = references.get(name, math.inf)
    if (worse := models[is_final(models) & (models["loss"] >= goal)]).size:
        raise ValueError(f"held-out loss not below that of {REFERENCES[name]}, {goal:.3f}:\n{worse}")


def is_final(models: pd.DataFrame) -> pd.Series:
    """Whether a row is of a model's last checkpoint."""
    return models["step"] == models.groupby("model")["step"].transform("max")


def models_table(results: Path) -> pd.DataFrame:
    """Read the models of notebook 00, with `is_final`."""
    if not (path := results / "models.csv").is_file():
        raise NotReadyError(f"{relative(path)}: not there yet; run notebook 00 first")
    table = pd.read_csv(path)
    if gone := [each for each in table["path"] if each.startswith("data/") and not Path(locate(each)).is_dir()]:
        raise NotReadyError(f"{gone[0]}: this model of {relative(path)} is not there; run notebook 00 first")
    return table.assign(is_final=is_final(table))


def masked_models(trained: pd.DataFrame, model: str | None, parts: int) -> pd.DataFrame:
    """The model whose units are masked: a row per part of the text, or per seed of the largest of `trained` (None).

    Columns: `model`, `seed` (the part, where there is one model), `path`, and `part` of so many `parts` of the text.
    """
    if model is not None:
        part = range(parts)
        return pd.DataFrame({"model": Path(model).name, "seed": part, "path": model, "part": part, "parts": parts})
    final = trained[trained["is_final"]].sort_values("parameters")
    return final[final["model"] == final["model"].iloc[-1]].assign(part=0, parts=1)


def base_models(results: Path, model: str, seeds: Sequence[int]) -> dict[int, str]:
    """Where the final model of that name of notebook 00 lies, for each seed; a folder or a name on the Hub for all."""
    if "/" in model:
        return dict.fromkeys(seeds, model)
    models = models_table(results)
    final = models[models["is_final"] & (models["model"] == model)].set_index("seed")
    if missing := sorted(set(seeds) - set(final.index)):
        found = {name: sorted(rows["seed"].unique().tolist()) for name, rows in models.groupby("model", sort=False)}
        raise ValueError(f"model {model!r}: no base model for seeds {missing}; models.csv has seeds {found}")
    return final.loc[list(seeds), "path"].to_dict()
