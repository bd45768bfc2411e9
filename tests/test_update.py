"""Updates: what is applied has the bits of what was exported, whatever changed; nothing else is accepted or harmed."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_expansion import expanded, perturb
from transformers import AutoModelForCausalLM

from apexlib import ExpansionPlan, LayerPlan, apply_update, expand, export_update, fuse
from apexlib.text.tokenizer import train_tokenizer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        bits = [each.reshape(-1).contiguous().view(torch.uint8) for each in (tensor, other[name])]
        assert torch.equal(*bits), name


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def drawn(shape, dtype, generator):
    values = torch.randint(0, 255, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    values = values % 2 if dtype == torch.bool else values  # NaN, infinity and -0 are bits as others are
    return values.view(dtype)[..., 0]


@st.composite
def two_folders(draw):
    """Tensors of a base and of what became of them: any dtype and shape; rows, columns, entries or all changed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base, tuned = {}, {}
    for number in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        dtype, fate = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["same", "lines", "all", "new", "lost"]))
        name = draw(st.sampled_from(["layers.{}.weight", "index:{}", "rows:whole:{} ü"])).format(number)
        old = drawn(shape, dtype, generator)
        new = old.clone()
        if fate == "lines" and old.numel():
            axis = draw(st.integers(0, max(0, len(shape) - 1)))
            lines = draw(st.sets(st.integers(0, (shape or [1])[axis] - 1)))
            flat = new.reshape(shape or [1])
            for line in lines:
                part = flat.select(axis, line)
                part.copy_(drawn(part.shape, dtype, generator))
        if fate == "all":
            new = drawn(draw(st.lists(st.integers(0, 7), max_size=3)), draw(st.sampled_from(DTYPES)), generator)
        base |= {} if fate == "new" else {name: old}
        tuned |= {} if fate == "lost" else {name: new}
    shards = draw(st.integers(1, 3))
    return base or {"a": torch.zeros(2)}, tuned or {"b": torch.zeros(2)}, shards


def write(folder, weights, shards):
    folder.mkdir()
    parts = [dict(list(weights.items())[start::shards]) for start in range(shards)]
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@given(two_folders())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_applying_what_was_exported_gives_the_bits_of_the_tuned_model(tmp_path, drawn_folders):
    base, tuned, shards = drawn_folders
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write(tmp_path / "base", base, shards)
    write(tmp_path / "tuned", tuned, 1)
    before = hashes(tmp_path)
    table = export_update(tmp_path / "base", tmp_path / "tuned", tmp_path / "update")
    apply_update(tmp_path / "base", tmp_path / "update", tmp_path / "made")
    same_bits(tensors(tmp_path / "made"), tuned)
    after = hashes(tmp_path)
    assert {path: after[path] for path in before} == before
    assert sorted(table["weight"]) == sorted(base.keys() | tuned.keys())
    assert table["full"].sum() == sum(tensor.nbytes for tensor in tuned.values())
    assert (table["bytes"] <= table["full"]).all()
    kept = load_file(tmp_path / "update")
    assert table["bytes"].sum() == sum(tensor.nbytes for tensor in kept.values())


@pytest.fixture
def pair(tmp_path):
    """Folders of a base with a tokenizer and of what training half of its units made of it."""
    tokenizer = train_tokenizer(["some text to learn from"] * 9, 300)
    build("llama").save_pretrained(tmp_path / "base")
    fuse(perturb(expanded("llama"), 0.05)).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("about the base")
    return tmp_path / "base", tmp_path / "tuned"


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
def test_a_model_made_of_base_and_update_is_the_tuned_one(variant, dtype, shard, tmp_path, batch):
    build(variant, dtype=dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)
    model = fuse(perturb(expanded(variant, train_embeddings=False, dtype=dtype), 0.05))
    model.save_pretrained(tmp_path / "tuned")
    table = export_update(tmp_path / "base", tmp_path / "tuned", tmp_path / "update")
    assert (table["bytes"] <= table["full"]).all()
    assert set(table["kept"]) <= {"same", "rows", "columns", "whole"}  # whole where nearly all units train
    assert table["bytes"].sum() < table["full"].sum()
    made = apply_update(tmp_path / "base", tmp_path / "update", tmp_path / "made")
    same_bits(tensors(made), tensors(tmp_path / "tuned"))
    files = [sorted(path.name for path in folder.glob("*.safetensors*")) for folder in (tmp_path / "base", made)]
    assert files[0] == files[1]
    loaded = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (made, tmp_path / "tuned")]
    assert loaded[0].dtype == dtype
    assert torch.equal(*(each(**batch).logits for each in loaded))


