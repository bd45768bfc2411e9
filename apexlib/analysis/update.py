"""What training changed, to the bit: a file of the rows and columns that differ makes the tuned folder of the base.

APEX leaves most rows of most matrices as they are (arXiv:2505.24241), so the file is as much smaller than a checkpoint
as less was trained. Bits are compared and kept, never values. One weight is in memory at a time.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor

from apexlib.analysis.stored import Stored, content, stored, stored_weights, write_tensors
from apexlib.files import atomic_folder, atomic_write, check_new, content_hash, write_json
from apexlib.progress import progress

Kept = Literal["same", "rows", "columns", "whole", "dropped"]

_FORMAT = "apexlib update 1"
_CARRIED = ("config.json", "generation_config.json")  # of the tuned model, as text beside the weights
_NOT_OF_BASE = ("README.md", "certificate.json")  # they speak of its weights
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
_AXES = {"rows": 0, "columns": 1}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


def export_update(base: str | Path, tuned: str | Path, file: str | Path) -> pd.DataFrame:
    """Write to `file` what makes the weights in the folder `tuned` of those in `base`; return what is kept of each.

    Columns: `weight`; `kept`: "rows" or "columns", whichever takes less, "whole" where neither is smaller or dtype or
    shape is another, "same" for nothing, "dropped" for what is in `base` only; `changed` rows or columns `of` all;
    `bytes` in the update, and in the `full` checkpoint: `table["bytes"].sum() / table["full"].sum()` is what it saves.

    The file is safetensors, with the SHA-256 of both folders' weights (however they are sharded) and the tuned model's
    configuration; a tokenizer is not in it. Both folders are only read.
    """
    file, folders = Path(file), (Path(base), Path(tuned))
    if file.exists():
        raise FileExistsError(f"{file}: exists; need a new file")
    if file.resolve().parent in [folder.resolve() for folder in folders]:
        raise ValueError(f"{file}: lies among the weights of a model; need another folder")
    before, after = map(stored_weights, folders)
    digests: tuple[dict[str, str], dict[str, str]] = ({}, {})
    parts, rows = {}, []
    for name in progress(sorted(before.keys() | after.keys()), "comparing"):
        old, new = (weights[name].read() if name in weights else None for weights in (before, after))
        for weights, tensor, found in zip((before, after), (old, new), digests, strict=True):
            if tensor is not None:
                found[name] = _digest(weights[name], tensor)
        kept, index = ("dropped", None) if new is None else _difference(old, new)
        shape = torch.Size((0, 0)) if new is None else _bits(new).shape
        of = shape[kept == "columns"]
        changed = len(index) if index is not None else of * (kept == "whole")
        own = {} if kept in ("same", "dropped") else _parts(name, after[name], kept, index, shape)
        size = sum(part.nbytes for part in own.values())
        rows.append((name, kept, changed, of, size, after[name].nbytes if name in after else 0))
        parts |= own
    carried = {name: (folders[1] / name).read_text("utf-8") for name in _CARRIED if (folders[1] / name).is_file()}
    said = {"format": _FORMAT, "base": content_hash(digests[0]), "tuned": content_hash(digests[1])}
    said |= {"files": json.dumps(carried), "files_sha256": content_hash(carried)}
    said |= {"dropped": json.dumps(sorted(before.keys() - after.keys()))}
    with atomic_write(file) as temporary:
        write_tensors(temporary, parts, said)
    return pd.DataFrame(rows, columns=["weight", "kept", "changed", "of", "bytes", "full"])


def apply_update(base: str | Path, file: str | Path, folder: str | Path) -> Path:
    """Make the tuned model of the folder `base` and an update, in a new folder: its weights bit for bit.

    Weights are sharded as in `base`; the configuration is the tuned model's, all else, such as a tokenizer, that of
    `base`. Raises ValueError for another base, or a file that was damaged; `base` and `file` are only read, and the
    folder appears whole or not at all.
    """
    base, file, folder = Path(base), Path(file), Path(folder)
    check_new(folder)
    try:
        update, said = stored(file)
        if said.get("format") != _FORMAT:
            raise ValueError(f"{file}: need a file that `export_update` wrote")
        carried, dropped = json.loads(said["files"]), set(json.loads(said["dropped"]))
        kept = {name: kind for kind, _, name in (key.partition(":") for key in update) if kind != "index"}
        weights = stored_weights(base)
        asked = {name: _digest(stored, stored.read()) for name, stored in progress(weights.items(), "checking")}
        if (found := content_hash(asked)) != said["base"]:
            need = f"need the weights of which {file} was made, {said['base'][:16]}…"
            raise ValueError(f"{base}: another base, its weights have the SHA-256 {found[:16]}…; {need}")
        names = sorted(weights.keys() - dropped | kept.keys())
        tuned = {name: _tuned(update, name, kept.get(name), weights.get(name)) for name in names}
        with atomic_folder(folder) as temporary:
            digests = _write_shards(temporary, tuned, sorted({stored.path.name for stored in weights.values()}))
            if content_hash(digests) != said["tuned"] or content_hash(carried) != said["files_sha256"]:
                raise ValueError(f"{file}: was damaged, what it makes has another SHA-256")
            _copy_rest(base, temporary)
            for name in carried.keys() & {*_CARRIED}:
                (temporary / name).write_text(carried[name], encoding="utf-8")
    except (json.JSONDecodeError, SafetensorError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{file}: was damaged, {type(error).__name__}: {told}") from None
    return folder


def _digest(stored: Stored, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{stored.dtype} {list(stored.shape)}\n".encode())
    digest.update(content(tensor))
    return digest.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as a matrix of integers: its last axis makes the columns, a vector has one."""
    bits = tensor.contiguous().view(_INTEGERS[tensor.itemsize]) if tensor.dim() else _bits(tensor[None])
    return bits.flatten(0, -2) if bits.dim() > 1 else bits[:, None]


