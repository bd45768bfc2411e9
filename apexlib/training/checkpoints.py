"""The state of a run on disk: folders that appear whole, with a manifest of their hashes; tensors and JSON, no pickle.

A run's folder holds `run.json`, what the run is made of; `stage-s`, the plain model that stage s left; `step-s-n`, the
state n steps into stage s, from which a run that ended there goes on; and, where they are asked for, `step-00040` and
the like, the plain model after so many steps of the run, or `best`, that of the best evaluation. A stage that ends with
a step that is kept is not saved twice: its folder holds the rest.
"""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from apexlib.files import atomic_folder, clear_partial, file_hash, read_hashes, read_object, remove_folder, write_json
from apexlib.provenance import provenance
from apexlib.training.sharding import share_out

MANIFEST, RUN, BEST = "manifest.json", "run.json", "best"
_FORMAT = 1
_STATE = re.compile(r"stage-(?P<done>\d{1,9})|step-(?P<stage>\d{1,9})-(?P<step>\d{1,9})")
_SHARED = ("state.parameters.", "state.optimizer.")  # what a state has once, not for each process
_CHECKPOINT = re.compile(r"step-\d{5,9}")

_log = logging.getLogger(__name__)


def fault(folder: Path) -> str:
    """Say what is wrong with a folder that `RunFolder.complete` wrote; "" if it is whole and unchanged."""
    if not (folder / MANIFEST).is_file():
        return f"has no {MANIFEST}"
    try:
        files = read_hashes(folder / MANIFEST, _FORMAT)
    except (OSError, ValueError) as error:
        return str(error)
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_hash(folder / name) != expected:
            return f"{name} was changed"
    return "" if files else f"{MANIFEST} names no file"


