"""What training changed, for the tools of others: a task vector to merge models with, a LoRA adapter to switch on.

Task vectors: Ilharco et al. 2023, arXiv:2212.04089. The best approximation of rank r is the truncated singular value
decomposition (Eckart & Young 1936); what APEX trains is no low-rank update, so the table says what is lost.
"""

from functools import partial
from math import isfinite
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apexlib.analysis.stored import Stored, check_versions, stored_weights, write_tensors
from apexlib.files import atomic_folder, atomic_write, check_new, pretrained, untrained
from apexlib.progress import progress

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PREFIX = "base_model.model."  # of each key of an adapter, by PEFT


def export_task_vector(
    base: str | Path, tuned: str | Path, file: str | Path, *, dtype: torch.dtype | None = torch.float32
) -> pd.DataFrame:
    """Write tuned − base of every weight of two folders to a safetensors file, with the keys of the weights.

    Differences are taken in float64 and rounded once, to `dtype`, or to that of each weight if None. Columns: `weight`;
    `norm` of the difference; `relative`, that over the norm of the base's; `rounded`, the share of the norm that
    rounding took. One weight is in memory at a time.
    """
    file = Path(file)
    if file.exists():
        raise FileExistsError(f"{file}: exists; need a new file")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype}: need one of {', '.join(map(str, _DTYPES))}, or None for the weights' own")
    rows = []

    def difference(name: str, old: Stored, new: Stored) -> Tensor:
        before, after = old.read(), new.read()
        exact = after.double() - before.double()
        kept = exact.to(dtype or after.dtype)
        norm, start, lost = (_norm(each) for each in (exact, before, kept.double() - exact))
        rows.append((name, norm, norm / start if start else float("nan"), lost / norm if norm else 0.0))
        return kept

    vector = {
        name: new._replace(dtype=_DTYPES[dtype] if dtype else new.dtype, read=partial(difference, name, old, new))
        for name, old, new in _pairs(base, tuned)
    }
    with atomic_write(file) as temporary:
        write_tensors(temporary, vector, {"format": "pt"})
    table = pd.DataFrame(rows, columns=["weight", "norm", "relative", "rounded"])
    return table.sort_values("weight", ignore_index=True)


