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
    "claims_table": "suite.ledger",
    "ApexConfig": "plan",
    "ExpansionPlan": "plan",
    "LayerPlan": "plan",
    "select": "selection",
    "selection_stability": "selection",
    "expand": "expansion",
    "fuse": "expansion",
    "is_expanded": "expansion",
    "parameter_groups": "inspection",
    "trainable_table": "inspection",
    "save_fused": "certificate",
    "verify_folder": "certificate",
    "imbalance_table": "analysis.difference",
    "masking_curve": "analysis.difference",
    "weight_difference": "analysis.difference",
    "biography": "analysis.difference",
    "effective_rank": "analysis.spectrum",
    "spectrum_table": "analysis.spectrum",
    "update_table": "analysis.spectrum",
    "head_table": "analysis.function_spectrum",
    "hidden_table": "analysis.function_spectrum",
    "perplexity": "evaluation",
    "exact_match": "evaluation",
    "multiple_choice": "evaluation",
    "load_corpus": "text.corpora",
    "load_chat": "text.corpora",
    "train_tokenizer": "text.tokenizer",
    "pack": "text.datasets",
    "encode_chat": "text.datasets",
    "batches": "text.datasets",
    "collate": "text.datasets",
    "pretrain": "suite.pretraining",
    "TrainingRecord": "training.stages",
    "train_in_stages": "training.stages",
    "plan_budget": "analysis.budget",
    "save_table": "provenance",
    "save_figure": "suite.figures",
    "draw_figure": "suite.figures",
    "write_overview": "suite.overview",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apexlib' has no attribute {name!r}")
    return getattr(import_module(f"apexlib.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