def _difference(old: Tensor | None, new: Tensor) -> tuple[Kept, Tensor | None]:
    """Which form of what differs takes least, and which rows or columns it has."""
    if old is None or old.dtype != new.dtype or old.shape != new.shape:
        return "whole", None
    moved = _bits(old) != _bits(new)
    if not moved.any():
        return "same", None
    sizes: dict[Kept, int] = {"whole": new.nbytes}
    lines: dict[Kept, Tensor] = {"rows": moved.any(1).nonzero()[:, 0], "columns": moved.any(0).nonzero()[:, 0]}
    for (kept, index), length in zip(lines.items(), reversed(moved.shape), strict=True):
        sizes[kept] = len(index) * (length * new.itemsize + 8)
    least = min(sizes, key=sizes.get)
    return least, lines.get(least)


def _parts(name: str, stored: Stored, kept: Kept, index: Tensor | None, shape: torch.Size) -> dict[str, Stored]:
    """The tensors of an update that tell of one weight, a matrix of that shape."""
    if index is None:
        return {f"whole:{name}": stored}
    axis = _AXES[kept]

    def lines() -> Tensor:
        tensor = stored.read()
        return _bits(tensor).index_select(axis, index).view(tensor.dtype)

    size = (len(index), shape[1]) if kept == "rows" else (shape[0], len(index))
    places = Stored("I64", (len(index),), lambda: index)
    return {f"{kept}:{name}": Stored(stored.dtype, size, lines), f"index:{name}": places}


def _tuned(update: Mapping[str, Stored], name: str, kept: str | None, stored: Stored | None) -> Stored:
    """A weight of the tuned model: the base's, with what the update has of it."""
    if kept == "whole":
        return update[f"whole:{name}"]._replace(path=stored.path if stored else None)
    if stored is None:
        raise KeyError(name)

    def read() -> Tensor:
        tensor = stored.read().clone()
        if kept is not None:
            index, lines = (update[f"{what}:{name}"].read() for what in ("index", kept))
            _bits(tensor).index_copy_(_AXES[kept], index, lines.view(_INTEGERS[lines.itemsize]))
        return tensor

    return stored._replace(read=read)


def _write_shards(folder: Path, tensors: Mapping[str, Stored], files: list[str]) -> dict[str, str]:
    """Write each weight to the file that it has in the base, a new one to the last; return the hash of each."""
    digests: dict[str, str] = {}

    def hashed(name: str) -> Tensor:
        tensor = tensors[name].read()
        digests[name] = _digest(tensors[name], tensor)
        return tensor

    places = {name: stored.path.name if stored.path else files[-1] for name, stored in tensors.items()}
    for file in progress(files, "writing"):
        own = {name: tensors[name]._replace(read=partial(hashed, name)) for name in tensors if places[name] == file}
        write_tensors(folder / file, own, {"format": "pt"})
    if len(files) > 1:
        size = {"total_size": sum(stored.nbytes for stored in tensors.values())}
        write_json({"metadata": size, "weight_map": places}, folder / "model.safetensors.index.json")
    return digests


def _copy_rest(base: Path, folder: Path) -> None:
    """Copy what is no weight and does not speak of weights."""
    for path in base.iterdir():
        if path.is_file() and path.name not in _NOT_OF_BASE and not path.name.startswith("."):
            if not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":  # of a tokenizer
            shutil.copytree(path, folder / path.name)
