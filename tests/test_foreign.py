"""What lies in a folder from somebody else runs no code, and unpickles nothing; what is written keeps the umask."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build

from apexlib.files import atomic_folder, atomic_write, pretrained
from apexlib.text.skills import skills_text
from apexlib.text.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def foreign(tmp_path):
    """A model folder whose configuration asks for the code beside it to be run; the code leaves a mark."""
    folder = tmp_path / "model"
    build("llama").save_pretrained(folder)
    train_tokenizer(skills_text(20), 300).save_pretrained(folder)
    code = f"open({str(tmp_path / 'mark')!r}, 'w').write('was here')\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.case("code in a model folder (`auto_map`)", "refused")
@pytest.mark.parametrize(
    "command",
    [
        ["verify"],
        ["difference", "--corpus", "stdlib-prose", "--blocks", "1", "--length", "8"],
        ["plan", "--batch", "1", "--length", "8"],
    ],
    ids=lambda command: command[0],
)
def test_no_code_of_a_model_folder_runs_whoever_answers_yes(command, foreign, tmp_path):
    name, *options = command
    ended = subprocess.run(
        [sys.executable, "-m", "apexlib", name, str(foreign), *options],
        input="y\n" * 50, capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert not (tmp_path / "mark").exists()
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr


def test_models_tokenizers_and_configurations_are_loaded_in_one_way():
    calls = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in [*(ROOT / "apexlib").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\.from_pretrained\(", line)
    ]
    assert [call.partition(":")[0] for call in calls] == ["apexlib/files.py"], calls


@pytest.mark.case("pickled weights", "refused")
def test_weights_that_are_pickled_are_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    build("llama").save_pretrained(tmp_path)
    torch.save(build("llama").state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        pretrained(AutoModelForCausalLM, tmp_path, dtype="auto")


@pytest.mark.skipif(os.name == "nt", reason="no umask there")
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_and_folders_keep_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("x")
        with atomic_folder(tmp_path / "folder"):
            pass
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
