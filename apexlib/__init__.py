"""Understand and train the advantageous parameters of language models (APEX, arXiv:2505.24241).

Every public name is imported from its module when it is first used, so that `import apexlib` costs nothing and a table
can be plotted without torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "activation_statistics": "activations",
    "ActivationRecorder": "activations",
    "model_components": "architectures",
    "claims_table": "claims",
    "ApexConfig": "selection",
    "ExpansionPlan": "selection",
    "LayerPlan": "selection",
    "select": "selection",
    "selection_stability": "selection",
    "expand": "expansion",
    "fuse": "expansion",
    "is_expanded": "expansion",
    "parameter_groups": "expansion",
    "trainable_table": "expansion",
    "save_fused": "certificate",
    "verify_folder": "certificate",
    "imbalance_table": "difference",
    "masking_curve": "difference",
    "weight_difference": "difference",
    "biography": "difference",
    "effective_rank": "spectrum",
    "spectrum_table": "spectrum",
    "update_table": "spectrum",
    "head_table": "function_spectrum",
    "hidden_table": "function_spectrum",
    "perplexity": "evaluation",
    "exact_match": "evaluation",
    "multiple_choice": "evaluation",
    "load_corpus": "corpora",
    "load_chat": "corpora",
    "train_tokenizer": "tokenizer",
    "pack": "data",
    "encode_chat": "data",
    "batches": "data",
    "collate": "data",
    "pretrain": "pretraining",
    "TrainingRecord": "training",
    "train_in_stages": "training",
    "plan_budget": "planner",
    "save_table": "records",
    "save_figure": "plotting",
    "draw_figure": "plotting",
    "write_overview": "overview",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apexlib' has no attribute {name!r}")
    return getattr(import_module(f"apexlib.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
