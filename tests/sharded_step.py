"""What a training step allocates on one process of several: `python sharded_step.py FILE STRATEGY:METHOD...`."""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from apexlib.training import sharding
from benchmarks.measure import peak_of
from benchmarks.workloads import Case, workload

CASE = Case("small", d_model=64, d_ff=176, layers=3, heads=4, vocabulary=256, batch=2, length=48)


def peak(strategy: str, method: str) -> int:
    """Peak bytes of a step that is not the first, with all that lives on this process before it."""
    args = TrainingArguments("unused", use_cpu=True, fsdp=strategy == "fsdp", ddp_backend="gloo", report_to="none")
    accelerator, shared = Accelerator(cpu=True), {}
    if strategy == "fsdp":
        sharding.set_up(accelerator, args, "LlamaDecoderLayer")

    def step() -> None:
        shared["model"](input_ids=shared["ids"], labels=shared["ids"]).loss.backward()
        shared["optimizer"].step()
        shared["optimizer"].zero_grad()

    def prepare() -> None:
        work = workload(CASE, method)
        (shared["ids"],) = work.inputs
        shared["model"], shared["optimizer"] = accelerator.prepare(work.model, work.optimizer)
        del work
        gc.collect()
        for _ in range(2):  # moments, and the buckets of DDP
            step()

    return peak_of(step, 0, prepare=prepare)


if __name__ == "__main__":
    peaks = {name: peak(*name.split(":")) for name in sys.argv[2:]}
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(peaks))
    torch.distributed.destroy_process_group()
