"""Which cases and methods a run of the benchmark measures, by device and size."""

from dataclasses import dataclass, replace

from benchmarks.workloads import FORMS, METHODS, Case

BLOCK_METHODS = (*FORMS, "lora")
CURVES = ("full", "activation-space", "apex", "apex-recompute")


@dataclass(frozen=True)
class Study:
    """A case, its methods, and how often each step is timed; `resident` names methods to measure in pages too."""

    case: Case
    methods: tuple[str, ...]
    rounds: int
    resident: tuple[str, ...] = ()


def step_studies(device: str, quick: bool, compiled: bool) -> list[Study]:
    """The cases of the table of steps."""
    if quick:
        block = Case("FFN 128/352", "block", 128, 352, heads=4, batch=2, length=128, device=device)
        model = Case("Llama 2 × 128", "model", 128, 352, 2, 4, 512, 4, 64, device=device)
        few = ("full", "apex")
        return [
            Study(block, BLOCK_METHODS, 5, few),
            Study(model, METHODS, 3, few),
            Study(replace(model, name="Llama 2 × 128, embeddings frozen", embeddings=False), CURVES, 3),
            Study(replace(model, name="Llama 2 × 128, checkpointing", checkpointing=True), CURVES, 3),
            Study(replace(block, name="FFN 128/352, bfloat16", autocast=True), CURVES, 5),
        ]
    if device == "cuda":
        block = Case("FFN 4096/11008", "block", 4096, 11008, batch=8, length=1024, autocast=True, device=device)
        model = Case("Llama 4 × 4096", "model", 4096, 11008, 4, 32, 32000, 4, 1024, autocast=True, device=device)
        studies = [
            Study(block, BLOCK_METHODS, 20),
            Study(replace(block, name="FFN 1024/2816", d_model=1024, d_ff=2816), BLOCK_METHODS, 20),
            Study(replace(block, name="FFN 4096/11008, float32", autocast=False), CURVES, 10),
            Study(model, METHODS, 10),
            Study(replace(model, name="Llama 4 × 4096, embeddings frozen", embeddings=False), CURVES, 10),
            Study(replace(model, name="Llama 4 × 4096, checkpointing", checkpointing=True), (*CURVES, "lora"), 10),
        ]
    else:
        block = Case("FFN 512/1408, 2048 tokens", "block")
        model = Case("Llama 4 × 512, 2048 tokens")
        seen = ("full", "activation-space", "apex", "apex-recompute", "lora")
        wide = replace(block, name="FFN 1024/2816, 1024 tokens", d_model=1024, d_ff=2816, batch=4)
        frozen = replace(model, name="Llama 4 × 512, embeddings frozen", embeddings=False)
        again = replace(model, name="Llama 4 × 512, checkpointing", checkpointing=True)
        half = replace(model, name="Llama 7 × 512, bfloat16", layers=7, heads=16, vocabulary=8192, autocast=True)
        studies = [
            Study(block, BLOCK_METHODS, 15, seen),
            Study(replace(block, name="FFN 512/1408, 256 tokens", batch=1), BLOCK_METHODS, 25),
            Study(wide, BLOCK_METHODS, 5),
            Study(replace(block, name="FFN 512/1408, bfloat16", autocast=True), (*CURVES, "apex-split", "lora"), 9),
            Study(model, METHODS, 5, seen),
            Study(frozen, CURVES, 5),
            Study(again, (*CURVES, "lora"), 3),
            Study(replace(model, name="Llama 4 × 512, bfloat16", autocast=True), (*CURVES, "lora"), 3),
            Study(half, ("full", "apex-split", "apex", "apex-2.4%", "lora"), 5),
        ]
    if compiled:
        studies += [
            replace(
                s,
                case=replace(s.case, name=f"{s.case.name}, compiled", compiled=True),
                methods=(*CURVES[:3], "lora"),
                resident=(),
            )
            for s in studies[:1]
        ]
    return studies


def scaling_studies(device: str, quick: bool) -> dict[tuple[str, float], Study]:
    """One study per axis and value: tokens, width, depth, share k of units that are paired."""
    rounds, factor = (3, 4) if quick else (5, 1)
    wide = 8 if device == "cuda" else 1
    d_model = 512 * wide // factor
    block = Case("", "block", d_model, 11 * d_model // 4, heads=4, batch=8, length=128 * wide, device=device)
    deep = Case("", "model", d_model // 2, 11 * d_model // 8, 2, 4, 1024, 4, 128 * wide // factor, device=device)
    studies = {}
    for tokens in (64, 128, 256, 512, 1024, 4096):
        studies["tokens", tokens * wide // factor] = replace(block, batch=1, length=tokens * wide // factor)
    for width in (d_model // 4, d_model // 2, d_model, 2 * d_model):
        studies["width", width] = replace(block, d_model=width, d_ff=11 * width // 4)
    for layers in (1, 2, 4, 8):
        studies["layers", layers] = replace(deep, layers=layers)
    for share in (0.0625, 0.125, 0.1875, 0.25):
        studies["k", share] = replace(block, config=replace(block.config, fraction=share, direct_channels=0.5))
    return {key: Study(replace(c, name=f"{key[0]} {key[1]}"), CURVES, rounds) for key, c in studies.items()}


def throughput_cases(device: str, quick: bool) -> list[Case]:
    """Whole models as they are pre-trained: the shipped base's shape, and two larger ones."""
    if quick:
        return [Case("Llama 2 × 64", "model", 64, 176, 2, 4, 512, 2, 64, device=device)]
    return [
        Case("3 M: Llama 6 × 160", "model", 160, 512, 6, 8, 4096, 32, 256, device=device),
        Case("8 M: Llama 8 × 256", "model", 256, 704, 8, 8, 8192, 16, 256, device=device),
        Case("25 M: Llama 7 × 512", "model", 512, 1408, 7, 16, 8192, 8, 256, device=device),
    ]
