"""The README's examples, run one after the other as they stand, but for the model, its length and device."""

import json
import re
from pathlib import Path

import pytest
from conftest import build

from apexlib.suite.cli import main
from apexlib.text.skills import skills
from apexlib.text.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
CHANGES = {
    "python": {'"…"': '"model"', "length=512": "length=64", "learning_rate=2e-5": "learning_rate=2e-5, use_cpu=True"},
    "yaml": {"path-or-name": "model", "length: 512": "length: 64", "bf16: true": "bf16: true, use_cpu: true"},
}


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Blocks of code of a language, on a small model and some data in the working directory."""
    monkeypatch.chdir(tmp_path)
    chats = [{"messages": each["messages"]} for each in skills("train", 64)]
    Path("chat.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in chats), encoding="utf-8")
    texts = [f"{n} and {n + 1} make {2 * n + 1}, says the book of numbers." for n in range(400)]
    Path("my.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
    tokenizer = train_tokenizer([*texts, *(each["content"] for chat in chats for each in chat["messages"])], 300)
    tokenizer.save_pretrained("model")
    build("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained("model")

    def blocks(language):
        found = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
        text = "\n".join(found)
        for old, new in CHANGES[language].items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return text

    return blocks


def test_look_expand_and_train_in_stages(example):
    pytest.importorskip("trl", reason="trl is not installed")
    names = {}
    exec(compile(example("python"), "README.md", "exec"), names)
    assert names["record"].log["loss"].notna().all()
    assert len(names["record"].plans) == 2
    assert main(["verify", "tuned"]) == 0


def test_train_from_the_shell(example):
    Path("settings.yaml").write_text(example("yaml"), encoding="utf-8")
    assert main(["train", "settings.yaml"]) == 0
    assert Path("run/final/model.safetensors").exists()
