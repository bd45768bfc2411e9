"""Which cases and methods a run of the benchmark measures, by device and size."""

import os
from dataclasses import dataclass, replace

from benchmarks.workloads import FORMS, METHODS, Case

BLOCK_METHODS = (*FORMS, "lora")
CURVES = ("full", "activation-space", "apex", "apex-recompute")
PEERS = ("full", "apex", "apex-2.4%", "lora")
TINY = "tiny "  # how names of cases of a quick run begin


@dataclass(frozen=True)
class Study:
    """A case, its methods, and how often each step is timed; `resident` names methods to measure in pages too."""

    case: Case
    methods: tuple[str, ...]
    rounds: int
    resident: tuple[str, ...] = ()


def step_studies(device: str, quick: bool) -> list[Study]:
    """The cases of the table of steps; the first of each kind are those that most figures show."""
    studies = _on_cuda() if device == "cuda" else _on_cpu()
    return [_tiny(study) for study in studies] if quick else studies


def _on_cpu() -> list[Study]:
    block = Case("FFN 512/1408, 2048 tokens", "block")
    model = Case("Llama 4 × 512, 2048 tokens")
    cores = os.cpu_count() or 1

    def blocks(name: str, **changes: object) -> Case:
        return replace(block, name=f"FFN {name}", **changes)

    def models(name: str, **changes: object) -> Case:
        return replace(model, name=f"Llama {name}", **changes)

    small = models("8 × 256", d_model=256, d_ff=704, layers=8, vocabulary=8192)
    deep = models("7 × 512, bfloat16", layers=7, heads=16, vocabulary=8192, autocast=True)
    short = blocks("1024/2816, 256 tokens", d_model=1024, d_ff=2816, batch=1)
    return [
        Study(block, BLOCK_METHODS, 9, ("full", "apex", "apex-recompute")),
        Study(blocks("512/1408, 256 tokens", batch=1), BLOCK_METHODS, 15),
        Study(short, (*PEERS, "apex-split"), 9),
        Study(replace(short, name=f"{short.name}, bfloat16", autocast=True), (*PEERS, "apex-split"), 9),
        Study(blocks("1024/2816, 1024 tokens", d_model=1024, d_ff=2816, batch=4), BLOCK_METHODS, 5),
        Study(blocks("2048/5632, 512 tokens", d_model=2048, d_ff=5632, batch=2), (*PEERS, "apex-split"), 3),
        Study(blocks("512/1408, bfloat16", autocast=True), (*CURVES, *PEERS[2:], "apex-split"), 7),
        Study(
            blocks("1024/2816, bfloat16", d_model=1024, d_ff=2816, batch=4, autocast=True), (*PEERS, "apex-split"), 5
        ),
        Study(model, METHODS, 5, ("full", "apex")),
        Study(models("4 × 512, embeddings frozen", embeddings=False), CURVES, 3),
        Study(models("4 × 512, checkpointing", checkpointing=True), ("full", "apex", "apex-recompute", "lora"), 2),
        Study(models("4 × 512, all threads", threads=cores), PEERS, 5),
        Study(models("4 × 512, all threads, bfloat16", threads=cores, autocast=True), PEERS, 3),
        Study(small, PEERS, 3),
        Study(replace(small, name=f"{small.name}, bfloat16", autocast=True), PEERS, 3),
        Study(deep, (*PEERS, "apex-split"), 4),
        Study(replace(deep, name=f"{deep.name}, compiled", compiled=True), PEERS, 4),
    ]


def _on_cuda() -> list[Study]:
    block = Case("FFN 4096/11008", "block", 4096, 11008, batch=8, length=1024, autocast=True, device="cuda")
    model = Case("Llama 4 × 4096", "model", 4096, 11008, 4, 32, 32000, 4, 1024, autocast=True, device="cuda")
    return [
        Study(block, BLOCK_METHODS, 20),
        Study(replace(block, name="FFN 1024/2816", d_model=1024, d_ff=2816), BLOCK_METHODS, 20),
        Study(replace(block, name="FFN 4096/11008, float32", autocast=False), CURVES, 10),
        Study(model, METHODS, 10),
        Study(replace(model, name="Llama 4 × 4096, embeddings frozen", embeddings=False), CURVES, 10),
        Study(replace(model, name="Llama 4 × 4096, checkpointing", checkpointing=True), (*CURVES, "lora"), 10),
        Study(replace(model, name="Llama 4 × 4096, compiled", compiled=True), PEERS, 10),
    ]


def _tiny(study: Study) -> Study:
    """The same study, so small that a step takes a moment; compiling takes as long as ever, and is done for two."""
    case = study.case
    sizes = {"d_model": case.d_model // 4, "d_ff": case.d_ff // 4, "layers": min(case.layers, 2), "heads": 4}
    case = replace(case, name=f"{TINY}{case.name}", **sizes, vocabulary=512, batch=2, length=64)
    return replace(study, case=case, rounds=2, methods=study.methods[:2] if case.compiled else study.methods)


def scaling_studies(device: str, quick: bool) -> dict[tuple[str, float], Study]:
    """One study per axis and value: tokens, width, depth, share k of units that are paired."""
    factor = 4 if quick else 1
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
    return {key: Study(replace(c, name=f"{key[0]} {key[1]}"), CURVES, 3) for key, c in studies.items()}
