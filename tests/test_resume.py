"""A run that is stopped, however and wherever, goes on to the bits of one that was not; or says why it does not."""

import itertools
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faults
import pandas as pd
import pytest
import torch
from faults import CONFIG, digest, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import Blocks
from transformers import Trainer

from apexlib import projections
from apexlib.activations import ActivationRecorder
from apexlib.files import exclusive
from apexlib.operators import OPERATORS, MonarchOperator
from apexlib.plan import ApexConfig
from apexlib.training import checkpoints, interruption
from apexlib.training.checkpoints import fault, position
from apexlib.training.interruption import TIME_IS_OVER, Interrupted
from apexlib.training.methods import METHODS


class Crash(Exception):  # noqa: N818
    pass


class Fragile(Trainer):
    """Crashes in the forward pass of one step of the whole run, counted from 0."""

    at = None

    def compute_loss(self, *given, **named):
        if self.model.training and self.run_step == Fragile.at:
            raise Crash
        return super().compute_loss(*given, **named)


def crash_and_resume(folder, step, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fragile, "at", step)
        with pytest.raises(Crash):
            run(folder, trainer_class=Fragile, **options)
    return run(folder, trainer_class=Fragile, resume=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The digest of an uninterrupted run."""
    return digest(run(tmp_path_factory.mktemp("whole"), trainer_class=Fragile))


def damage(path: Path, index: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


# going on


def long(values, *quick):
    """All but the values named are for `make test-long`."""
    return [pytest.param(value, marks=[] if value in quick else pytest.mark.slow) for value in values]


@pytest.mark.parametrize("step", long(range(9), 0, 3, 5))
def test_a_run_resumes_at_every_step(step, whole, tmp_path):
    assert digest(crash_and_resume(tmp_path, step)) == whole
    assert not list(tmp_path.glob("step-*")), "states inside stages go when their stage is saved"


@pytest.mark.case("`resume=True` after a crash, to the same bits, for every method", "works")
@pytest.mark.parametrize("method", long(METHODS, "lora"))
def test_every_method_resumes(method, tmp_path):
    options = {"method": method, "save_steps": 2}
    assert digest(crash_and_resume(tmp_path / "a", 5, **options)) == digest(
        run(tmp_path / "b", trainer_class=Fragile, **options)
    )


def test_a_stage_whose_model_is_kept_as_a_checkpoint_is_gone_back_to(tmp_path):
    resumed = crash_and_resume(tmp_path / "a", 5, method="hft", checkpoints=[3])
    assert digest(resumed) == digest(run(tmp_path / "b", trainer_class=Fragile, method="hft"))
    assert [path.name for path in sorted((tmp_path / "a" / "stage-0").iterdir())] == ["manifest.json", "progress.json"]
    assert (tmp_path / "a" / "stage-1" / "model.safetensors").exists()


CHANGES = [
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"optim": "sgd"},
    {"optim": "adafactor"},
    {"config": ApexConfig(**(vars(CONFIG) | {"strategy": "magnitude"}))},
    {"config": ApexConfig(**(vars(CONFIG) | {"strategy": "gradient"}))},
    {"config": ApexConfig(**(vars(CONFIG) | {"statistic": "ema_rank", "halve_fraction": True}))},
    {"config": ApexConfig(**(vars(CONFIG) | {"balance_weight": 0.1, "operator_lr_scale": 3.0}))},
    {"config": ApexConfig(**(vars(CONFIG) | {"decay_to_start": True})), "weight_decay": 5.0},
    {"bf16": True, "use_cpu": True, "gradient_checkpointing": True},
    {"eval_on_start": True, "eval_strategy": "epoch", "logging_steps": 3},
    {"save_strategy": "no"},
    {"train_sampling_strategy": "sequential"},
    {"load_best_model_at_end": True, "eval_steps": 1, "learning_rate": 0.3},
]


@pytest.mark.parametrize(
    "changes", long(CHANGES, CHANGES[0], CHANGES[3], CHANGES[4], CHANGES[7], CHANGES[9], CHANGES[-1]), ids=str
)
def test_every_kind_of_state_is_restored(changes, tmp_path):
    resumed = crash_and_resume(tmp_path / "a", 5, **changes)
    assert digest(resumed) == digest(run(tmp_path / "b", trainer_class=Fragile, **changes))


def test_a_finished_run_is_read_back_without_training(whole, tmp_path):
    run(tmp_path, trainer_class=Fragile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
        assert digest(run(tmp_path, trainer_class=Fragile, resume=True)) == whole


def test_resuming_where_nothing_is_starts(whole, tmp_path):
    assert digest(run(tmp_path / "new", trainer_class=Fragile, resume=True)) == whole


# signals

PHASES = {  # what is called there, and which of its calls
    "assessment": ((ActivationRecorder, "_begin"), 1),
    "training step": ((MonarchOperator, "product"), 60),
    "evaluation": ((Trainer, "prediction_step"), 2),
    "evaluation at a stage's end": ((Trainer, "prediction_step"), 4),
    "fuse": ((projections, "unsplit"), 1),
    "saving": ((checkpoints.Progress, "save"), 2),
}


@pytest.mark.parametrize("number", long([signal.SIGTERM, signal.SIGINT], signal.SIGTERM), ids=lambda n: n.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_saves_in_every_phase(phase, number, whole, tmp_path, monkeypatch):
    (owner, attribute), n = PHASES[phase]
    original, calls = getattr(owner, attribute), []

    def once(*given, **named):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), number)
        return original(*given, **named)

    before = signal.getsignal(number)
    monkeypatch.setattr(owner, attribute, once)
    with pytest.raises(Interrupted, match=rf"{number.name} .*: saved; resume=True .* goes on") as stopped:
        run(tmp_path, trainer_class=Fragile, save_strategy="no")
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    if phase != "assessment":
        assert list(tmp_path.glob("st*-*"))
    assert digest(run(tmp_path, trainer_class=Fragile, save_strategy="no", resume=True)) == whole


@pytest.mark.parametrize("asked", [0, 1, 3, 5, 9, 14])  # in assessment, steps, evaluations and after stages
def test_the_end_of_time_saves_as_a_signal_does(asked, whole, tmp_path, monkeypatch):
    clock = itertools.chain([0], range(1, asked + 1), itertools.repeat(math.inf))  # asked + 1 times there is time left
    with monkeypatch.context() as patch:
        patch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        with pytest.raises(Interrupted, match=r"time is over .*: saved; resume=True .* goes on") as stopped:
            run(tmp_path, trainer_class=Fragile, save_strategy="no", seconds=3600)
    assert stopped.value.code == TIME_IS_OVER
    assert str(pickle.loads(pickle.dumps(stopped.value))) == str(stopped.value)
    assert digest(run(tmp_path, trainer_class=Fragile, save_strategy="no", resume=True)) == whole


# what is damaged, changed or taken


def test_the_newest_whole_state_is_taken_and_torn_ones_are_named(whole, tmp_path, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fragile, "at", 5)
        with pytest.raises(Crash):
            run(tmp_path, trainer_class=Fragile)
    assert sorted(path.name for path in tmp_path.glob("st*-*")) == ["stage-0", "step-1-1", "step-1-2"]
    damage(tmp_path / "step-1-2" / "state.safetensors")
    (tmp_path / "step-1-1" / "progress.json").unlink()
    assert digest(run(tmp_path, trainer_class=Fragile, resume=True)) == whole
    said = [record.getMessage() for record in caplog.records if record.name == "apexlib.training.checkpoints"]
    assert said == [
        f"{tmp_path / 'step-1-2'}: passed over, state.safetensors was changed",
        f"{tmp_path / 'step-1-1'}: passed over, progress.json is missing",
    ]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text(""), "manifest.json: not JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "need an object, got list"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": 2, "files": {"a": "b"}}'),
            "need format 1.* got format 2",
        ),
        (lambda f: (f / "manifest.json").write_text('{"format": 1, "files": {"../a": "b"}}'), "'../a' is no file of"),
        (lambda f: (f / "state.safetensors").write_bytes(b""), "state.safetensors was changed"),
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: (f / "assessed.parquet").unlink(), "assessed.parquet is missing"),
        (lambda f: damage(f / "trainer_state.json"), "trainer_state.json was changed"),
    ],
)
def test_every_damage_is_told_apart(spoil, reason, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fragile, "at", 2)
        with pytest.raises(Crash):
            run(tmp_path, trainer_class=Fragile)
    folder = tmp_path / "step-0-2"
    assert fault(folder) == ""
    spoil(folder)
    assert re.search(reason, fault(folder))


def test_a_damaged_stage_takes_the_states_that_build_on_it_along(whole, tmp_path, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fragile, "at", 5)
        with pytest.raises(Crash):
            run(tmp_path, trainer_class=Fragile)
    damage(tmp_path / "stage-0" / "model.safetensors")
    assert digest(run(tmp_path, trainer_class=Fragile, resume=True)) == whole
    assert "step-1-2: passed over, stage-0 model.safetensors was changed" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-2}, "arguments.learning_rate was 0.01, is 0.02"),
        ({"seed": 7}, "arguments.seed was 42, is 7"),
        ({"method": "direct"}, "method was apex, is direct"),
        ({"config": ApexConfig(**(vars(CONFIG) | {"operator": "dense"}))}, "config.operator was monarch, is dense"),
        ({"trainer_class": Trainer}, "trainer was Fragile, is Trainer"),
        ({"max_steps": 12}, "steps was 9, is 12"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_another_run_is_not_resumed_and_nothing_is_harmed(changes, message, tmp_path):
    run(tmp_path, trainer_class=Fragile)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}
    with pytest.raises(ValueError, match=f"cannot resume another run: {message}"):
        run(tmp_path, **({"trainer_class": Fragile} | changes), resume=True)
    with pytest.raises(FileExistsError, match=r"holds a run already; continue it \(resume=True\), replace it"):
        run(tmp_path, **({"trainer_class": Fragile} | changes))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()} == before


def test_other_weights_or_data_are_not_resumed(tmp_path, monkeypatch):
    run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "build", lambda *given, **named: other_weights(*given, **named))
        with pytest.raises(ValueError, match=r"model.weights was \w+, is \w+"):
            run(tmp_path, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "Counted", lambda moment: Blocks(start=3))
        with pytest.raises(ValueError, match=r"data.train was \w+, is \w+"):
            run(tmp_path, resume=True)


def other_weights(*given, build=faults.build, **named):
    model = build(*given, **named)
    model.lm_head.weight.data[0, 0] += 2**-20
    return model


def test_overwriting_starts_anew(whole, tmp_path):
    run(tmp_path, trainer_class=Fragile, learning_rate=3e-2)
    (tmp_path / "notes.txt").write_text("mine")
    assert digest(run(tmp_path, trainer_class=Fragile, overwrite=True)) == whole
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_run_at_a_time_works_in_a_folder(tmp_path):
    with exclusive(tmp_path / ".lock"), pytest.raises(FileExistsError, match="another run is at work there"):
        run(tmp_path, resume=True)


def test_what_a_killed_writer_left_is_cleared(whole, tmp_path):
    (tmp_path / ".partial-stage-0-abc").mkdir()
    (tmp_path / ".partial-stage-0-abc" / "model.safetensors").write_text("half")
    (tmp_path / ".partial-run-xyz.json").write_text("{")
    assert digest(run(tmp_path, trainer_class=Fragile)) == whole
    assert not list(tmp_path.glob(".partial-*"))


def test_a_full_disk_stops_the_run_and_leaves_the_last_state(whole, tmp_path):
    """Files may not grow beyond what a state takes once stage 1 has begun: its writers fail as on a full disk."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from apexlib.training.trainer import StageTraining
from test_resume import Fragile, run
save_state = StageTraining.save_state
def full(self, **named):
    if self.stage.number == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    save_state(self, **named)
StageTraining.save_state = full
run({str(tmp_path)!r}, trainer_class=Fragile)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "step-1-1: not saved, " in done.stderr.splitlines()[-1]
    assert "what was saved before is complete" in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json", "stage-0"]
    assert digest(run(tmp_path, trainer_class=Fragile, resume=True)) == whole


@pytest.mark.parametrize("changes", [{}, {"save_strategy": "no"}], ids=str)
def test_a_folder_that_is_removed_under_way_ends_the_run(changes, tmp_path):
    class Removing(Fragile):
        def compute_loss(self, *given, **named):
            if self.model.training and self.run_step == 1:
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
            return super().compute_loss(*given, **named)

    with pytest.raises(FileNotFoundError, match="run: removed while its run is under way"):
        run(tmp_path / "run", trainer_class=Removing, **changes)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run")


# what lies in a state


def test_a_state_holds_no_code_no_secret_and_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    with monkeypatch.context() as patch:
        patch.setattr(Fragile, "at", 5)
        with pytest.raises(Crash):
            run(tmp_path, trainer_class=Fragile, hub_token="a-secret-token")
    for path in tmp_path.rglob("*"):
        assert path.suffix in ("", ".json", ".safetensors", ".parquet"), path
        if path.is_file():
            assert b"a-secret-token" not in path.read_bytes(), path


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES)
def test_a_state_comes_back_as_it_was(tmp_path, tree):
    value = {"tree": tree, "tensors": [torch.arange(3), torch.tensor(0.1, dtype=torch.float64)]}
    checkpoints.write_state(value, tmp_path)
    found = checkpoints.read_state(tmp_path)
    assert found["tree"] == tree
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found["tensors"], value["tensors"], strict=True)
    )


