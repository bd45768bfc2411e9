"""Save a fused model with a card and a certificate: what fusing and casting changed, a hash of every file."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from apexlib.evaluation import in_evaluation, on_device
from apexlib.expansion import fuse, is_expanded
from apexlib.files import atomic_folder, check_new, file_hash, pretrained, read_hashes, write_json
from apexlib.inspection import composed_weights, trainable_table
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.projections import SplitProjection
from apexlib.provenance import provenance

CERTIFICATE = "certificate.json"
_FORMAT = 1


def save_fused(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    base: PreTrainedModel | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    plans: Sequence[ExpansionPlan] = (),
    facts: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "50GB",
    push_to_hub: str | None = None,
) -> dict[str, Any]:
    """Fuse `model`, cast it to `dtype` (default: its own), save it to a new folder; return the certificate.

    The folder holds a plain model for any `from_pretrained`, and appears whole or not at all. `model` comes back fused
    and in `dtype`. No file of weights is larger than `max_shard_size`, "5GB" say. The model card, README.md, names the
    base, what trained, the `plans` (one per stage) with their settings, and `facts` of yours, such as
    `{"data": corpus_hash(documents)}`. `push_to_hub` is a repository on the Hub, "owner/name", to which the folder is
    uploaded as it is, card and certificate too, once it is complete; a new repository is private.

    The certificate has a SHA-256 of each file, provenance, and

    - `drift`, with `batches`: by how much the logits of the saved weights differ from those of the model as it trained
      (dropout off), `max` and `mean` over `tokens` that are no padding; `largest_logit` says on which scale. All logits
      of all batches are held in memory.
    - `update`, with `base`, the model or folder from which training started: its norm before the cast, the norm of what
      the cast rounded away, and `survived`, 1 − rounded / norm, over all weights that train.
    """
    folder, batches = Path(folder), list(batches or ())
    check_new(folder)
    if push_to_hub is not None:  # what is refused there is refused before anything is computed
        HfApi().create_repo(push_to_hub, private=True, exist_ok=True)
    counts = trainable_table(model)[["trainable", "total"]].sum() if is_expanded(model) else None
    before = _logits(model, batches)
    update = None if base is None else _update(model, base, dtype)
    if is_expanded(model):
        fuse(model)
    if dtype is not None:
        for parameter in model.parameters():  # not model.to: rotary frequencies stay in float32, as in a loaded model
            parameter.data = parameter.data.to(dtype)
    drift = _drift(before, _logits(model, batches)) if batches else None
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        told = _told(counts, plans, drift, update) | dict(facts or {})
        _card(model, folder.name, model if base is None else base, told).save(temporary / "README.md")
        files = {name: file_hash(path) for name, path in _files(temporary).items()}
        dtype_name = str(model.dtype).removeprefix("torch.")
        certificate = {"format": _FORMAT, "model": type(model).__name__, "dtype": dtype_name, "files": files}
        certificate |= {"drift": drift, "update": update, "provenance": provenance()}
        write_json(certificate, temporary / CERTIFICATE)
    if push_to_hub is not None:
        HfApi().upload_folder(repo_id=push_to_hub, folder_path=folder, commit_message=f"Upload {folder.name}")
    return certificate


def verify_folder(folder: str | Path) -> pd.DataFrame:
    """Check a folder that `save_fused` wrote, one row per check: `check`, `file`, `passed`, `detail`.

    The certificate can be read; each file has its hash, and none is there beside them but hidden ones; all values are
    finite; the model loads with plain transformers, without missing, unexpected or mismatched keys. Nothing in the
    folder is executed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: need a folder that `save_fused` wrote")
    listed: Mapping[str, str] = {}
    try:
        files = read_hashes(folder / CERTIFICATE, _FORMAT)
        listed = files if any(name.endswith(".safetensors") for name in files) else {}
        fault = "" if listed else "need the hashes of the model's files"
    except (OSError, ValueError) as error:
        fault = f"need an object with format {_FORMAT} ({error})"
    rows = [("certificate", CERTIFICATE, fault)]
    for name, expected in listed.items():
        path = folder / name
        fault = "is missing" if not path.is_file() else "" if file_hash(path) == expected else "was changed"
        rows.append(("hash", name, fault))
    for name, path in _files(folder).items():
        if listed and name not in {*listed, CERTIFICATE}:
            rows.append(("hash", name, "is not in the certificate"))
        if path.suffix == ".safetensors":
            rows.append(("finite", name, _not_finite(path)))
    rows.append(("loads", "", _load_fault(folder)))
    table = pd.DataFrame(rows, columns=["check", "file", "detail"])
    table.insert(2, "passed", table["detail"] == "")
    return table