def export_lora(
    base: str | Path, tuned: str | Path, folder: str | Path, *, rank: int, dtype: torch.dtype = torch.float32
) -> pd.DataFrame:
    """Write the update of two folders as a LoRA adapter of that rank, in PEFT's format, to a new folder.

    Each matrix that changed is approximated as well as its rank, at most `rank`, allows; tied ones get the same factors
    at both ends. What has no such form, norms and biases say, goes in whole. PEFT loads it on the base. Columns:
    `weight`, of those that changed; `kept`: "lora", "whole", or "left out" where the model has no module of that name,
    as for experts that are stacked on loading; `rank`; `norm` of the change; `error`, the share of that norm which is
    not in the adapter.
    """
    from peft import LoraConfig

    folder = Path(folder)
    check_new(folder)
    if rank < 1:
        raise ValueError(f"rank={rank}: need at least 1")
    model = _shell(base)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}  # of each module that is adapted
    after, rows, rest = stored_weights(tuned), [], []
    for name, old, new in progress(_pairs(base, tuned), "adapting"):
        update = new.read().double() - old.read().double()
        if not (norm := _norm(update)):
            continue
        if not isfinite(norm):
            raise ValueError(f"{name}: differs by {norm}; need finite weights")
        paths = [path.rpartition(".")[0] for path in _places(model, name) if path.endswith(".weight")]
        if not paths or not all(_adapts(model.get_submodule(path)) for path in paths):
            rest.append((name, norm))
            continue
        left, right = (factor.to(dtype) for factor in _factors(update, rank))
        for path in paths:
            state |= _named(model.get_submodule(path), path, left, right)
            ranks[path] = left.shape[1]
        error = _norm(update - left.double() @ right.double()) / norm
        rows.append((name, "lora", left.shape[1], norm, error))
    whole, biases = set(), {}
    for name, norm in rest:
        found = _places(model, name)
        path, _, leaf = found[0].rpartition(".") if found else ("", "", "")
        kept = "left out"
        if path in ranks and leaf == "bias":
            biases[f"{_PREFIX}{path}.base_layer.bias"], kept = after[name].read(), "whole"
        elif path and path not in ranks and not list(model.get_submodule(path).children()):
            own = dict(model.get_submodule(path).named_parameters())
            state |= {f"{_PREFIX}{path}.{each}": after[_stored_name(model, path, each, after)].read() for each in own}
            whole.add(path)
            kept = "whole"
        rows.append((name, kept, 0, norm, float(kept == "left out")))
    if not ranks:
        raise ValueError(f"{tuned}: no matrix of a linear or an embedding differs from {base}; nothing to adapt")
    lower = {path: own for path, own in sorted(ranks.items()) if own < rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=lower, alpha_pattern=lower, target_modules=sorted(ranks),
        modules_to_save=sorted(whole) or None, bias="all" if biases else "none", task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in ranks),
        base_model_name_or_path=str(base), inference_mode=True,
    )  # fmt: skip
    with atomic_folder(folder) as temporary:
        save_file(state | biases, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(temporary)
    return pd.DataFrame(rows, columns=["weight", "kept", "rank", "norm", "error"])


def _pairs(base: str | Path, tuned: str | Path) -> list[tuple[str, Stored, Stored]]:
    """Each weight by name, as it lies in both folders."""
    before, after = stored_weights(base), stored_weights(tuned)
    check_versions(before, after)
    for name, old in before.items():
        if old.shape != after[name].shape:
            raise ValueError(f"{name}: {old.shape} in base, {after[name].shape} in tuned; need equal shapes")
    return [(name, old, after[name]) for name, old in before.items()]


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()


def _shell(folder: str | Path) -> PreTrainedModel:
    """The modules of the model in a folder, without its weights."""
    config = pretrained(AutoConfig, folder)
    with torch.device("meta"):
        return untrained(AutoModelForCausalLM, config)


def _places(model: PreTrainedModel, name: str) -> list[str]:
    """Where in a model a stored weight goes; a tied one goes to several places."""
    named = dict(model.named_parameters(remove_duplicate=False))
    known = next((each for each in (name, f"{model.base_model_prefix}.{name}") if each in named), None)
    return [each for each, parameter in named.items() if known and parameter is named[known]]


def _stored_name(model: PreTrainedModel, path: str, leaf: str, stored: dict[str, Stored]) -> str:
    return next(name for name in stored if f"{path}.{leaf}" in _places(model, name))


def _adapts(module: nn.Module) -> bool:
    """Whether PEFT's LoRA does for a module what it does for its weight."""
    return isinstance(module, nn.Linear | Conv1D) or type(module) is nn.Embedding or hasattr(module, "embed_scale")


def _factors(update: Float[Tensor, "m n"], rank: int) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """The two factors of the best approximation of that rank, from the eigenvectors of the smaller Gram matrix."""
    if update.shape[0] < update.shape[1]:
        left, right = _factors(update.T, rank)
        return right.T.contiguous(), left.T.contiguous()
    update = update.to("cuda" if torch.cuda.is_available() else "cpu")
    basis = torch.linalg.eigh(update.T @ update).eigenvectors[:, -rank:].flip(1)
    return (update @ basis).cpu(), basis.T.contiguous().cpu()


def _named(module: nn.Module, path: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Both factors of an update left · right under the names that PEFT has for them."""
    if isinstance(module, nn.Embedding):
        names = {"lora_embedding_B": right.T, "lora_embedding_A": left.T}
    elif isinstance(module, Conv1D):  # whose weight is inputs × outputs
        names = {"lora_B.weight": right.T, "lora_A.weight": left.T}
    else:
        names = {"lora_B.weight": left, "lora_A.weight": right}
    return {f"{_PREFIX}{path}.{name}": factor.clone().contiguous() for name, factor in names.items()}
