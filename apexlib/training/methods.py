"""What trains in a stage, by method: APEX and the baselines it is compared with, each one class and one entry.

Who trains, plans or measures a method asks its class and names none: a new baseline is a class below `Method` and its
entry in `METHODS`, from here or from outside (`METHODS["bitfit"] = BitFit`).
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apexlib import ApexConfig, ExpansionPlan, expand, fuse, parameter_groups, select
from apexlib.architectures import family_of
from apexlib.fused_ffn import wide
from apexlib.training.sharding import full, local


@dataclass(eq=False)
class Method:
    """One method in one run; each stage, `begin` makes a plain model ready to train and `end` makes it plain again.

    This class is full fine-tuning; the others say what they do differently. With `matrices_only`, it and its like leave
    embeddings, norms and biases alone, as methods do that train no more than matrices of layers. All of it works on the
    meta device too, where tensors have no values.
    """

    staged = False  # whether it starts afresh at each stage; otherwise its one stage is the whole run
    assesses = False  # whether it needs activation statistics, which `plan(statistics, stage)` makes a plan of
    plain = True  # whether `save_pretrained` of what it trains writes a plain model at any step

    config: ApexConfig
    _: KW_ONLY
    lora_rank: int = 16
    lora_scale: float = 2.0
    lora_dora: bool = False
    mask_share: float = 0.6
    matrices_only: bool = False
    plans: list[ExpansionPlan] = field(default_factory=list, init=False)  # made so far, one a stage that assesses

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        """Return the module to train; only what trains requires gradients."""
        model.requires_grad_(not self.matrices_only)
        for parameter in model.get_submodule(family_of(model).layers).parameters() if self.matrices_only else ():
            parameter.requires_grad_(parameter.dim() == 2)
        return model

    def groups(self, model: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]] | None:
        """Return parameter groups of the optimizer, or None for the Trainer's own."""
        return None

    def change_gradients(self, model: nn.Module) -> None:
        """Change the gradients in place, just before the optimizer uses them."""

    def end(self, model: nn.Module) -> PreTrainedModel:
        """Return the plain model."""
        return model


class Apex(Method):
    """Heads and channels expanded by trainable operators, chosen anew at each stage."""

    staged = True
    assesses = True

    def plan(self, statistics: pd.DataFrame, stage: int) -> ExpansionPlan:
        """Choose the units of the next stage and keep the plan."""
        self.plans.append(select(statistics, self.config, stage=stage, previous=self.plans))
        return self.plans[-1]

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        own = ("operator", "train_embeddings", "train_norms", "train_queries", "train_rows", "ffn")
        options = {name: getattr(self.config, name) for name in own} | {"seed": self.config.seed + stage}
        return expand(model.requires_grad_(True), self.plan(statistics, stage), **options)

    def groups(self, model: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]] | None:
        return parameter_groups(model, rate, operator_lr_scale=self.config.operator_lr_scale, weight_decay=weight_decay)

    def end(self, model: nn.Module) -> PreTrainedModel:
        return fuse(model)


class Direct(Apex):
    """The rows that APEX would train, without operators (like S²FT, Yang et al. 2024)."""

    def plan(self, statistics: pd.DataFrame, stage: int) -> ExpansionPlan:
        layers = (
            replace(part, source=(), target=(), direct=tuple(sorted((*part.source, *part.target, *part.direct))))
            for part in super().plan(statistics, stage).layers
        )
        self.plans[-1] = replace(self.plans[-1], layers=tuple(layers))
        return self.plans[-1]


class Lora(Method):
    """LoRA on all linear layers, merged at the end (Hu et al. 2021); `lora_rank` r, and α = `lora_scale` · r.

    With `lora_dora` the norms of rows, each an output's weights, train apart (DoRA, Liu et al. 2024, arXiv:2402.09353).
    """

    plain = False

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        rank = {"r": self.lora_rank, "lora_alpha": self.lora_scale * self.lora_rank, "use_dora": self.lora_dora}
        return get_peft_model(model, LoraConfig(**rank, target_modules="all-linear", task_type="CAUSAL_LM"))

    def end(self, model: nn.Module) -> PreTrainedModel:
        return model.merge_and_unload(safe_merge=model.device.type != "meta")  # the check reads values


class Restarted(Method):
    """Full fine-tuning with a fresh optimizer at each stage, as methods with stages have it."""

    staged = True


class HalfFineTuning(Restarted):
    """Half of the matrices of attention and of the FFN, drawn anew at each stage (Hui et al. 2024, arXiv:2404.18466).

    Of an odd number, such as a gated FFN's three, a layer freezes one more and the next one less.
    """

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        super().begin(model, stage, statistics)
        family, generator = family_of(model), torch.Generator().manual_seed(self.config.seed * 1000 + stage)
        attention = (family.query, family.key, family.value, family.output)
        for layer, block in enumerate(model.get_submodule(family.layers)):
            for roles in (attention, (family.gate, family.up, family.down)):
                names = [name for name in dict.fromkeys(roles) if name]  # a fused projection is one matrix
                drawn = torch.randperm(len(names), generator=generator).tolist()
                for index in drawn[: (len(names) + layer % 2) // 2]:
                    block.get_submodule(names[index]).weight.requires_grad_(False)
        return model


class GradientMask(Method):
    """At each step only the largest gradients of each weight, a share `mask_share` of them (Li et al. 2024)."""

    def change_gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                keep_largest(parameter.grad, self.mask_share)


METHODS: dict[str, Callable[..., Method]] = {
    "apex": Apex,
    "full": Method,
    "restart": Restarted,
    "lora": Lora,
    "hft": HalfFineTuning,
    "gmt": GradientMask,
    "direct": Direct,
}
Name = Literal["apex", "full", "restart", "lora", "hft", "gmt", "direct"]  # written out, for type checkers


def method_of(name: Name, config: ApexConfig, **options: Any) -> Method:
    """Make a method by its name in `METHODS`; `options` are its own."""
    if name not in METHODS:
        raise ValueError(f"method {name!r}: need one of {', '.join(METHODS)}")
    return METHODS[name](config, **options)


@torch.no_grad()
def keep_largest(gradient: Tensor, share: float) -> Tensor:
    """Set all but the `share` of entries that are largest in magnitude to zero, in place; at least one stays."""
    flat, gradient = full(gradient).abs().flatten(), local(gradient)
    kept = max(1, round(share * flat.numel()))
    if kept < flat.numel():
        threshold = flat.to(wide(flat.dtype)).kthvalue(flat.numel() - kept + 1).values
        gradient.mul_(gradient.abs() >= threshold)
    return gradient
