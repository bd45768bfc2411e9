"""Trainings for one process of several, or for one alone: `python sharded_run.py FOLDER NAME...`; see `RUNS`.

What a run leaves on the first process goes to `FOLDER/NAME-<processes>.pt`.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from conftest import build
from transformers import TrainerCallback, TrainingArguments

from apexlib.plan import ApexConfig
from apexlib.training.stages import train_in_stages

HERE = Path(__file__).parent
BY_ENVIRONMENT = "ACCELERATE_USE_FSDP" in os.environ  # accelerate sets it later on
# the mean does not depend on how the assessment is cut into batches, as the rank score does
SMALL = {"fraction": 0.25, "direct_heads": 0.5, "direct_channels": 0.6, "assessment_samples": 8, "statistic": "mean"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
EVALUATED |= {"metric_for_best_model": "loss", "save_strategy": "steps", "save_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch_fused", "learning_rate": 1e-2}
# by name: the method, the variant of the model, what else differs
RUNS = {
    "apex": ("apex", "llama", {"arguments": {"gradient_accumulation_steps": 2}, "config": {"train_norms": True}}),
    "tied": ("apex", "llama", {"model": {"tie_word_embeddings": True}, "arguments": {"gradient_checkpointing": True}}),
    "magnitude": ("apex", "gpt2", {"config": {"strategy": "magnitude", "train_embeddings": False}}),
    "kept": ("apex", "llama", {"arguments": EVALUATED, "checkpoints": [0, 3, 5]}),
    "lora": ("lora", "llama", {}),
    "gmt": ("gmt", "llama", {}),
    "hft": ("hft", "llama", {}),
    "whole": ("apex", "llama", {"arguments": SAVED}),
    "killed": ("apex", "llama", {"arguments": SAVED, "killed": True}),
    "resumed": ("apex", "llama", {"arguments": SAVED, "resume": True}),
}


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2")
ACCELERATE += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def launched(script, *arguments, by=TORCHRUN):
    """Run a script of this folder on two processes of the CPU."""
    launch = [sys.executable, "-m", *by]
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    around = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launch, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | around, timeout=900, check=False)


class Blocks(torch.utils.data.Dataset):
    """Blocks that count upwards from their own number."""

    def __init__(self, size=64, start=0):
        self.size, self.start = size, start

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        ids = (torch.arange(12) * (1 + row % 3) + row + self.start) % 48
        return {"input_ids": ids, "labels": ids}


class Kill(TrainerCallback):
    """Kills its process at the beginning of a step of the second stage, once the last is saved."""

    def on_step_begin(self, args, state, control, **_):
        if Path(args.output_dir, "step-1-2").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)


def run(name, folder, processes):
    method, variant, asked = RUNS[name]
    given = {"max_steps": 6, "per_device_train_batch_size": 4 // processes, "learning_rate": 0.3, "optim": "sgd"}
    given |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    given |= {"ddp_backend": "gloo"} if processes > 1 else {}
    given |= {"fsdp": True} if processes > 1 and not BY_ENVIRONMENT else {}
    output = folder / f"{name}-{processes}"
    args = TrainingArguments(str(output), dataloader_pin_memory=False, **given | asked.get("arguments", {}))
    model = build(variant, **asked.get("model", {}))
    if args.process_index:  # only those of the first process count
        torch.nn.utils.vector_to_parameters(torch.full((model.num_parameters(),), torch.nan), model.parameters())
    options = {"callbacks": [Kill()]} if "killed" in asked else {}
    options |= {"eval_dataset": Blocks(8, 100) if "eval_strategy" in asked.get("arguments", {}) else None}
    options |= {"checkpoints": asked.get("checkpoints", ()), "resume": "resume" in asked}
    record = train_in_stages(
        model, Blocks(), args, ApexConfig(**SMALL | asked.get("config", {})), method=method, **options
    )
    if args.process_index:
        assert all(parameter.is_meta for parameter in record.model.parameters())
    else:
        plans = [plan.layers for plan in record.plans]
        torch.save(
            (record.model.state_dict(), plans, record.log.drop(columns="gradient_norm")),
            output.with_name(f"{name}-{processes}.pt"),
        )


if __name__ == "__main__":
    for name in sys.argv[2:]:
        run(name, Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1)))