def position(folder: Path) -> tuple[int, int, int]:
    """Tell from the name of a state the stage to go on in, whether it has begun (0 or 1), and how many steps are done.

    >>> position(Path("stage-1")), position(Path("step-2-30"))
    ((2, 0, 0), (2, 1, 30))
    """
    found = _STATE.fullmatch(folder.name)
    return (int(found["done"]) + 1, 0, 0) if found["done"] else (int(found["stage"]), 1, int(found["step"]))


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Name the folder of the plain model after `step` steps of the run in `folder`: `folder/step-00040` of 40."""
    return Path(folder) / f"step-{step:05d}"


def stage_borders(steps: int, stages: int) -> list[int]:
    """Count the steps of a run before each of its stages, and in all.

    >>> stage_borders(7, 3)
    [0, 2, 5, 7]
    """
    return [round(steps * stage / stages) for stage in range(stages + 1)]


class RunFolder:
    """The folder of one run: refuses another run's, finds where to go on, keeps the last few steps.

    `borders` are the steps of the run before each stage, and in all; `kept` those after which a plain model is kept.
    """

    def __init__(self, path: Path, borders: Sequence[int] = (), kept: Collection[int] = ()) -> None:
        self.path, self.borders, self.kept, self.progress = path, borders, kept, Progress()

    def begin(self, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
        """Return the newest complete folder to go on from, None to start; only one process may do this at a time."""
        clear_partial(self.path)
        if overwrite:
            (self.path / RUN).unlink(missing_ok=True)
            for folder in [*self._found(), *self._named(_CHECKPOINT), *self.path.glob(BEST)]:
                remove_folder(folder)
        if not self._found() and not (self.path / RUN).exists():
            write_json({"format": _FORMAT, "identity": identity, "provenance": provenance()}, self.path / RUN)
            return None
        if not resume:
            ways = "continue it (resume=True), replace it (overwrite=True) or choose another output_dir"
            raise FileExistsError(f"{self.path}: holds a run already; {ways}")
        self._compare(identity)
        return self.newest()

    def newest(self) -> Path | None:
        """Return the newest state that is complete, and builds on a model that is."""
        for folder in self._found():
            stage, why = position(folder)[0], fault(folder)
            base = self.model(stage - 1) if stage else folder  # the plain model that it builds on
            if not why and base != folder and (found_there := fault(base)):
                why = f"{base.name} {found_there}"
            if not why:
                return folder
            _log.warning("%s: passed over, %s", folder, why)
        return None

    @contextmanager
    def complete(self, folder: Path) -> Iterator[Path]:
        """Yield a temporary folder; on success add the manifest of its files and put it in place of `folder`.

        Raises FileNotFoundError if the run's own folder was removed, OSError where something cannot be written.
        """
        if not (self.path / RUN).is_file():
            raise FileNotFoundError(f"{self.path}: removed while its run is under way; nothing can be saved there")
        try:
            with atomic_folder(folder, replace=True) as temporary:
                yield temporary
                files = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
                write_json({"format": _FORMAT, "files": files}, temporary / MANIFEST)
        except Exception as error:  # torch, pyarrow and safetensors each have their own for a full disk
            raise OSError(f"{folder}: not saved, {error}; what was saved before is complete, to be resumed") from error

    def stage(self, stage: int) -> Path:
        """Name the folder of a finished stage."""
        return self.path / f"stage-{stage}"

    def model(self, stage: int) -> Path:
        """Name the folder of the plain model that a finished stage left."""
        own = self.stage(stage)
        return own if (own / "config.json").exists() else checkpoint_folder(self.path, self.borders[stage + 1])

    def step(self, stage: int, step: int) -> Path:
        """Name the folder of the state `step` steps into a stage."""
        return self.path / f"step-{stage}-{step}"

    def forget_steps(self, keep: int = 0) -> None:
        """Remove the states inside stages but the newest `keep`."""
        steps = [folder for folder in self._found() if position(folder)[1]]
        for folder in steps[keep:]:
            remove_folder(folder)

    def _found(self) -> list[Path]:
        """Every state, the newest first."""
        return sorted(self._named(_STATE), key=position, reverse=True)

    def _named(self, pattern: re.Pattern) -> list[Path]:
        return [path for path in self.path.glob("st*-*") if path.is_dir() and pattern.fullmatch(path.name)]

    def _compare(self, identity: Mapping[str, Any]) -> None:
        try:
            run = read_object(self.path / RUN)
        except OSError:
            raise ValueError(f"{self.path}: has stages but no {RUN}; need overwrite=True or another folder") from None
        if run.get("format") != _FORMAT or not isinstance(run.get("identity"), dict):
            raise ValueError(f"{self.path / RUN}: need format {_FORMAT} with an identity, got {run.get('format')!r}")
        both = (run["identity"], json.loads(json.dumps(identity)))
        then, now = (pd.json_normalize(facts).to_dict("records")[0] for facts in both)
        pairs = {key: (then.get(key), now.get(key)) for key in now | then}
        if changed := [f"{key} was {before}, is {after}" for key, (before, after) in pairs.items() if before != after]:
            raise ValueError(f"{self.path}: cannot resume another run: {'; '.join(changed[:5])}")
        old, new = (facts.get("versions", {}) for facts in (run.get("provenance", {}), provenance()))
        if old != new:
            _log.warning("%s: begun with %s, resumed with %s; bits may differ", self.path, old, new)


@dataclass
class Progress:
    """What a run has behind it, weights aside."""

    histories: list[list[dict[str, float]]] = field(default_factory=list)  # of the Trainer, one a stage
    trainable: list[dict[str, float]] = field(default_factory=list)  # one a stage
    seconds: list[float] = field(default_factory=list)  # of every optimizer step
    ended: bool = False  # before its last step, as a callback wanted it
    tokens: int = 0  # read so far, where `include_num_input_tokens_seen` asks for them
    best: float | None = None  # metric of an evaluation so far, where one is named
    assessed: list[pd.DataFrame] = field(default_factory=list)  # the statistics behind each plan

    def save(self, folder: Path) -> None:
        numbers = {name: value for name, value in vars(self).items() if name != "assessed"}
        (folder / "progress.json").write_text(json.dumps(numbers), encoding="utf-8")
        if self.assessed:
            tables = [table.assign(stage=stage) for stage, table in enumerate(self.assessed)]
            pd.concat(tables).to_parquet(folder / "assessed.parquet", index=False)

    @classmethod
    def read(cls, folder: Path) -> Self:
        progress = cls(**read_object(folder / "progress.json"))
        if (folder / "assessed.parquet").exists():
            for _, table in pd.read_parquet(folder / "assessed.parquet").groupby("stage", sort=True):
                progress.assessed.append(table.drop(columns="stage").reset_index(drop=True))
        return progress


def write_state(value: Any, folder: Path) -> None:
    """Write nested dicts, lists, numbers, text and tensors to `state.json` and `state.safetensors`."""
    tensors: dict[str, Tensor] = {}
    (folder / "state.json").write_text(json.dumps(_pack(value, tensors, "state")), encoding="utf-8")
    save_file(tensors, folder / "state.safetensors")


def read_state(folder: Path, *, hollow: bool = False) -> Any:
    """Read what `write_state` wrote; nothing in the files is executed.

    Where `hollow`, matrices and vectors of parameters and of the optimizer are not read, and come up with no values.
    """

    def unpack(packed: dict[str, Any]) -> Any:
        ((kind, content),) = packed.items()
        return {"tensor": tensors.__getitem__, "pairs": dict, "list": list, "tuple": tuple}[kind](content)

    try:
        tensors = _hollow_file(folder / "state.safetensors") if hollow else load_file(folder / "state.safetensors")
        return json.loads((folder / "state.json").read_text(encoding="utf-8"), object_hook=unpack)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}: no state of a run ({type(error).__name__}: {error})") from None


def _hollow_file(path: Path) -> dict[str, Tensor]:
    """Read a state's tensors, but leave out the values of those that the first process shares out."""
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        left_out = {name for name, shape in shapes.items() if shape and name.startswith(_SHARED)}
        return {
            name: torch.empty(shape) if name in left_out else file.get_tensor(name) for name, shape in shapes.items()
        }


def load_trained(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Load what trains, from a state, into a module that trains the same."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if name not in parameters or parameters[name].shape != parameter.shape:
                raise ValueError(f"the state has no {name} of shape {tuple(parameter.shape)}; need one of the same run")
            parameter.data.copy_(share_out(parameters[name], parameter))


def save_plain(model: PreTrainedModel, processing_class: Any, folder: Path) -> None:
    """Save a plain model and, if it can be saved, its tokenizer."""
    model.save_pretrained(folder)
    if hasattr(processing_class, "save_pretrained"):
        processing_class.save_pretrained(folder)


def _pack(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _pack(item, tensors, f"{path}.{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, tensors, f"{path}.{index}") for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    need = "tensors, numbers, text and their collections"
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved; need {need}")
