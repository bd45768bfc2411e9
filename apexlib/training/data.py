"""The data of a run: prepared once, by the Trainer that is to train, checked, and read in the run's own order."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from apexlib.text.datasets import IGNORED, PackedTokens

_NOT_TAKEN = {
    "optimizers": "an optimizer made for the plain model knows no rows; give optimizer_cls_and_kwargs",
    "model_init": "a run trains the model that it is given",
    "peft_config": "adapters are method='lora'",
}


def prepare(
    kind: type[Trainer], model: PreTrainedModel, args: TrainingArguments, train: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], Callable]:
    """Let a Trainer prepare data as it would for itself: the training set, options of a stage, a collator for batches.

    What TRL's Trainers tokenise, pack and truncate, they do here, once. The collator drops what the model does not
    take, and is for batches outside a stage, where Trainers have their own.
    """
    if refused := [name for name in _NOT_TAKEN if options.get(name) is not None]:
        raise ValueError(f"{refused[0]}: {_NOT_TAKEN[refused[0]]}")
    made = (options.get("optimizer_cls_and_kwargs") or (Optimizer,))[0]
    if not isinstance(made, type) or not issubclass(made, Optimizer):
        raise ValueError(f"optimizer_cls_and_kwargs: need a class of torch.optim.Optimizer, got {made!r}")
    trainer = kind(model=model, args=args, train_dataset=train, **{**options, "callbacks": None})
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    return trainer.train_dataset, {**options, "eval_dataset": trainer.eval_dataset}, collate


class Streamed(Dataset):
    """The first `size` examples of an iterable data set by their number; it starts again where it ends, as in training.

    It is read forwards, and from its start where an earlier example is asked for: it has to give the same each time.
    """

    def __init__(self, source: IterableDataset, size: int) -> None:
        self.source, self.size, self._read = source, size, math.inf  # it has no place yet, so it starts when asked

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Any:
        if row < self._read - 1:
            self._waiting, self._read = iter(self.source), 0
        while self._read <= row:
            try:
                self._last = next(self._waiting)
            except StopIteration:
                self._waiting = iter(self.source)
                self._last = next(self._waiting)
            self._read += 1
        return self._last


def check_data(train: Dataset, evaluation: Any, order: Sequence[int], per_step: int) -> dict[str, str | int]:
    """Read every example once and hash them; examples in training and evaluation, and silent steps, are refused.

    A step is silent where no token has a label. Of a stream the first step is read, of an iterable evaluation nothing.
    """
    if isinstance(train, Streamed):
        return {"examples": len(train), "first step": _read(Subset(train, range(per_step)), "train_dataset")[0]}
    whole, tokens, silent = _read(train, "train_dataset")
    for start in range(0, len(order) if silent else 0, per_step):
        if silent.issuperset(order[start : start + per_step]):
            what = f"no label of step {start // per_step + 1} is anything but −100"
            raise ValueError(f"train_dataset: {what}; {len(silent)} of {len(train)} examples have none")
    hashes, seen = {"examples": len(train), "train": whole}, set()
    sets = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    for name, held_out in sets.items():
        if not hasattr(held_out, "__len__") or not len(held_out):
            continue
        called, seen = f"eval_dataset {name}".strip(), seen or set(tokens)
        hashes[f"evaluation {name}".strip()], theirs, silent = _read(held_out, called)
        if shared := sum(tokens in seen for tokens in theirs):
            raise ValueError(f"{called}: {shared} of its {len(held_out)} examples are in the training data too")
        if len(silent) == len(held_out):
            raise ValueError(f"{called}: no label of its {len(held_out)} examples is anything but −100")
    return hashes


def _read(dataset: Dataset, name: str) -> tuple[str, Iterable[bytes], set[int]]:
    """Read a data set once: a hash of all, of each example's tokens, and rows without a label."""
    whole, tokens, silent = blake2b(digest_size=16), [], set()
    if type(dataset) is PackedTokens:  # one array whose tokens all train: a corpus of a gigabyte in a second
        blocks = dataset.blocks
        whole.update(repr(blocks.shape).encode())
        for start in range(0, len(blocks), 4096):
            whole.update(np.ascontiguousarray(blocks[start : start + 4096], dtype=np.int32))
        return whole.hexdigest(), map(_digest, blocks), silent
    for row in range(len(dataset)):
        item = dataset[row]
        ids = sorted(key for key in item if key.endswith("_ids"))  # those of preferences are several
        if not ids:
            found = ", ".join(map(str, item))
            raise ValueError(f"{name}: example {row} has no input_ids but {found}: need it tokenised")
        if not any(len(item[key]) for key in ids):
            raise ValueError(f"{name}: example {row} has no tokens")
        for key in sorted(item):
            value = np.asarray(item[key])
            whole.update(f"{key} {value.dtype}{value.shape}".encode())
            whole.update(repr(item[key]).encode() if value.dtype == object else value.tobytes())
        tokens.append(_digest(np.concatenate([np.asarray(item[key], dtype=np.int64).ravel() for key in ids])))
        labels = item.get("labels")
        if labels is not None and not (np.asarray(labels)[1:] != IGNORED).any():  # the first predicts nothing
            silent.add(row)
    return whole.hexdigest(), tokens, silent


def _digest(tokens: Any) -> bytes:
    return blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()
