"""What the suite promises of itself: the targets, beside what was measured."""

from typing import NamedTuple

import pandas as pd

from benchmarks.cases import TINY


class Target(NamedTuple):
    """A quantity of `method` over that of another in one case: at most `must`, and better if at most `aim`.

    Without a case, the worst of all counts in which both methods were measured.
    """

    quantity: str
    case: str
    method: str
    must: float
    aim: float | None = None
    over: str = "full"
    column: str = "ratio"


FFN, MODEL, DEEP = "FFN 512/1408, 2048 tokens", "Llama 4 × 512, 2048 tokens", "Llama 7 × 512, bfloat16"
FROZEN, PEAK = "Llama 4 × 512, embeddings frozen", {"column": "peak_mib"}
STEPS = (
    Target("FFN: step", FFN, "apex", 0.90),
    Target("FFN: step to full, equally fused", FFN, "apex", 0.92, over="full-fused"),
    Target("FFN: step to the scheme on activations", FFN, "apex", 0.70, over="activation-space"),
    Target("FFN: peak memory", FFN, "apex", 0.75, **PEAK),
    Target("FFN, recomputing: step", FFN, "apex-recompute", 1.12),
    Target("FFN, recomputing: peak memory", FFN, "apex-recompute", 0.55, **PEAK),
    Target("model: step", MODEL, "apex", 0.94),
    Target("model: step, embeddings frozen", FROZEN, "apex", 0.88),
    Target("model: peak memory", MODEL, "apex", 0.77, **PEAK),
    Target("model: peak memory, embeddings frozen", FROZEN, "apex", 0.70, **PEAK),
    Target("model: step to the scheme on activations", MODEL, "apex", 0.78, over="activation-space"),
    Target("model, all cores: step", "Llama 4 × 512, all threads", "apex", 0.92, 0.88),
    Target("25 M, bfloat16: step", DEEP, "apex", 1.00, 0.92),
    Target("25 M, bfloat16: step to LoRA", DEEP, "apex", 0.90, 0.82, over="lora"),
    Target("25 M, bfloat16, compiled: step", f"{DEEP}, compiled", "apex", 1.00, 0.93),
    Target("25 M, bfloat16: time to compile", f"{DEEP}, compiled", "apex", 2.0, 1.2, column="compile_seconds"),
    Target("FFN 1024 wide: step to LoRA", "FFN 1024/2816, 1024 tokens", "apex", 1.05, 1.00, over="lora"),
    Target("APEX 2.4 %, wherever measured: step to LoRA", "", "apex-2.4%", 1.00, 0.90, over="lora"),
)


def targets(measured: pd.DataFrame, extra: pd.DataFrame, forecast: pd.DataFrame) -> pd.DataFrame:
    """Columns: `quantity`, `must` and `aim` (at most), `floor`, `measured`, `holds` (what it must), `case`.

    `floor`, of a time: the same ratio of FLOPs of products, which both need whatever the program. Where it is above
    what must be, no form of the method gets there, unless the other wastes time.
    """
    rows = []
    for each in STEPS:
        value, case = _worst(measured, each)
        flops = measured[measured["case"] == case].set_index("method")["flops"]
        floor = flops[each.method] / flops[each.over] if each.column == "ratio" else None
        rows.append((each.quantity, each.must, each.aim, floor, value, case))
    share = extra.set_index("quantity")["share"]
    rows += [
        ("statistics gathered in training, share of a step", 0.02, None, None, share["statistics"], MODEL),
        ("fusing a layer, in steps", 1.0, None, None, share["fuse"], MODEL),
        ("generating 128 tokens, to the plain model", 1.1, 1.02, None, 1 + share["generate"], MODEL),
        ("forecast of peak memory, largest error", 0.10, None, None, forecast["error"].abs().max(), "all"),
    ]
    table = pd.DataFrame(rows, columns=["quantity", "must", "aim", "floor", "measured", "case"])
    table.insert(5, "holds", table["measured"] <= table["must"])
    return table


def _worst(measured: pd.DataFrame, target: Target) -> tuple[float, str]:
    """The largest of what the target is about, and its case."""
    values = measured.pivot(index="case", columns="method", values=target.column)
    ratio = (values[target.method] / values[target.over]).dropna()
    if target.case:
        ratio = ratio[[name for name in ratio.index if name.removeprefix(TINY) == target.case]]
    return ratio.max(), ratio.idxmax()
