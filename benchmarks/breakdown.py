"""What a step is made of: the products that a method cannot do without, its floor, and where the time goes."""

from collections.abc import Callable
from typing import Any

from torch import ops
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop

_FLOPS = flop_registry | {  # what torch has no formula for
    ops.aten.addmm_: addmm_flop,
    ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
KINDS = {  # of work, by how the names of torch's operators begin; others of torch's are "elementwise"
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "copies_and_casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index_", "aten::clone"),
    "embeddings_and_loss": ("aten::_log_softmax", "aten::nll_loss", "aten::embedding"),
    "optimizer": ("aten::_fused_adamw_", "Optimizer."),
    "elementwise": ("aten::",),
    "rest": ("",),  # Python; of a compiled step also the kernels that the compiler wrote
}


def flops(run: Callable[[], object]) -> int:
    """Count the floating-point operations of the products of an eager call, a multiply-add as two."""
    with _Flops() as counter:
        run()
    return counter.total


def seconds_by_kind(profiler: profile, device: str = "cpu") -> dict[str, float]:
    """Seconds of what was profiled, by kind of work."""
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        found[next(kind for kind, names in KINDS.items() if event.key.startswith(names))] += own / 1e6
    return found


class _Flops(TorchDispatchMode):
    """Adds up operations; torch's own `FlopCounterMode` hooks into modules, and fused forms step aside for hooks."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if formula := _FLOPS.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
