"""One training step of one method on one case, as a function without arguments."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from apexlib.analysis.budget import equal_statistics
from apexlib.architectures import model_components
from apexlib.expansion import expand
from apexlib.inspection import parameter_groups
from apexlib.plan import ApexConfig, ExpansionPlan, LayerPlan
from apexlib.selection import select
from apexlib.training.methods import METHODS as PLANNED
from apexlib.training.methods import method_of
from benchmarks.activation_space import expand_on_activations

APEX = ApexConfig(strategy="random")  # scattered units, as a selection by activation has them
SMALL = replace(ApexConfig.preset("2.4%"), strategy="random")
FORMS = (
    "full",  # eager full fine-tuning: what every ratio is to
    "full-fused",  # full fine-tuning through the same fused FFN
    "activation-space",  # the method as its release computes it
    "apex-split",
    "apex",  # 52 %, fused FFN
    "apex-recompute",
    "apex-2.4%",
)
LIKE_FULL = "restart"  # whose step is that of full fine-tuning
METHODS = (*FORMS, *(name for name in PLANNED if name not in (*FORMS, LIKE_FULL)), "dora")  # what the library trains by


@dataclass(frozen=True)
class Case:
    """A model of Llama's form, or one FFN block of it, and the batch of a step."""

    name: str
    kind: str = "model"  # or "block": one gated FFN
    d_model: int = 512
    d_ff: int = 1408
    layers: int = 4
    heads: int = 8
    vocabulary: int = 4096
    batch: int = 8
    length: int = 256
    embeddings: bool = True  # whether APEX trains them; full fine-tuning always does
    autocast: bool = False  # bfloat16
    checkpointing: bool = False
    compiled: bool = False
    threads: int = 1
    device: str = "cpu"
    config: ApexConfig = field(default=APEX)

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass
class Workload:
    """A prepared model, its optimizer, and `step`: forward, backward, update, no gradients left."""

    model: PreTrainedModel
    module: nn.Module  # what runs: the model or its block
    optimizer: torch.optim.Optimizer
    inputs: tuple[Tensor, ...]
    step: Callable[[], None]


def llama_config(case: Case) -> LlamaConfig:
    """The case's model as a configuration."""
    block = case.kind == "block"
    return LlamaConfig(
        hidden_size=case.d_model,
        intermediate_size=case.d_ff,
        num_hidden_layers=1 if block else case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        vocab_size=64 if block else case.vocabulary,
        max_position_embeddings=max(case.length, 64),
        use_cache=False,
    )


def workload(case: Case, method: str, *, seed: int = 0) -> Workload:
    """Build the model, prepare it for `method`, and make its step."""
    torch.manual_seed(seed)
    model = plain = LlamaForCausalLM(llama_config(case)).to(case.device)
    trained_by = method_of(method if method in PLANNED else "full", case.config)
    model, groups = prepare(plain, case, method)  # peft wraps the plain model
    module = plain.get_submodule("model.layers.0.mlp") if case.kind == "block" else model
    module.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    own = {id(parameter) for parameter in module.parameters()}
    groups = [group | {"params": [p for p in group["params"] if id(p) in own]} for group in groups]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    inputs = _inputs(case)
    for part in ([module] if case.kind == "block" else plain.model.layers) if case.compiled else ():
        part.compile()  # layer by layer: one trace for all, and minutes less than for a whole model

    def step() -> None:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.autocast):
            output = module(inputs[0]) if case.kind == "block" else module(input_ids=inputs[0], labels=inputs[0]).loss
        output.backward(inputs[1].to(output.dtype) if case.kind == "block" else None)
        del output
        trained_by.change_gradients(module)
        optimizer.step()
        optimizer.zero_grad()
        if case.kind == "block":
            inputs[0].grad = None

    return Workload(model, module, optimizer, inputs, step)


def prepare(model: PreTrainedModel, case: Case, method: str) -> tuple[PreTrainedModel, list[dict]]:
    """Let `model` train as `method` says; return it and its parameter groups."""
    config = SMALL if method == "apex-2.4%" else replace(case.config, train_embeddings=case.embeddings)
    name, _, form = method.partition("-")
    if method == "full-fused":
        model = _fully_trained_in_parts(model)
    elif method == "activation-space":
        plan = select(equal_statistics(model), config)
        model = expand_on_activations(model, plan, train_embeddings=config.train_embeddings).to(case.device)
    else:
        config = replace(config, ffn=form) if form in ("split", "recompute") else config
        name, own = ("lora", {"lora_dora": True}) if name == "dora" else (name, {})
        model = method_of(name, config, **own).begin(model, 0, equal_statistics(model))
    return model, parameter_groups(model, 1e-4)


def _fully_trained_in_parts(model: PreTrainedModel) -> PreTrainedModel:
    """Full fine-tuning whose FFNs run as the fused function does, with every channel tuned directly."""
    layers = [
        LayerPlan(part.layer, "channel", (), (), tuple(range(part.units)), part.units)
        for part in model_components(model)
        if part.component == "channel"
    ]
    return expand(model, ExpansionPlan(tuple(layers))).requires_grad_(True)


def _inputs(case: Case) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    if case.kind == "model":
        return (torch.randint(case.vocabulary, (case.batch, case.length), generator=generator).to(case.device),)
    shape = (case.batch, case.length, case.d_model)
    x, gradient = (torch.randn(shape, generator=generator).to(case.device) for _ in range(2))
    return x.requires_grad_(), gradient
