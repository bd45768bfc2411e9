"""Pre-training: plain checkpoints where asked, a log, the same bits from the same seed."""

import math
import os
import signal
from itertools import count
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from apexlib.suite.pretraining import pretrain
from apexlib.training import interruption
from apexlib.training.checkpoints import checkpoint_folder
from apexlib.training.interruption import TIME_IS_OVER, Interrupted


class Blocks(torch.utils.data.Dataset):
    """Blocks that count upwards: easy to learn."""

    def __len__(self):
        return 64

    def __getitem__(self, row):
        ids = (torch.arange(12) + row) % 40
        return {"input_ids": ids, "labels": ids}


def train(tiny_model, folder, **changes):
    model = tiny_model("llama", tie_word_embeddings=folder.name in ("whole", "parts")).train()
    settings = {"steps": 12, "checkpoints": [0, 6, 12], "batch_size": 8, "learning_rate": 1e-2, "precision": "float32"}
    return model, pretrain(model, Blocks(), folder, **(settings | changes))


def test_training_lowers_the_loss_and_keeps_loadable_checkpoints(tiny_model, tmp_path):
    start = {name: value.clone() for name, value in tiny_model("llama").state_dict().items()}
    model, log = train(tiny_model, tmp_path)
    assert list(log.columns) == ["step", "loss", "learning_rate", "gradient_norm"]
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    assert log["step"].iloc[-1] == 12
    first, last = (AutoModelForCausalLM.from_pretrained(checkpoint_folder(tmp_path, step)) for step in (0, 12))
    for name, value in first.state_dict().items():
        assert torch.equal(value, start[name]), name
    for name, value in last.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].cpu()), name
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000", "step-00006", "step-00012"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_model, tmp_path):
    logs = {name: train(tiny_model, tmp_path / name, seed=seed)[1] for name, seed in {"a": 0, "b": 0, "c": 1}.items()}
    pd.testing.assert_frame_equal(logs["a"], logs["b"], check_exact=True)
    assert logs["a"]["loss"].tolist() != logs["c"]["loss"].tolist()


def test_bf16_rounds_products_and_no_weights(tiny_model, tmp_path):
    (model, rounded), (_, exact) = (train(tiny_model, tmp_path / name, precision=name) for name in ("bf16", "float32"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert rounded["loss"].tolist() != exact["loss"].tolist()
    assert rounded["loss"].iloc[-1] == pytest.approx(exact["loss"].iloc[-1], rel=0.02)


def test_learning_rate_warms_up_then_follows_one_cosine(tiny_model, tmp_path):
    _, log = train(tiny_model, tmp_path, steps=20, checkpoints=[20], warmup_share=0.2)
    rates = torch.tensor(log.set_index("step")["learning_rate"].to_numpy())  # rate of the step just done
    steps = torch.tensor(log["step"].to_numpy() - 1.0)
    progress = (steps - 4) / 16
    expected = 1e-2 * torch.where(steps < 4, steps / 4, 0.5 * (1 + torch.cos(torch.pi * progress)))
    assert_close(rates, expected, rtol=1e-5, atol=1e-9)


def test_checkpoints_outside_the_run_are_refused_before_it_starts(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints \[13\]: need steps from 0 to 12"):
        train(tiny_model, tmp_path / "new", checkpoints=[0, 13])
    assert not list(tmp_path.glob("new/*"))


def assert_same(model, log, whole):
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[0].state_dict()[name]), name
    pd.testing.assert_frame_equal(log, whole[1], check_exact=True)


@pytest.mark.parametrize("step", [1, 5, 6, 11])  # the first, mid-epoch, one after which a checkpoint is kept, the last
@pytest.mark.parametrize("reason", ["signal", "time"])
def test_a_training_that_left_after_any_step_goes_on_to_the_same_bits(reason, step, tiny_model, tmp_path, monkeypatch):
    whole = train(tiny_model, tmp_path / "whole")
    original, done = Trainer.training_step, []

    def counted(*given, **named):
        done.append(1)
        if len(done) == step:
            if reason == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                patch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: math.inf))
        return original(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", counted)
        with pytest.raises(Interrupted, match=f"(SIGTERM|time is over) after step {step}: saved") as left:
            train(tiny_model, tmp_path / "parts", seconds=3600)
    assert left.value.code == (143 if reason == "signal" else TIME_IS_OVER)
    kept = sorted(path.name for path in (tmp_path / "parts").glob("step-0????"))
    assert kept == [f"step-{border:05d}" for border in (0, 6, 12) if border <= step]
    assert_same(*train(tiny_model, tmp_path / "parts", resume=True), whole)
    assert sorted(path.name for path in (tmp_path / "parts").glob("step-*")) == [
        "step-00000",
        "step-00006",
        "step-00012",
    ]


def test_a_training_in_many_short_parts_is_the_training_in_one(tiny_model, tmp_path, monkeypatch):
    whole, clock = train(tiny_model, tmp_path / "whole"), count()
    monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # asking takes a second
    for _ in range(4):
        with pytest.raises(Interrupted, match="time is over"):
            train(tiny_model, tmp_path / "parts", resume=True, seconds=3.5)
    assert_same(*train(tiny_model, tmp_path / "parts", resume=True, seconds=3.5), whole)


def test_a_killed_training_loses_no_more_than_save_steps(tiny_model, tmp_path, monkeypatch):
    whole = train(tiny_model, tmp_path / "whole")
    original, done = Trainer.training_step, []

    def failing(*given, **named):
        done.append(1)
        if len(done) == 9:
            raise MemoryError
        return original(*given, **named)

    monkeypatch.setattr(Trainer, "training_step", failing)
    with pytest.raises(MemoryError):
        train(tiny_model, tmp_path / "parts", save_steps=4)
    assert_same(*train(tiny_model, tmp_path / "parts", save_steps=4, resume=True), whole)
    assert len(done) == 9 + 4  # steps 9 to 12


def test_a_folder_that_holds_a_training_is_not_written_over(tiny_model, tmp_path):
    train(tiny_model, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tiny_model, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()} == before


@pytest.mark.parametrize("again", [[0, 6, 12], [0]], ids=str)
def test_the_last_checkpoint_is_the_only_copy_of_what_was_trained(again, tiny_model, tmp_path, monkeypatch):
    whole, last = train(tiny_model, tmp_path), checkpoint_folder(tmp_path, 12) / "model.safetensors"
    kept = [path.parent.name for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert kept == ["step-00000", "step-00006", "step-00012"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
        assert_same(*train(tiny_model, tmp_path, resume=True, checkpoints=again), whole)
    last.unlink()
    assert_same(*train(tiny_model, tmp_path, resume=True, checkpoints=again), whole)
    assert last.exists() == (12 in again)


def test_the_numbers_are_those_of_a_trainer_that_knows_of_no_stages(tiny_model, tmp_path):
    model, log = train(tiny_model, tmp_path / "ours", steps=8, checkpoints=[])  # 64 blocks: one epoch
    plain = tiny_model("llama").train()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2,
        lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.1, adam_beta2=0.95, logging_steps=1, seed=0,
        save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(model=plain, args=arguments, train_dataset=Blocks())
    trainer.train()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert log["loss"].tolist() == [row["loss"] for row in rows]
    assert log["gradient_norm"].tolist() == [row["grad_norm"] for row in rows]
    assert log["learning_rate"].tolist() == [row["learning_rate"] for row in rows]
