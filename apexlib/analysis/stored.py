"""Safetensors files of a model, read and written one tensor at a time."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apexlib.files import read_object


class Stored(NamedTuple):
    """A tensor that is read or made when it is asked for; `dtype` as safetensors calls it."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[..., Tensor]  # given an index, that part of it
    path: Path | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        bits = re.search(r"\d+", self.dtype)
        return max(1, int(bits[0]) // 8) if bits else 1  # BOOL

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize


def stored_weights(folder: str | Path) -> dict[str, Stored]:
    """What is in the safetensors files of a folder, by name, layer 2 before layer 10; only headers are read."""
    weights: dict[str, Stored] = {}
    for path in weight_files(Path(folder)):
        own, _ = stored(path)
        if twice := sorted(weights.keys() & own.keys()):
            raise ValueError(f"{folder}: {twice[0]} lies in {weights[twice[0]].path.name} and in {path.name}")
        weights |= own
    natural = {name: [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")] for name in weights}
    return {name: weights[name] for name in sorted(weights, key=natural.get)}


def stored(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                tensors[name] = Stored(part.get_dtype(), tuple(part.get_shape()), partial(_read, path, name), path)
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: Path, name: str, part: object = ...) -> Tensor:
    with safe_open(path, framework="pt") as file:  # anew each time: what is mapped of an open one stays in memory
        return file.get_tensor(name) if part is ... else file.get_slice(name)[part]


def write_tensors(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file while only one of its tensors is in memory."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so each is aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            entries = content(tensors[name].read())
            if entries.nbytes != tensors[name].nbytes:
                raise ValueError(f"{name}: {entries.nbytes} bytes of {tensors[name].dtype}; need whole bytes an entry")
            file.write(entries)


def content(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def check_versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse weights, by name, that are not of two versions of one model."""
    if different := sorted(before.keys() ^ after.keys()):
        here, there = ("base", "tuned") if different[0] in before else ("tuned", "base")
        raise ValueError(f"{different[0]} is in {here}, not in {there}: need two versions of one model")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or all."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: need a folder with safetensors files")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (paths := sorted(folder.glob("*.safetensors"))):
            raise FileNotFoundError(f"{folder} has no safetensors file; weights of another format are not read")
        return paths
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: need JSON with a weight_map ({type(error).__name__}: {error})") from None
    if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index}: {bad[0]!r} is no file of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: {missing[0]} is missing, which the index names")
    return [folder / name for name in names]