def test_an_update_holds_the_rows_and_columns_that_trained_and_no_others(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    plan = ExpansionPlan((LayerPlan(1, "channel", source=(7,), target=(3,), direct=(5, 20), units=24),))
    fuse(perturb(expand(model, plan, train_embeddings=False), 0.05)).save_pretrained(tmp_path / "tuned")
    table = export_update(tmp_path / "base", tmp_path / "tuned", tmp_path / "update").set_index("weight")
    ffn = {f"model.layers.1.mlp.{name}_proj.weight": "rows" for name in ("gate", "up")}
    ffn["model.layers.1.mlp.down_proj.weight"] = "columns"
    assert table.loc[table["kept"] != "same", "kept"].to_dict() == ffn
    assert (table.loc[[*ffn], ["changed", "of", "bytes"]] == [4, 24, 4 * (16 * 4 + 8)]).all(axis=None)
    for name, kept in ffn.items():
        assert load_file(tmp_path / "update")[f"index:{name}"].tolist() == [3, 5, 7, 20], kept
    assert (tmp_path / "update").stat().st_size < table["full"].sum() / 4


def test_the_configuration_is_the_tuned_models_and_the_tokenizer_the_bases(pair, tmp_path):
    base, tuned = pair
    AutoModelForCausalLM.from_pretrained(tuned).bfloat16().save_pretrained(tmp_path / "half")
    export_update(base, tmp_path / "half", tmp_path / "update")
    made = apply_update(base, tmp_path / "update", tmp_path / "made")
    assert (made / "config.json").read_text() == (tmp_path / "half" / "config.json").read_text()
    assert (made / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (made / "README.md").exists()
    assert AutoModelForCausalLM.from_pretrained(made, dtype="auto").dtype == torch.bfloat16


def test_another_base_is_refused_in_one_line_and_nothing_is_written(pair, tmp_path):
    base, tuned = pair
    export_update(base, tuned, tmp_path / "update")
    other = tensors(base)
    other["model.norm.weight"][3] = -other["model.norm.weight"][3]
    save_file(other, base / "model.safetensors", metadata={"format": "pt"})
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match=r"base: another base, its weights have the SHA-256 \w{16}…; need the weights"):
        apply_update(base, tmp_path / "update", tmp_path / "made")
    assert hashes(tmp_path) == before


def test_a_base_in_other_shards_is_the_same_base(pair, tmp_path):
    base, tuned = pair
    export_update(base, tuned, tmp_path / "update")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "again", max_shard_size="8KB")
    made = apply_update(tmp_path / "again", tmp_path / "update", tmp_path / "made")
    assert len(list(made.glob("*.safetensors"))) > 1
    same_bits(tensors(made), tensors(tuned))


@given(st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_update_is_refused_and_leaves_nothing(pair, tmp_path, data):
    base, tuned = pair
    file = tmp_path / "update"
    if not file.exists():
        export_update(base, tuned, file)
        shutil.copy(file, tmp_path / "whole")
    content = bytearray((tmp_path / "whole").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    where = st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1))
    if data.draw(st.booleans()):
        content[data.draw(where)] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(where) :]
    file.write_bytes(content)
    before = hashes(tmp_path)
    try:
        made, refused = apply_update(base, file, tmp_path / "made"), ""
    except (ValueError, OSError) as error:
        made, refused = None, str(error)
    if made:  # a bit of the padding, say, tells nothing
        same_bits(tensors(made), tensors(tuned))
        shutil.rmtree(made)
    else:
        assert refused.count("\n") == 0 < len(refused)
    assert hashes(tmp_path) == before
    assert not list(tmp_path.glob(".partial-*"))


def test_the_page_on_sharing_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **given: pushed.append(given["repo_id"]))
    monkeypatch.chdir(tmp_path)
    model = build("llama")
    model.save_pretrained("base")
    plan = ExpansionPlan((LayerPlan(1, "channel", source=(7,), target=(3,), direct=(5, 20), units=24),))
    record = SimpleNamespace(model=perturb(expand(model, plan), 0.01), plans=(plan,))
    here = {"record": record, "tokenizer": train_tokenizer(["some text"] * 9, 300), "torch": torch}
    page = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, here)
    assert pushed == ["me/tuned"]
    same_bits(tensors(Path("again")), tensors(Path("tuned")))
    assert {path.name for path in Path("tasks").glob("*.yaml")} == {"skills.yaml", "skills_choice.yaml"}


def test_what_cannot_be_done_is_said_before_anything_is_read(pair, tmp_path):
    base, tuned = pair
    (tmp_path / "there").write_text("x")
    with pytest.raises(FileExistsError, match="there: exists; need a new file"):
        export_update(base, tuned, tmp_path / "there")
    with pytest.raises(ValueError, match="lies among the weights of a model; need another folder"):
        export_update(base, tuned, base / "update.safetensors")
    with pytest.raises(FileNotFoundError, match="need a folder with safetensors files"):
        export_update(tmp_path / "none", tuned, tmp_path / "update")
    export_update(base, tuned, tmp_path / "update")
    with pytest.raises(FileExistsError, match="exists and is not an empty folder; need a new one"):
        apply_update(base, tmp_path / "update", tuned)
    with pytest.raises(ValueError, match=r"need a file that `export_update` wrote"):
        apply_update(base, tuned / "model.safetensors", tmp_path / "made")
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"torn: .*header"):
        apply_update(base, tmp_path / "torn", tmp_path / "made")
    save_file({"model.norm.weight": torch.zeros(1)}, base / "more.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight lies in model.safetensors and in more.safetensors"):
        export_update(base, tuned, tmp_path / "other")
    assert not (tmp_path / "made").exists()
