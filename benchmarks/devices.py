"""What a step needs of each of several devices, for known shapes, on paper: `python -m benchmarks.devices`.

Nothing of this was run: `plan_budget` takes the step on the meta device. One sequence of 2048 tokens a device, float32
weights, gradient checkpointing.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
from transformers import LlamaConfig

from apexlib.analysis.budget import plan_budget
from apexlib.plan import ApexConfig
from apexlib.provenance import save_table
from apexlib.suite.folders import folders

STEP = {"batch": 1, "length": 2048, "gradient_checkpointing": True}
SHAPES = {  # width, channels, layers, heads, groups
    "1.1 B": (2048, 5632, 22, 32, 4),
    "7 B": (4096, 11008, 32, 32, 32),
    "13 B": (5120, 13824, 40, 40, 40),
    "70 B": (8192, 28672, 80, 64, 8),
}
SHARED = [(1, "ddp"), *((devices, strategy) for devices in (8, 64) for strategy in ("ddp", "fsdp", "zero2"))]
METHODS = {"full": "full", "apex 52 %": "apex", "apex 2.4 %": "apex", "lora": "lora"}
COLUMNS = [f"{name}_mib" for name in ("train", "parameters", "optimizer", "gradients", "gathered", "activations")]


def shape(name: str) -> LlamaConfig:
    """A Llama of that size."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return LlamaConfig(**dict(zip(keys, SHAPES[name], strict=True)), vocab_size=32000, max_position_embeddings=2048)


def devices_table(step: dict = STEP) -> pd.DataFrame:
    """One row per model, number of devices, strategy and method."""
    rows = []
    for model in SHAPES:
        for devices, strategy in SHARED:
            for label, method in METHODS.items():
                config = replace(ApexConfig.preset("2.4%" if "2.4" in label else "52%"), align=16)
                share = {"devices": devices, "strategy": strategy, "methods": [method]}
                found = plan_budget(shape(model), config, **step, **share).iloc[0]
                told = {"model": model, "devices": devices, "strategy": strategy, "method": label}
                rows.append(told | found[["parameters", "trainable", *COLUMNS, "traffic_mib"]].to_dict())
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=__doc__)
    parser.add_argument("--out", type=Path, default=folders("bench").results)
    print(save_table(devices_table(), "devices", parser.parse_args(arguments).out, **STEP))


if __name__ == "__main__":
    main()
