"""What of a run is refused before it starts, what names it, and what is checked while it trains and after."""

import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from apexlib.text.datasets import IGNORED, PackedTokens
from apexlib.training.methods import Method

_BY_STEP = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
_DECISIVE = (  # arguments that the bits of a run depend on
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "gradient_checkpointing", "label_smoothing_factor", "neftune_noise_alpha"),
    *("average_tokens_across_devices", "dataloader_drop_last"),
)
_CHUNK = 1 << 22  # values hashed at once


def decisive_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that the bits of a run depend on."""
    arguments = {name: getattr(args, name, None) for name in _DECISIVE}
    return {name: getattr(value, "value", value) for name, value in arguments.items()}


def check_run(
    args: TrainingArguments, method: Method, stages: int, steps: int, per_step: int, examples: int, kept: Iterable[int]
) -> None:
    """Refuse a run that cannot be done as it is asked for; `kept`: the steps after which a plain model is kept."""
    if examples < per_step:
        raise ValueError(f"train_dataset: {examples} examples, fewer than the {per_step} of one step")
    if steps < stages:
        raise ValueError(f"{steps} steps for {stages} stages: need at least one step a stage (data set of {examples})")
    if outside := sorted(step for step in kept if not 0 <= step <= steps):
        raise ValueError(f"checkpoints {outside}: need steps from 0 to {steps}")
    if kept and not method.plain:
        raise ValueError(f"checkpoints: the model of {type(method).__name__} is not plain while it trains; need none")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule not in _BY_STEP:
        known = ", ".join(_BY_STEP)
        raise ValueError(f"lr_scheduler_type {schedule!r}: need one that depends on the step alone: {known}")
    if args.deepspeed or args.fsdp:
        raise ValueError("DeepSpeed and FSDP shard weights, which expansion needs whole; use DDP or one process")
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if method.config.balance_weight and args.gradient_checkpointing and reentrant:
        raise ValueError("balance_weight > 0: need gradient checkpointing without reentry, use_reentrant=False")


def check_data(train: Dataset, evaluation: Dataset | None, order: Sequence[int], per_step: int) -> dict[str, str | int]:
    """Read every example of both sets once and hash them; examples in both, and steps without a label, are refused."""
    evaluated = evaluation is not None and len(evaluation) > 0
    whole, tokens, silent = _read(train, "train_dataset", compare=evaluated)
    for step, start in enumerate(range(0, len(order) if silent else 0, per_step), 1):
        if silent.issuperset(order[start : start + per_step]):
            none = f"{len(silent)} of {len(train)} examples have none"
            raise ValueError(f"train_dataset: no label of step {step} is anything but −100; {none}")
    hashes = {"examples": len(train), "train": whole}
    if not evaluated:
        return hashes
    (hashes["evaluation"], held_out, silent), seen = _read(evaluation, "eval_dataset", compare=True), set(tokens)
    if shared := sum(tokens in seen for tokens in held_out):
        raise ValueError(f"eval_dataset: {shared} of its {len(evaluation)} examples are in the training data too")
    if len(silent) == len(evaluation):
        raise ValueError(f"eval_dataset: no label of its {len(evaluation)} examples is anything but −100")
    return hashes


def _read(dataset: Dataset, name: str, *, compare: bool) -> tuple[str, list[bytes], set[int]]:
    """Read a data set once: a hash of all, of each example's tokens, to `compare` them, and rows without a label."""
    whole, tokens, silent = blake2b(digest_size=16), [], set()
    if type(dataset) is PackedTokens:  # one array whose tokens all train: a corpus of a gigabyte in a second
        blocks = dataset.blocks
        whole.update(repr(blocks.shape).encode())
        rows = max(1, _CHUNK // blocks.shape[1])
        for start in range(0, len(blocks), rows):
            whole.update(np.ascontiguousarray(blocks[start : start + rows], dtype=np.int32))
        return whole.hexdigest(), [_digest(block) for block in blocks] if compare else [], silent
    for row in range(len(dataset)):
        item = dataset[row]
        if "input_ids" not in item:
            found = ", ".join(map(str, item))
            raise ValueError(f"{name}: example {row} has no input_ids but {found}: need it tokenised")
        for key in sorted(item):
            value = np.asarray(item[key])
            whole.update(f"{key} {value.dtype}{value.shape}".encode())
            whole.update(repr(item[key]).encode() if value.dtype == object else value.tobytes())
        if compare:
            tokens.append(_digest(item["input_ids"]))
        labels = item.get("labels")
        if labels is not None and not (np.asarray(labels)[1:] != IGNORED).any():  # the first predicts nothing
            silent.add(row)
    return whole.hexdigest(), tokens, silent


def _digest(tokens: Any) -> bytes:
    return blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first tensor that holds NaN or an infinite value; one synchronisation with the device for all.

    >>> first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, math.nan])), ("c", torch.ones(1))])
    'b'
    """
    filled = ((name, tensor.detach()) for name, tensor in tensors if tensor.numel())
    found = [(name, torch.linalg.vector_norm(tensor, math.inf).isfinite()) for name, tensor in filled]
    if not found or torch.stack([finite.to(found[0][1].device) for _, finite in found]).all():
        return None
    return next(name for name, finite in found if not finite)


def why_not_finite(model: nn.Module, inputs: Mapping[str, Any], loss: Tensor) -> str:
    """Say why a loss is not finite, as far as it can be seen."""
    labels = inputs.get("labels")
    if labels is not None and not (labels[:, 1:] != IGNORED).any():
        return "no label of the batch is anything but −100"
    name = first_not_finite(model.named_parameters())
    return f"{name} is not finite" if name else f"the loss is {loss.item()}"


def fingerprints(model: nn.Module) -> dict[str, tuple[bool, int]]:
    """Tell whether each parameter trains, and a hash of its bits, taken where it lies."""
    return {name: (p.requires_grad, _bits_hash(p.detach())) for name, p in model.named_parameters()}


def check_movement(
    model: nn.Module, before: Mapping[str, tuple[bool, int]], optimizer: torch.optim.Optimizer, stage: int
) -> None:
    """Compare the model with its fingerprints `before` the stage: what trains has moved, and nothing else."""
    after = fingerprints(model)
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized]
    whole = {name: name.partition(".operator.")[0] for name in before}  # a factor of M waits for the other
    mobile = {whole[name] for name, (_, bits) in before.items() if after[name][1] != bits}
    still = [name for name, (trains, _) in before.items() if trains and whole[name] not in mobile]
    moved = [name for name, (trains, bits) in before.items() if not trains and after[name][1] != bits]
    for names, what in (
        (left_out, "should train but are not in the optimizer"),
        (moved, "are frozen but changed"),
        (still, "should train but did not move (no gradient, or a learning rate of 0 throughout)"),
    ):
        if names:
            raise RuntimeError(f"stage {stage}: {len(names)} parameters {what}: {', '.join(names[:3])} …")


def _bits_hash(tensor: Tensor) -> int:
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    bits, total = tensor.contiguous().flatten().view(integers[tensor.element_size()]), 0
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        index = torch.arange(start, start + len(part), device=part.device)
        total += int((part * (index * 2654435761 % 2147483647 + 1)).sum())  # a plain sum could cancel: ±lr around one
    return total
