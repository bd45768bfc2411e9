"""Sharded training on two CPU processes: what one process trains, two with FSDP2 do, and go on with when killed."""

import shutil

import pandas as pd
import pytest
import torch
from conftest import build
from safetensors.torch import load_file
from sharded_run import ACCELERATE, RUNS, launched, run
from torch.testing import assert_close

from apexlib.training.checkpoints import read_state

SAME = [name for name in RUNS if name not in ("killed", "resumed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs on two processes, the last of which ends by SIGKILL."""
    folder = tmp_path_factory.mktemp("runs")
    done = launched("sharded_run.py", folder, *SAME, "killed")
    assert (folder / "killed-2" / "step-1-2").is_dir(), done.stderr[-4000:]
    for name in SAME:
        run(name, folder, 1)
    return folder


@pytest.mark.case("sharded training, FSDP2: `accelerate launch --use_fsdp --fsdp_version 2`, or `fsdp=True`", "works")
@pytest.mark.parametrize("name", SAME)
def test_two_processes_that_share_a_model_train_what_one_trains(name, folder):
    (one, plans, log), (two, same, other) = (
        torch.load(folder / f"{name}-{processes}.pt", weights_only=False) for processes in (1, 2)
    )
    _, variant, asked = RUNS[name]
    base = build(variant, **asked.get("model", {})).state_dict()
    for key, value in one.items():
        assert_close(two[key], value, rtol=0, atol=1e-6 if name != "whole" else 1e-4)  # Adam divides by small numbers
    assert max((one[key] - base[key]).abs().max() for key in one) > 1e-2
    assert plans == same
    pd.testing.assert_frame_equal(log, other, atol=1e-5)


def test_plain_models_are_kept_and_the_best_is_returned(folder):
    for kept in ("best", "step-00000", "step-00003", "step-00005", "stage-1"):
        one, two = (load_file(folder / f"kept-{n}" / kept / "model.safetensors") for n in (1, 2))
        assert set(one) == set(two)
        for key, value in one.items():
            assert_close(two[key], value, rtol=0, atol=1e-6)


def test_two_processes_killed_go_on_to_the_same_bits(folder):
    shutil.copytree(folder / "killed-2", folder / "resumed-2")
    assert not (folder / "resumed-2" / "stage-1").exists()
    assert (done := launched("sharded_run.py", folder, "resumed", by=ACCELERATE)).returncode == 0, done.stderr[-4000:]
    (whole, *_), (resumed, *_) = (
        torch.load(folder / f"{name}-2.pt", weights_only=False) for name in ("whole", "resumed")
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_frozen_rows_are_in_no_state(folder):
    """The state of a step inside a stage holds what trains, whole, and moments of that alone."""
    state = read_state(folder / "killed-2" / "step-1-2")
    trains = {name: value.shape for name, value in state["parameters"].items()}
    assert trains
    assert not [name for name in trains if "frozen" in name]
    moments = [own["exp_avg"].shape for own in state["optimizer"]["state"].values()]
    assert sorted(moments) == sorted(trains.values())
