"""The commands as a user types them, in this process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from typing import get_args

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

import apexlib
from apexlib import ExpansionPlan
from apexlib.suite.cli import main
from apexlib.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from conftest import build

    folder = tmp_path_factory.mktemp("model ü")
    text = ["one two three four five " * 40, "six seven eight nine ten " * 40]
    tokenizer = train_tokenizer(text, 270)
    build("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(f"{n} {part}" for n in range(40) for part in text))
    return folder


def test_difference_writes_tables_with_provenance(folder, tmp_path, capsys):
    given = ["difference", str(folder), "--corpus", str(folder / "text.txt"), "--length", "32", "--blocks", "4"]
    assert main([*given, "--out", str(tmp_path)]) == 0
    statistics = pd.read_csv(tmp_path / "activations.csv")
    assert len(statistics) == 2 * (2 + 24)
    assert set(statistics["tokens"]) == {4 * 32}
    assert len(pd.read_csv(tmp_path / "imbalance.csv")) == 4
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / f"{n}.csv") for n in ("activations", "imbalance")]
    assert (tmp_path / "activations.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "missing.txt"], "missing.txt"),
        (["--top", "0.7"], "top = 0.7: need a fraction above 0 and at most 0.5"),
        (["--length", "100000"], "need 100000"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(arguments, message, folder, tmp_path, capsys):
    given = ["difference", str(folder), "--corpus", str(folder / "text.txt"), "--out", str(tmp_path), *arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_spectrum_prints_and_writes_what_the_table_says(folder, tmp_path, capsys):
    assert main(["spectrum", str(folder), "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "spectrum.csv")
    pd.testing.assert_frame_equal(table, apexlib.spectrum_table(folder), check_dtype=False, rtol=1e-6)
    header, *rows, path = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "spectrum.csv")
    assert header.split()[:4] == ["weight", "rows", "columns", "effective_rank"]
    assert [row.split()[0] for row in rows] == table["weight"].tolist()
    assert json.loads((tmp_path / "spectrum.json").read_text())["model"] == str(folder)


def test_an_update_goes_out_and_comes_back(folder, tmp_path, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] += 1.0
    (tmp_path / "tuned").mkdir()
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    base, tuned, file, made = map(str, (folder, tmp_path / "tuned", tmp_path / "update", tmp_path / "made"))
    assert main(["export-update", base, tuned, file]) == 0
    _, row, told = capsys.readouterr().out.splitlines()
    assert row.split()[:4] == ["model.layers.1.mlp.up_proj.weight", "rows", "1", "24"]
    assert told.startswith(f"{file}: {os.path.getsize(file):,} bytes, ")
    assert main(["apply-update", base, file, made]) == 0
    assert capsys.readouterr().out == f"{made}\n"
    found = load_file(tmp_path / "made" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert main(["apply-update", tuned, file, f"{made} again"]) == 2
    error = capsys.readouterr().err
    assert "another base" in error
    assert error.count("\n") == 1


def test_spectrum_of_updates(folder, tmp_path, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] += 1.0
    (tmp_path / "tuned").mkdir()
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    given = ["spectrum", str(tmp_path / "tuned"), "--base", str(folder), "--out", str(tmp_path)]
    assert main(given) == 0
    table = pd.read_csv(tmp_path / "updates.csv").set_index("weight")
    assert table.index[table["effective_rank"] > 0].tolist() == ["model.layers.1.mlp.up_proj.weight"]
    assert "noise_frobenius" in capsys.readouterr().out
    (tmp_path / "tuned" / "model.safetensors").write_bytes(b"torn")
    for wrong, message in ((given, "model.safetensors: "), (["spectrum", str(tmp_path / "gone")], "need a folder")):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


TRAINING = """
model: {model}
data: {{source: {text}, split: all}}
length: 32
apex: {{fraction: 0.25, direct_heads: 0.5, direct_channels: 0.6, statistic: mean, assessment_samples: 16}}
training: {{output_dir: {out}, max_steps: 6, per_device_train_batch_size: {batch}, learning_rate: 1.0e-2, optim: sgd,
            use_cpu: true, disable_tqdm: true, save_strategy: "no", logging_steps: 1{more}}}
