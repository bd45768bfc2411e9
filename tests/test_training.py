"""Staged training: one run cut into stages, every method through the same function."""

import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from apexlib.activations import ActivationRecorder, activation_statistics, gradient_norms
from apexlib.analysis.budget import plan_budget
from apexlib.evaluation import in_evaluation, perplexity
from apexlib.expansion import expand, fuse, is_expanded
from apexlib.inspection import parameter_groups
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.selection import select
from apexlib.text.datasets import PackedTokens, collate, in_one_row
from apexlib.text.tokenizer import train_tokenizer
from apexlib.training import bar, stages
from apexlib.training.checkpoints import checkpoint_folder
from apexlib.training.checks import first_not_finite
from apexlib.training.data import check_data
from apexlib.training.methods import METHODS, Method, keep_largest, method_of
from apexlib.training.stages import data_order, train_in_stages
from apexlib.training.trainer import draw_to
from benchmarks.workloads import Case, workload

SMALL = ApexConfig(fraction=0.25, direct_heads=0.5, direct_channels=0.6, assessment_samples=8)


class Blocks(torch.utils.data.Dataset):
    """Blocks that count upwards from their own number; it notes which of them are read."""

    def __init__(self, size=64, start=0):
        self.size, self.start, self.read = size, start, []

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        self.read.append(row)
        ids = (torch.arange(12) * (1 + row % 3) + row + self.start) % 48
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **changes):
    given = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    given |= {"report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "cosine", "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **(given | {"dataloader_pin_memory": False} | changes))


def run(tiny_model, folder, method="apex", config=SMALL, variant="llama", dataset=None, **changes):
    options = {
        name: changes.pop(name)
        for name in ("eval_dataset", "data_collator", "trainer_class", "checkpoints")
        if name in changes
    }
    model = tiny_model(variant)
    return train_in_stages(
        model, Blocks() if dataset is None else dataset, arguments(folder, **changes), config, method=method, **options
    )


def changed(record, base):
    start = base.state_dict()
    return {name for name, value in record.model.state_dict().items() if not torch.equal(value, start[name])}


@pytest.mark.case("evaluation, logs and saves by steps, by epochs, as a share of the run", "works")
@pytest.mark.parametrize(
    "when",
    [
        {"eval_strategy": "epoch", "logging_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 12, "logging_steps": 5, "logging_first_step": True},
        {"eval_strategy": "steps", "eval_steps": 0.25, "logging_steps": 0.1},
        {"eval_strategy": "epoch", "eval_delay": 2},
        {"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 10, "eval_on_start": True},
    ],
    ids=str,
)
def test_arguments_speak_of_the_whole_run_as_the_stock_trainer_takes_them(when, tiny_model, tmp_path):
    given = {"max_steps": -1, "num_train_epochs": 4, "per_device_train_batch_size": 8} | when
    held_out = Blocks(size=8, start=100)
    stock = Trainer(tiny_model("llama"), arguments(tmp_path / "a", **given), None, Blocks(), held_out)
    stock.train()
    config = ApexConfig(**(vars(SMALL) | {"stages": 3}))  # whose borders, 11 and 21 of 32 steps, are no one's
    log = run(tiny_model, tmp_path / "b", config=config, eval_dataset=held_out, **given).log
    for loss in ("loss", "eval_loss"):
        expected = [(row["step"], row["epoch"]) for row in stock.state.log_history if loss in row]
        found = log.dropna(subset=[loss])[["step", "epoch"]]
        assert [tuple(row) for row in found.to_numpy()] == [(step, pytest.approx(epoch)) for step, epoch in expected]
        assert expected


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_plain_model(method, tiny_model, tmp_path):
    record = run(tiny_model, tmp_path, method)
    base = tiny_model("llama")
    assert type(record.model) is type(base)
    assert not is_expanded(record.model)
    assert set(record.model.state_dict()) == set(base.state_dict())
    assert changed(record, base)
    assert record.log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert record.log["stage"].nunique() == (2 if METHODS[method].staged else 1)
    assert record.log["loss"].iloc[-1] < record.log["loss"].iloc[0]
    last = tmp_path / f"stage-{record.log['stage'].max()}"
    loaded = AutoModelForCausalLM.from_pretrained(last)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, record.model.state_dict()[name]), name


def test_which_methods_start_afresh_at_each_stage():
    staged = {"apex": True, "direct": True, "hft": True, "restart": True, "full": False, "lora": False, "gmt": False}
    assert {name: METHODS[name].staged for name in staged} == staged


def test_dora_trains_a_norm_for_each_row_beside_lora_and_leaves_a_plain_model(tiny_model, tmp_path):
    model = tiny_model("llama")
    rows = sum(
        part.out_features for name, part in model.named_modules() if name != "lm_head" and type(part) is nn.Linear
    )
    counts = {}
    for dora in (False, True):
        args = arguments(tmp_path / str(dora), max_steps=4)
        record = train_in_stages(tiny_model("llama"), Blocks(), args, SMALL, method="lora", lora_dora=dora)
        counts[dora] = record.trainable["trainable"].iloc[0]
    assert counts[True] - counts[False] == rows
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "True" / "stage-0").state_dict()
    start = model.state_dict()
    assert loaded.keys() == start.keys()
    moved = {name for name, value in start.items() if not torch.equal(loaded[name], value)}
    assert len(moved) == sum(type(part) is nn.Linear for part in model.get_submodule("model").modules())


