"""Pre-training: plain checkpoints where asked, a log, the same bits from the same seed."""

from itertools import pairwise

import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from apexlib.suite.pretraining import checkpoint_folder, pretrain


class Blocks(torch.utils.data.Dataset):
    """Blocks that count upwards: easy to learn."""

    def __len__(self):
        return 64

    def __getitem__(self, row):
        ids = (torch.arange(12) + row) % 40
        return {"input_ids": ids, "labels": ids}


def train(tiny_model, folder, **changes):
    model = tiny_model("llama", tie_word_embeddings=folder.name.startswith(("whole", "part"))).train()
    how = {"steps": 12, "checkpoints": [0, 6, 12], "batch_size": 8, "learning_rate": 1e-2}
    return model, pretrain(model, Blocks(), folder, **(how | changes))


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
        assert torch.equal(value, model.state_dict()[name]), name
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000", "step-00006", "step-00012"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_model, tmp_path):
    logs = {name: train(tiny_model, tmp_path / name, seed=seed)[1] for name, seed in {"a": 0, "b": 0, "c": 1}.items()}
    pd.testing.assert_frame_equal(logs["a"], logs["b"], check_exact=True)
    assert logs["a"]["loss"].tolist() != logs["c"]["loss"].tolist()


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
    assert not (tmp_path / "new").exists()


def test_a_training_in_parts_is_the_training_in_one(tiny_model, tmp_path):
    whole, log = train(tiny_model, tmp_path / "whole")
    borders, kept = (0, 5, 6, 12), {5: [0], 6: [6], 12: [12]}  # mid-epoch, a part of one step, the end
    for start, stop in pairwise(borders):
        resume = tmp_path / f"part-{start}" / "state" if start else None
        own = {"checkpoints": kept[stop], "stop": stop, "resume": resume}
        model, parts = train(tiny_model, tmp_path / f"part-{stop}", **own)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    pd.testing.assert_frame_equal(parts, log, check_exact=True)
    assert sorted(path.name for path in tmp_path.glob("part-*/step-*")) == ["step-00000", "step-00006", "step-00012"]


def test_a_part_without_its_optimizer_is_refused(tiny_model, tmp_path):
    train(tiny_model, tmp_path / "one", checkpoints=[], stop=5)
    state = tmp_path / "one" / "state"
    (state / "checkpoint-5" / "optimizer.pt").unlink()  # the Trainer would start a fresh one and not say so
    with pytest.raises(FileNotFoundError, match="need the state of the part before, with its optimizer"):
        train(tiny_model, tmp_path / "two", checkpoints=[], resume=state)
