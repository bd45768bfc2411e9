"""Every family's row against the laws of an expansion, on a tiny random model of it; and rows that are wrong."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import OTHER_LAYOUTS, smallest
from transformers import CONFIG_MAPPING

from apexlib.analysis.family_check import check_family
from apexlib.architectures import FAMILIES, NOT_COVERED, Family, family_of, register_family

MODEL_TYPES = sorted(set(FAMILIES) - {"gemma3"})  # that one is gemma3_text beside a picture


@pytest.mark.case("decoders: every model type of [this table](models.md)", "works")
@pytest.mark.filterwarnings("ignore:.*the experts' channels are not units here")
@pytest.mark.parametrize(("model_type", "layout"), [*((each, {}) for each in MODEL_TYPES), *OTHER_LAYOUTS.items()])
def test_a_family_obeys_the_laws(model_type, layout):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {model_type}")
    check_family(smallest(model_type, **layout))


@pytest.mark.parametrize("model_type", NOT_COVERED)
def test_what_is_not_covered_is_refused_with_the_reason(model_type):
    assert model_type not in FAMILIES
    config = SimpleNamespace(model_type=model_type)
    with pytest.raises(ValueError, match=f"{model_type!r} is not supported, because {NOT_COVERED[model_type][:20]}"):
        family_of(SimpleNamespace(config=config))


WRONG = {
    "norms with weights for each head": ("stablelm", {"coupled": ()}),
    "norms over all heads": ("olmo2", {"coupled": ()}),
    "a bias of position for each head": ("bloom", {"coupled": ()}),
    "sinks for each head": ("gpt_oss", {"coupled": ()}),
    "roles one after another that alternate": ("gpt_neox", {"interleaved": False}),
}


@pytest.mark.filterwarnings("ignore:.*the experts' channels are not units here")
@pytest.mark.parametrize("case", WRONG)
def test_a_row_that_is_wrong_is_refused(case, monkeypatch):
    model_type, changes = WRONG[case]
    check_family(smallest(model_type))
    monkeypatch.setitem(FAMILIES, model_type, replace(FAMILIES[model_type], **changes))
    with pytest.raises(
        ValueError, match=r"(identity in training mode|gradient of .*): off by .*; the row of the family"
    ):
        check_family(smallest(model_type))


@pytest.mark.case("decoders: one of your own, `register_family` and `check_family`", "works")
def test_a_family_from_outside_is_checked_before_it_is_used(monkeypatch):
    monkeypatch.delitem(FAMILIES, "granite")
    with pytest.raises(ValueError, match="model type 'granite' is not supported"):
        check_family(smallest("granite"))
    register_family("granite", Family())
    check_family(smallest("granite"))


def test_a_large_configuration_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match=r"llama: 1\d\d,\d{3},\d{3} parameters; need a small configuration"):
        check_family(smallest("llama", hidden_size=4096, intermediate_size=11008, vocab_size=1000, num_hidden_layers=1))
