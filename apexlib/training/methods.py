"""What trains in a stage, by method: APEX and the baselines it is compared with, all through one training function."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from apexlib.architectures import family_of
from apexlib.expansion import expand, fuse
from apexlib.inspection import parameter_groups
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.selection import select

Name = Literal["apex", "full", "lora", "hft", "gmt", "direct"]


class Method(Protocol):
    """One stage of a method: `begin` makes a plain model ready to train, `end` makes it plain again."""

    staged: bool  # whether it starts afresh at each stage; otherwise its one stage is the whole run
    assesses: bool  # whether it needs activation statistics
    plans: Sequence[ExpansionPlan]  # those made so far, one a stage; none for methods without

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        """Return the module to train; only what trains requires gradients."""

    def groups(self, model: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]] | None:
        """Return parameter groups of the optimizer, or None for the Trainer's own."""

    def callbacks(self) -> list[TrainerCallback]:
        """Return what has to act during training."""

    def end(self, model: nn.Module) -> PreTrainedModel:
        """Return the plain model."""


def method_of(name: Name, config: ApexConfig, *, lora_rank: int = 16, mask_share: float = 0.6) -> Method:
    """Make a method by its name.

    "apex"; "direct", the same rows without operators (like S²FT, Yang et al. 2024); "full" fine-tuning; "lora" on all
    linear layers, merged at the end (Hu et al. 2021, `lora_rank`); "hft", a random half of each block's matrices, drawn
    anew at each stage (Hui et al. 2024); "gmt", at each step the `mask_share` of the largest gradients of each weight
    (Li et al. 2024).
    """
    makers = {
        "apex": lambda: _Apex(config),
        "direct": lambda: _Direct(config),
        "full": _Full,
        "lora": lambda: _Lora(lora_rank),
        "hft": lambda: _HalfFineTuning(config.seed),
        "gmt": lambda: _GradientMask(mask_share),
    }
    if name not in makers:
        raise ValueError(f"method {name!r}: need one of {', '.join(get_args(Name))}")
    return makers[name]()


class _Full:
    staged = False
    assesses = False
    plans: Sequence[ExpansionPlan] = ()

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        return model.requires_grad_(True)

    def groups(self, model: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]] | None:
        return None

    def callbacks(self) -> list[TrainerCallback]:
        return []

    def end(self, model: nn.Module) -> PreTrainedModel:
        return model


class _Apex(_Full):
    staged = True
    assesses = True

    def __init__(self, config: ApexConfig) -> None:
        self.config = config
        self.plans: list[ExpansionPlan] = []

    def plan(self, statistics: pd.DataFrame, stage: int) -> ExpansionPlan:
        return select(statistics, self.config, stage=stage, previous=self.plans)

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        plan = self.plan(statistics, stage)
        self.plans.append(plan)
        model.requires_grad_(True)
        return expand(
            model,
            plan,
            operator=self.config.operator,
            train_embeddings=self.config.train_embeddings,
            train_norms=self.config.train_norms,
            ffn=self.config.ffn,
            seed=self.config.seed + stage,
        )

    def groups(self, model: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]] | None:
        return parameter_groups(model, rate, operator_lr_scale=self.config.operator_lr_scale, weight_decay=weight_decay)

    def end(self, model: nn.Module) -> PreTrainedModel:
        return fuse(model)


class _Direct(_Apex):
    def plan(self, statistics: pd.DataFrame, stage: int) -> ExpansionPlan:
        plan = super().plan(statistics, stage)
        layers = (
            replace(part, source=(), target=(), direct=tuple(sorted((*part.source, *part.target, *part.direct))))
            for part in plan.layers
        )
        return replace(plan, layers=tuple(layers))


class _Lora(_Full):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    def end(self, model: nn.Module) -> PreTrainedModel:
        return model.merge_and_unload(safe_merge=True)


class _HalfFineTuning(_Full):
    staged = True

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def begin(self, model: PreTrainedModel, stage: int, statistics: pd.DataFrame | None) -> nn.Module:
        model.requires_grad_(True)
        generator = torch.Generator().manual_seed(self.seed * 1000 + stage)
        for matrices in _matrices_by_block(model).values():
            for index in torch.randperm(len(matrices), generator=generator)[: len(matrices) // 2].tolist():
                matrices[index].requires_grad_(False)
        return model


class _GradientMask(_Full, TrainerCallback):
    def __init__(self, share: float) -> None:
        self.share = share

    def callbacks(self) -> list[TrainerCallback]:
        return [self]

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                keep_largest(parameter.grad, self.share)


@torch.no_grad()
def keep_largest(gradient: Tensor, share: float) -> Tensor:
    """Set all but the `share` of entries that are largest in magnitude to zero, in place; at least one stays.

    >>> keep_largest(torch.tensor([1.0, -3.0, 2.0, 0.5]), share=0.5)
    tensor([ 0., -3.,  2.,  0.])
    """
    flat = gradient.abs().flatten()
    kept = max(1, round(share * flat.numel()))
    if kept < flat.numel():
        threshold = flat.float().kthvalue(flat.numel() - kept + 1).values
        gradient.mul_(gradient.abs() >= threshold)
    return gradient


def _matrices_by_block(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Weight matrices of each decoder layer, by the layer's name."""
    layers = family_of(model).layers
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{layers}.") and parameter.dim() == 2:
            blocks.setdefault(name.removeprefix(f"{layers}.").split(".")[0], []).append(parameter)
    return blocks
