"""The weight matrices of a model in memory or of a folder with safetensors files, to be read one at a time."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from apexlib.expansion import is_expanded

Model = nn.Module | str | Path  # in memory, or a folder with safetensors files


def matrices(source: Model, device: str | torch.device | None = None) -> dict[str, Callable[[], Tensor]]:
    """What reads each matrix of a model or folder to `device`, by name; before that only headers of files are read.

    A tensor of three dimensions, such as the experts of a layer, is a stack of matrices and gives `name[0]`, `name[1]`,
    …, unless they would be vectors; anything else is left out. The default device is a GPU if there is one.

    >>> {name: tuple(read().shape) for name, read in matrices(nn.Linear(4, 3)).items()}
    {'weight': (3, 4)}
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(source, nn.Module):
        tensors = _of_folder(Path(source))
    elif is_expanded(source):
        raise ValueError("the model is expanded: its weights lie in parts; need fuse(model) first")
    else:
        tensors = {name: (tensor.shape, tensor.detach().__getitem__) for name, tensor in source.named_parameters()}
    weights: dict[str, Callable[[], Tensor]] = {}
    for name, (shape, read) in tensors.items():
        if len(shape) == 2 and min(shape):
            weights[name] = lambda read=read: read(...).to(device)
        elif len(shape) == 3 and min(shape[1:]) > 1:
            for index in range(shape[0]):
                weights[f"{name}[{index}]"] = lambda read=read, index=index: read(index).to(device)
    if not weights:
        raise ValueError(f"{source if isinstance(source, str | Path) else type(source).__name__} has no weight matrix")
    return weights


def _of_folder(folder: Path) -> dict[str, tuple[Sequence[int], Callable[[object], Tensor]]]:
    """The shape of each tensor by name, and what reads a part of it."""
    tensors = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = file.get_slice(name).get_shape(), partial(_read, path, name)
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None

    def natural(name: str) -> list[tuple[int, str]]:  # layer 10 comes after layer 2
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    return {name: tensors[name] for name in sorted(tensors, key=natural)}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or all."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: need a folder with safetensors files")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (paths := sorted(folder.glob("*.safetensors"))):
            raise FileNotFoundError(f"{folder} has no safetensors file; weights of another format are not read")
        return paths
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: need JSON with a weight_map ({type(error).__name__}: {error})") from None
    if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index}: {bad[0]!r} is no file of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: {missing[0]} is missing, which the index names")
    return [folder / name for name in names]


def _read(path: Path, name: str, part: object) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name)[part]