@pytest.mark.parametrize("variant", ["gpt2", "qwen2", "opt"])
def test_other_families_train_too(variant, tiny_model, tmp_path):
    record = run(tiny_model, tmp_path, variant=variant, max_steps=4)
    assert changed(record, tiny_model(variant))


def test_what_trains_is_what_the_method_says(tiny_model, tmp_path):
    shares = {method: run(tiny_model, tmp_path / method, method, max_steps=2).trainable["share"] for method in METHODS}
    assert shares["full"].tolist() == [1.0]
    assert shares["gmt"].tolist() == [1.0]
    assert 0 < shares["lora"].iloc[0] < 1.5  # rank 16 is no small rank at width 16
    operators = shares["apex"] - shares["direct"]
    assert (operators > 0).all()
    matrices = sum(p.numel() for n, p in tiny_model("llama").named_parameters() if p.dim() == 2 and "layers" in n)
    total = sum(p.numel() for p in tiny_model("llama").parameters())
    assert ((1 - shares["hft"]) * total < 0.8 * matrices).all()
    assert ((1 - shares["hft"]) * total > 0.2 * matrices).all()


def test_rows_outside_every_plan_keep_their_bits(tiny_model, tmp_path):
    record = run(tiny_model, tmp_path, config=ApexConfig(**(vars(SMALL) | {"train_embeddings": False})))
    base = tiny_model("llama")
    for layer in range(2):
        planned = {
            unit
            for plan in record.plans
            for part in plan.layers
            if (part.layer, part.component) == (layer, "channel")
            for unit in (*part.source, *part.target, *part.direct)
        }
        kept = sorted(set(range(24)) - planned)
        new, old = (model.model.layers[layer].mlp for model in (record.model, base))
        assert kept
        assert torch.equal(new.gate_proj.weight[kept], old.gate_proj.weight[kept])
        assert torch.equal(new.down_proj.weight[:, kept], old.down_proj.weight[:, kept])
        assert (new.gate_proj.weight[sorted(planned)] != old.gate_proj.weight[sorted(planned)]).any(dim=1).all()
    assert torch.equal(record.model.model.embed_tokens.weight, base.model.embed_tokens.weight)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_schedule_is_one_cosine_over_all_stages_and_each_warms_up_anew(stages, tiny_model, tmp_path):
    config = ApexConfig(**(vars(SMALL) | {"stages": stages, "operator_lr_scale": 3.0}))
    record = run(tiny_model, tmp_path, config=config, max_steps=9, warmup_steps=2)
    step = torch.arange(9.0)
    cosine = 0.5 * (1 + torch.cos(math.pi * (step - 2) / 7))
    expected = 1e-2 * torch.where(step < 2, step / 2, cosine)
    for start in [round(9 * stage / stages) for stage in range(1, stages)]:  # a third and two thirds of the rate
        expected[start : start + 2] *= torch.tensor([1 / 3, 2 / 3])[: 9 - start]
    logged = torch.tensor(record.log["learning_rate"].to_numpy(), dtype=torch.float32)
    assert_close(logged / logged.max(), expected / expected.max(), rtol=1e-5, atol=1e-8)
    assert record.log["step"].tolist() == list(range(1, 10))


def test_the_order_of_the_data_is_one_permutation_an_epoch():
    assert data_order(3, 7, seed=0) == [2, 0, 1, 2, 1, 0, 1]


def test_the_seed_of_the_data_goes_before_that_of_the_run(tiny_model, tmp_path):
    data = Blocks(size=24)
    run(tiny_model, tmp_path, "full", dataset=data, seed=1, data_seed=5)
    assert data.read[24:] == data_order(24, 24, seed=5) != data_order(24, 24, seed=1)


def test_each_stage_draws_operators_of_its_own(tiny_model):
    model, method = tiny_model("llama"), method_of("apex", SMALL)
    statistics, drawn = activation_statistics(model, [{"input_ids": torch.arange(24).reshape(2, 12)}]), []
    for stage in (0, 1):
        trained = method.begin(model, stage, statistics)
        drawn.append(trained.model.layers[0].mlp.apex_channel.operator.first.detach().clone())
        model = method.end(trained)
    assert drawn[0].shape == drawn[1].shape
    assert not torch.equal(*drawn)


def test_gradient_masking_keeps_three_fifths_of_each_weight_as_published(tiny_model):
    model = tiny_model("llama").train()
    model(input_ids=torch.arange(24).reshape(2, 12), labels=torch.arange(24).reshape(2, 12)).loss.backward()
    method_of("gmt", SMALL).change_gradients(model)
    for name, weight in model.named_parameters():
        if "mlp" in name:
            assert (weight.grad != 0).sum().item() == round(0.6 * weight.numel()), name


def test_stages_take_successive_slices_of_one_order(tiny_model, tmp_path):
    data = Blocks(size=40)
    run(tiny_model, tmp_path, dataset=data, max_steps=10, seed=5)  # 40 examples: one epoch
    trained = data.read[40 + SMALL.assessment_samples :]  # after one look at each example
    assert sorted(trained) == list(range(40))  # each once, over both stages
    assert trained == data_order(40, 40, seed=5)
    full = Blocks(size=40)
    run(tiny_model, tmp_path / "full", "full", dataset=full, max_steps=10, seed=5)
    assert full.read[40:] == trained  # the baselines see the same