def test_what_is_no_tensor_number_or_text_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"state\.a\.0: a PosixPath cannot be saved"):
        checkpoints.write_state({"a": [Path()]}, tmp_path)


def test_every_state_inside_a_stage_lies_before_that_stages_end():
    names = ["stage-0", "step-1-0", "step-1-3", "stage-1", "step-2-0"]
    assert sorted(names, key=lambda name: position(Path(name))) == names


# killed


def stopped(tmp_path, every, end):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", faults.__file__, str(tmp_path), str(every), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / f"{end}.csv")
    assert table["stopped"].all(), table[~table["stopped"]]
    assert table["survived"].all(), table[~table["survived"]]
    assert not table["debris"].any()
    return table


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_run_stopped_anywhere_goes_on(end, tmp_path):
    assert len(stopped(tmp_path, 97, end)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_run_stopped_at_many_moments_goes_on(end, tmp_path, tally):
    table = stopped(tmp_path, 7, end)
    assert len(table) >= 30
    assert set(table["kind"]) >= {"read", "open", "os.mkdir", "os.rename"}
    what = {"kill": "kill −9", "terminate": "SIGTERM"}[end]
    where = "of a 3-stage run: examples read; files and folders opened, made, moved, removed"
    tally(f"stopped-by-{end}", f"{what} at moments {where}", len(table), int(table["survived"].sum()))


@pytest.mark.slow
def test_every_method_resumes_at_every_step(tmp_path, tally):
    tried = survived = 0
    for method in METHODS:
        expected = digest(run(tmp_path / method, trainer_class=Fragile, method=method))
        for step in range(9):
            found = crash_and_resume(tmp_path / f"{method}-{step}", step, method=method)
            tried, survived = tried + 1, survived + (digest(found) == expected)
    assert survived == tried
    tally("crashes", f"crash in each of 9 steps, {len(METHODS)} methods", tried, survived)


@pytest.mark.slow
def test_two_hundred_random_plans_resume_at_a_random_step(tmp_path, tally):
    survived = 0
    for seed in range(200):
        draw = random.Random(seed)
        fraction, stages = draw.choice([0.05, 0.2, 0.25, 0.5]), draw.randint(1, 3)
        shares = [draw.uniform(2 * fraction, 1) for _ in range(2)]
        choices = {"operator": OPERATORS, "strategy": ("advantage", "random", "reversed", "magnitude", "gradient")}
        choices |= {"statistic": ("rank", "mean", "ema", "ema_rank"), "train_norms": (True, False)}
        drawn = {name: draw.choice(list(known)) for name, known in choices.items()}
        drawn |= {"train_embeddings": draw.random() < 0.5, "balance_weight": draw.choice([0.0, 0.1]), "seed": seed}
        config = ApexConfig(fraction, *shares, stages=stages, assessment_samples=8, **drawn)
        options = {"config": config, "max_steps": 2 * stages, "eval_strategy": "no", "save_steps": draw.randint(1, 2)}
        expected = digest(run(tmp_path / f"{seed}-whole", trainer_class=Fragile, **options))
        found = crash_and_resume(tmp_path / f"{seed}", draw.randrange(2 * stages), **options)
        assert digest(found) == expected, options
        survived += 1
    tally("random-plans", "crash at a random step, random plan, operator, strategy and stages", 200, survived)
