"""The units of a decoder as data: which rows and columns of which weights belong to one head or FFN channel.

The only file that knows module names; a family is one row of `FAMILIES`, also from outside (`register_family`).

A unit is an attention head (under grouped-query attention one key/value group: a value head and the query heads it
serves) or an FFN channel. Its parameters are slices of a few weights, each described by a `Slot`: module, axis, index
table. That absorbs fused, interleaved and transposed projections.
"""

import math
import warnings
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apexlib.plan import ComponentName


@dataclass(frozen=True)
class Family:
    """Module names of one model family, relative to a layer; equal names mean one fused projection.

    `interleaved`: a fused qkv projection holds query, key and value head by head (GPT-NeoX) where each head has all
    three, else one after another.
    `coupled`: roles that a norm over all heads ties together, so that a head's output depends on other heads' rows.
    An empty `down` means that the FFN has no units here (mixture of experts).
    """

    layers: str = "model.layers"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    interleaved: bool = False
    coupled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is str and not isinstance(value := getattr(self, field.name), str):
                raise ValueError(f"{field.name}: need the name of a module, got {type(value).__name__}")


def _ffn(gate: str, up: str, down: str, activation: str) -> dict[str, str]:
    return {"gate": gate, "up": up, "down": down, "activation": activation}


_QKV = ("query", "key", "value")
_LLAMA, _EXPERTS = Family(), Family(**_ffn("", "", "", ""))
_GPT2_FFN = _ffn("mlp.c_fc", "", "mlp.c_proj", "mlp.act")
_NEOX_FFN = _ffn("mlp.dense_h_to_4h", "", "mlp.dense_4h_to_h", "mlp.act")
_PHI3_FFN = _ffn("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.activation_fn")
_NEOX = {**dict.fromkeys(_QKV, "attention.query_key_value"), "interleaved": True}
_BLOOM = {**dict.fromkeys(_QKV, "self_attention.query_key_value"), "output": "self_attention.dense"}
_TIED = {"coupled": ("query", "key")}  # by norms over all heads or with weights for each, or by position biases
_GPTJ = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj")
_LIKE_LLAMA = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 olmo granite cohere2 ernie4_5 helium"
_LIKE_LLAMA += " hunyuan_v1_dense ministral ministral3 seed_oss internlm3 exaone4 cwm vaultgemma"
_MIXTURES = "mixtral qwen2_moe qwen3_moe granitemoe granitemoeshared ernie4_5_moe llama4_text phimoe glm4_moe"

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_LIKE_LLAMA.split(), _LLAMA),
    "gemma3": replace(_LLAMA, layers="model.language_model.layers"),
    **dict.fromkeys(("olmo2", "olmo3", "stablelm", "cohere"), replace(_LLAMA, **_TIED)),
    **dict.fromkeys(("nemotron", "apertus", "arcee"), replace(_LLAMA, gate="mlp.up_proj", up="")),
    **dict.fromkeys(("glm", "glm4"), Family(**_PHI3_FFN)),
    "starcoder2": Family(**_GPT2_FFN),
    "gptj": Family("transformer.h", *_GPTJ, **_ffn("mlp.fc_in", "", "mlp.fc_out", "mlp.act")),
    "bloom": Family(
        "transformer.h", **_BLOOM, interleaved=True, **(_NEOX_FFN | {"activation": "mlp.gelu_impl"}), **_TIED
    ),
    "phi": Family(output="self_attn.dense", **_ffn("mlp.fc1", "", "mlp.fc2", "mlp.activation_fn")),
    "phi3": Family(**dict.fromkeys(_QKV, "self_attn.qkv_proj"), **_PHI3_FFN),
    "gpt2": Family("transformer.h", **dict.fromkeys(_QKV, "attn.c_attn"), output="attn.c_proj", **_GPT2_FFN),
    "gpt_neox": Family("gpt_neox.layers", **_NEOX, output="attention.dense", **_NEOX_FFN),
    "gpt_bigcode": Family(
        "transformer.h", **dict.fromkeys(_QKV, "attn.c_attn"), output="attn.c_proj", interleaved=True, **_GPT2_FFN
    ),
    "opt": Family("model.decoder.layers", output="self_attn.out_proj", **_ffn("fc1", "", "fc2", "activation_fn")),
    **dict.fromkeys(_MIXTURES.split(), _EXPERTS),
    **dict.fromkeys(("olmoe", "gpt_oss"), replace(_EXPERTS, **_TIED)),
}

_ABSENT = {  # why a model type cannot be a row
    "gemma3n gemma3n_text gemma4 gemma4_text": "layers use the keys and values of others, or their keys as values",
    "deepseek_v2 deepseek_v3 minicpm3": "keys and values of all heads come from one latent vector (MLA)",
    "bamba falcon_h1 granitemoehybrid jamba lfm2 nemotron_h qwen3_next zamba2": "some layers have no softmax attention",
    "falcon_mamba mamba mamba2 rwkv": "there is no attention",
}
NOT_COVERED = {model_type: why for model_types, why in _ABSENT.items() for model_type in model_types.split()}


@dataclass(frozen=True, eq=False)
class Slot:
    """Where the units lie in one weight: `index[unit, copy, dim]` counts along `axis` of `module.weight`.

    A `copy` is a query head of a KV group; it is 1 wherever a unit has a single slice. Rows of a projection
    (`is_input` false) carry bias entries of the same index.
    """

    role: str
    module: str
    axis: int
    index: Tensor
    is_input: bool