def test_later_stages_use_what_was_gathered_in_training_at_no_extra_pass(tiny_model, tmp_path):
    data = Blocks()
    record = run(tiny_model, tmp_path, dataset=data, config=ApexConfig(**(vars(SMALL) | {"stages": 3})))
    assert len(data.read) == 64 + SMALL.assessment_samples + 6 * 4  # once each to check them, the rest to learn from
    assert [len(table) for table in record.statistics] == [2 * (2 + 24)] * 3
    assert [int(table["tokens"].iloc[0]) for table in record.statistics] == [8 * 12, 2 * 4 * 12, 2 * 4 * 12]
    for stage, (plan, statistics) in enumerate(zip(record.plans, record.statistics, strict=True)):
        assert plan.layers == select(statistics, SMALL, stage=stage).layers
    first = activation_statistics(
        tiny_model("llama"),
        [torch.utils.data.default_collate([data[row] for row in data_order(64, 24, 42)[i : i + 4]]) for i in (0, 4)],
        top=0.25,
    )
    pd.testing.assert_frame_equal(record.statistics[0], first)
    assert ExpansionPlan.from_json(tmp_path / "stage-1" / "plan.json") == record.plans[1]
    assert len(pd.read_parquet(tmp_path / "stage-1" / "statistics.parquet")) == 52


def test_runs_that_start_alike_assess_once(tiny_model, tmp_path, monkeypatch):
    passes = []

    def counted(*given, **named):
        passes.append(1)
        return activation_statistics(*given, **named)

    monkeypatch.setattr(stages, "activation_statistics", counted)

    def assessed(name, model, dataset=None, **config):
        own = ApexConfig(**(vars(SMALL) | config))
        return run(lambda _: model, tmp_path / name, dataset=dataset, config=own, seed=1).statistics[0], len(passes)

    other = tiny_model("llama")
    scaled = tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight[3] += 1
    first, count = assessed("first", tiny_model("llama"))
    assert count == 1
    first["activation"] = 0.0  # the caller's own
    again, count = assessed("again", tiny_model("llama"), operator="dense", direct_heads=0.75)
    assert count == 1
    assert (again["activation"] > 0).all()
    tables = [again]
    for number, changed in enumerate([{"fraction": 0.2}, {"assessment_samples": 4}, {"dataset": Blocks(start=3)}], 2):
        table, count = assessed(str(number), tiny_model("llama"), **changed)
        assert count == number
        tables.append(table)
    for number, model in enumerate([other, scaled, tiny_model("llama", dtype=torch.bfloat16)], 5):
        table, count = assessed(str(number), model)
        assert count == number
        tables.append(table)
    values = [table.to_csv() for table in tables]
    assert len({*values}) == len(values)
    for number in range(8, 16):
        assessed(str(number), tiny_model("llama"), dataset=Blocks(start=number))
    assert len(stages._assessed) == 8


