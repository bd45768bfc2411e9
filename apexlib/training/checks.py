"""What of a run is refused before it starts, its precision and its name, and what is checked as it trains and after."""

import os
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SchedulerType, TrainingArguments

from apexlib.training.methods import Method
from apexlib.training.sharding import agreed, engine_of, local

_BY_STEP = str.split(
    "constant constant_with_warmup linear cosine cosine_with_restarts cosine_with_min_lr cosine_warmup_with_min_lr "
    "warmup_stable_decay polynomial inverse_sqrt"
)
_NOT_HONOURED = {  # arguments that a run takes at few values only, and what to do instead
    "push_to_hub": ((False,), "push the model once it is trained, model.push_to_hub(...)"),
    "resume_from_checkpoint": ((None,), "resume=True goes on from the newest state in output_dir"),
    "train_sampling_strategy": (("random", "sequential"), "batches of equal lengths are not made"),
    "auto_find_batch_size": ((False,), "a stage's data are cut for one size of batch"),
    "use_liger_kernel": ((False,), "its FFN shows no activation of a channel"),
    "optim_target_modules": ((None,), "a method says what trains"),
    "save_only_model": ((False,), "a run goes on from all of its state; checkpoints=[...] keeps plain models"),
    "ignore_data_skip": ((False,), "a resumed run reads on where it stopped"),
    "enable_jit_checkpoint": ((False,), "SIGTERM saves the run without it"),
    "n_gpu": ((0, 1), "DataParallel divides batches on its own; use accelerate launch, or hide GPUs"),
}
_OWN_STEPS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")  # optimizers that do not step by groups
_COPIED = {"WANDB_LOG_MODEL": ("checkpoint",), "HF_MLFLOW_LOG_ARTIFACTS": ("1", "true", "on", "yes", "y", "t")}
_DECISIVE = str.split(
    "per_device_train_batch_size gradient_accumulation_steps world_size seed data_seed learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm bf16 fp16 gradient_checkpointing label_smoothing_factor neftune_noise_alpha train_sampling_strategy "
    "average_tokens_across_devices dataloader_drop_last"
)


def resolve_precision(precision: str = "auto") -> str:
    """Return "bf16", to train under autocast, or "float32"; "auto": bf16 where GPU or CPU have instructions for it."""
    if precision in ("bf16", "float32"):
        return precision
    if precision != "auto":
        raise ValueError(f"precision {precision!r}: need one of auto, bf16, float32")
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "float32"


def decisive_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that the bits of a run depend on."""
    arguments = {name: getattr(args, name, None) for name in _DECISIVE}
    return {name: getattr(value, "value", value) for name, value in arguments.items()}


def check_run(model: nn.Module, args: TrainingArguments, method: Method, kept: Collection[int]) -> None:
    """Refuse what a run cannot train or honour; `kept`: the steps after which a plain model is kept."""
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") and any(weight.is_meta for weight in module.parameters(recurse=False)):
            raise ValueError(
                f"{name}: device_map has it offloaded to memory or disk; need a model that is loaded whole"
            )
    for name, asked in (("checkpoints", kept), ("load_best_model_at_end", args.load_best_model_at_end)):
        if asked and not method.plain:
            raise ValueError(f"{name}: the model of {type(method).__name__} is not plain while it trains; need none")
    if (schedule := SchedulerType(args.lr_scheduler_type).value) not in _BY_STEP:
        need = f"one that depends on the step alone: {', '.join(_BY_STEP)}"
        raise ValueError(f"lr_scheduler_type {schedule!r}: need {need}")
    engine = engine_of(args)
    if engine and method.config.decay_to_start:
        raise ValueError("decay_to_start: under FSDP and ZeRO no process holds a whole start; need False")
    if engine == "fsdp" and method.assesses and method.config.strategy == "gradient":
        raise ValueError("strategy 'gradient': under FSDP no process holds whole gradients; need another strategy")
    if engine == "zero" and type(method).change_gradients is not Method.change_gradients:
        raise ValueError(f"ZeRO: shows no gradients, which {type(method).__name__} changes; need FSDP2 or DDP")
    for name, (taken, instead) in _NOT_HONOURED.items():
        if (value := getattr(args, name, taken[0])) not in taken:
            raise ValueError(f"{name}={value}: need {taken[0]!r}; {instead}")
    if args.optim.startswith(_OWN_STEPS):
        raise ValueError(f"optim={args.optim.value}: need an optimizer that steps by the groups that a method makes")
    if args.accelerator_config.split_batches:
        raise ValueError("accelerator_config split_batches=True: need False; a batch is that of each process")
    for name, values in _COPIED.items():
        if (value := os.environ.get(name, "")).lower() in values:
            raise ValueError(f"{name}={value}: need none; the states of a run are no checkpoints to be copied")
    if method.config.decay_to_start and not args.optim.startswith("adamw"):
        raise ValueError(f"decay_to_start: need AdamW, which decays apart from moments; got optim={args.optim.value!r}")
    if method.config.balance_weight and not method.assesses:
        what = f"{type(method).__name__} gathers no activations; need 0"
        raise ValueError(f"balance_weight {method.config.balance_weight:g}: {what}")
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if method.config.balance_weight and args.gradient_checkpointing and reentrant:
        raise ValueError("balance_weight > 0: need gradient checkpointing without reentry, use_reentrant=False")


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first tensor that holds NaN or an infinite value."""
    filled = [(name, tensor.detach()) for name, tensor in tensors if tensor.numel()]
    # one norm of all is cheap; it is not finite where a value is not, or where squares overflow
    if not filled or agreed(nn.utils.get_total_norm([local(t) for _, t in filled]).isfinite(), filled[0][1]):
        return None
    return next((name for name, tensor in filled if not agreed(local(tensor).isfinite().all(), tensor)), None)


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Hash the bits of each parameter: SHA-256, in hex."""
    values = ((name, parameter.detach().contiguous().flatten()) for name, parameter in model.named_parameters())
    return {name: sha256(flat.view(torch.uint8).cpu().numpy()).hexdigest() for name, flat in values}


def unexpected_movement(model: nn.Module, before: Mapping[str, str], stage: int) -> list[str]:
    """Compare the model with its fingerprints `before` the stage: say what trains and has not moved, or else has."""
    changed = {name for name, bits in fingerprints(model).items() if before[name] != bits}
    whole = {name: name.partition(".operator.")[0] for name in before}  # a factor of M waits for the other
    mobile = {whole[name] for name in changed}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    still = [name for name in before if name in trains and whole[name] not in mobile]
    moved = [name for name in before if name in changed - trains]
    why = "not in the optimizer, no gradient, a rate of 0 throughout, or steps that its dtype rounds away"
    said = ((moved, "are frozen but changed"), (still, f"should train but did not move ({why})"))
    return [
        f"stage {stage}: {len(names)} parameters {what}: {', '.join(names[:3])}{' …' if names[3:] else ''}"
        for names, what in said
        if names
    ]
