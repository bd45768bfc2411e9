"""Task vectors and LoRA adapters of an update: what base and adapter compute together, and what is lost."""

import json

import pytest
import torch
from conftest import build
from safetensors.torch import load_file
from test_expansion import expanded, logits, perturb
from test_update import tensors
from transformers import AutoModelForCausalLM

from apexlib import export_lora, export_task_vector, fuse


def pair(folder, variant, *, dtype=torch.float32, size=0.05, **options):
    """Folders of a base and of what all kinds of training made of it."""
    build(variant, dtype=dtype).save_pretrained(folder / "base")
    fuse(perturb(expanded(variant, dtype=dtype, **options), size)).save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, None])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_base_and_task_vector_add_up_to_the_tuned_weights(dtype, stored, tmp_path):
    base, tuned = pair(tmp_path, "llama", dtype=stored)
    table = export_task_vector(base, tuned, tmp_path / "vector", dtype=dtype).set_index("weight")
    vector, before, after = load_file(tmp_path / "vector"), tensors(base), tensors(tuned)
    assert vector.keys() == before.keys() == set(table.index)
    for name, difference in vector.items():
        assert difference.dtype == (dtype or stored)
        exact = after[name].double() - before[name].double()
        lost = (difference.double() - exact).norm().item()
        assert table.loc[name, "norm"] == pytest.approx(exact.norm().item())
        assert table.loc[name, "relative"] == pytest.approx((exact.norm() / before[name].double().norm()).item())
        assert table.loc[name, "rounded"] == pytest.approx(lost / (exact.norm().item() or 1), abs=1e-12)
        assert lost <= exact.norm() * torch.finfo(difference.dtype).eps


@pytest.mark.parametrize("variant", ["llama", "llama-mha-bias", "gpt2", "gemma", "opt", "phi3", "qwen3"])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*fan_in_fan_out")
def test_an_adapter_comes_closer_with_its_rank_and_is_the_update_at_full_rank(variant, norms, tmp_path, batch):
    peft = pytest.importorskip("peft")
    base, tuned = pair(tmp_path, variant, train_norms=norms, size=0.01)
    load = {"dtype": torch.float32, "attn_implementation": "eager"}
    wanted = logits(AutoModelForCausalLM.from_pretrained(tuned, **load), batch)
    before, after = tensors(base), tensors(tuned)
    losses = [(wanted - logits(AutoModelForCausalLM.from_pretrained(base, **load), batch)).norm().item()]
    for rank in (8, 12, 16):
        table = export_lora(base, tuned, tmp_path / f"lora-{rank}", rank=rank).set_index("weight")
        assert set(table.index) == {name for name in before if not torch.equal(before[name], after[name])}
        for name, row in table[table["kept"] == "lora"].iterrows():
            sigma = torch.linalg.svdvals(after[name].double() - before[name].double())
            assert row["error"] == pytest.approx((sigma[rank:].norm() / sigma.norm()).item(), abs=1e-6)
            assert row["rank"] == min(rank, len(sigma))
        assert set(table["kept"]) <= {"lora", "whole"}
        assert (table.loc[table["kept"] == "whole", "error"] == 0).all()
        plain = AutoModelForCausalLM.from_pretrained(base, **load)
        adapted = peft.PeftModel.from_pretrained(plain, tmp_path / f"lora-{rank}")
        losses.append((wanted - logits(adapted, batch)).norm().item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3 * losses[0]


def test_what_is_no_pair_of_models_or_no_rank_is_refused(tmp_path):
    base, tuned = pair(tmp_path, "llama")
    with pytest.raises(ValueError, match="rank=0: need at least 1"):
        export_lora(base, tuned, tmp_path / "lora", rank=0)
    with pytest.raises(ValueError, match=r"no matrix of a linear or an embedding differs"):
        export_lora(base, base, tmp_path / "lora", rank=2)
    with pytest.raises(FileExistsError, match="need a new one"):
        export_lora(base, tuned, tuned, rank=2)
    with pytest.raises(ValueError, match=r"dtype torch.int8: need one of torch.float64"):
        export_task_vector(base, tuned, tmp_path / "vector", dtype=torch.int8)
    build("llama", intermediate_size=32).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"down_proj.weight: \(16, 24\) in base, \(16, 32\) in tuned; need equal"):
        export_task_vector(base, tmp_path / "wider", tmp_path / "vector")
    build("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="need two versions of one model"):
        export_lora(base, tmp_path / "other", tmp_path / "lora", rank=2)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "wider", "other"}


def test_a_base_of_which_no_model_can_be_made_is_refused_by_a_line(tmp_path):
    base, tuned = pair(tmp_path, "llama")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "denault"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no model can be made of its configuration, KeyError: 'denault'"):
        export_lora(base, tuned, tmp_path / "lora", rank=4)
    assert not (tmp_path / "lora").exists()


@pytest.mark.filterwarnings("ignore:.*experts' channels are not units")
def test_what_an_adapter_cannot_hold_is_said(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "experts")
    model = build("mixtral")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "moved")
    table = export_lora(tmp_path / "experts", tmp_path / "moved", tmp_path / "lora", rank=4)
    left = table[table["kept"] == "left out"]
    assert len(left)
    assert left["weight"].str.contains("block_sparse_moe").all()  # experts and their router, which are renamed
    assert (left["error"] == 1).all()