@pytest.mark.parametrize("method", ["apex", "hft"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(method, tiny_model, tmp_path):
    states = [run(tiny_model, tmp_path / str(n), method, seed=s).model.state_dict() for n, s in enumerate([1, 1, 2])]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.case("gradient accumulation", "works")
@pytest.mark.parametrize(("method", "balance"), [("apex", 0.0), ("apex", 0.1), ("full", 0.0)])
def test_accumulating_four_equals_a_batch_of_four(method, balance, tiny_model, tmp_path, monkeypatch):
    # the balance term is not linear in the batch, so its four parts are made equal: the same example four times
    data = [Blocks()[row // 4] for row in range(64)] if balance else Blocks()
    # and the plan must not depend on how the assessment is cut into batches, as the rank score does
    config = ApexConfig(**(vars(SMALL) | {"balance_weight": balance, "stages": 1, "statistic": "mean"}))
    same = {"dataset": data, "config": config, "learning_rate": 1e-3, "max_steps": 3, "optim": "sgd"}
    if balance:
        monkeypatch.setattr("apexlib.training.stages.data_order", lambda size, count, seed: list(range(count)))
    one = run(tiny_model, tmp_path / "1", method, **same)
    apart = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    four = run(tiny_model, tmp_path / "4", method, **apart, **same)
    for name, value in one.model.state_dict().items():
        assert_close(four.model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


def test_the_balance_term_is_the_mean_coefficient_of_variation_and_lowers_it(tiny_model, batch, tmp_path):
    model = tiny_model("llama", dtype=torch.float64)
    with ActivationRecorder(model, differentiable=True) as recorder:
        model(**batch)
    table = activation_statistics(model, [batch])
    groups = table.groupby(["layer", "component"])["activation"]
    expected = (groups.std(ddof=0) / groups.mean()).mean()
    assert recorder.imbalance.item() == pytest.approx(expected, rel=1e-9)
    recorder.imbalance.backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad.abs().sum() > 0

    spread = {}
    for weight in (0.0, 3.0):
        config = ApexConfig(**(vars(SMALL) | {"balance_weight": weight}))
        record = run(tiny_model, tmp_path / str(weight), config=config, max_steps=20)
        after = activation_statistics(record.model, [batch]).groupby(["layer", "component"])["activation"]
        spread[weight] = (after.std(ddof=0) / after.mean()).mean()
    assert spread[3.0] < spread[0.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "random"},
        {"strategy": "reversed"},
        {"strategy": "magnitude"},
        {"strategy": "gradient"},
        {"operator": "diagonal"},
        {"operator": "low_rank"},
        {"operator": "dense"},
        {"statistic": "mean"},
        {"statistic": "ema"},
        {"statistic": "ema_rank"},
        {"stages": 1},
        {"stages": 4},
        {"halve_fraction": True},
        {"train_norms": True},
        {"train_queries": False},
        {"train_rows": False},
        {"train_rows": False, "ffn": "split"},
        {"balance_weight": 0.1},
    ],
    ids=str,
)
def test_every_ablation_runs(changes, tiny_model, tmp_path):
    record = run(tiny_model, tmp_path, config=ApexConfig(**(vars(SMALL) | changes)), max_steps=4)
    assert changed(record, tiny_model("llama"))


@pytest.mark.case("bf16 autocast with gradient checkpointing, with and without reentry", "works")
@pytest.mark.parametrize("kind", [True, False])
def test_checkpointing_and_autocast_train(kind, tiny_model, tmp_path):
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": kind},
        "bf16": True,
        "use_cpu": True,
    }
    record = run(tiny_model, tmp_path, **options)
    assert record.log["loss"].iloc[-1] < record.log["loss"].iloc[0]
    assert int(record.statistics[1]["tokens"].iloc[0]) == 3 * 4 * 12  # each pass once


def test_evaluation_is_logged_and_not_counted(tiny_model, tmp_path):
    held_out = Blocks(size=8, start=7)
    record = run(tiny_model, tmp_path, eval_dataset=held_out, eval_strategy="steps", eval_steps=1)
    assert record.log["eval_loss"].notna().sum() == 6
    assert int(record.statistics[1]["tokens"].iloc[0]) == 3 * 4 * 12


class Spoiled(Blocks):
    """From its n-th reading in a training step on, labels are as `spoil` makes them; earlier passes see nothing."""

    def __init__(self, clean, spoil):
        super().__init__()
        self.clean, self.spoil = self.size + SMALL.assessment_samples + clean, spoil

    def __getitem__(self, row):
        item = super().__getitem__(row)
        return item if len(self.read) <= self.clean else item | {"labels": self.spoil(item["labels"])}


def masked(labels):
    return torch.full_like(labels, -100)


def test_a_batch_without_labels_stops_the_run_and_keeps_the_last_stage(tiny_model, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 4: no label of the batch is .*is kept"):
        run(tiny_model, tmp_path, dataset=Spoiled(4 * 4, masked))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "stage-0")


def only_the_first_labelled(dataset):
    return [
        item | {"labels": torch.cat([dataset[0]["labels"][:1], item["labels"][1:]])} for item in without_labels(dataset)
    ]


def without_labels(dataset):
    return [dataset[row] | {"labels": masked(dataset[row]["labels"])} for row in range(len(dataset))]


class Failing(Trainer):
    """At its n-th step of a stage, `fail` is done to the model just before, or to what it computes."""

    at, fail = 1, None

    def compute_loss(self, model, inputs, *given, **named):
        loss = super().compute_loss(model, inputs, *given, **named)
        return self.fail(model, loss) if self.state.global_step == self.at and model.training else loss


def test_the_first_of_tensors_that_is_not_finite_is_named():
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, math.nan]), "c": torch.ones(1)}
    assert first_not_finite(tensors.items()) == "b"
    assert first_not_finite([("large", torch.full((4,), 1e30))]) is None  # though its squares are infinite


def test_a_loss_that_is_not_finite_names_the_step(tiny_model, tmp_path):
    class Exploding(Failing):
        fail = staticmethod(lambda model, loss: loss * math.inf)

    with pytest.raises(FloatingPointError, match="step 1: the loss is inf; what was saved before is kept"):
        run(tiny_model, tmp_path, trainer_class=Exploding)


@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_names_its_parameter_and_the_step(clipped, tiny_model, tmp_path):
    class Steep(Failing):
        @staticmethod
        def fail(model, loss):
            rows = model.model.layers[1].mlp.gate_proj.rows
            return loss + (rows.flatten()[0] - rows.flatten()[0].detach()).abs().sqrt()  # √0: value 0, slope infinite

    with pytest.raises(
        FloatingPointError, match=r"step 1: the gradient of model\.layers\.1\.mlp\.gate_proj\.rows is not"
    ):
        run(tiny_model, tmp_path, trainer_class=Steep, max_grad_norm=clipped)