def _told(
    counts: pd.Series | None, plans: Sequence[ExpansionPlan], drift: dict | None, update: dict | None
) -> dict[str, str]:
    """What a card says of training and saving: only what is known."""
    told = {"method": "APEX"} if counts is not None or plans else {}
    if counts is not None:
        told["trained"] = f"{counts['trainable'] / counts['total']:.3g} of the parameters"
    for plan in plans:
        units = {role: sum(len(getattr(part, role)) for part in plan.layers) for role in ("source", "target", "direct")}
        told[f"stage {plan.stage}"] = ", ".join(f"{count} {role}" for role, count in units.items()) + " units"
        if plan.config is not None:
            own = {field.name: getattr(plan.config, field.name) for field in fields(plan.config)}
            own = {name: value for name, value in own.items() if value != getattr(ApexConfig, name)}
            told["settings"] = ", ".join(f"{name} {value}" for name, value in own.items()) or "the paper's"
    if update and update["survived"] is not None:
        told["update that survived rounding"] = f"{update['survived']:.4g}"
    if drift:
        told["logits moved by fusing and rounding"] = f"at most {drift['max']:.3g}, of {drift['largest_logit']:.3g}"
    return told


def _card(model: PreTrainedModel, name: str, base: PreTrainedModel | str | Path, told: Mapping[str, Any]) -> ModelCard:
    """The card of a fused model; a base that has no name on the Hub is no `base_model` there."""
    base = base.name_or_path if isinstance(base, PreTrainedModel) else str(base)
    hub = base if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not Path(base).exists() else None
    tags = ["apexlib", "apex"][: 1 + ("method" in told)]
    data = ModelCardData(base_model=hub, library_name="transformers", pipeline_tag="text-generation", tags=tags)
    rows = {"base": hub or Path(base).name or "not told", "model": type(model).__name__}
    rows |= {"parameters": f"{model.num_parameters():,}", "weights": str(model.dtype).removeprefix("torch.")} | told
    cells = {what: " ".join(str(value).split()).replace("|", "\\|") for what, value in rows.items()}
    return ModelCard.from_template(data, template_path=str(Path(__file__).with_name("card.md")), name=name, rows=cells)


def _files(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its name in it, without hidden ones, such as what Git or a download puts there."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in found.items() if not any(part[0] == "." for part in name.parts)}


def _logits(model: PreTrainedModel, batches: list[Mapping[str, Tensor]]) -> list[Tensor]:
    """Logits of all tokens that are no padding, of an expanded model as it computes them in training."""
    logits = []
    with in_evaluation(model):
        for module in model.modules():
            if isinstance(module, SplitProjection):
                module.train()
        for batch in batches:
            inputs = on_device(model, batch, labels=False)
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            logits.append(model(**inputs, use_cache=False).logits[mask].double().cpu())
    return logits


def _drift(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    old, new = torch.cat(before), torch.cat(after)
    difference = (new - old).abs()
    if not difference.isfinite().all():
        raise ValueError("logits are not finite before fusing and casting or after it; nothing was saved")
    sizes = {"max": difference.max().item(), "mean": difference.mean().item(), "largest_logit": old.abs().max().item()}
    return sizes | {"tokens": len(old)}


@torch.no_grad()
def _update(
    model: PreTrainedModel, base: PreTrainedModel | str | Path, dtype: torch.dtype | None
) -> dict[str, float | None]:
    if not isinstance(base, PreTrainedModel):
        base = pretrained(type(model), base, dtype="auto")
    updated = rounded = 0.0
    for name, weight, own in composed_weights(model):
        try:
            start = base.get_parameter(name).to(weight.device, weight.dtype)
        except AttributeError:
            raise ValueError(f"base: has no {name}; need the model from which training started") from None
        if start.shape != weight.shape:
            raise ValueError(f"base: {name} is {tuple(start.shape)} there, {tuple(weight.shape)} here")
        cast = weight.to(dtype or own).to(weight.dtype)
        updated += torch.linalg.vector_norm(weight - start, dtype=torch.float64).item() ** 2
        rounded += torch.linalg.vector_norm(weight - cast, dtype=torch.float64).item() ** 2
    survived = max(0.0, 1 - (rounded / updated) ** 0.5) if updated else None
    return {"norm": updated**0.5, "rounded": rounded**0.5, "survived": survived}


def _not_finite(path: Path) -> str:
    """Name the tensors of a safetensors file that hold NaN or infinite values."""
    try:
        with safe_open(path, framework="pt") as file:
            # as float64, for values of 8 bits have no `isfinite`
            bad = [name for name in file.keys() if not file.get_tensor(name).double().isfinite().all()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return f"cannot be read: {error}"
    return f"not finite: {', '.join(bad)}" if bad else ""


def _load_fault(folder: Path) -> str:
    try:
        config = pretrained(AutoConfig, folder)
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
            return f"architecture {config.architectures}: not in transformers"
        _, info = pretrained(cls, folder, output_loading_info=True, dtype="auto")
    except Exception as error:  # whatever a damaged folder makes a loader raise is the finding
        return f"{type(error).__name__}: {error}"
    faults = {name: keys for name, keys in info.items() if keys}
    return "; ".join(f"{name}: {sorted(map(str, keys))[:3]}" for name, keys in faults.items())
