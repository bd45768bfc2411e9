"""Understand and train the advantageous parameters of language models (APEX, arXiv:2505.24241).

Look:     activation_statistics, imbalance_table, masking_curve, silenced, perplexity, exact_match, multiple_choice
Expand:   select, ApexConfig, ExpansionPlan, LayerPlan, expand, composed_once, trainable_table, parameter_groups, fuse,
          save_fused, verify_folder, plan_budget, config_for_share, register_family, check_family
Train:    train_in_stages, TrainingRecord, pretrain
Compare:  weight_difference, biography, effective_rank, spectrum_table, update_table, head_table, hidden_table,
          operator_share
Read:     load_corpus, load_chat, train_tokenizer, pack, encode_chat, collate, batches
Pass on:  export_update, apply_update, export_task_vector, export_lora, harness_tasks
Record:   claims_table, save_table, draw_figure, save_figure, write_overview; on screen: explore, a module

The imports below tell where each name lives, to editors and type checkers; it is imported when it is first used, so
that `import apexlib` costs nothing and a table can be plotted without torch.
"""

import ast as _ast
import typing as _typing
from importlib import import_module as _import_module
from pathlib import Path as _Path

if _typing.TYPE_CHECKING:
    from apexlib.activations import ActivationRecorder, activation_statistics
    from apexlib.analysis.adapters import export_lora, export_task_vector
    from apexlib.analysis.budget import config_for_share, plan_budget
    from apexlib.analysis.difference import (
        biography,
        imbalance_table,
        masking_curve,
        selection_stability,
        silenced,
        weight_difference,
    )
    from apexlib.analysis.family_check import check_family
    from apexlib.analysis.function_spectrum import head_table, hidden_table
    from apexlib.analysis.operators_at_work import operator_share
    from apexlib.analysis.spectrum import effective_rank, spectrum_table, update_table
    from apexlib.analysis.update import apply_update, export_update
    from apexlib.architectures import model_components, register_family
    from apexlib.certificate import save_fused, verify_folder
    from apexlib.evaluation import exact_match, multiple_choice, perplexity
    from apexlib.expansion import expand, fuse, is_expanded
    from apexlib.inspection import parameter_groups, trainable_table
    from apexlib.plan import ApexConfig, ExpansionPlan, LayerPlan
    from apexlib.projections import composed_once
    from apexlib.provenance import save_table
    from apexlib.selection import select
    from apexlib.suite.figures import draw_figure, save_figure
    from apexlib.suite.ledger import claims_table
    from apexlib.suite.overview import write_overview
    from apexlib.suite.pretraining import pretrain
    from apexlib.text.corpora import load_chat, load_corpus
    from apexlib.text.datasets import batches, collate, encode_chat, pack
    from apexlib.text.harness import harness_tasks
    from apexlib.text.tokenizer import train_tokenizer
    from apexlib.training.stages import TrainingRecord, train_in_stages

else:  # a type checker must not believe that there are other names
    _HOMES = {
        alias.name: node.module
        for node in _ast.walk(_ast.parse(_Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, _ast.ImportFrom) and node.module.startswith("apexlib.")
        for alias in node.names
    }
    __all__ = sorted(_HOMES)

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'apexlib' has no attribute {name!r}")
        return getattr(_import_module(_HOMES[name]), name)

    def __dir__():
        return __all__
