"""Data and Trainers as people bring them: each works in stages, or is refused by name before anything is trained."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import build
from test_training import SMALL, Blocks, arguments
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from apexlib.text.skills import skills
from apexlib.text.tokenizer import train_tokenizer
from apexlib.training.data import Streamed
from apexlib.training.stages import train_in_stages

datasets = pytest.importorskip("datasets")
WORDS = ["one two three four five " * 40, "six seven eight nine ten " * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*WORDS, *(m["content"] for each in skills("train", 60) for m in each["messages"])], 300)


def rows(count=64, ragged=False):
    """Examples of Python lists, all of one length or of several."""
    lists = [Blocks()[row]["input_ids"].tolist() for row in range(count)]
    return [ids[: 4 + row % 5] if ragged else ids for row, ids in enumerate(lists)]


def as_data(ids):
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def ragged(tokenizer):
    return {"train_dataset": as_data(rows(ragged=True)), "data_collator": DataCollatorForSeq2Seq(tokenizer)}


def masked_by_the_collator(tokenizer):
    data = datasets.Dataset.from_dict({"input_ids": rows(ragged=True), "note": ["extra column"] * 64})
    return {"train_dataset": data, "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}


def by_processing_class(tokenizer):
    return {"train_dataset": as_data(rows()), "processing_class": tokenizer}


GIVEN = {
    "a Dataset of lists": lambda _: {"train_dataset": as_data(rows())},
    "a Dataset as torch": lambda _: {"train_dataset": as_data(rows()).with_format("torch")},
    "a list of lists": lambda _: {"train_dataset": [{"input_ids": ids, "labels": ids} for ids in rows()]},
    "ragged rows": ragged,
    "labels by the collator, extra columns": masked_by_the_collator,
    "a tokenizer alone": by_processing_class,
}


@pytest.mark.case("data: a `datasets.Dataset` of lists, as torch, ragged, with further columns", "works")
@pytest.mark.case("data: a list of examples; a tokenizer or a collator alone", "works")
@pytest.mark.parametrize("method", ["apex", "full", "direct"])
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_data_as_the_trainer_takes_it(given, method, tokenizer, tmp_path):
    model = build("llama", vocab_size=len(tokenizer))
    data = given(tokenizer)
    record = train_in_stages(model, args=arguments(tmp_path), config=SMALL, method=method, **data)
    assert record.log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert len(record.plans) == (0 if method == "full" else 2)


def test_lists_and_tensors_are_the_same_run(tmp_path):
    found = []
    for name, data in (("lists", as_data(rows())), ("tensors", [Blocks()[row] for row in range(64)])):
        found.append(train_in_stages(build("llama", vocab_size=64), data, arguments(tmp_path / name), SMALL))
    pd.testing.assert_frame_equal(found[0].log, found[1].log)
    for one, two in zip(*(record.statistics for record in found), strict=True):
        pd.testing.assert_frame_equal(one, two)


class Stream(IterableDataset):
    def __init__(self, ids, count):
        self.ids, self.count, self.read = ids, count, []

    def __iter__(self):
        for row in range(self.count):
            self.read.append(row)
            yield {"input_ids": self.ids[row], "labels": self.ids[row]}


@pytest.mark.case("data: an `IterableDataset` with `max_steps`, in its own order", "works")
@pytest.mark.case("data: an `IterableDataset` without `max_steps`", "refused")
def test_a_stream_is_read_in_its_own_order(tmp_path):
    seen = []

    class Seeing(Trainer):
        def training_step(self, model, inputs, *given, **named):
            seen.extend(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *given, **named)

    stream = Stream(rows(), 64)
    record = train_in_stages(build("llama", vocab_size=64), stream, arguments(tmp_path), SMALL, trainer_class=Seeing)
    assert seen == rows()[: 6 * 4]
    assert len(record.plans) == 2
    args = arguments(tmp_path / "new", max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        train_in_stages(build("llama", vocab_size=64), stream, args, SMALL)


@pytest.mark.case("data: a stream that ends before the run does: it starts again", "works")
def test_a_stream_that_ends_starts_again_and_is_read_forwards_only():
    stream = Stream(rows(), 5)
    streamed = Streamed(stream, 8)
    assert [streamed[row]["input_ids"] for row in range(8)] == [*rows()[:5], *rows()[:3]]
    assert streamed[7]["input_ids"] == rows()[2]  # the last one is remembered
    assert stream.read == [0, 1, 2, 3, 4, 0, 1, 2]
    assert streamed[1]["input_ids"] == rows()[1]
    assert stream.read[8:] == [0, 1]


class Listening(TrainerCallback):
    def __init__(self):
        self.logged, self.stages = [], 0

    def on_log(self, args, state, control, logs=None, **_):
        self.logged += [state.global_step] * ("loss" in logs)

    def on_train_begin(self, *_, **__):
        self.stages += 1


@pytest.mark.case("`callbacks`, `compute_metrics`, several evaluation sets by name", "works")
def test_loggers_hear_the_steps_of_the_whole_run(tmp_path):
    listening = Listening()
    options = {"callbacks": [listening], "compute_metrics": lambda found: {"rows": len(found.predictions)}}
    options["eval_dataset"] = {"near": Blocks(size=8, start=7), "far": Blocks(size=8, start=10)}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3)
    record = train_in_stages(build("llama", vocab_size=64), Blocks(), args, SMALL, **options)
    assert listening.logged == record.log["step"].dropna().tolist()[:6] == [1, 2, 3, 4, 5, 6]
    assert listening.stages == 2


@pytest.mark.case("`EarlyStoppingCallback`: it ends the run, not a stage", "works")
def test_a_callback_that_stops_ends_the_run_not_a_stage(tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", learning_rate=10.0)
    options = {"eval_dataset": Blocks(size=8, start=7), "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]}
    record = train_in_stages(build("llama", vocab_size=64), Blocks(), args, SMALL, **options)
    assert len(record.trainable) == 1
    assert record.log["step"].max() < 3
    assert (tmp_path / "stage-0" / "model.safetensors").exists()
    again = train_in_stages(build("llama", vocab_size=64), Blocks(), args, SMALL, resume=True, **options)
    assert again.log.equals(record.log)


def test_the_best_so_far_is_that_of_the_run(tmp_path):
    class Noting(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            best.append(state.best_metric)

    best = []
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
    options = {"eval_dataset": Blocks(size=8, start=7), "callbacks": [Noting()]}
    train_in_stages(build("llama", vocab_size=64), Blocks(), args, SMALL, **options)
    assert best[0] is None
    assert best[3] is not None
    assert best[3] <= best[2]


@pytest.mark.case("`optimizer_cls_and_kwargs`: any optimizer class, given the method's parameter groups", "works")
def test_the_optimizer_of_ones_choice_gets_the_groups_of_the_method(tmp_path):
    class Noting(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **_):
            made.append(optimizer.optimizer)

    made = []
    options = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-3}), "callbacks": [Noting()]}
    train_in_stages(build("llama", vocab_size=64), Blocks(), arguments(tmp_path), SMALL, **options)
    assert {type(each) for each in made} == {torch.optim.NAdam}
    assert "operators" in {group["name"] for group in made[0].param_groups}


NOT_HONOURED = {
    "push_to_hub": ({"push_to_hub": True}, {}),
    "resume_from_checkpoint": ({"resume_from_checkpoint": "checkpoint-500"}, {}),
    "train_sampling_strategy": ({"train_sampling_strategy": "group_by_length"}, {}),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, {}),
    "use_liger_kernel": ({"use_liger_kernel": True}, {}),
    "optim=galore_adamw": ({"optim": "galore_adamw", "optim_target_modules": None}, {}),
    "optim=schedule_free_sgd": ({"optim": "schedule_free_sgd"}, {}),
    "optim_target_modules": ({"optim_target_modules": ["mlp"]}, {}),
    "save_only_model": ({"save_only_model": True}, {}),
    "ignore_data_skip": ({"ignore_data_skip": True}, {}),
    "enable_jit_checkpoint": ({"enable_jit_checkpoint": True}, {}),
    "accelerator_config split_batches": ({"accelerator_config": {"split_batches": True}}, {}),
    "optimizer_cls_and_kwargs": ({}, {"optimizer_cls_and_kwargs": (lambda: None, {})}),
    "optimizers": ({}, {"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}),
    "model_init": ({}, {"model_init": lambda: build("llama")}),
    "peft_config": ({}, {"peft_config": object()}),
}


@pytest.mark.case("`push_to_hub`: push the model that is returned", "refused")
@pytest.mark.case('`train_sampling_strategy="group_by_length"`', "refused")
@pytest.mark.case("`resume_from_checkpoint`: `resume=True` finds the newest state", "refused")
@pytest.mark.case("`auto_find_batch_size`, `ignore_data_skip`, `accelerator_config` with `split_batches`", "refused")
@pytest.mark.case("`save_only_model`: `checkpoints=[...]` keeps plain models; `enable_jit_checkpoint`", "refused")
@pytest.mark.case("`use_liger_kernel`", "refused")
@pytest.mark.case("GaLore, APOLLO, LOMO, schedule-free optimizers, factories of optimizers (Muon, Dion)", "refused")
@pytest.mark.case("`optimizers` made for the plain model; `model_init`; `peft_config`", "refused")
@pytest.mark.parametrize("name", NOT_HONOURED)
def test_what_is_not_honoured_is_refused_by_name(name, tmp_path):
    changes, options = NOT_HONOURED[name]
    with pytest.raises(ValueError, match=rf"^{name}"):
        train_in_stages(build("llama"), Blocks(), arguments(tmp_path, **changes), SMALL, **options)
    assert not list(tmp_path.glob("*/run.json"))
    assert not (tmp_path / "run.json").exists()


def test_an_option_that_nobody_takes_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="lora_rnak"):
        train_in_stages(build("llama"), Blocks(), arguments(tmp_path), SMALL, lora_rnak=3)


@pytest.mark.case("several GPUs in one process (`DataParallel`): `accelerate launch` uses them", "refused")
def test_data_parallelism_inside_a_process_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2 if args.device else 0  # which asking for the device has set
    with pytest.raises(ValueError, match=r"^n_gpu=2: need 0; DataParallel .* use accelerate launch"):
        train_in_stages(build("llama"), Blocks(), args, SMALL)


@pytest.mark.case("`WANDB_LOG_MODEL=checkpoint`, `HF_MLFLOW_LOG_ARTIFACTS`: states are no checkpoints", "refused")
@pytest.mark.parametrize(("name", "value"), [("WANDB_LOG_MODEL", "checkpoint"), ("HF_MLFLOW_LOG_ARTIFACTS", "1")])
def test_uploads_of_checkpoints_are_refused(name, value, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name}={value}: need none"):
        train_in_stages(build("llama"), Blocks(), arguments(tmp_path), SMALL)


HONOURED = {  # by the Trainer of each stage as by one for the whole run
    "cosine_with_min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "warmup_stable_decay": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 3},
    },
    "label_smoothing_factor": {"label_smoothing_factor": 0.3},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "optim": {"optim": "adafactor"},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.01},
}


@pytest.mark.case("`cosine_with_min_lr`, `warmup_stable_decay` (WSD), with their arguments", "works")
@pytest.mark.case("`label_smoothing_factor`, `neftune_noise_alpha`, `include_num_input_tokens_seen`", "works")
@pytest.mark.parametrize("name", HONOURED)
def test_what_a_stock_trainer_honours_is_honoured(name, tmp_path):
    """One stage is the stock Trainer, to the bit; over two, steps, rates and tokens go on; neither is what it was."""
    given = HONOURED[name]
    args = arguments(tmp_path / "stock", train_sampling_strategy="sequential", seed=3, **given)
    stock = Trainer(build("llama", vocab_size=64), args, None, Blocks())
    stock.train()
    expected = pd.DataFrame([row for row in stock.state.log_history if "loss" in row])

    def log(method, **changes):
        folder = tmp_path / f"{method} {len(changes)}"
        args = arguments(folder, train_sampling_strategy="sequential", seed=3, **changes)
        return train_in_stages(build("llama", vocab_size=64), Blocks(), args, SMALL, method=method).log

    full, apex, plain = log("full", **given), log("apex", **given), log("apex")
    timed = ["train_runtime", "train_tokens_per_second"]
    for column in expected.columns.intersection(full.columns).difference(timed):
        pd.testing.assert_series_equal(full[column], expected[column])
    for column in ("learning_rate", "epoch", *expected.columns.intersection(["num_input_tokens_seen"])):
        shares = (values / values.max() for values in (apex[column], expected[column]))
        pd.testing.assert_series_equal(*shares)  # of several groups, the Trainer logs the first one's rate
    same = ["average_tokens_across_devices"]  # in one process
    assert (name in same) == apex.equals(plain)


@pytest.mark.case("FSDP1, ZeRO 3, Megatron, parallelism of tensors, by arguments or from the environment", "refused")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"USE_FSDP": "true"}, r"^FSDP1: flattens matrices; need FSDP2: version 2, --fsdp_version 2"),
        ({"USE_FSDP": "true", "FSDP_VERSION": "2"}, r"^one process: has nobody to share weights with"),
        ({"USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, r"^cpu_offload: was never tried"),
        ({"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3"}, r"^ZeRO 3: need ZeRO 1 or 2, or FSDP2"),
        ({"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": "zero.json"}, r"^ZeRO of unknown stage: need ZeRO 1 or 2"),
        ({"USE_PARALLELISM_CONFIG": "true"}, r"^PARALLELISM_CONFIG: cuts matrices, which expansion needs whole"),
        ({"USE_MEGATRON_LM": "true"}, r"^MEGATRON_LM: cuts matrices, which expansion needs whole"),
    ],
)
def test_sharding_that_cannot_be_is_refused_by_name(given, message, tmp_path, monkeypatch):
    args = arguments(tmp_path / "run")
    for name, value in given.items():
        monkeypatch.setenv(name if name.startswith("FSDP") else f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=message):
        train_in_stages(build("llama"), Blocks(), args, SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("engine", "method", "config", "message"),
    [
        ("fsdp", "apex", {"decay_to_start": True}, r"^decay_to_start: under FSDP and ZeRO"),
        (
            "fsdp",
            "direct",
            {"strategy": "gradient"},
            r"^strategy 'gradient': under FSDP no process holds whole gradients",
        ),
        ("zero", "gmt", {}, r"^ZeRO: shows no gradients, which GradientMask changes"),
    ],
)
def test_what_needs_whole_weights_or_gradients_is_refused(engine, method, config, message, tmp_path, monkeypatch):
    monkeypatch.setattr("apexlib.training.checks.engine_of", lambda args: engine)
    with pytest.raises(ValueError, match=message):
        train_in_stages(build("llama"), Blocks(), arguments(tmp_path), replace(SMALL, **config), method=method)


def test_a_start_that_failed_leaves_the_folder_free(tmp_path):
    with pytest.raises(ValueError, match="no input_ids"):
        train_in_stages(build("llama"), [{"text": "a"}] * 64, arguments(tmp_path), SMALL)
    assert train_in_stages(build("llama", vocab_size=64), Blocks(), arguments(tmp_path), SMALL).plans


# TRL


def sft(tokenizer, folder, data, **changes):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": "none", "logging_steps": 1}
    settings |= {"save_strategy": "no", "learning_rate": 1e-3, "max_length": 32, "disable_tqdm": True}
    args = trl.SFTConfig(str(folder), dataloader_pin_memory=False, bf16=False, **settings | changes)
    model = build("llama", vocab_size=len(tokenizer), attention="sdpa")
    more = {"trainer_class": trl.SFTTrainer, "processing_class": tokenizer}
    return train_in_stages(model, data, args, SMALL, **more)


def conversations():
    return datasets.Dataset.from_list([{"messages": each["messages"]} for each in skills("train", 64)])


@pytest.mark.case("TRL: `SFTTrainer` on messages, with `assistant_only_loss`, with packing", "works")
@pytest.mark.parametrize("changes", [{}, {"assistant_only_loss": True}, {"packing": True}], ids=str)
def test_sft_on_conversations(changes, tokenizer, tmp_path):
    record = sft(tokenizer, tmp_path, conversations(), **changes)
    assert record.log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert record.log["loss"].notna().all()
    assert len(record.plans) == 2


@pytest.mark.case("TRL: `SFTTrainer` on text, on prompts with completions", "works")
def test_sft_on_text_and_on_prompts_with_completions(tokenizer, tmp_path):
    text = datasets.Dataset.from_dict({"text": [f"one two {n} " * 5 for n in range(64)]})
    assert len(sft(tokenizer, tmp_path / "text", text).plans) == 2
    pairs = {"prompt": [f"one {n}" for n in range(64)], "completion": [f" two {n}" for n in range(64)]}
    assert len(sft(tokenizer, tmp_path / "pairs", datasets.Dataset.from_dict(pairs)).plans) == 2


def test_the_data_of_trl_are_prepared_once(tokenizer, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    prepared, original = [], trl.SFTTrainer._prepare_dataset
    monkeypatch.setattr(trl.SFTTrainer, "_prepare_dataset", lambda *given: prepared.append(1) or original(*given))
    sft(tokenizer, tmp_path, conversations())
    assert prepared == [1]


@pytest.mark.case("TRL: `DPOTrainer` on preferences", "works")
def test_dpo_on_preferences(tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    chat = [each["messages"] for each in skills("train", 64)]
    answer = [{"role": "assistant", "content": "no idea"}]
    pairs = [{"prompt": each[:1], "chosen": each[1:2], "rejected": answer} for each in chat]
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none", "logging_steps": 1}
    args = trl.DPOConfig(str(tmp_path), dataloader_pin_memory=False, bf16=False, save_strategy="no", **settings)
    model, reference = (build("llama", vocab_size=len(tokenizer)) for _ in range(2))
    more = {"trainer_class": trl.DPOTrainer, "processing_class": tokenizer, "ref_model": reference}
    record = train_in_stages(model, datasets.Dataset.from_list(pairs), args, SMALL, **more)
    assert record.log["step"].tolist() == [1, 2, 3, 4]
    assert len(record.plans) == 2
