"""A base model as it is shipped: bf16 weights, weaker versions of itself, a card that says how good it is."""

import lzma
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jinja2 import StrictUndefined, Template

from apexlib.files import atomic_folder, write_json
from apexlib.provenance import provenance, save_table
from apexlib.suite.bases import REFERENCES, reference_losses
from apexlib.suite.inputs import load_model, load_tokenizer, text_blocks
from apexlib.suite.runs import text_loss
from apexlib.text.datasets import PackedTokens
from apexlib.training.checkpoints import checkpoint_folder

PROMPTS = ("def mean(values):\n", "import os\n\n\nclass ", "The function returns ")


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
    paths = {step: str(checkpoint_folder(run, step)) for step in (last, *weaker)}
    models = {"model" if step == last else f"step {step}": path for step, path in paths.items()}
    tokenizer = load_tokenizer(paths[last])
    evaluation = evaluation_table(models, train, list(corpora), blocks=blocks)
    with atomic_folder(folder, replace=True) as temporary:
        for step, path in paths.items():
            place = temporary if step == last else checkpoint_folder(temporary, step)
            model = load_model(path, dtype=torch.bfloat16)
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
        facts = provenance(settings=dict(settings), parameters=model.num_parameters())
        write_json(facts, temporary / "training.json")
        save_table(evaluation, "evaluation", temporary)
        said = {"evaluation": evaluation, "facts": facts, "corpora": corpora, "name": folder.name, "weaker": weaker}
        said["samples"] = {prompt: continuation(paths[last], prompt) for prompt in PROMPTS}
        card = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
        card = Template(card, trim_blocks=True, undefined=StrictUndefined).render(said)
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
        tokens = text_blocks(tokenizer, corpus, "valid", context).blocks[:blocks]
        text = "".join(tokenizer.batch_decode(tokens.tolist())).encode()
        per_byte = tokens.size / len(text) / math.log(2)
        asked = {"corpus": corpus, "context": context, "blocks": blocks}
        losses = {name: text_loss(load_model(path), tokenizer, **asked) for name, path in models.items()}
        losses |= reference_losses(list(REFERENCES), train, tokens, len(tokenizer))
        rows += [(corpus, name, loss, loss * per_byte) for name, loss in losses.items()]
        packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        rows.append((corpus, "xz -9e", None, 8 * packed / len(text)))
    return pd.DataFrame(rows, columns=["corpus", "predictor", "loss", "bits_per_byte"])


def continuation(model: str, prompt: str, *, tokens: int = 60) -> str:
    """What a model writes after a prompt, drawn at temperature 0.7 from the likeliest tokens."""
    tokenizer, network = load_tokenizer(model), load_model(model, dtype=torch.float32)
    torch.manual_seed(0)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(network.device)
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "pad_token_id": tokenizer.pad_token_id}
    return tokenizer.decode(network.generate(**given, max_new_tokens=tokens, **options)[0], skip_special_tokens=True)