"""


def settings(folder, path, batch, more=""):
    given = {"model": json.dumps(str(folder)), "text": json.dumps(str(folder / "text.txt")), "batch": batch}
    path.with_suffix(".yaml").write_text(TRAINING.format(**given, out=json.dumps(str(path)), more=more))
    return str(path.with_suffix(".yaml"))


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCH += ["-m", "apexlib", "train"]


@pytest.mark.case("data parallel training, `accelerate launch --num_processes 2`", "works")
def test_two_processes_train_what_one_trains(folder, tmp_path):
    """Data parallel under `accelerate launch`, on two CPU processes: the same plans, the same weights to 1e-6."""
    assert main(["train", settings(folder, tmp_path / "one", 4)]) == 0
    given = settings(folder, tmp_path / "two", 2, ", ddp_backend: gloo")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*LAUNCH, given], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two, base = (
        load_file(path / "model.safetensors") for path in (tmp_path / "one/final", tmp_path / "two/final", folder)
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
    assert max((one[name] - base[name]).abs().max() for name in one) > 1e-3
    for stage in (0, 1):
        plans = [ExpansionPlan.from_json(tmp_path / run / f"stage-{stage}" / "plan.json") for run in ("one", "two")]
        assert plans[0].layers == plans[1].layers
        paths = [tmp_path / run / f"stage-{stage}" / "statistics.parquet" for run in ("one", "two")]
        seen = [pd.read_parquet(path)[["layer", "component", "unit", "activation", "tokens"]] for path in paths]
        pd.testing.assert_frame_equal(*seen, rtol=1e-4)  # of what both processes have seen
    assert pd.read_csv(tmp_path / "two" / "log.csv")["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_training_is_resumed_by_the_command_line(folder, tmp_path, monkeypatch, capsys):
    assert main(["train", settings(folder, tmp_path / "whole", 4)]) == 0
    file, steps = settings(folder, tmp_path / "cut ü", 4), iter(range(100))
    with monkeypatch.context() as patch:
        original = Trainer.training_step

        def interrupted(*given, **named):
            if next(steps) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*given, **named)

        patch.setattr(Trainer, "training_step", interrupted)
        assert main(["train", file]) == 143
        assert "interrupted: SIGTERM after step 5: saved; resume=True (--resume) goes on" in capsys.readouterr().err
    assert main(["train", file]) == 2
    assert "holds a run already; continue it (resume=True" in capsys.readouterr().err
    assert main(["train", file, "--resume"]) == 0
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "cut ü"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert main(["train", file, "--overwrite"]) == 0


@pytest.mark.case("`python -m apexlib train settings.yaml --set training.seed=1`", "works")
def test_settings_of_a_file_are_overridden_from_the_command_line(folder, tmp_path, capsys):
    file = settings(folder, tmp_path / "out", 4)
    changes = {"method": "full", "training.learning_rate": "2e-3", "apex.stages": "3", "training.max_steps": "3"}
    given = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    assert main(["train", file, *given]) == 0
    told = json.loads((tmp_path / "out" / "log.json").read_text())["settings"]
    assert (told["method"], told["apex"]["stages"]) == ("full", 3)
    assert (told["training"]["learning_rate"], told["training"]["max_steps"]) == (2e-3, 3)
    assert pd.read_csv(tmp_path / "out" / "log.csv")["step"].max() == 3
    for wrong, said in {"method": "need NAME=VALUE", "model.x=1": "need a mapping at model"}.items():
        assert main(["train", file, "--set", wrong]) == 2
        assert said in capsys.readouterr().err


def test_the_command_line_says_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"apexlib {metadata.version('apexlib')}\n"


@pytest.mark.slow
def test_two_processes_killed_go_on_to_the_same_bits(folder, tmp_path):
    more = ", ddp_backend: gloo, save_steps: 1, save_total_limit: 2"
    text = TRAINING.replace("max_steps: 6", "max_steps: 40").replace('save_strategy: "no"', "save_strategy: steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "TRAINING", text)
        files = [settings(folder, tmp_path / name, 2, more) for name in ("whole", "killed")]
    done = subprocess.run([*LAUNCH, files[0]], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen([*LAUNCH, files[1]], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed").glob("step-1-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run([*LAUNCH, files[1], "--resume"], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "while parsing"),
        ("model: m\ntraining: [output_dir]", "t.yaml, training: need a mapping, got ['output_dir']"),
        ("- 1", "need a mapping with model"),
        ("model: &m m\nmethod: *m", "alias *m, need the value"),
        ("model: m\nmodell: n", "unknown key 'modell' in "),
        ("kind: text", "t.yaml: need model"),
        ("model: m\nmethod: apx\ntraining: {output_dir: o}", "t.yaml, method: need 'apex', 'full'"),
        ("model: m\ntraining: {lr: 1}", "t.yaml, training: need output_dir"),
        ("model: m\nlength: '9'\ntraining: {output_dir: o}", "t.yaml, length: need a valid integer, got '9'"),
        ("model: m\nkind: prose\ntraining: {output_dir: o}", "t.yaml, kind: need 'text' or 'chat', got 'prose'"),
        ("model: m\ntraining: {output_dir: o, lr: 1}", "unexpected keyword argument 'lr'"),
    ],
)
def test_a_wrong_training_file_is_one_line(text, message, tmp_path, capsys):
    (tmp_path / "t.yaml").write_text(text)
    assert main(["train", str(tmp_path / "t.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


SIZES = {"num_attention_heads": 0, "num_hidden_layers": -1, "hidden_size": "wide", "vocab_size": None}


@pytest.mark.parametrize("change", [{name: value} for name, value in SIZES.items()] + [{"hidden_size": 2**70}], ids=str)
def test_a_plan_for_sizes_that_are_none_is_one_line(change, tmp_path, capsys):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 48} | shape | change))
    assert main(["plan", str(tmp_path), "--batch", "1", "--length", "8", "--method", "full"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_methods_to_plan_for_are_those_that_there_are(capsys):
    from apexlib.training.methods import Name

    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    assert ", ".join(get_args(Name)) in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "model", "--method", "apex", "apx"])
    assert "invalid choice: 'apx' (choose from 'apex', 'full'" in capsys.readouterr().err


def test_without_the_notebooks_extra_train_says_what_is_missing(tmp_path, capsys, monkeypatch):
    (tmp_path / "t.yaml").write_text("model: m")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.delitem(sys.modules, "apexlib.suite.notebooks", raising=False)
    assert main(["train", str(tmp_path / "t.yaml")]) == 2
    assert re.fullmatch(r"error: .*pydantic.*; need pip install 'apexlib\[notebooks\]'\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["reproduce", "difference", "spectrum", "train", "fuse", "plan", "verify"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: python -m apexlib {command} " in capsys.readouterr().out


def test_the_exit_codes_are_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(f"{code}: " in told for code in ("0", "1", "2", "3", "130, 143"))


def test_verify_tells_a_sound_folder_from_a_damaged_one(tmp_path, capsys):
    from conftest import build

    apexlib.save_fused(build("llama"), tmp_path / "model")
    assert main(["verify", str(tmp_path / "model")]) == 0
    assert "FAILED" not in capsys.readouterr().out
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(tmp_path / "model")]) == 1
    assert "FAILED  hash        model.safetensors  was changed" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "need a folder that `save_fused` wrote" in capsys.readouterr().err


def test_every_public_name_can_be_imported():
    for name in apexlib.__all__:
        found = getattr(apexlib, name)
        assert callable(found) or found.__name__ == f"apexlib.{name}", name
    with pytest.raises(AttributeError, match="no attribute 'expnad'"):
        apexlib.expnad  # noqa: B018
