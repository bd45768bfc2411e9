"""Understand and train the advantageous parameters of language models (APEX, arXiv:2505.24241)."""

# The imports below tell where each public name lives, to editors and type checkers, and the text above a group what it
# is for. A name is imported when it is first used, so that `import apexlib` costs nothing and a table can be plotted
# without torch.

import ast as _ast
import typing as _typing
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from itertools import pairwise as _pairwise
from pathlib import Path as _Path
from textwrap import fill as _fill
from textwrap import indent as _indent

if _typing.TYPE_CHECKING:
    """Look: how unequal units are, what is lost without some, how well a model does"""
    from apexlib.activations import ActivationRecorder, activation_statistics
    from apexlib.analysis.difference import imbalance_table, masking_curve, silenced
    from apexlib.architectures import model_components, register_family
    from apexlib.evaluation import perplexity
    from apexlib.text.answers import exact_match, multiple_choice

    """Expand: choose units, expand them, write the result into plain weights"""
    from apexlib.analysis.difference import selection_stability
    from apexlib.analysis.family_check import check_family
    from apexlib.analysis.operators_at_work import operator_share
    from apexlib.expansion import expand, fuse, is_expanded
    from apexlib.inspection import parameter_groups, trainable_table
    from apexlib.plan import ApexConfig, ExpansionPlan, LayerPlan
    from apexlib.projections import composed_once
    from apexlib.selection import select

    """Train: in stages, by APEX or a baseline; what it will cost"""
    from apexlib.analysis.budget import config_for_share, plan_budget
    from apexlib.suite.pretraining import pretrain
    from apexlib.training.stages import TrainingRecord, train_in_stages

    """Measure: what training changed, and effective rank"""
    from apexlib.analysis.difference import biography, weight_difference
    from apexlib.analysis.function_spectrum import head_table, hidden_table
    from apexlib.analysis.spectrum import effective_rank, spectrum_table, update_table

    """Data: text and conversations, as batches"""
    from apexlib.text.corpora import load_chat, load_corpus
    from apexlib.text.datasets import batches, collate, encode_chat, pack
    from apexlib.text.harness import harness_tasks
    from apexlib.text.tokenizer import train_tokenizer

    """Share: folders with a certificate, updates that are exact, adapters"""
    from apexlib.analysis.adapters import export_lora, export_task_vector
    from apexlib.analysis.update import apply_update, export_update
    from apexlib.certificate import save_fused, verify_folder

    """Plot: tables on axes of yours (module plot), figures as files, views in JupyterLab (module explore)"""
    from apexlib import explore, plot
    from apexlib.suite.figures import draw_figure, save_figure

    """Record: tables with their provenance, the ledger of claims, all of a run on one page"""
    from apexlib.provenance import save_table
    from apexlib.suite.ledger import claims_table
    from apexlib.suite.overview import write_overview

else:  # a type checker must not believe that there are other names
    _BODY = _ast.parse(_Path(__file__).read_text(encoding="utf-8")).body[-1].body
    _STARTS = [place for place, node in enumerate(_BODY) if isinstance(node, _ast.Expr)]
    _GROUPS = {
        _BODY[start].value.value: {
            alias.name: node.module if node.module != "apexlib" else f"apexlib.{alias.name}"
            for node in _BODY[start + 1 : end]
            for alias in node.names
        }
        for start, end in _pairwise([*_STARTS, None])
    }
    _HOMES = {name: home for homes in _GROUPS.values() for name, home in homes.items()}
    __all__ = sorted(_HOMES)
    __doc__ = "\n\n".join(
        [__doc__, *(f"{use}:\n{_indent(_fill(', '.join(names), 100), '    ')}" for use, names in _GROUPS.items())]
    )

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'apexlib' has no attribute {name!r}")
        home = _import_module(_HOMES[name])
        return home if home.__name__ == f"apexlib.{name}" else getattr(home, name)

    def __dir__():  # what can be used: `help` imports all of it
        rooms = () if _find_spec("matplotlib") else ("apexlib.suite", "apexlib.plot", "apexlib.explore")
        return [name for name in __all__ if not _HOMES[name].startswith(rooms)]
