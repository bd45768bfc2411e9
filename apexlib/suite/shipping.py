"""A base model as it is shipped: bf16 weights, weaker versions of itself, a card that says how good it is."""

import lzma
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jinja2 import StrictUndefined, Template

from apexlib import perplexity
from apexlib.files import atomic_folder, write_json
from apexlib.provenance import provenance, save_table
from apexlib.suite.bases import REFERENCES, reference_losses
from apexlib.suite.inputs import load_model, load_tokenizer, text_blocks
from apexlib.text.datasets import PackedTokens, batches
from apexlib.training.checkpoints import checkpoint_folder

PROMPTS = ("def mean(values):\n", "import os\n\n\nclass ", "The function returns ")
_CARD = Path(__file__).with_name("card.md")


def ship_base(
    run: Path,
    folder: Path,
    *,
    train: PackedTokens,
    weaker: Sequence[int],
    last: int,
    corpora: Mapping[str, str],
    blocks: int,
    settings: Mapping[str, Any],
) -> pd.DataFrame:
    """Write the model that a run has left after step `last` to `folder`, in bf16, and return how good it is.

    The models after the steps `weaker` go to `step-…` inside it; `training.json` tells the `settings`, `evaluation.csv`
    what `evaluation_table` finds on the held-out text of `corpora`, each with words on what it is, and README.md all
    of it for people. `train` is what n-gram models may count.
    """
    tokenizer, named = load_tokenizer(str(checkpoint_folder(run, last))), {}
    for step in (last, *weaker):
        named["model" if step == last else f"step {step}"] = str(checkpoint_folder(run, step))
    evaluation = evaluation_table(named, train, list(corpora), blocks=blocks)
    with atomic_folder(folder, replace=True) as temporary:
        for step in (last, *weaker):
            place = temporary if step == last else checkpoint_folder(temporary, step)
            model = load_model(str(checkpoint_folder(run, step)), dtype=torch.bfloat16)
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
        facts = provenance(settings=dict(settings), parameters=model.num_parameters())
        write_json(facts, temporary / "training.json")
        save_table(evaluation, "evaluation", temporary)
        said = {"rows": _rows(evaluation), "facts": facts, "corpora": corpora, "name": folder.name, "weaker": weaker}
        said["samples"] = {prompt: continuation(named["model"], prompt) for prompt in PROMPTS}
        card = Template(_CARD.read_text(encoding="utf-8"), trim_blocks=True, undefined=StrictUndefined).render(said)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return evaluation


def evaluation_table(
    models: Mapping[str, str], train: PackedTokens, corpora: Sequence[str], *, blocks: int
) -> pd.DataFrame:
    """Measure models of one tokenizer, n-gram models that count `train`, and xz on held-out blocks of corpora.

    Columns: `corpus`, `predictor`, `loss` (nats per token; none of xz), `bits_per_byte` of the blocks' text. xz -9e is
    given that text alone; it has learnt from nothing else.
    """
    rows, context = [], train.blocks.shape[1]
    tokenizer = load_tokenizer(next(iter(models.values())))
    for corpus in corpora:
        held_out = text_blocks(tokenizer, corpus, "valid", context)
        tokens = held_out.blocks[:blocks]
        text = "".join(tokenizer.batch_decode(tokens.tolist())).encode()
        per_byte = tokens.size / len(text) / math.log(2)
        losses = {
            name: float(perplexity(load_model(path), batches(held_out, 16, limit=blocks), quiet=True)["loss"])
            for name, path in models.items()
        }
        losses |= reference_losses(list(REFERENCES), train, tokens, len(tokenizer))
        rows += [(corpus, name, loss, loss * per_byte) for name, loss in losses.items()]
        packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        rows.append((corpus, "xz -9e", None, 8 * packed / len(text)))
    return pd.DataFrame(rows, columns=["corpus", "predictor", "loss", "bits_per_byte"])


def continuation(model: str, prompt: str, *, tokens: int = 60, seed: int = 0) -> str:
    """What a model writes after a prompt, drawn at temperature 0.7 from the likeliest tokens."""
    tokenizer, network = load_tokenizer(model), load_model(model, dtype=torch.float32)
    torch.manual_seed(seed)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(network.device)
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "pad_token_id": tokenizer.pad_token_id}
    return tokenizer.decode(network.generate(**given, max_new_tokens=tokens, **options)[0], skip_special_tokens=True)


def _rows(evaluation: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """An evaluation for people: each predictor with a cell per corpus."""
    cells = evaluation.assign(
        cell=[
            f"{row.bits_per_byte:.3f}" + ("" if math.isnan(row.loss) else f" ({row.loss:.3f})")
            for row in evaluation.itertuples()
        ]
    )
    return [(name, part["cell"].tolist()) for name, part in cells.groupby("predictor", sort=False)]