@pytest.mark.parametrize("method", ["apex", "hft"])
def test_a_weight_that_is_not_finite_names_itself_and_the_step(method, tiny_model, tmp_path):
    class Overflowing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    class Broken(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return Overflowing, {"lr": 0.1}

    without_embeddings = ApexConfig(**(vars(SMALL) | {"train_embeddings": False}))
    with pytest.raises(FloatingPointError, match=r"step 1: model\..* is not finite; what was saved"):
        run(tiny_model, tmp_path, method, trainer_class=Broken, config=without_embeddings)


def test_a_weight_that_no_loss_has_seen_is_not_saved(tiny_model, tmp_path):
    class Spoiling(Failing):
        @staticmethod
        def fail(model, loss):
            model.model.embed_tokens.weight.data[60] = math.nan  # the row of a token that no example holds
            return loss

    model = tiny_model("llama", vocab_size=64, tie_word_embeddings=False)
    with pytest.raises(FloatingPointError, match=r"step 3: model\.embed_tokens\.weight is not finite"):
        train_in_stages(model, Blocks(), arguments(tmp_path), SMALL, trainer_class=Spoiling)
    assert not list(tmp_path.glob("stage-*"))


def test_statistics_that_would_rank_nan_are_refused(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight.data[3, 0] = math.nan
    with pytest.raises(ValueError, match=r"batch 0: .* of layer 1 has a NaN or infinite activation"):
        train_in_stages(model, Blocks(), arguments(tmp_path), SMALL)


@pytest.mark.case('`load_best_model_at_end` and kept steps under "lora"', "refused")
@pytest.mark.case("a schedule that asks for the loss, `reduce_lr_on_plateau`", "refused")
@pytest.mark.case(
    "an example in training and in evaluation; a step without labels; data that are not tokenised", "refused"
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method 'magic': need one of apex, full, restart, lora, hft, gmt, direct"),
        ({"max_steps": 1}, "1 steps for 2 stages: need at least one step a stage"),
        ({"dataset": Blocks(size=4), "max_steps": -1, "num_train_epochs": 1}, "for 2 stages"),
        ({"dataset": Blocks(size=3)}, "train_dataset: 3 examples, fewer than the 4 of one step"),
        ({"dataset": Blocks(size=0)}, "train_dataset: 0 examples, fewer than the 4 of one step"),
        ({"eval_dataset": Blocks(size=3)}, "eval_dataset: 3 of its 3 examples are in the training data too"),
        (
            {"eval_dataset": without_labels(Blocks(size=3, start=7))},
            "eval_dataset: no label of its 3 examples is",
        ),
        ({"dataset": without_labels(Blocks())}, "train_dataset: no label of step 1 .*; 64 of 64 examples have none"),
        ({"dataset": only_the_first_labelled(Blocks())}, "train_dataset: no label of step 1 .*; 64 of 64"),
        ({"dataset": [{"text": "a"}] * 64}, "train_dataset: example 0 has no input_ids but text: need it tokenised"),
        ({"checkpoints": [0, 7, -1], "method": "full"}, r"checkpoints \[-1, 7\]: need steps from 0 to 6"),
        ({"checkpoints": [2], "method": "lora"}, "checkpoints: the model of Lora is not plain while it trains"),
        (
            {"load_best_model_at_end": True, "save_strategy": "no", "method": "lora"},
            "load_best_model_at_end: the model of Lora is not plain while it trains",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "need one that depends on the step"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_done_is_refused_before_training(changes, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tiny_model, tmp_path / "new", **changes)
    assert not list(tmp_path.glob("new/stage-*"))


def logits(model, ids):
    with in_evaluation(model):
        return model(input_ids=ids, use_cache=False).logits.clone()


@pytest.mark.parametrize("method", ["apex", "hft"])
def test_plain_models_are_kept_after_the_steps_asked_for_in_every_stage(method, tiny_model, tmp_path):
    class Noting(Trainer):
        def training_step(self, *given, **named):
            outputs[len(outputs)] = logits(self.model, ids)
            return super().training_step(*given, **named)

    outputs, ids = {}, torch.arange(8)[None]
    record = run(tiny_model, tmp_path, method, checkpoints=[0, 2, 3, 5, 6], trainer_class=Noting)
    outputs[6] = logits(record.model, ids)
    assert sorted(path.name for path in tmp_path.glob("st*-*")) == [
        *("stage-0", "stage-1"),
        *(f"step-{step:05d}" for step in (0, 2, 3, 5, 6)),
    ]
    for step in (0, 2, 3, 5, 6):
        kept = AutoModelForCausalLM.from_pretrained(checkpoint_folder(tmp_path, step))
        assert_close(logits(kept, ids), outputs[step], rtol=0, atol=1e-5, msg=str(step))
    model = tiny_model("llama")
    args = arguments(tmp_path)
    train_in_stages(model, Blocks(), args, SMALL, method=method, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("st*-*")) == ["stage-0", "stage-1"]


class WorseAndWorse(Trainer):
    """From step 4 of the run on, every step ruins the model."""

    def training_step(self, *given, **named):
        loss = super().training_step(*given, **named)
        if self.run_step >= 4:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(3)
        return loss


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
BEST |= {"save_steps": 1, "eval_dataset": Blocks(size=8, start=7)}


@pytest.mark.case("`load_best_model_at_end`: the best of all stages", "works")
@pytest.mark.parametrize("method", ["apex", "hft"])
def test_the_best_model_of_all_stages_is_the_one_returned(method, tiny_model, tmp_path):
    record = run(tiny_model, tmp_path, method, trainer_class=WorseAndWorse, **BEST)
    losses = record.log["eval_loss"].dropna()
    assert losses.min() < losses.iloc[-1] - 0.1
    batch = [BEST["eval_dataset"][row] for row in range(8)]
    found = perplexity(record.model, [{name: torch.stack([each[name] for each in batch]) for name in batch[0]}])
    assert found["loss"] == pytest.approx(losses.min(), abs=1e-4)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in record.model.state_dict().items())
    model = tiny_model("llama")
    train_in_stages(model, Blocks(), arguments(tmp_path), SMALL, method=method, overwrite=True)
    assert not (tmp_path / "best").exists()


def test_where_nothing_was_evaluated_the_last_model_is_returned_with_a_warning(tiny_model, tmp_path):
    never = BEST | {"eval_strategy": "no", "save_strategy": "no"}
    with pytest.warns(RuntimeWarning, match=r"load_best_model_at_end: .*best has no manifest\.json; the last model is"):
        record = run(tiny_model, tmp_path, **never)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "stage-1").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in record.model.state_dict().items())


@pytest.mark.case('`train_sampling_strategy="sequential"`', "works")
def test_data_may_keep_its_own_order(tiny_model, tmp_path):
    data = Blocks(size=16)
    config = ApexConfig(**(vars(SMALL) | {"assessment_samples": 4}))
    run(tiny_model, tmp_path, dataset=data, config=config, train_sampling_strategy="sequential")
    assert data.read[-6 * 4 :] == [row % 16 for row in range(6 * 4)]


class BitFit(Method):
    """Biases and norms only."""

    def begin(self, model, stage, statistics):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        return model


@pytest.mark.case("a method of one's own, `METHODS['bitfit'] = BitFit`", "works")
def test_a_method_from_outside_is_trained_planned_and_measured(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "bitfit", BitFit)
    record = run(tiny_model, tmp_path, "bitfit", checkpoints=[3])
    assert {name.split(".")[-2].rstrip("12") for name in changed(record, tiny_model("llama"))} <= {
        *("norm", "input_layernorm", "post_attention_layernorm")
    }
    trains = int(record.trainable["trainable"].iloc[0])
    assert trains == 5 * 16  # norms of two layers and the last one, at width 16
    table = plan_budget(tiny_model("llama").config, batch=1, length=8).set_index("method")
    assert table.loc["bitfit", "trainable"] == trains
    assert table.loc["bitfit", "share"] == pytest.approx(record.trainable["share"].iloc[0])
    case = Case("Llama", "model", 16, 24, 2, 4, 48, 2, 8)
    work = workload(case, "bitfit")
    work.step()
    assert sum(p.numel() for p in work.model.parameters() if p.requires_grad) == trains


def test_a_packed_corpus_is_checked_as_its_examples_would_be():
    blocks = np.arange(60, dtype=np.int32).reshape(12, 5) % 40
    packed, order = PackedTokens(blocks.ravel(), 5), list(range(12))
    rows = [packed[row] for row in range(12)]
    narrow = PackedTokens(blocks.astype(np.uint16).ravel(), 5)
    assert check_data(packed, None, order, 4) == check_data(narrow, None, order, 4)
    for data in (packed, rows):
        for held_out in (packed, rows[3:4]):
            with pytest.raises(ValueError, match="examples are in the training data too"):
                check_data(data, held_out, order, 4)
    other = PackedTokens(np.where(blocks == 7, 8, blocks).ravel(), 5)
    hashes = {check_data(data, None, order, 4)["train"] for data in (packed, other, PackedTokens(blocks.ravel(), 4))}
    assert len(hashes) == 3


def test_time_per_step_leaves_out_what_is_no_step(tiny_model, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    record = run(tiny_model, tmp_path, eval_dataset=Blocks(size=8, start=7), eval_strategy="steps", eval_steps=1)
    assert record.seconds_per_step == 10  # the clock is read twice a step


@pytest.mark.case("a loop of one's own, without a Trainer", "works")
def test_ten_lines_without_a_trainer_do_the_same_as_one_stage(tiny_model, tmp_path):
    config = ApexConfig(**(vars(SMALL) | {"stages": 1}))
    record = run(tiny_model, tmp_path, config=config, lr_scheduler_type="constant", max_grad_norm=0.0)
    model, order, data = tiny_model("llama"), data_order(64, 24, seed=42), Blocks()
    batches = [torch.utils.data.default_collate([data[row] for row in order[i : i + 4]]) for i in range(0, 24, 4)]

    statistics = activation_statistics(model, batches[:2], top=config.fraction)
    expand(model, select(statistics, config), seed=config.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    fuse(model)

    for name, value in record.model.state_dict().items():
        assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


def test_one_bar_tells_stage_step_and_loss_of_the_whole_run(tiny_model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(bar, "hide_progress", lambda: False)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # its bars of files that it writes
    evaluated = {"eval_dataset": Blocks(8, start=20), "eval_strategy": "steps", "eval_steps": 3}
    record = run(tiny_model, tmp_path, disable_tqdm=False, **evaluated)
    out, shown = capfd.readouterr()
    assert out == ""  # what is logged is in the record
    assert re.search(r"stage 1 of 2:.* 3/6 \[.*, loss=[\d.]+, eval_loss=", shown)
    assert not re.search(r"stage 2 of 2:.* [012]/6 ", shown)
    *_, last = re.findall(r"stage 2 of 2: 100%.* 6/6 \[[\d:]+<00:00,.* loss=([\d.]+), eval_loss=[\d.]+\]\n", shown)
    assert float(last) == pytest.approx(record.log["loss"].dropna().iloc[-1], rel=0.01)
    assert shown.count("\n") == shown.count("\n\r") + 1  # only one bar stays; those inside it return


@pytest.mark.parametrize(("hidden", "disabled"), [(True, False), (False, True)])
def test_there_is_no_bar_where_nobody_watches_or_wants_one(hidden, disabled, tiny_model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(bar, "hide_progress", lambda: hidden)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # which other tests load
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)
    run(tiny_model, tmp_path, disable_tqdm=disabled)
    assert capfd.readouterr() == ("", "")


def test_sft_trainer_of_trl_trains_in_stages(tiny_model, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    rows = [{name: value.tolist() for name, value in Blocks()[row].items()} for row in range(64)]
    given = arguments(tmp_path).to_dict()
    args = trl.SFTConfig(
        **{name: given[name] for name in ("output_dir", "max_steps", "per_device_train_batch_size", "report_to")},
        **{name: given[name] for name in ("learning_rate", "logging_steps", "disable_tqdm", "save_strategy")},
        dataloader_pin_memory=False,
        bf16=False,
    )
    tokenizer = train_tokenizer(["one two three four five " * 40, "six seven eight nine ten " * 40], 270)
    data = Dataset.from_list(rows).with_format("torch")
    more = {"trainer_class": trl.SFTTrainer, "processing_class": tokenizer}
    record = train_in_stages(tiny_model("llama"), data, args, SMALL, **more)
    assert record.log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert changed(record, tiny_model("llama"))
    assert len(record.plans) == 2


def test_a_parameter_that_does_not_move_is_reported_after_the_stage_is_saved(tiny_model, tmp_path):
    with pytest.warns(RuntimeWarning, match=r"stage 1: .* should train but did not move"):
        record = run(tiny_model, tmp_path, learning_rate=0.0)
    assert (tmp_path / "stage-1").is_dir()
    assert len(record.plans) == 2


def test_parameters_that_the_optimizer_has_not_are_reported(tiny_model, tmp_path):
    class Forgetful(Trainer):
        def create_optimizer(self, *given):
            self.optimizer = torch.optim.SGD([self.model.lm_head.weight], lr=0.1)
            return self.optimizer

    with pytest.warns(RuntimeWarning, match=r"stage 0: \d+ parameters should train but did not move \(not in the opt"):
        run(tiny_model, tmp_path, "full", trainer_class=Forgetful)


def test_frozen_parameters_that_change_are_reported(tiny_model, tmp_path):
    class Careless(Trainer):
        def train(self, **options):
            with torch.no_grad():
                self.model.model.layers[0].mlp.gate_proj.frozen.add_(1)
            return super().train(**options)

    with pytest.warns(RuntimeWarning, match=r"stage 0: 1 parameters are frozen but changed: .*gate_proj.frozen"):
        run(tiny_model, tmp_path, trainer_class=Careless)


@pytest.mark.case("a model in bfloat16 whose steps round away: trained, saved, reported", "works")
@pytest.mark.parametrize("method", ["full", "hft", "gmt"])
def test_a_half_precision_model_whose_norms_round_away_keeps_its_training(method, tiny_model, tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="should train but did not move"):
        record = train_in_stages(model, Blocks(), arguments(tmp_path, learning_rate=1e-4), SMALL, method=method)
    assert record.model.dtype == torch.bfloat16
    assert (tmp_path / f"stage-{record.log['stage'].max()}").is_dir()


def test_operators_without_a_rate_are_no_fault(tiny_model, tmp_path):
    with pytest.warns(RuntimeWarning, match=r"\d+ parameters should train but did not move"):
        record = run(tiny_model, tmp_path, config=ApexConfig(**(vars(SMALL) | {"operator_lr_scale": 0.0})))
    assert changed(record, tiny_model("llama"))


@pytest.mark.parametrize("method", ["full", "lora", "hft", "gmt"])
def test_a_balance_term_without_activations_is_refused(method, tiny_model, tmp_path):
    config = ApexConfig(**(vars(SMALL) | {"balance_weight": 0.1}))
    with pytest.raises(ValueError, match=r"balance_weight 0\.1: .* gathers no activations; need 0"):
        run(tiny_model, tmp_path, method, config=config)


def test_an_example_without_tokens_is_refused_with_its_row(tiny_model, tmp_path):
    class Hole(Blocks):
        def __getitem__(self, row):
            item = super().__getitem__(row)
            return {name: value[:0] for name, value in item.items()} if row == 17 else item

    with pytest.raises(ValueError, match=r"train_dataset: example 17 has no tokens"):
        train_in_stages(tiny_model("llama"), Hole(), arguments(tmp_path), SMALL)


@pytest.mark.parametrize("method", METHODS)
def test_what_required_gradients_does_so_again(method, tiny_model, tmp_path):
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    args = arguments(tmp_path, max_steps=2)
    record = train_in_stages(model, Blocks(), args, SMALL, method=method)
    assert {name: parameter.requires_grad for name, parameter in record.model.named_parameters()} == before


def test_half_of_four_gradients_are_kept():
    assert keep_largest(torch.tensor([1.0, -3.0, 2.0, 0.5]), share=0.5).tolist() == [0, -3, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.6, 1.0])
def test_gradient_masks_keep_the_largest(share, dtype):
    gradient = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    kept = keep_largest(gradient.clone(), share)
    count = max(1, round(share * 63))
    assert int((kept != 0).sum()) == count
    order = gradient.abs().flatten().argsort(descending=True)
    assert set(kept.flatten().nonzero().flatten().tolist()) == set(order[:count].tolist())


def test_half_fine_tuning_draws_anew_at_each_stage(tiny_model):
    frozen = []
    for stage in range(2):
        model = method_of("hft", SMALL).begin(tiny_model("llama"), stage, None)
        frozen.append({name for name, parameter in model.named_parameters() if not parameter.requires_grad})
        attention = [sum(f"layers.{layer}.self_attn" in name for name in frozen[-1]) for layer in range(2)]
        ffn = [sum(f"layers.{layer}.mlp" in name for name in frozen[-1]) for layer in range(2)]
        assert (attention, ffn) == ([2, 2], [1, 2])  # half of four, and of three over two layers
        assert len(frozen[-1]) == 7
    assert frozen[0] != frozen[1]


@pytest.mark.parametrize("method", ["full", "restart", "hft", "gmt"])
def test_matrices_only_leaves_embeddings_and_norms_alone(method, tiny_model):
    model = method_of(method, SMALL, matrices_only=True).begin(tiny_model("llama", attention_bias=True), 0, None)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = {name for name, parameter in model.named_parameters() if "layers" in name and parameter.dim() == 2}
    assert trained <= everything
    assert trained == everything or method == "hft"


def test_a_restart_is_full_training_with_a_fresh_optimizer(tiny_model, tmp_path):
    restarted, full = (run(tiny_model, tmp_path / name, name, max_steps=4) for name in ("restart", "full"))
    assert restarted.log["stage"].tolist() == [0, 0, 1, 1]
    assert restarted.log["learning_rate"].tolist() == full.log["learning_rate"].tolist()
    losses = [record.log["loss"].tolist() for record in (restarted, full)]
    assert losses[0][:3] == losses[1][:3]  # the first step of the second stage starts from the same weights
    assert losses[0][3] != losses[1][3]


def test_each_stage_ranks_by_the_gradients_of_the_examples_that_it_begins_with(tiny_model, tmp_path):
    config, data = ApexConfig(**(vars(SMALL) | {"strategy": "gradient"})), Blocks()
    record = run(tiny_model, tmp_path, config=config, dataset=data, checkpoints=[3])
    order = data_order(len(data), 6 * 4, 42)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "step-00003")
    for model, plan, start in zip((tiny_model("llama"), half), record.plans, (0, 12), strict=True):
        rows = [data[row] for row in order[start : start + 8]]
        batches = [{key: torch.stack([row[key] for row in rows[i : i + 4]]) for key in rows[0]} for i in (0, 4)]
        norms = gradient_norms(model, batches)
        for (layer, component), table in norms.groupby(["layer", "component"]):
            part = next(each for each in plan.layers if (each.layer, each.component) == (layer, component))
            best = table.nlargest(len(part.source), "gradient_norm")["unit"]
            assert sorted(best) == list(part.source)


def test_gradients_of_conversations_in_one_row_are_those_of_padded_ones(tiny_model, tmp_path):
    config = ApexConfig(**(vars(SMALL) | {"strategy": "gradient"}))
    rows = [torch.arange(2, 2 + length) % 48 for length in (9, 5, 12, 7) * 16]
    items = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(len(ids)) < 3, -100)} for ids in rows]
    records = [
        run(tiny_model, tmp_path / name, config=config, dataset=items, data_collator=collator, max_steps=4)
        for name, collator in (("padded", collate(0)), ("in one row", in_one_row))
    ]
    for padded, in_row in zip(*(record.statistics for record in records), strict=True):
        found = in_row["gradient_norm"].to_numpy()
        np.testing.assert_allclose(found, padded["gradient_norm"].to_numpy(), rtol=1e-3)
        assert (found > 0).all()


