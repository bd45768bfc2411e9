"""Sharded training, by PyTorch's FSDP2 and DeepSpeed's ZeRO 1 and 2, as accelerate sets them up.

A stage trains a copy, whose modules share the weights until they are sharded, so that no engine touches the model
itself. Under FSDP2 the model has values on the first process only, in memory of the host, and is a shell on the meta
device on every other one. A decoder layer is the unit: its rows, frozen rows, M, v and s are gathered together, and
composed inside. Values go out from the first process, and come back to it, one tensor at a time.
"""

import copy
import os
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import ParallelMode

from apexlib.architectures import family_of

Engine = Literal["", "fsdp", "zero"]
_ON = ("1", "true", "yes")


def engine_of(args: TrainingArguments) -> Engine:
    """Say what shards the run, by arguments or from the environment; refuse what expansion cannot do with."""
    asked = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in _ON for name in ("FSDP", "DEEPSPEED")}
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in _ON or getattr(args, name.lower(), None):
            raise ValueError(f"{name}: cuts matrices, which expansion needs whole; need FSDP2, ZeRO 1 or 2, or DDP")
    fsdp, zero = args.fsdp or asked["FSDP"], args.deepspeed or asked["DEEPSPEED"]
    if not (fsdp or zero):
        return ""
    if zero:
        stage = _zero_stage(args)
        refused = {
            f"ZeRO {stage}": stage not in (1, 2) and "need ZeRO 1 or 2, or FSDP2",
            "save_strategy": args.save_strategy != "no" and "ZeRO keeps optimizer state of its own; need 'no'",
            "bf16 or fp16": (args.bf16 or args.fp16) and "ZeRO would round M, v and s; need float32, or FSDP2",
        }
    else:
        plugin = fsdp_plugin(args)
        refused = {
            "FSDP1": plugin.fsdp_version != 2 and "flattens matrices; need FSDP2: version 2, --fsdp_version 2",
            "cpu_offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy) and "was never tried; need False",
            "activation_checkpointing": plugin.activation_checkpointing and "need gradient_checkpointing=True instead",
            "torch_compile": args.torch_compile and "under FSDP was never tried; need False",
            "fp16": args.fp16 and "under FSDP was never tried; need bf16 or float32",
        }
    refused["save_on_each_node"] = args.save_on_each_node and "the first process saves; need False"
    alone = args.parallel_mode != ParallelMode.DISTRIBUTED
    refused["one process"] = alone and "has nobody to share weights with; need accelerate launch or torchrun"
    for what, why in refused.items():
        if why:
            raise ValueError(f"{what}: {why}")
    return "zero" if zero else "fsdp"


def fsdp_plugin(args: TrainingArguments) -> Any:
    """Return what accelerate makes of the arguments, or of the environment, for FSDP."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(**((args.fsdp and args.fsdp_plugin_args) or {}))


def _zero_stage(args: TrainingArguments) -> Any:
    plugin = getattr(args, "deepspeed_plugin", None)
    config = getattr(plugin, "deepspeed_config", None) or {}
    known = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "of unknown stage")
    stage = config.get("zero_optimization", {}).get("stage", getattr(plugin, "zero_stage", known))
    return int(stage) if str(stage).isdigit() else stage


def set_up(accelerator: Any, args: TrainingArguments, unit: str) -> None:
    """Let accelerate shard modules of class `unit`, and gather values in their own dtype, which composing needs."""
    from accelerate.utils import DistributedType

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:  # there accelerate would not shard, and not say so
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin(args)
    plugin = state.fsdp_plugin
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, [unit]
    plugin.mixed_precision_policy, plugin.cpu_ram_efficient_loading = MixedPrecisionPolicy(), False


def layer_class(model: PreTrainedModel) -> str:
    """Name the class of the decoder layers, the unit that is sharded and gathered."""
    return type(next(iter(model.get_submodule(family_of(model).layers)))).__name__


def hollow(model: nn.Module) -> None:
    """Move the parameters, not the buffers, to the meta device; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            setattr(module, name, made.setdefault(parameter, empty))


def copy_to_shard(model: nn.Module) -> nn.Module:
    """Copy the modules, with parameters of their own on the same storage, and the buffers of the first process.

    Parameters that are on the meta device come up empty: memory that is never written to before they are sharded, so
    that the system hands out none. All processes call it together.
    """
    from accelerate.utils import broadcast_object_list

    names, first = [name for name, _ in model.named_buffers()], torch.distributed.get_rank() == 0
    (buffers,) = broadcast_object_list([[model.get_buffer(name).cpu() for name in names] if first else None])
    fresh: dict[int, Any] = {id(model.get_buffer(name)): value for name, value in zip(names, buffers, strict=True)}
    for own in model.parameters():
        value = torch.empty_like(own, device="cpu") if own.is_meta else own.detach()
        fresh[id(own)] = nn.Parameter(value, own.requires_grad)
    return copy.deepcopy(model, fresh)


def fill(sharded: nn.Module, whole: nn.Module) -> None:
    """Give a sharded model the values that `whole` has on the first process; all processes call it together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    values = whole.state_dict() if torch.distributed.get_rank() == 0 else {}
    set_model_state_dict(sharded, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


@torch.no_grad()
def bring_back(trained: nn.Module, whole: nn.Module) -> nn.Module:
    """Give `whole`, where it has values, those of the model that trains; all processes call it together."""
    reshard(trained)
    targets = dict(whole.named_parameters())
    for name, parameter in trained.named_parameters():
        value = full(parameter)
        if not targets[name].is_meta:
            targets[name].copy_(value)
    return whole


def reshard(model: nn.Module) -> None:
    """Free what was gathered, so that the parameters are the shards again; evaluation leaves some."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded_for_reading(model: PreTrainedModel) -> PreTrainedModel:
    """Shard a copy of a plain model, but its head, for passes without gradients; all processes call it together."""
    sharded = copy_to_shard(model)
    for unit in (sharded.get_input_embeddings(), *sharded.get_submodule(family_of(model).layers)):
        fully_shard(unit)
    fully_shard(sharded.base_model)
    fill(sharded.base_model, model.base_model)
    return sharded


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor; of a shard all processes have to ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_out(value: Any, like: Tensor) -> Any:
    """Shard a whole tensor, which the first process holds, as `like` is; one of another shape stays as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def optimizer_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Shard the tensors of an optimizer's state as its parameters are, in place."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, own in state["state"].items():
        own.update({name: share_out(value, parameters[index]) for name, value in own.items()})
    return state


def gathered(state: Any) -> Any:
    """Replace the shards in nested dicts and lists by whole tensors, on the first process, in memory of the host."""
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

    def gather(shard: DTensor) -> Tensor:
        value = shard.detach().full_tensor()
        return value.cpu() if first else value.new_empty(0)

    return tree_map_only(DTensor, gather, state)


def agreed(flag: Tensor, of: Tensor) -> bool:
    """Whether a flag is set: where it is about the shards `of` a tensor, on all processes, which ask together."""
    if isinstance(of, DTensor):
        torch.distributed.all_reduce(flag := flag.int(), torch.distributed.ReduceOp.MIN)
    return bool(flag)
