"""Certificates: what fusing and casting changed, measured independently; damaged folders are found out."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import build
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from test_expansion import EVERY, expanded, logits, perturb, state, varied_plan
from transformers import AutoModelForCausalLM

from apexlib.certificate import save_fused, verify_folder
from apexlib.expansion import expand, fuse, is_expanded
from apexlib.files import file_hash
from apexlib.inspection import trainable_table
from apexlib.plan import ApexConfig
from apexlib.projections import SplitProjection
from apexlib.text.tokenizer import train_tokenizer


@pytest.fixture
def batches(batch):
    return [batch, {"input_ids": batch["input_ids"][:1]}]


def split_logits(model, batch):
    """Logits of the training path, as `save_fused` measures them."""
    model.eval()
    for module in model.modules():
        if isinstance(module, SplitProjection):
            module.train()
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits
    model.eval()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma"])
def test_the_certificate_says_what_a_reader_of_the_folder_would_measure(variant, dtype, tmp_path, batches):
    base, model = build(variant), perturb(expanded(variant, **EVERY), 0.01)
    before = [split_logits(model, batch) for batch in batches]
    model.train()  # and so it comes back
    modes = {name: module.training for name, module in model.named_modules() if "apex" not in name}
    exact = {name: tensor.clone() for name, tensor in fuse(copy.deepcopy(model)).named_parameters()}
    base.save_pretrained(tmp_path / "base")
    found = save_fused(model, tmp_path / "fused", batches=batches, base=tmp_path / "base", dtype=dtype)
    assert found == json.loads((tmp_path / "fused" / "certificate.json").read_text())
    assert not is_expanded(model)
    assert model.dtype == dtype
    assert found["dtype"] == str(dtype).removeprefix("torch.")
    assert {name: module.training for name, module in model.named_modules()} == modes

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype="auto", attn_implementation="eager")
    assert loaded.dtype == dtype
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches]
    old = torch.cat([each[mask].double() for each, mask in zip(before, masks, strict=True)])
    new = torch.cat([logits(loaded, batch)[mask].double() for batch, mask in zip(batches, masks, strict=True)])
    difference = (new - old).abs()
    assert found["drift"]["tokens"] == len(difference)
    assert found["drift"]["max"] == pytest.approx(difference.max().item(), rel=1e-6)
    assert found["drift"]["mean"] == pytest.approx(difference.mean().item(), rel=1e-6)
    assert (found["drift"]["max"] < 1e-5) == (dtype == torch.float32)
    assert found["drift"]["largest_logit"] == pytest.approx(old.abs().max().item(), rel=1e-6)

    start = dict(base.named_parameters())
    asked = torch.cat([(weight - start[name]).flatten() for name, weight in exact.items()]).double()
    kept = dict(loaded.named_parameters())
    rounded = torch.cat([(kept[name].float() - weight).flatten() for name, weight in exact.items()]).double()
    trained = torch.cat(
        [torch.full((weight.numel(),), bool((weight != start[name]).any())) for name, weight in exact.items()]
    )
    assert found["update"]["norm"] == pytest.approx(asked.norm().item(), rel=1e-12)
    assert found["update"]["rounded"] == pytest.approx(rounded[trained].norm().item(), rel=1e-12)
    assert found["update"]["survived"] == pytest.approx(1 - (rounded[trained].norm() / asked.norm()).item())
    assert (found["update"]["survived"] == 1) == (dtype == torch.float32)


def test_a_model_whose_logits_are_not_all_finite_is_not_saved(tmp_path, batches):
    model = expanded("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = 3e38  # the weights are finite
    with pytest.raises(ValueError, match="logits are not finite before fusing"):
        save_fused(model, tmp_path / "fused", batches=batches)
    assert not list(tmp_path.iterdir())


def test_a_model_that_did_not_train_has_no_share_that_survived(tmp_path):
    found = save_fused(expanded("llama"), tmp_path / "fused", base=build("llama"))
    assert found["update"] == {"norm": 0.0, "rounded": 0.0, "survived": None}
    assert found["drift"] is None
    assert verify_folder(tmp_path / "fused")["passed"].all()


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral"])
@pytest.mark.filterwarnings("ignore:.*experts' channels are not units")
def test_a_saved_folder_passes_and_any_damage_fails(variant, tmp_path):
    folder = tmp_path / "fused model ü"
    save_fused(perturb(expanded(variant)), folder)
    table = verify_folder(folder)
    assert list(table.columns) == ["check", "file", "passed", "detail"]
    assert table["passed"].all(), table
    assert set(table["check"]) == {"certificate", "hash", "finite", "loads"}
    assert {path.name for path in folder.iterdir()} == {
        *table.loc[table["check"] == "hash", "file"],
        "certificate.json",
    }
    for name in ("model.safetensors", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        failed = failures(folder)
        assert ("hash", name, "was changed") in failed
        (folder / name).write_bytes(content)
    assert not failures(folder)


def test_every_file_is_certified_and_what_is_put_beside_them_is_found(tmp_path):
    folder, tokenizer = tmp_path / "fused", train_tokenizer(["some text to learn from"] * 9, 300)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}  # the second lies in a folder
    save_fused(expanded("llama"), folder, tokenizer=tokenizer)
    assert not failures(folder)
    named = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert any("/" in name for name in named)
    for name in sorted({*named} - {"certificate.json"}):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert ("hash", name, "was changed") in failures(folder)
        (folder / name).unlink()
        assert ("hash", name, "is missing") in failures(folder)
        (folder / name).write_bytes(content)
    for name in ("modeling.py", "sub/more.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        assert failures(folder) == [("hash", name, "is not in the certificate")]
        (folder / name).unlink()
    more = sorted("qwertzuiopasdf")
    for name in more:
        (folder / name).touch()
    assert [name for _, name, _ in failures(folder)] == more
    for name in more:
        (folder / name).unlink()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note.txt").write_text("of a download")
    assert not failures(folder)


def test_the_card_says_what_is_known_and_is_certified(tmp_path, batches):
    model = build("llama")
    model.config.name_or_path = model.name_or_path = "owner/some-model"
    plan = replace(varied_plan(model, 0), config=ApexConfig(stages=3), stage=2)
    share = trainable_table(expand(model, plan))[["trainable", "total"]].sum()
    facts = {"data": "0123|abc\nd"}
    save_fused(model, tmp_path / "fused", batches=batches, plans=[plan], facts=facts, max_shard_size="8KB")
    card = ModelCard.load(tmp_path / "fused" / "README.md")
    assert card.data.base_model == "owner/some-model"
    assert (card.data.library_name, card.data.tags) == ("transformers", ["apexlib", "apex"])
    assert card.data.pipeline_tag == "text-generation"
    assert "\n# fused\n" in card.text
    sources = sum(len(layer.source) for layer in plan.layers)
    for row in (
        f"| trained | {share['trainable'] / share['total']:.3g} of the parameters |",
        f"| stage 2 | {sources} source, {sources} target, ",
        "| settings | stages 3 |",
        "| weights | float32 |",
        "| data | 0123\\|abc d |",
        "| logits moved by fusing and rounding | at most ",
    ):
        assert f"\n{row}" in card.text
    assert len(list((tmp_path / "fused").glob("model-*.safetensors"))) > 1
    assert not failures(tmp_path / "fused")
    with (tmp_path / "fused" / "README.md").open("a") as file:
        file.write("and it is the best of all")
    assert failures(tmp_path / "fused") == [("hash", "README.md", "was changed")]


def test_a_base_from_a_folder_is_no_model_of_the_hub_and_its_path_is_kept_private(tmp_path):
    build("llama").save_pretrained(tmp_path / "secret" / "base")
    save_fused(expanded("llama"), tmp_path / "fused", base=tmp_path / "secret" / "base")
    card = ModelCard.load(tmp_path / "fused" / "README.md")
    assert card.data.base_model is None
    assert card.data.tags == ["apexlib", "apex"]
    assert "| base | base |" in card.text
    assert "secret" not in str(card)
    model = expanded("llama")
    model.config.name_or_path = model.name_or_path = "/secret/that/is/no/more/base"
    save_fused(model, tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert "| base | base |" in card.text
    assert "secret" not in str(card)
    save_fused(build("llama"), tmp_path / "plain")  # trained by whatever method
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert card.data.tags == ["apexlib"]
    assert "APEX" not in card.text


def test_what_is_pushed_is_the_certified_folder_as_it_is(tmp_path, monkeypatch):
    calls = []

    def upload(_, **given):
        folder = given["folder_path"]
        assert verify_folder(folder)["passed"].all()
        calls.append((given["repo_id"], given["commit_message"], {path.name for path in folder.iterdir()}))

    monkeypatch.setattr(HfApi, "create_repo", lambda _, *given, **options: calls.append((given, options)))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    save_fused(expanded("llama"), tmp_path / "fused", push_to_hub="me/fused")
    made, (*told, files) = calls
    assert made == (("me/fused",), {"private": True, "exist_ok": True})
    assert told == ["me/fused", "Upload fused"]
    assert files == {path.name for path in (tmp_path / "fused").iterdir()}
    assert {"README.md", "certificate.json", "model.safetensors"} <= files

    def refuse(*_, **__):
        raise OSError("not yours")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    model = expanded("llama")
    with pytest.raises(OSError, match="not yours"):
        save_fused(model, tmp_path / "more", push_to_hub="you/fused")
    assert is_expanded(model)
    assert not (tmp_path / "more").exists()


def failures(folder):
    table = verify_folder(folder)
    return [tuple(row) for row in table.loc[~table["passed"], ["check", "file", "detail"]].to_numpy()]


def rewrite(folder, change):
    """Change the weights and record their new hash, so that only the other checks can notice."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    record = json.loads((folder / "certificate.json").read_text())
    record["files"]["model.safetensors"] = file_hash(path)
    (folder / "certificate.json").write_text(json.dumps(record))


