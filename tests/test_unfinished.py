"""The newest state of a run as a plain model: that of the step it was saved at, to the bit."""

import shutil

import pytest
import torch
from conftest import build
from faults import run
from safetensors.torch import load_file
from test_resume import Crash, Fragile, damage

from apexlib.certificate import verify_folder
from apexlib.suite.cli import main
from apexlib.text.tokenizer import train_tokenizer
from apexlib.training.methods import METHODS
from apexlib.training.unfinished import newest_model

EVERY = range(10)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    train_tokenizer(["one two three " * 40], 270).save_pretrained(folder)
    return folder


def crash(folder, step, **options):
    """A run that died in its step after `step`, whose plain models were kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fragile, "at", step)
        with pytest.raises(Crash):
            run(folder, trainer_class=Fragile, **options)
    return folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fuse(*given):
    return main(["fuse", *map(str, given)])


@pytest.mark.case("`python -m apexlib fuse RUN --out FOLDER`: a run's newest state, also inside a stage", "works")
@pytest.mark.parametrize(("step", "state"), [(1, "step-0-1"), (2, "step-0-2"), (3, "stage-0"), (5, "step-1-2")])
def test_the_newest_state_is_the_model_after_so_many_steps(step, state, base, tmp_path, capsys):
    whole = crash(tmp_path / "run", step, checkpoints=EVERY)
    before = files(whole)
    assert fuse(whole, "--out", tmp_path / "fused", "--base", base) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'fused'}: {state} of {whole}, with a tokenizer\n"
    assert files(whole) == before
    assert verify_folder(tmp_path / "fused")["passed"].all()
    expected = load_file(whole / f"step-{step:05d}" / "model.safetensors")
    found = load_file(tmp_path / "fused" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert f"| state | {state} of run |" in (tmp_path / "fused" / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_newest_state(method, base, tmp_path):
    kept = EVERY if METHODS[method].plain else ()
    folder = crash(tmp_path / "run", 5, method=method, checkpoints=kept)
    model, state, plans = newest_model(folder, base)
    assert state.name == ("step-1-2" if METHODS[method].staged else "step-0-5")
    assert len(plans) == (2 if METHODS[method].assesses else 0)
    if kept:
        expected = load_file(folder / "step-00005" / "model.safetensors")
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert type(model) is type(build("llama"))
    assert not torch.equal(model.lm_head.weight, build("llama").lm_head.weight) or method == "lora"


def test_a_run_that_has_ended_gives_what_it_returned(tmp_path):
    record = run(tmp_path)
    model, state, plans = newest_model(tmp_path)
    assert (state.name, plans) == ("stage-2", record.plans)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in record.model.state_dict().items())


def test_a_damaged_state_is_passed_over_for_the_one_before(base, tmp_path):
    folder = crash(tmp_path / "run", 5)
    damage(folder / "step-1-2" / "state.safetensors")
    assert newest_model(folder, base)[1].name == "step-1-1"


def _no_run(folder, base):
    (folder / "run.json").unlink()


def _no_object(folder, base):
    (folder / "run.json").write_text("[]")


def _no_identity(folder, base):
    (folder / "run.json").write_text('{"identity": {"method": "apex"}}')


def _no_state(folder, base):
    for state in (*folder.glob("step-*"), *folder.glob("stage-*")):
        shutil.rmtree(state)


WRONG = {
    "need the output_dir of a run": (_no_run, True),
    "need an object, got list": (_no_object, True),
    "not that of a run": (_no_identity, True),
    "has no state yet that is complete": (_no_state, True),
    "is inside the first stage; need base": (lambda *_: None, False),
    "is not the model that the run began with": (lambda _, base: build("llama", seed=1).save_pretrained(base), True),
    "exists and is not an empty folder": (lambda folder, _: shutil.copytree(folder, folder.parent / "out"), True),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_state_of_a_run_is_one_line_and_harms_nothing(message, base, tmp_path, capsys):
    folder, own = crash(tmp_path / "run", 1), shutil.copytree(base, tmp_path / "base")
    spoil, with_base = WRONG[message]
    spoil(folder, own)
    before = files(tmp_path)
    capsys.readouterr()
    assert fuse(folder, "--out", tmp_path / "out", *(("--base", own) if with_base else ())) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert files(tmp_path) == before
