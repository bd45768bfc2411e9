"""Tiny models of every supported family, built from configs; nothing is downloaded."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 48
SHARED = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}

# one entry per variant: family, and what differs from SHARED
VARIANTS = {
    "llama": ("llama", {}),
    "llama-mha-bias": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 6, "attention_bias": True}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {"n_inner": 24}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "opt": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt-post-norm": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
}
# GPT-2 and GPT-NeoX have no grouped queries; OPT names its FFN width differently
_NOT_TAKEN = {
    "gpt2": {"num_key_value_heads", "intermediate_size"},
    "gpt_neox": {"num_key_value_heads"},
    "opt": {"num_key_value_heads", "intermediate_size"},
}


_PDROP = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    for name in (*(f"{part}_dropout" for part in ("attention", "hidden", "residual")), "dropout", *_PDROP):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def build(
    variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str = "eager", **changes
) -> PreTrainedModel:
    """A random model of `variant` in evaluation mode; biases, norms and all are drawn away from their defaults."""
    family, own = VARIANTS[variant]
    settings = {name: value for name, value in SHARED.items() if name not in _NOT_TAKEN.get(family, ())}
    config = AutoConfig.for_model(family, **(settings | own | changes))
    without_dropout(config)
    options = {"attn_implementation": attention} | ({"experts_implementation": "eager"} if "num_experts" in own else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **options).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.add_(noise, alpha=0.3 if parameter.dim() > 1 else 0.1)
    return model


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
_SIZES |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_GROUPED = {"num_key_value_heads": 2}
_WIDE = {"intermediate_size": 24}
_HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
_MOE = _GROUPED | _WIDE | EXPERTS
OTHER_LAYOUTS = {"gpt_bigcode": {"multi_query": False, "n_head": 4}}  # beside the smallest configuration
_OWN = {  # what a family's smallest configuration needs, or where it has no such field
    "gpt2": {},
    "bloom": {},
    "gpt_bigcode": {},
    "gptj": {"rotary_dim": 2},
    **dict.fromkeys(("helium", "hunyuan_v1_dense", "internlm3", "ministral"), _GROUPED | _WIDE | {"head_dim": 4}),
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt_neox": _WIDE,
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GROUPED | _WIDE | _HEADS),
    "olmoe": _WIDE | {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": _MOE | {"head_dim": 4},
    "ernie4_5_moe": _MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "llama4_text": _MOE | {"head_dim": 4, "intermediate_size_mlp": 24},
    **dict.fromkeys(("qwen3_moe", "mixtral", "granitemoe", "granitemoeshared", "phimoe", "glm4_moe"), _MOE),
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 12},
    "stablelm": _GROUPED | _WIDE | {"qk_layernorm": True},
    "cohere": _GROUPED | _WIDE | {"use_qk_norm": True},
}


def smallest(model_type: str, **changes) -> PretrainedConfig:
    """A configuration of any supported family, as small as can be."""
    return without_dropout(
        AutoConfig.for_model(model_type, **_SIZES | _OWN.get(model_type, _GROUPED | _WIDE) | changes)
    )


@pytest.fixture(autouse=True)
def nothing_assessed():
    """Let no run find what one of another test has assessed."""
    if stages := sys.modules.get("apexlib.training.stages"):
        stages._assessed.clear()


@pytest.fixture
def tiny_model():
    return build


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two sequences, the second padded on the right by three tokens."""
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def tally():
    """Keep what a long test counted, for the table in the README."""
    folder = Path(__file__).parents[1] / "data" / "results" / "reliability"

    def keep(name: str, what: str, tried: int, survived: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        row = {"what": what, "tried": tried, "survived": survived}
        (folder / f"{name}.json").write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    return keep


@pytest.fixture(autouse=True)
def no_engine_left():
    """Forget what `TrainingArguments` with an engine leave in the environment, which other tests would train by."""
    before = {*os.environ}
    yield
    for name in {*os.environ} - before:
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]