@dataclass(frozen=True, eq=False)
class Component:
    """All units of one kind in one layer: their slots, and the modules at which their activations can be seen."""

    layer: int
    component: ComponentName
    units: int
    slots: dict[str, Slot]
    activation: str  # the module whose output is f(x W_gate); empty for heads

    @cached_property
    def reader(self) -> Slot:
        """The projection that reads the units' outputs: `o_proj` for heads, `down_proj` for channels."""
        return next(slot for slot in self.slots.values() if slot.is_input)


def model_components(model: PreTrainedModel) -> tuple[Component, ...]:
    """List heads and channels of every layer, in layer order, heads first.

    Raises ValueError for a `model_type` that is not in `FAMILIES` and for modules that do not have the shapes of the
    family. Warns where a family's FFN has no units (mixture of experts). Works on the meta device.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    ...                      num_key_value_heads=2, vocab_size=32)
    >>> for part in model_components(LlamaForCausalLM(config)):
    ...     print(part.component, part.units, {role: tuple(slot.index.shape) for role, slot in part.slots.items()})
    head 2 {'query': (2, 2, 4), 'key': (2, 1, 4), 'value': (2, 1, 4), 'output': (2, 2, 4)}
    channel 24 {'gate': (24, 1, 1), 'up': (24, 1, 1), 'down': (24, 1, 1)}
    """
    family = family_of(model)
    if not family.down:
        what = "the experts' channels are not units here; only attention heads are covered"
        warnings.warn(f"{model.config.model_type}: {what}", stacklevel=2)
    components = []
    for layer in range(len(_module(model, family.layers))):
        components.append(_heads(model, family, layer))
        if family.down:
            components.append(_channels(model, family, layer))
    for component in components:
        for slot in component.slots.values():
            _check_shape(model, slot, [s for s in component.slots.values() if s.module == slot.module])
    return tuple(components)


def family_of(model: PreTrainedModel) -> Family:
    """Look up the family of `model` by its config's `model_type`."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        because = f", because {NOT_COVERED[model_type]}" if model_type in NOT_COVERED else ""
        raise ValueError(f"model type {model_type!r} is not supported{because}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def register_family(model_type: str, family: Family) -> None:
    """Make models known whose config has that `model_type`; a family that is known already is never replaced.

    >>> register_family("llama", Family(gate="mlp.first", up="mlp.second", down="mlp.third"))
    Traceback (most recent call last):
    ValueError: model type 'llama': is known already, as another family; need one of its own
    """
    if not isinstance(model_type, str) or not model_type or not isinstance(family, Family):
        kinds = f"{type(model_type).__name__} and {type(family).__name__}"
        raise ValueError(f"need a model_type, a string that is not empty, and a Family, got {kinds}")
    if model_type in FAMILIES and FAMILIES[model_type] != family:
        raise ValueError(f"model type {model_type!r}: is known already, as another family; need one of its own")
    FAMILIES[model_type] = family


def _heads(model: PreTrainedModel, family: Family, layer: int) -> Component:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    copies = heads // groups
    output = query = torch.arange(heads * head_dim).view(groups, copies, head_dim)
    value = torch.arange(groups * head_dim).view(groups, 1, head_dim)
    starts = (0, 0)  # of key and value among the rows
    if family.query == family.value and family.interleaved and copies == 1:  # head by head: its query, key, value
        query = value = torch.arange(heads)[:, None, None] * 3 * head_dim + torch.arange(head_dim)
        starts = (head_dim, 2 * head_dim)
    elif family.query == family.value:
        starts = (heads * head_dim, (heads + groups) * head_dim)
    index = {"query": query, "key": value + starts[0], "value": value + starts[1], "output": output}
    slots = {role: _slot(model, family, layer, role, index[role]) for role in index}
    return Component(layer, "head", groups, slots, activation="")


def _channels(model: PreTrainedModel, family: Family, layer: int) -> Component:
    down = _module(model, f"{family.layers}.{layer}.{family.down}")
    units = down.weight.shape[_axis(down, is_input=True)]
    channel = torch.arange(units).view(units, 1, 1)
    slots = {"gate": _slot(model, family, layer, "gate", channel)}
    if family.up:
        start = units if family.up == family.gate else 0
        slots["up"] = _slot(model, family, layer, "up", channel + start)
    slots["down"] = _slot(model, family, layer, "down", channel)
    return Component(layer, "channel", units, slots, activation=f"{family.layers}.{layer}.{family.activation}")


def _slot(model: PreTrainedModel, family: Family, layer: int, role: str, index: Tensor) -> Slot:
    name = f"{family.layers}.{layer}.{getattr(family, role)}"
    is_input = role in ("output", "down")
    return Slot(role, name, _axis(_module(model, name), is_input=is_input), index, is_input)


def _axis(module: nn.Module, *, is_input: bool) -> int:
    """Axis of `weight` along which inputs (or outputs) lie: Conv1D stores (in, out), Linear (out, in)."""
    return int(is_input) if not isinstance(module, Conv1D) else int(not is_input)


def _module(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        here = f"{type(model).__name__} ({model.config.model_type}) has no module {name!r}"
        raise ValueError(f"{here}; need an unwrapped ...ForCausalLM of transformers") from None


def _check_shape(model: PreTrainedModel, slot: Slot, same_module: list[Slot]) -> None:
    """The slots that share an axis of a weight must fill it exactly."""
    weight = model.get_submodule(slot.module).weight
    if weight.dim() != 2:
        raise ValueError(f"{slot.module}: weight of shape {tuple(weight.shape)}; need a matrix (quantised or sharded?)")
    claimed = sum(math.prod(other.index.shape) for other in same_module)
    if claimed != weight.shape[slot.axis]:
        entries = f"axis {slot.axis} has {weight.shape[slot.axis]} entries"
        raise ValueError(f"{slot.module}: {entries}; the config's heads and channels need {claimed}")
