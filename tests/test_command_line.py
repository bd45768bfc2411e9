"""The commands as a user types them, in this process."""

import pandas as pd
import pytest

import apexlib
from apexlib.__main__ import main
from apexlib.tokenizer import train_tokenizer


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
        assert callable(getattr(apexlib, name)), name
    with pytest.raises(AttributeError, match="no attribute 'expnad'"):
        apexlib.expnad  # noqa: B018
