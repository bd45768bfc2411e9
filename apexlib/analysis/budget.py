"""Before a run: parameters, FLOPs, peak memory by phase, disk and time, for any supported configuration.

Nothing is derived on paper. The model is built on the meta device, where tensors have shapes but no values, prepared by
the method itself, and takes a real step there, while every allocation and every product is counted.
"""

import copy
import weakref
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import addmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from apexlib.activations import add_gradients, unit_table, unit_weights
from apexlib.analysis.devices import STRATEGIES, Alone, Fsdp2
from apexlib.architectures import family_of, model_components
from apexlib.files import pretrained, untrained
from apexlib.fused_ffn import wide
from apexlib.plan import ApexConfig
from apexlib.training.methods import METHODS, Method, method_of

_ATTENTION = "apexlib_planned"
_DEEP = 6  # more layers than this are extrapolated from two depths: they are alike
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLOPS = flop_registry | {  # what torch has no formula for; its formulas take tensors, those it exports too
    torch.ops.aten.addmm_: addmm_flop,
    _FLASH: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


def plan_budget(
    config_or_name: PretrainedConfig | str | Path,
    config: ApexConfig | None = None,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype | str = "float32",
    methods: Collection[str] = METHODS,
    share: float | None = None,
    gradient_checkpointing: bool = False,
    flops_per_second: float | None = None,
    devices: int = 1,
    strategy: Literal["ddp", "fsdp", "zero2"] = "ddp",
) -> pd.DataFrame:
    """Say what a run on `batch` sequences of `length` tokens a step and device needs, one row per method.

    Columns: `method`; `parameters` of the plain model; `trainable`, operators included, and `share`, which leaves them
    out of what trains; `flops_per_step` (dense products, a multiply-add is two); `assess_mib` (with gradients, where
    they select), `train_mib`, `fuse_mib`, the peak of each phase, weights included; of `train_mib`, at its moment,
    `parameters_mib`, `optimizer_mib` of AdamW's state, `gradients_mib`, `gathered_mib` of what an engine has collected
    or is sending, and `activations_mib`, the rest; `traffic_mib` that a device sends in a step; `disk_mib` of the
    checkpoints of all stages; `seconds_per_step`, where `flops_per_second` says what the machine reaches (`calibrate`).

    All of it is for one of `devices` that share the work by a `strategy`: "ddp", a whole model on each; "fsdp", FSDP2
    by decoder layers, for which `fuse_mib` is memory of the first process's host; "zero2", DeepSpeed's ZeRO 2, which
    was never measured.

    With a `share` of the parameters, methods with a plan train pairs of units that come to it (`config_for_share`), and
    LoRA has the rank that does.

    `dtype` is what the model is loaded in; what APEX trains is float32 in any case. A step is one forward and backward
    and AdamW's fused update, with attention that keeps no attention matrix. Buffers below torch's allocator (libraries,
    CUDA context, fragmentation) are not forecast, nor autocast. Sizes of MiB are 2²⁰ bytes.

    >>> from transformers import LlamaConfig
    >>> small = LlamaConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
    ...                     vocab_size=256)
    >>> table = plan_budget(small, batch=2, length=32, methods=["apex", "full"])
    >>> table[["method", "parameters", "trainable"]].values.tolist()
    [['apex', 133440, 81698], ['full', 133440, 133440]]
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: need one of {', '.join(STRATEGIES)}")
    for name, value in (("batch", batch), ("length", length), ("devices", devices)):
        if value < 1:
            raise ValueError(f"{name}: need at least 1, got {value}")
    shape = config_or_name if isinstance(config_or_name, PretrainedConfig) else pretrained(AutoConfig, config_or_name)
    by_gradients = config is not None and config.strategy == "gradient"
    if by_gradients and devices > 1 and strategy == "fsdp":
        raise ValueError("strategy 'gradient': under FSDP no process holds whole gradients; need another strategy")
    config, options = replace(config or ApexConfig(), strategy="random"), {}
    if share is not None:
        config, options = config_for_share(shape, share, config), {"lora_rank": lora_rank_for_share(shape, share)}
    depth = shape.get_text_config().num_hidden_layers
    rows = []
    for name in methods:
        counts = []
        for layers in [depth] if depth <= _DEEP else [2, 4]:
            method = method_of(name, config, **options)
            model = _on_meta(shape, dtype, layers)
            share_out = partial(STRATEGIES[strategy] if devices > 1 else Alone, devices=devices)
            asked = (batch, length, gradient_checkpointing, share_out, by_gradients)
            counts.append(pd.Series(_count(model, method, *asked)))
        whole = counts[0] + (counts[-1] - counts[0]) * ((depth - 2) / 2)
        stages = config.stages if method.staged else 1
        rows.append({"method": name, **whole, "disk_mib": whole["disk_mib"] * stages})
    table = pd.DataFrame(rows)
    table.insert(3, "share", table.pop("plain_trainable") / table["parameters"])
    if flops_per_second is not None:
        table["seconds_per_step"] = table["flops_per_step"] / flops_per_second
    return table.astype(dict.fromkeys(("parameters", "trainable", "flops_per_step"), "int64"))


def trained_share(shape: PretrainedConfig, method: Method) -> float:
    """The parameters that a method trains in its first stage, operators and adapters too, over those of the model."""
    return _share(_on_meta(shape), method)


def _share(model: PreTrainedModel, method: Method) -> float:
    """`trained_share` of a model that is there, and that is plain again afterwards."""
    total = model.num_parameters()
    trained = method.begin(model, 0, equal_statistics(model))
    trains = model.num_parameters(only_trainable=True)
    method.end(trained)
    return trains / total


def config_for_share(shape: PretrainedConfig, share: float, config: ApexConfig | None = None) -> ApexConfig:
    """Settings like `config` that train that share of a model's parameters, in pairs of channels and heads alone.

    Heads and channels have the same ratio (`ApexConfig.of_size`), found by counting on the model itself. Raises
    ValueError where the nearest share is more than 5 % away: a model of few units has few shares.

    >>> from transformers import LlamaConfig
    >>> shape = LlamaConfig(hidden_size=64, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
    ...                     vocab_size=256)
    >>> config_for_share(shape, 0.024).direct_channels
    0.02734375
    """
    config, model = replace(config or ApexConfig(), strategy="random"), _on_meta(shape)
    text = shape.get_text_config()
    numbers = (text.intermediate_size, text.num_hidden_layers * getattr(text, "num_key_value_heads", 1))
    sizes = sorted({2 * pairs / number for number in numbers for pairs in range(1, number // 2 + 1)})
    size, found = _nearest(sizes, share, lambda size: _share(model, method_of("apex", config.of_size(size))))
    if abs(found / share - 1) > 0.05:
        raise ValueError(f"share {share}: the nearest in pairs of units is {found:.4g}, need one within 5 %")
    return config.of_size(size)


def lora_rank_for_share(shape: PretrainedConfig, share: float) -> int:
    """The rank at which LoRA on all linear layers trains the share nearest to `share` of a model's parameters."""
    ranks, model = range(1, shape.get_text_config().hidden_size + 1), _on_meta(shape)
    return _nearest(ranks, share, lambda rank: _share(model, method_of("lora", ApexConfig(), lora_rank=rank)))[0]


def _nearest(sizes: Sequence[Any], share: float, found: Callable[[Any], float]) -> tuple[Any, float]:
    """The one of ascending `sizes` whose share, which ascends too, is nearest, and that share."""
    above = bisect_left(sizes, share, key=found)
    near = [(size, found(size)) for size in sizes[max(0, above - 1) : above + 1]]
    return min(near, key=lambda pair: abs(pair[1] - share))


def calibrate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Measure FLOP/s of a dense product of `size`³: the median over half a second, after warming up."""
    from torch.utils.benchmark import Timer

    factors = {name: torch.randn(size, size, device=device, dtype=dtype) for name in ("left", "right")}
    timer = Timer("left @ right", globals=factors, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.5).median


def _count(
    plain: PreTrainedModel,
    method: Method,
    batch: int,
    length: int,
    checkpointing: bool,
    share_out: Callable,
    by_gradients: bool,
) -> dict[str, float]:
    """Count one model on the meta device: parameters, FLOPs and MiB."""
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    if not family_of(plain).down:  # an unknown family is refused there, by name
        here = plain.config.model_type
        raise ValueError(f"{here}: which experts run depends on values; only dense models can be planned")
    parameters, disk = plain.num_parameters(), sum(parameter.nbytes for parameter in plain.parameters())
    layers, sizes = plain.get_submodule(family_of(plain).layers), {"assess": 0}
    if method.assesses:
        whole = plain.base_model if share_out.func is Fsdp2 else plain  # the head is of no use there
        engine = share_out(whole.eval(), layers)
        with torch.no_grad(), engine, _Counter((*engine.parameters(), *plain.buffers(), ids), engine) as assess:
            plain.base_model(input_ids=ids, use_cache=False)
        sizes["assess"] = assess.peak
    if method.assesses and by_gradients:
        weights = unit_weights(plain)
        with _Counter((*plain.parameters(), *plain.buffers(), ids)) as assess:
            sums = {name: torch.zeros_like(weight, dtype=wide(weight.dtype)) for name, weight in weights.items()}
            add_gradients(plain(input_ids=ids, labels=ids, use_cache=False).loss, weights, sums)
        del weights, sums
        sizes["assess"] = max(sizes["assess"], assess.peak)
    model = method.begin(plain, 0, equal_statistics(plain)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trainable, added = plain.num_parameters(only_trainable=True), plain.num_parameters() - parameters
    with share_out(model, layers) as engine:
        moments = engine.moments()
        _step(model, moments, ids, method, engine)  # the first makes the moments
        own, buffers, engine.sent = engine.parameters(), engine.buffers(), 0
        with _Counter((*own, *model.buffers(), *moments.values(), *buffers, ids), engine) as train:
            _step(model, moments, ids, method, engine)
    held = sum(parameter.nbytes for parameter in own)
    del own  # fusing lets go of one weight after another
    on_host = isinstance(engine, Fsdp2)
    with _Counter((*model.parameters(), *model.buffers(), *(() if on_host else moments.values()))) as fuse:
        method.end(model)
    gathered, gradients = train.at_peak
    sizes |= {"train": train.peak, "fuse": fuse.peak, "parameters": held}
    sizes |= {"optimizer": sum(moment.nbytes for moment in moments.values()), "gathered": gathered}
    sizes |= {"gradients": gradients + sum(buffer.nbytes for buffer in buffers)}
    parts = ("parameters", "optimizer", "gathered", "gradients")
    sizes |= {"activations": train.peak - sum(sizes[name] for name in parts), "traffic": engine.sent, "disk": disk}
    return {
        "parameters": parameters,
        "trainable": trainable,
        "plain_trainable": trainable - added or added,  # where only what is added trains, that counts
        "flops_per_step": train.flops,
    } | {f"{name}_mib": size / 2**20 for name, size in sizes.items()}


def _on_meta(
    shape: PretrainedConfig, dtype: torch.dtype | str = "float32", layers: int | None = None
) -> PreTrainedModel:
    """Make the model without values, of another number of layers if one is given."""
    shape = copy.deepcopy(shape)  # which would be left with an attention that sees padding
    text = shape.get_text_config()
    text.pad_token_id = None  # else GPT-2 looks for it in the tokens, which have no values here
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        return untrained(AutoModelForCausalLM, shape, dtype=dtype, attn_implementation=_ATTENTION)


def equal_statistics(model: PreTrainedModel) -> pd.DataFrame:
    """Make statistics in which all units are alike, for plans that draw their units."""
    tables = [unit_table(part, activation=1.0, rank_score=0) for part in model_components(model)]
    return pd.concat(tables, ignore_index=True)


def _step(model: nn.Module, moments: dict[nn.Parameter, Tensor], ids: Tensor, method: Method, engine: Alone) -> None:
    """Forward, backward and what a fused AdamW leaves: its kernel itself needs nothing beyond its two moments."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    engine.finish()
    method.change_gradients(model)
    for parameter in model.parameters():
        if parameter.grad is not None and parameter not in moments:
            moments[parameter] = parameter.new_zeros(2, *parameter.shape)
    model.zero_grad()
    engine.forget()


class _Counter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all tensors that live, from `resident` ones on, with their peak.

    What an engine does not hold on this device, it does not count, and it notes what that has gathered at the peak.
    torch's own `FlopCounterMode` hooks into every module, and fused forms step aside for hooks.
    """

    def __init__(self, resident: Iterable[Tensor], engine: Alone | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.at_peak, self.engine = (0, 0), engine  # bytes gathered, and of gradients
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)  # the storages that live
        for tensor in resident:
            self._see(tensor)
        for tensor in engine.model.parameters() if engine else ():
            self._known.setdefault(tensor.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if formula := _FLOPS.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        if (storage := tensor.untyped_storage()) not in self._known:
            self._known[storage] = None
            self.live += storage.nbytes()
            if self.live > self.peak:
                self.peak = self.live
                self.at_peak = (self.engine.gathered, self.engine.gradients) if self.engine else self.at_peak
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.live -= size


def _flash_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch groups tokens dim"],
    value: Float[Tensor, "batch groups tokens dim"],
    *_: Any,
    scaling: float | None = None,
    **__: Any,
) -> tuple[Float[Tensor, "batch tokens heads dim"], None]:
    """Causal attention by a kernel; on the meta device SDPA would take the form that keeps the attention matrix."""
    copies = query.shape[1] // key.shape[1]
    if copies > 1:
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    output = _FLASH(query, key, value, is_causal=True, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _flash_attention)  # transformers makes no mask for one it does not know
