"""What a training step allocates on one process of several: `python sharded_step.py FILE CASE STRATEGY:METHOD...`."""

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
from benchmarks.workloads import APEX, Case, workload


def peak(case: Case, strategy: str, method: str) -> int:
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
        work = workload(case, method)
        (shared["ids"],) = work.inputs
        shared["model"], shared["optimizer"] = accelerator.prepare(work.model, work.optimizer)
        del work
        gc.collect()
        for _ in range(2):  # moments, and the buckets of DDP
            step()

    if strategy == "ddp":  # whose buckets are seen only while they are made
        return peak_of(step, 0, prepare=prepare)
    prepare()
    state = [value for own in shared["optimizer"].state.values() for value in own.values()]
    tensors = [*shared["model"].parameters(), *shared["model"].buffers(), *state, shared["ids"]]
    storages = [sharding.local(tensor).untyped_storage() for tensor in tensors]
    return peak_of(step, sum({id(each): each.nbytes() for each in storages}.values()))


if __name__ == "__main__":
    case = Case(**json.loads(sys.argv[2]) | {"config": APEX})
    peaks = {name: peak(case, *name.split(":")) for name in sys.argv[3:]}
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(peaks))
    torch.distributed.destroy_process_group()
