"""Understand and train the advantageous parameters of language models (APEX, arXiv:2505.24241).

Look:     activation_statistics, imbalance_table, masking_curve, silenced, perplexity, exact_match, multiple_choice
Expand:   select, ApexConfig, ExpansionPlan, LayerPlan, expand, trainable_table, parameter_groups, fuse, save_fused,
          verify_folder, plan_budget, register_family
Train:    train_in_stages, TrainingRecord, pretrain
Compare:  weight_difference, biography, effective_rank, spectrum_table, update_table, head_table, hidden_table
Read:     load_corpus, load_chat, train_tokenizer, pack, encode_chat, collate, batches
Record:   claims_table, save_table, draw_figure, save_figure, write_overview

The imports below tell where each name lives, to editors and type checkers; it is imported when it is first used, so
that `import apexlib` costs nothing and a table can be plotted without torch.
"""

import ast as _ast
import typing as _typing
from importlib import import_module as _import_module
from pathlib import Path as _Path

if _typing.TYPE_CHECKING:
    from apexlib.activations import ActivationRecorder as ActivationRecorder
    from apexlib.activations import activation_statistics as activation_statistics
    from apexlib.analysis.budget import plan_budget as plan_budget
    from apexlib.analysis.difference import biography as biography
    from apexlib.analysis.difference import imbalance_table as imbalance_table
    from apexlib.analysis.difference import masking_curve as masking_curve
    from apexlib.analysis.difference import silenced as silenced
    from apexlib.analysis.difference import weight_difference as weight_difference
    from apexlib.analysis.function_spectrum import head_table as head_table
    from apexlib.analysis.function_spectrum import hidden_table as hidden_table
    from apexlib.analysis.spectrum import effective_rank as effective_rank
    from apexlib.analysis.spectrum import spectrum_table as spectrum_table
    from apexlib.analysis.spectrum import update_table as update_table
    from apexlib.architectures import model_components as model_components
    from apexlib.architectures import register_family as register_family
    from apexlib.certificate import save_fused as save_fused
    from apexlib.certificate import verify_folder as verify_folder
    from apexlib.evaluation import exact_match as exact_match
    from apexlib.evaluation import multiple_choice as multiple_choice
    from apexlib.evaluation import perplexity as perplexity
    from apexlib.expansion import expand as expand
    from apexlib.expansion import fuse as fuse
    from apexlib.expansion import is_expanded as is_expanded
    from apexlib.inspection import parameter_groups as parameter_groups
    from apexlib.inspection import trainable_table as trainable_table
    from apexlib.plan import ApexConfig as ApexConfig
    from apexlib.plan import ExpansionPlan as ExpansionPlan
    from apexlib.plan import LayerPlan as LayerPlan
    from apexlib.provenance import save_table as save_table
    from apexlib.selection import select as select
    from apexlib.selection import selection_stability as selection_stability
    from apexlib.suite.figures import draw_figure as draw_figure
    from apexlib.suite.ledger import claims_table as claims_table
    from apexlib.suite.overview import write_overview as write_overview
    from apexlib.suite.pretraining import pretrain as pretrain
    from apexlib.suite.style import save_figure as save_figure
    from apexlib.text.corpora import load_chat as load_chat
    from apexlib.text.corpora import load_corpus as load_corpus
    from apexlib.text.datasets import batches as batches
    from apexlib.text.datasets import collate as collate
    from apexlib.text.datasets import encode_chat as encode_chat
    from apexlib.text.datasets import pack as pack
    from apexlib.text.tokenizer import train_tokenizer as train_tokenizer
    from apexlib.training.stages import TrainingRecord as TrainingRecord
    from apexlib.training.stages import train_in_stages as train_in_stages

else:  # a type checker must not believe that there are other names
    _HOMES = {
        alias.asname: node.module
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