def test_each_kind_of_damage_has_its_own_finding(tmp_path):
    folder = tmp_path / "fused"
    save_fused(expanded("llama"), folder)
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert failures(folder) == [("finite", "model.safetensors", "not finite: model.norm.weight")]
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(1.0))
    rewrite(folder, lambda tensors: tensors.update(extra=tensors.pop("model.norm.weight")))
    ((check, _, detail),) = failures(folder)
    assert check == "loads"
    assert "missing_keys: ['model.norm.weight']" in detail
    assert "unexpected_keys: ['extra']" in detail

    (folder / "more.safetensors").write_bytes(b"torn")
    found = failures(folder)
    assert ("hash", "more.safetensors", "is not in the certificate") in found
    assert any(check == "finite" and "cannot be read" in detail for check, _, detail in found)
    (folder / "more.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    found = failures(folder)
    assert ("hash", "model.safetensors", "is missing") in found
    assert found[-1][0] == "loads"
    assert found[-1][2].startswith("OSError: ")


@pytest.mark.parametrize("name", ["Trainer", "pipeline", "NoSuchModel"])
def test_an_architecture_that_is_no_model_is_named(name, tmp_path):
    folder = tmp_path / "fused"
    save_fused(expanded("llama"), folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", name))
    assert ("loads", "", f"architecture ['{name}']: not in transformers") in failures(folder)


def test_weights_of_eight_bits_are_looked_into(tmp_path):
    folder = tmp_path / "fused"
    save_fused(expanded("llama"), folder)
    bad = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    rewrite(folder, lambda tensors: tensors.update(extra=bad))
    assert ("finite", "model.safetensors", "not finite: extra") in failures(folder)
    rewrite(folder, lambda tensors: tensors.update(extra=torch.tensor([1e300], dtype=torch.float64)))
    assert [check for check, *_ in failures(folder)] == ["loads"]


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ("", "Expecting value"),
        ("[]", "need an object with format 1"),
        ('{"format": 2, "files": {}}', "need an object with format 1"),
        ('{"format": 1, "files": {}}', "need the hashes of the model's files"),
        ('{"format": 1, "files": {"a.safetensors": 3}}', "'a.safetensors' is no file of this folder"),
        ('{"format": 1, "files": {"../a.safetensors": "0"}}', "'../a.safetensors' is no file of this folder"),
        ('{"format": 1, "files": {"/a.safetensors": "0"}}', "'/a.safetensors' is no file of this folder"),
        ('{"format": 1, "files": {"b/../../a.safetensors": "0"}}', "'b/../../a.safetensors' is no file of"),
        ('{"format": 1, "files": {"": "0"}}', "'' is no file of this folder"),
    ],
)
def test_a_certificate_that_says_nothing_is_a_finding(content, detail, tmp_path):
    folder = tmp_path / "fused"
    save_fused(expanded("llama"), folder)
    (folder / "certificate.json").write_text(content)
    first = failures(folder)[0]
    assert first[:2] == ("certificate", "certificate.json")
    assert detail in first[2]
    (folder / "certificate.json").unlink()
    assert "certificate.json" in failures(folder)[0][2]


def test_a_folder_in_use_is_refused_before_anything_changes(tmp_path):
    model = perturb(expanded("llama"))
    before = state(model)
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="exists and is not an empty folder; need a new one"):
            save_fused(model, folder)
    other = build("llama", intermediate_size=32)
    with pytest.raises(
        ValueError, match=r"base: model.layers.0.mlp.gate_proj.weight is \(32, 16\) there, \(24, 16\) here"
    ):
        save_fused(model, tmp_path / "fused", base=other)
    with pytest.raises(ValueError, match=r"base: has no model.embed_tokens.weight; need the model from which"):
        save_fused(model, tmp_path / "fused", base=build("gpt2"))
    assert is_expanded(model)
    after = state(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError, match="need a folder that `save_fused` wrote"):
        verify_folder(tmp_path / "fused")


def test_a_save_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    model = expanded("llama")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("apexlib.certificate.write_json", full)
    with pytest.raises(OSError, match="no space left"):
        save_fused(model, tmp_path / "fused")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "fused").mkdir()
    save_fused(model, tmp_path / "fused")  # plain by now, which is as good; an empty folder may be there
    assert verify_folder(tmp_path / "fused")["passed"].all()
