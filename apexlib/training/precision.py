"""The precision in which a model trains: bfloat16 where the machine multiplies it fast, else float32."""

import torch

PRECISIONS = ("auto", "bf16", "float32")


def resolve_precision(precision: str = "auto") -> str:
    """Return "bf16", to train under autocast, or "float32"; "auto": bf16 where GPU or CPU have instructions for it."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: need one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "float32"