def test_weights_decay_to_their_start_where_asked():
    first, rate, decay = torch.randn(3, 4, dtype=torch.float64), 0.01, 0.5
    gradients = torch.randn(5, 3, 4, dtype=torch.float64)
    weight, plain = (nn.Parameter(first.clone()) for _ in range(2))
    start, optimizers = {weight: first.clone()}, [AdamW([weight], lr=rate, weight_decay=decay), AdamW([plain], lr=rate)]
    optimizers[1].param_groups[0]["weight_decay"] = 0.0
    for step, gradient in enumerate(gradients):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * (5 - step) / 5
        weight.grad, plain.grad = gradient.clone(), gradient.clone()
        plain.data -= rate * (5 - step) / 5 * decay * (plain.data - first)
        for optimizer in optimizers:
            optimizer.step()
        draw_to(optimizers[0], start)
    assert_close(weight, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["apex", "direct", "full"])
def test_a_run_decays_to_its_start_not_to_zero(method, tiny_model, tmp_path):
    norms, base = {}, tiny_model("llama").model.layers[0].mlp.down_proj.weight
    for to_start in (False, True):
        config = ApexConfig(**(vars(SMALL) | {"decay_to_start": to_start, "stages": 1}))
        strong = {"weight_decay": 90.0, "lr_scheduler_type": "constant"}  # 0.9 of the way at each step of 0.01
        record = run(tiny_model, tmp_path / str(to_start), method, config, **strong)
        moved = record.model.model.layers[0].mlp.down_proj.weight - base
        norms[to_start] = moved.norm() / base.norm()
    assert norms[True] < 0.5 * norms[False]


def test_a_decay_to_the_start_needs_an_optimizer_that_decays_apart(tiny_model, tmp_path):
    config = ApexConfig(**(vars(SMALL) | {"decay_to_start": True}))
    with pytest.raises(ValueError, match=r"decay_to_start: need AdamW.*got optim='sgd'"):
        run(tiny_model, tmp_path / "run", config=config, optim="sgd")
    assert not (tmp_path / "run").exists()
